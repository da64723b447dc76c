"""Read the page headers of a Parquet file, to know what its pages unfold to before they do.

A page of a few bytes can unfold to gigabytes, and the sizes in the file's footer need not be true.
PyArrow allocates what the header of each page says, and does not tell it; so the headers are read
here, without the pages. Where the pages are, the footer tells; PyArrow's own reader of it ends the
process at some wrong ones. Source: the format's description, parquet.thrift, and Thrift's compact
protocol, in which footer and headers are written.
"""

import io
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

TYPE, UNFOLDED, STORED = 1, 2, 3
"""Fields of a PageHeader: the kind of page, and its sizes in bytes without the header."""

VALUES_OF = {0: 5, 2: 7, 3: 8}
"""The field of a PageHeader that holds the number of values, by kind of page: data, dictionary, and
data in the second version of pages. It is field 1 of that structure."""

ENCODING_OF = {0: 2, 2: 2, 3: 4}
"""The field of that structure that holds the encoding."""

DICTIONARY = 2

DELTA_BYTE_ARRAY = 7
"""An encoding in which each text repeats the beginning of the one before it."""

DICTIONARY_ENTRY_BYTES = 16
"""What PyArrow takes for an entry of a dictionary besides its content."""

DEEPEST = 16
"""Levels of structures in footer and headers; the format has half as many."""

Fields = dict[int, "Fields"]
"""The fields of a structure that are kept, by number, with those of the structures in them. Others
are passed over, so that they take no memory."""

MOST_VALUES = 1_000_000
"""Values of a footer or header that are kept, at most: a chunk has seven."""

FOOTER_FIELDS: Fields = {4: {1: {3: {5: {}, 7: {}, 9: {}, 11: {}}}}}
"""The fields of a FileMetaData that are kept: row groups, their chunks, and what `Chunk` has."""

HEADER_FIELDS: Fields = {
    **{TYPE: {}, UNFOLDED: {}, STORED: {}},
    **{number: {1: {}, ENCODING_OF[kind]: {}} for kind, number in VALUES_OF.items()},
}
"""The fields of a PageHeader that are kept."""

LARGEST_FOOTER = 16_000_000
"""Bytes of a footer, at most."""

LARGEST_HEADER = 1 << 18
"""Bytes of a page's header, at most; it may hold the least and the greatest value of the page."""


class Chunk(NamedTuple):
    """Where the footer says that a column's pages of a row group are. `dictionary`: 0 where it
    names no dictionary."""

    data: int
    dictionary: int
    stored: int
    values: int


class Page(NamedTuple):
    """The header of a page: its sizes in bytes, unfolded and in the file, and how many values it
    has, empty ones included."""

    kind: int
    unfolded: int
    stored: int
    values: int
    encoding: int


class ColumnPages(NamedTuple):
    """The pages of a column in a row group. `largest`: the most bytes that one value, and so a
    flat column's row, can take: those of the dictionary or of the largest page. `held`: the most
    bytes of pages in memory at a time. `unfolded`: bytes that the values of a repeated column take
    beyond what they take in the file, see `unfolded_values`."""

    largest: int
    held: int
    unfolded: int
    encodings: frozenset[int]


def read_pages(file: BinaryIO, chunk: Chunk, width: int) -> ColumnPages:
    """Return what the headers of a column's pages say. `width`: bytes that a value takes in memory
    besides its content.

    Raises OSError where there is no valid header."""
    dictionary = largest = unfolded = 0
    encodings = set()
    for page in each_page(file, chunk):
        encodings.add(page.encoding)
        if page.kind == DICTIONARY:
            dictionary = page.unfolded + DICTIONARY_ENTRY_BYTES * page.values
        else:
            largest = max(largest, page.unfolded)
            unfolded += unfolded_values(page, width)
    return ColumnPages(
        max(dictionary, largest, width), dictionary + largest, unfolded, frozenset(encodings)
    )


def unfolded_values(page: Page, width: int) -> int:
    """Return how many bytes the values of a page take in memory beyond sixteen times what they
    take in the file: a list's elements that are all empty or equal take next to nothing there."""
    return max(0, page.values * width - 16 * page.stored)


def read_footer(file: BinaryIO) -> list[list[Chunk]]:
    """Return the chunks of each row group, one for each column. Raises OSError."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(4), "little")
    if length > min(LARGEST_FOOTER, size - 8):
        raise OSError(f"a footer of {length:,} bytes; at most {LARGEST_FOOTER:,} are read")
    file.seek(size - 8 - length)
    footer = io.BytesIO(file.read(length))
    try:
        groups = Values(footer).structure(FOOTER_FIELDS).get(4, [])
        return [[chunk_of(column[3]) for column in group[1]] for group in groups]
    except (LookupError, ArithmeticError, ValueError, TypeError, AttributeError) as error:
        raise OSError("no valid footer") from error


def chunk_of(column: dict[int, Any]) -> Chunk:
    """Return a chunk from a structure ColumnMetaData. Raises an error for one that is none."""
    chunk = Chunk(data=column[9], dictionary=column.get(11, 0), stored=column[7], values=column[5])
    if min(chunk) < 0:
        raise ValueError("a negative number")
    return chunk


def each_page(file: BinaryIO, chunk: Chunk) -> Iterator[Page]:
    """Yield the headers of the pages that PyArrow reads of a column's chunk."""
    start = chunk.data
    if 0 < chunk.dictionary < start:
        start = chunk.dictionary
    end = start + chunk.stored
    values = 0
    while start < end and values < chunk.values:
        file.seek(start)
        page = read_page(file)
        yield page
        start = file.tell() + page.stored
        if page.kind != DICTIONARY:
            values += page.values


def read_page(file: BinaryIO) -> Page:
    """Return the header that the file stands at, and leave the file behind it. Raises OSError."""
    start = file.tell()
    window = io.BytesIO(file.read(LARGEST_HEADER))
    try:
        header = Values(window).structure(HEADER_FIELDS)
        kind = header[TYPE]
        inner = header.get(VALUES_OF.get(kind, 0), {})
        page = Page(
            kind,
            header[UNFOLDED],
            header[STORED],
            inner.get(1, 0),
            inner.get(ENCODING_OF.get(kind, 0), -1),
        )
        valid = min(page.unfolded, page.stored, page.values) >= 0
    except (LookupError, ArithmeticError, ValueError, TypeError, AttributeError) as error:
        raise OSError("a page has no valid header") from error
    if not valid:
        raise OSError("a page has a negative size")
    file.seek(start + window.tell())
    return page


class Values:
    """Values in Thrift's compact protocol. The methods raise IndexError at the file's end, and
    LookupError for what no footer and no header has."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._kept = 0

    def structure(self, kept: Fields, depth: int = 0) -> dict[int, Any]:
        """Return the fields of a structure, by number, that are in `kept`."""
        if depth == DEEPEST:
            raise LookupError("too many levels")
        fields: dict[int, Any] = {}
        number = 0
        while True:
            head = self._byte()
            if head == 0:
                return fields
            step, kind = head >> 4, head & 15
            number = number + step if step else self._integer()
            value = self._value(kind, kept.get(number, {}), depth)
            if number in kept:
                self._count()
                fields[number] = value

    def _value(self, kind: int, kept: Fields, depth: int) -> Any:
        """Return a field's value. Numbers with a point and texts, which nothing needs, are passed
        over, and so is a list of what has no fields that are kept."""
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._file.read(8)[7]
        if kind == 8:
            return self._file.seek(self._size(), 1)
        if kind in (9, 10):
            return self._list(kept, depth)
        if kind == 12:
            return self.structure(kept, depth + 1)
        raise LookupError(f"a field of kind {kind}")

    def _list(self, kept: Fields, depth: int) -> list[Any]:
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._size()
        # In a list, a truth value is a byte.
        kind = 3 if head & 15 in (1, 2) else head & 15
        values = []
        for _ in range(count):
            value = self._value(kind, kept, depth)
            if kept:
                self._count()
                values.append(value)
        return values

    def _count(self) -> None:
        self._kept += 1
        if self._kept > MOST_VALUES:
            raise LookupError(f"more than {MOST_VALUES:,} values")

    def _byte(self) -> int:
        return self._file.read(1)[0]

    def _size(self) -> int:
        """Return an unsigned integer of at most 64 bits: 7 bits a byte, the lowest first."""
        size = 0
        for shift in range(0, 64, 7):
            byte = self._byte()
            size |= (byte & 127) << shift
            if byte < 128:
                return size
        raise LookupError("a number of more than 64 bits")

    def _integer(self) -> int:
        """Return a signed integer, which is written zigzag: 0, -1, 1, -2 as 0, 1, 2, 3."""
        size = self._size()
        return (size >> 1) ^ -(size & 1)
