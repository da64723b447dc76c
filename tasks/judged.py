"""What the registry is asked before anything is paid for: whether it will take the student, and how
often the run's test rows have judged before."""

from prefect import get_run_logger

from distillery.errors import DataError
from distillery.recipe import Recipe
from distillery.records import JudgedVersions, PreparedDataset
from distillery.registry import judged as domain
from distillery.registry.open import open_registry
from distillery.storage.artifacts import ArtifactStore
from tasks.stage import uncached


@uncached("judged before")
def judged_before(data: PreparedDataset, recipe: Recipe) -> JudgedVersions:
    """Return the registered versions that the test rows have judged, and tell of them in the log.

    Raises CredentialsError if the registry refuses the login or its role, and DataError if the
    recipe rotates test rows and one of them has trained the champion; other recipes get a
    warning."""
    registry, name = open_registry(recipe.registry), recipe.registry.model_name
    registry.check_access(name)
    judged = domain.find_judged(registry, name, data)
    if judged.versions:
        get_run_logger().info("%s", judged.line())
    version, rows = domain.trained_by_test_rows(registry, name, data, ArtifactStore())
    if rows:
        line = (
            f"dataset: {len(rows)} of {judged.rows} test rows have trained {name} version "
            f"{version}, the champion, such as row {rows[0]}, and can't judge its successor; "
            "leave dataset.seed, dataset.carve and dataset.rotation as that version had them, or "
            "set another registry.model_name"
        )
        if recipe.dataset.rotation:
            raise DataError(line)
        get_run_logger().warning("%s", line)
    return judged
