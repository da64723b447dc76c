"""Jobs in a process of their own: how they end is told in one line, and they end with their
parent. What imports on Linux alone would fail elsewhere."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from pydantic import BaseModel

from distillery.errors import ModelError, OutOfResources
from distillery.machine import machine_name, usable_cores
from distillery.processes import exit_reason, is_secret, run_in_process
from distillery.serving.process import served

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

JOB = """
import io, os, sys, time
from contextlib import redirect_stdout
from pathlib import Path
from pydantic import BaseModel
from distillery.processes import process_main

class Job(BaseModel):
    go: str

def work(job, progress):
WORK
    return job

sys.exit(process_main(sys.argv[1:], Job, work))
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


class Job(BaseModel):
    go: str


@pytest.fixture
def job_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`job_module(work)`: the name of a module whose process does a Job by the statements
    `work`."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(PROJECT)]))
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)

    def write(work: str) -> str:
        lines = textwrap.indent(textwrap.dedent(work), "    ")
        (tmp_path / "job_of_a_test.py").write_text(JOB.replace("WORK", lines))
        return "job_of_a_test"

    return write


SECRETS = {
    "AZURE_CLIENT_SECRET": "planted",
    "AZURE_TENANT_ID": "planted",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountName=a;AccountKey=planted",
    "DISTILLERY_LABELS": "postgresql://labels:planted@host/labels",
    "DISTILLERY_REGISTRY": "https://user:planted@host",
    "DISTILLERY_SIGNING_KEY": "planted",
    "DISTILLERY_STORE": "https://host/store?sv=1&sig=planted",
    "HF_TOKEN": "planted",
    "GITHUB_PAT": "planted",
    "MYSQL_PWD": "planted",
    "OPENAI_APIKEY": "planted",
    "PGPASSWORD": "planted",
    "POSTGRES_PASSWORD": "planted",
    "PREFECT_API_AUTH_STRING": "admin:planted",
    "PREFECT_API_DATABASE_CONNECTION_URL": "postgresql+asyncpg://prefect:planted@host/prefect",
    "PREFECT_SERVER_API_AUTH_STRING": "admin:planted",
    "PREFECT_SERVER_ENCRYPTION_KEY": "planted",
    "CHEAP_MODEL_ENDPOINT": "https://planted.test",
    "CHEAP_MODEL_NAME": "planted",
    "JUDGE_MODEL_ENDPOINT": "https://planted.test",
    "JUDGE_MODEL_NAME": "planted",
    "TEACHER_MODEL_ENDPOINT": "https://planted.test",
    "TEACHER_MODEL_KEY": "planted",
    "my_api_key": "planted",
}

PLAIN = {
    "DISTILLERY_STORE": "abfs://container@account.dfs.core.windows.net/store",
    "HTTPS_PROXY": "http://proxy.test:3128",
    "MONKEY": "a word that ends as a key does",
    "OMP_NUM_THREADS": "1",
    "PREFECT__FLOW_RUN_ID": "run",
    "PWD": "/work",
    "TOKENIZERS_PARALLELISM": "false",
}


@pytest.mark.security
def test_a_child_gets_no_secret(
    job_module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = job_module("""
        import json
        job = Job(go=json.dumps(dict(os.environ)))
    """)
    for name, value in (SECRETS | PLAIN).items():
        monkeypatch.setenv(name, value)
    found = json.loads(Job.model_validate_json(run_in_process(module, Job(go=""), 60)).go)
    assert found.items() >= PLAIN.items()
    # It reads no .env, where the same secrets may be.
    assert found["DISTILLERY_CHILD"] == "true"
    assert set(found) & (set(SECRETS) - set(PLAIN)) == set()


@pytest.mark.security
@pytest.mark.parametrize("name", SECRETS)
def test_what_is_secret(name: str) -> None:
    assert is_secret(name, SECRETS[name])


@pytest.mark.security
def test_a_server_of_a_run_gets_its_own_key_and_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, str] = {}

    def start(_command: list[str], env: dict[str, str], **_: object) -> None:
        given.update(env)
        raise InterruptedError

    monkeypatch.setattr("distillery.serving.process.subprocess.Popen", start)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InterruptedError), served(tmp_path, "name"):
        pass
    assert set(given) & set(SECRETS) == set()
    assert "planted" not in given["DISTILLERY_SERVER_KEY"]


def test_progress_is_shown_while_the_process_runs(
    job_module: Callable[[str], str], tmp_path: Path
) -> None:
    """What else it prints is no progress, and is not in the way."""
    module = job_module("""
        print("progress is slow")
        with redirect_stdout(io.StringIO()):
            progress(1, 3, "one: two")
        while not Path(job.go).exists():
            time.sleep(0.01)
        print("no line's end", end="")
        progress(2, 3, "lost")
        progress(3, 3, "")
    """)
    go = tmp_path / "go"
    shown = []

    def show(done: int, of: int, text: str) -> None:
        shown.append((done, of, text))
        go.touch()

    result = run_in_process(module, Job(go=str(go)), 60, show)
    assert shown == [(1, 3, "one: two"), (3, 3, "")]
    assert Job.model_validate_json(result) == Job(go=str(go))


def test_a_process_that_never_stops_telling_is_killed_at_its_limit(
    job_module: Callable[[str], str],
) -> None:
    module = job_module("""
        while True:
            progress(0, 1, "")
    """)
    with pytest.raises(OutOfResources, match=r"^it did not finish within 0\.02 minutes$"):
        run_in_process(module, Job(go=""), 1.2)
    commands = [child.cmdline() for child in psutil.Process().children()]
    assert not [command for command in commands if module in command]


def test_a_process_whose_progress_can_not_be_shown_is_killed(
    job_module: Callable[[str], str],
) -> None:
    module = job_module("""
        progress(os.getpid(), 1, "")
        time.sleep(600)
    """)

    def show(done: int, _of: int, _text: str) -> None:
        raise RuntimeError(done)

    with pytest.raises(RuntimeError) as raised:
        run_in_process(module, Job(go=""), progress=show)
    assert not psutil.pid_exists(raised.value.args[0])


def test_the_last_line_of_stderr_is_the_reason(job_module: Callable[[str], str]) -> None:
    """However much is written there and to stdout."""
    module = job_module("""
        for stream in (sys.stdout, sys.stderr):
            stream.write("noise " * 100_000)
        print("\\nout of luck", file=sys.stderr)
        os._exit(3)
    """)
    with pytest.raises(
        ModelError, match=r"^its process ended with exit code 3 \(out of luck\)$"
    ) as raised:
        run_in_process(module, Job(go=""))
    assert not isinstance(raised.value, OutOfResources)


@pytest.mark.parametrize(
    "work",
    [
        "raise MemoryError",
        "raise RuntimeError('DefaultCPUAllocator: not able to allocate 9 bytes of memory')",
        "raise RuntimeError('std::bad_alloc')",
        "os.kill(os.getpid(), 9)",
    ],
)
def test_a_lack_of_memory_or_disk_is_told_from_other_reasons(
    job_module: Callable[[str], str], work: str
) -> None:
    with pytest.raises(OutOfResources):
        run_in_process(job_module(work), Job(go=""))


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
