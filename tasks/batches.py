"""Prefect's side of asking in batches: one task before the first label, and a run that ends as
waiting."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, NoReturn

from prefect import get_client
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import Pause
from prefect.runtime import deployment, flow_run
from prefect.states import Scheduled

from distillery.data.examples import each_example
from distillery.errors import Waiting
from distillery.labels.batch_book import BatchBook
from distillery.labels.batch_files import Share
from distillery.labels.batch_run import ask_in_batches
from distillery.labels.store import LabelStore
from distillery.recipe import PromptRecipe, Recipe, TeacherRecipe
from distillery.records import PreparedDataset, Rows
from distillery.storage.artifacts import ArtifactStore
from distillery.teacher.endpoint import resolve_endpoint
from tasks.labels import payer_of_run, purpose_of, rows_to_ask
from tasks.progress import conclude, progress_of, show
from tasks.stage import uncached

STATE = "Waiting"
"""The name of the state in which a run ends whose batches are under way."""


def batches_first(
    recipe: Recipe, train: Rows, data: PreparedDataset, identity: str, test: bool
) -> None:
    """Have the rows that this run labels asked in batches, where teacher.batch says so, or where
    they are in another run's batches: the `train` rows and those of other splits at once, as a
    batch takes hours. `test`: whether the test rows are among them.

    Raises Pause, which ends the run as waiting, where answers are still to come."""
    if recipe.teacher.kind != "endpoint":
        return
    if recipe.teacher.batch is None:
        with BatchBook() as book:
            if not book.open_batches(identity):
                return
    new = rows_to_ask(recipe, train, data, identity, test)
    waiting = ask_batches(new, recipe.prompt) if new else None
    if waiting is not None:
        end_as_waiting(waiting)


@uncached("ask in batches")
def ask_batches(
    asked: Sequence[tuple[Rows, TeacherRecipe]], prompt: PromptRecipe
) -> Waiting | None:
    """Send these rows in batches and take the answers in; return what is still to come, if
    anything is."""
    store = ArtifactStore()
    shares = []
    for rows, teacher in asked:
        file = store.fetch(rows.artifact) / rows.file
        shares.append(Share(partial(each_example, file), teacher, purpose_of(rows)))
    teacher = asked[0][1]
    with progress_of("ask in batches"), LabelStore(max_age=teacher.max_age) as answers:
        work = ask_in_batches(
            shares,
            prompt,
            resolve_endpoint(teacher),
            answers,
            payer=payer_of_run(),
            progress=lambda done, lines: show(done, lines, "requests"),
        )
        try:
            asyncio.run(work)
        except Waiting as waiting:
            conclude(str(waiting))
            return waiting
        conclude("no batch is under way")
    return None


def end_as_waiting(waiting: Waiting) -> NoReturn:
    """End this flow run as waiting. A run of a deployment is scheduled to go on by itself; another
    has ended, and is run again by hand."""
    state: State[Any] = State(type=StateType.CANCELLED, name=STATE, message=str(waiting))
    if deployment.id:
        at = datetime.now(UTC) + timedelta(seconds=waiting.seconds)
        state = Scheduled(scheduled_time=at, name=STATE, message=str(waiting))
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run.id, state, force=True)
    raise Pause(str(waiting), state=state)
