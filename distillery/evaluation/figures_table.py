"""The further figures for people: a table for the terminal, and tables in Markdown."""

from collections.abc import Mapping, Sequence

from distillery.evaluation.scoreboard import plain_table
from distillery.evaluation.statistics import wilson_interval
from distillery.markdown import markdown_table
from distillery.recipe import METRIC_NAMES
from distillery.records import Figures, PreferenceFigures, ScoreRow

COLUMNS = (
    "predictor",
    "macro-F1 [95 %]",
    "calibration error [95 %]",
    "nats from teacher [95 %]",
    "p99 ms",
    "load s",
)

COVERAGE_COLUMNS = ("rows answered", "share of rows", "confidence from", "accuracy")

CLASS_COLUMNS = ("class", "rows", "precision", "recall [95 %]", "F1")

FIELD_COLUMNS = ("field", "rows with it", "precision", "recall", "F1")

FEWEST_ROWS = 10
"""Rows from which a field may be named as the one with the lowest F1. Chance makes rarer ones look
worse than they are: beside fields of 100 rows with an F1 of 0.9, of which one has 0.8, a field with
0.9 too would be named in 15 % of the runs if it had 10 rows, and in 23 % if it had 5."""


def render_figures(rows: Sequence[ScoreRow]) -> str:
    """Return the figures of the rows that have some for a terminal, at most 110 columns wide."""
    tables = []
    for row in rows:
        if row.figures:
            titles = (row.name, "figure", "95 %")
            tables.append(plain_table(titles, candidate_cells(row.figures, 40)))
    return "\n\n".join(tables)


MOST_CONFUSED = 40
"""Classes whose confusion is shown as a table, at most; report.json has it for any number."""


def render_figures_markdown(figures: Mapping[str, Figures], candidate: str) -> str:
    """Return tables in Markdown: the figures of all predictors, and of the `candidate` also those
    that it alone has, its classes and its confusion."""
    own = figures[candidate]
    if own.written or own.confusion is None:
        return render_written_markdown(figures, candidate)
    labels = own.confusion.labels
    confusion = []
    for label, counts in zip(labels, own.confusion.counts, strict=True):
        confusion.append([label, *map(str, counts)])
    tables = [
        markdown_table(COLUMNS, predictor_cells(figures)),
        markdown_table((candidate, "figure", "95 %"), candidate_cells(own)),
        markdown_table(CLASS_COLUMNS, class_cells(own)),
    ]
    if len(labels) <= MOST_CONFUSED:
        titles = (f"gold, and what {candidate} says", *labels, "no answer")
        tables.append(markdown_table(titles, confusion))
    if own.coverage:
        tables.append(markdown_table(COVERAGE_COLUMNS, coverage_cells(own)))
    return "\n\n".join(tables)


def render_written_markdown(figures: Mapping[str, Figures], candidate: str) -> str:
    """Return tables in Markdown of written answers: the figures of all predictors, those of the
    `candidate`, and its fields if there are any."""
    own = figures[candidate]
    tables = [
        markdown_table(*written_table(figures)),
        markdown_table((candidate, "figure", "95 %"), candidate_cells(own)),
    ]
    if own.written and own.written.fields:
        tables.append(markdown_table(FIELD_COLUMNS, field_cells(own)))
    return "\n\n".join(tables)


def written_table(figures: Mapping[str, Figures]) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of the predictors' figures of written answers."""
    titles, lines = ["predictor"], []
    for name, found in figures.items():
        if found.written is None:
            continue
        written = found.written
        titles = ["predictor"]
        cells = [name]
        for metric, estimate in written.metrics.items():
            titles.append(f"{METRIC_NAMES[metric]} [95 %]")
            cells.append(f"{estimate.value:.3f} {interval_cell(estimate.low, estimate.high)}")
        titles += ["valid answers", "characters, median"]
        lines.append([*cells, f"{written.valid.value:.3f}", f"{written.length:,.0f}"])
    return titles, lines


def field_cells(figures: Figures) -> list[list[str]]:
    """Return the cells of each field, one for each of FIELD_COLUMNS."""
    lines = []
    for found in figures.written.fields if figures.written else ():
        shares = [f"{share:.3f}" for share in (found.precision, found.recall, found.f1)]
        lines.append([found.field, f"{found.rows:,}", *shares])
    return lines


def predictor_cells(figures: Mapping[str, Figures]) -> list[list[str]]:
    """Return the cells of each predictor, one for each of COLUMNS."""
    lines = []
    for name, found in figures.items():
        calibration = divergence = ""
        if found.calibration:
            bounds = interval_cell(found.calibration.low, found.calibration.high)
            calibration = f"{found.calibration.error:.3f} {bounds}"
        if found.kl_from_teacher:
            bounds = interval_cell(found.kl_from_teacher.low, found.kl_from_teacher.high)
            divergence = f"{found.kl_from_teacher.value:.3f} {bounds}"
        macro_f1 = ""
        if found.macro_f1:
            bounds = interval_cell(found.macro_f1.low, found.macro_f1.high)
            macro_f1 = f"{found.macro_f1.value:.3f} {bounds}"
        lines.append(
            [
                name,
                macro_f1,
                calibration,
                divergence,
                "" if found.p99_ms is None else f"{found.p99_ms:.1f}",
                "" if found.load_s is None else f"{found.load_s:.1f}",
            ]
        )
    return lines


def candidate_cells(figures: Figures, widest: int = 1000) -> list[list[str]]:
    """Return a line for each figure: title, value and interval. A class's label is cut to `widest`
    characters."""
    lines = []

    def estimate(title: str, value: float, low: float, high: float) -> None:
        lines.append([title, f"{value:.3f}", interval_cell(low, high)])

    def measurement(title: str, value: float | None) -> None:
        if value is not None:
            lines.append([title, f"{value:.1f}", ""])

    if figures.written:
        for metric, each in figures.written.metrics.items():
            estimate(METRIC_NAMES[metric], each.value, each.low, each.high)
        valid = figures.written.valid
        estimate("rows with a valid answer", valid.value, valid.low, valid.high)
        measurement("characters of an answer, median", figures.written.length)
        frequent = [found for found in figures.written.fields if found.rows >= FEWEST_ROWS]
        if len(frequent) > 1:
            weakest = min(frequent, key=lambda found: found.f1)
            name = " ".join(weakest.field.split())[:widest]
            lines.append([f"lowest F1: {name}, {weakest.rows:,} rows", f"{weakest.f1:.3f}", ""])
    lines += preference_cells(figures.preferences, widest)
    if figures.macro_f1:
        macro_f1 = figures.macro_f1
        estimate("macro-F1", macro_f1.value, macro_f1.low, macro_f1.high)
    if figures.classes:
        lowest = min(figures.classes, key=lambda found: found.recall)
        title = f"lowest recall: {' '.join(lowest.label.split())[:widest]}, {lowest.rows} rows"
        estimate(title, lowest.recall, lowest.recall_low, lowest.recall_high)
    if figures.calibration:
        calibration = figures.calibration
        title = "expected calibration error"
        estimate(title, calibration.error, calibration.low, calibration.high)
    if figures.kl_from_teacher:
        divergence = figures.kl_from_teacher
        title = "Kullback-Leibler divergence from the teacher, nats"
        estimate(title, divergence.value, divergence.low, divergence.high)
    if figures.given:
        coverage, right = figures.given.coverage, figures.given.accuracy
        title = f"rows answered, with a confidence of {figures.given.threshold:.3f} or more"
        estimate(title, coverage.value, coverage.low, coverage.high)
        if right:
            estimate("of these answers right", right.value, right.low, right.high)
    if figures.order_robustness:
        order = figures.order_robustness
        title = f"same option in another order of options, {order.rows} rows"
        estimate(title, order.value, order.low, order.high)
    measurement("tokens a second", figures.tokens_per_second)
    measurement("time to first token, ms", figures.first_token_ms)
    measurement("p99, ms", figures.p99_ms)
    measurement("time to load, s", figures.load_s)
    return lines


def preference_cells(found: PreferenceFigures | None, widest: int = 1000) -> list[list[str]]:
    """Return a line for each of a judge's figures: title, value and interval. Its name is cut to
    `widest` characters."""
    if found is None or found.win_rate is None:
        return []
    rate = found.win_rate
    title = f"win rate against the teacher by {found.judge[:widest]}, {found.rows:,} rows"
    lines = [[title, f"{rate.value:.3f}", interval_cell(rate.low, rate.high)]]
    if found.disagreement is not None:
        interval = wilson_interval(found.disagree, found.compared)
        bounds = interval_cell(interval.low, interval.high)
        lines.append(["rows on which its two orders disagree", f"{found.disagreement:.3f}", bounds])
    return lines


def coverage_cells(figures: Figures) -> list[list[str]]:
    """Return the cells of each point of the coverage, one for each of COVERAGE_COLUMNS."""
    lines = []
    for point in figures.coverage:
        lines.append(
            [
                f"{point.rows:,}",
                f"{point.coverage:.3f}",
                f"{point.threshold:.3f}",
                f"{point.accuracy:.3f}",
            ]
        )
    return lines


def class_cells(figures: Figures) -> list[list[str]]:
    """Return the cells of each class, one for each of CLASS_COLUMNS."""
    lines = []
    for found in figures.classes:
        lines.append(
            [
                found.label,
                str(found.rows),
                f"{found.precision:.3f}",
                f"{found.recall:.3f} {interval_cell(found.recall_low, found.recall_high)}",
                f"{found.f1:.3f}",
            ]
        )
    return lines


def interval_cell(low: float, high: float) -> str:
    """Return an interval."""
    return f"[{low:.3f}, {high:.3f}]"
