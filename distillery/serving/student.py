"""The model that a server asks: each way of asking it is loaded when it is needed."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distillery.errors import ModelError
from distillery.inference.batch_student import load_for_rows
from distillery.inference.guide import Guide
from distillery.inference.logits import Logits, token_sampler
from distillery.inference.onnx_student import OnnxStudent
from distillery.inference.student import Student
from distillery.models.onnx_folder import files_in
from distillery.registry.manifest import verify_before_loading
from distillery.training.rows import TrainingRow


class ServedStudent(Student):
    """A model that chooses as batch inference does, and generates by ONNX Runtime GenAI.

    Each of the two holds the weights. The scorer, which chooses, is loaded at once, so that a
    folder that can't be loaded is told of at once. The generator is loaded with the first answer of
    several tokens; if nothing was chosen until then, the scorer is unloaded first, and loaded again
    when it is needed. So only a server that does both holds the weights twice. What is loaded later
    must be the same model: the folder must not have changed since.

    `worker`: the one thread that loads and asks the model, which is not thread-safe. What is freed
    in another thread's part of the heap would not serve the next load."""

    def __init__(self, folder: Path, threads: int | None = None, for_labels: bool = False) -> None:
        """Load the model. Raises ModelError for a folder that can't be loaded. `threads` counts the
        cores for one operation; None leaves it to the runtime. `for_labels`: the log-probabilities
        of a written answer are to be learnt from; see `completion.complete`."""
        self.threads = threads
        self.for_labels = for_labels
        self.loaded_files = file_states(folder)
        self.stop = threading.Event()
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="student")
        self.scorer: Student | None = self.worker.submit(load_for_rows, folder, threads).result()
        self.scorer.heed(self.stop)
        self.has_chosen = False
        self.generator: OnnxStudent | None = None
        if isinstance(self.scorer, OnnxStudent):
            self.generator = self.scorer
        super().__init__(folder, self.scorer.tokenizer, self.scorer.context_length)

    def probabilities(self, rows: Sequence[TrainingRow]) -> list[list[float]]:
        """Return the probabilities over the options of each rendered row, by the scorer."""
        return self.needed_scorer().probabilities(rows)

    def next_logits(self, prompt_ids: Sequence[int]) -> Logits:
        """Return the logits of the token after a prompt, [vocabulary], by the scorer."""
        return self.needed_scorer().next_logits(prompt_ids)

    def steps(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        *,
        guide: Guide | None = None,
        held: bool = False,
        **sampling: Any,
    ) -> Iterator[tuple[int, Logits]]:
        """Yield tokens with their logits, as `OnnxStudent.steps` does with the same `sampling`. A
        single token is a choice: it is taken from the scorer's logits."""
        if max_tokens == 1:
            logits = self.next_logits(prompt_ids)
            allowed = guide.masked(logits) if guide else logits
            yield token_sampler(**sampling)(allowed), allowed if held else logits
        else:
            yield from self.needed_generator().steps(
                prompt_ids, max_tokens, guide=guide, held=held, **sampling
            )

    def needed_scorer(self) -> Student:
        """Return the scorer, loaded if it is not; see `check_folder`."""
        if self.scorer is None:
            self.check_folder()
            self.scorer = load_for_rows(self.folder, self.threads)
            self.scorer.heed(self.stop)
        self.has_chosen = True
        return self.scorer

    def needed_generator(self) -> OnnxStudent:
        """Return the generator, loaded if it is not; see `check_folder`."""
        if self.generator is None:
            self.check_folder()
            if not self.has_chosen:
                self.scorer = None
            self.generator = OnnxStudent(self.folder, self.threads)
            self.generator.heed(self.stop)
        return self.generator

    def check_folder(self) -> None:
        """Raise ModelError if the folder has changed since the model was first loaded, and
        RegistryError if it is not what its manifest lists any more."""
        if file_states(self.folder) != self.loaded_files:
            raise ModelError(
                f"{self.folder}: has changed since the server started; start the server again"
            )
        verify_before_loading(self.folder)

    def heed(self, stop: threading.Event) -> None:
        """See `Student`."""
        self.stop = stop
        for student in (self.scorer, self.generator):
            if student:
                student.heed(stop)

    def forget(self) -> None:
        """See `Student`."""
        for student in (self.scorer, self.generator):
            if student:
                student.forget()


def file_states(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return the size in bytes, and the time of the last change in nanoseconds, of each file."""
    states = {path: path.stat() for path in files_in(folder) if path.exists()}
    return {path: (state.st_size, state.st_mtime_ns) for path, state in states.items()}
