"""registry/local"""

import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from distillery.errors import ArtifactDamaged, RegistryError, RegistryUnavailable
from distillery.records import RegisteredModel
from distillery.registry.base import CANDIDATE, CHAMPION, Models, Registry
from distillery.registry.manifest import MANIFEST, altered, copy_folder, first_line, masked
from distillery.settings import LocalSettings
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import sha256_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


class LocalRegistry(Registry):
    """Versions and aliases in MLflow's model registry at `url`, the folders in `artifacts`/name/manifest digest.

    A machine that shares the registry but has no such folder takes the files from the artifact store, where the stages
    keep them under the same digest, and the manifest from manifests/DIGEST.json there."""

    kind = "local"

    def __init__(self, url: str | None = None, artifacts: Path | None = None) -> None:
        settings = LocalSettings()
        self._url = url or settings.registry_url
        self._artifacts = artifacts or settings.folder / "models"
        self.place = masked(self._url)
        # Read when MLflow is imported. By default it asks a server that is down for minutes.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")

    def promote(self, model: RegisteredModel) -> RegisteredModel:
        with self._mlflow() as client:
            client.set_registered_model_alias(model.name, CHAMPION, model.version)
        return model.model_copy(update={"role": CHAMPION})

    def _names(self) -> tuple[str, ...]:
        names: tuple[str, ...] = ()
        page = None
        with self._mlflow() as client:
            while page != "":
                found = client.search_registered_models(page_token=page)
                names += tuple(model.name for model in found)
                page = found.token or ""
        return names

    def _versions(self, name: str) -> Models:
        found: list[ModelVersion] = []
        page = None
        with self._mlflow() as client:
            while page != "":
                some = client.search_model_versions(f"name = '{name}'", page_token=page)
                found += some
                page = some.token or ""
            champion = client.get_registered_model(name).aliases.get(CHAMPION) if found else None
        ours = [version for version in found if "manifest_sha256" in version.tags]
        ours.sort(key=lambda version: int(version.version), reverse=True)
        return [
            self._from_mlflow(version, str(version.version) == str(champion)) for version in ours
        ]

    def _put(self, content: Path, name: str, digest: str) -> str:
        final = self._artifacts / name / digest
        _share(content, digest)
        final.parent.mkdir(parents=True, exist_ok=True)
        beside = final.with_name(f".writing-{uuid.uuid4().hex[:8]}")
        try:
            shutil.move(content, beside)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(beside, final)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return str(final)

    def _add(self, name: str, uri: str, tags: dict[str, str]) -> RegisteredModel:
        with self._mlflow() as client:
            _create_once(client, name)
            # register_model wants an MLflow model; create_model_version takes any folder.
            return self._from_mlflow(
                client.create_model_version(name, source=uri, tags=tags), False
            )

    def _from_mlflow(self, version: "ModelVersion", champion: bool) -> RegisteredModel:
        role = CHAMPION if champion else CANDIDATE
        return self._record(
            version.name, str(version.version), role, str(version.source), version.tags
        )

    def _fetch(self, model: RegisteredModel, folder: Path) -> None:
        if (here := self._folder(model)).is_dir():
            copy_folder(here, folder)
            # The store may be another one by now.
            _share(folder, model.manifest_sha256)
            return
        with self._elsewhere(model) as store:
            copy_folder(store.fetch(model.artifact), folder)
        (folder / MANIFEST).write_bytes(self._read_manifest(model))

    def _read_manifest(self, model: RegisteredModel) -> bytes:
        if not (here := self._folder(model)).is_dir():
            with self._elsewhere(model) as store:
                return store.read_object(_shared_manifest(model.manifest_sha256))
        if not (here / MANIFEST).is_file():
            raise altered(model, MANIFEST)
        return (here / MANIFEST).read_bytes()

    def _folder(self, model: RegisteredModel) -> Path:
        return self._artifacts / model.name / model.manifest_sha256

    @contextmanager
    def _elsewhere(self, model: RegisteredModel) -> Iterator[ArtifactStore]:
        """The store, where this machine lacks the model's folder."""
        store = ArtifactStore()
        try:
            yield store
        except ArtifactDamaged as error:
            raise RegistryError(
                f"{self._folder(model)}: the folder of {model.name} version {model.version} is gone, and {store.url} "
                "does not have it either; register it again"
            ) from error

    @cached_property
    def _client(self) -> "MlflowClient":
        from mlflow import MlflowClient

        for noisy in ("mlflow.store.db.utils", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self._artifacts.mkdir(parents=True, exist_ok=True)
        # The first to come makes MLflow's tables; two that make them at once break each other.
        with FileLock(self._artifacts / ".lock"):
            client = MlflowClient(tracking_uri=self._url, registry_uri=self._url)
            client.search_registered_models(max_results=1)
        return client

    @contextmanager
    def _mlflow(self) -> "Iterator[MlflowClient]":
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import OperationalError, SQLAlchemyError

        try:
            yield self._client
        except (OperationalError, MlflowException) as error:
            # MLflow's own texts hold the URL with its password, so that they are masked and not chained.
            text = masked(first_line(error))
            code = getattr(error, "error_code", "TEMPORARILY_UNAVAILABLE")
            if code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"):
                raise RegistryUnavailable(
                    f"{self.place}: the registry does not answer ({text})"
                ) from None
            raise RegistryError(f"{self.place}: {text}") from None
        except (SQLAlchemyError, OSError) as error:
            raise RegistryError(
                f"{self.place}: not a registry that can be opened ({first_line(error)}); set DISTILLERY_REGISTRY"
            ) from error


def _create_once(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _share(folder: Path, digest: str) -> None:
    """Writes a folder's manifest, if it is whole, where the machines that share the store read it."""
    manifest = folder / MANIFEST
    if manifest.is_file() and sha256_of(manifest) == digest:
        ArtifactStore().write_object(_shared_manifest(digest), manifest.read_bytes())


def _shared_manifest(digest: str) -> str:
    """Its name in the artifact store: no artifact and no record, so that no collection takes it."""
    return f"manifests/{digest}.json"
