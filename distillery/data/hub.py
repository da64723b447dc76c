"""Load data sets from the Hugging Face hub by `datasets`, which keeps them on this machine."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import yaml

from distillery.data.readers import Table, cause_of
from distillery.errors import DataError, DataUnavailable, NoSuchRevision
from distillery.records import digest_of
from distillery.settings import LocalSettings
from distillery.storage.allowed import is_allowed_data_set
from distillery.storage.outages import is_hub_outage

FORMATS = ("parquet", "csv", "json", "text", "arrow", "xml", "cache")
"""How `datasets` may read a data set's files: the formats of tables, which lead to no other file.
cache: the copy on this machine, where the hub does not answer."""

CARDS = ("README.md", ".huggingface.yaml")
"""The files of a data set that tell `datasets` what to read."""

BATCH_ROWS = 1_000
"""Rows of a data set that are taken out of its Arrow files at a time."""

_log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def check_name(name: str) -> None:
    """Raise DataError for a data set's name that `datasets` would take for a local folder or for
    one of its own readers of local files, and for one that this worker may not load."""
    if not _HUB_ID.fullmatch(name) or ".." in name:
        raise DataError(f"dataset.name: {name!r}: no name on the hub, such as tau/commonsense_qa")
    if os.path.lexists(name) or ("/" not in name and is_reader(name)):
        raise DataError(
            f"dataset.name: {name} is a folder or a format on this machine; name a data set of the "
            "hub, or set dataset.source: files"
        )
    if not is_allowed_data_set(name):
        raise DataError(
            f"dataset.name: {name}: this worker may not load it; add hf://datasets/{name} to its "
            "DISTILLERY_DATA_PROTOCOLS"
        )


def is_reader(name: str) -> bool:
    """Return whether `datasets` has a reader of local files of this name."""
    import datasets.packaged_modules

    return name in datasets.packaged_modules._PACKAGED_DATASETS_MODULES


def check_card(name: str, commit: str) -> None:
    """Raise DataError where the data set's own card names files outside the data set: `datasets`
    would look for them on this machine, or ask other servers for them.

    A card that can't be read is left to `datasets`, and its files to `check_builder`."""
    from huggingface_hub import hf_hub_download

    for file in CARDS:
        try:
            path = hf_hub_download(name, file, repo_type="dataset", revision=commit)
            text = Path(path).read_text(encoding="utf-8", errors="replace")
            # In a README, the card is what stands between two lines of dashes.
            found = re.match(r"\s*---\r?\n(.*?)\r?\n---\s", f"{text}\n", re.DOTALL)
            card = yaml.safe_load(found[1] if found else text)
            configs = [config for config in card["configs"] if isinstance(config, dict)]
        except Exception:
            _log.debug("%s: no readable %s", name, file, exc_info=True)
            continue
        for config in configs:
            for named in texts_in([config.get("data_files"), config.get("data_dir")]):
                refuse_foreign_file(name, named)


def texts_in(value: Any) -> Iterator[str]:
    """Yield each text in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


def refuse_foreign_file(name: str, path: str) -> None:
    """Raise DataError unless `path` is relative to the data set's folder and stays within it."""
    outside = path.startswith(("/", "\\", "~")) or re.match("[A-Za-z]:", path)
    if outside or "://" in path or "::" in path or ".." in re.split(r"[/\\]", path):
        raise DataError(
            f"dataset.name: {name}: its card names files outside the data set; choose another one"
        )


def check_builder(name: str, builder: Any) -> None:
    """Raise DataError where `datasets` would read a data set by anything but FORMATS, or a file
    outside of it."""
    reader = type(builder).__module__.rpartition(".")[2]
    if reader not in FORMATS:
        raise DataError(
            f"dataset.name: {name}: its files are read as {reader}, not as one of "
            f"{', '.join(FORMATS[:-1])}; convert them to Parquet"
        )
    start = f"hf://datasets/{name}@"
    for paths in (builder.config.data_files or {}).values():
        for path in paths:
            if not str(path).startswith(start):
                refuse_foreign_file(name, str(path))
            refuse_foreign_file(name, str(path).removeprefix(start))


def hub_commit(name: str, revision: str | None) -> str:
    """Return the commit that a revision names today, or the newest one without a revision.

    Raises NoSuchRevision if the hub has no such data set or revision, DataUnavailable if it does
    not answer, and DataError if it refuses.
    """
    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=10).sha)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        wanted = name
        if revision:
            wanted += f" with revision {revision}"
        raise NoSuchRevision(
            f"dataset.name: the hub has no {wanted}, or HF_TOKEN may not read it; correct it"
        ) from error
    except Exception as error:
        kind = DataUnavailable if is_hub_outage(error) else DataError
        raise kind(
            f"dataset.name: the hub doesn't answer for {name} ({type(error).__name__}); check the "
            "name and the network, or use local files (dataset.source: files)"
        ) from error


def load_from_hub(name: str, revision: str | None, commit: str | None = None) -> dict[str, Any]:
    """Return the splits of a data set at a revision. Raises DataError, and DataUnavailable if the
    hub does not answer. The hub is asked which commit the revision is, unless `commit` tells.

    Each name and revision has a cache folder of its own: without a connection, `datasets` takes
    any commit that it finds in its cache.
    """
    import huggingface_hub.errors

    check_name(name)
    datasets, hub_errors = quiet_datasets(), cast(Any, huggingface_hub.errors)
    wanted = name
    if revision:
        wanted += f" at {revision}"
    cache = LocalSettings().folder / "datasets" / digest_of([name, revision])[:16]
    if commit is None:
        commit = revision
        with suppress(DataError):
            # What is wrong is said below, unless a copy on this machine serves.
            commit = hub_commit(name, revision)
    if commit and re.fullmatch("[0-9a-f]{40}", commit):
        check_card(name, commit)
    try:
        # As load_dataset does it, with a look at what it found before it is read. Code that comes
        # with a data set is run by no version of datasets since 4.
        builder = datasets.load_dataset_builder(name, revision=commit, cache_dir=str(cache))
        check_builder(name, builder)
        builder.download_and_prepare()
        splits: dict[str, Any] = builder.as_dataset()
    except (datasets.exceptions.DatasetNotFoundError, hub_errors.RepositoryNotFoundError) as error:
        raise DataError(
            f"dataset.name: {wanted} is not on the hub, or needs a login; "
            "correct dataset.name or dataset.revision, or set HF_TOKEN"
        ) from error
    except (
        OSError,
        ValueError,
        RuntimeError,
        hub_errors.HTTPError,
        datasets.exceptions.DatasetsError,
    ) as error:
        kind = DataUnavailable if is_hub_outage(error) else DataError
        raise kind(
            f"dataset.name: {wanted} could not be loaded from the hub ({cause_of(error)}); check "
            "the name and the connection, or set dataset.source to files and dataset.files to "
            "local copies"
        ) from error
    return splits


def hub_tables(name: str, split: str, rows: Any) -> Iterator[Table]:
    """Yield a split, a datasets.Dataset, as the only Table."""
    title = f"{name} ({split})"

    def numbered() -> Iterator[tuple[str, dict[str, Any]]]:
        for start in range(0, len(rows), BATCH_ROWS):
            batch = rows.select(range(start, min(start + BATCH_ROWS, len(rows))))
            for number, row in enumerate(batch.to_list(), start + 1):
                yield f"{title}:{number}", row

    yield Table(title, dict.fromkeys(rows.column_names), numbered())


def quiet_datasets() -> Any:
    """Return the package `datasets`, which then neither draws bars nor logs what it raises."""
    import datasets
    from datasets.utils.logging import set_verbosity
    from datasets.utils.tqdm import disable_progress_bars as disable_datasets_bars
    from huggingface_hub.utils.logging import set_verbosity as set_hub_verbosity
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    disable_datasets_bars()
    set_verbosity(logging.CRITICAL)
    set_hub_verbosity(logging.ERROR)
    return datasets
