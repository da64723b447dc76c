"""The audit of packages: an answer counts if it tells of every package; a stored one where the
service is out of reach, and only for the same list."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from deployments.audit import audit

pytestmark = pytest.mark.security


def pip_audit(folder: Path, answer: Any) -> list[str]:
    """Return a command that answers as pip-audit does, with `answer`; None for a lost network."""
    script = folder / "pip_audit.py"
    text = f"print({json.dumps(answer)!r})" if answer else "raise SystemExit('no network')"
    script.write_text(text + "\n")
    return [sys.executable, str(script)]


def package(*advisories: str) -> dict[str, Any]:
    vulns = [{"id": each, "fix_versions": ["2"]} for each in advisories]
    return {"dependencies": [{"name": "idna", "version": "1", "vulns": vulns}]}


def test_an_audit_without_a_network_says_so_and_takes_the_stored_answer_of_the_same_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packages, stored = tmp_path / "list.txt", tmp_path / "audit.json"
    packages.write_text("idna==1\n")
    skipped = {"dependencies": [{"name": "idna", "skip_reason": "not found on PyPI"}]}
    unheard: list[Any] = [None, skipped, {"dependencies": []}]
    for lost in unheard:
        assert audit(packages, stored, pip_audit(tmp_path, lost)) == 0
        assert "nothing is known" in capsys.readouterr().out

    assert audit(packages, stored, pip_audit(tmp_path, package())) == 0
    assert audit(packages, stored, pip_audit(tmp_path, None)) == 0
    assert "can't be reached" in capsys.readouterr().out

    assert audit(packages, stored, pip_audit(tmp_path, package("PYSEC-1", "PYSEC-2"))) == 1
    assert audit(packages, stored, pip_audit(tmp_path, None)) == 1
    assert "idna==1: PYSEC-1, PYSEC-2" in capsys.readouterr().out

    packages.write_text("idna==2\n")
    assert audit(packages, stored, pip_audit(tmp_path, None)) == 0
    assert "is for another list; nothing is known" in capsys.readouterr().out
