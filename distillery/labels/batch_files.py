"""The files of a batch on this machine: the requests that are sent, and the answers that came."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO

from distillery.labels.batch_book import Batch
from distillery.labels.questions import Question
from distillery.recipe import TeacherRecipe
from distillery.records import Example, Usage
from distillery.teacher.asking import MESSAGE_TOKENS
from distillery.teacher.batch import BatchLine, each_line, key_of_line, read_line
from distillery.teacher.endpoint import Endpoint
from distillery.teacher.ledger import Purpose

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Share:
    """Rows that are asked with equal settings; `rows` returns them anew at each call."""

    rows: Callable[[], Iterable[Example]]
    recipe: TeacherRecipe
    purpose: Purpose


class RequestFile:
    """A file of requests that is being written; `most` is what they can take, and `keys` has that
    of each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: dict[str, Usage] = {}
        self.size = 0
        self.most = Usage()
        self._lines: IO[bytes] = path.open("wb")

    def add(self, key: str, line: bytes, most: Usage) -> None:
        """Write a request."""
        self._lines.write(line)
        self.keys[key] = most
        self.size += len(line)
        self.most = self.most + most

    def close(self) -> None:
        """Close the file, which stays."""
        self._lines.close()

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the closed file."""
        with self.path.open("rb") as lines:
            hasher = sha256()
            while block := lines.read(MEGABYTE):
                hasher.update(block)
        return hasher.hexdigest()

    def keep(self, keys: set[str]) -> None:
        """Write the closed file anew with these requests alone."""
        kept = self.path.with_suffix(".kept")
        with kept.open("wb") as out:
            for _, line in each_line(self.path):
                if key_of_line(line) in keys:
                    out.write(line)
        kept.replace(self.path)
        self.keys = {key: most for key, most in self.keys.items() if key in keys}
        self.most = self.most_of(self.keys)

    def most_of(self, keys: Iterable[str]) -> Usage:
        """Return what some of the requests can take."""
        most = Usage()
        for key in keys:
            most = most + self.keys[key]
        return most


class Answers:
    """The downloaded files of an ended batch: for each of its requests, where its line is. Of
    several lines for a request the first counts, and those of the output file come first.

    answered and failed: the requests whose lines were read. untried: those to which the service did
    not come before the batch expired or was cancelled. lost: those without a line in a batch that
    is complete. unreadable: lines that name no request."""

    def __init__(
        self, batch: Batch, requests: set[str], files: Sequence[Path], status: str
    ) -> None:
        self.batch = batch
        self._files = [path.open("rb") for path in files]
        self._places: dict[str, tuple[int, int]] = {}
        self.unreadable: list[bytes] = []
        for number, path in enumerate(files):
            for position, line in each_line(path):
                key = key_of_line(line)
                if not key:
                    self.unreadable.append(line.rstrip(b"\r\n"))
                elif key in requests:
                    self._places.setdefault(key, (number, position))
        missing = requests - self._places.keys()
        self.answered: list[str] = []
        self.failed: list[str] = []
        self._is_complete = status == "completed"
        self.untried = [] if self._is_complete else list(missing)
        self.lost = list(missing) if self._is_complete else []

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def take(self, key: str, endpoint: Endpoint) -> BatchLine:
        """Return a request's line, and take it out."""
        number, position = self._places.pop(key)
        self._files[number].seek(position)
        return read_line(self._files[number].readline(), endpoint)

    def note_failed(self, line: BatchLine) -> None:
        """Note a line without an answer. Before a batch ended early, the service did not come to
        those without a status."""
        has_status = line.failure is not None and line.failure.status is not None
        (self.failed if has_status or self._is_complete else self.untried).append(line.key)

    def rest(self) -> list[str]:
        """Return the requests whose lines are still in."""
        return list(self._places)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def most_of(question: Question, recipe: TeacherRecipe) -> Usage:
    """Return the most tokens that a request can take: a byte-level tokenizer makes at most one
    token of a byte."""
    size = sum(len(message["content"].encode()) for message in question.messages)
    return Usage(prompt_tokens=size + MESSAGE_TOKENS, completion_tokens=recipe.max_tokens)
