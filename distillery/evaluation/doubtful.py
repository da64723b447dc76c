"""Which labels may be wrong, by confident learning, and a file in which to correct them.

Confident learning (Northcutt, Jiang, Chuang, Confident Learning: Estimating Uncertainty in Dataset
Labels, JAIR 70, 2021), as cleanlab implements it: a label is doubtful where a predictor gives
another class at least the probability that it gives this class on average in the rows labelled so.
The probabilities must be of rows that the predictor has not learnt from.

doubtful.jsonl: a Doubtful a line. doubtful.csv: the same to correct, in the columns that the recipe
reads, and then
  suggested       the contradicting answer
  confidence      its probability, 0 to 1
  split           gold, validation or test
  contradicted_by the predictors, separated by commas
A cell that a spreadsheet would run as a formula starts with a no-break space. Reading the rows
removes it as it removes all white space around a text.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distillery.evaluation.scoring import Probabilities
from distillery.recipe import Columns
from distillery.records import LETTERS, Example, Record

DOUBTFUL_FILE = "doubtful.csv"
DOUBTFUL_ROWS_FILE = "doubtful.jsonl"

FORMULA_STARTS = tuple("=+-@\t\r＝＋－＠")
"""What a spreadsheet takes for the start of a formula (OWASP, CSV Injection)."""

NO_BREAK_SPACE = "\u00a0"

LEAST_KAPPA = 0.2
"""The least agreement with the labels beyond chance (Cohen's kappa) of a predictor whose doubts
count; below it, agreement is slight at best (Landis and Koch, The Measurement of Observer Agreement
for Categorical Data, 1977)."""


class Opinion(Record):
    """A predictor's answer to a row and its probability, None where it gives none. `contradicts`:
    confident learning takes it as saying that the label is wrong."""

    answer: str
    confidence: float | None = None
    contradicts: bool = False


class Doubtful(Record):
    """A row whose label, `example.answer_key`, is contradicted with confidence.

    `opinions`: by predictor. `suggested`: the answer of the most confident that contradicts, and
    its `confidence` (0 to 1). `label_confidence`: the probability of the label by the predictor
    that contradicts it most."""

    example: Example
    split: str
    suggested: str
    confidence: float
    label_confidence: float
    opinions: dict[str, Opinion]

    @property
    def contradicted_by(self) -> list[str]:
        return [name for name, opinion in self.opinions.items() if opinion.contradicts]

    def text_of(self, answer: str) -> str:
        """Return what an answer is called: the option's text, or the class."""
        choices = self.example.choices
        return choices[LETTERS.index(answer)] if choices else answer


def doubtful_rows(
    split: str,
    examples: Sequence[Example],
    probabilities: Mapping[str, Sequence[Probabilities]],
    answers: Mapping[str, Sequence[str | None]] | None = None,
) -> list[Doubtful]:
    """Return the rows of a split whose labels a predictor contradicts with confidence.

    `probabilities` of each row's keys, by predictor, are what contradicts. `answers` are those of
    predictors whose answers stand in the table even where they have no probabilities."""
    opinions: list[dict[str, Opinion]] = [{} for _ in examples]
    least = [1.0] * len(examples)
    for name, letters in (answers or {}).items():
        for row, letter in zip(opinions, letters, strict=True):
            if letter is not None:
                row[name] = Opinion(answer=letter)
    for name, shares in probabilities.items():
        contradicted = set(label_issues(examples, shares))
        for number, share in enumerate(shares):
            if share is not None:
                best = max(range(len(share)), key=share.__getitem__)
                opinions[number][name] = Opinion(
                    answer=examples[number].keys[best],
                    confidence=round(share[best], 6),
                    contradicts=number in contradicted,
                )
        for number in contradicted:
            label = examples[number].keys.index(str(examples[number].answer_key))
            least[number] = min(least[number], (shares[number] or ())[label])
    found = []
    for example, row, label_confidence in zip(examples, opinions, least, strict=True):
        against = [opinion for opinion in row.values() if opinion.contradicts]
        if against:
            surest = max(against, key=lambda opinion: opinion.confidence or 0)
            found.append(
                Doubtful(
                    example=example,
                    split=split,
                    suggested=surest.answer,
                    confidence=surest.confidence or 0,
                    label_confidence=round(label_confidence, 6),
                    opinions=row,
                )
            )
    return found


def label_issues(examples: Sequence[Example], shares: Sequence[Probabilities]) -> list[int]:
    """Return the positions of the examples whose label the probabilities contradict; none where
    they hardly agree with the labels (LEAST_KAPPA). Rows without a label or without probabilities
    are passed over."""
    import numpy as np
    from cleanlab.filter import find_label_issues
    from sklearn.metrics import cohen_kappa_score

    known = []
    for number, (example, share) in enumerate(zip(examples, shares, strict=True)):
        if example.answer_key in example.keys and share is not None and sum(share) > 0:
            known.append(number)
    if not known:
        return []
    labels = np.zeros(len(known), dtype=int)
    # Rows of choices may have options of different number.
    matrix = np.zeros((len(known), max(len(examples[number].keys) for number in known)))
    for position, number in enumerate(known):
        row = np.asarray(shares[number])
        labels[position] = examples[number].keys.index(str(examples[number].answer_key))
        matrix[position, : len(row)] = row / row.sum()
    # Of a predictor that says the same of all rows, kappa is not defined.
    if not cohen_kappa_score(labels, matrix.argmax(axis=1)) >= LEAST_KAPPA:
        return []
    issues = find_label_issues(labels, matrix, filter_by="confident_learning", n_jobs=1)
    return [number for number, issue in zip(known, issues, strict=True) if issue]


def write_doubtful(
    out: Path, rows: Sequence[Doubtful], columns: Columns, fields: Sequence[str]
) -> None:
    """Write doubtful.jsonl and, if there are rows, doubtful.csv into the folder `out`: first the
    rows that most predictors contradict, and of these those whose label is the least probable.

    `columns` and `fields` are those of the recipe's dataset."""
    ordered = sorted(rows, key=weight)
    with (out / DOUBTFUL_ROWS_FILE).open("w", encoding="utf-8", newline="\n") as file:
        for row in ordered:
            file.write(row.model_dump_json() + "\n")
    if not ordered:
        return
    lines = [to_cells(row, columns, fields) for row in ordered]
    names: dict[str, None] = {}
    for line in lines:
        names.update(dict.fromkeys(line))
    # Without the byte order mark, Excel takes the text for another encoding.
    with (out / DOUBTFUL_FILE).open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def weight(row: Doubtful) -> tuple[int, float, str, str]:
    """Return what rows are sorted by."""
    return -len(row.contradicted_by), row.label_confidence, row.split, row.example.example_id


def to_cells(row: Doubtful, columns: Columns, fields: Sequence[str]) -> dict[str, Any]:
    """Return a row of doubtful.csv by column."""
    example = row.example
    cells = {columns.id or "id": example.example_id}
    if columns.question:
        cells[columns.question] = example.question
    for name in fields:
        cells[name] = example.fields.get(name, "")
    if columns.concept and example.concept:
        cells[columns.concept] = example.concept
    if columns.choices:
        # With task.kind: classify, the options' texts are the classes.
        options = {"label": example.keys, "text": example.options}
        cells[columns.choices] = json.dumps(options, ensure_ascii=False)
    cells[columns.answer] = str(example.answer_key)
    further = {
        "suggested": row.suggested,
        "confidence": f"{row.confidence:.3f}",
        "split": row.split,
        "contradicted_by": ", ".join(row.contradicted_by),
    }
    for name, text in further.items():
        # A column of the user's own keeps its name.
        while name in cells:
            name += "_"
        cells[name] = text
    return {name: guarded(text) for name, text in cells.items()}


def guarded(text: str) -> str:
    """Return a text that no spreadsheet runs."""
    if text.startswith(FORMULA_STARTS):
        return NO_BREAK_SPACE + text
    return text
