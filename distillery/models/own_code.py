"""Python code that a model brings along: its digest, and what is refused even where it may run."""

import json
import re
from pathlib import Path

from distillery.errors import TrainingError
from distillery.records import is_relative_name
from distillery.storage.digests import FileEntry, digest_of_files, sha256_of

SETTINGS = "*config.json"
"""The files whose auto_map says which code is loaded."""


def code_digest(folder: Path) -> str:
    """Return the SHA-256 (hex) of a folder's Python code and of the settings that say which of it
    is loaded. Weights are left out: they run nothing, and reading them takes long.

    Raises TrainingError for a name that another system could not write."""
    entries = []
    for path in sorted([*folder.rglob("*.py"), *folder.glob(SETTINGS)]):
        name = path.relative_to(folder).as_posix()
        if not is_relative_name(name):
            raise TrainingError(
                f"{folder}: {name!r}: a file's name may have no backslash and begin with no drive; "
                "rename it"
            )
        size = path.stat().st_size
        entries.append(FileEntry(path=name, sha256=sha256_of(path), bytes=size))
    return digest_of_files(tuple(entries))


def refuse_code_elsewhere(folder: Path, title: str) -> None:
    """Raise TrainingError where an auto_map leads to the code of another repository, which the
    commit or digest of this model does not fix. `title` names the model."""
    for file in sorted(folder.glob(SETTINGS)):
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # What loads it says what is wrong.
            continue
        named = settings.get("auto_map") if isinstance(settings, dict) else None
        elsewhere = re.search(r'([^"]*?)--', json.dumps(named))
        if elsewhere:
            raise TrainingError(
                f"{title}: {file.name} takes its Python code from another repository, "
                f"{elsewhere[1]}, of which no commit is named; copy the model and that code into "
                "a folder, without the name of the repository in auto_map, and give the folder"
            )


def refuse_added_code(model: Path, base: Path) -> None:
    """Raise TrainingError where the folder of a trained `model` holds Python code that its base
    model does not: training copies code and changes none."""
    refuse_code_elsewhere(model, str(model))
    for path in sorted(model.rglob("*.py")):
        original = base / path.relative_to(model)
        if not original.is_file() or original.read_bytes() != path.read_bytes():
            raise TrainingError(
                f"{path}: Python code that the base model does not hold; remove this checkpoint "
                "from the store, and run again to train it anew"
            )
