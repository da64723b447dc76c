"""Write several texts at once: one pass computes the next token of every text under way.

Each text has a row of the buffers of keys and values, which ONNX Runtime reads and writes in place.
A prompt is computed alone, into its row. The texts then go on together, one token a pass, each
masked to its own length, and come and go between two passes (continuous batching: Yu et al., Orca,
OSDI 2022). The rows under way are the first ones: when a text ends, the last one moves to its row.

Where the model has drafts (models/drafts.py), a pass computes behind the last token of a text those
too that are guessed to follow. A text that then takes them has their logits already; however it
takes its tokens, they are those that it would take without guesses.

The graph is that of batch_graph.py for rows; one that it can't make is refused, since a row's
numbers might depend on the rows beside it. They don't, bit for bit on a Xeon with AVX-512 and on an
AMD EPYC in fp32, int8 and int4, so that a text is the same however many are under way.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillery.errors import AnswerStopped
from distillery.inference.decoder import (
    FEWEST,
    LARGEST_WASTE,
    LONGEST_PASS,
    SMALLEST_CAPACITY,
    TILE,
    check_length,
    read_config,
)
from distillery.inference.generation import Answering, Steps, generated
from distillery.inference.graph_session import (
    cache_shapes,
    load_tokenizer,
    open_session,
    read_graphs,
    runtime_errors,
    runtime_value,
)
from distillery.inference.guide import Guide
from distillery.inference.logits import Logits, token_sampler
from distillery.models.drafts import NO_PROMPT, following, read_drafts
from distillery.prompts import GenAITokenizer
from distillery.training.batching import common_prefix

LONGEST_DRAFT_PASS = 8
"""Tokens that a pass has of one text at most, the guessed ones included."""

DRAFT_PASS = 16
"""Tokens that a pass has of several texts, as long as each has FEWEST: with more, those that are
guessed wrong cost more than the right ones save."""


class BatchedText:
    """A text under way. `length`: how many of the tokens in its row it has taken. `logits`: those
    after the last of them, [vocabulary], until the text takes its next token from them. `ahead`:
    the tokens in the row that are guessed to follow, each with the logits after it. `prompt`: the
    tokens that follow each other in its prompt, where answers are guessed; see `Drafts.guess`."""

    def __init__(
        self, answering: Answering, length: int, logits: Logits, prompt: Mapping[str, int]
    ) -> None:
        self.answering = answering
        self.prompt = prompt
        self.length = length
        self.logits: Logits | None = logits
        self.ahead: list[tuple[int, Logits]] = []

    @property
    def is_ahead(self) -> bool:
        """Whether the last token that was taken had been guessed, so that its logits are there."""
        if self.logits is not None or not self.ahead or self.answering.over:
            return False
        return self.ahead[0][0] == self.answering.tokens[-1]

    @property
    def computed(self) -> int:
        """How many tokens in its row are computed, the guessed ones included."""
        return self.length + len(self.ahead)

    def go_ahead(self) -> None:
        """Take the logits after the last token from those that were computed ahead, if there."""
        if self.is_ahead:
            (_, self.logits), *self.ahead = self.ahead
            self.length += 1


class TextBatch:
    """A model folder in ONNX Runtime, and the texts that it is writing.

    Not thread-safe. Each text is an iterator that gives a token and waits until it is asked for the
    next one. The first that needs logits that are not there computes them for all texts that have
    taken a token: so ask them in turns. `active` are the texts under way, by their rows; `prompts`
    are the prompts whose keys and values the rows hold, those of earlier texts too."""

    def __init__(self, folder: Path, threads: int | None, count: int) -> None:
        """Load the model for at most `count` texts at once. `threads` counts the cores for one
        operation; None leaves it to the runtime. Raises UnknownGraph for a graph that does not take
        rows together, and ModelError for a folder that can't be loaded."""
        graphs, self.drafts = read_graphs(folder), read_drafts(folder)
        _, self.context_length = read_config(folder)
        self.folder = folder
        self.count = count
        self.tokenizer = GenAITokenizer(load_tokenizer(folder, graphs.stand_in), folder)
        self.end_ids = frozenset(int(token) for token in self.tokenizer.runtime.eos_token_ids)
        self.stop = threading.Event()
        self._session = open_session(folder, graphs.rows, threads)
        self._shapes = cache_shapes(self._session)
        self.active: list[BatchedText] = []
        self.asked: BatchedText | None = None
        self.rows = count + 1
        self.prompts: list[tuple[int, ...]] = [()] * self.rows
        self.capacity = 0
        self._buffers: dict[str, NDArray[Any]] = {}
        self._bindings: dict[tuple[int, int], Any] = {}
        self.fewest = FEWEST if self.drafts else 1
        """The tokens of a text in a pass at least. With drafts they are never one alone, since that
        takes other kernels, and a text must not depend on what was guessed."""
        self.multiple = TILE if self.fewest % TILE and self.counts_beside() else 1
        """The rows of a pass are filled up to a multiple of it."""

    def heed(self, stop: threading.Event) -> None:
        """Look at `stop` before each pass of a prompt, of which a long one takes several; see
        `Student.heed`."""
        self.stop = stop

    def forget(self) -> None:
        """Let no prompt go on from one that was computed before."""
        self.prompts = [()] * self.rows

    def steps(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        guide: Guide | None = None,
        held: bool = False,
    ) -> Steps:
        """Yield the tokens of a text and their logits, as `OnnxStudent.steps` does. At most
        `count` of these iterators may have begun and not ended."""
        room = self.context_length - len(prompt_ids) - (self.fewest - 1)
        most = max(1, min(max_tokens, room))
        draw = token_sampler(temperature, top_p, seed)
        with self.joined(prompt_ids, Answering(most, self.end_ids, draw, guide)) as text:
            first = self.next_logits(text)
            yield from generated(first, lambda _: self.next_logits(text), text.answering, held)

    @contextmanager
    def joined(self, prompt_ids: Sequence[int], answering: Answering) -> Iterator[BatchedText]:
        """Compute a prompt into the first free row, for a text that is under way within the `with`
        block."""
        logits = self.prefill(prompt_ids, min(answering.most, SMALLEST_CAPACITY))
        prompt = following(prompt_ids) if self.drafts else NO_PROMPT
        text = BatchedText(answering, len(prompt_ids), logits, prompt)
        self.active.append(text)
        try:
            yield text
        finally:
            self.leave(text)

    def leave(self, text: BatchedText) -> None:
        """Move the last row to that of a text that is over."""
        if text is self.asked:
            self.asked = None
        if text not in self.active:
            return
        row, last = self.active.index(text), len(self.active) - 1
        moved = self.active.pop()
        if moved is not text:
            self.active[row] = moved
            self.copy(last, row, moved.computed)
            self.prompts[row] = self.prompts[last]

    def next_logits(self, text: BatchedText) -> Logits:
        """Return the logits after the last token that a text took, [vocabulary]."""
        self.asked = text
        text.go_ahead()
        if text.logits is None:
            self.compute()
        logits, text.logits = text.logits, None
        assert logits is not None  # noqa: S101 - `compute` gives each text some
        return logits

    def counts_beside(self) -> bool:
        """Return whether a token's numbers depend on how many are computed beside it: kernels for 4
        bits may take other sums for the last one of an odd number."""
        self.make_room(1)
        alone, beside = (self.run(0, [[0]] * count, [0] * count) for count in (1, TILE))
        return not np.array_equal(alone[0], beside[0])

    @property
    def is_ahead(self) -> bool:
        """Whether the text that was asked last has the logits after its last token already."""
        return self.asked is not None and self.asked.is_ahead

    def compute(self) -> None:
        """Compute in one pass the last token of each text that has taken one and goes on, and the
        tokens that are guessed to follow it."""
        for text in [each for each in self.active if each.answering.over]:
            self.leave(text)
        for text in self.active:
            text.go_ahead()
        lengths = [text.length for text in self.active]
        # Where texts are not asked in turns, one that was not asked since the last pass has its
        # logits still, and only what is guessed to follow is computed for it.
        waiting = [text.logits is None for text in self.active]
        most = self.widest() - 1
        guesses = [self.guess(text, most) for text in self.active]
        tokens: list[list[int]] = []
        for text, waits, guess in zip(self.active, waiting, guesses, strict=True):
            tokens.append([text.answering.tokens[-1], *guess] if waits else guess)
        width = max(self.fewest, *map(len, tokens))
        if self.drafts:
            width += width % TILE
        # Any token may stand behind a row's own: the next ones take its place.
        tokens = [[*row, *[0] * (width - len(row))] for row in tokens]
        while len(tokens) % self.multiple:
            # A free row gets any token, behind the prompt that it holds.
            held = len(self.prompts[len(tokens)])
            lengths.append(min(held, self.context_length - 1))
            tokens.append([0])
        self.make_room(max(lengths) + width)
        for text in self.active:
            # The pass goes over what was computed ahead, also if it fails.
            text.ahead = []
        found = self.run(0, tokens, lengths, range(width))
        for text, waits, guess, each in zip(self.active, waiting, guesses, found, strict=False):
            rest = iter(each)
            if waits:
                text.length += 1
                text.logits = next(rest)
            text.ahead = list(zip(guess, rest, strict=False))

    def widest(self) -> int:
        """Return how many tokens of each text the next pass has room for."""
        if not self.drafts:
            return 1
        longest = max(text.length for text in self.active)
        width = max(FEWEST, min(LONGEST_DRAFT_PASS, DRAFT_PASS // len(self.active)))
        width = min(width, self.context_length - longest)
        return width - width % TILE

    def guess(self, text: BatchedText, most: int) -> list[int]:
        """Return up to `most` tokens that are likely to follow those of a text."""
        if not self.drafts:
            return []
        taken = text.answering.tokens
        left = text.answering.most - len(taken) - 1
        return self.drafts.guess(taken, min(most, left), text.prompt)

    def prefill(self, prompt_ids: Sequence[int], room: int) -> Logits:
        """Compute a prompt into the first free row, from where it departs from those that the rows
        hold, and return the logits after it, [vocabulary]. Raises AnswerStopped if `stop` is set,
        and ModelError for a prompt that does not fit the context.

        What it shares is an even number of tokens, as in `Decoder.shared_tokens`."""
        check_length(self.folder, prompt_ids, self.context_length)
        row, prompt = len(self.active), tuple(prompt_ids)
        self.make_room(min(len(prompt) + room, self.context_length))
        shared = [common_prefix([prompt, other], 0) for other in self.prompts]
        source = shared.index(max(shared))
        done = max(0, min(shared[source], len(prompt) - FEWEST))
        done -= done % TILE
        if source != row:
            self.copy(source, row, done)
        self.prompts[row] = prompt[:done]
        for start, end in passes(done, len(prompt)):
            if self.stop.is_set():
                raise AnswerStopped(f"{self.folder}: the answer was given up")
            logits: Logits = self.run(row, [prompt[start:end]], [start], [end - start - 1])[0, 0]
            self.prompts[row] = prompt[:end]
        return logits

    def run(
        self,
        row: int,
        tokens: Sequence[Sequence[int]],
        lengths: Sequence[int],
        read: Sequence[int] = (0,),
    ) -> NDArray[np.float32]:
        """Compute `tokens`, as many for each of the rows from `row` on, behind the first `lengths`
        tokens of these rows. Return the logits after those of them that `read` names by their
        places, [rows, read, vocabulary]."""
        ids = np.array(tokens, dtype=np.int64)
        last = np.array(lengths, dtype=np.int32) + ids.shape[1] - 1
        inputs = {
            "input_ids": ids,
            "last": last,
            "most": np.array([last.max() + 1], dtype=np.int32),
            "new": np.full(len(ids), ids.shape[1], dtype=np.int32),
            "read": np.array(read, dtype=np.int64),
        }
        binding = self.binding(row, len(ids))
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, runtime_value(value))
        # Memory for them is taken anew, since the last ones had another shape.
        binding.bind_output("logits")
        with runtime_errors(self.folder):
            self._session.run_with_iobinding(binding)
            logits = binding.get_outputs()[0].numpy()
        # Else the binding would hold them.
        binding.bind_output("logits")
        found: NDArray[np.float32] = logits.astype(np.float32, copy=False)
        return found

    def binding(self, row: int, count: int) -> Any:
        """Return what binds the caches of the `count` rows from `row` on to the graph."""
        if (row, count) not in self._bindings:
            binding = self._session.io_binding()
            binding.bind_output("logits")
            for name, buffer in self._buffers.items():
                rows = runtime_value(buffer[row : row + count])
                binding.bind_ortvalue_input(name, rows)
                present = name.replace("past_key_values.", "present.")
                binding.bind_ortvalue_output(present, rows)
            self._bindings[row, count] = binding
        return self._bindings[row, count]

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of a row to another one."""
        for buffer in self._buffers.values():
            buffer[target, :, :count] = buffer[source, :, :count]

    def make_room(self, needed: int) -> None:
        """Make rows that hold `needed` tokens. Rows that are much longer are given up where no
        text is under way, which frees their memory."""
        much = LARGEST_WASTE * max(needed, SMALLEST_CAPACITY)
        if not self.active and self.capacity > much:
            self.forget()
        elif needed <= self.capacity:
            return
        capacity = SMALLEST_CAPACITY
        while capacity < needed:
            capacity *= 2
        capacity = min(capacity, self.context_length)
        kept = list(map(len, self.prompts))
        for row, text in enumerate(self.active):
            kept[row] = max(kept[row], text.computed)
        buffers = {}
        for name, shape in self._shapes.items():
            buffer = shape.empty(self.rows, capacity)
            for row, count in enumerate(kept):
                if count:
                    buffer[row, :, :count] = self._buffers[name][row, :, :count]
            buffers[name] = buffer
        # Last, so that a lack of memory leaves the rows as they are.
        self._buffers, self.capacity = buffers, capacity
        self._bindings.clear()


def passes(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the passes over the tokens from `start` to `end`, of LONGEST_PASS tokens each; the last
    one has the rest, and takes over what would be fewer than FEWEST."""
    while start < end:
        until = start + LONGEST_PASS
        if end - until < FEWEST:
            until = end
        yield start, until
        start = until
