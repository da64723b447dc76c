"""Work in several processes: on the work pool of a deployment, or on this machine.

What a child has done is kept whatever becomes of it: answers of a student to a shard are cached
(shards.py), those of models to test rows too (slices.py), those of a teacher are in the label store
(label_parts.py). What children do is a Work: shards that they take from one list (shard_work.py),
or a part for each (parts_work.py).
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import httpx
from prefect import get_client, get_run_logger
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import CancelledRun, ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelled
from pydantic import NonNegativeInt, PositiveInt

from distillery.errors import DataError, DistilleryError
from distillery.machine import usable_cores
from distillery.processes import exit_reason, exit_with_parent
from distillery.records import Record
from tasks.progress import StageProgress
from tasks.results import BLOCK
from tasks.stage import produced_by

POLL_S = 0.5

LOOK_S = 5.0
"""Seconds between two looks at what children that are at work have done."""

WORKERS_S = 15.0
"""Seconds between two counts of a pool's workers."""

TAKE_BACK_S = 60.0
"""Seconds after which the parent does a child's work itself, where no worker takes one."""

MOST_RUNS = 100
"""Runs at work or waiting at once, at most: Prefect's queues stall with some 200."""

TRIES = 3
"""Children in a row that may end without anything done."""


class Job(Record):
    """What the child `number` does, from 0. `threads`: cores for one operation; None leaves it to
    the runtime."""

    what: ClassVar[str] = "child run"
    """What is counted by `number`."""

    number: NonNegativeInt = 0
    threads: PositiveInt | None = None

    @property
    def title(self) -> str:
        """Which one it is, counted from 1."""
        return f"{self.what} {self.number + 1}"

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the flow that does it."""
        return dict(self)

    def of(self, number: int) -> Self:
        """Return the same job for another number."""
        return self.model_copy(update={"number": number})


@dataclass
class Child:
    """A process or run that does the job `number`. `reason`: how it ended, "" while it has not.
    `ended` says it in a word: "failed" is with an error of its own, which another one would meet
    too, and "died" is otherwise, as by a signal. `taken`: a worker has taken it from its queue."""

    number: int
    handle: Any
    taken: bool = True
    since: float = field(default_factory=time.monotonic)
    reason: str = ""
    ended: Literal["done", "failed", "died"] | None = None


class Work(Protocol):
    """What children do, and what the parent knows of it."""

    @property
    def job(self) -> Job:
        """The job, for any child."""
        ...

    @property
    def units(self) -> tuple[float, float, str]:
        """What is done, of how much, and the unit's name, for the progress."""
        ...

    def key(self, number: int) -> str:
        """Return the idempotency key of a child."""
        ...

    def next_child(self, running: Sequence[Child]) -> int | None:
        """Return the number of the child that is to be started beside those that run; None where
        there is nothing for it to do."""
        ...

    def is_for(self, child: Child) -> bool:
        """Return whether there is something to do for a child that no worker has taken yet."""
        ...

    def look_on(self) -> None:
        """Look at what children have done."""

    def take_in(self, child: Child) -> None:
        """Look at what a child that has ended has done."""

    def do_here(self, child: Child) -> None:
        """Do in this process what a child would do next."""


class Children(Protocol):
    """Where children run."""

    def most(self) -> int:
        """Return how many may be at work or wait at once."""

    def start(self, job: Job, key: str) -> Child:
        """Start a child; one that another parent has started for the same key is taken over."""

    def look(self, children: Sequence[Child]) -> None:
        """Set `taken`, `reason` and `ended` of the children."""

    def end(self, children: Iterable[Child]) -> None:
        """End children that have not ended."""


def work_by(children: Children, work: Work, progress: StageProgress) -> None:
    """Have children do all of `work`. Raises what `work` raises where they do it in vain."""
    running: list[Child] = []
    looked_at = time.monotonic()
    told = False
    try:
        while start_children(children, work, running):
            time.sleep(POLL_S)
            children.look(running)
            ended = [child for child in running if child.reason]
            if ended or time.monotonic() - looked_at >= LOOK_S:
                work.look_on()
                looked_at = time.monotonic()
            for child in ended:
                running.remove(child)
                work.take_in(child)
            progress.show(*work.units, f"{len(running)} child runs")
            waiting = waiting_in_vain(running)
            if waiting:
                if not told:
                    get_run_logger().warning(
                        "no worker has taken a child run for %.0f s; this run does the work itself",
                        TAKE_BACK_S,
                    )
                work.do_here(waiting)
                # A worker may have taken it meanwhile.
                children.look(running)
            told = waiting is not None
            needless = [child for child in running if not (child.taken or work.is_for(child))]
            running = [child for child in running if child not in needless]
            children.end(needless)
    finally:
        children.end(running)


def start_children(children: Children, work: Work, running: list[Child]) -> bool:
    """Start the children that there is work for, and add them to those that run. Return whether
    any run."""
    while len(running) < children.most() and (number := work.next_child(running)) is not None:
        running.append(children.start(work.job.of(number), work.key(number)))
    return bool(running)


def waiting_in_vain(running: Sequence[Child]) -> Child | None:
    """Return the child that has waited longest, if none is at work and it has waited for
    TAKE_BACK_S: there is no worker, or the parent has taken the place of the only one."""
    if not running or any(child.taken for child in running):
        return None
    oldest = min(running, key=lambda child: child.since)
    return oldest if time.monotonic() - oldest.since >= TAKE_BACK_S else None


class DeploymentRuns:
    """Child runs of a deployment. `limit`: how many at once; by default one for each of the pool's
    workers. `parameter`: which of the flow's names the deployment, for messages."""

    def __init__(
        self, deployment: str, limit: int | None, parameter: str = "shards_deployment"
    ) -> None:
        """Raises DataError if there is no such deployment."""
        self.deployment, self._limit = deployment, limit
        self._counted_at, self._most = -WORKERS_S, 1
        self._attempts: Counter[str] = Counter()
        with get_client(sync_client=True) as client:
            try:
                found = client.read_deployment_by_name(deployment)
            except ObjectNotFound:
                raise DataError(
                    f"{parameter}: no deployment {deployment} here; `prefect deploy --all`"
                ) from None
        self._pool = found.work_pool_name

    def most(self) -> int:
        """See `Children`."""
        if self._limit is not None:
            return min(self._limit, MOST_RUNS)
        if time.monotonic() - self._counted_at >= WORKERS_S:
            self._counted_at = time.monotonic()
            self._most = min(MOST_RUNS, max(1, self._workers_online()))
        return self._most

    def _workers_online(self) -> int:
        """Return how many workers of the pool are there."""
        if self._pool is None:
            return 1
        try:
            with get_client(sync_client=True) as client:
                workers = client.read_workers_for_work_pool(self._pool)
        except (ObjectNotFound, PrefectHTTPStatusError, httpx.TransportError):
            return 1
        return sum(worker.status == WorkerStatus.ONLINE for worker in workers)

    def start(self, job: Job, key: str) -> Child:
        """See `Children`. A run that has ended is followed by another one under the next key."""
        # Without defaults: the schema of a slice leaves out fields that mean nothing in it.
        sent = job.model_dump(mode="json", exclude={"threads"}, exclude_defaults=True)
        name = f"{produced_by()}, {job.title}"
        while True:
            run: Any = run_deployment(
                self.deployment,
                parameters=sent,
                flow_run_name=name,
                timeout=0,
                idempotency_key=f"shards-{key}-{self._attempts[key]}",
            )
            if run.state is None or not run.state.is_final():
                return Child(job.number, run, taken=is_taken(run.state))
            self._attempts[key] += 1

    def look(self, children: Sequence[Child]) -> None:
        """See `Children`. While the server does not answer, all count as alive."""
        if not children:
            return
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=[child.handle.id for child in children]))
        try:
            with get_client(sync_client=True) as client:
                runs = client.read_flow_runs(flow_run_filter=wanted, limit=2 * MOST_RUNS)
        except (httpx.TransportError, PrefectHTTPStatusError):
            return
        found: dict[Any, FlowRun] = {run.id: run for run in runs}
        for child in children:
            run = found.get(child.handle.id)
            if run is None:
                child.reason, child.ended = "the run was deleted", "died"
            elif run.state and run.state.is_final():
                child.ended = "died"
                if run.state.is_completed() or run.state.is_failed():
                    child.ended = "done" if run.state.is_completed() else "failed"
                child.reason = f"{run.name} ended as {run.state.name}: {run.state.message}"
            else:
                child.taken = is_taken(run.state)

    def end(self, children: Iterable[Child]) -> None:
        """See `Children`. Runs that are at work end by themselves (parent.py)."""
        left = [child for child in children if not child.taken]
        with get_client(sync_client=True) as client:
            for child in left:
                try:
                    client.set_flow_run_state(
                        child.handle.id, Cancelled(message="the run that asked for it is done")
                    )
                except (httpx.TransportError, PrefectHTTPStatusError, ObjectNotFound):
                    continue


def is_taken(state: State | None) -> bool:
    """Return whether a worker has taken a run in this state."""
    return state is not None and not state.is_scheduled()


class LocalProcesses:
    """`count` processes of this machine, each of which gets its share of the cores."""

    def __init__(self, count: int, module: str, folder: Path) -> None:
        """`module` is run with the path of a Job, and this process's id to end with. Its logs
        are in `folder`."""
        self._count, self._module, self._folder = count, module, folder
        self._threads = max(1, usable_cores() // count)
        with get_client(sync_client=True) as client:
            # Of the temporary server, too.
            self._api = str(client.api_url).rstrip("/")

    def most(self) -> int:
        """See `Children`."""
        return self._count

    def start(self, job: Job, key: str) -> Child:
        """See `Children`."""
        own = Path(tempfile.mkdtemp(dir=self._folder))
        file = own / "job.json"
        file.write_text(job.model_copy(update={"threads": self._threads}).model_dump_json())
        settings = {"PREFECT_API_URL": self._api, "PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK": BLOCK}
        with (own / "log").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", self._module, str(file), str(os.getpid())],
                env=os.environ | settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return Child(job.number, (process, own / "log"))

    def look(self, children: Sequence[Child]) -> None:
        """See `Children`."""
        for child in children:
            process, log = child.handle
            code = process.poll()
            if code == 0:
                child.reason, child.ended = "its process ended", "done"
            elif code is not None:
                child.ended = "died" if code < 0 else "failed"
                child.reason = exit_reason(code, log.read_text(errors="replace"))

    def end(self, children: Iterable[Child]) -> None:
        """See `Children`."""
        for child in children:
            process, _ = child.handle
            process.kill()
            process.wait()


def do_job(flow: Callable[..., Any], kind: type[Job], arguments: Sequence[str]) -> int:
    """Do the job of a file by a flow, in a process that LocalProcesses has started; return its exit
    code. The process ends with the one that has written the file."""
    job_file, parent = arguments
    exit_with_parent(int(parent))
    job = kind.model_validate_json(Path(job_file).read_text(encoding="utf-8"))
    try:
        flow(**job.parameters)
    except (DistilleryError, CancelledRun) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
