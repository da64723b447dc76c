"""Statistics against published values, scoring in real processes on tiny models, the report's
files, and the gate."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from distillery.data.examples import read_examples
from distillery.errors import DataError, ModelError
from distillery.evaluation.baselines import (
    MAJORITY,
    TFIDF,
    TFIDF_ON_GOLD,
    score_baselines,
    with_letters,
)
from distillery.evaluation.doubtful import Doubtful, Opinion
from distillery.evaluation.evaluate import evaluate, measuring_notes
from distillery.evaluation.linear_probe import TextStates
from distillery.evaluation.report import candidate_of
from distillery.evaluation.scoreboard import describe_waiting, headline, render_table
from distillery.evaluation.scoring import (
    TIMED_ROWS,
    ModelToScore,
    Scored,
    ScoringJob,
    score_model,
)
from distillery.evaluation.scoring_process import score
from distillery.evaluation.statistics import paired_interval, wilson_interval
from distillery.export.build import export
from distillery.inference.batch import Prediction, answer_some
from distillery.inference.text_student import load_for_rows
from distillery.recipe import ExportForm, PromptRecipe
from distillery.records import Departure, Example, Interval, ScoreRow

Build = Callable[..., Path]

PROMPT = PromptRecipe(system="", user="{question}\n{choices}", max_tokens=128)
MOODS = ("pleased", "displeased", "neither")
GLAD = (
    "Lovely service, thank you",
    "Thank you, great speed",
    "Great help, lovely people",
    "So happy, great line",
)
CROSS = (
    "Awful outage again",
    "Dead line, awful support",
    "The outage is back",
    "Awful, dead and slow",
)
PLAIN = (
    "When is the visit due",
    "Where do I find the form",
    "When do I pay",
    "Where is the socket",
)


def write_examples(path: Path, examples: Sequence[Example]) -> Path:
    path.write_text("".join(example.model_dump_json() + "\n" for example in examples))
    return path


@pytest.fixture
def test_file(tmp_path: Path) -> Path:
    texts = [
        (text, letter)
        for group, letter in ((GLAD, "A"), (CROSS, "B"), (PLAIN, "C"))
        for text in group
    ]
    rows = [
        Example(
            example_id=f"t{number}", question=f"{text}, friends.", choices=MOODS, answer_key=letter
        )
        for number, (text, letter) in enumerate(texts)
    ]
    return write_examples(tmp_path / "test.jsonl", rows)


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    """More displeased rows than others, in the words of the test rows."""
    texts = [
        (text, letter)
        for group, letter in ((GLAD, "A"), (CROSS * 2, "B"), (PLAIN, "C"))
        for text in group
    ]
    rows = [
        Example(example_id=f"g{number}", question=text, choices=MOODS, answer_key=letter)
        for number, (text, letter) in enumerate(texts)
    ]
    return write_examples(tmp_path / "gold.jsonl", rows)


# Statistics


@pytest.mark.parametrize(
    ("correct", "rows", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(
    correct: int, rows: int, low: float, high: float
) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3."""
    interval = wilson_interval(correct, rows)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


def pairs(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    cells = (
        [(True, True)] * both
        + [(True, False)] * first
        + [(False, True)] * second
        + [(False, False)] * neither
    )
    return [a for a, _ in cells], [b for _, b in cells]


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [((1, 1, 7, 12), -0.507, -0.026), ((59, 6, 16, 80), -0.119, -0.005)],
)
def test_paired_interval_gives_the_published_intervals(
    cells: tuple[int, int, int, int], low: float, high: float
) -> None:
    """The data of Bentur (2009) and Cavo (2012) by Newcombe's method in Fagerland, Lydersen, Laake,
    Recommended tests and confidence intervals for paired binomial proportions, Statistics in
    Medicine 33 (2014), 2850-2875."""
    first, second = pairs(*cells)
    interval = paired_interval(first, second)
    assert (round(interval.low, 3), round(interval.high, 3)) == (low, high)
    swapped = paired_interval(second, first)
    assert (swapped.low, swapped.high) == pytest.approx((-interval.high, -interval.low))


@pytest.mark.parametrize("rows", [1, 3, 40, 97, 480])
def test_a_share_is_within_its_interval(rows: int) -> None:
    for correct in (0, rows // 2, rows):
        interval = wilson_interval(correct, rows)
        assert 0 <= interval.low <= correct / rows <= interval.high <= 1


def test_paired_interval_by_hand_where_phi_is_negative() -> None:
    """(a, b, c, d) = (0, 5, 5, 0): phi = -1, so that the two half-widths add up; Wilson's interval
    of 5 in 10 is 0.2366 to 0.7634."""
    interval = paired_interval(*pairs(0, 5, 5, 0))
    assert (interval.low, interval.high) == pytest.approx((-0.5268, 0.5268), abs=1e-4)


@pytest.mark.parametrize("cells", [(80, 0, 0, 20), (100, 0, 0, 0), (0, 0, 0, 100), (1, 0, 0, 0)])
def test_paired_interval_without_discordant_pairs_is_narrow_and_holds_zero(
    cells: tuple[int, int, int, int],
) -> None:
    interval = paired_interval(*pairs(*cells))
    assert -1 <= interval.low < 0 < interval.high <= 1
    single = wilson_interval(cells[0], sum(cells))
    assert interval.high - interval.low <= 2 * (single.high - single.low)


# Scoring in a process of its own


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For processes started from here on."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_torch_and_onnx_agree_on_every_row(
    arch: str, tiny_model: Build, tiny_onnx: Build, tmp_path: Path
) -> None:
    """Whether asked one by one or in batches."""
    rows = rows_of_many_options(TIMED_ROWS + 24)
    test_file = write_examples(tmp_path / "rows.jsonl", rows)
    prompt = PROMPT.model_copy(update={"max_tokens": 512})
    torch_model = ModelToScore(name="torch", kind="transformers", folder=str(tiny_model(arch)))
    onnx_model = ModelToScore(name="onnx", kind="onnx", folder=str(tiny_onnx(arch)))
    ballast = b"x" * (400 << 20)
    by_torch = score_model(torch_model, test_file, prompt, threads=1)
    by_onnx = score_model(onnx_model, test_file, prompt, threads=1)
    assert by_torch.answers == by_onnx.answers
    assert len(by_onnx.answers) == len(rows)
    assert len(set(by_onnx.answers)) > 1
    for own, theirs in zip(by_torch.probabilities, by_onnx.probabilities, strict=True):
        assert own == pytest.approx(theirs, abs=1e-4)
        assert sum(theirs or ()) == pytest.approx(1)
    assert by_torch.ran_on == "cpu float32"
    assert_measured(by_torch, TIMED_ROWS)
    assert_measured(by_onnx, TIMED_ROWS)
    assert by_onnx.peak_mib < 350 < len(ballast) >> 20, (
        "the peak is the child's own, not this process's"
    )


@pytest.mark.usefixtures("no_gpu")
def test_bfloat16_gives_what_training_s_autocast_gives(tiny_model: Build, test_file: Path) -> None:
    """The linear layers are cast once; the numbers are those of autocast over float32 weights."""
    from distillery.models.device import Device
    from distillery.models.load import load_model, pad_id
    from distillery.prompts import TransformersTokenizer, letter_ids, render_ids
    from distillery.training.rows import TrainingRow
    from distillery.training.validation import option_probabilities

    model, tokenizer = load_model(tiny_model("llama"))
    wrapped = TransformersTokenizer(tokenizer)
    letters = tuple(letter_ids(wrapped, 3))
    rows = [
        TrainingRow(
            prompt=tuple(render_ids(example, PROMPT, wrapped) or ()), letters=letters, answer=0
        )
        for example in read_examples(test_file)
    ]
    device = Device("cpu", "bfloat16")
    expected = option_probabilities(
        model, rows, pad_id=pad_id(tokenizer), device=device, batch_size=1
    )
    scored = score_model(
        ModelToScore(name="torch", kind="transformers", folder=str(tiny_model("llama"))),
        test_file,
        PROMPT,
        threads=1,
        precision="bfloat16",
    )
    assert [list(row or ()) for row in scored.probabilities] == [
        pytest.approx(row, abs=1e-6) for row in expected
    ]


def rows_of_many_options(count: int) -> list[Example]:
    """Rows of 2 to 24 options."""
    rows = []
    for number in range(count):
        text = (GLAD + CROSS + PLAIN)[number % 12]
        choices = tuple(f"option {i}" for i in range(2 + 2 * (number % 12)))
        question = f"{text}? {'So it is. ' * (number // 12)}"
        rows.append(Example(example_id=f"r{number}", question=question, choices=choices))
    return rows


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("answer", ["letter", "text"])
@pytest.mark.parametrize("arch", ["llama", "phi4mini", "qwen2"])
def test_batches_give_what_single_rows_give(
    arch: str,
    answer: Literal["letter", "text"],
    tiny_model: Build,
    tmp_path: Path,
) -> None:
    """Rows that are too long get no answer, in batches too."""
    rows = rows_of_many_options(48)
    job = ScoringJob(
        model=ModelToScore(name="torch", kind="transformers", folder=str(tiny_model(arch))),
        examples=str(write_examples(tmp_path / "rows.jsonl", rows)),
        prompt=PROMPT.model_copy(update={"max_tokens": 200, "answer": answer}),
        threads=1,
        precision="float32",
    )
    asked = {}
    for timed in (7, 48):
        asked[timed] = score(job.model_copy(update={"timed_rows": timed}))
    single, batched = asked[48], asked[7]
    assert len(batched.latencies_ms) == 7
    assert len(single.latencies_ms) == 48 - single.answers.count(None)
    assert 0 < single.answers[7:].count(None) < 20
    assert batched.answers == single.answers
    for own, theirs in zip(batched.probabilities, single.probabilities, strict=True):
        assert own == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("answer", ["letter", "text"])
@pytest.mark.parametrize("algorithm", ["rtn", "dynamic"])
def test_an_exported_model_answers_as_in_batch_inference(
    algorithm: Literal["rtn", "dynamic"],
    answer: Literal["letter", "text"],
    tiny_model: Build,
    tmp_path: Path,
) -> None:
    """Whether a row is timed alone or is one of a batch. In prompts of more than 128 tokens ONNX
    Runtime adds up the attention in other parts where more of them is cached."""
    folder, rows = tmp_path / "model", rows_of_many_options(24)
    export(tiny_model("llama"), None, ExportForm(precision="int8", algorithm=algorithm), folder)
    prompt = PROMPT.model_copy(update={"max_tokens": 128, "answer": answer})
    scored = score(
        ScoringJob(
            model=ModelToScore(name="student", kind="onnx", folder=str(folder)),
            examples=str(write_examples(tmp_path / "rows.jsonl", rows)),
            prompt=prompt,
            threads=1,
            timed_rows=5,
        )
    )
    results = answer_some(load_for_rows(folder, threads=1), rows, prompt)
    predictions = [result for result in results if isinstance(result, Prediction)]
    assert len(scored.latencies_ms) == 5
    assert [letter for letter in scored.answers if letter] == [one.answer for one in predictions]
    asked = [row for row in scored.probabilities if row]
    for own, theirs in zip(asked, predictions, strict=True):
        assert own == pytest.approx(tuple(theirs.probabilities.values()), abs=1e-6)
    assert 10 < len(predictions) < len(rows)


def test_the_notes_tell_what_was_timed() -> None:
    """Nothing where every row was; a row that is too long is not timed either."""
    figures = {"rows_per_second": 1.0, "peak_mib": 1.0, "load_s": 1.0, "ran_on": "here"}
    answers, probabilities = ("A", "B", None), ((1.0,), (1.0,), None)
    for timed, expected in ((1, 1), (2, 0)):
        scored = Scored(
            answers=answers, probabilities=probabilities, latencies_ms=(1.0,) * timed, **figures
        )
        notes = measuring_notes({"student": scored}, 2)
        batched = "student: speed and latency are of the first 1 rows; the others were asked in "
        assert sum(note.startswith(batched) for note in notes) == expected
        assert notes[0].startswith("Measured one row at a time on ")
        assert notes[-1] == "student: 1 prompts are over prompt.max_tokens and count as wrong."


def assert_measured(scored: Scored, rows: int) -> None:
    assert len(scored.latencies_ms) == rows
    assert all(latency > 0 for latency in scored.latencies_ms)
    assert scored.rows_per_second == pytest.approx(1000 * rows / sum(scored.latencies_ms))
    assert scored.peak_mib > 20
    assert scored.load_s > 0


def test_a_prompt_over_the_budget_gets_no_answer(tiny_onnx: Build, tmp_path: Path) -> None:
    rows = [
        Example(example_id="short", question="Where is it?", choices=MOODS, answer_key="A"),
        Example(example_id="long", question="Where is it? " * 60, choices=MOODS, answer_key="A"),
    ]
    model = ModelToScore(name="student", kind="onnx", folder=str(tiny_onnx("llama")))
    scored = score_model(model, write_examples(tmp_path / "rows.jsonl", rows), PROMPT, threads=1)
    assert scored.answers[0] in ("A", "B", "C")
    assert scored.answers[1] is None
    assert scored.probabilities[1] is None
    assert len(scored.latencies_ms) == 1


def test_a_child_that_fails_gives_its_reason_in_one_line(tmp_path: Path, test_file: Path) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "genai_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"^student int4: .*half") as raised:
        score_model(
            ModelToScore(name="student int4", kind="onnx", folder=str(folder)), test_file, PROMPT
        )
    assert "\n" not in str(raised.value)
    gone = ModelToScore(name="student", kind="transformers", folder=str(tmp_path / "gone"))
    with pytest.raises(ModelError, match=r"^student: .*/gone: no such folder$"):
        score_model(gone, test_file, PROMPT)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -KILL $$", "killed, as happens when memory runs out"),
        ("echo out of luck >&2; kill -SEGV $$", r"by signal SIGSEGV \(out of luck\)"),
        ("echo no module >&2; exit 3", r"with exit code 3 \(no module\)"),
    ],
)
def test_a_child_that_dies_is_reported(
    script: str, reason: str, tmp_path: Path, test_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError, match=f"^student: its process .*{reason}"):
        score_model(
            ModelToScore(name="student", kind="onnx", folder=str(tmp_path)), test_file, PROMPT
        )


# The report


@pytest.fixture
def student(tiny_onnx: Build) -> ModelToScore:
    folder = tiny_onnx("llama")
    return ModelToScore(
        name="student int4", kind="onnx", folder=str(folder), parameters=150_000, bytes=500_000
    )


def test_evaluate_against_an_endpoint(
    student: ModelToScore, test_file: Path, train_file: Path, tmp_path: Path
) -> None:
    gold = {example.example_id: str(example.answer_key) for example in read_examples(test_file)}
    labels = {key: letter for key, letter in gold.items() if key != "t0"} | {"t1": "C"}
    out = tmp_path / "report"
    rows = evaluate(
        [student],
        labels,
        test_file,
        read_examples(train_file),
        PROMPT,
        "student int4",
        out,
        threads=1,
    )
    by_name = {row.name: row for row in rows}
    assert list(by_name) == [
        "gold",
        "majority class",
        "TF-IDF + logistic regression",
        "teacher",
        "student int4",
    ]
    assert [row.kind for row in rows] == ["reference", "baseline", "baseline", "model", "model"]
    assert by_name["gold"].accuracy == 1
    assert by_name["majority class"].correct == 4
    assert by_name["TF-IDF + logistic regression"].correct == 12
    # t0 has no accepted label and t1 a wrong one.
    teacher = by_name["teacher"]
    assert (teacher.correct, teacher.rows, teacher.versus_teacher, teacher.p50_ms) == (
        10,
        12,
        None,
        None,
    )
    assert by_name["majority class"].agreement == pytest.approx(4 / 12)
    ours = by_name["student int4"]
    assert ours.versus_teacher is not None
    assert ours.p50_ms is not None
    assert ours.p95_ms is not None
    assert 0 < ours.p50_ms <= ours.p95_ms
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert list(lines[0]) == ["example_id", *by_name]
    assert (lines[0]["example_id"], lines[0]["teacher"], lines[1]["teacher"]) == ("t0", None, "C")
    assert sum(line["student int4"] == line["gold"] for line in lines) == ours.correct
    report = json.loads((out / "report.json").read_text())
    assert [ScoreRow.model_validate(row) for row in report["scoreboard"]] == [
        row.model_copy(update={"figures": None}) for row in rows
    ]
    assert report["ran_on"] == {"student int4": "ONNX Runtime"}
    markdown = (out / "scoreboard.md").read_text()
    assert report["headline"] in markdown
    assert "Measured one row at a time on" in markdown
    assert all(name in markdown for name in by_name)
    picture = (out / "scoreboard.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(picture[16:20]) > 1000
    assert int.from_bytes(picture[20:24]) > 300
    assert len(picture) > 10_000


def test_labels_that_teacher_or_probe_contradict_are_listed(
    student: ModelToScore, test_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def right_but_for_one(_states: object, rows: Sequence[Example], _prompt: object) -> Any:
        found = []
        for row in rows:
            right = "ABC".index(str(row.answer_key))
            said = (right + 1) % 3 if row.example_id == "t3" else right
            found.append(tuple(0.98 if place == said else 0.01 for place in range(3)))
        return found

    def no_answers(
        _states: object, _gold: object, asked: Sequence[Example], _prompt: object
    ) -> Any:
        return [None] * len(asked)

    monkeypatch.setattr("distillery.evaluation.evaluate.cross_validated", right_but_for_one)
    monkeypatch.setattr("distillery.evaluation.evaluate.classify_states", no_answers)
    examples = read_examples(test_file)
    answers, shares = {}, {}
    for number, example in enumerate(examples):
        letter = "B" if number == 0 else str(example.answer_key)
        answers[example.example_id] = letter
        shares[example.example_id] = {key: 0.9 if key == letter else 0.05 for key in "ABC"}
    out = tmp_path / "report"
    evaluate(
        [student],
        answers,
        test_file,
        [],
        PROMPT,
        student.name,
        out,
        gold=examples[:3],
        validation=examples[3:],
        teacher_probabilities=shares,
        states=TextStates(Path(student.folder), False),
    )
    found = [Doubtful.model_validate_json(line) for line in (out / "doubtful.jsonl").open()]
    (doubted,) = [row for row in found if "teacher" in row.contradicted_by]
    assert (doubted.example.example_id, doubted.split) == ("t0", "test")
    assert doubted.opinions["teacher"] == Opinion(answer="B", confidence=0.9, contradicts=True)
    assert student.name in doubted.opinions
    assert f"{len(found)} labels are contradicted" in (out / "scoreboard.md").read_text()
    by_probe = [row.example.example_id for row in found if row.split == "validation"]
    assert by_probe == ["t3"]


def test_how_far_the_candidate_is_from_the_float_model_is_in_the_report(
    student: ModelToScore, tiny_model: Build, tiny_onnx: Build, test_file: Path, tmp_path: Path
) -> None:
    exact = ModelToScore(name="student", kind="transformers", folder=str(tiny_model("llama")))
    far = {}
    for precision in ("fp32", "int4"):
        candidate = student.model_copy(update={"folder": str(tiny_onnx("llama", precision))})
        out = tmp_path / precision
        rows = evaluate(
            [exact, candidate],
            {},
            test_file,
            [],
            PROMPT,
            student.name,
            out,
            float_model="student",
        )
        assert [row.name for row in rows if row.departure] == [student.name]
        assert rows[-1].departure is not None
        assert rows[-1].departure.mean is not None
        far[precision] = rows[-1].departure.mean
        assert f"by {far[precision]:.4f} on average" in (out / "scoreboard.md").read_text()
        assert candidate_of(out / "answers.jsonl") == student.name
    assert far["fp32"] < 1e-4 < 0.01 < far["int4"] < 0.5


def test_answers_are_the_same_bytes_for_equal_answers(
    student: ModelToScore, test_file: Path, tmp_path: Path
) -> None:
    teacher = student.model_copy(update={"name": "teacher"})
    for name in ("one", "two"):
        rows = evaluate(
            [teacher, student], "teacher", test_file, [], PROMPT, "student int4", tmp_path / name
        )
    assert (tmp_path / "one/answers.jsonl").read_bytes() == (
        tmp_path / "two/answers.jsonl"
    ).read_bytes()
    assert [row.name for row in rows] == ["gold", "teacher", "student int4"]
    assert rows[2].agreement == 1
    assert "left out: there is no answered row" in (tmp_path / "one/scoreboard.md").read_text()


def test_tfidf_is_left_out_where_the_options_differ(
    student: ModelToScore, test_file: Path, train_file: Path, tmp_path: Path
) -> None:
    other = Example(
        example_id="x", question="Which?", choices=("neither", "pleased"), answer_key="A"
    )
    learnt = [*read_examples(train_file), other]
    rows = evaluate([student], {}, test_file, learnt, PROMPT, "student int4", tmp_path / "out")
    assert [row.name for row in rows] == ["gold", "majority class", "teacher", "student int4"]
    assert rows[2].correct == 0
    assert (
        "TF-IDF + logistic regression is left out" in (tmp_path / "out/scoreboard.md").read_text()
    )


def of_mood(key: str, words: str, letter: str | None) -> Example:
    return Example(example_id=key, question=words, choices=MOODS, answer_key=letter)


def test_tfidf_learns_what_the_student_learns_and_beside_it_stands_one_on_gold_alone() -> None:
    """The gold rows say nothing of vans; of these only the teacher's labels tell."""
    gold = [of_mood("g1", "good router", "A"), of_mood("g2", "bad router", "B")]
    train = [
        of_mood("t1", "late van", None),
        of_mood("t2", "the teacher has no label", None),
        of_mood("t3", "late grey van", "A"),
    ]
    labelled = with_letters(train, {"t1": "B", "t3": "B", "elsewhere": "A"})
    assert [(row.example_id, row.answer_key) for row in labelled] == [("t1", "B"), ("t3", "B")]
    asked = [of_mood("x", "van", "B"), of_mood("y", "good", "A")]
    answers, notes = score_baselines(asked, [*labelled, *gold], gold)
    assert list(answers) == ["majority class", "TF-IDF + logistic regression", TFIDF_ON_GOLD]
    assert answers[TFIDF] == ["B", "A"]
    assert answers[TFIDF_ON_GOLD][1] == "A"
    assert answers[MAJORITY] == ["B", "B"]
    assert notes == []
    longer, _ = score_baselines([of_mood("z", "late grey van", "B")], [*gold], gold)
    assert longer[TFIDF] == longer[TFIDF_ON_GOLD], "without labels there is nothing else to learn"
    answers, notes = score_baselines(asked, labelled)
    assert list(answers) == ["majority class"]
    assert notes == [f"{TFIDF} is left out: all rows to learn from have one answer."]


def test_two_that_give_no_answer_do_not_agree(
    student: ModelToScore, test_file: Path, tmp_path: Path
) -> None:
    short = PROMPT.model_copy(update={"max_tokens": 8})
    rows = evaluate([student], {}, test_file, [], short, "student int4", tmp_path / "out")
    assert (rows[2].correct, rows[2].agreement) == (0, 0)
    assert (rows[2].rows_per_second, rows[2].p50_ms) == (None, None)
    assert "12 prompts are over prompt.max_tokens" in (tmp_path / "out/scoreboard.md").read_text()


def test_evaluate_refuses_what_can_t_be_compared(student: ModelToScore, tmp_path: Path) -> None:
    empty = write_examples(tmp_path / "empty.jsonl", [])
    unanswered = write_examples(
        tmp_path / "no.jsonl", [Example(example_id="u", question="?", choices=MOODS)]
    )
    answered = write_examples(
        tmp_path / "yes.jsonl",
        [Example(example_id="u", question="?", choices=MOODS, answer_key="A")],
    )
    with pytest.raises(DataError, match="no test row"):
        evaluate([student], {}, empty, [], PROMPT, "student int4", tmp_path)
    with pytest.raises(DataError, match="row u has no gold answer"):
        evaluate([student], {}, unanswered, [], PROMPT, "student int4", tmp_path)
    with pytest.raises(ModelError, match="no model to score is named 'student'"):
        evaluate([student], {}, answered, [], PROMPT, "student", tmp_path)
    with pytest.raises(ModelError, match="two lines of the scoreboard are named 'teacher'"):
        evaluate(
            [student.model_copy(update={"name": "teacher"})],
            {},
            answered,
            [],
            PROMPT,
            "teacher",
            tmp_path,
        )


def score_row(
    name: str, correct: int, rows: int = 450, **figures: float | Interval | Departure
) -> ScoreRow:
    return ScoreRow(
        name=name,
        kind="model",
        correct=correct,
        rows=rows,
        accuracy=correct / rows,
        interval=wilson_interval(correct, rows),
        **figures,
    )


def wide_rows() -> list[ScoreRow]:
    """Figures about as wide as they get."""
    worst: dict[str, Any] = {"versus_teacher": Interval(low=-0.149, high=0.101), "agreement": 0.956}
    speeds: dict[str, Any] = {
        "rows_per_second": 139.2,
        "p50_ms": 628.3,
        "p95_ms": 1441.3,
        "peak_mib": 12480.0,
    }
    return [
        score_row("TF-IDF + logistic regression", 260, **worst),
        score_row(
            "teacher",
            400,
            parameters=134_000_000,
            bytes=269_000_000,
            **{**speeds, "rows_per_second": 34.8},
        ),
        score_row("student int4", 380, parameters=67_000_000, bytes=53_600_000, **worst, **speeds),
    ]


def test_the_terminal_table_fits_and_cuts_nothing() -> None:
    text = render_table(wide_rows())
    assert max(map(len, text.splitlines())) <= 115
    assert "TF-IDF + logistic regression 0.578" in text
    assert "…" not in text
    for figure in (
        "0.844 [0.808, 0.875]",
        "[-14.9, +10.1]",
        "95.6 %",
        "67.0 M",
        "54 MB",
        "139.2",
        "1441.3",
        "12480",
    ):
        assert figure in text, figure


def test_the_headline_is_reckoned_from_the_rows() -> None:
    assert headline(wide_rows(), "student int4") == (
        "student int4 is right on 380 of 450 rows and keeps 95.0 % of the teacher's accuracy with "
        "50.0 % of its parameters, 20.0 % of its bfloat16 bytes (two a parameter), 4.0 times its "
        "rows a second; -4.4 points against the teacher, 95 % interval [-14.9, +10.1]."
    )
    bare = [score_row("teacher", 0), score_row("student", 3)]
    assert headline(bare, "student") == "student is right on 3 of 450 rows."
    apart = Departure(mean=0.01234, largest=0.4567, changed=7)
    assert headline([score_row("student", 3, departure=apart)], "student", "student") == (
        "student is right on 3 of 450 rows; its options' probabilities depart from the float "
        "student's by 0.0123 on average and 0.457 at most, 7 answers change."
    )
    near = headline(
        [score_row("student", 3, departure=apart.model_copy(update={"changed": 1}))],
        "student",
        "student",
    )
    assert near.endswith(", 1 answer changes.")


def test_speeds_of_a_busy_machine_are_marked(tmp_path: Path) -> None:
    baseline, teacher, student = wide_rows()

    def board(theirs: float | None, ours: float | None) -> list[ScoreRow]:
        slowed = [teacher.model_copy(update={"waited": theirs})]
        return [baseline, *slowed, student.model_copy(update={"waited": ours})]

    for theirs, ours in ((None, None), (0.09, 0.0)):
        assert "busy" not in headline(board(theirs, ours), "student int4")
        assert describe_waiting(board(theirs, ours)) == ""
    for theirs, ours, shares in (
        (0.31, 0.02, "teacher 31 %, student int4 2 %."),
        (None, 0.58, "student int4 58 %."),
    ):
        marked = ", 4.0 times its rows a second (measured on a busy machine); "
        assert marked in headline(board(theirs, ours), "student int4")
        assert describe_waiting(board(theirs, ours)).endswith(f" share of the time: {shares}")
    assert "waited" not in student.model_dump(), "so that reports look as those of before"
    kept = board(None, 0.58)[-1].model_dump_json()
    assert ScoreRow.model_validate_json(kept).waited == 0.58


def test_a_killed_parent_leaves_no_scorer(student: ModelToScore, tmp_path: Path) -> None:
    """The scorer ends because its parent does, not because it is done: it leaves no result."""
    rows = [
        Example(example_id=f"r{n}", question="Where is it?", choices=MOODS) for n in range(50_000)
    ]
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from distillery.evaluation.scoring import ModelToScore, score_model\n"
        "from distillery.recipe import PromptRecipe\n"
        "score_model(ModelToScore.model_validate_json(sys.argv[1]), Path(sys.argv[2]),"
        " PromptRecipe.model_validate_json(sys.argv[3]), threads=1)"
    )
    rows_file = write_examples(tmp_path / "rows.jsonl", rows)
    arguments = [student.model_dump_json(), str(rows_file), PROMPT.model_dump_json()]
    with subprocess.Popen([sys.executable, "-c", script, *arguments]) as parent:
        scorer = wait_for(lambda: next(iter(psutil.Process(parent.pid).children()), None))
        wait_for(lambda: has_loaded(scorer, "onnxruntime_genai"))
        _job, result, _parent = scorer.cmdline()[-3:]
        parent.kill()
    wait_for(lambda: ended(scorer))
    assert Path(result).parent.is_dir()
    assert not Path(result).exists()


def has_loaded(process: psutil.Process, library: str) -> bool:
    return any(library in mapped.path for mapped in process.memory_maps())


def ended(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def wait_for(found: Callable[[], Any]) -> Any:
    """Return what `found` returns once that is true; two minutes mean that it never will be."""
    deadline = time.monotonic() + 120
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def test_scoring_leaves_nothing_behind(student: ModelToScore, test_file: Path, home: Path) -> None:
    score_model(student, test_file, PROMPT, threads=1)
    assert os.listdir(home / "work") == []
