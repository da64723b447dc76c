"""Which files a folder, a pattern or a URL with * names for batch inference."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distillery.errors import DataError
from distillery.records import InputFile
from distillery.settings import RUN_OF_A_WORKER
from tasks import inference
from tasks.inference import (
    fetch_input,
    fetched,
    input_files,
    is_pattern,
    open_address,
    options_of,
    unchanged_copy,
)

pytestmark = pytest.mark.security


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    (folder / "b").mkdir(parents=True)
    for name in ("b/2.jsonl", "a.csv", "b/1.parquet", "_SUCCESS", "c.txt"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    found = fsspec.filesystem("memory")
    for name in ("day=1/x.jsonl", "day=2/x.jsonl", "day=2/_SUCCESS", "other.jsonl"):
        found.pipe_file(f"/store/rows/{name}", name.encode())
    yield found
    found.rm("/store", recursive=True)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is opened, as often as it is."""
    found: list[str] = []

    def counted(source: Path | str) -> Any:
        found.append(str(source))
        return open_address(source)

    monkeypatch.setattr(inference, "open_address", counted)
    return found


def names(uri: str) -> list[str]:
    return [each.name for each in input_files(uri)]


def test_a_folder_or_pattern_names_its_files_in_order(rows: Path) -> None:
    assert names(str(rows)) == ["a.csv"]
    assert names(f"{rows}/**/*") == ["a.csv", "b/1.parquet", "b/2.jsonl"]
    assert names(f"{rows}/b/[12].*") == ["1.parquet", "2.jsonl"]
    (each,) = input_files(f"{rows}/*.csv")
    assert each.file.sha256 == hashlib.sha256(b"a.csv").hexdigest()
    assert each.file.uri == str(rows / "a.csv")


def test_a_name_does_not_depend_on_what_else_matches(rows: Path) -> None:
    before = names(f"{rows}/b/*.jsonl")
    (rows / "b" / "0.jsonl").write_text("")
    (rows / "b" / "d").mkdir()
    assert names(f"{rows}/b/*.jsonl") == ["0.jsonl", *before]


def test_a_url_with_a_star_names_files_under_its_own_beginning(
    memory: MemoryFileSystem, tmp_path: Path
) -> None:
    assert names("memory://store/rows/day=*/*") == ["day=1/x.jsonl", "day=2/x.jsonl"]
    first, _ = input_files("memory://store/rows/*/x.jsonl")
    assert first.file.uri == "memory://store/rows/day=1/x.jsonl"
    assert fetch_input(first.file.uri, tmp_path).read_text() == "day=1/x.jsonl"


def test_one_file_is_no_pattern(rows: Path) -> None:
    (rows / "what*.csv").write_text("")
    for uri in (str(rows / "a.csv"), str(rows / "what*.csv"), "memory://store/what?.csv"):
        assert not is_pattern(uri)
    for uri in (str(rows), f"{rows}/*.csv", f"{rows}/w?at*", "memory://store/*.csv"):
        assert is_pattern(uri)


def test_what_a_run_has_fetched_is_not_fetched_again(
    memory: MemoryFileSystem, opened: list[str], tmp_path: Path
) -> None:
    first, second = "memory://store/rows/other.jsonl", "memory://store/rows/day=1/x.jsonl"
    other = InputFile(uri=second, sha256=hashlib.sha256(b"day=1/x.jsonl").hexdigest())
    with fetched(first) as (file, copy):
        assert file.sha256 == hashlib.sha256(b"other.jsonl").hexdigest()
        assert unchanged_copy(file, tmp_path) == copy
        assert copy.read_text() == "other.jsonl"
        assert unchanged_copy(other, tmp_path).read_text() == "day=1/x.jsonl"
    assert opened == [first, second]
    assert not copy.exists()
    assert unchanged_copy(file, tmp_path).parent == tmp_path
    memory.pipe_file("/store/rows/other.jsonl", b"changed")
    with pytest.raises(DataError, match=r"^other.jsonl: changed while the run was under way"):
        unchanged_copy(file, tmp_path)


@pytest.mark.parametrize("uri", ["*.json", "b/none*", "memory://store/rows/*.csv", "memory://no/*"])
def test_a_pattern_without_a_file_is_one_line(
    uri: str, rows: Path, memory: MemoryFileSystem
) -> None:
    with pytest.raises(DataError, match=r"^[^\n]*correct input_uri$"):
        input_files(uri if "://" in uri else f"{rows}/{uri}")


def test_an_object_store_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: Any, **_options: Any) -> Any:
        raise RuntimeError("https://account/container?sig=SIGNATURE\nand more")

    monkeypatch.setattr(fsspec, "url_to_fs", fails)
    with pytest.raises(DataError) as caught:
        input_files("abfs://rows@account.dfs.core.windows.net/day/*.jsonl")
    assert str(caught.value) == "input_uri *.jsonl: can't be read (RuntimeError); correct input_uri"
    assert caught.value.__cause__ is None


def test_azure_is_asked_as_the_store_is() -> None:
    assert options_of("abfs://rows@account.dfs.core.windows.net/x.csv")["anon"] is False
    assert options_of("memory://x.csv") == {}


def test_a_worker_lists_nothing_elsewhere(
    rows: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_OF_A_WORKER, "6d2f6a0e-0000-4000-8000-000000000000")
    monkeypatch.setenv("DISTILLERY_DATA_FOLDERS", str(rows / "b"))
    monkeypatch.setenv("DISTILLERY_DATA_PROTOCOLS", "file,memory://store/rows/day=1")
    assert names(f"{rows}/b/*") == ["1.parquet", "2.jsonl"]
    assert names("memory://store/rows/day=1/*") == ["x.jsonl"]
    elsewhere = ["memory://store/rows/*/*", "memory://store/*", f"{rows}/*", f"{rows}/b/../*.csv"]
    for uri in (*elsewhere, "/etc/*.csv"):
        with pytest.raises(DataError, match="this worker may not open it"):
            input_files(uri)


def test_a_link_leads_a_worker_nowhere_else(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (rows / "b" / "3.csv").symlink_to(rows / "a.csv")
    monkeypatch.setenv(RUN_OF_A_WORKER, "6d2f6a0e-0000-4000-8000-000000000000")
    monkeypatch.setenv("DISTILLERY_DATA_FOLDERS", str(rows / "b"))
    with pytest.raises(DataError, match="this worker may not open it"):
        input_files(f"{rows}/b/*")
