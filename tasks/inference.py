import hashlib
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from glob import has_magic
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from distillery.data.source import TABLES, matching_files
from distillery.errors import DataError
from distillery.inference.batch import count_rows, read_rows, row_reader, score_file
from distillery.inference.student import Student
from distillery.inference.text_student import load_for_rows
from distillery.recipe import Columns, PromptRecipe, RegistryRecipe
from distillery.records import InputFile, Predictions, RegisteredModel
from distillery.registry.open import open_registry
from distillery.storage.allowed import address, name_in
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.azure_blobs import AZURE_PROTOCOLS, azure_options
from distillery.storage.digests import sha256_of
from distillery.storage.working import working_folder
from tasks.progress import conclude, show_rows
from tasks.stage import origin, stage


@stage("score", version=4, added_later={"fields"})
def score(
    model: RegisteredModel,
    prompt: PromptRecipe,
    rows: InputFile,
    columns: Columns,
    fields: tuple[str, ...] | None = None,
) -> Predictions:
    """Download and verify `model`, and answer every row of the file. `fields`: dataset.fields of
    the model's recipe."""
    started = time.perf_counter()
    with working_folder("score") as folder:
        student = load_student(model, folder / "model")
        file = unchanged_copy(rows, folder)
        of = count_rows(file)
        classes = student.classes.classes if student.classes else None
        reader = row_reader(columns, fields or (), classes, student.format)
        counts = score_file(
            student,
            read_rows(file, reader),
            prompt,
            folder / "out",
            lambda done: show_rows(done, of),
        )
        artifact = ArtifactStore().put(folder / "out")
    predictions = Predictions(artifact=artifact, **origin(started), **dict(counts))
    conclude(
        f"{counts.rows} rows answered, {counts.failed} set aside, in {predictions.seconds:.1f} s"
    )
    return predictions


def load_student(model: RegisteredModel, folder: Path, threads: int | None = None) -> Student:
    """Download and verify a registered model into `folder`, and load it. `threads` counts the cores
    for one operation; None leaves it to the runtime."""
    registry = open_registry(RegistryRecipe(kind=model.registry, model_name=model.name))
    return load_for_rows(registry.download(model, folder), threads)


class Fetched(NamedTuple):
    """A file of the input and its copy on this machine."""

    file: InputFile
    copy: Path


_fetched: ContextVar[Fetched | None] = ContextVar("fetched", default=None)


@contextmanager
def fetched(uri: str) -> Iterator[Fetched]:
    """Copy the file at a path or fsspec URL, and yield it with its copy, which the stages that are
    called within use: a large file is fetched and hashed once. Raises DataError."""
    with working_folder("input") as folder:
        copy = fetch_input(uri, folder)
        found = Fetched(InputFile(uri=uri, sha256=sha256_of(copy)), copy)
        token = _fetched.set(found)
        try:
            yield found
        finally:
            _fetched.reset(token)


def unchanged_copy(file: InputFile, folder: Path) -> Path:
    """Return a copy of a file: the one of `fetched`, or a new one in `folder`. Raises DataError,
    also where the file has changed."""
    at_hand = _fetched.get()
    if at_hand and at_hand.file == file:
        return at_hand.copy
    copy = fetch_input(file.uri, folder)
    if sha256_of(copy) != file.sha256:
        raise DataError(f"{copy.name}: changed while the run was under way; run it again")
    return copy


def fetch_input(uri: str, folder: Path) -> Path:
    """Copy the file at a path or fsspec URL into `folder` and return its path.

    Its name has nothing of a URL's query, which may hold a signature. Raises DataError, which tells
    nothing of what the file holds."""
    source = address(uri, "input_uri")
    target = folder / (source.name if isinstance(source, Path) else name_in(source))
    if target.suffix.lower() not in TABLES:
        raise DataError(
            f"{target.name}: input_uri takes {', '.join(TABLES)}, not {target.suffix!r}; convert it"
        )
    try:
        with open_address(source) as file, target.open("wb") as copy:
            shutil.copyfileobj(file, copy)
    except Exception as error:
        raise unreadable(target.name, error) from None
    return target


def unreadable(name: str, error: Exception) -> DataError:
    """Return the error for a file or address that can't be read: a file system of fsspec may raise
    anything, with the file's content in its text."""
    reason = getattr(error, "strerror", None) or type(error).__name__
    return DataError(f"input_uri {name}: can't be read ({reason}); correct input_uri")


def open_address(source: Path | str) -> AbstractContextManager[Any]:
    """Open a local file, or what is at a URL, to be read as bytes."""
    if isinstance(source, Path):
        return source.open("rb")
    opened: AbstractContextManager[Any] = fsspec.open(source, "rb", **options_of(source))
    return opened


def options_of(url: str) -> dict[str, Any]:
    """Return fsspec's options for a URL: Azure's storage is asked as the store is."""
    return azure_options(url) if url.partition("://")[0] in AZURE_PROTOCOLS else {}


def is_pattern(uri: str) -> bool:
    """Return whether input_uri names several files: a local folder or pattern, or a URL with *."""
    source = address(uri, "input_uri")
    if isinstance(source, Path):
        return source.is_dir() or (has_magic(str(source)) and not source.is_file())
    return "*" in source


class NamedInput(NamedTuple):
    """A file of the input. `name`: its path below the folder that the pattern begins with."""

    name: str
    file: InputFile


def input_files(uri: str) -> list[NamedInput]:
    """Return the files that a local folder or pattern, or a URL with *, names, by name.

    Raises DataError if there are none, or if one can't be read or may not be opened."""
    source = address(uri, "input_uri")
    if isinstance(source, Path):
        found = matching_files(str(source), "input_uri")
        base = str(source) if source.is_dir() else fixed_folder(str(source))
    else:
        base = fixed_folder(source)
        found = matching_urls(source, base)
    files = []
    for each in sorted(found):
        if Path(name_of(each)).suffix.lower() in TABLES:
            file = InputFile(uri=each, sha256=sha256_at(each))
            files.append(NamedInput(each.removeprefix(base).lstrip("/"), file))
    if not files:
        # A URL's query may hold a signature.
        shown = name_in(uri) if "://" in uri else uri
        raise DataError(
            f"input_uri {shown}: no {', '.join(TABLES)} file matches; correct input_uri"
        )
    return files


def name_of(uri: str) -> str:
    return name_in(uri) if "://" in uri else Path(uri).name


def fixed_folder(pattern: str) -> str:
    """Return the folder that a pattern begins with, before the first part with *, ? or [."""
    start = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    return start.rpartition("/")[0]


def matching_urls(url: str, base: str) -> list[str]:
    """Return the URLs of the files that a URL with * names; all begin with `base`."""
    try:
        filesystem, pattern = fsspec.url_to_fs(url, **options_of(url))
        root = fixed_folder(pattern)
        paths: Sequence[str] = filesystem.glob(pattern)
    except Exception as error:
        raise unreadable(name_in(url) or url, error) from None
    # A file system's own path leaves out what stands before the container, such as the account.
    return [f"{base}/{path.removeprefix(root).lstrip('/')}" for path in paths]


def sha256_at(uri: str) -> str:
    """Return the SHA-256 of what is at a path or URL, without a copy. Raises DataError."""
    source = address(uri, "input_uri")
    try:
        digest = hashlib.sha256()
        with open_address(source) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except Exception as error:
        raise unreadable(name_of(uri), error) from None
    return digest.hexdigest()
