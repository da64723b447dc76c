"""Foundry Local: what is written and registered, and that it answers as we do."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_model import build_tiny_model

from distillery.errors import DistilleryError, ModelError, RegistryError
from distillery.inference.decoder import ADAPTER_FILE
from distillery.inference.onnx_student import OnnxStudent
from distillery.models.class_tokens import ClassTokens
from distillery.processes import environment_without_secrets
from distillery.prompts import letter_ids, render_messages
from distillery.recipe import PromptRecipe
from distillery.records import Example
from distillery.registry.manifest import copy_with_manifest, provenance_of, verify_before_loading
from distillery.serving import foundry
from distillery.serving.foundry import register_in_foundry

Build = Callable[..., Path]
PROJECT = Path(__file__).resolve().parents[2]
ASK = PROJECT / "tests" / "support" / "foundry_answers.py"
# It writes down what it is given, and refuses the model "bad".
STAND_IN = """#!{python}
import pathlib, sys

pathlib.Path(__file__).with_name("given").write_text("\\n".join(sys.argv[2:]))
if "bad:1" in sys.argv:
    sys.exit("warning: something\\nload failed: no such operator")
"""


def test_foundry_local_is_given_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEACHER_MODEL_KEY", "HF_TOKEN", "AZURE_CLIENT_SECRET"):
        monkeypatch.setenv(name, "a secret")
    assert "a secret" not in environment_without_secrets().values()
    assert "PATH" in environment_without_secrets()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script in place of Foundry Local's Python; the file that it writes."""
    python = tmp_path / "foundry" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o700)
    monkeypatch.setattr(foundry, "ENVIRONMENT", tmp_path / "foundry")
    return python.with_name("given")


def downloaded(folder: Path, out: Path) -> Path:
    """A copy of a model's folder with the manifest that a download has."""
    copy_with_manifest(folder, out, "mood", {"prompt": PromptRecipe().model_dump(mode="json")})
    return out


def test_a_downloaded_folder_is_registered_by_its_name_and_stays_verified(
    tiny_onnx: Build, tmp_path: Path, stand_in: Path
) -> None:
    folder = downloaded(tiny_onnx("llama"), tmp_path / "student")
    assert register_in_foundry(folder, "shop") == "mood:1"
    assert stand_in.read_text().split("\n") == [str(folder), "mood:1", "shop"]
    assert json.loads((folder / "inference_model.json").read_text()) == {
        "Name": "mood:1",
        "PromptTemplate": {
            "assistant": "{Content}",
            "prompt": "<|im_start|>user\n{Content}<|im_end|>\n<|im_start|>assistant\n",
        },
    }
    verify_before_loading(folder)
    # Registered again from here, the file is not taken along.
    again = downloaded(folder, tmp_path / "again")
    assert not (again / "inference_model.json").exists()
    verify_before_loading(again)
    assert register_in_foundry(folder, "shop", "mine:7") == "mine:7"
    assert json.loads((folder / "inference_model.json").read_text())["Name"] == "mine:7"


def test_an_exported_folder_is_registered_by_its_own_name(
    tiny_onnx: Build, tmp_path: Path, stand_in: Path
) -> None:
    folder = tmp_path / "exported"
    shutil.copytree(tiny_onnx("llama"), folder)
    assert register_in_foundry(folder, "shop") == "exported:1"
    assert stand_in.is_file()


def refused(kind: type[DistilleryError], folder: Path, *arguments: Any) -> str:
    with pytest.raises(kind) as raised:
        register_in_foundry(folder, *arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_can_not_be_registered_is_one_line(
    tiny_onnx: Build, tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "two words"
    shutil.copytree(tiny_onnx("llama"), folder)
    assert "'two words': no name for Foundry Local; give --name" in refused(
        ModelError, folder, "shop"
    )
    assert "--app 'my shop'" in refused(ModelError, folder, "my shop", "mine")
    assert "genai_config.json: can't be read" in refused(ModelError, tmp_path, "shop")
    assert "does not take it (load failed: no such operator)" in refused(
        ModelError, folder, "shop", "bad"
    )
    stand_in.unlink()
    (folder / ADAPTER_FILE).write_bytes(b"")
    assert "export.adapter_apart" in refused(ModelError, folder, "shop", "mine")
    ClassTokens(classes=("yes", "no"), tokens=(301, 305)).write(folder)
    assert "answers with a class" in refused(ModelError, folder, "shop", "mine")
    altered = downloaded(tiny_onnx("llama"), tmp_path / "altered")
    (altered / "extra.txt").write_text("")
    assert "added or altered" in refused(RegistryError, altered, "shop")
    monkeypatch.setattr(foundry, "ENVIRONMENT", tmp_path / "nothing")
    assert "nothing/bin/python: not there" in refused(ModelError, folder, "shop", "mine")
    assert "run `make foundry`" in refused(ModelError, folder, "shop", "mine")
    assert not stand_in.exists()


def student_of_letters(arch: str, folder: Path) -> Path:
    """A random model of which the likeliest token after most prompts is one of the letters A to C:
    all other tokens have the logit 0. With its manifest, as a download has it."""
    import torch
    from onnxruntime_genai.models.builder import create_model
    from transformers import AutoModelForCausalLM

    from distillery.models.load import load_tokenizer
    from distillery.prompts import TransformersTokenizer

    checkpoint = build_tiny_model(arch, folder / "checkpoint", tied=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    letters = letter_ids(TransformersTokenizer(load_tokenizer(checkpoint)), 3)
    head = torch.zeros_like(model.lm_head.weight)
    head[letters] = model.lm_head.weight[letters]
    model.lm_head.weight.data = head
    model.save_pretrained(checkpoint)
    # Its decorator, torch.no_grad, hides its signature.
    create_model(  # type: ignore[call-arg, type-var]
        arch, str(checkpoint), str(folder / "onnx"), "int4", "cpu", str(folder), hf_remote=False
    )
    return downloaded(folder / "onnx", folder / "student")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "phi4mini"])
def test_foundry_local_answers_as_we_do(arch: str, tmp_path: Path) -> None:
    """Foundry Local gives no log-probabilities, so that the letters and the lengths of the prompts
    are compared, where the likeliest token is a letter."""
    folder = student_of_letters(arch, tmp_path)
    environment = os.environ | {"HOME": str(tmp_path)}
    command = [sys.executable, "-m", "distillery.cli", "models", "foundry", str(folder)]
    for _ in range(2):
        done = subprocess.run(
            command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"mood:1 in Foundry Local's catalog of distillery: {folder}\n"

    prompt = PromptRecipe.model_validate((provenance_of(folder) or {})["prompt"])
    rows = []
    for number in range(60):
        text = f"Where is the person {number} who would like to keep bread?"
        rows.append(
            Example(example_id=str(number), question=text, choices=("oven", "river", str(number)))
        )
    conversations = [render_messages(row, prompt) for row in rows]
    done = subprocess.run(
        [str(PROJECT / ".venv-foundry" / "bin" / "python"), str(ASK), "mood:1", "distillery"],
        input=json.dumps(conversations),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    student = OnnxStudent(folder)
    letters = []
    for row, messages, theirs in zip(rows, conversations, json.loads(done.stdout), strict=True):
        ids = student.tokenizer.encode_chat(messages)
        assert theirs["prompt_tokens"] == len(ids)
        likeliest = int(student.decoder.prefill(ids).argmax())
        if likeliest in student.letter_ids(3):
            letters.append(theirs["text"])
            assert theirs["text"] == student.answer(row, prompt).letter
    assert len(letters) >= 30
    assert len(set(letters)) > 1
