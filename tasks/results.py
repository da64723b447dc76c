"""Prefect's storage of the stages' records: the artifact store, so that DISTILLERY_STORE sets
both."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.exceptions import ObjectNotFound
from prefect.filesystems import WritableFileSystem
from prefect.settings import PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK, temporary_settings

from distillery.errors import ArtifactDamaged
from distillery.storage.artifacts import RESULTS, ArtifactStore
from distillery.storage.result_records import ForeignRecord, plain_record, warn_of


class DistilleryStore(WritableFileSystem):
    """Files under results/ in the worker's own DISTILLERY_STORE.

    The block itself holds nothing, so that moving the store changes nothing in Prefect, and no key
    to it is in Prefect's database. All that Prefect reads of results comes from here, so that this
    is where records are passed over that could run code."""

    _block_type_name = "Distillery Store"
    _block_type_slug = "distillery-store"

    # Prefect's base class is asynchronous, yet calls these two with _sync where it runs no loop.
    def read_path(self, path: str, _sync: bool = True) -> bytes:  # type: ignore[override]
        name = f"{RESULTS}/{path}"
        try:
            return plain_record(ArtifactStore().read_object(name))
        except ArtifactDamaged as error:
            raise ValueError(f"{path}: no such record") from error
        except ForeignRecord as error:
            warn_of(name, str(error))
            raise

    def write_path(  # type: ignore[override]
        self, path: str, content: bytes, _sync: bool = True
    ) -> None:
        ArtifactStore().write_object(f"{RESULTS}/{path}", content)

    async def aread_path(self, path: str) -> bytes:
        return await asyncio.to_thread(self.read_path, path)

    async def awrite_path(self, path: str, content: bytes) -> None:
        await asyncio.to_thread(self.write_path, path, content)


BLOCK = f"{DistilleryStore._block_type_slug}/{RESULTS}"


def save_block() -> None:
    """Make the block known to the Prefect server in use, where it isn't yet."""
    try:
        DistilleryStore.load(RESULTS)
    except (ValueError, ObjectNotFound):
        DistilleryStore().save(RESULTS, overwrite=True)


@contextmanager
def results_in_store() -> Iterator[None]:
    """Have the flows that are called within keep their results there.

    Workers have the same setting from their pool's template."""
    save_block()
    with temporary_settings({PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK: BLOCK}):
        yield
