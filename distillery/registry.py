"""The model registry: named, numbered models that carry their history, in Azure ML or here (MLflow on SQLite).

What is registered is the model's folder with a manifest.json inside it: its provenance (data, prompts, teacher, labels,
code, evaluation, as the caller gives them) and the sha256 and size of every file. The manifest's own sha256 is a tag of
the version, so that a folder which was altered anywhere after it was registered is refused when it is downloaded.

Azure ML's own upload drops files that a .gitignore in the folder names, takes an earlier upload on trust and waits 90 s
for storage that is down. So the folder is written to the workspace's blob store by azure-storage-blob, below its digest
as path, and the version that MLClient registers (a CUSTOM_MODEL) points there.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from distillery.errors import ArtifactDamaged, CredentialsError, RegistryError, RegistryUnavailable
from distillery.recipe import RegistryKind, RegistryRecipe
from distillery.records import Artifact, Record, RegisteredModel
from distillery.settings import AzureMLSettings, LocalSettings
from distillery.store import ArtifactStore, FileEntry, digest_of_files, list_files, sha256_of, working_folder

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.ai.ml.entities import Model
    from azure.storage.blob import ContainerClient
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MANIFEST = "manifest.json"
CHAMPION = "champion"
CANDIDATE = "candidate"
AZURE_DATASTORE = "workspaceblobstore"
AZURE_DEADLINE = 30.0
"""Seconds after which Azure or its storage counts as down: three tries of a request, waits included."""

Models = list[RegisteredModel]


class Manifest(Record):
    """manifest.json: `files` are all others in the folder; the manifest can't hold its own digest."""

    model: str
    provenance: dict[str, Any]
    files: tuple[FileEntry, ...]


class Registry(ABC):
    """Every method raises RegistryError where what is asked can't be done, RegistryUnavailable where nothing answers
    (worth a retry), and CredentialsError where the login is refused."""

    kind: RegistryKind
    place: str

    def register(
        self, folder: Path, name: str, tags: Mapping[str, str], provenance: Mapping[str, Any]
    ) -> RegisteredModel:
        """Adds the folder's content as the next version of `name`, as a candidate.

        The same content with the same provenance is the version that it already has; a stored copy that was damaged is
        then written anew. The manifest of an earlier download is replaced. `tags` are for people; the tag `produced_by`
        becomes the record's.
        """
        with _disk_errors(self.place), working_folder("register") as scratch:
            content = scratch / f"model-{uuid.uuid4().hex[:8]}"
            manifest = _copy_with_manifest(folder, content, name, provenance)
            digest = sha256_of(content / MANIFEST)
            existing = next((model for model in self._versions(name) if model.manifest_sha256 == digest), None)
            if existing and self.is_whole(existing):
                return existing
            uri = self._put(content, name, digest)
        return existing or self._add(name, uri, {**tags, **_facts(manifest, digest)})

    def list(self, name: str | None = None) -> Models:
        """All that was registered by Distillery, or the versions of one model; by name, the newest version first."""
        names = self._names() if name is None else [name]
        return [model for each in sorted(names) for model in self._versions(each)]

    def get(self, name: str, version: str | None = None) -> RegisteredModel:
        """A version of a model; without `version` the champion, or the newest where there is none."""
        models = self._versions(name)
        if not models:
            held = ", ".join(sorted(self._names())) or "none"
            raise RegistryError(f"{name}: no such model in {self.place}; it holds: {held}")
        if version is None:
            return next((model for model in models if model.role == CHAMPION), models[0])
        found = next((model for model in models if model.version == version), None)
        if found is None:
            held = ", ".join(model.version for model in models)
            raise RegistryError(f"{name}: no version {version} in {self.place}; it holds: {held}")
        return found

    def provenance(self, model: RegisteredModel) -> dict[str, Any]:
        """The manifest: keys model, provenance, files. Reads that file alone, and verifies it."""
        raw = self._read_manifest(model)
        if hashlib.sha256(raw).hexdigest() != model.manifest_sha256:
            raise _altered(model, MANIFEST)
        content: dict[str, Any] = json.loads(raw)
        return content

    def download(self, model: RegisteredModel, target: Path) -> Path:
        """The registered folder as `target`, each file verified before `target` exists.

        A target that already is this model is left as it is.
        """
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            return self._already_there(model, target)
        with _disk_errors(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=".downloading-", dir=target.parent))
            try:
                self._fetch(model, beside)
                _verify(beside, model)
                os.rename(beside, target)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        return target

    @abstractmethod
    def promote(self, model: RegisteredModel) -> RegisteredModel:
        """Makes this version the one champion of its name; the one before it is a candidate again."""

    @abstractmethod
    def _names(self) -> tuple[str, ...]: ...

    @abstractmethod
    def _versions(self, name: str) -> Models:
        """The newest first; none for an unknown name. Versions without our tags are somebody else's and left out."""

    @abstractmethod
    def _put(self, content: Path, name: str, digest: str) -> str:
        """Stores the folder, in place of what may be there under the same digest; gives its URI."""

    @abstractmethod
    def _add(self, name: str, uri: str, tags: dict[str, str]) -> RegisteredModel: ...

    @abstractmethod
    def _fetch(self, model: RegisteredModel, folder: Path) -> None: ...

    @abstractmethod
    def _read_manifest(self, model: RegisteredModel) -> bytes: ...

    def is_whole(self, model: RegisteredModel) -> bool:
        """Whether the registered folder is there, unaltered: reads all of it."""
        with working_folder("verify") as scratch:
            try:
                self.download(model, scratch / "model")
            except RegistryUnavailable:
                raise
            except RegistryError:
                return False
        return True

    def _already_there(self, model: RegisteredModel, target: Path) -> Path:
        try:
            _verify(target, model)
        except RegistryError as error:
            raise RegistryError(
                f"{target}: exists and is not {model.name} version {model.version}; move it away or name another folder"
            ) from error
        return target

    def _record(self, name: str, version: str, role: str, uri: str, tags: Mapping[str, str]) -> RegisteredModel:
        return RegisteredModel(
            artifact=Artifact(uri=uri, sha256=tags["files_sha256"], bytes=int(tags["bytes"])),
            produced_by=tags.get("produced_by", ""),
            name=name,
            version=version,
            registry=self.kind,
            role=role,
            manifest_sha256=tags["manifest_sha256"],
        )


class LocalRegistry(Registry):
    """Versions and aliases in MLflow's model registry at `url`, the folders in `artifacts`/name/manifest digest.

    A machine that shares the registry but has no such folder takes the files from the artifact store, where the stages
    keep them under the same digest, and the manifest from manifests/DIGEST.json there."""

    kind = "local"

    def __init__(self, url: str | None = None, artifacts: Path | None = None) -> None:
        settings = LocalSettings()
        self._url = url or settings.registry_url
        self._artifacts = artifacts or settings.folder / "models"
        self.place = _masked(self._url)
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
        return [self._from_mlflow(version, str(version.version) == str(champion)) for version in ours]

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
            return self._from_mlflow(client.create_model_version(name, source=uri, tags=tags), False)

    def _from_mlflow(self, version: "ModelVersion", champion: bool) -> RegisteredModel:
        role = CHAMPION if champion else CANDIDATE
        return self._record(version.name, str(version.version), role, str(version.source), version.tags)

    def _fetch(self, model: RegisteredModel, folder: Path) -> None:
        if (here := self._folder(model)).is_dir():
            _copy(here, folder)
            # The store may be another one by now.
            _share(folder, model.manifest_sha256)
            return
        with self._elsewhere(model) as store:
            _copy(store.fetch(model.artifact), folder)
        (folder / MANIFEST).write_bytes(self._read_manifest(model))

    def _read_manifest(self, model: RegisteredModel) -> bytes:
        if not (here := self._folder(model)).is_dir():
            with self._elsewhere(model) as store:
                return store.read_object(_shared_manifest(model.manifest_sha256))
        if not (here / MANIFEST).is_file():
            raise _altered(model, MANIFEST)
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
        with (self._artifacts / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
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
            text = _masked(_first_line(error))
            code = getattr(error, "error_code", "TEMPORARILY_UNAVAILABLE")
            if code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"):
                raise RegistryUnavailable(f"{self.place}: the registry does not answer ({text})") from None
            raise RegistryError(f"{self.place}: {text}") from None
        except (SQLAlchemyError, OSError) as error:
            raise RegistryError(
                f"{self.place}: not a registry that can be opened ({_first_line(error)}); set DISTILLERY_REGISTRY"
            ) from error


class AzureRegistry(Registry):
    """Models of an Azure ML workspace. Azure has no aliases: the champion carries the tag role=champion."""

    kind = "azureml"

    def __init__(self, settings: AzureMLSettings | None = None) -> None:
        self._settings = settings or AzureMLSettings()
        needed = {
            "AZUREML_SUBSCRIPTION_ID": self._settings.subscription_id,
            "AZUREML_RESOURCE_GROUP": self._settings.resource_group,
            "AZUREML_WS_NAME": self._settings.workspace,
        }
        missing = [key for key, value in needed.items() if not value]
        if missing:
            raise CredentialsError(f"Azure ML: not set: {', '.join(missing)}; put them into the environment or .env")
        self.place = f"Azure ML workspace {self._settings.workspace}"

    def promote(self, model: RegisteredModel) -> RegisteredModel:
        with _azure_errors(self.place):
            versions = list(self._client.models.list(name=model.name))
            # The new champion first: in between there are two rather than none, and the one promoted later counts.
            for version in versions:
                if version.version == model.version:
                    self._retag(version, {"role": CHAMPION, "promoted_at": datetime.now(UTC).isoformat()})
            for version in versions:
                if version.version != model.version and _tags(version).get("role") == CHAMPION:
                    self._retag(version, {"role": CANDIDATE})
        if model.version not in {version.version for version in versions}:
            raise RegistryError(f"{model.name}: no version {model.version} in {self.place} that could be promoted")
        return model.model_copy(update={"role": CHAMPION})

    def _retag(self, version: "Model", tags: dict[str, str]) -> None:
        version.tags = {**_tags(version), **tags}
        self._client.models.create_or_update(version)

    def _names(self) -> tuple[str, ...]:
        with _azure_errors(self.place):
            found = [str(model.name) for model in self._client.models.list()]
        return tuple(name for name in found if self._versions(name))

    def _versions(self, name: str) -> Models:
        from azure.core.exceptions import ResourceNotFoundError

        with _azure_errors(self.place):
            try:
                found = [model for model in self._client.models.list(name=name) if "manifest_sha256" in _tags(model)]
            except ResourceNotFoundError:
                # The service says the same of an unknown model and an unknown workspace; only the latter fails here.
                list(self._client.models.list())
                return []
        found.sort(key=lambda model: model.creation_context.created_at, reverse=True)
        champions = [model for model in found if _tags(model).get("role") == CHAMPION]
        champion = max(champions, key=lambda model: _tags(model).get("promoted_at", ""), default=None)
        return [self._from_azure(model, model is champion) for model in found]

    def _put(self, content: Path, name: str, digest: str) -> str:
        files = sorted(path for path in content.rglob("*") if path.is_file())
        # The manifest last: where it stands, all is there.
        files.sort(key=lambda path: path == content / MANIFEST)
        with self._container() as container:
            for path in files:
                with path.open("rb") as file:
                    blob = f"{_prefix(name, digest)}{path.relative_to(content).as_posix()}"
                    container.upload_blob(blob, file, overwrite=True)
        return f"azureml://datastores/{AZURE_DATASTORE}/paths/{_prefix(name, digest)}"

    def _add(self, name: str, uri: str, tags: dict[str, str]) -> RegisteredModel:
        from azure.ai.ml.constants import AssetTypes
        from azure.ai.ml.entities import Model

        with _azure_errors(self.place):
            model = Model(name=name, path=uri, type=AssetTypes.CUSTOM_MODEL, tags={**tags, "role": CANDIDATE})
            return self._from_azure(self._client.models.create_or_update(model), False)

    def _from_azure(self, model: "Model", champion: bool) -> RegisteredModel:
        role = CHAMPION if champion else CANDIDATE
        return self._record(str(model.name), str(model.version), role, str(model.path), _tags(model))

    def _fetch(self, model: RegisteredModel, folder: Path) -> None:
        prefix = _prefix(model.name, model.manifest_sha256)
        with self._container() as container:
            for blob in container.list_blobs(name_starts_with=prefix, include=["metadata"]):
                target = folder / blob.name.removeprefix(prefix)
                if (blob.metadata or {}).get("hdi_isfolder"):
                    continue
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise _altered(model, blob.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    container.download_blob(blob.name).readinto(file)

    def _read_manifest(self, model: RegisteredModel) -> bytes:
        from azure.core.exceptions import ResourceNotFoundError

        with self._container() as container:
            try:
                blob = f"{_prefix(model.name, model.manifest_sha256)}{MANIFEST}"
                content: bytes = container.download_blob(blob).readall()
            except ResourceNotFoundError as error:
                raise _altered(model, MANIFEST) from error
            return content

    @cached_property
    def _credential(self) -> Any:
        from azure.identity import DefaultAzureCredential

        # Both log every failure, over several lines, beside raising it.
        for noisy in map(logging.getLogger, ("azure.identity", "azure.ai.ml")):
            noisy.propagate = False
            noisy.addHandler(logging.NullHandler())
        return DefaultAzureCredential()

    @cached_property
    def _client(self) -> "MLClient":
        from azure.ai.ml import MLClient

        settings = self._settings
        return MLClient(
            self._credential,
            settings.subscription_id,
            settings.resource_group,
            settings.workspace,
            show_progress=False,
            enable_telemetry=False,
            retry_total=2,
            retry_backoff_factor=0.5,
            connection_timeout=5,
            read_timeout=8,
        )

    @contextmanager
    def _container(self) -> "Iterator[ContainerClient]":
        """The workspace's blob container, by the short-lived key that the workspace hands out, else by the login."""
        from azure.storage.blob import ContainerClient, ExponentialRetry

        with _azure_errors(self.place):
            store = self._client.datastores.get(AZURE_DATASTORE, include_secrets=True)
        secret = getattr(store.credentials, "sas_token", None)
        if key := getattr(store.credentials, "account_key", None):
            secret = {"account_name": store.account_name, "account_key": key}
        with _azure_errors(f"{self.place}: its storage {store.account_name}"):
            yield ContainerClient(
                f"{store.protocol}://{store.account_name}.blob.{store.endpoint}",
                store.container_name,
                credential=secret or self._credential,
                retry_policy=ExponentialRetry(1, 1, retry_total=2, random_jitter_range=1),
                connection_timeout=5,
                read_timeout=8,
            )


def open_registry(recipe: RegistryRecipe) -> Registry:
    """The registry that the recipe names, where the environment says it is. Raises CredentialsError."""
    return AzureRegistry() if recipe.kind == "azureml" else LocalRegistry()


def _copy(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _copy_with_manifest(folder: Path, content: Path, name: str, provenance: Mapping[str, Any]) -> Manifest:
    if not folder.is_dir():
        raise RegistryError(f"{folder}: no such folder; register the folder of an exported model")
    _copy(folder, content)
    _remove_old_manifest(content, folder)
    files = list_files(content)
    if not files:
        raise RegistryError(f"{folder}: an empty folder is no model")
    manifest = Manifest(model=name, provenance=dict(provenance), files=files)
    text = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=False)
    (content / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def _remove_old_manifest(content: Path, folder: Path) -> None:
    try:
        Manifest.model_validate_json((content / MANIFEST).read_bytes())
    except FileNotFoundError:
        return
    except ValidationError as error:
        raise RegistryError(f"{folder / MANIFEST}: the registry writes a file of this name; rename yours") from error
    (content / MANIFEST).unlink()


def _facts(manifest: Manifest, digest: str) -> dict[str, str]:
    """The tags from which a record is read back."""
    return {
        "manifest_sha256": digest,
        "files_sha256": digest_of_files(manifest.files),
        "bytes": str(sum(entry.bytes for entry in manifest.files)),
    }


def _verify(folder: Path, model: RegisteredModel) -> None:
    """Raises RegistryError naming the first file that is missing, altered or not in the manifest."""
    path = folder / MANIFEST
    if not path.is_file() or sha256_of(path) != model.manifest_sha256:
        raise _altered(model, MANIFEST)
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise _altered(model, MANIFEST) from error
    listed = {entry.path: entry for entry in manifest.files}
    found = {entry.path: entry for entry in list_files(folder) if entry.path != MANIFEST}
    for file in sorted(listed.keys() | found.keys()):
        if listed.get(file) != found.get(file):
            raise _altered(model, file)
    if digest_of_files(manifest.files) != model.artifact.sha256:
        raise _altered(model, MANIFEST)


def _altered(model: RegisteredModel, file: str) -> RegistryError:
    return RegistryError(
        f"{model.name} version {model.version}: {file}: missing, added or altered since it was registered; "
        "register the model again to mend it"
    )


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


def _tags(version: "Model") -> dict[str, str]:
    return version.tags or {}


def _prefix(name: str, digest: str) -> str:
    """Where a model's blobs stand in the workspace's container."""
    return f"distillery/{name}/{digest}/"


def _masked(text: str) -> str:
    return re.sub(r"://\S*@", "://***@", text)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def _disk_errors(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RegistryError(
            f"{error.filename or place}: {error.strerror or error}; free some space, or set DISTILLERY_HOME elsewhere"
        ) from error


@contextmanager
def _azure_errors(place: str) -> Iterator[None]:
    """Turns what the Azure SDKs raise into one line. The SDKs' own texts of failed connections may hold a URL with its
    signature, so that these are neither shown nor chained."""
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError

    try:
        yield
    except ClientAuthenticationError as error:
        raise _login_error(place, error.status_code) from None
    except HttpResponseError as error:
        raise _answer_error(place, error) from None
    except MlException as error:
        raise RegistryError(f"{place}: {_first_line(error)}") from error
    except AzureError as error:
        raise RegistryUnavailable(
            f"{place} does not answer within {AZURE_DEADLINE:.0f} s ({type(error).__name__}); try again later"
        ) from None


def _login_error(place: str, status: int | None) -> CredentialsError:
    if status is None:
        return CredentialsError(
            "no Azure login: run `az login`, or set AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET"
        )
    return CredentialsError(
        f"{place} refuses the login ({status}): run `az login` again, or correct AZURE_CLIENT_SECRET"
    )


def _answer_error(place: str, error: Any) -> Exception:
    status = error.status_code or 0
    if status in (401, 403):
        return CredentialsError(
            f"{place} refuses access ({status}): give the login the role AzureML Data Scientist there"
        )
    if status in (408, 429) or status >= 500:
        return RegistryUnavailable(f"{place} does not answer ({status}); try again later")
    if status in (409, 412):
        return RegistryUnavailable(f"{place}: another run changed the same model at the same time; try again")
    return RegistryError(f"{place}: {_first_line(error)} ({status}); correct AZUREML_* or the model's name")
