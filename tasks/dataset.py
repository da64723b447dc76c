import time

from distillery.data.prepare import prepare
from distillery.recipe import DatasetRecipe
from distillery.records import PreparedDataset
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from tasks.progress import conclude
from tasks.stage import origin, stage


@stage("prepare dataset", version=3)
def prepare_dataset(recipe: DatasetRecipe, source: str) -> PreparedDataset:
    """Load, validate, de-duplicate and split the rows.

    `source` stands for their content in the cache key."""
    started = time.perf_counter()
    with working_folder("dataset") as folder:
        counts = prepare(recipe, folder)
        artifact = ArtifactStore().put(folder)
    rows = ", ".join(f"{split.rows} {name}" for name, split in counts.splits.items())
    dropped = counts.duplicates_dropped + counts.near_duplicates_dropped
    conclude(f"data set: {rows} rows; {dropped} duplicates dropped")
    return PreparedDataset(
        artifact=artifact,
        **origin(started),
        **dict(counts),
    )
