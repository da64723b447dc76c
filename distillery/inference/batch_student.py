"""Ask an ONNX model many rows, or a row's options, in one pass.

What the prompts begin with is computed once and serves the next rows too. Texts follow their
prompts in a second pass, all of them at once, each from its prompt's cache. The numbers are those
of rows one by one, whatever stands beside them: the graph computes token by token
(batch_graph.py), and its kernels give a token the same sums in every pass of an even number (bit
for bit on a Xeon with AVX-512, in fp32, int8 and int4).

OnnxStudent's numbers are the same for prompts, in fp32 and in 8 bits. In 4 bits it computes the
last token of an odd prompt by other sums, and texts token by token by others again; where
activations are rounded to 8 bits, a difference of 1e-6 becomes one of up to 0.06 in a probability
of SmolLM2-135M before training (32 rows). Neither student's numbers depend on what was asked
before, but for prompts of more than 128 tokens: with more of them in the cache, the attention is
added up in other parts.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from distillery.errors import AnswerStopped, ModelError, OutOfResources
from distillery.inference.batch_graph import UnknownGraph
from distillery.inference.decoder import FEWEST, LONGEST_PASS, TILE, check_length, read_config
from distillery.inference.graph_session import (
    cache_shapes,
    load_tokenizer,
    open_session,
    read_graphs,
    runtime_errors,
    runtime_value,
)
from distillery.inference.logits import Logits, log_softmax, pooled, softmax
from distillery.inference.onnx_student import OnnxStudent
from distillery.inference.student import Student
from distillery.prompts import GenAITokenizer
from distillery.training.batching import common_prefix
from distillery.training.rows import TrainingRow

PASS_TOKENS = 256
"""Tokens that a pass has at most, where more than one sequence is in it: by then the processor
multiplies as fast as it can, and the logits of so many tokens take little memory."""

PASS_CACHE = 16_384
"""Tokens that the caches of a pass have at most, padding included, where more than one sequence is
in it: sequences x (cached tokens + longest). It bounds the memory of a pass."""

LEAST_SAVED = 64
"""The fewest tokens that a shared beginning must save for its pass of its own to pay."""

Found = TypeVar("Found")
Together = TypeVar("Together", bound=Student)

_log = logging.getLogger(__name__)


def load_scorer(folder: Path, threads: int | None = None) -> Student:
    """Load a model that is to choose: as a BatchStudent or, where its graph can't be rewritten or
    an adapter is apart, as an OnnxStudent, which answers one by one.

    `threads` counts the cores for one operation; None leaves it to the runtime. Raises ModelError
    for a folder that can't be loaded."""
    return load_together(partial(BatchStudent, folder, threads), folder, threads)


def load_together(
    load: Callable[[], Together], folder: Path, threads: int | None
) -> "Together | OnnxStudent":
    """Return the student that `load` loads, or an OnnxStudent where its graph is not one for that.
    Raises ModelError."""
    try:
        return load()
    except OutOfResources:
        raise
    except (UnknownGraph, ModelError) as error:
        _log.info("%s: its rows are answered one by one, since %s", folder, error)
    return OnnxStudent(folder, threads)


@dataclass(frozen=True)
class Cache:
    """Keys and values of sequences, one tensor for each name of past_key_values.*, [sequences,
    heads, tokens, size]."""

    values: dict[str, Any]


class BatchStudent(Student):
    """A model whose graph takes many sequences at once.

    It holds the weights once: the tokenizer is loaded without them. `_begun` are the tokens in
    `_cache`, which serve prompts that begin alike."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        """Load the model. Raises UnknownGraph, or ModelError for a folder that can't be loaded."""
        _, context_length = read_config(folder)
        graphs = read_graphs(folder)
        tokenizer = GenAITokenizer(load_tokenizer(folder, graphs.stand_in), folder)
        super().__init__(folder, tokenizer, context_length)
        self._session = open_session(folder, graphs.many, threads)
        self._stop = threading.Event()
        self._begun: tuple[int, ...] = ()
        shapes = cache_shapes(self._session).items()
        self._cache = self._no_cache = Cache(
            {name: runtime_value(shape.empty(1, 0)) for name, shape in shapes}
        )

    def probabilities(self, rows: Sequence[TrainingRow]) -> list[list[float]]:
        """Return the probabilities over the options of each row; rows of like length share a
        pass. Raises ModelError for a row that does not fit the context."""
        return self.in_shared_passes(rows, self.ask)

    def next_logits(self, prompt_ids: Sequence[int]) -> Logits:
        """Return the logits of the token after a prompt, [vocabulary]."""
        (logits,) = self.all_next_logits([prompt_ids])
        return logits

    def all_next_logits(self, prompts: Sequence[Sequence[int]]) -> list[Logits]:
        """See `Student`; prompts of like length share a pass."""

        def ask(rows: Sequence[TrainingRow], shared: int) -> list[Logits]:
            logits, _ = self.prompt_logits(rows, shared, keep=len(rows) == 1)
            return list(logits)

        rows = [TrainingRow(prompt=tuple(prompt), answer=0) for prompt in prompts]
        return self.in_shared_passes(rows, ask)

    def in_shared_passes(
        self, rows: Sequence[TrainingRow], ask: Callable[[Sequence[TrainingRow], int], list[Found]]
    ) -> list[Found]:
        """Return what `ask` finds of each row. It is given the rows of one pass and how many of
        their first tokens are in the cache. Raises ModelError for a row that does not fit the
        context."""
        if not rows:
            return []
        for row in rows:
            longest = max(map(len, row.texts), default=1)
            check_length(self.folder, row.prompt, self.context_length, longest)
        shared = self.shared_tokens(rows)
        found: dict[int, Found] = {}
        lengths = [len(row.prompt) - shared for row in rows]
        for picked in in_passes(lengths, [shared] * len(rows), self.context_length):
            some = [rows[index] for index in picked]
            found |= zip(picked, ask(some, shared), strict=True)
        return [found[index] for index in range(len(rows))]

    def heed(self, stop: threading.Event) -> None:
        """See `Student`."""
        self._stop = stop

    def forget(self) -> None:
        """See `Student`."""
        self._begun, self._cache = (), self._no_cache

    def shared_tokens(self, rows: Sequence[TrainingRow]) -> int:
        """Return how many tokens of the cache serve all rows; at least two of each row are left to
        compute. What the rows begin with is computed into it where that pays.

        The number is even, as in `Decoder.shared_tokens`."""
        prompts = [row.prompt for row in rows]
        most = min(len(row.prompt) - row.span for row in rows)
        shared = min(common_prefix(prompts, FEWEST), most)
        shared -= shared % TILE
        cached = common_prefix([self._begun, prompts[0][:shared]], 0)
        cached -= cached % TILE
        if (shared - cached) * (len(rows) - 1) < LEAST_SAVED:
            return cached
        row = TrainingRow(prompt=prompts[0][:shared], answer=0)
        self.prompt_logits([row], cached, keep=True)
        return shared

    def ask(self, rows: Sequence[TrainingRow], shared: int) -> list[list[float]]:
        """Return the probabilities over the options of the rows of one pass, whose first `shared`
        tokens are in the cache."""
        if rows[0].texts:
            logits, cache = self.prompt_logits(rows, shared, keep=True)
            return self.text_probabilities(rows, logits, cache)
        logits, _ = self.prompt_logits(rows, shared, keep=len(rows) == 1)
        found, start = [], 0
        for row in rows:
            each = logits[start : start + row.span]
            start += row.span
            # Where classes are read from the mean of the states, theirs is the mean of the logits,
            # because a head is linear.
            read = pooled(each, row.last) if row.span > 1 else each[-1]
            found.append(softmax(read[list(row.letters)]))
        return found

    def prompt_logits(
        self, rows: Sequence[TrainingRow], shared: int, keep: bool
    ) -> tuple[Logits, Cache]:
        """Compute prompts whose first `shared` tokens are in the cache. Return the logits at the
        last `span` tokens of each, [tokens, vocabulary], and, to `keep`, the prompts' cache.

        The cache of a single prompt replaces the one that was there. If the prompt is long, it
        takes several passes: that bounds their memory, and `heed` its delay."""
        if len(rows) == 1:
            most = len(rows[0].prompt) - max(rows[0].span, FEWEST)
            while len(rows[0].prompt) - shared > LONGEST_PASS and shared + LONGEST_PASS <= most:
                part = TrainingRow(prompt=rows[0].prompt[: shared + LONGEST_PASS], answer=0)
                self.prompt_logits([part], shared, keep=True)
                shared += LONGEST_PASS
        own = [row.prompt[shared:] for row in rows]
        read: list[int] = []
        end = 0
        for row, tokens in zip(rows, own, strict=True):
            end += len(tokens)
            read += range(end - row.span, end)
        start = self._cache if shared else self._no_cache
        logits, cache = self.run(own, read, start, [0] * len(rows), [shared] * len(rows), keep)
        if keep and len(rows) == 1:
            self._begun, self._cache = rows[0].prompt, cache
        return logits, cache

    def text_probabilities(
        self, rows: Sequence[TrainingRow], after_prompts: Logits, cache: Cache
    ) -> list[list[float]]:
        """Return the softmax over the texts' scores of each row, from the logits after the prompts,
        [rows, vocabulary], and the prompts' cache.

        A score is the mean log-probability of a text's tokens, as in training/likelihood.py."""
        scores: list[list[list[float]]] = []
        longer: list[tuple[int, int]] = []
        for number, (row, logits) in enumerate(zip(rows, after_prompts, strict=True)):
            first = log_softmax(logits)
            scores.append([[float(first[text[0]])] for text in row.texts])
            longer += [(number, option) for option, text in enumerate(row.texts) if len(text) > 1]
        texts = [rows[number].texts[option] for number, option in longer]
        lengths = [len(text) - 1 for text in texts]
        after = [len(rows[number].prompt) for number, _ in longer]
        for picked in in_passes(lengths, after, self.context_length):
            some = [texts[index] for index in picked]
            owners = [longer[index][0] for index in picked]
            before = [after[index] for index in picked]
            following = self.text_logits([text[:-1] for text in some], cache, owners, before)
            for index, text in zip(picked, some, strict=True):
                number, option = longer[index]
                for token in text[1:]:
                    scores[number][option].append(float(log_softmax(next(following))[token]))
        return [softmax(np.array([np.mean(logs) for logs in of_row])) for of_row in scores]

    def text_logits(
        self,
        texts: Sequence[Sequence[int]],
        cache: Cache,
        cache_of: Sequence[int],
        cached: Sequence[int],
    ) -> Iterator[Logits]:
        """Yield the logits at each token of the texts of one pass, [vocabulary]; see `run`. A long
        text, which is alone in its pass, takes several, as a long prompt does."""
        longest = max(map(len, texts))
        for start in range(0, longest, LONGEST_PASS):
            end = start + LONGEST_PASS
            parts = [text[start:end] for text in texts]
            read = list(range(sum(map(len, parts))))
            logits, cache = self.run(parts, read, cache, cache_of, cached, keep=end < longest)
            yield from logits
            cache_of, cached = [0], [cached[0] + LONGEST_PASS]

    def run(
        self,
        sequences: Sequence[Sequence[int]],
        read: Sequence[int],
        cache: Cache,
        cache_of: Sequence[int],
        cached: Sequence[int],
        keep: bool,
    ) -> tuple[Logits, Cache]:
        """Compute sequences in one pass, each after the first `cached` tokens of the sequence
        `cache_of` in `cache`. Return the logits at the tokens `read`, counted through all
        sequences, [tokens, vocabulary], and, to `keep`, the sequences' own cache."""
        if self._stop.is_set():
            raise AnswerStopped(f"{self.folder}: the answer was given up")
        new = np.array([len(tokens) for tokens in sequences])
        before = np.array(cached)
        # There is no place for padding behind the last token of the context; a sequence that ends
        # there by a single token is alone in its pass.
        longest = min(max(FEWEST, int(new.max())), self.context_length - int(before.max()))
        tokens = [token for sequence in sequences for token in sequence]
        # A pass is filled up to a multiple of TILE, so that no token is the last of an odd number.
        filling = -len(tokens) % TILE
        to_sequences = np.zeros((len(new), longest), dtype=np.int64)
        from_sequences, start = [0] * (len(tokens) + filling), 0
        for number, count in enumerate(new.tolist()):
            to_sequences[number, :count] = np.arange(start, start + count)
            first = number * longest
            from_sequences[start : start + count] = range(first, first + count)
            start += count
        feeds = {
            "input_ids": np.array([tokens + [0] * filling], dtype=np.int64),
            "to_sequences": to_sequences,
            "from_sequences": np.array(from_sequences, dtype=np.int64),
            "cache_of": np.array(cache_of, dtype=np.int64),
            "cached": np.array([before.max()], dtype=np.int64),
            "last": (before + new - 1).astype(np.int32),
            "new": new.astype(np.int32),
            "most": np.array([before.max() + longest], dtype=np.int32),
            "read": np.array([*read, *[read[-1]] * (-len(read) % TILE)], dtype=np.int64),
        }
        values = {name: runtime_value(array) for name, array in feeds.items()}
        wanted = ["logits"]
        if keep:
            wanted += [name.replace("past_key_values.", "present.") for name in cache.values]
        with runtime_errors(self.folder):
            found = self._session.run_with_ort_values(wanted, values | cache.values)
        logits: Logits = found[0].numpy()[0, : len(read)].astype(np.float32, copy=False)
        return logits, Cache(dict(zip(cache.values, found[1:], strict=False)))


def in_passes(
    lengths: Sequence[int], cached: Sequence[int], context_length: int
) -> Iterator[list[int]]:
    """Give the indices of sequences of `lengths` tokens, each after `cached` tokens, in passes of
    like length.

    A pass has at most PASS_TOKENS tokens and PASS_CACHE tokens of caches, and the longest sequence
    fits the context after the longest cache; or it has a single sequence."""
    picked: list[int] = []
    tokens = before = 0
    for index in sorted(range(len(lengths)), key=lambda each: (lengths[each], cached[each])):
        tokens += lengths[index]
        before = max(before, cached[index])
        # The sequences come in the order of their lengths.
        most = before + max(FEWEST, lengths[index])
        too_many = tokens > PASS_TOKENS or (len(picked) + 1) * most > PASS_CACHE
        if picked and (too_many or most > context_length):
            yield picked
            picked, tokens, before = [], lengths[index], cached[index]
        picked.append(index)
    if picked:
        yield picked
