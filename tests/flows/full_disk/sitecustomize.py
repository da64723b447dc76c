"""A disk that is full from the first export on: with this folder on PYTHONPATH, Python imports it
at its start.

When an export makes its working folder, the process sets itself the system's limit on a file's
size. From then on every write beyond it, by whichever library, fails in the kernel: with EFBIG,
since ENOSPC would take a file system of its own and root.
"""

import resource
import sys
from typing import Any

LIMIT = 1 << 16


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "tempfile.mkdtemp" and "/work/export-" in str(arguments[0]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))


sys.addaudithook(watch)
