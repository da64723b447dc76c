"""Make a model's folder known to Foundry Local, Microsoft's runtime for models on your own machine.

Its Python package needs another ONNX Runtime than Distillery, so it is installed in an environment
of its own, whose Python runs foundry_registration.py.
"""

import json
import os
import re
import subprocess
from pathlib import Path

from distillery.errors import ModelError
from distillery.inference.decoder import ADAPTER_FILE, read_config
from distillery.models.class_tokens import read_class_tokens
from distillery.models.load import load_tokenizer
from distillery.models.onnx_folder import check_model_folder
from distillery.processes import environment_without_secrets
from distillery.prompts import TransformersTokenizer
from distillery.registry.manifest import INFERENCE_MODEL, manifest_of, verify_before_loading

ENVIRONMENT = Path(".venv-foundry")
SCRIPT = Path(__file__).with_name("foundry_registration.py")

NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]*(:[1-9][0-9]*)?")
"""The names that Foundry Local takes, with or without a version."""

LONGEST_S = 600.0
"""How long Foundry Local may take to load a model."""

APP = re.compile(r"[a-zA-Z0-9._-]+")
"""What Foundry Local takes as the app_name of a program."""


def register_in_foundry(folder: Path, app: str, name: str | None = None) -> str:
    """Write inference_model.json into the folder of an exported model, register the folder in
    Foundry Local for programs with the app_name `app`, and return the model's id, NAME:VERSION.

    `name` is NAME or NAME:VERSION; by default the model's name in manifest.json, or that of the
    folder, and version 1. An earlier registration of the same id is replaced. The folder is not
    copied. Raises ModelError where the environment is absent, for a model that Foundry Local can't
    ask as it was trained, for names that it does not take, and where it can't load the model;
    RegistryError for a registered model that was altered or is not signed as DISTILLERY_VERIFY_KEY
    asks for.
    """
    python = foundry_python()
    verify_before_loading(folder)
    read_config(folder)
    # Its ONNX Runtime is another one than ours, so that the graph is read here.
    check_model_folder(folder)
    refuse_other_answers(folder)
    folder = folder.resolve()
    if name is None:
        manifest = manifest_of(folder)
        name = manifest.model if manifest else folder.name
    if not NAME.fullmatch(name):
        raise ModelError(
            f"{name!r}: no name for Foundry Local; give --name letters, digits, dots, hyphens and "
            "underscores, and if you like a version such as :2"
        )
    if not APP.fullmatch(app):
        raise ModelError(f"--app {app!r}: use letters, digits, dots, hyphens and underscores")
    model_id = name if ":" in name else f"{name}:1"
    write_inference_model(folder, model_id)
    command = [str(python), str(SCRIPT), str(folder), model_id, app]
    try:
        done = subprocess.run(  # noqa: S603 - our own script
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment_without_secrets(),
            timeout=LONGEST_S,
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"{folder}: Foundry Local did not load it within {LONGEST_S:.0f} s; end programs that "
            "take memory, and try again"
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise ModelError(
            f"{folder}: Foundry Local does not take it ({lines[-1].strip()[:300]}); does "
            "`distillery ask` on the folder answer?"
        )
    return model_id


def foundry_python() -> Path:
    """Return the Python of the environment that has Foundry Local.

    Raises ModelError where there is none in the working folder."""
    python = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.is_file():
        raise ModelError(
            f"{python}: not there; Foundry Local needs an environment of its own: run "
            f"`make foundry`, or `python3 -m venv {ENVIRONMENT}` and then "
            f'`{python} -m pip install "foundry-local-sdk<3"`'
        )
    return python.absolute()


def refuse_other_answers(folder: Path) -> None:
    """Raise ModelError for a model whose answers are not the text that it generates."""
    if read_class_tokens(folder) is not None:
        raise ModelError(
            f"{folder}: answers with a class, while Foundry Local generates text; serve it by "
            "`distillery serve`, or train a student with student.prompt.answer: text"
        )
    if (folder / ADAPTER_FILE).is_file():
        raise ModelError(
            f"{folder}: Foundry Local would leave {ADAPTER_FILE} aside and answer as the base "
            "model; export it without export.adapter_apart"
        )


def write_inference_model(folder: Path, model_id: str) -> None:
    """Write inference_model.json: the model's id, and the prompt of a single user message in the
    chat template of the folder's tokenizer, where {Content} stands for the message."""
    tokenizer = TransformersTokenizer(load_tokenizer(folder))
    prompt = tokenizer.chat_text([{"role": "user", "content": "{Content}"}])
    values = {
        "Name": model_id,
        "PromptTemplate": {"assistant": "{Content}", "prompt": prompt},
    }
    text = json.dumps(values, ensure_ascii=False, indent=1) + "\n"
    (folder / INFERENCE_MODEL).write_text(text, encoding="utf-8", newline="\n")
