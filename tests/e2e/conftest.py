"""The rows and the tiny model of all runs on real servers."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_recipe import write_rows


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def tiny(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")
