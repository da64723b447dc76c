"""Slices of rows that other processes have asked: the numbers are those of one process, bit for
bit."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from distillery.errors import ModelError
from distillery.evaluation import slices
from distillery.evaluation.predictors import Predictor, load_predictor
from distillery.evaluation.scoring import ModelToScore, Scored, ScoringJob
from distillery.evaluation.scoring_process import score
from distillery.evaluation.slices import (
    SliceAnswers,
    ask_slice,
    count_of_parts,
    slice_numbers,
    slice_of,
    slices_from,
)
from distillery.recipe import PromptRecipe
from distillery.records import AnswerFormat, Example
from distillery.training.rows import TrainingRow

Build = Callable[..., Path]

ROWS, TIMED = 90, 7
SHORT = AnswerFormat(max_tokens=12, metric="exact_match")


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(slices, "SLICE_ROWS", 32)


def examples(writes: bool) -> list[Example]:
    """Rows of very different lengths, also of more than 128 tokens, where what is cached counts;
    some are too long to be asked."""
    rows = []
    for number in range(ROWS):
        question = f"Where is it? {'So it is. ' * (number * 7 % 40)}{number}"
        row = Example(example_id=f"r{number}", question=question)
        changed: dict[str, Any] = {"format": SHORT} if writes else {"choices": ("a river", "bread")}
        rows.append(row.model_copy(update=changed))
    return rows


@pytest.mark.parametrize("answer", ["letter", "text", "written"])
@pytest.mark.parametrize("kind", ["transformers", "fp32", "int4"])
def test_a_slice_has_the_numbers_that_one_process_finds(
    kind: str,
    answer: Literal["letter", "text", "written"],
    tiny_model: Build,
    tiny_onnx: Build,
    tmp_path: Path,
) -> None:
    exported = kind != "transformers"
    folder = tiny_onnx("llama", kind) if exported else tiny_model("llama")
    user = "{question}" if answer == "written" else "{question}\n{choices}"
    job = ScoringJob(
        model=ModelToScore(
            name="model", kind="onnx" if exported else "transformers", folder=str(folder)
        ),
        examples=str(tmp_path / "rows.jsonl"),
        prompt=PromptRecipe(system="", user=user, max_tokens=220, answer=answer),
        threads=1,
        timed_rows=TIMED,
    )
    rows = examples(writes=answer == "written")
    one = scored(job, rows)
    assert len(one.latencies_ms) == TIMED, "the others are asked in batches"
    assert 0 < one.answers.count(None) < ROWS / 2 or answer == "written"
    # Other processes, one after another slice, each after the last.
    known = {}
    for number in reversed(slice_numbers(ROWS)):
        predictor = load_predictor(job, rows[0].format)
        ask_slice(predictor, rows, 1, lambda _: None)
        found = ask_slice(predictor, rows, number, lambda _: None)
        known[number] = tmp_path / f"{number}.json"
        known[number].write_text(found.model_dump_json())
    for numbers in ((1, 2), (2,)):
        files = {number: str(known[number]) for number in numbers}
        assert numbers_of(scored(job.model_copy(update={"known": files}), rows)) == numbers_of(one)
    # They are taken from the files.
    nothing = SliceAnswers(asked=(None,) * len(slice_of(2, ROWS)))
    known[2].write_text(nothing.model_dump_json())
    changed = scored(job.model_copy(update={"known": {2: str(known[2])}}), rows)
    assert changed.answers == (*one.answers[:64], *[None] * 26)


def scored(job: ScoringJob, rows: list[Example]) -> Scored:
    with pytest.MonkeyPatch.context() as patch:
        # A file of rows leaves the format out.
        patch.setattr("distillery.evaluation.scoring_process.read_examples", lambda _: rows)
        return score(job)


def numbers_of(found: Scored) -> tuple[Any, ...]:
    return found.answers, found.probabilities, found.no_answer


def test_slices_hold_each_row_once() -> None:
    for rows in (1, 31, 32, 33, 90):
        for first in range(rows):
            found = list(slices_from(first, rows))
            assert [index for _, each in found for index in each] == list(range(first, rows))
            for number, each in found:
                if number is None:
                    assert each.start % 32
                else:
                    assert each == slice_of(number, rows)
        assert [*slice_numbers(rows)] == [number for number, _ in slices_from(1, rows) if number]


def test_a_process_has_enough_rows_to_be_worth_it() -> None:
    least = slices.ROWS_OF_A_PART
    asked = (0, least, 2 * least - 1, 2 * least, 9 * least)
    assert [count_of_parts(rows, 4) for rows in asked] == [1, 1, 1, 2, 4]


def test_a_model_that_takes_no_batches_is_left_to_one_process() -> None:
    predictor = Predictor("here", lambda _: None, lambda _: [])
    with pytest.raises(ModelError, match="one by one, by a single process"):
        ask_slice(predictor, examples(False), 1, lambda _: None)


def test_no_slice_depends_on_what_was_asked_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model whose numbers tell what it has cached."""

    class Remembering:
        """Finds how many rows it has been asked since it has forgotten the others, and how many are
        asked at once."""

        cached = 0

        def ask_batches(
            self, rows: Sequence[Any], done: Callable[[int], None]
        ) -> list[list[float]]:
            done(len(rows))
            self.cached += len(rows)
            return [[float(self.cached), float(len(rows))] for _ in rows]

        def forget(self) -> None:
            self.cached = 0

    def load(*_: object) -> Predictor:
        model, row = Remembering(), TrainingRow(prompt=(1, 2), answer=0)
        return Predictor(
            "here",
            lambda _: row,
            lambda row: model.ask_batches([row], lambda _: None)[0],
            model.ask_batches,
            forget=model.forget,
        )

    monkeypatch.setattr("distillery.evaluation.scoring_process.load_predictor", load)
    rows = examples(writes=False)
    job = ScoringJob(
        model=ModelToScore(name="model", kind="onnx", folder=str(tmp_path)),
        examples="rows.jsonl",
        prompt=PromptRecipe(),
        threads=1,
        timed_rows=TIMED,
    )
    one = scored(job, rows)
    assert one.probabilities[32:] == ((32.0, 32.0),) * 32 + ((26.0, 26.0),) * 26
    predictor = load()
    for number in (2, 1, 2):
        asked = ask_slice(predictor, rows, number, lambda _: None).asked
        each = slice_of(number, ROWS)
        assert asked == one.probabilities[each.start : each.stop]
