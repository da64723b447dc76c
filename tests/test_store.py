"""The artifact store: content-addressed, whole or not there, verified on the way out."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distillery.errors import ArtifactDamaged, StoreError
from distillery.records import Artifact
from distillery.store import MANIFEST, ArtifactStore, working_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_text("one")
    (source / "deep" / "b.bin").write_bytes(bytes(3 << 20))
    return source


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    url = str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}"
    return ArtifactStore(url, cache=tmp_path / "cache")


def test_what_goes_in_comes_out(store: ArtifactStore, folder: Path) -> None:
    artifact = store.put(folder)
    fetched = store.fetch(artifact)
    assert (fetched / "a.txt").read_text() == "one"
    assert (fetched / "deep" / "b.bin").stat().st_size == 3 << 20
    assert artifact.bytes == 3 + (3 << 20)
    assert sorted(p.name for p in fetched.rglob("*") if p.is_file()) == ["a.txt", "b.bin"]


def test_equal_content_has_one_digest_and_other_content_another(store: ArtifactStore, folder: Path) -> None:
    first = store.put(folder)
    assert store.put(folder) == first
    (folder / "a.txt").write_text("two")
    assert store.put(folder).sha256 != first.sha256


def test_an_unknown_artifact_is_damaged(store: ArtifactStore) -> None:
    nowhere = Artifact(uri=f"{store.url}/x", sha256="0" * 64, bytes=1)
    assert not store.holds(nowhere)
    with pytest.raises(ArtifactDamaged, match="run its stage again"):
        store.fetch(nowhere)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "no manifest", "other manifest"])
def test_damage_is_noticed_and_mended_by_storing_again(folder: Path, tmp_path: Path, damage: str) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    artifact = store.put(folder)
    file = store.fetch(artifact) / "deep" / "b.bin"
    manifest = tmp_path / "store" / artifact.sha256 / MANIFEST
    if damage == "flip":
        file.write_bytes(b"\x01" + bytes((3 << 20) - 1))
    elif damage == "cut":
        file.write_bytes(bytes(100))
    elif damage == "remove":
        file.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text('{"files": []}')
    assert not store.holds(artifact)
    assert store.put(folder) == artifact
    assert store.holds(artifact)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="empty folder"):
        ArtifactStore(str(tmp_path / "store")).put(tmp_path / "empty")


def test_a_manifest_can_not_name_a_file_outside(folder: Path, tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    artifact = store.put(folder)
    manifest = tmp_path / "store" / artifact.sha256 / MANIFEST
    manifest.write_text(manifest.read_text().replace("a.txt", "../a.txt"))
    with pytest.raises(ArtifactDamaged, match="outside the folder"):
        store.fetch(artifact)


def test_a_writer_killed_in_the_middle_leaves_nothing_that_counts(folder: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    code = (
        "import shutil, os, sys, pathlib, signal\n"
        "from distillery.store import ArtifactStore\n"
        "real, done = shutil.copyfile, []\n"
        "def copy(a, b):\n"
        "    real(a, b); done.append(a)\n"
        "    if len(done) == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "shutil.copyfile = copy\n"
        f"ArtifactStore({url!r}).put(pathlib.Path({str(folder)!r}))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ})
    assert killed.returncode == -signal.SIGKILL
    assert not [p for p in Path(url).iterdir() if not p.name.startswith(".writing-")]
    store = ArtifactStore(url)
    assert store.holds(store.put(folder))


def test_a_full_disk_is_one_clear_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distillery.store.shutil.copyfile", full)
    with pytest.raises(StoreError, match="the disk is full; free some space"):
        ArtifactStore(str(tmp_path / "store")).put(folder)


def write(target: Path) -> None:
    target.write_bytes(b"1")


def copy(target: Path) -> None:
    # shutil.Error, a list of what failed, without an errno.
    (target.parent / "source").mkdir()
    (target.parent / "source" / target.name).write_bytes(b"1")
    shutil.copytree(target.parent / "source", target.parent, dirs_exist_ok=True)


def save(target: Path) -> None:
    raise RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fill", [write, copy, save])
def test_a_working_folder_says_in_one_line_that_the_disk_is_full(fill: Callable[[Path], None], home: Path) -> None:
    def fill_it() -> None:
        with working_folder("test") as folder:
            (folder / "file").symlink_to("/dev/full")
            fill(folder / "file")

    with pytest.raises(StoreError, match=r"the disk is full .*; free some space or move DISTILLERY_HOME") as caught:
        fill_it()
    assert str(caught.value).startswith(f"{home / 'work'}: ")
    assert list((home / "work").iterdir()) == []


def test_a_working_folder_leaves_other_errors_as_they_are() -> None:
    with pytest.raises(FileNotFoundError), working_folder("test") as folder:
        (folder / "none").read_bytes()
