"""Hides the packages that WITHOUT_MODULES names (top-level modules, separated by commas) from every
Python process with this folder on its PYTHONPATH, as if they were not installed."""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Hiding:
    """Finds what `finder` does, save the modules `names`."""

    def __init__(self, finder: Any, names: frozenset[str]) -> None:
        self.finder, self.names = finder, names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in self.names or fullname in self.names:
            return None
        found: ModuleSpec | None = self.finder.find_spec(fullname, path, target)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


hidden = frozenset(os.environ["WITHOUT_MODULES"].split(","))
sys.meta_path[:] = [Hiding(finder, hidden) for finder in sys.meta_path]
