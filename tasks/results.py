"""Prefect keeps the stages' records in the artifact store, so that one setting, DISTILLERY_STORE, places both."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.exceptions import ObjectNotFound
from prefect.filesystems import WritableFileSystem
from prefect.settings import PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK, temporary_settings

from distillery.errors import ArtifactDamaged
from distillery.storage.artifacts import RESULTS, ArtifactStore


class DistilleryStore(WritableFileSystem):
    """Files under results/ in the worker's own DISTILLERY_STORE: the block itself holds nothing, so that a moved store
    changes nothing in Prefect and no key of it is in Prefect's database."""

    _block_type_name = "Distillery Store"
    _block_type_slug = "distillery-store"

    def read_path(self, path: str, _sync: bool = True) -> bytes:
        try:
            return ArtifactStore().read_object(f"{RESULTS}/{path}")
        except ArtifactDamaged as error:
            raise ValueError(f"{path}: no such record") from error

    def write_path(self, path: str, content: bytes, _sync: bool = True) -> None:
        ArtifactStore().write_object(f"{RESULTS}/{path}", content)

    async def aread_path(self, path: str) -> bytes:
        return await asyncio.to_thread(self.read_path, path)

    async def awrite_path(self, path: str, content: bytes) -> None:
        await asyncio.to_thread(self.write_path, path, content)


BLOCK = f"{DistilleryStore._block_type_slug}/{RESULTS}"


def save_block() -> None:
    """Makes the block known to the Prefect server in use, where it isn't yet."""
    try:
        DistilleryStore.load(RESULTS)
    except (ValueError, ObjectNotFound):
        DistilleryStore().save(RESULTS, overwrite=True)


@contextmanager
def results_in_store() -> Iterator[None]:
    """Has the flows that are called within keep their results there; workers have it from their pool's template."""
    save_block()
    with temporary_settings({PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK: BLOCK}):
        yield
