"""Batch inference in shards as stages: rows are cut into shards, and each shard is answered and
cached on its own, in whichever process or machine."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from distillery.data.rows import RowReader
from distillery.errors import DataError, StageError
from distillery.inference import shards as sharded
from distillery.inference.batch import read_rows
from distillery.inference.student import Student
from distillery.recipe import Columns, PromptRecipe
from distillery.records import (
    InputFile,
    Predictions,
    RegisteredModel,
    Shard,
    ShardAnswers,
    ShardedRows,
)
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.shards import are_whole, write_list, write_shards
from distillery.storage.working import working_folder
from tasks.inference import load_student, unchanged_copy
from tasks.parent import check_parent
from tasks.progress import conclude, show_parts, show_rows
from tasks.stage import origin, stage


def is_whole_table(record: ShardedRows) -> bool:
    """Return whether the store holds all shards of a table."""
    return are_whole(record.artifact, ArtifactStore())


@stage("cut rows", version=1, reusable=is_whole_table)
def cut_rows(
    files: tuple[InputFile, ...],
    names: tuple[str, ...],
    columns: Columns,
    fields: tuple[str, ...],
    answers: sharded.Answers,
    shard_rows: int,
) -> ShardedRows:
    """Store the rows of the files as shards of at most `shard_rows` rows, each of a single file.

    `names`: by which name the answers tell each file; none for a single file. `answers`: what the
    student answers with."""
    started = time.perf_counter()
    store = ArtifactStore()
    shards: list[Shard] = []
    rows = 0
    reader = sharded.shard_reader(columns, fields, answers)
    with working_folder("cut") as folder:
        for number, file in enumerate(files):
            copy = unchanged_copy(file, folder)
            found = cut_file(copy, names[number] if names else None, reader)
            for shard in write_shards(
                found, sharded.row_schema(), store, shard_rows, sharded.ORIGIN
            ):
                shards.append(shard)
                rows += shard.rows
                show_parts(number, len(files), f"file {number + 1} of {len(files)}, {rows} rows")
            if copy.parent == folder:
                copy.unlink()
        if not shards:
            raise DataError("input_uri: no row in it; correct input_uri")
        (folder / "list").mkdir()
        write_list(shards, folder / "list")
        artifact = store.put(folder / "list")
    conclude(f"{rows} rows in {len(shards)} shards")
    return ShardedRows(artifact=artifact, rows=rows, shards=len(shards), **origin(started))


def cut_file(path: Path, name: str | None, reader: RowReader) -> Iterator[dict[str, Any]]:
    """Yield the columns of each row of a file, malformed ones too."""
    for row in read_rows(path, reader):
        yield sharded.shard_row(row, name)


class Answering(NamedTuple):
    """What `answer_shard` works with in this process. `told`: is told how many rows of the shard
    are done."""

    student: Callable[[RegisteredModel], Student]
    told: Callable[[int], None] | None


_answering: ContextVar[Answering | None] = ContextVar("answering", default=None)


@contextmanager
def answering(
    threads: int | None = None, told: Callable[[int], None] | None = None
) -> Iterator[None]:
    """Let `answer_shard` be called within. The model is downloaded and loaded once, for the first
    shard that is not cached. `threads` counts the cores for one operation; None leaves it to the
    runtime."""
    with working_folder("answer") as folder:
        loaded: dict[str, Student] = {}

        def student(model: RegisteredModel) -> Student:
            if model.content_id not in loaded:
                loaded.clear()
                target = folder / model.content_id
                loaded[model.content_id] = load_student(model, target, threads)
            return loaded[model.content_id]

        token = _answering.set(Answering(student, told))
        try:
            yield
        finally:
            _answering.reset(token)
            # Before its folder is removed.
            loaded.clear()


@stage("answer shard", version=2)
def answer_shard(model: RegisteredModel, prompt: PromptRecipe, shard: Shard) -> ShardAnswers:
    """Answer the rows of a shard. See `answering`."""
    started = time.perf_counter()
    now = _answering.get()
    if now is None:
        raise StageError("answer shard: called outside of `answering`; please report this")
    store = ArtifactStore()
    with working_folder("shard") as folder:
        counts = sharded.answer_shard(
            now.student(model), shard, prompt, store, folder / "out", partial(_tell, now, shard)
        )
        artifact = store.put(folder / "out")
    answers = ShardAnswers(artifact=artifact, **origin(started), **dict(counts))
    if now.told is None:
        conclude(f"{counts.rows} rows answered, {counts.failed} set aside")
    return answers


def _tell(now: Answering, shard: Shard, done: int) -> None:
    """Show how many rows of a shard are done; end it with its parent run."""
    check_parent()
    show_rows(done, shard.rows)
    if now.told is not None:
        now.told(done)


def gather(
    shards: Sequence[Shard], answers: Sequence[ShardAnswers], model: RegisteredModel, started: float
) -> Predictions:
    """Store the answers to all shards as one folder; `started` is time.perf_counter() at the
    start."""
    store = ArtifactStore()
    title = f"{model.name} version {model.version}"
    with working_folder("gather") as folder:
        manifest = sharded.gather(shards, answers, title, store, folder)
        artifact = store.put(folder)
    rows = manifest.rows - manifest.failed
    return Predictions(artifact=artifact, rows=rows, failed=manifest.failed, **origin(started))
