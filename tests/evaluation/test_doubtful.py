"""Labels that may be wrong: which are found, and the file to correct is read back as it was."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from distillery.data.prepare import select_rows
from distillery.evaluation.doubtful import Doubtful, doubtful_rows, to_cells, write_doubtful
from distillery.evaluation.linear_probe import TextStates, cross_validated
from distillery.progress import shown_by
from distillery.recipe import Columns, DatasetRecipe, PromptRecipe, TaskRecipe
from distillery.records import Example

CLASSES = ("-1", "billing", "line")
HOSTILE = ("=1+1", "+1", "-1+cmd", "@SUM(A1)", 'a, "b"\nc', "＝1+1", "plain")


def text_row(number: int, label: str | None, text: str = "") -> Example:
    return Example(
        example_id=f"r{number}",
        question=text or f"text {number}",
        answer_key=label,
        classes=CLASSES,
    )


def sure(label: str, share: float) -> tuple[float, ...]:
    """Probabilities of the classes."""
    return tuple(share if name == label else (1 - share) / 2 for name in CLASSES)


def test_confident_contradictions_are_found_and_unsure_ones_are_not() -> None:
    rows = [text_row(number, CLASSES[number % 3]) for number in range(30)]
    shares = [sure(str(row.answer_key), 0.8) for row in rows]
    shares[3] = sure("billing", 0.95)  # labelled -1
    shares[6] = sure("line", 0.5)  # another answer, less sure than the others of line
    teacher: list[tuple[float, ...] | None] = [*shares]
    teacher[3] = sure("line", 0.97)
    teacher[4] = sure("line", 0.99)
    teacher[5] = None
    found = doubtful_rows("gold", rows, {"student": shares, "teacher": teacher})
    assert [(row.example.example_id, row.suggested, row.contradicted_by) for row in found] == [
        ("r3", "line", ["student", "teacher"]),
        ("r4", "line", ["teacher"]),
    ]
    assert (found[0].confidence, found[0].label_confidence) == (0.97, 0.015)
    assert found[0].opinions["student"].answer == "billing"
    assert doubtful_rows("gold", rows, {"student": [None] * 30}) == []


def test_a_predictor_near_chance_doubts_nothing() -> None:
    rows = [text_row(number, CLASSES[number % 3]) for number in range(30)]
    shares = [sure(str(row.answer_key), 0.8) for row in rows]
    for number in range(14):
        shares[number] = sure(CLASSES[(number + 1) % 3], 0.9)
    assert len(doubtful_rows("gold", rows, {"probe": shares})) == 14
    for number in range(14, 20):
        shares[number] = sure(CLASSES[(number + 1) % 3], 0.9)
    assert doubtful_rows("gold", rows, {"probe": shares}) == []


def test_options_may_differ_in_number() -> None:
    rows, shares = [], []
    for number in range(20):
        options = ("yes", "no", "maybe")[: 2 + number % 2]
        rows.append(Example(example_id=str(number), question="?", choices=options, answer_key="A"))
        shares.append((0.9, 0.1, 0.0)[: len(options)])
    for number in (2, 3):
        rows[number] = rows[number].model_copy(update={"answer_key": "B"})
        shares[number] = (0.1, 0.9, 0.0)[: len(rows[number].choices)]
    rows[1] = rows[1].model_copy(update={"answer_key": "C"})
    (found,) = doubtful_rows("test", rows, {"student": shares}, {"teacher": ["B"] * 20})
    assert (found.example.example_id, found.suggested) == ("1", "A")
    assert (found.text_of("A"), found.opinions["teacher"].answer) == ("yes", "B")


def doubted(example: Example, suggested: str, confidence: float = 0.9) -> Doubtful:
    return Doubtful(
        example=example,
        split="gold",
        suggested=suggested,
        confidence=confidence,
        label_confidence=1 - confidence,
        opinions={},
    )


@pytest.mark.parametrize("choices", [None, "options"])
def test_a_corrected_file_is_read_back_as_the_rows_were(
    choices: str | None, tmp_path: Path
) -> None:
    columns = Columns(id="key", question=None, choices=choices, answer="confidence")
    rows = []
    for number, text in enumerate(HOSTILE):
        example = text_row(number, CLASSES[number % 3], text)
        fields = {"title": text, "body": "" if number else "more"}
        question = "\n".join(filter(None, fields.values()))
        rows.append(example.model_copy(update={"fields": fields, "question": question}))
    write_doubtful(tmp_path, [doubted(row, "-1") for row in rows], columns, ("title", "body"))
    file = tmp_path / "doubtful.csv"
    with file.open(encoding="utf-8-sig", newline="") as lines:
        cells = [cell for line in csv.reader(lines) for cell in line]
    named = ["key", "title", "body", *([choices] if choices else []), "confidence", "suggested"]
    assert cells[: len(named)] == named
    assert "confidence_" in cells
    assert not [cell for cell in cells if cell.startswith(tuple("=+-@＝"))]
    recipe = DatasetRecipe(
        source="files",
        files={"train": (str(file),)},
        splits={"train": "train"},
        columns=columns,
        fields=("title", "body"),
    )
    task = TaskRecipe(kind="classify", labels=CLASSES)
    with select_rows(recipe, task) as selected:
        prepared = list(selected.lines("train"))
    # The classes stand beside the rows.
    shared = {"classes": CLASSES}
    again = [Example.model_validate_json(line).model_copy(update=shared) for line in prepared]
    assert sorted(again, key=lambda row: row.example_id) == rows


def test_a_row_of_choices_is_read_back_too(tmp_path: Path) -> None:
    rows = []
    for number, concept in enumerate(("", "bread")):
        rows.append(
            Example(
                example_id=f"r{number}",
                question=f"=where {number}",
                concept=concept,
                choices=("an oven", "a\n=river"),
                answer_key="B",
            )
        )
    write_doubtful(tmp_path, [doubted(row, "A") for row in rows], Columns(), ())
    recipe = DatasetRecipe(
        source="files",
        files={"train": (str(tmp_path / "doubtful.csv"),)},
        splits={"train": "train"},
    )
    with select_rows(recipe) as selected:
        again = list(map(Example.model_validate_json, selected.lines("train")))
    assert sorted(again, key=lambda row: row.example_id) == rows


def test_the_most_contradicted_come_first_and_no_row_leaves_no_file(tmp_path: Path) -> None:
    rows = [doubted(text_row(n, "line"), "billing", share) for n, share in enumerate((0.7, 0.9))]
    write_doubtful(tmp_path, rows, Columns(question="text", choices=None, answer="label"), ())
    lines = (tmp_path / "doubtful.csv").read_text(encoding="utf-8-sig").splitlines()
    assert lines[1] == "r1,text 1,line,billing,0.900,gold,"
    (tmp_path / "none").mkdir()
    write_doubtful(tmp_path / "none", [], Columns(), ())
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["doubtful.jsonl"]


def test_ids_have_a_column_where_the_recipe_names_none() -> None:
    cells = to_cells(
        doubted(text_row(1, "line"), "-1"), Columns(id=None, question="text", choices=None), ()
    )
    assert cells["id"] == "r1"


def test_cross_validated_probabilities_are_not_of_rows_that_were_learnt(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of labels that mean nothing, a probe knows those that it has learnt and no others."""
    monkeypatch.setattr("distillery.training.probing.REGULARISATION", (1e4, 1e4))
    rows, shown = [], []
    for number in range(40):
        rows.append(text_row(number, ("billing", "line")[number * 7 % 5 % 2], f"{number:08b}"))
    rows.append(text_row(40, "-1"))
    rows.append(text_row(41, None))
    prompt = PromptRecipe(system="", user="{text}", answer="class")
    with shown_by(lambda *told: shown.append(told)):
        shares = cross_validated(TextStates(tiny_model("llama"), False), rows, prompt)
    assert shown == [
        *((done, 40, "reading for a linear probe") for done in (0, 16, 32)),
        *((done, 80, "fitting a linear probe") for done in (0, 40)),
    ]
    assert shares[40:] == [None, None]
    right = 0
    for row, share in zip(rows[:40], shares, strict=False):
        assert share is not None
        assert len(share) == 3
        assert sum(share) == pytest.approx(1)
        right += row.keys[share.index(max(share))] == row.answer_key
    assert right < 32
