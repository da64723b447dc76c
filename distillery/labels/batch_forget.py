"""Giving batches up: their requests are asked again."""

import asyncio
import logging
import uuid

from distillery.errors import DataError, DistilleryError, TeacherError
from distillery.labels.batch_book import Batch, BatchBook, lost_call
from distillery.labels.store import LabelStore
from distillery.recipe import TeacherRecipe
from distillery.storage.leases import LENGTH_S, Leases
from distillery.teacher.batch import batch_service
from distillery.teacher.endpoint import resolve_endpoint

_log = logging.getLogger(__name__)


def give_up_batch(book: BatchBook, batch_id: str, lease_s: float = LENGTH_S) -> int:
    """Leave the requests of a batch to be asked again, and return how many. The ledger counts those
    without an entry at the most that they can have cost. Raises DataError if there is no such
    batch, or if a run is at work on it."""
    batch = book.batch(batch_id)
    left = book.keys_of(batch_id)
    if batch is None or not left:
        raise DataError(f"batch {batch_id}: holds no request; see distillery labels batches")
    leases, holder = Leases(seconds=lease_s), uuid.uuid4().hex
    name = batch.lease
    if leases.is_held(name) or not leases.acquire(name, holder, "forget", lease_s):
        raise DataError(f"batch {batch_id}: a run is at work on it; try again later")
    try:
        # Its run may have gone on until the lease was free.
        batch, left = book.batch(batch_id) or batch, book.keys_of(batch_id)
        with LabelStore() as store:
            for key in left if batch.service_id else ():
                store.record(lost_call(batch, key))
        cancel_at_service(batch)
        book.give_up(batch_id)
    finally:
        leases.release(name, holder)
    return len(left)


def cancel_at_service(batch: Batch) -> None:
    """Have the service end a batch that is under way. If the settings of this process are not those
    of its endpoint, or the service does not do it, that is told."""
    if batch.state != "submitted":
        return
    recipe = TeacherRecipe(kind="endpoint")

    async def cancel() -> None:
        endpoint = resolve_endpoint(recipe)
        if endpoint.url != batch.url:
            raise TeacherError(f"{endpoint.variables}_ENDPOINT is not {batch.url}")
        async with batch_service(recipe, endpoint) as service:
            await service.cancel(batch.service_id)

    try:
        asyncio.run(cancel())
    except DistilleryError as error:
        _log.warning("%s; cancel the batch %s at the service yourself", error, batch.service_id)
