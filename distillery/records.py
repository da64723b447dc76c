"""The hand-off records between stages: frozen, JSON both ways; URIs, digests and counts, never a payload or a secret.

Each record has a `content_id`: a digest of what later stages depend on. Two equal runs give equal content_ids, wherever
and whenever they ran: URIs, times, costs and the producing run's name are no part of it.
"""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from distillery.errors import DataError
from distillery.recipe import ExportForm, RegistryKind


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value in canonical form: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Example(Record):
    """One multiple-choice row: `choices` are the option texts in order; `answer_key` is the gold letter, if known."""

    example_id: str
    question: str
    concept: str = ""
    choices: tuple[str, ...]
    answer_key: str | None = None

    @property
    def letters(self) -> tuple[str, ...]:
        return LETTERS[: len(self.choices)]


LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


class Usage(Record):
    """Tokens of one call or of many, as the endpoint counts them; `cached_tokens` are those of the prompt that it had
    at hand."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
        )


class TeacherLabel(Record):
    """A teacher's accepted answer to one row: a letter and, from log-probabilities or votes, the distribution over the
    row's letters (sums to 1). `confidence` (0 to 1): the share of its several answers that agree, else the letter's
    probability; None where there is one answer without probabilities. `rationale`: its reason, in its words."""

    example_id: str
    answer: str
    distribution: dict[str, float] | None = None
    confidence: float | None = None
    rationale: str | None = None
    usage: Usage = Usage()


class RejectedLabel(Record):
    """A row whose answer is no option or never came: kept with its reason and never trained on."""

    example_id: str
    reason: str
    raw: str = ""


class Artifact(Record):
    """A folder in the artifact store. `sha256` covers all paths and contents; `uri` may change when a store moves."""

    uri: str
    sha256: str
    bytes: int

    @property
    def content_id(self) -> str:
        return self.sha256


class StageRecord(Record):
    """What a stage returns: an artifact and its counts. `produced_by` and `run_id` name the run that did the work."""

    artifact: Artifact
    produced_by: str = ""
    run_id: str = ""
    seconds: float = 0.0

    @property
    def content_id(self) -> str:
        return self.artifact.sha256


class Split(Record):
    """A split of the prepared data: `file` in the artifact's folder, one Example a line (JSONL)."""

    file: str
    rows: int
    sha256: str


class PreparedDataset(StageRecord):
    splits: dict[str, Split]
    duplicates_dropped: int = 0
    near_duplicates_dropped: int = 0

    def rows(self, role: str) -> "Rows":
        """The rows of a role: gold, train, validation or test. Raises DataError where the data set has none."""
        if role not in self.splits:
            raise DataError(
                f"dataset.splits: the recipe needs {role} rows; name a split for them or carve them"
            )
        return Rows(artifact=self.artifact, **self.splits[role].model_dump())

    def rows_if_any(self, role: str) -> "Rows | None":
        return self.rows(role) if role in self.splits else None


class Rows(Split):
    """One split on its way to a stage; its content_id is the split's own, whatever else the data set holds."""

    artifact: Artifact

    @property
    def content_id(self) -> str:
        return self.sha256


class TeacherLabels(StageRecord):
    """Files in the folder: labels.jsonl (TeacherLabel), rejected.jsonl (RejectedLabel), train_data.jsonl (the lab's
    Question/Answer rows), report.json (LabelReport) and, where gold answers are known, reliability.png and
    look.jsonl, the rows worth a look. `asked`, `usage` and `cost`: the calls of the run that did the work."""

    teacher: str
    accepted: int
    rejected: int
    soft: bool
    asked: int = 0
    usage: Usage = Usage()
    cost: float | None = None
    currency: str = ""
    calls_per_second: tuple[float, ...] = ()


class TeacherDrift(Record):
    """How the canary rows were answered afresh: `changed` names those of the `compared` rows whose label is another
    one now. `before`, `after`: the model versions that the endpoint reported."""

    asked: int
    compared: int
    changed: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def share(self) -> float:
        """Of the compared rows, those that changed (0 to 1)."""
        return len(self.changed) / self.compared if self.compared else 0.0

    def line(self) -> str:
        """The result in one line."""
        if not self.compared:
            return "no canary row has an answer from before and one from now"
        versions = f"; {', '.join(self.before)} answered then, {', '.join(self.after)} now"
        return f"{len(self.changed)} of {self.compared} canary rows are answered otherwise ({self.share:.0%}){versions}"


class CurvePoint(Record):
    """`loss` is the mean since the last point; `validation_accuracy` (0 to 1) and `validation_loss` (nats) are there at
    an epoch's end."""

    step: int
    loss: float
    validation_accuracy: float | None = None
    validation_loss: float | None = None


class StudentCheckpoint(StageRecord):
    """Folders in the artifact: model/ (a whole model in safetensors: the trained one, or for LoRA and DoRA the one that
    the adapter is for, left out where that is the base model itself) and, for these two, adapter/."""

    method: Literal["full", "lora", "dora"]
    base: str
    base_revision: str | None = None
    parameters: int
    steps: int
    curve: tuple[CurvePoint, ...] = ()
    validation_accuracy: float | None = None
    device: str = "cpu"
    remote_code: bool = False


class Interval(Record):
    """A two-sided 95 % interval."""

    low: float
    high: float


class Departure(Record):
    """How far an exported model is from the float model that it was made of, on the same rows: mean and largest |dp|
    over all options' probabilities (0 to 1), and the rows that it answers otherwise."""

    mean: float
    largest: float
    changed: int


class Rung(Record):
    """A form of the student on the validation rows. `difference`: its accuracy less the float student's, with the
    paired interval. Figures are None where it could not be built or asked. `note`: why it was picked, or why not."""

    form: ExportForm
    bytes: int | None = None
    accuracy: float | None = None
    difference: float | None = None
    interval: Interval | None = None
    departure: Departure | None = None
    picked: bool = False
    note: str = ""


class Ladder(Record):
    """All forms that a student was tried in. `accuracy`: the float student's, on the `rows` validation rows."""

    rows: int
    accuracy: float
    largest_loss: float
    rungs: tuple[Rung, ...]


class OnnxModel(StageRecord):
    """A folder that ONNX Runtime GenAI loads: genai_config.json at its top, and ladder.json where it was picked from a
    ladder."""

    precision: str
    algorithm: str
    parameters: int
    adapter_apart: bool = False
    ladder: Ladder | None = None

    @property
    def bytes(self) -> int:
        return self.artifact.bytes


class ScoreRow(Record):
    """One line of the scoreboard: a predictor on the test rows. Latencies in ms, memory in MiB, bytes of its folder.
    `departure`: of the candidate alone."""

    name: str
    kind: Literal["reference", "baseline", "model"]
    correct: int
    rows: int
    accuracy: float
    interval: Interval
    versus_teacher: Interval | None = None
    agreement: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    rows_per_second: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    peak_mib: float | None = None
    departure: Departure | None = None


class EvaluationReport(StageRecord):
    """Files in the folder: report.json, answers.jsonl (one test row a line: each predictor's answer), scoreboard.md,
    scoreboard.png."""

    scoreboard: tuple[ScoreRow, ...]
    candidate: str
    answers_sha256: str
    machine: str = ""

    @property
    def content_id(self) -> str:
        """The answers alone: speeds differ between equal runs."""
        return self.answers_sha256

    def row(self, name: str) -> ScoreRow:
        return next(row for row in self.scoreboard if row.name == name)


class Measured(Record):
    """An exported student on the validation rows: the rows it gets right, its latency (ms, median of single rows) and
    its folder's bytes."""

    correct: int
    rows: int
    p50_ms: float
    bytes: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.rows


class Trial(Record):
    """A student of a search. `settings`: what was tried, by name. `measured`: what came of it, or None where no student
    did, for `reason`. `best`: no other is as good in accuracy, size and latency and better in one of them (the Pareto
    front)."""

    number: int
    settings: dict[str, float]
    measured: Measured | None
    best: bool
    reason: str = ""


class GateDecision(Record):
    """`passed`: the candidate may be registered. `reason` is one line for people."""

    passed: bool
    reason: str
    champion: str | None = None


class RegisteredModel(StageRecord):
    """`manifest_sha256` is that of manifest.json inside the registered folder, which lists every file's sha256."""

    name: str
    version: str
    registry: RegistryKind
    role: str = "candidate"
    manifest_sha256: str = Field(min_length=64, max_length=64)

    @property
    def content_id(self) -> str:
        """A registration, not its content alone: the same model in two registries is downloaded from each."""
        return digest_of([self.registry, self.name, self.version, self.manifest_sha256])


class InputFile(Record):
    """A file of rows to score; its content_id is its content's, wherever it lies."""

    uri: str
    sha256: str

    @property
    def content_id(self) -> str:
        return self.sha256


class Predictions(StageRecord):
    """Files in the folder: predictions.jsonl (example_id, answer, probabilities), failed.jsonl (line, example_id,
    reason)."""

    rows: int
    failed: int


class PreparedTeacher(Record):
    """A local teacher: as weights, from which a student may start, and as the model that is served while it labels."""

    checkpoint: StudentCheckpoint
    model: OnnxModel


class Outcome(Record):
    """All records of a run; what the gate refused is not registered."""

    recipe: str
    data: PreparedDataset
    teacher: PreparedTeacher | None
    labels: TeacherLabels
    student: StudentCheckpoint
    model: OnnxModel
    report: EvaluationReport
    decision: GateDecision
    registered: RegisteredModel | None
    delivered: OnnxModel | None
    run: str = ""
