"""The gate: whether a candidate may be registered, rule by rule (see recipe/rules.py)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distillery.evaluation.baselines import MAJORITY
from distillery.evaluation.gold import gold_in
from distillery.evaluation.limits import limited_figure, limited_rows, missing_class
from distillery.evaluation.report import RowContent, read_answers
from distillery.evaluation.scoreboard import GOLD, TEACHER, row_named
from distillery.evaluation.statistics import (
    Paired,
    Pairs,
    count_pairs,
    difference_interval,
    one_sided,
    p_value_of,
    ratio_interval,
    rows_needed,
    rows_needed_for_limit,
)
from distillery.evaluation.verdicts import reason_of
from distillery.recipe import (
    METRIC_NAMES,
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

AnswerRows = Mapping[str, Mapping[str, Any]]
"""The lines of an answers.jsonl by example_id; each has an answer for each predictor."""


@dataclass(frozen=True)
class EarlierVersion:
    """A registered version. `answers`: its own answers.jsonl, as registered: the last column is the
    version's. `may_be_best`: it was neither rejected nor rolled back. `is_candidate`: its student
    is the candidate's."""

    version: str
    title: str
    answers: AnswerRows
    is_champion: bool = False
    may_be_best: bool = True
    is_candidate: bool = False


@dataclass(frozen=True)
class Comparison:
    """The candidate beside an earlier version, on the rows of both. `pairs`: the candidate first.
    `note` says which rows these are, for people. `shared`: both ones' lines of each of the rows."""

    earlier: EarlierVersion
    pairs: Paired
    note: str
    shared: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]] = ()


@dataclass(frozen=True)
class Evidence:
    """What the rules look at: the candidate's row of the scoreboard, the answers of all predictors
    to the test rows, and the comparisons with earlier versions."""

    row: ScoreRow
    teacher: str
    answers: AnswerRows
    comparisons: Sequence[Comparison]

    def compared_with(self, than: str) -> Comparison | None:
        """Return the comparison that a rule `not_worse` asks for; None if there is none."""
        best = None
        for comparison in self.comparisons:
            earlier, pairs = comparison.earlier, comparison.pairs
            if earlier.version == than or (than == "champion" and earlier.is_champion):
                return comparison
            if than != "best" or not earlier.may_be_best or 2 * pairs.rows < len(self.answers):
                continue
            if best is None or pairs.difference < best.pairs.difference:
                best = comparison
        return best

    def against(self, predictor: str) -> Paired | None:
        """Compare the candidate with another predictor; None if that has no answers."""
        rows = list(self.answers.values())
        if not all(predictor in row for row in rows):
            return None
        ours = [row[self.row.name] for row in rows]
        return gold_in(rows).paired(ours, [row[predictor] for row in rows])

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
    contents: Mapping[str, RowContent] | None = None,
    earlier: Sequence[EarlierVersion] = (),
) -> GateDecision:
    """Decide whether the candidate may be registered: it must pass each of `rules`.

    `answers` is the evaluation's answers.jsonl, and `contents` tells by example_id what its rows
    are; without it, rows are known by their ids. `earlier` are registered versions, the champion
    among them if there is one. Raises DataError for a file that can't be read."""
    own = read_answers(answers)
    comparisons = [compare(own, candidate, contents or {}, version) for version in earlier]
    evidence = Evidence(row_named(report_rows, candidate), teacher, own, comparisons)
    metric = evidence.row.metric
    verdicts = tuple(
        apply_rule(rule, evidence).model_copy(update={"metric": metric}) for rule in rules
    )
    champion = next((version for version in earlier if version.is_champion), None)
    return GateDecision(
        passed=all(verdict.passes for verdict in verdicts),
        reason=reason_of(candidate, verdicts),
        champion=champion.title if champion else None,
        champion_version=champion.version if champion else None,
        verdicts=verdicts,
    )


def compare(
    own: AnswerRows, candidate: str, contents: Mapping[str, RowContent], earlier: EarlierVersion
) -> Comparison:
    """Compare the candidate with an earlier version on the rows that both were asked.

    A row is known by exactly what was asked: the same options in another order are another row,
    since a model's answer may depend on the order. In answers that earlier releases registered,
    rows are known by their ids alone."""
    by_id = known_by_id(earlier.answers, contents)
    theirs: dict[str | None, Mapping[str, Any]] = {}
    for example_id, row in earlier.answers.items():
        theirs[example_id if by_id else row["asked"]] = row
    known_contents = {row.get("content") for row in earlier.answers.values()}
    shared = []
    reordered = reused = 0
    for example_id, row in own.items():
        other = theirs.get(example_id if by_id else contents[example_id].asked)
        if other is not None:
            shared.append((row, other))
        elif not by_id and contents[example_id].content in known_contents:
            reordered += 1
        elif not by_id and example_id in earlier.answers:
            reused += 1
    gold = gold_in([row for row, _ in shared])
    answers = [other[list(other)[-1]] for _, other in shared]
    pairs = gold.paired([row[candidate] for row, _ in shared], answers)
    notes = [f"against {earlier.title} on {count_shared(pairs.rows, len(own))}"]
    if not pairs.rows:
        notes = ["no test row is shared"]
    if by_id and pairs.rows and contents:
        notes.append("known by their ids alone, since its answers are of an earlier release")
    if reordered:
        notes.append(f"left out, options in another order or spelling: {reordered:,}")
    if reused:
        notes.append(f"left out, id used for other content: {reused:,}")
    return Comparison(earlier, pairs, "; ".join(notes), shared)


def known_by_id(answers: AnswerRows, contents: Mapping[str, RowContent]) -> bool:
    """Return whether rows are known by their ids alone, because the contents are not there."""
    return not contents or not all("asked" in row for row in answers.values())


def share_rows(answers: AnswerRows, contents: Mapping[str, RowContent]) -> bool:
    """Return whether answers are to one of the rows of `contents` at least."""
    if known_by_id(answers, contents):
        return bool(answers.keys() & contents.keys())
    asked = {content.asked for content in contents.values()}
    return any(row["asked"] in asked for row in answers.values())


def count_shared(shared: int, rows: int) -> str:
    """Return such as '40 shared rows', or '38 shared rows of 40'."""
    text = f"{shared:,} shared rows"
    return text if shared == rows else f"{text} of {rows:,}"


def apply_rule(rule: GateRule, evidence: Evidence) -> RuleVerdict:
    """Apply one rule."""
    match rule:
        case BetterRule():
            return apply_better(rule, evidence)
        case KeepsRule():
            return apply_keeps(rule, evidence)
        case NotWorseRule():
            return apply_not_worse(rule, evidence)
        case LimitRule():
            return apply_limit(rule, evidence.row)
        case RowsRule():
            return apply_rows(rule, evidence.row)


def apply_better(rule: BetterRule, evidence: Evidence) -> RuleVerdict:
    """Apply a rule `better`. Undecided where the scoreboard lacks the predictor."""
    # Written answers have no class.
    if rule.than == MAJORITY and evidence.row.metric is None:
        note = "against the most frequent answer of the test rows"
        return decide_difference(rule, evidence.against_most_frequent(), 0.0, note)
    pairs = evidence.against(rule.than)
    if pairs is None:
        note = "not on the scoreboard"
        return RuleVerdict(rule=rule, verdict="undecided", note=note)
    return decide_difference(rule, pairs, 0.0, note="")


def apply_not_worse(rule: NotWorseRule, evidence: Evidence) -> RuleVerdict:
    """Apply a rule `not_worse`. Undecided where too few test rows are shared, or where the version
    that the rule names does not exist."""
    for comparison in evidence.comparisons:
        if comparison.earlier.is_champion and comparison.earlier.is_candidate:
            note = "the student is the champion"
            return RuleVerdict(rule=rule, verdict="passed", note=note)
    compared = evidence.compared_with(rule.than)
    if compared is None:
        if rule.than == "champion":
            return RuleVerdict(rule=rule, verdict="passed", note="no champion yet")
        if rule.than == "best":
            if not any(comparison.earlier.may_be_best for comparison in evidence.comparisons):
                return RuleVerdict(rule=rule, verdict="passed", note="no version yet")
            note = "too few test rows are shared"
        else:
            note = f"no version {rule.than} is registered"
        return RuleVerdict(rule=rule, verdict="undecided", note=note)
    if not compared.pairs.rows:
        return RuleVerdict(rule=rule, verdict="undecided", note=compared.note)
    if compared.earlier.is_candidate:
        note = f"the student is version {compared.earlier.version}"
        return RuleVerdict(rule=rule, verdict="passed", note=note)
    return decide_difference(rule, compared.pairs, -rule.margin, compared.note)


def decide_difference(
    rule: BetterRule | NotWorseRule, pairs: Paired, limit: float, note: str
) -> RuleVerdict:
    """Ask the difference of two primary figures to be above `limit`."""
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
        p_value=p_value_of(pairs),
        rows_needed=needed,
        note=note,
    )


def apply_keeps(rule: KeepsRule, evidence: Evidence) -> RuleVerdict:
    """Apply a rule `keeps`."""
    pairs = evidence.against(evidence.teacher)
    if pairs is None:
        return RuleVerdict(rule=rule, verdict="undecided", note="the teacher has no answers")
    ours, theirs = pairs.values
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
        note=f"{METRIC_NAMES[evidence.row.metric]} {ours:.3f}, the teacher's {theirs:.3f}",
    )


def apply_limit(rule: LimitRule, row: ScoreRow) -> RuleVerdict:
    """Apply a rule `limit`. Undecided where the figure was not measured."""
    figure, interval = limited_figure(row, rule)
    rows = limited_rows(row, rule)
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
            needed = rows_needed_for_limit(rows, figure, interval, limit, rule.confidence)
    return RuleVerdict(
        rule=rule,
        verdict=verdict,
        figure=figure,
        interval=interval,
        rows_needed=more_than(rows, needed),
    )


def apply_rows(rule: RowsRule, row: ScoreRow) -> RuleVerdict:
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
