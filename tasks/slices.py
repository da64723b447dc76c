"""Slices of the test rows as stages: each is asked and cached on its own, in whichever process or
machine, for the stages that score models."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from distillery.data.examples import read_examples
from distillery.errors import ModelError, StageError
from distillery.evaluation.predictors import Predictor, load_predictor
from distillery.evaluation.scoring import ScoringJob
from distillery.evaluation.slices import (
    SLICE_FILE,
    SLICE_ROWS,
    ask_slice,
    slice_numbers,
    slice_of,
)
from distillery.machine import usable_cores
from distillery.records import Example, Rows, ScoredSlice
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from tasks.parent import check_parent
from tasks.progress import conclude, show_rows
from tasks.scored_models import AskedModel
from tasks.stage import cached_records, origin, stage


class Loaded(NamedTuple):
    """A model that is asked about rows."""

    predictor: Predictor
    examples: list[Example]


class Scoring:
    """What `score_slice` works with in this process: the model and rows that it was last called
    with, and the cores for one operation."""

    def __init__(self, threads: int | None) -> None:
        self._threads = threads or usable_cores()
        self._key = ""
        self._loaded: Loaded | None = None

    def load(self, model: AskedModel, test: Rows) -> Loaded:
        """Load a model and the rows. Raises ModelError where its numbers could be others than on
        the machine of the run that waits for them."""
        key = f"{model.content_id} {test.content_id}"
        if self._loaded is None or key != self._key:
            self._loaded = None
            self._loaded, self._key = self._load(model, test), key
        return self._loaded

    def _load(self, model: AskedModel, test: Rows) -> Loaded:
        own = model.machine_of()
        if own != model.machine:
            raise ModelError(
                f"this machine ({own}) may compute other last bits than the run's "
                f"({model.machine}), which asks this model itself"
            )
        store = ArtifactStore()
        file = store.fetch(test.artifact) / test.file
        examples = read_examples(file)
        job = ScoringJob(
            model=model.to_score(store),
            examples=str(file),
            prompt=model.prompt,
            threads=self._threads,
        )
        predictor = load_predictor(job, examples[0].format)
        return Loaded(predictor, examples)


_scoring: ContextVar[Scoring | None] = ContextVar("scoring", default=None)


@contextmanager
def scoring(threads: int | None = None) -> Iterator[None]:
    """Let `score_slice` be called within. A model is loaded for its first slice that is not cached,
    and given up for another one. `threads` counts the cores for one operation; by default all."""
    token = _scoring.set(Scoring(threads))
    try:
        yield
    finally:
        _scoring.reset(token)


@stage("score slice", version=1)
def score_slice(model: AskedModel, test: Rows, number: int, slice_rows: int) -> ScoredSlice:
    """Ask a model the rows of one slice of the test rows; see `scoring`. `slice_rows`: the rows of
    a slice."""
    started = time.perf_counter()
    now = _scoring.get()
    if now is None:
        raise StageError("score slice: called outside of `scoring`; please report this")
    loaded = now.load(model, test)
    rows = len(slice_of(number, len(loaded.examples)))
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        check_parent()
        done += count
        show_rows(done, rows)

    answers = ask_slice(loaded.predictor, loaded.examples, number, tell)
    with working_folder("slice") as folder:
        (folder / SLICE_FILE).write_text(answers.model_dump_json(), encoding="utf-8")
        artifact = ArtifactStore().put(folder)
    conclude(f"{rows} rows asked")
    return ScoredSlice(artifact=artifact, rows=rows, **origin(started))


class KnownSlices:
    """The slices that other processes have asked, by cached records."""

    def __init__(self) -> None:
        self._find = cached_records(score_slice)

    def find(self, model: AskedModel, test: Rows, number: int) -> ScoredSlice | None:
        """Return the record of a slice, None if there is none."""
        found: ScoredSlice | None = self._find(
            model=model, test=test, number=number, slice_rows=SLICE_ROWS
        )
        return found


def known_slices(model: AskedModel, test: Rows) -> dict[int, Path]:
    """Return the files of the slices of the test rows that a model has been asked, by number."""
    files: dict[int, Path] = {}
    numbers = slice_numbers(test.rows)
    if numbers:
        model, known, store = model.here(), KnownSlices(), ArtifactStore()
        for number in numbers:
            found = known.find(model, test, number)
            if found:
                files[number] = store.fetch(found.artifact) / SLICE_FILE
    return files
