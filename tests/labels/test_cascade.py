"""Two teachers, a cheap one first: who is asked what, whose answer is the label, and what it
saves."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from chat_endpoint import Call, ChatEndpoint, Reply, completion, said
from label_runs import PROMPT, endpoint_of, example, labelled, read_all, read_lines
from pydantic import ValidationError

from distillery.errors import BudgetReached, DataError, RecipeError, TeacherError
from distillery.labels.canaries import ask_canaries
from distillery.labels.cascade import label_in_cascade, results
from distillery.labels.files import LabelCounts, read_labels, read_rejected
from distillery.labels.quote import quote_canaries
from distillery.labels.store import LabelStore
from distillery.recipe import CanaryRecipe, CascadeRecipe, TeacherRecipe, parse_recipe
from distillery.records import Example
from distillery.teacher.ledger import Payer

ROWS = 20
PRICES = {"input": 100.0, "output": 1000.0}
CHEAP_PRICES = {"input": 10.0, "output": 100.0}
EACH = (40 * 100 + 1000) / 1e6
"""What an answer of the dear teacher costs: 40 tokens in, one out. A cheap one is a tenth of it."""

pytestmark = pytest.mark.usefixtures("no_backoff")


def number(call: Call) -> int:
    """The number of the row that is asked."""
    return int(call.question.partition("after ")[2].partition("?")[0])


def unsure_of_odd_rows(call: Call) -> Reply:
    """The cheap one: A, with 0.95 for even rows and 0.6 for odd ones; row 4 gets no answer."""
    if number(call) == 4:
        # With probabilities too: an endpoint whose first answer has none is said to leave them out.
        return said("I can't tell.", top={"I": 0.9, "Well": 0.1})
    share = 0.6 if number(call) % 2 else 0.95
    rest = dict.fromkeys("BC", (1 - share) / 2)
    return said("A", top={"A": share, **rest})


def dear(call: Call) -> Reply:
    """The teacher itself: A for rows below 10, else B."""
    letter = "A" if number(call) < 10 else "B"
    rest = {other: 0.1 for other in "ABC" if other != letter}
    return said(letter, top={letter: 0.8, **rest} if call.body.get("logprobs") else None)


@pytest.fixture
def servers() -> Iterator[tuple[ChatEndpoint, ChatEndpoint]]:
    with ChatEndpoint(unsure_of_odd_rows) as cheap, ChatEndpoint(dear) as teacher:
        yield cheap, teacher


async def run(
    servers: tuple[ChatEndpoint, ChatEndpoint],
    folder: Path,
    out: str = "out",
    name: str = "large",
    **recipe: Any,
) -> LabelCounts:
    cascade = {"below": 0.9, "prices": CHEAP_PRICES, **recipe.pop("cascade", {})}
    teacher = TeacherRecipe(**{"prices": PRICES, "cascade": cascade, **recipe})
    cheap = teacher.cheap
    assert cheap
    rows = [example(number) for number in range(ROWS)]
    with LabelStore(f"sqlite:///{folder / 'labels.db'}") as store:
        return await label_in_cascade(
            partial(list, rows),
            PROMPT,
            teacher,
            cheap,
            endpoint_of(servers[1], identity=name),
            endpoint_of(servers[0], identity="cheap"),
            store,
            folder / out,
            count=ROWS,
            payer=Payer(run=out, recipe="two"),
        )


async def test_the_teacher_is_asked_where_the_cheap_one_is_not_sure(
    servers: tuple[ChatEndpoint, ChatEndpoint], tmp_path: Path
) -> None:
    counts = await run(servers, tmp_path)
    assert sorted(map(number, servers[0].calls)) == list(range(ROWS))
    hard = [4, *(n for n in range(ROWS) if n % 2)]
    assert sorted(map(number, servers[1].calls)) == sorted(hard)
    labels = read_labels(tmp_path / "out")
    assert list(labels) == [f"row-{n}" for n in range(ROWS)], "in the order of the rows"
    for n in range(ROWS):
        assert labels[f"row-{n}"].answer == ("B" if n in hard and n >= 10 else "A")
        # The teacher's labels have no probabilities either, so that all rows are alike.
        assert labels[f"row-{n}"].distribution is None
    found = counts.cascade
    assert found
    assert (found.cheap, found.cheap_rows, found.dear_rows) == ("cheap", 9, 11)
    assert (found.compared, found.agreed) == (10, 5), "row 4 has no cheap answer to compare"
    assert found.line() == (
        "9 rows by cheap, 11 left to the teacher, which agrees with it on 50% of those"
    )
    assert (counts.accepted, counts.rejected, counts.asked) == (ROWS, 0, ROWS + 11)
    assert found.cheap_cost == pytest.approx(ROWS * EACH / 10)
    assert found.dear_cost == pytest.approx(11 * EACH)
    assert counts.cost == pytest.approx(ROWS * EACH / 10 + 11 * EACH)
    # Nine answers of the teacher less 19 cheap labels.
    assert found.saved == pytest.approx(9 * EACH - 19 * EACH / 10)


async def test_a_second_run_asks_nobody_and_writes_the_same(
    servers: tuple[ChatEndpoint, ChatEndpoint], tmp_path: Path
) -> None:
    first = await run(servers, tmp_path)
    asked = [len(server.calls) for server in servers]
    again = await run(servers, tmp_path, out="again")
    assert [len(server.calls) for server in servers] == asked
    assert read_all(tmp_path / "out") == read_all(tmp_path / "again")
    assert (again.asked, again.cost) == (0, 0.0)
    assert first.cascade
    assert again.cascade
    assert again.cascade.saved == first.cascade.saved, "whoever has paid for the answers"


async def test_a_bound_that_is_reached_by_all_asks_the_teacher_nothing(
    servers: tuple[ChatEndpoint, ChatEndpoint], tmp_path: Path
) -> None:
    servers[0].script = lambda call: said("C", top={"C": 0.95, "A": 0.03, "B": 0.02})
    counts = await run(servers, tmp_path)
    assert not servers[1].calls
    found = counts.cascade
    assert found
    assert (found.dear_rows, found.dear_cost, found.compared) == (0, 0.0, 0)
    # Answers of the teacher, which gave none, are taken to be as long as the cheap one's.
    assert found.saved == pytest.approx(ROWS * EACH * 0.9)


async def test_probabilities_are_kept_where_they_are_wanted(
    servers: tuple[ChatEndpoint, ChatEndpoint], tmp_path: Path
) -> None:
    await run(servers, tmp_path, soft_labels=True)
    labels = read_labels(tmp_path / "out")
    assert labels["row-0"].distribution == pytest.approx({"A": 0.95, "B": 0.025, "C": 0.025})
    assert labels["row-11"].distribution == pytest.approx({"A": 0.1, "B": 0.8, "C": 0.1})
    assert labels["row-11"].usage.prompt_tokens == 80, "both answers"


async def test_votes_tell_how_sure_the_cheap_one_is(
    servers: tuple[ChatEndpoint, ChatEndpoint], tmp_path: Path
) -> None:
    asked: dict[int, int] = {}

    def drawn(call: Call) -> Reply:
        """Of three answers to an odd row, one differs."""
        row = number(call)
        asked[row] = asked.get(row, 0) + 1
        return said("B" if row % 2 and asked[row] == 2 else "A")

    servers[0].script = drawn
    cascade = {"soft_labels": False, "answers": {"votes": 3}, "temperature": 0.7, "below": 0.8}
    await run(servers, tmp_path, cascade=cascade)
    assert sorted(map(number, servers[1].calls)) == [n for n in range(ROWS) if n % 2]


async def test_rows_that_the_teacher_does_not_answer_get_no_cheap_label(
    servers: tuple[ChatEndpoint, ChatEndpoint], tmp_path: Path
) -> None:
    servers[1].script = lambda call: said("Hm.") if number(call) == 7 else dear(call)
    await run(servers, tmp_path)
    assert list(read_rejected(tmp_path / "out")) == ["row-7"]


async def test_too_few_labels_are_those_of_both(
    servers: tuple[ChatEndpoint, ChatEndpoint], tmp_path: Path
) -> None:
    """The hard rows may well be those that nobody can answer."""
    servers[1].script = lambda call: said("Hm.")
    filters = {"minimum_accepted": 0.4}
    counts = await run(servers, tmp_path, filters=filters)
    assert (counts.accepted, counts.rejected) == (9, 11)
    with pytest.raises(TeacherError, match=r"9 of 20 rows have a label"):
        await run(servers, tmp_path, out="again")


async def test_canaries_are_asked_of_both_where_they_have_answered(
    servers: tuple[ChatEndpoint, ChatEndpoint], tmp_path: Path
) -> None:
    await run(servers, tmp_path)
    recipe = TeacherRecipe.model_validate(
        {"cascade": CascadeRecipe(), "canaries": CanaryRecipe(rows=10), "prices": PRICES}
    )
    assert recipe.cheap
    rows = [example(number) for number in range(ROWS)]
    dear, cheap = (
        endpoint_of(servers[1], identity="large"),
        endpoint_of(servers[0], identity="cheap"),
    )
    servers[0].script = lambda call: said("B", top={"B": 0.9, "A": 0.05, "C": 0.05})
    asked_before = [len(server.calls) for server in servers]
    with LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store:
        quoted = [
            quote_canaries(rows, PROMPT, asked, name, store)
            for asked, name in ((recipe.cheap, "cheap"), (recipe, "large"))
        ]
        drift = await ask_canaries(rows, PROMPT, recipe, dear, store)
        assert (drift.compared, drift.changed) == (10, ())
        of_cheap = await ask_canaries(rows, PROMPT, recipe.cheap, cheap, store)
    assert of_cheap.compared >= 9, "row 4 has no answer"
    assert len(of_cheap.changed) >= 9
    calls = [len(server.calls) - n for server, n in zip(servers, asked_before, strict=True)]
    assert [each.calls for each in quoted] == calls == [10, 10]
    assert [each.usage.prompt_tokens for each in quoted] == [400, 400]
    assert quoted[1].cost == pytest.approx(10 * EACH)
    assert "10 canaries, 0 known: 10 calls, 400 tokens in (counted)" in quoted[1].line()


async def test_two_teachers_of_one_name_are_refused(
    servers: tuple[ChatEndpoint, ChatEndpoint], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="both teachers are cheap"):
        await run((servers[0], servers[1]), tmp_path, name="cheap")
    assert not servers[0].calls


async def test_the_filters_are_for_the_labels_of_both(
    servers: tuple[ChatEndpoint, ChatEndpoint], tmp_path: Path
) -> None:
    filters = {"agreement_with_gold": True}
    counts = await run(servers, tmp_path, filters=filters)
    # Rows from 10 on are answered B by the teacher, and all gold answers are A.
    assert (counts.accepted, counts.rejected) == (15, 5)
    assert set(read_rejected(tmp_path / "out").values()) == {"gold says otherwise"}


async def test_the_budget_is_for_both(
    servers: tuple[ChatEndpoint, ChatEndpoint], tmp_path: Path
) -> None:
    with pytest.raises(BudgetReached, match=r"^teacher\.budget\.calls: 25 of 25 spent"):
        await run(servers, tmp_path, budget={"calls": 25})
    assert [len(server.calls) for server in servers] == [ROWS, 5]
    counts = await run(servers, tmp_path, out="again", budget={"calls": 25})
    assert (counts.accepted, counts.asked) == (ROWS, 6), "the answers so far were kept"


def test_results_of_other_rows_are_refused(tmp_path: Path) -> None:
    label = {"example_id": "row-1", "answer": "A"}
    (tmp_path / "labels.jsonl").write_text(json.dumps(label) + "\n")
    (tmp_path / "rejected.jsonl").write_text("")
    assert [found.example_id for found in results([example(1)], tmp_path)] == ["row-1"]
    with pytest.raises(DataError, match="row-2: neither labelled nor rejected"):
        list(results([example(2)], tmp_path))


def test_what_a_cheap_teacher_may_be_told() -> None:
    def error_of(**recipe: Any) -> str:
        with pytest.raises(ValidationError) as error:
            TeacherRecipe(**recipe)
        return str(error.value)

    assert "needs prices" in error_of(cascade={"budget": {"cost": 1}})
    assert "canaries: belongs to the teacher" in error_of(cascade={"canaries": {"rows": 3}})
    assert "no confidence" in error_of(cascade={"soft_labels": False})
    assert "have no probabilities" in error_of(
        soft_labels=True, cascade={"soft_labels": False, "answers": {"orders": 2}}
    )
    assert "remove batch or cascade" in error_of(batch={}, cascade={})
    assert "would have no reasons" in error_of(
        answers={"form": "rationale"}, max_tokens=300, cascade={}
    )
    assert "set cascade.prices" in error_of(budget={"cost": 1}, prices=PRICES, cascade={})
    other = {**CHEAP_PRICES, "currency": "EUR"}
    assert "give both in one" in error_of(prices=PRICES, cascade={"prices": other})
    assert "kind local costs nothing" in error_of(kind="local", cascade={})
    assert "kind gold cost nothing" in error_of(kind="gold", select={"rows": 5})


def test_keys_are_as_before_and_tell_cascades_apart() -> None:
    def key(**recipe: Any) -> str:
        return TeacherRecipe(**recipe).content_id

    assert "cascade" not in key()
    assert key(select={"rows": 5}) == key(), "the chosen rows are in a key of their own"
    keys = {key(cascade={"below": below}) for below in (0.5, 0.9)} | {key()}
    assert len(keys) == 3
    same = {"concurrency": 3, "prices": PRICES, "attempts": 1}
    assert key(cascade=same) == key(cascade={})


async def test_equal_rows_are_asked_once_and_counted(tmp_path: Path) -> None:
    def rows() -> list[Example]:
        twice = [example(1), example(1, example_id="again"), example(2)]
        return twice

    with ChatEndpoint() as server:
        url = f"sqlite:///{tmp_path / 'labels.db'}"
        counts = await labelled(server, url, tmp_path / "out", rows())
        assert (len(server.calls), counts.asked, counts.equal) == (2, 2, 1)
        again = await labelled(server, url, tmp_path / "again", rows())
        assert (again.asked, again.equal) == (0, 0), "its answer was there: nothing was saved now"
    assert len(read_lines(tmp_path / "out" / "labels.jsonl")) == 3


async def test_what_the_cache_of_prompts_saves_is_told(tmp_path: Path) -> None:
    def cached(call: Call) -> Reply:
        body = completion("A")
        body["usage"]["prompt_tokens_details"] = {"cached_tokens": 30}
        return Reply(body)

    with ChatEndpoint(cached) as server:
        url = f"sqlite:///{tmp_path / 'labels.db'}"
        prices = {"input": 100.0, "cached_input": 25.0, "output": 1000.0}
        counts = await labelled(server, url, tmp_path / "out", 4, prices=prices)
        assert counts.cached_saved == pytest.approx(4 * 30 * 75 / 1e6)
        assert counts.cost == pytest.approx(4 * (10 * 100 + 30 * 25 + 1000) / 1e6)
        plain = await labelled(server, url, tmp_path / "plain", 5)
        assert plain.cached_saved is None


WRITTEN: dict[str, Any] = {
    "dataset": {"source": "files", "files": {"train": ["a.csv"]}, "carve": {"test": 0.2}},
    "prompt": {"system": "Write."},
}


@pytest.mark.parametrize(
    ("task", "teacher", "told"),
    [
        ({"kind": "generate"}, {"cascade": {}}, "the confidence of texts is not known"),
        ({"kind": "generate"}, {"select": {"rows": 5}}, "set by: diversity"),
        ({"kind": "extract"}, {"select": {"rows": 5, "by": "uncertainty"}}, "set by: diversity"),
        ({"kind": "extract"}, {"cascade": {}}, "the share of answers that agree"),
        (
            {"kind": "extract"},
            {
                "cascade": {
                    "soft_labels": False,
                    "temperature": 1,
                    "answers": {"votes": 3, "orders": 2},
                }
            },
            "have no meaning with task.kind: extract",
        ),
    ],
)
def test_what_written_answers_do_not_tell(
    task: dict[str, Any], teacher: dict[str, Any], told: str
) -> None:
    schema = {"type": "object", "properties": {"place": {"type": "string"}}}
    if task["kind"] == "extract":
        task = {**task, "schema": schema}
    with pytest.raises(RecipeError, match=told):
        parse_recipe({**WRITTEN, "task": task, "teacher": {"kind": "endpoint", **teacher}}, "mine")


def test_a_cheap_teacher_answers_in_the_teachers_form_and_never_for_test_rows() -> None:
    values = {**WRITTEN, "task": {"kind": "classify"}, "teacher": {"cascade": {"below": 0.7}}}
    recipe = parse_recipe({**values, "prompt": {}}, "mine")
    cheap = recipe.teacher.cascade
    assert cheap
    assert (cheap.answers.form, cheap.max_tokens) == ("json", 64)
    plain = parse_recipe({**values, "prompt": {}, "teacher": {}}, "mine")
    asked = recipe.teacher_of_test_rows
    assert asked.content_id == plain.teacher_of_test_rows.content_id, "no answer is paid for anew"
