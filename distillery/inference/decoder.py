"""Run an ONNX model token by token, and compute once what a prompt shares with the one before."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from distillery.errors import AnswerStopped, ModelError, OutOfResources, lacks_memory, one_line
from distillery.inference.logits import Logits, pooled
from distillery.models.onnx_folder import CONFIG, check_before_loading
from distillery.training.batching import common_prefix

ADAPTER_FILE = "adapter_weights.onnx_adapter"

SMALLEST_CAPACITY = 256
"""Tokens. A cache is twice as large, or four times, and so on, as a prompt needs it."""

LARGEST_WASTE = 8
"""A cache this many times larger than needed is replaced, which frees its memory."""

LONGEST_REUSE = 4096
"""Tokens. Phi-3 and Phi-4-mini change to other rotary factors beyond this length, so the cache of
a shorter prompt does not fit a longer one."""

LONGEST_PASS = 512
"""Tokens of a prompt that are computed in one pass where somebody may give up waiting meanwhile."""

TILE = 2
"""Kernels for 4 bits compute so many tokens at a time, and the last of an odd number by other
sums."""


FEWEST = 2
"""The fewest tokens of a sequence in a pass, padding included: the attention takes other sums where
every sequence has a single token."""


class Decoder:
    """A model folder in ONNX Runtime GenAI, and the key-value cache of its last prompt.

    Not thread-safe. The cache is kept on a CPU. Logits are those of a fresh cache but for rounding
    (1e-5), whatever was computed before. Invariants between calls:
      - `tokens` are those in the generator's cache, in order.
      - The first `prefilled` of them were computed in passes of several tokens, the others one by
        one. A pass over a single token takes other kernels, whose sums differ, in int4 by much.
        So only prefilled tokens serve another prompt.
      - A generator that has raised is not used again: it is None until the next prompt.
    """

    def __init__(self, folder: Path, threads: int | None = None, adapter: bool = True) -> None:
        """Load the model. Raises ModelError for a folder that can't be loaded.

        `threads` counts the cores for one operation; None leaves it to the runtime. With
        `adapter` False, an adapter_weights.onnx_adapter in the folder is not used.
        """
        import onnxruntime_genai

        og: Any = onnxruntime_genai
        self._runtime = og
        self.folder = folder
        decoder, self.context_length = read_config(folder)
        with model_errors(folder):
            config = og.Config(str(folder))
            if threads is not None:
                options = {"intra_op_num_threads": threads}
                config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model = og.Model(config)
            self.tokenizer = og.Tokenizer(self._model)
            on_cpu = self._model.device_type.lower() == "cpu"
            self.can_rewind = on_cpu and "sliding_window" not in decoder
            self._adapters = None
            if adapter and (folder / ADAPTER_FILE).is_file():
                self._adapters = og.Adapters(self._model)
                self._adapters.load(str(folder / ADAPTER_FILE), "student")
        self.stop = threading.Event()
        """Another thread may set it: until it is cleared, each pass raises AnswerStopped."""
        self.longest_pass: int | None = None
        """Tokens of a prompt that are computed in one pass; None for all of them."""
        self._generator: Any = None
        self.capacity = 0
        self.tokens: list[int] = []
        self.prefilled = 0

    def prefill(self, prompt_ids: Sequence[int], room: int = 0) -> Logits:
        """Return the logits after the prompt.

        A new cache has space for `room` tokens more; it grows later if that is too little.
        """
        ids = list(prompt_ids)
        check_length(self.folder, ids, self.context_length)
        needed = len(ids) + min(room, SMALLEST_CAPACITY)
        if not self.can_serve(ids, needed):
            self.start(needed)
            return self.append(ids)
        shared = self.shared_tokens(ids)
        self._generator.rewind_to(shared)
        self.prefilled = shared
        del self.tokens[shared:]
        return self.append(ids[shared:])

    def prefill_mean(self, prompt_ids: Sequence[int], span: int, last: float = 0.0) -> Logits:
        """Return the mean of the logits at the prompt's last `span` tokens, where the last one
        counts for `last` (0 to 1) more. They are computed in one pass, so that it does not depend
        on what was computed before. The model must give the logits of all tokens."""
        ids = list(prompt_ids)
        check_length(self.folder, ids, self.context_length)
        before = len(ids) - span
        serves = self.can_serve(ids, len(ids)) and self.prefilled >= before > 0
        if serves and self.tokens[:before] == ids[:before]:
            self._generator.rewind_to(before)
            self.prefilled = before
            del self.tokens[before:]
        else:
            self.start(len(ids))
            if before:
                self.append(ids[:before])
        each = self.append_all(ids[before:])
        return pooled(each, last)

    def can_serve(self, ids: Sequence[int], needed: int) -> bool:
        """Return whether the cache can go on with a prompt that needs space for `needed` tokens."""
        if self._generator is None or not self.can_rewind or len(ids) < 2:
            return False
        if not needed <= self.capacity <= LARGEST_WASTE * max(needed, SMALLEST_CAPACITY):
            return False
        return max(len(ids), len(self.tokens)) <= LONGEST_REUSE

    def shared_tokens(self, ids: Sequence[int]) -> int:
        """Return how many tokens of the cache serve a prompt; at least two are left to compute.

        Their number is a multiple of TILE."""
        shared = min(len(ids) - 2, common_prefix([ids, self.tokens[: self.prefilled]], 0))
        return shared - shared % TILE

    def append(self, tokens: list[int]) -> Logits:
        """Compute the tokens in `passes` and return the logits after the last one."""
        *parts, tokens = self.passes(tokens)
        for part in parts:
            self._compute(part, lambda generator: generator.get_logits())
        # [1, 1 or tokens, vocabulary]: a head pruned by ModelBuilder gives the last position alone.
        each = self._compute(tokens, lambda generator: generator.get_logits())
        last: Logits = each[-1].copy()
        return last

    def passes(self, tokens: list[int]) -> list[list[int]]:
        """Return the tokens in passes of at most `longest_pass`, none of a single token, which
        takes other kernels. A prompt beyond LONGEST_REUSE is one pass: the model may choose its
        rotary factors by the first."""
        size = self.longest_pass
        if size is None or len(self.tokens) + len(tokens) > LONGEST_REUSE:
            return [tokens]
        starts = list(range(0, len(tokens), size))
        if len(starts) > 1 and len(tokens) - starts[-1] == 1:
            starts[-1] -= min(2, size - 1)
        ends = [*starts[1:], len(tokens)]
        return [tokens[start:end] for start, end in zip(starts, ends, strict=True)]

    def append_all(self, tokens: list[int]) -> Logits:
        """Compute the tokens in one pass and return the logits after each, [tokens, vocabulary].
        Raises ModelError for a model that gives those after the last one alone."""
        each = self._compute(tokens, lambda generator: generator.get_output("logits"))
        if len(each) != len(tokens):
            raise ModelError(f"{self.folder}: gives the last token's logits alone; export it again")
        return each

    def _compute(self, tokens: list[int], read: Callable[[Any], Any]) -> Logits:
        if self.stop.is_set():
            raise AnswerStopped(f"{self.folder}: the answer was given up")
        if len(self.tokens) + len(tokens) > self.capacity:
            self.grow(len(self.tokens) + len(tokens))
        generator, self._generator = self._generator, None
        with model_errors(self.folder):
            generator.append_tokens(np.array(tokens, dtype=np.int32))
            logits = np.asarray(read(generator), dtype=np.float32)
        self._generator = generator
        if self.prefilled == len(self.tokens) and len(tokens) > 1:
            self.prefilled += len(tokens)
        self.tokens += tokens
        each: Logits = logits.reshape(-1, logits.shape[-1])
        return each

    def forget(self) -> None:
        """Give up the cache, so that the time of the next prompt tells nothing of this one."""
        self._generator, self.tokens, self.prefilled = None, [], 0

    def rewind(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        if self.can_rewind and count > 1:
            self._generator.rewind_to(count)
            del self.tokens[count:]
        else:
            kept = self.tokens[:count]
            self.start(self.capacity)
            self.append(kept)

    def start(self, needed: int) -> None:
        """Start an empty cache with space for `needed` tokens."""
        capacity = SMALLEST_CAPACITY
        while capacity < needed:
            capacity *= 2
        self.capacity = min(capacity, self.context_length)
        # The old cache is freed before the new one is made.
        self._generator, self.tokens, self.prefilled = None, [], 0
        with model_errors(self.folder):
            params = self._runtime.GeneratorParams(self._model)
            params.set_search_options(max_length=self.capacity)
            self._generator = self._runtime.Generator(self._model, params)
            if self._adapters:
                self._generator.set_active_adapter(self._adapters, "student")

    def grow(self, needed: int) -> None:
        """Start a larger cache and compute the same tokens again, in passes of the same kind."""
        prompt, answer = self.tokens[: self.prefilled], self.tokens[self.prefilled :]
        self.start(needed)
        if prompt:
            self.append(prompt)
        for token in answer:
            self.append([token])


def read_config(folder: Path) -> tuple[dict[str, Any], int]:
    """Return the decoder's part of genai_config.json, and the context's length in tokens.

    Raises ModelError for a folder that is not a model's alone; see `check_before_loading`."""
    check_before_loading(folder)
    path = folder / CONFIG
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        return dict(model["decoder"]), int(model["context_length"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: no valid configuration ({type(error).__name__}); export the model again"
        ) from error


def check_length(
    folder: Path, prompt_ids: Sequence[int], context_length: int, text: int = 1
) -> None:
    """Raise ModelError for an empty prompt, or one that does not fit the context, in which the
    tokens of a `text` but for its last one follow it."""
    length, most = len(prompt_ids), context_length - (text - 1)
    if not 1 <= length <= most:
        follows = f" before a text of {text}" if text > 1 else ""
        raise ModelError(f"{folder}: a prompt of {length} tokens; it takes 1 to {most}{follows}")


@contextmanager
def model_errors(
    folder: Path,
    runtime: str = "ONNX Runtime GenAI",
    kind: type[Exception] = RuntimeError,
) -> Iterator[None]:
    """Turn what a runtime raises, of this kind, into a ModelError of one line: OutOfResources where
    it lacks memory."""
    try:
        yield
    except kind as error:
        cause = one_line(str(error).replace(f"{folder.absolute()}/", "")) or type(error).__name__
        if lacks_memory(error):
            raise OutOfResources(
                f"{folder}: {runtime} runs out of memory ({cause}); free memory, or use a machine "
                "with more"
            ) from error
        raise ModelError(f"{folder}: {runtime} fails ({cause}); export the model again") from error
