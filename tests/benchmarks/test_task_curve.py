"""The learning curve of an endpoint's labels: its teacher, its rows and its recipes."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from label_runs import read_lines

from benchmarks import task_curve, task_rows
from benchmarks.noisy_teacher import RIGHT, NoisyTeacher
from benchmarks.slow_endpoint import serving
from benchmarks.task_curve import (
    SHARES,
    nested_subsets,
    point_recipe,
    run_curves,
    summary,
    write_task,
)
from distillery.errors import TeacherError
from distillery.labels.files import LabelCounts
from distillery.labels.labelling import label
from distillery.labels.store import LabelStore
from distillery.recipe import AnswerRecipe, TeacherRecipe
from distillery.recipe.load import parse_recipe
from distillery.records import Example
from distillery.teacher.endpoint import Endpoint
from distillery.teacher.options import answer_schema

CLASSES = ("bus", "car", "plane", "train")
ROWS = [(f"text {number}", CLASSES[number % len(CLASSES)]) for number in range(400)]


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> str:
    """A task whose rows are ROWS."""
    monkeypatch.setitem(task_rows.FULL, "rides", lambda: ROWS)
    return "rides"


def texts_of(path: str) -> list[str]:
    with open(path, encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def test_a_larger_share_holds_the_smaller_ones() -> None:
    subsets = nested_subsets(ROWS)
    assert {share: len(rows) for share, rows in subsets.items()} == {10: 40, 30: 120, 100: 400}
    assert subsets[10] == subsets[30][:40]
    assert subsets[30] == subsets[100][:120]
    assert sorted(subsets[100]) == sorted(ROWS)
    assert subsets[10] != ROWS[:40]
    assert nested_subsets(ROWS) == subsets


def test_the_probabilities_are_calibrated() -> None:
    rows = {f"text {number}": CLASSES[number % len(CLASSES)] for number in range(8000)}
    teacher = NoisyTeacher(rows)
    sure: dict[int, list[tuple[float, bool]]] = {}
    for text, gold in rows.items():
        found = teacher.probabilities(text)
        assert sorted(found) == list(CLASSES)
        assert sum(found.values()) == pytest.approx(1)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        for rank, (name, share) in enumerate(found.items()):
            sure.setdefault(rank, []).append((share, name == gold))
    # The standard error is 0.004 at most.
    for pairs in sure.values():
        stated = sum(share for share, _ in pairs) / len(pairs)
        assert sum(right for _, right in pairs) / len(pairs) == pytest.approx(stated, abs=0.015)
    assert sum(share for share, _ in sure[0]) / len(rows) == pytest.approx(RIGHT, abs=0.01)
    for low in (0.5, 0.7, 0.9):
        within = [pair for pair in sure[0] if low <= pair[0] < low + 0.1]
        stated = sum(share for share, _ in within) / len(within)
        assert sum(right for _, right in within) / len(within) == pytest.approx(stated, abs=0.06)


@pytest.fixture
def paths(task: str, tmp_path: Path) -> dict[str, str]:
    """The files of the task, and beside them the teacher's answers.json."""
    return write_task(task, tmp_path, small=True)


@pytest.fixture
def url(paths: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """The URL of the teacher, in a process of its own."""
    assert paths
    with serving("benchmarks.noisy_teacher", str(tmp_path / "answers.json")) as address:
        yield address


async def labelled(
    url: str, paths: dict[str, str], texts: list[str], out: Path, form: str = "letter"
) -> LabelCounts:
    """Label the texts as the recipe of the last point says, with this form of the answer."""
    values = point_recipe("rides", 100, paths, small=True)
    values["teacher"]["answers"] = {"form": form}
    recipe = parse_recipe(values, "rides")
    rows = [Example(example_id=text, question=text, classes=CLASSES) for text in texts]
    with LabelStore(f"sqlite:///{out}.db") as store:
        endpoint = Endpoint(url, "noisy-teacher", None, "noisy-teacher", "openai")
        return await label(rows, recipe.prompt, recipe.teacher, endpoint, store, out)


@pytest.mark.parametrize("form", ["letter", "json"])
async def test_its_answers_become_soft_labels(
    form: str, url: str, paths: dict[str, str], tmp_path: Path
) -> None:
    texts = texts_of(paths["pool-100"])
    counts = await labelled(url, paths, texts, tmp_path / "labels", form)
    assert (counts.accepted, counts.rejected) == (60, 0)
    answers = json.loads((tmp_path / "answers.json").read_text())
    teacher = NoisyTeacher(answers)
    right = 0
    for line in read_lines(tmp_path / "labels" / "labels.jsonl"):
        expected = teacher.probabilities(line["example_id"])
        assert line["distribution"] == pytest.approx(expected)
        assert line["answer"] == max(expected, key=lambda name: expected[name])
        right += line["answer"] == answers[line["example_id"]]
    assert 40 <= right < 60


def test_an_answer_has_the_form_of_its_schema() -> None:
    teacher = NoisyTeacher(dict(ROWS))
    asked = {"messages": [{"role": "user", "content": "text 0"}]}
    schema = {"response_format": answer_schema(CLASSES)}
    found = []
    for body in (asked, asked | schema):
        head, _, answer = teacher.answer(json.dumps(body).encode()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        found.append(json.loads(answer)["choices"][0]["message"]["content"])
    name = next(iter(teacher.probabilities("text 0")))
    assert found[0] == name
    assert json.loads(found[1]) == {"answer": name}


async def test_a_text_that_the_teacher_does_not_know_ends_labelling(
    url: str, paths: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(TeacherError, match="no gold class of the text 'never seen'"):
        await labelled(url, paths, ["never seen"], tmp_path / "labels")


def test_the_teacher_knows_every_text_that_is_asked(paths: dict[str, str], tmp_path: Path) -> None:
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert len(texts_of(paths["test"])) == 30
    assert [len(texts_of(paths[f"pool-{share}"])) for share in SHARES if share] == [6, 18, 60]
    for name in ("pool-100", "validation", "test"):
        for text in texts_of(paths[name]):
            assert answers[text] == dict(ROWS)[text]
    with open(paths["pool-100"], encoding="utf-8", newline="") as file:
        assert {row["label"] for row in csv.DictReader(file)} == {""}


def test_the_recipes_differ_in_what_the_student_learns_from(
    task: str, paths: dict[str, str]
) -> None:
    recipes = {
        share: parse_recipe(point_recipe(task, share, paths, small=False), task) for share in SHARES
    }
    gold = recipes[0]
    assert gold.teacher.kind == "gold"
    assert (gold.dataset.splits["train"], "gold" in gold.dataset.splits) == ("gold", False)
    assert not gold.student.gold
    for share in (10, 30, 100):
        recipe = recipes[share]
        assert recipe.teacher == TeacherRecipe(
            kind="endpoint",
            soft_labels=True,
            answers=AnswerRecipe(form="json"),
            max_tokens=64,
        )
        assert recipe.dataset.splits["train"] == f"pool-{share}"
        assert recipe.student.gold
        assert recipe.student.training.soft_share > 0
        assert recipe.prompt == recipes[0].prompt
    assert len({recipe.registry.model_name for recipe in recipes.values()}) == len(SHARES)


def test_the_last_line(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def run(name: str, recipe: dict[str, Any], work: Path, settings: dict[str, str]) -> Any:
        asked.append(settings["TEACHER_MODEL_ENDPOINT"])
        if name == "moods-endpoint-10":
            return {"failed": "error: no memory"}
        share = int(name.rpartition("-")[2])
        accuracy = (900 + share / 2) / 1000
        return {
            "rows": {"gold": 80, "train": share or 80},
            "tfidf_all": 0.8,
            "teacher": 0.85,
            "student": accuracy,
            "shipped": accuracy,
            "form": "int8",
            "passed": share == 100,
            "minutes": 1.0,
        }

    monkeypatch.setattr(task_curve, "run_in_a_process", run)
    monkeypatch.setattr(task_curve, "WORK", tmp_path / "bench-tasks")
    monkeypatch.setitem(task_rows.FULL, "moods", lambda: ROWS)
    run_curves([task, "moods"], small=True)
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found.pop("minutes") >= 0
    assert found == {
        "tasks": 1,
        "points": 7,
        "failed": 1,
        "gain_over_gold": {"rides": 5.0},
        "shipped": {"rides": 0.95},
        "passed": 1,
    }
    points = [json.loads(line) for line in lines[:8]]
    assert (points[0]["gold"], points[0]["labelled"], points[0]["teacher"]) == (80, 0, None)
    assert (points[3]["gold"], points[3]["labelled"], points[3]["teacher"]) == (80, 100, 0.85)
    assert points[5] == {"task": "moods", "share": 10, "failed": "error: no memory"}
    assert "| rides | 100 | 0.800 | 0.850 | 0.950 | 0.950 |" in lines
    assert len(set(asked)) == 2, "each task has a teacher of its own"
    assert summary([], 0.0)["tasks"] == 0
