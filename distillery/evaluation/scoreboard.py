"""The scoreboard for people: a headline, a table for the terminal and one in Markdown, a plot."""

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from distillery.errors import ModelError
from distillery.markdown import markdown_table
from distillery.recipe import METRIC_NAMES
from distillery.records import Departure, Interval, ScoreRow

GOLD = "gold"
"""The row of the gold answers, and their column in answers.jsonl."""

TEACHER = "teacher"
"""The teacher's row, save where `evaluate` is given another name."""

FLOAT = "student"
"""The row of the student as training left it, before the export."""

BASE = "base model"
"""The row of the student's base model before any training."""

BUSY = 0.1
"""Share of the time in which a model is timed that it waits for a processor, from which its speed
is no longer its own. On an idle machine it waits about 0.01 of the time."""

ON_BUSY_MACHINE = "measured on a busy machine"
"""What stands beside such a speed."""

COLUMNS = (
    "predictor",
    "accuracy\n[95 %]",
    "points vs\nteacher [95 %]",
    "agrees\nwith it",
    "param-\neters",
    "folder",
    "rows/s",
    "p50\nms",
    "p95\nms",
    "peak\nMiB",
)


def headline(rows: Sequence[ScoreRow], candidate: str, teacher: str = TEACHER) -> str:
    """Return a sentence that compares the candidate with the teacher, in all that is known of
    both. Where the classes are uneven, it begins with macro-F1."""
    ours, theirs = row_named(rows, candidate), row_named(rows, teacher)
    name = METRIC_NAMES[ours.metric]
    text = f"{candidate} is right on {ours.correct} of {ours.rows} rows"
    if ours.metric:
        text = f"{candidate} has {name} {ours.accuracy:.3f} on {ours.rows} rows"
    if ours is not theirs:
        if theirs.accuracy:
            kept = percent(ours.accuracy / theirs.accuracy)
            text += f" and keeps {kept} of the teacher's {name}"
        facts = compared_costs(ours, theirs)
        if facts:
            text += " with " + ", ".join(facts)
    if ours.versus_teacher:
        difference = 100 * (ours.accuracy - theirs.accuracy)
        interval = points(ours.versus_teacher)
        text += f"; {difference:+.1f} points against the teacher, 95 % interval {interval}"
    if ours.departure:
        text += f"; {describe_departure(ours.departure)}"
    uneven = describe_unevenness(ours)
    if ours.figures and ours.figures.macro_f1 and uneven:
        text = f"{candidate} has macro-F1 {ours.figures.macro_f1.value:.3f} ({uneven}); {text}"
    return f"{text}."


def describe_unevenness(row: ScoreRow) -> str:
    """Return how uneven the classes of a predictor's test rows are; '' where they are not."""
    uneven = row.figures.uneven_classes if row.figures else None
    if uneven is None:
        return ""
    commonest, rarest = uneven
    return (
        f"the first figure, because the classes are uneven: {commonest.rows:,} test rows of "
        f"{commonest.label!r}, {rarest.rows:,} of {rarest.label!r}"
    )


def compared_costs(ours: ScoreRow, theirs: ScoreRow) -> list[str]:
    """Return phrases that compare parameters, bytes and speed, where they are known."""
    phrases = []
    if theirs.parameters:
        if ours.parameters:
            phrases.append(f"{percent(ours.parameters / theirs.parameters)} of its parameters")
        if ours.bytes:
            share = percent(ours.bytes / (2 * theirs.parameters))
            phrases.append(f"{share} of its bfloat16 bytes (two a parameter)")
    if ours.rows_per_second and theirs.rows_per_second:
        times = ours.rows_per_second / theirs.rows_per_second
        where = f" ({ON_BUSY_MACHINE})" if is_slowed(ours) or is_slowed(theirs) else ""
        phrases.append(f"{times:.1f} times its rows a second{where}")
    return phrases


def is_slowed(row: ScoreRow) -> bool:
    """Return whether other work slowed a model down while it was timed, as far as is known."""
    return row.waited is not None and row.waited >= BUSY


def describe_waiting(rows: Sequence[ScoreRow]) -> str:
    """Return how long the models waited for a processor while they were timed, in a sentence for
    people; "" where other work slowed none of them down."""
    if not any(map(is_slowed, rows)):
        return ""
    shares = [f"{row.name} {100 * row.waited:.0f} %" for row in rows if row.waited is not None]
    return (
        "The machine was busy while the models were timed, so do not compare their speeds. They "
        f"waited for a processor for this share of the time: {', '.join(shares)}."
    )


def describe_departure(departure: Departure) -> str:
    """Return in words how far an exported student departs from the float student."""
    changed = f"{departure.changed} answers change"
    if departure.changed == 1:
        changed = "1 answer changes"
    if departure.mean is None or departure.largest is None:
        return f"{changed} from the float student's"
    return (
        f"its options' probabilities depart from the float student's by {departure.mean:.4f} on "
        f"average and {departure.largest:.3f} at most, {changed}"
    )


def row_named(rows: Sequence[ScoreRow], name: str) -> ScoreRow:
    """Return the row of a predictor. Raises ModelError where there is none."""
    for row in rows:
        if row.name == name:
            return row
    names = ", ".join(row.name for row in rows)
    raise ModelError(f"the scoreboard has no line {name!r}, only {names}")


def percent(share: float) -> str:
    """Return a share (0 to 1) in percent."""
    return f"{100 * share:.1f} %"


def points(interval: Interval) -> str:
    """Return an interval of shares in percentage points."""
    return f"[{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def titles_of(rows: Sequence[ScoreRow]) -> list[str]:
    """Return the titles of the columns: COLUMNS, with the name of the primary figure."""
    return [title.replace("accuracy", METRIC_NAMES[rows[0].metric]) for title in COLUMNS]


def table_cells(row: ScoreRow) -> list[str]:
    """Return a row's cells, one for each of COLUMNS; a figure that the row lacks is empty."""
    versus_teacher = agreement = ""
    if row.versus_teacher is not None:
        versus_teacher = points(row.versus_teacher)
    if row.agreement is not None:
        agreement = percent(row.agreement)

    def figure(value: float | None, template: str, divisor: float = 1) -> str:
        if value is None:
            return ""
        return template.format(value / divisor)

    return [
        row.name,
        f"{row.accuracy:.3f} [{row.interval.low:.3f}, {row.interval.high:.3f}]",
        versus_teacher,
        agreement,
        figure(row.parameters, "{:.1f} M", 1e6),
        figure(row.bytes, "{:.0f} MB", 1e6),
        figure(row.rows_per_second, "{:.1f}"),
        figure(row.p50_ms, "{:.1f}"),
        figure(row.p95_ms, "{:.1f}"),
        figure(row.peak_mib, "{:.0f}"),
    ]


def render_table(rows: Sequence[ScoreRow]) -> str:
    """Return the scoreboard for a terminal, at most 120 columns wide."""
    return plain_table(titles_of(rows), list(map(table_cells, rows)))


def plain_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table for a terminal, at most 120 columns wide. All columns but the first are
    aligned to the right and never wrapped."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column(titles[0])
    for title in titles[1:]:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    text = StringIO()
    Console(file=text, width=120, color_system=None, markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def render_markdown(rows: Sequence[ScoreRow]) -> str:
    """Return the scoreboard as a table in Markdown."""
    return markdown_table(one_line_titles(rows), list(map(table_cells, rows)))


def one_line_titles(rows: Sequence[ScoreRow]) -> list[str]:
    """Return the titles of the columns, each in one line."""
    return [title.replace("-\n", "").replace("\n", " ") for title in titles_of(rows)]


def plot_scoreboard(rows: Sequence[ScoreRow], teacher: str, path: Path) -> None:
    """Write a picture of the primary figure with its interval, the folder's size and the rows a
    second."""
    from matplotlib.figure import Figure

    shown = [row for row in reversed(rows) if row.name != GOLD]
    figure = Figure(figsize=(12, 1.4 + 0.45 * len(shown)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    colours, megabytes, speeds = [], [], []
    for position, row in enumerate(shown):
        colour = "#9a9a9a"
        if row.kind == "model":
            colour = "#1f5fa8"
        error = [[row.accuracy - row.interval.low], [row.interval.high - row.accuracy]]
        left.errorbar(row.accuracy, position, xerr=error, fmt="o", color=colour, capsize=4)
        colours.append(colour)
        megabytes.append((row.bytes or 0) / 1e6)
        speeds.append(row.rows_per_second or 0)
    left.axvline(row_named(rows, teacher).accuracy, color="#1f5fa8", linestyle=":", linewidth=1)
    left.set_yticks(range(len(shown)), [row.name for row in shown])
    left.set_xlabel(f"{METRIC_NAMES[rows[0].metric]}, 95 % interval (dotted: the teacher)")
    plot_bars(middle, megabytes, colours, "folder, MB")
    plot_bars(right, speeds, colours, "rows a second, one at a time")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=120)


def plot_bars(axes: Any, values: Sequence[float], colours: Sequence[str], title: str) -> None:
    """Plot horizontal bars with their values; 0 stands for a value that is not known."""
    labels = [f"{value:.3g}" if value else "" for value in values]
    bars = axes.barh(range(len(values)), values, color=colours, height=0.55)
    axes.bar_label(bars, labels, padding=3)
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.set_xlabel(title)
