"""The files of a labelling, written row by row as rows are done, in the order of the rows.

- labels.jsonl: a TeacherLabel for each accepted row
- rejected.jsonl: a RejectedLabel for each other row
- train_data.jsonl: {"Question": the user message, "Answer": the letter, class or text that answers
  it} for each accepted row, and for each further text of it
- answer_tokens.parquet: of accepted rows whose answers are written, the tokens with the teacher's
  probabilities (data/answer_tokens.py); not there if no row has any
- those of report.py: report.json, look.jsonl, reliability.png
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from distillery.data.answer_tokens import FILE as TOKENS_FILE
from distillery.data.answer_tokens import AnswerToken, AnswerTokensFile, unpacked
from distillery.errors import DataError, TeacherError
from distillery.labels.acceptance import (
    accepted_answers,
    answers_needed,
    label_of_answers,
    reasons_of_no_answer,
)
from distillery.labels.report import Tally
from distillery.labels.window import OpenRow
from distillery.prompts import render_messages
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import (
    CallTotal,
    CascadeFigures,
    Example,
    RejectedLabel,
    TeacherLabel,
    Usage,
)
from distillery.teacher.reading import rationale_of
from distillery.teacher.written_tokens import tokens_of_label

LABELS_FILE = "labels.jsonl"

REJECTED_FILE = "rejected.jsonl"

TRAIN_DATA_FILE = "train_data.jsonl"

UNREAD_SHOWN = 3
"""Rejected answers that the error for too few labels shows."""

UNREAD_CHARACTERS = 100
"""The most of each that it shows."""

LEARN_AS_HARD = (
    "to learn the answers that are stored without them, set teacher.filters.minimum_accepted: 0 "
    "and student.training.soft_weight: 0 (soft_labels: false would ask for all rows again)"
)
"""What to do about labels of an endpoint or a local teacher: which labels are accepted counts in no
request's key, while soft_labels does."""

WHY_NOT_SOFT = {
    (False, False): (
        "those that came are not at the answer's letter",
        f"use answers.votes; {LEARN_AS_HARD}",
    ),
    (False, True): ("the tokens that came do not spell the answers", LEARN_AS_HARD),
    (True, False): (
        "teacher.files have no column distribution",
        "add it, or set teacher.soft_labels: false",
    ),
    (True, True): (
        "teacher.files have no columns tokens, candidates and logs",
        "add them, or set teacher.soft_labels: false",
    ),
}
"""What the error for labels without probabilities says is wrong, and what to do about it: whether
the labels are of files, and whether answers are written."""

ENCODER = json.JSONEncoder(ensure_ascii=False)
"""Made once: json.dumps makes one for each call."""

JUDGED_ROWS = 100
"""Rows from which on a share of labels that is too low ends the run early."""


@dataclass(frozen=True)
class LabelCounts:
    """Rows accepted and rejected, and what this run paid for them: see records.TeacherLabels."""

    accepted: int
    rejected: int
    asked: int = 0
    usage: Usage = field(default_factory=Usage)
    cost: float | None = None
    currency: str = ""
    calls_per_second: tuple[float, ...] = ()
    paid: tuple[CallTotal, ...] = ()
    equal: int = 0
    cached_saved: float | None = None
    cascade: CascadeFigures | None = None


@contextmanager
def label_files(
    out: Path, prompt: PromptRecipe, recipe: TeacherRecipe, judged: bool = True
) -> Iterator["LabelFiles"]:
    """Yield files to write to. They are moved to `out` at the end, and deleted after an error.
    `judged`: whether too few labels are an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder,
        closing(LabelFiles(Path(folder), prompt, recipe, judged)) as files,
    ):
        yield files
        out.mkdir(exist_ok=True)
        # Tokens of an earlier labelling would not be those of these labels.
        (out / TOKENS_FILE).unlink(missing_ok=True)
        for file in Path(folder).iterdir():
            file.replace(out / file.name)


class LabelFiles:
    """The open files in `folder`, and the tally of what was written to them."""

    def __init__(
        self, folder: Path, prompt: PromptRecipe, recipe: TeacherRecipe, judged: bool = True
    ) -> None:
        self._folder, self._prompt, self._recipe = folder, prompt, recipe
        self._judged = judged
        self.tally = Tally()
        self._unread: list[str] = []
        self._without_answer = 0
        self._labels = open_lines(folder / LABELS_FILE, "w")
        self._rejected = open_lines(folder / REJECTED_FILE, "w")
        self._train = open_lines(folder / TRAIN_DATA_FILE, "w")
        self._tokens: AnswerTokensFile | None = None

    def close(self) -> None:
        """Close the files."""
        for file in (self._labels, self._rejected, self._train, self._tokens):
            if file:
                file.close()

    def write(self, done: OpenRow) -> None:
        """Write a complete row: its label if more than half of its answers are accepted and these
        have a majority, otherwise its rejection. Of free texts, one that is accepted is enough."""
        stored = [state.stored for state in done.states]
        accepted = accepted_answers(done.questions, stored)
        if len(accepted) < answers_needed(done.row, len(stored)):
            self._reject_for_first_failure(done)
            return
        label = label_of_answers(done.row, accepted, self._recipe.soft_labels)
        if label is None:
            votes = ", ".join(answer.letter for answer in accepted)
            self.reject(done.row, f"no majority among its {len(accepted)} answers", votes)
            return
        asks_reason = self._recipe.answers.form == "rationale"
        rationale = None
        if asks_reason:
            rationale = rationale_for(label.letter, done)
        prompt_tokens = completion_tokens = 0
        for answer in stored:
            if answer:
                prompt_tokens += answer.prompt_tokens
                completion_tokens += answer.completion_tokens
        self.accept(
            done.row,
            TeacherLabel(
                example_id=done.row.example_id,
                answer=label.letter,
                distribution=label.distribution,
                confidence=label.confidence,
                rationale=rationale,
                references=label.references,
                usage=Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens),
            ),
            tokens_of(done, label.letter) if done.row.format else None,
            # The first is in the row's own order. A rationale is asked for in a text of its own.
            "" if asks_reason else done.questions[0].messages[-1]["content"],
        )

    def _reject_for_first_failure(self, done: OpenRow) -> None:
        for state in done.states:
            if state.stored is None:
                self._without_answer += 1
                self.reject(done.row, state.failure)
                return
            if not state.stored.answer:
                no_answer = reasons_of_no_answer(self._recipe).values()
                self._without_answer += state.stored.reason in no_answer
                if len(self._unread) < UNREAD_SHOWN and state.stored.raw.strip():
                    self._unread.append(state.stored.raw)
                self.reject(done.row, state.stored.reason, state.stored.raw)
                return

    def accept(
        self,
        row: Example,
        label: TeacherLabel,
        tokens: Sequence[AnswerToken] | None = None,
        question: str = "",
    ) -> None:
        """Write a label, with the tokens of a written one, or its rejection if teacher.filters
        reject it. What it tells about the teacher is counted in either case. `question`: the user
        message that asks the row, if it is at hand.

        Raises TeacherError as soon as enough rows show that the labels are not good enough.
        """
        soft = label.distribution is not None or tokens is not None
        self.tally.accept(row, label, soft)
        reason = self._filtered(row, label)
        if reason:
            self.tally.drop(label, reason, soft)
            self._write_rejected(row, reason, label.answer)
            return
        write_line(self._labels, label.model_dump())
        if tokens is not None:
            self._tokens = self._tokens or AnswerTokensFile(self._folder / TOKENS_FILE)
            self._tokens.write(row.example_id, tokens)
        question = question or render_messages(row, self._prompt)[-1]["content"]
        for answer in label.answers:
            if self._prompt.answer == "text":
                answer = row.options[row.keys.index(answer)]
            self._train.write(train_line(question, answer))
        self._check_soft(final=False)
        self._check_share(final=False)

    def reject(self, row: Example, reason: str, raw: str = "") -> None:
        """Write a row without a label. Raises TeacherError as `accept` does."""
        self.tally.reject(reason)
        self._write_rejected(row, reason, raw)

    def finish(self) -> None:
        """Close the files, balance the labels and write the report.

        Raises TeacherError if there was no row, if too few rows have a label (see `_check_share`),
        or if soft labels are wanted and none has probabilities.
        """
        if not self.tally.rows:
            raise TeacherError("dataset: no row to label; check dataset.splits and dataset.sample")
        self._check_share(final=True)
        self._check_soft(final=True)
        self.close()
        if self._recipe.filters.balance:
            self._balance(self._recipe.filters.balance)
        self.tally.write(self._folder)

    def _filtered(self, row: Example, label: TeacherLabel) -> str:
        """Return why teacher.filters reject a label, or nothing."""
        filters = self._recipe.filters
        if filters.confidence and label.confidence is None:
            return "no confidence is known (teacher.filters.confidence)"
        if label.confidence is not None and label.confidence < filters.confidence:
            return f"confidence below teacher.filters.confidence ({filters.confidence:g})"
        if filters.agreement_with_gold:
            right = row.right_answers
            if right and label.answer not in right:
                return "gold says otherwise"
        return ""

    def _write_rejected(self, row: Example, reason: str, raw: str) -> None:
        rejected = RejectedLabel(example_id=row.example_id, reason=reason, raw=raw)
        write_line(self._rejected, rejected.model_dump())
        self._check_share(final=False)

    def _check_share(self, final: bool) -> None:
        """Raise TeacherError if too few rows have a label, in the end or after JUDGED_ROWS. For a
        judge, which needs no labels, none is too few only if every row has an answer and none of
        the answers can be read."""
        tally, minimum = self.tally, self._recipe.filters.minimum_accepted
        if not self._judged or (not final and tally.rows < JUDGED_ROWS):
            return
        if tally.accepted and tally.accepted >= minimum * tally.rows:
            return
        # What a content filter or a failing endpoint keeps back says nothing of the settings.
        if not self._recipe.needs_labels and self._without_answer:
            return
        reasons = "; ".join(
            f"{reason} ({count} rows)" for reason, count in tally.rejected.most_common()
        )
        said = ""
        if self._unread:
            said = f"; it said {', '.join(map(quoted, self._unread))}"
        section, asked = self._recipe.section, ""
        if minimum:
            asked = f", and {section}.filters.minimum_accepted asks for {minimum:.0%}"
        raise TeacherError(
            f"{section}: {tally.accepted} of {tally.rows} rows have a label{asked}: "
            f"{reasons}{said}; check {self._recipe.wording}, {section}.max_tokens and the model"
        )

    def _check_soft(self, final: bool) -> None:
        """Raise TeacherError if no label has the probabilities that teacher.soft_labels wants."""
        tally, recipe = self.tally, self._recipe
        if not recipe.soft_labels or tally.soft or not tally.accepted:
            return
        # A minimum of 0 says that labels are taken as they are.
        if not recipe.filters.minimum_accepted:
            return
        if not final and tally.accepted < JUDGED_ROWS:
            return
        why, remedy = WHY_NOT_SOFT[recipe.kind == "file", self._prompt.answer == "written"]
        raise TeacherError(
            f"teacher.soft_labels: none of {tally.accepted} labels has probabilities: "
            f"{why}; {remedy}"
        )

    def _balance(self, most: float) -> None:
        """Move the labels that teacher.filters.balance rejects from the written files to the
        rejected ones."""
        with open_lines(self._folder / LABELS_FILE) as lines:
            surplus = surplus_labels(map(TeacherLabel.model_validate_json, lines), most)
        if not surplus:
            return
        reason = (
            f"its letter has more than {most:g} times the rarest's labels (teacher.filters.balance)"
        )
        kept_labels, kept_train = self._folder / "labels.kept", self._folder / "train.kept"
        with (
            open_lines(self._folder / LABELS_FILE) as labels,
            open_lines(self._folder / TRAIN_DATA_FILE) as train,
            open_lines(self._folder / REJECTED_FILE, "a") as rejected_file,
            open_lines(kept_labels, "w") as labels_out,
            open_lines(kept_train, "w") as train_out,
        ):
            for number, (line, train_line) in enumerate(zip(labels, train, strict=True)):
                if number not in surplus:
                    labels_out.write(line)
                    train_out.write(train_line)
                    continue
                label = TeacherLabel.model_validate_json(line)
                rejected = RejectedLabel(
                    example_id=label.example_id, reason=reason, raw=label.answer
                )
                write_line(rejected_file, rejected.model_dump())
                self.tally.drop(label, reason, label.distribution is not None)
        kept_labels.replace(self._folder / LABELS_FILE)
        kept_train.replace(self._folder / TRAIN_DATA_FILE)


def read_labels(folder: Path) -> dict[str, TeacherLabel]:
    """Return the labels in an artifact's folder by example_id. Raises DataError for a file that is
    none of labels, with its line."""
    path = folder / LABELS_FILE
    labels = {}
    number = 1
    try:
        with open_lines(path) as lines:
            for line in lines:
                label = TeacherLabel.model_validate_json(line)
                labels[label.example_id] = label
                number += 1
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}:{number}: no label can be read ({type(error).__name__}); label again "
            "with --refresh label"
        ) from error
    return labels


def read_rejected(folder: Path) -> dict[str, str]:
    """Return the reasons for rejections in an artifact's folder, by example_id."""
    with open_lines(folder / REJECTED_FILE) as lines:
        rejected = list(map(RejectedLabel.model_validate_json, lines))
    return {each.example_id: each.reason for each in rejected}


def rationale_for(letter: str, done: OpenRow) -> str | None:
    """Return the first rationale for `letter` that was given in the row's own order of options:
    in another order, a rationale refers to the options by other letters."""
    for question, state in zip(done.questions, done.states, strict=True):
        in_own_order = list(question.order) == sorted(question.order)
        if in_own_order and state.stored and state.stored.answer == letter:
            by_letter = not done.row.classes
            return rationale_of(state.stored.raw, question.options, by_letter) or None
    return None


def tokens_of(done: OpenRow, label: str) -> tuple[AnswerToken, ...] | None:
    """Return the tokens of the first stored answer that is the label of a written row and whose
    tokens spell it; None if there is none. Raises DataError for stored bytes that are none."""
    for question, state in zip(done.questions, done.states, strict=True):
        stored = state.stored
        if stored is None or stored.tokens is None or stored.answer != label:
            continue
        try:
            tokens = unpacked(stored.tokens)
        except ValueError as error:
            raise DataError(
                f"{done.row.example_id}: the stored tokens of its answer can't be read ({error}); "
                f"run distillery labels delete --row {stored.example_id}, then label again"
            ) from error
        found = tokens_of_label(tokens, label, question.schema)
        if found:
            return found
    return None


def surplus_labels(labels: Iterable[TeacherLabel], most: float) -> set[int]:
    """Return the positions (from 0) of the labels by which a letter has more than `most` times the
    labels of the rarest letter: the least confident ones.

    A hash of the id decides between equally confident labels, not their order in the file.
    """
    by_letter: dict[str, list[tuple[float, str, int]]] = {}
    for number, label in enumerate(labels):
        confidence = 1.0 if label.confidence is None else label.confidence
        id_hash = sha256(label.example_id.encode()).hexdigest()[:16]
        by_letter.setdefault(label.answer, []).append((-confidence, id_hash, number))
    limit = int(most * min(map(len, by_letter.values())))
    surplus: set[int] = set()
    for ranked in by_letter.values():
        surplus.update(number for _, _, number in sorted(ranked)[limit:])
    return surplus


def quoted(text: str) -> str:
    """Return a text in quotes and in one line, its middle left out if it is long."""
    line = " ".join(text.split())
    if len(line) > UNREAD_CHARACTERS:
        half = UNREAD_CHARACTERS // 2
        line = f"{line[:half]} … {line[-half:]}"
    return f'"{line}"'


def open_lines(path: Path, mode: str = "r") -> IO[str]:
    """Open a file of JSON lines: UTF-8, with the same line ends on every system."""
    return path.open(mode, encoding="utf-8", newline="\n")


def train_line(question: str, answer: str) -> str:
    """Return a line of train_data.jsonl. Two texts alone are encoded faster than an object."""
    return f'{{"Question": {ENCODER.encode(question)}, "Answer": {ENCODER.encode(answer)}}}\n'


def write_line(file: IO[str], value: dict[str, Any]) -> None:
    """Write a value as one line of JSON."""
    file.write(ENCODER.encode(value) + "\n")
