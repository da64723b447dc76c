"""Every call that loads a model, a tokenizer or a data set says whether code that comes with it may
run: what Transformers is not told, it asks whoever sits at the terminal."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from parsing import parsed

from distillery.olive_workflow import explicit_loading

ROOT = Path(__file__).parents[2]

ANSWERS = {
    "from_pretrained": "trust_remote_code",
    "from_config": "trust_remote_code",
    "load_dataset": "trust_remote_code",
    "create_model": "hf_remote",
}
"""The loaders by their names, with the argument that is the answer."""

SILENT = ("PeftModel.from_pretrained", "create_model_version")
"""peft reads weights and a JSON file, and no code."""


def silent_loads(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of each call of a loader without its answer."""
    for node in ast.walk(parsed(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        answer = ANSWERS.get(called.rpartition(".")[2])
        if answer is None or called.endswith(SILENT):
            continue
        if answer not in [argument.arg for argument in node.keywords]:
            yield node.lineno, called


@pytest.mark.security
def test_every_loader_says_whether_code_may_run() -> None:
    silent, files = [], 0
    for folder in ("distillery", "tasks", "flows", "benchmarks", "deployments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            files += 1
            for line, called in silent_loads(path.read_text(encoding="utf-8")):
                silent.append(f"{path.relative_to(ROOT)}:{line}: {called}")
    assert files > 100
    assert silent == []


def test_a_silent_loader_is_found() -> None:
    assert list(silent_loads("AutoConfig.from_pretrained(folder)")) == [
        (1, "AutoConfig.from_pretrained")
    ]
    assert list(silent_loads("X.from_pretrained(folder, trust_remote_code=own)")) == []


@pytest.mark.security
@pytest.mark.parametrize("remote_code", [False, True])
def test_olive_says_it_too(remote_code: bool) -> None:
    from olive.common.hf import utils

    told: list[dict[str, object]] = []

    class AutoModelForTest:
        @classmethod
        def from_pretrained(cls, _name: str, **settings: object) -> None:
            told.append(settings)

    class AutoTokenizer(AutoModelForTest):
        pass

    before = utils.from_pretrained
    with explicit_loading(remote_code):
        utils.from_pretrained(AutoModelForTest, "folder", "model")
        utils.from_pretrained(AutoTokenizer, "folder", "tokenizer", trust_remote_code=None)
    assert utils.from_pretrained is before
    assert told == [
        {"trust_remote_code": remote_code, "use_safetensors": True},
        {"trust_remote_code": remote_code},
    ]
