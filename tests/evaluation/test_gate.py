"""The gate: each kind of rule and its verdicts, the reason, the tables, and records of before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter
from student_answers import Rights, answers_file, first, last, score_row

from distillery.errors import DataError
from distillery.evaluation.baselines import MAJORITY, TFIDF
from distillery.evaluation.figures import figures_of
from distillery.evaluation.gate import gate
from distillery.evaluation.report import candidate_of
from distillery.evaluation.scoreboard import BASE
from distillery.evaluation.statistics import Pairs, difference_interval, wilson_interval
from distillery.evaluation.verdicts import render_verdicts, render_verdicts_markdown
from distillery.recipe import EvaluationRecipe, GateRule, LimitRule
from distillery.recipe.rules import Baseline
from distillery.records import (
    Example,
    Figures,
    GateDecision,
    OrderRobustness,
    RuleVerdict,
    ScoreRow,
)

RULE: TypeAdapter[GateRule] = TypeAdapter(GateRule)
CANDIDATE = "student int4"


def rule(**settings: Any) -> GateRule:
    return RULE.validate_python(settings)


def decide(
    folder: Path,
    rules: Sequence[GateRule],
    ours: Sequence[bool],
    others: Rights | None = None,
    champion: Path | None = None,
    gold: str = "A",
    **figures: float | Figures,
) -> GateDecision:
    """Judge a student; a teacher is right on the first 80 % of the rows."""
    rows = len(ours)
    rights: Rights = {"teacher": first(rows * 8 // 10, rows), **(others or {}), CANDIDATE: ours}
    decision = gate(
        [score_row(CANDIDATE, sum(ours), rows, **figures)],
        CANDIDATE,
        rules=rules,
        answers=answers_file(folder / "ours.jsonl", rights, gold=gold),
        champion_answers=champion,
        champion="student:3" if champion else None,
        champion_candidate=candidate_of(champion) if champion else None,
    )
    assert "\n" not in decision.reason
    assert decision.reason.startswith("passed: " if decision.passed else "refused: ")
    assert decision.champion == ("student:3" if champion else None)
    assert GateDecision.model_validate_json(decision.model_dump_json()) == decision
    for line in render_verdicts(decision.verdicts).splitlines():
        assert len(line) <= 120
    return decision


def only(decision: GateDecision) -> RuleVerdict:
    (verdict,) = decision.verdicts
    assert decision.passed is verdict.passes
    return verdict


def test_without_rules_every_student_passes(tmp_path: Path) -> None:
    decision = decide(tmp_path, [], first(0))
    assert decision.passed
    assert decision.reason == "passed: the recipe has no rules for the gate"


def test_a_rule_names_predictors_and_figures_as_the_scoreboard_does() -> None:
    assert get_args(Baseline) == (MAJORITY, TFIDF, BASE)
    assert set(get_args(LimitRule.model_fields["figure"].annotation)) < set(ScoreRow.model_fields)


@pytest.mark.parametrize(
    ("ours", "verdict"), [(60, "passed"), (52, "undecided"), (48, "undecided"), (40, "refused")]
)
@pytest.mark.parametrize("than", [TFIDF, BASE])
def test_better_goes_by_the_bound_of_the_paired_difference(
    than: str, ours: int, verdict: str, tmp_path: Path
) -> None:
    found = only(decide(tmp_path, [rule(kind="better", than=than)], first(ours), {than: first(50)}))
    assert found.verdict == verdict
    assert found.figure == pytest.approx((ours - 50) / 100)
    cells = Pairs(min(ours, 50), max(ours - 50, 0), max(50 - ours, 0), 100 - max(ours, 50))
    assert found.interval == difference_interval(cells, 0.9)
    assert (found.rows_needed is not None) == (verdict == "undecided")
    assert found.rows_needed is None or found.rows_needed > 100


@pytest.mark.parametrize("learned", [{}, {MAJORITY: [number % 3 == 2 for number in range(90)]}])
def test_a_student_that_always_gives_one_answer_is_not_better_than_the_majority_class(
    learned: Rights, tmp_path: Path
) -> None:
    """Gold is A, A, B: A alone is right on two thirds. The scoreboard's majority class is missing,
    or is B, which training rows had most often."""
    asks = [rule(kind="better", than=MAJORITY)]
    says_a = [number % 3 != 2 for number in range(90)]
    constant = only(decide(tmp_path, asks, says_a, learned, gold="AAB"))
    assert (constant.figure, constant.passes) == (0, False)
    assert constant.note == "against the most frequent answer of the test rows"
    found = only(decide(tmp_path, asks, first(89, 90), learned, gold="AAB"))
    assert found.interval == difference_interval(Pairs(60, 29, 0, 1), 0.9)
    assert found.passes


def test_a_predictor_that_is_not_on_the_scoreboard_leaves_a_rule_undecided(tmp_path: Path) -> None:
    decision = decide(tmp_path, [rule(kind="better", than=TFIDF)], first(90))
    assert only(decision).verdict == "undecided"
    assert decision.reason == (
        "refused: student int4 does not pass: better than TF-IDF + logistic regression "
        "(not on the scoreboard, undecided)"
    )
    lenient = decide(tmp_path, [rule(kind="better", than=TFIDF, undecided="passed")], first(90))
    assert lenient.passed
    assert "(not on the scoreboard, undecided, counts as passed)" in lenient.reason


@pytest.mark.parametrize(("ours", "passed"), [(75, False), (76, True), (90, True)])
def test_keeps_by_point_estimate(ours: int, passed: bool, tmp_path: Path) -> None:
    decision = decide(tmp_path, [rule(kind="keeps", share=0.95)], first(ours))
    assert only(decision).passes is passed
    share = f"{100 * ours / 80:.1f} %, "
    if not passed:
        share += "must be ≥ 95 %, "
    assert decision.reason.endswith(
        f"keeps 95 % of the teacher's accuracy ({share}accuracy 0.{ours}0, the teacher's 0.800)"
    )


@pytest.mark.parametrize(("ours", "verdict"), [(90, "passed"), (77, "undecided"), (60, "refused")])
def test_keeps_by_a_bound(ours: int, verdict: str, tmp_path: Path) -> None:
    found = only(decide(tmp_path, [rule(kind="keeps", share=0.95, confidence=0.95)], first(ours)))
    assert found.verdict == verdict
    assert found.interval is not None
    assert found.interval.low < ours / 80 < found.interval.high


def test_a_teacher_that_is_never_right_is_kept(tmp_path: Path) -> None:
    found = only(decide(tmp_path, [rule(kind="keeps", share=1)], first(0), {"teacher": first(0)}))
    assert found.passes


def test_without_a_champion_not_worse_is_passed(tmp_path: Path) -> None:
    found = only(decide(tmp_path, [rule(kind="not_worse")], first(1)))
    assert (found.passes, found.note) == (True, "no champion yet")


@pytest.mark.parametrize(
    ("theirs", "margin", "verdict"),
    [(700, 0.02, "passed"), (764, 0.02, "undecided"), (900, 0.02, "refused"), (764, 0.1, "passed")],
)
def test_not_worse_goes_by_the_bound_of_the_paired_difference(
    theirs: int, margin: float, verdict: str, tmp_path: Path
) -> None:
    champion = answers_file(tmp_path / "theirs.jsonl", {CANDIDATE: first(theirs, 1000)})
    asks = [rule(kind="not_worse", margin=margin)]
    decision = decide(tmp_path, asks, first(750, 1000), champion=champion)
    found = only(decision)
    assert found.verdict == verdict
    assert found.figure == pytest.approx((750 - theirs) / 1000)
    assert found.p_value is not None
    assert "against student:3 on 1,000 shared rows" in decision.reason
    if verdict == "undecided":
        assert f"undecided, needs {found.rows_needed:,} rows)" in decision.reason


@pytest.mark.parametrize(("theirs", "passed"), [(70, True), (78, True), (79, False)])
def test_not_worse_by_point_estimate(theirs: int, passed: bool, tmp_path: Path) -> None:
    champion = answers_file(tmp_path / "theirs.jsonl", {CANDIDATE: first(theirs)})
    asks = [rule(kind="not_worse", margin=0.02, confidence=None)]
    assert decide(tmp_path, asks, first(76), champion=champion).passed is passed


def test_the_champion_is_compared_on_shared_rows_alone(tmp_path: Path) -> None:
    """Rows 50 to 99 are shared. Ours is right on 26 of them, the champion on 40."""
    champion = answers_file(tmp_path / "theirs.jsonl", {"student fp16": first(40)}, start=50)
    asks = [rule(kind="not_worse", confidence=None)]
    decision = decide(tmp_path, asks, first(76), champion=champion)
    assert "(-28.0 points, must be ≥ -2, against student:3 on 50 shared rows)" in decision.reason


def test_a_margin_of_zero_is_shown_without_a_sign(tmp_path: Path) -> None:
    champion = answers_file(tmp_path / "theirs.jsonl", {CANDIDATE: first(77)})
    asks = [rule(kind="not_worse", margin=0)]
    decision = decide(tmp_path, asks, first(76), champion=champion)
    assert "at most 0 points worse than the champion (-1.0 points [" in decision.reason
    assert "], must be > 0 at 95 %, against student:3" in decision.reason


def test_a_champion_without_a_shared_row_leaves_the_rule_undecided(tmp_path: Path) -> None:
    champion = answers_file(tmp_path / "theirs.jsonl", {CANDIDATE: first(40)}, start=1000)
    found = only(decide(tmp_path, [rule(kind="not_worse")], first(90), champion=champion))
    assert found.verdict == "undecided"
    assert found.note == "no test row is shared with the champion"


def test_the_champion_itself_passes_on_however_few_rows(tmp_path: Path) -> None:
    rights: Rights = {"teacher": first(4, 5), CANDIDATE: first(3, 5)}
    champion = answers_file(tmp_path / "theirs.jsonl", rights)
    found = only(decide(tmp_path, [rule(kind="not_worse")], first(3, 5), champion=champion))
    assert (found.passes, found.note) == (True, "the answers are the champion's own")


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        ({"figure": "p95_ms", "maximum": 40.0}, "passed"),
        ({"figure": "p95_ms", "maximum": 39.9}, "refused"),
        ({"figure": "accuracy", "minimum": 0.7}, "passed"),
        ({"figure": "accuracy", "minimum": 0.7, "maximum": 0.75}, "refused"),
        ({"figure": "bytes", "maximum": 60e6}, "passed"),
        ({"figure": "peak_mib", "maximum": 1}, "undecided"),
    ],
)
def test_a_limit_on_a_figure(settings: dict[str, Any], verdict: str, tmp_path: Path) -> None:
    asks = [rule(kind="limit", **settings)]
    decision = decide(tmp_path, asks, first(76), p95_ms=40.0, bytes=55_000_000)
    assert only(decision).verdict == verdict


def further_figures(**update: Any) -> Figures:
    """Of the class yes, 45 of 50 rows are recalled, of no 31 of 50."""
    rows = [
        Example(example_id=str(n), question=str(n), choices=("yes", "no"), answer_key="AB"[n // 50])
        for n in range(100)
    ]
    given = ["A"] * 45 + ["B"] * 5 + ["B"] * 31 + ["A"] * 19
    probabilities = [(0.8, 0.2) if letter == "A" else (0.2, 0.8) for letter in given]
    found = figures_of(rows, given, probabilities, [(0.9, 0.1)] * 100, None)
    return found.model_copy(update={"p99_ms": 55.0, "load_s": 2.0, "first_token_ms": 30.0} | update)


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        ({"figure": "macro_f1", "minimum": 0.75}, "passed"),
        ({"figure": "macro_f1", "minimum": 0.75, "confidence": 0.95}, "undecided"),
        ({"figure": "macro_f1", "minimum": 0.66, "confidence": 0.95}, "passed"),
        ({"figure": "macro_f1", "minimum": 0.9, "confidence": 0.95}, "refused"),
        ({"figure": "recall", "class": "yes", "minimum": 0.9}, "passed"),
        ({"figure": "recall", "class": "yes", "minimum": 0.9, "confidence": 0.95}, "undecided"),
        ({"figure": "recall", "class": "no", "minimum": 0.75, "confidence": 0.95}, "refused"),
        ({"figure": "recall", "class": "maybe", "minimum": 0.5}, "undecided"),
        ({"figure": "calibration_error", "maximum": 0.1}, "passed"),
        ({"figure": "calibration_error", "maximum": 0.1, "confidence": 0.95}, "undecided"),
        ({"figure": "calibration_error", "maximum": 0.3, "confidence": 0.95}, "passed"),
        ({"figure": "kl_from_teacher", "maximum": 0.1, "confidence": 0.95}, "refused"),
        ({"figure": "kl_from_teacher", "maximum": 1, "confidence": 0.95}, "passed"),
        ({"figure": "order_robustness", "minimum": 0.8}, "undecided"),
        ({"figure": "p99_ms", "maximum": 55}, "passed"),
        ({"figure": "first_token_ms", "maximum": 29}, "refused"),
        ({"figure": "load_s", "maximum": 2}, "passed"),
        ({"figure": "accuracy", "minimum": 0.7, "confidence": 0.95}, "undecided"),
        ({"figure": "accuracy", "minimum": 0.65, "confidence": 0.95}, "passed"),
        ({"figure": "accuracy", "minimum": 0.5, "maximum": 0.7, "confidence": 0.95}, "undecided"),
    ],
)
def test_a_limit_on_a_further_figure(
    settings: dict[str, Any], verdict: str, tmp_path: Path
) -> None:
    asks = rule(kind="limit", **settings)
    decision = decide(tmp_path, [asks], first(76), figures=further_figures())
    found = only(decision)
    assert found.verdict == verdict
    assert (found.interval is not None) == ("confidence" in settings)
    if found.interval and found.verdict == "undecided":
        assert found.rows_needed is not None
        assert found.rows_needed > 100
    if settings.get("class") == "maybe":
        assert found.note == "no test row has the answer 'maybe', only yes, no"


def test_a_limit_on_the_order_of_options(tmp_path: Path) -> None:
    order = OrderRobustness(rows=50, alike=45, value=0.9, low=0.78, high=0.96, seconds=1.0)
    asks = [rule(kind="limit", figure="order_robustness", minimum=0.8, confidence=0.95)]
    decision = decide(tmp_path, asks, first(76), figures=further_figures(order_robustness=order))
    assert only(decision).interval == wilson_interval(45, 50, 0.9)
    assert decision.reason == (
        "passed: student int4 passes 1 rule: order_robustness at least 0.8: 0.9 [0.8084, 0.9505] "
        "must be ≥ 0.8 at 95 %"
    )


def test_a_rule_with_a_class_goes_to_json_and_back() -> None:
    asks = rule(kind="limit", figure="recall", minimum=0.5, **{"class": "yes"})
    assert RULE.validate_json(RULE.dump_json(asks)) == asks
    assert asks.title == "recall of yes at least 0.5"


@pytest.mark.parametrize(("minimum", "passed"), [(100, True), (101, False)])
def test_a_minimum_of_rows(minimum: int, passed: bool, tmp_path: Path) -> None:
    found = only(decide(tmp_path, [rule(kind="rows", minimum=minimum)], first(76)))
    assert found.passes is passed
    assert found.rows_needed == (None if passed else minimum)


def test_a_refusal_names_the_rules_that_refuse_and_the_table_shows_all(tmp_path: Path) -> None:
    asks = [
        rule(kind="better", than=MAJORITY),
        rule(kind="keeps", share=0.95, name="as good as the teacher"),
        rule(kind="limit", figure="p95_ms", maximum=50),
    ]
    decision = decide(tmp_path, asks, first(70), gold="ABC", p95_ms=22.73)
    assert decision.reason == (
        "refused: student int4 does not pass: as good as the teacher (87.5 %, must be ≥ 95 %, "
        "accuracy 0.700, the teacher's 0.800)"
    )
    lines = [" ".join(line.split()) for line in render_verdicts(decision.verdicts).splitlines()]
    assert lines[0] == "rule figure bound McNemar p verdict"
    assert lines[2].startswith("better than majority class +36.0 points [+2")
    assert lines[2].endswith("> 0 at 95 % <0.001 passed")
    assert lines[3] == "as good as the teacher 87.5 % ≥ 95 % refused"
    assert lines[4] == "p95_ms at most 50 22.73 ≤ 50 passed"
    markdown = render_verdicts_markdown(decision.verdicts).splitlines()
    assert markdown[3] == "| as good as the teacher | 87.5 % | ≥ 95 % |  | refused |"
    assert len(markdown) == 5


@pytest.mark.parametrize("starts_from_base", [True, False])
def test_the_default_rules_refuse_a_student_at_chance(
    starts_from_base: bool, tmp_path: Path
) -> None:
    """One that was promoted once: right on 25.8 % where chance is 20 %, the base model is right on
    27.1 % and the teacher on 60.2 %."""
    others: Rights = {"teacher": first(602, 1000), BASE: last(271, 1000)}
    asks = EvaluationRecipe().gate_rules(starts_from_base)
    decision = decide(tmp_path, asks, first(258, 1000), others, gold="ABCDE")
    assert not decision.passed
    refused = [verdict.rule.title for verdict in decision.verdicts if not verdict.passes]
    assert "keeps 80 % of the teacher's accuracy" in refused
    assert ("better than base model" in refused) is starts_from_base
    constant = [number % 5 == 0 for number in range(1000)]
    refused_constant = decide(tmp_path, asks, constant, others, gold="ABCDE").verdicts[0]
    assert refused_constant.rule.title == "better than majority class"
    assert not refused_constant.passes


def test_a_good_student_passes_the_default_rules(tmp_path: Path) -> None:
    asks = EvaluationRecipe().gate_rules(starts_from_base=True)
    decision = decide(tmp_path, asks, first(75), {BASE: last(30)}, gold="ABC")
    assert decision.passed
    assert len(decision.verdicts) == 4


def test_decisions_of_earlier_versions_still_load() -> None:
    old = '{"passed": true, "reason": "passed: all well", "champion": "student version 3"}'
    assert GateDecision.model_validate_json(old).verdicts == ()


def test_the_candidate_is_the_last_column_of_its_answers(tmp_path: Path) -> None:
    file = answers_file(tmp_path / "theirs.jsonl", {"teacher": [True], "student fp16": [True]})
    assert candidate_of(file) == "student fp16"
    file.write_text("")
    assert candidate_of(file) is None


def test_the_gate_refuses_unreadable_answers(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"example_id": "r0"\n')
    own = answers_file(tmp_path / "ours.jsonl", {CANDIDATE: [True]})
    with pytest.raises(DataError, match=r"broken\.jsonl: can't be read as answers"):
        gate(
            [score_row(CANDIDATE, 1, 1)], CANDIDATE, rules=(), answers=own, champion_answers=broken
        )
