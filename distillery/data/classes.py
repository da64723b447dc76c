"""The classes that task.labels names."""

from pathlib import Path

from distillery.errors import DataError
from distillery.recipe import TaskRecipe
from distillery.storage.allowed import is_limited, local_path


def named_classes(task: TaskRecipe) -> tuple[str, ...] | None:
    """Return the classes in the order given, that of task.other last; None where they are those
    found in the rows.

    Raises DataError for a file that can't be read, or names fewer than two classes, one twice or
    that of task.other."""
    if task.labels is None:
        return None
    where = "task.labels"
    names = task.labels
    if isinstance(names, str):
        where = names
        path = local_path(names, "task.labels")
        # Its lines become public: no other file may be taken for a list of classes.
        if is_limited() and path.suffix.lower() != ".txt":
            raise DataError(f"task.labels: {names}: this worker takes a file that ends in .txt")
        names = read_names(path)
    names = tuple(name.strip() for name in names)
    if len(names) < 2 or "" in names:
        raise DataError(f"{where}: name at least two classes, none of them empty")
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{where}: the class {name!r} is named twice; remove one")
    if task.other is None:
        return names
    if task.other.label in names:
        raise DataError(
            f"{where}: the class {task.other.label!r} is that of task.other; remove it here, or "
            "choose another task.other.label"
        )
    return (*names, task.other.label)


def read_names(path: Path) -> tuple[str, ...]:
    """Return the lines of a text file that are not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: can't be read as text ({type(error).__name__}); correct task.labels"
        ) from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())
