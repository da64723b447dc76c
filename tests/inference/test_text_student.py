"""Answers to many rows, several at once, in few passes."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from guessing import Guessing, watched, with_drafts

from distillery.data.examples import write_format
from distillery.errors import AnswerStopped, ModelError, OutOfResources
from distillery.inference import text_student
from distillery.inference.onnx_student import OnnxStudent
from distillery.inference.text_student import TextStudent, load_for_rows, load_writer
from distillery.models.drafts import FILE
from distillery.recipe import PromptRecipe
from distillery.records import AnswerFormat, Example

Build = Callable[..., Path]

TEXT = AnswerFormat(max_tokens=24, metric="rouge_l")
PROMPT = PromptRecipe(system="Say it.", user="{text}", answer="written")


def examples(count: int) -> list[Example]:
    questions = [f"{'bread and ' * (number % 4)}river {number}" for number in range(count)]
    return [
        Example(example_id=str(number), question=question, format=TEXT)
        for number, question in enumerate(questions)
    ]


def test_answers_are_written_several_at_once_and_go_ahead_where_they_are_guessed(
    tiny_onnx: Build, tmp_path: Path
) -> None:
    student = TextStudent(with_drafts(tiny_onnx("llama"), tmp_path), 1, 4)
    rows = [student.render(example, PROMPT) for example in examples(9)]
    prompts = [row.prompt for row in rows]
    alone = [student.write(prompt, TEXT) for prompt in prompts]
    answers = [[token for token, _ in student.answer_steps(prompt, TEXT)] for prompt in prompts]
    passes = []
    for right in (0, 9):
        student.batch.drafts = Guessing(answers, right)  # type: ignore[assignment]
        widths, done = watched(student.batch), list[int]()
        assert student.write_all(prompts, TEXT, done.append) == alone
        assert sum(done) == len(prompts)
        assert max(rows for rows, _ in widths) == 4, "under way at once"
        passes.append(len(widths))
    longest = sorted(map(len, answers))
    assert passes[0] >= longest[-1] - 1, "without a guess, a token a pass"
    # Four at once have passes of four tokens each, so that three of four passes are saved.
    assert passes[1] <= passes[0] / 2
    assert student.batch.active == []


def test_rows_that_can_t_be_asked_load_nothing(tiny_onnx: Build, tmp_path: Path) -> None:
    folder = with_drafts(tiny_onnx("llama"), tmp_path)
    write_format(folder, TEXT)
    student = load_for_rows(folder, 1)
    assert isinstance(student, TextStudent)
    assert student.answers([], PROMPT) == []
    assert "scorer" not in vars(student)


def test_what_can_t_be_read_is_told_and_no_student_gets_slow_by_it(
    tiny_onnx: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_drafts(tiny_onnx("llama"), tmp_path)
    (folder / FILE).write_text("{")
    with pytest.raises(ModelError, match=r"drafts\.json: no drafts of answers; export"):
        load_writer(folder, 1)

    def fail(*_given: object) -> None:
        raise OutOfResources("no memory")

    monkeypatch.setattr(text_student, "TextStudent", fail)
    with pytest.raises(OutOfResources):
        load_writer(tiny_onnx("llama"), 1)


def test_a_graph_that_takes_one_answer_at_a_time_is_asked_so(tiny_onnx: Build) -> None:
    student = load_writer(tiny_onnx("phi4mini"), 1)
    assert type(student) is OnnxStudent
    assert student.is_ahead is False


def test_a_prompt_that_does_not_fit_is_told(tiny_onnx: Build) -> None:
    student = load_writer(tiny_onnx("llama"), 1)
    for prompt in ([], [5] * 1025):
        with pytest.raises(ModelError, match="it takes 1 to 1024"):
            student.next_logits(prompt)


def test_answers_that_are_stopped_leave_the_batch(tiny_onnx: Build, tmp_path: Path) -> None:
    student = TextStudent(with_drafts(tiny_onnx("llama"), tmp_path), 1, 3)
    prompts = [student.render(example, PROMPT).prompt for example in examples(5)]
    expected = student.write_all(prompts, TEXT)
    stop = threading.Event()
    student.heed(stop)
    with pytest.raises(AnswerStopped):
        student.write_all(prompts, TEXT, lambda _: stop.set())
    stop.clear()
    assert student.batch.active == []
    assert student.write_all(prompts, TEXT) == expected
