"""Stored answers are read again from their texts: a newer reader applies to them at no cost."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from chat_endpoint import ChatEndpoint, said
from label_runs import PROMPT, endpoint_of, example, labelled, read_lines

from distillery.errors import TeacherError
from distillery.labels.canaries import ask_canaries
from distillery.labels.exports import export_answers
from distillery.labels.questions import questions
from distillery.labels.store import LabelStore, StoredAnswer
from distillery.recipe import TeacherRecipe
from distillery.records import Example

UNREAD = "no option, or more than one, of A to C"
SENTENCE = "Among A through C, the answer is B, two."
PROBABILITIES = {"A": 0.1, "B": 0.1, "C": 0.8}


def keep(url: str, row: Example, recipe: TeacherRecipe, raw: str, **read_as: Any) -> None:
    """Store the answer to a row as an earlier version has read it."""
    values: dict[str, Any] = {"answer": None, "distribution": None, "reason": ""} | read_as
    (question,) = questions(row, PROMPT, recipe, "gpt-test")
    with LabelStore(url) as store:
        store.add(
            StoredAnswer(
                request_key=question.key,
                teacher="gpt-test",
                raw=raw,
                prompt_tokens=40,
                completion_tokens=9,
                latency_ms=1.0,
                attempts=1,
                model_version="v1",
                **values,
            )
        )


async def check_answers_are_read_again(url: str, out: Path) -> None:
    """What holds on every database."""
    recipe = TeacherRecipe()
    keep(url, example(0), recipe, SENTENCE, reason=UNREAD)
    keep(url, example(1), recipe, "B", reason="refused by the teacher")
    keep(url, example(2), recipe, "A, not C", answer="C", distribution=PROBABILITIES)
    keep(url, example(3), recipe, "C", answer="C", distribution=PROBABILITIES)
    keep(url, example(4), recipe, "The answer is A or C.", answer="A", distribution=PROBABILITIES)
    keep(url, example(5), recipe, "The answer is A or C.", reason=UNREAD)
    with ChatEndpoint() as server:
        counts = await labelled(server, url, out, 6, filters={"minimum_accepted": 0.5})
        assert server.calls == []
    assert (counts.accepted, counts.rejected, counts.asked) == (4, 2, 0)
    labels = read_lines(out / "labels.jsonl")
    assert [(row["example_id"], row["answer"], row["distribution"]) for row in labels] == [
        ("row-0", "B", None),
        ("row-2", "A", None),
        ("row-3", "C", PROBABILITIES),
        ("row-4", "A", PROBABILITIES),
    ]
    rejected = read_lines(out / "rejected.jsonl")
    assert [(row["example_id"], row["reason"]) for row in rejected] == [
        ("row-1", "refused by the teacher"),
        ("row-5", UNREAD),
    ]
    exported = out / "export.parquet"
    with LabelStore(url) as store:
        assert store.delete(rejected=True) == 2, "an answer that is read now is none of them"
        assert store.summary() == [("gpt-test", 4, 0)]
        assert export_answers(store, exported) == 4
    rows = pq.read_table(exported).to_pylist()
    kept = {row["raw"]: (row["answer"], row["distribution"], row["reason"]) for row in rows}
    assert kept[SENTENCE] == ("B", None, "")
    assert kept["A, not C"] == ("A", None, "")


async def test_stored_answers_are_read_again_without_a_call(url: str, tmp_path: Path) -> None:
    await check_answers_are_read_again(url, tmp_path / "out")


@pytest.mark.slow
async def test_stored_answers_are_read_again_on_postgresql(
    postgres_url: str, tmp_path: Path
) -> None:
    await check_answers_are_read_again(postgres_url, tmp_path / "out")


@pytest.mark.parametrize(("form", "accepted"), [("letter", 1), ("rationale", 0)])
async def test_a_rationale_that_was_cut_off_is_not_read(
    form: str, accepted: int, url: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"max_tokens": 300, "answers": {"form": form}}
    recipe = TeacherRecipe(**settings)
    reason = "no answer within teacher.max_tokens (300)"
    keep(url, example(0), recipe, "B, since we", reason=reason)
    with ChatEndpoint() as server:
        settings["filters"] = {"minimum_accepted": 0}
        if accepted:
            counts = await labelled(server, url, tmp_path / "out", 1, **settings)
            assert counts.accepted == accepted
        else:
            with pytest.raises(TeacherError, match="no answer within"):
                await labelled(server, url, tmp_path / "out", 1, **settings)
        assert server.calls == []


async def test_a_reader_that_reads_more_is_no_change_of_the_teacher(url: str) -> None:
    recipe = TeacherRecipe.model_validate({"canaries": {"rows": 1}})
    keep(url, example(0), recipe, SENTENCE, reason=UNREAD)
    with ChatEndpoint(lambda _: said("B")) as server, LabelStore(url) as store:
        drift = await ask_canaries([example(0)], PROMPT, recipe, endpoint_of(server), store)
    assert (drift.compared, drift.changed) == (1, ())


async def test_too_few_labels_show_three_unread_answers_in_one_line(
    url: str, tmp_path: Path
) -> None:
    long = "It depends,\nas ever.\n" + "word " * 200 + "the end"
    texts = ["as an AI", long, "A or B", "as an AI", ""]
    for number, text in enumerate(texts):
        keep(url, example(number), TeacherRecipe(), text, reason=UNREAD)
    with ChatEndpoint() as server, pytest.raises(TeacherError) as caught:
        await labelled(server, url, tmp_path / "out", 5)
    told = str(caught.value)
    assert '; it said "as an AI", "It depends, as ever. word word' in told
    assert ' word the end", "A or B"; check prompt.system' in told
    assert "\n" not in told
    assert len(told) < 600
