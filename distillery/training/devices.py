"""A training on several devices: PyTorch's launcher, torchrun, starts a process for each.

Progress, log and checkpoints of the first rank come back to the process that asked for the
training: what these need, such as the store's login, no rank is given. If a rank, the launcher or
that process dies, the others end too, and the next run goes on (see `ended`).

The ranks of a second machine are started there by torchrun and find the job by the first rank's
word: both machines see its files under the same path (docs/how-to/operations.md).
"""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from distillery import errors
from distillery.errors import (
    DistilleryError,
    StoreError,
    TrainingError,
    TrainingUnavailable,
    one_line,
)
from distillery.models.device import has_several_machines, release_gpu
from distillery.processes import environment_without_secrets, exit_reason, exit_with_parent
from distillery.progress import show_rows, shown_by
from distillery.records import CurvePoint
from distillery.settings import LocalSettings
from distillery.storage.working import working_folder
from distillery.training.checkpoint import Checkpoints
from distillery.training.decisions import keep_decisions, kept_decisions
from distillery.training.job import TrainingJob, distil
from distillery.training.loop import Progress, TrainingProgress
from distillery.training.ranks import Ranks

_log = logging.getLogger(__name__)

MARK = "distillery-rank "
"""What a line begins with by which the first rank tells the asking process something."""

PATIENCE = timedelta(hours=1)
"""How long a rank waits for the others, such as for the first one while it saves a checkpoint."""

END_S = 10.0
"""Seconds that the launcher has to end its ranks."""

JOB_FILE = "job.json"
LOADED, SAVED, ANSWER = "loaded", "saved", "answer.json"

EXIT_CODE = re.compile(r"exitcode *: (-?\d+)")
"""How torchrun tells the exit code of each rank that failed, the root cause's last. It is negative
for a signal."""

LAUNCHER_LOG = re.compile(r"[A-Z]\d{4} ")
"""What a line of torchrun's log begins with: the level's letter, month and day."""


def distil_on_devices(
    job: TrainingJob, progress: Progress | None, checkpoints: Checkpoints | None
) -> None:
    """Train as `job` says on DISTILLERY_DEVICES devices: GPUs where there are some, else processes
    on the CPU.

    Raises what `distil` raises in a rank, and TrainingUnavailable where a rank or the launcher
    dies."""
    devices = LocalSettings().devices
    # Of what this process has computed before, such as the teacher's hidden states.
    release_gpu()
    with working_folder("ranks") as folder:
        (folder / JOB_FILE).write_text(job.model_dump_json(), encoding="utf-8")
        if checkpoints:
            (folder / LOADED).mkdir()
            checkpoints.load(folder / LOADED)
        with (
            (folder / "stderr.txt").open("wb") as stderr,
            subprocess.Popen(  # noqa: S603 - our own interpreter and modules
                command_of(folder, devices),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                errors="replace",
                env=environment_of(folder, devices),
            ) as launcher,
        ):
            try:
                for line in launcher.stdout or ():
                    if line.startswith(MARK):
                        hear(json.loads(line.removeprefix(MARK)), folder, progress, checkpoints)
                code = launcher.wait()
            finally:
                end(launcher)
        if code:
            raise failure_of(code, folder)


def command_of(folder: Path, devices: int) -> list[str]:
    """Return the launcher's command. Its variables for several machines come from the environment;
    the processes of one machine meet by files in `folder`, so that no port is open to others."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(devices)]
    launcher += ["--log-dir", str(folder / "log")]
    if not has_several_machines():
        launcher += ["--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--rdzv-id", "one"]
        launcher += ["--rdzv-endpoint", str(folder / "launcher"), "--local-addr", "127.0.0.1"]
    rank = ["-m", "distillery.training.devices", str(folder), str(os.getpid())]
    return [*launcher, *rank]


def environment_of(folder: Path, devices: int) -> dict[str, str]:
    """Return the ranks' environment, without secrets. What they write to DISTILLERY_HOME is removed
    with `folder`."""
    threads = max(1, torch.get_num_threads() // devices)
    environment = environment_without_secrets()
    environment |= {"DISTILLERY_HOME": str(folder), "OMP_NUM_THREADS": str(threads)}
    if not has_several_machines():
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        # NCCL's service for questions on its state, which nobody asks here.
        environment.setdefault("NCCL_RAS_ENABLE", "0")
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
            environment.setdefault("NCCL_SOCKET_IFNAME", "lo")
    return environment


def hear(
    told: dict[str, Any], folder: Path, progress: Progress | None, checkpoints: Checkpoints | None
) -> None:
    """Do in this process what the first rank has told."""
    if "log" in told:
        name, level, text = told["log"]
        logging.getLogger(name).log(level, "%s", text)
    elif "rows" in told:
        show_rows(*told["rows"])
    elif "decisions" in told:
        keep_decisions(told["decisions"])
    elif "saved" in told and checkpoints:
        answer = ""
        try:
            checkpoints.save(folder / SAVED)
        except StoreError as error:
            answer = str(error)
        shutil.rmtree(folder / SAVED, ignore_errors=True)
        write_whole(folder / ANSWER, json.dumps(answer))
    elif "point" in told and progress:
        point = CurvePoint.model_validate(told.pop("point"))
        progress(TrainingProgress(point=point, **told))


def end(launcher: "subprocess.Popen[str]") -> None:
    """End the launcher, which ends its ranks first."""
    launcher.terminate()
    with suppress(subprocess.TimeoutExpired):
        launcher.wait(END_S)
    launcher.kill()


def failure_of(code: int, folder: Path) -> Exception:
    """Return the error of a launcher that ended with `code`: what the first rank that failed has
    said, or how it died."""
    said = sorted(folder.glob("error-*.json"), key=lambda file: file.stat().st_mtime_ns)
    found = [json.loads(file.read_text(encoding="utf-8")) for file in said]
    # When a rank ends, the others fail because it is gone.
    for kind, text in found:
        if kind == "OutOfMemoryError" or "out of memory" in text:
            advice = "set training.gradient_checkpointing: true"
            if not LocalSettings().fsdp:
                advice += ", or, but for qlora, DISTILLERY_FSDP=true where the worker starts"
            return TrainingError(
                f"training.batch_size: a GPU's memory is full ({text}); lower it and raise "
                f"training.accumulation as much, or {advice}"
            )
        known = getattr(errors, kind, None)
        if known is not None:
            error: DistilleryError = known(text)
            return error
    stderr = (folder / "stderr.txt").read_text(errors="replace")
    codes = [int(each) for each in EXIT_CODE.findall(stderr)]
    # If a rank is killed, torchrun may see first that another one has failed because of it. SIGTERM
    # is what torchrun itself ends the others with.
    signals = [each for each in codes if each < 0 and each != -signal.SIGTERM]
    died = [code, *codes, *signals][-1]
    if died < 0 or not found:
        return ended(exit_reason(died, without_report(stderr)))
    kind, text = found[0]
    return RuntimeError(f"{kind}: {text}")


def ended(reason: str) -> TrainingUnavailable:
    """Return the error of processes that died or never met."""
    return TrainingUnavailable(
        f"training on several devices: {reason}; the next run goes on from its last checkpoint, if "
        "there is one"
    )


def without_report(stderr: str) -> str:
    """Return `stderr` without what torchrun adds where a rank fails, and without borders: its log,
    and a table that tells ranks and exit codes, but not what a rank has said."""
    if "ChildFailedError" in stderr:
        stderr = stderr.rpartition("Traceback (most recent call last)")[0]
    lines = [line for line in stderr.splitlines() if any(map(str.isalnum, line))]
    return "\n".join(line for line in lines if not LAUNCHER_LOG.match(line))


def main(arguments: Sequence[str]) -> int:
    """Be one of the ranks that torchrun has started; return the exit code.

    `arguments`: the folder of `distil_on_devices` and its process id, both on the first machine
    alone."""
    given = arguments[0] if arguments else ""
    # torchrun died during the imports. On a second machine it may itself be process 1.
    if given and os.getppid() == 1:
        return 1
    exit_with_parent(os.getppid())
    if arguments:
        exit_with_parent(int(arguments[1]))
    asking = AskingProcess.on_stdout()
    folder = Path(given) if given else None
    try:
        ranks = meet(given)
        folder = folder_of_first(given)
        job = TrainingJob.model_validate_json((folder / JOB_FILE).read_text(encoding="utf-8"))
        checkpoints = None
        if (folder / LOADED).is_dir():
            checkpoints = RelayedCheckpoints(folder, asking)
        if ranks.is_first:
            with asking.listening() as decisions:
                distil(job, asking.tell_progress, checkpoints, ranks)
            asking.tell(decisions=decisions)
        else:
            distil(job, None, checkpoints, ranks)
    except Exception as error:
        # A library may raise anything; the asking process reports it in one line.
        if folder is None:
            raise
        text = [type(error).__name__, one_line(error, 300)]
        write_whole(folder / f"error-{os.environ['RANK']}.json", json.dumps(text))
        return 1
    dist.destroy_process_group()
    return 0


def meet(folder: str) -> Ranks:
    """Meet the other ranks: those of one machine by a file in `folder`, without a port that is open
    to other machines.

    Raises TrainingUnavailable where they do not meet."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    try:
        dist.init_process_group(
            backend,
            init_method="env://" if has_several_machines() else f"file://{folder}/ranks",
            rank=ranks.rank,
            world_size=ranks.count,
            timeout=PATIENCE,
        )
    except RuntimeError as error:
        # PyTorch adds a stack trace.
        reason = one_line(error, 100)
        raise ended(f"its processes do not reach each other ({reason})") from error
    return ranks


def folder_of_first(folder: str) -> Path:
    """Return the folder that the first rank knows."""
    path = torch.zeros(4096, dtype=torch.uint8)
    given = folder.encode()
    path[: len(given)] = torch.tensor(list(given), dtype=torch.uint8)
    dist.broadcast(path, 0)
    return Path(bytes(path.tolist()).rstrip(b"\0").decode())


@dataclass(frozen=True)
class AskingProcess:
    """The process that asked for the training, to which the first rank tells something by
    `stream`."""

    stream: TextIO

    @classmethod
    def on_stdout(cls) -> "AskingProcess":
        """Return the process that reads this one's stdout, and send to stderr what others print."""
        stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        return cls(stream)

    def tell(self, **told: Any) -> None:
        # If it is gone, `exit_with_parent` ends this process.
        with suppress(BrokenPipeError):
            print(MARK + json.dumps(told), file=self.stream, flush=True)

    def tell_progress(self, at: TrainingProgress) -> None:
        self.tell(**at._asdict() | {"point": at.point.model_dump(mode="json")})

    @contextmanager
    def listening(self) -> Iterator[list[str]]:
        """Tell what is logged and shown within; give the decisions made there."""
        tell = self.tell

        class Teller(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                tell(log=[record.name, record.levelno, record.getMessage()])

        logger = logging.getLogger("distillery")
        logger.addHandler(Teller())
        logger.setLevel(logging.INFO)
        logger.propagate = False
        with (
            shown_by(lambda done, of, text: tell(rows=[done, of, text])),
            kept_decisions() as decisions,
        ):
            yield decisions


@dataclass(frozen=True)
class RelayedCheckpoints:
    """Checkpoints of a rank, which the asking process keeps: it has put the last one into `folder`,
    and fetches the next one there."""

    folder: Path
    asking: AskingProcess

    def save(self, folder: Path) -> None:
        os.rename(folder, self.folder / SAVED)
        self.asking.tell(saved=True)
        answer = self.folder / ANSWER
        while not answer.exists():
            time.sleep(0.02)
        text = json.loads(answer.read_text(encoding="utf-8"))
        answer.unlink()
        if text:
            raise StoreError(text)

    def load(self, into: Path) -> bool:
        files = list((self.folder / LOADED).iterdir())
        for file in files:
            # A copy for each rank would take a large model's weights as often.
            (into / file.name).symlink_to(file)
        return bool(files)


def write_whole(file: Path, text: str) -> None:
    """Write a file that another process waits for."""
    beside = file.with_suffix(".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code:
        # PyTorch's threads, which still wait for the other ranks, would now and then abort an
        # ordinary exit, and torchrun would tell of that signal.
        sys.stderr.flush()
        os._exit(code)
