"""Keeps bitsandbytes from fetching compiled code of the hub."""

import logging
import sys
from importlib.util import find_spec
from typing import Any


def import_bitsandbytes() -> None:
    """Import bitsandbytes where it is installed; to be called before peft, which imports it too, is
    imported.

    On CPUs with AVX512_BF16 it would fetch compiled code from the hub by the package `kernels`, and
    run it, or warn that this package is not installed. It works without that code."""
    if "bitsandbytes" in sys.modules or find_spec("bitsandbytes") is None:
        return
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, missing = log.level, object()
    before: Any = sys.modules.get("kernels", missing)
    log.setLevel(logging.ERROR)
    # With None, an import fails as if the package were not installed.
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if before is not missing:
            sys.modules["kernels"] = before
