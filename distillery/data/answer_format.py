"""How the written answers of task.kind: extract and generate look."""

import json
from pathlib import Path

from distillery.answers import check_schema
from distillery.data.readers import cause_of
from distillery.errors import DataError
from distillery.recipe import TaskRecipe
from distillery.records import AnswerFormat
from distillery.storage.allowed import public_path

LARGEST_SCHEMA = 1_000_000
"""Bytes of a file with a schema, at most."""


def named_format(task: TaskRecipe) -> AnswerFormat | None:
    """Return the format of the answers; None where they are chosen. Raises what `with_schema`
    raises."""
    if not task.writes:
        return None
    schema = with_schema(task).answer_schema
    return AnswerFormat(
        max_tokens=task.max_tokens,
        json_schema=schema if isinstance(schema, dict) else None,
        metric=task.metric or ("field_f1" if task.kind == "extract" else "rouge_l"),
    )


def with_schema(task: TaskRecipe) -> TaskRecipe:
    """Return the task with the schema itself in place of the file that holds it, so that cache keys
    go by its content. Raises DataError for a file that can't be read or holds no schema of
    objects."""
    name = task.answer_schema
    if not isinstance(name, str):
        return task
    schema = read_schema(public_path(name, "task.schema", ".json"))
    return task.model_copy(update={"answer_schema": schema})


def read_schema(path: Path) -> dict[str, object]:
    """Return the schema in a JSON file. Raises DataError."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_SCHEMA + 1)
        if len(content) > LARGEST_SCHEMA:
            raise DataError(f"{path}: more than {LARGEST_SCHEMA:,} bytes; correct task.schema")
        schema = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        cause = cause_of(error) if isinstance(error, OSError) else f"no JSON: {error}"
        raise DataError(f"{path}: can't be read ({cause}); correct task.schema") from error
    if not isinstance(schema, dict):
        raise DataError(f"{path}: no JSON Schema, which is an object; correct task.schema")
    try:
        check_schema(schema)
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply; correct task.schema") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}; correct task.schema") from error
    return schema
