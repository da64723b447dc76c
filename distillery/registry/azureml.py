"""The registry in Azure ML: versions are workspace models, files are blobs of the workspace.

Azure ML's own upload drops files that a .gitignore in the folder names, trusts that an earlier
upload is complete, and waits 90 s for storage that is down. So azure-storage-blob writes the
folder to the workspace's blob store, below its digest, and the version that MLClient registers (a
CUSTOM_MODEL) points there.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.errors import CredentialsError, RegistryError, RegistryUnavailable
from distillery.records import RegisteredModel
from distillery.registry.base import (
    ARCHIVED,
    CHALLENGER,
    CHAMPION,
    Events,
    Models,
    OtherModel,
    Others,
    Registry,
)
from distillery.registry.history import Event, event_tag, events_in
from distillery.registry.manifest import MANIFEST, altered_error, first_line
from distillery.settings import AzureMLSettings
from distillery.storage.azure_blobs import azure_ml_login
from distillery.storage.digests import FileEntry

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.ai.ml.entities import Model
    from azure.storage.blob import ContainerClient

AZURE_DATASTORE = "workspaceblobstore"

BLOBS = "distillery/"

ACCESS_CHECK = "access-check"

WORKSPACE_ROLE = "AzureML Data Scientist"

STORAGE_ROLE = "Storage Blob Data Contributor"

DATASTORE_URI = re.compile(r"azureml://(?:.*/)?datastores/(?P<datastore>[^/]+)/paths/(?P<path>.+)")
"""Where a model's files are, by the service's long form or the short one."""

AZURE_DEADLINE = 30.0
"""Seconds after which Azure or its storage counts as down: three attempts with their waits."""


class AzureRegistry(Registry):
    """Models of an Azure ML workspace.

    Azure ML has no aliases: the champion is the version with the tag role=champion. Promoting tags
    the new champion before it untags the old one, so there is never none; while there are two, the
    one that was promoted later counts. An event of the history is a tag of its version.

    Azure ML has neither locks nor conditional writes for versions. The champion is read before the
    write and after it. So a run whose promotion is overwritten mostly learns it, but two runs that
    promote within the same seconds may both report theirs, and then the later one counts although
    it was judged against an older champion. A version's tags are written as a whole: an event can
    be lost if two processes tag the same version at once.
    """

    kind = "azureml"

    def __init__(self) -> None:
        self._settings = AzureMLSettings()
        self._settings.require()
        self.location = f"Azure ML workspace {self._settings.workspace}"

    def set_champion(
        self, model: RegisteredModel, before: RegisteredModel | None, event: Event
    ) -> None:
        name, value = event_tag(event)
        with azure_errors(self.location):
            versions = list(self._client.models.list(name=model.name))
            for version in versions:
                if version.version == model.version:
                    self.add_tags(version, {"role": CHAMPION, "promoted_at": event.at, name: value})
            for version in versions:
                if version.version != model.version and tags_of(version).get("role") == CHAMPION:
                    self.add_tags(version, {"role": ARCHIVED})

    def add_event(self, model: RegisteredModel, event: Event) -> None:
        name, value = event_tag(event)
        with azure_errors(self.location):
            self.add_tags(self._client.models.get(model.name, model.version), {name: value})

    def history(self, name: str) -> Events:
        tags: dict[str, str] = {}
        for model in self.found(name):
            tags |= tags_of(model)
        return events_in(tags, f"{self.location}: {name}")

    def set_tag(self, model: RegisteredModel, name: str, value: str) -> None:
        with azure_errors(self.location):
            self.add_tags(self._client.models.get(model.name, version=model.version), {name: value})

    def add_tags(self, version: "Model", tags: dict[str, str]) -> None:
        version.tags = {**tags_of(version), **tags}
        self._client.models.create_or_update(version)

    def names(self) -> tuple[str, ...]:
        with azure_errors(self.location):
            return tuple(str(model.name) for model in self._client.models.list())

    def found(self, name: str) -> list[Any]:
        """Return all versions of a model, those of others too, the newest first; [] for an unknown
        name."""
        from azure.core.exceptions import ResourceNotFoundError

        with azure_errors(self.location):
            try:
                models = list(self._client.models.list(name=name))
            except ResourceNotFoundError:
                # Azure's answer for an unknown model is that for an unknown workspace. Listing
                # fails for the workspace only.
                list(self._client.models.list())
                return []
        models.sort(key=lambda model: model.creation_context.created_at, reverse=True)
        return models

    def versions(self, name: str) -> Models:
        ours = [model for model in self.found(name) if is_ours(model)]
        champions = [model for model in ours if tags_of(model).get("role") == CHAMPION]
        champions.sort(key=lambda model: tags_of(model).get("promoted_at", ""), reverse=True)
        champion = champions[0] if champions else None
        return [self.record_of(model, model is champion) for model in ours]

    def check_access(self, name: str) -> int:
        """Return how many versions of `name` there are, after an empty blob was written where the
        versions' files go: to list models, a login needs a lesser role. Whether it may register a
        version is not asked, since a version that is registered stays."""
        with self.container() as container:
            container.upload_blob(f"{BLOBS}{name}/{ACCESS_CHECK}", b"", overwrite=True)
        return super().check_access(name)

    def others(self, name: str | None = None) -> Others:
        models: Others = []
        for each in sorted(self.names()) if name is None else [name]:
            for model in self.found(each):
                if not is_ours(model):
                    version, uri = str(model.version), str(model.path)
                    models.append(OtherModel(name=each, version=version, uri=uri))
        return models

    def store_folder(self, content: Path, name: str, digest: str) -> str:
        files = sorted(path for path in content.rglob("*") if path.is_file())
        # The manifest is last: if it is there, all files are.
        files.sort(key=lambda path: path == content / MANIFEST)
        place = blob_folder(name, digest)
        with self.container() as container:
            for path in files:
                blob = f"{place}/{path.relative_to(content).as_posix()}"
                with path.open("rb") as file:
                    container.upload_blob(blob, file, overwrite=True)
        return f"azureml://datastores/{AZURE_DATASTORE}/paths/{place}/"

    def add_version(self, name: str, uri: str, tags: dict[str, str]) -> RegisteredModel:
        from azure.ai.ml.constants import AssetTypes
        from azure.ai.ml.entities import Model

        with azure_errors(self.location):
            model = Model(
                name=name, path=uri, type=AssetTypes.CUSTOM_MODEL, tags={"role": CHALLENGER, **tags}
            )
            added = self._client.models.create_or_update(model)
            return self.record_of(added, is_champion=False)

    def record_of(self, model: "Model", is_champion: bool) -> RegisteredModel:
        name, version, uri = str(model.name), str(model.version), str(model.path)
        return self.record(name, version, is_champion, uri, tags_of(model))

    def fetch_files(self, model: RegisteredModel, folder: Path) -> None:
        with self.container() as container:
            fetch_blobs(container, blob_folder(model.name, model.manifest_sha256), folder)

    def fetch_other_files(self, model: OtherModel, folder: Path) -> None:
        """Copy the blobs of the folder, or the one blob, that a version of others points to."""
        title = f"{model.name} version {model.version}"
        place = DATASTORE_URI.fullmatch(model.uri)
        if place is None:
            raise RegistryError(
                f"{title}: its files are at {model.uri}, which is no folder of a datastore; fetch "
                "them with `az ml model download`"
            )
        with self.container(place["datastore"]) as container:
            fetch_blobs(container, place["path"].rstrip("/"), folder)
        if not any(folder.iterdir()):
            raise RegistryError(f"{title}: {model.uri} holds no file; register the model again")

    def holds_files(self, model: RegisteredModel, files: Sequence[FileEntry]) -> bool:
        folder = blob_folder(model.name, model.manifest_sha256)
        with self.container() as container:
            blobs = container.list_blobs(name_starts_with=f"{folder}/")
            sizes = {blob.name: blob.size for blob in blobs}
        return all(sizes.get(f"{folder}/{file.path}") == file.bytes for file in files)

    def read_file(self, model: RegisteredModel, file: str) -> bytes:
        from azure.core.exceptions import ResourceNotFoundError

        blob = f"{blob_folder(model.name, model.manifest_sha256)}/{file}"
        with self.container() as container:
            try:
                content: bytes = container.download_blob(blob).readall()
            except ResourceNotFoundError as error:
                raise altered_error(model, file) from error
            return content

    @cached_property
    def _credential(self) -> Any:
        return azure_ml_login()

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
    def container(self, datastore: str = AZURE_DATASTORE) -> "Iterator[ContainerClient]":
        """Give the blob container of one of the workspace's datastores.

        It is opened with the short-lived key that the workspace hands out, else with the login.
        """
        from azure.storage.blob import ContainerClient, ExponentialRetry

        with azure_errors(self.location):
            store = self._client.datastores.get(datastore, include_secrets=True)
        if not hasattr(store, "container_name"):
            raise RegistryError(
                f"{self.location}: its datastore {datastore} is no blob container; fetch the model "
                "with `az ml model download`"
            )
        account_key = getattr(store.credentials, "account_key", None)
        secret = getattr(store.credentials, "sas_token", None)
        if account_key:
            secret = {"account_name": store.account_name, "account_key": account_key}
        with azure_errors(f"{self.location}: its storage {store.account_name}", STORAGE_ROLE):
            yield ContainerClient(
                f"{store.protocol}://{store.account_name}.blob.{store.endpoint}",
                store.container_name,
                credential=secret or self._credential,
                retry_policy=ExponentialRetry(1, 1, retry_total=2, random_jitter_range=1),
                connection_timeout=5,
                read_timeout=8,
            )


def tags_of(model: "Model") -> dict[str, str]:
    return model.tags or {}


def is_ours(model: "Model") -> bool:
    """Return whether Distillery registered a version."""
    return "manifest_sha256" in tags_of(model)


def fetch_blobs(container: "ContainerClient", path: str, folder: Path) -> None:
    """Copy the blob `path`, or all blobs below it, into `folder`. A mark that there is a folder,
    which some tools write as an empty blob, is no file.

    Raises RegistryError for a blob whose name leads out of the folder."""
    for blob in container.list_blobs(name_starts_with=path, include=["metadata"]):
        inner = blob.name.removeprefix(f"{path}/")
        is_mark = blob.name.endswith("/") or (blob.metadata or {}).get("hdi_isfolder")
        if blob.name == path:
            inner = path.rpartition("/")[2]
        elif inner == blob.name or is_mark:
            # Another folder, whose name begins alike, is left out too.
            continue
        target = folder / inner
        if not target.resolve().is_relative_to(folder.resolve()):
            raise RegistryError(f"{blob.name}: leads out of the model's folder; remove this blob")
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            container.download_blob(blob.name).readinto(file)


def blob_folder(name: str, digest: str) -> str:
    """Return the folder of a model's blobs."""
    return f"{BLOBS}{name}/{digest}"


@contextmanager
def azure_errors(location: str, role: str = WORKSPACE_ROLE) -> Iterator[None]:
    """Raise the errors of the Azure SDKs as ours, in one line that names `location` and, where it
    refuses access, the `role` that gives it.

    The SDKs' texts of failed connections may hold a URL with its signature, so they are neither
    shown nor chained.
    """
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError

    try:
        yield
    except ClientAuthenticationError as error:
        raise login_error(location, error.status_code) from None
    except HttpResponseError as error:
        raise response_error(location, error, role) from None
    except MlException as error:
        raise RegistryError(f"{location}: {first_line(error)}") from error
    except AzureError as error:
        raise RegistryUnavailable(
            f"{location} does not answer within {AZURE_DEADLINE:.0f} s "
            f"({type(error).__name__}); try again later"
        ) from None


def login_error(location: str, status: int | None) -> CredentialsError:
    """Return the error for a login that does not exist (no `status`) or is refused."""
    if status is None:
        return CredentialsError(
            "no Azure login: run `az login`, or set AZURE_CLIENT_ID, AZURE_TENANT_ID and "
            "AZURE_CLIENT_SECRET"
        )
    return CredentialsError(
        f"{location} refuses the login ({status}): run `az login` again, or correct "
        "AZURE_CLIENT_SECRET"
    )


def response_error(location: str, error: Any, role: str) -> Exception:
    """Return the error for an HTTP response, by its status."""
    status = error.status_code or 0
    if status in (401, 403):
        return CredentialsError(
            f"{location} refuses access ({status}): give the login the role {role} there"
        )
    if status in (408, 429) or status >= 500:
        return RegistryUnavailable(f"{location} does not answer ({status}); try again later")
    if status in (409, 412):
        return RegistryUnavailable(
            f"{location}: another run changed the same model at the same time; try again"
        )
    return RegistryError(
        f"{location}: {first_line(error)} ({status}); correct AZUREML_* or the model's name"
    )
