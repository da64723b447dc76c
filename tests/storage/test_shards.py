"""Tables as shards: cut in flat memory, named by what the rows hold, and verified when read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pytest

from distillery.errors import ArtifactDamaged
from distillery.records import Artifact, Shard
from distillery.storage import shards as module
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.shards import (
    LIST_FILE,
    ROWS_FILE,
    are_whole,
    read_list,
    read_shard,
    write_list,
    write_shards,
)

SCHEMA = pyarrow.schema(
    {"line": pyarrow.int64(), "text": pyarrow.string(), "by": pyarrow.map_(*[pyarrow.string()] * 2)}
)


def rows(count: int, first_line: int = 1) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {"line": first_line + number, "text": f"row {number}", "by": {"a": "1", "b": ""}}


def cut(store: ArtifactStore, found: Iterator[dict[str, Any]], most: int = 4) -> list[Shard]:
    return list(write_shards(found, SCHEMA, store, most, origin=("line",)))


def listed(store: ArtifactStore, shards: list[Shard], folder: Path) -> Artifact:
    folder.mkdir()
    write_list(shards, folder)
    return store.put(folder)


def test_what_is_written_is_read_in_its_order(tmp_path: Path) -> None:
    store = ArtifactStore()
    shards = cut(store, rows(10))
    assert [shard.rows for shard in shards] == [4, 4, 2]
    assert [row for shard in shards for row in read_shard(shard, store)] == list(rows(10))
    artifact = listed(store, shards, tmp_path / "list")
    assert read_list(artifact, store) == tuple(shards)
    assert are_whole(artifact, store)


def test_the_list_does_not_depend_on_where_the_store_is(tmp_path: Path) -> None:
    artifacts = []
    for name in ("one", "two"):
        store = ArtifactStore(str(tmp_path / name))
        artifacts.append(listed(store, cut(store, rows(10)), tmp_path / f"list-{name}"))
    assert artifacts[0].content_id == artifacts[1].content_id


def test_equal_rows_are_the_same_shard_wherever_they_come_from() -> None:
    store = ArtifactStore()
    (here,), (there,), (other,) = (
        cut(store, rows(3, line)) if line else cut(store, rows(2)) for line in (1, 100, 0)
    )
    assert here.content_id == there.content_id
    assert here.artifact != there.artifact
    assert other.content_id != here.content_id


def test_one_shard_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is read once the shard before it is stored, by the number of rows and by their size."""
    taken = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal taken
        for row in rows(100):
            taken += 1
            yield row

    seen = 0
    for shard in write_shards(counted(), SCHEMA, ArtifactStore(), 4):
        seen += shard.rows
        assert taken <= seen + 1
    assert seen == 100
    monkeypatch.setattr(module, "SHARD_BYTES", 200)
    sizes = {shard.rows for shard in write_shards(rows(100), SCHEMA, ArtifactStore(), 50)}
    assert max(sizes) <= 4


def test_a_row_larger_than_a_shard_is_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 200)
    found = [*rows(2), {"line": 3, "text": "x" * 1000, "by": {}}, *rows(2)]
    shards = cut(ArtifactStore(), iter(found), most=100)
    assert [shard.rows for shard in shards] == [2, 1, 2]


@pytest.mark.parametrize("file", [f"files/{ROWS_FILE}", "artifact.json"])
def test_a_damaged_shard_is_found(file: str, tmp_path: Path) -> None:
    store = ArtifactStore()
    shards = cut(store, rows(10))
    artifact = listed(store, shards, tmp_path / "list")
    path = Path(shards[1].artifact.uri) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not are_whole(artifact, store)
    with pytest.raises(ArtifactDamaged, match=r"^[^\n]*run"):
        read_shard(shards[1], store)
    assert read_shard(shards[2], store)
    # Cutting again mends it.
    assert cut(store, rows(10)) == shards
    assert are_whole(artifact, store)


def test_a_shard_or_list_that_is_gone_is_found(tmp_path: Path) -> None:
    store = ArtifactStore()
    shards = cut(store, rows(10))
    artifact = listed(store, shards, tmp_path / "list")
    (Path(shards[0].artifact.uri) / "artifact.json").unlink()
    assert not are_whole(artifact, store)
    with pytest.raises(ArtifactDamaged):
        read_shard(shards[0], store)
    (Path(artifact.uri) / "files" / LIST_FILE).unlink()
    assert not are_whole(artifact, store)


def test_a_table_that_is_not_read_to_its_end_has_no_list() -> None:
    """Its shards are whole; that they are not all is known by the list that is missing."""
    store = ArtifactStore()

    def breaks() -> Iterator[dict[str, Any]]:
        yield from rows(5)
        raise OSError("cut off")

    found: list[Shard] = []
    with pytest.raises(OSError, match="cut off"):
        found.extend(write_shards(breaks(), SCHEMA, store, 2))
    names = {path.name for path in Path(store.url).rglob("*") if path.is_file()}
    assert names == {"artifact.json", ROWS_FILE}
