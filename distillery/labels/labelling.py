"""Labelling: rows become requests, requests become answers that are paid for once, and a row's answers become its
label, or a rejection with its reason: never a guess.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from distillery.errors import TeacherUnavailable
from distillery.labels.acceptance import stored_answer
from distillery.labels.files import LabelCounts, LabelFiles, label_files
from distillery.labels.questions import Question, questions
from distillery.labels.store import LabelStore, StoredAnswer
from distillery.labels.window import OpenRow, RequestState
from distillery.prompts import Message
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example, Usage
from distillery.teacher.asking import PROBE, Teacher
from distillery.teacher.budget import Spending, cost_of
from distillery.teacher.endpoint import Endpoint
from distillery.teacher.pace import Pace, Stopped
from distillery.teacher.reply import Completion

_LOOKUP_ROWS = 1000

_WINDOW_ROWS = 4000
"""Rows that are in memory at a time: enough for the fast ones not to wait for a slow one before them."""

_STRIKES = 2

_UNCOMMITTED = 10_000

_SLOT_S = 30.0

_SLICES = 20


class Asker(Protocol):
    """Who answers: a `Teacher`."""

    async def ask(self, messages: list[Message], letters: Sequence[str]) -> Completion: ...


Slots = Callable[[], AbstractAsyncContextManager[Any]]
"""A place among all runs that share a limit; each worker holds one for some seconds of its work at a time."""


async def label(
    examples: Iterable[Example],
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    endpoint: Endpoint,
    store: LabelStore,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    rows: int | None = None,
    teacher: Asker | None = None,
    slots: Slots = nullcontext,
    spent: dict[str, float] | None = None,
) -> LabelCounts:
    """Labels `examples` and writes labels.jsonl (TeacherLabel), rejected.jsonl (RejectedLabel), train_data.jsonl
    ({"Question": the user message, "Answer": the letter}, as in the lab), each in the order of `examples`, and the
    files of label_report.py.

    Asks what the store doesn't hold, equal requests once; `progress` gets (rows done, rows in all), the latter from
    `rows` where `examples` has no length. Holds some thousand rows in memory at a time, however many there are. Equal
    answers give equal bytes. Whatever is raised, the answers that came are in the store: TeacherError where too few
    rows got a label, BudgetReached at a cap, what `Teacher.ask` and `LabelStore` raise. `teacher` is asked in place
    of the endpoint's own. `spent`: see `pace.Spending`.
    """
    total = len(examples) if isinstance(examples, Sequence) else rows or 0
    pace = Pace(recipe.concurrency, recipe.requests_per_minute, recipe.tokens_per_minute)
    spending = Spending(recipe.budget, recipe.prices, spent)
    with label_files(out, prompt, recipe) as files:
        run = _Labelling(
            prompt, recipe, endpoint.identity, store, files, pace, slots, progress, total
        )
        try:
            if teacher:
                await run.work(examples, teacher)
            else:
                async with Teacher(recipe, endpoint, pace=pace, spending=spending) as own:
                    await run.work(examples, own)
        finally:
            await asyncio.to_thread(store.flush)
        files.finish()
    return LabelCounts(
        accepted=files.tally.accepted,
        rejected=files.tally.rejected.total(),
        asked=run.asked,
        usage=run.usage,
        cost=cost_of(run.usage, recipe.prices),
        currency=recipe.prices.currency if recipe.prices else "",
        calls_per_second=run.rate(),
    )


class _Labelling:
    """One run over the rows. A producer looks rows up and opens them, in chunks; workers ask what is missing; whoever
    makes the window's first row whole closes it, and those behind it that are."""

    def __init__(
        self,
        prompt: PromptRecipe,
        recipe: TeacherRecipe,
        identity: str,
        store: LabelStore,
        files: "LabelFiles",
        pace: Pace,
        slots: Slots,
        progress: Callable[[int, int], None] | None,
        total: int,
    ) -> None:
        self._prompt, self._recipe, self._identity = prompt, recipe, identity
        self._store, self._files, self._pace, self._slots = store, files, pace, slots
        self._progress, self._total = progress, total
        self._window: deque[OpenRow] = deque()
        self._room = asyncio.Event()
        self._outcomes: dict[str, RequestState] = {}
        self._queue: asyncio.Queue[Question | None] = asyncio.Queue()
        self._strikes: Counter[str] = Counter()
        self._produced = False
        self._error: BaseException | None = None
        self._started = time.monotonic()
        self._seconds: Counter[int] = Counter()
        self.asked = 0
        self.usage = Usage()

    async def work(self, examples: Iterable[Example], teacher: Asker) -> None:
        """Raises the first error of any worker, once the calls under way have come back: they are paid for."""
        self._report()
        workers = [
            asyncio.create_task(self._guarded(self._answer_questions(teacher)))
            for _ in range(self._recipe.concurrency)
        ]
        producer = asyncio.create_task(self._guarded(self._produce(iter(examples))))
        tasks = {producer, *workers}
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

    def rate(self) -> tuple[float, ...]:
        """Answers a second over the run, in equal slices of at least a second."""
        if not self._seconds:
            return ()
        last = max(self._seconds) + 1
        width = -(-last // _SLICES)
        slices = Counter[int]()
        for second, count in self._seconds.items():
            slices[second // width] += count
        return tuple(slices[at] / width for at in range(-(-last // width)))

    async def _produce(self, examples: Iterator[Example]) -> None:
        while chunk := await asyncio.to_thread(lambda: list(islice(examples, _LOOKUP_ROWS))):
            asked = await asyncio.to_thread(self._questions, chunk)
            keys = {one.key for several in asked for one in several}
            # Their rows may be written, and they forgotten, while the others are looked up.
            under_way = {key: self._outcomes[key] for key in keys & self._outcomes.keys()}
            known = await asyncio.to_thread(self._store.get_many, keys - under_way.keys())
            self._outcomes |= under_way
            for row, several in zip(chunk, asked, strict=True):
                self._open(row, several, known)
            self._close()
            while len(self._window) >= _WINDOW_ROWS or self._store.waiting > _UNCOMMITTED:
                self._room.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._room.wait(), 0.1)
        self._produced = True
        self._close()

    def _questions(self, chunk: list[Example]) -> list[list[Question]]:
        return [questions(row, self._prompt, self._recipe, self._identity) for row in chunk]

    def _open(self, row: Example, several: list[Question], known: dict[str, StoredAnswer]) -> None:
        outcomes = []
        for question in several:
            outcome = self._outcomes.get(question.key)
            if outcome is None:
                outcome = self._outcomes[question.key] = RequestState(known.get(question.key))
                if not outcome.is_known:
                    self._queue.put_nowait(question)
            outcome.rows += 1
            outcomes.append(outcome)
        self._window.append(OpenRow(row, several, outcomes))

    async def _guarded(self, work: Any) -> None:
        """`work`, whose first error ends the run."""
        try:
            await work
        except Stopped:
            return
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._error = self._error or error
            self._end()

    async def _answer_questions(self, teacher: Asker) -> None:
        while (question := await self._queue.get()) is not None:
            async with self._slots():
                until = time.monotonic() + _SLOT_S
                await self._answer(question, teacher)
                # A slot is taken for some seconds of work at a time: taking it costs a call of Prefect's API.
                while time.monotonic() < until and not self._queue.empty():
                    if (question := self._queue.get_nowait()) is None:
                        return
                    await self._answer(question, teacher)

    async def _answer(self, question: Question, teacher: Asker) -> None:
        if self._error:
            raise Stopped
        try:
            completion = await teacher.ask(question.messages, question.letters)
        except TeacherUnavailable as error:
            if self._pace.silent_s >= self._recipe.outage_s:
                raise
            # Where a plain question is answered next, it is this one that the endpoint fails on. What was answered
            # before the failure tells nothing: the outage may have begun since.
            if not error.overloaded and await self._is_there(teacher):
                self._strikes[question.key] += 1
            if self._strikes[question.key] < _STRIKES:
                self._queue.put_nowait(question)
                return
            self._outcomes[
                question.key
            ].failure = f"the endpoint fails on it, again and again ({error})"
        else:
            if completion.finish_reason == "malformed":
                if self._pace.is_open:
                    # Nothing else comes any more, so that it is not this question's doing.
                    if self._pace.silent_s >= self._recipe.outage_s:
                        raise TeacherUnavailable(
                            f"TEACHER_MODEL_ENDPOINT: has given no chat completion for {self._recipe.outage_s:.0f} s; "
                            "run again later: what was answered is kept"
                        )
                    self._queue.put_nowait(question)
                    return
                # Nothing that was said: whoever labels these rows again asks again.
                self._outcomes[question.key].failure = "malformed answer: no chat completion"
                return self._close()
            stored = stored_answer(question, completion, self._recipe, self._identity)
            self.asked += 1
            self.usage = self.usage + completion.usage
            self._seconds[int(time.monotonic() - self._started)] += 1
            self._store.add(stored)
            self._outcomes[question.key].stored = stored
        self._close()

    async def _is_there(self, teacher: Asker) -> bool:
        """Whether the teacher answers a plain question, which is paid for too."""
        try:
            completion = await teacher.ask(PROBE, ("A", "B"))
        except TeacherUnavailable:
            return False
        self.asked += 1
        self.usage = self.usage + completion.usage
        return True

    def _close(self) -> None:
        """Writes the rows at the window's start that are whole, and ends the workers after the last."""
        closed = False
        while self._window and all(outcome.is_known for outcome in self._window[0].outcomes):
            done = self._window.popleft()
            self._files.write(done)
            for question, outcome in zip(done.questions, done.outcomes, strict=True):
                outcome.rows -= 1
                if not outcome.rows:
                    del self._outcomes[question.key]
            closed = True
            self._report()
        if closed and len(self._window) < _WINDOW_ROWS:
            self._room.set()
        if self._produced and not self._window:
            self._end()

    def _end(self) -> None:
        self._pace.stop()
        for _ in range(self._recipe.concurrency):
            self._queue.put_nowait(None)

    def _report(self) -> None:
        if self._progress:
            self._progress(self._files.tally.rows, max(self._total, self._files.tally.rows))
