import shutil
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import fsspec

from distillery.data.rows import RowReader
from distillery.data.source import TABLES
from distillery.errors import DataError
from distillery.inference.batch import count_rows, read_rows, score_file
from distillery.inference.batch_student import load_for_rows
from distillery.recipe import Columns, PromptRecipe, RegistryRecipe
from distillery.records import InputFile, Predictions, RegisteredModel
from distillery.registry.open import open_registry
from distillery.storage.allowed import address, name_in
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import sha256_of
from distillery.storage.working import working_folder
from tasks.progress import conclude, show_rows
from tasks.stage import origin, stage


@stage("score", version=4, added_later={"fields"})
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
        student = load_for_rows(registry.download(model, folder / "model"))
        file = fetch_input(rows.uri, folder)
        if sha256_of(file) != rows.sha256:
            raise DataError(f"{file.name}: changed while the run was under way; run it again")
        of = count_rows(file)
        classes = student.classes.classes if student.classes else None
        if classes or student.format:
            # A text is all that such a row needs.
            columns = columns.model_copy(update={"choices": None})
        reader = RowReader(columns, fields or (), classes is not None, classes, student.format)
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

    Its name has nothing of a URL's query, which may hold a signature. Raises DataError, which tells
    nothing of what the file holds."""
    source = address(uri, "input_uri")
    target = folder / (source.name if isinstance(source, Path) else name_in(source))
    if target.suffix.lower() not in TABLES:
        raise DataError(
            f"{target.name}: input_uri takes {', '.join(TABLES)}, not {target.suffix!r}; convert it"
        )
    try:
        with open_address(source) as file, target.open("wb") as copy:
            shutil.copyfileobj(file, copy)
    except Exception as error:
        # A file system of fsspec may raise anything, with the file's content in its text.
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DataError(
            f"input_uri {target.name}: can't be read ({reason}); correct input_uri"
        ) from None
    return target


def open_address(source: Path | str) -> AbstractContextManager[Any]:
    """Open a local file, or what is at a URL, to be read as bytes."""
    return source.open("rb") if isinstance(source, Path) else fsspec.open(source, "rb")
