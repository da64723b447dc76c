"""storage/working"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distillery.errors import StoreError
from distillery.settings import LocalSettings
from distillery.storage.files import NO_ROOM

_NO_ROOM = re.compile("|".join(map(os.strerror, NO_ROOM)))


@contextmanager
def working_folder(purpose: str) -> Iterator[Path]:
    """A scratch folder on the disk that holds DISTILLERY_HOME, removed afterwards whatever happens.

    Raises StoreError where the disk is full, whichever library found it so."""
    parent = LocalSettings().folder / "work"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{purpose}-", dir=parent))
    except OSError as error:
        raise StoreError(
            f"DISTILLERY_HOME {parent.parent}: can't be written ({error.strerror}); set another"
        ) from error
    try:
        yield folder
    except StoreError:
        raise
    except Exception as error:
        if not (reason := _no_room(error)):
            raise
        raise StoreError(
            f"{parent}: the disk is full ({reason}); free some space or move DISTILLERY_HOME, then run again"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _no_room(error: BaseException | None) -> str:
    """What the system said of a disk without room, of which safetensors and shutil keep no errno; or nothing."""
    while error:
        if found := _NO_ROOM.search(str(error)):
            return found[0]
        error = error.__cause__ or error.__context__
    return ""
