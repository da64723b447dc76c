"""The records that stages hand on: frozen, to JSON and back.

They hold URIs, digests and counts, never file contents or secrets. Each stage's record has a
`content_id`: a digest of what later stages depend on. Two equal runs have equal content_ids,
wherever and whenever they ran, because URIs, times, costs and the run's name are not part of it.
"""

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from distillery.errors import DataError
from distillery.recipe import Choose, ExportForm, GateRule, Metric, RegistryKind

CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
"""Made once: json.dumps makes one for each call."""


def digest_of(value: Any) -> str:
    """Return the SHA-256 (hex) of a value's canonical JSON: sorted keys, no spaces, UTF-8."""
    return hashlib.sha256(CANONICAL.encode(value).encode()).hexdigest()


def is_relative_name(name: str) -> bool:
    """Return whether `name` is that of a file below a folder on every system: parts joined by
    forward slashes, none of them empty, "." or "..", without a drive, a backslash, NUL or what
    is no Unicode text."""
    if re.search("[\\\\\0\ud800-\udfff]", name) or re.match("[A-Za-z]:", name):
        return False
    return not {"", ".", ".."} & set(name.split("/"))


def check_relative_name(name: str) -> str:
    """Return `name`. Raises ValueError unless it is that of a file below a folder."""
    if not is_relative_name(name):
        raise ValueError("not the relative name of a file below its folder")
    return name


Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
"""A SHA-256 in hex. It names folders and locks, so nothing else may stand in its place."""

VersionName = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$")]
"""A version in a registry, in words that name a folder: MLflow counts, Azure ML takes these."""

RelativeName = Annotated[str, AfterValidator(check_relative_name)]
"""The name of a file below a folder, which may be in another folder below that."""


class Record(BaseModel):
    """Base of all records: frozen, and refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class AnswerFormat(Record):
    """How written answers look, the same for all rows: the most tokens of the student's tokenizer
    that one has, the JSON Schema that it meets (None for text), and the metric it is judged by."""

    max_tokens: int
    json_schema: dict[str, Any] | None = None
    metric: Metric


class Example(Record):
    """A row. `answer_key` is its gold answer, if known: one of `keys`, or a text where answers are
    written.

    task.kind choice: a question with options of its own. `choices` are their texts in order, and
    the keys are letters. task.kind classify: a text that belongs to one of `classes`, which are
    the same for all rows and are the keys. A row's JSON leaves the classes out: they stand once
    beside the rows, in classes.json. `fields`: further columns that the prompt shows, by name.
    extract and generate: a text whose answer is written, as `format` says, which stands once beside
    the rows, in format.json; there are no keys. `references`: further gold answers, each as good as
    `answer_key`. An answer of extract is the JSON text of `answers.canonical`."""

    example_id: str
    question: str
    concept: str = ""
    choices: tuple[str, ...] = ()
    answer_key: str | None = None
    fields: dict[str, str] = Field({}, exclude_if=lambda fields: not fields)
    classes: tuple[str, ...] = Field((), exclude=True, repr=False)
    references: tuple[str, ...] = Field((), exclude_if=lambda references: not references)
    format: AnswerFormat | None = Field(None, exclude=True, repr=False)

    @property
    def right_answers(self) -> tuple[str, ...]:
        """The gold answer and the further ones; none where it is not known."""
        return () if self.answer_key is None else (self.answer_key, *self.references)

    @property
    def keys(self) -> tuple[str, ...]:
        """What an answer to the row may be: its options' letters, or the classes."""
        return self.classes or LETTERS[: len(self.choices)]

    @property
    def writes_text(self) -> bool:
        """Whether the answer is free text."""
        return self.format is not None and self.format.json_schema is None

    @property
    def options(self) -> tuple[str, ...]:
        """The text of each key: of an option, or the class's name."""
        return self.classes or self.choices


LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

LONGEST_OPTION = 16_384
"""Characters of an option that a model is asked the likelihood of, by the server."""

CLASSES_FILE = "classes.json"
"""The classes of the rows in the same folder: a JSON list of names. Other rows have none."""

FORMAT_FILE = "format.json"
"""The AnswerFormat of the rows in the same folder, if their answers are written."""


class Usage(Record):
    """Tokens of one call or of many, as the endpoint counts them. `cached_tokens` are the part of
    the prompt tokens that it had cached."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
        )


class CallTotal(Record):
    """Entries of the ledger together: `calls`, of which `estimated` have tokens that the endpoint
    did not count, their `usage` and `cost`. `currency`: of their price list; "" without one. The
    other fields are what the entries have in common; "" where that was not asked for."""

    run: str = ""
    recipe: str = ""
    teacher: str = ""
    purpose: str = ""
    outcome: str = ""
    week: str = ""
    calls: int
    estimated: int = 0
    usage: Usage = Usage()
    cost: float | None = None
    currency: str = ""


class TeacherLabel(Record):
    """A teacher's accepted answer to a row: a letter, a class or a text.

    `distribution`: probability of each of the row's letters, from log-probabilities or votes; sums
    to 1. `confidence` (0 to 1): the share of several answers that agree, or else the letter's
    probability; None for a single answer without probabilities. `rationale`: the teacher's reason.
    `references`: further texts of the teacher, each as good as `answer`, where several are drawn.
    """

    example_id: str
    answer: str
    distribution: dict[str, float] | None = None
    confidence: float | None = None
    rationale: str | None = None
    references: tuple[str, ...] = Field((), exclude_if=lambda references: not references)
    usage: Usage = Usage()

    @property
    def answers(self) -> tuple[str, ...]:
        """All that is learnt for the row: the answer and the references."""
        return (self.answer, *self.references)


class RejectedLabel(Record):
    """A row without a usable answer: kept with the reason, and never trained on."""

    example_id: str
    reason: str
    raw: str = ""


class Artifact(Record):
    """A folder in the artifact store.

    `sha256` covers all paths and contents. `uri` may change when a store moves.
    """

    uri: str
    sha256: Sha256
    bytes: int

    @property
    def content_id(self) -> str:
        return self.sha256


class StageRecord(Record):
    """What a stage returns: an artifact and its figures.

    `produced_by` and `run_id` name the run that did the work, which took `seconds`.
    """

    artifact: Artifact
    produced_by: str = ""
    run_id: str = ""
    seconds: float = 0.0

    @property
    def content_id(self) -> str:
        return self.artifact.sha256


class Split(Record):
    """A split of the prepared data: a JSONL `file` in the artifact's folder, one Example a line.
    `sha256`: of the file, and of the classes where there are any."""

    file: RelativeName
    rows: int
    sha256: Sha256


class PreparedDataset(StageRecord):
    """The prepared data: its splits by role, the classes of task.kind: classify, and how many rows
    of train, gold and validation were dropped as copies."""

    splits: dict[str, Split]
    classes: tuple[str, ...] = ()
    duplicates_dropped: int = 0
    near_duplicates_dropped: int = 0

    def rows(self, role: str) -> "Rows":
        """Return the rows of a role: gold, train, validation or test.

        Raises DataError if the data set has none.
        """
        if role not in self.splits:
            raise DataError(
                f"dataset: the recipe needs {role} rows; name a split for them in dataset.splits, "
                "or take a share of train by dataset.carve"
            )
        return Rows(artifact=self.artifact, **self.splits[role].model_dump())

    def rows_if_any(self, role: str) -> "Rows | None":
        return self.rows(role) if role in self.splits else None


class Rows(Split):
    """A split as a stage takes it. Its content_id does not depend on the other splits."""

    artifact: Artifact

    @property
    def content_id(self) -> str:
        return self.sha256


class CascadeFigures(Record):
    """What a cheap teacher and the teacher itself did for a set of labels.

    `cheap`: the cheap one's name in the label store. `below`: the bound on its confidence. It
    labelled `cheap_rows`, and the teacher was asked about the other `dear_rows`, and
    agreed with it on `agreed` of the `compared` ones that both answered. `cheap_asked`,
    `dear_asked`: calls of the run that did the work, and `cheap_cost`, `dear_cost` what they cost.
    `saved`: about what labelling cost less than with the teacher alone, by the tokens of all
    answers, whichever run paid for them; costs are None without prices."""

    cheap: str
    below: float
    cheap_rows: int
    dear_rows: int
    compared: int
    agreed: int
    cheap_asked: int = 0
    dear_asked: int = 0
    cheap_cost: float | None = None
    dear_cost: float | None = None
    saved: float | None = None

    def line(self) -> str:
        """Return who labelled how many rows, in one line."""
        line = f"{self.cheap_rows:,} rows by {self.cheap}, {self.dear_rows:,} left to the teacher"
        if self.compared:
            line += f", which agrees with it on {self.agreed / self.compared:.0%} of those"
        return line


class Selection(StageRecord):
    """The train rows that are labelled, chosen of `of` rows. The folder has them in `chosen.file`,
    and selection.jsonl, which says for each why it was chosen.

    `kept`: rows that stay because the last student learnt from them or their answers are stored.
    `by` and `added`: the recipe's teacher.select. `scorer`: whose uncertainty it is; "" where only
    diversity counted. `note`: what differs from the recipe, for people. `train_sha256`: of the rows
    chosen from."""

    chosen: Split
    of: int
    kept: int
    by: Literal["uncertainty", "diversity", "both"]
    added: int
    scorer: str
    train_sha256: Sha256
    note: str = ""

    @property
    def content_id(self) -> str:
        """The digest of the chosen rows."""
        return self.chosen.sha256

    @property
    def rows(self) -> "Rows":
        """The chosen rows as a stage takes them."""
        return Rows(artifact=self.artifact, **self.chosen.model_dump())

    def line(self) -> str:
        """Return it in one line."""
        line = f"{self.chosen.rows:,} of {self.of:,} train rows are labelled"
        if self.kept:
            line += f", of which {self.kept:,} stay, as they are paid for"
        reason = {"both": "uncertainty and diversity"}.get(self.by, self.by)
        if not self.scorer:
            reason = "diversity"
        line += f"; chosen by {reason}"
        if self.scorer:
            line += f" ({self.scorer})"
        return f"{line}; {self.note}" if self.note else line


class TeacherLabels(StageRecord):
    """The labels of the train rows.

    Files in the folder: labels.jsonl (TeacherLabel), rejected.jsonl (RejectedLabel),
    train_data.jsonl (the lab's Question/Answer rows), report.json (LabelReport), if written answers
    have probabilities of their tokens, answer_tokens.parquet, and, if gold answers are known,
    reliability.png and look.jsonl, the rows worth a look. `asked`, `usage`, `cost`, `paid` and
    `calls_per_second` describe the calls of the run that did the work: `asked` are the answers
    and refusals that came, also to probes, but not those that other processes of the run had asked
    for before (tasks/label_parts.py), and `paid` all calls for these rows by outcome, probes
    excepted, which `usage` and `cost` cover. In records of versions before the ledger they cover
    the answers, and `paid` is empty. `equal` counts the requests that it did not make since a row
    nearby had an equal one, and `cached_saved` is what the endpoint's cache of prompts took off the
    cost of the answers. `cascade`: where a cheap teacher was asked first.
    """

    teacher: str
    accepted: int
    rejected: int
    soft: bool
    asked: int = 0
    usage: Usage = Usage()
    cost: float | None = None
    currency: str = ""
    calls_per_second: tuple[float, ...] = ()
    paid: tuple[CallTotal, ...] = Field((), exclude_if=lambda found: not found)
    equal: int = Field(0, exclude_if=lambda count: not count)
    cached_saved: float | None = Field(None, exclude_if=lambda cost: cost is None)
    cascade: CascadeFigures | None = Field(None, exclude_if=lambda found: found is None)

    @property
    def calls(self) -> int:
        """How many calls were made for these rows; in records of versions before the ledger, how
        many answers came."""
        return sum(total.calls for total in self.paid) or self.asked


class Interval(Record):
    """A two-sided interval; of 95 % where nothing else is said."""

    low: float
    high: float


class Rival(Record):
    """A predictor that a teacher is compared with. `correct`: its right answers. `teacher_ahead`:
    the teacher's accuracy less its own."""

    name: str
    correct: int
    teacher_ahead: Interval


class TeacherCheck(StageRecord):
    """A teacher beside its rivals on the validation rows; the artifact has all answers, in
    answers.jsonl. `correct`: the teacher's right answers of `rows`. `soft_weight`: what its
    probabilities are worth beside its labels (evaluation/soft_weight.py); None where it gives
    none."""

    rows: int
    correct: int
    rivals: tuple[Rival, ...]
    soft_weight: float | None = None

    @property
    def decisions(self) -> tuple[str, ...]:
        """What is decided by this comparison, with the reason."""
        if self.soft_weight is None:
            return ()
        share = f"{100 * self.soft_weight:.0f} %"
        return (
            f"probabilities make {share} of the loss, labels the rest: by how well the teacher's "
            f"are calibrated on {self.rows} validation rows (training.soft_weight: auto)",
        )

    def line(self) -> str:
        """Return the comparison in one line."""
        others = ", ".join(f"{rival.name} on {rival.correct}" for rival in self.rivals)
        line = f"the teacher is right on {self.correct} of {self.rows} validation rows"
        return f"{line}; {others}" if others else line


class TeacherDrift(Record):
    """How the teacher answered the canary rows when it was asked again.

    `asked`: answers received. `compared`: rows that have labels from before and from now.
    `changed`: ids of those whose label differs. `before`, `after`: model versions that the
    endpoint reported.
    """

    asked: int
    compared: int
    changed: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def share(self) -> float:
        """The share (0 to 1) of the compared rows that changed."""
        if not self.compared:
            return 0.0
        return len(self.changed) / self.compared

    def line(self) -> str:
        """Return the result as a sentence."""
        if not self.compared:
            return "no canary row has an answer from before and one from now"
        before, after = ", ".join(self.before), ", ".join(self.after)
        return (
            f"{len(self.changed)} of {self.compared} canary rows are answered otherwise "
            f"({self.share:.0%}); {before} answered then, {after} now"
        )


class CurvePoint(Record):
    """A point of the training curve.

    `loss`: mean since the point before. `validation_accuracy` (0 to 1) and `validation_loss` (nats)
    are known at the end of an epoch, and where answers are written, `validation_tokens`: the mean
    share (0 to 1) of an answer's tokens, its end included, that are the likeliest behind those
    before them.
    """

    step: int
    loss: float
    validation_accuracy: float | None = None
    validation_loss: float | None = None
    validation_tokens: float | None = Field(None, exclude_if=lambda share: share is None)


class StudentCheckpoint(StageRecord):
    """A trained student.

    Folders in the artifact: model/, a whole model in safetensors, and for LoRA, QLoRA and DoRA
    adapter/. With an adapter, model/ is the model that the adapter belongs to; it is left out if
    that is the base model itself. `base_license`: as the base model names it; None if it names
    none.
    `validation_tokens`: of the weights that are kept, see `CurvePoint`. `decisions`: what the
    recipe left to the rows, and why it came out as it did.
    """

    method: Literal["full", "lora", "qlora", "dora"]
    base: str
    base_revision: str | None = None
    base_license: str | None = None
    parameters: int
    steps: int
    curve: tuple[CurvePoint, ...] = ()
    validation_accuracy: float | None = None
    validation_tokens: float | None = Field(None, exclude_if=lambda share: share is None)
    device: str = "cpu"
    decisions: tuple[str, ...] = ()
    remote_code: bool = False


class Departure(Record):
    """How far an exported model's answers are from those of its float model, on the same rows.

    `mean`, `largest`: absolute difference of the options' probabilities (0 to 1); None where
    answers are written. `changed`: number of rows that are answered otherwise.
    """

    mean: float | None = None
    largest: float | None = None
    changed: int


class Rung(Record):
    """A form of the student on the rows that choose.

    `accuracy`: its primary figure, which `Ladder.metric` names. `difference`: that minus the float
    student's, with the paired interval. `p50_ms`, the
    median latency in milliseconds, and `rows_per_second` are of single rows, one after another. The
    figures are None if it could not be built or scored; rungs of earlier versions have no speed.
    `note`: why it was picked, or why not. `out_of_resources`: it was left out because memory or
    time ran out.
    """

    form: ExportForm
    bytes: int | None = None
    accuracy: float | None = None
    difference: float | None = None
    interval: Interval | None = None
    departure: Departure | None = None
    p50_ms: float | None = None
    rows_per_second: float | None = None
    picked: bool = False
    note: str = ""
    out_of_resources: bool = False


class Ladder(Record):
    """The forms that a student was tried in. `accuracy`: the float student's primary figure, which
    is `metric` where answers are written, on the rows that choose, of which there are `rows`:
    validation rows, but for `training_rows` with the teacher's labels. `choose` is the recipe's,
    `reason` what by it sets the picked rung apart, and `machine` where the rungs were timed;
    ladders of earlier versions took the smallest rung, and have neither reason nor machine."""

    rows: int
    training_rows: int = 0
    accuracy: float
    largest_loss: float
    choose: Choose = "smallest"
    reason: str = ""
    machine: str = ""
    rungs: tuple[Rung, ...]
    metric: Metric | None = Field(None, exclude_if=lambda metric: metric is None)

    @property
    def is_final(self) -> bool:
        """Whether no rung was left out for a lack of memory or time."""
        return not any(rung.out_of_resources for rung in self.rungs)


class Proof(Record):
    """What answered rows prove of a threshold: of `rows`, `given` answers have a confidence that
    reaches it, of which `correct` are right; with `confidence`, the accuracy of the answers that
    reach it is `bound` or higher."""

    rows: int
    given: int
    correct: int
    bound: float
    confidence: float


class Abstention(Record):
    """When a student abstains: if its confidence, which is the probability of its likeliest
    answer, is below `threshold`. `answer`: what it says then when it is served. `proof`: None for a
    threshold that the recipe gives."""

    threshold: float
    answer: str
    proof: Proof | None = None

    def abstains(self, confidence: float) -> bool:
        """Return whether an answer of this confidence is withheld."""
        return confidence < self.threshold


class OnnxModel(StageRecord):
    """A folder that ONNX Runtime GenAI loads.

    It has genai_config.json at its top, ladder.json if it was picked from a ladder, and
    abstain.json if it abstains.
    """

    precision: str
    algorithm: str
    parameters: int
    adapter_apart: bool = False
    ladder: Ladder | None = None
    abstention: Abstention | None = None

    @property
    def bytes(self) -> int:
        return self.artifact.bytes


class Estimate(Record):
    """A figure of the test rows, with its two-sided 95 % interval."""

    value: float
    low: float
    high: float


class ClassFigures(Record):
    """How well a predictor tells one class: `rows` with that gold answer (1 or more); precision,
    recall and F1 (0 to 1); the recall's 95 % interval."""

    label: str
    rows: int
    precision: float
    recall: float
    f1: float
    recall_low: float
    recall_high: float


class Confusion(Record):
    """How often each gold answer (row) was given each answer (column). `counts` are [labels,
    labels + 1]; the last column counts the rows without an answer."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


class Bin(Record):
    """The answers with a confidence from `low` to below `high`: how many `rows`, their mean
    confidence, and the share of them that gold confirms."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


class Calibration(Record):
    """The expected calibration error with its 95 % interval, and the bins that it is the mean
    of."""

    error: float
    low: float
    high: float
    bins: tuple[Bin, ...]


class OrderRobustness(Record):
    """A model that was asked again with the options in another order: it gave the same option on
    `alike` of `rows`, a share of `value` with its 95 % interval. Asking took `seconds`."""

    rows: int
    alike: int
    value: float
    low: float
    high: float
    seconds: float


UNEVEN = 5
"""From this ratio of the commonest class to the rarest on, macro-F1 is the first figure that people
are told: accuracy says little of the rare classes."""


class CoveragePoint(Record):
    """The `rows` answers with the highest confidence, those of equal confidence included: their
    lowest confidence (`threshold`), their share of all rows (`coverage`), and the share of them
    that is right (`accuracy`)."""

    threshold: float
    rows: int
    coverage: float
    accuracy: float


class GivenAnswers(Record):
    """What becomes of the test rows under a student's `threshold`: the share of rows with an answer
    (`coverage`), and the share of these answers that is right; None where none is given."""

    threshold: float
    coverage: Estimate
    accuracy: Estimate | None


class FieldFigures(Record):
    """How well a predictor finds one field: `rows` with a gold value of it, and of its values in
    all answers precision, recall and F1 (0 to 1). `field`: its path, such as address/city."""

    field: str
    rows: int
    precision: float
    recall: float
    f1: float


class WrittenFigures(Record):
    """Figures of written answers, by the best of a row's gold answers. `metrics`: exact match and,
    for objects, the F1 of fields, or else ROUGE-L, chrF and BLEU. `fields`: each of the objects'
    fields. `valid`: the share of rows with an answer, which for objects meets the schema. `length`:
    the answers' median number of characters."""

    metrics: dict[Metric, Estimate]
    fields: tuple[FieldFigures, ...] = ()
    valid: Estimate
    length: float


class PreferenceFigures(Record):
    """How often a judge prefers the student's text to the teacher's. A row is one of the student's
    `wins` or `losses` if the judge says so in both orders of the two texts, else one of the `ties`.
    `win_rate`: wins and half of the ties, as a share of these rows, with its paired 95 % interval;
    None without rows. Of the `compared` rows, which the judge was asked about, the two orders
    `disagree` on so many. `left_out`: rows for which the judge gave no answer, by reason."""

    judge: str
    wins: int
    ties: int
    losses: int
    win_rate: Estimate | None
    compared: int
    disagree: int
    left_out: dict[str, int] = Field({})

    @property
    def rows(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def disagreement(self) -> float | None:
        """The share (0 to 1) of the compared rows on which the two orders disagree."""
        return self.disagree / self.compared if self.compared else None

    def line(self) -> str:
        """Return the figures in one line."""
        line = f"{self.wins} wins, {self.ties} ties, {self.losses} losses of the student"
        if self.win_rate:
            rate = self.win_rate
            line += f", win rate {rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}]"
        if self.compared:
            line += f"; the orders disagree on {self.disagree} of {self.compared} rows"
        for reason, count in self.left_out.items():
            line += f"; {count} rows left out: {reason}"
        return line


class Figures(Record):
    """Further figures of a predictor on the test rows.

    `written`: those of written answers, which have neither classes nor probabilities. `macro_f1`:
    mean F1 of the classes that are a gold answer. `kl_from_teacher`: mean Kullback-Leibler
    divergence of its probabilities from the teacher's, in nats. `first_token_ms`: median time to
    the first token of a prompt that shares nothing with the one before, rendering included. p50,
    p95 and p99: latency of single rows, in milliseconds. `load_s`: seconds to load the model.
    `tokens_per_second`: of written answers, prompts included. `coverage`: the accuracy of its most
    confident answers, and `given` of those that reach its threshold; only the candidate has them,
    and the `preferences` of a judge where one is asked.
    None where a predictor has no such figure.
    """

    macro_f1: Estimate | None = None
    classes: tuple[ClassFigures, ...] = ()
    confusion: Confusion | None = None
    written: WrittenFigures | None = Field(None, exclude_if=lambda written: written is None)
    calibration: Calibration | None = None
    kl_from_teacher: Estimate | None = None
    order_robustness: OrderRobustness | None = None
    first_token_ms: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    load_s: float | None = None
    tokens_per_second: float | None = Field(None, exclude_if=lambda speed: speed is None)
    coverage: tuple[CoveragePoint, ...] = ()
    given: GivenAnswers | None = None
    preferences: PreferenceFigures | None = Field(None, exclude_if=lambda found: found is None)

    @property
    def uneven_classes(self) -> tuple[ClassFigures, ClassFigures] | None:
        """The commonest and the rarest class, if the commonest has UNEVEN times as many test rows
        or more. None too where the classes are letters: of rows with options of their own."""
        if self.confusion is None:
            return None
        if self.confusion.labels == LETTERS[: len(self.confusion.labels)]:
            return None
        commonest = max(self.classes, key=lambda each: each.rows)
        rarest = min(self.classes, key=lambda each: each.rows)
        return (commonest, rarest) if commonest.rows >= UNEVEN * rarest.rows else None


class ScoreRow(Record):
    """A row of the scoreboard: a predictor on the test rows.

    `accuracy`: the primary figure (0 to 1), by which gate and headline go. Where answers are
    written, `metric` says which figure that is; None is accuracy, the share of the `correct`
    answers. `versus_teacher`: it minus the teacher's (paired interval). `agreement`: share of rows
    (0 to 1) answered as the teacher does. Latencies in milliseconds, `peak_mib` in MiB of memory,
    `bytes` of the model's folder. `waited`: the share (0 to 1) of the time in which the model was
    timed that it waited for a processor; None where that is not known. `departure` and `figures`:
    only the candidate has them; the figures of the others are in the evaluation's report.json.
    """

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
    waited: float | None = Field(None, exclude_if=lambda share: share is None)
    departure: Departure | None = None
    figures: Figures | None = None
    metric: Metric | None = Field(None, exclude_if=lambda metric: metric is None)


class BaseModelAnswers(StageRecord):
    """What the base model of the student answers to the test rows before any training, with its
    speed and memory: a Scored, in the folder's scored.json."""

    answers_sha256: str
    machine: str = ""

    @property
    def content_id(self) -> str:
        """The digest of the answers: speeds differ between equal runs."""
        return self.answers_sha256


class EvaluationReport(StageRecord):
    """The scoreboard of a run.

    Files in the folder: report.json, answers.jsonl (one test row a line, with the answer of each
    predictor), rows.jsonl (the same with question, options and probabilities), doubtful.jsonl and
    doubtful.csv (rows whose labels may be wrong), scoreboard.md and scoreboard.png. `candidate`:
    the student's name on the scoreboard.
    """

    scoreboard: tuple[ScoreRow, ...]
    candidate: str
    answers_sha256: str
    machine: str = ""

    @property
    def content_id(self) -> str:
        """The digest of the answers: speeds differ between equal runs."""
        return self.answers_sha256

    def row(self, name: str) -> ScoreRow:
        """Return the row of a predictor that is on the scoreboard."""
        return next(row for row in self.scoreboard if row.name == name)


class Preferences(StageRecord):
    """What a judge says of the student's texts beside the teacher's. The folder has
    preferences.jsonl, one test row a line. `asked`, `usage`, `cost` and `paid` are as in
    TeacherLabels."""

    figures: PreferenceFigures
    asked: int
    usage: Usage
    cost: float | None
    currency: str
    paid: tuple[CallTotal, ...] = Field((), exclude_if=lambda found: not found)


class Measured(Record):
    """An exported student on the validation rows.

    `correct` of `rows` are answered right. `metric` and `figure`: the primary figure of written
    answers. `p50_ms`: median latency of single rows, in
    milliseconds. `bytes`: size of the folder.
    """

    correct: int
    rows: int
    p50_ms: float
    bytes: int
    metric: Metric | None = Field(None, exclude_if=lambda metric: metric is None)
    figure: float | None = Field(None, exclude_if=lambda figure: figure is None)

    @property
    def accuracy(self) -> float:
        """The primary figure."""
        return self.correct / self.rows if self.figure is None else self.figure


class Trial(Record):
    """A trial of a search.

    `settings`: what was tried, by name. `measured`: the student's figures, or None if there is no
    student, for `reason`. `best`: on the Pareto front of accuracy, size and latency: no other
    trial is at least as good in all three and better in one.
    """

    number: int
    settings: dict[str, float]
    measured: Measured | None
    best: bool
    reason: str = ""


class RuleVerdict(Record):
    """What the gate says of a rule.

    `metric`: the primary figure of written answers, None for accuracy. `figure`: the candidate's,
    None if there is none. For the rules better and not_worse it is a difference of primary figures
    (-1 to 1), for keeps the share of the teacher's. `interval`:
    its lower and upper one-sided bounds, each at the rule's confidence. `p_value`: of the exact
    McNemar test that both predictors are equally accurate. `undecided`: too few rows to decide;
    about `rows_needed` are needed. `note`: one line for people.
    """

    rule: GateRule
    verdict: Literal["passed", "refused", "undecided"]
    figure: float | None = None
    interval: Interval | None = None
    p_value: float | None = None
    rows_needed: int | None = None
    note: str = ""
    metric: Metric | None = Field(None, exclude_if=lambda metric: metric is None)

    @property
    def passes(self) -> bool:
        """Whether the candidate passes this rule."""
        if self.verdict == "undecided":
            return self.rule.undecided == "passed"
        return self.verdict == "passed"


class GateDecision(Record):
    """The gate's decision. `passed`: the candidate may be registered. `reason`: one line for
    people. `champion`: the name for people of the champion that the candidate was compared with,
    and `champion_version` its version; None if there was none. `verdicts`: one for each rule.
    `champion_answers`: a folder with its answers.jsonl. Decisions of earlier versions have neither
    verdicts nor `champion_version` nor `champion_answers`."""

    passed: bool
    reason: str
    champion: str | None = None
    champion_version: str | None = None
    verdicts: tuple[RuleVerdict, ...] = ()
    champion_answers: Artifact | None = None

    @property
    def content_id(self) -> str:
        """The digest of `passed`: the rest differs between equal runs, as the champion does."""
        return digest_of(self.passed)


class RegisteredModel(StageRecord):
    """A version of a model in a registry.

    `role`: champion; challenger, which is not promoted (records of earlier versions say candidate);
    archived, a former champion; or rejected, a student that the gate refused. `manifest_sha256` is
    the digest of manifest.json in the registered folder, which lists the sha256 of every file.
    `signature`: of manifest.json, in base64; "" if it is not signed. `model_sha256`, the digest of
    the exported model, and `rows_sha256`, that of the test rows that it has answered, say which
    student it is; "" in registrations of earlier versions.
    """

    name: VersionName
    version: VersionName
    registry: RegistryKind
    role: str = "challenger"
    manifest_sha256: Sha256
    model_sha256: str = ""
    rows_sha256: str = ""
    signature: str = ""

    @property
    def content_id(self) -> str:
        """The digest of the registration: the same model in two registries is downloaded from
        each."""
        return digest_of([self.registry, self.name, self.version, self.manifest_sha256])


class JudgedVersions(Record):
    """The registered `versions` of the model `name` that a run's test rows, of which there are
    `rows`, have judged before; the newest first."""

    name: str
    rows: int
    versions: tuple[str, ...]

    def line(self) -> str:
        """Return it as a sentence."""
        count = len(self.versions)
        return (
            f"these {self.rows:,} test rows have judged {count} version{'s' if count != 1 else ''} "
            f"of {self.name}; dataset.rotation brings fresh ones"
        )


class Promotion(Record):
    """What became of a version that passed the gate.

    `result`: promoted; stands, if it was the champion already; outpaced, if the champion is no
    longer the one that it was compared with; or barred, if a user has pinned the champion and the
    version is not newer than the pin. `champion`: the champion's version now. `reason`: one line
    for people.
    """

    result: Literal["promoted", "stands", "outpaced", "barred"]
    champion: str | None
    reason: str


class InputFile(Record):
    """A file of rows to score. Its content_id is that of its content, whatever its path."""

    uri: str
    sha256: Sha256

    @property
    def content_id(self) -> str:
        return self.sha256


class Shard(Record):
    """Successive rows of a table: a Parquet file, rows.parquet, in a folder of the artifact store.
    `rows`: how many. `rows_sha256` covers what the rows hold, but neither where they come from nor
    how Parquet writes them."""

    artifact: Artifact
    rows: int
    rows_sha256: Sha256

    @property
    def content_id(self) -> str:
        """The digest of the rows: equal rows are asked once, whichever file they are in."""
        return self.rows_sha256


class ShardedRows(StageRecord):
    """Rows in shards, whose list is shards.json in the folder. `rows` and `shards`: how many."""

    rows: int
    shards: int


class ShardAnswers(StageRecord):
    """A student's answers to the rows of a shard, in their order: answers.parquet in the folder.
    `rows` are answered, `failed` set aside."""

    rows: int
    failed: int


class ScoredSlice(StageRecord):
    """What a model made of a slice of the test rows: slice.json in the folder. `rows`: how many."""

    rows: int


class Predictions(StageRecord):
    """A student's answers to rows.

    Files in the folder: predictions.jsonl (line, example_id, answer, probabilities) and
    failed.jsonl (line, example_id, reason). For rows that were answered in shards:
    answers-NNNNN.parquet, all rows in the order of the input, and manifest.json, an
    `AnswersManifest`.
    """

    rows: int
    failed: int


class PreparedTeacher(Record):
    """A local teacher: its weights, from which a student may start, and the model that is served
    while it labels."""

    checkpoint: StudentCheckpoint
    model: OnnxModel


class Outcome(Record):
    """All records of a run.

    `registered` is None if the gate refused the student. It is set beside a decision that refuses
    if another run promoted a champion meanwhile: then `decision` is the one against that champion.
    `promotion` is what became of it. `rejected`: the refused student, if the recipe keeps it.
    `judged`: what the test rows have judged before; None in records of earlier versions. `page`: a
    folder with report.html; None in records of earlier versions, too. `preferences`: a judge's, and
    `judge_drift` how it answered its canaries; None where none is asked. `paid`: all calls of the
    run by teacher, purpose and outcome, as the ledger has them; None where it could not be read,
    and in records of earlier versions. `selection`: the train rows that were labelled; None where
    all were. `base_answers`: those of the base model; None where it is not asked, and in records of
    earlier versions.
    """

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
    promotion: Promotion | None = None
    rejected: RegisteredModel | None = None
    run: str = ""
    judged: JudgedVersions | None = None
    page: Artifact | None = None
    preferences: Preferences | None = Field(None, exclude_if=lambda found: found is None)
    selection: Selection | None = Field(None, exclude_if=lambda found: found is None)
    judge_drift: TeacherDrift | None = Field(None, exclude_if=lambda found: found is None)
    paid: tuple[CallTotal, ...] | None = Field(None, exclude_if=lambda found: found is None)
    base_answers: BaseModelAnswers | None = Field(None, exclude_if=lambda found: found is None)
