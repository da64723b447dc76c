"""storage/manifest"""

import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distillery.errors import ArtifactDamaged
from distillery.storage.digests import FileEntry, digest_of_files, sha256_of

MANIFEST = "artifact.json"

FILES = "files"


def verify_folder(folder: Path, digest: str) -> None:
    manifest = folder / MANIFEST
    if not manifest.exists():
        raise ArtifactDamaged(
            f"{folder}: not in the store, or not completely written; run its stage again"
        )
    files = read_manifest(manifest.read_bytes(), str(folder))
    if digest_of_files(files) != digest:
        raise ArtifactDamaged(
            f"{manifest}: does not match the digest {digest[:12]}; run its stage again"
        )
    verify_files(folder, files)


def verify_files(folder: Path, files: tuple[FileEntry, ...]) -> None:
    for entry in files:
        path = folder / FILES / entry.path
        if (
            not path.is_file()
            or path.stat().st_size != entry.bytes
            or sha256_of(path) != entry.sha256
        ):
            raise ArtifactDamaged(
                f"{path}: missing or altered since it was written; run its stage again"
            )


def manifest_text(files: tuple[FileEntry, ...]) -> bytes:
    return json.dumps({"files": [entry.model_dump() for entry in files]}, indent=1).encode()


def read_manifest(text: bytes, place: str) -> tuple[FileEntry, ...]:
    try:
        payload: dict[str, Any] = json.loads(text)
        files = tuple(FileEntry(**entry) for entry in payload["files"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ArtifactDamaged(
            f"{place}/{MANIFEST}: can't be read ({type(error).__name__}); run its stage again"
        ) from error
    if any(Path(entry.path).is_absolute() or ".." in Path(entry.path).parts for entry in files):
        raise ArtifactDamaged(f"{place}/{MANIFEST}: names a file outside the folder")
    return files


def take_name(beside: Path, final: Path) -> None:
    """Renames; where another run has written the same content in the meantime, its folder stands."""
    try:
        os.rename(beside, final)
    except OSError:
        if not (final / MANIFEST).exists():
            raise
