"""Labelling against endpoints that fail, stall, refuse and give odd answers; budgets; votes,
orders, forms of answers, and filters."""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from chat_endpoint import Call, ChatEndpoint, Reply, Script, completion, good, refused, said
from label_runs import PROMPT, example, labelled, read_all, read_lines, run_process, stored_keys

from distillery.errors import BudgetReached, CredentialsError, TeacherError, TeacherUnavailable
from distillery.labels.exports import export_answers
from distillery.labels.files import LabelCounts
from distillery.labels.questions import request_key
from distillery.labels.store import LabelStore
from distillery.prompts import render_messages
from distillery.recipe import TeacherRecipe
from distillery.records import Example
from distillery.teacher.endpoint import Sdk

pytestmark = pytest.mark.usefixtures("no_backoff")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillery.teacher.pace.FIRST_PAUSE_S", 0.02)


class PaceTime:
    """Time as the pace sees it: only the pace's own pauses take any, and they are over at once."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        # No two events happen at the same time.
        self.now += 1e-6
        return self.now

    async def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        await asyncio.sleep(0)
        self.now = max(self.now, end)

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)


@pytest.fixture
def pace_time(monkeypatch: pytest.MonkeyPatch) -> PaceTime:
    """The time that a run's pace goes by, in place of the machine's."""
    own = PaceTime()
    monkeypatch.setattr("distillery.teacher.pace.asyncio", own)
    monkeypatch.setattr("distillery.teacher.pace.time", own)
    return own


def number_of(call: Call) -> int:
    """The row that a call asks; -1 where it asks none."""
    found = re.search(r"after (\d+)\?", call.question)
    return int(found[1]) if found else -1


def options_of(call: Call) -> list[str]:
    return re.findall(r"^\(\w\) (.*)$", call.question, re.MULTILINE)


def labels_in(out: Path) -> dict[str, dict[str, Any]]:
    return {row["example_id"]: row for row in read_lines(out / "labels.jsonl")}


def reasons_in(out: Path) -> dict[str, str]:
    return {row["example_id"]: row["reason"] for row in read_lines(out / "rejected.jsonl")}


def answers_in(tmp_path: Path) -> int:
    return len(stored_keys(tmp_path / "labels.db"))


def first_tries(trouble: Reply, times: int = 1) -> Script:
    """`trouble` for the first tries of each question, then a good answer."""
    tries = Counter[str]()

    def script(call: Call) -> Reply:
        tries[call.question] += 1
        return trouble if tries[call.question] <= times else good(call)

    return script


def only_for(row: int, reply: Reply, others: Script = good) -> Script:
    return lambda call: reply if number_of(call) == row else others(call)


@pytest.mark.parametrize(
    "trouble",
    [
        refused(500, "oh no"),
        refused(503, "busy", retry_after="0"),
        refused(408, "too slow"),
        Reply("<html>Bad Gateway</html>", 502),
        Reply(drop=True),
        Reply(reset=True),
        Reply(completion("A"), half=True),
    ],
    ids=["500", "503", "408", "502 page", "dropped", "reset", "half a body"],
)
async def test_trouble_that_passes_costs_no_row(
    sdk: Sdk, url: str, tmp_path: Path, trouble: Reply
) -> None:
    with ChatEndpoint() as server:
        await labelled(server, f"{url}.calm", tmp_path / "calm")
        server.script = first_tries(trouble)
        before = len(server.calls)
        counts = await labelled(server, url, tmp_path / "out", sdk=sdk)
        assert len(server.calls) - before == 40
    assert (counts.accepted, counts.asked) == (20, 20)
    assert read_all(tmp_path / "out") == read_all(tmp_path / "calm")


@pytest.mark.parametrize(
    "trouble",
    [Reply(completion("A"), drip=6.0), Reply(wait=asyncio.Event())],
    ids=["drip", "silence"],
)
async def test_a_reply_that_is_not_whole_in_time_is_asked_for_again(
    sdk: Sdk, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Reply
) -> None:
    """`timeout_s` is for the whole reply, however many bytes of it have come.

    The client's clock is put forward when all first tries are under way, so that no other call can
    time out: in steps shorter than `timeout_s`, between which some bytes arrive.
    """
    client, ahead = asyncio.get_running_loop(), [0.0]
    monkeypatch.setattr(client, "time", lambda: time.monotonic() + ahead[0])

    def put_forward() -> None:
        ahead[0] += 24
        client.call_soon_threadsafe(lambda: None)

    with ChatEndpoint() as server:
        await labelled(server, f"{url}.calm", tmp_path / "calm", rows=8)
        tries = first_tries(trouble)

        def script(call: Call) -> Reply:
            if len(server.calls) == 16:
                for seconds in (0.45, 0.75, 1.05):
                    asyncio.get_running_loop().call_later(seconds, put_forward)
            return tries(call)

        server.script = script
        counts = await labelled(
            server, url, tmp_path / "out", rows=8, sdk=sdk, concurrency=8, timeout_s=60
        )
        assert len(server.calls) == 8 + 16
    assert (counts.accepted, counts.asked) == (8, 8)
    assert read_all(tmp_path / "out") == read_all(tmp_path / "calm")


class Storms:
    """After every 20 answers, 429 to the next call and for `seconds` from then on. `refusals` are
    the questions refused, by storm."""

    def __init__(self, seconds: float, **headers: str) -> None:
        self.seconds, self.headers = seconds, headers
        self.answered = 0
        self.until = 0.0
        self.refusals: list[list[str]] = []

    def __call__(self, call: Call) -> Reply:
        now = time.monotonic()
        if len(self.refusals) < self.answered // 20:
            self.until = now + self.seconds
            self.refusals.append([])
        if now < self.until:
            self.refusals[-1].append(call.question)
            return refused(429, "slow down", **self.headers)
        self.answered += 1
        return replace(good(call), delay=0.01)


async def test_a_storm_of_429_that_says_how_long_is_waited_out_in_silence(
    sdk: Sdk, url: str, tmp_path: Path
) -> None:
    storms = Storms(1.0, retry_after="1")
    with ChatEndpoint(storms) as server:
        counts = await labelled(server, url, tmp_path / "out", rows=50, sdk=sdk)
    assert (counts.accepted, counts.asked, len(storms.refusals)) == (50, 50, 2)
    for refusals in storms.refusals:
        # The calls that were on their way at the first refusal, one of a worker at most. The second
        # that it asks for is longer than the storm, so a call that comes in it was not held back.
        assert len(refusals) <= 8
        assert len(set(refusals)) == len(refusals), "no call is tried again within it"


async def test_a_storm_of_429_that_says_nothing_costs_no_row(
    sdk: Sdk, url: str, tmp_path: Path
) -> None:
    storms = Storms(0.5)
    with ChatEndpoint(storms) as server:
        counts = await labelled(server, url, tmp_path / "out", rows=50, sdk=sdk)
    assert (counts.accepted, counts.rejected, len(storms.refusals)) == (50, 0, 2)


async def test_rows_are_not_set_aside_for_an_endpoints_overload(url: str, tmp_path: Path) -> None:
    """Others have most of its places: six calls of ten are refused, whoever makes them."""
    chance = random.Random(3)
    script = lambda call: refused(429, "slow down") if chance.random() < 0.6 else good(call)  # noqa: E731
    with ChatEndpoint(script) as server:
        counts = await labelled(server, url, tmp_path / "out", rows=40, attempts=2)
    assert (counts.accepted, counts.rejected) == (40, 0)


@pytest.mark.parametrize("concurrency", [1, 8, 64])
async def test_a_key_that_is_refused_half_way_ends_the_run_at_once(
    sdk: Sdk, url: str, tmp_path: Path, concurrency: int
) -> None:
    refusal = refused(401, "Incorrect API key provided")
    with ChatEndpoint(
        lambda call: replace(good(call), delay=0.02) if call.number < 60 else refusal
    ) as server:
        with pytest.raises(CredentialsError, match="TEACHER_MODEL_KEY: refused by") as caught:
            await labelled(server, url, tmp_path / "1", rows=150, sdk=sdk, concurrency=concurrency)
        assert "\n" not in str(caught.value)
        assert len(server.calls) <= 60 + concurrency
        assert answers_in(tmp_path) == len(server.answered) == 60
        server.script = good
        counts = await labelled(server, url, tmp_path / "2", rows=150, sdk=sdk)
        assert (counts.accepted, counts.asked) == (150, 90)
        answered = Counter(question for question, _ in server.answered)
        assert set(answered.values()) == {1}


def changed(body: dict[str, Any], *place: str | int, to: Any) -> Reply:
    """A completion with one value replaced."""
    body = json.loads(json.dumps(body))
    *way, last = place
    inner: Any = body
    for step in way:
        inner = inner[step]
    inner[last] = to
    return Reply(body)


MALFORMED = {
    "no JSON": Reply("upstream connect error"),
    "nothing": Reply(""),
    "truncated JSON": Reply(json.dumps(completion("A"))[:-40]),
    "null": Reply(None),
    "a list": Reply([1]),
    "a text": Reply('"A"'),
    "no object": Reply({}),
    "choices no list": changed(completion("A"), "choices", to="A"),
    "choice null": changed(completion("A"), "choices", to=[None]),
    "no choices": changed(completion("A"), "choices", to=[]),
    "message a text": changed(completion("A"), "choices", 0, "message", to="A"),
    "message null": changed(completion("A"), "choices", 0, "message", to=None),
    "content null": changed(completion("A"), "choices", 0, "message", "content", to=None),
    "content a number": changed(completion("A"), "choices", 0, "message", "content", to=7),
    "deep": Reply("[" * 100_000),
}


@pytest.mark.parametrize("reply", MALFORMED.values(), ids=MALFORMED)
async def test_a_malformed_answer_is_set_aside_and_ends_no_run(
    sdk: Sdk, url: str, tmp_path: Path, reply: Reply
) -> None:
    with ChatEndpoint(only_for(7, reply)) as server:
        counts = await labelled(server, url, tmp_path / "out", rows=20, sdk=sdk, attempts=2)
    assert (counts.accepted, counts.rejected) == (19, 1)
    assert reasons_in(tmp_path / "out")["row-7"]


async def test_a_malformed_answer_is_paid_for_once(sdk: Sdk, url: str, tmp_path: Path) -> None:
    with ChatEndpoint(only_for(19, Reply("{}}"))) as server:
        await labelled(server, url, tmp_path / "out", rows=20, sdk=sdk, concurrency=2)
    assert sum(number_of(call) == 19 for call in server.calls) == 1
    assert reasons_in(tmp_path / "out") == {"row-19": "malformed answer: no chat completion"}


async def test_pages_that_come_for_a_while_in_place_of_answers_cost_few_rows(
    url: str, tmp_path: Path
) -> None:
    """A gateway's, say: beyond the breaker's failures no row is set aside for them."""
    page = Reply("<html>Maintenance</html>")
    with ChatEndpoint(lambda call: page if 20 <= call.number < 32 else good(call)) as server:
        counts = await labelled(server, url, tmp_path / "out", rows=60, concurrency=8)
    assert counts.accepted + counts.rejected == 60
    assert counts.rejected < 20


async def test_nothing_but_pages_for_long_ends_the_run(url: str, tmp_path: Path) -> None:
    page = Reply("<html>Maintenance</html>")
    ended = pytest.raises(
        TeacherUnavailable, match="has given no chat completion for 1 s; run again later"
    )
    with ChatEndpoint(lambda call: page if call.number >= 20 else good(call)) as server, ended:
        await labelled(server, url, tmp_path / "out", rows=60, concurrency=8, outage_s=1)


ODD_BESIDE = {
    "usage null": changed(completion("A"), "usage", to=None),
    "usage a list": changed(completion("A"), "usage", to=[1]),
    "tokens a text": changed(completion("A"), "usage", "prompt_tokens", to="many"),
    "details a list": changed(completion("A"), "usage", "prompt_tokens_details", to=[1]),
    "logprobs a list": changed(completion("A"), "choices", 0, "logprobs", to=[1]),
    "tokens numbers": changed(completion("A"), "choices", 0, "logprobs", to={"content": [1, None]}),
    "alternatives a number": changed(
        completion("A"),
        "choices",
        0,
        "logprobs",
        to={"content": [{"token": "A", "top_logprobs": 7}]},
    ),
    "finish a number": changed(completion("A"), "choices", 0, "finish_reason", to=1),
    "model a list": changed(completion("A"), "model", to=[1]),
}


@pytest.mark.parametrize("reply", ODD_BESIDE.values(), ids=ODD_BESIDE)
async def test_oddities_beside_the_answer_cost_it_not(
    sdk: Sdk, url: str, tmp_path: Path, reply: Reply
) -> None:
    with ChatEndpoint(only_for(7, reply)) as server:
        counts = await labelled(server, url, tmp_path / "out", rows=20, sdk=sdk, attempts=2)
    assert (counts.accepted, counts.rejected) == (20, 0)
    assert labels_in(tmp_path / "out")["row-7"]["answer"] == "A"


async def test_a_page_in_place_of_every_answer_ends_the_run(
    sdk: Sdk, url: str, tmp_path: Path
) -> None:
    with ChatEndpoint(lambda call: Reply("<html>Sign in to the hotel's network</html>")) as server:
        with pytest.raises(
            TeacherError, match="check that it is a chat-completions endpoint"
        ) as caught:
            await labelled(server, url, tmp_path / "out", sdk=sdk, outage_s=1)
        assert "\n" not in str(caught.value)
        assert len(server.calls) <= 8 * TeacherRecipe().attempts
    assert not (tmp_path / "out").exists()


async def test_refusals_and_answers_outside_the_options_are_set_aside(
    sdk: Sdk, url: str, tmp_path: Path
) -> None:
    odd = {
        2: said("I'm sorry, but I can't help with that."),
        3: changed(
            completion(""), "choices", 0, "message", to={"content": None, "refusal": "I can't."}
        ),
        5: said("D"),
        8: said("(D) four"),
        11: said("A and C"),
        13: said("error: rate limit"),
    }
    with ChatEndpoint(lambda call: odd.get(number_of(call)) or good(call)) as server:
        counts = await labelled(server, url, tmp_path / "out", sdk=sdk)
        again = await labelled(server, url, tmp_path / "again", sdk=sdk)
    assert (counts.accepted, counts.rejected, again.asked) == (14, 6, 0)
    assert reasons_in(tmp_path / "out").keys() == {f"row-{number}" for number in odd}
    assert reasons_in(tmp_path / "out")["row-3"] == "refused by the teacher"
    train = (tmp_path / "out" / "train_data.jsonl").read_text()
    assert "sorry" not in train
    assert "rate limit" not in train
    assert read_all(tmp_path / "out") == read_all(tmp_path / "again")


async def test_options_of_one_text_are_told_apart_by_letter_alone(url: str, tmp_path: Path) -> None:
    rows = [example(number, choices=("same", "same", "other")) for number in range(3)]
    texts = ["B", "same", "B) same"]
    with ChatEndpoint(lambda call: said(texts[number_of(call)])) as server:
        await labelled(server, url, tmp_path / "out", rows=rows)
    assert {name: row["answer"] for name, row in labels_in(tmp_path / "out").items()} == {
        "row-0": "B",
        "row-2": "B",
    }
    assert reasons_in(tmp_path / "out") == {"row-1": "no option, or more than one, of A to C"}


async def test_one_request_for_orders_that_look_alike(url: str, tmp_path: Path) -> None:
    rows = [example(0, choices=("same", "same")), example(1)]
    with ChatEndpoint(
        lambda call: said("ABC"[options_of(call).index("two")] if number_of(call) else "A")
    ) as server:
        counts = await labelled(server, url, tmp_path / "out", rows=rows, answers={"orders": 3})
        assert len(server.calls) == counts.asked == 1 + 3
    assert labels_in(tmp_path / "out").keys() == {"row-1"}
    assert reasons_in(tmp_path / "out") == {"row-0": "no majority among its 2 answers"}


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("row", [20, 59], ids=["within", "last"])
@pytest.mark.parametrize(
    "trouble", [refused(500, "oh no"), Reply(drop=True)], ids=["500", "dropped"]
)
async def test_a_row_on_which_the_endpoint_always_fails_is_set_aside(
    url: str, tmp_path: Path, concurrency: int, row: int, trouble: Reply
) -> None:
    with ChatEndpoint(only_for(row, trouble)) as server:
        counts = await labelled(
            server, url, tmp_path / "out", rows=60, concurrency=concurrency, attempts=3, outage_s=2
        )
        assert (counts.accepted, counts.rejected) == (59, 1)
        assert "fails on it" in reasons_in(tmp_path / "out")[f"row-{row}"]
        assert answers_in(tmp_path) == 59, "what never came is not kept"
        assert sum(number_of(call) == row for call in server.calls) <= 30


BUSY = "Rate limit reached on tokens per min (TPM): Limit 30000, Used 29500, Requested 900."

TOO_LARGE = "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 49137."


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize(("headers", "most"), [({}, 3 + 24), ({"retry_after": "0"}, 3 + 2 * 3)])
async def test_rows_that_always_get_429_are_set_aside(
    url: str, tmp_path: Path, concurrency: int, headers: dict[str, str], most: int
) -> None:
    """Also where they are the last that are left. A later run asks them again."""
    refusal = refused(429, BUSY, **headers)
    never = (3, 20, 21, 59)
    script = lambda call: refusal if number_of(call) in never else good(call)  # noqa: E731
    settings: dict[str, Any] = {"rows": 60, "attempts": 3, "concurrency": concurrency}
    with ChatEndpoint(script) as server:
        counts = await labelled(server, url, tmp_path / "1", outage_s=1, **settings)
        assert (counts.accepted, counts.rejected) == (56, 4)
        assert reasons_in(tmp_path / "1") == {
            f"row-{row}": "refused again and again (429), while other requests are answered"
            for row in never
        }
        tries = Counter(number_of(call) for call in server.calls)
        assert all(3 < tries[row] <= most for row in never)
        assert answers_in(tmp_path) == 56
        server.script = good
        counts = await labelled(server, url, tmp_path / "2", **settings)
    assert (counts.accepted, counts.asked) == (60, 4)


@pytest.mark.parametrize(
    "refusal",
    [
        refused(429, TOO_LARGE, code="rate_limit_exceeded", retry_after="60"),
        refused(413, "Request too large for model on tokens per minute (TPM)"),
        Reply("<html>413 Request Entity Too Large</html>", 413),
    ],
    ids=["429", "413", "413 page"],
)
async def test_a_row_that_is_too_large_is_asked_once_a_run(
    sdk: Sdk, url: str, tmp_path: Path, refusal: Reply
) -> None:
    with ChatEndpoint(only_for(7, refusal)) as server:
        for run in ("1", "2"):
            counts = await labelled(server, url, tmp_path / run, rows=20, sdk=sdk)
            assert (counts.accepted, counts.rejected) == (19, 1)
            reason = "larger than the endpoint takes, or than its limit per minute"
            assert reasons_in(tmp_path / run) == {"row-7": reason}
        assert sum(number_of(call) == 7 for call in server.calls) == 2
    assert len(server.calls) == 21


async def test_what_the_endpoint_filters_or_cuts_off_is_asked_once_for_all_runs(
    sdk: Sdk, url: str, tmp_path: Path
) -> None:
    odd = {
        2: refused(400, "filtered", code="content_filter"),
        5: said("", finish_reason="content_filter"),
        8: said("It is", finish_reason="length"),
    }
    with ChatEndpoint(lambda call: odd.get(number_of(call)) or good(call)) as server:
        for run in ("1", "2"):
            counts = await labelled(server, url, tmp_path / run, rows=20, sdk=sdk)
            assert (counts.accepted, counts.rejected) == (17, 3)
        assert len(server.calls) == 20


@pytest.mark.parametrize("status", [429, 500])
async def test_a_row_that_fails_for_longer_than_an_outage_ends_no_run(
    url: str, tmp_path: Path, status: int
) -> None:
    """No other answer comes meanwhile, but the endpoint answers a simple question."""
    with ChatEndpoint() as server:
        await labelled(server, url, tmp_path / "1", rows=19)
        server.script = only_for(19, replace(refused(status, BUSY), delay=0.05))
        counts = await labelled(server, url, tmp_path / "2", rows=20, attempts=4, outage_s=0.1)
    assert (counts.accepted, counts.rejected) == (19, 1)


async def test_a_run_of_which_only_the_failing_row_is_left_ends(url: str, tmp_path: Path) -> None:
    with ChatEndpoint() as server:
        await labelled(server, url, tmp_path / "1", rows=[example(n) for n in range(20) if n != 5])
        server.script = only_for(5, refused(500, "oh no"))
        counts = await labelled(server, url, tmp_path / "2", attempts=2, outage_s=1)
    assert (counts.accepted, counts.rejected) == (19, 1)


@pytest.mark.parametrize(
    ("concurrency", "trouble"),
    [(8, refused(503, "maintenance")), (64, Reply(drop=True))],
    ids=["503", "dropped"],
)
async def test_an_outage_is_waited_out_with_few_requests(
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pace_time: PaceTime,
    concurrency: int,
    trouble: Reply,
) -> None:
    monkeypatch.setattr("distillery.teacher.pace.FIRST_PAUSE_S", 0.1)
    down_at, during, after = pace_time.now, [], []

    def script(call: Call) -> Reply:
        if call.number < 100:
            return good(call)
        if pace_time.now < down_at + 3:
            during.append(call)
            return trouble
        after.append(pace_time.now - down_at)
        return good(call)

    with ChatEndpoint(script) as server:
        counts = await labelled(server, url, tmp_path / "out", rows=300, concurrency=concurrency)
        assert (counts.accepted, counts.rejected) == (300, 0)
        assert 300 <= counts.asked < 300 + concurrency
    print(f"{len(during)} requests in 3 s of outage, the next {after[0]:.1f} s after its start")
    assert len(during) <= 2 * concurrency + 20
    assert after[0] < 3 + 3.2 * 1.25, (
        "the pauses double: that it is back is seen within as long as it was away"
    )


@pytest.mark.parametrize("attempts", [1, 2])
async def test_no_row_is_set_aside_for_an_outage(url: str, tmp_path: Path, attempts: int) -> None:
    """It comes when few are left, so that each is tried several times in it."""
    down: list[float] = []

    def script(call: Call) -> Reply:
        if call.number == 40:
            down.append(call.at)
        return (
            Reply(drop=True) if down and call.at < down[0] + 1 else replace(good(call), delay=0.02)
        )

    with ChatEndpoint(script) as server:
        counts = await labelled(server, url, tmp_path / "out", rows=44, attempts=attempts)
    assert (counts.accepted, counts.rejected) == (44, 0)


async def test_each_call_has_its_tries_where_no_outage_is_waited_for(
    sdk: Sdk, url: str, tmp_path: Path
) -> None:
    with ChatEndpoint(first_tries(refused(500, "oh no"), times=2)) as server:
        counts = await labelled(
            server, url, tmp_path / "out", rows=3, sdk=sdk, attempts=3, outage_s=0, concurrency=1
        )
    assert (counts.accepted, counts.asked) == (3, 3)


@pytest.mark.parametrize("concurrency", [1, 8, 64])
async def test_an_endpoint_that_stays_away_ends_the_run_after_its_outage_s(
    sdk: Sdk, url: str, tmp_path: Path, pace_time: PaceTime, concurrency: int
) -> None:
    """Not after teacher.attempts of some question: in an outage there is one try in half a minute,
    of any of them."""
    down_at = pace_time.now
    settings: dict[str, Any] = {"concurrency": concurrency, "outage_s": 1}
    with ChatEndpoint(lambda call: good(call) if call.number < 70 else Reply(drop=True)) as server:
        with pytest.raises(TeacherUnavailable, match="can't be reached"):
            await labelled(server, url, tmp_path / "out", rows=200, sdk=sdk, **settings)
        assert len(server.calls) < 70 + 2 * concurrency + 20
    assert 1 <= pace_time.now - down_at < 5
    assert answers_in(tmp_path) == 70


async def test_time_in_which_nothing_was_asked_is_no_outage(url: str, tmp_path: Path) -> None:
    """The rows come slowly, or are known already: the endpoint was not silent but left alone."""

    def rows() -> Iterator[Example]:
        yield from map(example, range(20))
        time.sleep(1.5)
        yield example(20)

    with ChatEndpoint() as server:
        await labelled(server, url, tmp_path / "1", rows=20)
        server.script = first_tries(refused(500, "oh no"), times=2)
        counts = await labelled(server, url, tmp_path / "2", rows=rows(), attempts=1, outage_s=1)
    assert counts.accepted == 21
    assert counts.asked <= 2, "the one, and perhaps whether the endpoint answers at all"


async def test_a_copy_of_a_row_that_is_under_way_is_not_asked_again(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is looked up while the row is asked, and opened when the row is answered and
    written."""
    monkeypatch.setattr("distillery.labels.labelling.LOOKUP_ROWS", 100)
    looked_up = LabelStore.get_many
    rows = [example(number % 100, example_id=f"row-{number}") for number in range(110)]

    def slowly(store: LabelStore, keys: Iterable[str]) -> Any:
        wanted = list(keys)
        found = looked_up(store, wanted)
        time.sleep(0 if len(wanted) == 100 else 2)
        return found

    monkeypatch.setattr(LabelStore, "get_many", slowly)
    with ChatEndpoint() as server:
        counts = await labelled(server, url, tmp_path / "out", rows=rows)
        assert len(server.calls) == 100
    assert (counts.accepted, counts.asked) == (110, 100)


def counted(call: Call) -> Reply:
    """A good answer that took as many tokens as its characters suggest."""
    body = completion("ABC"[number_of(call) % 3])
    characters = sum(len(message["content"]) for message in call.body["messages"])
    return Reply(
        {**body, "usage": {"prompt_tokens": characters // 4, "completion_tokens": 1}}, delay=0.01
    )


async def until_done(
    run: Callable[[int], Any], server: ChatEndpoint, most: int = 50
) -> tuple[LabelCounts, list[list[Call]], list[str]]:
    """Run again until the budget no longer ends the run; return the counts, the calls of each run,
    and what ended them."""
    calls, ends = [], []
    for number in range(most):
        before = len(server.calls)
        try:
            counts = await run(number)
        except BudgetReached as error:
            calls.append(server.calls[before:])
            ends.append(str(error))
        else:
            return counts, [*calls, server.calls[before:]], ends
    raise AssertionError(f"not done after {most} runs")


@pytest.mark.parametrize("concurrency", [1, 8, 64])
async def test_a_cap_on_calls_is_kept_by_the_endpoints_own_count(
    url: str, tmp_path: Path, concurrency: int
) -> None:
    """Tries that fail count too; what was answered is kept, and the next run goes on from there."""
    flaky = first_tries(refused(500, "oh no"))
    with ChatEndpoint(
        lambda call: flaky(call) if number_of(call) % 10 == 0 else counted(call)
    ) as server:
        settings: dict[str, Any] = {"concurrency": concurrency, "budget": {"calls": 30}}

        async def run(number: int) -> LabelCounts:
            try:
                return await labelled(server, url, tmp_path / f"{number}", rows=100, **settings)
            finally:
                assert answers_in(tmp_path) == len(server.answered)

        counts, calls, ends = await until_done(run, server)
    assert [len(run) for run in calls] == [30, 30, 30, 20]
    assert all(end.startswith("teacher.budget.calls: 30 of 30 spent in this run") for end in ends)
    assert (
        counts.accepted,
        set(Counter(question for question, _ in server.answered).values()),
    ) == (100, {1})
    assert not (tmp_path / "0").exists()


@pytest.mark.parametrize("concurrency", [1, 8, 64])
@pytest.mark.parametrize(("name", "cap"), [("tokens", 3000), ("cost", 0.006)])
async def test_caps_on_tokens_and_cost_are_kept_by_the_endpoints_own_count(
    sdk: Sdk, url: str, tmp_path: Path, concurrency: int, name: str, cap: float
) -> None:
    prices = {"input": 2.0, "output": 8.0}

    def spent(calls: list[Call]) -> float:
        total = 0.0
        for call in calls:
            usage = counted(call).body["usage"]
            prompt, answer = usage["prompt_tokens"], usage["completion_tokens"]
            total += prompt * 2e-6 + answer * 8e-6 if name == "cost" else prompt + answer
        return total

    with ChatEndpoint(counted) as server:
        settings: dict[str, Any] = {"concurrency": concurrency, "budget": {name: cap}}
        settings |= {"prices": prices, "sdk": sdk}
        run = lambda number: labelled(server, url, tmp_path / f"{number}", rows=100, **settings)  # noqa: E731
        counts, calls, ends = await until_done(run, server)
    assert all(spent(run) <= cap for run in calls)
    assert all(spent(run) > cap / 2 for run in calls[:-1]), "and used"
    assert all(end.startswith(f"teacher.budget.{name}: ") for end in ends)
    assert len(ends) >= 2
    assert (counts.accepted, len(server.calls)) == (100, 100)


async def test_an_endpoint_that_counts_no_tokens_does_not_pass_a_cap_on_them(
    sdk: Sdk, url: str, tmp_path: Path
) -> None:
    with ChatEndpoint(lambda call: changed(completion("A"), "usage", to=None)) as server:
        with pytest.raises(BudgetReached, match=r"teacher\.budget\.tokens"):
            await labelled(
                server, url, tmp_path / "out", rows=100, sdk=sdk, budget={"tokens": 3000}
            )
        characters = sum(len(message["content"]) for message in server.calls[0].body["messages"])
        assert len(server.calls) <= 3000 / (characters / 4)


@pytest.mark.parametrize("sign", ["猫", "~"])
async def test_a_cap_holds_for_texts_that_take_more_tokens_than_those_before(
    url: str, tmp_path: Path, sign: str
) -> None:
    """Four characters of prose are a token, and so is each of these signs."""

    def in_tokens(call: Call) -> int:
        text = "".join(message["content"] for message in call.body["messages"])
        return len(text.replace(sign, "")) // 4 + text.count(sign)

    def script(call: Call) -> Reply:
        return Reply(
            {**completion("A"), "usage": {"prompt_tokens": in_tokens(call), "completion_tokens": 1}}
        )

    texts = [f"What comes after {number}? {sign * 900 * (number >= 10)}" for number in range(20)]
    rows = [example(number, question=text) for number, text in enumerate(texts)]
    with ChatEndpoint(script) as server:
        with pytest.raises(BudgetReached):
            await labelled(
                server, url, tmp_path / "out", rows=rows, budget={"tokens": 3000}, concurrency=4
            )
        assert 500 < sum(in_tokens(call) + 1 for call in server.calls) <= 3000


async def test_a_cap_counts_what_never_came_back_at_its_most(url: str, tmp_path: Path) -> None:
    with ChatEndpoint(lambda call: Reply(delay=5)) as server, pytest.raises(BudgetReached):
        await labelled(server, url, tmp_path / "out", timeout_s=0.2, budget={"tokens": 2000})
    characters = sum(len(message["content"]) for message in server.calls[0].body["messages"])
    assert 0 < len(server.calls) <= 2000 / (characters / 4)


async def test_votes_are_asked_one_by_one_and_their_shares_are_the_distribution(
    sdk: Sdk, url: str, tmp_path: Path
) -> None:
    drawn = Counter[str]()

    def script(call: Call) -> Reply:
        drawn[call.question] += 1
        return said(
            "BBBAC"[drawn[call.question] - 1]
            if number_of(call)
            else "AABBC"[drawn[call.question] - 1]
        )

    settings: dict[str, Any] = {
        "temperature": 1.0,
        "answers": {"votes": 5},
        "soft_labels": True,
        "sdk": sdk,
    }
    with ChatEndpoint(script) as server:
        counts = await labelled(server, url, tmp_path / "1", rows=10, **settings)
        again = await labelled(server, url, tmp_path / "2", rows=10, **settings)
        assert set(drawn.values()) == {5}
        assert all(
            call.body["temperature"] == 1.0 and "logprobs" not in call.body for call in server.calls
        )
        assert (counts.asked, again.asked) == (50, 0)
        # Which replies the first three get is a matter of timing: some rows may have no majority.
        fewer = settings | {"answers": {"votes": 3}, "filters": {"minimum_accepted": 0}}
        more = await labelled(server, url, tmp_path / "3", rows=10, **fewer)
        assert more.asked == 0, "the first three of the five are these"
    for row in read_lines(tmp_path / "1" / "labels.jsonl"):
        assert (row["answer"], row["confidence"]) == ("B", 0.6)
        assert row["distribution"] == {"A": 0.2, "B": 0.6, "C": 0.2}
        assert row["usage"]["prompt_tokens"] == 5 * 40
    assert reasons_in(tmp_path / "1") == {"row-0": "no majority among its 5 answers"}
    assert read_all(tmp_path / "1") == read_all(tmp_path / "2")


async def test_hard_labels_of_votes_have_a_confidence_and_no_distribution(
    url: str, tmp_path: Path
) -> None:
    drawn = Counter[str]()

    def script(call: Call) -> Reply:
        drawn[call.question] += 1
        return said("BBA"[drawn[call.question] - 1])

    with ChatEndpoint(script) as server:
        await labelled(server, url, tmp_path / "out", rows=3, temperature=0.7, answers={"votes": 3})
    for row in read_lines(tmp_path / "out" / "labels.jsonl"):
        assert (row["answer"], row["distribution"]) == ("B", None)
        assert row["confidence"] == pytest.approx(2 / 3)


async def test_a_majority_of_votes_must_be_answers(url: str, tmp_path: Path) -> None:
    drawn = Counter[str]()

    def script(call: Call) -> Reply:
        drawn[call.question] += 1
        return said(
            (["B", "well", "hm"] if number_of(call) else ["B", "B", "hm"])[drawn[call.question] - 1]
        )

    with ChatEndpoint(script) as server:
        await labelled(server, url, tmp_path / "out", rows=2, temperature=0.7, answers={"votes": 3})
    assert labels_in(tmp_path / "out").keys() == {"row-0"}
    assert reasons_in(tmp_path / "out") == {"row-1": "no option, or more than one, of A to C"}


async def test_in_every_order_the_answer_is_the_same_option(
    sdk: Sdk, url: str, tmp_path: Path
) -> None:
    def script(call: Call) -> Reply:
        letter = "ABC"[options_of(call).index("two")]
        top = {letter: 0.8, **{other: 0.1 for other in "ABC" if other != letter}}
        return said(letter, top=top)

    with ChatEndpoint(script) as server:
        counts = await labelled(
            server, url, tmp_path / "out", rows=4, sdk=sdk, soft_labels=True, answers={"orders": 3}
        )
        shown = {tuple(options_of(call)) for call in server.calls}
    assert counts.asked == 12
    assert shown == {("one", "two", "three"), ("two", "three", "one"), ("three", "one", "two")}
    for row in read_lines(tmp_path / "out" / "labels.jsonl"):
        assert (row["answer"], row["confidence"]) == ("B", 1.0)
        assert row["distribution"] == pytest.approx({"A": 0.1, "B": 0.8, "C": 0.1})
    question = render_messages(example(2), PROMPT)[-1]["content"]
    assert read_lines(tmp_path / "out" / "train_data.jsonl")[2] == {
        "Question": question,
        "Answer": "B",
    }


@pytest.mark.parametrize("soft", [False, True])
async def test_a_teacher_that_leans_to_a_place_gives_no_majority(
    url: str, tmp_path: Path, soft: bool
) -> None:
    always = said("A", top={"A": 0.9, "B": 0.06, "C": 0.04} if soft else None)
    with ChatEndpoint(lambda call: always) as server, pytest.raises(TeacherError) as caught:
        await labelled(
            server, url, tmp_path / "out", rows=5, soft_labels=soft, answers={"orders": 3}
        )
    assert "no majority among its 3 answers (5 rows)" in str(caught.value)


async def test_a_lean_is_seen_in_the_confidence(url: str, tmp_path: Path) -> None:
    """It finds "two" in the first two positions and otherwise says A: two of three orders agree."""

    def script(call: Call) -> Reply:
        place = options_of(call).index("two")
        return said("AB"[place] if place < 2 else "A")

    with ChatEndpoint(script) as server:
        await labelled(server, url, tmp_path / "out", rows=3, answers={"orders": 3})
    for row in read_lines(tmp_path / "out" / "labels.jsonl"):
        assert (row["answer"], row["confidence"]) == ("B", pytest.approx(2 / 3))


async def test_more_orders_than_options_are_as_many_as_options(url: str, tmp_path: Path) -> None:
    with ChatEndpoint(lambda call: said("ABC"[options_of(call).index("two")])) as server:
        counts = await labelled(server, url, tmp_path / "out", rows=2, answers={"orders": 26})
    assert (counts.accepted, counts.asked) == (2, 6)


def in_tokens(tokens: dict[str, dict[str, float] | None]) -> Reply:
    """A completion of these tokens, each with its alternatives."""
    body = completion("".join(tokens), top={"x": 1.0})
    blank = body["choices"][0]["logprobs"]["content"][0] | {"top_logprobs": []}
    listed = []
    for token, top in tokens.items():
        pairs = completion("x", top=top or {token: 1.0})["choices"][0]["logprobs"]["content"][0][
            "top_logprobs"
        ]
        listed.append(blank | {"token": token, "top_logprobs": pairs})
    body["choices"][0]["logprobs"]["content"] = listed
    return Reply(body)


async def test_json_is_asked_for_by_schema_and_read(sdk: Sdk, url: str, tmp_path: Path) -> None:
    answer = in_tokens(
        {'{"': None, "answer": None, '":"': None, "B": {"B": 0.7, '"B': 0.1, "A": 0.2}, '"}': None}
    )
    with ChatEndpoint(lambda call: answer) as server:
        await labelled(
            server,
            url,
            tmp_path / "out",
            rows=3,
            sdk=sdk,
            soft_labels=True,
            answers={"form": "json"},
        )
        (form,) = {json.dumps(call.body["response_format"]) for call in server.calls}
    schema = json.loads(form)
    assert schema["type"] == "json_schema"
    assert schema["json_schema"]["strict"] is True
    assert schema["json_schema"]["schema"]["properties"] == {
        "answer": {"type": "string", "enum": ["A", "B", "C"]}
    }
    for row in read_lines(tmp_path / "out" / "labels.jsonl"):
        assert row["answer"] == "B"
        assert row["distribution"]["B"] == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    "refusal",
    [
        refused(400, "Unrecognized request argument supplied: response_format"),
        refused(400, "Invalid value: 'json_schema'", param="response_format.type"),
        Reply({"detail": [{"type": "extra_forbidden", "loc": ["body", "response_format"]}]}, 422),
    ],
    ids=["OpenAI", "param", "FastAPI"],
)
async def test_an_endpoint_that_takes_no_schema_is_asked_without(
    sdk: Sdk, url: str, tmp_path: Path, refusal: Reply
) -> None:
    script = lambda call: refusal if "response_format" in call.body else good(call)  # noqa: E731
    with ChatEndpoint(script) as server:
        counts = await labelled(
            server, url, tmp_path / "out", rows=40, sdk=sdk, answers={"form": "json"}
        )
        assert sum("response_format" in call.body for call in server.calls) <= 8
    assert (counts.accepted, counts.asked) == (40, 40)


async def test_a_rationale_is_asked_for_and_kept_beside_the_label(
    sdk: Sdk, url: str, tmp_path: Path
) -> None:
    reply = in_tokens(
        {
            "A": {"A": 0.99, "B": 0.01},
            " is too small, so it is not that.": None,
            "\nAnswer:": None,
            " B": {" B": 0.75, " A": 0.15, " C": 0.10},
        }
    )
    with ChatEndpoint(lambda call: reply) as server:
        settings: dict[str, Any] = {
            "soft_labels": True,
            "max_tokens": 300,
            "answers": {"form": "rationale"},
            "sdk": sdk,
        }
        await labelled(server, url, tmp_path / "out", rows=3, **settings)
        asked = server.calls[0].question
    question = render_messages(example(number_of(server.calls[0])), PROMPT)[-1]["content"]
    assert asked == f"{question}\n\n{TeacherRecipe().answers.instruction}"
    for row in read_lines(tmp_path / "out" / "labels.jsonl"):
        assert (row["answer"], row["rationale"]) == ("B", "A is too small, so it is not that.")
        assert row["distribution"] == pytest.approx({"A": 0.15, "B": 0.75, "C": 0.10})
    for row in read_lines(tmp_path / "out" / "train_data.jsonl"):
        assert TeacherRecipe().answers.instruction not in row["Question"]
        assert row["Answer"] == "B"


async def test_a_reason_names_the_options_by_the_rows_own_letters(url: str, tmp_path: Path) -> None:
    def script(call: Call) -> Reply:
        options = options_of(call)
        letter = "ABC"[options.index("two")]
        wrong_in_own_order = number_of(call) == 1 and options[0] == "one"
        return said(f"{letter} it is.\nAnswer: {'C' if wrong_in_own_order else letter}")

    with ChatEndpoint(script) as server:
        answers = {"form": "rationale", "orders": 3}
        await labelled(server, url, tmp_path / "out", rows=3, max_tokens=300, answers=answers)
    labels = read_lines(tmp_path / "out" / "labels.jsonl")
    assert [row["answer"] for row in labels] == ["B", "B", "B"]
    assert [row["rationale"] for row in labels] == ["B it is.", None, "B it is."]


async def test_a_rationale_that_was_cut_off_is_set_aside(url: str, tmp_path: Path) -> None:
    for text in ("A is too small, so", "Answer: A\nOr rather"):
        cut = said(text, finish_reason="length")
        with ChatEndpoint(only_for(3, cut, lambda call: said("It is.\nAnswer: C"))) as server:
            out = tmp_path / str(len(text))
            await labelled(
                server, f"{url}{len(text)}", out, max_tokens=60, answers={"form": "rationale"}
            )
        assert reasons_in(out) == {"row-3": "no answer within teacher.max_tokens (60)"}


async def test_labels_below_the_confidence_are_set_aside(url: str, tmp_path: Path) -> None:
    def script(call: Call) -> Reply:
        sure = 0.5 + number_of(call) * 0.05
        return said("A", top={"A": sure, "B": (1 - sure) * 0.6, "C": (1 - sure) * 0.4})

    with ChatEndpoint(script) as server:
        counts = await labelled(
            server, url, tmp_path / "out", rows=10, soft_labels=True, filters={"confidence": 0.72}
        )
        again = await labelled(
            server, url, tmp_path / "2", rows=10, soft_labels=True, filters={"confidence": 0.52}
        )
    assert (counts.accepted, counts.rejected, again.accepted, again.asked) == (5, 5, 9, 0)
    assert set(reasons_in(tmp_path / "out").values()) == {
        "confidence below teacher.filters.confidence (0.72)"
    }
    assert labels_in(tmp_path / "out").keys() == {f"row-{number}" for number in range(5, 10)}


async def test_a_label_without_a_confidence_is_below_any(url: str, tmp_path: Path) -> None:
    reply = in_tokens({"?": {"?": 0.9, "!": 0.1}})
    reply.body["choices"][0]["message"]["content"] = "A"
    no_confidence = pytest.raises(
        TeacherError, match=r"no confidence is known \(teacher.filters.conf"
    )
    with ChatEndpoint(lambda call: reply) as server, no_confidence:
        await labelled(
            server, url, tmp_path / "out", filters={"confidence": 0.5}, rows=3, soft_labels=True
        )


@pytest.mark.parametrize("token", ["(A", '"A"', 'A"}', " A.", "**A"])
async def test_probabilities_at_a_letter_with_marks_around_it_are_taken(
    url: str, tmp_path: Path, token: str
) -> None:
    reply = in_tokens({token: {token: 0.7, "B": 0.2, "C": 0.1}})
    reply.body["choices"][0]["message"]["content"] = "A"
    with ChatEndpoint(lambda call: reply) as server:
        await labelled(server, url, tmp_path / "out", rows=2, soft_labels=True)
    for row in read_lines(tmp_path / "out" / "labels.jsonl"):
        assert row["distribution"] == pytest.approx({"A": 0.7, "B": 0.2, "C": 0.1})


async def test_soft_labels_that_none_has_end_the_run(url: str, tmp_path: Path) -> None:
    reply = in_tokens({"?": {"?": 0.9, "!": 0.1}})
    reply.body["choices"][0]["message"]["content"] = "A"
    with ChatEndpoint(lambda call: reply) as server:
        with pytest.raises(TeacherError, match="none of 4 labels has prob"):
            await labelled(server, url, tmp_path / "out", rows=4, soft_labels=True)
        with pytest.raises(TeacherError, match="none of 100 labels has prob"):
            await labelled(server, url, tmp_path / "out", rows=1000, soft_labels=True)
        assert len(server.calls) < 200
    assert not (tmp_path / "out").exists()


async def test_text_that_a_database_can_not_hold_loses_no_answer(url: str, tmp_path: Path) -> None:
    rows = [
        example(number, example_id=f"row\0{number}", question=f"What comes after {number}?\0")
        for number in (1, 2)
    ]
    with ChatEndpoint() as server:
        await labelled(server, url, tmp_path / "out", rows=rows)
        again = await labelled(server, url, tmp_path / "2", rows=rows)
    assert (again.accepted, again.asked) == (2, 0)
    with LabelStore(url) as store:
        export_answers(store, tmp_path / "answers.parquet")
    for answer in pq.read_table(tmp_path / "answers.parquet").to_pylist():
        assert "\0" not in answer["prompt"] + answer["example_id"]


async def test_labels_that_gold_contradicts_are_set_aside(url: str, tmp_path: Path) -> None:
    rows = [
        example(0),
        example(1, answer_key="B"),
        example(2, answer_key=None),
        example(3, answer_key="C"),
    ]
    with ChatEndpoint(lambda call: said("B")) as server:
        await labelled(
            server, url, tmp_path / "out", rows=rows, filters={"agreement_with_gold": True}
        )
        await labelled(server, url, tmp_path / "all", rows=rows)
    assert reasons_in(tmp_path / "out") == {
        "row-0": "gold says otherwise",
        "row-3": "gold says otherwise",
    }
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["gold_rows"], report["right"]) == (3, 1), (
        "what was filtered tells of the teacher too"
    )
    assert report["letters"] == {"B": 2}
    assert len(labels_in(tmp_path / "all")) == 4


async def test_balance_keeps_the_surest_of_each_letter(url: str, tmp_path: Path) -> None:
    """Ten of A, of which the later are the surer, and three each of B and C."""

    def script(call: Call) -> Reply:
        number = number_of(call)
        letter = "A" if number < 10 else "BC"[number % 2]
        sure = 0.5 + number * 0.03
        others = [other for other in "ABC" if other != letter]
        return said(
            letter, top={letter: sure, others[0]: (1 - sure) * 0.6, others[1]: (1 - sure) * 0.4}
        )

    with ChatEndpoint(script) as server:
        counts = await labelled(
            server, url, tmp_path / "out", rows=16, soft_labels=True, filters={"balance": 1.5}
        )
    kept = labels_in(tmp_path / "out")
    assert Counter(row["answer"] for row in kept.values()) == {"A": 4, "B": 3, "C": 3}
    assert list(kept) == [f"row-{number}" for number in range(6, 16)]
    assert (counts.accepted, counts.rejected) == (10, 6)
    assert reasons_in(tmp_path / "out").keys() == {f"row-{number}" for number in range(6)}
    train = read_lines(tmp_path / "out" / "train_data.jsonl")
    assert [row["Answer"] for row in train] == [row["answer"] for row in kept.values()]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["letters"] == {"A": 4, "B": 3, "C": 3}
    assert report["accepted"] == 10


async def test_a_run_that_yields_too_few_labels_is_stopped_early(url: str, tmp_path: Path) -> None:
    with ChatEndpoint(
        lambda call: said("as an AI") if number_of(call) % 3 else good(call)
    ) as server:
        with pytest.raises(
            TeacherError,
            match=r"of 1\d\d rows have a label, and teacher\.filters\.minimum_accepted",
        ):
            await labelled(
                server, url, tmp_path / "1", rows=1000, filters={"minimum_accepted": 0.5}
            )
        assert len(server.calls) < 150
        counts = await labelled(
            server, url, tmp_path / "2", rows=300, filters={"minimum_accepted": 0.3}, concurrency=32
        )
    assert (counts.accepted, counts.rejected) == (100, 200)
    assert not (tmp_path / "1").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_twelve_times_asks_nothing_twice_that_was_stored(
    url: str, tmp_path: Path
) -> None:
    """Each run is killed amid calls and commits, once all that it was answered by then is stored.

    It stores without being asked to, and goes on meanwhile, by 30 answers at most: no more than
    these and its eight calls under way may be lost.
    """
    rows, kills, chance = 1200, 12, random.Random(11)
    examples = [example(number) for number in range(rows)]
    recipe = TeacherRecipe(soft_labels=True)
    messages = [render_messages(row, PROMPT) for row in examples]
    keys = {asked[-1]["content"]: request_key("gpt-test", asked, recipe) for asked in messages}
    stored_at: dict[str, float] = {}
    # By the API key that each run has to itself: its calls, and how many of them are answered.
    called, answers = Counter[str](), Counter[str]()
    first_call: dict[str, float] = {}

    def script(call: Call) -> Reply:
        called[call.key] += 1
        first_call.setdefault(call.key, call.at)
        if called[call.key] > answers[call.key]:
            return Reply(wait=asyncio.Event())
        return replace(good(call), delay=chance.uniform(0, 0.02))

    def answered_to(run: str) -> set[str]:
        began = first_call.get(run, float("inf"))
        return {keys[question] for question, at in server.answered if at >= began}

    def wait_until(happened: Callable[[], bool]) -> None:
        while not happened():
            assert process.poll() is None
            time.sleep(chance.uniform(0, 0.01))

    with ChatEndpoint(script) as server:
        for number in range(kills):
            run, wanted = f"run-{number}", chance.randint(1, 60)
            answers[run] = wanted + 30
            with run_process(
                server, url, tmp_path / "out", examples, recipe, run, stderr=None
            ) as process:
                wait_until(lambda: len(answered_to(run)) >= wanted)  # noqa: B023
                due = answered_to(run)
                wait_until(lambda: not due or due <= stored_keys(tmp_path / "labels.db"))  # noqa: B023
                process.kill()
            with LabelStore(url) as store:
                kept = store.get_many(keys.values()).keys()
            assert due <= kept
            assert kept >= stored_at.keys()
            stored_at |= {key: time.monotonic() for key in kept - stored_at.keys()}
        answers.update({"last": rows, "fresh": rows})
        with run_process(
            server, url, tmp_path / "out", examples, recipe, "last", stderr=None
        ) as process:
            assert process.wait() == 0
        asked_again = [
            call for call in server.calls if call.at > stored_at.get(keys[call.question], call.at)
        ]
        assert asked_again == []
        assert {keys[call.question] for call in server.calls} == set(keys.values())
        print(f"{len(server.calls)} requests for {rows} rows in {len(first_call)} runs")
        assert len(server.calls) <= rows + kills * (30 + 8)
        url = f"sqlite:///{tmp_path / 'fresh.db'}"
        with run_process(
            server, url, tmp_path / "fresh", examples, recipe, "fresh", stderr=None
        ) as process:
            assert process.wait() == 0
    assert read_all(tmp_path / "out") == read_all(tmp_path / "fresh")
    assert len(read_lines(tmp_path / "out" / "labels.jsonl")) == rows


MANY = """
import asyncio, re, sys, time
from pathlib import Path
from pydantic import SecretStr
from distillery.labels.store import LabelStore
from distillery.labels.labelling import label
from distillery.labels.quote import quote
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example, Usage
from distillery.teacher.reply import Completion
from distillery.teacher.endpoint import Endpoint
database, out, rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
class Stub:
    async def ask(self, messages, names, schema, *, by_text=False, key=""):
        await asyncio.sleep(0)
        return Completion("B", "stop", usage=Usage(prompt_tokens=100, completion_tokens=1))
def examples():
    for n in range(rows):
        question = f"What comes after {n}?"
        choices = ("one", "two", "three")
        yield Example(example_id=f"row-{n}", question=question, choices=choices, answer_key="B")
endpoint = Endpoint("http://127.0.0.1/v1", "stub", SecretStr("key"), "stub", "openai")
prompt, teacher = PromptRecipe(), TeacherRecipe()
with LabelStore(database) as store:
    assert quote(examples(), prompt, teacher, "stub", store).calls == rows
    started = time.perf_counter()
    run = label(examples(), prompt, teacher, endpoint, store, out, rows=rows, teacher=Stub())
    done = asyncio.run(run)
assert done.accepted == rows
# This program's own peak: ru_maxrss may be that of the process that forked it.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(rows / (time.perf_counter() - started), int(peak[1]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """LABEL_ROWS=1000000 takes some four minutes."""
    most = int(os.environ.get("LABEL_ROWS", "50000"))
    peaks = {}
    for rows in (most // 10, most):
        arguments = [f"sqlite:///{tmp_path / f'{rows}.db'}", str(tmp_path / f"{rows}"), str(rows)]
        done = subprocess.run(
            [sys.executable, "-c", MANY, *arguments], stdout=subprocess.PIPE, text=True, check=True
        )
        rate, peaks[rows] = map(float, done.stdout.split())
        print(f"{rows} rows: {rate:.0f} rows a second, {peaks[rows]:.0f} MiB at most")
    # Half of either peak is libraries.
    assert peaks[most] <= 1.1 * peaks[most // 10]
