"""The gate: whether a candidate may be registered, rule by rule (see recipe/rules.py)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distillery.evaluation.baselines import MAJORITY
from distillery.evaluation.limits import limited_figure, missing_class
from distillery.evaluation.report import read_answers
from distillery.evaluation.scoreboard import GOLD, TEACHER, row_named
from distillery.evaluation.statistics import (
    Pairs,
    count_pairs,
    difference_interval,
    mcnemar_p,
    one_sided,
    ratio_interval,
    rows_needed,
    rows_needed_for_limit,
)
from distillery.evaluation.verdicts import reason_of
from distillery.recipe import (
    BetterRule,
    GateRule,
    KeepsRule,
    LimitRule,
    NotWorseRule,
    RowsRule,
)
from distillery.records import GateDecision, Interval, RuleVerdict, ScoreRow

ROUNDING = 1e-9
"""A candidate that is at a limit, but for rounding, passes."""

Verdict = Literal["passed", "refused", "undecided"]

AnswerRows = Mapping[str, Mapping[str, str | None]]
"""The lines of an answers.jsonl by example_id; each has a letter for each predictor."""


@dataclass(frozen=True)
class Champion:
    """The champion on the test rows that the candidate answered, too. `pairs`: the candidate first.
    `is_candidate`: the champion's evaluation has the same answers of all predictors to the same
    rows."""

    name: str
    pairs: Pairs
    is_candidate: bool


@dataclass(frozen=True)
class Evidence:
    """What the rules look at: the candidate's row of the scoreboard, the answers of all predictors
    to the test rows, and the champion, if there is one."""

    row: ScoreRow
    teacher: str
    answers: AnswerRows
    champion: Champion | None

    def against(self, predictor: str) -> Pairs | None:
        """Compare the candidate with another predictor; None if that has no answers."""
        ours: list[bool] = []
        theirs: list[bool] = []
        for answer in self.answers.values():
            if predictor not in answer:
                return None
            ours.append(answer[self.row.name] == answer[GOLD])
            theirs.append(answer[predictor] == answer[GOLD])
        return count_pairs(ours, theirs)

    def against_most_frequent(self) -> Pairs:
        """Compare the candidate with the most frequent gold answer of the test rows."""
        gold = [answer[GOLD] for answer in self.answers.values()]
        letter = Counter(gold).most_common(1)[0][0]
        ours = [answer[self.row.name] == answer[GOLD] for answer in self.answers.values()]
        return count_pairs(ours, [right == letter for right in gold])


def gate(
    report_rows: Sequence[ScoreRow],
    candidate: str,
    teacher: str = TEACHER,
    *,
    rules: Sequence[GateRule],
    answers: Path,
    champion_answers: Path | None = None,
    champion: str | None = None,
    champion_candidate: str | None = None,
) -> GateDecision:
    """Decide whether the candidate may be registered: it must pass each of `rules`.

    `answers` and `champion_answers` are the two evaluations' answers.jsonl. `champion` names the
    champion for people; its column is `champion_candidate`, which defaults to the candidate's name.
    Raises DataError for a file that can't be read."""
    own = read_answers(answers)
    compared = None
    if champion_answers is not None:
        compared = Champion(
            name=champion or "the champion",
            pairs=shared_pairs(
                own, candidate, read_answers(champion_answers), champion_candidate or candidate
            ),
            is_candidate=answers.read_bytes() == champion_answers.read_bytes(),
        )
    evidence = Evidence(row_named(report_rows, candidate), teacher, own, compared)
    verdicts = tuple(judge_rule(rule, evidence) for rule in rules)
    return GateDecision(
        passed=all(verdict.passes for verdict in verdicts),
        reason=reason_of(candidate, verdicts),
        champion=champion,
        verdicts=verdicts,
    )


def shared_pairs(own: AnswerRows, candidate: str, other: AnswerRows, column: str) -> Pairs:
    """Compare the candidate with the column `column` of another evaluation, on the rows of both."""
    ours: list[bool] = []
    theirs: list[bool] = []
    for example_id, row in own.items():
        other_row = other.get(example_id, {})
        if column in other_row:
            ours.append(row[candidate] == row[GOLD])
            theirs.append(other_row[column] == row[GOLD])
    return count_pairs(ours, theirs)


def judge_rule(rule: GateRule, evidence: Evidence) -> RuleVerdict:
    """Apply one rule."""
    match rule:
        case BetterRule():
            return judge_better(rule, evidence)
        case KeepsRule():
            return judge_keeps(rule, evidence)
        case NotWorseRule():
            return judge_not_worse(rule, evidence.champion)
        case LimitRule():
            return judge_limit(rule, evidence.row)
        case RowsRule():
            return judge_rows(rule, evidence.row)


def judge_better(rule: BetterRule, evidence: Evidence) -> RuleVerdict:
    """Apply a rule `better`. Undecided where the scoreboard lacks the predictor."""
    if rule.than == MAJORITY:
        note = "against the most frequent answer of the test rows"
        return judge_difference(rule, evidence.against_most_frequent(), 0.0, note)
    pairs = evidence.against(rule.than)
    if pairs is None:
        note = "not on the scoreboard"
        return RuleVerdict(rule=rule, verdict="undecided", note=note)
    return judge_difference(rule, pairs, 0.0, note="")


def judge_not_worse(rule: NotWorseRule, champion: Champion | None) -> RuleVerdict:
    """Apply a rule `not_worse`. Undecided where no test row is shared with the champion."""
    if champion is None:
        return RuleVerdict(rule=rule, verdict="passed", note="no champion yet")
    if not champion.pairs.rows:
        note = "no test row is shared with the champion"
        return RuleVerdict(rule=rule, verdict="undecided", note=note)
    if champion.is_candidate:
        note = "the answers are the champion's own"
        return RuleVerdict(rule=rule, verdict="passed", note=note)
    note = f"against {champion.name} on {champion.pairs.rows:,} shared rows"
    return judge_difference(rule, champion.pairs, -rule.margin, note)


def judge_difference(
    rule: BetterRule | NotWorseRule, pairs: Pairs, limit: float, note: str
) -> RuleVerdict:
    """Ask the difference of two accuracies to be above `limit`."""
    interval = needed = None
    if rule.confidence is not None:
        interval = difference_interval(pairs, one_sided(rule.confidence))
    verdict = decide(pairs.difference, interval, limit)
    if verdict == "undecided" and rule.confidence is not None:
        needed = more_than(pairs.rows, rows_needed(pairs, limit, rule.confidence))
    return RuleVerdict(
        rule=rule,
        verdict=verdict,
        figure=pairs.difference,
        interval=interval,
        p_value=mcnemar_p(pairs),
        rows_needed=needed,
        note=note,
    )


def judge_keeps(rule: KeepsRule, evidence: Evidence) -> RuleVerdict:
    """Apply a rule `keeps`."""
    pairs = evidence.against(evidence.teacher)
    if pairs is None:
        return RuleVerdict(rule=rule, verdict="undecided", note="the teacher has no answers")
    ours, theirs = pairs.both + pairs.first, pairs.both + pairs.second
    if not theirs:
        return RuleVerdict(rule=rule, verdict="passed", note="the teacher has no right answer")
    interval = needed = None
    if rule.confidence is not None:
        interval = ratio_interval(pairs, one_sided(rule.confidence))
    verdict = decide(ours / theirs, interval, rule.share)
    if verdict == "undecided" and rule.confidence is not None:
        needed = rows_needed(pairs, 0.0, rule.confidence, weight=rule.share)
        needed = more_than(pairs.rows, needed)
    return RuleVerdict(
        rule=rule,
        verdict=verdict,
        figure=ours / theirs,
        interval=interval,
        rows_needed=needed,
        note=f"accuracy {ours / pairs.rows:.3f}, the teacher's {theirs / pairs.rows:.3f}",
    )


def judge_limit(rule: LimitRule, row: ScoreRow) -> RuleVerdict:
    """Apply a rule `limit`. Undecided where the figure was not measured."""
    figure, interval = limited_figure(row, rule)
    if figure is None:
        note = missing_class(row, rule) or "not measured"
        return RuleVerdict(rule=rule, verdict="undecided", note=note)
    sides: list[tuple[float, Verdict]] = []
    if rule.minimum is not None:
        sides.append((rule.minimum, decide(figure, interval, rule.minimum)))
    if rule.maximum is not None:
        mirrored = interval and Interval(low=-interval.high, high=-interval.low)
        sides.append((rule.maximum, decide(-figure, mirrored, -rule.maximum)))
    verdict: Verdict = "passed"
    needed = None
    if any(side == "refused" for _, side in sides):
        verdict = "refused"
    elif any(side == "undecided" for _, side in sides):
        verdict = "undecided"
        limit = next(limit for limit, side in sides if side == "undecided")
        if interval is not None and rule.confidence is not None:
            needed = rows_needed_for_limit(row.rows, figure, interval, limit, rule.confidence)
    return RuleVerdict(
        rule=rule,
        verdict=verdict,
        figure=figure,
        interval=interval,
        rows_needed=more_than(row.rows, needed),
    )


def judge_rows(rule: RowsRule, row: ScoreRow) -> RuleVerdict:
    """Apply a rule `rows`."""
    if row.rows >= rule.minimum:
        return RuleVerdict(rule=rule, verdict="passed", figure=row.rows)
    return RuleVerdict(rule=rule, verdict="undecided", figure=row.rows, rows_needed=rule.minimum)


def decide(figure: float, interval: Interval | None, limit: float) -> Verdict:
    """Return whether the figure is proven to be above the limit, or below it, or neither; without
    an interval, whether it reaches the limit."""
    if interval is None:
        return "passed" if figure >= limit - ROUNDING else "refused"
    if interval.low > limit:
        return "passed"
    if interval.high < limit:
        return "refused"
    return "undecided"


def more_than(rows: int, needed: int | None) -> int | None:
    """Return `needed`, but more than `rows`, which were too few."""
    if needed is None:
        return None
    return max(needed, rows + 1)
