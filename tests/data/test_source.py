"""Files of rows that a folder or a pattern names."""

import re
from pathlib import Path

import pytest
from chat_endpoint import ChatEndpoint, Reply

from distillery.data.source import open_source, source_identity
from distillery.errors import DataError
from distillery.recipe import DatasetRecipe

ROW = '{"question": "Where?", "choices": ["x", "y"]}\n'


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ROW)


def of_train(*paths: Path | str) -> DatasetRecipe:
    return DatasetRecipe(source="files", files={"pool": tuple(map(str, paths))})


def read(recipe: DatasetRecipe) -> list[str]:
    return [Path(table.name).name for table in open_source(recipe)["pool"]()]


def test_a_folder_and_a_pattern_stand_for_their_files(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", "a.jsonl", ".hidden.jsonl", "notes.txt", "below/c.jsonl")
    assert read(of_train(tmp_path)) == ["a.jsonl", "b.jsonl"]
    assert read(of_train(tmp_path / "*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert read(of_train(tmp_path / "**/*.jsonl")) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert read(of_train(tmp_path / "b.*", tmp_path)) == ["b.jsonl", "a.jsonl"], "each once"


def test_names_with_the_signs_of_a_pattern_are_names(tmp_path: Path) -> None:
    write(tmp_path / "[1]", "rows[2].jsonl", "rows2.jsonl")
    assert read(of_train(tmp_path / "[1]" / "rows[2].jsonl")) == ["rows[2].jsonl"]
    assert read(of_train(tmp_path / "[1]")) == ["rows2.jsonl", "rows[2].jsonl"]


def test_a_new_file_is_seen_and_a_pattern_alone_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "b.jsonl")
    named = source_identity(of_train(tmp_path / "a.jsonl", tmp_path / "b.jsonl"))
    assert source_identity(of_train(tmp_path)) == named
    assert source_identity(of_train(tmp_path / "?.jsonl")) == named
    write(tmp_path, "c.jsonl")
    assert source_identity(of_train(tmp_path)) != named


def test_a_revision_of_the_hub_that_moves_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = ["e" * 40]
    dataset = DatasetRecipe(source="hub", name="a/d")
    with ChatEndpoint(lambda _call: Reply({"id": "a/d", "sha": newest[-1]})) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        assert source_identity(dataset) == source_identity(dataset) == f"a/d@{'e' * 40}"
        newest.append("f" * 40)
        assert source_identity(dataset) == f"a/d@{'f' * 40}"
        assert source_identity(dataset.model_copy(update={"revision": "e" * 40})).endswith("e")


@pytest.mark.parametrize(
    ("path", "told"),
    [("empty", "a folder without .jsonl, .csv, .parquet files"), ("*.csv", "no file matches")],
)
def test_nothing_found_is_said(path: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    recipe = of_train(tmp_path / path)
    line = re.escape(f"{tmp_path / path}: {told}; correct dataset.files.pool")
    with pytest.raises(DataError, match=f"^{line}$"):
        source_identity(recipe)


@pytest.mark.parametrize(
    ("path", "title"),
    [
        ("rows.csv", "rows"),
        ("week/", "week"),
        ("week/*.csv", "week"),
        ("week/**/[ab].csv", "week"),
        ("*.csv", "files"),
    ],
)
def test_a_run_is_named_by_the_folder_of_a_pattern(path: str, title: str) -> None:
    assert of_train(path).title == title
