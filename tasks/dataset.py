import time

from distillery.data.prepare import prepare
from distillery.data.source import commit_in
from distillery.recipe import DatasetRecipe, TaskRecipe
from distillery.records import PreparedDataset
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from tasks.progress import conclude
from tasks.stage import origin, stage


@stage("prepare dataset", version=3, added_later={"task"})
def prepare_dataset(
    recipe: DatasetRecipe, source: str, task: TaskRecipe | None = None
) -> PreparedDataset:
    """Load, validate, de-duplicate and split the rows.

    `source` stands for their content in the cache key."""
    started = time.perf_counter()
    with working_folder("dataset") as folder:
        counts = prepare(recipe, folder, task, commit_in(source))
        artifact = ArtifactStore().put(folder)
    rows = ", ".join(f"{split.rows} {name}" for name, split in counts.splits.items())
    dropped = counts.duplicates_dropped + counts.near_duplicates_dropped
    classes = f" of {len(counts.classes)} classes" if counts.classes else ""
    conclude(f"data set: {rows} rows{classes}; {dropped} duplicates dropped")
    return PreparedDataset(
        artifact=artifact,
        **origin(started),
        **dict(counts),
    )
