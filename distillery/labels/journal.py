"""The journal: on this machine's disk, what is on its way into the label database.

A run that is killed, or whose database stays away, loses nothing that was paid for. A call is a
line here before it is made; its answer and its entry in the ledger are a line before they are
handed to the label store's writer. What is committed leaves the journal. Whoever opens the label
database next on this machine takes in the journals that no process holds any more.

A journal is a file in DISTILLERY_HOME/journals/USER for each open label store that is written to,
with rights for its user alone. Its name tells the database, by a hash of its address and its id,
and the process. A line is a CRC-32 in eight hex digits, a blank, and JSON, [kind, values]:

- journal: the first line; the database's URL without its password, and the form of these lines
- begun: a call that is about to be made, as the ledger's entry of a call that was lost
- call: the ledger's entry of a call that has ended
- answer: row, of the table teacher_answers; since, the time before which it replaces what is
  stored, or null; call, the ledger's entry, or null
- settled: the keys of answers above this line that are committed, and may be deleted again

Beside it are its lock and a spare file, which is removed where the disk is full.
"""

import base64
import json
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast
from uuid import uuid4

from filelock import FileLock, Timeout
from sqlalchemy.engine import URL

from distillery.errors import StoreError, StoreUnavailable
from distillery.settings import LocalSettings
from distillery.storage.database import Database, without_password
from distillery.teacher.ledger import Call

Kind = Literal["begun", "call", "answer"]

FORM = 1
"""The form of the lines, as the first of them tells it."""

SMALL = 1 << 16
"""Bytes of open lines up to which every commit rewrites the file without the committed ones. With
more, the file is rewritten when half of it is committed, so that a long queue costs no more."""

SPARE_BYTES = 1 << 21
"""Size of the spare file, so that the answers of calls under way have room when the disk is full: a
hundred of them even with the tokens of written answers."""

POSTGRESQL_PORT = 5432

LIBPQ = {"host": "PGHOST", "port": "PGPORT", "database": "PGDATABASE", "service": "PGSERVICE"}
"""What a PostgreSQL URL may leave to the environment."""

_log = logging.getLogger(__name__)


class Line(NamedTuple):
    """A line that is not committed yet. `key`: of an answer; of others ""."""

    kind: Kind
    text: bytes
    key: str


class Journal:
    """The journal of one label store. The file is made with the first line.

    Each line is written by one call of the system when it arrives, so that it outlives this
    process. Only the system's own end, such as a loss of power, can lose what is not committed: at
    most the store's GATHER_S and the time of one commit. From the first failed commit on
    (`set_durable`) each line is on the disk before `write` returns.

    Any thread may call any method. Invariants:
    - A line is in the file from the return of `write` until `settle` is told its number.
    - What is settled is in the file no longer than until as much again of it is settled (SMALL).
      It is marked there, so that an answer that is deleted from the database does not come back.
    - While the journal is open its lock is held, before the file is there and until it is gone or
      may be taken in. The system drops the lock of a process that ends, even if it is killed.
    - After a failure no call begins: every later `write` of one raises it. What calls under way
      bring is written all the same, into the room of the spare file, as long as there is any.
    - A file that can't be replaced by a shorter one stays, and a later commit tries again.
    """

    def __init__(self, database: Database) -> None:
        name = f"{prefixes_of(database)[0]}-{os.getpid()}-{uuid4().hex[:12]}.jsonl"
        self.path = journal_folder() / name
        address = without_password(database.url)
        self._first = line_of("journal", {"database": address, "form": FORM})
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
        key = values["row"]["request_key"] if kind == "answer" else ""
        with self._lock:
            if self._failure and kind == "begun":
                raise self._failure
            try:
                self._append(text)
            except OSError as error:
                failure = self._fail(error)
                if kind == "begun" or not self._has_room_now(text):
                    raise failure from None
            self._last_number += 1
            self._open[self._last_number] = Line(kind, text, key)
            self._open_bytes += len(text)
            return self._last_number

    def settle(self, numbers: Iterable[int]) -> None:
        """Take committed lines out of the file, now or with those of a later commit."""
        with self._lock:
            settled = [self._open.pop(number) for number in numbers]
            self._open_bytes -= sum(len(line.text) for line in settled)
            if self._file is None:
                return
            if self._open_bytes <= max(SMALL, self._size // 2) and self._is_rewritten():
                return
            keys = [line.key for line in settled if line.key]
            if keys and self._file is not None:
                # Without the mark, as on a full disk, the answers would come back unchanged.
                self._has_room_now(line_of("settled", {"answers": keys}))

    def set_durable(self, durable: bool) -> None:
        """Have all lines on the disk, those to come too, or leave that to the database again."""
        with self._lock:
            is_new = durable and not self._durable
            self._durable = durable
            if not is_new or self._file is None or self._failure:
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
            for suffix in (".spare", ".next"):
                self.path.with_suffix(suffix).unlink(missing_ok=True)
            release(self._held)

    def _append(self, text: bytes) -> None:
        if self._file is None:
            make_folder(self.path.parent)
            if not self._held.is_locked:
                self._held.acquire(blocking=False)
            # Some file systems store no zeros.
            write_file(self.path.with_suffix(".spare"), os.urandom(SPARE_BYTES))
            self._file = open_to_append(self.path)
            write_whole(self._file, self._first)
            self._size = len(self._first)
            if self._durable:
                sync_folder(self.path.parent)
        write_whole(self._file, text)
        self._size += len(text)
        if self._durable:
            os.fsync(self._file)

    def _has_room_now(self, text: bytes) -> bool:
        """Append a line after all, where that is possible, and return whether it was."""
        if self._file is None:
            return False
        try:
            self._append(text)
        except OSError:
            self._cut_off()
            return False
        return True

    def _is_rewritten(self) -> bool:
        """Replace the open file by one of the open lines alone, at one stroke, and return whether
        that was possible."""
        content = b"".join([self._first, *(line.text for line in self._open.values())])
        if len(content) == self._size:
            return True
        beside = self.path.with_suffix(".next")
        try:
            write_file(beside, content, self._durable)
        except OSError:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            return False
        # Some systems rename no file that is open.
        os.close(cast(int, self._file))
        self._file = None
        try:
            os.replace(beside, self.path)
            self._size = len(content)
        except OSError:
            pass
        try:
            self._file = open_to_append(self.path)
        except OSError as error:
            self._fail(error)
        return self._size == len(content)

    def _fail(self, error: OSError) -> StoreError:
        """Note the failure for good and return it, and make room for what calls under way bring."""
        self._cut_off()
        with suppress(OSError):
            self.path.with_suffix(".spare").unlink(missing_ok=True)
        self._failure = self._failure or StoreError(
            f"DISTILLERY_HOME {self.path}: can't be written ({error.strerror or error}), so that "
            "answers could be lost, and nothing more is asked; free some space or correct the "
            "folder's rights, then run again"
        )
        return self._failure

    def _cut_off(self) -> None:
        """Take out what was written of a line that is not whole."""
        if self._file is not None:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)


class Item(NamedTuple):
    """What a line holds: an answer, an entry of the ledger, or both. row: of the table
    teacher_answers. since: the time before which it replaces what is stored."""

    row: dict[str, Any] | None
    since: datetime | None
    call: Call | None
    line: bytes


@dataclass
class Contents:
    """What a journal holds. items: answers and calls that ended. lost: calls that did not, by their
    ids. unreadable: lines that can't be read or are refused."""

    items: list[Item] = field(default_factory=list)
    lost: dict[str, Item] = field(default_factory=dict)
    unreadable: list[bytes] = field(default_factory=list)

    def refuse(self, items: Iterable[Item]) -> None:
        """Move items that the database refuses to the lines that are kept."""
        refused = {item.line for item in items}
        self.unreadable.extend(refused)
        self.items = [item for item in self.items if item.line not in refused]
        self.lost = {name: item for name, item in self.lost.items() if item.line not in refused}


@dataclass(frozen=True)
class Recovered:
    """What was found in a journal that no process holds. `unreadable`: lines that can't be read, or
    that the database refuses. `kept`: the file with these; None if there are none. `trouble`: why
    the journal stays as it is, or ""."""

    journal: Path
    answers: int = 0
    calls: int = 0
    lost: int = 0
    unreadable: int = 0
    kept: Path | None = None
    trouble: str = ""

    def line(self) -> str:
        """Return it in one line."""
        if self.trouble:
            return f"{self.journal}: stays as it is: {self.trouble}"
        line = f"{self.answers} answers, {self.calls} calls, {self.lost} lost calls"
        if self.kept:
            line += f", {self.unreadable} lines that can't be taken in, kept in {self.kept}"
        return f"{self.journal}: {line}"


TakeIn = Callable[[list[Item]], list[Item]]
"""Writes what a journal holds into the database, where what is there already stays; returns what
the database refuses."""


def recover(database: Database, take_in: TakeIn) -> list[Recovered]:
    """Take in a database's journals that no process holds, and remove them. Lines that can't be
    read or taken in are kept in a file beside. A process that is killed meanwhile leaves a journal
    that is taken in again, which changes nothing. A journal that can't be taken in stays, and a
    warning tells why. Raises StoreUnavailable where the database does not answer."""

    def taken_in(path: Path) -> Recovered:
        contents = read_journal(path)
        contents.refuse(take_in([*contents.items, *contents.lost.values()]))
        recovered = summed_up(path, contents)
        if recovered.kept:
            write_file(recovered.kept, b"\n".join([*contents.unreadable, b""]))
        for suffix in (".spare", ".next"):
            path.with_suffix(suffix).unlink(missing_ok=True)
        path.unlink()
        return recovered

    found = each_abandoned(database, taken_in)
    for recovered in found:
        told = "not taken" if recovered.trouble else "taken"
        _log.warning("%s into the label database: %s", told, recovered.line())
    return found


def examine(database: Database) -> list[Recovered]:
    """Return what `recover` would take in."""
    return each_abandoned(database, lambda path: summed_up(path, read_journal(path)))


def each_abandoned(database: Database, look: Callable[[Path], Recovered]) -> list[Recovered]:
    """Return what `look` finds in each of a database's journals that no process holds, or why that
    is not possible. One process does so at a time, and others wait: none takes the lock of one that
    only looks for that of an owner."""
    found: list[Recovered] = []
    if not journals_of(database):
        return found
    lock = FileLock(journal_folder().with_suffix(".lock"), mode=0o600)
    try:
        lock.acquire()
    except OSError as error:
        raise StoreError(f"DISTILLERY_HOME {lock.lock_file}: {reason_of(error)}") from None
    try:
        for path in journals_of(database):
            try:
                with if_abandoned(path) as is_abandoned:
                    if is_abandoned:
                        found.append(look(path))
            except StoreUnavailable:
                raise
            except StoreError as error:
                found.append(Recovered(path, trouble=str(error)))
            except OSError as error:
                found.append(Recovered(path, trouble=reason_of(error)))
    finally:
        lock.release()
    return found


def reason_of(error: OSError) -> str:
    return f"can't be used ({error.strerror or error}); free some space or correct its rights"


def summed_up(path: Path, contents: Contents) -> Recovered:
    """Return the numbers of what a journal holds."""
    return Recovered(
        journal=path,
        answers=sum(item.row is not None for item in contents.items),
        calls=sum(item.call is not None for item in contents.items),
        lost=len(contents.lost),
        unreadable=len(contents.unreadable),
        kept=path.with_suffix(".unreadable") if contents.unreadable else None,
    )


def left_beside(database: Database) -> list[Path]:
    """Return the files of this user on this machine that may hold answers which are not in a
    database, or no more: journals, and lines that could not be taken in."""
    return [*journals_of(database), *files_of(database, ".unreadable")]


def of_other_databases(database: Database) -> list[Path]:
    """Return this user's journals on this machine that are not of a database."""
    return sorted(set(journal_folder().glob("*.jsonl")).difference(journals_of(database)))


def keep_unreadable(database: Database, name: str, lines: Iterable[bytes]) -> Path:
    """Keep lines that nobody can read, of something called `name`, in a file beside the journals,
    and return its path. Raises StoreError where that can't be written."""
    path = journal_folder() / f"{prefixes_of(database)[0]}-{name}.unreadable"
    try:
        make_folder(path.parent)
        write_file(path, b"\n".join([*lines, b""]))
    except OSError as error:
        raise StoreError(f"DISTILLERY_HOME {path}: {reason_of(error)}") from None
    return path


def journal_folder() -> Path:
    """Return the folder of this user's journals on this machine."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    return LocalSettings().folder / "journals" / str(user)


def make_folder(folder: Path) -> None:
    """Make the folder of a user's journals, in one where other users may make theirs."""
    above = folder.parent
    if not above.exists():
        above.mkdir(parents=True, exist_ok=True)
        above.chmod(0o1777)
    folder.mkdir(exist_ok=True, mode=0o700)


def journals_of(database: Database) -> list[Path]:
    """Return a database's journals, those of living processes too."""
    return files_of(database, ".jsonl")


def files_of(database: Database, suffix: str) -> list[Path]:
    """Return the files of this user on this machine that are of a database."""
    prefixes = prefixes_of(database)
    return sorted(
        path for prefix in prefixes for path in journal_folder().glob(f"{prefix}-*{suffix}")
    )


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


def prefixes_of(database: Database) -> tuple[str, ...]:
    """Return what the names of a database's journals begin with, and what they began with before
    databases had ids, and where one had none. The id alone would give a copy of a database the
    journals of the other."""
    address = address_of(database.url)
    ids = [database.identity, "None"]
    return (*(hash_of([*address, each]) for each in ids), hash_of(address))


def address_of(url: URL) -> list[Any]:
    """Return what tells where a database is: server and name, or the file. Users and passwords are
    not in it."""
    if url.get_backend_name() == "sqlite":
        named: Any = str(Path(url.database or "").absolute().resolve())
    else:
        named = {"host": url.host, "port": url.port, "database": url.database}
        named |= {"database": url.query["dbname"]} if "dbname" in url.query else {}
        named |= {name: url.query[name] for name in LIBPQ if name in url.query}
        for name, variable in LIBPQ.items():
            named[name] = named.get(name) or os.environ.get(variable)
        named["host"] = str(named["host"] or "").lower()
        named["port"] = int(named["port"] or POSTGRESQL_PORT)
    return [url.get_backend_name(), named]


def hash_of(values: list[Any]) -> str:
    """Return 16 hex digits of the SHA-256 of `values`."""
    text = json.dumps(values, sort_keys=True, default=str)
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
    """Return what a journal holds. A line that was cut off or changed is among the unreadable.
    Raises StoreError for a journal of another form."""
    contents = Contents()
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            read_line(line.rstrip(b"\r"), contents)
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            contents.unreadable.append(line)
    return contents


def read_line(line: bytes, contents: Contents) -> None:
    """Add what a line holds. Raises ValueError, TypeError, KeyError, RecursionError or
    OverflowError for a line that is not as it was written, and StoreError for one of another
    form."""
    check, _, text = line.partition(b" ")
    if len(check) != 8 or int(check, 16) != zlib.crc32(text):
        raise ValueError("the checksum is another one")
    kind, values = json.loads(text)
    if kind == "journal":
        if values["form"] != FORM:
            raise StoreError(
                f"written by another version of Distillery (form {values['form']}); run "
                "`distillery labels recover` of that version"
            )
    elif kind == "begun":
        call = call_of(values)
        contents.lost[call.call_id] = Item(None, None, call, line)
    elif kind == "call":
        add_item(Item(None, None, call_of(values), line), contents)
    elif kind == "answer":
        row = values["row"]
        row["created_at"] = datetime.fromisoformat(row["created_at"])
        if row["tokens"] is not None:
            row["tokens"] = base64.b64decode(row["tokens"])
        since = datetime.fromisoformat(values["since"]) if values["since"] else None
        call_or_none = call_of(values["call"]) if values["call"] else None
        add_item(Item(row, since, call_or_none, line), contents)
    elif kind == "settled":
        keys = set(values["answers"])
        contents.items = [
            item
            for item in contents.items
            if item.row is None or item.row["request_key"] not in keys
        ]
    else:
        raise ValueError(f"{kind}: not a line of this version")


def add_item(item: Item, contents: Contents) -> None:
    """Add an item, whose call is not lost then."""
    contents.items.append(item)
    if item.call:
        contents.lost.pop(item.call.call_id, None)


def call_of(values: dict[str, Any]) -> Call:
    """Return the ledger's entry that a line holds."""
    return Call(**{**values, "called_at": datetime.fromisoformat(values["called_at"])})


def open_to_append(path: Path) -> int:
    """Open a file that is this user's alone, to which bytes are written as they are."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, 0o600)


def write_file(path: Path, content: bytes, durable: bool = False) -> None:
    """Write a file that is this user's alone, in place of an older one."""
    path.unlink(missing_ok=True)
    file = open_to_append(path)
    try:
        write_whole(file, content)
        if durable:
            os.fsync(file)
    finally:
        os.close(file)


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
