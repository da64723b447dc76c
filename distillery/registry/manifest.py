"""manifest.json in a registered folder: provenance, and the sha256 and size of every other file.

The provenance is what the caller gives: flows/distill.py the records of a run, `environment` the
code and the packages.
"""

import json
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import TypeAdapter, ValidationError

import distillery
from distillery.errors import DataError, ModelError, RegistryError
from distillery.models.onnx_folder import check_model_folder, is_system_file
from distillery.recipe import Columns, PromptRecipe
from distillery.records import Record, RegisteredModel
from distillery.registry.signing import (
    SIGNATURE,
    SIGNATURE_TAG,
    must_be_signed,
    sign,
    verify_signature,
)
from distillery.storage.digests import FileEntry, digest_of_files, list_files, sha256_of

MANIFEST = "manifest.json"
INFERENCE_MODEL = "inference_model.json"
"""What `distillery models foundry` writes into a folder for Foundry Local. Nothing here reads it,
so that it is no part of a registered model."""

PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "safetensors", "datasets", "huggingface-hub"),
    *("olive-ai", "onnxruntime", "onnxruntime-genai", "numpy", "scikit-learn"),
    *("prefect", "openai", "azure-ai-inference", "mlflow-skinny", "azure-ai-ml"),
)
"""The packages that rows, labels, weights and figures depend on."""


class Manifest(Record):
    """The content of manifest.json. `files`: all other files, as it can't hold its own digest."""

    model: str
    provenance: dict[str, Any]
    files: tuple[FileEntry, ...]


def environment() -> dict[str, Any]:
    """Return what the manifest tells of the code: the version and the digest of Distillery's
    modules, Python's version, and that of each of PACKAGES which is installed."""
    package = Path(distillery.__file__).parent
    modules = tuple(entry for entry in list_files(package) if entry.path.endswith(".py"))
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "distillery": distillery.__version__,
        "code_sha256": digest_of_files(modules),
        "python": platform.python_version(),
        "packages": versions,
    }


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files below `source` to the same paths below `target`."""
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def copy_with_manifest(
    folder: Path, content: Path, name: str, provenance: Mapping[str, Any]
) -> Manifest:
    """Copy `folder` to `content`, write manifest.json there and return it.

    Raises RegistryError for a folder with anything but a model; see `check_content`."""
    if not folder.is_dir():
        raise RegistryError(f"{folder}: no such folder; register the folder of an exported model")
    copy_folder(folder, content)
    if (content / MANIFEST).exists():
        refuse_other_manifest(folder / MANIFEST)
        (content / MANIFEST).unlink()
    for own in (SIGNATURE, INFERENCE_MODEL):
        (content / own).unlink(missing_ok=True)
    check_content(content, str(folder))
    files = list_files(content)
    if not files:
        raise RegistryError(f"{folder}: the folder is empty; register the folder of a model")
    manifest = Manifest(model=name, provenance=dict(provenance), files=files)
    (content / MANIFEST).write_bytes(manifest_text(manifest))
    return manifest


def check_content(folder: Path, title: str) -> None:
    """Raise RegistryError for a folder that holds anything but a model, as `check_model_folder`
    says it. `title` names the model in the message, in place of a temporary folder."""
    try:
        check_model_folder(folder)
    except ModelError as error:
        raise RegistryError(str(error).replace(str(folder), title)) from error


def manifest_text(manifest: Manifest) -> bytes:
    """Return what manifest.json holds."""
    values = manifest.model_dump(mode="json")
    return json.dumps(values, sort_keys=True, indent=1, ensure_ascii=False).encode()


def refuse_other_manifest(path: Path) -> None:
    """Raise RegistryError unless the file is a manifest that a download left."""
    try:
        Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise RegistryError(
            f"{path}: the registry writes a file of this name; rename yours"
        ) from error


def manifest_tags(manifest: Manifest, digest: str) -> dict[str, str]:
    """Return the tags of a version from which its record is read back, with the signature if
    DISTILLERY_SIGNING_KEY is set."""
    tags = {
        "manifest_sha256": digest,
        "files_sha256": digest_of_files(manifest.files),
        "bytes": str(sum(entry.bytes for entry in manifest.files)),
    }
    signature = sign(manifest_text(manifest))
    if signature:
        tags[SIGNATURE_TAG] = signature
    return tags


def verify_files(folder: Path, model: RegisteredModel) -> None:
    """Raise RegistryError with the first file that is missing, altered or not in the manifest."""
    path = folder / MANIFEST
    if not path.is_file() or sha256_of(path) != model.manifest_sha256:
        raise altered_error(model, MANIFEST)
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise altered_error(model, MANIFEST) from error
    file = first_difference(folder, manifest)
    if file is not None:
        raise altered_error(model, file)
    if manifest.model != model.name or digest_of_files(manifest.files) != model.artifact.sha256:
        raise altered_error(model, MANIFEST)


def verify_before_loading(folder: Path) -> None:
    """Raise RegistryError if a downloaded folder is not what its manifest.json lists, or is not
    signed as DISTILLERY_VERIFY_KEY asks for.

    A folder without manifest.json was exported but not registered. It is refused only if
    DISTILLERY_VERIFY_KEY is set, which nothing but a registered model can satisfy, or if it has a
    signature.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if must_be_signed() or (folder / SIGNATURE).is_file():
            raise RegistryError(
                f"{folder}: {MANIFEST}: missing, while {SIGNATURE} or DISTILLERY_VERIFY_KEY asks "
                "for it; get the model with `distillery models download`"
            )
        return
    content = path.read_bytes()
    signature = ""
    if (folder / SIGNATURE).is_file():
        signature = (folder / SIGNATURE).read_text(encoding="ascii", errors="replace")
    verify_signature(content, signature, str(folder))
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError:
        file: str | None = MANIFEST
    else:
        file = first_difference(folder, manifest)
    if file is not None:
        raise RegistryError(
            f"{folder}: {file}: missing, added or altered since the model was registered; "
            "download it again"
        )


def first_difference(folder: Path, manifest: Manifest) -> str | None:
    """Return the first file of a folder that is not as the manifest lists it; None if all are."""
    listed = {entry.path: entry for entry in manifest.files}
    found = {entry.path: entry for entry in list_files(folder)}
    for own in (MANIFEST, SIGNATURE, INFERENCE_MODEL):
        listed.pop(own, None)
        found.pop(own, None)
    for file in sorted(listed.keys() | found.keys()):
        left_by_system = file not in listed and is_system_file(PurePosixPath(file).name)
        if listed.get(file) != found.get(file) and not left_by_system:
            return file
    return None


def provenance_of(folder: Path) -> dict[str, Any] | None:
    """Return what a downloaded folder's manifest.json tells of how the model came to be; None for a
    folder without manifest.json.

    Raises RegistryError where the file can't be read as a manifest."""
    manifest = manifest_of(folder)
    return manifest.provenance if manifest else None


def manifest_of(folder: Path) -> Manifest | None:
    """Return what a downloaded folder's manifest.json holds; None for a folder without it.

    Raises RegistryError where the file can't be read as a manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RegistryError(f"{path}: no manifest of a model; download the model again") from error


def prompt_in(made: Mapping[str, Any], title: str, classify: bool) -> PromptRecipe:
    """Return the prompt in the provenance of a manifest; the lab's for a model without manifest,
    whose provenance is empty. `title` names the model.

    Raises DataError for a prompt that can't be read, and for a classifier without one, whose prompt
    nobody can guess."""
    if made.get("prompt"):
        try:
            return PromptRecipe.model_validate(made["prompt"])
        except ValidationError as error:
            raise DataError(
                f"{title}: the prompt in its {MANIFEST} can't be read; download the model again"
            ) from error
    if classify:
        raise DataError(
            f"{title}: no manifest.json tells the prompt of this classifier; download it from the "
            "registry, or name its recipe where the command has --recipe"
        )
    return PromptRecipe()


def columns_in(made: Mapping[str, Any], title: str) -> tuple[Columns | None, tuple[str, ...]]:
    """Return the columns and the further columns (dataset.fields) of the rows that the provenance
    of a manifest names; None and () where it names none. `title` names the model.

    Raises DataError where they can't be read."""
    try:
        dataset = made.get("recipe", {}).get("dataset", {})
        columns = Columns.model_validate(dataset["columns"]) if "columns" in dataset else None
        fields = TypeAdapter(tuple[str, ...]).validate_python(dataset.get("fields") or ())
    except (ValidationError, AttributeError, TypeError) as error:
        raise DataError(
            f"{title}: the columns in its {MANIFEST} can't be read; download the model again"
        ) from error
    return columns, fields


def altered_error(model: RegisteredModel, file: str) -> RegistryError:
    return RegistryError(
        f"{model.name} version {model.version}: {file}: missing, added or altered since it was "
        "registered; register the model again to repair it"
    )


def mask_credentials(text: str) -> str:
    """Return the text with *** for the user and password of each URL in it."""
    return re.sub(r"://\S*@", "://***@", text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name if it has none."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0][:300]


@contextmanager
def disk_errors(location: str) -> Iterator[None]:
    """Raise OSError as RegistryError, which names the file or `location`."""
    try:
        yield
    except OSError as error:
        raise RegistryError(
            f"{error.filename or location}: {error.strerror or error}; "
            "free some space, or set DISTILLERY_HOME to another disk"
        ) from error
