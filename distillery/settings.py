"""What belongs to the machine or the account, not to the recipe: read from the environment or a .env file.

None of it is part of any cache key: moving the store or changing a key repeats nothing.
"""

import ipaddress
from functools import cache
from pathlib import Path
from typing import Any

from dotenv import find_dotenv, load_dotenv
from pydantic import AliasChoices, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from distillery.errors import CredentialsError, DistilleryError


@cache
def load_environment() -> None:
    """Reads .env in the working folder or above it; what the environment already says wins."""
    load_dotenv(find_dotenv(usecwd=True))


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own, which no other machine reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Settings(BaseSettings):
    # Each class below needs an env_prefix: without one, pydantic would read a field `home` from HOME as well.
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


class LocalSettings(_Settings):
    """DISTILLERY_HOME holds all that this machine writes; the others default to places inside it. Training saves a
    checkpoint every DISTILLERY_CHECKPOINT_SECONDS. An outage of the store is waited out for DISTILLERY_STORE_WAIT
    seconds; copies of what a remote store holds take DISTILLERY_CACHE_GB (10^9 bytes) at most. DISTILLERY_TRACKING is
    an MLflow tracking URI for training's figures; without it none are sent."""

    model_config = SettingsConfigDict(env_prefix="DISTILLERY_")

    home: Path = Path(".distillery")
    store: str = ""
    store_wait: float = Field(90, ge=0)
    cache_gb: float = Field(50, ge=0)
    labels: str = ""
    registry: str = ""
    tracking: str = ""
    remote_code: str = ""
    checkpoint_seconds: float = Field(300, gt=0)
    container: bool = False

    @property
    def folder(self) -> Path:
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
    def remote_code_models(self) -> frozenset[str]:
        """Models whose own Python code may run on this machine, comma-separated in DISTILLERY_REMOTE_CODE."""
        return frozenset(name.strip() for name in self.remote_code.split(",") if name.strip())


class TeacherSettings(_Settings):
    """The teacher's endpoint, under the lab's names."""

    model_config = SettingsConfigDict(env_prefix="TEACHER_MODEL_")

    model: str = Field(default="", validation_alias="TEACHER_MODEL_NAME")
    endpoint: str = ""
    key: SecretStr = SecretStr("")


class AzureMLSettings(_Settings):
    """The Azure ML workspace, under the lab's names."""

    model_config = SettingsConfigDict(env_prefix="AZUREML_")

    subscription_id: str = ""
    resource_group: str = ""
    workspace: str = Field(
        default="", validation_alias=AliasChoices("AZUREML_WS_NAME", "AZUREML_WORKSPACE_NAME")
    )

    def require(self) -> None:
        """Raises CredentialsError with the names that are not set."""
        names = {
            "AZUREML_SUBSCRIPTION_ID": self.subscription_id,
            "AZUREML_RESOURCE_GROUP": self.resource_group,
            "AZUREML_WS_NAME": self.workspace,
        }
        missing = [name for name, value in names.items() if not value]
        if missing:
            raise CredentialsError(
                f"{', '.join(missing)}: not set; set them in the environment or in .env (see sample.env)"
            )
