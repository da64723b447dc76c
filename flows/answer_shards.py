"""Answer shards of a batch inference: the flow that batch_inference.py starts on the CPU pool, or
in processes of this machine.

Its runs take shards from one list until it is at its end. Every shard is a cached stage, and the
run that waits finds the answers in the artifact store.
"""

import sys

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Cancelled
from pydantic import NonNegativeInt, PositiveInt

from distillery.recipe import PromptRecipe
from distillery.records import RegisteredModel, ShardedRows
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.shards import read_list
from tasks.children import do_job
from tasks.parent import ParentEnded, parent_watched
from tasks.shard_work import ShardsJob, shards_taken
from tasks.shards import answer_shard, answering
from tasks.stage import RESULT, begin


@flow(name="answer-shards", description="Answers a part of the rows of a batch.", **RESULT)
def answer_shards(
    model: RegisteredModel,
    prompt: PromptRecipe,
    rows: ShardedRows,
    number: NonNegativeInt = 0,
    threads: PositiveInt | None = None,
) -> int | State:
    """Answer shards of the rows, which the run that waits has put on a list for all its children,
    and return how many rows of them have an answer.

    Args:
        model: The registered student.
        prompt: The chat prompt.
        rows: The rows in shards.
        number: Which of the children this is, from 0.
        threads: Cores for one operation; by default the runtime decides.
    """
    begin()
    job = ShardsJob(model=model, prompt=prompt, rows=rows, number=number)
    shards = read_list(rows.artifact, ArtifactStore())
    try:
        with parent_watched(), answering(threads):
            return sum(answer_shard(model, prompt, each).rows for each in shards_taken(job, shards))
    except ParentEnded as ended:
        return Cancelled(message=str(ended))


if __name__ == "__main__":
    sys.exit(do_job(answer_shards, ShardsJob, sys.argv[1:]))
