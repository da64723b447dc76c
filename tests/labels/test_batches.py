"""Asking in batches against a stand-in of the Batch API: what is sent, what is taken in, and what
it costs. test_batch_faults.py kills the processes that do so."""

import asyncio
import json
import re
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from batch_endpoint import BatchEndpoint, Fate, Plan
from batch_runs import (
    PRICES,
    asked_in_batches,
    batch_teacher,
    calls_in,
    cents,
    labelled_in_batches,
    left_in_book,
)
from chat_endpoint import Call, ChatEndpoint, Reply, refused, said
from label_runs import PROMPT, endpoint_of, example, stored_keys

from distillery.errors import BudgetReached, RecipeError, TeacherError, Waiting
from distillery.labels.batch_book import BatchBook
from distillery.labels.batch_run import Share, ask_in_batches, give_up_batch
from distillery.labels.questions import questions
from distillery.labels.quote import quote
from distillery.labels.store import LabelStore
from distillery.records import Example
from distillery.teacher.batch import check_takes_batches, path_of_requests
from distillery.teacher.endpoint import Endpoint
from distillery.teacher.ledger import Payer

ROWS = [example(number) for number in range(20)]

BATCH_CENTS = (40 * PRICES["input"] + PRICES["output"]) / 1e6 / 2 * 100
"""What a line costs: 40 tokens in and 1 out, at half the price."""


def keys_of(rows: list[Example]) -> set[str]:
    """The keys of the answers to these rows."""
    return {
        question.key
        for row in rows
        for question in questions(row, PROMPT, batch_teacher(), "gpt-test")
    }


async def test_every_row_is_asked_once_and_costs_half(url: str, tmp_path: Path) -> None:
    teacher = batch_teacher({"lines": 8})
    with BatchEndpoint(lambda _: Plan(looks=2)) as service:
        await asked_in_batches(service, url, ROWS, teacher)
        # The first question shows which options the endpoint takes; 19 are left for three files.
        assert service.asked.total() == 1
        assert len(service.batches) == 3
        assert len(service.answered | service.asked) == 20
        assert set((service.answered + service.asked).values()) == {1}
        assert stored_keys(tmp_path / "labels.db") == keys_of(ROWS)
        calls = calls_in(url)
        assert len(calls) == 20
        assert {call["outcome"] for call in calls} == {"answer"}
        assert {call["batch_id"] for call in calls} == {"", *service.batches}
        assert cents(calls) == pytest.approx(19 * BATCH_CENTS + 2 * BATCH_CENTS)
        assert left_in_book(url) == (0, 0)
        before = len(service.requests)
        await asked_in_batches(service, url, ROWS, teacher)
        assert len(service.requests) == before


def batch_lines(service: BatchEndpoint, batch_id: str) -> list[bytes]:
    """The requests of a batch."""
    return service.files[service.batches[batch_id].request["input_file_id"]].content.splitlines()


async def soon(work: Coroutine[Any, Any, None]) -> None:
    """Wait half a second for `work`."""
    await asyncio.wait_for(work, 0.5)


async def test_a_line_holds_what_a_direct_call_sends(url: str) -> None:
    bodies: dict[str, list[Any]] = {}

    def answer(call: Call) -> Reply:
        bodies.setdefault(call.question, []).append((call.path, call.body))
        return said("A", top={"A": 0.9, "B": 0.1})

    teacher = batch_teacher(soft_labels=True, answers={"form": "json"})
    with BatchEndpoint(script=answer) as service:
        await asked_in_batches(service, url, ROWS[:3], teacher)
        (line, *_) = next(iter(service.files.values())).content.splitlines()
        (direct,) = (body for (path, body), *_ in bodies.values() if path == "/chat/completions")
    sent = json.loads(line)
    assert (sent["method"], sent["url"]) == ("POST", "/v1/chat/completions")
    assert re.fullmatch("[0-9a-f]{64}", sent["custom_id"])
    assert {**sent["body"], "messages": None} == {**direct, "messages": None}


async def test_an_option_that_the_endpoint_refuses_is_in_no_line(url: str) -> None:
    def answer(call: Call) -> Reply:
        if "temperature" in call.body:
            return refused(400, "temperature is not supported", param="temperature")
        return said("A")

    with BatchEndpoint(script=answer) as service:
        await asked_in_batches(service, url, ROWS[:4], batch_teacher())
        assert b"temperature" not in next(iter(service.files.values())).content
        assert service.answered.total() == 3


FATES: dict[str, tuple[Fate, int, str | None]] = {
    # What becomes of a line at first, how often it is sent, and the reason of its rejection.
    "twice": ("twice", 1, ""),
    "missing": ("missing", 2, ""),
    "overloaded": ("overloaded", 2, ""),
    "filtered": ("filtered", 1, "refused by the endpoint's content filter"),
}


@pytest.mark.parametrize("name", FATES)
async def test_a_line_that_fails_is_asked_again_and_one_that_is_refused_is_rejected(
    name: str, url: str
) -> None:
    fate, sent, reason = FATES[name]

    def fates(question: str, earlier: int) -> Fate:
        return fate if "after 7?" in question and not earlier else "answer"

    with BatchEndpoint(lambda _: Plan(fate=fates)) as service:
        await asked_in_batches(service, url, ROWS, batch_teacher())
        (question,) = (each for each in service.sent if "after 7?" in each)
        assert service.sent.pop(question) == sent
        assert set(service.sent.values()) == {1}
    (key,) = keys_of([ROWS[7]])
    with LabelStore(url) as store:
        assert store.get_many([key])[key].reason == reason
    mine = [call for call in calls_in(url) if call["request_key"] == key]
    outcomes = {"missing": ["lost", "answer"], "overloaded": ["retried", "answer"]}
    assert [call["outcome"] for call in mine] == outcomes.get(
        name, ["filtered" if reason else "answer"]
    )
    assert left_in_book(url) == (0, 0)


@pytest.mark.parametrize("status", ["expired", "cancelled"])
async def test_what_a_batch_has_answered_when_it_ends_early_is_taken(status: Any, url: str) -> None:
    plans = [Plan(status=status, answers=5), Plan()]
    with BatchEndpoint(lambda number: plans[number]) as service:
        await asked_in_batches(service, url, ROWS, batch_teacher())
        assert [len(batch_lines(service, each)) for each in service.batches] == [19, 14]
        assert set(service.answered.values()) == {1}
    calls = calls_in(url)
    assert [call["outcome"] for call in calls].count("retried") == 14
    assert cents(calls) == pytest.approx(21 * BATCH_CENTS)


async def test_a_request_that_fails_in_every_batch_is_left_to_be_asked_directly(url: str) -> None:
    with BatchEndpoint(lambda _: Plan(fate=lambda _question, _earlier: "overloaded")) as service:
        await asked_in_batches(service, url, ROWS[:5], batch_teacher({"tries": 3}))
        assert set(service.sent.values()) == {3}
        counts = await labelled_in_batches(service, url, ROWS[:5], batch_teacher({"tries": 3}))
        assert set(service.sent.values()) == {3}
        assert service.asked.total() == 5
    assert counts.accepted == 5


async def test_a_full_queue_takes_smaller_batches(url: str) -> None:
    def plan(number: int) -> Plan:
        return Plan(status="failed") if number < 2 else Plan()

    with BatchEndpoint(plan) as service:
        await asked_in_batches(service, url, ROWS, batch_teacher())
        sizes = [len(batch_lines(service, each)) for each in service.batches]
        assert sizes == [19, 9, 9, 1, 4, 4, 1]
        assert set(service.answered.values()) == {1}
    assert cents(calls_in(url)) == pytest.approx(21 * BATCH_CENTS)


async def test_a_queue_that_takes_nothing_has_the_run_wait(url: str) -> None:
    with BatchEndpoint(lambda _: Plan(status="failed")) as service:
        with pytest.raises(Waiting, match="its queue of batches has no room for 4 requests"):
            await asked_in_batches(service, url, ROWS, batch_teacher({"direct_below": 5}))
        assert not service.answered
    assert left_in_book(url) == (0, 0)


async def test_a_file_that_is_not_accepted_is_an_error_of_one_line(url: str) -> None:
    plan = Plan(status="failed", code="invalid_json_line", error="not JSON\nat all")
    with BatchEndpoint(lambda _: plan) as service, pytest.raises(TeacherError) as caught:
        await asked_in_batches(service, url, ROWS, batch_teacher())
    assert "did not accept batch-1 (invalid_json_line: not JSON at all)" in str(caught.value)
    assert left_in_book(url) == (0, 0)


async def test_a_run_that_waits_is_continued_by_the_next_one(url: str) -> None:
    teacher = batch_teacher({"wait_s": 0, "again_s": 900})
    with BatchEndpoint(lambda _: Plan(looks=2)) as service:
        with pytest.raises(Waiting, match=r"1 batch is under way, 0 of 19 .* in 15 min") as caught:
            await asked_in_batches(service, url, ROWS, teacher)
        assert caught.value.seconds == 900
        assert left_in_book(url) == (1, 19)
        # A recipe without batches waits for these answers too, and pays for none of them.
        plain = batch_teacher().model_copy(update={"batch": None})
        with pytest.raises(TimeoutError):
            await soon(asked_in_batches(service, url, ROWS[:10], plain))
        await asked_in_batches(service, url, ROWS, teacher)
        assert set((service.answered + service.asked).values()) == {1}
        assert len(service.batches) == 1
    assert left_in_book(url) == (0, 0)


async def test_answers_to_the_rows_of_another_run_are_left_to_it(url: str) -> None:
    teacher = batch_teacher({"wait_s": 0})
    with BatchEndpoint(lambda _: Plan(looks=1)) as service:
        with pytest.raises(Waiting):
            await asked_in_batches(service, url, ROWS, teacher)
        await asked_in_batches(service, url, ROWS[10:], teacher)
        assert left_in_book(url) == (1, 9)
        await asked_in_batches(service, url, ROWS, teacher)
        assert set((service.answered + service.asked).values()) == {1}
    assert left_in_book(url) == (0, 0)
    assert cents(calls_in(url)) == pytest.approx(21 * BATCH_CENTS)


async def test_few_rows_are_left_to_be_asked_directly(url: str) -> None:
    teacher = batch_teacher({"direct_below": 20})
    with BatchEndpoint() as service:
        await asked_in_batches(service, url, ROWS, teacher)
        assert not service.requests
        await asked_in_batches(service, url, [*ROWS, example(20)], teacher)
        assert service.answered.total() == 20


async def test_the_budget_is_reserved_until_the_answers_are_there(url: str) -> None:
    """19 lines can take 19 times what they do take, as every byte may be a token."""
    payer = Payer("run-1", "mine")
    teacher = batch_teacher({"wait_s": 0}, budget={"calls": 12})
    with BatchEndpoint(lambda _: Plan(looks=1)) as service:
        with pytest.raises(Waiting):
            await asked_in_batches(service, url, ROWS, teacher, payer)
        assert service.asked.total() == 1
        assert left_in_book(url) == (1, 11)
        with pytest.raises(BudgetReached, match=r"teacher.budget: has no room .* of 8"):
            await asked_in_batches(service, url, ROWS, teacher, payer)
        assert len(service.batches) == 1
        assert service.answered.total() == 11
        # Another run has a budget of its own.
        await asked_in_batches(service, url, ROWS, batch_teacher(budget={"calls": 12}))
        assert service.answered.total() + service.asked.total() == 20


async def test_a_run_that_asks_directly_leaves_room_for_batches_under_way(url: str) -> None:
    payer = Payer("run-1", "mine")
    teacher = batch_teacher({"wait_s": 0}, budget={"calls": 20})
    with BatchEndpoint(lambda _: Plan(looks=9)) as service:
        with pytest.raises(Waiting):
            await asked_in_batches(service, url, ROWS, teacher, payer)
        plain = teacher.model_copy(update={"batch": None})
        others = [example(number) for number in range(20, 23)]
        with pytest.raises(BudgetReached):
            await labelled_in_batches(service, url, others, plain, payer)
        assert service.asked.total() == 1


async def test_a_batch_can_be_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_LABELS", url)
    teacher = batch_teacher({"wait_s": 0})
    with BatchEndpoint(lambda _: Plan(looks=9)) as service:
        with pytest.raises(Waiting):
            await asked_in_batches(service, url, ROWS, teacher)
        with BatchBook(url) as book:
            ((batch, left),) = book.all_batches()
            assert left == 19
            assert give_up_batch(book, batch.batch_id) == 19
        (lost,) = (call for call in calls_in(url) if call["outcome"] == "lost")
        assert lost["cost"] == pytest.approx(batch.cost)
        with pytest.raises(Waiting):
            await asked_in_batches(service, url, ROWS, teacher)
        assert len(service.batches) == 2


async def test_an_endpoint_without_batches_is_told_in_one_line(url: str) -> None:
    with ChatEndpoint(only_chat) as server:
        endpoint = endpoint_of(server)
        share = Share(lambda: ROWS, batch_teacher(), "label")
        with LabelStore(url) as store, pytest.raises(TeacherError) as caught:
            await ask_in_batches([share], PROMPT, endpoint, store)
    assert "answers no batches (404: no such path); remove this setting" in str(caught.value)
    assert left_in_book(url) == (0, 0)


def only_chat(call: Call) -> Reply:
    return said("A") if "completions" in call.path else refused(404, "no such path")


@pytest.mark.usefixtures("no_backoff")
@pytest.mark.parametrize("number", range(8))
async def test_a_response_that_is_lost_has_nothing_done_twice(number: int, url: str) -> None:
    with BatchEndpoint() as service:
        service.lost = {number}
        await asked_in_batches(service, url, ROWS, batch_teacher())
        assert len(service.batches) == 1
        assert service.requests.count("POST /files") == 1
        assert set(service.answered.values()) == {1}


async def test_a_batch_is_made_of_a_file_once_it_is_processed(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillery.teacher.batch.FILE_POLL_S", 0.01)
    with BatchEndpoint() as service:
        service.pending = 3
        await asked_in_batches(service, url, ROWS, batch_teacher())
        start = service.requests.index("POST /files")
        looked = service.requests[start : service.requests.index("POST /batches")]
        assert looked == ["POST /files", *["GET /files/ID"] * 4]


async def test_answers_whose_file_is_gone_are_not_paid_twice(url: str) -> None:
    teacher = batch_teacher({"wait_s": 0})
    with BatchEndpoint(lambda _: Plan(looks=1)) as service:
        with pytest.raises(Waiting):
            await asked_in_batches(service, url, ROWS, teacher)
        (batch,) = service.batches.values()
        service.go_on(batch)
        del service.files[str(batch.output)]
        with pytest.raises(
            TeacherError, match="no file file-2 of the batch batch-1 any more; give"
        ):
            await asked_in_batches(service, url, ROWS, teacher)
        assert len(service.batches) == 1
    assert left_in_book(url) == (1, 19)


async def test_a_batch_that_another_key_sent_is_not_sent_again(url: str) -> None:
    teacher = batch_teacher({"wait_s": 0})
    with BatchEndpoint() as service:
        with pytest.raises(Waiting):
            await asked_in_batches(service, url, ROWS, teacher)
        kept = service.batches.copy()
        service.batches.clear()
        with pytest.raises(TeacherError, match="does not know the batch batch-1; use the key"):
            await asked_in_batches(service, url, ROWS, teacher)
        service.batches |= kept
        await asked_in_batches(service, url, ROWS, batch_teacher())
        assert len(service.batches) == 1


async def test_a_quote_tells_both_prices(url: str) -> None:
    with LabelStore(url) as store:
        quoted = quote(ROWS, PROMPT, batch_teacher(), "gpt-test", store)
        assert quoted.cost == pytest.approx(2 * (quoted.batch_cost or 0))
        assert (
            f"about {quoted.cost:.2f} USD, or {quoted.batch_cost:.2f} in batches" in quoted.line()
        )
        other = batch_teacher().model_copy(update={"batch": None, "sdk": "azure-ai-inference"})
        assert quote(ROWS, PROMPT, other, "gpt-test", store).batch_cost is None


async def test_answers_from_batches_do_not_shorten_the_time_of_a_quote(url: str) -> None:
    with BatchEndpoint() as service:
        await asked_in_batches(service, url, ROWS, batch_teacher())
    with LabelStore(url) as store:
        experience = store.experience("gpt-test")
        assert experience is not None
        assert experience.answers == 20
        assert experience.latency_ms > 0


def test_azure_has_paths_of_its_own() -> None:
    azure = Endpoint("https://x.openai.azure.com/openai/v1", "m", None, "m", "openai")
    other = Endpoint("https://api.example.com/v1", "m", None, "m", "openai")
    assert path_of_requests(azure) == "/chat/completions"
    assert path_of_requests(other) == "/v1/chat/completions"


def test_another_sdk_takes_no_batches() -> None:
    address = "https://x.services.ai.azure.com/models"
    endpoint = Endpoint(address, "m", None, "m", "azure-ai-inference")
    with pytest.raises(RecipeError, match="knows no batches; set TEACHER_MODEL_ENDPOINT"):
        check_takes_batches(batch_teacher(), endpoint)
    with pytest.raises(ValueError, match="batch: a teacher of kind gold takes no batches"):
        batch_teacher(kind="gold")
    with pytest.raises(ValueError, match="batch: the SDK azure-ai-inference knows no batches"):
        batch_teacher(sdk="azure-ai-inference")


def test_the_prices_of_batches() -> None:
    half = batch_teacher().in_batch.prices
    assert half is not None
    assert (half.input, half.output) == (1.0, 4.0)
    assert half.in_batch == half
    own = batch_teacher(prices=PRICES | {"batch": {"input": 0.5, "output": 3.0}}).in_batch.prices
    assert own is not None
    assert (own.input, own.output) == (0.5, 3.0)
