"""Settings of this machine or account, which no recipe holds: read from the environment or .env.

No setting is part of a cache key: moving the store or changing a key repeats no work.
"""

import ipaddress
import logging
import os
import re
import stat
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from distillery.errors import CredentialsError, DistilleryError

CHILD = "DISTILLERY_CHILD"
"""Set for the processes that Distillery starts: they get what they need, and read no .env."""

RUN_OF_A_WORKER = "PREFECT__FLOW_RUN_ID"
"""Prefect sets it for a run that a worker starts."""

OTHER_NAMES = frozenset(
    {
        # Of our own commands.
        "DISTILLERY_PREFECT_PORT",
        "DISTILLERY_SERVER_KEY",
        # Of deployments/compose.yaml and of Prefect.
        "POSTGRES_PASSWORD",
        "PREFECT_DATABASE_PASSWORD",
        "LABELS_DATABASE_PASSWORD",
        "PREFECT_API_AUTH_STRING",
        "PREFECT_API_URL",
        "PREFECT_SERVER_API_AUTH_STRING",
        "PREFECT_SERVER_ENCRYPTION_KEY",
        "WORKER_MEMORY",
        # Of the libraries that compute or reach the network.
        "ALL_PROXY",
        "CUDA_VISIBLE_DEVICES",
        "HF_ENDPOINT",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "MLFLOW_TRACKING_USERNAME",
        "NO_PROXY",
        "OMP_NUM_THREADS",
        "REQUESTS_CA_BUNDLE",
        "SSL_CERT_FILE",
    }
)
"""Names that .env may hold beside those of the settings below and AZURE_*."""

EXAMPLES = {
    "_MODEL_NAME": "gpt-4.1-mini",
    "_MODEL_ENDPOINT": "https://api.openai.com/v1",
    "_MODEL_KEY": "sk-...",
}
"""What an endpoint's settings look like, by the ends of their names, for messages."""

_log = logging.getLogger(__name__)


@cache
def load_environment() -> None:
    """Read .env from the working folder; variables that are set already win over it.

    Neither a run of a worker nor a process that Distillery starts reads one: the working folder of
    a run is not its user's."""
    if RUN_OF_A_WORKER in os.environ or CHILD in os.environ:
        return
    for name, value in read_dotenv(Path.cwd()).items():
        os.environ.setdefault(name, value)


def read_dotenv(folder: Path) -> dict[str, str]:
    """Return the known settings in `folder`/.env.

    A file that others may have written is not read, and an unknown name is not taken; one warning
    says so for each. Raises DistilleryError for a file that is not text."""
    file = folder / ".env"
    reason = why_not_trusted(file)
    if reason:
        _log.warning("%s is not read: %s", file, reason)
    if reason or not file.is_file():
        return {}
    try:
        found = dotenv_values(file, encoding="utf-8")
    except UnicodeDecodeError:
        raise DistilleryError(f"{file}: not UTF-8; save it as UTF-8") from None
    known = known_names()
    values = {}
    for name, value in found.items():
        # Prefect reads its own settings from this file itself.
        if name.startswith("PREFECT_") and name not in known:
            continue
        if name.upper() not in known and not name.startswith("AZURE_"):
            _log.warning(
                "%s: %s is no setting of Distillery and is not read; correct its name, or set it "
                "in the environment",
                file,
                name,
            )
        elif value is not None:
            values[name] = value
    return values


def why_not_trusted(file: Path) -> str:
    """Return why nobody should read settings from `file`; "" if they may, or if there is none.

    It must be a regular file of the current user or of root, and others must not be able to write
    to it. A link must belong to one of them too. Root, as which containers work in the folders of
    their users, may read that of the folder's owner."""
    try:
        link, found = file.lstat(), file.stat()
        folder = file.parent.stat()
    except OSError:
        return ""
    # Some name the folder of a virtual environment so.
    if stat.S_ISDIR(found.st_mode):
        return ""
    if not stat.S_ISREG(found.st_mode):
        return "it is no regular file; remove it"
    # As of root's own file in a folder that others work in.
    if not os.access(file, os.R_OK):
        return "you may not read it; ask its owner, or work in a folder of your own"
    # Windows knows neither such owners nor such a mode.
    if not hasattr(os, "geteuid"):
        return ""
    owners, groups = {os.geteuid(), 0}, {os.getegid()}
    if os.geteuid() == 0:
        owners.add(folder.st_uid)
        groups.add(folder.st_gid)
    if not {link.st_uid, found.st_uid} <= owners:
        return "it belongs to another user; work in a folder of your own"
    of_a_group = found.st_mode & stat.S_IWGRP and found.st_gid not in groups
    if found.st_mode & stat.S_IWOTH or of_a_group:
        return f"others may write to it; run `chmod go-w {file}`"
    return ""


def known_names() -> set[str]:
    """Return the names that .env may hold, beside AZURE_*."""
    names = set(OTHER_NAMES)
    endpoints = (TeacherSettings, CheapSettings, JudgeSettings)
    for settings in (LocalSettings, *endpoints, AzureMLSettings):
        for field_name, field in settings.model_fields.items():
            alias = field.validation_alias
            aliases = getattr(alias, "choices", [alias])
            prefixed = f"{settings.model_config['env_prefix']}{field_name}".upper()
            names |= {prefixed} if alias is None else set(map(str, aliases))
    return names


def names_in(text: str, separator: str) -> list[str]:
    """Return the parts of a setting that lists several things; empty ones are left out."""
    return [part.strip() for part in text.split(separator) if part.strip()]


def is_loopback(host: str) -> bool:
    """Return whether `host`, a name or an address, is reachable from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def not_set(names: Sequence[str]) -> CredentialsError:
    """Return the error for settings that are missing."""
    return CredentialsError(f"{', '.join(names)}: not set or empty; {where_to_set(names)}")


def where_to_set(names: Sequence[str]) -> str:
    """Return what to do about settings that are missing: the file that they belong into, with
    examples of those of an endpoint."""
    them = "it" if len(names) == 1 else "them"
    if RUN_OF_A_WORKER in os.environ:
        return f"set {them} in .env of the server's machine and run `python -m deployments.setup`"
    examples = [
        f"{name}={value}" for name in names for end, value in EXAMPLES.items() if name.endswith(end)
    ]
    such_as = f", such as {' '.join(examples)}" if examples else ""
    return f"set {them} in {Path.cwd() / '.env'}{copy_hint()} or in the environment{such_as}"


def copy_hint() -> str:
    """Return how .env is made where the working folder has none; a copy would overwrite one."""
    return "" if Path(".env").exists() else " (copy sample.env)"


class EnvironmentSettings(BaseSettings):
    """Base of the settings below: an invalid value raises DistilleryError with its variable's name.

    Subclasses need an env_prefix: without one, pydantic would read a field `home` from HOME too."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", populate_by_name=True, env_ignore_empty=True
    )

    def __init__(self, **values: Any) -> None:
        load_environment()
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            name = f"{self.model_config['env_prefix']}{first['loc'][0]}".upper()
            raise DistilleryError(
                f"{name}: {first['msg']}; correct it in the environment or in .env"
            ) from None


class LocalSettings(EnvironmentSettings):
    """Where this machine keeps what it makes, and how it works: DISTILLERY_*."""

    model_config = SettingsConfigDict(env_prefix="DISTILLERY_")

    home: Path = Field(
        Path(".distillery"),
        description="The folder for everything that this machine writes; an absolute path for "
        "workers, which give each run a working folder of its own",
    )
    store: str = Field(
        "",
        description="The artifact store: an absolute folder or an fsspec URL such as "
        "abfs://container@account.dfs.core.windows.net/path; by default store/ in the home",
    )
    store_wait: float = Field(
        90,
        ge=0,
        description="Seconds to wait while the store, the database or the storage of a base model "
        "does not answer",
    )
    cache_gb: float = Field(
        50,
        ge=0,
        description="The most that copies from a remote store may take, in 10^9 bytes",
    )
    row_mb: float = Field(
        16,
        ge=0.001,
        le=1_000,
        description="The most that one row of a file may take, in 10^6 characters of CSV or JSONL "
        "or 10^6 bytes that Parquet unfolds to; a longer one is a bad row",
    )
    table_mb: float = Field(
        4_000,
        ge=0.001,
        description="The most that the rows of one Parquet file may unfold to where all are kept, "
        "as in a data set, in 10^6 bytes",
    )
    labels: str = Field(
        "",
        description="The label database: an SQLAlchemy URL of SQLite or PostgreSQL; by default "
        "labels.db in the home",
    )
    registry: str = Field(
        "",
        description="The local registry: an MLflow tracking URI; by default registry.db in the "
        "home",
    )
    tracking: str = Field(
        "",
        description="An MLflow tracking URI that training sends its losses and speed to; by "
        "default none",
    )
    data_folders: str = Field(
        "",
        description="The folders from which a run that a worker executes may read files and model "
        "folders that its recipe or parameters name: absolute, separated as in PATH; by default "
        "the working folder. The store and the shipped sample are always among them, hidden files "
        "never. A run on the command line reads what its user may read",
    )
    data_protocols: str = Field(
        "file",
        description="What else a run that a worker executes may open: protocols, or what URLs "
        "begin with, comma-separated, such as file,abfs://container@account.dfs.core.windows.net/"
        "rows; they are opened with the worker's login. Batch inference also writes its answers "
        "below what URLs begin with. Where it has an entry such as "
        "hf://datasets/ORGANISATION, data sets come from there alone",
    )
    remote_code: str = Field(
        "",
        description="Models whose own Python code may run on this machine, comma-separated, each "
        "as MODEL@COMMIT with the hub's commit of 40 hex digits; for a folder or an azureml:// "
        "model as MODEL@DIGEST, which `distillery check` tells. The recipe must allow it too",
    )
    checkpoint_seconds: float = Field(
        300, gt=0, description="Seconds between the checkpoints that training saves"
    )
    worker_wait: float = Field(
        1800,
        ge=0,
        description="Seconds that a run waits for a work pool that is paused or has no worker, "
        "before it fails",
    )
    needs_gpu: bool = Field(
        False,
        description="Whether a training ends at once on this machine if there is no CUDA, unless "
        "its recipe says training.allow_cpu",
    )
    devices: int = Field(
        1,
        ge=1,
        description="On how many devices of this machine a training computes: GPUs or, where there "
        "is none, processes on the CPU. They share out the rows of each step. The student is the "
        "same up to rounding, and with lora.dropout up to which numbers are dropped",
    )
    fsdp: bool = Field(
        False,
        description="Whether the devices of a training share out the model, too (FSDP), for one "
        "that exceeds the memory of a GPU. The student is the same up to rounding",
    )
    signing_key: SecretStr = Field(
        SecretStr(""),
        description="An Ed25519 private key, as PEM or the path of a PEM file, that signs the "
        "manifests of the models that this machine registers",
    )
    verify_key: str = Field(
        "",
        description="An Ed25519 public key, as PEM or the path of a PEM file: models that its "
        "private key has not signed are neither downloaded nor served",
    )
    container: bool = Field(
        False,
        description="Whether this is a container whose files vanish with it: a label database in "
        "SQLite is then refused",
    )

    @field_validator("data_folders")
    @classmethod
    def check_folders(cls, text: str) -> str:
        if not all(Path(name).expanduser().is_absolute() for name in names_in(text, os.pathsep)):
            raise ValueError(f"give absolute folders, separated by {os.pathsep!r}")
        return text

    @property
    def folders(self) -> list[Path]:
        """The folders in `data_folders`."""
        return [Path(name).expanduser() for name in names_in(self.data_folders, os.pathsep)]

    @property
    def protocols(self) -> list[str]:
        """The protocols and beginnings of URLs in `data_protocols`."""
        return names_in(self.data_protocols, ",")

    @property
    def folder(self) -> Path:
        """The home as an absolute path."""
        return self.home.expanduser().absolute()

    @property
    def store_url(self) -> str:
        """An fsspec URL: a local folder by default, abfs:// on Azure."""
        return self.store or str(self.folder / "store")

    @property
    def labels_url(self) -> str:
        """An SQLAlchemy URL of the label store."""
        return self.labels or f"sqlite:///{self.folder / 'labels.db'}"

    @property
    def registry_url(self) -> str:
        """An MLflow tracking URI of the local registry."""
        return self.registry or f"sqlite:///{self.folder / 'registry.db'}"

    @property
    def row_bytes(self) -> int:
        """The most characters or bytes of a row."""
        return int(self.row_mb * 1e6)

    @property
    def table_bytes(self) -> int:
        """The most bytes of a Parquet file's rows together."""
        return int(self.table_mb * 1e6)

    @property
    def remote_code_models(self) -> dict[str, frozenset[str]]:
        """The models in `remote_code`, each with its commits or digests; an empty set for a model
        that is named without one."""
        models: dict[str, frozenset[str]] = {}
        for entry in names_in(self.remote_code, ","):
            found = re.fullmatch("(.+)@([0-9a-f]{40}|[0-9a-f]{64})", entry)
            model, revisions = (found[1], {found[2]}) if found else (entry, set())
            models[model] = models.get(model, frozenset()) | revisions
        return models


class TeacherSettings(EnvironmentSettings):
    """The teacher's endpoint, under the lab's names: TEACHER_MODEL_*."""

    model_config = SettingsConfigDict(env_prefix="TEACHER_MODEL_")

    model: str = Field(
        "", validation_alias="TEACHER_MODEL_NAME", description="The model's name in requests"
    )
    endpoint: str = Field("", description="The endpoint's URL")
    key: SecretStr = Field(
        SecretStr(""), description="The endpoint's key; without it Azure is asked with your login"
    )


class JudgeSettings(TeacherSettings):
    """The judge's endpoint: JUDGE_MODEL_*."""

    model_config = SettingsConfigDict(env_prefix="JUDGE_MODEL_")

    model: str = Field(
        "", validation_alias="JUDGE_MODEL_NAME", description="The model's name in requests"
    )


class CheapSettings(TeacherSettings):
    """The endpoint of the cheap teacher of teacher.cascade: CHEAP_MODEL_*."""

    model_config = SettingsConfigDict(env_prefix="CHEAP_MODEL_")

    model: str = Field(
        "", validation_alias="CHEAP_MODEL_NAME", description="The model's name in requests"
    )


class AzureMLSettings(EnvironmentSettings):
    """The Azure ML workspace, under the lab's names: AZUREML_*."""

    model_config = SettingsConfigDict(env_prefix="AZUREML_")

    subscription_id: str = ""
    resource_group: str = ""
    workspace: str = Field(
        "", validation_alias=AliasChoices("AZUREML_WS_NAME", "AZUREML_WORKSPACE_NAME")
    )

    @property
    def is_complete(self) -> bool:
        """Whether a workspace is named."""
        return bool(self.subscription_id and self.resource_group and self.workspace)

    def require(self) -> None:
        """Raise CredentialsError with the names of the variables that are not set."""
        names = {
            "AZUREML_SUBSCRIPTION_ID": self.subscription_id,
            "AZUREML_RESOURCE_GROUP": self.resource_group,
            "AZUREML_WS_NAME": self.workspace,
        }
        missing = [name for name, value in names.items() if not value]
        if missing:
            raise not_set(missing)
