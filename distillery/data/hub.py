"""Load data sets from the Hugging Face hub by `datasets`, which keeps them on this machine."""

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

from distillery.data.readers import Table, cause_of
from distillery.errors import DataError, DataUnavailable, NoSuchRevision
from distillery.records import digest_of
from distillery.settings import LocalSettings
from distillery.storage.outages import is_hub_outage


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
    try:
        splits: dict[str, Any] = datasets.load_dataset(
            name, revision=commit, cache_dir=str(cache), trust_remote_code=False
        )
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
    numbered = [(f"{title}:{number}", row) for number, row in enumerate(rows.to_list(), 1)]
    yield Table(title, rows.column_names, numbered)


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
