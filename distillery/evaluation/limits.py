"""The figures of the scoreboard that a rule of the gate can limit, with their intervals."""

from distillery.evaluation.gold import is_share
from distillery.evaluation.statistics import (
    one_sided,
    scaled_interval,
    wilson_interval,
    win_rate_interval,
)
from distillery.recipe import LimitRule
from distillery.records import Estimate, Interval, PreferenceFigures, ScoreRow


def limited_figure(row: ScoreRow, rule: LimitRule) -> tuple[float | None, Interval | None]:
    """Return the figure that a rule limits, or None; and if the rule has a confidence, the interval
    of which each bound holds at it: a share's is Wilson's."""
    counts = share_counts(row, rule)
    if counts is not None:
        right, rows = counts
        interval = None
        if rule.confidence is not None:
            interval = wilson_interval(right, rows, one_sided(rule.confidence))
        return right / rows, interval
    preferences = preferences_in(row, rule)
    if preferences is not None:
        rate = preferences.win_rate
        if rate is None or rule.confidence is None:
            return rate.value if rate else None, None
        counted = (preferences.wins, preferences.ties, preferences.losses)
        return rate.value, win_rate_interval(*counted, one_sided(rule.confidence))
    estimate = estimate_of(row, rule)
    if estimate is not None:
        interval = None
        if rule.confidence is not None:
            interval = scaled_interval(estimate, one_sided(rule.confidence))
        return estimate.value, interval
    figure: float | None = getattr(row, rule.figure, None)
    if figure is None:
        figure = getattr(row.figures, rule.figure, None)
    return figure, None


def limited_rows(row: ScoreRow, rule: LimitRule) -> int:
    """Return how many rows the figure that a rule limits is of."""
    preferences = preferences_in(row, rule)
    return preferences.rows if preferences else row.rows


def preferences_in(row: ScoreRow, rule: LimitRule) -> PreferenceFigures | None:
    """Return a judge's figures if the rule limits its win rate; None for other figures."""
    return row.figures.preferences if rule.figure == "win_rate" and row.figures else None


def share_counts(row: ScoreRow, rule: LimitRule) -> tuple[int, int] | None:
    """Return a figure that is a share of rows as (rows that count, all rows); None for others."""
    figures = row.figures
    written = figures.written if figures else None
    if rule.figure == "accuracy" and is_share(row.metric):
        return row.correct, row.rows
    if rule.figure == "exact_match" and written:
        return row.correct, row.rows
    if rule.figure == "valid" and written:
        return round(written.valid.value * row.rows), row.rows
    if rule.figure == "agreement" and row.agreement is not None:
        return round(row.agreement * row.rows), row.rows
    if rule.figure == "order_robustness" and figures and figures.order_robustness:
        return figures.order_robustness.alike, figures.order_robustness.rows
    if rule.figure == "recall" and figures:
        for found in figures.classes:
            if found.label == rule.of_class:
                return round(found.recall * found.rows), found.rows
    return None


def estimate_of(row: ScoreRow, rule: LimitRule) -> Estimate | None:
    """Return a figure that is another estimate from the rows; None for others."""
    figures = row.figures
    if rule.figure == "accuracy":
        return Estimate(value=row.accuracy, low=row.interval.low, high=row.interval.high)
    if figures is None:
        return None
    for name, found in (figures.written.metrics if figures.written else {}).items():
        if name == rule.figure:
            return found
    if rule.figure == "macro_f1":
        return figures.macro_f1
    if rule.figure == "kl_from_teacher":
        return figures.kl_from_teacher
    if rule.figure == "calibration_error" and figures.calibration:
        error = figures.calibration
        return Estimate(value=error.error, low=error.low, high=error.high)
    return None


def missing_class(row: ScoreRow, rule: LimitRule) -> str:
    """Return that no test row has the rule's class, and which classes there are; '' if there is no
    such class to look for."""
    if rule.of_class is None or row.figures is None or not row.figures.classes:
        return ""
    known = ", ".join(found.label for found in row.figures.classes)
    return f"no test row has the answer {rule.of_class!r}, only {known}"
