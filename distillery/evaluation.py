"""Evaluation: all predictors on the same test rows, the scoreboard in four forms, and the gate before the registry.

Files out of `evaluate`: report.json (the scoreboard and what was measured where), answers.jsonl (a test row a line:
example_id, gold and each predictor's letter or null), scoreboard.md, scoreboard.png. answers.jsonl is the same byte for
byte for equal answers; the other three hold measured speeds.
"""

import json
import logging
import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

from distillery.dataset import read_examples
from distillery.errors import DataError, ModelError
from distillery.processes import run_apart
from distillery.recipe import EvaluationRecipe, PromptRecipe
from distillery.records import Departure, Example, GateDecision, Interval, Record, ScoreRow

GOLD, TEACHER = "gold", "teacher"
MAJORITY, TFIDF = "majority class", "TF-IDF + logistic regression"
REPORT_FILE, ANSWERS_FILE = "report.json", "answers.jsonl"
TABLE_FILE, PLOT_FILE = "scoreboard.md", "scoreboard.png"

Answers = Sequence[str | None]
"""A letter for each row, in the rows' order; None where there is no answer, which counts as wrong."""

Precision = Literal["auto", "float32", "bfloat16"]

_Z = NormalDist().inv_cdf(0.975)
_log = logging.getLogger(__name__)


class ModelToScore(Record):
    """A line of the scoreboard to be: a Transformers folder (with a LoRA adapter or without) or an ONNX folder. `bytes`
    is what the folder weighs, `parameters` what it has; `prompt` its own, where it is asked otherwise than the rest."""

    name: str
    kind: Literal["transformers", "onnx"]
    folder: str
    adapter: str | None = None
    remote_code: bool = False
    parameters: int | None = None
    bytes: int | None = None
    prompt: PromptRecipe | None = None


class ScoringJob(Record):
    """What the process that scores a model is told."""

    model: ModelToScore
    examples: str
    prompt: PromptRecipe
    threads: int
    precision: Precision = "auto"


class Scored(Record):
    """What it tells. Answers and probabilities (over the row's options) by row, None for a prompt over the budget;
    latencies in ms of the rows that were asked, one at a time; `peak_mib` is the process's, loading included.

    What a prompt shares with the one before it is computed only once, by Transformers as by ONNX Runtime; the latencies
    show that, as users would see it. Where the answer is an option's text, ONNX Runtime alone has this."""

    answers: tuple[str | None, ...]
    probabilities: tuple[tuple[float, ...] | None, ...]
    latencies_ms: tuple[float, ...]
    rows_per_second: float
    peak_mib: float
    load_s: float
    ran_on: str


def score_model(
    model: ModelToScore,
    examples_file: Path,
    prompt: PromptRecipe,
    threads: int | None = None,
    precision: Precision = "auto",
) -> Scored:
    """Scores `model` on the rows of `examples_file` in a process of its own, which ends with this one; `threads`
    defaults to the cores.

    `precision` is that of a Transformers model; auto is bfloat16 on a GPU that has it, else float32. Raises ModelError
    with the reason that the process gives."""
    job = ScoringJob(
        model=model,
        examples=str(Path(examples_file).absolute()),
        prompt=model.prompt or prompt,
        threads=threads or cores(),
        precision=precision,
    )
    try:
        return Scored.model_validate_json(run_apart("distillery.scoring", job))
    except ModelError as error:
        raise ModelError(f"{model.name}: {error}") from error


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """The processor's name and the cores that this process may use: speeds compare only within one of these."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {cores()} cores"


def evaluate(
    models: Sequence[ModelToScore],
    teacher: str | Mapping[str, str],
    test: Path,
    train: Path | None,
    prompt: PromptRecipe,
    candidate: str,
    out: Path,
    *,
    float_model: str | None = None,
    threads: int | None = None,
) -> tuple[ScoreRow, ...]:
    """Scores every model and the baselines on the rows of `test`, and writes the report into `out` (see the module).

    `teacher` is the name of one of `models`, or an endpoint's letters by example_id. `train` holds answered Examples,
    from which the baselines learn; without it they are left out. `candidate` is the model that may be registered, and
    `float_model` the one that it was exported from: how far the two are apart is a figure of the report.
    Raises DataError for test rows that can't serve, ModelError for a model that can't be scored."""
    examples, gold = answered_rows(test)
    teacher_name = teacher if isinstance(teacher, str) else TEACHER
    baselines, notes = _baselines(examples, train)
    answers: dict[str, Answers] = {GOLD: gold, **baselines}
    if not isinstance(teacher, str):
        answers[TEACHER] = [teacher.get(example.example_id) for example in examples]
    _check_names([*answers, *(model.name for model in models)], teacher_name, candidate)
    scored: dict[str, Scored] = {}
    for model in models:
        scored[model.name] = score_model(model, test, prompt, threads)
        answers[model.name] = scored[model.name].answers
        _log.info("scored %s: %.1f rows a second", model.name, scored[model.name].rows_per_second)
    by_name = {model.name: model for model in models}
    apart = {candidate: departure(scored[candidate], scored[float_model])} if float_model else {}
    rows = tuple(
        _score_row(name, answers, teacher_name, by_name.get(name), scored.get(name), apart.get(name))
        for name in answers
    )
    notes += _measuring_notes(scored, threads or cores())
    _write_report(out, rows, candidate, teacher_name, scored, notes)
    _write_answers(out / ANSWERS_FILE, examples, answers)
    return rows


def answered_rows(path: Path, role: str = "test") -> tuple[list[Example], list[str]]:
    """The rows of a split that judges, and their gold letters. Raises DataError where there are none."""
    examples = read_examples(path)
    if not examples:
        raise DataError(f"{path}: no {role} row; prepare the data set again")
    for example in examples:
        if example.answer_key not in example.letters:
            raise DataError(f"{path}: row {example.example_id} has no gold answer; {role} rows need one")
    return examples, [str(example.answer_key) for example in examples]


def departure(exported: Scored, exact: Scored) -> Departure:
    """How far `exported` is from `exact` on the same rows; a row that either was not asked is left out, and where no
    row is left there is no departure: 0."""
    import numpy as np

    pairs = zip(exported.probabilities, exact.probabilities, strict=True)
    apart = [abs(np.subtract(a, b)) for a, b in pairs if a is not None and b is not None]
    each = np.concatenate(apart) if apart else np.zeros(1)
    changed = sum(a != b for a, b in zip(exported.answers, exact.answers, strict=True))
    return Departure(mean=float(each.mean()), largest=float(each.max()), changed=changed)


def _check_names(names: list[str], teacher: str, candidate: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ModelError(f"two lines of the scoreboard are named {name!r}; rename one")
    for name in (teacher, candidate):
        if name not in names:
            raise ModelError(f"no model to score is named {name!r}, only {', '.join(names)}")


def _baselines(examples: Sequence[Example], train: Path | None) -> tuple[dict[str, Answers], list[str]]:
    """The baselines' answers, and a line for each that is left out."""
    learnt = [example for example in read_examples(train) if example.answer_key] if train else []
    if not learnt:
        return {}, [f"{MAJORITY} and {TFIDF} are left out: there is no answered row to learn from."]
    keys = [str(example.answer_key) for example in learnt]
    majority = Counter(keys).most_common(1)[0][0]
    answers: dict[str, Answers] = {MAJORITY: [majority] * len(examples)}
    if len({example.choices for example in (*learnt, *examples)}) > 1:
        return answers, [f"{TFIDF} is left out: the options differ from row to row, so that letters are no classes."]
    if len(set(keys)) < 2:
        return answers, [f"{TFIDF} is left out: all rows to learn from have one answer."]
    answers[TFIDF] = _tfidf(learnt, keys, examples)
    return answers, []


def _tfidf(learnt: Sequence[Example], keys: Sequence[str], examples: Sequence[Example]) -> list[str]:
    """Logistic regression (C = 10) over the question's words and pairs of words, term frequencies sublinear."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)  # type: ignore[no-untyped-call]
    classifier = LogisticRegression(C=10, max_iter=1000)  # type: ignore[no-untyped-call]
    pipeline = make_pipeline(words, classifier)  # type: ignore[no-untyped-call]
    pipeline.fit([example.question for example in learnt], keys)
    return [str(letter) for letter in pipeline.predict([example.question for example in examples])]


def _score_row(
    name: str,
    answers: Mapping[str, Answers],
    teacher: str,
    model: ModelToScore | None,
    scored: Scored | None,
    apart: Departure | None,
) -> ScoreRow:
    gold, own = answers[GOLD], answers[name]
    right = right_answers(own, gold)
    correct = sum(right)
    compared = name not in (GOLD, teacher)
    agreed = sum(a is not None and a == b for a, b in zip(own, answers[teacher], strict=True))
    return ScoreRow(
        name=name,
        kind="reference" if name == GOLD else "baseline" if name in (MAJORITY, TFIDF) else "model",
        correct=correct,
        rows=len(gold),
        accuracy=correct / len(gold),
        interval=Interval(low=1, high=1) if name == GOLD else wilson(correct, len(gold)),
        versus_teacher=paired_interval(right, right_answers(answers[teacher], gold)) if compared else None,
        agreement=agreed / len(gold) if compared else None,
        parameters=model.parameters if model else None,
        bytes=model.bytes if model else None,
        departure=apart,
        **(_speeds(scored) if scored else {}),
    )


def right_answers(answers: Answers, gold: Answers) -> list[bool]:
    return [a == b for a, b in zip(answers, gold, strict=True)]


def _speeds(scored: Scored) -> dict[str, float | None]:
    import numpy as np

    p50, p95 = np.percentile(scored.latencies_ms, (50, 95)).tolist() if scored.latencies_ms else (None, None)
    return {
        "rows_per_second": scored.rows_per_second or None,
        "p50_ms": p50,
        "p95_ms": p95,
        "peak_mib": scored.peak_mib,
    }


def _measuring_notes(scored: Mapping[str, Scored], threads: int) -> list[str]:
    where = "; ".join(f"{name}: {result.ran_on}" for name, result in scored.items())
    notes = [f"Measured one row at a time on {machine()}, {threads} threads ({where})."] if scored else []
    for name, result in scored.items():
        unasked = result.answers.count(None)
        if unasked:
            notes.append(f"{name}: {unasked} prompts are over prompt.max_tokens and count as wrong.")
    return notes


# Statistics


def wilson(correct: int, rows: int) -> Interval:
    """The 95 % score interval of a proportion of `rows` (1 or more), in [0, 1], without continuity correction.

    Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927); method 3 in Newcombe,
    Two-sided confidence intervals for the single proportion, Statistics in Medicine 17 (1998), 857-872."""
    share = correct / rows
    centre = share + _Z**2 / (2 * rows)
    half = _Z * math.sqrt(share * (1 - share) / rows + _Z**2 / (4 * rows**2))
    scale = 1 + _Z**2 / rows
    # Rounding must not leave the share itself outside: at 0 and at 1 it is an end of its interval.
    low, high = min(max(0.0, (centre - half) / scale), share), max(min(1.0, (centre + half) / scale), share)
    return Interval(low=low, high=high)


def paired_interval(a_correct: Sequence[bool], b_correct: Sequence[bool]) -> Interval:
    """The 95 % interval of a's accuracy less b's on the same rows (1 or more), in [-1, 1].

    Newcombe, Improved confidence intervals for the difference between binomial proportions based on paired data,
    Statistics in Medicine 17 (1998), 2635-2650, method 10: both Wilson intervals, squared and added less twice their
    product with the correlation phi, whose numerator is brought n/2 nearer to 0 where it is positive. It keeps a width
    where the two are right on the same rows."""
    n = len(a_correct)
    pairs = Counter(zip(a_correct, b_correct, strict=True))
    a, b = sum(a_correct), sum(b_correct)
    wilson_a, wilson_b = wilson(a, n), wilson(b, n)
    covariance: float = pairs[True, True] * pairs[False, False] - pairs[True, False] * pairs[False, True]
    if covariance > 0:
        covariance = max(covariance - n / 2, 0)
    spread = math.sqrt(a * (n - a) * b * (n - b))
    phi = covariance / spread if spread else 0.0
    difference = (a - b) / n
    return Interval(
        low=difference - _joint(a / n - wilson_a.low, wilson_b.high - b / n, phi),
        high=difference + _joint(wilson_a.high - a / n, b / n - wilson_b.low, phi),
    )


def _joint(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))


# The report's forms


def _write_report(
    out: Path,
    rows: Sequence[ScoreRow],
    candidate: str,
    teacher: str,
    scored: Mapping[str, Scored],
    notes: Sequence[str],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "candidate": candidate,
        "teacher": teacher,
        "machine": machine(),
        "ran_on": {name: result.ran_on for name, result in scored.items()},
        "load_s": {name: result.load_s for name, result in scored.items()},
        "headline": headline(rows, candidate, teacher),
        "notes": list(notes),
        "scoreboard": [row.model_dump() for row in rows],
    }
    _write(out / REPORT_FILE, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    _write(out / TABLE_FILE, "\n\n".join([_markdown(rows), report["headline"], *notes]) + "\n")
    _plot(rows, teacher, out / PLOT_FILE)


def _write_answers(path: Path, examples: Sequence[Example], answers: Mapping[str, Answers]) -> None:
    columns = zip(*answers.values(), strict=True)
    lines = [
        json.dumps({"example_id": example.example_id, **dict(zip(answers, letters, strict=True))}, ensure_ascii=False)
        for example, letters in zip(examples, columns, strict=True)
    ]
    _write(path, "".join(f"{line}\n" for line in lines))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def headline(rows: Sequence[ScoreRow], candidate: str, teacher: str = TEACHER) -> str:
    """One paragraph on the candidate beside the teacher, with what is known of both."""
    ours, theirs = _named(rows, candidate), _named(rows, teacher)
    text = f"{candidate} is right on {ours.correct} of {ours.rows} rows"
    if theirs.correct and ours is not theirs:
        text += f" and keeps {_percent(ours.correct / theirs.correct)} of the teacher's accuracy"
    facts = []
    if ours.parameters and theirs.parameters:
        facts.append(f"{_percent(ours.parameters / theirs.parameters)} of its parameters")
    if ours.bytes and theirs.parameters:
        facts.append(f"{_percent(ours.bytes / (2 * theirs.parameters))} of its bfloat16 bytes (two a parameter)")
    if ours.rows_per_second and theirs.rows_per_second:
        facts.append(f"{ours.rows_per_second / theirs.rows_per_second:.1f} times its rows a second")
    if facts and ours is not theirs:
        text += " with " + ", ".join(facts)
    if ours.versus_teacher:
        lost = 100 * (ours.accuracy - theirs.accuracy)
        text += f"; {lost:+.1f} points against the teacher, 95 % interval {points(ours.versus_teacher)}"
    if ours.departure:
        text += f"; {departed(ours.departure)}"
    return f"{text}."


def departed(apart: Departure) -> str:
    """A Departure in words."""
    return (
        f"its options' probabilities depart from the float student's by {apart.mean:.4f} on average and "
        f"{apart.largest:.3f} at most, {apart.changed} answers change"
    )


def _named(rows: Sequence[ScoreRow], name: str) -> ScoreRow:
    for row in rows:
        if row.name == name:
            return row
    raise ModelError(f"the scoreboard has no line {name!r}, only {', '.join(row.name for row in rows)}")


_HEADER = (
    "predictor",
    "accuracy\n[95 %]",
    "points vs\nteacher [95 %]",
    "agrees\nwith it",
    "param-\neters",
    "folder",
    "rows\na second",
    "p50\nms",
    "p95\nms",
    "peak\nMiB",
)


def _cells(row: ScoreRow) -> list[str]:
    def shown(value: float | None, form: str, scale: float = 1) -> str:
        return "" if value is None else form.format(value / scale)

    return [
        row.name,
        f"{row.accuracy:.3f} [{row.interval.low:.3f}, {row.interval.high:.3f}]",
        points(row.versus_teacher) if row.versus_teacher else "",
        _percent(row.agreement) if row.agreement is not None else "",
        shown(row.parameters, "{:.1f} M", 1e6),
        shown(row.bytes, "{:.0f} MB", 1e6),
        shown(row.rows_per_second, "{:.1f}"),
        shown(row.p50_ms, "{:.1f}"),
        shown(row.p95_ms, "{:.1f}"),
        shown(row.peak_mib, "{:.0f}"),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(interval: Interval) -> str:
    """In points of accuracy."""
    return f"[{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def render_table(rows: Sequence[ScoreRow]) -> str:
    """The scoreboard for a terminal: plain text, 120 columns at most, the figures of scoreboard.md."""
    return plain_table(_HEADER, [_cells(row) for row in rows])


def plain_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal, 120 columns at most; all but the first column stand to the right, on one line."""
    from io import StringIO

    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left", no_wrap=number > 0)
    for row in rows:
        table.add_row(*row)
    text = StringIO()
    Console(file=text, width=120, color_system=None, markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _markdown(rows: Sequence[ScoreRow]) -> str:
    titles = [title.replace("-\n", "").replace("\n", " ") for title in _HEADER]
    lines = [titles, [":--", *["--:"] * (len(_HEADER) - 1)], *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plot(rows: Sequence[ScoreRow], teacher: str, path: Path) -> None:
    """Accuracy with its interval, and beside it the folder's size and the rows a second."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.name != GOLD][::-1]
    colours = ["#1f5fa8" if row.kind == "model" else "#9a9a9a" for row in shown]
    figure = Figure(figsize=(12, 1.4 + 0.45 * len(shown)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    for place, (row, colour) in enumerate(zip(shown, colours, strict=True)):
        width = [[row.accuracy - row.interval.low], [row.interval.high - row.accuracy]]
        left.errorbar(row.accuracy, place, xerr=width, fmt="o", color=colour, capsize=4)
    left.axvline(_named(rows, teacher).accuracy, color="#1f5fa8", linestyle=":", linewidth=1)
    left.set_yticks(range(len(shown)), [row.name for row in shown])
    left.set_xlabel("accuracy, 95 % interval (dotted: the teacher)")
    _bars(middle, [row.bytes and row.bytes / 1e6 for row in shown], colours, "folder, MB")
    _bars(right, [row.rows_per_second for row in shown], colours, "rows a second, one at a time")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=120)


def _bars(axes: Any, values: Sequence[float | None], colours: Sequence[str], title: str) -> None:
    bars = axes.barh(range(len(values)), [value or 0 for value in values], color=colours, height=0.55)
    axes.bar_label(bars, [f"{value:.3g}" if value else "" for value in values], padding=3)
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.set_xlabel(title)


# The gate


def gate(
    report_rows: Sequence[ScoreRow],
    candidate: str,
    teacher: str = TEACHER,
    *,
    recipe: EvaluationRecipe,
    answers: Path,
    champion_answers: Path | None = None,
    champion: str | None = None,
    champion_candidate: str | None = None,
) -> GateDecision:
    """Whether the candidate may be registered: it keeps evaluation.minimum_kept of the teacher's accuracy, and is not
    worse than the champion by more than evaluation.maximum_loss on the test rows that both answered.

    `answers` and `champion_answers` are the answers.jsonl of the two evaluations; the champion's column is
    `champion_candidate`, by default named as ours. A champion without a shared row can't be compared and stops the
    candidate, unless maximum_loss is 1. Raises DataError for a file that can't be read."""
    ours, theirs = _named(report_rows, candidate), _named(report_rows, teacher)
    kept = ours.correct / theirs.correct if theirs.correct else 1.0
    passed = ours.correct >= recipe.minimum_kept * theirs.correct - 1e-9
    reason = (
        f"{candidate} keeps {_percent(kept)} of the teacher's accuracy ({ours.accuracy:.3f} of {theirs.accuracy:.3f}); "
        f"evaluation.minimum_kept asks for {_percent(recipe.minimum_kept)}"
    )
    if passed and champion_answers is not None:
        passed, compared = _against_champion(
            answers, candidate, champion_answers, champion_candidate or candidate, champion or "the champion", recipe
        )
        reason = f"{reason}; {compared}"
    return GateDecision(passed=passed, reason=f"{'passed' if passed else 'refused'}: {reason}", champion=champion)


def _against_champion(
    answers: Path, candidate: str, champion_answers: Path, column: str, champion: str, recipe: EvaluationRecipe
) -> tuple[bool, str]:
    own, other = _read_answers(answers), _read_answers(champion_answers)
    shared = [key for key in own if column in other.get(key, {})]
    if not shared:
        return recipe.maximum_loss >= 1, (
            f"no test row is shared with {champion}, so the two can't be compared; "
            "only evaluation.maximum_loss: 1 lets such a candidate pass"
        )
    gold = [own[key][GOLD] for key in shared]
    ours = right_answers([own[key][candidate] for key in shared], gold)
    theirs = right_answers([other[key][column] for key in shared], gold)
    allowed = 100 * recipe.maximum_loss
    gained = (sum(ours) - sum(theirs)) / len(shared)
    return gained >= -recipe.maximum_loss - 1e-9, (
        f"{100 * gained:+.1f} points against {champion} on {len(shared)} shared rows, 95 % interval "
        f"{points(paired_interval(ours, theirs))}; evaluation.maximum_loss allows to lose {allowed:.1f}"
    )


def candidate_of(answers: Path) -> str | None:
    """The name of the candidate in an answers.jsonl, which is its last column; it tells the precision, in which a
    champion may differ. None for a file without rows. Raises DataError for a file that can't be read."""
    first = next(iter(_read_answers(answers).values()), {})
    return next(reversed(first), None)


def _read_answers(path: Path) -> dict[str, dict[str, str | None]]:
    """The lines of an answers.jsonl by example_id."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return {row["example_id"]: row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: can't be read as answers ({type(error).__name__}); evaluate again") from error
