"""Tables of any length as shards: Parquet files of some thousand rows in the artifact store.

Each shard is an artifact of its own, and so named by the digest of its content, whole or not there,
and verified when it is read. The list of a table's shards, shards.json, is an artifact too, which
is written after the last of them: a table that was not written to its end has no list. Both writing
and reading hold one shard in memory.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from distillery.errors import ArtifactDamaged
from distillery.records import Artifact, Record, Sha256, Shard
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import digest_of_files
from distillery.storage.manifest import FILES
from distillery.storage.working import working_folder

ROWS_FILE = "rows.parquet"

LIST_FILE = "shards.json"

SHARD_ROWS = 2_048
"""Rows of a shard, at most."""

SHARD_BYTES = 32_000_000
"""JSON text of a shard's rows, at most; a longer row is a shard of its own."""


class ListedShard(Record):
    """An entry of shards.json: a Shard without the address of the store, which may move."""

    sha256: Sha256
    bytes: int
    rows: int
    rows_sha256: Sha256


class ShardList(Record):
    """The content of shards.json."""

    shards: tuple[ListedShard, ...]


def write_shards(
    rows: Iterable[Mapping[str, Any]],
    schema: Any,
    store: ArtifactStore,
    most_rows: int = SHARD_ROWS,
    origin: Sequence[str] = (),
) -> Iterator[Shard]:
    """Store the rows in shards of at most `most_rows` rows and yield each shard once it is stored.

    `schema`: a pyarrow.Schema with the rows' columns. `origin`: the columns that say where a row
    comes from, which `rows_sha256` does not cover."""
    held: list[Mapping[str, Any]] = []
    size, digest = 0, hashlib.sha256()
    for row in rows:
        content = {name: value for name, value in row.items() if name not in origin}
        text = json.dumps(content, sort_keys=True).encode() + b"\n"
        if held and (len(held) >= most_rows or size + len(text) > SHARD_BYTES):
            yield store_shard(held, schema, store, digest.hexdigest())
            held, size, digest = [], 0, hashlib.sha256()
        held.append(row)
        size += len(text)
        digest.update(text)
    if held:
        yield store_shard(held, schema, store, digest.hexdigest())


def store_shard(
    rows: Sequence[Mapping[str, Any]], schema: Any, store: ArtifactStore, rows_sha256: str
) -> Shard:
    """Store rows as one shard."""
    with working_folder("shard") as folder:
        write_table(rows, schema, folder / ROWS_FILE)
        artifact = store.put(folder)
    return Shard(artifact=artifact, rows=len(rows), rows_sha256=rows_sha256)


def write_list(shards: Iterable[Shard], folder: Path) -> None:
    """Write shards.json into `folder`."""
    listed = []
    for shard in shards:
        artifact = shard.artifact
        entry = ListedShard(
            sha256=artifact.sha256,
            bytes=artifact.bytes,
            rows=shard.rows,
            rows_sha256=shard.rows_sha256,
        )
        listed.append(entry)
    (folder / LIST_FILE).write_text(ShardList(shards=tuple(listed)).model_dump_json(indent=1))


def read_list(artifact: Artifact, store: ArtifactStore) -> tuple[Shard, ...]:
    """Return the shards of a table, in their order. Raises ArtifactDamaged."""
    shards = []
    for entry in ShardList.model_validate_json(read_file(artifact, LIST_FILE, store)).shards:
        of_shard = Artifact(
            uri=f"{store.url}/{entry.sha256}", sha256=entry.sha256, bytes=entry.bytes
        )
        shards.append(Shard(artifact=of_shard, rows=entry.rows, rows_sha256=entry.rows_sha256))
    return tuple(shards)


def are_whole(artifact: Artifact, store: ArtifactStore) -> bool:
    """Return whether the store holds the list of a table and all of its shards."""
    try:
        return all(store.holds(shard.artifact) for shard in read_list(artifact, store))
    except ArtifactDamaged:
        return False


def read_shard(shard: Shard, store: ArtifactStore) -> list[dict[str, Any]]:
    """Return the rows of a shard. Raises ArtifactDamaged if it is not as it was written."""
    return read_rows(shard.artifact, ROWS_FILE, store)


def read_rows(artifact: Artifact, name: str, store: ArtifactStore) -> list[dict[str, Any]]:
    """Return the rows of a Parquet file of an artifact. Raises ArtifactDamaged."""
    return read_table(io.BytesIO(read_file(artifact, name, store)))


def read_table(source: Path | BinaryIO) -> list[dict[str, Any]]:
    """Return the rows of a Parquet file; a map becomes a dict."""
    import pyarrow.parquet  # type: ignore[import-untyped]

    table = pyarrow.parquet.read_table(source, use_threads=False)
    rows: list[dict[str, Any]] = table.to_pylist(maps_as_pydicts="strict")
    return rows


def write_table(rows: Sequence[Mapping[str, Any]], schema: Any, path: Path) -> None:
    """Write rows to a Parquet file. Equal rows give equal bytes."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(list(rows), schema=schema)
    pyarrow.parquet.write_table(table, path, compression="zstd")


def read_file(artifact: Artifact, name: str, store: ArtifactStore) -> bytes:
    """Return a small file of an artifact, verified. Unlike ArtifactStore.fetch, this leaves no copy
    in the local cache, which holds a lock file open for each. Raises ArtifactDamaged."""
    digest = artifact.sha256
    files = store.files(digest)
    content = store.read_object(f"{digest}/{FILES}/{name}")
    listed = {entry.path: entry.sha256 for entry in files}
    found = hashlib.sha256(content).hexdigest()
    if digest_of_files(files) != digest or listed.get(name) != found:
        raise ArtifactDamaged(
            f"{store.url}/{digest}/{FILES}/{name}: altered since it was written; run it again"
        )
    return content
