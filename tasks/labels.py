import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError, concurrency
from prefect.runtime import flow_run

from distillery.data.examples import each_example
from distillery.errors import TeacherChanged, TeacherError
from distillery.labels import known, labelling
from distillery.labels.canaries import ask_canaries
from distillery.labels.known import label_from, labels_in
from distillery.labels.labelling import Slots
from distillery.labels.quote import counted_by, quote
from distillery.labels.report import read_report
from distillery.labels.store import LabelStore
from distillery.machine import usable_cores
from distillery.recipe import FilterRecipe, PromptRecipe, Recipe, TeacherRecipe
from distillery.records import OnnxModel, Rows, TeacherDrift, TeacherLabels
from distillery.serving.server import served
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from distillery.teacher.endpoint import Endpoint, resolve_endpoint
from tasks.progress import progress_artifact
from tasks.stage import RESULT, Stage, origin, stage

AS_TOLD = TeacherRecipe(filters=FilterRecipe(minimum_accepted=0))
"""For labels that are taken as they are."""
_SPENT: dict[str, dict[str, float]] = {}


@stage("label", version=4)
def label(
    rows: Rows,
    prompt: PromptRecipe,
    teacher: TeacherRecipe,
    identity: str,
    model: OnnxModel | None = None,
) -> TeacherLabels:
    """Asks the teacher `identity` what the label store doesn't know; a local teacher's `model` is served meanwhile."""
    started = time.perf_counter()
    store, logger = ArtifactStore(), get_run_logger()
    examples = store.fetch(rows.artifact) / rows.file
    folder_of_model = store.fetch(model.artifact) if model else None
    tokenizer = teacher.tokenizer or (str(folder_of_model) if folder_of_model else None)
    where = (
        _local_endpoint(folder_of_model, identity)
        if folder_of_model
        else nullcontext(resolve_endpoint(teacher))
    )
    with (
        working_folder("labels") as folder,
        LabelStore() as answers,
        progress_artifact("labelling", f"rows that {identity} has answered") as show,
    ):
        tokens = counted_by(tokenizer) if tokenizer else None
        logger.info(
            "%s", quote(each_example(examples), prompt, teacher, identity, answers, tokens).line()
        )
        with where as endpoint:
            work = labelling.label(
                each_example(examples),
                prompt,
                teacher,
                endpoint,
                answers,
                folder,
                show,
                rows=rows.rows,
                slots=_slots(teacher),
                spent=_spent(),
            )
            counts = asyncio.run(work)
        report = read_report(folder)
        artifact = store.put(folder)
    used = counts.usage.prompt_tokens + counts.usage.completion_tokens
    cost = "" if counts.cost is None else f", {counts.cost:.2f} {counts.currency}"
    logger.info("%s; %d calls, %d tokens%s", report.line(), counts.asked, used, cost)
    return TeacherLabels(
        artifact=artifact,
        teacher=identity,
        soft=teacher.soft_labels,
        **origin(started),
        **vars(counts),
    )


def _spent() -> dict[str, float]:
    """What this flow run has spent so far: teacher.budget is for all of its stages and their retries together."""
    return _SPENT.setdefault(str(flow_run.id), {})


def _slots(teacher: TeacherRecipe) -> Slots:
    return partial(_slot, teacher.shared_limit) if teacher.shared_limit else nullcontext


def _slot(name: str) -> Any:
    """A place in the Prefect concurrency limit `name`, which all runs of this teacher share."""
    return _Slot(concurrency(name, occupy=1, strict=True), name)


class _Slot:
    def __init__(self, place: Any, name: str) -> None:
        self._place, self._name = place, name

    async def __aenter__(self) -> None:
        try:
            await self._place.__aenter__()
        except ConcurrencySlotAcquisitionError:
            raise TeacherError(
                f"teacher.shared_limit: the Prefect server has no concurrency limit {self._name}; create it with "
                f"prefect gcl create {self._name} --limit CALLS"
            ) from None

    async def __aexit__(self, *error: Any) -> Any:
        return await self._place.__aexit__(*error)


@contextmanager
def _local_endpoint(folder: Path, identity: str) -> Iterator[Endpoint]:
    """The exported teacher behind HTTP on the loopback interface, for the very client that asks a paid endpoint."""
    with served(folder, "teacher", threads=usable_cores()) as server:
        yield Endpoint(
            url=server.url, model="teacher", key=server.key, identity=identity, sdk="openai"
        )


@stage("gold labels", version=3)
def gold_labels(
    rows: Rows, prompt: PromptRecipe, teacher: TeacherRecipe = AS_TOLD
) -> TeacherLabels:
    """The rows' own answers, in the shape of a teacher's."""
    started = time.perf_counter()
    store = ArtifactStore()
    file = store.fetch(rows.artifact) / rows.file
    labels = known.gold_labels(each_example(file))
    with working_folder("gold") as folder:
        counts = label_from(each_example(file), labels, prompt, teacher, folder)
        artifact = store.put(folder)
    return TeacherLabels(
        artifact=artifact, teacher="gold", soft=False, **origin(started), **vars(counts)
    )


@stage("labels from files", version=2)
def labels_from_files(
    rows: Rows, prompt: PromptRecipe, teacher: TeacherRecipe, identity: str
) -> TeacherLabels:
    """The labels that teacher.files hold for these rows; `identity` is the files' digest."""
    started = time.perf_counter()
    store = ArtifactStore()
    file = store.fetch(rows.artifact) / rows.file
    labels = labels_in(teacher.files, each_example(file))
    with working_folder("files") as folder:
        counts = label_from(each_example(file), labels, prompt, teacher, folder)
        report = read_report(folder)
        artifact = store.put(folder)
    get_run_logger().info("%s", report.line())
    soft = all(one.distribution for one in labels.values())
    return TeacherLabels(
        artifact=artifact, teacher=identity, soft=soft, **origin(started), **vars(counts)
    )


def labelled(
    rows: Rows,
    recipe: Recipe,
    identity: str,
    model: OnnxModel | None,
    again: Callable[[Stage, Any], Any],
) -> TeacherLabels:
    """The labels to train on, from whichever kind of teacher the recipe names."""
    if recipe.teacher.kind == "gold":
        return again("label", gold_labels)(rows, recipe.prompt, recipe.teacher)
    if recipe.teacher.kind == "file":
        return again("label", labels_from_files)(rows, recipe.prompt, recipe.teacher, identity)
    return again("label", label)(rows, recipe.prompt, recipe.teacher, identity, model)


def judged_by(rows: Rows, recipe: Recipe, identity: str) -> TeacherLabels:
    """What the student is measured against on the test rows: its teacher's answers, unfiltered; the gold answers where
    that teacher can't be asked about them."""
    if recipe.teacher.kind in ("gold", "file"):
        return gold_labels(rows, recipe.prompt)
    unfiltered = recipe.teacher.model_copy(update={"filters": AS_TOLD.filters})
    return label(rows, recipe.prompt, unfiltered, identity)


@task(name="canaries", task_run_name="canaries", cache_policy=NO_CACHE, **RESULT)
def canaries(
    rows: Rows, prompt: PromptRecipe, teacher: TeacherRecipe, identity: str
) -> TeacherDrift:
    """Asks the canary rows afresh and says how many are answered otherwise than before; more than
    teacher.canaries.threshold is reported, and ends the run where teacher.canaries.stop says so."""
    store = ArtifactStore()
    examples = each_example(store.fetch(rows.artifact) / rows.file)
    endpoint, logger = resolve_endpoint(teacher), get_run_logger()
    with LabelStore() as answers:
        asked = ask_canaries(
            examples, prompt, teacher, endpoint, answers, slots=_slots(teacher), spent=_spent()
        )
        drift = asyncio.run(asked)
    logger.info("%s", drift.line())
    if drift.share > teacher.canaries.threshold:
        listed = "\n".join(f"- {row}" for row in drift.changed)
        create_markdown_artifact(
            key="teacher-drift",
            markdown=f"# {drift.line()}\n\n{listed}",
            description=f"{identity} has changed",
        )
        told = f"{identity}: {drift.line()}, more than teacher.canaries.threshold ({teacher.canaries.threshold:.0%})"
        if teacher.canaries.stop:
            raise TeacherChanged(
                f"{told}; give the new teacher another teacher.identity, or set canaries.stop: false"
            )
        logger.warning("%s", told)
    return drift
