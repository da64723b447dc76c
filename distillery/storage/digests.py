"""storage/digests"""

import hashlib
from pathlib import Path

from distillery.records import Record, digest_of

_CHUNK = 1 << 20


class FileEntry(Record):
    path: str
    sha256: str
    bytes: int


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's content, read in pieces."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            hasher.update(piece)
    return hasher.hexdigest()


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """Every file below `folder`, in the order of its path; paths with forward slashes."""
    entries = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        entries.append(
            FileEntry(
                path=path.relative_to(folder).as_posix(),
                sha256=sha256_of(path),
                bytes=path.stat().st_size,
            )
        )
    return tuple(entries)


def digest_of_files(files: tuple[FileEntry, ...]) -> str:
    return digest_of([entry.model_dump() for entry in files])
