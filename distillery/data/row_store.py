"""Keep the rows of a data set on disk, so that preparation takes the same memory for any number.

Rows of equal content share a position (rows.Row). So what makes rows leaks, copies or references
of each other is decided bucket by bucket, in the order of positions, and only one bucket is in
memory. What concerns rows of different content, such as equal ids, is asked of the database.

The database is a temporary one of SQLite: up to CACHE_BYTES it stays in memory, and beyond that it
is a file without a name, which the system removes with the process, in the folder SQLITE_TMPDIR,
TMPDIR or else /var/tmp. A data set of short rows takes about five times its size there.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager

from distillery.data.rows import Row
from distillery.data.splits import Splits
from distillery.errors import StoreError
from distillery.records import AnswerFormat, Example

BUCKET_ROWS = 1_000
"""Rows of a bucket; one whose last rows share a position may have more."""

UNWRITTEN = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
"""Kinds of SQLite's errors that a disk is to blame for."""

CACHE_BYTES = 8_000_000
"""How much of a database is in memory."""

TABLES = (
    "CREATE TABLE loaded (number INTEGER PRIMARY KEY, role TEXT, position REAL, content TEXT, "
    "place TEXT, line TEXT)",
    "CREATE TABLE kept (number INTEGER PRIMARY KEY, role INTEGER, position REAL, content TEXT, "
    "place TEXT, example_id TEXT, line TEXT)",
)
"""`place` is Row.where, and `line` the row's Example as JSON. `role` of a kept row is the index in
RowStore.roles."""

SHARED_ID = """
SELECT role, example_id, place, earlier_place FROM (
    SELECT role, position, number, example_id, place, content,
        lag(role) OVER same AS earlier_role,
        lag(content) OVER same AS earlier_content,
        lag(place) OVER same AS earlier_place
    FROM kept WINDOW same AS (PARTITION BY example_id ORDER BY role, position, number)
)
WHERE earlier_role = role OR earlier_content <> content
ORDER BY role, position, number LIMIT 1
"""
"""The first row, and the last one before it, that have one id though they are in one split or of
different content."""


def told(place: str) -> str:
    """Return a place with the bytes of a file's name that are not UTF-8 written as escapes."""
    return place.encode("utf-8", "backslashreplace").decode()


@contextmanager
def temporary_database() -> Iterator[sqlite3.Connection]:
    """Open an empty database that is gone afterwards. Raises StoreError where it can't be written,
    as on a full disk."""
    with closing(sqlite3.connect("", isolation_level=None)) as connection:
        connection.execute(f"PRAGMA cache_size = -{CACHE_BYTES // 1024}")
        # Nothing of it outlives an error, so there is nothing to roll back.
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("BEGIN")
        try:
            yield connection
        except sqlite3.OperationalError as error:
            # The low byte is the kind of an error. That of a quota is input and output.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in UNWRITTEN:
                raise
            raise StoreError(
                f"dataset: no room on disk for the rows while they are prepared ({error}); free "
                "some, or set SQLITE_TMPDIR to a folder that has about five times the size of the "
                "data set"
            ) from error


class RowStore:
    """The rows as they were loaded, and those that are kept of them."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.roles: list[str] = []
        """The roles of the kept rows, in the order in which ids are compared."""
        self._numbered = 0
        for table in TABLES:
            connection.execute(table)

    def load(self, role: str, rows: Iterable[Row]) -> None:
        """Add rows as they are read."""
        self.connection.executemany(
            "INSERT INTO loaded (role, position, content, place, line) VALUES (?, ?, ?, ?, ?)",
            (
                (role, row.position, row.content, told(row.where), row.example.model_dump_json())
                for row in rows
            ),
        )

    def buckets(
        self, roles: Sequence[str], answer_format: AnswerFormat | None = None
    ) -> Iterator[Splits]:
        """Yield the loaded rows by position in buckets of all `roles`, at least one: rows of one
        position are in one bucket, of each role in the order in which they were loaded."""
        bucket: Splits = {role: [] for role in roles}
        count, last = 0, -1.0
        found = self.connection.execute(
            "SELECT role, position, content, place, line FROM loaded ORDER BY position, number"
        )
        for role, position, content, where, line in found:
            if count >= BUCKET_ROWS and position != last:
                yield bucket
                bucket, count = {role: [] for role in roles}, 0
            example = Example.model_validate_json(line)
            if answer_format:
                example = example.model_copy(update={"format": answer_format})
            bucket[role].append(Row(where, example, content, position))
            count, last = count + 1, position
        yield bucket

    def keep(self, splits: Splits) -> list[tuple[int, Example]]:
        """Add the rows of a bucket to those that are kept, and return each with its number."""
        self.roles = list(splits)
        kept, values = [], []
        for index, rows in enumerate(splits.values()):
            for row in rows:
                example = row.example
                self._numbered += 1
                kept.append((self._numbered, example))
                values.append(
                    (
                        *(self._numbered, index, row.position, row.content, row.where),
                        *(example.example_id, example.model_dump_json()),
                    )
                )
        self.connection.executemany("INSERT INTO kept VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        return kept

    def end_keeping(self) -> None:
        """Say that all rows are kept, and forget those that were loaded."""
        self.connection.execute("DROP TABLE loaded")
        self.connection.execute("CREATE INDEX in_order ON kept (role, position, number)")

    def shared_id(self) -> tuple[str, str, str, str] | None:
        """Return role, id and place of the first row whose id an earlier row of its role has, or
        one of another content, and that row's place; None if there is none."""
        found = self.connection.execute(SHARED_ID).fetchone()
        return (self.roles[found[0]], *found[1:]) if found else None

    def drop_outside(self, role: str, low: float, high: float) -> None:
        """Drop the rows of a role whose position is not in [low, high)."""
        self.connection.execute(
            "DELETE FROM kept WHERE role = ? AND NOT (position >= ? AND position < ?)",
            (self.roles.index(role), low, high),
        )

    def count(self, role: str) -> int:
        """Return how many rows of a role are kept."""
        (count,) = self.connection.execute(
            "SELECT count(*) FROM kept WHERE role = ?", (self.roles.index(role),)
        ).fetchone()
        return int(count)

    def lines(self, role: str, most: int) -> Iterator[str]:
        """Yield the first `most` rows of a role in order, as JSON."""
        for (line,) in self.connection.execute(
            "SELECT line FROM kept WHERE role = ? ORDER BY position, number LIMIT ?",
            (self.roles.index(role), most),
        ):
            yield line
