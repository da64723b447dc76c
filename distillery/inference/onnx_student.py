"""Asking an ONNX model: exact option probabilities, text, and the batch work of scoring a file.

Files out of `score_file`: predictions.jsonl, one `Prediction` a line; failed.jsonl, one `FailedRow` a line.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillery.errors import DataError, ModelError
from distillery.prompts import GenAITokenizer, letter_ids, longest_prompt, render_ids, text_ids
from distillery.recipe import PromptRecipe
from distillery.records import Example, Record

ADAPTER_FILE = "adapter_weights.onnx_adapter"

Logits = NDArray[np.float32]

_SMALLEST_CACHE = 256

# Phi-3 and Phi-4-mini turn to other rotary factors beyond 4,096 tokens, so a shorter prompt's cache does not fit there.
_LONGEST_REUSE = 4096


class Answer(Record):
    """The most probable letter, and the probability of each of the row's letters (they sum to 1)."""

    letter: str
    probabilities: dict[str, float]


class OnnxStudent:
    """A model folder in ONNX Runtime GenAI. Not thread-safe: one question at a time.

    The key-value cache of the last prompt is kept on a CPU, and what the next prompt shares with it is not computed
    again. The logits are those of a fresh cache but for rounding (1e-5), whatever was asked before.
    """

    def __init__(self, folder: Path, threads: int | None = None, adapter: bool = True) -> None:
        """Raises ModelError for a folder that can't be loaded. `threads` counts the cores for one operation (None: the
        runtime's choice); `adapter` False leaves an adapter_weights.onnx_adapter in the folder aside."""
        og = _runtime()
        self.folder = folder
        decoder, self.context_length = _read_config(folder)
        with _model_errors(folder):
            config = og.Config(str(folder))
            if threads is not None:
                options = {"intra_op_num_threads": threads}
                config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model = og.Model(config)
            self._tokenizer = og.Tokenizer(self._model)
            self._can_rewind = (
                self._model.device_type.lower() == "cpu" and "sliding_window" not in decoder
            )
            self._adapters = (
                self._load_adapter() if adapter and (folder / ADAPTER_FILE).is_file() else None
            )
        self.tokenizer = GenAITokenizer(self._tokenizer)
        self.end_ids = frozenset(int(token) for token in self._tokenizer.eos_token_ids)
        self._letters: dict[int, list[int]] = {}
        self._tokens: dict[int, str] = {}
        self._generator: Any = None
        self._capacity = 0
        self._cached: list[int] = []
        self._prefilled = 0

    def option_probabilities(
        self, prompt_ids: Sequence[int], letter_ids: Sequence[int]
    ) -> list[float]:
        """The softmax over the letters' logits at the assistant's first token, float64: one prefill, no decoding."""
        logits = self._prefill(prompt_ids)[list(letter_ids)]
        probabilities: list[float] = np.exp(log_softmax(logits)).tolist()
        return probabilities

    def text_probabilities(
        self, prompt_ids: Sequence[int], texts: Sequence[Sequence[int]]
    ) -> list[float]:
        """The softmax over the texts' scores, float64: a score is the mean log-probability of a text's tokens after the
        prompt, which is computed once (likelihood.py)."""
        first = log_softmax(self._prefill(prompt_ids, room=max(map(len, texts))))
        scores = []
        for text in texts:
            logs = [first[text[0]]]
            for token, following in pairwise(text):
                logs.append(log_softmax(self._append([token]))[following])
            scores.append(float(np.mean(logs)))
            if len(text) > 1:
                self._back_to(len(prompt_ids))
        probabilities: list[float] = np.exp(log_softmax(np.array(scores))).tolist()
        return probabilities

    def next_token_logprobs(self, prompt_ids: Sequence[int]) -> NDArray[np.float64]:
        """Natural log-probabilities of the next token, [vocabulary]."""
        return log_softmax(self._prefill(prompt_ids))

    def steps(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[tuple[int, Logits]]:
        """Yields up to `max_tokens` pairs of a token and the logits it was taken from, [vocabulary]; stops after an end
        token, which is yielded too, and where the context is full. The model works only as far as the caller asks."""
        draw = _sampler(temperature, top_p, seed)
        most = max(1, min(max_tokens, self.context_length - len(prompt_ids)))
        logits = self._prefill(prompt_ids, room=most)
        for count in range(1, most + 1):
            token = draw(logits)
            yield token, logits
            if token in self.end_ids or count == most:
                return
            logits = self._append([token])

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> tuple[list[int], list[float]]:
        """The answer's tokens, less the end token, and each one's log-probability under the model as it is (at
        temperature 1). Greedy at temperature 0; equal seeds give equal answers."""
        tokens, logprobs = [], []
        for token, logits in self.steps(
            prompt_ids, max_tokens, temperature=temperature, top_p=top_p, seed=seed
        ):
            if token not in self.end_ids:
                tokens.append(token)
                logprobs.append(float(log_softmax(logits)[token]))
        return tokens, logprobs

    def answer(self, example: Example, prompt: PromptRecipe) -> Answer:
        """Raises DataError where the prompt is longer than prompt.max_tokens or, with the longest option's text where
        that is the answer, than the model's context."""
        texts = text_ids(example, self.tokenizer) if prompt.answer == "text" else []
        ids = render_ids(example, prompt, self.tokenizer)
        limit = longest_prompt(prompt, self.context_length, texts)
        if ids is None or len(ids) > limit:
            whose = "prompt.max_tokens" if limit == prompt.max_tokens else "the model's context"
            raise DataError(
                f"{example.example_id}: the prompt is longer than {limit} tokens ({whose})"
            )
        if texts:
            probabilities = self.text_probabilities(ids, texts)
        else:
            probabilities = self.option_probabilities(ids, self.letter_ids(len(example.choices)))
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        by_letter = dict(zip(example.letters, probabilities, strict=True))
        return Answer(letter=example.letters[best], probabilities=by_letter)

    def letter_ids(self, count: int) -> list[int]:
        """`prompts.letter_ids` by this model's tokenizer."""
        if count not in self._letters:
            self._letters[count] = letter_ids(self.tokenizer, count)
        return self._letters[count]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(np.array(tokens, dtype=np.int32)))

    def text_stream(self) -> Any:
        """An object whose `decode(token)` gives the text that this token completes."""
        return self._tokenizer.create_stream()

    def token_text(self, token: int) -> str:
        """One token as text; special tokens by their name, parts of a character as U+FFFD."""
        if token not in self._tokens:
            self._tokens[token] = self._special.get(token) or self.decode([token])
        return self._tokens[token]

    @cached_property
    def _special(self) -> dict[int, str]:
        added = json.loads((self.folder / "tokenizer.json").read_text(encoding="utf-8")).get(
            "added_tokens", []
        )
        return {int(token["id"]): str(token["content"]) for token in added}

    def _load_adapter(self) -> Any:
        adapters = _runtime().Adapters(self._model)
        adapters.load(str(self.folder / ADAPTER_FILE), "student")
        return adapters

    def _prefill(self, prompt_ids: Sequence[int], room: int = 0) -> Logits:
        """The logits after the prompt, [vocabulary]; a new cache has space for `room` tokens more (it grows later)."""
        ids = list(prompt_ids)
        if not 1 <= len(ids) <= self.context_length:
            raise ModelError(
                f"{self.folder}: a prompt of {len(ids)} tokens; it takes 1 to {self.context_length}"
            )
        needed = len(ids) + min(room, _SMALLEST_CACHE)
        kept = self._shared(ids) if self._fits(needed) else None
        if kept is None:
            self._start(needed)
            return self._append(ids)
        self._generator.rewind_to(kept)
        self._prefilled = kept
        del self._cached[kept:]
        return self._append(ids[kept:])

    def _fits(self, tokens: int) -> bool:
        """Whether the cache at hand is large enough, and not so large that it had better be given back."""
        return self._generator is not None and tokens <= self._capacity <= 8 * max(
            tokens, _SMALLEST_CACHE
        )

    def _shared(self, ids: list[int]) -> int | None:
        """How many tokens of the cache serve the prompt; None where a new one is due.

        A pass over a single token takes other kernels, whose sums differ, by much in int4. So what was decoded token by
        token is not used again, and at least two tokens are left to compute."""
        if (
            not self._can_rewind
            or len(ids) < 2
            or max(len(ids), len(self._cached)) > _LONGEST_REUSE
        ):
            return None
        most = min(len(ids) - 2, self._prefilled)
        return next((i for i in range(most) if ids[i] != self._cached[i]), most)

    def _back_to(self, tokens: int) -> None:
        """Forgets all but the first `tokens` of the cache."""
        kept = self._cached[:tokens]
        if self._can_rewind and tokens > 1:
            self._generator.rewind_to(tokens)
            del self._cached[tokens:]
        else:
            self._start(self._capacity)
            self._append(kept)

    def _start(self, tokens: int) -> None:
        og = _runtime()
        capacity = _SMALLEST_CACHE
        while capacity < tokens:
            capacity *= 2
        self._capacity = min(capacity, self.context_length)
        self._generator, self._cached, self._prefilled = None, [], 0
        with _model_errors(self.folder):
            params = og.GeneratorParams(self._model)
            params.set_search_options(max_length=self._capacity)
            self._generator = og.Generator(self._model, params)
            if self._adapters:
                self._generator.set_active_adapter(self._adapters, "student")

    def _grow(self, needed: int) -> None:
        """A larger cache with the same content, computed in the same way: the prompt at once, the answer by tokens."""
        prompt, answer = self._cached[: self._prefilled], self._cached[self._prefilled :]
        self._start(needed)
        for tokens in [prompt] * bool(prompt) + [[token] for token in answer]:
            self._append(tokens)

    def _append(self, tokens: list[int]) -> Logits:
        if len(self._cached) + len(tokens) > self._capacity:
            self._grow(len(self._cached) + len(tokens))
        generator, self._generator = self._generator, None
        with _model_errors(self.folder):
            generator.append_tokens(np.array(tokens, dtype=np.int32))
            logits = np.asarray(generator.get_logits(), dtype=np.float32)
        # A generator that has raised is not asked again.
        self._generator = generator
        if self._prefilled == len(self._cached) and len(tokens) > 1:
            self._prefilled += len(tokens)
        self._cached += tokens
        # [1, tokens or 1, vocabulary]: a head pruned by ModelBuilder gives the last position alone.
        last: Logits = logits.reshape(-1, logits.shape[-1])[-1].copy()
        return last


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Natural log-probabilities in float64 from logits of one dimension."""
    shifted = logits.astype(np.float64) - float(logits.max())
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def _sampler(temperature: float, top_p: float, seed: int | None) -> Callable[[Logits], int]:
    """Takes a token from logits: the most probable at temperature 0, else one drawn from the smallest set of tokens
    that holds `top_p` of the probability (Holtzman et al., The Curious Case of Neural Text Degeneration, 2020)."""
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = np.random.default_rng(seed)

    def draw(logits: Logits) -> int:
        probabilities = np.exp(
            log_softmax((logits.astype(np.float64) - logits.max()) / temperature)
        )
        order = np.argsort(-probabilities, kind="stable")
        total = np.cumsum(probabilities[order])
        kept = order[: int(np.searchsorted(total, min(top_p, total[-1]))) + 1]
        share = probabilities[kept] / probabilities[kept].sum()
        return int(generator.choice(kept, p=share))

    return draw


def _runtime() -> Any:
    import onnxruntime_genai

    return onnxruntime_genai


def _read_config(folder: Path) -> tuple[dict[str, Any], int]:
    """The decoder's part of genai_config.json and the context's length in tokens."""
    path = folder / "genai_config.json"
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        return dict(model["decoder"]), int(model["context_length"])
    except OSError as error:
        raise ModelError(
            f"{path}: can't be read ({error.strerror}); name a folder that export made"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: no valid configuration ({type(error).__name__}); export the model again"
        ) from error


@contextmanager
def _model_errors(folder: Path) -> Iterator[None]:
    """Turns what ONNX Runtime GenAI raises into one line."""
    try:
        yield
    except RuntimeError as error:
        cause = " ".join(str(error).split()).replace(str(folder.absolute()) + "/", "")
        raise ModelError(
            f"{folder}: ONNX Runtime GenAI fails ({cause[:200]}); export the model again"
        ) from error
