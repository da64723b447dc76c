"""A student in the local registry with the whole record of its making, whose rows and labels are in
the artifact store: without any training."""

from pathlib import Path
from typing import Any

from distillery.evaluation.report import write_answers
from distillery.recipe import Recipe
from distillery.records import (
    Artifact,
    EvaluationReport,
    Example,
    GateDecision,
    Interval,
    OnnxModel,
    PreparedDataset,
    RegisteredModel,
    ScoreRow,
    Split,
    StudentCheckpoint,
    TeacherLabel,
    TeacherLabels,
    Usage,
)
from distillery.registry.card import write_card
from distillery.registry.local import LocalRegistry
from distillery.registry.manifest import environment
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import sha256_of

RUN = {"produced_by": "mine-run-1", "run_id": "0-1", "seconds": 2.5}
ROWS = {"gold": ("g1",), "train": ("r1", "r2", "r3"), "validation": ("v1",), "test": ("t1", "t2")}


def example(example_id: str) -> Example:
    return Example(
        example_id=example_id, question=example_id, choices=("yes", "no"), answer_key="A"
    )


def prepared(folder: Path, rows: dict[str, tuple[str, ...]] = ROWS) -> PreparedDataset:
    """A data set in the store with these rows by role."""
    folder.mkdir()
    splits = {}
    for role, ids in rows.items():
        file = folder / f"{role}.jsonl"
        file.write_text("".join(example(each).model_dump_json() + "\n" for each in ids))
        splits[role] = Split(file=file.name, rows=len(ids), sha256=sha256_of(file))
    return PreparedDataset(artifact=ArtifactStore().put(folder), splits=splits, **RUN)


def labels(folder: Path, answers: dict[str, str], confidence: float = 0.75) -> TeacherLabels:
    """Labels in the store: an answer by row."""
    folder.mkdir()
    lines = []
    for row, answer in answers.items():
        label = TeacherLabel(example_id=row, answer=answer, confidence=confidence)
        lines.append(label.model_dump_json() + "\n")
    (folder / "labels.jsonl").write_text("".join(lines))
    return TeacherLabels(
        artifact=ArtifactStore().put(folder),
        teacher="a-large-model",
        accepted=len(answers),
        rejected=1,
        soft=False,
        asked=4,
        usage=Usage(prompt_tokens=1200, completion_tokens=4),
        cost=0.25,
        currency="EUR",
        **RUN,
    )


def provenance(folder: Path, **recipe: Any) -> dict[str, Any]:
    """What a run tells the registry, in the manifest's JSON."""
    folder.mkdir()
    artifact = Artifact(uri="file:///elsewhere", sha256="e" * 64, bytes=1)
    row = ScoreRow(
        name="student int4",
        kind="model",
        correct=1,
        rows=2,
        accuracy=0.5,
        interval=Interval(low=0.1, high=0.9),
    )
    values: dict[str, Any] = {"dataset": {"source": "sample"}, "teacher": {"kind": "endpoint"}}
    values |= {"name": "mine", "student": {"gold": True}, **recipe}
    records = {
        "recipe": Recipe.model_validate(values),
        "data": prepared(folder / "data"),
        "labels": labels(folder / "labels", {"r1": "A", "r2": "B"}),
        "test_labels": labels(folder / "test", {"t1": "A", "t2": "A"}),
        "student": StudentCheckpoint(
            artifact=artifact,
            method="lora",
            base="HuggingFaceTB/SmolLM2-135M-Instruct",
            base_revision="c" * 40,
            base_license="apache-2.0",
            parameters=70_800_000,
            steps=9,
            **RUN,
        ),
        "model": OnnxModel(
            artifact=artifact, precision="int4", algorithm="rtn", parameters=70_800_000, **RUN
        ),
        "evaluation": EvaluationReport(
            artifact=artifact,
            scoreboard=(row,),
            candidate=row.name,
            answers_sha256="a" * 64,
            **RUN,
        ),
        "decision": GateDecision(passed=True, reason="passes 1 rule: keeps 80 %"),
    }
    made: dict[str, Any] = {key: each.model_dump(mode="json") for key, each in records.items()}
    made |= {"teacher": "a-large-model", "source": "sample-digest", "run": "mine-run-1"}
    return made | environment()


def register(folder: Path, name: str, made: dict[str, Any]) -> RegisteredModel:
    """Register files that stand for a model, with the card and the student's answers."""
    content = folder / "onnx"
    (content / "evaluation").mkdir(parents=True)
    (content / "genai_config.json").write_text("{}")
    (content / "model.onnx").write_text(str(folder))
    tested = [example(each) for each in ROWS["test"]]
    write_answers(content / "evaluation", tested, {"gold": ["A", "A"], "student int4": ["A", "B"]})
    write_card(content, name, made)
    return LocalRegistry().register(content, name, {"produced_by": "mine-run-1"}, made)
