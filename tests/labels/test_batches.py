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
    batch_endpoint_of,
    batch_teacher,
    calls_in,
    cents,
    labelled_in_batches,
    left_in_book,
    rows_of,
)
from chat_endpoint import Call, ChatEndpoint, Reply, refused, said
from label_runs import PROMPT, endpoint_of, example, stored_keys

from distillery.errors import BudgetReached, DataError, RecipeError, TeacherError, Waiting
from distillery.labels.batch_book import Batch, BatchBook
from distillery.labels.batch_files import RequestFile, Share
from distillery.labels.batch_forget import give_up_batch
from distillery.labels.batch_run import ask_in_batches
from distillery.labels.journal import left_beside
from distillery.labels.questions import questions
from distillery.labels.quote import quote
from distillery.labels.store import LabelStore
from distillery.records import Example
from distillery.storage.leases import Leases
from distillery.teacher.allowances import ALLOWANCES, NEVER
from distillery.teacher.batch import batch_service, check_takes_batches, path_of_requests
from distillery.teacher.endpoint import Endpoint
from distillery.teacher.ledger import Payer, spent

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
    # What became of a line that is missing from a complete batch, nobody knows.
    assert [call["is_counted"] for call in mine].count(0) == (name in ("missing", "filtered"))
    assert name != "missing" or mine[0]["cost"] > 0
    assert [call["outcome"] for call in mine] == outcomes.get(
        name, ["filtered" if reason else "answer"]
    )
    assert left_in_book(url) == (0, 0)


async def test_a_line_that_cannot_be_read_is_kept_and_its_request_sent_again(url: str) -> None:
    def fates(question: str, earlier: int) -> Fate:
        return "garbled" if "after 7?" in question and not earlier else "answer"

    with BatchEndpoint(lambda _: Plan(fate=fates)) as service:
        await asked_in_batches(service, url, ROWS, batch_teacher())
        assert [n for question, n in service.answered.items() if "after 7?" in question] == [2]
    (key,) = keys_of([ROWS[7]])
    mine = [call["outcome"] for call in calls_in(url) if call["request_key"] == key]
    assert mine == ["lost", "answer"], "it is paid for twice"
    with LabelStore(url) as store:
        (kept,) = left_beside(store.database)
    assert kept.suffix == ".unreadable"
    assert kept.stat().st_mode & 0o777 == 0o600
    (line,) = kept.read_bytes().splitlines()
    assert line.startswith(b'{"id": "batch_req_')
    assert key.encode() in line


@pytest.mark.parametrize("status", ["expired", "cancelled"])
async def test_what_a_batch_has_answered_when_it_ends_early_is_taken(status: Any, url: str) -> None:
    plans = [Plan(status=status, answers=5), Plan()]
    with BatchEndpoint(lambda number: plans[number]) as service:
        direct = 1 if status == "expired" else 2
        if status == "cancelled":
            # Whoever did so does not want it sent again at once.
            with pytest.raises(TeacherError, match=r"batch-1 was cancelled at .* run again"):
                await asked_in_batches(service, url, ROWS, batch_teacher())
            assert len(service.batches) == 1
        await asked_in_batches(service, url, ROWS, batch_teacher())
        assert [len(batch_lines(service, each)) for each in service.batches] == [19, 15 - direct]
        assert set(service.answered.values()) == {1}
    calls = calls_in(url)
    assert [call["outcome"] for call in calls].count("retried") == 14
    # A direct answer costs twice what one of a batch does.
    assert cents(calls) == pytest.approx((20 + direct) * BATCH_CENTS)


async def test_a_request_that_fails_in_every_batch_is_left_to_be_asked_directly(url: str) -> None:
    few = batch_teacher({"tries": 3, "direct_below": 4})
    with BatchEndpoint(lambda _: Plan(fate=lambda _question, _earlier: "overloaded")) as service:
        none = batch_teacher({"tries": 3})
        with pytest.raises(TeacherError, match="4 requests have failed in 3 batches each; raise"):
            await asked_in_batches(service, url, ROWS[:5], none)
        assert set(service.sent.values()) == {3}
        counts = await labelled_in_batches(service, url, ROWS[:5], few)
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
    teacher, payer = batch_teacher({"wait_s": 0}), Payer("run-1", "mine")
    with BatchEndpoint(lambda _: Plan(looks=9)) as service:
        for name, value in (("ENDPOINT", service.url), ("NAME", "m"), ("KEY", "k")):
            monkeypatch.setenv(f"TEACHER_MODEL_{name}", value)
        with pytest.raises(Waiting):
            await asked_in_batches(service, url, ROWS, teacher, payer)
        with BatchBook(url) as book:
            ((batch, left),) = book.all_batches()
            assert left == 19
            leases, name = Leases(url, 30), f"batch {batch.batch_id}"
            leases.acquire(name, "a run")
            with pytest.raises(DataError, match="a run is at work on it"):
                give_up_batch(book, batch.batch_id)
            leases.release(name, "a run")
            assert await asyncio.to_thread(give_up_batch, book, batch.batch_id) == 19
        lost = [call for call in calls_in(url) if call["outcome"] == "lost"]
        assert len(lost) == 19
        assert sum(call["cost"] for call in lost) == pytest.approx(batch.cost)
        with LabelStore(url) as store:
            gone = store.database.run(lambda c: spent(c, payer, "teacher", "USD", None))
        assert gone["cost"] == pytest.approx((batch.cost or 0) + 2 * BATCH_CENTS / 100)
        assert gone["calls"] == 20
        assert [each.status for each in service.batches.values()] == ["cancelled"]
        with pytest.raises(Waiting):
            await asked_in_batches(service, url, ROWS, teacher, payer)
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


async def test_a_second_expiry_has_nothing_asked_at_the_full_price(url: str) -> None:
    plans = [Plan(status="expired", answers=5), Plan(status="expired", answers=5), Plan()]
    with BatchEndpoint(lambda number: plans[number]) as service:
        await asked_in_batches(service, url, ROWS, batch_teacher({"tries": 1}))
        assert [len(batch_lines(service, each)) for each in service.batches] == [19, 14, 9]
        assert service.asked.total() == 1


@pytest.mark.parametrize(("number", "status"), [(1, 503), (2, 429), (3, 500), (4, 503), (5, 429)])
async def test_an_outage_has_the_run_go_on_later(number: int, status: int, url: str) -> None:
    """Upload, look at the file, make the batch, look at it, and download."""
    with BatchEndpoint() as service:
        service.failing = {number: status}
        await asked_in_batches(service, url, ROWS, batch_teacher(attempts=1))
        assert len(service.batches) == 1
        assert set((service.answered + service.asked).values()) == {1}
    assert left_in_book(url) == (0, 0)


async def test_an_outage_that_lasts_has_the_run_wait(url: str) -> None:
    with BatchEndpoint() as service:
        service.failing = dict.fromkeys(range(4, 99), 503)
        teacher = batch_teacher({"wait_s": 0.1}, attempts=1)
        with pytest.raises(Waiting, match="its batches go on"):
            await asked_in_batches(service, url, ROWS, teacher)
        service.failing = {}
        await asked_in_batches(service, url, ROWS, batch_teacher())
        assert set((service.answered + service.asked).values()) == {1}


async def test_a_batch_that_another_run_gave_up_during_its_upload_is_not_made(url: str) -> None:
    def give_up(request: str) -> None:
        if request == "POST /files" and service.requests.count(request) == 1:
            with BatchBook(url) as book:
                ((batch, _),) = book.all_batches()
                book.give_up(batch.batch_id)

    with BatchEndpoint() as service:
        service.before = give_up
        await asked_in_batches(service, url, ROWS, batch_teacher())
        assert service.requests.count("POST /files") == 2
        assert len(service.batches) == 1
        assert set(service.answered.values()) == {1}
    assert left_in_book(url) == (0, 0)


@pytest.mark.usefixtures("no_backoff")
async def test_of_two_equal_batches_one_is_cancelled(url: str) -> None:
    with BatchEndpoint() as service:
        # The response that a batch was made is lost, and the next list does not show it yet.
        service.lost, service.unlisted = {3}, 1
        await asked_in_batches(service, url, ROWS, batch_teacher())
        assert sorted(each.status for each in service.batches.values()) == [
            "cancelled",
            "completed",
        ]
        assert set(service.answered.values()) == {1}


@pytest.mark.parametrize("oldest_first", [True, False])
async def test_a_batch_is_found_among_hundreds(oldest_first: bool) -> None:
    teacher = batch_teacher()
    with BatchEndpoint() as service:
        service.oldest_first = oldest_first
        request = {"endpoint": "", "input_file_id": "", "completion_window": "24h"}
        for number in range(301):
            made = service.make_batch({**request, "metadata": {"distillery_batch": f"{number}"}})
            made.created_at = 0
            service.keep(f"{number}.jsonl", b"")
        async with batch_service(teacher, batch_endpoint_of(service)) as found:
            assert await found.find_batch("150") == "batch-151"
            assert await found.find_file("150.jsonl") == "file-151"
            assert await found.find_batch("none") == ""


async def test_a_batch_whose_rows_are_no_longer_asked_is_paid_and_reserves_nothing(
    url: str,
) -> None:
    teacher, payer = batch_teacher({"wait_s": 0}, budget={"calls": 50}), Payer("run-1", "mine")
    with BatchEndpoint(lambda _: Plan(looks=0)) as service:
        service.failing = {4: 503}
        with pytest.raises(Waiting):
            await asked_in_batches(service, url, ROWS, teacher.model_copy(update={"attempts": 1}))
        await asked_in_batches(service, url, [example(90)], teacher, payer)
        assert left_in_book(url) == (1, 19)
        assert len([call for call in calls_in(url) if call["batch_id"]]) == 19
        assert not rows_of(url, "SELECT * FROM budget_allowances")
        downloads = service.requests.count("GET /files/ID/content")
        await asked_in_batches(service, url, [example(90)], teacher, payer)
        assert service.requests.count("GET /files/ID/content") == downloads == 1
        await asked_in_batches(service, url, ROWS, teacher, payer)
        assert set(service.answered.values()) == {1}
    assert left_in_book(url) == (0, 0)
    calls = [call for call in calls_in(url) if call["batch_id"]]
    assert cents(calls) == pytest.approx(19 * BATCH_CENTS)


async def test_the_run_that_takes_answers_in_pays_for_those_that_its_recipe_sent(url: str) -> None:
    teacher = batch_teacher({"wait_s": 0}, budget={"calls": 30})
    with BatchEndpoint(lambda _: Plan(looks=1)) as service:
        with pytest.raises(Waiting):
            await asked_in_batches(service, url, ROWS, teacher, Payer("run-1", "mine"))
        more = [*ROWS, *(example(number) for number in range(20, 40))]
        with pytest.raises(BudgetReached):
            await asked_in_batches(
                service, url, more, batch_teacher(budget={"calls": 30}), Payer("run-2", "mine")
            )
    booked = {call["run"] for call in calls_in(url) if call["batch_id"]}
    assert booked == {"run-2"}
    assert [call["run"] for call in calls_in(url)].count("run-2") == 30


async def test_the_allowance_of_a_dead_process_leaves_room(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillery.teacher.allowances.RENEWAL_S", 0.1)
    allow(url, "dead", 25, 0)
    with BatchEndpoint() as service:
        teacher = batch_teacher(budget={"calls": 30})
        await asked_in_batches(service, url, ROWS, teacher, Payer("run-1", "mine"))
        assert service.answered.total() == 19


def allow(url: str, holder: str, calls: int, expires_at: float) -> None:
    """Write another process's allowance of calls in the budget of run-1."""
    row = {"cost": 0, "tokens": 0, "calls": calls, "expires_at": expires_at}
    names = {"holder": holder, "run": "run-1", "recipe": "mine", "section": "teacher"}
    with LabelStore(url) as store:
        store.database.run(lambda c: c.execute(ALLOWANCES.insert(), [names | row]))


async def test_a_file_that_no_longer_fits_the_budget_is_sent_in_part(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = RequestFile.close

    def taken_meanwhile(file: RequestFile) -> None:
        close(file)
        if not service.batches:
            allow(url, "other", 10, NEVER)

    monkeypatch.setattr(RequestFile, "close", taken_meanwhile)
    with BatchEndpoint() as service:
        teacher = batch_teacher(budget={"calls": 20})
        with pytest.raises(BudgetReached, match="next request of 10"):
            await asked_in_batches(service, url, ROWS, teacher, Payer("run-1", "mine"))
        assert service.answered.total() == 9


async def test_a_batch_on_its_way_to_another_address_is_told(url: str) -> None:
    batch = Batch("gpt-test", "http://127.0.0.1:9/v1", "run-0", "mine")
    with BatchBook(url) as book:
        book.intend(batch, sorted(keys_of(ROWS)))
    with (
        BatchEndpoint() as service,
        pytest.raises(TeacherError, match=r"sent to .*:9/v1; set"),
    ):
        await soon(asked_in_batches(service, url, ROWS, batch_teacher()))


async def test_a_file_that_can_not_be_read_leaves_nothing_behind(url: str) -> None:
    with BatchEndpoint() as service:
        service.unreadable = True
        with pytest.raises(TeacherError, match="can't read the file file-1"):
            await asked_in_batches(service, url, ROWS, batch_teacher())
    assert left_in_book(url) == (0, 0)


async def test_an_account_without_credit_is_not_a_full_queue(url: str) -> None:
    plan = Plan(status="failed", code="insufficient_quota", error="check your plan")
    with BatchEndpoint(lambda _: plan) as service:
        with pytest.raises(TeacherError, match="the account of TEACHER_MODEL_KEY has no credit"):
            await asked_in_batches(service, url, ROWS, batch_teacher())
        assert len(service.batches) == 1
