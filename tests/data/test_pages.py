"""A footer of Parquet that would take far more memory than it has bytes: one line, or as if what
nothing needs were not there."""

import io
import tracemalloc

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from spoilt import varint

from distillery.data import pages
from distillery.data.pages import read_footer

pytestmark = pytest.mark.security

MANY = 50_000
LIST_FIELD = 9
STRUCTURE, DOUBLE = 12, 7


def many(kind: int, count: int) -> bytes:
    """Return the head of a list with 15 values or more."""
    return bytes([0xF0 | kind]) + varint(count)


def file_with(footer: bytes) -> io.BytesIO:
    return io.BytesIO(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def test_what_nothing_needs_takes_no_memory() -> None:
    unknown = bytes([0x20 | LIST_FIELD]) + many(STRUCTURE, MANY) + bytes(MANY)
    no_groups = bytes([0x20 | LIST_FIELD, STRUCTURE, 0])
    file = file_with(unknown + no_groups)
    tracemalloc.start()
    try:
        assert read_footer(file) == []
        assert tracemalloc.get_traced_memory()[1] < 10 * MANY
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("place", ["groups", "chunks"])
def test_row_groups_and_chunks_without_end_are_refused(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "MOST_VALUES", 1_000)
    empty = many(STRUCTURE, MANY) + bytes(MANY)
    if place == "chunks":
        empty = bytes([0x10 | STRUCTURE, 0x10 | LIST_FIELD]) + empty + bytes(1)
    read = file_with(bytes([0x40 | LIST_FIELD]) + empty + bytes(1))
    tracemalloc.start()
    try:
        with pytest.raises(OSError, match="no valid footer"):
            read_footer(read)
        assert tracemalloc.get_traced_memory()[1] < 10 * MANY
    finally:
        tracemalloc.stop()


@pytest.mark.timeout(20)
def test_a_list_of_numbers_ends_with_the_file() -> None:
    with pytest.raises(OSError, match="no valid footer"):
        read_footer(file_with(bytes([0x20 | LIST_FIELD]) + many(DOUBLE, 1 << 40)))


def test_a_wide_file_is_read() -> None:
    file = io.BytesIO()
    table = pa.table({f"column {number}": ["a", "b", "c", None] for number in range(50)})
    pq.write_table(table, file, row_group_size=2)
    groups = read_footer(file)
    metadata = pq.read_metadata(file)
    assert [len(group) for group in groups] == [50, 50]
    for number, group in enumerate(groups):
        for column, chunk in enumerate(group):
            known = metadata.row_group(number).column(column)
            assert chunk.data == known.data_page_offset
            assert chunk.dictionary == (known.dictionary_page_offset or 0)
            assert (chunk.stored, chunk.values) == (known.total_compressed_size, known.num_values)
