"""The model that a server asks: each way of asking it is loaded when it is needed."""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distillery.errors import ModelError
from distillery.inference.batch_student import load_scorer
from distillery.inference.generation import Steps
from distillery.inference.guide import Guide
from distillery.inference.logits import Logits
from distillery.inference.onnx_student import OnnxStudent
from distillery.inference.student import Student
from distillery.inference.text_student import TextStudent, load_writer
from distillery.models.onnx_folder import files_in
from distillery.records import FORMAT_FILE
from distillery.registry.manifest import verify_before_loading
from distillery.serving.limits import Limits
from distillery.training.rows import TrainingRow

_log = logging.getLogger(__name__)

Choice = list[float] | Logits
"""What a choice is made from; see `ServedStudent.choices`."""


class ServedStudent(Student):
    """A model that chooses as batch inference does, and writes several texts at once.

    Each of the two holds the weights. The scorer chooses; the generator writes, as a TextStudent
    or, where the graph is not one for that, as an OnnxStudent, which then is both. A model that
    writes its answers loads the generator at once, others the scorer, so that a folder that can't
    be loaded is told of at once. The other is loaded when it is needed; if nothing was chosen until
    the generator is, the scorer is unloaded first. So only a server that does both holds the
    weights twice. What is loaded later must be the same model: the folder must not have changed
    since.

    `worker`: the one thread that loads and asks the model, which is not thread-safe. What is freed
    in another thread's part of the heap would not serve the next load."""

    def __init__(
        self,
        folder: Path,
        threads: int | None = None,
        for_labels: bool = False,
        limits: Limits | None = None,
    ) -> None:
        """Load the model. Raises ModelError for a folder that can't be loaded. `threads` counts the
        cores for one operation; None leaves it to the runtime. `for_labels`: the log-probabilities
        of a written answer are to be learnt from; see `completion.complete`. Of the `limits`,
        `batch` and `context` count here."""
        self.threads = threads
        self.for_labels = for_labels
        self.limits = limits or Limits()
        self.loaded_files = file_states(folder)
        self.stop = threading.Event()
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="student")
        self.has_chosen = False
        self.scorer: Student | None = None
        self.generator: TextStudent | OnnxStudent | None = None
        load = self.load_generator if (folder / FORMAT_FILE).is_file() else self.load_scorer
        loaded = self.worker.submit(load, folder).result()
        context = min(loaded.context_length, self.limits.context or loaded.context_length)
        super().__init__(folder, loaded.tokenizer, context)

    def load_scorer(self, folder: Path) -> Student:
        """Load what chooses, which generates too where it is an OnnxStudent."""
        self.scorer = load_scorer(folder, self.threads)
        if isinstance(self.scorer, OnnxStudent):
            self.generator = self.scorer
        self.scorer.heed(self.stop)
        return self.scorer

    def load_generator(self, folder: Path) -> TextStudent | OnnxStudent:
        """Load what writes, which chooses too where it is an OnnxStudent."""
        self.generator = load_writer(folder, self.threads, self.limits.batch)
        if isinstance(self.generator, OnnxStudent):
            self.scorer = self.generator
        self.generator.heed(self.stop)
        return self.generator

    @property
    def is_ahead(self) -> bool:
        """See `Writer`."""
        return self.generator is not None and self.generator.is_ahead

    @property
    def at_once(self) -> int:
        """How many texts may be under way at once; 1 where the model writes them one by one."""
        return 1 if isinstance(self.generator, OnnxStudent) else self.limits.batch

    @property
    def chooses_apart(self) -> bool:
        """Whether a choice may be made while texts are under way."""
        return not isinstance(self.generator, OnnxStudent)

    def probabilities(self, rows: Sequence[TrainingRow]) -> list[list[float]]:
        """Return the probabilities over the options of each rendered row, by the scorer."""
        return self.needed_scorer().probabilities(rows)

    def next_logits(self, prompt_ids: Sequence[int]) -> Logits:
        """Return the logits of the token after a prompt, [vocabulary], by the scorer."""
        return self.needed_scorer().next_logits(prompt_ids)

    def choices(self, rows: Sequence[TrainingRow]) -> list[Choice]:
        """Return of each row the probabilities over its options or, where it has none, the logits
        of the token after its prompt, [vocabulary]; rows of one kind share the scorer's passes."""
        scorer = self.needed_scorer()
        texts = [row for row in rows if row.texts]
        letters = [row for row in rows if row.letters]
        plain = [row for row in rows if not row.texts and not row.letters]
        of_texts = iter(scorer.probabilities(texts))
        of_letters = iter(scorer.probabilities(letters))
        of_plain = iter(scorer.all_next_logits([row.prompt for row in plain]))
        found: list[Choice] = []
        for row in rows:
            if row.texts:
                found.append(next(of_texts))
            elif row.letters:
                found.append(next(of_letters))
            else:
                found.append(next(of_plain))
        return found

    def steps(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        *,
        guide: Guide | None = None,
        held: bool = False,
        **sampling: Any,
    ) -> Steps:
        """Yield tokens with their logits, as `OnnxStudent.steps` does with the same `sampling`.
        At most `at_once` such iterators may be under way, asked in turns; see `TextBatch`."""
        yield from self.needed_generator().steps(
            prompt_ids, max_tokens, guide=guide, held=held, **sampling
        )

    def needed_scorer(self) -> Student:
        """Return the scorer, loaded if it is not; see `check_folder`."""
        if self.scorer is None:
            self.check_folder()
            self.load_scorer(self.folder)
        self.has_chosen = True
        assert self.scorer  # noqa: S101 - it is loaded
        return self.scorer

    def needed_generator(self) -> TextStudent | OnnxStudent:
        """Return the generator, loaded if it is not; see `check_folder`."""
        if self.generator is None:
            self.check_folder()
            if not self.has_chosen:
                self.scorer = None
            self.load_generator(self.folder)
        assert self.generator  # noqa: S101 - it is loaded
        return self.generator

    def check_folder(self) -> None:
        """Raise ModelError if the folder has changed since the model was first loaded, and
        RegistryError if it is not what its manifest lists any more."""
        check_unchanged(self.folder, self.loaded_files)
        verify_before_loading(self.folder)

    def heed(self, stop: threading.Event) -> None:
        """See `Student`."""
        self.stop = stop
        for loaded in (self.scorer, self.generator):
            if loaded:
                loaded.heed(stop)

    def forget(self) -> None:
        """See `Student`."""
        for loaded in (self.scorer, self.generator):
            if loaded:
                loaded.forget()


def check_unchanged(folder: Path, states: dict[Path, tuple[int, int]]) -> None:
    """Raise ModelError if the folder's files are no longer in these `file_states`."""
    if file_states(folder) != states:
        raise ModelError(f"{folder}: has changed since the server started; start the server again")


def file_states(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return the size in bytes, and the time of the last change in nanoseconds, of each file."""
    states = {path: path.stat() for path in files_in(folder) if path.exists()}
    return {path: (state.st_size, state.st_mtime_ns) for path, state in states.items()}
