import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from prefect import get_run_logger

from distillery import labels as domain
from distillery.dataset import read_examples
from distillery.evaluation import cores
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import OnnxModel, Rows, TeacherLabels
from distillery.serving import served
from distillery.store import ArtifactStore, working_folder
from distillery.teacher import Endpoint, resolve_endpoint
from tasks.progress import progress_artifact
from tasks.stage import origin, stage


@stage("label", version=1)
def label(
    rows: Rows, prompt: PromptRecipe, teacher: TeacherRecipe, identity: str, model: OnnxModel | None = None
) -> TeacherLabels:
    """Asks the teacher `identity` what the label store doesn't know; a local teacher's `model` is served meanwhile."""
    started = time.perf_counter()
    store = ArtifactStore()
    examples = read_examples(store.fetch(rows.artifact) / rows.file)
    where = _local_endpoint(store.fetch(model.artifact), identity) if model else nullcontext(resolve_endpoint(teacher))
    with (
        working_folder("labels") as folder,
        domain.LabelStore() as answers,
        where as endpoint,
        progress_artifact("labelling", f"rows that {identity} has answered") as show,
    ):
        counts = asyncio.run(domain.label(examples, prompt, teacher, endpoint, answers, folder, progress=show))
        artifact = store.put(folder)
    tokens = counts.usage.prompt_tokens + counts.usage.completion_tokens
    get_run_logger().info(
        "%d labels accepted, %d rejected; %d calls, %d tokens", counts.accepted, counts.rejected, counts.asked, tokens
    )
    return TeacherLabels(
        artifact=artifact,
        teacher=identity,
        soft=teacher.soft_labels,
        **origin(started),
        **vars(counts),
    )


@contextmanager
def _local_endpoint(folder: Path, identity: str) -> Iterator[Endpoint]:
    """The exported teacher behind HTTP on the loopback interface, for the very client that asks a paid endpoint."""
    with served(folder, "teacher", threads=cores()) as server:
        yield Endpoint(url=server.url, model="teacher", key=server.key, identity=identity, sdk="openai")


@stage("gold labels", version=1)
def gold_labels(rows: Rows, prompt: PromptRecipe) -> TeacherLabels:
    """The rows' own answers, in the shape of a teacher's."""
    started = time.perf_counter()
    store = ArtifactStore()
    examples = read_examples(store.fetch(rows.artifact) / rows.file)
    with working_folder("gold") as folder:
        counts = domain.write_gold(examples, prompt, folder)
        artifact = store.put(folder)
    return TeacherLabels(artifact=artifact, teacher="gold", soft=False, **origin(started), **vars(counts))
