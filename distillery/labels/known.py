"""labels/known"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from distillery.data.readers import read_columns
from distillery.errors import DataError
from distillery.labels.files import LabelCounts, label_files
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example, TeacherLabel


def label_from(
    examples: Iterable[Example],
    labels: dict[str, TeacherLabel],
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    out: Path,
) -> LabelCounts:
    """The same files from labels that are there already; a row without one is rejected."""
    with label_files(out, prompt, recipe) as files:
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
            raise DataError(
                f"{where}: answer: {answer!r} is none of {row.letters[0]} to {row.letters[-1]}"
            )
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
