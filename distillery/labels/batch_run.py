"""Asking in batches: what the label store does not know is sent in files, and the answers are taken
in as they come, by this run or a later one. teacher/batch.py is the service, batch_book.py the book
of what is under way.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distillery.errors import (
    BudgetReached,
    DataError,
    DistilleryError,
    TeacherError,
    TeacherUnavailable,
    Waiting,
)
from distillery.labels.acceptance import call_read_as, stored_answer
from distillery.labels.batch_book import Batch, BatchBook, BatchState, Line
from distillery.labels.batch_files import MEGABYTE, Answers, RequestFile, most_of
from distillery.labels.journal import keep_unreadable
from distillery.labels.questions import Question, questions
from distillery.labels.quote import duration, estimated_tokens
from distillery.labels.store import LabelStore
from distillery.recipe import BatchRecipe, PriceRecipe, PromptRecipe, TeacherRecipe
from distillery.records import Example, Usage
from distillery.storage.leases import LENGTH_S, Leases
from distillery.teacher.asking import Teacher
from distillery.teacher.batch import (
    NO_CREDIT,
    BatchService,
    ServiceBatch,
    batch_service,
    check_takes_batches,
    path_of_requests,
    request_line,
)
from distillery.teacher.budget import POLL_S, Spending, cost_of
from distillery.teacher.endpoint import Endpoint, resolve_endpoint
from distillery.teacher.ledger import Amounts, Call, Outcome, Payer, Purpose
from distillery.teacher.pace import pace_of
from distillery.teacher.reply import Completion, read_completion, usage_of
from distillery.teacher.reservations import Reservations, amounts_of, fits

LOOKUP_ROWS = 1000
"""Rows that are in memory at a time."""

Progress = Callable[[int, int], None]
"""Takes the requests that the service has done and those that it has."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """Rows that are asked with equal settings; `rows` returns them anew at each call."""

    rows: Callable[[], Iterable[Example]]
    recipe: TeacherRecipe
    purpose: Purpose


async def ask_in_batches(
    shares: Sequence[Share],
    prompt: PromptRecipe,
    endpoint: Endpoint,
    store: LabelStore,
    *,
    payer: Payer | None = None,
    progress: Progress | None = None,
    lease_s: float = LENGTH_S,
) -> None:
    """Ask the questions of `shares`, which have the same teacher, in batches, as far as
    teacher.batch says; afterwards what is left is to be asked directly.

    Without teacher.batch nothing is sent. Questions that are in another run's batch are waited for
    all the same, and their answers taken in. Raises what `BatchRun.work` raises, and RecipeError
    for an endpoint that takes no batches."""
    recipe = shares[0].recipe
    check_takes_batches(recipe, endpoint)
    url = store.database.url.render_as_string(hide_password=False)
    with BatchBook(url) as book:
        if recipe.batch is None and not book.open_batches(endpoint.identity):
            return
        async with batch_service(recipe, endpoint) as service:
            run = BatchRun(
                shares,
                prompt,
                recipe.batch or BatchRecipe(),
                endpoint,
                store,
                book,
                service,
                payer=payer or Payer(),
                sends=recipe.batch is not None,
                progress=progress,
                leases=Leases(url, lease_s),
                lease_s=lease_s,
            )
            await run.work()


class BatchRun:
    """One run's part in the batches of its teacher: it sends, waits, and takes in.

    Invariants:
    - Before a file is uploaded, its requests are in the book, under a batch of our own whose id
      stands in the file's name and in the metadata of the service's batch. A run that is killed
      leaves a row in the book, from which the next one looks for what the service has.
    - Who sends a batch, or takes its answers in, holds its lease.
    - An answer is committed to the label store, and its call to the ledger, before the request
      leaves the book. The call's id comes from the batch and the request, so that an answer that is
      taken in twice counts once.
    - A request that is in a batch is not asked otherwise.
    """

    def __init__(
        self,
        shares: Sequence[Share],
        prompt: PromptRecipe,
        batch: BatchRecipe,
        endpoint: Endpoint,
        store: LabelStore,
        book: BatchBook,
        service: BatchService,
        *,
        payer: Payer,
        sends: bool,
        progress: Progress | None,
        leases: Leases,
        lease_s: float,
    ) -> None:
        self._shares, self._prompt, self._batch = shares, prompt, batch
        self._endpoint, self._store, self._book, self._service = endpoint, store, book, service
        self._payer, self._sends, self._progress = payer, sends, progress
        self._leases, self._lease_s = leases, lease_s
        self._holder = uuid.uuid4().hex
        self._reservations = Reservations(
            store.database, store.flush, shares[0].recipe, payer, store.recover
        )
        self._room: Amounts = {}
        self._teachers: dict[int, Teacher] = {}
        self._most_lines = batch.lines
        self._is_full = False
        self._waits_for: set[str] = set()
        self._may_take: set[str] = set()
        self._held_back = self._exhausted = 0
        self._looked_at: set[str] = set()

    async def work(self) -> None:
        """Send and take in until nothing is under way that this run's rows wait for. What is left
        then is to be asked directly. While the endpoint does not answer, it is tried again.

        Raises Waiting after batch.wait_s, BudgetReached where the budget has no room for a request,
        TeacherError where batches were cancelled or more than batch.direct_below requests have
        failed in them, and what the service raises."""
        until = time.monotonic() + self._batch.wait_s
        await asyncio.to_thread(self._adopt)
        with TemporaryDirectory(prefix="distillery-batches-") as folder:
            while True:
                try:
                    if not await self._work_once(Path(folder), until):
                        break
                except TeacherUnavailable as error:
                    left = until - time.monotonic()
                    if left <= 0:
                        raise Waiting(
                            f"{error}; its batches go on, and all answers so far are kept: run "
                            f"again in {duration(self._batch.again_s)}",
                            self._batch.again_s,
                        ) from error
                    _log.warning("%s; trying again", error)
                    await asyncio.sleep(min(self._batch.poll_s, left))
        if self._exhausted > self._batch.direct_below:
            raise TeacherError(
                f"{self._endpoint.section}.batch: {self._exhausted:,} requests have failed in "
                f"{self._batch.tries} batches each; raise `tries` to send them again, or "
                "`direct_below` to ask them directly, at the full price"
            )
        if self._held_back:
            raise BudgetReached(
                f"{self._endpoint.section}.budget: has no room for the next request of "
                f"{self._held_back:,}; all answers are kept: run again to continue, or raise it"
            )

    async def _work_once(self, folder: Path, until: float) -> bool:
        """Send what is to be sent, wait for the first batches that end and take their answers in.
        Return whether there may be more to do."""
        await self._resume()
        await self._send(folder)
        ended = await self._ended(until)
        await self._take_in(ended, folder)
        if ended or self._waits_for:
            return True
        if self._held_back and not self._reservations.is_final and time.monotonic() < until:
            # A process that asks directly may leave something, or be dead.
            await asyncio.sleep(min(self._batch.poll_s, POLL_S))
            return True
        return False

    def _adopt(self) -> None:
        """Pay for the batches under way that earlier runs of this run's recipe sent: what a run
        reports, and its budget counts, is what it takes in."""
        mine = self._payer
        for batch in self._book.open_batches(self._endpoint.identity):
            is_earlier = batch.recipe == mine.recipe != "" and batch.run != mine.run
            if is_earlier and not batch.booked_at:
                self._book.adopt(batch.batch_id, mine.run)

    def _chunks(self) -> Iterator[list[tuple[int, Question]]]:
        """Yield the run's questions, those of some rows at a time, with their shares' numbers."""
        for number, share in enumerate(self._shares):
            remaining = iter(share.rows())
            while rows := list(islice(remaining, LOOKUP_ROWS)):
                yield [
                    (number, question)
                    for row in rows
                    for question in questions(
                        row, self._prompt, share.recipe, self._endpoint.identity
                    )
                ]

    def _look_up(self, chunk: list[tuple[int, Question]]) -> tuple[set[str], dict[str, Line]]:
        keys = [question.key for _, question in chunk]
        return self._store.answered(keys), self._book.lines(keys)

    # What a run that died has left.

    async def _resume(self) -> None:
        """Bring every batch on its way that a dead process has left before the service knew it."""
        for batch in self._book.open_batches(self._endpoint.identity):
            if batch.state in ("intended", "uploaded") and batch.url == self._endpoint.url:
                await self._resume_batch(batch)

    async def _resume_batch(self, batch: Batch) -> None:
        if not await self._hold(batch):
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
            self._release(batch)

    async def _hold(self, batch: Batch) -> bool:
        """Take a batch's lease, if no living process has it."""
        name = lease_of(batch)
        if await asyncio.to_thread(self._leases.is_held, name):
            return False
        return await asyncio.to_thread(
            self._leases.acquire, name, self._holder, self._payer.recipe, self._lease_s
        )

    def _release(self, batch: Batch) -> None:
        self._leases.release(lease_of(batch), self._holder)

    # Sending.

    async def _send(self, folder: Path) -> None:
        """Send what is neither known nor under way, and note the batches to wait for. So few
        requests as batch.direct_below are left."""
        self._waits_for, self._may_take, self._held_back = set(), set(), 0
        if self._is_full and await self._is_blocked():
            return
        few: list[tuple[int, Question]] = []
        file: RequestFile | None = None
        async for asked in self._missing():
            few.append(asked)
            if file is None and len(few) <= self._batch.direct_below:
                continue
            for number, question in few:
                file = await self._add(number, question, file, folder)
            few = []
        if file is not None:
            await self._submit(file)
        self._may_take -= self._waits_for

    async def _missing(self) -> AsyncIterator[tuple[int, Question]]:
        """Yield what is to be sent, and note the batches in which other questions are, and how
        many have failed in as many batches as they may."""
        self._exhausted = 0
        for chunk in self._chunks():
            known, lines = await asyncio.to_thread(self._look_up, chunk)
            for number, question in chunk:
                line = lines.get(question.key, Line("", 0))
                if question.key in known:
                    self._may_take |= {line.batch_id} - {""}
                elif line.batch_id:
                    self._waits_for.add(line.batch_id)
                elif line.tries >= self._batch.tries:
                    self._exhausted += self._sends
                elif self._sends:
                    yield number, question

    async def _is_blocked(self) -> bool:
        """Return whether other batches fill the endpoint's queue. If none of ours do, smaller ones
        are tried. Raises Waiting where not even those of batch.direct_below requests fit."""
        async for _ in self._missing():
            pass
        if self._waits_for:
            return True
        if self._most_lines <= max(self._batch.direct_below, 1):
            raise Waiting(
                f"{self._endpoint.url}: its queue of batches has no room for "
                f"{self._most_lines:,} requests; run again later: all answers so far are kept",
                self._batch.again_s,
            )
        self._is_full = False
        return False

    async def _add(
        self,
        number: int,
        question: Question,
        file: RequestFile | None,
        folder: Path,
    ) -> RequestFile | None:
        """Write a request to the file; send it first if it is full. Return the file."""
        if self._held_back:
            self._held_back += 1
            return None
        share = self._shares[number]
        most = most_of(question, share.recipe)
        if file is None:
            self._room = await asyncio.to_thread(self._reservations.room)
            # The first question of all is asked directly, at the full price.
            priced = share.recipe.in_batch if number in self._teachers else share.recipe
            if not fits(amounts_of(most, 1, priced), self._room):
                self._held_back = 1
                return None
        if number not in self._teachers:
            # The answer shows which options the endpoint takes, before thousands ask with them.
            try:
                await self._ask_first(number, question)
            except BudgetReached:
                if file is not None:
                    await self._submit(file)
                self._held_back += 1
                return None
            self._room = await asyncio.to_thread(self._reservations.room)
            return file
        if file is not None and question.key in file.keys:
            return file
        body = {
            "model": self._batch.model or self._endpoint.model,
            "messages": question.messages,
            **self._teachers[number].body(question.keys, question.schema),
        }
        line = request_line(question.key, path_of_requests(self._endpoint), body)
        if file is not None and not self._fits(file, line, most):
            await self._submit(file)
            return await self._add(number, question, None, folder)
        file = file or RequestFile(folder / "requests.jsonl")
        file.add(question.key, line, most)
        return file

    def _fits(self, file: RequestFile, line: bytes, most: Usage) -> bool:
        """Return whether a request has room in the file and in the budget."""
        if len(file.keys) >= self._most_lines:
            return False
        if file.keys and file.size + len(line) > self._batch.megabytes * MEGABYTE:
            return False
        priced = self._shares[0].recipe.in_batch
        return fits(amounts_of(file.most + most, len(file.keys) + 1, priced), self._room)

    async def _ask_first(self, number: int, question: Question) -> None:
        """Ask a share's first question directly."""
        share, store = self._shares[number], self._store
        async with (
            Spending.shared(
                share.recipe, self._payer, store.database, store.flush, store.recover
            ) as spending,
            Teacher(
                share.recipe,
                self._endpoint,
                spending=spending,
                book=store,
                pace=pace_of(share.recipe, self._endpoint, store.database),
                payer=self._payer,
                purpose=share.purpose,
            ) as teacher,
        ):
            completion = await teacher.ask(
                question.messages, question.keys, question.schema, key=question.key
            )
            if completion.finish_reason != "malformed":
                answer = stored_answer(question, completion, share.recipe, self._endpoint.identity)
                store.add(answer, call_read_as(answer, completion))
        self._teachers[number] = teacher

    async def _submit(self, file: RequestFile) -> None:
        """Take the file's requests into the book, upload it and have a batch made of it."""
        file.close()
        recipe = self._shares[0].recipe.in_batch
        batch = Batch(
            teacher=self._endpoint.identity,
            url=self._endpoint.url,
            run=self._payer.run,
            recipe=self._payer.recipe,
            prices=recipe.prices.model_dump() if recipe.prices else None,
        )
        await self._hold(batch)
        try:
            taken = await asyncio.to_thread(self._book.intend, batch, list(file.keys))
            # Another run may have taken in the answers since they were looked up.
            known = await asyncio.to_thread(self._store.answered, taken)
            if known:
                await asyncio.to_thread(self._book.leave, batch.batch_id, known)
            others = await asyncio.to_thread(self._book.lines, file.keys.keys() - taken)
            self._waits_for |= {line.batch_id for line in others.values()} - {""}
            if not taken - known:
                await asyncio.to_thread(self._book.give_up, batch.batch_id)
                return
            kept = await self._reserve(batch, file, taken - known)
            if not kept:
                await asyncio.to_thread(self._book.give_up, batch.batch_id)
                return
            if len(kept) < len(file.keys):
                await asyncio.to_thread(file.keep, kept)
            most = amounts_of(file.most, len(file.keys), recipe)
            written: dict[str, Any] = {
                "digest": await asyncio.to_thread(file.digest),
                "lines": len(file.keys),
                "tokens": round(most["tokens"]),
                "cost": most["cost"] if recipe.prices else None,
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
            self._waits_for.add(batch.batch_id)
            await self._submit_file(replace(batch, file_id=file_id))
        finally:
            self._release(batch)

    async def _reserve(self, batch: Batch, file: RequestFile, keys: set[str]) -> set[str]:
        """Reserve the most that those of `keys` can take for which the budget has room. Return
        them; the others leave the batch."""
        recipe = self._shares[0].recipe.in_batch
        kept = [key for key in file.keys if key in keys]
        while kept:
            most = amounts_of(file.most_of(kept), len(kept), recipe)
            if await asyncio.to_thread(self._reservations.reserve, batch.batch_id, most):
                break
            # Another process has spent what was left since.
            room = await asyncio.to_thread(self._reservations.room)
            fitting: list[str] = []
            total = Usage()
            for key in kept:
                total = total + file.keys[key]
                if not fits(amounts_of(total, len(fitting) + 1, recipe), room):
                    break
                fitting.append(key)
            kept = fitting if len(fitting) < len(kept) else kept[: len(kept) // 2]
        left = keys.difference(kept)
        if left:
            await asyncio.to_thread(self._book.leave, batch.batch_id, left)
            self._held_back = len(left)
        return set(kept)

    async def _submit_file(self, batch: Batch) -> None:
        """Have a batch made of an uploaded file, unless another process, which took this one for
        dead, has gone on with it since `batch` was read."""
        if not await self._advance(batch, batch.state, state="uploaded", file_id=batch.file_id):
            return
        try:
            service_id = await self._service.create(
                batch.file_id, batch.batch_id, batch.digest, self._batch.window
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

    # Taking in.

    async def _ended(self, until: float) -> list[tuple[Batch, ServiceBatch]]:
        """Wait until one of the batches that this run waits for has ended, or is another run's
        work; return those that have ended. Raises Waiting when the time `until` has come."""
        while True:
            await self._resume()
            ended, waited, done, lines = [], set(), 0, 0
            for batch in await asyncio.to_thread(self._book.open_batches, self._endpoint.identity):
                if batch.batch_id not in self._waits_for | self._may_take:
                    # Another run's, or one whose questions nobody asks any more.
                    if batch.booked_at or batch.batch_id in self._looked_at:
                        continue
                    self._looked_at.add(batch.batch_id)
                waited |= {batch.batch_id} & self._waits_for
                seen = await self._look_at(batch)
                if seen is None:
                    continue
                done, lines = done + seen.done, lines + batch.lines
                if not seen.is_under_way:
                    ended.append((batch, seen))
            if self._progress and lines:
                self._progress(done, lines)
            if ended or waited != self._waits_for or not waited:
                return ended
            left = until - time.monotonic()
            if left <= 0:
                raise self._waiting(lines, done)
            await asyncio.sleep(min(self._batch.poll_s, left))

    async def _look_at(self, batch: Batch) -> ServiceBatch | None:
        """Return how the service says a batch is; None where it is not submitted yet."""
        forget = f"or give it up: distillery labels batches --forget {batch.batch_id}"
        is_sent = batch.state in ("submitted", "ended")
        if batch.url != self._endpoint.url:
            if batch.batch_id not in self._waits_for:
                return None
            # A living process may be sending it.
            if not is_sent and await asyncio.to_thread(self._leases.is_held, lease_of(batch)):
                return None
            raise TeacherError(
                f"batch {batch.service_id or batch.batch_id} was sent to {batch.url}; set "
                f"{self._endpoint.variables}_ENDPOINT to it until its answers are here, {forget}"
            )
        if not is_sent:
            return None
        seen = await self._service.look_at(batch.service_id)
        if seen is None:
            if batch.batch_id not in self._waits_for:
                return None
            raise TeacherError(
                f"{self._endpoint.url} does not know the batch {batch.service_id}; use the key of "
                f"the project that sent it, {forget}"
            )
        if seen.status != batch.status:
            await self._change(batch, status=seen.status)
        if not seen.is_under_way and batch.state == "submitted":
            await self._change(batch, state="ended", ended_at=datetime.now(UTC))
        return seen

    def _waiting(self, lines: int, done: int) -> Waiting:
        count = len(self._waits_for)
        batches = "1 batch is" if count == 1 else f"{count} batches are"
        return Waiting(
            f"{batches} under way, {done:,} of {lines:,} requests done; run again "
            f"in {duration(self._batch.again_s)} (distillery labels batches lists them)",
            self._batch.again_s,
        )

    async def _take_in(self, ended: Sequence[tuple[Batch, ServiceBatch]], folder: Path) -> None:
        """Take the answers of ended batches in. Raises TeacherError for a batch that the service
        did not accept, and for one that somebody has cancelled."""
        cancelled: list[str] = []
        failures: list[str] = []
        refused: list[int] = []
        with ExitStack() as held:
            collected = []
            for batch, seen in ended:
                if not await self._hold(batch):
                    # Another run is taking its answers in.
                    await asyncio.sleep(min(self._batch.poll_s, 1.0))
                    continue
                held.callback(self._release, batch)
                if seen.status == "failed":
                    await self._note_failure(batch, seen)
                    if seen.lacks_quota:
                        refused.append(batch.lines)
                    elif batch.batch_id in self._waits_for:
                        failures.append(self._failure(seen))
                    continue
                self._is_full = False
                answers = await self._download(batch, seen, folder)
                if answers is None:
                    continue
                if seen.status == "cancelled" and batch.batch_id in self._waits_for:
                    cancelled.append(seen.service_id)
                held.callback(answers.close)
                collected.append(answers)
            if collected:
                await self._read(collected)
            for answers in collected:
                await self._settle(answers)
        if failures:
            raise TeacherError(failures[0])
        if cancelled:
            raise TeacherError(
                f"batch {cancelled[0]} was cancelled at {self._endpoint.url}; its answers so far "
                "are kept: run again to send the other requests anew"
            )
        if refused:
            self._is_full = True
            self._most_lines = min(self._most_lines, max(max(refused) // 2, 1))

    def _failure(self, seen: ServiceBatch) -> str:
        """Say why the service did not accept a batch."""
        if seen.code == NO_CREDIT:
            return (
                f"{self._endpoint.url}: the account of {self._endpoint.variables}_KEY has no "
                f"credit for {seen.service_id} ({seen.error}); nothing was asked"
            )
        return (
            f"{self._endpoint.section}.batch: {self._endpoint.url} did not accept "
            f"{seen.service_id} ({seen.code}: {seen.error}); nothing was asked: correct the setting"
        )

    async def _note_failure(self, batch: Batch, seen: ServiceBatch) -> None:
        """Leave the requests of a batch that the service did not accept to be asked again."""
        keys = await asyncio.to_thread(self._book.keys_of, batch.batch_id)
        await asyncio.to_thread(self._book.settle, batch.batch_id, [], [], list(keys))
        _log.warning("batch %s failed: %s", seen.service_id, seen.error)

    async def _download(self, batch: Batch, seen: ServiceBatch, folder: Path) -> Answers | None:
        """Download an ended batch's files; it may have none of either kind. Raises TeacherError if
        they are gone: the answers in them are paid for. None if this run waits for none of them."""
        files = []
        for kind, file_id in (("output", seen.output_file), ("errors", seen.error_file)):
            path = folder / f"{batch.batch_id}.{kind}"
            if not file_id:
                continue
            if not await self._service.download(file_id, path):
                if batch.batch_id not in self._waits_for:
                    _log.warning("batch %s: its answers are gone", seen.service_id)
                    return None
                raise TeacherError(
                    f"{self._endpoint.url} has no file {file_id} of the batch {seen.service_id} "
                    f"any more; give it up: distillery labels batches --forget {batch.batch_id}"
                )
            files.append(path)
        requests = await asyncio.to_thread(self._book.keys_of, batch.batch_id)
        return await asyncio.to_thread(Answers, batch, requests, files, seen.status)

    async def _read(self, collected: Sequence[Answers]) -> None:
        """Read the answers to this run's questions."""
        for chunk in self._chunks():
            for number, question in chunk:
                for answers in collected:
                    if question.key in answers:
                        self._take(number, question, answers)
            # What is read waits in memory for its commit.
            await asyncio.to_thread(self._store.flush)

    def _take(self, number: int, question: Question, answers: Answers) -> None:
        """Store one answer with its entry in the ledger, or note that it failed."""
        share, batch = self._shares[number], answers.batch
        recipe = share.recipe.in_batch
        line = answers.take(question.key, self._endpoint)
        used: Usage | None = Usage()
        completion: Completion | None = None
        outcome: Outcome = "retried"
        if line.payload is not None:
            last = recipe.answers.form == "rationale"
            completion = read_completion(
                line.payload, question.keys, last, self._endpoint.redact, recipe.stop
            )
            used, outcome = usage_of(line.payload), "answer"
        elif line.failure is not None and line.failure.question_refusal:
            used = line.failure.billed_usage(estimated_tokens(question))
            completion, outcome = Completion("", line.failure.question_refusal), "refused"
        most = most_of(question, recipe)
        if completion is None:
            answers.note_failed(line)
            self._store.record(self._entry(batch, question.key, share, outcome, used, most))
            return
        answer = stored_answer(question, completion, recipe, self._endpoint.identity)
        if completion.finish_reason == "content_filter":
            outcome = "filtered"
        elif outcome == "answer" and answer.answer is None:
            outcome = "rejected"
        self._store.add(answer, self._entry(batch, question.key, share, outcome, used, most))
        answers.answered.append(question.key)

    def _entry(
        self,
        batch: Batch,
        key: str,
        share: Share,
        outcome: Outcome,
        used: Usage | None,
        most: Usage,
    ) -> Call:
        """Return a line's entry in the ledger, on behalf of the run that sent it."""
        prices = PriceRecipe.model_validate(batch.prices) if batch.prices else None
        counted = used is not None and outcome not in ("filtered", "refused")
        taken = most if used is None else used
        return replace(
            lost_call(batch, key),
            purpose=share.purpose,
            outcome=outcome,
            prompt_tokens=taken.prompt_tokens,
            cached_tokens=taken.cached_tokens,
            completion_tokens=taken.completion_tokens,
            is_counted=counted,
            cost=cost_of(taken, prices),
        )

    async def _settle(self, answers: Answers) -> None:
        """Book the calls that this run has no question for, and have the requests whose answers are
        stored leave the book. Those that failed are to be asked again; answers to questions that
        are not this run's stay at the service for the run that has them. Lines that can't be read
        are kept on this machine: an answer in one is paid for."""
        batch = answers.batch
        if answers.unreadable and not batch.booked_at:
            kept = await asyncio.to_thread(
                keep_unreadable, self._store.database, batch.batch_id, answers.unreadable
            )
            _log.warning(
                "batch %s: %d lines that can't be read, kept in %s",
                batch.service_id,
                len(answers.unreadable),
                kept,
            )
        # An equal entry of a run that reads the answer later counts once with this one.
        for number, key in enumerate(answers.rest(), start=1):
            line = answers.take(key, self._endpoint)
            used: Usage | None = Usage()
            if line.payload is None:
                answers.note_failed(line)
            else:
                used = usage_of(line.payload)
            self._book_unread(batch, key, "retried" if line.payload is None else "answer", used)
            if number % LOOKUP_ROWS == 0:
                await asyncio.to_thread(self._store.flush)
        for key in answers.lost:
            self._book_unread(batch, key, "lost", None)
        await asyncio.to_thread(self._store.flush)
        untried = answers.untried
        failed = [*answers.failed, *answers.lost]
        left = await asyncio.to_thread(
            self._book.settle, batch.batch_id, answers.answered, failed, untried
        )
        told = f"{len(answers.answered):,} answers taken in"
        if failed or untried:
            told += f", {len(failed) + len(untried):,} requests to be asked again"
        if left:
            told += f", {left:,} left at the service for runs that ask for them"
        _log.info("batch %s: %s", batch.service_id, told)

    def _book_unread(self, batch: Batch, key: str, outcome: Outcome, used: Usage | None) -> None:
        """Write the entry of a line that answers none of this run's questions, or of a request
        whose line is missing."""
        share = self._shares[0]
        if used is None:
            entry = replace(lost_call(batch, key), purpose=share.purpose, outcome=outcome)
        else:
            entry = self._entry(batch, key, share, outcome, used, used)
        self._store.record(entry)


def lease_of(batch: Batch) -> str:
    """Return the name of a batch's lease."""
    return f"batch {batch.batch_id}"


def give_up_batch(book: BatchBook, batch_id: str, lease_s: float = LENGTH_S) -> int:
    """Leave the requests of a batch to be asked again, and return how many. The ledger counts those
    without an entry at the most that they can have cost. Raises DataError if there is no such
    batch, or if a run is at work on it."""
    batch = book.batch(batch_id)
    left = book.keys_of(batch_id)
    if batch is None or not left:
        raise DataError(f"batch {batch_id}: holds no request; see distillery labels batches")
    leases, holder = Leases(seconds=lease_s), uuid.uuid4().hex
    name = lease_of(batch)
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


def lost_call(batch: Batch, key: str) -> Call:
    """Return the entry of a request whose answer nobody will see."""
    lines = max(batch.lines, 1)
    return Call(
        call_id=call_id_of(batch, key),
        called_at=batch.submitted_at or batch.created_at,
        run=batch.run,
        recipe=batch.recipe,
        teacher=batch.teacher,
        purpose="label",
        outcome="lost",
        request_key=key,
        prompt_tokens=round(batch.tokens / lines),
        is_counted=False,
        cost=None if batch.cost is None else batch.cost / lines,
        prices=batch.prices,
        batch_id=batch.service_id,
    )


def call_id_of(batch: Batch, key: str) -> str:
    """Return the id of a request's entry in the ledger, so that one written twice counts once."""
    return sha256(f"{batch.batch_id} {key}".encode()).hexdigest()


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
