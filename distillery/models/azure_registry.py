"""Base models of an Azure ML registry: what they consist of, and their download.

azure-ai-ml finds the model and gets the key to its storage. Its own download holds each file in
memory and begins anew after an interruption, so azure-storage-blob fetches the files here: in
ranges, each tried again while the storage does not answer.

Most models of a registry are MLflow folders with weights, config and tokenizer apart. Their files
are written where Transformers looks for them, which is one folder. A file is called by its name
once its size and, if the storage has one, its MD5 are right; the folder, once it has all files.
Until then they are in a folder whose name begins with .writing-, from which a later process goes
on.
"""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import yaml
from filelock import FileLock, Timeout
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from distillery.errors import CredentialsError, ModelUnavailable, RecipeError, TrainingError
from distillery.progress import ShowProgress, show_nothing
from distillery.settings import LocalSettings
from distillery.storage.azure_blobs import azure_ml_login
from distillery.storage.outages import OutageLongerThan, is_outage, os_error, reason_of

if TYPE_CHECKING:
    from azure.storage.blob import BlobProperties, ContainerClient

WEIGHTS = "*.safetensors"

FILES = (WEIGHTS, "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*", "*.py")
"""What is downloaded of a part of a model. Python code runs only where recipe and worker allow."""

FLAVOURS = {
    "hftransformersv2": ("data/model", "data/config", "data/tokenizer"),
    "hftransformers": ("data/model", "data/config", "data/tokenizer"),
    "transformers": ("model", "components/tokenizer"),
}
"""The parts of an MLflow folder by the flavour that its MLmodel names, as Olive's handler knows
them (olive/common/hf/mlflow.py). Of two files with one name, that of the later part counts."""

RANGE = 32 << 20
"""Bytes that are read, then written; what an interruption can lose."""

CHUNK = 8 << 20
"""Bytes of one request; four are under way at once."""

BACKOFF = wait_random_exponential(multiplier=0.5, max=10)

LOG_S = 30.0
"""Seconds between two log lines of a download."""

_log = logging.getLogger(__name__)


class AzureModel(NamedTuple):
    """A version of a model in an Azure ML registry."""

    registry: str
    name: str
    version: str

    @property
    def folder(self) -> Path:
        """The folder that it is downloaded to. The digest tells it from a model whose names are
        parted elsewhere: meta-X of azureml from X of azureml-meta."""
        digest = hashlib.sha256("/".join(self).encode()).hexdigest()[:8]
        return LocalSettings().folder / "models" / f"{'-'.join(self)}-{digest}"

    @property
    def earlier_folder(self) -> Path | None:
        """The folder that earlier versions downloaded it to; None if it may be another model's."""
        name = "-".join(self)
        return self.folder.with_name(name) if name.count("-") == 2 else None

    @property
    def unfinished(self) -> Path:
        """The folder of what is downloaded so far."""
        return self.folder.with_name(f".writing-{self.folder.name}")

    @property
    def title(self) -> str:
        """Its name for people."""
        return f"{self.name} version {self.version} of the registry {self.registry}"


class RegistryFile(NamedTuple):
    """A file of a registry's model: its blob, its path in the folder that it is downloaded to, and
    its `size` in bytes. `md5` is None if the storage has none."""

    blob: str
    path: str
    size: int
    md5: bytes | None


def parse_azureml(url: str) -> AzureModel:
    """Return what azureml://registries/REGISTRY/models/NAME/versions/VERSION names.

    Raises RecipeError for another form."""
    parts = url.removeprefix("azureml://").split("/")
    if len(parts) != 6 or parts[::2] != ["registries", "models", "versions"] or not all(parts):
        raise RecipeError(
            f"base.model: {url}: not azureml://registries/REGISTRY/models/NAME/versions/VERSION"
        )
    return AzureModel(registry=parts[1], name=parts[3], version=parts[5])


def downloaded_folder(model: AzureModel) -> Path | None:
    """Return the folder of a model that is on this machine, None if it is not there whole.

    Earlier versions kept the registry's own tree: of that, the folder with the highest config.json,
    if it has the tokenizer too. Raises TrainingError where there is no config.json."""
    folder = model.folder
    if not folder.exists() and model.earlier_folder is not None:
        folder = model.earlier_folder
    if not folder.exists():
        return None
    configs = sorted(folder.rglob("config.json"), key=lambda path: len(path.parts))
    if not configs:
        raise TrainingError(
            f"base.model: {folder}: no config.json in the downloaded model; remove the "
            "folder, and it is downloaded again"
        )
    found = configs[0].parent
    is_tree_in_parts = any(folder.rglob("MLmodel")) and not any(found.glob("tokenizer*"))
    return None if is_tree_in_parts else found


def download(model: AzureModel, progress: ShowProgress = show_nothing) -> Path:
    """Return the folder of a model, downloaded if it is not there.

    Raises RecipeError, CredentialsError, StoreError or TrainingError (see `registry_errors`)."""
    with alone(model):
        folder = downloaded_folder(model)
        if folder is not None:
            return folder
        with registry_errors(model):
            remote = RemoteModel(model)
            remote.fetch(remote.files, progress)
            os.replace(model.unfinished, model.folder)
            if model.earlier_folder is not None and model.earlier_folder.exists():
                # A tree of an earlier version, which can't be loaded.
                shutil.rmtree(model.earlier_folder)
    return model.folder


def fetch_small_files(model: AzureModel) -> int:
    """Download config and tokenizer of a model into `model.unfinished`; return the bytes of the
    files that are still to be downloaded.

    Raises what `download` raises, and TrainingError for a model without safetensors."""
    with alone(model), registry_errors(model):
        remote = RemoteModel(model)
        weights = [file for file in remote.files if fnmatch(file.path, WEIGHTS)]
        if not weights:
            raise TrainingError(
                f"base.model: {model.title} has no .safetensors (other weight files can run code); "
                "choose another model"
            )
        remote.fetch([file for file in remote.files if file not in weights], show_nothing)
        return sum(file.size - bytes_there(file, model.unfinished) for file in weights)


class RemoteModel:
    """A model's files in the storage of its registry.

    Raises the errors of the Azure SDKs, which `registry_errors` translates."""

    def __init__(self, model: AzureModel) -> None:
        self._model = model
        self._container, self._prefix = open_storage(model)
        self.files = self._listed()

    def _listed(self) -> tuple[RegistryFile, ...]:
        """Return the files that are downloaded, the small ones first."""
        blobs = {}
        for blob in self._tries()(self._list_once):
            if not (blob.metadata or {}).get("hdi_isfolder"):
                blobs[blob.name.removeprefix(self._prefix)] = blob

        def read(name: str) -> str:
            blob = blobs[name]
            return self._read(blob.name, 0, blob.size).decode("utf-8", "replace")

        files: list[RegistryFile] = []
        for path, name in placed(tuple(blobs), read, self._model.title).items():
            blob = blobs[name]
            md5 = blob.content_settings.content_md5
            files.append(RegistryFile(blob.name, path, blob.size, bytes(md5) if md5 else None))
        return tuple(sorted(files, key=lambda file: file.size))

    def fetch(self, files: Sequence[RegistryFile], progress: ShowProgress) -> None:
        """Download what is missing of `files` into the unfinished folder. `progress` is told
        bytes."""
        folder = self._model.unfinished
        size = sum(file.size for file in files)
        done = sum(bytes_there(file, folder) for file in files)
        told_at = time.monotonic()
        if done < size:
            _log.info(
                "base model: downloading %s, %.2f of %.2f GB, into %s",
                self._model.title,
                (size - done) / 1e9,
                size / 1e9,
                self._model.folder,
            )
        for file in files:
            for added in self._fetch_file(file, folder):
                done += added
                progress(done, size, f"download of {self._model.name}")
                if time.monotonic() - told_at > LOG_S:
                    told_at = time.monotonic()
                    _log.info("base model: %.2f of %.2f GB downloaded", done / 1e9, size / 1e9)

    def _fetch_file(self, file: RegistryFile, folder: Path) -> Iterator[int]:
        """Download a file, or the rest of one; yield how many bytes were added each time."""
        target = folder / file.path
        if target.exists() and target.stat().st_size == file.size:
            return
        part = part_of(target)
        part.parent.mkdir(parents=True, exist_ok=True)
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()
        with part.open("ab") as stream:
            while stream.tell() < file.size:
                offset = stream.tell()
                length = min(RANGE, file.size - offset)
                stream.write(self._read(file.blob, offset, length))
                yield length
        if file.md5:
            with part.open("rb") as stream:
                digest = hashlib.file_digest(stream, new_md5)
            if digest.digest() != file.md5:
                part.unlink()
                raise ModelUnavailable(
                    f"base.model: {self._model.title}: {file.path} was damaged on the way (its MD5 "
                    "is another); run again, and this file is downloaded anew"
                )
        os.replace(part, target)

    def _read(self, blob: str, offset: int, length: int) -> bytes:
        """Return a range of a blob, read again while the storage does not answer. The key to the
        storage is good for some hours: it is renewed once."""
        from azure.core.exceptions import HttpResponseError

        try:
            return self._tries()(self._read_once, blob, offset, length)
        except HttpResponseError as error:
            if error.status_code not in (401, 403):
                raise
            self._container, _ = open_storage(self._model)
            return self._tries()(self._read_once, blob, offset, length)

    def _tries(self) -> Retrying:
        return Retrying(
            retry=retry_if_exception(is_outage),
            wait=BACKOFF,
            stop=OutageLongerThan(LocalSettings().store_wait),
            before_sleep=self._log_first_failure,
            reraise=True,
        )

    def _list_once(self) -> "list[BlobProperties]":
        return list(self._container.list_blobs(name_starts_with=self._prefix, include=["metadata"]))

    def _read_once(self, blob: str, offset: int, length: int) -> bytes:
        if not length:
            return b""
        content: bytes = self._container.download_blob(
            blob, offset=offset, length=length, max_concurrency=RANGE // CHUNK
        ).readall()
        if len(content) != length:
            raise ConnectionError(f"{len(content)} bytes instead of {length}")
        return content

    def _log_first_failure(self, state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome:
            _log.warning(
                "base model: the storage of %s does not answer (%s); trying again for up to %.0f s",
                self._model.title,
                reason_of(state.outcome.exception()),
                LocalSettings().store_wait,
            )


def part_of(target: Path) -> Path:
    """Return the file that what is downloaded of `target` so far is in."""
    return target.with_name(f"{target.name}.part")


def bytes_there(file: RegistryFile, folder: Path) -> int:
    """Return how many bytes of a file are in `folder` already."""
    for path in (folder / file.path, part_of(folder / file.path)):
        if path.exists() and path.stat().st_size <= file.size:
            return path.stat().st_size
    return 0


def new_md5() -> Any:
    """Return a hash that compares with the storage's. It finds damage; it proves no origin."""
    return hashlib.md5(usedforsecurity=False)


def placed(names: Sequence[str], read: Callable[[str], str], title: str) -> dict[str, str]:
    """Return which files of a registry's model are downloaded: by their path in the folder that
    Transformers loads, their name in the registry.

    `read` returns the text of a named file. Raises TrainingError for a model that is none of
    Transformers', or has no config.json."""
    by_depth = sorted(names, key=lambda name: (name.count("/"), name))
    descriptions = [name for name in by_depth if PurePosixPath(name).name == "MLmodel"]
    configs = [name for name in by_depth if PurePosixPath(name).name == "config.json"]
    if descriptions:
        parts = mlflow_parts(descriptions[0], read(descriptions[0]), title)
    else:
        parts = [PurePosixPath(name).parent for name in configs[:1]]
    chosen = {}
    for part in parts:
        for name in names:
            path = PurePosixPath(name)
            if not path.is_relative_to(part):
                continue
            if any(fnmatch(path.name, pattern) for pattern in FILES):
                chosen[str(path.relative_to(part))] = name
    if "config.json" not in chosen:
        raise TrainingError(
            f"base.model: {title} has no config.json where Transformers models have it; choose "
            "another model, or give a local folder"
        )
    for path in map(PurePosixPath, chosen):
        if ".." in path.parts or path.is_absolute():
            raise TrainingError(f"base.model: {title}: the file {path} leads out of its folder")
    return chosen


def mlflow_parts(description: str, text: str, title: str) -> list[PurePosixPath]:
    """Return the folders of a model's parts, which its file MLmodel with `text` stands beside.

    Raises TrainingError where MLmodel names no flavour of Transformers."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        content = None
    flavours = content.get("flavors") if isinstance(content, dict) else None
    named = list(flavours) if isinstance(flavours, dict) else []
    for flavour, parts in FLAVOURS.items():
        if flavour in named:
            return [PurePosixPath(description).parent / part for part in parts]
    raise TrainingError(
        f"base.model: {title}: its MLmodel names the flavours {', '.join(map(str, named)) or '-'}, "
        f"none of {', '.join(FLAVOURS)}; choose a model of Transformers"
    )


def open_storage(model: AzureModel) -> "tuple[ContainerClient, str]":
    """Return the container that holds a model's files, and what their names begin with.

    Raises the errors of the Azure SDKs."""
    from azure.ai.ml import MLClient
    from azure.ai.ml._utils._registry_utils import get_storage_details_for_registry_assets
    from azure.storage.blob import ContainerClient

    client = MLClient(
        azure_ml_login(),
        registry_name=model.registry,
        show_progress=False,
        enable_telemetry=False,
        # This client's own retries heed Retry-After.
        retry_total=3,
        retry_backoff_factor=0.5,
        connection_timeout=5,
        read_timeout=20,
    )
    address = str(client.models.get(model.name, version=model.version).path)
    url = urlsplit(address)
    container, _, folder = url.path.strip("/").partition("/")
    try:
        # What client.models.download calls too; azure-ai-ml has no public name for it.
        storage, _ = get_storage_details_for_registry_assets(
            service_client=client.models._registry_service_client,
            asset_type="models",
            asset_name=model.name,
            asset_version=model.version,
            rg_name=client.resource_group_name,
            reg_name=model.registry,
            uri=address,
        )
    except KeyError:
        # azure-ai-ml fails so where the storage needs no key.
        storage = f"{url.scheme}://{url.netloc}/{container}"
    client_of_container = ContainerClient.from_container_url(
        storage,
        # The only retries are those of `_tries`.
        retry_total=0,
        max_single_get_size=CHUNK,
        max_chunk_get_size=CHUNK,
        connection_timeout=10,
        read_timeout=30,
    )
    return client_of_container, f"{folder}/" if folder else ""


@contextmanager
def alone(model: AzureModel) -> Iterator[None]:
    """Wait until no other process downloads the model. A process that dies lets go."""
    model.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(model.folder.with_name(f".lock-{model.folder.name}"), thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _log.warning("base model: another process downloads %s; waiting for it", model.title)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def registry_errors(model: AzureModel) -> Iterator[None]:
    """Raise the errors of the Azure SDKs and of the disk as ours, in one line.

    RecipeError: no such model or registry. CredentialsError: no login, or one without access.
    ModelUnavailable: no answer. StoreError: the disk. The SDKs' texts are neither shown nor
    chained: they may hold a URL with its signature."""
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError, ClientAuthenticationError, ResourceNotFoundError

    try:
        yield
    except ResourceNotFoundError:
        raise RecipeError(
            f"base.model: there is no {model.title}; correct the name or the version"
        ) from None
    except MlException as error:
        raise TrainingError(
            f"base.model: {model.title} can't be read ({type(error).__name__}); correct the name, "
            "or give a local folder"
        ) from None
    except (AzureError, ConnectionError, TimeoutError) as error:
        status = getattr(error, "status_code", None)
        if isinstance(error, ClientAuthenticationError) and status is None:
            raise CredentialsError(
                f"base.model: no Azure login for the registry {model.registry}: run `az login`, or "
                "set AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET"
            ) from None
        if status in (401, 403):
            raise CredentialsError(
                f"base.model: the registry {model.registry} refuses the login ({status}): run "
                "`az login` again, or give the login the role AzureML Registry User there"
            ) from None
        if status is not None and not is_outage(error):
            raise TrainingError(
                f"base.model: the registry {model.registry} refuses {model.name} "
                f"({reason_of(error)}); correct the name, or give a local folder"
            ) from None
        raise ModelUnavailable(
            f"base.model: {model.title} can't be downloaded now ({reason_of(error)}); run again, "
            "and the download goes on where it is"
        ) from None
    except OSError as error:
        raise os_error(error, str(model.folder)) from error
