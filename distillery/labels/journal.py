"""The journal: on this machine's disk, what is on its way into the label database.

A run that is killed, or whose database stays away, loses nothing that was paid for. A call is a
line here before it is made; its answer and its entry in the ledger are a line before they are
handed to the label store's writer. What is committed leaves the journal. Whoever opens the label
database next on this machine takes in the journals that no process holds any more.

A journal is a file in DISTILLERY_HOME/journals for each open label store that is written to, with
rights for its user alone. Its name tells the database, by a hash, and the process. A line is a
CRC-32 in eight hex digits, a blank, and JSON, [kind, values]:

- journal: the first line; the database's URL without its password, and the form of these lines
- begun: a call that is about to be made, as the ledger's entry of a call that was lost
- call: the ledger's entry of a call that has ended
- answer: row, of the table teacher_answers; since, the time before which it replaces what is
  stored, or null; call, the ledger's entry, or null
"""

import base64
import json
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import uuid4

from filelock import FileLock, Timeout
from sqlalchemy.engine import URL

from distillery.errors import StoreError
from distillery.settings import LocalSettings
from distillery.storage.database import without_password
from distillery.teacher.ledger import Call

Kind = Literal["begun", "call", "answer"]

FORM = 1
"""The form of the lines, as the first of them tells it."""

SMALL = 1 << 16
"""Bytes of open lines up to which every commit rewrites the file without the committed ones. With
more, the file is rewritten when half of it is committed, so that a long queue costs no more."""

LIBPQ = {"host": "PGHOST", "port": "PGPORT", "database": "PGDATABASE", "service": "PGSERVICE"}
"""What a PostgreSQL URL may leave to the environment."""

_log = logging.getLogger(__name__)


class Line(NamedTuple):
    """A line that is not committed yet."""

    kind: Kind
    text: bytes


class Journal:
    """The journal of one label store. The file is made with the first line.

    Each line is written by one call of the system when it arrives, so that it outlives this
    process. Only the system's own end, such as a loss of power, can lose what is not committed: at
    most the store's GATHER_S and the time of one commit. From the first failed commit on
    (`set_durable`) each line is on the disk before `write` returns.

    Any thread may call any method. Invariants:
    - A line is in the file from the return of `write` until `settle` is told its number.
    - What is settled is in the file no longer than until as much again of it is settled (SMALL).
    - While the journal is open its lock is held, before the file is there and until it is gone or
      may be taken in. The system drops the lock of a process that ends, even if it is killed.
    - After a failure nothing is written: every later `write` raises it.
    """

    def __init__(self, url: URL) -> None:
        name = f"{database_hash(url)}-{os.getpid()}-{uuid4().hex[:12]}.jsonl"
        self.path = journal_folder() / name
        self._first = line_of("journal", {"database": without_password(url), "form": FORM})
        self._lock = threading.Lock()
        self._held = lock_of(self.path)
        self._file: int | None = None
        self._size = self._open_bytes = self._last_number = 0
        self._open: dict[int, Line] = {}
        self._durable = False
        self._failure: StoreError | None = None

    @property
    def answers(self) -> int:
        """The answers that are in the file and not committed."""
        with self._lock:
            return sum(line.kind == "answer" for line in self._open.values())

    def write(self, kind: Kind, values: dict[str, Any]) -> int:
        """Append a line and return its number, for `settle`. Raises StoreError where the file can't
        be written, as on a full disk."""
        text = line_of(kind, values)
        with self._lock:
            if self._failure:
                raise self._failure
            try:
                self._append(text)
            except OSError as error:
                raise self._fail(error) from None
            self._last_number += 1
            self._open[self._last_number] = Line(kind, text)
            self._open_bytes += len(text)
            return self._last_number

    def settle(self, numbers: Iterable[int]) -> None:
        """Take committed lines out of the file, now or with those of a later commit."""
        with self._lock:
            for number in numbers:
                self._open_bytes -= len(self._open.pop(number).text)
            if self._file is None or self._failure:
                return
            if self._open_bytes > max(SMALL, self._size // 2):
                return
            try:
                self._rewrite(self._file)
            except OSError as error:
                self._fail(error)

    def set_durable(self, durable: bool) -> None:
        """Have all lines on the disk, those to come too, or leave that to the database again."""
        with self._lock:
            self._durable = durable
            if not durable or self._file is None or self._failure:
                return
            try:
                os.fsync(self._file)
                sync_folder(self.path.parent)
            except OSError as error:
                self._fail(error)

    def close(self) -> None:
        """Remove the file if all of it is committed. Otherwise it may be taken in from now on."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None
            if not self._held.is_locked:
                return
            if not self._open:
                self.path.unlink(missing_ok=True)
            release(self._held)

    def _append(self, text: bytes) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._held.acquire(blocking=False)
            self._file = open_to_append(self.path)
            write_whole(self._file, self._first)
            self._size = len(self._first)
            if self._durable:
                sync_folder(self.path.parent)
        write_whole(self._file, text)
        self._size += len(text)
        if self._durable:
            os.fsync(self._file)

    def _rewrite(self, file: int) -> None:
        """Replace the open file by one of the open lines alone, at one stroke."""
        content = b"".join([self._first, *(line.text for line in self._open.values())])
        if len(content) == self._size:
            return
        beside = self.path.with_suffix(".next")
        beside.unlink(missing_ok=True)
        new = open_to_append(beside)
        try:
            write_whole(new, content)
            if self._durable:
                os.fsync(new)
        finally:
            # Some systems rename no file that is open.
            os.close(new)
        os.close(file)
        self._file = None
        os.replace(beside, self.path)
        self._file, self._size = open_to_append(self.path), len(content)

    def _fail(self, error: OSError) -> StoreError:
        """Note the failure for good, and return it. What was cut off is taken out again."""
        if self._file is not None:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
        self._failure = StoreError(
            f"DISTILLERY_HOME {self.path}: can't be written ({error.strerror or error}), so that "
            "answers could be lost, and nothing more is asked; free some space or correct the "
            "folder's rights, then run again: the answers so far are in the label database"
        )
        return self._failure


@dataclass
class Contents:
    """What a journal holds. rows: of answers, each with the time before which it replaces what is
    stored. calls: entries of calls that ended; lost: of those that did not. unreadable: lines."""

    rows: list[tuple[datetime | None, dict[str, Any]]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    lost: list[Call] = field(default_factory=list)
    unreadable: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Recovered:
    """What was found in a journal that no process holds. `kept`: the file with its lines that can't
    be read; None if there are none."""

    journal: Path
    answers: int
    calls: int
    lost: int
    unreadable: int
    kept: Path | None

    def line(self) -> str:
        """Return it in one line."""
        line = f"{self.answers} answers, {self.calls} calls, {self.lost} lost calls"
        if self.kept:
            line += f", {self.unreadable} lines that can't be read, kept in {self.kept}"
        return f"{self.journal}: {line}"


TakeIn = Callable[[Contents], None]
"""Writes what a journal holds into the database; what is there already stays."""


def recover(url: URL, take_in: TakeIn) -> list[Recovered]:
    """Take in the journals of the database at `url` that no process holds, and remove them. Lines
    that can't be read are kept in a file beside. A process that is killed meanwhile leaves a
    journal that is taken in again, which changes nothing. Raises what `take_in` raises."""
    found = []
    for path in journals_of(url):
        with if_abandoned(path) as is_abandoned:
            if not is_abandoned:
                continue
            contents = read_journal(path)
            take_in(contents)
            recovered = summed_up(path, contents)
            if recovered.kept:
                keep(recovered.kept, contents.unreadable)
            path.with_suffix(".next").unlink(missing_ok=True)
            path.unlink()
            _log.warning("taken into the label database: %s", recovered.line())
            found.append(recovered)
    return found


def examine(url: URL) -> list[Recovered]:
    """Return what `recover` would take in."""
    found = []
    for path in journals_of(url):
        with if_abandoned(path) as is_abandoned:
            if is_abandoned:
                found.append(summed_up(path, read_journal(path)))
    return found


def summed_up(path: Path, contents: Contents) -> Recovered:
    """Return the numbers of what a journal holds."""
    return Recovered(
        journal=path,
        answers=len(contents.rows),
        calls=len(contents.calls),
        lost=len(contents.lost),
        unreadable=len(contents.unreadable),
        kept=path.with_suffix(".unreadable") if contents.unreadable else None,
    )


def journal_folder() -> Path:
    """Return the folder of this machine's journals."""
    return LocalSettings().folder / "journals"


def journals_of(url: URL) -> list[Path]:
    """Return the journals of the database at `url`, those of living processes too."""
    return sorted(journal_folder().glob(f"{database_hash(url)}-*.jsonl"))


@contextmanager
def if_abandoned(path: Path) -> Iterator[bool]:
    """Yield whether no process holds a journal, nor has removed it. If so, this one holds it
    meanwhile. Other users' journals are theirs to take in."""
    lock = lock_of(path)
    try:
        lock.acquire(blocking=False)
    except (Timeout, PermissionError):
        yield False
        return
    try:
        yield path.exists()
    finally:
        release(lock)


def lock_of(path: Path) -> FileLock:
    """Return the lock of a journal. It may be taken in one thread and released in another."""
    return FileLock(path.with_suffix(".lock"), mode=0o600, thread_local=False)


def release(lock: FileLock) -> None:
    """Release a lock and remove its file, which another process may be about to lock: it will see
    that the file is gone."""
    with suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()


def database_hash(url: URL) -> str:
    """Return a hash of what tells a database from others: server and name, or the file. Users and
    passwords tell none apart, and are not in it."""
    if url.get_backend_name() == "sqlite":
        named: Any = str(Path(url.database or "").absolute().resolve())
    else:
        named = {"host": url.host, "port": url.port, "database": url.database}
        named |= {"database": url.query["dbname"]} if "dbname" in url.query else {}
        named |= {name: url.query[name] for name in LIBPQ if name in url.query}
        for name, variable in LIBPQ.items():
            named[name] = named.get(name) or os.environ.get(variable)
    text = json.dumps([url.get_backend_name(), named], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()[:16]


def as_text(value: datetime | bytes) -> str:
    """Return what JSON has no form for: a time in ISO's form, bytes in base64."""
    if isinstance(value, datetime):
        return value.isoformat()
    return base64.b64encode(value).decode()


ENCODER = json.JSONEncoder(default=as_text, separators=(",", ":"))
"""Made once: json.dumps makes one for each call."""


def values_of(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name, as they are."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def line_of(kind: str, values: dict[str, Any]) -> bytes:
    """Return a line of a journal."""
    text = ENCODER.encode([kind, values]).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def read_journal(path: Path) -> Contents:
    """Return what a journal holds. A line that was cut off or changed is among the unreadable."""
    contents, begun = Contents(), dict[str, Call]()
    for line in path.read_bytes().split(b"\n"):
        if not line:
            continue
        try:
            read_line(line, contents, begun)
        except (ValueError, TypeError, KeyError, RecursionError):
            contents.unreadable.append(line)
    ended = {call.call_id for call in contents.calls}
    contents.lost = [call for call_id, call in begun.items() if call_id not in ended]
    return contents


def read_line(line: bytes, contents: Contents, begun: dict[str, Call]) -> None:
    """Add what a line holds. Raises ValueError, TypeError, KeyError or RecursionError for a line
    that is not as it was written."""
    check, _, text = line.partition(b" ")
    if len(check) != 8 or int(check, 16) != zlib.crc32(text):
        raise ValueError("the checksum is another one")
    kind, values = json.loads(text)
    if kind == "begun":
        call = call_of(values)
        begun[call.call_id] = call
    elif kind == "call":
        contents.calls.append(call_of(values))
    elif kind == "answer":
        row = values["row"]
        row["created_at"] = datetime.fromisoformat(row["created_at"])
        if row["tokens"] is not None:
            row["tokens"] = base64.b64decode(row["tokens"])
        since = values["since"] and datetime.fromisoformat(values["since"])
        if values["call"]:
            contents.calls.append(call_of(values["call"]))
        contents.rows.append((since, row))
    elif kind != "journal" or values["form"] != FORM:
        raise ValueError(f"{kind}: not a line of this version")


def call_of(values: dict[str, Any]) -> Call:
    """Return the ledger's entry that a line holds."""
    return Call(**{**values, "called_at": datetime.fromisoformat(values["called_at"])})


def keep(path: Path, lines: Sequence[bytes]) -> None:
    """Write lines that can't be read to a file, for people."""
    path.unlink(missing_ok=True)
    file = open_to_append(path)
    try:
        write_whole(file, b"\n".join([*lines, b""]))
    finally:
        os.close(file)


def open_to_append(path: Path) -> int:
    """Open a file that is this user's alone."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def write_whole(file: int, content: bytes) -> None:
    """Write all of `content`. Raises OSError where it has no room."""
    while content:
        content = content[os.write(file, content) :]


def sync_folder(folder: Path) -> None:
    """Have a folder's entries on the disk, where the system lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
