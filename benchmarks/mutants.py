"""Change the code in small ways, and see which of the changes no test notices:
`python -m benchmarks.mutants MODULE...`, such as distillery/evaluation/gate.py.

mutmut makes the changes (mutants) and runs the module's own fast tests, which TESTS names, on each.
All happens in a copy of the working tree. Without MODULE, each module of TESTS has its turn. Takes
minutes a module. No extra brings mutmut: `.venv/bin/pip install "mutmut>=3.8,<4"`.

mutants     changes that were tried
killed      of these, changes with which a test fails or does not end
survived    changes with which every test passes, or that no test runs

The survivors are shown as diffs. The last line is JSON: these figures by module.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

PROJECT = Path(__file__).resolve().parents[1]
TESTS = {
    "distillery/evaluation/gate.py": ["tests/evaluation/test_gate.py"],
    "distillery/export/choice.py": ["tests/export/test_choice.py"],
    "distillery/export/ladder.py": ["tests/export/test_ladder.py"],
    "distillery/teacher/pace.py": ["tests/teacher/test_pace.py"],
    "distillery/teacher/answers.py": ["tests/teacher/test_answers.py"],
    "distillery/teacher/reading.py": ["tests/teacher/test_reading.py"],
    "distillery/training/losses.py": ["tests/training/test_losses.py"],
}
COPIED = ("distillery", "tasks", "flows", "deployments", "tests", "pyproject.toml", "prefect.yaml")

ONLY = "try these mutants only, * for any text: '*[05]' is a fifth of them"

CONFIG = """
[tool.mutmut]
source_paths = ["distillery"]
only_mutate = ["{module}"]
also_copy = ["tasks", "flows", "deployments", "prefect.yaml"]
pytest_add_cli_args = ["-m", "not slow"]
pytest_add_cli_args_test_selection = {tests}
use_git_change_detection = false
"""


NOT_TRIED, SURVIVED, NO_TESTS = None, 0, 33
"""How mutmut notes what became of a mutant: a test's exit status, but for these."""


def tried(module: str, names: list[str], processes: int) -> dict[str, int]:
    """Try the mutants of a module whose names fit one of the patterns, print those that survive,
    and return the figures."""
    with TemporaryDirectory(prefix="mutants-") as folder:
        copy_tree(Path(folder))
        with (Path(folder) / "pyproject.toml").open("a", encoding="utf-8") as file:
            file.write(CONFIG.format(module=module, tests=json.dumps(TESTS[module])))
        ran = mutmut(Path(folder), "run", "--max-children", str(processes), *names)
        if ran.returncode:
            raise SystemExit(f"{module}: mutmut failed:\n{ran.stdout[-4000:]}{ran.stderr[-4000:]}")
        noted = json.loads((Path(folder) / "mutants" / f"{module}.meta").read_text("utf-8"))
        statuses = {
            name: status
            for name, status in noted["exit_code_by_key"].items()
            if status is not NOT_TRIED
        }
        survivors = [name for name, status in statuses.items() if status in (SURVIVED, NO_TESTS)]
        for name in survivors:
            print(mutmut(Path(folder), "show", name).stdout, flush=True)
    return {
        "mutants": len(statuses),
        "killed": len(statuses) - len(survivors),
        "survived": len(survivors),
    }


def copy_tree(folder: Path) -> None:
    """Copy what the tests of a module need."""
    left_out = shutil.ignore_patterns("__pycache__", "node_modules")
    for name in COPIED:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=left_out)
        else:
            shutil.copyfile(source, folder / name)


def mutmut(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run mutmut in a folder, whose code comes before this one's."""
    return subprocess.run(
        [sys.executable, "-m", "mutmut", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.mutants", description="Mutation testing")
    parser.add_argument("module", nargs="*", choices=[*TESTS, []], help="all of them by default")
    parser.add_argument("--only", metavar="NAMES", action="append", default=[], help=ONLY)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args(arguments)
    if find_spec("mutmut") is None:
        parser.error('mutmut is not installed; run `.venv/bin/pip install "mutmut>=3.8,<4"`')
    figures = {}
    for module in given.module or TESTS:
        figures[module] = tried(module, given.only, given.processes)
        print(f"{module}: {figures[module]}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
