"""The SQL database that runs and machines share (DISTILLERY_LABELS): the teacher's answers and the leases on work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine, MetaData, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    InternalError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_random_exponential

from distillery.errors import StoreError, StoreUnavailable
from distillery.settings import LocalSettings

T = TypeVar("T")

METADATA = MetaData()

SCHEMA = "0002"
"""The newest of migrations/versions: what this version of the project reads and writes."""

VERSION_TABLE = "distillery_version"

_TABLE_LOCK = 7213548210

_LIMITS = {
    "connect_timeout": 10,
    "tcp_user_timeout": 20_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
}
"""For PostgreSQL, in seconds and ms: without them a machine that vanished is noticed after a quarter of an hour."""


class Database:
    """SQLite or PostgreSQL at `url`, as SQLAlchemy writes it; its tables are made, or brought to this version's schema.
    `wait_s`: how long an outage is waited out, by default DISTILLERY_STORE_WAIT.

    Raises StoreError, or StoreUnavailable where it does not answer."""

    def __init__(self, url: str | None = None, wait_s: float | None = None) -> None:
        settings = LocalSettings()
        self.url = _checked_url(url or settings.labels_url, settings.container)
        self.backend = self.url.get_backend_name()
        self._wait = settings.store_wait if wait_s is None else wait_s
        self._engine = _engine(self.url)
        self.run(self._migrate)

    def run(self, work: Callable[[Any], T]) -> T:
        """`work(connection)` in a transaction. An outage is waited out, and what is done twice then, because only the
        answer to its commit was lost, must do no harm."""
        patiently = retry(
            retry=retry_if_exception_type(StoreUnavailable),
            wait=wait_random_exponential(multiplier=0.5, max=5),
            stop=stop_after_delay(self._wait),
            reraise=True,
        )
        return patiently(self.run_once)(work)

    def run_once(self, work: Callable[[Any], T]) -> T:
        """The same without waiting."""
        with self._errors(), self._engine.begin() as connection:
            return work(connection)

    def insert(self, table: Any) -> Any:
        """An INSERT that has the dialect's ON CONFLICT."""
        from sqlalchemy.dialects import postgresql, sqlite

        return (postgresql if self.backend == "postgresql" else sqlite).insert(table)

    def forget_log(self) -> None:
        """Has what was deleted leave SQLite's write-ahead log too."""
        if self.backend == "sqlite":
            with self._errors(), self._engine.connect() as connection:
                blocked = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").scalar()
            if blocked:
                raise StoreUnavailable(
                    f"DISTILLERY_LABELS {_shown(self.url)}: another run reads it, so that its log still holds what was "
                    "deleted; run the same again when that run has ended"
                )

    def close(self) -> None:
        self._engine.dispose()

    def _migrate(self, connection: Any) -> None:
        if _version(connection) == SCHEMA:
            return
        # One process at a time; SQLite's own lock is taken at the first write, which is too late.
        lock = (
            "BEGIN IMMEDIATE"
            if self.backend == "sqlite"
            else f"SELECT pg_advisory_xact_lock({_TABLE_LOCK})"
        )
        connection.exec_driver_sql(lock)
        if _version(connection) == SCHEMA:
            return
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config(attributes={"connection": connection, "version_table": VERSION_TABLE})
        config.set_main_option("script_location", str(files("distillery.storage") / "migrations"))
        try:
            command.upgrade(config, SCHEMA)
        except CommandError:
            raise StoreError(
                f"DISTILLERY_LABELS {_shown(self.url)}: its schema {_version(connection)} is of a newer version of "
                "Distillery; install that"
            ) from None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise _store_error(self.url, error) from None


def _version(connection: Any) -> str | None:
    """The schema that the database has; None where it has none of ours."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    version: str | None = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))  # noqa: S608 - a constant
    return version


def _shown(url: URL) -> str:
    """`url` without its password, which may stand in the query too."""
    return url.set(query={}).render_as_string(hide_password=True)


def _checked_url(url: str, container: bool) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise StoreError(
            "DISTILLERY_LABELS: no SQLAlchemy URL, such as sqlite:////data/labels.db"
        ) from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise StoreError(
            f"DISTILLERY_LABELS: {parsed.drivername} is not supported; give a sqlite or postgresql URL"
        )
    if container and parsed.drivername == "sqlite":
        raise StoreError(
            "DISTILLERY_LABELS: a container's SQLite file goes with the container, and paid answers with it; "
            "give a postgresql URL"
        )
    return parsed


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite" and url.database:
        try:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"DISTILLERY_LABELS {url.database}: its folder can't be made ({error.strerror}); set another place"
            ) from error
    try:
        limits = _LIMITS if url.get_backend_name() == "postgresql" else {}
        engine = create_engine(url, pool_pre_ping=True, hide_parameters=True, connect_args=limits)
    except (ModuleNotFoundError, NoSuchModuleError):
        raise StoreError(
            "DISTILLERY_LABELS: needs psycopg for PostgreSQL; install distillery[postgres]"
        ) from None
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    # secure_delete: what is deleted is overwritten, not left in the file.
    for pragma in (
        "busy_timeout = 30000",
        "journal_mode = WAL",
        "synchronous = FULL",
        "secure_delete = ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
    # SQLite's own knows the letters of ASCII alone.
    connection.create_function(
        "lower", 1, lambda text: text.lower() if isinstance(text, str) else text
    )


def _store_error(url: URL, error: SQLAlchemyError) -> StoreError:
    """One line without the SQL, its rows or the password."""
    origin = str(error.orig) if isinstance(error, DBAPIError) else type(error).__name__
    reason = " ".join(origin.split())[:200]
    place = f"DISTILLERY_LABELS {_shown(url)}"
    postgresql = url.get_backend_name() == "postgresql"
    if "full" in reason.lower():
        return StoreError(
            f"{place}: the disk is full; free some space or set another place, then run again"
        )
    if "authentication failed" in reason:
        return StoreError(f"{place}: refuses the login; correct its user or password")
    away = isinstance(error, OperationalError | InterfaceError | InternalError | PoolTimeout)
    if (postgresql and away) or "locked" in reason:
        return StoreUnavailable(
            f"{place}: the database does not answer ({reason}); check it and run again"
        )
    what = "the user's rights" if postgresql else "the file and its folder"
    return StoreError(f"{place}: can't be used ({reason}); check {what}, or set another place")
