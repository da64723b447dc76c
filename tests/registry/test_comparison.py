"""Two models side by side: by the answers that are registered with them, and by asking both."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from registered_student import provenance
from written_run import description

from distillery.errors import DataError, DistilleryError, RegistryError
from distillery.evaluation.preferences import Preference, Result, preference_figures
from distillery.evaluation.report import answer_rows
from distillery.evaluation.statistics import Pairs, difference_interval
from distillery.inference.onnx_student import OnnxStudent
from distillery.models.class_tokens import ClassTokens
from distillery.recipe import PromptRecipe
from distillery.records import Example, PreparedDataset, Split
from distillery.registry.comparison import Side, Subject, compare_models, compared, find_subject
from distillery.registry.comparison_table import render_comparison
from distillery.registry.local import LocalRegistry
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import sha256_of

pytestmark = pytest.mark.usefixtures("one_registry")

ROWS = 40


def examples(start: int = 0) -> list[Example]:
    return [
        Example(
            example_id=f"r{number}",
            question=f"question {number}",
            choices=("oven", "bridge"),
            answer_key="A",
        )
        for number in range(start, start + ROWS)
    ]


def registered(folder: Path, name: str, right: range, start: int = 0, **made: Any) -> str:
    """Register a student that is right on the rows whose numbers are in `right`."""
    content = folder / f"{name}-{right.start}-{start}"
    (content / "evaluation").mkdir(parents=True)
    (content / "genai_config.json").write_text("{}")
    rows = examples(start)
    letters = ["A" if int(row.example_id[1:]) in right else "B" for row in rows]
    lines = [json.dumps(line) + "\n" for line in answer_rows(rows, "int4", letters).values()]
    (content / "evaluation" / "answers.jsonl").write_text("".join(lines))
    LocalRegistry().register(content, name, {}, made)
    return name


def with_rows(folder: Path, **changes: Any) -> dict[str, Any]:
    """The record of a making whose test rows are in the store."""
    made = provenance(folder / "made")
    (folder / "data").mkdir()
    file = folder / "data" / "test.jsonl"
    file.write_text("".join(f"{row.model_dump_json()}\n" for row in examples()))
    split = Split(file=file.name, rows=ROWS, sha256=sha256_of(file))
    data = PreparedDataset(artifact=ArtifactStore().put(file.parent), splits={"test": split})
    return made | {"data": data.model_dump(mode="json")} | changes


def test_registered_models_are_compared_by_their_own_answers(tmp_path: Path) -> None:
    made = with_rows(tmp_path)
    first = registered(tmp_path, "large", range(30), **made)
    second = registered(tmp_path, "small", range(4, 30))
    found = compare_models(find_subject(first, "local"), find_subject(f"local:{second}:1", "local"))
    assert (found.rows, found.first.correct, found.second.correct) == (ROWS, 30, 26)
    assert found.difference == pytest.approx(0.1)
    assert found.interval == difference_interval(Pairs(26, 4, 0, 10))
    assert [flip.example_id for flip in found.flips] == ["r0", "r1", "r2", "r3"]
    assert found.flips[0].question == "question 0"
    # The labels of the train rows and of the test rows, and the student's 2.5 s.
    side = found.first
    assert (side.calls, side.cost, side.currency, side.labelled) == (8, 0.5, "EUR", 2)
    assert side.usage is not None
    assert side.usage.prompt_tokens == 2400
    assert side.training_minutes == pytest.approx(2.5 / 60)
    assert (found.second.calls, found.second.training_minutes) == (None, None)

    text = render_comparison(found, shown=1)
    assert "difference +10.0 points [-0.6, +20.7], p = 0.125, on 40 rows" in text
    assert "4 rows right in large version 1 and wrong in small version 1" in text
    assert "  r0  question 0\n    gold A oven; A oven against B bridge\n" in text
    assert "r1" not in text
    assert "0 rows right in small version 1" in text
    assert [line.split()[-1] for line in text.splitlines() if "paid" in line] == ["EUR"]
    assert [line.split()[-1] for line in text.splitlines() if "tokens in" in line] == ["2,400"]

    turned = compare_models(find_subject(second, "local"), find_subject(first, "local"))
    assert turned.difference == pytest.approx(-0.1)
    assert [flip.question for flip in turned.flips] == [""] * 4


def test_models_of_one_name_are_told_apart_by_their_registries(tmp_path: Path) -> None:
    ours = find_subject(registered(tmp_path, "mine", range(30)), "local")
    found = compare_models(ours._replace(registry="azureml"), ours)
    assert found.first.title == "azureml:mine version 1"
    assert found.second.title == "local:mine version 1"


def test_a_downloaded_folder_is_compared_like_its_version(tmp_path: Path) -> None:
    name = registered(tmp_path, "fetched", range(30))
    other = registered(tmp_path, "other", range(10, 40))
    folder = LocalRegistry().download(LocalRegistry().get(name), tmp_path / "down")
    found = compare_models(find_subject(str(folder), "local"), find_subject(other, "local"))
    assert (found.rows, found.difference, len(found.flips)) == (ROWS, 0, 20)
    assert found.first.title == str(folder)


def test_only_rows_of_both_count(tmp_path: Path) -> None:
    first = registered(tmp_path, "early", range(40))
    second = registered(tmp_path, "late", range(40), start=30)
    third = registered(tmp_path, "later", range(40), start=60)
    found = compare_models(find_subject(first, "local"), find_subject(second, "local"))
    assert (found.rows, found.first.accuracy) == (10, 1)
    with pytest.raises(DataError, match="early version 1 and later version 1 have answered no row"):
        compare_models(find_subject(first, "local"), find_subject(third, "local"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("azureml:a:b:c", "azureml:a:b:c: neither a folder with genai_config.json nor a model"),
        ("nobody", "nobody: no such model"),
        ("a:", "neither a folder"),
    ],
)
def test_a_model_that_is_not_there(name: str, words: str) -> None:
    with pytest.raises(RegistryError, match=words):
        find_subject(name, "local")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_folders_are_asked_the_rows_of_a_file(
    tiny_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    folders = [tiny_onnx("llama"), tiny_onnx("qwen2")]
    ours, theirs = (find_subject(str(folder), "local") for folder in folders)
    with pytest.raises(DataError, match=r"holds no answers to test rows; name rows .* --rows"):
        compare_models(ours, theirs)
    rows = []
    for number in range(8):
        options = ["oven", "river", "cloud"]
        row = {"id": f"r{number}", "question": f"Where is {number}?", "choices": options}
        rows.append(row | {"answerKey": "ABC"[number % 3]})
    file = write_rows(tmp_path / "rows.jsonl", rows)
    found = compare_models(ours, theirs, file)
    for folder, side in zip(folders, (found.first, found.second), strict=True):
        student, correct = OnnxStudent(folder), 0
        for row in rows:
            example = Example(
                example_id="r", question=row["question"], choices=tuple(row["choices"])
            )
            correct += student.answer(example, PromptRecipe()).letter == row["answerKey"]
        assert side.correct == correct
        assert side.rows_per_second is not None
        assert side.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert found.first.correct - found.second.correct == round(8 * found.difference)
    for each in found.flips:
        assert each.options == {"A": "oven", "B": "river", "C": "cloud"}
    for bad, words in (
        ([*rows, rows[0]], "rows.jsonl:9: r0 comes twice"),
        ([], "without a single row"),
        ([{**rows[0], "answerKey": ""}], "rows.jsonl:1: answerKey: empty"),
    ):
        with pytest.raises(DistilleryError, match=words):
            compare_models(ours, theirs, write_rows(file, bad))


def test_of_several_models_in_a_folder_the_highest_is_asked(
    tiny_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "around"
    shutil.copytree(tiny_onnx("llama"), folder / "model")
    (folder / "backup" / "earlier").mkdir(parents=True)
    (folder / "backup" / "earlier" / "genai_config.json").write_text("{}")
    ours = find_subject(str(folder / "model"), "local")
    row = {"question": "Where?", "choices": ["oven", "river"], "answerKey": "A"}
    file = write_rows(tmp_path / "rows.jsonl", [row])
    around = ours._replace(title="around", fetch=lambda _scratch: folder)
    assert compare_models(around, ours, file).difference == 0


def test_classifiers_need_their_prompt(tiny_onnx: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "classifier"
    shutil.copytree(tiny_onnx("llama"), folder)
    ClassTokens(classes=("bread", "river"), tokens=(301, 305)).write(folder)
    prompt = PromptRecipe(system="{labels}", user="{text}", answer="class")
    LocalRegistry().register(folder, "classes", {}, {"prompt": prompt.model_dump(mode="json")})
    rows = [{"text": f"a loaf {number}", "label": "bread"} for number in range(5)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    ours = find_subject("classes", "local")
    found = compare_models(ours, ours, file)
    assert (found.rows, found.difference, found.flips) == (5, 0, ())
    with pytest.raises(DataError, match=r"no manifest\.json tells the prompt of this classifier"):
        compare_models(ours, find_subject(str(folder), "local"), file)


def test_the_command_prints_a_table_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from distillery.commands.models import compare_models as command

    one, two = (registered(tmp_path, name, range(20)) for name in ("one", "two"))
    command(one, two)
    lines = capsys.readouterr().out.splitlines()
    (accuracy,) = [line for line in lines if line.startswith("accuracy [95 %]")]
    assert accuracy.count("0.500 [0.352, 0.648]") == 2
    command(one, two, as_json=True)
    sides = json.loads(capsys.readouterr().out)
    assert Side.model_validate(sides["second"]).title == "two version 1"
    command(one, two, picture=tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_written_answers_are_compared_by_their_metric() -> None:
    """A row is right for either gold answer; its flip names the one that was given."""
    rows = [description(number) for number in range(30)]
    golds = [row.answer_key for row in rows]
    others = [row.references[0] for row in rows]
    subjects = [Subject(title, {}, None, Path) for title in ("old", "new")]
    given: tuple[list[str | None], ...] = ([None, *golds[1:]], [*others[:29], "no"])
    outcomes: list[Result] = ["win", "tie", "tie", "loss"]
    preferences = preference_figures(
        "wise",
        [Preference(example_id=str(row), outcome=each) for row, each in enumerate(outcomes)],
    )
    first_side, second_side = (
        (subject, answer_rows(rows, subject.title, answers), {"preferences": preferences})
        for subject, answers in zip(subjects, given, strict=True)
    )
    found = compared(first_side, second_side, {row.example_id: row for row in rows})
    assert (found.metric, found.p_value, found.rows) == ("rouge_l", None, 30)
    assert (found.first.correct, found.second.correct) == (29, 29)
    assert found.first.accuracy == pytest.approx(29 / 30)
    assert found.interval.low < 0 < found.interval.high
    first, last = found.flips
    assert (first.gold, first.first, first.second) == (others[0], None, others[0])
    assert (last.gold, last.first, last.second) == (golds[29], golds[29], "no")
    text = render_comparison(found, shown=2)
    assert "ROUGE-L [95 %]" in text
    (line,) = [line for line in text.splitlines() if line.startswith("win rate against its")]
    assert line.count("0.500 [") == line.count("], wise") == 2
    assert "p = " not in text
    assert "accuracy" not in text
