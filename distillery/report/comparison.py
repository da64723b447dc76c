"""Draw a comparison of two models: primary figure, size, speed and cost, side by side."""

from pathlib import Path
from typing import Any

from distillery.errors import DataError
from distillery.recipe import METRIC_NAMES
from distillery.registry.comparison import ModelComparison
from distillery.registry.comparison_table import CELLS

FORMATS = (".svg", ".png", ".pdf")

COLOURS = ("#0072b2", "#d55e00")
"""Of the first and the second model, told apart by people who see no red or green too (Wong,
Points of view: Color blindness, Nature Methods 8, 2011)."""

BARS = {
    "folder": ("size", "bytes"),
    "rows a second": ("rows a second", "rows_per_second"),
    "p50 ms": ("milliseconds a row, median", "p50_ms"),
    "teacher calls": ("calls to the teacher", "calls"),
    "paid": ("paid to the teacher", "cost"),
    "training minutes": ("minutes of training", "training_minutes"),
}
"""The bars by the name of their line in the table: their titles, and the fields of `Side`."""


def check_picture(path: Path) -> None:
    """Raise DataError for a path that ends in none of FORMATS, or whose folder is not there."""
    if path.suffix.lower() not in FORMATS:
        raise DataError(f"--picture {path}: name a file that ends in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise DataError(f"--picture {path}: its folder is not there; make it, or name another")


def draw_comparison(found: ModelComparison, path: Path) -> None:
    """Write a picture of a comparison: the primary figures with their 95 % intervals, the
    difference with its paired interval, and bars for what is known of either model.

    Raises DataError for a path that ends in none of FORMATS or can't be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    check_picture(path)
    sides = (found.first, found.second)
    bars = []
    for line, (title, field) in BARS.items():
        if any(getattr(side, field) is not None for side in sides):
            bars.append((line, title, field))
    style: Any = {
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "comparison",
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        rows = 1 + (len(bars) + 1) // 2
        figure = Figure(figsize=(8, 0.6 + 1.2 * rows), layout="constrained")
        panels = list(figure.subplots(rows, 2).flat)
        draw_accuracies(panels[0], found)
        draw_difference(panels[1], found)
        for panel, (line, title, field) in zip(panels[2:], bars, strict=False):
            values = [getattr(side, field) or 0 for side in sides]
            drawn = panel.barh((1, 0), values, height=0.6, color=COLOURS)
            texts = [CELLS[line](side) or "not known" for side in sides]
            panel.bar_label(drawn, texts, padding=3)
            panel.set_title(title, loc="left")
            panel.margins(x=0.3)
            panel.set_xticks([])
            name_models(panel)
        for panel in panels[2 + len(bars) :]:
            panel.set_axis_off()
        handles = [panels[0].containers[number] for number in (0, 1)]
        labels = [f"{letter}: {side.title}" for letter, side in zip("AB", sides, strict=True)]
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        try:
            figure.savefig(path, dpi=150, metadata=metadata)
        except OSError as error:
            raise DataError(
                f"--picture {path}: can't be written ({error.strerror}); name another file"
            ) from None


def draw_accuracies(panel: Any, found: ModelComparison) -> None:
    """Draw each model's primary figure with its 95 % interval."""
    for position, side, colour in zip((1, 0), (found.first, found.second), COLOURS, strict=True):
        error = [[side.accuracy - side.interval.low], [side.interval.high - side.accuracy]]
        panel.errorbar(side.accuracy, position, xerr=error, fmt="o", capsize=4, color=colour)
        panel.annotate(f"{side.accuracy:.3f}", (side.accuracy, position + 0.12), ha="center")
    figure = METRIC_NAMES[found.metric]
    panel.set_title(f"{figure} on {found.rows:,} rows, 95 % interval", loc="left")
    name_models(panel)


def draw_difference(panel: Any, found: ModelComparison) -> None:
    """Draw the first model's primary figure less the second's with its paired 95 % interval, in
    percentage points."""
    points, low, high = (
        100 * value for value in (found.difference, found.interval.low, found.interval.high)
    )
    panel.axvline(0, color="0.6", linewidth=1)
    error = [[points - low], [high - points]]
    panel.errorbar(points, 0.5, xerr=error, fmt="D", capsize=4, color="0.2")
    panel.annotate(f"{points:+.1f} [{low:+.1f}, {high:+.1f}]", (points, 0.62), ha="center")
    panel.set_title("A less B in points, paired 95 % interval", loc="left")
    panel.set_yticks([])
    panel.set_ylim(-0.5, 1.5)


def name_models(panel: Any) -> None:
    """Name the lines of a panel by the letters of the legend."""
    panel.set_yticks((1, 0), ("A", "B"))
    panel.set_ylim(-0.5, 1.5)
