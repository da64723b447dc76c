"""data/hub"""

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

from distillery.data.readers import Table, cause_of, quiet_datasets
from distillery.errors import DataError, NoSuchRevision
from distillery.recipe import DatasetRecipe
from distillery.records import digest_of
from distillery.settings import LocalSettings


def hub_commit(recipe: DatasetRecipe) -> str:
    """The commit that dataset.revision names, which a branch does not for long; without one, the newest."""
    if recipe.revision and re.fullmatch("[0-9a-f]{40}", recipe.revision):
        return recipe.revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(HfApi().dataset_info(recipe.name, revision=recipe.revision, timeout=10).sha)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" with revision {recipe.revision}" if recipe.revision else ""
        raise NoSuchRevision(
            f"dataset.name: the hub has no {recipe.name}{at}, or HF_TOKEN may not read it; correct it"
        ) from error
    except Exception as error:
        raise DataError(
            f"dataset.name: the hub doesn't answer for {recipe.name} ({type(error).__name__}); check name and network, "
            "or use local files (dataset.source: files)"
        ) from error


def load_from_hub(recipe: DatasetRecipe) -> dict[str, Any]:
    """The splits of the hub's data set, at the commit that dataset.revision names. Cached by name and revision: without
    a connection, `datasets` takes whichever commit it finds in its cache."""
    import huggingface_hub.errors

    datasets, hub_errors = quiet_datasets(), cast(Any, huggingface_hub.errors)
    asked = recipe.name + (f" at {recipe.revision}" if recipe.revision else "")
    cache = LocalSettings().folder / "datasets" / digest_of([recipe.name, recipe.revision])[:16]
    revision = recipe.revision
    with suppress(DataError):
        # Else what is wrong is said below.
        revision = hub_commit(recipe)
    try:
        loaded: dict[str, Any] = datasets.load_dataset(
            recipe.name, revision=revision, cache_dir=str(cache)
        )
    except (datasets.exceptions.DatasetNotFoundError, hub_errors.RepositoryNotFoundError) as error:
        raise DataError(
            f"dataset.name: {asked} is not on the hub, or needs a login; "
            f"correct dataset.name or dataset.revision, or set HF_TOKEN"
        ) from error
    except (
        OSError,
        ValueError,
        RuntimeError,
        hub_errors.HTTPError,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise DataError(
            f"dataset.name: {asked} could not be had from the hub ({cause_of(error)}); "
            f"check the name and the connection, or set dataset.source to files and dataset.files to local copies"
        ) from error
    return loaded


def hub_table(name: str, split: str, rows: Any) -> Iterator[Table]:
    title = f"{name} ({split})"
    yield Table(
        title, rows.column_names, [(f"{title}:{n}", row) for n, row in enumerate(rows.to_list(), 1)]
    )
