"""The gate's verdicts for people: one line of reason, a table for the terminal, one in Markdown."""

from collections.abc import Sequence

from distillery.evaluation.scoreboard import percent, plain_table, points
from distillery.markdown import markdown_table
from distillery.recipe import METRIC_NAMES, BetterRule, KeepsRule, LimitRule, NotWorseRule
from distillery.records import RuleVerdict

TITLES = ("rule", "figure", "bound", "McNemar p", "verdict")


def reason_of(candidate: str, verdicts: Sequence[RuleVerdict]) -> str:
    """Return the decision and why, in one line: the rules that the candidate fails, or else all."""
    if not verdicts:
        return "passed: the recipe has no rules for the gate"
    failed = [verdict for verdict in verdicts if not verdict.passes]
    if failed:
        return f"refused: {candidate} does not pass: {'; '.join(map(describe_verdict, failed))}"
    return f"passed: {candidate} passes all rules: {'; '.join(map(describe_verdict, verdicts))}"


def title_of(verdict: RuleVerdict) -> str:
    """Return a rule's title: its own name, or what it asks for, with the name of the primary
    figure."""
    rule = verdict.rule
    return rule.name or rule.content.replace("accuracy", METRIC_NAMES[verdict.metric])


def describe_verdict(verdict: RuleVerdict) -> str:
    """Return a rule, and in brackets its figure, what it should be, and the note."""
    parts = []
    if verdict.figure is not None:
        parts.append(figure_cell(verdict))
        if not verdict.passes:
            parts.append(f"must be {bound_cell(verdict)}")
    if verdict.note:
        parts.append(verdict.note)
    if verdict.verdict == "undecided":
        parts.append(undecided_cell(verdict))
    return f"{title_of(verdict)} ({', '.join(parts)})"


def table_cells(verdict: RuleVerdict) -> list[str]:
    """Return a verdict's cells, one for each of TITLES."""
    p_value = ""
    if verdict.p_value is not None:
        p_value = f"{verdict.p_value:.3f}" if verdict.p_value >= 0.001 else "<0.001"
    outcome: str = verdict.verdict
    if outcome == "undecided":
        outcome = undecided_cell(verdict)
    if verdict.figure is None:
        # The reason has all of the note; the table has no room for it.
        outcome += f": {verdict.note.partition(';')[0]}"
    return [title_of(verdict), figure_cell(verdict), bound_cell(verdict), p_value, outcome]


def undecided_cell(verdict: RuleVerdict) -> str:
    """Return what an undecided rule counts as, and how many rows would decide it."""
    text = "undecided"
    if verdict.passes:
        text += ", counts as passed"
    if verdict.rows_needed:
        text += f", needs {verdict.rows_needed:,} rows"
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
    if interval:
        return f"{number(figure)} [{number(interval.low)}, {number(interval.high)}]"
    return number(figure)


def bound_cell(verdict: RuleVerdict) -> str:
    """Return what the rule asks of the figure."""
    rule = verdict.rule
    if isinstance(rule, BetterRule):
        return above("0", rule.confidence)
    if isinstance(rule, NotWorseRule):
        # Not -100 * margin, which is -0 for a margin of 0.
        return above(f"{0 - 100 * rule.margin:g}", rule.confidence)
    if isinstance(rule, KeepsRule):
        return above(f"{100 * rule.share:g} %", rule.confidence)
    parts = []
    if rule.minimum is not None:
        parts.append(f"≥ {number(rule.minimum)}")
    if isinstance(rule, LimitRule) and rule.maximum is not None:
        parts.append(f"≤ {number(rule.maximum)}")
    text = ", ".join(parts)
    if isinstance(rule, LimitRule) and rule.confidence is not None:
        text += f" at {100 * rule.confidence:g} %"
    return text


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
    return markdown_table(TITLES, list(map(table_cells, verdicts)))
