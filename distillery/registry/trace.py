"""From a registered version to its rows, labels, cost and runs; and from a row to the versions that
it trained."""

from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from distillery.data.examples import each_example
from distillery.errors import ArtifactDamaged
from distillery.labels.files import read_labels
from distillery.recipe import METRIC_NAMES, Metric, Recipe
from distillery.records import (
    BaseModelAnswers,
    EvaluationReport,
    GateDecision,
    OnnxModel,
    Preferences,
    PreparedDataset,
    PreparedTeacher,
    Record,
    RegisteredModel,
    Rows,
    Selection,
    Split,
    StageRecord,
    StudentCheckpoint,
    TeacherLabels,
    Usage,
)
from distillery.registry.base import Registry
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import FileEntry

R = TypeVar("R", bound=BaseModel)


class Work(Record):
    """A stage's work: the run that did it, in `seconds`, and the digest of what it made."""

    stage: str
    run: str
    run_id: str
    seconds: float
    sha256: str


class Payment(Record):
    """What a run paid for answers, of train rows, test rows or a judge. The answers that it found
    in the label database are not in it: they were paid for by an earlier run."""

    labels: str
    calls: int
    usage: Usage
    cost: float | None
    currency: str


class Trace(Record):
    """Where a version comes from. What an older manifest does not tell is None or empty.

    `run`: the run that registered it. `splits`: by role. `answers`: digest of the answers to the
    test rows. `files`: all of the registered folder but its manifest.
    """

    name: str
    version: str
    role: str
    manifest_sha256: str
    signed: bool
    run: str
    recipe: str
    source: str
    splits: dict[str, Split]
    teacher: str
    terms: str | None
    accepted: int | None
    rejected: int | None
    base: str
    base_revision: str | None
    base_license: str | None
    answers_sha256: str
    accuracy: float | None
    metric: Metric | None
    verdict: str
    code: str
    packages: dict[str, str]
    payments: tuple[Payment, ...]
    work: tuple[Work, ...]
    files: tuple[FileEntry, ...]


def trace(registry: Registry, model: RegisteredModel) -> Trace:
    """Return where a version comes from, as its manifest tells.

    Raises RegistryError if the manifest is missing or altered.
    """
    manifest = registry.provenance(model)
    made = manifest["provenance"]
    recipe = record_in(made, "recipe", Recipe)
    data = record_in(made, "data", PreparedDataset)
    labels = record_in(made, "labels", TeacherLabels)
    student = record_in(made, "student", StudentCheckpoint)
    report = record_in(made, "evaluation", EvaluationReport)
    decision = record_in(made, "decision", GateDecision)
    row = report.row(report.candidate) if report else None
    return Trace(
        name=model.name,
        version=model.version,
        role=model.role,
        manifest_sha256=model.manifest_sha256,
        signed=bool(model.signature),
        run=made.get("run") or model.produced_by,
        recipe=recipe.name if recipe else "",
        source=made.get("source", ""),
        splits=data.splits if data else {},
        teacher=labels.teacher if labels else "",
        terms=recipe.teacher.terms if recipe else None,
        accepted=labels.accepted if labels else None,
        rejected=labels.rejected if labels else None,
        base=student.base if student else "",
        base_revision=student.base_revision if student else None,
        base_license=student.base_license if student else None,
        answers_sha256=report.answers_sha256 if report else "",
        accuracy=row.accuracy if row else None,
        metric=row.metric if row else None,
        verdict=decision.reason if decision else "",
        code=f"{made.get('distillery', '')} {made.get('code_sha256', '')[:12]}".strip(),
        packages=made.get("packages", {}),
        payments=(*payments_in(made), *judge_payments_in(made)),
        work=tuple(work_in(made)),
        files=tuple(FileEntry.model_validate(entry) for entry in manifest["files"]),
    )


def record_in(made: dict[str, Any], key: str, kind: type[R]) -> R | None:
    """Return a record of a manifest; None where there is none of this kind."""
    try:
        return kind.model_validate(made.get(key))
    except ValidationError:
        return None


def work_in(made: dict[str, Any]) -> Iterator[Work]:
    """Yield the stages' work in the order of a run."""
    local = record_in(made, "local_teacher", PreparedTeacher)
    stages: dict[str, StageRecord | None] = {
        "prepare dataset": record_in(made, "data", PreparedDataset),
        "train teacher": local.checkpoint if local else None,
        "export teacher": local.model if local else None,
        "select rows": record_in(made, "selection", Selection),
        "label": record_in(made, "labels", TeacherLabels),
        "label test rows": record_in(made, "test_labels", TeacherLabels),
        "train student": record_in(made, "student", StudentCheckpoint),
        "export student": record_in(made, "model", OnnxModel),
        "ask base model": record_in(made, "base_answers", BaseModelAnswers),
        "evaluate": record_in(made, "evaluation", EvaluationReport),
        "ask judge": record_in(made, "preferences", Preferences),
    }
    for stage, record in stages.items():
        if record:
            yield Work(
                stage=stage,
                run=record.produced_by,
                run_id=record.run_id,
                seconds=record.seconds,
                sha256=record.artifact.sha256,
            )


def payments_in(made: dict[str, Any]) -> Iterator[Payment]:
    """Yield what was paid for the labels of the train rows and of the test rows."""
    for title, key in (("train rows", "labels"), ("test rows", "test_labels")):
        labels = record_in(made, key, TeacherLabels)
        if labels:
            yield Payment(
                labels=title,
                calls=labels.asked,
                usage=labels.usage,
                cost=labels.cost,
                currency=labels.currency,
            )


def judge_payments_in(made: dict[str, Any]) -> Iterator[Payment]:
    """Yield what was paid for a judge of the texts, if one was asked."""
    found = record_in(made, "preferences", Preferences)
    if found:
        yield Payment(
            labels="judge",
            calls=found.asked,
            usage=found.usage,
            cost=found.cost,
            currency=found.currency,
        )


class RowUse(Record):
    """What a version did with a row.

    `used`: trained, the student learnt from it; taught, only its local teacher did; rejected, it
    got no label and was left out; chose, it is a validation row; tested, a test row; unknown, the
    artifact `missing` is no longer in the store. `label`: what the student learnt from it; several
    texts are separated by |.
    """

    name: str
    version: str
    role: str
    split: str
    used: Literal["trained", "taught", "rejected", "chose", "tested", "unknown"]
    label: str = ""
    confidence: float | None = None
    missing: str = ""


def trace_row(registry: Registry, example_id: str, name: str | None = None) -> list[RowUse]:
    """Return what the versions of `name`, or of all models, did with a row, the newest first.

    Versions whose data set lacks the row are left out, as are those whose manifest names no data
    set. Rows and labels are read from the artifact store.
    """
    finder = RowFinder(example_id)
    uses = []
    for model in registry.list(name):
        made = registry.provenance(model)["provenance"]
        for found in finder.uses(made):
            uses.append(RowUse(name=model.name, version=model.version, role=model.role, **found))
    return uses


class RowFinder:
    """Looks for a row in data sets and labels; each artifact is read once."""

    def __init__(self, example_id: str) -> None:
        self.example_id = example_id
        self._store = ArtifactStore()
        self._answers: dict[str, str | None] = {}
        self._labels: dict[str, tuple[str, float | None] | None] = {}

    def uses(self, made: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the fields of a RowUse for each split that holds the row."""
        data = record_in(made, "data", PreparedDataset)
        labels = record_in(made, "labels", TeacherLabels)
        recipe = record_in(made, "recipe", Recipe)
        if not (data and labels and recipe):
            return
        for split in data.splits:
            try:
                if self.holds(data.rows(split)):
                    yield {"split": split, **self.use(split, data, labels, recipe)}
            except ArtifactDamaged:
                missing = data.artifact.sha256
                if self._store.holds(data.artifact):
                    missing = labels.artifact.sha256
                yield {"split": split, "used": "unknown", "missing": missing}

    def use(
        self, split: str, data: PreparedDataset, labels: TeacherLabels, recipe: Recipe
    ) -> dict[str, Any]:
        """Return how a row of `split` was used."""
        if split == "train":
            label = self.label(labels)
            if label is None:
                return {"used": "rejected"}
            return {"used": "trained", "label": label[0], "confidence": label[1]}
        if split == "gold":
            used = "trained" if recipe.student.gold else "taught"
            return {"used": used, "label": self._answers[data.rows(split).sha256]}
        return {"used": "chose" if split == "validation" else "tested"}

    def holds(self, rows: Rows) -> bool:
        """Return whether a split holds the row."""
        if rows.sha256 not in self._answers:
            file = self._store.fetch(rows.artifact) / rows.file
            for example in each_example(file):
                if example.example_id == self.example_id:
                    self._answers[rows.sha256] = example.answer_key or ""
                    return True
            self._answers[rows.sha256] = None
        return self._answers[rows.sha256] is not None

    def label(self, labels: TeacherLabels) -> tuple[str, float | None] | None:
        """Return the row's label and its confidence; None if it was rejected."""
        digest = labels.artifact.sha256
        if digest not in self._labels:
            found = read_labels(self._store.fetch(labels.artifact)).get(self.example_id)
            self._labels[digest] = (" | ".join(found.answers), found.confidence) if found else None
        return self._labels[digest]


def render_trace(found: Trace) -> str:
    """Return a trace for the terminal."""
    signed = "signed" if found.signed else "not signed"
    lines = [
        f"{found.name} version {found.version}, {found.role}, {signed}",
        f"{'run':16} {found.run or 'not told'}",
        f"{'recipe':16} {found.recipe or 'not told'}",
        f"{'code':16} {found.code or 'not told'}",
        f"{'source':16} {found.source or 'not told'}",
    ]
    for role, split in found.splits.items():
        lines.append(f"{f'{role} rows':16} {split.rows:>9,}  {split.sha256[:12]}  {split.file}")
    teacher = f"{found.teacher or 'not told'}; terms of use: {found.terms or 'not stated'}"
    lines.append(f"{'teacher':16} {teacher}")
    if found.accepted is not None:
        lines.append(f"{'labels':16} {found.accepted:>9,}  accepted, {found.rejected:,} rejected")
    for payment in found.payments:
        lines.append(f"{f'paid, {payment.labels}':16} {payment_line(payment)}")
    license_name = found.base_license or "licence not stated"
    revision = f" at {found.base_revision}" if found.base_revision else ""
    lines.append(f"{'base model':16} {found.base or 'not told'}{revision}, {license_name}")
    if found.accuracy is not None:
        answers = f"answers {found.answers_sha256[:12]}"
        lines.append(
            f"{METRIC_NAMES[found.metric]:16} {found.accuracy:>9.3f}  on the test rows, {answers}"
        )
    lines.append(f"{'gate':16} {found.verdict or 'not told'}")
    lines.append("")
    for work in found.work:
        lines.append(f"{work.stage:16} {work.seconds:>7.1f} s  {work.sha256[:12]}  {work.run}")
    lines.append("")
    for file in found.files:
        lines.append(f"{file.sha256[:12]}  {file.bytes:>12,}  {file.path}")
    return "\n".join(lines)


def payment_line(payment: Payment) -> str:
    """Return what was paid in one line."""
    usage = payment.usage
    cost = "no price table"
    if payment.cost is not None:
        cost = f"{payment.cost:.2f} {payment.currency}"
    return (
        f"{payment.calls:>9,}  calls, {usage.prompt_tokens:,} tokens in, "
        f"{usage.completion_tokens:,} out, {cost}"
    )


def render_row(example_id: str, uses: list[RowUse]) -> str:
    """Return what versions did with a row for the terminal."""
    if not uses:
        return f"{example_id}: in the data set of no registered version"
    lines = []
    for use in uses:
        told = str(use.used)
        if use.label:
            told += f" as {use.label}"
        if use.confidence is not None:
            told += f", confidence {use.confidence:.2f}"
        if use.missing:
            told += f": artifact {use.missing[:12]} is not in the store"
        lines.append(f"{use.name}  version {use.version}  {use.role:9}  {use.split:10}  {told}")
    return "\n".join(lines)
