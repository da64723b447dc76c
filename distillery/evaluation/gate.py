"""evaluation/gate"""

import json
from collections.abc import Sequence
from pathlib import Path

from distillery.errors import DataError
from distillery.evaluation.scoreboard import GOLD, TEACHER, percent, points, row_named
from distillery.evaluation.scoring import right_answers
from distillery.evaluation.statistics import paired_interval
from distillery.recipe import EvaluationRecipe
from distillery.records import GateDecision, ScoreRow

# The gate


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
    """Whether the candidate may be registered: it keeps evaluation.minimum_kept of the teacher's accuracy, and is not
    worse than the champion by more than evaluation.maximum_loss on the test rows that both answered.

    `answers` and `champion_answers` are the answers.jsonl of the two evaluations; the champion's column is
    `champion_candidate`, by default named as ours. A champion without a shared row can't be compared and stops the
    candidate, unless maximum_loss is 1. Raises DataError for a file that can't be read."""
    ours, theirs = row_named(report_rows, candidate), row_named(report_rows, teacher)
    kept = ours.correct / theirs.correct if theirs.correct else 1.0
    passed = ours.correct >= recipe.minimum_kept * theirs.correct - 1e-9
    reason = (
        f"{candidate} keeps {percent(kept)} of the teacher's accuracy ({ours.accuracy:.3f} of {theirs.accuracy:.3f}); "
        f"evaluation.minimum_kept asks for {percent(recipe.minimum_kept)}"
    )
    if passed and champion_answers is not None:
        passed, compared = _against_champion(
            answers,
            candidate,
            champion_answers,
            champion_candidate or candidate,
            champion or "the champion",
            recipe,
        )
        reason = f"{reason}; {compared}"
    return GateDecision(
        passed=passed, reason=f"{'passed' if passed else 'refused'}: {reason}", champion=champion
    )


def _against_champion(
    answers: Path,
    candidate: str,
    champion_answers: Path,
    column: str,
    champion: str,
    recipe: EvaluationRecipe,
) -> tuple[bool, str]:
    own, other = _read_answers(answers), _read_answers(champion_answers)
    shared = [key for key in own if column in other.get(key, {})]
    if not shared:
        return recipe.maximum_loss >= 1, (
            f"no test row is shared with {champion}, so the two can't be compared; "
            "only evaluation.maximum_loss: 1 lets such a candidate pass"
        )
    gold = [own[key][GOLD] for key in shared]
    ours = right_answers([own[key][candidate] for key in shared], gold)
    theirs = right_answers([other[key][column] for key in shared], gold)
    allowed = 100 * recipe.maximum_loss
    gained = (sum(ours) - sum(theirs)) / len(shared)
    return gained >= -recipe.maximum_loss - 1e-9, (
        f"{100 * gained:+.1f} points against {champion} on {len(shared)} shared rows, 95 % interval "
        f"{points(paired_interval(ours, theirs))}; evaluation.maximum_loss allows to lose {allowed:.1f}"
    )


def candidate_of(answers: Path) -> str | None:
    """The name of the candidate in an answers.jsonl, which is its last column; it tells the precision, in which a
    champion may differ. None for a file without rows. Raises DataError for a file that can't be read."""
    first = next(iter(_read_answers(answers).values()), {})
    return next(reversed(first), None)


def _read_answers(path: Path) -> dict[str, dict[str, str | None]]:
    """The lines of an answers.jsonl by example_id."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return {row["example_id"]: row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: can't be read as answers ({type(error).__name__}); evaluate again"
        ) from error
