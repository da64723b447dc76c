"""Parts of a stage's work that children do before it, one each: what they have done is found by the
stage, which does the rest."""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import ClassVar

from prefect import get_run_logger
from pydantic import PositiveInt

from distillery.records import digest_of
from tasks.children import TRIES, Child, DeploymentRuns, Job


class PartsJob(Job):
    """What a child does: the part `number` of `parts`."""

    what: ClassVar[str] = "part"

    parts: PositiveInt


class PartsWork:
    """The parts of a stage's work. `of`: the units of work that are to be done; `made` looks at
    what children have made, and returns how many units are done.

    A part that a child has ended with is done, also if it ended with an error: the stage does what
    is left, meets the same, and says so. So is one whose children have died TRIES times."""

    def __init__(self, job: PartsJob, of: float, unit: str, made: Callable[[], float]) -> None:
        self.job, self._of, self._unit, self._made = job, of, unit, made
        self._waiting = deque(range(job.parts))
        self._failed: set[int] = set()
        self._left_to_stage: set[int] = set()
        self._deaths: Counter[int] = Counter()
        self._shown = 0.0

    @property
    def all_failed(self) -> bool:
        """Whether each part has ended with an error of its own."""
        return len(self._failed) == self.job.parts

    @property
    def units(self) -> tuple[float, float, str]:
        """See `Work`. Units that were made again can be more than was expected."""
        return self._shown, max(self._of, self._shown), self._unit

    def key(self, number: int) -> str:
        """See `Work`."""
        return digest_of(self.job.of(number).model_dump_json())

    def next_child(self, running: Sequence[Child]) -> int | None:
        """See `Work`."""
        return self._waiting.popleft() if self._waiting else None

    def is_for(self, child: Child) -> bool:
        """See `Work`."""
        return child.number not in self._left_to_stage

    def look_on(self) -> None:
        """See `Work`."""
        self._shown = self._made()

    def take_in(self, child: Child) -> None:
        """See `Work`."""
        if child.ended == "done":
            return
        log, title = get_run_logger(), self.job.of(child.number).title
        if child.ended == "failed":
            self._failed.add(child.number)
        else:
            self._deaths[child.number] += 1
            if self._deaths[child.number] < TRIES:
                self._waiting.appendleft(child.number)
                log.warning("%s has ended early (%s); another one follows", title, child.reason)
                return
        log.warning("%s: %s; this run asks what is left itself", title, child.reason)

    def do_here(self, child: Child) -> None:
        """See `Work`: the stage does it."""
        self._left_to_stage.add(child.number)


def runs_of(
    deployment: str | None, processes: int, parameter: str
) -> tuple[DeploymentRuns | None, int]:
    """Return the runs of a deployment, None where none is named, and how many children are to be at
    work: so many processes, or with a deployment and one process, one for each of its workers.
    `parameter` as in DeploymentRuns."""
    if deployment is None:
        return None, processes
    runs = DeploymentRuns(deployment, processes if processes > 1 else None, parameter)
    return runs, processes if processes > 1 else runs.most()
