"""The teacher's labels: how an answer is read, where it is kept, and how a data set is labelled without paying twice.

An answer is kept under what was asked of whom (`request_key`), in a SQL database that runs and machines share. What is
no option, or never came, is a rejection with its reason: never a label, never stored as one.
"""

import asyncio
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import islice
from operator import methodcaller
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self, TextIO

from sqlalchemy import JSON, Column, DateTime, Float, Integer, String, Table, Text
from sqlalchemy.sql import select

from distillery.database import METADATA, Database
from distillery.errors import StoreError, TeacherError
from distillery.prompts import Message, render_messages
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import LETTERS, Example, RejectedLabel, TeacherLabel, Usage, digest_of
from distillery.teacher import Completion, Endpoint, Teacher, letter_of

LABELS_FILE = "labels.jsonl"
REJECTED_FILE = "rejected.jsonl"
TRAIN_DATA_FILE = "train_data.jsonl"

_MARK = re.compile(
    r"^\W*(?:(?:so|therefore|thus)\W+)?(?:the\s+)?(?:(?:correct|best|right|final)\s+)?"
    r"(?:answer|option|choice)\b(?:\s+(?:is|would\s+be)\b)?\s*[:=-]?\s*",
    re.IGNORECASE,
)
_MARK_ALONE = re.compile(r"((?:answer|option|choice)(?:\s+is)?\s*:)\s*\n\s*", re.IGNORECASE)
_LETTER_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:,]?")
_LETTER_FIRST = re.compile(r"(?:[(\[]([A-Z])[)\]]|([A-Z])(?:[).:,]|\s*[-–—](?=\s)|(?=\s*\n)))[.:]?\s*(?=\S)")
_OTHER_LETTER = re.compile(r"(?<![\w'])([A-Z])(?![\w'])(?!(?<=[AI])\s+[a-z])")


def parse_answer(text: str, choices: Sequence[str]) -> str | None:
    """The letter that `text` answers with, out of those of `choices` (the option texts), or None where it is none or
    more than one.

    Read are a letter alone ("B", "(B)", "B.", "**B**"), a letter before other text ("B) some text"), an option's exact
    text, and each of these after "Answer:", "The answer is" and the like at the start of a line. A letter within a
    sentence is not read: "A good choice is B" is None. What stands before </think> is not looked at.
    """
    body = re.sub(r"[*`]", "", text.rpartition("</think>")[2]).strip()
    body = _MARK_ALONE.sub(r"\1 ", body)
    if body.startswith("<think>"):
        return None
    marked = [body_after for line in body.splitlines() if (body_after := _after_mark(line))]
    letters = {_read(rest, choices) for rest in marked or [body]}
    return letters.pop() if len(letters) == 1 else None


def _after_mark(line: str) -> str:
    found = _MARK.match(line)
    return line[found.end() :].strip() if found else ""


def _read(body: str, choices: Sequence[str]) -> str | None:
    """The letter of a text that starts with its answer: by letter and by option text, which must not disagree."""
    letters = LETTERS[: len(choices)]
    named = {letter for letter, choice in zip(letters, choices, strict=True) if body and _plain(body) == _plain(choice)}
    if (alone := _LETTER_ALONE.fullmatch(body)) and alone[1].upper() in letters:
        named.add(alone[1].upper())
    elif (first := _LETTER_FIRST.match(body)) and (letter := first[1] or first[2]) in letters:
        named |= {letter} | _letters_named(body[first.end() :], letter, choices)
    return named.pop() if len(named) == 1 else None


def _letters_named(rest: str, letter: str, choices: Sequence[str]) -> set[str]:
    """The options that the text after a leading letter speaks of; its own text counts as nothing else."""
    letters = LETTERS[: len(choices)]
    if _plain(rest) == _plain(choices[letters.index(letter)]):
        return set()
    by_text = {other for other, choice in zip(letters, choices, strict=True) if _plain(rest) == _plain(choice)}
    return by_text | {found for found in _OTHER_LETTER.findall(rest) if found in letters}


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[*`]", "", text).split()).strip(" \"'“”.").casefold()


def distribution(top_logprobs: Iterable[tuple[str, float]], letters: Sequence[str]) -> dict[str, float] | None:
    """The teacher's probabilities of `letters` (they sum to 1) from the alternatives at the answer's token, or None
    where no letter is among them.

    Spellings of a letter with blanks around it (" A", "A") are summed, and the letters are normalised among themselves.
    A letter that is not listed gets the least listed probability, which it can't have exceeded, or, where that is
    smaller, an equal share with the other missing letters of what all listed tokens leave. -9999 stands for a token
    outside the list, of 20 at most (OpenAI's API reference, chat completions, logprobs and top_logprobs).
    """
    listed = [(token, math.exp(min(value, 0.0))) for token, value in top_logprobs if value > -9999.0]
    found: dict[str, float] = {}
    for token, probability in listed:
        if (letter := letter_of(token)) in letters:
            found[letter] = found.get(letter, 0.0) + probability
    if not sum(found.values()):
        return None
    missing = [letter for letter in letters if letter not in found]
    if missing:
        left = max(1.0 - sum(p for _, p in listed), 0.0) / len(missing)
        found |= dict.fromkeys(missing, min(left, min(p for _, p in listed)))
    total = sum(found.values())
    return {letter: found[letter] / total for letter in letters}


def request_key(identity: str, messages: list[Message], settings: TeacherRecipe) -> str:
    """SHA-256 (hex) of what is asked of whom: the teacher's identity, the messages, the temperature, the token limit
    and whether soft labels are wanted. Not the URL, the SDK, the key or the row's place."""
    return digest_of(
        {
            "teacher": identity,
            "messages": messages,
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
            "soft_labels": settings.soft_labels,
        }
    )


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """An accepted answer, as it stands in the table teacher_answers. `latency_ms`: of the call that succeeded."""

    request_key: str
    teacher: str
    answer: str
    distribution: dict[str, float] | None
    raw: str
    prompt_tokens: int
    completion_tokens: int
    latency_ms: float
    attempts: int
    model_version: str


_TABLE = Table(
    "teacher_answers",
    METADATA,
    Column("request_key", String(64), primary_key=True),
    Column("teacher", Text, nullable=False),
    Column("answer", String(1), nullable=False),
    Column("distribution", JSON(none_as_null=True)),
    Column("raw", Text, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("latency_ms", Float, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("model_version", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
)
_ANSWER_COLUMNS = [column for column in _TABLE.columns if column.name != "created_at"]
_LOOKUP_ROWS = 1000
_COMMIT_ROWS = 500


class LabelStore:
    """Teacher answers by request key, in SQLite or PostgreSQL (`url` as SQLAlchemy writes it; DISTILLERY_LABELS).

    One thread writes: it commits whatever has arrived while its last commit ran, at once, so that an answer is on disk
    some milliseconds after `add`. An answer that is there already stays as it is. An outage of the database is waited
    out (database.py); then StoreUnavailable, and StoreError for what waiting does not mend.
    """

    def __init__(self, url: str | None = None, wait_s: float | None = None) -> None:
        self._database = Database(url, wait_s)
        self._arrived: SimpleQueue[StoredAnswer | threading.Event | None] = SimpleQueue()
        self._failure: StoreError | None = None
        self._writer = threading.Thread(target=self._write, name="label-store", daemon=True)
        self._writer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()
        if error is None:
            self._raise_failure()

    def get_many(self, keys: Iterable[str]) -> dict[str, StoredAnswer]:
        """The stored answers among `keys`."""
        found: dict[str, StoredAnswer] = {}
        wanted = iter(keys)
        while chunk := list(islice(wanted, _LOOKUP_ROWS)):
            query = select(*_ANSWER_COLUMNS).where(_TABLE.c.request_key.in_(chunk))
            rows = self._database.run(methodcaller("execute", query)).all()
            found |= {row.request_key: StoredAnswer(**row._mapping) for row in rows}
        return found

    def add(self, answer: StoredAnswer) -> None:
        """Hands an answer to the writer, without waiting; raises what a former write failed with."""
        self._raise_failure()
        self._arrived.put(answer)

    def flush(self) -> None:
        """Waits until all that was added is committed."""
        if self._writer.is_alive():
            done = threading.Event()
            self._arrived.put(done)
            done.wait()
        self._raise_failure()

    def close(self) -> None:
        """Commits what has arrived and lets go of the database."""
        self._stop()
        self._raise_failure()

    def _stop(self) -> None:
        if self._writer.is_alive():
            self._arrived.put(None)
            self._writer.join()
        self._database.close()

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    def _write(self) -> None:
        while True:
            batch = self._take()
            answers = [item for item in batch if isinstance(item, StoredAnswer)]
            if answers and not self._failure:
                try:
                    self._commit(answers)
                except StoreError as error:
                    self._failure = error
            for item in batch:
                if isinstance(item, threading.Event):
                    item.set()
            if None in batch:
                return

    def _take(self) -> list[StoredAnswer | threading.Event | None]:
        """Waits for one item and takes what else is there."""
        batch = [self._arrived.get()]
        while len(batch) < _COMMIT_ROWS:
            try:
                batch.append(self._arrived.get_nowait())
            except Empty:
                break
        return batch

    def _commit(self, answers: list[StoredAnswer]) -> None:
        now = datetime.now(UTC)
        rows = [{**asdict(answer), "created_at": now} for answer in answers]
        insert = self._database.insert(_TABLE).on_conflict_do_nothing()
        self._database.run(lambda connection: connection.execute(insert, rows))


@dataclass(frozen=True)
class LabelCounts:
    """Rows accepted and rejected; the calls `asked` in this run and their `usage`: what this run paid for."""

    accepted: int
    rejected: int
    asked: int
    usage: Usage


@dataclass
class _Answers:
    """What is known of each request: by its key, an answer or why there is none (reason, raw text)."""

    accepted: dict[str, StoredAnswer]
    rejected: dict[str, tuple[str, str]] = field(default_factory=dict)
    asked: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


async def label(
    examples: Sequence[Example],
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    endpoint: Endpoint,
    store: LabelStore,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
) -> LabelCounts:
    """Labels `examples` and writes labels.jsonl (TeacherLabel), rejected.jsonl (RejectedLabel) and train_data.jsonl
    ({"Question": the user message, "Answer": the letter}, as in the lab), each in the order of `examples`.

    Asks what the store doesn't hold, equal requests once; `progress` gets (requests done, requests in all). Equal
    answers give equal bytes. Whatever is raised, the answers that came are in the store: TeacherError where no row was
    accepted, what `Teacher.ask` and `LabelStore` raise.
    """
    if not examples:
        raise TeacherError("dataset: no row to label; check dataset.splits and dataset.sample")
    keys = [request_key(endpoint.identity, render_messages(row, prompt), recipe) for row in examples]
    wanted = dict(zip(keys, examples, strict=True))
    answers = _Answers(await asyncio.to_thread(store.get_many, wanted))
    missing = {key: row for key, row in wanted.items() if key not in answers.accepted}

    def report() -> None:
        if progress:
            progress(len(answers.accepted) + len(answers.rejected), len(wanted))

    report()
    if missing:
        await _ask_all(missing, prompt, recipe, endpoint, store, answers, report)
    _write_files(out, examples, keys, prompt, answers)
    return _count(keys, answers)


def write_gold(examples: Sequence[Example], prompt: PromptRecipe, out: Path) -> LabelCounts:
    """The gold answers in the same files, for the rows that have one."""
    known = [row for row in examples if row.answer_key]
    with (out / LABELS_FILE).open("w") as labels, (out / TRAIN_DATA_FILE).open("w") as train:
        for row in known:
            label = TeacherLabel(example_id=row.example_id, answer=row.answer_key or "")
            _write_line(labels, label.model_dump(mode="json"))
            _write_line(train, {"Question": render_messages(row, prompt)[-1]["content"], "Answer": label.answer})
    return LabelCounts(accepted=len(known), rejected=0, asked=0, usage=Usage())


def read_labels(folder: Path) -> dict[str, TeacherLabel]:
    """The labels of an artifact's folder by example_id."""
    lines = (folder / LABELS_FILE).read_text().splitlines()
    return {label.example_id: label for label in map(TeacherLabel.model_validate_json, lines)}


async def _ask_all(
    missing: Mapping[str, Example],
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    endpoint: Endpoint,
    store: LabelStore,
    answers: _Answers,
    report: Callable[[], None],
) -> None:
    """teacher.concurrency workers that take from one iterator; the first error stops them all."""
    rows = iter(missing.items())

    async def work(teacher: Teacher) -> None:
        for key, row in rows:
            completion = await teacher.ask(render_messages(row, prompt), row.letters)
            _take_in(key, row, completion, recipe, endpoint, store, answers)
            report()

    try:
        async with Teacher(recipe, endpoint) as teacher:
            workers = [asyncio.create_task(work(teacher)) for _ in range(min(recipe.concurrency, len(missing)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
    finally:
        await asyncio.to_thread(store.flush)


def _take_in(
    key: str,
    row: Example,
    completion: Completion,
    recipe: TeacherRecipe,
    endpoint: Endpoint,
    store: LabelStore,
    answers: _Answers,
) -> None:
    answers.asked += 1
    answers.prompt_tokens += completion.usage.prompt_tokens
    answers.completion_tokens += completion.usage.completion_tokens
    answer = None if completion.finish_reason == "content_filter" else parse_answer(completion.text, row.choices)
    if answer is None:
        answers.rejected[key] = (_reason(completion, row, recipe), completion.text)
        return
    # The alternatives at a letter that is not the one answered with say nothing of the answer.
    pairs = completion.top_logprobs if completion.answer_letter == answer else None
    accepted = StoredAnswer(
        request_key=key,
        teacher=endpoint.identity,
        answer=answer,
        distribution=distribution(pairs, row.letters) if pairs and recipe.soft_labels else None,
        raw=completion.text,
        prompt_tokens=completion.usage.prompt_tokens,
        completion_tokens=completion.usage.completion_tokens,
        latency_ms=completion.latency_ms,
        attempts=completion.attempts,
        model_version=completion.model_version,
    )
    store.add(accepted)
    answers.accepted[key] = accepted


def _reason(completion: Completion, row: Example, recipe: TeacherRecipe) -> str:
    if completion.finish_reason == "content_filter":
        return "refused by the endpoint's content filter"
    if completion.finish_reason == "context_length_exceeded":
        return "prompt longer than the teacher's context"
    if completion.finish_reason == "length" and not completion.text.strip():
        return f"no answer within teacher.max_tokens ({recipe.max_tokens})"
    if not completion.text.strip():
        return "empty answer"
    return f"no option, or more than one, of {row.letters[0]} to {row.letters[-1]}"


def _write_files(
    out: Path, examples: Sequence[Example], keys: Sequence[str], prompt: PromptRecipe, answers: _Answers
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (
        (out / LABELS_FILE).open("w", encoding="utf-8", newline="\n") as labels,
        (out / REJECTED_FILE).open("w", encoding="utf-8", newline="\n") as rejected,
        (out / TRAIN_DATA_FILE).open("w", encoding="utf-8", newline="\n") as train,
    ):
        for row, key in zip(examples, keys, strict=True):
            if stored := answers.accepted.get(key):
                _write_line(labels, _label_of(row, stored).model_dump())
                question = render_messages(row, prompt)[-1]["content"]
                _write_line(train, {"Question": question, "Answer": stored.answer})
            else:
                reason, raw = answers.rejected[key]
                _write_line(rejected, RejectedLabel(example_id=row.example_id, reason=reason, raw=raw).model_dump())


def _write_line(file: TextIO, value: dict[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")


def _label_of(row: Example, stored: StoredAnswer) -> TeacherLabel:
    usage = Usage(prompt_tokens=stored.prompt_tokens, completion_tokens=stored.completion_tokens)
    return TeacherLabel(example_id=row.example_id, answer=stored.answer, distribution=stored.distribution, usage=usage)


def _count(keys: Sequence[str], answers: _Answers) -> LabelCounts:
    accepted = sum(key in answers.accepted for key in keys)
    if not accepted:
        reasons = Counter(answers.rejected[key][0] for key in keys).most_common()
        raise TeacherError(
            "teacher: none of its answers is a label: "
            + "; ".join(f"{reason} ({count} rows)" for reason, count in reasons)
            + "; check prompt.system, teacher.max_tokens and the model"
        )
    usage = Usage(prompt_tokens=answers.prompt_tokens, completion_tokens=answers.completion_tokens)
    return LabelCounts(accepted=accepted, rejected=len(keys) - accepted, asked=answers.asked, usage=usage)
