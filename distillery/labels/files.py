"""labels/files"""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from distillery.errors import TeacherError
from distillery.labels.acceptance import accepted_answers
from distillery.labels.report import Tally
from distillery.labels.window import OpenRow
from distillery.prompts import render_messages
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example, RejectedLabel, TeacherLabel, Usage
from distillery.teacher.answers import combine_answers, rationale_of

LABELS_FILE = "labels.jsonl"

REJECTED_FILE = "rejected.jsonl"

TRAIN_DATA_FILE = "train_data.jsonl"

_JUDGED_ROWS = 100
"""Rows after which the share of labels is taken seriously."""


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


def read_labels(folder: Path) -> dict[str, TeacherLabel]:
    """The labels of an artifact's folder by example_id."""
    with (folder / LABELS_FILE).open(encoding="utf-8") as lines:
        return {label.example_id: label for label in map(TeacherLabel.model_validate_json, lines)}


class LabelFiles:
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

    def write(self, done: OpenRow) -> None:
        """A row whose requests are all known; more than half of them must have come to a label."""
        stored = [outcome.stored for outcome in done.outcomes]
        found = accepted_answers(done.questions, stored)
        if 2 * len(found) <= len(done.outcomes):
            first = next(o for o in done.outcomes if not (o.stored and o.stored.answer))
            raw = first.stored.raw if first.stored else ""
            return self.reject(
                done.row, first.stored.reason if first.stored else first.failure, raw
            )
        whole = combine_answers(found, done.row.letters, self._recipe.soft_labels)
        if whole is None:
            votes = ", ".join(answer.letter for answer in found)
            return self.reject(done.row, f"no majority among its {len(found)} answers", votes)
        answers = [answer for answer in stored if answer]
        usage = Usage(
            prompt_tokens=sum(answer.prompt_tokens for answer in answers),
            completion_tokens=sum(answer.completion_tokens for answer in answers),
        )
        rationale = (
            self._rationale(done, whole.letter)
            if self._recipe.answers.form == "rationale"
            else None
        )
        label = TeacherLabel(
            example_id=done.row.example_id,
            answer=whole.letter,
            distribution=whole.distribution,
            confidence=whole.confidence,
            rationale=rationale or None,
            usage=usage,
        )
        return self.take(done.row, label)

    def _rationale(self, done: OpenRow, letter: str) -> str | None:
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
        _write_line(
            self._rejected,
            RejectedLabel(example_id=row.example_id, reason=reason, raw=raw).model_dump(),
        )
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
        reasons = "; ".join(
            f"{reason} ({count} rows)" for reason, count in tally.rejected.most_common()
        )
        raise TeacherError(
            f"teacher: {tally.accepted} of {tally.rows} rows have a label, and teacher.filters.minimum_accepted asks "
            f"for {minimum:.0%}: {reasons}; check prompt.system, teacher.max_tokens and the model"
        )

    def _refuse_no_soft(self, final: bool) -> None:
        tally, recipe = self.tally, self._recipe
        # With a minimum of nothing, labels are taken as they are.
        if (
            not recipe.soft_labels
            or tally.soft
            or not tally.accepted
            or not recipe.filters.minimum_accepted
        ):
            return
        if not (final or tally.accepted >= _JUDGED_ROWS):
            return
        why = "those that came are not at the answer's letter"
        mend = "set it to false, whereupon the rows are asked anew, or take answers.votes"
        if recipe.kind == "file":
            why, mend = (
                "teacher.files have no column distribution",
                "add it, or set teacher.soft_labels: false",
            )
        raise TeacherError(
            f"teacher.soft_labels: none of {tally.accepted} labels has probabilities: {why}; {mend}"
        )

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
        reason = (
            f"its letter has more than {most:g} times the rarest's labels (teacher.filters.balance)"
        )
        with (
            self._file(f"{LABELS_FILE}.kept") as labels,
            (self._folder / REJECTED_FILE).open("a", encoding="utf-8") as out,
        ):
            for number, label in enumerate(self._written()):
                if number in dropped:
                    rejected = RejectedLabel(
                        example_id=label.example_id, reason=reason, raw=label.answer
                    )
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
def label_files(out: Path, prompt: PromptRecipe, recipe: TeacherRecipe) -> Iterator[LabelFiles]:
    """Files that come to `out` when all of them are whole, and not at all after an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder,
        closing(LabelFiles(Path(folder), prompt, recipe)) as files,
    ):
        yield files
        out.mkdir(exist_ok=True)
        for file in Path(folder).iterdir():
            file.replace(out / file.name)


def _write_line(file: TextIO, value: dict[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
