"""Labelling: rows become requests, requests become answers that are paid for once, and a row's answers become its
label, or a rejection with its reason: never a guess.
"""

import asyncio
import heapq
import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TextIO

from distillery.answers import (
    Answer,
    combined,
    distribution,
    in_own_letters,
    parse_answer,
    parse_json,
    rationale_of,
    turned,
)
from distillery.dataset import read_columns
from distillery.errors import DataError, TeacherError, TeacherUnavailable
from distillery.label_report import Tally
from distillery.label_store import LabelStore, StoredAnswer
from distillery.pace import Pace, Spending, Stopped, cost_of
from distillery.prompts import Message, render_messages
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example, RejectedLabel, TeacherDrift, TeacherLabel, Usage, digest_of
from distillery.teacher import PROBE, Completion, Endpoint, Teacher, storable

LABELS_FILE = "labels.jsonl"
REJECTED_FILE = "rejected.jsonl"
TRAIN_DATA_FILE = "train_data.jsonl"

_LOOKUP_ROWS = 1000
_WINDOW_ROWS = 4000
"""Rows that are in memory at a time: enough for the fast ones not to wait for a slow one before them."""
_JUDGED_ROWS = 100
"""Rows after which the share of labels is taken seriously."""
_STRIKES = 2
_UNCOMMITTED = 10_000
_SLOT_S = 30.0
_SLICES = 20


def request_key(identity: str, messages: list[Message], settings: TeacherRecipe, vote: int = 0) -> str:
    """SHA-256 (hex) of what is asked of whom: the teacher's identity, the messages, the temperature, the token limit,
    whether log-probabilities are wanted, whether JSON is, and which of several votes it is. Not the URL, the SDK, the
    key or the row's place."""
    asked = {
        "teacher": identity,
        "messages": messages,
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "soft_labels": settings.asks_log_probabilities,
    }
    # Left out where they ask for nothing, so that what was asked before they were there is still known.
    asked |= {"form": "json"} if settings.answers.form == "json" else {}
    asked |= {"vote": vote} if vote else {}
    return digest_of(asked)


@dataclass(frozen=True, slots=True)
class Question:
    """One request for a row: `order` holds the row's option at each place that was shown."""

    key: str
    messages: list[Message]
    order: list[int]
    row: Example

    @property
    def letters(self) -> tuple[str, ...]:
        return self.row.letters

    @property
    def choices(self) -> list[str]:
        return [self.row.choices[option] for option in self.order]


def questions(row: Example, prompt: PromptRecipe, recipe: TeacherRecipe, identity: str) -> list[Question]:
    """What is asked for a row: in each order of its options, each vote."""
    asked = []
    for number in range(min(recipe.answers.orders, len(row.choices))):
        order = turned(len(row.choices), number)
        shown = row.model_copy(update={"choices": tuple(row.choices[option] for option in order)}) if number else row
        messages = render_messages(shown, prompt)
        if recipe.answers.form == "rationale":
            last = messages[-1]
            messages = [*messages[:-1], last | {"content": f"{last['content']}\n\n{recipe.answers.instruction}"}]
        for vote in range(recipe.answers.votes):
            asked.append(Question(request_key(identity, messages, recipe, vote), messages, order, row))
    return asked


class Asker(Protocol):
    """Who answers: a `Teacher`."""

    async def ask(self, messages: list[Message], letters: Sequence[str]) -> Completion: ...


Slots = Callable[[], AbstractAsyncContextManager[Any]]
"""A place among all runs that share a limit; each worker holds one for some seconds of its work at a time."""


@dataclass(frozen=True)
class LabelCounts:
    """Rows accepted and rejected; the calls `asked` in this run, their `usage` and `cost`: what this run paid for.
    `calls_per_second`: over the run, in equal slices of its time."""

    accepted: int
    rejected: int
    asked: int = 0
    usage: Usage = field(default_factory=Usage)
    cost: float | None = None
    currency: str = ""
    calls_per_second: tuple[float, ...] = ()


@dataclass(slots=True)
class _Outcome:
    """What is known of a request: the stored answer, or why there is none; neither while it is under way."""

    stored: StoredAnswer | None = None
    failure: str = ""
    rows: int = 0

    @property
    def is_known(self) -> bool:
        return self.stored is not None or bool(self.failure)


@dataclass(frozen=True, slots=True)
class _Open:
    """A row in the window."""

    row: Example
    questions: list[Question]
    outcomes: list[_Outcome]


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
    pace, spending = Pace(recipe), Spending(recipe.budget, recipe.prices, spent)
    with _files_for(out, prompt, recipe) as files:
        run = _Labelling(prompt, recipe, endpoint.identity, store, files, pace, slots, progress, total)
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


def label_from(
    examples: Iterable[Example], labels: dict[str, TeacherLabel], prompt: PromptRecipe, recipe: TeacherRecipe, out: Path
) -> LabelCounts:
    """The same files from labels that are there already; a row without one is rejected."""
    with _files_for(out, prompt, recipe) as files:
        for row in examples:
            if known := labels.get(row.example_id):
                files.take(row, known)
            else:
                files.reject(row, "no label for it")
        files.finish()
    return LabelCounts(accepted=files.tally.accepted, rejected=files.tally.rejected.total())


def labels_in(paths: Sequence[str], examples: Iterable[Example]) -> dict[str, TeacherLabel]:
    """The labels of files (JSONL, CSV, Parquet) for `examples`, by the columns example_id, answer (a letter) and, where
    they are there, distribution (letter to probability, as a mapping or as JSON) and rationale (the reason). Other rows
    of the files are left out.

    Raises DataError with the file and row."""
    rows = {row.example_id: row for row in examples}
    meaning = {"example_id": "the row's id in the data set", "answer": "the teacher's letter"}
    found: dict[str, TeacherLabel] = {}
    for where, values in read_columns(paths, meaning):
        row, answer = rows.get(str(values["example_id"])), str(values["answer"]).strip()
        if row is None:
            continue
        if answer not in row.letters:
            raise DataError(f"{where}: answer: {answer!r} is none of {row.letters[0]} to {row.letters[-1]}")
        probabilities = _probabilities(values.get("distribution"), row, where)
        found[row.example_id] = TeacherLabel(
            example_id=row.example_id,
            answer=answer,
            distribution=probabilities,
            confidence=probabilities[answer] if probabilities else None,
            rationale=str(values.get("rationale") or "").strip() or None,
        )
    return found


def _probabilities(value: Any, row: Example, where: str) -> dict[str, float] | None:
    try:
        given = json.loads(value) if isinstance(value, str) and value else value
        if not given:
            return None
        found = {letter: float(given[letter]) for letter in row.letters}
    except (ValueError, KeyError, TypeError):
        found = {}
    if not math.isclose(sum(found.values()), 1, abs_tol=1e-3) or min(found.values()) < 0:
        letters = f"{row.letters[0]} to {row.letters[-1]}"
        raise DataError(f"{where}: distribution: no probabilities of {letters} that sum to 1")
    return found


def gold_labels(examples: Iterable[Example]) -> dict[str, TeacherLabel]:
    """The gold answers as labels, for the rows that have one."""
    return {
        row.example_id: TeacherLabel(example_id=row.example_id, answer=row.answer_key)
        for row in examples
        if row.answer_key
    }


def read_labels(folder: Path) -> dict[str, TeacherLabel]:
    """The labels of an artifact's folder by example_id."""
    with (folder / LABELS_FILE).open(encoding="utf-8") as lines:
        return {label.example_id: label for label in map(TeacherLabel.model_validate_json, lines)}


async def ask_canaries(
    examples: Iterable[Example],
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    endpoint: Endpoint,
    store: LabelStore,
    *,
    slots: Slots = nullcontext,
    spent: dict[str, float] | None = None,
) -> TeacherDrift:
    """Asks those of teacher.canaries.rows of `examples` again that the store holds, and compares; nothing is stored.
    Which rows is told by a hash of their ids, so that new rows move few. `slots` and `spent` as in `label`. Raises what
    `Teacher.ask` does."""
    chosen = heapq.nsmallest(recipe.canaries.rows, examples, key=lambda row: sha256(row.example_id.encode()).digest())
    asked = [questions(row, prompt, recipe, endpoint.identity) for row in chosen]
    known = store.get_many(one.key for several in asked for one in several)
    there = [(row, several) for row, several in zip(chosen, asked, strict=True) if all(q.key in known for q in several)]
    places = asyncio.Semaphore(recipe.concurrency)
    pace, spending = Pace(recipe), Spending(recipe.budget, recipe.prices, spent)
    async with Teacher(recipe, endpoint, pace=pace, spending=spending) as teacher:

        async def again(question: Question) -> StoredAnswer | None:
            """None where no answer comes, which tells nothing of the teacher."""
            started = time.monotonic()
            async with places, slots():
                while True:
                    try:
                        completion = await teacher.ask(question.messages, question.letters)
                    except TeacherUnavailable:
                        if time.monotonic() - started < recipe.outage_s:
                            continue
                        if pace.answered_at > started:
                            return None
                        raise
                    malformed = completion.finish_reason == "malformed"
                    return None if malformed else _stored(question, completion, recipe, endpoint.identity)

        answers = await asyncio.gather(*(again(one) for _, several in there for one in several))
    fresh = [answer for answer in answers if answer]
    by_key = {answer.request_key: answer for answer in fresh}
    compared = [(row, several) for row, several in there if all(one.key in by_key for one in several)]
    changed = [
        row.example_id
        for row, several in compared
        if _whole(row, several, known, recipe) != _whole(row, several, by_key, recipe)
    ]
    return TeacherDrift(
        asked=len(fresh),
        compared=len(compared),
        changed=tuple(changed),
        before=tuple(sorted({answer.model_version for answer in known.values()})),
        after=tuple(sorted({answer.model_version for answer in fresh})),
    )


def _whole(
    row: Example, several: Sequence[Question], answers: Mapping[str, StoredAnswer], recipe: TeacherRecipe
) -> str | None:
    """The letter that a row's answers come to."""
    found = _accepted(several, [answers[one.key] for one in several])
    whole = combined(found, row.letters, recipe.soft_labels) if found else None
    return whole.letter if whole else None


class _Labelling:
    """One run over the rows. A producer looks rows up and opens them, in chunks; workers ask what is missing; whoever
    makes the window's first row whole closes it, and those behind it that are."""

    def __init__(
        self,
        prompt: PromptRecipe,
        recipe: TeacherRecipe,
        identity: str,
        store: LabelStore,
        files: "_Files",
        pace: Pace,
        slots: Slots,
        progress: Callable[[int, int], None] | None,
        total: int,
    ) -> None:
        self._prompt, self._recipe, self._identity = prompt, recipe, identity
        self._store, self._files, self._pace, self._slots = store, files, pace, slots
        self._progress, self._total = progress, total
        self._window: deque[_Open] = deque()
        self._room = asyncio.Event()
        self._outcomes: dict[str, _Outcome] = {}
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
            asyncio.create_task(self._guarded(self._answer_questions(teacher))) for _ in range(self._recipe.concurrency)
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
                outcome = self._outcomes[question.key] = _Outcome(known.get(question.key))
                if not outcome.is_known:
                    self._queue.put_nowait(question)
            outcome.rows += 1
            outcomes.append(outcome)
        self._window.append(_Open(row, several, outcomes))

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
            self._outcomes[question.key].failure = f"the endpoint fails on it, again and again ({error})"
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
            stored = _stored(question, completion, self._recipe, self._identity)
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


def _stored(question: Question, completion: Completion, recipe: TeacherRecipe, identity: str) -> StoredAnswer:
    read = parse_json if recipe.answers.form == "json" else parse_answer
    refused = completion.finish_reason in ("content_filter", "refusal")
    # A reason that was cut off has not come to its answer, whatever letters stand in it.
    cut = completion.finish_reason == "length" and recipe.answers.form == "rationale"
    letter = None if refused or cut else read(completion.text, question.choices)
    # The alternatives at a letter that is not the one answered with say nothing of the answer.
    pairs = completion.top_logprobs if completion.answer_letter == letter else None
    return StoredAnswer(
        request_key=question.key,
        teacher=identity,
        answer=letter,
        distribution=distribution(pairs, question.letters) if pairs and recipe.asks_log_probabilities else None,
        raw=completion.text,
        prompt_tokens=completion.usage.prompt_tokens,
        completion_tokens=completion.usage.completion_tokens,
        cached_tokens=completion.usage.cached_tokens,
        cost=cost_of(completion.usage, recipe.prices),
        latency_ms=completion.latency_ms,
        attempts=completion.attempts,
        model_version=completion.model_version,
        reason="" if letter else _reason(completion, question, recipe),
        example_id=storable(question.row.example_id),
        prompt=storable(question.messages[-1]["content"]),
    )


def _accepted(several: Sequence[Question], answers: Sequence[StoredAnswer | None]) -> list[Answer]:
    """Those answers to a row that are labels, in the row's own letters."""
    return [
        in_own_letters(stored.answer, stored.distribution, question.order)
        for question, stored in zip(several, answers, strict=True)
        if stored and stored.answer
    ]


def _reason(completion: Completion, question: Question, recipe: TeacherRecipe) -> str:
    if completion.finish_reason == "content_filter":
        return "refused by the endpoint's content filter"
    if completion.finish_reason == "refusal":
        return "refused by the teacher"
    if completion.finish_reason == "context_length_exceeded":
        return "prompt longer than the teacher's context"
    if completion.finish_reason == "length":
        return f"no answer within teacher.max_tokens ({recipe.max_tokens})"
    if not completion.text.strip():
        return "empty answer"
    return f"no option, or more than one, of {question.letters[0]} to {question.letters[-1]}"


class _Files:
    """The files of a labelling, written row by row as rows are done."""

    def __init__(self, folder: Path, prompt: PromptRecipe, recipe: TeacherRecipe) -> None:
        self._folder, self._prompt, self._recipe = folder, prompt, recipe
        self.tally = Tally()
        self._labels = self._file(LABELS_FILE)
        self._rejected = self._file(REJECTED_FILE)
        self._train = self._file(TRAIN_DATA_FILE)

    def _file(self, name: str) -> TextIO:
        return (self._folder / name).open("w", encoding="utf-8", newline="\n")

    def close(self) -> None:
        for file in (self._labels, self._rejected, self._train):
            file.close()

    def write(self, done: _Open) -> None:
        """A row whose requests are all known; more than half of them must have come to a label."""
        stored = [outcome.stored for outcome in done.outcomes]
        found = _accepted(done.questions, stored)
        if 2 * len(found) <= len(done.outcomes):
            first = next(o for o in done.outcomes if not (o.stored and o.stored.answer))
            raw = first.stored.raw if first.stored else ""
            return self.reject(done.row, first.stored.reason if first.stored else first.failure, raw)
        whole = combined(found, done.row.letters, self._recipe.soft_labels)
        if whole is None:
            votes = ", ".join(answer.letter for answer in found)
            return self.reject(done.row, f"no majority among its {len(found)} answers", votes)
        answers = [answer for answer in stored if answer]
        usage = Usage(
            prompt_tokens=sum(answer.prompt_tokens for answer in answers),
            completion_tokens=sum(answer.completion_tokens for answer in answers),
        )
        rationale = self._rationale(done, whole.letter) if self._recipe.answers.form == "rationale" else None
        label = TeacherLabel(
            example_id=done.row.example_id,
            answer=whole.letter,
            distribution=whole.distribution,
            confidence=whole.confidence,
            rationale=rationale or None,
            usage=usage,
        )
        return self.take(done.row, label)

    def _rationale(self, done: _Open, letter: str) -> str | None:
        """The first reason for `letter` that was given in the row's own order: others name its options by other
        letters."""
        for question, outcome in zip(done.questions, done.outcomes, strict=True):
            stored = outcome.stored
            if stored and stored.answer == letter and question.order == sorted(question.order):
                return rationale_of(stored.raw)
        return None

    def take(self, row: Example, label: TeacherLabel) -> None:
        """A label, unless teacher.filters reject it; what it tells of the teacher counts either way."""
        self.tally.accept(row, label)
        if reason := self._filtered(row, label):
            self.tally.drop(label, reason)
            return self._write_rejected(row, reason, label.answer)
        _write_line(self._labels, label.model_dump())
        question = render_messages(row, self._prompt)[-1]["content"]
        _write_line(self._train, {"Question": question, "Answer": label.answer})
        self._refuse_no_soft(final=False)
        return self._refuse_too_few(final=False)

    def _filtered(self, row: Example, label: TeacherLabel) -> str:
        """Why teacher.filters reject a label, or nothing."""
        filters = self._recipe.filters
        if filters.confidence and label.confidence is None:
            return "no confidence is known (teacher.filters.confidence)"
        if label.confidence is not None and label.confidence < filters.confidence:
            return f"confidence below teacher.filters.confidence ({filters.confidence:g})"
        if filters.agreement_with_gold and row.answer_key and row.answer_key != label.answer:
            return "gold says otherwise"
        return ""

    def reject(self, row: Example, reason: str, raw: str = "") -> None:
        self.tally.reject(reason)
        self._write_rejected(row, reason, raw)

    def _write_rejected(self, row: Example, reason: str, raw: str) -> None:
        _write_line(self._rejected, RejectedLabel(example_id=row.example_id, reason=reason, raw=raw).model_dump())
        self._refuse_too_few(final=False)

    def finish(self) -> None:
        """Raises TeacherError where there was no row, too few got a label, or none has the probabilities wanted."""
        if not self.tally.rows:
            raise TeacherError("dataset: no row to label; check dataset.splits and dataset.sample")
        self._refuse_too_few(final=True)
        self._refuse_no_soft(final=True)
        self.close()
        if self._recipe.filters.balance:
            self._balance(self._recipe.filters.balance)
        self.tally.write(self._folder)

    def _refuse_too_few(self, final: bool) -> None:
        tally, minimum = self.tally, self._recipe.filters.minimum_accepted
        enough = tally.accepted >= minimum * tally.rows and tally.accepted
        if enough or not (final or tally.rows >= _JUDGED_ROWS):
            return
        reasons = "; ".join(f"{reason} ({count} rows)" for reason, count in tally.rejected.most_common())
        raise TeacherError(
            f"teacher: {tally.accepted} of {tally.rows} rows have a label, and teacher.filters.minimum_accepted asks "
            f"for {minimum:.0%}: {reasons}; check prompt.system, teacher.max_tokens and the model"
        )

    def _refuse_no_soft(self, final: bool) -> None:
        tally, recipe = self.tally, self._recipe
        # With a minimum of nothing, labels are taken as they are.
        if not recipe.soft_labels or tally.soft or not tally.accepted or not recipe.filters.minimum_accepted:
            return
        if not (final or tally.accepted >= _JUDGED_ROWS):
            return
        why = "those that came are not at the answer's letter"
        mend = "set it to false, whereupon the rows are asked anew, or take answers.votes"
        if recipe.kind == "file":
            why, mend = "teacher.files have no column distribution", "add it, or set teacher.soft_labels: false"
        raise TeacherError(f"teacher.soft_labels: none of {tally.accepted} labels has probabilities: {why}; {mend}")

    def _balance(self, most: float) -> None:
        """Takes the least sure labels of each letter that has more than `most` times the rarest's."""
        ranked: dict[str, list[tuple[float, str, int]]] = {}
        for number, label in enumerate(self._written()):
            # Of equally sure ones, whichever the hash says: not the first or last of the file.
            place = sha256(label.example_id.encode()).hexdigest()[:16]
            confidence = 1.0 if label.confidence is None else label.confidence
            ranked.setdefault(label.answer, []).append((-confidence, place, number))
        limit = int(most * min(map(len, ranked.values())))
        dropped = {number for rows in ranked.values() for _, _, number in sorted(rows)[limit:]}
        if not dropped:
            return
        reason = f"its letter has more than {most:g} times the rarest's labels (teacher.filters.balance)"
        with (
            self._file(f"{LABELS_FILE}.kept") as labels,
            (self._folder / REJECTED_FILE).open("a", encoding="utf-8") as out,
        ):
            for number, label in enumerate(self._written()):
                if number in dropped:
                    rejected = RejectedLabel(example_id=label.example_id, reason=reason, raw=label.answer)
                    _write_line(out, rejected.model_dump())
                    self.tally.drop(label, reason)
                else:
                    _write_line(labels, label.model_dump())
        with (
            self._file(f"{TRAIN_DATA_FILE}.kept") as train,
            (self._folder / TRAIN_DATA_FILE).open(encoding="utf-8") as lines,
        ):
            train.writelines(line for number, line in enumerate(lines) if number not in dropped)
        for name in (LABELS_FILE, TRAIN_DATA_FILE):
            (self._folder / f"{name}.kept").replace(self._folder / name)

    def _written(self) -> Iterator[TeacherLabel]:
        with (self._folder / LABELS_FILE).open(encoding="utf-8") as lines:
            yield from map(TeacherLabel.model_validate_json, lines)


@contextmanager
def _files_for(out: Path, prompt: PromptRecipe, recipe: TeacherRecipe) -> Iterator[_Files]:
    """Files that come to `out` when all of them are whole, and not at all after an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder,
        closing(_Files(Path(folder), prompt, recipe)) as files,
    ):
        yield files
        out.mkdir(exist_ok=True)
        for file in Path(folder).iterdir():
            file.replace(out / file.name)


def _write_line(file: TextIO, value: dict[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
