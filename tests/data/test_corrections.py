"""Corrected labels replace those of the source, and nothing else of it."""

from pathlib import Path
from typing import Any

import pytest

from distillery.data.prepare import check_rows, select_rows
from distillery.data.source import source_identity
from distillery.errors import DataError
from distillery.evaluation.doubtful import Doubtful, write_doubtful
from distillery.recipe import Columns, DatasetRecipe, TaskRecipe
from distillery.records import Example

COLUMNS = Columns(question="text", choices=None, answer="label")
CLASSES = ("billing", "line")


def recipe_of(folder: Path, corrections: str = "", **further: Any) -> DatasetRecipe:
    """Return a recipe of twelve rows without ids, half of them billing; `corrections` is the CSV
    file to correct them."""
    rows = [f"=text {number},{CLASSES[number % 2]}" for number in range(12)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows, "no label,"]) + "\n")
    values: dict[str, Any] = {
        "source": "files",
        "files": {"train": (str(folder / "rows.csv"),)},
        "splits": {"train": "train"},
        "columns": COLUMNS,
        "carve": {"gold": 0.5, "test": 0.5},
    }
    if corrections:
        (folder / "corrections.csv").write_text(corrections)
        values["corrections"] = (str(folder / "corrections.csv"),)
    return DatasetRecipe.model_validate(values | further)


def labels_of(recipe: DatasetRecipe) -> dict[str, dict[str, str | None]]:
    """Return the label of each text by role."""
    found: dict[str, dict[str, str | None]] = {}
    with select_rows(recipe, TaskRecipe(kind="classify")) as selected:
        for role in selected.counts:
            rows = map(Example.model_validate_json, selected.lines(role))
            found[role] = {row.question: row.answer_key for row in rows}
    return found


def test_a_corrected_file_changes_its_labels_and_moves_no_row(tmp_path: Path) -> None:
    before = labels_of(recipe_of(tmp_path))
    first, second = next(iter(before["gold"])), next(iter(before["test"]))
    doubtful = []
    for text in (first, second):
        label = before["gold"].get(text) or before["test"].get(text)
        right = CLASSES[1 - CLASSES.index(str(label))]
        example = Example(example_id=text, question=text, answer_key=right, classes=CLASSES)
        doubtful.append(
            Doubtful(
                example=example,
                split="gold",
                suggested="line",
                confidence=1,
                label_confidence=0,
                opinions={},
            )
        )
    write_doubtful(tmp_path, doubtful, COLUMNS, ())
    after = labels_of(recipe_of(tmp_path, corrections=(tmp_path / "doubtful.csv").read_text()))
    for row in doubtful:
        role = "gold" if row.example.question in before["gold"] else "test"
        before[role][row.example.question] = row.example.answer_key
    assert after == before


@pytest.mark.parametrize(
    ("corrections", "said"),
    [
        ("text,label\nelsewhere,line\n", "no row of the source has this text"),
        ("text,label\n=text 1,line\n=text 1,billing\n", "csv:3: another answer than .*csv:2"),
        ("text,label\n=text 1,\n", "label: empty"),
        ("text,topic\n=text 1,line\n", "no column 'label'"),
    ],
)
def test_what_corrects_nothing_is_refused(tmp_path: Path, corrections: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        labels_of(recipe_of(tmp_path, corrections=corrections))


def test_options_in_another_order_are_another_row(tmp_path: Path) -> None:
    options = '["yes", "no"]'.replace('"', '""')
    (tmp_path / "rows.csv").write_text(f'question,choices,answerKey\nq,"{options}",A\n')
    for written, answer in (('["yes", "no"]', "B"), ('["no", "yes"]', None)):
        cell = written.replace('"', '""')
        (tmp_path / "right.csv").write_text(f'question,choices,answerKey\nq,"{cell}",B\n')
        recipe = DatasetRecipe(
            source="files",
            files={"train": (str(tmp_path / "rows.csv"),)},
            splits={"train": "train"},
            corrections=(str(tmp_path / "right.csv"),),
        )
        if answer is None:
            with pytest.raises(DataError, match="and these options"):
                check_rows(recipe)
        else:
            with select_rows(recipe) as selected:
                (line,) = selected.lines("train")
            assert Example.model_validate_json(line).answer_key == answer


def test_the_sources_identity_covers_corrections_by_content(tmp_path: Path) -> None:
    plain = recipe_of(tmp_path)
    one = recipe_of(tmp_path, corrections="text,label\n=text 1,line\n")
    identities = [source_identity(plain), source_identity(one)]
    (tmp_path / "corrections.csv").write_text("text,label\n=text 1,billing\n")
    identities.append(source_identity(one))
    assert len(set(identities)) == 3
    assert plain.content_id == one.content_id
    (tmp_path / "corrections.csv").unlink()
    with pytest.raises(DataError, match=r"corrections\.csv: no such file; correct dataset.corr"):
        source_identity(one)
