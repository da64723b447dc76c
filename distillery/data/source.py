"""Where a recipe's rows come from: the hub, local files or the shipped sample."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from glob import escape, glob, has_magic
from importlib.resources import files
from pathlib import Path

from distillery.data.hub import check_name, hub_commit, hub_tables, load_from_hub
from distillery.data.readers import Table, read_files
from distillery.errors import DataError, NoSuchRevision
from distillery.recipe import DatasetRecipe, OtherRecipe
from distillery.records import digest_of
from distillery.storage.allowed import local_path
from distillery.storage.digests import sha256_of

_log = logging.getLogger(__name__)

TABLES = (".jsonl", ".csv", ".parquet")
"""The endings of files that a folder of rows is read for."""

SAMPLE_SPLITS = ("gold", "pool", "validation", "test")


def open_source(
    recipe: DatasetRecipe, commit: str | None = None
) -> dict[str, Callable[[], Iterator[Table]]]:
    """Return a function for each split of the source that reads its tables.

    Raises DataError, as the functions do. A hub data set is downloaded at once, at `commit` if the
    caller knows it.
    """
    readers: dict[str, Callable[[], Iterator[Table]]] = {}
    if recipe.source == "hub":
        for split, rows in load_from_hub(recipe.name, recipe.revision, commit).items():
            readers[split] = partial(hub_tables, recipe.name, split, rows)
    else:
        for split, paths in source_files(recipe).items():
            readers[split] = partial(read_files, f"dataset.files.{split}", paths)
    return readers


def source_identity(recipe: DatasetRecipe, other: OtherRecipe | None = None) -> str:
    """Return what stands for the source's content in a cache key.

    For files and the sample it is a digest of the contents, and for the hub NAME@COMMIT; with
    corrections, DIGEST+ before it, and with the texts of task.other, other:DIGEST+ before both. If
    the hub does not answer, the recipe's revision stands for the commit. Raises DataError if there
    is no revision either, or if a file is missing.
    """
    if recipe.source == "hub":
        identity = f"{recipe.name}@{commit_or_revision(recipe.name, recipe.revision)}"
    else:
        by_split = source_files(recipe)
        digests = []
        for split in sorted(by_split):
            digests += digests_of(by_split[split], "dataset.files")
        counts = {}
        if recipe.source == "files":
            counts = {split: len(paths) for split, paths in by_split.items()}
        identity = digest_of([counts, *digests])
    if recipe.corrections:
        corrections = digest_of(digests_of(recipe.corrections, "dataset.corrections"))
        identity = f"{corrections}+{identity}"
    if other:
        texts = digest_of(digests_of(other.files, "task.other.files"))
        identity = f"other:{texts}+{identity}"
    return identity


def commit_in(identity: str) -> str | None:
    """Return the commit of the hub's data set in a source's identity; None if there is none."""
    found = re.search("@([0-9a-f]{40})$", identity)
    return found[1] if found else None


def digests_of(paths: Sequence[str], setting: str) -> list[str]:
    """Return the SHA-256 of each file. Raises DataError, which names the setting, if one is
    missing."""
    digests = []
    for path in paths:
        file = local_path(path, setting)
        if not file.is_file():
            raise DataError(f"{file}: no such file; correct {setting}")
        digests.append(sha256_of(file))
    return digests


def commit_or_revision(name: str, revision: str | None) -> str:
    """Return the commit that a revision names, or the revision if the hub does not answer."""
    check_name(name)
    try:
        return hub_commit(name, revision)
    except NoSuchRevision:
        raise
    except DataError as error:
        if not revision:
            raise
        _log.warning("%s; using the copy of revision %s on this machine", error, revision)
        return revision


def source_files(recipe: DatasetRecipe) -> Mapping[str, tuple[str, ...]]:
    """Return the paths by split, with the files that folders and patterns name today; of the
    shipped sample, those in this package. Raises DataError if there are none."""
    if recipe.source == "files":
        by_split = {}
        for split, paths in recipe.files.items():
            found: list[str] = []
            for path in paths:
                found += matching_files(path, f"dataset.files.{split}")
            # A file that two patterns name is read once.
            by_split[split] = tuple(dict.fromkeys(found))
        return by_split
    sample = files("distillery.data") / "sample"
    return {split: (str(sample / f"{split}.jsonl"),) for split in SAMPLE_SPLITS}


def matching_files(path: str, setting: str) -> list[str]:
    """Return the files that a path names, by name: for a folder, its .jsonl, .csv and .parquet
    files; for a pattern with *, ? or [, what matches it, where ** stands for any folders; for any
    other path, itself. Hidden files count only where a pattern names them.

    Raises DataError, which names the setting, for a folder or pattern without a file.
    """
    expanded = local_path(path, setting)
    if expanded.is_dir():
        names = [
            name
            for name in glob(f"{escape(str(expanded))}/*")
            if Path(name).suffix.lower() in TABLES
        ]
        described = f"{path}: a folder without {', '.join(TABLES)} files"
    elif has_magic(path) and not expanded.is_file():
        names = glob(str(expanded), recursive=True)
        described = f"{path}: no file matches"
    else:
        return [path]
    # What a pattern matches may be a link that leads elsewhere.
    found = sorted(name for name in names if local_path(name, setting).is_file())
    if not found:
        raise DataError(f"{described}; correct {setting}")
    return found
