"""Budgets that several processes share, by the ledger and the table of allowances."""

import asyncio
import random
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from chat_endpoint import Call, ChatEndpoint, Reply, completion, good, refused
from label_runs import PROMPT, endpoint_of, example, run_process
from sqlalchemy import select

from distillery.errors import BudgetReached, RecipeError, TeacherUnavailable
from distillery.labels.labelling import label
from distillery.labels.store import LabelStore
from distillery.recipe import BudgetRecipe, PriceRecipe, TeacherRecipe
from distillery.records import Usage
from distillery.teacher import ledger
from distillery.teacher.asking import PROBE, Teacher
from distillery.teacher.budget import HeldByOthers, Spending, cost_of, when_left
from distillery.teacher.ledger import Payer, period_end, period_start, spent
from distillery.teacher.pace import Pace

PRICES = PriceRecipe(input=2.0, output=8.0)
MOST = Usage(prompt_tokens=100, completion_tokens=20)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'labels.db'}"
    return str(request.getfixturevalue("postgres_url"))


def recipe_of(**budget: Any) -> TeacherRecipe:
    return TeacherRecipe(prices=PRICES, budget=BudgetRecipe(**budget), concurrency=8)


def call_of(payer: Payer, used: Usage, **values: Any) -> ledger.Call:
    """Return an entry that takes `used`."""
    return ledger.Call(
        run=payer.run,
        recipe=payer.recipe,
        purpose="label",
        outcome="answer",
        prompt_tokens=used.prompt_tokens,
        completion_tokens=used.completion_tokens,
        cost=cost_of(used, PRICES),
        prices=PRICES.model_dump(),
        **{"teacher": "gpt-test"} | values,
    )


async def spend(
    store: LabelStore, recipe: TeacherRecipe, payer: Payer, chance: random.Random, rows: int = 1000
) -> tuple[list[Usage], str]:
    """Make up to `rows` calls until a cap stops them; return what each took and the cap's message,
    or ""."""
    taken: list[Usage] = []
    refusals: list[str] = []
    left = iter(range(rows))
    async with Spending.shared(
        recipe, payer, store.database, store.flush, store.recover
    ) as spending:

        async def worker() -> None:
            for _ in left:
                try:
                    reserved = await when_left(partial(spending.reserve, MOST))
                except BudgetReached as error:
                    refusals.append(str(error))
                    return
                await asyncio.sleep(chance.uniform(0, 0.01))
                used = Usage(
                    prompt_tokens=chance.randint(0, 100),
                    completion_tokens=chance.choice([0, 1, 20]),
                )
                spending.settle(reserved, used)
                store.record(call_of(payer, used))
                taken.append(used)

        await asyncio.gather(*(worker() for _ in range(recipe.concurrency)))
    return taken, "".join(refusals[:1])


def amounts(taken: list[Usage]) -> dict[str, float]:
    total = sum(taken, Usage())
    return {
        "calls": len(taken),
        "tokens": total.prompt_tokens + total.completion_tokens,
        "cost": cost_of(total, PRICES) or 0.0,
    }


@pytest.mark.parametrize(("name", "cap"), [("calls", 60), ("tokens", 5000), ("cost", 0.02)])
async def test_several_that_spend_at_a_time_keep_a_cap_and_use_it(
    url: str, name: str, cap: float
) -> None:
    """Each has a store of its own, as processes have."""
    recipe = recipe_of(**{name: cap, "period": "week"})
    payers = [Payer(recipe="messages") for _ in range(3)]
    stores = [LabelStore(url) for _ in payers]
    ends = await asyncio.gather(
        *(
            spend(store, recipe, payer, random.Random(number))
            for number, (store, payer) in enumerate(zip(stores, payers, strict=True))
        )
    )
    for store in stores:
        store.close()
    spent = amounts([used for taken, _ in ends for used in taken])[name]
    call = amounts([MOST])[name]
    rounding = cap * 1e-9
    assert cap - call - rounding < spent <= cap + rounding, "the next call might exceed it"
    assert all(f"teacher.budget.{name}: " in refusal for _, refusal in ends)
    next_week = period_end("week", datetime.now(UTC))
    assert all("spent in this week" in refusal for _, refusal in ends)
    assert all(f"run again from {next_week:%Y-%m-%d} (UTC) on" in refusal for _, refusal in ends)
    with LabelStore(url) as store:
        assert rows_of(store) == [], "what was allowed is given back"


def rows_of(store: LabelStore) -> list[Any]:
    query = "SELECT holder, calls FROM budget_allowances"
    return list(store.database.run(lambda c: c.exec_driver_sql(query).all()))


@pytest.mark.parametrize(
    ("period", "earlier", "spends"),
    [
        ("run", {"run": "this"}, 1),
        ("run", {"run": "another"}, 5),
        ("week", {"run": "another"}, 1),
        ("week", {"run": "another", "recipe": "other"}, 5),
        ("week", {"run": "another", "days": 8}, 5),
        ("month", {"run": "another", "days": 40}, 5),
        ("week", {"run": "another", "teacher": "judge:gpt-test"}, 5),
    ],
)
async def test_what_counts_is_in_the_ledger(
    tmp_path: Path, period: str, earlier: dict[str, Any], spends: int
) -> None:
    """Four of five calls are spent already, in this run or another one."""
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    days = earlier.pop("days", 0)
    values = {"teacher": "gpt-test"} | earlier
    payer = Payer(values.pop("run"), values.pop("recipe", "messages"))
    called_at = datetime.now(UTC) - timedelta(days=days)
    with LabelStore(url) as store:
        for _ in range(4):
            store.record(call_of(payer, MOST, called_at=called_at, **values))
        recipe = recipe_of(calls=5, period=period)
        this = Payer("this", "messages")
        taken, refusal = await spend(store, recipe, this, random.Random(1))
    assert len(taken) == spends
    assert refusal.startswith("teacher.budget.calls: 5 of 5 spent in this ")


def test_a_period_needs_a_recipes_name(tmp_path: Path) -> None:
    with LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store:
        week = recipe_of(calls=5, period="week")
        with pytest.raises(RecipeError, match=r"teacher\.budget\.period: week counts the runs of"):
            Spending.shared(week, Payer(), store.database, store.flush)


async def test_costs_in_another_currency_do_not_count(tmp_path: Path) -> None:
    with LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store:
        payer = Payer("this", "messages")
        other = {**PRICES.model_dump(), "currency": "EUR"}
        store.record(replace(call_of(payer, MOST), cost=5.0, prices=other))
        taken, _ = await spend(store, recipe_of(cost=0.02), payer, random.Random(1), rows=5)
    assert len(taken) == 5


def test_without_a_cap_the_database_is_left_alone(tmp_path: Path) -> None:
    with LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store:

        def never() -> None:
            raise AssertionError("flushed")

        async def work() -> None:
            shared = Spending.shared(recipe_of(), Payer(), store.database, never)
            async with shared as spending:
                spending.settle(await spending.reserve(MOST), None)

        asyncio.run(work())


async def test_a_dead_processs_allowance_is_given_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillery.teacher.allowances.RENEWAL_S", 0.4)
    monkeypatch.setattr("distillery.teacher.budget.POLL_S", 0.1)
    path = tmp_path / "labels.db"
    with LabelStore(f"sqlite:///{path}") as store:
        payer = Payer("this", "messages")
        with sqlite3.connect(path) as connection:
            connection.execute(
                "INSERT INTO budget_allowances VALUES ('dead', 'this', 'messages', 'teacher', 0, 0,"
                " 9, (julianday('now') - 2440587.5) * 86400.0 + 0.5)"
            )
        loop = asyncio.get_running_loop()
        began = loop.time()
        taken, refusal = await spend(store, recipe_of(calls=10), payer, random.Random(1))
        assert (len(taken), refusal != "") == (10, True)
        assert loop.time() - began > 0.5 + 0.8, "not before it has expired and stayed so"


async def test_a_process_whose_row_was_dropped_while_it_was_suspended_asks_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one has spent meanwhile what the row had allowed."""
    monkeypatch.setattr("distillery.teacher.budget.RENEWAL_S", 0.1)
    payer = Payer("this", "messages")
    with LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store:
        shared = Spending.shared(recipe_of(calls=80), payer, store.database, store.flush)
        async with shared as spending:
            spending.settle(await spending.reserve(MOST), MOST)
            store.record(call_of(payer, MOST))
            execute(store, "DELETE FROM budget_allowances")
            for _ in range(79):
                store.record(call_of(payer, MOST))
            store.flush()
            await asyncio.sleep(0.5)
            with pytest.raises(BudgetReached, match="80 of 80 spent"):
                await spending.reserve(MOST)


async def test_a_process_that_was_suspended_spends_nothing_before_it_has_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payer = Payer("this", "messages")
    with LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store:
        shared = Spending.shared(recipe_of(calls=80), payer, store.database, store.flush)
        async with shared as spending:
            spending.settle(await spending.reserve(MOST), MOST)
            for _ in range(80):
                store.record(call_of(payer, MOST))
            monkeypatch.setattr("distillery.teacher.allowances.LENGTH_S", -1.0)
            with pytest.raises(BudgetReached):
                await spending.reserve(MOST)


async def test_what_was_reserved_before_a_suspension_is_reserved_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call waits for its turn meanwhile: another process has spent what its row allowed."""
    monkeypatch.setattr("distillery.teacher.budget.RENEWAL_S", 0.1)
    payer = Payer("this", "messages")
    recipe = recipe_of(calls=80)
    with ChatEndpoint() as server, LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store:
        pace = Pace(1)
        turn = await pace.turn(1)
        shared = Spending.shared(recipe, payer, store.database, store.flush)
        endpoint = endpoint_of(server)
        async with (
            shared as spending,
            Teacher(recipe, endpoint, pace=pace, spending=spending, book=store) as teacher,
        ):
            waiting = asyncio.create_task(teacher.ask(PROBE, ("A", "B")))
            await until(lambda: rows_of(store) != [])
            for _ in range(80):
                store.record(call_of(payer, MOST))
            execute(store, "DELETE FROM budget_allowances")
            await asyncio.sleep(0.5)
            pace.done(turn)
            with pytest.raises(BudgetReached, match="80 of 80 spent"):
                await waiting
    assert server.calls == []


async def test_a_worker_that_waits_for_anothers_money_holds_no_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillery.teacher.budget.POLL_S", 0.05)
    payer = Payer("this", "messages")
    recipe = recipe_of(calls=10)
    with ChatEndpoint() as server, LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store:
        execute(
            store,
            "INSERT INTO budget_allowances"
            f" VALUES ('other', 'this', 'messages', 'teacher', 0, 0, 10, {time.time() + 600})",
        )
        pace = Pace(1)
        shared = Spending.shared(recipe, payer, store.database, store.flush)
        endpoint = endpoint_of(server)
        async with (
            shared as spending,
            Teacher(recipe, endpoint, pace=pace, spending=spending, book=store) as teacher,
        ):
            ask = partial(teacher.ask, PROBE, ("A", "B"))
            waiting = asyncio.create_task(when_left(ask))
            await until(lambda: len(rows_of(store)) == 2)
            # All turns are free, of which there is one.
            pace.done(await asyncio.wait_for(pace.turn(1), 1))
            assert server.calls == []
            execute(store, "DELETE FROM budget_allowances WHERE holder = 'other'")
            assert (await waiting).text
    assert len(server.calls) == 1


class HeldAtTheSecondTry(Spending):
    """A budget of which others hold all that is left, once, when the second try wants some."""

    tries = 0

    async def reserve(self, most: Usage) -> ledger.Amounts:
        self.tries += 1
        if self.tries == 2:
            raise HeldByOthers(0)
        return await super().reserve(most)


@pytest.mark.usefixtures("no_backoff")
@pytest.mark.parametrize("answered_at", [3, 9])
async def test_a_question_that_waited_for_anothers_money_goes_on_with_its_tries(
    answered_at: int,
) -> None:
    def reply(call: Call) -> Reply:
        return good(call) if len(server.calls) == answered_at else refused(500, "try again")

    with ChatEndpoint(reply) as server:
        spending = HeldAtTheSecondTry(BudgetRecipe(), PRICES)
        recipe = TeacherRecipe(attempts=3, outage_s=30)
        async with Teacher(recipe, endpoint_of(server), spending=spending) as teacher:
            asked = when_left(partial(teacher.ask, PROBE, ("A", "B"), key="one"))
            if answered_at == 3:
                assert (await asked).attempts == 3
            else:
                with pytest.raises(TeacherUnavailable):
                    await asked
            assert len(server.calls) == 3
            # Another round has all of its tries.
            if answered_at == 9:
                with pytest.raises(TeacherUnavailable):
                    await teacher.ask(PROBE, ("A", "B"), key="one")
                assert len(server.calls) == 6


async def test_a_run_that_waits_for_anothers_money_holds_no_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one needs a slot to come to an end."""
    monkeypatch.setattr("distillery.teacher.budget.POLL_S", 0.05)
    recipe = recipe_of(calls=8, period="day")
    slot = asyncio.Lock()
    with ChatEndpoint() as server, LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store:
        execute(
            store,
            "INSERT INTO budget_allowances"
            f" VALUES ('other', 'that', 'messages', 'teacher', 0, 0, 8, {time.time() + 600})",
        )

        async def end_the_other() -> None:
            await until(lambda: len(rows_of(store)) == 2)
            async with slot:
                execute(store, "DELETE FROM budget_allowances WHERE holder = 'other'")

        ends = asyncio.create_task(end_the_other())
        rows = [example(number) for number in range(8)]
        counts = await label(
            rows,
            PROMPT,
            recipe,
            endpoint_of(server),
            store,
            tmp_path / "out",
            slots=lambda: slot,
            payer=Payer("this", "messages"),
        )
        await ends
    assert (counts.accepted, len(server.calls)) == (8, 8)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.01)


def execute(store: LabelStore, statement: str) -> None:
    store.database.run(lambda connection: connection.exec_driver_sql(statement))


async def test_slow_looks_do_not_keep_a_dead_processs_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Looks that are further apart than an outage lasts count as well."""
    monkeypatch.setattr("distillery.teacher.allowances.RENEWAL_S", 0.4)
    monkeypatch.setattr("distillery.teacher.budget.POLL_S", 3.5)
    payer = Payer("this", "messages")
    with LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store:
        execute(
            store,
            "INSERT INTO budget_allowances"
            " VALUES ('dead', 'this', 'messages', 'teacher', 0, 0, 9, 1)",
        )
        taken, _ = await asyncio.wait_for(
            spend(store, recipe_of(calls=10), payer, random.Random(1)), timeout=15
        )
    assert len(taken) == 10
    assert caplog.text.count("waiting for what run this gives back") == 1


async def test_the_sums_are_those_of_the_ledger(url: str) -> None:
    """Calls of several runs, days, currencies and teachers; some are written twice, at once or by
    another store."""
    chance = random.Random(1)
    now = datetime.now(UTC).replace(hour=12)
    payers = [Payer(f"run-{number}", f"recipe-{number % 2}") for number in range(4)]
    calls = []
    for _ in range(500):
        used = Usage(prompt_tokens=chance.randint(0, 99), completion_tokens=chance.randint(0, 9))
        values: dict[str, Any] = {"teacher": chance.choice(["gpt-test", "judge:gpt-test"])}
        values["called_at"] = now - timedelta(days=chance.randint(0, 3))
        call = call_of(chance.choice(payers), used, **values)
        currency = chance.choice(["EUR", "USD", ""])
        prices = {**PRICES.model_dump(), "currency": currency} if currency else None
        calls.append(replace(call, prices=prices, cost=call.cost if prices else None))
    with LabelStore(url) as one, LabelStore(url) as other:
        for call in calls:
            chance.choice([one, other]).record(call)
            if chance.random() < 0.3:
                one.record(call)
            if chance.random() < 0.1:
                other.record(call)
                other.flush()
        one.flush()
        other.flush()
        for payer in payers:
            for section in ("teacher", "evaluation.judge"):
                for since in (None, now.replace(hour=0) - timedelta(days=1)):
                    found = one.database.run(
                        partial(spent, payer=payer, section=section, currency="EUR", since=since)
                    )
                    mine = [
                        call
                        for call in calls
                        if (call.run if since is None else call.recipe)
                        == (payer.run if since is None else payer.recipe)
                        and call.called_at >= (since or call.called_at)
                        and call.teacher.startswith("judge:") == (section != "teacher")
                    ]
                    assert len(mine) > 5
                    of_currency = [
                        call for call in mine if (call.prices or {}).get("currency") == "EUR"
                    ]
                    assert found == {
                        "calls": len(mine),
                        "tokens": sum(call.prompt_tokens + call.completion_tokens for call in mine),
                        "cost": pytest.approx(sum(call.cost or 0 for call in of_currency)),
                    }


def test_the_beginning_of_periods() -> None:
    now = datetime(2026, 11, 28, 9, 30, tzinfo=UTC)
    assert period_end("run", now) is None
    assert period_end("day", now) == datetime(2026, 11, 29, tzinfo=UTC)
    assert period_end("week", now) == datetime(2026, 11, 30, tzinfo=UTC), "a Monday"
    assert period_end("month", now) == datetime(2026, 12, 1, tzinfo=UTC)
    assert period_start("run", now) is None
    assert period_start("day", now) == datetime(2026, 11, 28, tzinfo=UTC)
    assert period_start("week", now) == datetime(2026, 11, 23, tzinfo=UTC), "a Monday"
    assert period_start("month", now) == datetime(2026, 11, 1, tzinfo=UTC)


def counted(call: Call) -> Reply:
    """An answer whose tokens depend on the question."""
    number = int(call.question.partition("after ")[2].partition("?")[0])
    body = completion("A")
    body["usage"] = {"prompt_tokens": 60 + number % 40, "completion_tokens": 1 + number % 3}
    return Reply(body, delay=0.02)


def tokens_billed(server: ChatEndpoint) -> int:
    return sum(usage["prompt_tokens"] + usage["completion_tokens"] for usage in server.billed)


@pytest.mark.slow
def test_two_processes_at_once_keep_a_cap(tmp_path: Path, url: str) -> None:
    teacher = TeacherRecipe(budget=BudgetRecipe(tokens=8000, period="day"), concurrency=4)
    with ChatEndpoint(counted) as server:
        processes = []
        for number in range(2):
            rows = [example(row) for row in range(number * 200, number * 200 + 200)]
            payer = Payer(recipe="messages")
            out = tmp_path / f"out-{number}"
            processes.append(run_process(server, url, out, rows, teacher, payer=payer))
        ends = [process.communicate()[1].decode() for process in processes]
    assert all("teacher.budget.tokens: " in end for end in ends)
    assert 8000 - 1000 < tokens_billed(server) <= 8000
    asked = {int(call.question.partition("after ")[2].partition("?")[0]) for call in server.calls}
    assert min(asked) < 200 <= max(asked), "both have asked"


@pytest.mark.slow
def test_a_run_that_is_killed_and_starts_anew_goes_on_counting(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    teacher = TeacherRecipe(budget=BudgetRecipe(calls=40), concurrency=2)
    rows = [example(row) for row in range(200)]
    payer = Payer("run-1", "messages")
    with ChatEndpoint(counted) as server:
        first = run_process(server, url, tmp_path / "out", rows, teacher, payer=payer)
        wait_until(lambda: len(server.answered) >= 15)
        first.kill()
        first.wait()
        asked_before, killed_at = len(server.calls), datetime.now(UTC)
        second = run_process(server, url, tmp_path / "out", rows, teacher, payer=payer)
        assert "teacher.budget.calls: " in second.communicate()[1].decode()
        asked_after = len(server.calls) - asked_before
    with LabelStore(url) as store:
        query = select(ledger.CALLS.c.called_at)
        times = store.database.run(lambda c: c.execute(query).scalars().all())
    before = [at for at in times if at.replace(tzinfo=UTC) < killed_at]
    assert len(before) >= 10
    assert len(before) + asked_after == len(times) == 40


@pytest.mark.slow
def test_a_killed_processs_calls_under_way_stay_in_the_budget_of_another_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in its journal, which the other one takes in before it drops the row."""
    monkeypatch.setattr("distillery.teacher.allowances.RENEWAL_S", 0.4)
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    recipe = recipe_of(calls=40, period="day")
    rows = [example(row) for row in range(200)]
    hung = Reply(completion("A"), delay=60)
    with ChatEndpoint(lambda _: hung) as server, LabelStore(url) as store:
        payer = Payer(recipe="messages")
        other = run_process(server, url, tmp_path / "out", rows, recipe, payer=payer)
        wait_until(lambda: len(server.calls) == 8)
        other.kill()
        other.wait()
        execute(store, "UPDATE budget_allowances SET expires_at = 1")
        payer = Payer(recipe="messages")
        taken, _ = asyncio.run(spend(store, recipe, payer, random.Random(1)))
    assert len(taken) == 40 - 8


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in range(600):
        if is_so():
            return
        time.sleep(0.05)
    raise AssertionError("not within 30 s")
