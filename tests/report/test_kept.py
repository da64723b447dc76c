"""The page of a run is found in the store by the run's name."""

import os
from pathlib import Path
from unittest.mock import Mock

import pytest
from finished_run import evaluation, finished_run, page_of

from distillery.errors import StoreError
from distillery.report.kept import page_of_run
from distillery.storage.artifacts import ArtifactStore, run_record
from distillery.storage.housekeeping import Inventory
from tasks import summary


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


NO_FILE_NAMES = ("a\\b", "a//b", "./a", "../a", "/a/", "c:a", "", "a.writing-b", "long" * 100, "\0")


@pytest.mark.security
@pytest.mark.parametrize("run", NO_FILE_NAMES)
def test_a_run_of_any_name_is_kept_and_found(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore()
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "report.html").write_text("its page")
    page = store.put(folder)
    monkeypatch.setattr(summary, "produced_by", lambda: run)
    monkeypatch.setattr(summary, "report_page", lambda *_: page)
    monkeypatch.setattr(summary, "create_artifacts", Mock())
    monkeypatch.setattr(summary, "get_run_logger", Mock())
    assert summary.publish(finished_run()).run == run
    assert page_of_run(store, run).read_text() == "its page"
    (kept,) = Inventory(store).runs
    assert page_of_run(store, kept.name) == page_of_run(store, run) == page_of_run(store)


def test_ordinary_names_of_runs_are_those_of_their_records() -> None:
    for run in ("neat-otter", "team/neat otter, preparation", "Lauf 2026-11-27 18:00 (\u00fc)"):
        assert run_record(run) == f"runs/{run}.json"
    assert run_record("a//b") != run_record("a/_b") != run_record("a\\b")
