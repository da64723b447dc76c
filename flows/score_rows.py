"""Ask the models of a scoreboard a part of the test rows: the flow that distill.py starts in
processes of this machine (evaluation.processes), or on a work pool (evaluation_deployment).

Every slice of rows is a cached stage, whose answers the run that waits finds in the artifact store.
"""

import sys

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Cancelled
from pydantic import NonNegativeInt, PositiveInt

from distillery.records import Rows
from tasks.children import do_job
from tasks.parent import ParentEnded, parent_watched
from tasks.score_parts import ScoreJob, score_part
from tasks.scored_models import AskedModel
from tasks.slices import scoring
from tasks.stage import RESULT, begin


@flow(name="score-rows", description="Asks models a part of a run's test rows.", **RESULT)
def score_rows(
    models: tuple[AskedModel, ...],
    test: Rows,
    parts: PositiveInt,
    number: NonNegativeInt = 0,
    threads: PositiveInt | None = None,
) -> int | State:
    """Ask the models a part of the rows, and return how many rows it has, of all models.

    Args:
        models: The models, each with its prompt.
        test: The test rows.
        parts: How many parts there are.
        number: Which part, from 0.
        threads: Cores for one operation; by default all.
    """
    begin()
    job = ScoreJob(models=models, test=test, parts=parts, number=number)
    try:
        with parent_watched(), scoring(threads):
            return score_part(job)
    except ParentEnded as ended:
        return Cancelled(message=str(ended))


if __name__ == "__main__":
    sys.exit(do_job(score_rows, ScoreJob, sys.argv[1:]))
