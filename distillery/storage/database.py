"""The SQL database that runs and machines share (DISTILLERY_LABELS): the teacher's answers, its
calls, what each run may spend, and the leases on work. Tables and their migrations are in
migrations/versions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from sqlalchemy import (
    Column,
    Engine,
    MetaData,
    String,
    Table,
    bindparam,
    create_engine,
    event,
    inspect,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    InternalError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.sql.elements import TextClause
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_random_exponential

from distillery.errors import RowRefused, StoreError, StoreUnavailable, one_line
from distillery.settings import LocalSettings

T = TypeVar("T")

METADATA = MetaData()

IDENTITY = Table("database_identity", METADATA, Column("identity", String(32), primary_key=True))
"""The database's id, in its only row: two databases may have had the same address."""

SCHEMA = "0011"
"""The newest revision in migrations/versions: what this version of Distillery reads and writes."""

VERSION_TABLE = "distillery_version"

MIGRATION_LOCK = 7213548210
"""The number of PostgreSQL's advisory lock: one process migrates at a time."""

POSTGRESQL_LIMITS = {
    "connect_timeout": 10,
    "tcp_user_timeout": 20_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
}
"""In seconds and, tcp_user_timeout, in ms. Without them it takes a quarter of an hour to notice
that the database's machine has vanished."""


def nothing() -> None:
    """Do nothing."""


class Database:
    """SQLite or PostgreSQL at `url`, written as for SQLAlchemy; by default DISTILLERY_LABELS. Its
    tables are created, or migrated to this version's schema. `identity` is its id, which it got
    then. With `migrates=False`, for those who only look, it is left as it is: StoreError is raised
    where its tables are of an older version, and where there are none, `identity` is "".

    An outage is waited out for `wait_s` seconds, by default DISTILLERY_STORE_WAIT. Every method
    raises StoreUnavailable where the database does not answer, and StoreError for other errors."""

    def __init__(
        self, url: str | None = None, wait_s: float | None = None, migrates: bool = True
    ) -> None:
        settings = LocalSettings()
        self.url = checked_url(url or settings.labels_url, settings.container)
        self.backend = self.url.get_backend_name()
        self._wait_s = settings.store_wait if wait_s is None else wait_s
        self._engine = open_engine(self.url)
        if migrates:
            self.identity = self.run(self._open)
        elif self._is_missing_file():
            self.identity = ""
        else:
            self.identity = self.run(self._look)

    def run(
        self,
        work: Callable[[Any], T],
        on_failure: Callable[[], None] = nothing,
        wait_s: float | None = None,
    ) -> T:
        """Return `work(connection)`, done in a transaction and retried during an outage, of which
        each failed try calls `on_failure`. `wait_s`: another time to wait it out. Work is done
        twice where only the answer to its commit was lost: that must do no harm."""
        patiently = retry(
            retry=retry_if_exception_type(StoreUnavailable),
            wait=wait_random_exponential(multiplier=0.5, max=5),
            stop=stop_after_delay(self._wait_s if wait_s is None else wait_s),
            before_sleep=lambda _state: on_failure(),
            reraise=True,
        )
        return patiently(self.run_once)(work)

    def run_once(self, work: Callable[[Any], T]) -> T:
        """Return `work(connection)`, done in a transaction, without retries."""
        with self._one_line_errors(), self._engine.begin() as connection:
            return work(connection)

    def insert(self, table: Any) -> Any:
        """Return an INSERT that has the dialect's ON CONFLICT."""
        dialect: Any = postgresql if self.backend == "postgresql" else sqlite
        return dialect.insert(table)

    def truncate_log(self) -> None:
        """Remove what was deleted from SQLite's write-ahead log too."""
        if self.backend != "sqlite":
            return
        with self._one_line_errors(), self._engine.connect() as connection:
            blocked = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").scalar()
        if blocked:
            raise StoreUnavailable(
                f"DISTILLERY_LABELS {without_password(self.url)}: another run reads it, so that "
                "its log still holds what was deleted; run the same again when that run has ended"
            )

    def close(self) -> None:
        self._engine.dispose()

    def _open(self, connection: Any) -> str:
        """Make or migrate the tables and return the id, which a database without one gets."""
        if schema_version(connection) == SCHEMA and (identity := identity_of(connection)):
            return identity
        # One process at a time. SQLite takes its lock at the first write by itself: too late.
        lock = f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"
        if self.backend == "sqlite":
            lock = "BEGIN IMMEDIATE"
        connection.exec_driver_sql(lock)
        if schema_version(connection) != SCHEMA:
            self._migrate(connection)
        identity = identity_of(connection)
        if identity is None:
            # A copy of some of the tables may have left it out.
            identity = uuid4().hex
            connection.execute(IDENTITY.insert().values(identity=identity))
        return identity

    def _is_missing_file(self) -> bool:
        """Return whether it is a file of SQLite's that to connect would make."""
        return self.backend == "sqlite" and not Path(self.url.database or "").is_file()

    def _look(self, connection: Any) -> str:
        """Return the id of a database that is of this version, "" where it has none."""
        version = schema_version(connection)
        if version is None:
            return ""
        if version < SCHEMA:
            raise StoreError(
                f"DISTILLERY_LABELS {without_password(self.url)}: its schema {version} is of an "
                "older version of Distillery, and nothing is changed to look; a run or "
                "`distillery labels list` upgrades it"
            )
        if version > SCHEMA:
            raise self._is_newer(version)
        return identity_of(connection) or ""

    def _is_newer(self, version: str | None) -> StoreError:
        return StoreError(
            f"DISTILLERY_LABELS {without_password(self.url)}: its schema {version} is of a newer "
            "version of Distillery; install that"
        )

    def _migrate(self, connection: Any) -> None:
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config(attributes={"connection": connection, "version_table": VERSION_TABLE})
        config.set_main_option("script_location", str(files("distillery.storage") / "migrations"))
        try:
            command.upgrade(config, SCHEMA)
        except CommandError:
            raise self._is_newer(schema_version(connection)) from None

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise store_error(self.url, error) from None


def insert_new(table: Table, conflict: str = "DO NOTHING") -> TextClause:
    """Return an INSERT of whole rows, with what is to be done with those that are there already. It
    is text, which SQLAlchemy compiles once; its own ON CONFLICT is compiled at each execution."""
    names = [column.name for column in table.columns]
    values = ", ".join(f":{name}" for name in names)
    columns = ", ".join(names)
    into = f"INSERT INTO {table.name} ({columns}) VALUES ({values})"  # noqa: S608 - constants
    typed = [bindparam(column.name, type_=column.type) for column in table.columns]
    return text(f"{into} ON CONFLICT {conflict}").bindparams(*typed)


def schema_version(connection: Any) -> str | None:
    """Return the database's revision; None where it has no tables of Distillery's."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    query = text(f"SELECT version_num FROM {VERSION_TABLE}")  # noqa: S608 - a constant
    version: str | None = connection.scalar(query)
    return version


def identity_of(connection: Any) -> str | None:
    """Return the database's id; None where it has none."""
    identity: str | None = connection.scalar(select(IDENTITY.c.identity))
    return identity


def without_password(url: URL) -> str:
    """Return `url` without its password, which may be in the query too."""
    return url.set(query={}).render_as_string(hide_password=True)


def checked_url(url: str, container: bool) -> URL:
    """Return the parsed URL with its driver. Raises StoreError for other databases, and for SQLite
    in a container that keeps no files."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise StoreError(
            "DISTILLERY_LABELS: not an SQLAlchemy URL; give one such as sqlite:////data/labels.db"
        ) from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise StoreError(
            f"DISTILLERY_LABELS: {parsed.drivername} is not supported; "
            "give a sqlite or postgresql URL"
        )
    if container and parsed.drivername == "sqlite":
        raise StoreError(
            "DISTILLERY_LABELS: an SQLite file in a container vanishes with the container, and the "
            "paid answers with it; give a postgresql URL"
        )
    return parsed


def open_engine(url: URL) -> Engine:
    """Return SQLAlchemy's engine for `url`; the folder of an SQLite file is made."""
    is_sqlite = url.get_backend_name() == "sqlite"
    if is_sqlite and url.database:
        try:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"DISTILLERY_LABELS {url.database}: its folder can't be made ({error.strerror}); "
                "set another path"
            ) from error
    limits = {} if is_sqlite else POSTGRESQL_LIMITS
    try:
        engine = create_engine(url, pool_pre_ping=True, hide_parameters=True, connect_args=limits)
    except (ModuleNotFoundError, NoSuchModuleError):
        raise StoreError(
            "DISTILLERY_LABELS: needs psycopg for PostgreSQL; install distillery[postgres]"
        ) from None
    if is_sqlite:
        event.listen(engine, "connect", set_up_sqlite)
    return engine


def set_up_sqlite(connection: Any, _record: Any) -> None:
    """Prepare a new connection: durable commits, and deletion that overwrites what was deleted."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout = 30000")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA secure_delete = ON")
    cursor.close()
    # SQLite's own lower() knows the letters of ASCII only.
    connection.create_function("lower", 1, lower)


def lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def store_error(url: URL, error: SQLAlchemyError) -> StoreError:
    """Return the one line for `error`, without the SQL, its rows or the password."""
    origin = type(error).__name__
    if isinstance(error, DBAPIError):
        origin = str(error.orig)
    reason = one_line(origin)
    setting = f"DISTILLERY_LABELS {without_password(url)}"
    if "full" in reason.lower():
        return StoreError(
            f"{setting}: the disk is full; free some space or set another path, then run again"
        )
    if "authentication failed" in reason:
        return StoreError(f"{setting}: refuses the login; correct its user or password")
    if isinstance(error, DataError | IntegrityError):
        return RowRefused(
            f"{setting}: refuses a row ({reason}); report it as a defect of Distillery"
        )
    is_postgresql = url.get_backend_name() == "postgresql"
    away = isinstance(error, OperationalError | InterfaceError | InternalError | PoolTimeout)
    if (is_postgresql and away) or "locked" in reason:
        return StoreUnavailable(
            f"{setting}: the database does not answer ({reason}); check it and run again"
        )
    check = "the user's rights" if is_postgresql else "the file and its folder"
    return StoreError(f"{setting}: can't be used ({reason}); check {check}, or set another path")
