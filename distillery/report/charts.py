"""The charts of a run's page, as SVG that stands inside the page.

They are drawn by Matplotlib, which the project has anyway: a chart is 5 to 20 KB, needs no
JavaScript, and is the same in any browser and on paper. Plotly's script would add 4.5 MB to each
page, and Vega-Lite's converter a new package of 30 MB. Nothing here needs a pointer: each chart has
a table with the same figures behind it.

Colours are names of CSS variables, so that a chart follows the page from light to dark. Text stays
text, in the page's own font. Series differ in their markers, too.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any

from distillery.recipe import METRIC_NAMES, Metric
from distillery.records import Bin, CoveragePoint, CurvePoint, Rung, ScoreRow

INK, LINE = "#010100", "#010101"
SERIES = ("#010102", "#010103", "#010104", "#010105", "#010106", "#010107")
"""Stand-ins for colours, which `to_svg` replaces by CSS variables."""

MARKERS = ("o", "s", "^", "D", "v", "P")

VARIABLES = {INK: "var(--ink)", LINE: "var(--line)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)
}

STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11,
    "legend.fontsize": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    # So that the label of a tick at the edge is not cut.
    "figure.constrained_layout.h_pad": 0.12,
}

WIDTH = 4.6
"""Inches: at 72 points an inch about the width of a phone, so that text is nowhere too small."""


def to_svg(draw: Callable[[Any], None], title: str, height: float) -> str:
    """Return a chart of `height` inches that `draw` draws on a Matplotlib figure; `title` is its
    text for those who don't see it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The salt names what a chart defines: two charts in a page must not share names.
    with rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(WIDTH, height))
        draw(figure)
        written = StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    drawing = written.getvalue()
    body = drawing[drawing.index("<svg") : drawing.rindex("</svg>")]
    opening, _, body = body.partition(">")
    (box,) = re.findall(r'viewBox="[^"]*"', opening)
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, variable)
    return f'<svg role="img" aria-label="{escape(title)}" {box}>{body}</svg>'


def plot_accuracy(
    rows: Sequence[ScoreRow], figure_of: Callable[[ScoreRow], float | None], label: str, title: str
) -> str | None:
    """Return the primary figure against another one of the predictors, on a logarithmic axis; None
    where no predictor has that. Predictors without it are horizontal lines."""
    # The student is the last on the scoreboard, and has the first colour here.
    shown = [row for row in reversed(rows) if row.kind != "reference"]
    if not any(map(figure_of, shown)):
        return None

    def draw(figure: Any) -> None:
        from matplotlib.ticker import LogLocator, NullLocator

        axes = figure.subplots()
        for number, row in enumerate(shown):
            colour, value = SERIES[number % len(SERIES)], figure_of(row)
            if value:
                error = [[row.accuracy - row.interval.low], [row.interval.high - row.accuracy]]
                marker = MARKERS[number % len(MARKERS)]
                axes.errorbar(
                    value, row.accuracy, error, fmt=marker, color=colour, capsize=3, label=row.name
                )
            else:
                axes.axhline(row.accuracy, color=colour, linestyle="--", label=row.name)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.15)
        axes.set(xlabel=label, ylabel=f"{METRIC_NAMES[rows[0].metric]}, 95 % interval")
        add_legend(figure)

    return to_svg(draw, title, 4.0)


def plot_forms(rungs: Sequence[Rung], metric: Metric | None, title: str) -> str | None:
    """Return the rows a second of a ladder's forms against their sizes, with their primary figures,
    which `metric` names, in the legend; None for a ladder of an earlier version, whose speeds are
    not known."""
    shown = [rung for rung in rungs if rung.bytes and rung.rows_per_second]
    if not shown:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for number, rung in enumerate(shown):
            label = f"{rung.form.title}: {METRIC_NAMES[metric]} {rung.accuracy:.3f}"
            if rung.picked:
                label += ", picked"
            axes.plot(
                (rung.bytes or 0) / 1e6,
                rung.rows_per_second,
                color=SERIES[number % len(SERIES)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=10 if rung.picked else 6,
                linestyle="",
                label=label,
            )
        axes.margins(0.15)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="MB", ylabel="rows a second")
        add_legend(figure, columns=1)

    return to_svg(draw, title, 3.2 + 0.2 * len(shown))


def plot_reliability(bins: Mapping[str, Sequence[Bin]], title: str) -> str:
    """Return confidence against accuracy of some predictors. The larger a bin's share of the rows,
    the larger its point."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=LINE, linewidth=1)
        for number, (name, groups) in enumerate(bins.items()):
            colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
            confidences = [group.confidence for group in groups]
            accuracies = [group.accuracy for group in groups]
            largest = max(group.rows for group in groups)
            sizes = [15 + 100 * group.rows / largest for group in groups]
            axes.plot(confidences, accuracies, color=colour, linewidth=1)
            axes.scatter(
                confidences, accuracies, s=sizes, color=colour, marker=marker, label=name, zorder=3
            )
        axes.set(xlabel="confidence", ylabel="share of right answers", ylim=(-0.03, 1.03))
        add_legend(figure)

    return to_svg(draw, title, 4.0)


def plot_coverage(points: Sequence[CoveragePoint], given: float | None, title: str) -> str:
    """Return the accuracy of a student's most confident answers against their share of the rows.
    `given`: the share that the student's threshold lets through, where it has one."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        coverages = [point.coverage for point in points]
        accuracies = [point.accuracy for point in points]
        axes.plot(
            coverages,
            accuracies,
            color=SERIES[0],
            marker=MARKERS[0],
            markersize=4,
            label="accuracy of the answers given",
        )
        if given is not None:
            axes.axvline(given, color=SERIES[1], linestyle="--", label="the student's threshold")
        axes.set(xlabel="share of rows answered", ylabel="accuracy", xlim=(0, 1.03))
        add_legend(figure)

    return to_svg(draw, title, 3.4)


def plot_curve(curve: Sequence[CurvePoint], title: str) -> str:
    """Return the loss over the steps of a training and, below it, the accuracy on the validation
    rows where it is known, and the share of their tokens that are right where they are written."""
    accuracies = any(point.validation_accuracy is not None for point in curve)

    def draw_known(axes: Any, figure_name: str, series: int, label: str) -> None:
        """Draw a figure of the points that have it."""
        known = [point for point in curve if getattr(point, figure_name) is not None]
        if known:
            steps = [point.step for point in known]
            values = [getattr(point, figure_name) for point in known]
            look = {"color": SERIES[series], "marker": MARKERS[series]}
            axes.plot(steps, values, label=label, **look)

    def draw(figure: Any) -> None:
        panels = 2 if accuracies else 1
        grid = figure.subplots(panels, 1, sharex=True, squeeze=False)
        axes = grid[0, 0]
        steps = [point.step for point in curve]
        axes.plot(steps, [point.loss for point in curve], color=SERIES[0], label="training loss")
        draw_known(axes, "validation_loss", 1, "validation loss")
        axes.set(ylabel="loss")
        if accuracies:
            below = grid[1, 0]
            draw_known(below, "validation_accuracy", 2, "validation accuracy")
            draw_known(below, "validation_tokens", 3, "share of tokens right")
            below.set(ylabel="accuracy")
        grid[-1, 0].set(xlabel="step")
        add_legend(figure)

    return to_svg(draw, title, 4.2 if accuracies else 3.0)


def plot_latency(latencies: Mapping[str, Sequence[float | None]], title: str) -> str:
    """Return each predictor's latencies in milliseconds, one for each of PERCENTILES."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        # The first predictor is at the top.
        names = list(reversed(list(latencies)))
        for number, label in enumerate(PERCENTILES):
            values, positions = [], []
            for position, name in enumerate(names):
                value = latencies[name][number]
                if value is not None:
                    values.append(value)
                    positions.append(position)
            if values:
                axes.plot(
                    values,
                    positions,
                    color=SERIES[number],
                    marker=MARKERS[number],
                    linestyle="",
                    label=label,
                )
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlim(left=0)
        axes.set(xlabel="milliseconds a row")
        add_legend(figure)

    return to_svg(draw, title, 1.7 + 0.4 * len(latencies))


PERCENTILES = ("median", "95th percentile", "99th percentile")


def add_legend(figure: Any, columns: int = 2) -> None:
    """Put the legend below the chart, where it hides no point."""
    figure.legend(loc="outside lower center", ncols=columns)
