import shutil
import time
from pathlib import Path

import fsspec

from distillery.data.rows import RowReader
from distillery.errors import DataError
from distillery.inference.batch import count_rows, read_rows, score_file
from distillery.inference.onnx_student import OnnxStudent
from distillery.recipe import Columns, PromptRecipe, RegistryRecipe
from distillery.records import InputFile, Predictions, RegisteredModel
from distillery.registry.open import open_registry
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import sha256_of
from distillery.storage.working import working_folder
from tasks.progress import conclude, show_rows
from tasks.stage import origin, stage


@stage("score", version=3, added_later={"fields"})
def score(
    model: RegisteredModel,
    prompt: PromptRecipe,
    rows: InputFile,
    columns: Columns,
    fields: tuple[str, ...] | None = None,
) -> Predictions:
    """Download and verify `model`, and answer every row of the file. `fields`: dataset.fields of
    the model's recipe."""
    started = time.perf_counter()
    registry = open_registry(RegistryRecipe(kind=model.registry, model_name=model.name))
    with working_folder("score") as folder:
        student = OnnxStudent(registry.download(model, folder / "model"))
        file = fetch_input(rows.uri, folder)
        if sha256_of(file) != rows.sha256:
            raise DataError(f"{file.name}: changed while the run was under way; run it again")
        of = count_rows(file)
        classes = student.classes.classes if student.classes else None
        if classes:
            # A text is all that such a row needs.
            columns = columns.model_copy(update={"choices": None})
        reader = RowReader(columns, fields or (), classes is not None, classes)
        counts = score_file(
            student,
            read_rows(file, reader),
            prompt,
            folder / "out",
            lambda done: show_rows(done, of),
        )
        artifact = ArtifactStore().put(folder / "out")
    predictions = Predictions(artifact=artifact, **origin(started), **dict(counts))
    conclude(
        f"{counts.rows} rows answered, {counts.failed} set aside, in {predictions.seconds:.1f} s"
    )
    return predictions


def fetch_input(uri: str, folder: Path) -> Path:
    """Copy the file at a path or fsspec URL into `folder` and return its path.

    Its name has nothing of a URL's query, which may hold a signature. Raises DataError."""
    target = folder / Path(uri.split("?")[0]).name
    try:
        with fsspec.open(uri, "rb") as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    except (OSError, ValueError, ImportError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DataError(
            f"input_uri {target.name}: can't be read ({reason}); correct input_uri"
        ) from error
    return target
