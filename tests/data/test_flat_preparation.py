"""Rows on disk, bucket by bucket, come out as rows in memory do, byte for byte."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets.arrow_dataset import Dataset
from plain_preparation import plainly_prepared
from random_data_sets import random_data_set
from row_files import write

from distillery.data import row_store
from distillery.data.prepare import check_rows, prepare
from distillery.data.row_store import RowStore, temporary_database
from distillery.data.rows import Row
from distillery.errors import DistilleryError, StoreError
from distillery.recipe import DatasetRecipe
from distillery.records import Example


def error_of(prepared: Callable[[], object]) -> str:
    """Return the error that is raised, or "" if there is none."""
    try:
        prepared()
    except DistilleryError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def outcome(seed: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Prepare a random data set in both ways, and return the error of both."""
    dataset, task, hub = random_data_set(seed)
    monkeypatch.setattr(
        "distillery.data.source.load_from_hub",
        lambda *_: {split: Dataset.from_list(rows) for split, rows in hub.items()},
    )
    expected: dict[str, str] = {}
    error = error_of(lambda: expected.update(plainly_prepared(dataset, task)))
    assert error_of(lambda: prepare(dataset, Path("out"), task)) == error
    if error:
        assert not Path("out").exists()
        return error
    written = {path.stem: path.read_text() for path in Path("out").glob("*.jsonl")}
    assert written == expected
    counts = {role: text.count("\n") for role, text in expected.items()}
    assert check_rows(dataset, task) == counts
    return ""


def outcomes(
    seeds: range, bucket: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    monkeypatch.setattr(row_store, "BUCKET_ROWS", bucket)
    found = []
    for seed in seeds:
        folder = tmp_path / f"{bucket}-{seed}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        found.append(outcome(seed, monkeypatch))
    return found


def test_rows_on_disk_come_out_as_rows_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = outcomes(range(40), 4, tmp_path, monkeypatch)
    assert found.count("") >= 20
    for error in ("may not stand in", "is that of", "no row is left for", "no column"):
        assert error in "".join(found)


def test_of_two_faults_that_of_the_earlier_step_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A correction of no row is told before a row that stands in two roles."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(row_store, "BUCKET_ROWS", 1)
    row = {"question": "Why?", "choices": ["yes", "no"], "answerKey": "A"}
    recipe = DatasetRecipe.model_validate(
        {
            "source": "files",
            "files": {"train": [write([row])], "test": [write([row], "test.jsonl")]},
            "splits": {"train": "train", "test": "test"},
        }
    )
    assert "may not stand in" in error_of(lambda: check_rows(recipe))
    name = write([row | {"question": "Where?", "answerKey": "B"}], "corrections.jsonl")
    recipe = recipe.model_copy(update={"corrections": (name,)})
    assert "no row of the source has this text" in error_of(lambda: check_rows(recipe))


@pytest.mark.slow
def test_so_do_many_more_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bucket in (1, 10, 1000):
        found = outcomes(range(1000 * bucket, 1000 * bucket + 150), bucket, tmp_path, monkeypatch)
        assert found.count("") >= 75


def test_a_full_disk_is_one_line() -> None:
    def fill() -> None:
        with temporary_database() as database:
            database.execute("PRAGMA max_page_count = 2")
            database.execute("CREATE TABLE texts (text TEXT)")
            database.execute("INSERT INTO texts VALUES (?)", ("x" * 100_000,))

    with pytest.raises(StoreError, match=r"^dataset: no room on disk .*SQLITE_TMPDIR"):
        fill()


BEYOND_ITS_QUOTA = """
import resource
from distillery.data.row_store import temporary_database
from distillery.errors import StoreError
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
try:
    with temporary_database() as database:
        database.execute("CREATE TABLE texts (text TEXT)")
        for _ in range(300):
            database.execute("INSERT INTO texts VALUES (?)", ("x" * 100_000,))
except StoreError as error:
    print(error)
"""


def test_a_quota_is_one_line_too() -> None:
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", BEYOND_ITS_QUOTA], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("dataset: no room on disk"), done.stdout + done.stderr


def test_a_file_whose_name_is_not_utf_8_is_told() -> None:
    row = Row("r\udce9.csv:1", Example(example_id="a", question="q", choices=()), "c", 0.5)
    with temporary_database() as database:
        store = RowStore(database)
        store.load("train", [row])
        (bucket,) = store.buckets(["train"])
    assert bucket["train"][0].where == "r\\udce9.csv:1"
