"""Scratch folders on the disk that holds DISTILLERY_HOME."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distillery.errors import StoreError
from distillery.settings import LocalSettings
from distillery.storage.outages import NO_ROOM

NO_ROOM_TEXT = re.compile("|".join(map(os.strerror, NO_ROOM)))


@contextmanager
def working_folder(purpose: str) -> Iterator[Path]:
    """Yield a scratch folder, which is removed afterwards whatever happens.

    Raises StoreError where the disk is full, whichever library noticed it."""
    parent = LocalSettings().folder / "work"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{purpose}-", dir=parent))
    except OSError as error:
        raise StoreError(
            f"DISTILLERY_HOME {parent.parent}: can't be written ({error.strerror}); "
            "set another folder"
        ) from error
    try:
        yield folder
    except StoreError:
        raise
    except Exception as error:
        reason = disk_full_reason(error)
        if not reason:
            raise
        raise StoreError(
            f"{parent}: the disk is full ({reason}); free some space or move DISTILLERY_HOME, "
            "then run again"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def disk_full_reason(error: BaseException) -> str:
    """Return what the system said of a full disk in `error` or its causes, else "". It is found by
    its text, because safetensors and shutil keep no errno."""
    link: BaseException | None = error
    while link is not None:
        found = NO_ROOM_TEXT.search(str(link))
        if found:
            return found[0]
        link = link.__cause__ or link.__context__
    return ""
