"""Jobs in a process of their own: how they end is told in one line, and they end with their
parent. What imports on Linux alone would fail elsewhere."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from distillery.machine import machine_name, usable_cores
from distillery.processes import exit_reason

PROJECT = Path(__file__).resolve().parents[1]

OUT_OF_MEMORY = "as happens when memory runs out; free memory and run again"

CHILD = """
import os, time
from distillery.processes import exit_with_parent
exit_with_parent(os.getppid())
print(os.getpid(), flush=True)
time.sleep(600)
"""

PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""

# What Windows or macOS lacks: modules that our own code may not import, and names of others.
ELSEWHERE = """
import builtins, os, signal, sys
import filelock, psutil

import_module = builtins.__import__

def import_as_elsewhere(name, globals=None, *rest):
    ours = (globals or {}).get("__name__", "").startswith(("distillery", "deployments"))
    if ours and name in ("fcntl", "resource", "pwd", "grp"):
        raise ImportError(name)
    return import_module(name, globals, *rest)

builtins.__import__ = import_as_elsewhere
del signal.SIGKILL, os.sched_getaffinity, os.getppid

import distillery.machine, distillery.processes, distillery.registry.local
import distillery.storage.artifacts, distillery.storage.housekeeping, distillery.storage.leases
import distillery.evaluation.scoring_process, deployments.local
from pathlib import Path
from distillery.storage.cache import Cache
Cache(Path(sys.argv[1]), 0).hold("a" * 64)
print(distillery.machine.usable_cores())
"""


def test_a_child_ends_with_its_parent_even_before_that_is_reaped() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
        # Until `with` ends, the parent is a zombie.
        child.wait(60)
        assert psutil.Process(parent.pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("code", "stderr", "line"),
    [
        (
            -9,
            "",
            "its process was killed, as happens when memory runs out; free memory and run again",
        ),
        (-11, "a\n out of luck \n\n", "its process ended by signal SIGSEGV (out of luck)"),
        (3, "\n", "its process ended with exit code 3 (no reason given)"),
        (3221225477, "", "its process ended with exit code 3221225477 (no reason given)"),
    ],
)
def test_why_a_process_ended(code: int, stderr: str, line: str) -> None:
    assert exit_reason(code, stderr) == line


def test_the_machine_has_a_name_and_cores() -> None:
    assert usable_cores() == len(os.sched_getaffinity(0))
    name, _, cores = machine_name().rpartition(", ")
    assert name
    assert cores == f"{usable_cores()} cores"


def test_nothing_that_windows_and_macos_lack_is_needed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )
    assert (done.stdout, done.stderr) == (f"{usable_cores()}\n", "")
