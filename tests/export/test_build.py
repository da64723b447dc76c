"""Export through Olive: what it refuses, and the lab's own command on the lab's own file."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from olive.passes.pytorch import kquant

from distillery import olive_workflow
from distillery.errors import ExportError, ModelError
from distillery.export.build import TRIAL, ask_once, export
from distillery.export.fit import ARCHITECTURES, misfit
from distillery.inference.onnx_student import OnnxStudent
from distillery.labels.files import TRAIN_DATA_FILE
from distillery.labels.known import gold_labels, write_known_labels
from distillery.progress import ShowProgress
from distillery.recipe import ExportForm, PromptRecipe, TeacherRecipe
from distillery.records import Example

TinyModel = Callable[[str], Path]
FP32 = ExportForm(precision="fp32")


def test_a_workflow_that_ends_without_a_model_is_an_error(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = SimpleNamespace(has_output_model=lambda: False)
    monkeypatch.setattr("olive.workflows.run", lambda *_args, **_kwargs: nothing)
    with pytest.raises(ExportError, match="Olive ended without a model after build"):
        export(tiny_model("llama"), None, FP32, tmp_path / "out")


def test_a_build_that_lacks_a_file_is_an_error(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_config(_input: object, _passes: object, out: Path, progress: ShowProgress) -> None:
        (out / "model").mkdir()
        (out / "model" / "model.onnx").write_bytes(b"x")

    monkeypatch.setattr("distillery.olive_workflow.run_workflow", without_config)
    with pytest.raises(ExportError, match=r"produced no genai_config\.json"):
        export(tiny_model("llama"), None, FP32, tmp_path / "out")


def test_a_model_that_does_not_load_does_not_count(
    tiny_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    ask_once(tiny_onnx("llama"))
    for file in tiny_onnx("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError):
        ask_once(tmp_path)


def test_an_adapter_apart_needs_an_adapter(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"adapter_apart is true, but full training leaves no adapter"
    ):
        export(tiny_model("llama"), None, ExportForm(adapter_apart=True), tmp_path / "out")


SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
}

QWEN2 = {
    "model_type": "qwen2",
    "num_hidden_layers": 24,
    "use_sliding_window": True,
    "sliding_window": 4096,
}


@pytest.mark.parametrize(
    ("form", "config", "advice"),
    [
        ({"block_size": 64}, SMOLLM2, None),
        ({"block_size": 128}, SMOLLM2, "use block_size: 16 or block_size: 32 or block_size: 64"),
        (
            {"precision": "int8", "algorithm": "rtn", "block_size": 128},
            SMOLLM2,
            "rtn in blocks of 128 does not fit",
        ),
        ({"block_size": 32, "adapter_apart": True}, SMOLLM2, None),
        (
            {"block_size": 64, "adapter_apart": True},
            SMOLLM2,
            "use block_size: 16 or block_size: 32 or algorithm: rtn",
        ),
        ({"block_size": 64, "adapter_apart": True, "algorithm": "rtn"}, SMOLLM2, None),
        ({"precision": "fp16", "block_size": 128}, SMOLLM2, None),
        ({}, SMOLLM2 | {"hidden_size": 100}, "use precision: fp16"),
        ({}, SMOLLM2 | {"head_dim": 16}, "use block_size: 16"),
        (
            {"precision": "fp32"},
            SMOLLM2 | {"rope_parameters": {"rope_type": "yarn"}},
            "choose a base model without them",
        ),
        (
            {"precision": "fp32"},
            QWEN2 | {"layer_types": ["full_attention", "sliding_attention"]},
            "choose another base model",
        ),
        ({"precision": "fp32"}, QWEN2 | {"max_window_layers": 21}, "choose another base model"),
        ({"precision": "fp32"}, QWEN2 | {"max_window_layers": 24}, None),
        (
            {"precision": "fp32"},
            QWEN2 | {"max_window_layers": 21, "use_sliding_window": False},
            None,
        ),
        ({}, {"text_config": SMOLLM2}, None),
    ],
)
def test_a_form_that_does_not_fit_the_base_is_told_before_it_is_built(
    form: dict[str, Any], config: dict[str, Any], advice: str | None
) -> None:
    found = misfit(ExportForm(**form), config)
    assert found is None if advice is None else advice in str(found)


def test_the_architectures_are_those_that_model_builder_has_a_branch_for() -> None:
    from onnxruntime_genai.models import builder

    source = Path(builder.__file__).read_text()
    branches = re.findall(r'config\.architectures\[0\] == "(\w+)"', source)
    assert set(ARCHITECTURES) == set(branches)
    assert misfit(FP32, {"architectures": ["Phi3ForCausalLM"]}) is None
    found = misfit(FP32, {"architectures": ["OPTForCausalLM"]})
    assert "ModelBuilder builds no OPTForCausalLM; choose" in str(found)


@pytest.mark.parametrize(
    "form", [{"block_size": 128}, {"block_size": 128, "precision": "int8", "algorithm": "rtn"}]
)
def test_what_olive_itself_refuses_is_one_line(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: dict[str, Any]
) -> None:
    with pytest.raises(ExportError, match="in blocks of 128 does not fit"):
        export(tiny_model("llama"), None, ExportForm(**form), tmp_path / "out")
    monkeypatch.setattr("distillery.export.build.misfit", lambda *_: None)
    with pytest.raises(
        ExportError, match=r"^Olive failed at .* \((ValueError|AssertionError): [^\n]*\)$"
    ):
        export(tiny_model("llama"), None, ExportForm(**form), tmp_path / "out")


def test_float16_is_built_for_a_processor_and_is_near(
    tiny_model: TinyModel, tiny_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    shown = []
    form = ExportForm(precision="fp16")
    export(tiny_model("llama"), None, form, tmp_path, progress=lambda *told: shown.append(told))
    assert shown == [
        (0, 2, "loading Olive"),
        (0, 2, "pass 1 of 2, build"),
        (1, 2, "pass 2 of 2, half"),
        (2, 2, "asking one question"),
    ]
    half, exact = OnnxStudent(tmp_path, threads=1), OnnxStudent(tiny_onnx("llama"), threads=1)
    ids = exact.tokenizer.encode_chat(TRIAL)
    assert half.next_token_logprobs(ids) == pytest.approx(exact.next_token_logprobs(ids), abs=0.05)
    size = {
        folder: sum(file.stat().st_size for file in folder.iterdir())
        for folder in (tmp_path, tiny_onnx("llama"))
    }
    assert size[tmp_path] < 0.8 * size[tiny_onnx("llama")]


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "fp32"},
        {"precision": "fp16"},
        {"algorithm": "rtn", "share_embeddings": True},
        {"precision": "int8", "algorithm": "dynamic"},
    ],
)
def test_all_logits_are_those_of_every_token_of_the_prompt(
    tiny_model: TinyModel, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """The other forms give those after the last token alone; the student's answers are the same."""
    ids = list(range(3, 23))
    found = {}
    for all_logits, positions in ((False, 1), (True, len(ids))):
        folder = tmp_path / str(all_logits)
        form = ExportForm(all_logits=all_logits, **settings)
        export(tiny_model("llama"), None, form, folder)
        assert logits_of(folder, ids).shape == (1, positions, 512)
        found[all_logits] = OnnxStudent(folder, threads=1).next_token_logprobs(ids)
    assert found[True] == pytest.approx(found[False], abs=1e-3)


def logits_of(folder: Path, ids: list[int]) -> Any:
    """Return what the model itself gives for a prompt, as lm-evaluation-harness reads it."""
    import numpy as np
    import onnxruntime_genai

    og: Any = onnxruntime_genai
    model = og.Model(str(folder))
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.append_tokens(np.array(ids, dtype=np.int32))
    return generator.get_output("logits")


def test_gptq_is_calibrated_on_the_prompts_it_is_given(
    tiny_model: TinyModel, tiny_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    """Its own prompts keep the model nearer to itself on them than others do; embeddings and head
    are quantised too."""
    exact = OnnxStudent(tiny_onnx("llama"), threads=1)
    asked = [
        {"role": "user", "content": f"Which comes first?\n(A) {n} (B) {n * 7}"} for n in range(24)
    ]
    own = [exact.tokenizer.encode_chat([message]) for message in asked]
    other = [
        [random.Random(n).randrange(512) for n in range(40 * row, 40 * row + 40)]
        for row in range(24)
    ]
    apart, size = {}, {}
    for name, prompts in (("own", own), ("other", other)):
        file, out = tmp_path / f"{name}.jsonl", tmp_path / name
        file.write_text("".join(f"{json.dumps(ids)}\n" for ids in prompts))
        export(tiny_model("llama"), None, ExportForm(algorithm="gptq"), out, calibration=file)
        found = OnnxStudent(out, threads=1)
        errors = [
            abs(found.next_token_logprobs(ids) - exact.next_token_logprobs(ids)).mean()
            for ids in own
        ]
        apart[name] = sum(errors) / len(errors)
        size[name] = sum(path.stat().st_size for path in out.glob("model.onnx*"))
    assert apart["own"] < 0.9 * apart["other"]
    exact_size = sum(path.stat().st_size for path in tiny_onnx("llama").glob("model.onnx*"))
    assert size["own"] == size["other"] < 0.4 * exact_size


def test_gptq_without_prompts_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="gptq needs the task's prompts"):
        export(tiny_model("llama"), None, ExportForm(algorithm="gptq"), tmp_path / "out")


def test_k_quant_is_searched_in_slices_and_for_a_tied_head_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = kquant.kquant_find_qparams
    calls = []

    def counted(weight: torch.Tensor, **settings: Any) -> Any:
        calls.append(weight.shape)
        return whole(weight, **settings)

    monkeypatch.setattr(kquant, "kquant_find_qparams", counted)
    monkeypatch.setattr(olive_workflow, "SLICE", 5 * 64)
    matrix = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"group_size": 32, "maxq": 15, "minq": 0}
    with olive_workflow.frugal_k_quant():
        found = kquant.kquant_find_qparams(matrix, **settings)
        assert calls == [(5, 64), (5, 64), (2, 64)]
        again = kquant.kquant_find_qparams(matrix.clone(), **settings)
        assert len(calls) == 3
        kquant.kquant_find_qparams(matrix, **{**settings, "maxq": 255})
        assert len(calls) == 6
    assert kquant.kquant_find_qparams is counted
    for one, other, expected in zip(found, again, whole(matrix, **settings), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, expected)


@pytest.mark.slow
def test_olive_finetune_takes_the_training_rows_as_they_are(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    rows = [
        Example(
            example_id=str(i),
            question=f"number {i}",
            choices=("odd", "even"),
            answer_key="BA"[i % 2],
        )
        for i in range(40)
    ]
    write_known_labels(
        rows, gold_labels(rows), PromptRecipe(), TeacherRecipe(kind="gold"), tmp_path
    )
    first = json.loads((tmp_path / TRAIN_DATA_FILE).read_text().splitlines()[0])
    assert list(first) == ["Question", "Answer"]
    command = [
        sys.executable,
        "-m",
        "olive",
        "finetune",
        "--method",
        "lora",
        "-m",
        str(tiny_model("llama")),
    ]
    command += [
        "--data_name",
        "json",
        "--data_files",
        str(tmp_path / TRAIN_DATA_FILE),
        "--max_steps",
        "1",
    ]
    command += ["--text_template", "<|user|>{Question}<|end|><|assistant|>{Answer}<|end|>"]
    command += ["--torch_dtype", "float32", "-o", str(tmp_path / "tuned")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert list((tmp_path / "tuned").rglob("adapter_model.safetensors")), (
        done.stdout[-2000:] + done.stderr[-2000:]
    )
