"""Scoring in several processes: before a stage scores models on many test rows, children ask them,
each about a part, and keep what they find as slices (slices.py). The stage takes the slices, and
asks what is left, so that nothing depends on what becomes of a child."""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, ParamSpec, TypeVar

from prefect import Task

from distillery.errors import ModelError, RecipeError
from distillery.evaluation.slices import (
    SLICE_ROWS,
    count_of_parts,
    slice_numbers,
    slice_of,
)
from distillery.records import Rows, digest_of
from distillery.storage.working import working_folder
from tasks.children import LocalProcesses, work_by
from tasks.locks import leased
from tasks.parts_work import PartsJob, PartsWork, runs_of
from tasks.progress import conclude, progress_of
from tasks.scored_models import AskedModel
from tasks.slices import KnownSlices, score_slice
from tasks.stage import is_cached, uncached

P = ParamSpec("P")
R = TypeVar("R")


class ScoreJob(PartsJob):
    """What a child does: ask `models` the rows of a part of `test`."""

    models: tuple[AskedModel, ...]
    test: Rows


def slices_of_part(
    models: Sequence[AskedModel], rows: int, part: int, parts: int
) -> list[tuple[AskedModel, int]]:
    """Return the slices of one of `parts` parts, counted from 0: the models, each with the number
    of a slice of the `rows` rows. A part has slices of all models, model by model, so that parts
    take like times and a child loads each model once."""
    return [(model, number) for model in models for number in slice_numbers(rows)][part::parts]


class ScoredSlices:
    """What children have done: slices of a part are found in their order. `known`: the models'
    content_id and the numbers of those that were known before. `rows`: of the slices that children
    have asked since."""

    def __init__(self, job: ScoreJob, known: Collection[tuple[str, int]] = ()) -> None:
        self._job, self._known = job, KnownSlices()
        self._missing: dict[tuple[int, str], deque[int]] = {}
        for part in range(job.parts):
            for model, number in slices_of_part(job.models, job.test.rows, part, job.parts):
                if (model.content_id, number) not in known:
                    self._missing.setdefault((part, model.content_id), deque()).append(number)
        self.rows = 0

    def made(self) -> float:
        """Look for the slices of each part, up to the first of each model that is missing. Return
        how many rows have been asked."""
        for part in range(self._job.parts):
            for model in self._job.models:
                numbers = self._missing.get((part, model.content_id))
                while numbers and (found := self._known.find(model, self._job.test, numbers[0])):
                    self.rows += found.rows
                    numbers.popleft()
        return self.rows


def in_parts(
    task: Task[P, R], models: Sequence[AskedModel], processes: int, deployment: str | None
) -> Callable[P, R]:
    """Return what calls a stage that scores `models` on the rows `test`, both called with keywords;
    where the rows are many, runs of `deployment`, or so many processes of this machine, ask them
    before. Nothing is asked where the call is cached."""

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        several = deployment is not None or processes > 1
        if several and (task.refresh_cache or not is_cached(task, **kwargs)):
            asked = tuple(each.here() for each in models if is_for_several(each, deployment))
            test: Any = kwargs["test"]
            if asked:
                score_in_processes(asked, test, processes, deployment)
        return task(*args, **kwargs)

    return call


def is_for_several(model: AskedModel, deployment: str | None) -> bool:
    """Return whether several processes may ask a model and find the numbers of one. Those of a
    model that Transformers runs depend on how many cores compute, and processes of this machine
    have a part of them each; a GPU is left to the run itself, and so is a model with code of its
    own: a child has the keys of its worker."""
    if model.exported:
        return True
    if deployment is None or (model.base and model.base.trust_remote_code):
        return False
    import torch

    return not torch.cuda.is_available()


@uncached("score in processes")
def score_in_processes(
    models: tuple[AskedModel, ...], test: Rows, processes: int, deployment: str | None = None
) -> None:
    """Have processes of this machine, or runs of `deployment`, ask models the slices of the test
    rows that are not known, and wait for them. Of two runs that come to the same rows at once, one
    waits for the other."""
    work_of_these = digest_of([test.content_id, *(model.content_id for model in models)])
    with (
        leased(f"score-{work_of_these}"),
        progress_of("score in processes") as progress,
        working_folder("children") as folder,
    ):
        runs, most = runs_of(deployment, processes, "evaluation_deployment")
        stored, left = KnownSlices(), 0
        known: set[tuple[str, int]] = set()
        for model, number in slices_of_part(models, test.rows, 0, 1):
            if stored.find(model, test, number):
                known.add((model.content_id, number))
            else:
                left += len(slice_of(number, test.rows))
        parts = count_of_parts(left, most)
        if parts == 1:
            conclude(f"{left} rows to ask: one process asks them")
            return
        job = ScoreJob(models=models, test=test, parts=parts)
        slices = ScoredSlices(job, known)
        work = PartsWork(job, left, "rows", slices.made)
        work_by(runs or LocalProcesses(parts, "flows.score_rows", folder), work, progress)
        conclude(f"{slices.rows:,} of {left:,} rows asked, in {parts} parts")


def score_part(job: ScoreJob) -> int:
    """Ask the models the rows of a part, where they are not known; see `slices.scoring`. Return how
    many rows it has, of all models.

    Raises ModelError or RecipeError where a model can't be asked or is not here, once the others
    have been asked."""
    rows = 0
    refused: dict[int, ModelError | RecipeError] = {}
    for model, number in slices_of_part(job.models, job.test.rows, job.number, job.parts):
        if id(model) in refused:
            continue
        try:
            rows += score_slice(model, job.test, number, SLICE_ROWS).rows
        except (ModelError, RecipeError) as error:
            refused[id(model)] = error
    if refused:
        raise next(iter(refused.values()))
    return rows
