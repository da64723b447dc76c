"""Which files and addresses a run may open, of those that its recipe or its parameters name.

A run on the command line is its user's own: it opens what that user may open. A run that a worker
executes may have been started by somebody who has no login on the worker's machine: it opens what
the worker's DISTILLERY_DATA_FOLDERS and DISTILLERY_DATA_PROTOCOLS allow. By default these are the
files in the working folder, the store and the sample data.
"""

import os
import re
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from distillery.errors import DataError
from distillery.settings import RUN_OF_A_WORKER, LocalSettings

LOCAL = ("file", "local")

KEYS = (".key", ".p12", ".pem", ".pfx")
"""What the names of private keys end in."""

_PROTOCOL = re.compile("([A-Za-z][A-Za-z0-9+.-]+)://")


def is_limited() -> bool:
    """Return whether a worker executes this run, so that its settings limit what may be opened."""
    return RUN_OF_A_WORKER in os.environ


def local_path(path: str, setting: str) -> Path:
    """Return the local path that a recipe or a parameter names, with ~ expanded; in a worker's run
    the real path, so that what was allowed is what is opened.

    Raises DataError, which names the setting, for what is no path and for what may not be opened.
    """
    try:
        found = Path(path).expanduser()
        if is_limited():
            given, found = found.absolute(), Path(os.path.realpath(found))
            if not is_allowed(given, found):
                raise folder_error(path, setting)
        # Raises what is no path on this system, and a folder that may not be entered.
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(found)
    except (OSError, RuntimeError, ValueError) as error:
        if is_limited() and isinstance(error, RuntimeError):
            raise folder_error(path, setting) from None
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{setting}: {path!r:.200}: can't be opened ({reason}); correct it"
        ) from None
    return found


def public_path(name: str, setting: str, ending: str) -> Path:
    """Return `local_path` of a file whose content becomes public. Where a worker's folders are
    limited, its name must have this ending, so that no other file is taken for one.

    Raises DataError."""
    path = local_path(name, setting)
    if is_limited() and path.suffix.lower() != ending:
        raise DataError(f"{setting}: {name}: this worker takes a file that ends in {ending}")
    return path


def is_allowed(given: Path, real: Path) -> bool:
    """Return whether a worker's run may read the file `given`, which is `real`: in a folder that it
    may read, no hidden one and no key, and in Distillery's own home only where a folder inside the
    home is allowed."""
    settings = LocalSettings()
    inside = [folder for folder in allowed_folders(settings) if real.is_relative_to(folder)]
    if not inside or real.suffix.lower() in KEYS:
        return False
    folder = max(inside, key=lambda each: len(each.parts))
    home = Path(os.path.realpath(settings.folder))
    if real.is_relative_to(home) and home.is_relative_to(folder):
        return False
    return not any(part.startswith(".") for part in parts_below(folder, given, real))


def parts_below(folder: Path, given: Path, real: Path) -> tuple[str, ...]:
    """Return the parts of a path below the real folder that it is in, as they are given: a link may
    lead to a file in a hidden folder beside it, as in a volume of Kubernetes."""
    if ".." not in given.parts:
        for parent in given.parents:
            if Path(os.path.realpath(parent)) == folder:
                return given.relative_to(parent).parts
    return real.relative_to(folder).parts


def allowed_folders(settings: LocalSettings) -> list[Path]:
    """Return the real paths of the folders that a worker's run may read."""
    folders = [Path(str(files("distillery.data"))) / "sample"]
    store = store_folder(settings.store_url)
    if store is not None:
        folders.append(store)
    if "file" in settings.protocols:
        # Where all files are below the working folder, it was not chosen to hold data.
        working = [Path.cwd()] if Path.cwd() != Path(Path.cwd().anchor) else []
        folders += settings.folders or working
    return [Path(os.path.realpath(folder)) for folder in folders]


def store_folder(url: str) -> Path | None:
    """Return the folder of a local store; None for a store on another machine."""
    protocol = _PROTOCOL.match(url)
    if protocol is None:
        return Path(url).expanduser()
    if protocol[1].lower() in LOCAL:
        return Path(url2pathname(urlsplit(url).path))
    return None


def folder_error(path: str, setting: str) -> DataError:
    """Return the error of a path that a worker's run may not open, whether it is there or not."""
    remedy = "put the file into a folder of its DISTILLERY_DATA_FOLDERS, or add the folder there"
    if "file" not in LocalSettings().protocols:
        remedy = "add file to its DISTILLERY_DATA_PROTOCOLS"
    return DataError(f"{setting}: {path!r:.200}: this worker may not open it; {remedy}")


def address(uri: str, setting: str) -> Path | str:
    """Return the local path, or the URL for fsspec, that a parameter names.

    Raises DataError, which names the setting, for chained URLs and for what may not be opened."""
    if "::" in uri:
        raise DataError(f"{setting}: a URL with :: opens another one; give that of the file itself")
    protocol = _PROTOCOL.match(uri)
    if protocol is None:
        return local_path(uri, setting)
    name = protocol[1].lower()
    url = f"{name}{uri[protocol.end(1) :]}"
    shown = f"{name}://…/{name_in(url)}"
    try:
        parts = urlsplit(url)
    except ValueError:
        raise DataError(f"{setting}: {shown}: no URL; correct it") from None
    if name in LOCAL:
        if parts.netloc not in ("", "localhost"):
            raise DataError(f"{setting}: {shown}: names another machine; write file:///PATH")
        return local_path(url2pathname(parts.path), setting)
    if is_limited() and not is_allowed_url(url):
        raise DataError(
            f"{setting}: {shown}: this worker may not open it; add {name}, or what such addresses "
            "begin with, to its DISTILLERY_DATA_PROTOCOLS"
        )
    return url


def name_in(url: str) -> str:
    """Return the last part of a URL's path, which leaves out a query that may hold a signature."""
    return url.split("://", 1)[1].split("#")[0].split("?")[0].rpartition("/")[2]


def is_allowed_url(url: str) -> bool:
    """Return whether a worker's run may open `url`: its protocol is allowed, or what it begins
    with, or it is in the store."""
    parts = urlsplit(url).path.split("/")
    for part in parts:
        # Twice, for servers that decode once more.
        plain = unquote(unquote(part))
        if plain in (".", "..") or "/" in plain or "\\" in plain or "\0" in plain:
            return False
    settings = LocalSettings()
    allowed = [entry for entry in settings.protocols if entry != "file"]
    if store_folder(settings.store_url) is None:
        allowed.append(settings.store_url)
    return any(begins_with(url, entry) for entry in allowed)


def begins_with(url: str, entry: str) -> bool:
    """Return whether a URL is below `entry`, a URL, or has `entry` as its protocol."""
    if "://" not in entry:
        return urlsplit(url).scheme == entry.lower()
    asked, allowed = urlsplit(url), urlsplit(entry)
    folder = [part for part in allowed.path.split("/") if part]
    parts = [part for part in asked.path.split("/") if part]
    return (
        asked.scheme == allowed.scheme
        and asked.netloc == allowed.netloc
        and parts[: len(folder)] == folder
    )


def is_allowed_data_set(name: str) -> bool:
    """Return whether a worker's run may load this data set from the Hugging Face hub: any, unless
    DISTILLERY_DATA_PROTOCOLS says which."""
    entries = [entry for entry in LocalSettings().protocols if entry.startswith("hf://")]
    if not is_limited() or not entries:
        return True
    return any(begins_with(f"hf://datasets/{name}", entry) for entry in entries)
