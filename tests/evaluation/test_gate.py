"""The gate: each kind of rule and its verdicts, the reason, the tables, and records of before."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter
from student_answers import Rights, answers_file, first, further_figures, last, score_row

from distillery.errors import DataError
from distillery.evaluation.baselines import MAJORITY, TFIDF
from distillery.evaluation.gate import (
    EarlierVersion,
    compare,
    decide_difference,
    gate,
    more_than,
    share_rows,
)
from distillery.evaluation.gate import decide as decide_by
from distillery.evaluation.linear_probe import PROBE
from distillery.evaluation.report import (
    RowContent,
    candidate_of,
    read_answers,
    row_contents,
    rows_digest,
    write_own_answers,
)
from distillery.evaluation.scoreboard import BASE
from distillery.evaluation.statistics import (
    Pairs,
    difference_interval,
    ratio_interval,
    rows_needed,
    wilson_interval,
)
from distillery.evaluation.verdicts import render_verdicts, render_verdicts_markdown
from distillery.evaluation.written_baselines import DICTIONARY, NEAREST
from distillery.recipe import BetterRule, EvaluationRecipe, GateRule
from distillery.recipe.rules import Baseline, Measured
from distillery.records import (
    Example,
    Figures,
    GateDecision,
    Interval,
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
    earlier: Sequence[EarlierVersion] = (),
    contents: Mapping[str, RowContent] | None = None,
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
        contents=contents,
        earlier=[*earlier, *([version("3", champion, is_champion=True)] if champion else [])],
    )
    assert "\n" not in decision.reason
    assert decision.reason.startswith("passed: " if decision.passed else "refused: ")
    if not earlier:
        assert decision.champion == ("student:3" if champion else None)
        assert decision.champion_version == ("3" if champion else None)
    assert GateDecision.model_validate_json(decision.model_dump_json()) == decision
    for line in render_verdicts(decision.verdicts).splitlines():
        assert len(line) <= 120
    return decision


def version(number: str, answers: Path, **settings: bool) -> EarlierVersion:
    return EarlierVersion(number, f"student:{number}", read_answers(answers), **settings)


def only(decision: GateDecision) -> RuleVerdict:
    (verdict,) = decision.verdicts
    assert decision.passed is verdict.passes
    return verdict


def test_without_rules_every_student_passes(tmp_path: Path) -> None:
    decision = decide(tmp_path, [], first(0))
    assert decision.passed
    assert decision.reason == "passed: the recipe has no rules for the gate"


def test_a_rule_names_predictors_and_figures_as_the_scoreboard_does() -> None:
    assert get_args(Baseline) == (MAJORITY, TFIDF, PROBE, NEAREST, DICTIONARY, BASE)
    measured = set(get_args(Measured)) - set(ScoreRow.model_fields)
    assert measured < set(Figures.model_fields)


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
    known = decide(tmp_path, [rule(kind="better", than=TFIDF)], first(90), {TFIDF: first(50)})
    assert only(known).note == ""


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
    cells = Pairs(min(ours, 80), max(ours - 80, 0), max(80 - ours, 0), 100 - max(ours, 80))
    assert found.interval == ratio_interval(cells, 0.9)
    assert found.interval.low < ours / 80 < found.interval.high
    needed = rows_needed(cells, 0.0, 0.95, weight=0.95)
    assert needed is not None
    assert found.rows_needed == (max(needed, 101) if verdict == "undecided" else None)


def test_a_teacher_that_is_never_right_is_kept(tmp_path: Path) -> None:
    found = only(decide(tmp_path, [rule(kind="keeps", share=1)], first(0), {"teacher": first(0)}))
    assert (found.passes, found.note) == (True, "the teacher has no right answer")


def test_a_teacher_without_answers_leaves_keeps_undecided(tmp_path: Path) -> None:
    asks = rule(kind="keeps", share=0.9)
    decision = gate(
        [score_row(CANDIDATE, 5, 5)],
        CANDIDATE,
        rules=[asks],
        answers=answers_file(tmp_path / "ours.jsonl", {CANDIDATE: first(5, 5)}),
    )
    found = only(decision)
    assert (found.rule, found.verdict) == (asks, "undecided")
    assert found.note == "the teacher has no answers"


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
    assert (
        "(-28.0 points, must be ≥ -2, against student:3 on 50 shared rows of 100)"
        in decision.reason
    )


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
    assert found.note == "no test row is shared"


def test_the_champion_itself_passes_on_however_few_rows(tmp_path: Path) -> None:
    rights: Rights = {"teacher": first(4, 5), CANDIDATE: first(3, 5)}
    file = answers_file(tmp_path / "theirs.jsonl", rights)
    itself = version("3", file, is_champion=True, is_candidate=True)
    better = version("2", answers_file(tmp_path / "better.jsonl", {CANDIDATE: first(5, 5)}))
    for than in ("champion", "best", "2"):
        asks = [rule(kind="not_worse", than=than)]
        found = only(decide(tmp_path, asks, first(3, 5), earlier=[itself, better]))
        assert (found.passes, found.note) == (True, "the student is the champion")


def three_versions(folder: Path) -> list[EarlierVersion]:
    """Right on 80, 90 and 95 of 100 rows. The last was rolled back, the first is the champion."""
    files = {}
    for right in (80, 90, 95):
        files[right] = answers_file(folder / f"{right}.jsonl", {CANDIDATE: first(right)})
    return [
        version("1", files[80], is_champion=True),
        version("2", files[90]),
        version("3", files[95], may_be_best=False),
    ]


@pytest.mark.parametrize(
    ("than", "figure", "against"),
    [("champion", 0, "student:1"), ("best", -0.1, "student:2"), ("3", -0.15, "student:3")],
)
def test_not_worse_names_the_version_to_compare_with(
    than: str, figure: float, against: str, tmp_path: Path
) -> None:
    asks = [rule(kind="not_worse", than=than, confidence=None)]
    found = only(decide(tmp_path, asks, first(80), earlier=three_versions(tmp_path)))
    assert found.figure == pytest.approx(figure)
    assert found.note == f"against {against} on 100 shared rows"
    assert found.passes is (than == "champion")


def test_of_two_equally_good_versions_the_first_is_the_best(tmp_path: Path) -> None:
    same = answers_file(tmp_path / "same.jsonl", {CANDIDATE: first(90)})
    asks = [rule(kind="not_worse", than="best", confidence=None)]
    two = [version("1", same), version("2", same)]
    found = only(decide(tmp_path, asks, first(95), earlier=two))
    assert found.note == "against student:1 on 100 shared rows"


def test_half_of_the_rows_are_enough_to_be_the_best(tmp_path: Path) -> None:
    half = answers_file(tmp_path / "half.jsonl", {CANDIDATE: first(50)}, start=50)
    asks = [rule(kind="not_worse", than="best", confidence=None)]
    found = only(decide(tmp_path, asks, last(50), earlier=[version("2", half)]))
    assert (found.passes, found.note) == (True, "against student:2 on 50 shared rows of 100")


def test_a_version_that_is_the_student_itself_passes(tmp_path: Path) -> None:
    same = answers_file(tmp_path / "same.jsonl", {CANDIDATE: first(3, 5)})
    asks = rule(kind="not_worse", than="2")
    earlier = [version("2", same, is_candidate=True)]
    found = only(decide(tmp_path, [asks], first(3, 5), earlier=earlier))
    assert (found.rule, found.verdict) == (asks, "passed")
    assert found.note == "the student is version 2"


def test_an_anchor_that_is_not_there(tmp_path: Path) -> None:
    best = [rule(kind="not_worse", than="best")]
    found = only(decide(tmp_path, best, first(80)))
    assert (found.passes, found.note) == (True, "no version yet")
    down = [three_versions(tmp_path)[2]]
    assert only(decide(tmp_path, best, first(80), earlier=down)).note == "no version yet"
    elsewhere = answers_file(tmp_path / "elsewhere.jsonl", {CANDIDATE: first(80)}, start=51)
    found = only(decide(tmp_path, best, first(80), earlier=[version("2", elsewhere)]))
    assert (found.verdict, found.note) == (
        "undecided",
        "too few test rows are shared",
    )
    named = [rule(kind="not_worse", than="9")]
    found = only(decide(tmp_path, named, first(80), earlier=three_versions(tmp_path)))
    assert (found.verdict, found.note) == ("undecided", "no version 9 is registered")


def example(number: int, question: str = "", order: int = 1) -> Example:
    """A row whose gold answer is A."""
    choices = ("oven", "bridge", "rain")[::order]
    return Example(
        example_id=f"r{number}",
        question=question or f"question {number}",
        choices=choices,
        answer_key="A",
    )


def registered(folder: Path, rows: Sequence[Example], right: int) -> EarlierVersion:
    """The champion, as it is registered with its answers to `rows`."""
    own = answers_file(
        folder / "whole.jsonl", {"teacher": first(9, 10), CANDIDATE: first(right, 10)}
    )
    write_own_answers(own, CANDIDATE, rows, folder / "own.jsonl")
    return version("3", folder / "own.jsonl", is_champion=True)


def test_rows_are_known_by_their_content(tmp_path: Path) -> None:
    """Of ten rows, one has its options in another order now, two ids have another question, and one
    row has another id."""
    champion = registered(tmp_path, [example(number) for number in range(10)], 10)
    assert list(next(iter(champion.answers.values()))) == [
        *("example_id", "asked", "content", "gold", CANDIDATE)
    ]
    now = [example(number) for number in range(10)]
    now[0] = example(0, order=-1)
    now[1] = example(1, question="another question")
    now[2] = example(2, question="a new one")
    contents = row_contents(now)
    # The row of the id r9 was registered with the id r3, and the other way round.
    contents["r3"], contents["r9"] = contents["r9"], contents["r3"]
    asks = [rule(kind="not_worse", confidence=None)]
    found = only(decide(tmp_path, asks, first(10, 10), earlier=[champion], contents=contents))
    assert found.figure == 0
    assert found.note == (
        "against student:3 on 7 shared rows of 10; left out, options in another order or spelling: "
        "1; left out, id used for other content: 2"
    )


def test_a_comparison_holds_both_lines_of_each_shared_row(tmp_path: Path) -> None:
    """Two of five rows have their options in another order, and one is new."""
    champion = registered(tmp_path, [example(number) for number in range(10)], 9)
    now = [example(number, order=-1 if number < 2 else 1) for number in range(4)]
    now.append(example(40))
    rights: Rights = {"teacher": first(5, 5), CANDIDATE: first(4, 5)}
    own = read_answers(answers_file(tmp_path / "ours.jsonl", rights))
    own = {row.example_id: line for row, line in zip(now, own.values(), strict=True)}
    contents = row_contents(now)
    compared = compare(own, CANDIDATE, contents, champion)
    assert [(ours, theirs["asked"]) for ours, theirs in compared.shared] == [
        (own["r2"], contents["r2"].asked),
        (own["r3"], contents["r3"].asked),
    ]
    assert compared.note == (
        "against student:3 on 2 shared rows of 5; left out, options in another order or spelling: 2"
    )
    assert share_rows(champion.answers, contents)
    assert not share_rows(champion.answers, row_contents([example(40), example(41)]))
    assert not share_rows(champion.answers, {"r1": row_contents([example(40)])["r40"]})
    by_id = read_answers(answers_file(tmp_path / "ids.jsonl", {CANDIDATE: first(2, 2)}))
    assert share_rows(by_id, row_contents([example(1)]))
    assert not share_rows(by_id, row_contents([example(9)]))


def test_answers_of_earlier_releases_are_compared_by_id_and_it_is_said(tmp_path: Path) -> None:
    file = answers_file(tmp_path / "old.jsonl", {"teacher": first(8, 10), CANDIDATE: first(8, 10)})
    contents = row_contents([example(number) for number in range(10)])
    champion = version("3", file, is_champion=True)
    asks = [rule(kind="not_worse", confidence=None)]
    found = only(decide(tmp_path, asks, first(8, 10), earlier=[champion], contents=contents))
    assert found.note == (
        "against student:3 on 10 shared rows; known by their ids alone, since its answers are of "
        "an earlier release"
    )


def test_the_digest_of_rows_is_that_of_contents_and_gold() -> None:
    rows = [example(number) for number in range(3)]
    renamed = [row.model_copy(update={"example_id": f"x{row.example_id}"}) for row in rows]
    assert rows_digest(rows) == rows_digest(renamed[::-1])
    assert rows_digest(rows) != rows_digest(rows[:2])
    assert rows_digest(rows) != rows_digest([example(0, order=-1), *rows[1:]])
    corrected = rows[0].model_copy(update={"answer_key": "B"})
    assert rows_digest(rows) != rows_digest([corrected, *rows[1:]])


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


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        ({"figure": "macro_f1", "minimum": 0.75}, "passed"),
        ({"figure": "macro_f1", "minimum": 0.75, "confidence": 0.95}, "undecided"),
        ({"figure": "macro_f1", "minimum": 0.66, "confidence": 0.95}, "passed"),
        ({"figure": "macro_f1", "minimum": 0.9, "confidence": 0.95}, "refused"),
        ({"figure": "recall", "class": "yes", "minimum": 0.9}, "passed"),
        ({"figure": "recall", "class": "yes", "minimum": 0.85, "confidence": 0.95}, "undecided"),
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
    if settings["figure"] == "order_robustness":
        assert found.note == "not measured"
    if settings.get("class") == "maybe":
        assert found.note == "no test row has the answer 'maybe', only yes, no"


def test_a_limit_on_the_order_of_options(tmp_path: Path) -> None:
    order = OrderRobustness(rows=50, alike=45, value=0.9, low=0.78, high=0.96, seconds=1.0)
    asks = [rule(kind="limit", figure="order_robustness", minimum=0.8, confidence=0.95)]
    decision = decide(tmp_path, asks, first(76), figures=further_figures(order_robustness=order))
    assert only(decision).interval == wilson_interval(45, 50, 0.9)
    assert decision.reason == (
        "passed: student int4 passes all rules: order_robustness at least 0.8 "
        "(0.9 [0.8085, 0.9505])"
    )


def test_a_rule_with_a_class_goes_to_json_and_back() -> None:
    asks = rule(kind="limit", figure="recall", minimum=0.5, **{"class": "yes"})
    assert RULE.validate_json(RULE.dump_json(asks)) == asks
    assert asks.title == "recall of yes at least 0.5"


@pytest.mark.parametrize(("minimum", "passed"), [(100, True), (101, False)])
def test_a_minimum_of_rows(minimum: int, passed: bool, tmp_path: Path) -> None:
    found = only(decide(tmp_path, [rule(kind="rows", minimum=minimum)], first(76)))
    assert found.passes is passed
    assert found.figure == 100
    assert found.rows_needed == (None if passed else minimum)


def test_a_bound_at_the_limit_proves_nothing() -> None:
    """What equals the limit is neither above nor below it."""
    assert decide_by(0.5, Interval(low=0.4, high=0.6), 0.4) == "undecided"
    assert decide_by(0.5, Interval(low=0.4, high=0.6), 0.6) == "undecided"
    assert decide_by(0.5, Interval(low=0.4, high=0.6), 0.39) == "passed"
    assert decide_by(0.5, Interval(low=0.4, high=0.6), 0.61) == "refused"
    assert decide_by(0.5, None, 0.5) == "passed"


def test_more_rows_than_were_too_few_are_needed() -> None:
    assert more_than(100, 40) == 101
    assert more_than(100, 400) == 400
    assert more_than(100, None) is None
    level = decide_difference(BetterRule(kind="better", than=BASE), Pairs(50, 5, 5, 40), 0.0, "")
    assert (level.verdict, level.rows_needed) == ("undecided", None)


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
    assert len(decision.verdicts) == 5


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
    with pytest.raises(DataError, match=r"broken\.jsonl: can't be read as answers"):
        gate([score_row(CANDIDATE, 1, 1)], CANDIDATE, rules=(), answers=broken)
