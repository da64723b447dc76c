"""What the page of a run reads from the folder of an evaluation: its test rows and its figures
(see evaluation/report.py). Evaluations of earlier versions have neither.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import Field, ValidationError

from distillery.errors import DataError
from distillery.evaluation.doubtful import DOUBTFUL_ROWS_FILE, Doubtful
from distillery.evaluation.report import REPORT_FILE, ROWS_FILE, read_answers
from distillery.evaluation.scoreboard import GOLD, TEACHER
from distillery.recipe import Metric
from distillery.records import LETTERS, Figures, Record


class AnsweredRow(Record):
    """A line of rows.jsonl. `gold` and `answers` are letters or, with `classify`, classes;
    `probabilities` go in the options' order. With `metric`, they are texts, `references` further
    gold answers, and by predictor `scores` has the metric of the row by itself, and `no_answer` why
    there is none."""

    example_id: str
    content: str
    question: str
    choices: tuple[str, ...]
    classify: bool = False
    gold: str
    answers: dict[str, str | None]
    probabilities: dict[str, tuple[float, ...] | None]
    metric: Metric | None = None
    references: tuple[str, ...] = ()
    scores: dict[str, float] = Field({})
    no_answer: dict[str, str] = Field({})

    @property
    def gold_answers(self) -> tuple[str, ...]:
        return (self.gold, *self.references)

    @property
    def keys(self) -> tuple[str, ...]:
        """What an answer may be."""
        return self.choices if self.classify else LETTERS[: len(self.choices)]

    def confidence(self, predictor: str) -> float | None:
        """Return the probability that a predictor gives its answer, or the score of a written
        one; None where there is none."""
        if self.metric is not None:
            return self.scores.get(predictor)
        answer = self.answers.get(predictor)
        probabilities = self.probabilities.get(predictor)
        if answer is None or probabilities is None:
            return None
        return probabilities[self.keys.index(answer)]


@dataclass(frozen=True)
class Evaluated:
    """What is read of an evaluation. `teacher`: its name on the scoreboard. `rows` and `figures`
    are empty for an evaluation of an earlier version. `doubtful`: the rows whose labels may be
    wrong; None for an evaluation that has not looked for them."""

    teacher: str
    notes: tuple[str, ...]
    rows: tuple[AnsweredRow, ...]
    figures: Mapping[str, Figures]
    doubtful: tuple[Doubtful, ...] | None

    @property
    def has_details(self) -> bool:
        """Return whether there is more to show than the scoreboard."""
        return bool(self.rows and self.figures)

    @cached_property
    def metric(self) -> Metric | None:
        """The primary metric where answers are written."""
        return self.rows[0].metric if self.rows else None

    @cached_property
    def shared_choices(self) -> tuple[str, ...] | None:
        """Return the options where all rows have the same ones in the same order."""
        choices = {row.choices for row in self.rows}
        return choices.pop() if len(choices) == 1 else None


def read_evaluation(folder: Path) -> Evaluated:
    """Read the folder of an evaluation. Raises DataError for a file that can't be read."""
    path = folder / REPORT_FILE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        figures = {}
        for name, values in report.get("figures", {}).items():
            figures[name] = Figures.model_validate(values)
        path = folder / ROWS_FILE
        rows = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").split("\n"):
                if line:
                    rows.append(AnsweredRow.model_validate_json(line))
        path = folder / DOUBTFUL_ROWS_FILE
        doubtful = None
        if path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")
            doubtful = tuple(Doubtful.model_validate_json(line) for line in lines if line)
    except (OSError, ValueError, ValidationError) as error:
        raise DataError(
            f"{path}: can't be read as part of an evaluation ({type(error).__name__}); "
            "evaluate again with --refresh evaluate"
        ) from error
    return Evaluated(
        teacher=report.get("teacher", TEACHER),
        notes=tuple(report.get("notes", ())),
        rows=tuple(rows),
        figures=figures,
        doubtful=doubtful,
    )


class ChampionAnswers:
    """A champion's answers.jsonl, whose last column is its own.

    Raises DataError for a file that can't be read."""

    def __init__(self, path: Path) -> None:
        self.rows: dict[str | None, dict[str, str | None]] = {}
        for example_id, row in read_answers(path).items():
            self.rows[row.get("content") or example_id] = row

    def knows(self, row: AnsweredRow) -> bool:
        """Return whether the champion was asked this row. A row is known by its content, or by its
        id where the file has no content; another gold letter tells another order of options."""
        theirs = self.find(row)
        return theirs is not None and theirs.get(GOLD, row.gold) == row.gold

    def answer(self, row: AnsweredRow) -> str | None:
        """Return the champion's letter, None where it gave none."""
        theirs = self.find(row)
        return None if theirs is None else theirs[list(theirs)[-1]]

    def find(self, row: AnsweredRow) -> dict[str, str | None] | None:
        return self.rows.get(row.content, self.rows.get(row.example_id))
