"""Labelling: rows become requests, the teacher answers each of them once, and the answers to a row
become its label or its rejection.

Equal requests are asked once, and those that the label store has answers for are not asked at all.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from distillery.errors import TeacherUnavailable
from distillery.labels.acceptance import call_read_as, read_again, stored_answer
from distillery.labels.files import LabelCounts, LabelFiles, label_files
from distillery.labels.questions import Question, questions
from distillery.labels.store import LabelStore, StoredAnswer
from distillery.labels.window import Window
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example, Usage
from distillery.teacher.asking import PROBE, Teacher
from distillery.teacher.budget import HeldByOthers, Spending, cost_of, saved_by_cache
from distillery.teacher.endpoint import Endpoint
from distillery.teacher.failures import TOO_LARGE
from distillery.teacher.ledger import CALLS, Payer, Purpose, sum_of, totals
from distillery.teacher.pace import Pace, Stopped, pace_of
from distillery.teacher.reply import Completion

LOOKUP_ROWS = 500
"""Rows that are read, looked up in the store and opened at a time: with 1,000, so many objects are
alive at once that the garbage collector looks at all memory twice as often."""

WINDOW_ROWS = 4000
"""Open rows above which no more are read: enough that fast answers don't wait for a slow one."""

MOST_UNCOMMITTED = 10_000
"""Answers on their way to the store above which no more rows are read."""

STRIKES = 2
"""A request fails for good after so many failures, each of teacher.attempts tries, while the
endpoint answers another question."""

REFUSED_TRIES = 24
"""Tries after which a request fails for good that the endpoint refuses with 429, without saying how
long to wait, while it answers another question: more than an overload that hits any of them is
likely to refuse in a row. Where it says so and was waited for, STRIKES are enough."""

FRESH, REFUSED, END = 1, 2, 0
"""Ranks of what is in the queue; the lowest is taken first. A request that was refused with 429 is
asked again when no other one waits: its place may have been taken by others."""

SLOT_S = 30.0
"""Seconds after which a worker gives its slot back, so that other runs get theirs."""

RATE_SLICES = 20

Progress = Callable[[int, int], None]
"""Takes the rows done and the rows in all."""

Slots = Callable[[], AbstractAsyncContextManager[Any]]
"""Returns a context manager that holds one slot of a limit which several runs share."""


async def label(
    examples: Iterable[Example],
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    endpoint: Endpoint,
    store: LabelStore,
    out: Path,
    progress: Progress | None = None,
    *,
    rows: int | None = None,
    teacher: Teacher | None = None,
    slots: Slots = nullcontext,
    payer: Payer | None = None,
    purpose: Purpose = "label",
    judged: bool = True,
) -> LabelCounts:
    """Label `examples`, write the files of files.py and report.py to `out`, return the counts.

    Requests without an answer in the store are asked of the endpoint, or of `teacher` if given.
    `rows` is the number of examples if they have no length; only `progress` needs it. Each call is
    recorded in the ledger, as one of `payer` for `purpose`. `judged` is as in `label_files`. Some
    thousand rows are in memory at a time. Equal answers give equal bytes in the files. Raises
    TeacherError if too few rows get a label, BudgetReached at a cap, and what `Teacher.ask` and
    `LabelStore` raise; the answers so far are in the store then.
    """
    total = rows or 0
    if isinstance(examples, Sequence):
        total = len(examples)
    pace = pace_of(recipe, endpoint, store.database)
    payer = payer or Payer()
    with label_files(out, prompt, recipe, judged) as files:
        run = LabellingRun(
            prompt, recipe, endpoint.identity, store, files, pace, slots, progress, total
        )
        try:
            if teacher:
                await run.work(examples, teacher)
            else:
                async with (
                    Spending.shared(
                        recipe, payer, store.database, store.flush, store.recover
                    ) as spending,
                    Teacher(
                        recipe,
                        endpoint,
                        pace=pace,
                        spending=spending,
                        book=store,
                        payer=payer,
                        purpose=purpose,
                    ) as own,
                ):
                    await run.work(examples, own)
        finally:
            await asyncio.to_thread(store.flush)
        files.finish()
    currency = recipe.prices.currency if recipe.prices else ""
    whose = (CALLS.c.run == payer.run, CALLS.c.teacher == endpoint.identity)
    paid = await asyncio.to_thread(
        totals, store.database, ("outcome",), *whose, CALLS.c.purpose == purpose
    )
    together = sum_of(paid, currency)
    return LabelCounts(
        accepted=files.tally.accepted,
        rejected=files.tally.rejected.total(),
        asked=run.asked,
        usage=together.usage,
        cost=together.cost if paid else cost_of(Usage(), recipe.prices),
        currency=currency,
        calls_per_second=run.calls_per_second(),
        paid=tuple(paid),
        equal=run.equal,
        cached_saved=saved_by_cache(together.usage, recipe.prices),
    )


class LabellingRun:
    """One run over the rows: a producer, teacher.concurrency workers, and the window between them.

    The producer reads rows in chunks, looks their requests up in the store, opens the rows in the
    window and queues the requests without an answer. Each worker takes one request at a time from
    the queue and asks the teacher.

    Invariants. All tasks run on one event loop, so that what happens between two awaits is atomic:
    - The worker that completes the oldest row flushes it and every complete row behind it. The
      producer flushes too, since no worker touches a row whose answers are all known already.
    - A request is in the queue, or with one worker, or known; never two of these at a time.
    - A request that the endpoint can't answer becomes known by its failure, after STRIKES or
      REFUSED_TRIES, and ends no run. Whether it is the request or the endpoint that fails is told
      by a question that the endpoint answers right after the failure.
    - An answer is handed to the store before it counts as known, so that a label in the files
      always has its answers in the store.
    - At most WINDOW_ROWS + LOOKUP_ROWS rows are open: the producer opens a chunk only while there
      are fewer than WINDOW_ROWS, and waits likewise for the store to commit.
    - The first error of a task ends the run. No call starts after it; the calls under way may come
      back within teacher.timeout_s and are stored, since they are paid for.
    - When the last row is flushed, every worker gets a None from the queue and ends.
    """

    def __init__(
        self,
        prompt: PromptRecipe,
        recipe: TeacherRecipe,
        identity: str,
        store: LabelStore,
        files: LabelFiles,
        pace: Pace,
        slots: Slots,
        progress: Progress | None,
        total: int,
    ) -> None:
        self._prompt, self._recipe, self._identity = prompt, recipe, identity
        self._store, self._files, self._pace, self._slots = store, files, pace, slots
        self._progress, self._total = progress, total
        self._window = Window()
        self._has_room = asyncio.Event()
        self._queue: asyncio.PriorityQueue[tuple[int, int, Question | None]] = (
            asyncio.PriorityQueue()
        )
        self._queued = count()
        self._strikes: Counter[str] = Counter()
        self._refused: set[str] = set()
        # When the last answer before a probe without an answer came, by the pace's clock.
        self._silent_for_probe_since: float | None = None
        self._all_opened = False
        self._error: BaseException | None = None
        self._started = time.monotonic()
        self._answers_by_second: Counter[int] = Counter()
        self.asked = 0

    async def work(self, examples: Iterable[Example], teacher: Teacher) -> None:
        """Label all rows. Raises the first error of a task, after the calls under way are over."""
        self._report()
        producer = asyncio.create_task(self._until_error(self.produce(iter(examples))))
        tasks = {producer}
        for _ in range(self._recipe.concurrency):
            tasks.add(asyncio.create_task(self._until_error(self.ask_queued(teacher))))
        try:
            while tasks and not self._error:
                _, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            producer.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=self._recipe.timeout_s)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._error:
            raise self._error

    @property
    def equal(self) -> int:
        """Requests that were not made since a row nearby had an equal one."""
        return self._window.equal

    def calls_per_second(self) -> tuple[float, ...]:
        """Return the answers per second, in up to 20 slices of the run of equal whole seconds."""
        if not self._answers_by_second:
            return ()
        seconds = max(self._answers_by_second) + 1
        width = math.ceil(seconds / RATE_SLICES)
        answers = [0] * math.ceil(seconds / width)
        for second, answered in self._answers_by_second.items():
            answers[second // width] += answered
        return tuple(answered / width for answered in answers)

    async def _until_error(self, task: Coroutine[Any, Any, None]) -> None:
        """Run one of the run's tasks; its error, if it is the first, ends the run."""
        try:
            await task
        except Stopped:
            return
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if self._error is None:
                self._error = error
            self.end()

    async def produce(self, examples: Iterator[Example]) -> None:
        """Open all rows, chunk by chunk, as the window has room for them."""
        while True:
            chunk = await asyncio.to_thread(lambda: list(islice(examples, LOOKUP_ROWS)))
            if not chunk:
                break
            await self.open_rows(chunk)
            self.flush()
            while len(self._window) >= WINDOW_ROWS or self._store.waiting > MOST_UNCOMMITTED:
                self._has_room.clear()
                # Nothing tells when the store has committed, so look again after a while.
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._has_room.wait(), 0.1)
        self._all_opened = True
        self.flush()

    async def open_rows(self, chunk: list[Example]) -> None:
        """Look the chunk's requests up, open its rows and queue what has to be asked."""
        asked = await asyncio.to_thread(
            lambda: [questions(row, self._prompt, self._recipe, self._identity) for row in chunk]
        )
        keys = {question.key for row_questions in asked for question in row_questions}
        # The rows that wait for these may be flushed, and the states lost, during the look-up.
        under_way = self._window.states_of(keys)
        known = await asyncio.to_thread(self._known, asked, keys - under_way.keys())
        for row, row_questions in zip(chunk, asked, strict=True):
            for question in self._window.open(row, row_questions, known, under_way):
                self._put(question)

    def _put(self, question: Question | None, rank: int = FRESH) -> None:
        """Queue a request, or the end of a worker, behind all of the same rank."""
        self._queue.put_nowait((rank, next(self._queued), question))

    def _known(self, asked: list[list[Question]], keys: set[str]) -> dict[str, StoredAnswer]:
        """Return the stored answers under `keys` as they are read today; the store learns what
        has changed."""
        known = self._store.get_many(keys)
        changed = []
        for question in chain.from_iterable(asked):
            stored = known.get(question.key)
            if stored is None:
                continue
            answer = known[question.key] = read_again(question, stored, self._recipe)
            if answer.answer != stored.answer:
                changed.append(answer)
        self._store.accept(changed)
        return known

    async def ask_queued(self, teacher: Teacher) -> None:
        """Ask what is in the queue, one request at a time, until a None comes."""
        while True:
            _, _, question = await self._queue.get()
            if question is None:
                return
            try:
                async with self._slots():
                    # It is held for several requests: to take one is a call of Prefect's API.
                    until = time.monotonic() + SLOT_S
                    await self.ask(question, teacher)
                    while time.monotonic() < until and not self._queue.empty():
                        _, _, question = self._queue.get_nowait()
                        if question is None:
                            return
                        await self.ask(question, teacher)
            except HeldByOthers as held:
                # Without the slot, which they may need to come to an end.
                self._put(question)
                await self._pace.sleep(held.look_s)

    async def ask(self, question: Question, teacher: Teacher) -> None:
        """Ask once; afterwards the request is known, or in the queue again."""
        if self._error:
            raise Stopped
        try:
            completion = await teacher.ask(
                question.messages,
                question.names,
                question.schema,
                by_text=question.by_text,
                key=question.key,
            )
        except TeacherUnavailable as error:
            await self._handle_failure(question, error, teacher)
        else:
            if completion.finish_reason == "malformed":
                self._handle_malformed(question)
            elif completion.finish_reason == TOO_LARGE:
                self._fail(question, "larger than the endpoint takes, or than its limit per minute")
            else:
                self.take(question, completion)
        self.flush()

    def take(self, question: Question, completion: Completion) -> None:
        """Store an answer; it is known from now on."""
        answer = stored_answer(question, completion, self._recipe, self._identity)
        self.asked += 1
        self._answers_by_second[int(time.monotonic() - self._started)] += 1
        self._store.add(answer, call_read_as(answer, completion))
        self._window.state(question.key).stored = answer

    async def _handle_failure(
        self, question: Question, error: TeacherUnavailable, teacher: Teacher
    ) -> None:
        """Queue a request again that the endpoint failed on, or have it fail for good. Raises
        `error` once there was no answer for teacher.outage_s, to a simple question neither.

        It is the request's own fault if the endpoint answers a simple question right after the
        failure. An answer from before it proves nothing: an outage may have begun since. At the
        first refusal with 429, other requests may have its place.
        """
        is_outage = self._pace.silent_s >= self._recipe.outage_s
        if is_outage and self._silent_for_probe_since == self._pace.answered_at:
            raise error
        rank, strikes = FRESH, STRIKES
        is_first_refusal = False
        if error.overloaded:
            rank = REFUSED
            is_first_refusal = question.key not in self._refused
            self._refused.add(question.key)
            if not error.waited:
                strikes = max(STRIKES, math.ceil(REFUSED_TRIES / self._recipe.attempts))
        if is_outage or not is_first_refusal:
            if await self._answers_probe(teacher):
                self._strikes[question.key] += 1
            elif is_outage:
                raise error
        if self._strikes[question.key] < strikes:
            self._put(question, rank)
        elif error.overloaded:
            self._fail(question, "refused again and again (429), while other requests are answered")
        else:
            self._fail(question, f"the endpoint fails on it, again and again ({error})")

    def _fail(self, question: Question, reason: str) -> None:
        """Have a request fail for good. That is not stored, so that a later labelling asks it."""
        self._window.state(question.key).failure = reason

    async def _answers_probe(self, teacher: Teacher) -> bool:
        """Return whether the teacher answers a simple question, which is paid for too."""
        try:
            completion = await teacher.ask(PROBE, ("A", "B"), purpose="probe")
        except TeacherUnavailable:
            self._silent_for_probe_since = self._pace.answered_at
            return False
        self.asked += 1
        if completion.call:
            self._store.record(completion.call)
        return True

    def _handle_malformed(self, question: Question) -> None:
        """Have a request fail whose answer was no chat completion.

        It is queued again if no other request gets an answer either; after teacher.outage_s that
        ends the run.
        """
        if not self._pace.is_open:
            self._fail(question, "malformed answer: no chat completion")
        elif self._pace.silent_s < self._recipe.outage_s:
            self._put(question)
        else:
            raise TeacherUnavailable(
                f"{self._recipe.variables}_ENDPOINT: has given no chat completion for "
                f"{self._recipe.outage_s:.0f} s; run again later: all answers so far are kept"
            )

    def flush(self) -> None:
        """Write the complete rows at the start of the window; end the workers after the last."""
        for row in self._window.take_complete():
            self._files.write(row)
            self._report()
            if len(self._window) < WINDOW_ROWS:
                self._has_room.set()
        if self._all_opened and not len(self._window):
            self.end()

    def end(self) -> None:
        """Have all workers end: those that wait for their turn and those that wait for requests."""
        self._pace.stop()
        for _ in range(self._recipe.concurrency):
            self._put(None, END)

    def _report(self) -> None:
        if self._progress:
            done = self._files.tally.rows
            self._progress(done, max(self._total, done))
