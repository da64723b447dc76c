"""Answer some shards of a batch inference: the flow that batch_inference.py starts on the CPU pool,
or in processes of this machine, for a part of its rows each.

Every shard is a cached stage: shards that have answers are passed over, and the run that waits
finds the answers in the artifact store.
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
from tasks.children import ShardsJob, do_job
from tasks.parent import ParentEnded, parent_watched
from tasks.shards import answer_shard, answering
from tasks.stage import RESULT, begin


@flow(name="answer-shards", description="Answers a part of the rows of a batch.", **RESULT)
def answer_shards(
    model: RegisteredModel,
    prompt: PromptRecipe,
    rows: ShardedRows,
    first: NonNegativeInt = 0,
    count: PositiveInt = 1,
    threads: PositiveInt | None = None,
) -> int | State:
    """Answer `count` shards of the rows from the number `first` on, and return how many rows of
    them have an answer.

    Args:
        model: The registered student.
        prompt: The chat prompt.
        rows: The rows in shards.
        first: The first shard, from 0.
        count: How many shards.
        threads: Cores for one operation; by default the runtime decides.
    """
    begin()
    shards = read_list(rows.artifact, ArtifactStore())[first : first + count]
    try:
        with parent_watched(), answering(threads):
            return sum(answer_shard(model, prompt, shard).rows for shard in shards)
    except ParentEnded as ended:
        return Cancelled(message=str(ended))


if __name__ == "__main__":
    sys.exit(do_job(answer_shards, ShardsJob, sys.argv[1:]))
