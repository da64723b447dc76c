"""Digests and names of files that come from outside, in parameters, records and manifests: nothing
but a digest names a folder or a lock, and no name leads out of its folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distillery.errors import ArtifactDamaged, RegistryError, StoreError
from distillery.records import Artifact, InputFile, RegisteredModel, Rows, Split, TeacherLabels
from distillery.registry.local import LocalRegistry
from distillery.registry.manifest import Manifest
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import FileEntry, list_files
from distillery.storage.housekeeping import artifact_references
from distillery.storage.manifest import read_manifest
from flows.train_student import train_student

pytestmark = pytest.mark.security

NO_DIGESTS = [
    *("../../victim.txt", "/etc/passwd", "", "0" * 63, "0" * 65, "A" * 64, "g" * 64),
    *(f"{'0' * 64}\n", f" {'0' * 63}", f"{'0' * 63}/", "0" * 63 + "\0", "٠" * 64),
]

NO_NAMES = [
    *("../a.jsonl", "/etc/passwd", "a/../../b", "a//b", "", ".", "..", "a/", "./a", "a/./b"),
    *("a\\..\\..\\b", "..\\a", "C:/a", "c:a", "a\0b"),
]


@pytest.mark.parametrize("digest", NO_DIGESTS)
def test_nothing_but_a_digest_is_one(digest: str) -> None:
    with pytest.raises(ValidationError, match="sha256"):
        Artifact(uri="", sha256=digest, bytes=1)
    with pytest.raises(ValidationError, match="sha256"):
        InputFile(uri="", sha256=digest)
    with pytest.raises(ValidationError, match="sha256"):
        Split(file="a.jsonl", rows=1, sha256=digest)
    with pytest.raises(ValidationError, match="sha256"):
        FileEntry(path="a", sha256=digest, bytes=1)
    artifact = Artifact(uri="", sha256="0" * 64, bytes=1)
    with pytest.raises(ValidationError, match="manifest_sha256"):
        RegisteredModel(
            artifact=artifact, name="a", version="1", registry="local", manifest_sha256=digest
        )
    text = json.dumps({"files": [{"path": "a", "sha256": digest, "bytes": 1}]})
    with pytest.raises(ArtifactDamaged, match="run its stage again"):
        read_manifest(text.encode(), "folder")
    named = {"uri": f"store/{digest}", "sha256": digest, "bytes": 1}
    assert not list(artifact_references({"artifact": named}))


@pytest.mark.parametrize("name", [*NO_NAMES, "a/b", "a b"])
def test_name_and_version_of_a_model_name_a_folder(name: str) -> None:
    artifact = Artifact(uri="", sha256="0" * 64, bytes=1)
    good = {"name": "a", "version": "2026-11.27_b", "registry": "azureml"}
    RegisteredModel.model_validate(
        {"artifact": artifact, **good, "manifest_sha256": artifact.sha256}
    )
    for key in ("name", "version"):
        with pytest.raises(ValidationError, match=key):
            RegisteredModel.model_validate(
                {"artifact": artifact, **good, key: name, "manifest_sha256": artifact.sha256}
            )


@pytest.mark.parametrize("name", NO_NAMES)
def test_no_name_leads_out_of_its_folder(name: str) -> None:
    with pytest.raises(ValidationError, match="not the relative name"):
        FileEntry(path=name, sha256="0" * 64, bytes=1)
    with pytest.raises(ValidationError, match="not the relative name"):
        Split(file=name, rows=1, sha256="0" * 64)
    files = [{"path": name, "sha256": "0" * 64, "bytes": 1}]
    with pytest.raises(ArtifactDamaged, match="names a file outside the folder"):
        read_manifest(json.dumps({"files": files}).encode(), "folder")
    with pytest.raises(ValidationError, match="not the relative name"):
        Manifest.model_validate({"model": "a", "provenance": {}, "files": files})
    if name:
        with pytest.raises(StoreError, match="leads out of the store"):
            ArtifactStore().read_object(name)


@pytest.mark.parametrize(
    "name", ["a", "a/b.c", "onnx/model.onnx.data", "a..b", "…/…", "ab:c", "a b"]
)
def test_other_names_are_names(name: str) -> None:
    assert FileEntry(path=name, sha256="0" * 64, bytes=1).path == name


def test_a_file_that_another_system_could_not_write_is_no_part_of_an_artifact(
    tmp_path: Path,
) -> None:
    (tmp_path / "a\\b").write_text("")
    with pytest.raises(StoreError, match="rename it"):
        list_files(tmp_path)


@pytest.mark.parametrize("bad", ["digest", "file"])
def test_crafted_rows_of_a_training_touch_no_file(bad: str, home: Path) -> None:
    """The digest named a lock, and the file was read as rows."""
    victim = home / "victim.txt"
    home.mkdir()
    victim.write_text("kept")
    artifact = {"uri": "", "sha256": "0" * 64, "bytes": 1}
    crafted = {"file": "train.jsonl", "rows": 1, "sha256": "0" * 64, "artifact": artifact}
    if bad == "digest":
        artifact["sha256"] = "../../victim.txt"
    else:
        crafted["file"] = str(victim)
    labels = {"artifact": artifact, "teacher": "x", "accepted": 1, "rejected": 0, "soft": False}
    parameters: dict[str, Any] = {"base": {}, "training": {}, "prompt": {}, "rows": crafted}
    with pytest.raises(Exception, match=r"sha256|relative name"):
        train_student.validate_parameters(parameters | {"labels": labels})
    with pytest.raises(ValidationError):
        Rows.model_validate(crafted)
    if bad == "digest":
        with pytest.raises(ValidationError):
            TeacherLabels.model_validate(labels)
    assert victim.read_text() == "kept"


@pytest.mark.parametrize("digest", NO_DIGESTS)
def test_a_changed_tag_of_a_registry_is_one_line(digest: str, tmp_path: Path) -> None:
    tags = {"files_sha256": "0" * 64, "manifest_sha256": "0" * 64, "bytes": "1"}
    registry = LocalRegistry(f"sqlite:///{tmp_path / 'registry.db'}")
    for name in ("files_sha256", "manifest_sha256"):
        with pytest.raises(RegistryError, match=r"^a version 1: its \w*sha256 in the registry"):
            registry.record("a", "1", False, "", tags | {name: digest})
