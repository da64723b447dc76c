"""The students of the benchmark of written answers, on a tiny random model."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import text_levels, text_rows
from benchmarks.text_levels import difference, run_levels, student_base
from distillery.models.load import load_model
from distillery.recipe import TrainingRecipe
from distillery.training.rows import RowFile

FACTS = {"test": 6, "validation": 2, "gold": 8, "pool": 8}
SENTENCE = "the bread is warm"


@pytest.fixture(autouse=True)
def tiny_e2e(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set of facts that all say the same, and models that learn it in seconds."""
    file = tmp_path / "data" / "e2e_nlg" / "train.csv"
    file.parent.mkdir(parents=True)
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["mr", "ref"])
        for number in range(24):
            writer.writerows([[f"name[baker {number}]", SENTENCE]] * 2)
    monkeypatch.setenv("TASKS_DATA", str(tmp_path / "data"))
    for name, count in FACTS.items():
        monkeypatch.setitem(text_rows.E2E_FACTS, name, count)
    quick = TrainingRecipe(method="lora", max_steps=40, batch_size=8, learning_rate=0.02)
    monkeypatch.setattr(text_levels, "base_model", lambda: tiny_model("llama"))
    monkeypatch.setattr(text_levels, "LAYERS", [0])
    monkeypatch.setattr(text_levels, "SEEDS", (0, 1))
    monkeypatch.setattr(text_levels, "TEACHER", quick)
    monkeypatch.setattr(text_levels, "STUDENT", quick)


def test_students_learn_one_teacher_s_answers_and_a_run_goes_on(tmp_path: Path) -> None:
    place = tmp_path / "levels"
    found = run_levels(place)
    assert found["teacher"] == {"bleu": 1.0, "rouge_l": 1.0}
    assert found["texts"]["bleu"] == found["probabilities"]["bleu"] == [1.0, 1.0]
    assert (found["gain"], found["by_seed"]) == (0.0, [0.0, 0.0])
    assert len(load_model(student_base(place))[0].get_decoder().layers) == 1
    rows = RowFile(place / "rows.jsonl")
    assert len(rows) == 8
    for row in rows:
        assert row.soft_tokens
        ids, logs = row.soft_tokens.arrays()
        # Each token of the answer, then the end of the turn, of which the teacher is sure.
        assert ids.shape == (len(row.target) + 1, text_levels.CANDIDATES)
        assert tuple(ids[:-1, 0]) == row.target
        assert logs[:, 0].min() > -0.5

    made = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    lost = place / "texts-1.json"
    lost.unlink()
    assert run_levels(place)["by_seed"] == [0.0, 0.0]
    now = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    assert {path for path in made if now[path] != made[path]} == {lost}
    assert json.loads(lost.read_text())["answers"] == [SENTENCE] * FACTS["test"]


def test_what_one_level_gains_is_counted_by_row_and_by_seed() -> None:
    right, wrong = [SENTENCE] * FACTS["test"], [*[SENTENCE] * 4, "no", None]
    found = difference([right, right], [right, wrong], "rouge_l")
    assert found["by_seed"] == [0.0, pytest.approx(1 / 3, abs=1e-4)]
    assert found["gain"] == pytest.approx(1 / 6, abs=1e-4)
    assert found["low"] < found["gain"] < found["high"]
    assert found["seeds_low"] < 0 < found["seeds_high"]
