"""The packages that images install have hashes, and they are those of the lock."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deployments.requirements import requirements

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.security


def pins(file: str) -> dict[str, str]:
    """Return the versions that a lock pins, by the packages' names."""
    found = {}
    for line in (ROOT / file).read_text().splitlines():
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[a-z,]+\])?==([^ ;\\]+)", line)
        if match:
            found[str(canonicalize_name(match[1]))] = match[2]
    return found


def hashed(file: str) -> set[str]:
    """Return the packages of a lock that have a hash."""
    found, package = set(), ""
    for line in (ROOT / file).read_text().splitlines():
        if re.match(r"[A-Za-z0-9]", line):
            package = str(canonicalize_name(re.split("==", line)[0]))
        elif re.fullmatch(r" +--hash=sha256:[0-9a-f]{64}(?: \\)?", line):
            found.add(package)
        elif line.strip() and not line.startswith("#"):
            raise AssertionError(f"{file}: {line}")
    return found


def test_every_package_of_the_lock_has_its_hashes() -> None:
    lock, with_hashes = pins("constraints.txt"), pins("constraints-hashes.txt")
    weights = pins("constraints-weights.txt")
    missing = {name: lock[name] for name in lock.keys() - with_hashes.keys() - weights.keys()}
    assert not missing, "make constraints-hashes.txt anew, as its first lines say"
    pinned = with_hashes | weights
    assert {name: pinned[name] for name in lock} == lock
    assert "torch" not in pinned
    others = ("weights", "pip", "audit")
    for file in ("constraints-hashes.txt", *(f"constraints-{each}.txt" for each in others)):
        assert hashed(file) == pins(file).keys() != set()


def test_what_the_image_asks_for_is_in_the_list() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ["azure", "postgres"]
    asked = [Requirement(each) for each in requirements(extras)]
    known = pins("constraints-hashes.txt")
    assert {"hatchling", "editables"} <= known.keys(), "for an install without build isolation"
    for each in asked:
        name = str(canonicalize_name(each.name))
        assert each.specifier.contains(known[name]), each
    assert len(asked) == len(project["dependencies"]) - 1 + 2, "all but torch"
    done = subprocess.run(
        [sys.executable, "deployments/requirements.py", *extras],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == requirements(extras)
