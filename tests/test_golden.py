"""What is kept between versions: the forms of manifests, records, results and checkpoints.

golden/ holds each form as it was written when it last changed: manifest-1.json and, once it has
changed, manifest-2.json. Every one of them must be read, and what is written now must be the last
one. If a form has to change, say why:

    PYTHONPATH=.:tests/support .venv/bin/python tests/test_golden.py "outcome: why"

This writes the next file, and the reason into golden/reasons.json. A file that is there is never
written again: somebody's store has it.
"""

import json
import os
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from finished_run import ARTIFACT, finished_run
from one_folder import OneFolder
from prefect.results import ResultRecord, ResultRecordMetadata  # type: ignore[attr-defined]
from prefect.serializers import JSONSerializer
from registered_student import provenance

from distillery.recipe import Recipe
from distillery.records import (
    CurvePoint,
    EvaluationReport,
    JudgedVersions,
    OnnxModel,
    Outcome,
    Predictions,
    Promotion,
    RegisteredModel,
    StudentCheckpoint,
    TeacherLabels,
)
from distillery.registry.manifest import (
    Manifest,
    copy_with_manifest,
    manifest_of,
    verify_before_loading,
)
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.manifest import MANIFEST, read_manifest
from distillery.training.checkpoint import STATE_FILE, TrainingState
from tasks.stage import is_hit

GOLDEN = Path(__file__).with_name("golden")
REASONS = GOLDEN / "reasons.json"

Write = Callable[[Path], bytes]

CODE = {"distillery": "0.1.0", "code_sha256": "c" * 64, "python": "3.11.9", "packages": {"x": "1"}}


def model_folder(folder: Path) -> Path:
    """Return a folder of files that stand for a model."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "genai_config.json").write_text("{}")
    (folder / "tokenizer" / "vocabulary.txt").write_text("grüße\n", encoding="utf-8")
    return folder


def manifest(folder: Path) -> bytes:
    """Return the manifest.json of a registered model, with the provenance of a run."""
    made = json.dumps(provenance(folder / "made") | CODE)
    made = made.replace(ArtifactStore().url, "the-store")
    content = folder / "registered"
    copy_with_manifest(model_folder(folder / "model"), content, "mine", json.loads(made))
    return (content / "manifest.json").read_bytes()


def artifact(folder: Path) -> bytes:
    """Return the artifact.json of a folder in the store."""
    stored = ArtifactStore().put(model_folder(folder / "model"))
    return (Path(ArtifactStore().url) / stored.sha256 / MANIFEST).read_bytes()


def outcome(_folder: Path) -> bytes:
    """Return a run's record, with all that a run may tell."""
    registered = RegisteredModel(
        artifact=ARTIFACT,
        name="desk",
        version="2",
        registry="local",
        role="champion",
        manifest_sha256="d" * 64,
        model_sha256="e" * 64,
        rows_sha256="f" * 64,
    )
    whole = finished_run(
        registered=registered,
        rejected=registered,
        promotion=Promotion(result="promoted", champion="2", reason="in place of version 1"),
        judged=JudgedVersions(name="desk", rows=12, versions=("2", "1")),
        page=ARTIFACT,
    )
    return whole.model_dump_json(indent=1).encode()


def result(folder: Path) -> bytes:
    """Return a stage's result, as Prefect keeps it in the store."""
    (folder / "predictions").mkdir()
    (folder / "predictions" / "predictions.jsonl").write_text("{}\n")
    stored = ArtifactStore().put(folder / "predictions")
    record = Predictions(
        artifact=stored.model_copy(update={"uri": f"the-store/{stored.sha256}"}),
        produced_by="mine-run-1",
        run_id="0-1",
        seconds=2.5,
        rows=1,
        failed=0,
    )
    metadata = ResultRecordMetadata(
        storage_key="k", serializer=JSONSerializer(), prefect_version="3.8.8"
    )
    return ResultRecord(result=record, metadata=metadata).serialize()


def training_state() -> TrainingState:
    """Return the state of a training that has not begun."""
    weights = {"head": torch.nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 0.25]]))}
    optimiser = torch.optim.AdamW(weights.values(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))
    return TrainingState("f" * 64, weights, optimiser, schedule)


def checkpoint(folder: Path) -> bytes:
    """Return the state.pt of a training after a step, with the best weights so far."""
    torch.manual_seed(0)
    state = training_state()
    state.weights["head"].grad = torch.ones(2, 2)
    state.optimiser.step()
    state.schedule.step()
    state.step, state.losses, state.accuracy = 1, [0.5], 0.75
    state.curve = [CurvePoint(step=1, loss=0.5, validation_accuracy=0.75, validation_loss=0.25)]
    state.keep_if_best(0.25)
    state.right, state.epochs = [True, False], 1
    state.save(OneFolder(folder / "kept"))
    return (folder / "kept" / STATE_FILE).read_bytes()


FORMS: dict[str, tuple[str, Write]] = {
    "manifest": ("json", manifest),
    "artifact": ("json", artifact),
    "outcome": ("json", outcome),
    "result": ("json", result),
    "checkpoint": ("state", checkpoint),
}


def files_of(form: str) -> list[Path]:
    """Return the golden files of a form, the oldest first."""
    kind = FORMS[form][0]
    return sorted(GOLDEN.glob(f"{form}-*.{kind}"), key=lambda file: int(file.stem.split("-")[1]))


def content_of(file: bytes) -> Any:
    """Return what a form holds: its text, or the values of a checkpoint, which another version of
    torch writes in other bytes."""
    if not file.startswith(b"PK"):
        return file.decode()
    values = torch.load(BytesIO(file), weights_only=True)
    return in_lists(values | {"cuda_random": None})


def in_lists(value: Any) -> Any:
    """Return a value with its tensors as lists."""
    if isinstance(value, torch.Tensor):
        return in_lists(value.tolist())
    if isinstance(value, dict):
        return {str(key): in_lists(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [in_lists(each) for each in value]
    return round(value, 6) if isinstance(value, float) else value


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_what_was_written(form: str, tmp_path: Path) -> None:
    assert content_of(FORMS[form][1](tmp_path)) == content_of(files_of(form)[-1].read_bytes()), (
        f"this changes files that exist; see {Path(__file__).name}"
    )


def test_every_golden_file_has_its_reason() -> None:
    golden = {file.name for form in FORMS for file in files_of(form)}
    assert json.loads(REASONS.read_text("utf-8")).keys() == golden
    assert all(files_of(form) for form in FORMS)


@pytest.mark.parametrize("file", files_of("manifest"), ids=lambda file: file.name)
def test_manifests_are_read(file: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "manifest.json").write_bytes(file.read_bytes())
    verify_before_loading(folder)
    found = manifest_of(folder)
    assert isinstance(found, Manifest)
    made = found.provenance
    assert Recipe.model_validate(made["recipe"]).name == "mine"
    assert TeacherLabels.model_validate(made["labels"]).accepted == 2
    assert StudentCheckpoint.model_validate(made["student"]).method == "lora"
    assert OnnxModel.model_validate(made["model"]).precision == "int4"
    assert EvaluationReport.model_validate(made["evaluation"]).candidate == "student int4"


@pytest.mark.parametrize("file", files_of("artifact"), ids=lambda file: file.name)
def test_artifacts_are_read(file: Path) -> None:
    assert {entry.path: entry.bytes for entry in read_manifest(file.read_bytes(), "x")} == {
        "genai_config.json": 2,
        "tokenizer/vocabulary.txt": 8,
    }


@pytest.mark.parametrize("file", files_of("outcome"), ids=lambda file: file.name)
def test_run_records_are_read(file: Path) -> None:
    found = Outcome.model_validate_json(file.read_bytes())
    assert found.registered is not None
    assert (found.run, found.registered.version) == ("desk-1", "2")
    assert [verdict.verdict for verdict in found.decision.verdicts] == ["passed", "undecided"]
    assert found.labels.usage.prompt_tokens == 12_345


@pytest.mark.parametrize("file", files_of("result"), ids=lambda file: file.name)
def test_results_are_hits(file: Path, tmp_path: Path) -> None:
    assert not is_hit(file.read_bytes(), Predictions), "the artifact is not there"
    result(tmp_path)
    assert is_hit(file.read_bytes(), Predictions)


@pytest.mark.parametrize("file", files_of("checkpoint"), ids=lambda file: file.name)
def test_training_goes_on_from_a_checkpoint(file: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / STATE_FILE).write_bytes(file.read_bytes())
    state = training_state()
    state.resume(OneFolder(tmp_path / "kept"))
    assert (state.step, state.losses, state.accuracy) == (1, [0.5], 0.75)
    assert (state.best_loss, state.best_step, state.right) == (0.25, 1, [True, False])
    assert state.weights["head"].tolist() == [
        [pytest.approx(0.899), pytest.approx(-2.098)],
        [pytest.approx(0.3995), pytest.approx(0.14975)],
    ]
    assert state.schedule.get_last_lr() == [0.05]
    assert state.optimiser.state_dict()["state"][0]["step"] == 1


def main(decisions: list[str]) -> None:
    reasons = json.loads(REASONS.read_text("utf-8")) if REASONS.exists() else {}
    for decision in decisions:
        form, _, reason = decision.partition(": ")
        if form not in FORMS or not reason:
            sys.exit(f'error: give "FORM: REASON", where FORM is one of {", ".join(FORMS)}')
        kind, write = FORMS[form]
        file = GOLDEN / f"{form}-{len(files_of(form)) + 1}.{kind}"
        with TemporaryDirectory() as folder:
            file.write_bytes(write(Path(folder)))
        reasons[file.name] = reason
    REASONS.write_text(json.dumps(reasons, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with TemporaryDirectory() as home:
        os.environ["DISTILLERY_HOME"] = home
        main(sys.argv[1:])
