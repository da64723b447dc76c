"""A ladder for people: rows of a table, and the same as text for a terminal."""

from distillery.evaluation.scoreboard import plain_table, points
from distillery.recipe import METRIC_NAMES
from distillery.records import Ladder, Rung

COLUMNS = (
    "form",
    "folder",
    "rows/s",
    "p50\nms",
    "accuracy",
    "points vs\nfloat [95 %]",
    "mean\n|dp|",
    "largest\n|dp|",
    "answers\nchanged",
    "verdict",
)

PROBABILITIES = slice(6, 8)
"""The columns on probabilities, which written answers have none of."""


def table(ladder: Ladder) -> list[dict[str, str]]:
    """Return a row for the float student and one for each rung, by the columns' titles."""
    titles = [title.replace("\n", " ") for title in titles_of(ladder)]
    rows = [shown(cells, ladder) for cells in (float_cells(ladder), *map(rung_cells, ladder.rungs))]
    return [dict(zip(titles, row, strict=True)) for row in rows]


def titles_of(ladder: Ladder) -> list[str]:
    """Return the titles of a ladder's columns, with the name of its primary figure."""
    titles = [title.replace("accuracy", METRIC_NAMES[ladder.metric]) for title in COLUMNS]
    return shown(titles, ladder)


def shown(cells: list[str], ladder: Ladder) -> list[str]:
    """Return the cells, one for each of COLUMNS, without those that written answers lack."""
    if ladder.metric:
        del cells[PROBABILITIES]
    return cells


def render_ladder(ladder: Ladder) -> str:
    """Return the table for a terminal, at most 120 columns wide. Rungs that were left out have a
    line each below it, with the reason."""
    rows = [shown(float_cells(ladder), ladder)]
    left_out = []
    for rung in ladder.rungs:
        if rung.bytes is None:
            left_out.append(describe_rung(rung))
        else:
            rows.append(shown(rung_cells(rung), ladder))
    allowed = (
        f"export.largest_loss allows {100 * ladder.largest_loss:.1f} points on "
        f"{rows_in_words(ladder.rows, ladder.training_rows)}"
    )
    lines = [plain_table(titles_of(ladder), rows), *left_out, allowed]
    # Ladders of earlier versions give no reason.
    if ladder.reason:
        lines.append(choice_in_words(ladder))
    return "\n".join(lines)


def choice_in_words(ladder: Ladder) -> str:
    """Return which rung was picked, by which setting, and why, in one line."""
    setting = ladder.choose if isinstance(ladder.choose, str) else ladder.choose.title
    picked = next(rung for rung in ladder.rungs if rung.picked)
    return f"export.choose is {setting}: {picked.form.title} is {ladder.reason}"


def rows_in_words(rows: int, training_rows: int) -> str:
    """Return how many rows choose, and of what kind, with `training_rows` of them."""
    text = f"{rows - training_rows} validation rows"
    return f"{text} and {training_rows} training rows" if training_rows else text


def describe_rung(rung: Rung) -> str:
    """Return a rung's size, speed and loss, or why it was left out, in one line."""
    if rung.bytes is None or rung.difference is None or rung.interval is None:
        return f"{rung.form.title}: {rung.note}"
    difference = f"{100 * rung.difference:+.1f} points {points(rung.interval)}"
    return f"{rung.form.title}: {rung.bytes / 1e6:.1f} MB, {describe_speed(rung)}{difference}"


def describe_speed(rung: Rung) -> str:
    """Return a rung's rows a second and its latency, as the part of a list; "" where they are not
    known."""
    if rung.p50_ms is None or rung.rows_per_second is None:
        return ""
    return f"{rung.rows_per_second:.1f} rows/s (p50 {rung.p50_ms:.1f} ms), "


def float_cells(ladder: Ladder) -> list[str]:
    """Return the cells of the float student, one for each of COLUMNS."""
    return ["float student", "", "", "", f"{ladder.accuracy:.3f}", "", "", "", "", ""]


def rung_cells(rung: Rung) -> list[str]:
    """Return the cells of a rung, one for each of COLUMNS; of one left out, the reason alone."""
    if (
        rung.bytes is None
        or rung.difference is None
        or rung.interval is None
        or rung.departure is None
    ):
        return [rung.form.title, *[""] * (len(COLUMNS) - 2), rung.note]
    return [
        rung.form.title,
        f"{rung.bytes / 1e6:.1f} MB",
        "" if rung.rows_per_second is None else f"{rung.rows_per_second:.1f}",
        "" if rung.p50_ms is None else f"{rung.p50_ms:.1f}",
        f"{rung.accuracy:.3f}",
        f"{100 * rung.difference:+.1f} {points(rung.interval)}",
        "" if rung.departure.mean is None else f"{rung.departure.mean:.4f}",
        "" if rung.departure.largest is None else f"{rung.departure.largest:.3f}",
        str(rung.departure.changed),
        rung.note,
    ]
