"""What evaluation shows of its progress, and that showing it is not in the measured times."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from still_clock import StillClock

from distillery.evaluation import scoring_process
from distillery.evaluation.evaluate import evaluate
from distillery.evaluation.predictors import Predictor
from distillery.evaluation.scoring import ModelToScore, Scored, ScoringJob
from distillery.evaluation.scoring_process import RowCounter, ask_single_rows, score
from distillery.progress import ShowProgress
from distillery.recipe import PromptRecipe
from distillery.records import Example
from distillery.training.rows import TrainingRow

PROMPT = PromptRecipe(system="", user="{question}\n{choices}", max_tokens=128)
Shown = list[tuple[int, int, str]]


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> StillClock:
    clock = StillClock()
    monkeypatch.setattr(scoring_process, "time", clock)
    return clock


@pytest.fixture
def shown() -> Shown:
    return []


@pytest.fixture
def progress(shown: Shown) -> ShowProgress:
    return lambda *told: shown.append(told)


def examples(count: int, words: int = 0) -> list[Example]:
    """Answered rows; each third one has `words` words more than the others."""
    rows = []
    for number in range(count):
        question = "Where? " + "word " * (words if number % 3 == 2 else 0)
        rows.append(
            Example(example_id=f"r{number}", question=question, choices=("a", "b"), answer_key="A")
        )
    return rows


def write_examples(path: Path, rows: list[Example]) -> Path:
    path.write_text("".join(f"{row.model_dump_json()}\n" for row in rows))
    return path


def scored(letters: str, rows_per_second: float) -> Scored:
    """What came of a model that gives these letters."""
    return Scored(
        answers=tuple(letters),
        probabilities=((1.0, 0.0),) * len(letters),
        latencies_ms=(1000 / rows_per_second,) * len(letters),
        rows_per_second=rows_per_second,
        peak_mib=1.0,
        load_s=1.0,
        ran_on="here",
    )


def test_rows_are_shown_at_most_every_half_second(
    still: StillClock, shown: Shown, progress: ShowProgress
) -> None:
    counter = RowCounter(100, progress)
    counter.add(0)
    for _ in range(30):
        still.now += 0.25
        counter.add(2)
    assert [done for done, _, _ in shown] == list(range(0, 61, 4))
    assert shown[-1] == (60, 100, "60 of 100 rows")


def test_what_is_shown_is_not_in_a_row_s_latency(still: StillClock) -> None:
    """Asking a row takes 2 s here, of which the thread has a processor for 1.5 s, and to show it
    50 s."""

    def ask(_row: TrainingRow) -> list[float]:
        still.now += 2
        still.computed += 1.5
        return [0.5, 0.5]

    def rows_done(count: int) -> None:
        done.append(count)
        still.now += 50
        still.computed += 50

    done: list[int] = []
    row = TrainingRow(prompt=(1,), letters=(2, 3), answer=0)
    predictor = Predictor("here", lambda example: None if example.example_id == "r1" else row, ask)
    probabilities, latencies, waited = ask_single_rows(predictor, examples(4), 5, rows_done)
    assert latencies == [2000.0] * 3
    assert waited == 0.25
    assert probabilities[1] is None
    assert done == [1] * 4
    assert ask_single_rows(predictor, examples(2)[1:], 5, rows_done)[1:] == ([], None)


def test_a_model_on_a_gpu_is_not_said_to_wait_for_a_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ScoringJob(
        model=ModelToScore(name="student", kind="onnx", folder=str(tmp_path)),
        examples=str(write_examples(tmp_path / "rows.jsonl", examples(2))),
        prompt=PROMPT,
        threads=1,
    )
    row = TrainingRow(prompt=(1,), letters=(2, 3), answer=0)
    known = {}
    for ran_on in ("cuda bfloat16", "cpu float32", "ONNX Runtime"):
        predictor = Predictor(ran_on, lambda _: row, lambda _: [0.5, 0.5])
        monkeypatch.setattr(scoring_process, "load_predictor", lambda *_, own=predictor: own)
        known[ran_on] = score(job).waited is not None
    assert known == {"cuda bfloat16": False, "cpu float32": True, "ONNX Runtime": True}


@pytest.mark.parametrize("arch", ["llama", "phi4mini"])
def test_single_rows_and_batches_are_counted_once_each(
    arch: str,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    shown: Shown,
    progress: ShowProgress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """8 of the 24 rows are too long to be asked: 2 of the first 7, which are asked one by one."""
    monkeypatch.setattr(scoring_process, "SHOW_S", 0.0)
    job = ScoringJob(
        model=ModelToScore(name="torch", kind="transformers", folder=str(tiny_model(arch))),
        examples=str(write_examples(tmp_path / "rows.jsonl", examples(24, words=200))),
        prompt=PROMPT,
        threads=1,
        precision="float32",
        timed_rows=5,
    )
    assert score(job, progress).answers.count(None) == 8
    assert {of for _, of, _ in shown} == {24}
    # 6 of the 17 rows that are left are too long; the others are a batch.
    assert [done for done, _, _ in shown] == [0, 1, 2, 3, 4, 5, 6, 7, 13, 24]


def test_the_rows_of_all_models_are_shown_together(
    tmp_path: Path, shown: Shown, progress: ShowProgress, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score_model(
        model: ModelToScore, *_: object, progress: ShowProgress, reorder: bool, known: None
    ) -> Scored:
        assert reorder == (model.name == "ours")
        for done in (0, 5 if reorder else 2):
            progress(done, 3, f"{done} of 3 rows")
        return scored("AAA", 1000.0)

    monkeypatch.setattr("distillery.evaluation.evaluate.score_model", score_model)
    models = [
        ModelToScore(name=name, kind="onnx", folder=str(tmp_path)) for name in ("teacher", "ours")
    ]
    test_file = write_examples(tmp_path / "rows.jsonl", examples(3))
    evaluate(models, "teacher", test_file, [], PROMPT, "ours", tmp_path / "out", progress=progress)
    assert shown == [
        (0, 9, "loading teacher"),
        (0, 9, "asking teacher"),
        (2, 9, "asking teacher"),
        (3, 9, "loading ours"),
        (3, 9, "asking ours"),
        (8, 9, "asking ours"),
        (9, 9, "writing the report"),
    ]


def test_a_model_that_was_asked_before_is_not_asked_again(
    tmp_path: Path, shown: Shown, progress: ShowProgress, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def score_model(model: ModelToScore, *_: object, **_more: object) -> Scored:
        asked.append(model.name)
        return scored("AAA", 1000.0)

    monkeypatch.setattr("distillery.evaluation.evaluate.score_model", score_model)
    models = [
        ModelToScore(name=name, kind="onnx", folder=str(tmp_path), parameters=7)
        for name in ("teacher", "base model", "ours")
    ]
    test_file = write_examples(tmp_path / "rows.jsonl", examples(3))
    rows = evaluate(
        models,
        "teacher",
        test_file,
        [],
        PROMPT,
        "ours",
        tmp_path / "out",
        asked_before={"base model": scored("ABB", 4.0).model_copy(update={"waited": 0.25})},
        progress=progress,
    )
    assert asked == ["teacher", "ours"]
    assert {of for _, of, _ in shown} == {9}
    base = next(row for row in rows if row.name == "base model")
    assert (base.correct, base.rows_per_second, base.parameters) == (1, 4.0, 7)
    assert base.waited == 0.25
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "base model: its speed may be of an earlier run with the same rows." in report["notes"]
    assert any(note.endswith(" of the time: base model 25 %.") for note in report["notes"])
