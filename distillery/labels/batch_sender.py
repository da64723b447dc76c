"""Sending a file of requests as a batch. If the run is killed, at whatever moment, the next one
goes on from there."""

import asyncio
import logging
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from distillery.errors import TeacherError, TeacherUnavailable
from distillery.labels.batch_book import Batch, BatchBook, BatchState
from distillery.labels.batch_files import RequestFile
from distillery.labels.store import LabelStore
from distillery.recipe import TeacherRecipe
from distillery.records import Usage
from distillery.storage.leases import Leases
from distillery.teacher.batch import BatchService
from distillery.teacher.endpoint import Endpoint
from distillery.teacher.ledger import Payer
from distillery.teacher.reservations import Reservations, amounts_of, fits

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """What came of a file of requests. waits_for: the batches that its requests are in. held_back:
    how many are in none, as the budget has no room for them."""

    waits_for: set[str]
    held_back: int = 0


class BatchSender:
    """Sends batches on behalf of `payer` at the prices of `recipe`, and holds their leases.

    Invariants:
    - Before a file is uploaded, its requests are in the book, under a batch of our own whose id
      stands in the file's name and in the metadata of the service's batch. A run that is killed
      leaves a row in the book, from which the next one looks for what the service has.
    - Who sends a batch, or takes its answers in, holds its lease.
    """

    def __init__(
        self,
        recipe: TeacherRecipe,
        window: str,
        endpoint: Endpoint,
        store: LabelStore,
        book: BatchBook,
        service: BatchService,
        payer: Payer,
        reservations: Reservations,
        leases: Leases,
        lease_s: float,
    ) -> None:
        self._recipe, self._window, self._endpoint = recipe.in_batch, window, endpoint
        self._store, self._book, self._service = store, book, service
        self._payer, self._reservations = payer, reservations
        self._leases, self._lease_s = leases, lease_s
        self._holder = uuid.uuid4().hex

    async def hold(self, batch: Batch) -> bool:
        """Take a batch's lease, if no living process has it."""
        if await self.is_held(batch):
            return False
        return await asyncio.to_thread(
            self._leases.acquire, batch.lease, self._holder, self._payer.recipe, self._lease_s
        )

    def release(self, batch: Batch) -> None:
        """Give a batch's lease back."""
        self._leases.release(batch.lease, self._holder)

    async def is_held(self, batch: Batch) -> bool:
        """Return whether a living process has a batch's lease."""
        return await asyncio.to_thread(self._leases.is_held, batch.lease)

    async def resume(self, batch: Batch) -> None:
        """Bring a batch on its way that a dead process has left before the service knew it."""
        if not await self.hold(batch):
            return
        try:
            seen = await asyncio.to_thread(self._book.batch, batch.batch_id)
            if seen is None or seen.state not in ("intended", "uploaded"):
                return
            file_id = seen.file_id
            if seen.digest:
                service_id = await self._service.find_batch(seen.batch_id)
                if service_id:
                    await self._note_submitted(seen, service_id)
                    return
                file_id = file_id or await self._service.find_file(seen.file_name)
            if file_id:
                await self._submit_file(replace(seen, file_id=file_id))
            else:
                # The service has nothing of it: its requests are sent anew.
                await asyncio.to_thread(self._book.give_up, seen.batch_id)
        finally:
            self.release(batch)

    async def submit(self, file: RequestFile) -> Sent:
        """Take a file's requests into the book, upload it and have a batch made of it."""
        file.close()
        batch = Batch(
            teacher=self._endpoint.identity,
            url=self._endpoint.url,
            run=self._payer.run,
            recipe=self._payer.recipe,
            prices=self._recipe.prices.model_dump() if self._recipe.prices else None,
        )
        await self.hold(batch)
        try:
            taken = await asyncio.to_thread(self._book.intend, batch, list(file.keys))
            # Another run may have taken in the answers since they were looked up.
            known = await asyncio.to_thread(self._store.answered, taken)
            if known:
                await asyncio.to_thread(self._book.leave, batch.batch_id, known)
            others = await asyncio.to_thread(self._book.lines, file.keys.keys() - taken)
            waits_for = {line.batch_id for line in others.values()} - {""}
            if not taken - known:
                await asyncio.to_thread(self._book.give_up, batch.batch_id)
                return Sent(waits_for)
            kept = await self._reserve(batch, file, taken - known)
            held_back = len(taken - known - kept)
            if not kept:
                await asyncio.to_thread(self._book.give_up, batch.batch_id)
                return Sent(waits_for, held_back)
            if len(kept) < len(file.keys):
                await asyncio.to_thread(file.keep, kept)
            most = amounts_of(file.most, len(file.keys), self._recipe)
            written: dict[str, Any] = {
                "digest": await asyncio.to_thread(file.digest),
                "lines": len(file.keys),
                "tokens": round(most["tokens"]),
                "cost": most["cost"] if self._recipe.prices else None,
            }
            batch = replace(batch, **written)
            await self._change(batch, **written)
            try:
                file_id = await self._service.upload(file.path, batch.file_name)
            except TeacherUnavailable:
                # It may be there: the next run looks for it.
                raise
            except TeacherError:
                await asyncio.to_thread(self._book.give_up, batch.batch_id)
                raise
            await self._submit_file(replace(batch, file_id=file_id))
            return Sent(waits_for | {batch.batch_id}, held_back)
        finally:
            self.release(batch)

    async def _reserve(self, batch: Batch, file: RequestFile, keys: set[str]) -> set[str]:
        """Reserve the most that those of `keys` can take for which the budget has room. Return
        them; the others leave the batch."""
        kept = [key for key in file.keys if key in keys]
        while kept:
            most = amounts_of(file.most_of(kept), len(kept), self._recipe)
            if await asyncio.to_thread(self._reservations.reserve, batch.batch_id, most):
                break
            # Another process has spent what was left since.
            room = await asyncio.to_thread(self._reservations.room)
            fitting: list[str] = []
            total = Usage()
            for key in kept:
                total = total + file.keys[key]
                if not fits(amounts_of(total, len(fitting) + 1, self._recipe), room):
                    break
                fitting.append(key)
            kept = fitting if len(fitting) < len(kept) else kept[: len(kept) // 2]
        left = keys.difference(kept)
        if left:
            await asyncio.to_thread(self._book.leave, batch.batch_id, left)
        return set(kept)

    async def _submit_file(self, batch: Batch) -> None:
        """Have a batch made of an uploaded file, unless another process, which took this one for
        dead, has gone on with it since `batch` was read."""
        if not await self._advance(batch, batch.state, state="uploaded", file_id=batch.file_id):
            return
        try:
            service_id = await self._service.create(
                batch.file_id, batch.batch_id, batch.digest, self._window
            )
        except TeacherUnavailable:
            raise
        except TeacherError:
            if not await self._may_be_there(batch):
                await asyncio.to_thread(self._book.give_up, batch.batch_id)
            raise
        await self._note_submitted(batch, service_id)

    async def _may_be_there(self, batch: Batch) -> bool:
        """Return whether the service may have made a batch in a try whose response was lost."""
        try:
            return bool(await self._service.find_batch(batch.batch_id))
        except TeacherUnavailable:
            return True
        except TeacherError:
            return False

    async def _note_submitted(self, batch: Batch, service_id: str) -> None:
        values = {"service_id": service_id, "submitted_at": datetime.now(UTC)}
        if not await self._advance(batch, "intended", "uploaded", state="submitted", **values):
            # Another process has gone on with it, or gave it up.
            known = await asyncio.to_thread(self._book.batch, batch.batch_id)
            if known is None or known.service_id != service_id:
                await self._service.cancel(service_id)
            return
        _log.info("batch %s: %s requests sent", service_id, f"{batch.lines:,}")

    async def _advance(self, batch: Batch, *states: BatchState, **values: Any) -> bool:
        return await asyncio.to_thread(
            partial(self._book.advance, batch.batch_id, states, **values)
        )

    async def _change(self, batch: Batch, **values: Any) -> None:
        await asyncio.to_thread(partial(self._book.change, batch.batch_id, **values))
