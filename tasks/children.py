"""Work in several processes: on the work pool of a deployment, or on this machine.

A child does a group of successive shards. What it has done is kept whatever becomes of it: answers
of a student to a shard are cached (shards.py), those of models to test rows too (slices.py), those
of a teacher are in the label store (label_parts.py). A child that leaves a part of its group undone
is followed by another one.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import httpx
from prefect import get_client, get_run_logger
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import CancelledRun, ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelled
from pydantic import PositiveInt

from distillery.errors import DataError, DistilleryError, ModelError
from distillery.machine import usable_cores
from distillery.processes import exit_reason, exit_with_parent
from distillery.recipe import PromptRecipe
from distillery.records import (
    Record,
    RegisteredModel,
    Shard,
    ShardAnswers,
    ShardedRows,
    digest_of,
)
from tasks.progress import StageProgress
from tasks.results import BLOCK
from tasks.shards import answer_shard
from tasks.stage import content_of, produced_by

POLL_S = 0.5

LOOK_S = 5.0
"""Seconds between two looks for answers of children that are at work."""

WORKERS_S = 15.0
"""Seconds between two counts of a pool's workers."""

TAKE_BACK_S = 60.0
"""Seconds after which the parent does a child's work itself, where no worker takes one."""

RUNS_PER_WORKER = 2
"""Runs at work or waiting for each worker, so that one waits when another ends."""

MOST_RUNS = 100
"""Runs at work or waiting at once, at most: Prefect's queues stall with some 200."""

LARGEST_GROUP = 32
"""Shards of a student's rows that a child answers, at most: 65,536 rows. A start takes some five
seconds of a core."""

FEWEST_WORKERS = 4
"""Workers that work is divided among at least: one may have several runs at once, and others may
come."""

TRIES = 3
"""Children in a row that may end without a further shard answered."""


class Group(NamedTuple):
    """Successive shards: the number of the first, from 0, and how many."""

    first: int
    size: int

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + self.size)


class Job(Record):
    """What a child does: `count` shards from the number `first` on. `threads`: cores for one
    operation; None leaves it to the runtime."""

    what: ClassVar[str] = "shards"
    """What the shards are called."""

    first: int = 0
    count: PositiveInt = 1
    threads: PositiveInt | None = None

    @property
    def title(self) -> str:
        """Which shards it is, counted from 1."""
        first, last = self.first + 1, self.first + self.count
        one = f"{self.what.removesuffix('s')} {first}"
        return one if first == last else f"{self.what} {first} to {last}"

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the flow that does it."""
        return dict(self)

    def of(self, group: Group) -> Self:
        """Return the same job for a group."""
        return self.model_copy(update={"first": group.first, "count": group.size})


class ShardsJob(Job):
    """What a child does that answers shards of `rows` with a student."""

    model: RegisteredModel
    prompt: PromptRecipe
    rows: ShardedRows


class PartsJob(Job):
    """What a child does that does some of `parts` parts of a stage's work before it."""

    what: ClassVar[str] = "parts"

    parts: PositiveInt


class Work(Protocol):
    """Shards that are to be done, each by its number, and what the parent knows of them."""

    @property
    def job(self) -> Job:
        """The job, for any of the shards."""
        ...

    @property
    def count(self) -> int:
        """How many shards there are."""
        ...

    @property
    def largest_group(self) -> int:
        """How many of them a child does, at most."""
        ...

    @property
    def units(self) -> tuple[float, float, str]:
        """What is done, of how much, and the unit's name, for the progress."""
        ...

    def key(self, group: Group) -> str:
        """Return the idempotency key of a child for this group."""
        ...

    def missing(self, group: Group) -> list[int]:
        """Return the shards of a group that are not known to be done."""
        ...

    def take_in(self, child: "Child") -> None:
        """Look at what a child that has ended has done."""

    def look_on(self, group: Group) -> None:
        """Look at what a child that is at work has done."""

    def do_here(self, number: int) -> None:
        """Do a shard in this process."""


class ShardWork:
    """The shards of a job, and the answers that are known: `answers` by a shard's number. `find`
    returns the record of `answer_shard` for its arguments, or None if there is none."""

    largest_group = LARGEST_GROUP

    def __init__(self, job: ShardsJob, shards: Sequence[Shard], find: Callable[..., Any]) -> None:
        self.job, self.shards = job, shards
        self.answers: dict[int, ShardAnswers] = {}
        self._find = find
        self._rows = sum(shard.rows for shard in shards)

    @property
    def count(self) -> int:
        """See `Work`."""
        return len(self.shards)

    @property
    def units(self) -> tuple[float, float, str]:
        """See `Work`."""
        return self.rows_done, self._rows, "rows"

    def key(self, group: Group) -> str:
        """See `Work`: the digest of shards, model and prompt."""
        shards = [self.shards[number].content_id for number in group.numbers]
        return digest_of([self.job.model.content_id, content_of(self.job.prompt), *shards])

    def take_in(self, child: "Child") -> None:
        """See `Work`."""
        self.look(child.group.numbers)

    def look(self, numbers: Iterable[int]) -> None:
        """Read the answers that the store has."""
        for number in numbers:
            if number not in self.answers:
                found = self._find(
                    model=self.job.model, prompt=self.job.prompt, shard=self.shards[number]
                )
                if found is not None:
                    self.answers[number] = found

    def look_on(self, group: Group) -> None:
        """Read the answers of a group that is being answered, up to the first shard that has none:
        a child answers them in their order."""
        for number in self.missing(group):
            self.look([number])
            if number not in self.answers:
                return

    def missing(self, group: Group) -> list[int]:
        """Return the shards of a group whose answers are not known."""
        return [number for number in group.numbers if number not in self.answers]

    def do_here(self, number: int) -> None:
        """See `Work`."""
        shard = self.shards[number]
        self.answers[number] = answer_shard(self.job.model, self.job.prompt, shard)

    @property
    def rows_done(self) -> int:
        """Rows of the shards whose answers are known."""
        return sum(self.shards[number].rows for number in self.answers)


class PartsWork:
    """The parts of a stage's work that children do before it. `of`: the units of work that are to
    be done; `made` looks at what children have made, as that of a group does, and returns how many
    units are done.

    A part that a child has ended with is done, also if it ended with an error: the stage does what
    is left, meets the same, and says so. So is one whose children have died TRIES times."""

    largest_group = 1

    def __init__(self, job: PartsJob, of: float, unit: str, made: Callable[[Group], float]) -> None:
        self.job, self._of, self._unit, self._made = job, of, unit, made
        self._done: set[int] = set()
        self._failed: set[int] = set()
        self._deaths: Counter[int] = Counter()
        self._shown = 0.0

    @property
    def count(self) -> int:
        """See `Work`."""
        return self.job.parts

    @property
    def all_failed(self) -> bool:
        """Whether each part has ended with an error of its own."""
        return len(self._failed) == self.job.parts

    @property
    def units(self) -> tuple[float, float, str]:
        """See `Work`. Units that were made again can be more than was expected."""
        return self._shown, max(self._of, self._shown), self._unit

    def key(self, group: Group) -> str:
        """See `Work`."""
        return digest_of(self.job.of(group).model_dump_json())

    def missing(self, group: Group) -> list[int]:
        """See `Work`."""
        return [part for part in group.numbers if part not in self._done]

    def take_in(self, child: "Child") -> None:
        """See `Work`."""
        self.look_on(child.group)
        left = self.missing(child.group)
        if child.ended == "died":
            self._deaths.update(left)
            left = [part for part in left if self._deaths[part] >= TRIES]
        self._done.update(left)
        if child.ended == "failed":
            self._failed.update(left)
        if left and child.ended != "done":
            title = self.job.of(child.group).title
            get_run_logger().warning(
                "%s: %s; this run asks what is left itself", title, child.reason
            )

    def look_on(self, group: Group) -> None:
        """See `Work`."""
        self._shown = self._made(group)

    def do_here(self, number: int) -> None:
        """See `Work`: the stage does it."""
        self._done.add(number)


@dataclass
class Child:
    """A process or run that does a group. `reason`: how it ended, "" while it has not. `ended` says
    it in a word: "failed" is with an error of its own, which another one would meet too, and "died"
    is otherwise, as by a signal. `taken`: a worker has taken it from its queue."""

    group: Group
    handle: Any
    taken: bool = True
    since: float = field(default_factory=time.monotonic)
    reason: str = ""
    ended: Literal["done", "failed", "died"] | None = None


class Children(Protocol):
    """Where children run."""

    def most(self) -> int:
        """Return how many may be at work or wait at once."""

    def workers(self) -> int:
        """Return how many can be at work at once."""

    def start(self, job: Job, key: str) -> Child:
        """Start a child; one that another parent has started for the same key is taken over."""

    def look(self, children: Sequence[Child]) -> None:
        """Set `taken`, `reason` and `ended` of the children."""

    def end(self, children: Iterable[Child]) -> None:
        """End children that have not ended."""


def groups_of(shards: int, workers: int, largest: int = LARGEST_GROUP) -> Iterator[Group]:
    """Yield all shards in groups that become smaller towards the end, so that children seldom start
    and `workers` end together (guided self-scheduling: Polychronopoulos and Kuck, 1987). `largest`:
    shards of a group, at most."""
    first = 0
    while first < shards:
        count = min(largest, max(1, (shards - first) // max(workers, FEWEST_WORKERS)))
        yield Group(first, count)
        first += count


def work_by(children: Children, work: Work, progress: StageProgress) -> None:
    """Have children do all shards of `work` that are missing.

    Raises ModelError if TRIES children in a row end without another shard of their group done."""
    groups = groups_of(work.count, children.workers(), work.largest_group)
    waiting = deque(group for group in groups if work.missing(group))
    running: list[Child] = []
    fruitless: Counter[Group] = Counter()
    looked_at = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < children.most():
                group = waiting.popleft()
                running.append(children.start(work.job.of(group), work.key(group)))
            time.sleep(POLL_S)
            children.look(running)
            for child in [child for child in running if child.reason]:
                running.remove(child)
                before = len(work.missing(child.group))
                work.take_in(child)
                left = len(work.missing(child.group))
                if left:
                    fruitless[child.group] = 0 if left < before else fruitless[child.group] + 1
                    again(child, work.job.of(child.group).title, left, fruitless[child.group])
                    waiting.appendleft(child.group)
            if time.monotonic() - looked_at >= LOOK_S:
                for child in running:
                    work.look_on(child.group)
                looked_at = time.monotonic()
            progress.show(*work.units, f"{len(running)} child runs")
            for child in not_taken(running):
                running.remove(child)
                children.end([child])
                for number in work.missing(child.group):
                    work.do_here(number)
    finally:
        children.end(running)


def again(child: Child, title: str, left: int, fruitless: int) -> None:
    """Log that a child has left shards undone. Raises ModelError after TRIES in a row."""
    text = f"{title}: a child run left {left} undone ({child.reason})"
    if fruitless >= TRIES:
        raise ModelError(
            f"{text}, and so did {TRIES - 1} before it; mend what it says and run again: what "
            "is done is kept"
        )
    get_run_logger().warning("%s; another one follows", text)


def not_taken(running: Sequence[Child]) -> list[Child]:
    """Return the child that has waited longest, if none is at work and it has waited for
    TAKE_BACK_S: there is no worker, or the parent has taken the place of the only one."""
    if not running or any(child.taken for child in running):
        return []
    oldest = min(running, key=lambda child: child.since)
    if time.monotonic() - oldest.since < TAKE_BACK_S:
        return []
    get_run_logger().warning(
        "no worker has taken a child run for %.0f s; this run does its work itself",
        TAKE_BACK_S,
    )
    return [oldest]


class DeploymentRuns:
    """Child runs of a deployment. `limit`: how many at once; None goes by the pool's workers.
    `parameter`: which of the flow's names the deployment, for messages."""

    def __init__(
        self, deployment: str, limit: int | None, parameter: str = "shards_deployment"
    ) -> None:
        """Raises DataError if there is no such deployment."""
        self.deployment, self._limit = deployment, limit
        self._counted_at, self._most = -WORKERS_S, RUNS_PER_WORKER
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
            self._most = min(MOST_RUNS, max(1, self._workers_online()) * RUNS_PER_WORKER)
        return self._most

    def workers(self) -> int:
        """See `Children`."""
        return max(1, self.most() // RUNS_PER_WORKER)

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
        group, name = Group(job.first, job.count), f"{produced_by()}, {job.title}"
        attempt = 0
        while True:
            run: Any = run_deployment(
                self.deployment,
                parameters=sent,
                flow_run_name=name,
                timeout=0,
                idempotency_key=f"shards-{key}-{attempt}",
            )
            if run.state is None or not run.state.is_final():
                return Child(group, run, taken=is_taken(run.state))
            attempt += 1

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


def runs_of(
    deployment: str | None, processes: int, parameter: str
) -> tuple[DeploymentRuns | None, int]:
    """Return the runs of a deployment, None where none is named, and how many children are to be at
    work: so many processes, or with a deployment and one process, one for each of its workers.
    `parameter` as in DeploymentRuns."""
    if deployment is None:
        return None, processes
    runs = DeploymentRuns(deployment, processes if processes > 1 else None, parameter)
    return runs, processes if processes > 1 else runs.workers()


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

    def workers(self) -> int:
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
        return Child(Group(job.first, job.count), (process, own / "log"))

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


def answer_here(work: ShardWork, show: Callable[[int], None]) -> None:
    """Answer all shards of `work` whose answers are not known in this process. `show` is told how
    many rows are done."""
    for number in range(len(work.shards)):
        if number not in work.answers:
            work.do_here(number)
        show(work.rows_done)
