"""Child processes that never outlive their parent, and work that is done in one: it may crash, or take more memory or
time than there is, and takes nothing else with it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from distillery.errors import DistilleryError, ModelError
from distillery.storage.working import working_folder

Job = TypeVar("Job", bound=BaseModel)


def end_with(parent: int) -> None:
    """Has this process end within half a second of its no longer being the child of the process id `parent`, however
    that ended and whatever is under way here. Call it first of all."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_apart(module: str, job: BaseModel, limit_s: float | None = None) -> str:
    """The result (JSON) of `python -m MODULE JOB RESULT PARENT`, which has `limit_s` seconds.

    What it writes to DISTILLERY_HOME goes when it ends. Raises ModelError with the reason that it gives, or that can be
    told from how it ended."""
    with working_folder("apart") as folder:
        job_file, result_file = folder / "job.json", folder / "result.json"
        job_file.write_text(job.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", module, str(job_file), str(result_file), str(os.getpid())]
        try:
            done = subprocess.run(  # noqa: S603 - our own interpreter and module
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limit_s,
                env=os.environ | {"DISTILLERY_HOME": str(folder)},
            )
        except subprocess.TimeoutExpired as error:
            raise ModelError(f"it was not done after {error.timeout / 60:g} minutes") from None
        result = result_file.read_text(encoding="utf-8") if result_file.exists() else ""
    if done.returncode != 0:
        raise ModelError(_failure(done.returncode, result, done.stderr))
    return result


def _failure(code: int, result: str, stderr: str) -> str:
    if result:
        return str(json.loads(result)["error"])
    if code == -signal.SIGKILL:
        return "its process was killed, as happens when memory runs out; free some and run again"
    last = next(
        (line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "no word of why"
    )
    ended = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"its process ended {ended} ({last[:200]})"


def work_apart(arguments: Sequence[str], kind: type[Job], work: Callable[[Job], BaseModel]) -> int:
    """The other side of `run_apart`: reads a job of `kind` and writes what `work` makes of it, or {"error": "one
    line"}. Returns the process's exit code."""
    job_file, result_file, parent = arguments
    end_with(int(parent))
    try:
        job = kind.model_validate_json(Path(job_file).read_text(encoding="utf-8"))
        Path(result_file).write_text(work(job).model_dump_json(), encoding="utf-8")
    except Exception as error:
        # Whatever a runtime raises is the parent's to report, in one line.
        text = " ".join(str(error).split())[:300]
        reason = text if isinstance(error, DistilleryError) else f"{type(error).__name__}: {text}"
        Path(result_file).write_text(json.dumps({"error": reason}), encoding="utf-8")
        return 1
    return 0
