"""The classes that task.labels names."""

from pathlib import Path

from distillery.errors import DataError
from distillery.recipe import TaskRecipe
from distillery.storage.allowed import public_path


def named_classes(task: TaskRecipe) -> tuple[str, ...] | None:
    """Return the classes in the order given, that of task.other last; None where they are those
    found in the rows.

    Raises DataError for a file that can't be read, or names fewer than two classes, one twice or
    that of task.other."""
    labels = with_labels(task).labels
    if labels is None or isinstance(labels, str):
        return None
    names = checked(labels, "task.labels", task)
    return (*names, task.other.label) if task.other else names


def with_labels(task: TaskRecipe) -> TaskRecipe:
    """Return the task with the classes themselves in place of the file that names them, so that
    cache keys go by its content. Raises what `named_classes` raises."""
    name = task.labels
    if not isinstance(name, str):
        return task
    path = public_path(name, "task.labels", ".txt")
    return task.model_copy(update={"labels": checked(read_names(path), name, task)})


def checked(names: tuple[str, ...], where: str, task: TaskRecipe) -> tuple[str, ...]:
    """Return the names of classes without blanks around them. Raises DataError, which begins with
    `where`, for names that are no classes."""
    names = tuple(name.strip() for name in names)
    if len(names) < 2 or "" in names:
        raise DataError(f"{where}: name at least two classes, none of them empty")
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{where}: the class {name!r} is named twice; remove one")
    if task.other and task.other.label in names:
        raise DataError(
            f"{where}: the class {task.other.label!r} is that of task.other; remove it here, or "
            "choose another task.other.label"
        )
    return names


def read_names(path: Path) -> tuple[str, ...]:
    """Return the lines of a text file that are not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: can't be read as text ({type(error).__name__}); correct task.labels"
        ) from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())
