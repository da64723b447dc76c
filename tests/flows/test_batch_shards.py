"""Batch inference in this process: few rows as before, more of them in shards with the same
files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from sharded_rows import STUDENT, contents, write_rows

from distillery.errors import DataError, StoreError
from distillery.inference import shards as sharded
from distillery.inference.shards import AnswersManifest
from distillery.recipe import PromptRecipe, Recipe
from distillery.records import Predictions
from distillery.registry.local import LocalRegistry
from distillery.storage.artifacts import ArtifactStore
from flows.batch_inference import batch_inference, main
from tasks import inference
from tasks.results import results_in_store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_api", "own_registry")]

ROWS = 40


@pytest.fixture
def rows(tmp_path: Path, tiny_onnx: Callable[..., Path]) -> Path:
    """A file of rows, for a student that is registered."""
    prompt = PromptRecipe().model_dump(mode="json")
    made = {"prompt": prompt, "recipe": Recipe().model_dump(mode="json")}
    LocalRegistry().register(tiny_onnx("llama"), STUDENT, {}, made)
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each shard that is answered."""
    found: list[int] = []
    answer = sharded.answer_shard

    def counted(student: Any, shard: Any, *arguments: Any) -> Any:
        found.append(shard.rows)
        return answer(student, shard, *arguments)

    monkeypatch.setattr(sharded, "answer_shard", counted)
    return found


def run(rows: Path | str, out: Path | str, **settings: Any) -> Predictions:
    with results_in_store():
        done: Predictions = batch_inference(STUDENT, str(rows), str(out), "1", **settings)
        return done


def test_few_rows_are_one_piece_of_work(rows: Path, answered: list[int], tmp_path: Path) -> None:
    done = run(rows, tmp_path / "out", shard_rows=ROWS)
    assert (done.rows, done.failed, answered) == (ROWS - 1, 1, [])
    assert contents(tmp_path / "out") == contents(ArtifactStore().fetch(done.artifact))
    assert {*contents(tmp_path / "out")} == {"predictions.jsonl", "failed.jsonl"}
    # What is cached so stays a hit when the rows are more than a shard.
    again = run(rows, tmp_path / "again", shard_rows=4)
    assert (again.artifact, answered) == (done.artifact, [])


def test_shards_give_the_same_files_and_are_answered_once(
    rows: Path, answered: list[int], tmp_path: Path
) -> None:
    done = run(rows, tmp_path / "out", shard_rows=16)
    assert (done.rows, done.failed, answered) == (ROWS - 1, 1, [16, 16, 8])
    run(rows, tmp_path / "whole", shard_rows=ROWS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    # The last shard alone is another one.
    with rows.open("a") as file:
        file.write(json.dumps(json.loads(rows.read_text().splitlines()[0]) | {"id": "x"}) + "\n")
    run(rows, tmp_path / "more", shard_rows=16)
    assert answered == [16, 16, 8, 9]


@pytest.mark.parametrize("settings", [{}, {"form": "parquet"}, {"shard_rows": ROWS}])
def test_answers_go_to_any_address(rows: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"shard_rows": 16, **settings}
    run(rows, tmp_path / "out", **settings)
    url = f"memory://{tmp_path.name}/out"
    run(rows, url, **settings)
    memory = fsspec.filesystem("memory")
    found = {name.rpartition("/")[2]: memory.cat_file(name) for name in memory.find(url)}
    assert found == contents(tmp_path / "out")
    memory.rm(f"/{tmp_path.name}", recursive=True)


def test_the_command_takes_an_address(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"memory://user:secret@{tmp_path.name}/out"
    assert main([STUDENT, str(rows), out, "--version", "1"]) == 0
    memory = fsspec.filesystem("memory")
    assert len(memory.cat_file(f"{out}/predictions.jsonl").splitlines()) == ROWS - 1
    told = capsys.readouterr().out
    assert f"39 rows answered in memory://user:…@{tmp_path.name}/out/predictions.jsonl" in told
    memory.store.clear()


def test_no_row_is_answered_where_the_answers_can_not_be_written(
    rows: Path, answered: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_arguments: Any, **_options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuses)
    with pytest.raises(StoreError, match=r"^output memory://closed/out: not writable"):
        run(rows, "memory://closed/out", shard_rows=16)
    assert answered == []
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^output .*/file: can't be written"):
        run(rows, tmp_path / "file", shard_rows=ROWS)


def test_a_file_is_fetched_once(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    open_address = inference.open_address

    def counted(source: Any) -> Any:
        opened.append(source)
        return open_address(source)

    monkeypatch.setattr(inference, "open_address", counted)
    run(rows, tmp_path / "shards", shard_rows=16)
    run(rows, tmp_path / "whole", shard_rows=ROWS)
    assert opened == [rows, rows]


def test_a_damaged_answer_is_made_again_and_no_other(
    rows: Path, answered: list[int], tmp_path: Path
) -> None:
    run(rows, tmp_path / "out", shard_rows=16)
    store = Path(ArtifactStore().url)
    second = sorted(store.glob("*/files/answers.parquet"))[1]
    second.write_bytes(b"damaged")
    run(rows, tmp_path / "again", shard_rows=16)
    assert len(answered) == 4
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    # A shard of rows is cut again.
    next(store.glob("*/files/rows.parquet")).write_bytes(b"damaged")
    run(rows, tmp_path / "third", shard_rows=16)
    assert len(answered) == 4
    assert contents(tmp_path / "third") == contents(tmp_path / "out")


def test_files_of_a_folder_tell_their_names(
    rows: Path, answered: list[int], tmp_path: Path
) -> None:
    folder = tmp_path / "days"
    folder.mkdir()
    (folder / "2.jsonl").write_text(rows.read_text())
    run(folder, tmp_path / "out", shard_rows=32)
    (folder / "1.jsonl").write_text("".join(rows.read_text().splitlines(keepends=True)[:10]))
    done = run(folder, tmp_path / "parquet", shard_rows=32, form="parquet")
    assert answered == [32, 8, 10], "the other file's shards have answers"
    manifest = AnswersManifest.model_validate_json(
        (tmp_path / "parquet" / "manifest.json").read_bytes()
    )
    assert (manifest.rows, manifest.failed, done.failed) == (ROWS + 10, 2, 2)
    found = []
    for part in manifest.parts:
        found += pyarrow.parquet.read_table(tmp_path / "parquet" / part.file).to_pylist()
    where = [("1.jsonl", line) for line in range(1, 11)]
    assert [(row["file"], row["line"]) for row in found] == [
        *where,
        *(("2.jsonl", line) for line in range(1, ROWS + 1)),
    ]
    assert [row["answer"] is None for row in found].count(True) == 2
    line = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[0])
    assert (line["file"], line["line"]) == ("2.jsonl", 1)
