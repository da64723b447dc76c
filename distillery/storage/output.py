"""The folder that a user names for answers: a local one, or one under any fsspec URL.

A run's own answers are removed before new ones are written, and each file is whole or not there.
The last one is removed first and written last: where it is, all others are.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from fsspec import get_filesystem_class

from distillery.errors import DataError, DistilleryError
from distillery.settings import LocalSettings
from distillery.storage.allowed import (
    address,
    begins_with,
    is_limited,
    store_folder,
)
from distillery.storage.azure_blobs import AZURE_PROTOCOLS
from distillery.storage.files import UNFINISHED, Storage

ANSWERS = re.compile(r"predictions\.jsonl|failed\.jsonl|manifest\.json|answers-[0-9]{5,}\.parquet")
"""The names of what batch inference writes."""

TRIED = re.compile("trial|[0-9a-f]{8}")
"""Behind UNFINISHED, the names of what is left where it is killed while it tries to write."""

READ_ALONE = ("http", "https", "hf")
"""Protocols of the input that no answers are written by: servers have no common way to write, and
each file would be a commit of its own on the hub."""

TRIAL = f"{UNFINISHED}trial"


class Output:
    """The folder that a parameter `setting` names for answers. Nothing is asked or written yet.

    Raises DataError for a folder in the store and for an address that can't be written to; and in a
    worker's run for a local folder that `output_folder` refuses, and for an address that does not
    begin as DISTILLERY_DATA_PROTOCOLS says."""

    def __init__(self, output: str, setting: str) -> None:
        self._setting = setting
        found = address(output, setting)
        if isinstance(found, Path):
            found = output_folder(found, setting)
            self.shown = str(found)
        else:
            self.shown = without_secrets(found)
            self._check_url(found)
        self._title = f"{setting} {self.shown}"
        with self._one_line():
            settings = LocalSettings()
            url = found if isinstance(found, str) else str(found.absolute())
            self._storage = Storage(url, settings.store_wait, setting, self._title)

    def _check_url(self, url: str) -> None:
        title = f"{self._setting}: {self.shown}"
        parts = urlsplit(url)
        settings = LocalSettings()
        if not parts.netloc and not parts.path.strip("/"):
            raise DataError(f"{title}: names no folder; add a bucket or container, and a path")
        if parts.scheme in READ_ALONE:
            raise DataError(f"{title}: can only be read; name a local folder or an object store")
        if parts.query or parts.fragment:
            raise DataError(f"{title}: no folder has a ? or # in its URL; leave out what follows")
        if re.search(r"[*\[]", parts.path):
            raise DataError(f"{title}: file systems take * and [ for a pattern; choose other names")
        if store_folder(settings.store_url) is None and is_in(url, settings.store_url):
            raise DataError(f"{title}: in the store, which holds the answers anyway")
        # A bare protocol allows to read wherever the worker's login can; writing takes an address.
        entries = [entry for entry in settings.protocols if "://" in entry]
        if is_limited() and not any(begins_with(url, entry) for entry in entries):
            raise DataError(
                f"{title}: this worker may not write there; add what such addresses begin with to "
                "its DISTILLERY_DATA_PROTOCOLS"
            )

    def try_writing(self) -> None:
        """Write and remove an empty file, so that what can't be written to is known before any row
        is answered. The folder itself is not left behind where it was not there. Raises
        DistilleryError, also where a worker would write among other files."""
        with self._one_line():
            for name, is_folder in self._storage.entries():
                if is_limited():
                    check_name(name, f"{self._setting}: {self.shown}")
                if is_folder and is_answers(name):
                    raise DataError(f"{self._title}: {name} is a folder there; move it away")
            is_new = self._storage.make_folder()
            self._storage.write(TRIAL, b"")
            self._storage.delete(TRIAL)
            if is_new:
                self._storage.remove_empty()

    def replace(self, files: Sequence[Path], names: re.Pattern[str]) -> None:
        """Write `files` in place of those whose names match. The last file is there only where all
        are. Raises DistilleryError."""
        last = files[-1].name
        with self._one_line("; the answers are in the artifact store"):
            self._storage.make_folder()
            found = self._storage.entries()
            old = [name for name, _ in found if is_answers(name, names)]
            for name in sorted(old, key=lambda name: name != last):
                self._storage.delete(name)
            for file in files:
                self._storage.upload_whole(file, file.name)

    @contextmanager
    def _one_line(self, more: str = "") -> Iterator[None]:
        """Turn what a file system of fsspec may raise, which is anything, into one line without its
        text, which may hold a secret. `more`: what else to say."""
        try:
            yield
        except DistilleryError as error:
            raise type(error)(f"{error}{more}") from None
        except Exception as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise DataError(
                f"{self._title}: can't be written ({reason}); correct {self._setting}{more}"
            ) from None


def output_folder(folder: Path, setting: str) -> Path:
    """Return a local folder that answers may be written to.

    Raises DataError for a folder in the store; and in a worker's run for one that is part of a
    Python package, or that holds other files than answers."""
    title = f"{setting}: {folder}"
    store = store_folder(LocalSettings().store_url)
    if store is not None and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(store)):
        raise DataError(f"{title}: in the store, which holds the answers anyway")
    if not is_limited():
        return folder
    if any((parent / "__init__.py").exists() for parent in (folder, *folder.parents)):
        raise DataError(f"{title}: part of a program; name another folder")
    for entry in folder.iterdir() if folder.is_dir() else ():
        check_name(entry.name, title)
        if entry.is_symlink():
            raise DataError(f"{title}: holds links; name a new folder")
    return folder


def is_answers(name: str, names: re.Pattern[str] = ANSWERS) -> bool:
    """Return whether a file is one of `names` that batch inference writes, or what is left of one
    where it is killed."""
    unfinished = name.removeprefix(UNFINISHED)
    if names.fullmatch(unfinished):
        return True
    return unfinished != name and TRIED.fullmatch(unfinished) is not None


def is_in(url: str, store: str) -> bool:
    """Return whether an address is below that of a store. Azure's may be spelt in several ways,
    and without the account, which the environment then names."""
    protocols = {urlsplit(each).scheme for each in (url, store)}
    if protocols.issubset(AZURE_PROTOCOLS):
        hosts = {urlsplit(each).netloc.partition("@")[2].partition(".")[0] for each in (url, store)}
        if len(hosts - {""}) > 1:
            return False
        strip = get_filesystem_class("abfs")._strip_protocol
        url, store = (f"abfs://{strip(each)}" for each in (url, store))
    return begins_with(url, store)


def check_name(name: str, title: str) -> None:
    """Raise DataError for a file in the folder that is none of batch inference's."""
    if not is_answers(name):
        raise DataError(f"{title}: holds other files than answers; name a new folder")


def without_secrets(url: str) -> str:
    """Return a URL without its query, its fragment and its password."""
    return re.sub(r"(?<=://)([^/:]*):[^/]*@", r"\1:…@", re.split("[?#]", url)[0])
