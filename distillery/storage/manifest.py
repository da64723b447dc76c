"""An artifact as a folder: files/ holds its content, artifact.json lists path, size and sha256 of
each file. artifact.json is written last: a folder without it was not written completely."""

import json
import os
from pathlib import Path

from pydantic import ValidationError

from distillery.errors import ArtifactDamaged
from distillery.storage.digests import FileEntry, digest_of_files, sha256_of

MANIFEST = "artifact.json"

FILES = "files"


def verify_folder(folder: Path, digest: str) -> None:
    """Raise ArtifactDamaged unless `folder` is the whole artifact `digest`, byte for byte."""
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
    """Raise ArtifactDamaged for the first of `files` that is missing or altered in `folder`."""
    for entry in files:
        path = folder / FILES / entry.path
        right_size = path.is_file() and path.stat().st_size == entry.bytes
        if not right_size or sha256_of(path) != entry.sha256:
            raise ArtifactDamaged(
                f"{path}: missing or altered since it was written; run its stage again"
            )


def manifest_text(files: tuple[FileEntry, ...]) -> bytes:
    """Return what artifact.json holds."""
    return json.dumps({"files": [entry.model_dump() for entry in files]}, indent=1).encode()


def read_manifest(text: bytes, folder: str) -> tuple[FileEntry, ...]:
    """Return the files that the artifact.json of `folder` lists. Raises ArtifactDamaged."""
    try:
        files = tuple(FileEntry(**entry) for entry in json.loads(text)["files"])
    except ValidationError as error:
        field = error.errors(include_input=False)[0]["loc"][0]
        fault = f"can't be read ({field})"
        if field == "path":
            fault = "names a file outside the folder"
        raise ArtifactDamaged(f"{folder}/{MANIFEST}: {fault}; run its stage again") from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ArtifactDamaged(
            f"{folder}/{MANIFEST}: can't be read ({type(error).__name__}); run its stage again"
        ) from error
    return files


def rename_into_place(folder: Path, final: Path) -> None:
    """Rename `folder` to `final`, unless another run has written the same content there since."""
    try:
        os.rename(folder, final)
    except OSError:
        if not (final / MANIFEST).exists():
            raise
