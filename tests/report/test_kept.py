"""The page of a run is found in the store by the run's name."""

import os
from pathlib import Path

import pytest
from finished_run import evaluation, finished_run, page_of

from distillery.errors import StoreError
from distillery.report.kept import page_of_run
from distillery.storage.artifacts import ArtifactStore


def keep(store: ArtifactStore, tmp_path: Path, run: str, age_s: float) -> None:
    """Keep a run and its page in the store, finished `age_s` seconds ago."""
    folder = tmp_path / run
    folder.mkdir()
    outcome = finished_run(run=run)
    page_of(folder, outcome, evaluation(tmp_path / f"{run}-evaluation"))
    outcome = outcome.model_copy(update={"page": store.put(folder)})
    store.write_record(f"runs/{run}.json", outcome.model_dump_json())
    record = Path(store.url) / "records" / "runs" / f"{run}.json"
    finished = record.stat().st_mtime - age_s
    os.utime(record, (finished, finished))


def test_a_page_is_found_by_its_run_and_the_last_by_default(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    keep(store, tmp_path, "desk-2", age_s=10)
    keep(store, tmp_path, "desk-1", age_s=20)
    assert "<h1>desk-1</h1>" in page_of_run(store, "desk-1").read_text()
    assert "<h1>desk-2</h1>" in page_of_run(store).read_text()


def test_a_run_without_a_page_is_said(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    with pytest.raises(StoreError, match="no finished run; run"):
        page_of_run(store)
    store.write_record("runs/desk-0.json", finished_run().model_dump_json(exclude={"page"}))
    with pytest.raises(StoreError, match="no finished run desk-9; take a name"):
        page_of_run(store, "desk-9")
    with pytest.raises(StoreError, match="desk-0: has no page, because"):
        page_of_run(store, "desk-0")
