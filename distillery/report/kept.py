"""The pages that are kept in the store."""

import json
from pathlib import Path

from distillery.errors import ArtifactDamaged, StoreError
from distillery.records import Artifact
from distillery.report.page import PAGE_FILE
from distillery.storage.artifacts import ArtifactStore, run_record
from distillery.storage.housekeeping import Inventory


def page_path(store: ArtifactStore, page: Artifact) -> Path:
    """Return where a page is on this machine; from a remote store it is fetched."""
    return store.fetch(page) / PAGE_FILE


def page_of_run(store: ArtifactStore, run: str | None = None) -> Path:
    """Return where the page of a run is on this machine; by default that of the last run.

    Raises StoreError for a run that the store does not know or that has no page."""
    if run is None:
        runs = Inventory(store).runs
        if not runs:
            raise StoreError(f"{store.url}: no finished run; run `python -m flows.distill` first")
        run = runs[0].name
    try:
        outcome = json.loads(store.read_record(run_record(run)))
        page = Artifact.model_validate(outcome["page"]) if outcome.get("page") else None
    except ArtifactDamaged as error:
        raise StoreError(
            f"{store.url}: no finished run {run}; take a name from the Prefect UI"
        ) from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"{store.url}: the record of {run} can't be read ({type(error).__name__}); run it again"
        ) from error
    if page is None:
        raise StoreError(f"{run}: has no page, because an earlier version made it; run it again")
    return page_path(store, page)
