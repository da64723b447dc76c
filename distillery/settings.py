"""Settings of this machine or account, which no recipe holds: read from the environment or .env.

No setting is part of a cache key: moving the store or changing a key repeats no work.
"""

import ipaddress
import re
from functools import cache
from pathlib import Path
from typing import Any

from dotenv import find_dotenv, load_dotenv
from pydantic import AliasChoices, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from distillery.errors import CredentialsError, DistilleryError


@cache
def load_environment() -> None:
    """Read .env from the working folder or above; variables that are set already win over it."""
    load_dotenv(find_dotenv(usecwd=True))


def is_loopback(host: str) -> bool:
    """Return whether `host`, a name or an address, is reachable from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
    def remote_code_models(self) -> dict[str, frozenset[str]]:
        """The models in `remote_code`, each with its commits or digests; an empty set for a model
        that is named without one."""
        models: dict[str, frozenset[str]] = {}
        for entry in filter(None, map(str.strip, self.remote_code.split(","))):
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
            raise CredentialsError(
                f"{', '.join(missing)}: not set; set them in the environment or in .env "
                "(see sample.env)"
            )
