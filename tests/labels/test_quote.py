"""What labelling will cost, told before the first call; canary rows; labels that exist already."""

import asyncio
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_endpoint import Call, ChatEndpoint, Reply, good, said
from pydantic import SecretStr
from texts import write_texts

from distillery.data.examples import each_example, read_examples, write_examples
from distillery.data.prepare import prepare
from distillery.errors import (
    BudgetReached,
    DataError,
    RecipeError,
    TeacherError,
    TeacherUnavailable,
)
from distillery.labels.canaries import ask_canaries
from distillery.labels.files import read_labels
from distillery.labels.known import gold_labels, read_label_files, write_known_labels
from distillery.labels.labelling import label
from distillery.labels.questions import questions
from distillery.labels.quote import Quote, duration, quote, quote_recipe
from distillery.labels.report import read_report
from distillery.labels.store import LabelStore, StoredAnswer
from distillery.recipe import PromptRecipe, Recipe, TeacherRecipe
from distillery.records import Example, TeacherDrift
from distillery.teacher import ledger
from distillery.teacher.endpoint import Endpoint
from distillery.teacher.ledger import Payer

PROMPT = PromptRecipe()
PRICES = {"input": 2.0, "cached_input": 1.0, "output": 8.0, "currency": "EUR"}


def example(number: int) -> Example:
    return Example(
        example_id=f"row-{number}",
        question=f"What comes after {number:03}?",
        choices=("x", "y", "z"),
        answer_key="A",
    )


ROWS = [example(number) for number in range(30)]


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as opened:
        yield opened


def endpoint_of(server: ChatEndpoint) -> Endpoint:
    return Endpoint(server.url, "gpt-test", SecretStr("key"), "gpt-test", "openai")


def labelled(
    server: ChatEndpoint, store: LabelStore, out: Path, rows: list[Example], **recipe: Any
) -> None:
    teacher = TeacherRecipe.model_validate({"outage_s": 0, **recipe})
    asyncio.run(label(rows, PROMPT, teacher, endpoint_of(server), store, out))


def quoted(store: LabelStore, rows: list[Example] = ROWS, **recipe: Any) -> Quote:
    return quote(rows, PROMPT, TeacherRecipe.model_validate(recipe), "gpt-test", store)


def test_a_quote_before_any_answer_says_that_it_is_an_estimate(store: LabelStore) -> None:
    found = quoted(store, [*ROWS, ROWS[0]], prices=PRICES, concurrency=10, max_tokens=5)
    assert (found.rows, found.known, found.calls) == (31, 1, 30)
    assert not found.counted
    assert 40 < found.usage.prompt_tokens / 30 < 80
    assert found.usage.completion_tokens == 60
    assert found.cost == pytest.approx((found.usage.prompt_tokens * 2 + 60 * 8) / 1e6)
    assert found.seconds == pytest.approx(3)
    assert "estimated" in found.line()
    assert "EUR" in found.line()
    assert "no price table" in quoted(store).line()


def test_a_quote_says_what_is_spent_and_left_of_the_budget(store: LabelStore) -> None:
    teacher = TeacherRecipe.model_validate(
        {"prices": PRICES, "budget": {"cost": 20, "calls": 3000, "period": "week"}}
    )
    for recipe in ("messages", "messages", "another"):
        store.record(
            ledger.Call(
                run="earlier",
                recipe=recipe,
                teacher="gpt-test",
                purpose="test row",
                outcome="retried",
                cost=2.5,
                prices={"currency": "EUR"},
            )
        )
    payer = Payer(recipe="messages")
    store.flush()
    line = quote(ROWS, PROMPT, teacher, "gpt-test", store, payer=payer).line()
    assert line.endswith(
        "; budget: 5.00 of 20.00 EUR spent in this week, 15.00 left, and 2 of 3,000 calls spent in "
        "this week, 2,998 left"
    )
    assert "budget" not in quoted(store).line()


def test_room_for_reasoning_is_not_taken_for_the_answers_length(store: LabelStore) -> None:
    found = quoted(store, max_tokens=4096)
    assert found.usage.completion_tokens == 30 * 2, "a letter and the end of the answer"
    assert "about 60 out (from lengths, at most 4,096 each)" in found.line()
    held = quoted(store, max_tokens=4096, answers={"form": "json"})
    assert held.usage.completion_tokens == 30 * 8, '{"answer": "A"}'
    assert quoted(store, max_tokens=1).usage.completion_tokens == 30


def test_a_quote_learns_from_answers_and_counts_what_is_new(
    store: LabelStore, tmp_path: Path
) -> None:
    with ChatEndpoint() as server:
        labelled(server, store, tmp_path / "out", ROWS[:20])
        found = quoted(store, prices=PRICES)
        assert (found.known, found.calls) == (20, 10)
        assert found.usage.prompt_tokens == pytest.approx(400, abs=10), (
            "40 a row, as the endpoint counts them"
        )
        assert found.usage.completion_tokens == 10
        assert "from its last 20 answers" in found.line()
        labelled(server, store, tmp_path / "out", ROWS)
        assert len(server.calls) == 30
        assert (
            quoted(store).line() == "30 rows to label, all known: nothing to ask and nothing to pay"
        )


def test_a_quote_counts_answers_that_were_cut_off(store: LabelStore, tmp_path: Path) -> None:
    with ChatEndpoint() as server:
        labelled(server, store, tmp_path / "out", ROWS[:3])
    key = questions(ROWS[3], PROMPT, TeacherRecipe(), "gpt-test")[0].key
    (stored, *_) = store.first_answers("gpt-test", 1)
    store.add(stored._replace(request_key="text", answer="a text of its own"))
    store.add(stored._replace(request_key=key, answer=None, completion_tokens=397))
    store.flush()
    found = quoted(store)
    assert (found.calls, found.usage.completion_tokens) == (26, 26 * 100)
    assert found.basis == "from its last 4 answers"


def test_votes_and_orders_are_calls_of_their_own(store: LabelStore) -> None:
    answers = {"votes": 3, "orders": 5}
    assert quoted(store, temperature=1.0, answers=answers).calls == 30 * 3 * 3, (
        "three options have three orders"
    )


def test_a_tokenizer_counts(store: LabelStore) -> None:
    found = quote(
        ROWS, PROMPT, TeacherRecipe(), "gpt-test", store, lambda messages: 7 * len(messages)
    )
    assert found.counted
    assert found.usage.prompt_tokens == 30 * 14
    assert "(counted)" in found.line()


def test_the_slowest_limit_sets_the_time(store: LabelStore) -> None:
    assert quoted(store, requests_per_minute=6).seconds == pytest.approx(300)
    found = quoted(store, tokens_per_minute=100)
    assert found.seconds == pytest.approx(
        0.6 * (found.usage.prompt_tokens + found.usage.completion_tokens)
    )
    assert [duration(seconds) for seconds in (12, 180, 9000)] == ["12 s", "3 min", "2.5 h"]


def test_a_recipe_is_quoted_by_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DISTILLERY_HOME", str(tmp_path))
    monkeypatch.setenv("TEACHER_MODEL_NAME", "gpt-test")
    found = quote_recipe(Recipe.model_validate({"dataset": {"sample": {"train": 100, "test": 50}}}))
    assert {split: one.calls for split, one in found.items()} == {"train": 100, "test": 50}
    own = quote_recipe(Recipe.model_validate({"preset": "demo"}))["train"]
    assert own.calls == 700
    assert "700 calls to the run's own teacher, " in own.line()
    assert own.line().endswith("; nothing to pay, only time on this machine")
    assert "no price table" not in own.line()
    with pytest.raises(RecipeError, match="no teacher is asked, so there is nothing to pay"):
        quote_recipe(Recipe.model_validate({"teacher": {"kind": "gold"}}))


def test_a_cheap_teacher_and_chosen_rows_are_quoted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DISTILLERY_HOME", str(tmp_path))
    monkeypatch.setenv("TEACHER_MODEL_NAME", "dear")
    monkeypatch.setenv("CHEAP_MODEL_NAME", "cheap")
    cascade = {"below": 0.8, "prices": {"input": 1, "output": 1}}
    values: dict[str, Any] = {
        "dataset": {"sample": {"train": 100, "test": 50}},
        "teacher": {"cascade": cascade, "select": {"rows": 30}},
    }
    asked = Recipe.model_validate(values)
    found = quote_recipe(asked)
    calls = {name: one.calls for name, one in found.items()}
    assert calls == {"cheap teacher": 30, "train": 30, "test": 50}
    assert found["cheap teacher"].cost is not None
    assert found["train"].cost is None

    # The cheap teacher is sure of 20 of the rows, and unsure of five.
    prepare(asked.dataset, tmp_path / "rows", asked.task)
    rows = read_examples(tmp_path / "rows" / "train.jsonl")[:30]
    cheap = asked.teacher.cascade
    assert cheap
    with LabelStore() as store:
        for number, row in enumerate(rows[:25]):
            (question,) = questions(row, asked.prompt, cheap, "cheap")
            share = 0.9 if number < 20 else 0.7
            shares = {"A": share, "B": 1 - share, "C": 0.0}
            answer = StoredAnswer(question.key, "cheap", "A", shares, "A", 40, 1, 9.0, 1, "v")
            store.add(answer)
    write_examples(rows, tmp_path / "chosen.jsonl")
    found = quote_recipe(asked, tmp_path / "chosen.jsonl")
    assert (found["cheap teacher"].calls, found["train"].rows) == (5, 10)
    values["teacher"]["canaries"] = {"rows": 30}
    found = quote_recipe(Recipe.model_validate(values), tmp_path / "chosen.jsonl")
    assert found["cheap teacher's canaries"].calls == 25
    assert found["canaries"].calls == 0, "it has answered none of them"


def test_a_quote_holds_some_of_the_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DISTILLERY_HOME", str(tmp_path))
    for name in ("TEACHER", "CHEAP"):
        monkeypatch.setenv(f"{name}_MODEL_NAME", name)
    monkeypatch.setattr("distillery.labels.quote.CHUNK_ROWS", 20)
    held, most = 0, 0

    def let_go() -> None:
        nonlocal held
        held -= 1

    def each_watched(path: Path) -> Iterator[Example]:
        nonlocal held, most
        for row in each_example(path):
            held, most = held + 1, max(most, held + 1)
            weakref.finalize(row, let_go)
            yield row

    monkeypatch.setattr("distillery.labels.quote.each_example", each_watched)
    teacher = {"cascade": {"below": 0.8}, "canaries": {"rows": 10}}
    values = {"dataset": {"sample": {"train": 400, "test": 50}}, "teacher": teacher}
    found = quote_recipe(Recipe.model_validate(values))
    assert found["train"].rows == 400
    assert 20 <= most <= 100


def test_a_classifier_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DISTILLERY_HOME", str(tmp_path))
    monkeypatch.setenv("TEACHER_MODEL_NAME", "gpt-test")
    files = write_texts(tmp_path / "texts.csv", answered=40, unanswered=10)
    dataset = {"source": "files", "files": {"train": [files]}, "carve": {"test": 0.5, "gold": 0.5}}
    asked = Recipe.model_validate({"task": {"kind": "classify"}, "dataset": dataset})
    found = quote_recipe(asked)["train"]
    assert found.calls == 10
    assert found.usage.completion_tokens == 10 * 9, 'the longest, such as {"answer": "bread"}'


def canaries(server: ChatEndpoint, store: LabelStore, rows: int, **recipe: Any) -> TeacherDrift:
    teacher = TeacherRecipe.model_validate({"canaries": {"rows": rows}, **recipe})
    return asyncio.run(ask_canaries(ROWS, PROMPT, teacher, endpoint_of(server), store))


def test_canaries_tell_a_changed_teacher(store: LabelStore, tmp_path: Path) -> None:
    with ChatEndpoint() as server:
        labelled(server, store, tmp_path / "out", ROWS)
        same = canaries(server, store, 10)
        assert (same.asked, same.compared, same.changed) == (10, 10, ())
        chosen = {call.question for call in server.calls[30:]}
        assert len(chosen) == 10

        def otherwise(call: Call) -> Reply:
            letter = str(good(call).body["choices"][0]["message"]["content"])
            reply = said(
                {"A": "B", "B": "C", "C": "A"}[letter] if "00" in call.question else letter
            )
            return Reply(reply.body | {"model": "teacher-2026-06-01"})

        server.script = otherwise
        drift = canaries(server, store, 10)
        assert {call.question for call in server.calls[40:]} == chosen, "the same rows each time"
        assert 0 < len(drift.changed) < 10
        assert all(f"What comes after 00{row[-1]}?" for row in drift.changed)
        assert drift.share == len(drift.changed) / 10
        assert (drift.before, drift.after) == (("teacher-2026-01-01",), ("teacher-2026-06-01",))
        server.script = good
        assert canaries(server, store, 10).changed == (), "what was answered afresh is not stored"


def test_canaries_that_nobody_has_answered_tell_nothing(store: LabelStore) -> None:
    with ChatEndpoint() as server:
        drift = canaries(server, store, 3)
        assert server.calls == [], "they would be asked, and paid for, twice"
    assert (drift.asked, drift.compared, drift.share) == (0, 0, 0.0)
    assert drift.line() == "no canary row has an answer from before and one from now"


def test_what_is_no_answer_tells_nothing_of_the_teacher(store: LabelStore, tmp_path: Path) -> None:
    with ChatEndpoint() as server:
        labelled(server, store, tmp_path / "out", ROWS)
        server.script = lambda call: Reply("{}}") if call.number == 32 else good(call)
        drift = canaries(server, store, 5, concurrency=1)
        assert (drift.asked, drift.compared, drift.changed) == (4, 4, ())
        # Down for longer than one question's tries.
        server.script = lambda call: Reply(status=503) if call.number < 43 else good(call)
        assert canaries(server, store, 5, concurrency=1, attempts=2).compared == 5
        server.script = lambda call: Reply(status=503)
        with pytest.raises(TeacherUnavailable):
            canaries(server, store, 5, attempts=2, outage_s=1)


def test_a_budget_is_for_all_that_a_run_asks(store: LabelStore, tmp_path: Path) -> None:
    payer = Payer(run="this")
    teacher = TeacherRecipe.model_validate(
        {"budget": {"calls": 25}, "canaries": {"rows": 3}, "concurrency": 2}
    )
    with ChatEndpoint() as server:
        endpoint = endpoint_of(server)
        asyncio.run(
            label(ROWS[:10], PROMPT, teacher, endpoint, store, tmp_path / "train", payer=payer)
        )
        asyncio.run(ask_canaries(ROWS[:10], PROMPT, teacher, endpoint, store, payer=payer))
        with pytest.raises(
            BudgetReached, match=r"^teacher.budget.calls: 25 of 25 spent in this run"
        ):
            asyncio.run(
                label(ROWS, PROMPT, teacher, endpoint, store, tmp_path / "test", payer=payer)
            )
        assert len(server.calls) == 25
        another = Payer(run="another")
        asyncio.run(label(ROWS, PROMPT, teacher, endpoint, store, tmp_path / "test", payer=another))
    assert len({call.question for call in server.calls}) == 30


def test_a_quote_for_reasons_does_not_go_by_letters(store: LabelStore, tmp_path: Path) -> None:
    with ChatEndpoint() as server:
        labelled(server, store, tmp_path / "out", ROWS)
    assert "from its last 30 answers" in quoted(store, ROWS, max_tokens=20).basis
    reasons = quoted(store, ROWS, max_tokens=200, answers={"form": "rationale"})
    assert reasons.basis == "from lengths, at most 200 each"
    assert reasons.usage.completion_tokens == 30 * 200


def test_gold_is_a_teacher_of_its_own_kind(tmp_path: Path) -> None:
    rows = [*ROWS[:3], ROWS[3].model_copy(update={"answer_key": None})]
    counts = write_known_labels(
        rows, gold_labels(rows), PROMPT, TeacherRecipe(kind="gold"), tmp_path / "out"
    )
    assert (counts.accepted, counts.rejected, counts.asked) == (3, 1, 0)
    assert [one.answer for one in read_labels(tmp_path / "out").values()] == ["A", "A", "A"]
    assert read_report(tmp_path / "out").rejected == {"no label for it": 1}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_labels_that_are_there_already(tmp_path: Path, suffix: str) -> None:
    import pandas  # type: ignore[import-untyped]

    rows = [
        {"example_id": f"row-{n}", "answer": "ABC"[n % 3], "distribution": None} for n in range(4)
    ]
    rows[0]["distribution"] = json.dumps({"A": 0.8, "B": 0.1, "C": 0.1})
    rows.append({"example_id": "elsewhere", "answer": "Z", "distribution": None})
    rows = [
        row | {"rationale": "It comes first." if row["example_id"] == "row-3" else None}
        for row in rows
    ]
    path = tmp_path / f"labels.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    elif suffix == "csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    else:
        pandas.DataFrame(rows).to_parquet(path)
    found, _ = read_label_files([str(path)], ROWS)
    assert {key: one.answer for key, one in found.items()} == {
        "row-0": "A",
        "row-1": "B",
        "row-2": "C",
        "row-3": "A",
    }
    assert found["row-0"].distribution == {"A": 0.8, "B": 0.1, "C": 0.1}
    assert (found["row-0"].confidence, found["row-1"].confidence) == (0.8, None)
    assert [one.rationale for one in found.values()] == [None, None, None, "It comes first."]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"example_id": "row-1", "answer": "D"}, "labels.jsonl:1: answer: 'D' is none of A to C"),
        (
            {"example_id": "row-1"},
            "labels.jsonl:1: answer: missing; it is the teacher's letter, class or text",
        ),
        (
            {"answer": "A"},
            "labels.jsonl:1: example_id: missing; it is the row's id in the data set",
        ),
        (
            {"example_id": "row-1", "answer": "A", "distribution": {"A": 1.0}},
            "distribution: must be probabilities of A to C that sum to 1",
        ),
        (
            {"example_id": "row-1", "answer": "A", "distribution": "half"},
            "distribution: must be probabilities of A to C that sum to 1",
        ),
    ],
)
def test_a_label_file_that_can_not_be_meant(tmp_path: Path, row: dict[str, Any], line: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=line.replace("'", ".")):
        read_label_files([str(path)], ROWS)


def test_too_few_labels_in_a_file_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        TeacherError, match=r"1 of 30 rows have a label.*no label for it \(29 rows\)"
    ):
        write_known_labels(
            ROWS, gold_labels(ROWS[:1]), PROMPT, TeacherRecipe(kind="gold"), tmp_path / "out"
        )


def test_a_quote_of_classes_counts_their_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TEACHER_MODEL_NAME", "gpt-test")
    path = tmp_path / "rows.csv"
    lines = [
        f"message {n} of {n * n} and {n * n * n},{'refund' if n % 2 else ''}" for n in range(40)
    ]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    prompts = []
    for labels in (["refund", "other"], ["refund", "other", *(f"topic {n}" for n in range(200))]):
        values = {
            "dataset": {"source": "files", "files": {"train": [str(path)]}, "carve": {"test": 0.5}},
            "task": {"kind": "classify", "labels": labels},
        }
        found = quote_recipe(Recipe.model_validate(values))
        assert found["train"].calls + found["test"].calls == 40
        assert found["train"].calls >= 20, "rows without a label are labelled"
        prompts.append(found["train"].usage.prompt_tokens / found["train"].calls)
    assert prompts[1] - prompts[0] == pytest.approx(0.25 * sum(map(len, labels[2:])) + 50, rel=0.05)
