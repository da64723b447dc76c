"""The gate's verdicts for people: one line of reason, a table for the terminal, one in Markdown."""

from collections.abc import Sequence

from distillery.evaluation.scoreboard import percent, plain_table, points
from distillery.recipe import BetterRule, KeepsRule, LimitRule, NotWorseRule
from distillery.records import RuleVerdict

TITLES = ("rule", "figure", "bound", "McNemar p", "verdict")


def reason_of(candidate: str, verdicts: Sequence[RuleVerdict]) -> str:
    """Return the decision and why, in one line: the rules that the candidate fails, or else all."""
    failed = [verdict for verdict in verdicts if not verdict.passes]
    if failed:
        text = f"refused: {candidate} fails {len(failed)} of {count_rules(len(verdicts))}"
    elif verdicts:
        text = f"passed: {candidate} passes {count_rules(len(verdicts))}"
    else:
        return "passed: the recipe has no rules for the gate"
    return f"{text}: {'; '.join(map(describe_verdict, failed or verdicts))}"


def count_rules(number: int) -> str:
    """Return such as '2 rules'."""
    return "1 rule" if number == 1 else f"{number} rules"


def describe_verdict(verdict: RuleVerdict) -> str:
    """Return a rule, its figure and its bound, and what is worth a note, in words."""
    parts = []
    if verdict.figure is not None:
        parts.append(f"{figure_cell(verdict)} must be {bound_cell(verdict)}")
    if verdict.note:
        parts.append(verdict.note)
    if verdict.verdict == "undecided":
        parts.append(undecided_cell(verdict))
    return f"{verdict.rule.title}: {', '.join(parts)}"


def table_cells(verdict: RuleVerdict) -> list[str]:
    """Return a verdict's cells, one for each of TITLES."""
    p_value = ""
    if verdict.p_value is not None:
        p_value = f"{verdict.p_value:.3f}" if verdict.p_value >= 0.001 else "<0.001"
    outcome: str = verdict.verdict
    if outcome == "undecided":
        outcome = undecided_cell(verdict)
    if verdict.figure is None:
        outcome += f": {verdict.note}"
    return [verdict.rule.title, figure_cell(verdict), bound_cell(verdict), p_value, outcome]


def undecided_cell(verdict: RuleVerdict) -> str:
    """Return what an undecided rule counts as, and how many rows would decide it."""
    text = "undecided"
    if verdict.passes:
        text += ", passes"
    if verdict.rows_needed:
        text += f": {verdict.rows_needed:,} rows would do"
    return text


def figure_cell(verdict: RuleVerdict) -> str:
    """Return the figure with its one-sided bounds; '' where there is none."""
    figure, interval = verdict.figure, verdict.interval
    if figure is None:
        return ""
    if isinstance(verdict.rule, BetterRule | NotWorseRule):
        text = f"{100 * figure:+.1f} points"
        return f"{text} {points(interval)}" if interval else text
    if isinstance(verdict.rule, KeepsRule):
        text = percent(figure)
        if interval:
            text += f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
        return text
    return number(figure)


def bound_cell(verdict: RuleVerdict) -> str:
    """Return what the rule asks of the figure."""
    rule = verdict.rule
    if isinstance(rule, BetterRule):
        return above("0.0", rule.confidence)
    if isinstance(rule, NotWorseRule):
        return above(f"{-100 * rule.margin:.1f}", rule.confidence)
    if isinstance(rule, KeepsRule):
        return above(percent(rule.share), rule.confidence)
    parts = []
    if rule.minimum is not None:
        parts.append(f"≥ {number(rule.minimum)}")
    if isinstance(rule, LimitRule) and rule.maximum is not None:
        parts.append(f"≤ {number(rule.maximum)}")
    return ", ".join(parts)


def above(limit: str, confidence: float | None) -> str:
    """Return a lower limit, with the confidence of the bound that must be above it."""
    if confidence is None:
        return f"≥ {limit}"
    return f"> {limit} at {100 * confidence:g} %"


def number(value: float) -> str:
    """Return a figure with four digits, or whole from 1,000 on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def render_verdicts(verdicts: Sequence[RuleVerdict]) -> str:
    """Return the table for a terminal, at most 120 columns wide."""
    return plain_table(TITLES, list(map(table_cells, verdicts)))


def render_verdicts_markdown(verdicts: Sequence[RuleVerdict]) -> str:
    """Return the table in Markdown."""
    lines = [TITLES, [":--", *["--:"] * (len(TITLES) - 1)], *map(table_cells, verdicts)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
