"""Labels that exist already: in files of the user's, or as the gold answers of the rows."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distillery.data.answer_tokens import AnswerToken, packed, spelled, tokens_in, unpacked
from distillery.data.readers import has_surrogates, read_columns, shown
from distillery.data.rows import to_written
from distillery.errors import DataError
from distillery.labels.files import LabelCounts, label_files
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import AnswerFormat, Example, TeacherLabel
from distillery.teacher.written_tokens import merged, tokens_of_label

COLUMNS = {
    "example_id": "the row's id in the data set",
    "answer": "the teacher's letter, class or text",
}
"""The columns that a file of labels must have, and what they are."""

TOKEN_COLUMNS = ("tokens", "candidates", "logs")
"""The columns of a written answer's tokens, as in data/answer_tokens.py."""


def write_known_labels(
    examples: Iterable[Example],
    labels: dict[str, TeacherLabel],
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    out: Path,
    tokens: Mapping[str, bytes] | None = None,
) -> LabelCounts:
    """Write the files of a labelling from `labels` (by example_id); reject rows without one.
    `tokens`: those of written labels, packed, by example_id."""
    packed_tokens = tokens or {}
    with label_files(out, prompt, recipe) as files:
        for row in examples:
            label = labels.get(row.example_id)
            if label:
                found = packed_tokens.get(row.example_id)
                files.accept(row, label, unpacked(found) if found else None)
            else:
                files.reject(row, "no label for it")
        files.finish()
    return LabelCounts(accepted=files.tally.accepted, rejected=files.tally.rejected.total())


def read_label_files(
    paths: Sequence[str], examples: Iterable[Example]
) -> tuple[dict[str, TeacherLabel], dict[str, bytes]]:
    """Return the labels for `examples` in JSONL, CSV or Parquet files, by example_id, and the
    tokens of written ones, packed.

    Columns: example_id; answer, a letter or class; optionally distribution, the probability of each
    as a mapping or as JSON; optionally rationale, a text. Where answers are written, answer is the
    text, or a JSON object or its text; optionally references, further texts as a list or as JSON; a
    Parquet file may have their tokens in the columns of data/answer_tokens.py, and needs no answer
    then; distribution and rationale are passed over. Of two labels for a row the later one counts.
    Rows that are not in `examples` are left out. Raises DataError with the file and the row.
    """
    rows = {row.example_id: row for row in examples}
    labels: dict[str, TeacherLabel] = {}
    tokens: dict[str, bytes] = {}
    for where, values in read_columns(paths, {"example_id": COLUMNS["example_id"]}):
        answer = values.get("answer")
        if answer in (None, "") and not has_tokens(values):
            raise DataError(f"{where}: answer: missing; it is {COLUMNS['answer']}")
        row = rows.get(str(values["example_id"]))
        if row is None:
            continue
        if row.format:
            written = read_tokens(values, where) if has_tokens(values) else ()
            if answer in (None, ""):
                answer = spelled(written).decode("utf-8", "replace")
            text = to_written(answer, row.format, f"{where}: answer")
            if text is None:
                continue
            earlier = labels.get(row.example_id)
            if earlier and earlier.answer != text:
                tokens.pop(row.example_id, None)
            labels[row.example_id] = TeacherLabel(
                example_id=row.example_id,
                answer=text,
                references=read_references(values.get("references"), text, row.format, where),
            )
            found = tokens_of_label(written, text, row.format.json_schema)
            if found:
                tokens[row.example_id] = packed(found)
            elif written:
                raise DataError(f"{where}: tokens: do not spell the answer; correct the row")
            continue
        answer = str(answer).strip()
        if answer not in row.keys:
            known = f"{row.keys[0]} to {row.keys[-1]}"
            if row.classes:
                known = f"the {len(row.classes)} classes"
            raise DataError(f"{where}: answer: {shown(answer)} is none of {known}")
        probabilities = read_probabilities(values.get("distribution"), row.keys, where)
        labels[row.example_id] = TeacherLabel(
            example_id=row.example_id,
            answer=answer,
            distribution=probabilities,
            confidence=probabilities[answer] if probabilities else None,
            rationale=read_rationale(values.get("rationale"), where),
        )
    return labels, tokens


def read_references(
    value: Any, answer: str, answer_format: AnswerFormat, where: str
) -> tuple[str, ...]:
    """Return the further texts of a written label, each once and without `answer`, from a list or
    its JSON. Raises DataError, with `where`, for anything else."""
    try:
        if isinstance(value, str) and value:
            value = json.loads(value)
    except (ValueError, RecursionError):
        pass
    if value in (None, ""):
        return ()
    if not isinstance(value, list):
        raise DataError(
            f"{where}: references: no list of texts, nor its JSON; correct the row or leave the "
            "column out"
        )
    texts = [to_written(each, answer_format, f"{where}: references") for each in value]
    return tuple(dict.fromkeys(text for text in texts if text and text != answer))


def has_tokens(values: Mapping[str, Any]) -> bool:
    """Return whether a row has all columns of a written answer's tokens."""
    return all(values.get(name) is not None for name in TOKEN_COLUMNS)


def read_tokens(values: Mapping[str, Any], where: str) -> tuple[AnswerToken, ...]:
    """Return the tokens of a written answer in a row of a file.

    Raises DataError, with `where`, for values of other types and for logarithms that are none of
    probabilities."""
    try:
        tokens = []
        for text, candidates in tokens_in(values):
            for other, log in ((text, 0.0), *candidates):
                if not isinstance(other, bytes) or not -math.inf <= log <= 0:
                    raise ValueError("no bytes, or no logarithm of a probability")
            possible = [(other, float(log)) for other, log in candidates if log > -math.inf]
            tokens.append(AnswerToken(text, merged(possible)))
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"{where}: tokens: can't be read ({type(error).__name__}); write them as "
            "answer_tokens.parquet has them"
        ) from error
    return tuple(tokens)


def read_rationale(value: Any, where: str) -> str | None:
    """Return a reason as text; None if there is none. Raises DataError, with `where`, for a text
    that UTF-8 can't express."""
    text = str(value or "").strip()
    if has_surrogates(text):
        raise DataError(
            f"{where}: rationale: half of a surrogate pair, which is no character; correct the row"
        )
    return text or None


def read_probabilities(value: Any, letters: Sequence[str], where: str) -> dict[str, float] | None:
    """Return the probability of each letter from a mapping or its JSON; None if there is nothing.

    Raises DataError, with `where`, for anything else than probabilities that sum to 1.
    """
    try:
        if isinstance(value, str) and value:
            value = json.loads(value)
        if not value:
            return None
        probabilities = {letter: float(value[letter]) for letter in letters}
    except (ValueError, ArithmeticError, LookupError, TypeError, RecursionError):
        probabilities = {}
    if not math.isclose(sum(probabilities.values()), 1, abs_tol=1e-3) or (
        min(probabilities.values()) < 0
    ):
        raise DataError(
            f"{where}: distribution: must be probabilities of {letters[0]} to {letters[-1]} "
            "that sum to 1"
        )
    return probabilities


def gold_labels(examples: Iterable[Example]) -> dict[str, TeacherLabel]:
    """Return the gold answers as labels, by example_id, for the rows that have one."""
    labels = {}
    for row in examples:
        if row.answer_key:
            labels[row.example_id] = TeacherLabel(example_id=row.example_id, answer=row.answer_key)
    return labels
