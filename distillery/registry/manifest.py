"""registry/manifest"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from distillery.errors import RegistryError
from distillery.records import Record, RegisteredModel
from distillery.storage.digests import FileEntry, digest_of_files, list_files, sha256_of

if TYPE_CHECKING:
    from azure.ai.ml.entities import Model

MANIFEST = "manifest.json"


class Manifest(Record):
    """manifest.json: `files` are all others in the folder; the manifest can't hold its own digest."""

    model: str
    provenance: dict[str, Any]
    files: tuple[FileEntry, ...]


def copy_folder(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def copy_with_manifest(
    folder: Path, content: Path, name: str, provenance: Mapping[str, Any]
) -> Manifest:
    if not folder.is_dir():
        raise RegistryError(f"{folder}: no such folder; register the folder of an exported model")
    copy_folder(folder, content)
    _remove_old_manifest(content, folder)
    files = list_files(content)
    if not files:
        raise RegistryError(f"{folder}: an empty folder is no model")
    manifest = Manifest(model=name, provenance=dict(provenance), files=files)
    text = json.dumps(
        manifest.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=False
    )
    (content / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def _remove_old_manifest(content: Path, folder: Path) -> None:
    try:
        Manifest.model_validate_json((content / MANIFEST).read_bytes())
    except FileNotFoundError:
        return
    except ValidationError as error:
        raise RegistryError(
            f"{folder / MANIFEST}: the registry writes a file of this name; rename yours"
        ) from error
    (content / MANIFEST).unlink()


def searchable_facts(manifest: Manifest, digest: str) -> dict[str, str]:
    """The tags from which a record is read back."""
    return {
        "manifest_sha256": digest,
        "files_sha256": digest_of_files(manifest.files),
        "bytes": str(sum(entry.bytes for entry in manifest.files)),
    }


def verify_files(folder: Path, model: RegisteredModel) -> None:
    """Raises RegistryError naming the first file that is missing, altered or not in the manifest."""
    path = folder / MANIFEST
    if not path.is_file() or sha256_of(path) != model.manifest_sha256:
        raise altered(model, MANIFEST)
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise altered(model, MANIFEST) from error
    listed = {entry.path: entry for entry in manifest.files}
    found = {entry.path: entry for entry in list_files(folder) if entry.path != MANIFEST}
    for file in sorted(listed.keys() | found.keys()):
        if listed.get(file) != found.get(file):
            raise altered(model, file)
    if digest_of_files(manifest.files) != model.artifact.sha256:
        raise altered(model, MANIFEST)


def altered(model: RegisteredModel, file: str) -> RegistryError:
    return RegistryError(
        f"{model.name} version {model.version}: {file}: missing, added or altered since it was registered; "
        "register the model again to mend it"
    )


def tags_of(version: "Model") -> dict[str, str]:
    return version.tags or {}


def masked(text: str) -> str:
    return re.sub(r"://\S*@", "://***@", text)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def disk_errors(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RegistryError(
            f"{error.filename or place}: {error.strerror or error}; free some space, or set DISTILLERY_HOME elsewhere"
        ) from error
