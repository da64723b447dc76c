"""A judge that compares the student's texts with the teacher's, by real HTTP."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_endpoint import Call, ChatEndpoint, Reply, Script, completion, refused, said
from pydantic import SecretStr
from written_run import description

from distillery.errors import BudgetReached, DataError, TeacherError
from distillery.evaluation.gate import apply_limit
from distillery.evaluation.preferences import (
    Preference,
    compare_pairs,
    preference_figures,
    read_preferences,
    with_preferences,
)
from distillery.evaluation.statistics import win_rate_interval
from distillery.labels.canaries import drift_of, earlier_questions
from distillery.labels.exports import export_rows
from distillery.labels.files import LabelCounts
from distillery.labels.pairs import Pair, pairs_of
from distillery.labels.quote import quote_judge
from distillery.labels.store import LabelStore
from distillery.recipe import JudgeRecipe, LimitRule, PromptRecipe
from distillery.records import (
    Artifact,
    EvaluationReport,
    Figures,
    Interval,
    PreferenceFigures,
    ScoreRow,
    TeacherDrift,
)
from distillery.teacher.endpoint import Endpoint

PROMPT = PromptRecipe(system="Write a sentence.", user="{text}", answer="written")

SHOWN = re.compile(r"\[Answer A\]\n(.*)\n\[The end of answer A\].*\[Answer B\]\n(.*)\n\[The", re.S)


def better(call: Call) -> str:
    """Return the letter that a judge without errors gives: good is better than fair, and fair
    than poor."""
    found = SHOWN.search(call.question)
    assert found, call.question
    first, second = (["poor", "fair", "good"].index(text.split()[0]) for text in found.groups())
    return "C" if first == second else "A" if first > second else "B"


def perfect(call: Call) -> Reply:
    return said(better(call))


def biased(_: Call) -> Reply:
    return said("A")


def pair(number: int, student: str | None, teacher: str) -> Pair:
    return Pair(description(number), student, teacher)


PAIRS = [
    pair(0, "good 0", "fair 0"),
    pair(1, "poor 1", "fair 1"),
    pair(2, "fair 2, in other words", "fair 2"),
    pair(3, "fair 3", "fair 3"),
    pair(4, None, "fair 4"),
    pair(5, "poor 5", "good 5"),
]


class Judging:
    """A judge's endpoint, a label store, and what comes of asking."""

    def __init__(self, folder: Path, server: ChatEndpoint) -> None:
        self.folder, self.server = folder, server
        self.url = f"sqlite:///{folder / 'labels.db'}"

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(
            url=self.server.url,
            model="wise",
            key=SecretStr("key"),
            identity="judge:wise",
            sdk="openai",
            section=JudgeRecipe.section,
            variables=JudgeRecipe.variables,
        )

    async def compare(
        self, pairs: list[Pair] = PAIRS, **settings: Any
    ) -> tuple[PreferenceFigures, LabelCounts]:
        recipe = JudgeRecipe(**{"outage_s": 1} | settings)
        with LabelStore(self.url) as store:
            return await compare_pairs(pairs, PROMPT, recipe, self.endpoint, store, self.folder)

    async def drift(self, **settings: Any) -> TeacherDrift:
        recipe = JudgeRecipe(**{"outage_s": 1} | settings)
        with LabelStore(self.url) as store:
            asked = earlier_questions(recipe, "judge:wise", store)
            return await drift_of(asked, recipe, self.endpoint, store)

    def preferences(self) -> dict[str, Preference]:
        return read_preferences(self.folder)


@pytest.fixture
def judging(tmp_path: Path) -> Iterator[Callable[[Script], Judging]]:
    servers = []

    def start(script: Script) -> Judging:
        servers.append(ChatEndpoint(script).__enter__())
        return Judging(tmp_path, servers[-1])

    yield start
    for server in servers:
        server.__exit__()


async def test_a_judge_decides_and_is_asked_once_in_either_order(
    judging: Callable[[Script], Judging],
) -> None:
    run = judging(perfect)
    figures, counts = await run.compare()
    assert (figures.wins, figures.ties, figures.losses) == (1, 2, 3)
    assert (figures.judge, figures.compared, figures.disagree) == ("wise", 4, 0)
    assert figures.win_rate
    assert figures.win_rate.value == pytest.approx(2 / 6)
    assert counts.asked == len(run.server.calls) == 8
    shown: Counter[tuple[str, ...]] = Counter()
    for call in run.server.calls:
        found = SHOWN.search(call.question)
        assert found
        shown[found.groups()] += 1
        assert "Write a sentence." in call.question
        assert "city: " in call.question
        assert "'A', 'B', or 'C'" in call.body["messages"][0]["content"]
    asked = [(each.student, each.teacher) for each in PAIRS if each.is_asked]
    assert shown == Counter([*asked, *((second, first) for first, second in asked)])
    words = {example_id: each.in_words for example_id, each in run.preferences().items()}
    assert words == {
        "r0": "student",
        "r1": "teacher",
        "r2": "neither",
        "r3": "neither: equal answers",
        "r4": "teacher: no answer of the student",
        "r5": "teacher",
    }


async def test_a_judge_that_prefers_a_position_gives_ties_alone(
    judging: Callable[[Script], Judging],
) -> None:
    run = judging(biased)
    figures, _ = await run.compare([each for each in PAIRS if each.is_asked])
    assert (figures.wins, figures.ties, figures.losses) == (0, 4, 0)
    assert (figures.disagree, figures.disagreement) == (4, 1.0)
    assert run.preferences()["r0"].in_words == "neither: the orders disagree"


async def test_a_win_and_a_tie_are_a_tie(judging: Callable[[Script], Judging]) -> None:
    def undecided(call: Call) -> Reply:
        return said("C" if better(call) == "A" else "B")

    figures, _ = await judging(undecided).compare(PAIRS[:1])
    assert (figures.wins, figures.ties, figures.losses, figures.disagree) == (0, 1, 0, 1)


async def test_equal_answers_need_no_call(judging: Callable[[Script], Judging]) -> None:
    run = judging(perfect)
    figures, counts = await run.compare([PAIRS[3], PAIRS[4]])
    assert (figures.wins, figures.ties, figures.losses) == (0, 1, 1)
    assert (figures.compared, figures.disagreement) == (0, None)
    assert run.server.calls == []
    assert counts.asked == 0


async def test_an_answer_that_names_no_option_is_left_out_with_its_reason(
    judging: Callable[[Script], Judging],
) -> None:
    def strange(call: Call) -> Reply:
        if "poor 1" in call.question:
            return said("I can't say which of the two I like.")
        if "poor 5" in call.question and better(call) == "B":
            return said("Answ", finish_reason="length")
        return perfect(call)

    run = judging(strange)
    figures, _ = await run.compare()
    assert (figures.wins, figures.ties, figures.losses, figures.compared) == (1, 2, 1, 2)
    assert figures.left_out == {
        "no option, or more than one, of A to C": 1,
        "no answer within evaluation.judge.max_tokens (16)": 1,
    }
    left_out = run.preferences()["r5"]
    assert (left_out.outcome, left_out.orders.count(None)) == (None, 1)
    assert left_out.in_words.startswith("left out: no answer within evaluation.judge.max_tokens")
    # What is rejected was paid for, too.
    _, counts = await run.compare()
    assert counts.asked == 0


async def test_what_a_judge_refuses_is_left_out_in_words_for_a_judge(
    judging: Callable[[Script], Judging],
) -> None:
    body = completion("")
    body["choices"][0]["message"]["refusal"] = "A"

    def refuses(call: Call) -> Reply:
        return Reply(body) if "poor 1" in call.question else perfect(call)

    run = judging(refuses)
    for _ in range(2):
        figures, _ = await run.compare()
        assert figures.left_out == {"refused by the judge": 1}, "also as the label store keeps it"
    assert len(run.server.calls) == 8


async def test_a_judge_that_says_nothing_of_use_ends_the_run(
    judging: Callable[[Script], Judging],
) -> None:
    """As one that reasons does, whose answers are all cut off."""
    with pytest.raises(TeacherError) as error:
        await judging(lambda _: said("Let me", finish_reason="length")).compare(PAIRS[:2])
    assert str(error.value).startswith(
        "evaluation.judge: 0 of 4 rows have a label: "
        "no answer within evaluation.judge.max_tokens (16) (4 rows); "
    )
    assert "teacher" not in str(error.value)
    assert str(error.value).endswith(
        "check evaluation.judge.instructions, evaluation.judge.max_tokens and the model"
    )


@pytest.mark.parametrize("pairs", [PAIRS[:1], PAIRS[:2]])
async def test_a_judge_whose_content_filter_refuses_ends_no_run(
    judging: Callable[[Script], Judging], pairs: list[Pair]
) -> None:
    """Neither the only pair, nor one of two of which the other's answers can't be read."""

    def filtered(call: Call) -> Reply:
        if "good 0" in call.question:
            return refused(400, "The prompt triggered a policy.", code="content_filter")
        return said("Let me see.")

    run = judging(filtered)
    for _ in range(2):
        figures, _ = await run.compare(pairs)
        assert (figures.rows, figures.win_rate, figures.compared) == (0, None, 0)
        assert figures.left_out["refused by the endpoint's content filter"] == 1
        assert sum(figures.left_out.values()) == len(pairs)
    assert figures.line().startswith("0 wins, 0 ties, 0 losses of the student; 1 rows left out: ")
    assert len(run.server.calls) == 2 * len(pairs), "what was rejected is paid once"
    rule = LimitRule(kind="limit", figure="win_rate", minimum=0.4)
    assert apply_limit(rule, row_with(figures)).verdict == "undecided"


async def test_a_judge_whose_endpoint_fails_on_a_pair_ends_no_run(
    judging: Callable[[Script], Judging],
) -> None:
    def failing(call: Call) -> Reply:
        return refused(500, "broken") if "good 0" in call.question else said("A")

    figures, _ = await judging(failing).compare(PAIRS[:1], attempts=1)
    (reason,) = figures.left_out
    assert reason.startswith("the endpoint fails on it, again and again")
    assert figures.win_rate is None


async def test_a_second_run_asks_nothing_and_writes_the_same(
    judging: Callable[[Script], Judging],
) -> None:
    run = judging(perfect)
    first, _ = await run.compare()
    written = (run.folder / "preferences.jsonl").read_bytes()
    asked = len(run.server.calls)
    second, counts = await run.compare(prices={"input": 1, "output": 2}, concurrency=2)
    assert (first, 0) == (second, counts.asked)
    assert len(run.server.calls) == asked
    assert (run.folder / "preferences.jsonl").read_bytes() == written
    await run.compare(instructions="The shorter answer is better.")
    assert len(run.server.calls) == 2 * asked


async def test_a_budget_ends_in_one_line_and_what_was_paid_is_kept(
    judging: Callable[[Script], Judging],
) -> None:
    run = judging(perfect)
    with pytest.raises(BudgetReached) as error:
        await run.compare(budget={"calls": 5}, concurrency=1)
    assert str(error.value).startswith("evaluation.judge.budget.calls: 5 of 5 spent in this run")
    assert "\n" not in str(error.value)
    _, counts = await run.compare(budget={"calls": 5})
    assert (counts.asked, len(run.server.calls)) == (3, 8)


async def test_canaries_tell_a_judge_that_has_changed(
    judging: Callable[[Script], Judging],
) -> None:
    run = judging(perfect)
    await run.compare()
    await run.compare(instructions="The shorter answer is better.")
    asked = len(run.server.calls)
    drift = await run.drift(canaries={"rows": 20})
    # Of the answers, those to these instructions alone.
    assert (drift.compared, drift.changed, len(run.server.calls)) == (8, (), asked + 8)
    run.server.script = biased
    drift = await run.drift(canaries={"rows": 8})
    assert len(drift.changed) > 2
    assert drift.changed[0].endswith(("(student first)", "(teacher first)"))
    drift = await run.drift(canaries={"rows": 3})
    assert drift.compared == 3
    figures, counts = await run.compare()
    assert (figures.wins, counts.asked) == (1, 0), "what canaries answer is not stored"


async def test_what_a_judge_says_is_no_label_and_goes_with_its_row(
    judging: Callable[[Script], Judging], tmp_path: Path
) -> None:
    run = judging(perfect)
    await run.compare()
    with LabelStore(run.url) as store:
        assert export_rows(store, tmp_path / "rows.jsonl", "messages") == 0
        assert store.summary()[0][:2] == ("judge:wise", 8)
        assert store.delete(rows=["r1"]) == 2
        assert store.summary()[0][1] == 6


def test_pairs_are_of_the_same_rows_whatever_is_added() -> None:
    rows = [description(number) for number in range(40)]
    students = {row.example_id: f"{row.example_id} says" for row in rows}
    teachers: dict[str, str | None] = {row.example_id: None for row in rows[:5]}
    few = pairs_of(rows[:20], students, teachers, 10)
    more = pairs_of(rows[:21], students, teachers, 10)
    assert len(few) == 10
    assert len({each.row.example_id for each in few} & {each.row.example_id for each in more}) >= 9
    assert all(each.teacher == each.row.answer_key for each in few), "gold stands for a teacher"
    assert few[0].student == f"{few[0].row.example_id} says"


def test_a_quote_counts_both_orders(tmp_path: Path) -> None:
    judge = JudgeRecipe(rows=30, identity="wise", prices={"input": 2.0, "output": 8.0})
    with LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store:
        found = quote_judge(map(description, range(40)), PROMPT, judge, store)
    assert (found.rows, found.calls, found.known) == (60, 60, 0)
    assert found.usage.prompt_tokens > 60 * 100
    assert found.cost
    assert found.line().startswith("60 comparisons, 0 known: 60 calls")


def row_with(figures: PreferenceFigures | None) -> ScoreRow:
    return ScoreRow(
        name="student int8",
        kind="model",
        correct=0,
        rows=500,
        accuracy=0.4,
        interval=Interval(low=0.3, high=0.5),
        figures=Figures(preferences=figures),
        metric="rouge_l",
    )


def test_the_gate_takes_a_win_rate_by_the_judges_rows() -> None:
    figures = preference_figures(
        "wise",
        [
            Preference(example_id=str(number), outcome=outcome, orders=(outcome, outcome))
            for number, outcome in enumerate(["win"] * 30 + ["tie"] * 40 + ["loss"] * 30)
        ],
    )
    rule = LimitRule(kind="limit", figure="win_rate", minimum=0.4)
    assert apply_limit(rule, row_with(figures)).verdict == "passed"
    assert apply_limit(rule, row_with(figures)).figure == 0.5
    assert apply_limit(rule, row_with(None)).verdict == "undecided"
    sure = LimitRule(kind="limit", figure="win_rate", minimum=0.4, confidence=0.95)
    assert apply_limit(sure, row_with(figures)).verdict == "passed"
    surer = LimitRule(kind="limit", figure="win_rate", minimum=0.45, confidence=0.95)
    verdict = apply_limit(surer, row_with(figures))
    assert verdict.verdict == "undecided"
    assert verdict.rows_needed
    assert 100 < verdict.rows_needed < 500, "of the 100 that were compared"


@pytest.mark.parametrize("shares", [(0.2, 0.6, 0.2), (0.45, 0.1, 0.45), (0.02, 0.9, 0.08)])
@pytest.mark.parametrize("rows", [50, 200])
def test_an_interval_of_a_win_rate_holds_the_true_one(
    shares: tuple[float, float, float], rows: int
) -> None:
    drawn = np.random.default_rng(0).multinomial(rows, shares, size=4000)
    true = shares[0] + shares[1] / 2
    held = 0
    for wins, ties, losses in drawn.tolist():
        interval = win_rate_interval(wins, ties, losses)
        held += interval.low <= true <= interval.high
    assert 0.935 <= held / len(drawn) <= 0.985


def test_an_interval_keeps_a_width_where_all_rows_are_alike() -> None:
    for counts in ((30, 0, 0), (0, 30, 0), (0, 0, 30), (1, 0, 0)):
        interval = win_rate_interval(*counts)
        assert 0 <= interval.low < interval.high <= 1
        assert interval.low <= (counts[0] + counts[1] / 2) / sum(counts) <= interval.high


def test_a_report_gets_the_figures_and_stays_the_same_to_later_stages() -> None:
    figures = preference_figures("wise", [])
    artifact = Artifact(uri="store/0", sha256="0" * 64, bytes=1)
    report = EvaluationReport(
        artifact=artifact,
        scoreboard=(row_with(None), row_with(None).model_copy(update={"name": "teacher"})),
        candidate="student int8",
        answers_sha256="1" * 64,
    )
    found = with_preferences(report, figures)
    assert found.content_id == report.content_id
    assert found.row("student int8").figures == Figures(preferences=figures)
    assert found.scoreboard[1] == report.scoreboard[1]


def test_a_file_of_preferences_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "preferences.jsonl").write_text("[]\n")
    with pytest.raises(DataError, match='ask the judge again with --refresh "ask judge"'):
        read_preferences(tmp_path)
