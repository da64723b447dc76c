"""registry/azureml"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.errors import CredentialsError, RegistryError, RegistryUnavailable
from distillery.records import RegisteredModel
from distillery.registry.base import CANDIDATE, CHAMPION, Models, Registry
from distillery.registry.manifest import MANIFEST, altered, first_line, tags_of
from distillery.settings import AzureMLSettings

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.ai.ml.entities import Model
    from azure.storage.blob import ContainerClient

AZURE_DATASTORE = "workspaceblobstore"

AZURE_DEADLINE = 30.0
"""Seconds after which Azure or its storage counts as down: three tries of a request, waits included."""


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
            raise CredentialsError(
                f"Azure ML: not set: {', '.join(missing)}; put them into the environment or .env"
            )
        self.place = f"Azure ML workspace {self._settings.workspace}"

    def promote(self, model: RegisteredModel) -> RegisteredModel:
        with _azure_errors(self.place):
            versions = list(self._client.models.list(name=model.name))
            # The new champion first: in between there are two rather than none, and the one promoted later counts.
            for version in versions:
                if version.version == model.version:
                    self._retag(
                        version, {"role": CHAMPION, "promoted_at": datetime.now(UTC).isoformat()}
                    )
            for version in versions:
                if version.version != model.version and tags_of(version).get("role") == CHAMPION:
                    self._retag(version, {"role": CANDIDATE})
        if model.version not in {version.version for version in versions}:
            raise RegistryError(
                f"{model.name}: no version {model.version} in {self.place} that could be promoted"
            )
        return model.model_copy(update={"role": CHAMPION})

    def _retag(self, version: "Model", tags: dict[str, str]) -> None:
        version.tags = {**tags_of(version), **tags}
        self._client.models.create_or_update(version)

    def _names(self) -> tuple[str, ...]:
        with _azure_errors(self.place):
            found = [str(model.name) for model in self._client.models.list()]
        return tuple(name for name in found if self._versions(name))

    def _versions(self, name: str) -> Models:
        from azure.core.exceptions import ResourceNotFoundError

        with _azure_errors(self.place):
            try:
                found = [
                    model
                    for model in self._client.models.list(name=name)
                    if "manifest_sha256" in tags_of(model)
                ]
            except ResourceNotFoundError:
                # The service says the same of an unknown model and an unknown workspace; only the latter fails here.
                list(self._client.models.list())
                return []
        found.sort(key=lambda model: model.creation_context.created_at, reverse=True)
        champions = [model for model in found if tags_of(model).get("role") == CHAMPION]
        champion = max(
            champions, key=lambda model: tags_of(model).get("promoted_at", ""), default=None
        )
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
            model = Model(
                name=name, path=uri, type=AssetTypes.CUSTOM_MODEL, tags={**tags, "role": CANDIDATE}
            )
            return self._from_azure(self._client.models.create_or_update(model), False)

    def _from_azure(self, model: "Model", champion: bool) -> RegisteredModel:
        role = CHAMPION if champion else CANDIDATE
        return self._record(
            str(model.name), str(model.version), role, str(model.path), tags_of(model)
        )

    def _fetch(self, model: RegisteredModel, folder: Path) -> None:
        prefix = _prefix(model.name, model.manifest_sha256)
        with self._container() as container:
            for blob in container.list_blobs(name_starts_with=prefix, include=["metadata"]):
                target = folder / blob.name.removeprefix(prefix)
                if (blob.metadata or {}).get("hdi_isfolder"):
                    continue
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise altered(model, blob.name)
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
                raise altered(model, MANIFEST) from error
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


def _prefix(name: str, digest: str) -> str:
    """Where a model's blobs stand in the workspace's container."""
    return f"distillery/{name}/{digest}/"


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
        raise RegistryError(f"{place}: {first_line(error)}") from error
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
        return RegistryUnavailable(
            f"{place}: another run changed the same model at the same time; try again"
        )
    return RegistryError(
        f"{place}: {first_line(error)} ({status}); correct AZUREML_* or the model's name"
    )
