"""Child processes that end with their parent, and jobs that run in a child process: a job that
crashes, or runs out of memory or time, takes nothing else with it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil
from pydantic import BaseModel

from distillery.errors import ModelError, OutOfResources, lacks_memory, named_line
from distillery.progress import ShowProgress, show_nothing
from distillery.settings import CHILD
from distillery.storage.working import working_folder

Job = TypeVar("Job", bound=BaseModel)

SIGKILL = 9
"""A number, because Windows' `signal` lacks the name."""

PROGRESS_LINE = re.compile(r"progress (\d+) of (\d+): (.*)\n")
"""What a process writes to stdout to tell its parent how far it is."""

SECRET_WORD = re.compile(
    r"(?<![A-Z0-9])(AUTH|CONNECTION|CREDENTIALS?|KEYS?|PASS|PAT|SAS|TOKENS?)(?![A-Z0-9])"
    r"|APIKEY|PASSPHRASE|PASSWD|PASSWORD|PRIVATEKEY|SECRET|_PWD$"
)
"""Words of which one is in the name of a secret, as in HF_TOKEN, or joined to another, as in
PGPASSWORD. MONKEY is no such word, and PWD alone is the working folder."""

ACCOUNTS = ("AZURE_", "AZUREML_", "CHEAP_MODEL_", "JUDGE_MODEL_", "TEACHER_MODEL_")
"""What names of settings of accounts begin with."""

PASSWORD_IN_VALUE = re.compile(
    r"://[^/?#\s]*:[^/?#\s]*@|\b(password|passwd|pwd|sig|accountkey|sharedaccesskey)=",
    re.IGNORECASE,
)
"""A URL with user and password, as in postgresql://user:password@host, a connection string or a
signed URL."""


def environment_without_secrets(*needed: str) -> dict[str, str]:
    """Return this process's environment for a process that it starts, without keys, tokens,
    passwords, accounts and URLs that hold a password, but with those that are `needed`.

    The process reads no .env."""
    kept = {CHILD: "true"}
    for name, value in os.environ.items():
        if name in needed or not is_secret(name, value):
            kept[name] = value
    return kept


def is_secret(name: str, value: str) -> bool:
    """Return whether a variable of the environment is, or may hold, a secret."""
    name = name.upper()
    return bool(
        SECRET_WORD.search(name) or name.startswith(ACCOUNTS) or PASSWORD_IN_VALUE.search(value)
    )


def exit_with_parent(parent: int) -> None:
    """Make this process exit within half a second of the end of `parent`, a process id, whatever
    is under way here. Call it first of all."""

    def watch() -> None:
        try:
            process = psutil.Process(parent)
            # A parent that was killed is a zombie until its own parent asks for its exit code.
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.5)
        except psutil.NoSuchProcess:
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_in_process(
    module: str,
    job: BaseModel,
    limit_s: float = threading.TIMEOUT_MAX,
    progress: ShowProgress = show_nothing,
) -> str:
    """Run `python -m MODULE JOB RESULT PARENT` for at most `limit_s` seconds; return its result
    as JSON. See `process_main` for the other side, which says what `progress` shows.

    What the process writes to DISTILLERY_HOME is removed when it ends. Raises ModelError with the
    reason that the process gives, or that its exit code tells; OutOfResources if memory, disk or
    time ran out."""
    with working_folder("process") as folder:
        job_file, result_file = folder / "job.json", folder / "result.json"
        stderr_file = folder / "stderr.txt"
        job_file.write_text(job.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", module, str(job_file), str(result_file), str(os.getpid())]
        with (
            stderr_file.open("wb") as stderr,
            subprocess.Popen(  # noqa: S603 - our own interpreter and module
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                errors="replace",
                env=environment_without_secrets() | {"DISTILLERY_HOME": str(folder)},
            ) as process,
        ):
            code = wait_for(process, limit_s, progress)
        result = ""
        if result_file.exists():
            result = result_file.read_text(encoding="utf-8")
        if code == 0:
            return result
        if result:
            told = json.loads(result)
            reason, short = told["error"], told["lacks_memory"]
        else:
            reason = exit_reason(code, stderr_file.read_text(errors="replace"))
            short = code == -SIGKILL or lacks_memory(reason)
        if short:
            raise OutOfResources(reason)
        raise ModelError(reason)


def wait_for(process: "subprocess.Popen[str]", limit_s: float, progress: ShowProgress) -> int:
    """Show what the process tells of its progress until it ends; return its exit code.

    Kills it after `limit_s` seconds and raises OutOfResources; kills it too if `progress`
    raises."""
    expired = threading.Event()

    def end() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(limit_s, end)
    timer.start()
    try:
        for line in process.stdout or ():
            told = PROGRESS_LINE.fullmatch(line)
            if told:
                progress(int(told[1]), int(told[2]), told[3])
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
    if expired.is_set():
        raise OutOfResources(f"it did not finish within {limit_s / 60:g} minutes")
    return code


def tell_parent(done: int, of: int, text: str) -> None:
    """Tell `run_in_process`, which started this process, how far the job is."""
    # If the parent is gone, `exit_with_parent` ends this process.
    with suppress(BrokenPipeError):
        # Not sys.stdout: a job may redirect what libraries print.
        print(f"progress {done} of {of}: {text}", file=sys.__stdout__, flush=True)


def exit_reason(code: int, stderr: str) -> str:
    """Return one line on why a process ended: from its exit code (negative: a signal) and the last
    line that it wrote to stderr."""
    if code == -SIGKILL:
        return "its process was killed, as happens when memory runs out; free memory and run again"
    ended = f"with exit code {code}"
    if code < 0:
        ended = f"by signal {signal.Signals(-code).name}"
    lines = stderr.strip().splitlines() or ["no reason given"]
    return f"its process ended {ended} ({lines[-1].strip()[:200]})"


def process_main(
    arguments: Sequence[str], kind: type[Job], work: Callable[[Job, ShowProgress], BaseModel]
) -> int:
    """Do the job that `run_in_process` started this process for; return the exit code.

    `arguments` are JOB, RESULT and PARENT: a file that holds a `kind` as JSON; the file to which
    the result of `work` is written, or {"error": "one line", "lacks_memory": false}; and the id of
    the process to end with. `work` is given the job and what shows its progress."""
    job_file, result_file, parent = arguments
    exit_with_parent(int(parent))
    try:
        job = kind.model_validate_json(Path(job_file).read_text(encoding="utf-8"))
        result = work(job, tell_parent).model_dump_json()
        Path(result_file).write_text(result, encoding="utf-8")
    except Exception as error:
        # A runtime may raise anything; the parent reports it in one line.
        told = {"error": named_line(error), "lacks_memory": lacks_memory(error)}
        Path(result_file).write_text(json.dumps(told), encoding="utf-8")
        return 1
    return 0
