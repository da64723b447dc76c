"""JSONL files of records.Example, one a line, as `prepare` writes them."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from distillery.data.readers import cause_of
from distillery.errors import DataError
from distillery.records import CLASSES_FILE, FORMAT_FILE, AnswerFormat, Example


def read_examples(path: Path) -> list[Example]:
    """Return the rows of a file. Raises DataError with the file and line."""
    return list(each_example(path))


def each_example(path: Path) -> Iterator[Example]:
    """Yield the rows of a file one by one. Raises DataError with the file and line."""
    classes, answer_format = read_classes(path.parent), read_format(path.parent)
    shared = {"classes": classes, "format": answer_format}
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    example = parse_example(line, f"{path}:{number}")
                    yield example.model_copy(update=shared)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: can't be read ({cause_of(error)}); prepare the data set again"
        ) from error


def write_examples(examples: Sequence[Example], path: Path) -> None:
    """Write Examples to a file that `read_examples` reads, with their classes or the format of
    their answers beside it."""
    write_lines((example.model_dump_json() for example in examples), path)
    if examples and examples[0].classes:
        write_classes(path.parent, examples[0].classes)
    if examples and examples[0].format:
        write_format(path.parent, examples[0].format)


def write_lines(lines: Iterable[str], path: Path) -> None:
    """Write Examples in JSON to a file."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for line in lines:
            file.write(f"{line}\n")


def write_classes(folder: Path, classes: Sequence[str]) -> None:
    """Write classes.json, which `read_examples` reads."""
    text = json.dumps(classes, ensure_ascii=False, indent=1) + "\n"
    (folder / CLASSES_FILE).write_text(text, encoding="utf-8", newline="\n")


def read_classes(folder: Path) -> tuple[str, ...]:
    """Return the classes of the rows in a folder, () for rows of choices. Raises DataError."""
    path = folder / CLASSES_FILE
    if not path.exists():
        return ()
    try:
        return TypeAdapter(tuple[str, ...]).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{path}: no list of classes; prepare the data set again") from error


def write_format(folder: Path, answer_format: AnswerFormat) -> None:
    """Write format.json, which `read_examples` reads."""
    text = answer_format.model_dump_json(indent=1) + "\n"
    (folder / FORMAT_FILE).write_text(text, encoding="utf-8", newline="\n")


def read_format(folder: Path) -> AnswerFormat | None:
    """Return the format of the answers to the rows in a folder, or of the answers that the model in
    it writes; None where they are chosen. Raises DataError."""
    path = folder / FORMAT_FILE
    if not path.exists():
        return None
    try:
        return AnswerFormat.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(
            f"{path}: no format of answers; prepare the data set, or export the model, again"
        ) from error


def parse_example(line: str, where: str) -> Example:
    """Return a line as an Example. Raises DataError, whose text starts with `where`."""
    try:
        return Example.model_validate_json(line)
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(map(str, detail["loc"])) or "line"
        raise DataError(f"{where}: {field}: {detail['msg']}; prepare the data set again") from error
