"""The model that a server asks: each way of asking it is loaded when it is needed."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distillery.inference.batch_student import load_for_rows
from distillery.inference.guide import Guide
from distillery.inference.logits import Logits, token_sampler
from distillery.inference.onnx_student import OnnxStudent
from distillery.inference.student import Student
from distillery.training.rows import TrainingRow


class ServedStudent(Student):
    """A model that chooses as batch inference does, and generates by ONNX Runtime GenAI.

    Each of the two holds the weights. The scorer, which chooses, is loaded at once, so that a
    folder that can't be loaded is told of at once. The generator is loaded with the first answer of
    several tokens; if nothing was chosen until then, the scorer is unloaded first, and loaded again
    when it is needed. So only a server that does both holds the weights twice.

    `worker`: the one thread that loads and asks the model, which is not thread-safe. What is freed
    in another thread's part of the heap would not serve the next load."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        """Load the model. Raises ModelError for a folder that can't be loaded. `threads` counts the
        cores for one operation; None leaves it to the runtime."""
        self.threads = threads
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
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        guide: Guide | None = None,
    ) -> Iterator[tuple[int, Logits]]:
        """Yield tokens with their logits, as `OnnxStudent.steps` does. A single token is a choice:
        it is taken from the scorer's logits."""
        sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
        if max_tokens == 1:
            logits = self.next_logits(prompt_ids)
            yield token_sampler(**sampling)(guide.masked(logits) if guide else logits), logits
        else:
            steps = self.needed_generator().steps(prompt_ids, max_tokens, guide=guide, **sampling)
            yield from steps

    def needed_scorer(self) -> Student:
        """Return the scorer, loaded if it is not."""
        if self.scorer is None:
            self.scorer = load_for_rows(self.folder, self.threads)
            self.scorer.heed(self.stop)
        self.has_chosen = True
        return self.scorer

    def needed_generator(self) -> OnnxStudent:
        """Return the generator, loaded if it is not."""
        if self.generator is None:
            if not self.has_chosen:
                self.scorer = None
            self.generator = OnnxStudent(self.folder, self.threads)
            self.generator.heed(self.stop)
        return self.generator

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
