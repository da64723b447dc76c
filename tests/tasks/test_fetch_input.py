"""What batch inference opens of what its parameter names, and what its errors tell."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.workers.base import BaseJobConfiguration

from distillery.errors import DataError
from distillery.settings import RUN_OF_A_WORKER
from flows.batch_inference import batch_inference
from flows.train_student import train_student
from tasks.inference import fetch_input

pytestmark = pytest.mark.security

SECRET = "the-secret-line"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the copy goes."""
    made = tmp_path / "input"
    made.mkdir()
    return made


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs that fsspec was asked to open; none is."""
    urls: list[str] = []

    @contextmanager
    def asked(url: str, _mode: str) -> Iterator[Any]:
        urls.append(url)
        raise KeyError(SECRET)
        yield

    monkeypatch.setattr(fsspec, "open", asked)
    return urls


def refused(uri: str, folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        fetch_input(uri, folder)
    line = str(caught.value)
    assert SECRET not in line
    assert "\n" not in line
    assert caught.value.__cause__ is None
    return line


@pytest.mark.parametrize(
    "uri",
    [
        *("http://internal/secret.json#.csv", "http://internal/secret.json?x=.csv"),
        *("http://internal/secret.json?.csv#.csv", "http://internal/.csv/", "http://internal"),
        *("https://internal/a.csv/secret.json", "https://internal/csv", "secret.json", "."),
        "abfs://c@a.dfs.core.windows.net/secret.json#.jsonl",
    ],
)
def test_the_ending_is_that_of_the_path(uri: str, folder: Path, opened: list[str]) -> None:
    assert "input_uri takes .jsonl, .csv, .parquet" in refused(uri, folder)
    assert not opened
    assert not list(folder.iterdir())


def test_a_query_is_no_part_of_the_copys_name(folder: Path, opened: list[str]) -> None:
    line = refused("https://data.example/rows.csv?sig=SIGNATURE#x", folder)
    assert line == "input_uri rows.csv: can't be read (KeyError); correct input_uri"
    assert opened == ["https://data.example/rows.csv?sig=SIGNATURE#x"]


def test_a_reference_does_not_tell_a_files_content(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text(f"{SECRET}\n")
    refs = tmp_path / "refs.json"
    refs.write_text(json.dumps({"rows.csv": [str(secret)]}))
    refused(f"reference://rows.csv::{secret}", folder)
    refused(f"reference://rows.csv::{refs}", folder)
    refused(f"reference://{secret}/rows.csv", folder)


def test_a_worker_asks_no_server(
    folder: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_OF_A_WORKER, "6d2f6a0e-0000-4000-8000-000000000000")
    for uri in ("http://internal/a.csv", "abfs://other@account/a.csv", "/etc/a.csv"):
        assert "this worker may not open it" in refused(uri, folder)
    assert not opened
    monkeypatch.setenv("DISTILLERY_DATA_PROTOCOLS", "https://data.example/rows")
    refused("https://data.example/rows/a.csv", folder)
    assert opened == ["https://data.example/rows/a.csv"]


def test_a_local_file_is_copied_whatever_its_name(folder: Path, tmp_path: Path) -> None:
    for name in ("rows.csv", "a#b.csv", "what?.csv", "100%25.CSV", "a*.csv"):
        (tmp_path / name).write_text("text\n")
        copy = fetch_input(str(tmp_path / name), folder)
        assert (copy.name, copy.read_text()) == (name, "text\n")
        copy.unlink()
    assert fetch_input(f"file://{tmp_path}/100%2525.CSV", folder).name == "100%25.CSV"


def test_a_linked_file_has_the_ending_of_its_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_OF_A_WORKER, "6d2f6a0e-0000-4000-8000-000000000000")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.json").write_text(SECRET)
    (tmp_path / "rows.csv").symlink_to(tmp_path / "secret.json")
    assert "secret.json: input_uri takes" in refused("rows.csv", folder)


def test_a_worker_tells_the_runs_that_it_executes() -> None:
    """It is Prefect's own variable that says which runs are limited."""
    run = FlowRun(flow_id=uuid4())
    assert BaseJobConfiguration._base_flow_run_environment(run) == {RUN_OF_A_WORKER: str(run.id)}


def test_a_workers_answers_go_nowhere_else(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before a registry is asked, and any row answered."""
    monkeypatch.setenv(RUN_OF_A_WORKER, "6d2f6a0e-0000-4000-8000-000000000000")
    for output in ("/etc", str(home), "flows", "../out"):
        with pytest.raises(DataError, match=r"^output: [^\n]*$"):
            batch_inference.fn("a-model", "rows.csv", output)


def test_a_training_hands_its_record_to_no_name_of_a_users() -> None:
    nothing: Any = None
    for name in ("runs/demo-1.json", "../results/label-0", "train-x", f"train-{'0' * 32}\n"):
        with pytest.raises(Exception, match=r"hand_off: .*leave it out"):
            train_student.fn(nothing, nothing, nothing, nothing, nothing, hand_off=name)
