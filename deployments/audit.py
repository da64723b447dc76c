"""Ask PyPI's advisory service about the packages of constraints-hashes.txt, by pip-audit:

    .venv-audit/bin/python deployments/audit.py

Each answer is kept in deployments/audit.json with the day and the list that it is for. Where the
service can't be reached, that answer counts, if it is for the same list; without one, nothing is
known, and this says so. Exit code 1: a package has a known vulnerability.
"""

import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parent.parent

LIST = PROJECT / "constraints-hashes.txt"

STORED = PROJECT / "deployments" / "audit.json"

PIP_AUDIT = [sys.executable, "-m", "pip_audit"]

LONGEST_S = 900.0


def ask(packages: Path, command: list[str]) -> dict[str, list[str]] | None:
    """Return the advisories of each package of a list; None where the service does not tell of all
    of them: pip-audit passes over a package that it does not get an answer for."""
    options = ["--requirement", str(packages), "--disable-pip", "--format", "json"]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            [*command, *options, "--progress-spinner", "off"],
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
        )
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        return None
    if not found or any("vulns" not in each for each in found):
        return None
    advisories = {}
    for each in found:
        names = [advisory["id"] for advisory in each["vulns"]]
        advisories[f"{each['name']}=={each['version']}"] = names
    return advisories


def audit(packages: Path, stored: Path, command: list[str]) -> int:
    """Print what is known of the packages of a list; return the exit code."""
    digest = hashlib.sha256(packages.read_bytes()).hexdigest()
    advisories = ask(packages, command)
    if advisories is not None:
        known = {name: ids for name, ids in advisories.items() if ids}
        day = f"{datetime.now(UTC):%Y-%m-%d}"
        answer: dict[str, Any] = {"day": day, "list": digest, "advisories": known}
        stored.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    else:
        print("audit: the advisory service can't be reached from here, or did not tell of all")
        if not stored.is_file():
            print(f"audit: nothing is known: {stored.name} is not there; run this with a network")
            return 0
        answer = json.loads(stored.read_text(encoding="utf-8"))
        if answer["list"] != digest:
            print(f"audit: {stored.name} of {answer['day']} is for another list; nothing is known")
            return 0
    for name, ids in answer["advisories"].items():
        print(f"{name}: {', '.join(ids)}")
    print(f"audit: {len(answer['advisories'])} packages with advisories on {answer['day']}")
    return 1 if answer["advisories"] else 0


if __name__ == "__main__":
    sys.exit(audit(LIST, STORED, PIP_AUDIT))
