"""The ledger of a labelling: every call that may be billed is one entry, whatever becomes of it."""

import asyncio
import sqlite3
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from chat_endpoint import Call, ChatEndpoint, Reply, good, refused, said
from label_runs import PROMPT, endpoint_of, example, labelled
from postgres_server import Postgres

from distillery.labels.canaries import ask_canaries
from distillery.labels.files import LabelCounts
from distillery.labels.labelling import label
from distillery.labels.store import LabelStore
from distillery.recipe import CanaryRecipe, FilterRecipe, PriceRecipe, TeacherRecipe
from distillery.records import Usage
from distillery.teacher import ledger
from distillery.teacher.ledger import Payer

PRICES = PriceRecipe(input=2.0, cached_input=0.5, output=8.0, currency="EUR")
ANY = FilterRecipe(minimum_accepted=0)

pytestmark = pytest.mark.usefixtures("no_backoff")


def entries(database: Path) -> list[dict[str, Any]]:
    """Return the rows of the ledger."""
    connection = sqlite3.connect(database, timeout=60)
    connection.row_factory = sqlite3.Row
    rows = connection.execute("SELECT * FROM teacher_calls").fetchall()
    connection.close()
    return [dict(row) for row in rows]


def counted(usage: dict[str, Any]) -> tuple[int, int, int]:
    """Return the prompt's, cached and answer's tokens that an endpoint bills."""
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return usage["prompt_tokens"], cached, usage["completion_tokens"]


class Troubles:
    """A teacher that fails first on some questions, and on others for good: by the number in the
    question, 0 to 9, counted from the end."""

    def __init__(self) -> None:
        self.tries: Counter[str] = Counter()

    def __call__(self, call: Call) -> Reply:
        question = call.question
        self.tries[question] += 1
        trouble = question.partition("after ")[2].partition("?")[0][-1:]
        if self.tries[question] == 1 and trouble in "12":
            return refused({"1": 500, "2": 429}[trouble], "try again")
        if trouble == "3":
            # Before any answer has come, such a page would be asked again.
            return Reply("<html>", 200, delay=0.5)
        if trouble == "4":
            return refused(400, "blocked", code="content_filter")
        if trouble == "5":
            return refused(400, "too long", code="context_length_exceeded")
        if trouble == "6":
            return with_usage(said("I can't tell."), number=len(question), cached=17)
        if trouble == "7":
            return with_usage(said("A", finish_reason="content_filter"), number=3)
        return with_usage(good(call), number=len(question) + sum(self.tries.values()))


def with_usage(reply: Reply, number: int, cached: int = 0) -> Reply:
    """Return a reply that bills tokens by `number`, so that no two sums are equal by chance."""
    reply.body["usage"] = {
        "prompt_tokens": 40 + number,
        "completion_tokens": 1 + number % 5,
        "total_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return reply


def test_the_ledger_is_the_endpoints_own_count(tmp_path: Path) -> None:
    database = tmp_path / "labels.db"
    teacher = TeacherRecipe(
        prices=PRICES, filters=ANY, canaries=CanaryRecipe(rows=8), outage_s=30, attempts=3
    )
    payer = Payer(run="run-1", recipe="messages")
    train = [example(number) for number in range(40)]
    test = [example(number) for number in range(100, 120)]
    with ChatEndpoint(Troubles()) as server, LabelStore(f"sqlite:///{database}") as store:
        endpoint = endpoint_of(server)

        async def work() -> None:
            common: Any = {"payer": payer}
            await label(train, PROMPT, teacher, endpoint, store, tmp_path / "train", **common)
            await label(
                test,
                PROMPT,
                teacher,
                endpoint,
                store,
                tmp_path / "test",
                purpose="test row",
                **common,
            )
            await ask_canaries(train, PROMPT, teacher, endpoint, store, **common)

        asyncio.run(work())
    book = entries(database)
    assert len(book) == len(server.calls) == len({entry["call_id"] for entry in book})
    billed = Counter(map(counted, server.billed))
    answered = [entry for entry in book if entry["is_counted"] and entry["prompt_tokens"]]
    assert billed == Counter(
        (entry["prompt_tokens"], entry["cached_tokens"], entry["completion_tokens"])
        for entry in answered
    )
    cost = sum((p - c) * 2 + c * 0.5 + out * 8 for p, c, out in map(counted, server.billed)) / 1e6
    assert sum(entry["cost"] for entry in answered) == pytest.approx(cost)
    assert {entry["run"] for entry in book} == {"run-1"}
    assert {entry["recipe"] for entry in book} == {"messages"}
    assert {entry["teacher"] for entry in book} == {"gpt-test"}
    outcomes = Counter((entry["purpose"], entry["outcome"]) for entry in book)
    assert {
        purpose: sum(n for (each, _), n in outcomes.items() if each == purpose)
        for purpose in ("label", "test row")
    } == {"label": 4 * 10 + 4 * 2, "test row": 2 * 10 + 2 * 2}
    assert outcomes["label", "retried"] == 4 * 2, "a 500 and a 429 each, four times"
    assert outcomes["label", "malformed"] == 4
    assert outcomes["label", "filtered"] == 4 * 2, "by the request and by the answer"
    assert outcomes["label", "refused"] == 4, "too long"
    assert outcomes["label", "rejected"] == 4, "no option"
    assert outcomes["label", "answer"] == 4 * 5
    canaries = sum(n for (purpose, _), n in outcomes.items() if purpose == "canary")
    assert canaries == 7, "one of the eight rows has no answer to compare with"
    uncounted = Counter(entry["outcome"] for entry in book if not entry["is_counted"])
    assert set(uncounted) == {"malformed", "filtered", "refused"}
    failed = [entry for entry in book if entry["outcome"] == "retried"]
    assert all(entry["prompt_tokens"] == entry["cost"] == 0 for entry in failed)


async def test_an_entry_names_its_answer(tmp_path: Path) -> None:
    with ChatEndpoint(good) as server:
        await labelled(server, f"sqlite:///{tmp_path / 'labels.db'}", tmp_path / "out")
    connection = sqlite3.connect(tmp_path / "labels.db")
    joined = connection.execute(
        "SELECT count(*) FROM teacher_calls JOIN teacher_answers USING (request_key)"
    ).fetchone()
    assert joined == (20,)
    assert [entry["prices"] for entry in entries(tmp_path / "labels.db")] == [None] * 20
    assert len({entry["run"] for entry in entries(tmp_path / "labels.db")}) == 1


async def test_a_call_that_ends_with_the_run_is_an_entry_too(tmp_path: Path) -> None:
    """One call never comes back when another ends the run: it counts at the most that it can have
    taken."""

    def script(call: Call) -> Reply:
        if "after 0?" in call.question:
            return Reply(said("A").body, delay=60)
        return refused(401, "no")

    with ChatEndpoint(script) as server, pytest.raises(Exception, match="refused by"):
        await labelled(
            server,
            f"sqlite:///{tmp_path / 'labels.db'}",
            tmp_path / "out",
            rows=2,
            timeout_s=0.5,
            attempts=1,
            prices=PRICES,
            max_tokens=50,
        )
    book = {entry["outcome"]: entry for entry in entries(tmp_path / "labels.db")}
    assert len(server.calls) == len(book) == 2
    assert book["refused"]["prompt_tokens"] == 0
    unknown = book.get("retried") or book["lost"]
    assert not unknown["is_counted"]
    assert unknown["completion_tokens"] == 50
    assert unknown["cost"] > 50 * 8 / 1e6


async def test_what_a_run_reports_is_what_the_ledger_has(tmp_path: Path) -> None:
    """Tries that failed, malformed answers and what the filter blocked are in it."""
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    with ChatEndpoint(Troubles()) as server:
        counts = await labelled(
            server, url, tmp_path / "out", rows=10, prices=PRICES, filters=ANY, attempts=3
        )
    assert {each.outcome: each.calls for each in counts.paid} == {
        "answer": 5,
        "retried": 2,
        "malformed": 1,
        "filtered": 2,
        "refused": 1,
        "rejected": 1,
    }
    book = entries(tmp_path / "labels.db")
    assert counts.usage.prompt_tokens == sum(entry["prompt_tokens"] for entry in book)
    assert counts.usage.completion_tokens == sum(entry["completion_tokens"] for entry in book)
    assert counts.cost == pytest.approx(sum(entry["cost"] for entry in book))
    assert sum(each.estimated for each in counts.paid) == 3, "of which nobody counted the tokens"
    again = await labelled_again(url, tmp_path, rows=[0, 8, 9])
    assert (again.paid, again.usage, again.cost) == ((), Usage(), 0.0)


async def labelled_again(url: str, folder: Path, rows: list[int]) -> LabelCounts:
    """Label rows whose answers are known in another run, which asks nothing."""
    with ChatEndpoint(good) as server:
        known = [example(number) for number in rows]
        counts = await labelled(server, url, folder / "again", known, prices=PRICES)
        assert server.calls == []
    return counts


@pytest.mark.slow
def test_weeks_are_in_utc_in_any_zone_of_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Monday's first hour in Kiritimati is still Sunday in UTC."""
    monkeypatch.setenv("PGTZ", "Pacific/Kiritimati")
    with Postgres() as server, LabelStore(server.url()) as store:
        store.record(
            ledger.Call(
                run="run",
                recipe="messages",
                teacher="a",
                purpose="label",
                outcome="answer",
                called_at=datetime(2026, 11, 15, 12, tzinfo=UTC),
            )
        )
        store.flush()
        weeks = ledger.weekly_totals(store.database)
    assert [(each.week, each.calls) for each in weeks] == [("2026-11-09", 1)]


def test_totals_are_by_what_is_asked_for(tmp_path: Path) -> None:
    with LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store:
        for number, (teacher, week, currency) in enumerate(
            [("a", 9, "USD"), ("a", 16, "EUR"), ("b", 22, "EUR"), ("a", 23, "EUR")]
        ):
            store.record(
                ledger.Call(
                    run=f"run-{number}",
                    recipe="messages",
                    teacher=teacher,
                    purpose="label",
                    outcome="answer",
                    prompt_tokens=10**number,
                    cached_tokens=number,
                    completion_tokens=1,
                    is_counted=teacher == "a",
                    cost=float(number),
                    prices={"input": 1, "currency": currency},
                    called_at=datetime(2026, 11, week, 1, tzinfo=UTC),
                )
            )
        store.flush()
        found = ledger.totals(store.database, ("teacher",))
        weeks = ledger.weekly_totals(store.database)
        later = ledger.weekly_totals(store.database, datetime(2026, 11, 20, tzinfo=UTC))
    assert [(each.teacher, each.currency, each.calls, each.cost) for each in found] == [
        ("a", "USD", 1, 0.0),
        ("a", "EUR", 2, 4.0),
        ("b", "EUR", 1, 2.0),
    ]
    assert [each.estimated for each in found] == [0, 0, 1]
    assert found[1].usage == Usage(prompt_tokens=1010, cached_tokens=4, completion_tokens=2)
    assert [(each.week, each.calls) for each in weeks] == [
        ("2026-11-09", 1),
        ("2026-11-16", 2),
        ("2026-11-23", 1),
    ]
    assert [(each.week, each.calls) for each in later] == [("2026-11-16", 1), ("2026-11-23", 1)]
    assert ledger.sum_of(found, "EUR").cost == 6.0
    table = ledger.costs_table("teacher", found).splitlines()
    assert table[2].split() == ["2", "0", "1,006", "4", "2", "4.0000", "EUR", "a"]
