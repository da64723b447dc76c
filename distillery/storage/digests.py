"""Digests of files and folders: an artifact's name is the digest of the list of its files."""

import hashlib
from pathlib import Path

from distillery.records import Record, digest_of


class FileEntry(Record):
    """A file of a folder: `path` below it with forward slashes, SHA-256 in hex, size in bytes."""

    path: str
    sha256: str
    bytes: int


def sha256_of(path: Path) -> str:
    """Return the SHA-256 (hex) of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """Return an entry for every file below `folder`, in the order of their paths."""
    entries = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            entries.append(FileEntry(path=name, sha256=sha256_of(path), bytes=path.stat().st_size))
    return tuple(entries)


def digest_of_files(files: tuple[FileEntry, ...]) -> str:
    """Return the SHA-256 (hex) of a list of files, which covers paths, sizes and contents."""
    return digest_of([entry.model_dump() for entry in files])
