"""Turn a row as read into a valid Example, or say what is wrong with it.

Columns in, named in dataset.columns. With task.kind: choice the defaults are those of
tau/commonsense_qa:
  id                 text or a whole number; rows without this column are named by their content
  question           text
  question_concept   text, optional
  choices            {"label": [...], "text": [...]} or a list of texts, 2 to 26; also either of
                     them as a JSON string (CSV). Texts may repeat, as in one row of 75 of
                     CommonsenseQA: the teacher is asked for the letter
  answerKey          one of the labels, or an option's text; empty or missing if unknown
Labels become letters by position.

With task.kind: classify the defaults are:
  id                 as above
  text               text; or several columns, named in dataset.fields
  label              one of task.labels; empty or missing if unknown

With task.kind: extract or generate the defaults are:
  id, text           as above
  answer             the text; for extract a JSON object that meets task.schema, or its JSON text;
                     empty or missing if unknown
"""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distillery.answers import NotAnAnswer, canonical
from distillery.data.readers import Table, has_surrogates, listed, shown
from distillery.errors import DataError
from distillery.recipe import Columns
from distillery.records import LETTERS, AnswerFormat, Example, digest_of


@dataclass(frozen=True, slots=True)
class Row:
    """A valid row on its way through preparation.

    `where` is FILE:LINE. `content` is what `content_of_row` returns. `position` in [0, 1) decides
    the row's split; see `position_of`.
    """

    where: str
    example: Example
    content: str
    position: float


@dataclass(frozen=True)
class RowReader:
    """What turns the values of a row into an Example: the columns of task.kind, the further columns
    in dataset.fields and, for classify, the classes, where None lets a label be any text; for
    extract and generate, the format of the answers."""

    columns: Columns
    fields: tuple[str, ...] = ()
    classify: bool = False
    classes: tuple[str, ...] | None = None
    format: AnswerFormat | None = None

    def needed(self, role: str) -> dict[str, str]:
        """Return the columns that rows of a role must have, by setting."""
        needed = {}
        if self.columns.question:
            needed["question"] = self.columns.question
        if self.columns.choices:
            needed["choices"] = self.columns.choices
        if role not in ("train", "inference"):
            needed["answer"] = self.columns.answer
        return needed


def validated_rows(
    table: Table,
    reader: RowReader,
    role: str,
    seed: int,
    refuse_columns: Callable[[Table, RowReader], None] | None = None,
) -> Iterator[Row]:
    """Yield the rows of a table, which will serve in `role`, as they are read.

    Raises DataError once all are read: a malformed row counts before a missing column, and that
    before what else is wrong with a row. `refuse_columns` raises another error for a missing
    column."""
    columns = reader.columns
    unanswered = without_id = None
    wrong: DataError | None = None
    for where, values in table.rows:
        if wrong:
            continue
        try:
            example = to_example(values, reader, where)
        except DataError as error:
            wrong = error
            continue
        if columns.id is not None and columns.id not in values:
            without_id = without_id or where
        content = content_of_row(example)
        row = Row(where, example, content, position_of(content, seed))
        if role != "train" and example.answer_key is None:
            unanswered = unanswered or row
        yield row
    if refuse_columns:
        refuse_columns(table, reader)
    refuse_missing_columns(table.name, list(table.columns), reader.needed(role), reader.fields)
    if without_id and columns.id in table.columns:
        to_text(None, f"{without_id}: {columns.id}")
    if wrong:
        raise wrong
    if unanswered:
        refuse_unanswered(unanswered, columns.answer, role)


def refuse_missing_columns(
    table: str, present: Sequence[str], needed: Mapping[str, str], fields: Sequence[str] = ()
) -> None:
    """Raise DataError if a column is not there. `needed` maps settings to columns."""
    for setting, column in needed.items():
        if column not in present:
            raise DataError(
                f"{table}: no column {column!r}, only {listed(present)}; "
                f"set dataset.columns.{setting} to the one that is meant"
            )
    for column in fields:
        if column not in present:
            raise DataError(
                f"{table}: no column {column!r}, only {listed(present)}; correct dataset.fields"
            )


def refuse_unanswered(row: Row, column: str, role: str) -> None:
    """Raise DataError if the role needs an answer and the row has none."""
    if role != "train" and row.example.answer_key is None:
        raise DataError(
            f"{row.where}: {column}: empty, but rows of {role} need an answer; "
            f"fill it in, or set dataset.splits.{role} to a split with answers"
        )


def to_example(values: Mapping[str, Any], reader: RowReader, where: str) -> Example:
    """Return a row as an Example; its answer may be missing.

    A row without the column of ids is named by its content. Raises DataError, whose text starts
    with `where`.
    """
    columns = reader.columns
    fields = to_fields(values, reader.fields, where)
    if columns.question:
        question = to_text(values.get(columns.question), f"{where}: {columns.question}")
    else:
        question = "\n".join(text for text in fields.values() if text)
        if not question:
            raise DataError(
                f"{where}: {', '.join(fields)}: all empty; fill one in or remove the row"
            )
    choices: tuple[str, ...] = ()
    answer, answer_at = values.get(columns.answer), f"{where}: {columns.answer}"
    if columns.choices:
        labels, choices = to_options(values.get(columns.choices), f"{where}: {columns.choices}")
        answer = to_letter(answer, labels, choices, answer_at)
    if reader.classify:
        if columns.choices and answer is not None:
            answer = choices[LETTERS.index(answer)]
        choices = ()
        answer = to_class(answer, reader.classes, answer_at)
    if reader.format:
        answer = to_written(answer, reader.format, answer_at)
    concept = ""
    if columns.concept and values.get(columns.concept) not in (None, ""):
        concept = to_text(values[columns.concept], f"{where}: {columns.concept}")
    example_id = ""
    if columns.id is not None and columns.id in values:
        example_id = to_text(values.get(columns.id), f"{where}: {columns.id}")
    example = Example(
        example_id=example_id,
        question=question,
        concept=concept,
        choices=choices,
        answer_key=answer,
        fields=fields,
        classes=reader.classes or (),
        format=reader.format,
    )
    if example_id:
        return example
    return example.model_copy(update={"example_id": content_of_row(example)})


def to_fields(values: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, str]:
    """Return the columns in dataset.fields by name, "" for those that a row lacks. Numbers and
    truth values become text."""
    fields = {}
    for name in names:
        value = values.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            fields[name] = ""
        elif isinstance(value, bool | float):
            fields[name] = str(value)
        else:
            fields[name] = to_text(value, f"{where}: {name}")
    return fields


def to_class(value: Any, classes: Sequence[str] | None, where: str) -> str | None:
    """Return the class that a label names, or None if it is empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool):
        value = str(value)
    label = to_text(value, where)
    if classes is not None and label not in classes:
        raise DataError(
            f"{where}: {shown(label)} is none of the {len(classes)} classes in task.labels; "
            "correct the row, or add the class there"
        )
    return label


def to_written(value: Any, answer_format: AnswerFormat, where: str) -> str | None:
    """Return a written answer as it is trained and compared, or None if it is empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if answer_format.json_schema is not None and isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False)
    text = to_text(value, where)
    try:
        return canonical(text, answer_format.json_schema)
    except NotAnAnswer as error:
        cause = error.__cause__
        what = f"{error} ({cause})" if isinstance(cause, json.JSONDecodeError) else str(error)
        raise DataError(f"{where}: {what}; correct the row") from error


def to_text(value: Any, where: str) -> str:
    """Return the text without white space around it; a whole number counts as text."""
    if value is None:
        raise DataError(f"{where}: missing; fill it in or remove the row")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: {type(value).__name__} where text belongs; correct the row")
    text = str(value).strip()
    if not text:
        raise DataError(f"{where}: empty; fill it in or remove the row")
    if has_surrogates(text):
        raise DataError(
            f"{where}: half of a surrogate pair, which is no character; correct the row"
        )
    if "\0" in text:
        raise DataError(f"{where}: a NUL character, which no text has; correct the row")
    return text


def to_options(value: Any, where: str) -> tuple[list[str], tuple[str, ...]]:
    """Return the labels and the texts of a row's options."""
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where}: empty; fill it in or remove the row")
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: no JSON ({error}); "
                'write {"label": [...], "text": [...]} or a list of texts'
            ) from error
    labels = None
    if isinstance(value, dict):
        labels, value = value.get("label"), value.get("text")
    if not isinstance(value, list):
        raise DataError(f'{where}: neither {{"label": [...], "text": [...]}} nor a list of texts')
    if not 2 <= len(value) <= len(LETTERS):
        raise DataError(f"{where}: {len(value)} options; there must be 2 to {len(LETTERS)}")
    texts = tuple(to_text(text, f"{where}: option {n}") for n, text in enumerate(value, 1))
    return to_labels(labels, len(texts), where), texts


def to_labels(value: Any, count: int, where: str) -> list[str]:
    """Return the labels of `count` options; without any, the letters."""
    if value is None:
        return list(LETTERS[:count])
    if not isinstance(value, list) or len(value) != count:
        raise DataError(
            f"{where}: the labels are not as many as the {count} texts; correct the row"
        )
    labels = [to_text(label, f"{where}: label {n}") for n, label in enumerate(value, 1)]
    if len(set(labels)) < count:
        raise DataError(
            f"{where}: two options of one label among {listed(labels)}; correct the row"
        )
    return labels


def to_letter(value: Any, labels: Sequence[str], texts: Sequence[str], where: str) -> str | None:
    """Return the letter of the option whose label is `value`, or else whose text alone is; None if
    it is empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    label = to_text(value, where)
    if label in labels:
        return LETTERS[labels.index(label)]
    if texts.count(label) == 1:
        return LETTERS[texts.index(label)]
    what = "the text of several options, so write the label" if label in texts else "no option"
    told = [f"{shown(name)} ({shown(text)})" for name, text in zip(labels, texts, strict=True)]
    raise DataError(f"{where}: {shown(label)} is {what}; the options are {', '.join(told)}")


def content_of_row(example: Example) -> str:
    """Return the digest that rows of equal content share: of what is asked and of the options; see
    `asked_text`."""
    return content_of(asked_text(example), example.choices)


def asked_text(example: Example) -> str:
    """Return the text by which rows are compared: the question, and where answers are written, the
    further columns, since many rows may have one instruction in common."""
    if example.format is None:
        return example.question
    return "\n".join([example.question, *example.fields.values()])


def content_of(question: str, choices: Sequence[str]) -> str:
    """Return the digest of a question and of options, whatever their order, without regard to case,
    width of characters and white space."""
    return digest_of([normalised(question), sorted(map(normalised, choices))])


def normalised(text: str) -> str:
    """Return the text in NFKC and lower case, with single spaces between words."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def position_of(content: str, seed: int) -> float:
    """Return a number in [0, 1): SHA-256 of the seed and the content, divided by 2^256."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{content}".encode()).digest()) / 2**256
