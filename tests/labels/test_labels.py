"""The label store on real databases, and labelling through real HTTP."""

import asyncio
import sqlite3
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_endpoint import Call, ChatEndpoint, Reply, good, refused, replies, said
from label_runs import (
    KEY,
    PROMPT,
    endpoint_of,
    example,
    labelled,
    read_all,
    read_lines,
    run_process,
    stored_keys,
)
from postgres_server import Postgres

from distillery.errors import (
    CredentialsError,
    StoreError,
    StoreUnavailable,
    TeacherError,
    TeacherUnavailable,
)
from distillery.labels.labelling import label
from distillery.labels.questions import request_key
from distillery.labels.store import LabelStore, StoredAnswer
from distillery.prompts import render_messages
from distillery.recipe import TeacherRecipe
from distillery.records import TeacherLabel
from distillery.teacher import ledger
from distillery.teacher.endpoint import Sdk

pytestmark = pytest.mark.usefixtures("no_backoff")


def test_a_key_covers_what_is_asked_of_whom() -> None:
    recipe = TeacherRecipe()
    messages = render_messages(example(1), PROMPT)
    key = request_key("gpt-4o", messages, recipe)
    assert key == request_key(
        "gpt-4o", messages, TeacherRecipe(sdk="openai", concurrency=2, attempts=1, timeout_s=5)
    )
    others = [
        request_key("gpt-4o-mini", messages, recipe),
        request_key("gpt-4o", render_messages(example(2), PROMPT), recipe),
        request_key("gpt-4o", messages, TeacherRecipe(temperature=None)),
        request_key("gpt-4o", messages, TeacherRecipe(max_tokens=17)),
        request_key("gpt-4o", messages, TeacherRecipe(soft_labels=True)),
    ]
    assert len({key, *others}) == 6
    pinned = request_key("t", [{"role": "user", "content": "é"}], recipe)
    assert pinned == "3662e9909f5641b9eff42a74e75e63c3145e13a153c29ea53303a89d742c1b1e"


def stored(number: int, **values: Any) -> StoredAnswer:
    answer = StoredAnswer(
        f"{number:064x}", "gpt-4o", "A", {"A": 0.1 + 0.2, "B": 0.7}, "A", 40, 1, 12.5, 1, "v1"
    )
    return answer._replace(**values)


def check_store(url: str) -> None:
    """What holds on every database."""
    answers = [
        stored(
            number,
            distribution=None if number % 2 else {"A": 1 / 3},
            tokens=bytes(range(256)) if number % 3 else None,
        )
        for number in range(2500)
    ]
    with LabelStore(url) as store:
        for answer in answers:
            store.add(answer)
        store.flush()
        store.add(stored(7, answer="B", raw="said later"))
        store.add(stored(9999, answer="order status", raw="“ü” 猫"))
    with LabelStore(url) as store:
        found = store.get_many([answer.request_key for answer in answers])
        assert found == {answer.request_key: answer for answer in answers}, "the first answer stays"
        assert store.get_many([f"{9999:064x}", "0" * 63 + "x"]) == {
            f"{9999:064x}": stored(9999, answer="order status", raw="“ü” 猫")
        }
        assert store.get_many([]) == {}


def test_the_store_keeps_what_it_is_given(url: str) -> None:
    check_store(url)


@pytest.mark.slow
def test_the_store_on_postgresql(postgres_url: str) -> None:
    check_store(postgres_url)


@pytest.mark.slow
def test_stores_that_make_the_table_at_once_on_postgresql(postgres_url: str) -> None:
    ready, failures = threading.Barrier(8), []

    def make() -> None:
        ready.wait()
        try:
            LabelStore(postgres_url).close()
        except StoreError as error:
            failures.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.slow
async def test_labelling_into_postgresql_and_out_of_it(postgres_url: str, tmp_path: Path) -> None:
    with ChatEndpoint() as server:
        first = await labelled(server, postgres_url, tmp_path / "1", soft_labels=True)
        second = await labelled(server, postgres_url, tmp_path / "2", soft_labels=True)
        assert (first.asked, second.asked) == (20, 0)
    assert read_all(tmp_path / "1") == read_all(tmp_path / "2")


def test_an_answer_is_committed_without_a_flush_and_without_long_pauses(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The promise is 100 ms, by a clock that counts the writer's pauses: the rest is the disk's."""
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        time.sleep(seconds)

    monkeypatch.setattr("distillery.labels.store.sleep", pause)
    with LabelStore(url) as store:
        for number in range(20):
            paused = sum(pauses)
            store.add(stored(number))
            while len(stored_keys(tmp_path / "labels.db")) <= number:
                time.sleep(0.001)
            assert sum(pauses) - paused < 0.1
    assert pauses


def test_answers_that_arrive_together_are_committed_together(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LabelStore(url) as store:
        commits: list[int] = []
        commit = store.commit

        def counted(rows: list[dict[str, Any]], calls: Sequence[ledger.Call]) -> None:
            commits.append(len(rows))
            commit(rows, calls)

        monkeypatch.setattr(store, "commit", counted)
        for number in range(2000):
            store.add(stored(number))
        store.flush()
    assert sum(commits) == 2000
    assert len(commits) < 1000


def test_two_stores_write_to_one_database(url: str) -> None:
    with LabelStore(url) as one, LabelStore(url) as two:
        for number in range(300):
            (one if number % 2 else two).add(stored(number))
        one.flush()
        two.flush()
        assert len(one.get_many(f"{number:064x}" for number in range(300))) == 300


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("labels.db", "DISTILLERY_LABELS: not an SQLAlchemy URL; give one such as sqlite:"),
        (
            "mysql://u:hidden@host/db",
            "DISTILLERY_LABELS: mysql is not supported; give a sqlite or postgresql URL",
        ),
        (
            "sqlite:////proc/nowhere/labels.db",
            "DISTILLERY_LABELS /proc/nowhere/labels.db: its folder can't be made",
        ),
        (
            "sqlite:////proc",
            "DISTILLERY_LABELS sqlite:////proc: can't be used (unable to open database file)",
        ),
    ],
)
def test_a_store_that_can_not_be(wrong: str, line: str) -> None:
    with pytest.raises(StoreError) as caught:
        LabelStore(wrong)
    assert str(caught.value).startswith(line)
    assert "hidden" not in str(caught.value)


def test_a_postgresql_that_is_down_is_worth_a_retry_and_shows_no_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DISTILLERY_STORE_WAIT", "0")
    with pytest.raises(StoreUnavailable) as caught:
        LabelStore("postgresql://labels:hidden@127.0.0.1:1/db?sslpassword=hidden")
    assert "the database does not answer" in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_login_without_rights_is_no_outage() -> None:
    with Postgres() as server:
        server.ask("CREATE ROLE guest LOGIN")
        server.ask("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        with pytest.raises(StoreError, match="check the user's rights") as caught:
            # An outage would be waited out for longer than a test may take.
            LabelStore(server.url().replace("owner", "guest"), wait_s=3600)
        assert not isinstance(caught.value, StoreUnavailable)


@pytest.mark.slow
def test_answers_outlive_an_outage_of_the_database() -> None:
    with Postgres() as server, LabelStore(server.url()) as store:
        before, meanwhile = stored(1), stored(2)
        store.add(before)
        store.flush()
        server.stop()
        store.add(meanwhile)
        time.sleep(2)
        server.start()
        store.flush()
        keys = {before.request_key, meanwhile.request_key}
        assert store.get_many(keys).keys() == keys


def test_a_container_keeps_no_answers_in_a_file_of_its_own(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_CONTAINER", "1")
    with pytest.raises(
        StoreError,
        match="DISTILLERY_LABELS: an SQLite file in a container vanishes with the container",
    ):
        LabelStore(url)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "labels.db").write_text(
        "no database at all, but text that is long enough to be taken for a header " * 20
    )
    with pytest.raises(StoreError, match="file is not a database"):
        LabelStore(f"sqlite:///{tmp_path / 'labels.db'}")


async def test_a_write_that_fails_stops_the_run_in_one_line(url: str, tmp_path: Path) -> None:
    store = LabelStore(url)
    with sqlite3.connect(tmp_path / "labels.db") as other:
        other.execute("DROP TABLE teacher_answers")
    other.close()
    store.add(stored(1, raw="not to be shown"))
    with pytest.raises(StoreError, match="no such table") as caught:
        store.flush()
    assert "not to be shown" not in str(caught.value)
    assert "not to be shown" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(StoreError):
        store.add(stored(2))
    with pytest.raises(StoreError):
        store.close()


def letter_for(number: int) -> str:
    return "ABC"[sum(render_messages(example(number), PROMPT)[-1]["content"].encode()) % 3]


async def test_rows_are_labelled_in_their_order_with_the_labs_rows_beside(
    sdk: Sdk, url: str, tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    with ChatEndpoint() as server:
        counts = await labelled(
            server,
            url,
            tmp_path / "out",
            sdk=sdk,
            soft_labels=True,
            progress=lambda *step: steps.append(step),
        )
    assert (counts.accepted, counts.rejected, counts.asked) == (20, 0, 20)
    assert (counts.usage.prompt_tokens, counts.usage.completion_tokens) == (800, 20)
    assert steps == [(done, 20) for done in range(21)]
    labels = [
        TeacherLabel.model_validate(row) for row in read_lines(tmp_path / "out" / "labels.jsonl")
    ]
    assert [row.example_id for row in labels] == [f"row-{number}" for number in range(20)]
    assert [row.answer for row in labels] == [letter_for(number) for number in range(20)]
    for row in labels:
        assert row.distribution is not None
        assert list(row.distribution) == ["A", "B", "C"]
        assert sum(row.distribution.values()) == pytest.approx(1)
        assert row.distribution[row.answer] == pytest.approx(0.8 / 0.96)
        assert row.usage.prompt_tokens == 40
    train = read_lines(tmp_path / "out" / "train_data.jsonl")
    assert train[3] == {
        "Question": render_messages(example(3), PROMPT)[-1]["content"],
        "Answer": letter_for(3),
    }
    assert len(train) == 20
    assert (tmp_path / "out" / "rejected.jsonl").read_text() == ""


async def test_labelling_ends_when_all_is_committed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ChatEndpoint() as server, LabelStore(url) as store:
        commit = store.commit

        def slowly(rows: list[dict[str, Any]], calls: Sequence[ledger.Call]) -> None:
            time.sleep(0.2)
            commit(rows, calls)

        monkeypatch.setattr(store, "commit", slowly)
        await label(
            [example(1), example(2)], PROMPT, TeacherRecipe(), endpoint_of(server), store, tmp_path
        )
        with sqlite3.connect(tmp_path / "labels.db") as other:
            assert other.execute("SELECT count(*) FROM teacher_answers").fetchone() == (2,)
        other.close()


async def test_both_sdks_and_a_second_run_give_the_same_bytes(tmp_path: Path) -> None:
    with ChatEndpoint(lambda call: replace(good(call), delay=call.number % 3 * 0.01)) as server:
        for sdk in ("openai", "azure-ai-inference"):
            for run in ("1", "2"):
                url = f"sqlite:///{tmp_path / sdk}.db"
                await labelled(server, url, tmp_path / f"{sdk}-{run}", sdk=sdk, soft_labels=True)
        assert len(server.calls) == 40, "the second run of each asks nothing"
    outputs = [
        read_all(tmp_path / f"{sdk}-{run}")
        for sdk in ("openai", "azure-ai-inference")
        for run in ("1", "2")
    ]
    assert all(output == outputs[0] for output in outputs)


async def test_the_other_sdk_and_a_moved_endpoint_ask_nothing_again(
    url: str, tmp_path: Path
) -> None:
    with ChatEndpoint() as server:
        await labelled(server, url, tmp_path / "1", sdk="openai")
    with ChatEndpoint() as moved:
        counts = await labelled(moved, url, tmp_path / "2", rows=25, sdk="azure-ai-inference")
        assert len(moved.calls) == 5
    assert (counts.accepted, counts.asked, counts.usage.prompt_tokens) == (25, 5, 200)


async def test_hard_labels_alone_have_no_distribution(sdk: Sdk, url: str, tmp_path: Path) -> None:
    with ChatEndpoint() as server:
        await labelled(server, url, tmp_path / "out", rows=2, sdk=sdk)
    assert [row["distribution"] for row in read_lines(tmp_path / "out" / "labels.jsonl")] == [
        None,
        None,
    ]


async def test_equal_requests_are_asked_once(url: str, tmp_path: Path) -> None:
    rows = [example(1), example(2), example(1).model_copy(update={"example_id": "again"})]
    with ChatEndpoint() as server, LabelStore(url) as store:
        counts = await label(rows, PROMPT, TeacherRecipe(), endpoint_of(server), store, tmp_path)
        assert len(server.calls) == 2
    assert (counts.accepted, counts.asked) == (3, 2)
    assert [row["example_id"] for row in read_lines(tmp_path / "labels.jsonl")] == [
        "row-1",
        "row-2",
        "again",
    ]


async def test_another_teacher_never_answers_for_this_one(url: str, tmp_path: Path) -> None:
    with ChatEndpoint() as server, LabelStore(url) as store:
        for identity in ("sha256:old", "sha256:new"):
            await label(
                [example(1)],
                PROMPT,
                TeacherRecipe(),
                endpoint_of(server, identity=identity),
                store,
                tmp_path,
            )
        assert len(server.calls) == 2


async def test_rejected_rows_are_kept_apart_with_their_reason(
    sdk: Sdk, url: str, tmp_path: Path
) -> None:
    odd = {
        1: said("A good way is by sea"),
        3: refused(400, "filtered", code="content_filter"),
        4: said("A", finish_reason="content_filter"),
        6: Reply({"choices": []}),
        7: said("", finish_reason="length"),
        8: refused(
            400, "This model's maximum context length is 10", code="context_length_exceeded"
        ),
    }

    def script(call: Call) -> Reply:
        number = next(n for n in range(10) if f"after {n}?" in call.question)
        return odd.get(number, good(call))

    with ChatEndpoint(script) as server:
        few: dict[str, Any] = {"filters": {"minimum_accepted": 0.4}}
        counts = await labelled(server, url, tmp_path / "out", rows=10, sdk=sdk, **few)
        again = await labelled(server, url, tmp_path / "again", rows=10, sdk=sdk, **few)
    assert (counts.accepted, counts.rejected) == (4, 6)
    assert again.asked == 0, "a rejected answer was paid for too"
    rejected = read_lines(tmp_path / "out" / "rejected.jsonl")
    assert {row["example_id"]: row["reason"] for row in rejected} == {
        "row-1": "no option, or more than one, of A to C",
        "row-3": "refused by the endpoint's content filter",
        "row-4": "refused by the endpoint's content filter",
        "row-6": "empty answer",
        "row-7": "no answer within teacher.max_tokens (16)",
        "row-8": "prompt longer than the teacher's context",
    }
    assert rejected[0]["raw"] == "A good way is by sea"
    kept = {row["example_id"] for row in read_lines(tmp_path / "out" / "labels.jsonl")}
    assert kept == {"row-0", "row-2", "row-5", "row-9"}
    assert len(read_lines(tmp_path / "out" / "train_data.jsonl")) == 4
    assert read_all(tmp_path / "out") == read_all(tmp_path / "again")


async def test_nothing_accepted_is_an_error_that_counts_the_reasons(
    url: str, tmp_path: Path
) -> None:
    with (
        ChatEndpoint(replies([said("")], lambda call: said("as an AI"))) as server,
        pytest.raises(TeacherError) as caught,
    ):
        await labelled(server, url, tmp_path, rows=5, concurrency=1)
    assert "no option, or more than one, of A to C (4 rows); empty answer (1 rows)" in str(
        caught.value
    )


async def test_no_rows_at_all(url: str, tmp_path: Path) -> None:
    with ChatEndpoint() as server, pytest.raises(TeacherError, match="no row to label"):
        await labelled(server, url, tmp_path, rows=0)


async def test_log_probabilities_of_another_letter_are_not_taken(url: str, tmp_path: Path) -> None:
    aside = said("A matter of taste. So:\nAnswer: B", top={"A": 0.9, "B": 0.1})
    with ChatEndpoint(replies([said("C", top={"C": 0.9, "A": 0.05}), aside])) as server:
        await labelled(server, url, tmp_path, rows=2, soft_labels=True, concurrency=1)
    first, second = read_lines(tmp_path / "labels.jsonl")
    assert first["distribution"] is not None
    assert (second["answer"], second["distribution"]) == ("B", None)


@pytest.mark.parametrize("concurrency", [1, 3, 150])
async def test_calls_in_flight_are_bounded_and_used(
    sdk: Sdk, url: str, tmp_path: Path, concurrency: int
) -> None:
    """No call is answered before as many as allowed are in flight, and then none for a while."""
    all_in_flight = asyncio.Event()

    def script(call: Call) -> Reply:
        if call.number + 1 == concurrency:
            asyncio.get_running_loop().call_later(0.2, all_in_flight.set)
        return replace(good(call), wait=all_in_flight)

    rows = min(concurrency * 4, 200)
    with ChatEndpoint(script) as server:
        await labelled(server, url, tmp_path, rows=rows, sdk=sdk, concurrency=concurrency)
        assert server.most_in_flight == concurrency


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (refused(401, "Incorrect API key provided: " + KEY), CredentialsError),
        (refused(503, "down for good " + KEY), TeacherUnavailable),
        (Reply(drop=True), TeacherUnavailable),
    ],
    ids=["401", "503", "dropped"],
)
async def test_what_came_before_the_endpoint_failed_stays(
    sdk: Sdk, url: str, tmp_path: Path, trouble: Reply, kind: type[Exception]
) -> None:
    def script(call: Call) -> Reply:
        return good(call) if call.number < 9 else trouble

    few: dict[str, Any] = {"concurrency": 3, "attempts": 2, "outage_s": 0.5}
    with ChatEndpoint(script) as server:
        with pytest.raises(kind) as caught:
            await labelled(server, url, tmp_path / "1", sdk=sdk, **few)
        assert KEY not in str(caught.value)
        assert not (tmp_path / "1").exists()
        server.script = good
        before = len(server.calls)
        counts = await labelled(server, url, tmp_path / "2", sdk=sdk)
        assert len(server.calls) - before == counts.asked == 11
    assert KEY.encode() not in (tmp_path / "labels.db").read_bytes()


async def test_after_kill_9_no_stored_row_is_asked_again(url: str, tmp_path: Path) -> None:
    """The run is killed amid its calls, once all that it was answered by then is stored."""
    examples = [example(number) for number in range(200)]
    keys = {}
    for row in examples:
        messages = render_messages(row, PROMPT)
        keys[messages[-1]["content"]] = request_key("gpt-test", messages, TeacherRecipe())

    def script(call: Call) -> Reply:
        if call.number >= 150:
            return Reply(wait=asyncio.Event())
        return replace(good(call), delay=0.02)

    with ChatEndpoint(script) as server:
        recipe = TeacherRecipe(concurrency=4)
        with run_process(
            server, url, tmp_path / "killed", examples, recipe, stderr=None
        ) as process:
            while len(server.answered) < 80:
                assert process.poll() is None
                await asyncio.sleep(0.01)
            due = {keys[question] for question, _ in server.answered}
            while not due <= stored_keys(tmp_path / "labels.db"):
                assert process.poll() is None
                await asyncio.sleep(0.01)
            process.kill()
        with LabelStore(url) as store:
            kept = store.get_many(keys.values())
        assert due <= kept.keys()
        server.script = good
        counts = await labelled(server, url, tmp_path / "resumed", rows=200)
        assert counts.asked == 200 - len(kept)
        times = Counter(keys[call.question] for call in server.calls)
        assert not [key for key in kept if times[key] != 1]
        fresh = f"sqlite:///{tmp_path / 'fresh.db'}"
        await labelled(server, fresh, tmp_path / "fresh", rows=200)
    assert not (tmp_path / "killed").exists()
    assert read_all(tmp_path / "resumed") == read_all(tmp_path / "fresh")
