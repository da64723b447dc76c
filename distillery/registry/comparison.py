"""Two models side by side on the same rows: how good, how large, how fast, and what each cost.

Registered models, and folders that were downloaded, hold their answers to the test rows, so that no
model need run. Other folders are asked the rows of a file, and so are both models then.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, get_args

from pydantic import Field

from distillery.data.examples import (
    read_examples,
    read_format,
    write_classes,
    write_examples,
)
from distillery.data.readers import read_file
from distillery.data.rows import RowReader, validated_rows
from distillery.errors import ArtifactDamaged, DataError, RegistryError
from distillery.evaluation.gate import AnswerRows, EarlierVersion, compare
from distillery.evaluation.gold import gold_in
from distillery.evaluation.report import (
    REGISTERED_ANSWERS,
    RowContent,
    answer_rows,
    parse_answers,
)
from distillery.evaluation.scoring import ModelToScore, Scored, score_model
from distillery.evaluation.statistics import difference_interval, p_value_of
from distillery.machine import machine_name
from distillery.models.class_tokens import read_class_tokens
from distillery.recipe import Columns, Metric, RegistryKind, RegistryRecipe
from distillery.records import (
    AnswerFormat,
    EvaluationReport,
    Example,
    Interval,
    OnnxModel,
    PreferenceFigures,
    PreparedDataset,
    PreparedTeacher,
    Record,
    StudentCheckpoint,
    TeacherLabels,
    Usage,
)
from distillery.registry.base import OtherModel
from distillery.registry.manifest import columns_in, prompt_in, provenance_of, verify_before_loading
from distillery.registry.open import open_registry
from distillery.registry.trace import payments_in, record_in
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder

CONFIG = "genai_config.json"


class Subject(NamedTuple):
    """A model to compare: what its manifest tells of its making (empty without one), its answers to
    its test rows if it holds them, how its folder is got, below a scratch folder if it has to be
    downloaded, and the kind of its registry, empty for a folder."""

    title: str
    made: dict[str, Any]
    answers: bytes | None
    fetch: Callable[[Path], Path]
    registry: str = ""


class Side(Record):
    """A model of a comparison. What is not known is None or empty.

    `correct` answers of the shared rows; `accuracy`: the primary figure on them, see
    ModelComparison; `interval`: its own, at 95 %. `preferences`: a judge's, of its texts beside its
    teacher's, on the test rows of its own run. `bytes`: of its
    folder. `p50_ms`: median latency of a row, in milliseconds; `peak_mib`: memory, in MiB;
    `machine`: where these and `rows_per_second` were measured. `calls`, `usage` and `cost`: what
    the run that labelled its rows asked the teacher. `training_minutes`: with that of a local
    teacher.
    """

    title: str
    correct: int
    accuracy: float
    interval: Interval
    preferences: PreferenceFigures | None = None
    teacher: str = ""
    base: str = ""
    parameters: int | None = None
    bytes: int | None = None
    rows_per_second: float | None = None
    p50_ms: float | None = None
    peak_mib: float | None = None
    machine: str = ""
    labelled: int | None = None
    calls: int | None = None
    usage: Usage | None = None
    cost: float | None = None
    currency: str = ""
    training_minutes: float | None = None


class Flip(Record):
    """A row that one model answers right and the other wrong: the gold answer and those of both.
    `question` and `options` are empty where the rows are not in the artifact store."""

    example_id: str
    gold: str
    first: str | None
    second: str | None
    question: str = ""
    options: dict[str, str] = Field({})


class ModelComparison(Record):
    """Two models on the same `rows`.

    `metric`: the primary figure where answers are written; None is accuracy. `difference`: the
    first's less the second's, with its paired 95 % interval. `p_value`: of the exact McNemar test;
    None for a figure that is no share. `flips`: all rows that one of them alone answers right.
    `note` says which rows are shared.
    """

    rows: int
    first: Side
    second: Side
    difference: float
    interval: Interval
    p_value: float | None
    flips: tuple[Flip, ...]
    note: str
    metric: Metric | None = None


def find_subject(text: str, kind: RegistryKind) -> Subject:
    """Return the model that a text names: a folder with genai_config.json, or NAME, NAME:VERSION,
    local:NAME or azureml:NAME:VERSION; `kind` is the registry of a name without one.

    Raises RegistryError for what is not there.
    """
    folder = Path(text)
    if (folder / CONFIG).is_file():
        verify_before_loading(folder)
        answers = folder / REGISTERED_ANSWERS
        return Subject(
            title=text,
            made=provenance_of(folder) or {},
            answers=answers.read_bytes() if answers.is_file() else None,
            fetch=lambda scratch: folder,
        )
    parts = text.split(":")
    if len(parts) > 1 and parts[0] in get_args(RegistryKind):
        kind = "azureml" if parts.pop(0) == "azureml" else "local"
    if len(parts) > 2 or not all(parts):
        raise RegistryError(
            f"{text}: neither a folder with {CONFIG} nor a model such as NAME, NAME:VERSION or "
            "azureml:NAME:VERSION"
        )
    registry = open_registry(RegistryRecipe(kind=kind))
    model = registry.get_any(parts[0], parts[1] if len(parts) > 1 else None)
    title = f"{model.name} version {model.version}"
    if isinstance(model, OtherModel):
        return Subject(
            title=title,
            made={},
            answers=None,
            fetch=lambda scratch: registry.download_other(model, scratch),
            registry=kind,
        )
    return Subject(
        title=title,
        made=registry.provenance(model)["provenance"],
        answers=registry.read_verified(model, REGISTERED_ANSWERS),
        fetch=lambda scratch: registry.download(model, scratch),
        registry=kind,
    )


def compare_models(first: Subject, second: Subject, rows: Path | None = None) -> ModelComparison:
    """Compare two models: by the answers that they hold or, if `rows` is given, by asking both of
    them the rows of that JSONL, CSV or Parquet file.

    Its columns are those of the first one's recipe, or the defaults of dataset.columns. Raises
    DataError where a model holds no answers, no row is shared, or a row has no answer.
    """
    if first.title == second.title and first.registry != second.registry:
        first, second = (
            subject._replace(title=f"{subject.registry}:{subject.title}")
            for subject in (first, second)
        )
    if rows is not None:
        return asked_both(first, second, rows)
    sides = []
    for subject in (first, second):
        if subject.answers is None:
            raise DataError(
                f"{subject.title}: holds no answers to test rows; name rows to ask both models by "
                "--rows"
            )
        title = f"{subject.title}: {REGISTERED_ANSWERS}"
        sides.append((subject, parse_answers(subject.answers, title), registered_figures(subject)))
    return compared(sides[0], sides[1], shared_examples(first.made))


def asked_both(first: Subject, second: Subject, rows: Path) -> ModelComparison:
    """Ask both models the rows of a file, on this machine."""
    sides = []
    with working_folder("compare") as scratch:
        folders = []
        for number, subject in enumerate((first, second)):
            fetched = subject.fetch(scratch / f"model-{number}")
            # The lab's notebook registers the folder around the model's. The highest file counts.
            configs = sorted(fetched.rglob(CONFIG), key=lambda path: (len(path.parts), path))
            if not configs:
                raise DataError(f"{subject.title}: has no {CONFIG}; name another model")
            folders.append(configs[0].parent)
        tokens = read_class_tokens(folders[0])
        classes = tokens.classes if tokens else ()
        answer_format = read_format(folders[0])
        file = write_rows(rows, first.made, classes, answer_format, scratch / "rows")
        examples = read_examples(file)
        for subject, folder in zip((first, second), folders, strict=True):
            # Nobody can guess the prompt of a model that is made for one task.
            prompt = prompt_in(subject.made, subject.title, bool(classes or answer_format))
            model = ModelToScore(name=subject.title, kind="onnx", folder=str(folder))
            scored = score_model(model, file, prompt)
            answers = answer_rows(examples, subject.title, scored.answers)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            sides.append((subject, answers, measured_figures(scored, size)))
    return compared(sides[0], sides[1], {example.example_id: example for example in examples})


def write_rows(
    rows: Path,
    made: Mapping[str, Any],
    classes: tuple[str, ...],
    answer_format: AnswerFormat | None,
    out: Path,
) -> Path:
    """Write the rows of a file as the stages hand them on, and return the new file.

    Raises DataError for a row that can't be read, has no answer or has another one's id."""
    own_columns, fields = columns_in(made, "the first model")
    columns = own_columns or Columns()
    if classes or answer_format:
        columns = own_columns or Columns(question="text", answer="label" if classes else "answer")
        columns = columns.model_copy(update={"choices": None})
    reader = RowReader(columns, fields, bool(classes), classes or None, answer_format)
    found = list(validated_rows(read_file("--rows", rows), reader, "test", seed=0))
    seen = set()
    for row in found:
        if row.example.example_id in seen:
            raise DataError(
                f"{row.where}: {row.example.example_id} comes twice; remove one of them"
            )
        seen.add(row.example.example_id)
    out.mkdir()
    write_examples([row.example for row in found], out / "rows.jsonl")
    if classes:
        write_classes(out, classes)
    return out / "rows.jsonl"


SideAnswers = tuple[Subject, AnswerRows, dict[str, Any]]
"""A model, its answers and its figures, which are fields of `Side`."""


def compared(
    first: SideAnswers, second: SideAnswers, examples: Mapping[str, Example]
) -> ModelComparison:
    """Compare the answers of two models; `examples` are rows by id, as far as they are known."""
    ours, own, figures = first
    theirs, other, other_figures = second
    contents = {}
    for example_id, row in own.items():
        if row.get("asked"):
            contents[example_id] = RowContent(str(row["asked"]), str(row["content"]))
    if len(contents) < len(own):
        # Answers of earlier releases tell their rows by ids alone.
        contents = {}
    name = last_column(own, ours.title)
    found = compare(own, name, contents, EarlierVersion("", theirs.title, other))
    pairs = found.pairs
    if not pairs.rows:
        raise DataError(
            f"{ours.title} and {theirs.title} have answered no row in common; name rows to ask "
            "both by --rows"
        )
    gold = gold_in([row for row, _ in found.shared])
    first_answers = [row[name] for row, _ in found.shared]
    second_answers = [line[list(line)[-1]] for _, line in found.shared]
    flips = []
    rights = zip(gold.rights(first_answers), gold.rights(second_answers), strict=True)
    for number, (first_right, second_right) in enumerate(rights):
        if first_right != second_right:
            ours_here, theirs_here = first_answers[number], second_answers[number]
            right = str(ours_here if first_right else theirs_here)
            row = found.shared[number][0]
            flips.append(flip(row, right, ours_here, theirs_here, examples))
    sides = []
    for subject, answers, measured in (
        (ours, first_answers, figures),
        (theirs, second_answers, other_figures),
    ):
        estimate = gold.estimate(answers, gold.metric)
        sides.append(
            Side(
                title=subject.title,
                correct=sum(gold.rights(answers)),
                accuracy=estimate.value,
                interval=Interval(low=estimate.low, high=estimate.high),
                **making_figures(subject.made),
                **measured,
            )
        )
    return ModelComparison(
        rows=pairs.rows,
        first=sides[0],
        second=sides[1],
        difference=pairs.difference,
        interval=difference_interval(pairs),
        p_value=p_value_of(pairs),
        flips=tuple(flips),
        note=found.note,
        metric=gold.metric,
    )


def last_column(answers: AnswerRows, title: str) -> str:
    """Return the name of the predictor whose answers these are. Raises DataError for none."""
    for row in answers.values():
        return list(row)[-1]
    raise DataError(f"{title}: holds no answers; name rows to ask both models by --rows")


def flip(
    row: Mapping[str, Any],
    gold: str,
    first: str | None,
    second: str | None,
    examples: Mapping[str, Example],
) -> Flip:
    """Return a row that one model alone answers right; `gold` is the gold answer that it gives."""
    example_id = str(row["example_id"])
    example = examples.get(example_id)
    if example is None:
        return Flip(example_id=example_id, gold=gold, first=first, second=second)
    options = {} if example.classes else dict(zip(example.keys, example.options, strict=True))
    return Flip(
        example_id=example_id,
        gold=gold,
        first=first,
        second=second,
        question=example.question,
        options=options,
    )


def shared_examples(made: Mapping[str, Any]) -> dict[str, Example]:
    """Return a registered model's test rows by id; {} where they are not in the artifact store."""
    data = record_in(dict(made), "data", PreparedDataset)
    if data is None or "test" not in data.splits:
        return {}
    rows = data.rows("test")
    try:
        examples = read_examples(ArtifactStore().fetch(rows.artifact) / rows.file)
    except ArtifactDamaged:
        return {}
    return {example.example_id: example for example in examples}


def making_figures(made: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a Side that the record of a model's making has."""
    figures: dict[str, Any] = {}
    labels = record_in(made, "labels", TeacherLabels)
    if labels:
        figures |= {"teacher": labels.teacher, "labelled": labels.accepted}
        payments = list(payments_in(made))
        figures["calls"] = sum(payment.calls for payment in payments)
        figures["usage"] = sum((payment.usage for payment in payments), Usage())
        costs = [payment.cost for payment in payments if payment.cost is not None]
        if len(costs) == len(payments):
            figures |= {"cost": sum(costs), "currency": labels.currency}
    student = record_in(made, "student", StudentCheckpoint)
    if student:
        seconds = student.seconds
        local = record_in(made, "local_teacher", PreparedTeacher)
        if local:
            seconds += local.checkpoint.seconds
        figures |= {"base": student.base, "training_minutes": seconds / 60}
    model = record_in(made, "model", OnnxModel)
    if model:
        figures["parameters"] = model.parameters
    return figures


def registered_figures(subject: Subject) -> dict[str, Any]:
    """Return size and speed as a model's own evaluation measured them."""
    figures: dict[str, Any] = {}
    model = record_in(subject.made, "model", OnnxModel)
    if model:
        figures["bytes"] = model.bytes
    report = record_in(subject.made, "evaluation", EvaluationReport)
    if report:
        row = report.row(report.candidate)
        figures |= {
            "rows_per_second": row.rows_per_second,
            "p50_ms": row.p50_ms,
            "peak_mib": row.peak_mib,
            "machine": report.machine,
            "preferences": row.figures.preferences if row.figures else None,
        }
    return figures


def measured_figures(scored: Scored, size: int) -> dict[str, Any]:
    """Return size and speed as they were measured here."""
    return {
        "bytes": size,
        "rows_per_second": scored.rows_per_second or None,
        "p50_ms": median(scored.latencies_ms) if scored.latencies_ms else None,
        "peak_mib": scored.peak_mib,
        "machine": machine_name(),
    }
