"""Asking in batches: what the label store does not know is sent in files, and the answers are taken
in as they come, by this run or a later one. teacher/batch.py is the service, batch_book.py the book
of what is under way.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distillery.errors import (
    BudgetReached,
    TeacherError,
    TeacherUnavailable,
    Waiting,
)
from distillery.labels.acceptance import call_read_as, stored_answer
from distillery.labels.batch_book import Batch, BatchBook, Line
from distillery.labels.batch_files import MEGABYTE, Answers, RequestFile, Share, most_of
from distillery.labels.batch_intake import BatchIntake
from distillery.labels.batch_sender import BatchSender
from distillery.labels.questions import Question, questions
from distillery.labels.quote import duration
from distillery.labels.store import LabelStore
from distillery.recipe import BatchRecipe, PromptRecipe
from distillery.records import Usage
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
from distillery.teacher.budget import POLL_S, Spending, when_left
from distillery.teacher.endpoint import Endpoint
from distillery.teacher.ledger import Amounts, Payer
from distillery.teacher.pace import pace_of
from distillery.teacher.reservations import Reservations, amounts_of, fits

LOOKUP_ROWS = 1000
"""Rows that are in memory at a time."""

Progress = Callable[[int, int], None]
"""Takes the requests that the service has done and those that it has."""

_log = logging.getLogger(__name__)


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

    A request that is in a batch is not asked otherwise. What holds while a batch is sent, and while
    its answers are taken in, say BatchSender and BatchIntake."""

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
        recipe = shares[0].recipe
        self._reservations = Reservations(store.database, store.flush, recipe, payer, store.recover)
        self._sender = BatchSender(
            recipe,
            batch.window,
            endpoint,
            store,
            book,
            service,
            payer,
            self._reservations,
            leases,
            lease_s,
        )
        self._intake = BatchIntake(shares[0], endpoint, store, book, service)
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

    async def _resume(self) -> None:
        """Bring every batch on its way that a dead process has left before the service knew it."""
        for batch in self._book.open_batches(self._endpoint.identity):
            if batch.state in ("intended", "uploaded") and batch.url == self._endpoint.url:
                await self._sender.resume(batch)

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
            **self._teachers[number].body(question.names, question.schema),
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

    async def _submit(self, file: RequestFile) -> None:
        sent = await self._sender.submit(file)
        self._waits_for |= sent.waits_for
        self._held_back = sent.held_back or self._held_back

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
            parts = (question.messages, question.names, question.schema)
            completion = await when_left(partial(teacher.ask, *parts, key=question.key))
            if completion.finish_reason != "malformed":
                answer = stored_answer(question, completion, share.recipe, self._endpoint.identity)
                store.add(answer, call_read_as(answer, completion))
        self._teachers[number] = teacher

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
            if not is_sent and await self._sender.is_held(batch):
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
            await asyncio.to_thread(self._book.change, batch.batch_id, status=seen.status)
        if not seen.is_under_way and batch.state == "submitted":
            ended: dict[str, Any] = {"state": "ended", "ended_at": datetime.now(UTC)}
            await asyncio.to_thread(self._book.change, batch.batch_id, **ended)
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
                if not await self._sender.hold(batch):
                    # Another run is taking its answers in.
                    await asyncio.sleep(min(self._batch.poll_s, 1.0))
                    continue
                held.callback(self._sender.release, batch)
                if seen.status == "failed":
                    await self._intake.note_failure(batch, seen)
                    if seen.lacks_quota:
                        refused.append(batch.lines)
                    elif batch.batch_id in self._waits_for:
                        failures.append(self._failure(seen))
                    continue
                self._is_full = False
                is_waited_for = batch.batch_id in self._waits_for
                answers = await self._intake.download(batch, seen, folder, is_waited_for)
                if answers is None:
                    continue
                if seen.status == "cancelled" and is_waited_for:
                    cancelled.append(seen.service_id)
                held.callback(answers.close)
                collected.append(answers)
            if collected:
                await self._read(collected)
            for answers in collected:
                await self._intake.settle(answers)
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

    async def _read(self, collected: Sequence[Answers]) -> None:
        """Read the answers to this run's questions."""
        for chunk in self._chunks():
            for number, question in chunk:
                for answers in collected:
                    if question.key in answers:
                        self._intake.take(self._shares[number], question, answers)
            # What is read waits in memory for its commit.
            await asyncio.to_thread(self._store.flush)
