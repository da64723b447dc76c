"""The local registry: MLflow's model registry for versions, a folder on this machine for files."""

import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from distillery.errors import ArtifactDamaged, ModelGone, RegistryError, RegistryUnavailable
from distillery.records import RegisteredModel
from distillery.registry.base import ARCHIVED, CHAMPION, Events, Models, Registry
from distillery.registry.history import Event, event_tag, events_in
from distillery.registry.manifest import (
    MANIFEST,
    altered_error,
    copy_folder,
    first_line,
    mask_credentials,
    verify_files,
)
from distillery.settings import LocalSettings
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import FileEntry, sha256_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from sqlalchemy import URL

_log = logging.getLogger(__name__)

LOCK_S = 60
"""Seconds to wait for another process's promotion, which takes less than one."""


class LocalRegistry(Registry):
    """Versions and aliases are in MLflow at `url`, files in DISTILLERY_HOME/models/NAME/DIGEST.

    DIGEST is that of the manifest. A machine that shares the registry, but lacks this folder, takes
    the files from the artifact store, where the stages keep them under their own digest, and the
    manifest from manifests/DIGEST.json there. MLflow's server has the same versions, but no files.

    The champion is MLflow's alias `champion`; a former champion has the tag role=archived, and a
    rejected version role=rejected. The history is in tags of the registered model.

    Promotions exclude each other: on SQLite by a lock file beside the database, which holds for the
    processes that share that disk; on PostgreSQL by an advisory lock, which holds for all machines.
    So of two runs that promote at once, the second finds the first one's champion. Behind MLflow's
    own server or on another database there is no lock: the champion is read before the write and
    after it, and a promotion by another run between the first read and the write is overwritten.
    """

    kind = "local"

    def __init__(self, url: str | None = None) -> None:
        settings = LocalSettings()
        self._url = with_driver(url or settings.registry_url)
        self._models = settings.folder / "models"
        self.location = mask_credentials(self._url)
        # MLflow reads these when it is imported. By default it retries a dead server for minutes.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        url = self.database_url()
        if url is not None and url.drivername.startswith("sqlite") and url.database:
            with self.file_lock(f"{url.database}.lock"):
                yield
        elif url is not None and url.drivername.startswith("postgresql"):
            with self.postgres_lock(url, name):
                yield
        else:
            yield

    def database_url(self) -> "URL | None":
        """Return the database that MLflow uses; None for one behind MLflow's server."""
        from sqlalchemy import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            return make_url(self._url)
        except ArgumentError:
            return None

    @contextmanager
    def file_lock(self, path: str) -> Iterator[None]:
        """Hold the lock beside a SQLite file."""
        lock = FileLock(path, timeout=LOCK_S)
        try:
            lock.acquire()
        except Timeout as error:
            raise RegistryUnavailable(
                f"{path}: another process holds this lock for more than {LOCK_S} s; try again later"
            ) from error
        except OSError as error:
            raise RegistryError(
                f"{path}: can't be written ({first_line(error)}); correct DISTILLERY_REGISTRY"
            ) from error
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def postgres_lock(self, url: "URL", name: str) -> Iterator[None]:
        """Hold PostgreSQL's advisory lock of this model's name, until the transaction ends."""
        from sqlalchemy import create_engine, text
        from sqlalchemy.pool import NullPool

        key = {"key": f"distillery/{name}"}
        with ExitStack() as stack:
            with self.mlflow():
                connection = stack.enter_context(create_engine(url, poolclass=NullPool).begin())
                connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_S}s'"))
                connection.execute(
                    text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 0))"), key
                )
            yield

    def set_champion(
        self, model: RegisteredModel, before: RegisteredModel | None, event: Event
    ) -> None:
        self.add_event(model, event)
        with self.mlflow() as client:
            client.set_registered_model_alias(model.name, CHAMPION, model.version)
            if before is not None:
                client.set_model_version_tag(before.name, before.version, "role", ARCHIVED)

    def add_event(self, model: RegisteredModel, event: Event) -> None:
        with self.mlflow() as client:
            client.set_registered_model_tag(model.name, *event_tag(event))

    def history(self, name: str) -> Events:
        from mlflow.exceptions import MlflowException

        with self.mlflow() as client:
            try:
                tags = client.get_registered_model(name).tags
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return []
        return events_in(tags, f"{self.location}: {name}")

    def set_tag(self, model: RegisteredModel, name: str, value: str) -> None:
        with self.mlflow() as client:
            client.set_model_version_tag(model.name, model.version, name, value)

    def names(self) -> tuple[str, ...]:
        names = []
        with self.mlflow() as client:
            page = client.search_registered_models()
            names += [model.name for model in page]
            while page.token:
                page = client.search_registered_models(page_token=page.token)
                names += [model.name for model in page]
        return tuple(names)

    def versions(self, name: str) -> Models:
        query = f"name = '{name}'"
        champion = None
        with self.mlflow() as client:
            page = client.search_model_versions(query)
            found = list(page)
            while page.token:
                page = client.search_model_versions(query, page_token=page.token)
                found += page
            if found:
                champion = client.get_registered_model(name).aliases.get(CHAMPION)
        ours = [version for version in found if "manifest_sha256" in version.tags]
        ours.sort(key=lambda version: int(version.version), reverse=True)
        return [self.record_of(version, str(version.version) == str(champion)) for version in ours]

    def store_folder(self, content: Path, name: str, digest: str) -> str:
        final = self._models / name / digest
        share_manifest(content, digest)
        final.parent.mkdir(parents=True, exist_ok=True)
        beside = final.with_name(f".writing-{uuid.uuid4().hex[:8]}")
        try:
            shutil.move(content, beside)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(beside, final)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        if urlsplit(self._url).scheme in ("http", "https"):
            # MLflow's server refuses a path of another machine. The files are found by name and
            # digest, whatever this says.
            return f"distillery:/{name}/{digest}"
        return str(final)

    def add_version(self, name: str, uri: str, tags: dict[str, str]) -> RegisteredModel:
        from mlflow.exceptions import MlflowException

        with self.mlflow() as client:
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            # mlflow.register_model wants an MLflow model; create_model_version takes any folder.
            version = client.create_model_version(name, source=uri, tags=tags)
            return self.record_of(version, is_champion=False)

    def record_of(self, version: "ModelVersion", is_champion: bool) -> RegisteredModel:
        number, uri = str(version.version), str(version.source)
        return self.record(version.name, number, is_champion, uri, version.tags)

    def fetch_files(self, model: RegisteredModel, folder: Path) -> None:
        local = self.local_folder(model)
        if local.is_dir():
            copy_folder(local, folder)
            # DISTILLERY_STORE may name another store by now, which lacks the manifest.
            share_manifest(folder, model.manifest_sha256)
            return
        with self.store_of_missing(model) as store:
            copy_folder(store.fetch(model.artifact), folder)
        (folder / MANIFEST).write_bytes(self.read_file(model, MANIFEST))

    def holds_files(self, model: RegisteredModel, files: Sequence[FileEntry]) -> bool:
        folder = self.local_folder(model)
        if not folder.is_dir():
            return ArtifactStore().holds(model.artifact)
        verify_files(folder, model)
        return True

    def read_file(self, model: RegisteredModel, file: str) -> bytes:
        folder = self.local_folder(model)
        if not folder.is_dir():
            with self.store_of_missing(model) as store:
                if file == MANIFEST:
                    return store.read_object(shared_manifest_name(model.manifest_sha256))
                folder = store.fetch(model.artifact)
        if not (folder / file).is_file():
            raise altered_error(model, file)
        return (folder / file).read_bytes()

    def local_folder(self, model: RegisteredModel) -> Path:
        return self._models / model.name / model.manifest_sha256

    @contextmanager
    def store_of_missing(self, model: RegisteredModel) -> Iterator[ArtifactStore]:
        """Give the artifact store, for a model whose folder this machine lacks."""
        store = ArtifactStore()
        try:
            yield store
        except ArtifactDamaged as error:
            raise ModelGone(
                f"{self.local_folder(model)}: the folder of {model.name} version {model.version} "
                f"is gone, and {store.url} does not have it either; register it again"
            ) from error

    @cached_property
    def _client(self) -> "MlflowClient":
        from mlflow import MlflowClient

        for noisy in ("mlflow.store.db.utils", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self._models.mkdir(parents=True, exist_ok=True)
        # The first client creates MLflow's tables; two that do so at once break each other.
        with FileLock(self._models / ".lock"):
            self._make_tables()
            client = MlflowClient(tracking_uri=self._url, registry_uri=self._url)
            client.search_registered_models(max_results=1)
        return client

    def _make_tables(self) -> None:
        """Make a SQLite file with MLflow's tables where there is none. It takes seconds, and a file
        whose tables were half made when its process was killed could never be opened."""
        from mlflow import MlflowClient

        url = self.database_url()
        if url is None or not url.drivername.startswith("sqlite") or not url.database:
            return
        database = Path(url.database)
        if database.exists() or not database.parent.is_dir():
            return
        _log.info("making the registry %s, once; it takes seconds", database)
        with TemporaryDirectory(dir=database.parent, prefix=".registry-") as folder:
            made = Path(folder) / "registry.db"
            own = url.set(database=str(made)).render_as_string(hide_password=False)
            MlflowClient(tracking_uri=own, registry_uri=own).search_registered_models(max_results=1)
            # Another process may have been faster.
            if not database.exists():
                made.rename(database)

    @contextmanager
    def mlflow(self) -> "Iterator[MlflowClient]":
        """Give MLflow's client, and raise its errors as RegistryError in one line."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import OperationalError, SQLAlchemyError

        try:
            yield self._client
        except (OperationalError, MlflowException) as error:
            # The texts hold the URL with its password, so they are masked and not chained.
            text = mask_credentials(first_line(error))
            code = getattr(error, "error_code", "TEMPORARILY_UNAVAILABLE")
            if code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"):
                raise RegistryUnavailable(
                    f"{self.location}: the registry does not answer ({text})"
                ) from None
            raise RegistryError(f"{self.location}: {text}") from None
        except ModuleNotFoundError as error:
            raise RegistryError(
                f"DISTILLERY_REGISTRY {self.location}: needs {error.name}, which is not installed; "
                "for PostgreSQL, install distillery[postgres]"
            ) from None
        except (SQLAlchemyError, OSError) as error:
            raise RegistryError(
                f"{self.location}: can't be opened as a registry ({first_line(error)}); "
                "correct DISTILLERY_REGISTRY"
            ) from error


def with_driver(url: str) -> str:
    """Return the URL of a database with psycopg, which the extra `postgres` installs, as the driver
    for PostgreSQL. SQLAlchemy's own default is psycopg2, which is used where it is installed."""
    scheme, separator, rest = url.partition("://")
    if scheme in ("postgres", "postgresql") and find_spec("psycopg2") is None:
        return f"postgresql+psycopg{separator}{rest}"
    return url


def share_manifest(folder: Path, digest: str) -> None:
    """Write the folder's manifest, if it is unaltered, to the store that other machines share."""
    manifest = folder / MANIFEST
    if manifest.is_file() and sha256_of(manifest) == digest:
        ArtifactStore().write_object(shared_manifest_name(digest), manifest.read_bytes())


def shared_manifest_name(digest: str) -> str:
    """Return the manifest's name in the artifact store.

    It is neither an artifact nor a record, so `distillery store gc` does not remove it.
    """
    return f"manifests/{digest}.json"
