r"""A stage's cached records stand for its code: a change of the code is decided upon, never
overlooked.

stage_versions.json holds for each stage its version, a fingerprint of the code that decides what it
returns, and the last decision. After a change, either raise the version in tasks/ (what is cached
is made again) or, where the stage returns what it did, keep it; then record which:

    PYTHONPATH=tests/support .venv/bin/python tests/tasks/test_stage_versions.py \
        "export: no change in behaviour, the error text alone"

("all: …" for a change that concerns several in the same way).
"""

import ast
import hashlib
import io
import json
import re
import sys
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from parsing import parsed

PROJECT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("stage_versions.json")
# Storage, locks, retries, progress, payment and error texts: none of it is in what a stage returns.
# Recipes and records are in the cache keys themselves.
APART = (
    *("errors.py", "machine.py", "processes.py", "progress.py"),
    *("readiness.py", "records.py", "settings.py"),
    *("recipe/", "registry/", "storage/", "__init__.py"),
    *("labels/journal.py", "labels/quote.py", "labels/store.py"),
    *("teacher/allowances.py", "teacher/budget.py"),
    *("teacher/ledger.py", "teacher/pace.py"),
    "training/tracking.py",
)


def stages() -> dict[str, tuple[int, Path]]:
    """Each stage's version and file, as its decorator says."""
    found = {}
    for file in sorted((PROJECT / "tasks").glob("*.py")):
        for node in ast.walk(parsed(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "stage"
            ):
                (version,) = (
                    keyword.value for keyword in node.keywords if keyword.arg == "version"
                )
                found[ast.literal_eval(node.args[0])] = (ast.literal_eval(version), file)
    return found


def imported(file: Path) -> set[Path]:
    """Return the modules of distillery/ that `file` imports, at the top or inside a function, or
    names in a string that `python -m` or Olive imports."""
    found: set[Path] = set()
    for node in imports_and_texts(file.read_text()):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{file}:{node.lineno}: a relative import; this test follows none"
            )
            if node.module and node.module.split(".")[0] == "distillery":
                for alias in node.names:
                    found.add(module_file(node.module, alias.name, f"{file}:{node.lineno}"))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("distillery"), f"{file}: write from ... import"
        elif isinstance(node, ast.Constant) and re.fullmatch(
            r"distillery(\.\w+)+", str(node.value)
        ):
            module, name = str(node.value).rsplit(".", 1)
            found.add(module_file(module, name, f"{file}:{node.lineno}"))
    return found


@cache
def imports_and_texts(source: str) -> list[ast.AST]:
    """Return the parts of a source that may name modules."""
    kinds = ast.Import | ast.ImportFrom | ast.Constant
    return [node for node in ast.walk(parsed(source)) if isinstance(node, kinds)]


def module_file(module: str, name: str, where: str) -> Path:
    """Return the file of `from module import name`; a name in a package's own face leads to
    that."""
    folder = PROJECT / module.replace(".", "/")
    for path in (folder / f"{name}.py", folder / name / "__main__.py", folder.with_suffix(".py")):
        if path.is_file():
            return path
    assert (folder / "__init__.py").is_file(), f"{where}: {module}.{name} leads to no file"
    return folder / "__init__.py"


def modules(file: Path) -> set[Path]:
    """Return `file` and what of distillery/ it imports, directly or through others."""
    seen: set[Path] = set()
    left = {file}
    while left:
        file = left.pop()
        seen.add(file)
        for path in imported(file) - seen:
            if not path.relative_to(PROJECT / "distillery").as_posix().startswith(APART):
                left.add(path)
    return seen


def code(file: Path) -> str:
    """The source without comments, docstrings and blank lines."""
    return without_comments(file.read_text())


@cache
def without_comments(source: str) -> str:
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                assert first.end_lineno is not None
                lines[first.lineno - 1 : first.end_lineno] = [""] * (
                    first.end_lineno - first.lineno + 1
                )
    return "\n".join(line.rstrip() for line in lines if line.strip())


@cache
def now() -> dict[str, dict[str, Any]]:
    found = {}
    for name, (version, file) in stages().items():
        hasher = hashlib.sha256()
        for path in sorted(modules(file)):
            hasher.update(f"{path.relative_to(PROJECT)}\0{code(path)}\0".encode())
        found[name] = {"version": version, "fingerprint": hasher.hexdigest()[:16]}
    return found


def recorded() -> dict[str, dict[str, Any]]:
    known: dict[str, dict[str, Any]] = json.loads(RECORD.read_text())
    return known


@pytest.mark.parametrize("name", stages())
def test_a_change_of_a_stages_code_is_decided_upon(name: str) -> None:
    known = recorded().get(name, {})
    decided = {key: known.get(key) for key in ("version", "fingerprint")}
    advice = "raise its version in tasks/ or keep it, then record which, as this file says"
    assert decided == now()[name], f"the code behind the stage '{name}' has changed: {advice}"
    assert known["decision"]


def test_the_record_names_no_stage_that_is_gone() -> None:
    assert recorded().keys() == stages().keys()


def test_the_watch_reaches_every_stages_domain() -> None:
    """A move of modules must not let the code of a stage drop out of its watch."""
    reached = {
        name: {str(path.relative_to(PROJECT)) for path in modules(file)}
        for name, (_, file) in stages().items()
    }
    assert {
        "distillery/training/loop.py",
        "distillery/training/losses.py",
        "distillery/training/olive_passes.py",
    } <= reached["train"]
    assert "distillery/data/near_duplicates.py" in reached["prepare dataset"]
    assert {"distillery/labels/labelling.py", "distillery/teacher/answers.py"} <= reached["label"]
    assert "distillery/inference/onnx_student.py" in reached["score"]
    assert {
        "distillery/evaluation/scoring_process.py",
        "distillery/evaluation/baselines.py",
    } <= reached["evaluate"]
    assert "distillery/export/rung_process.py" in reached["export ladder"]
    assert "distillery/export/build.py" in reached["export"]


def test_an_import_that_leads_nowhere_fails_loudly(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("from distillery.gone import it\n")
    with pytest.raises(AssertionError, match=r"distillery\.gone\.it leads to no file"):
        imported(file)
    file.write_text("from . import it\n")
    with pytest.raises(AssertionError, match="a relative import"):
        imported(file)


def test_comments_and_docstrings_are_no_change_and_code_is(tmp_path: Path) -> None:
    file = tmp_path / "stage.py"
    file.write_text('"""A."""\n\n\ndef work() -> int:\n    """B."""\n    return 1  # c\n')
    first = code(file)
    file.write_text("def work() -> int:\n    # d\n\n    return 1\n")
    assert code(file) == first
    file.write_text("def work() -> int:\n    return 2\n")
    assert code(file) != first


def main(decisions: list[str]) -> None:
    known, new = recorded() if RECORD.exists() else {}, now()
    given = dict(decision.split(": ", 1) for decision in decisions)
    for name, found in new.items():
        changed = {key: known.get(name, {}).get(key) for key in found} != found
        decision = given.get(name) or given.get("all")
        if changed and not decision:
            sys.exit(f"error: '{name}' has changed; say what was decided: \"{name}: why\"")
        new[name] = found | {"decision": decision if changed else known[name]["decision"]}
    RECORD.write_text(json.dumps(new, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
