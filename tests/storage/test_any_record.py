"""Manifests and records that somebody has changed: the store's own errors, in one line, and what
was written is what is read."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spoilt import one_line, spoilt

from distillery.errors import ArtifactDamaged, DistilleryError, StoreError
from distillery.records import is_relative_name
from distillery.report.kept import page_of_run
from distillery.storage.artifacts import RECORDS, RUNS, ArtifactStore
from distillery.storage.digests import FileEntry
from distillery.storage.files import StoredFile
from distillery.storage.housekeeping import read_run
from distillery.storage.manifest import MANIFEST, manifest_text, read_manifest, verify_folder

pytestmark = pytest.mark.security

BUDGET = settings(max_examples=100, deadline=None, database=None, derandomize=True)
"""Inputs that are tried each time, always the same ones."""

FILES = (
    FileEntry(path="a.txt", sha256="0" * 64, bytes=3),
    FileEntry(path="deep/ö.bin", sha256="f" * 64, bytes=0),
)

ARTIFACT = {"uri": f"memory://store/{'a' * 64}", "sha256": "a" * 64, "bytes": 3}

OUTCOME = {
    "recipe": "mine",
    "registered": {"registry": "local", "name": "mine", "version": "1"},
    "data": {"artifact": ARTIFACT},
    "page": ARTIFACT,
}

KEYS = ("files", "path", "sha256", "bytes", "uri", *OUTCOME)


@BUDGET
@given(content=spoilt(manifest_text(FILES), KEYS, "files"))
def test_a_changed_list_of_files_is_one_line(content: bytes) -> None:
    try:
        found = read_manifest(content, "store/digest")
    except ArtifactDamaged as error:
        one_line(str(error))
    else:
        assert read_manifest(manifest_text(found), "store/digest") == found


@BUDGET
@given(
    files=st.lists(
        st.builds(
            FileEntry,
            path=st.text(min_size=1, max_size=20).filter(is_relative_name),
            sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
            bytes=st.integers(0, 2**60),
        ),
        max_size=4,
    ).map(tuple)
)
def test_a_list_of_files_is_read_as_it_was_written(files: tuple[FileEntry, ...]) -> None:
    assert read_manifest(manifest_text(files), "store/digest") == files


def test_brackets_without_end_are_a_damaged_artifact(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"files": ' + "[" * 60_000)
    with pytest.raises(ArtifactDamaged, match=r"artifact.json: can't be read \(RecursionError\)"):
        verify_folder(tmp_path, "0" * 64)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    folder = tmp_path_factory.mktemp("store")
    return ArtifactStore(str(folder / "store"), cache=folder / "cache", wait_s=0)


@BUDGET
@given(content=spoilt(json.dumps(OUTCOME).encode(), KEYS, "files"))
def test_a_changed_record_of_a_run_is_one_line(content: bytes, store: ArtifactStore) -> None:
    name = f"{RECORDS}/{RUNS}/one.json"
    store.write_object(name, content)
    try:
        run = read_run(store, StoredFile(name, len(content), datetime.now(UTC), "1"))
    except StoreError as error:
        one_line(str(error))
    else:
        assert hash((run.recipe, run.registered)) is not None
    # No such page is in the store.
    with pytest.raises(DistilleryError) as caught:
        page_of_run(store, "one")
    one_line(str(caught.value))


def test_the_record_of_a_run_is_read_as_it_was_written(store: ArtifactStore) -> None:
    name = f"{RECORDS}/{RUNS}/one.json"
    store.write_object(name, json.dumps(OUTCOME).encode())
    run = read_run(store, StoredFile(name, 1, datetime.now(UTC), "1"))
    assert (run.name, run.recipe, run.stages) == ("one", "mine", {"a" * 64: "data"})
    assert run.registered == ("local", "mine", "1")
