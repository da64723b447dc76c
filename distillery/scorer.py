"""Next-token logits of many prompts, on a processor, by the int8 form of an exported int4 or int8 model.

What all the prompts begin with is computed once. Then each thread of a pool takes a prompt of its own: over the few
dozen tokens of a question, two threads at one prompt wait for each other more than they save.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from distillery.evaluation import cores
from distillery.int8_graph import write_int8_graph
from distillery.store import working_folder

Ids = Sequence[int]
Logits = NDArray[np.float32]


class Scorer:
    """A loaded int8 graph. Not thread-safe: one call at a time.

    No number depends on what else is asked, before or beside it, nor on the count of threads."""

    def __init__(self, graph: Path, threads: int | None = None) -> None:
        """`graph`: a file of `write_int8_graph`; `threads`: how many prompts at a time, None for one a core."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        # Without VNNI, a processor adds two products in 16 bits, where these would overflow; this has it use 32.
        options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self._past = {value.name: value for value in self._session.get_inputs() if value.name.startswith("past")}
        self._pool = ThreadPoolExecutor(threads or cores(), "scorer")
        self._begun: list[int] = []
        """What self._cache, the graph's past keys and values of [1, heads, tokens, head size], was computed from."""
        self._cache = self._empty()

    @classmethod
    def of(cls, model: Path, threads: int | None = None) -> Self | None:
        """For an exported ONNX file; None where its graph is none for `write_int8_graph`."""
        with working_folder("int8") as folder:
            graph = write_int8_graph(model, folder)
            return cls(graph, threads) if graph else None

    def logits(self, prompts: Sequence[Ids], reuse: bool = True) -> list[Logits]:
        """After each prompt, [vocabulary]. `reuse` False computes every one from its first token."""
        start = self._share(prompts) if reuse else 0
        cache = self._cache if start else self._empty()
        if len(prompts) > 1:
            return list(self._pool.map(lambda ids: self._run(ids, start, cache)[0], prompts))
        logits, self._cache = self._run(prompts[0], start, cache, keep=True)
        self._begun = list(prompts[0])
        return [logits]

    def _share(self, prompts: Sequence[Ids]) -> int:
        """Has the cache hold what the prompts have in common, and gives its length.

        Each prompt has two tokens left: a pass over a single one takes other kernels for attention."""
        first, most = prompts[0], min(map(len, prompts)) - 2
        common = min(_common(first, ids, most) for ids in prompts)
        known = _common(first, self._begun, common)
        if len(prompts) > 1 and known < common:
            # One alone would make a pass of a single token.
            self._cache = self._run(first[:common], 0, self._empty(), keep=True)[1] if common > 1 else self._empty()
            known = common if common > 1 else 0
            self._begun = list(first[:known])
        elif known < len(self._begun):
            self._cache = {name: values[:, :, :known].copy() for name, values in self._cache.items()}
            self._begun = self._begun[:known]
        return known

    def _empty(self) -> dict[str, NDArray[np.float32]]:
        return {
            name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for name, value in self._past.items()
        }

    def _run(
        self, ids: Ids, start: int, cache: dict[str, NDArray[np.float32]], keep: bool = False
    ) -> tuple[Logits, dict[str, NDArray[np.float32]]]:
        """The logits after the prompt, of which `cache` holds the first `start` tokens; with `keep` the whole cache."""
        feed: dict[str, Any] = {"input_ids": np.array([ids[start:]], np.int64), **cache}
        feed["attention_mask"] = np.ones((1, len(ids)), np.int64)
        names = [name.replace("past_key_values", "present") for name in cache] if keep else []
        try:
            logits, *present = self._session.run(["logits", *names], feed)
        except Exception as error:
            # What this runtime raises has no base of its own.
            raise RuntimeError(str(error)) from error
        return logits.reshape(-1, logits.shape[-1])[-1], dict(zip(cache, present, strict=False))


def _common(one: Ids, other: Ids, most: int) -> int:
    """How many tokens the two begin with in common, `most` at most."""
    most = max(0, min(most, len(one), len(other)))
    return next((i for i in range(most) if one[i] != other[i]), most)
