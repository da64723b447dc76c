"""Ask the teacher about a part of the rows that a run labels: the flow that distill.py starts in
processes of this machine (teacher.processes), or on a work pool (labels_deployment).

Every answer is in the label store as soon as it comes, where the run that waits finds it.
"""

import sys

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Cancelled
from pydantic import NonNegativeInt, PositiveInt

from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Rows
from tasks.children import do_job
from tasks.label_parts import LabelJob, ask_part
from tasks.locks import Lease
from tasks.parent import ParentEnded, parent_watched
from tasks.stage import RESULT, begin


@flow(name="label-parts", description="Asks the teacher about a part of a run's rows.", **RESULT)
def label_parts(
    rows: Rows,
    prompt: PromptRecipe,
    teacher: TeacherRecipe,
    run: str,
    recipe: str,
    identities: tuple[str, ...],
    database: str,
    lease: Lease,
    parts: PositiveInt,
    number: NonNegativeInt = 0,
) -> int | State:
    """Have the teacher asked about a part of the rows, and return how many rows of it have a label.

    Args:
        rows: The rows of a split.
        prompt: The chat prompt.
        teacher: The teacher's settings, as in the recipe.
        run: The flow run that pays.
        recipe: The name of its recipe.
        identities: The teacher's identity, and that of its cheap one, as the run knows them.
        database: The id of the run's label database.
        lease: The run's lease on asking about these rows.
        parts: How many parts there are.
        number: Which part, from 0.
    """
    begin()
    job = LabelJob(
        rows=rows,
        prompt=prompt,
        teacher=teacher,
        run=run,
        recipe=recipe,
        identities=identities,
        database=database,
        lease=lease,
        parts=parts,
        number=number,
    )
    try:
        with parent_watched():
            return ask_part(job)
    except ParentEnded as ended:
        return Cancelled(message=str(ended))


if __name__ == "__main__":
    sys.exit(do_job(label_parts, LabelJob, sys.argv[1:]))
