"""evaluation/scoreboard"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distillery.errors import ModelError
from distillery.records import Departure, Interval, ScoreRow

GOLD, TEACHER = "gold", "teacher"

REPORT_FILE, ANSWERS_FILE = "report.json", "answers.jsonl"

TABLE_FILE, PLOT_FILE = "scoreboard.md", "scoreboard.png"


def headline(rows: Sequence[ScoreRow], candidate: str, teacher: str = TEACHER) -> str:
    """One paragraph on the candidate beside the teacher, with what is known of both."""
    ours, theirs = row_named(rows, candidate), row_named(rows, teacher)
    text = f"{candidate} is right on {ours.correct} of {ours.rows} rows"
    if theirs.correct and ours is not theirs:
        text += f" and keeps {percent(ours.correct / theirs.correct)} of the teacher's accuracy"
    facts = []
    if ours.parameters and theirs.parameters:
        facts.append(f"{percent(ours.parameters / theirs.parameters)} of its parameters")
    if ours.bytes and theirs.parameters:
        facts.append(
            f"{percent(ours.bytes / (2 * theirs.parameters))} of its bfloat16 bytes (two a parameter)"
        )
    if ours.rows_per_second and theirs.rows_per_second:
        facts.append(f"{ours.rows_per_second / theirs.rows_per_second:.1f} times its rows a second")
    if facts and ours is not theirs:
        text += " with " + ", ".join(facts)
    if ours.versus_teacher:
        lost = 100 * (ours.accuracy - theirs.accuracy)
        text += (
            f"; {lost:+.1f} points against the teacher, 95 % interval {points(ours.versus_teacher)}"
        )
    if ours.departure:
        text += f"; {departed(ours.departure)}"
    return f"{text}."


def departed(apart: Departure) -> str:
    """A Departure in words."""
    return (
        f"its options' probabilities depart from the float student's by {apart.mean:.4f} on average and "
        f"{apart.largest:.3f} at most, {apart.changed} answers change"
    )


def row_named(rows: Sequence[ScoreRow], name: str) -> ScoreRow:
    for row in rows:
        if row.name == name:
            return row
    raise ModelError(
        f"the scoreboard has no line {name!r}, only {', '.join(row.name for row in rows)}"
    )


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
        percent(row.agreement) if row.agreement is not None else "",
        shown(row.parameters, "{:.1f} M", 1e6),
        shown(row.bytes, "{:.0f} MB", 1e6),
        shown(row.rows_per_second, "{:.1f}"),
        shown(row.p50_ms, "{:.1f}"),
        shown(row.p95_ms, "{:.1f}"),
        shown(row.peak_mib, "{:.0f}"),
    ]


def percent(share: float) -> str:
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


def render_markdown(rows: Sequence[ScoreRow]) -> str:
    titles = [title.replace("-\n", "").replace("\n", " ") for title in _HEADER]
    lines = [titles, [":--", *["--:"] * (len(_HEADER) - 1)], *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot_scoreboard(rows: Sequence[ScoreRow], teacher: str, path: Path) -> None:
    """Accuracy with its interval, and beside it the folder's size and the rows a second."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.name != GOLD][::-1]
    colours = ["#1f5fa8" if row.kind == "model" else "#9a9a9a" for row in shown]
    figure = Figure(figsize=(12, 1.4 + 0.45 * len(shown)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    for place, (row, colour) in enumerate(zip(shown, colours, strict=True)):
        width = [[row.accuracy - row.interval.low], [row.interval.high - row.accuracy]]
        left.errorbar(row.accuracy, place, xerr=width, fmt="o", color=colour, capsize=4)
    left.axvline(row_named(rows, teacher).accuracy, color="#1f5fa8", linestyle=":", linewidth=1)
    left.set_yticks(range(len(shown)), [row.name for row in shown])
    left.set_xlabel("accuracy, 95 % interval (dotted: the teacher)")
    _bars(middle, [row.bytes and row.bytes / 1e6 for row in shown], colours, "folder, MB")
    _bars(right, [row.rows_per_second for row in shown], colours, "rows a second, one at a time")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=120)


def _bars(axes: Any, values: Sequence[float | None], colours: Sequence[str], title: str) -> None:
    bars = axes.barh(
        range(len(values)), [value or 0 for value in values], color=colours, height=0.55
    )
    axes.bar_label(bars, [f"{value:.3g}" if value else "" for value in values], padding=3)
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.set_xlabel(title)
