"""The gate: whether a candidate may be registered."""

from collections.abc import Sequence
from pathlib import Path

from distillery.evaluation.report import read_answers
from distillery.evaluation.scoreboard import GOLD, TEACHER, percent, points, row_named
from distillery.evaluation.statistics import paired_interval
from distillery.recipe import EvaluationRecipe
from distillery.records import GateDecision, ScoreRow

ROUNDING = 1e-9
"""A candidate that is at a limit, but for rounding, passes."""


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
    """Decide whether the candidate may be registered: it must keep evaluation.minimum_kept of the
    teacher's accuracy, and lose no more than evaluation.maximum_loss against the champion, on the
    test rows that both answered.

    `answers` and `champion_answers` are the two evaluations' answers.jsonl. `champion` names the
    champion for people; its column is `champion_candidate`, which defaults to the candidate's name.
    A champion without a shared row can't be compared: it stops the candidate, unless maximum_loss
    is 1. Raises DataError for a file that can't be read."""
    ours, theirs = row_named(report_rows, candidate), row_named(report_rows, teacher)
    kept = 1.0
    if theirs.correct:
        kept = ours.correct / theirs.correct
    passed = ours.correct >= recipe.minimum_kept * theirs.correct - ROUNDING
    reason = (
        f"{candidate} keeps {percent(kept)} of the teacher's accuracy "
        f"({ours.accuracy:.3f} of {theirs.accuracy:.3f}); "
        f"evaluation.minimum_kept asks for {percent(recipe.minimum_kept)}"
    )
    if passed and champion_answers is not None:
        passed, comparison = compare_with_champion(
            read_answers(answers),
            candidate,
            read_answers(champion_answers),
            champion_candidate or candidate,
            champion or "the champion",
            recipe.maximum_loss,
        )
        reason += f"; {comparison}"
    verdict = "passed" if passed else "refused"
    return GateDecision(passed=passed, reason=f"{verdict}: {reason}", champion=champion)


def compare_with_champion(
    own: dict[str, dict[str, str | None]],
    candidate: str,
    other: dict[str, dict[str, str | None]],
    column: str,
    champion: str,
    maximum_loss: float,
) -> tuple[bool, str]:
    """Return whether the candidate loses no more than `maximum_loss` (0 to 1) of accuracy against
    the champion, and the comparison in words.

    `own` and `other` are the rows of the two answers.jsonl, `candidate` and `column` the columns
    that are compared."""
    ours: list[bool] = []
    theirs: list[bool] = []
    for example_id, row in own.items():
        other_row = other.get(example_id, {})
        if column in other_row:
            ours.append(row[candidate] == row[GOLD])
            theirs.append(other_row[column] == row[GOLD])
    if not ours:
        return maximum_loss >= 1, (
            f"no test row is shared with {champion}, so the two can't be compared; "
            "only evaluation.maximum_loss: 1 lets such a candidate pass"
        )
    gained = (sum(ours) - sum(theirs)) / len(ours)
    return gained >= -maximum_loss - ROUNDING, (
        f"{100 * gained:+.1f} points against {champion} on {len(ours)} shared rows, "
        f"95 % interval {points(paired_interval(ours, theirs))}; "
        f"evaluation.maximum_loss allows to lose {100 * maximum_loss:.1f}"
    )
