"""Digests of files and folders: an artifact's name is the digest of the list of its files."""

import hashlib
from pathlib import Path

from distillery.errors import StoreError
from distillery.records import Record, RelativeName, Sha256, digest_of, is_relative_name


class FileEntry(Record):
    """A file of a folder: `path` below it with forward slashes, SHA-256 in hex, size in bytes."""

    path: RelativeName
    sha256: Sha256
    bytes: int


def sha256_of(path: Path) -> str:
    """Return the SHA-256 (hex) of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """Return an entry for every file below `folder`, in the order of their paths.

    Raises StoreError for a name that another system could not write."""
    entries = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            if not is_relative_name(name):
                raise StoreError(
                    f"{folder}: {name!r}: a file's name may have no backslash and begin with no "
                    "drive; rename it"
                )
            entries.append(FileEntry(path=name, sha256=sha256_of(path), bytes=path.stat().st_size))
    return tuple(entries)


def digest_of_files(files: tuple[FileEntry, ...]) -> str:
    """Return the SHA-256 (hex) of a list of files, which covers paths, sizes and contents."""
    return digest_of([entry.model_dump() for entry in files])
