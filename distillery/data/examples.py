"""data/examples"""

from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from distillery.data.readers import cause_of
from distillery.errors import DataError
from distillery.records import Example


def read_examples(path: Path) -> list[Example]:
    """The rows of a file that `prepare` wrote. Raises DataError with the file and line."""
    return list(each_example(path))


def each_example(path: Path) -> Iterator[Example]:
    """The same, one at a time."""
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _example(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: can't be read ({cause_of(error)}); prepare the data set again"
        ) from error


def _example(line: str, where: str) -> Example:
    try:
        return Example.model_validate_json(line)
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(str(part) for part in detail["loc"]) or "line"
        raise DataError(f"{where}: {field}: {detail['msg']}; prepare the data set again") from error
