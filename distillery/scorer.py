"""Next-token logits of many prompts, on a processor, by the int8 form of an exported int4 or int8 model.

What all the prompts begin with is computed once. What is left goes into batches of prompts of like length, and each
thread of a pool takes one after another: two threads at one batch would wait for each other more than they save.
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
Cache = dict[str, NDArray[np.float32]]
_TOKENS_TOGETHER = 320


class Scorer:
    """A loaded int8 graph. Not thread-safe: one call at a time.

    No number depends on what else is asked, before or beside it, nor on the count of threads."""

    def __init__(self, graph: Path, threads: int | None = None) -> None:
        """`graph`: a file of `write_int8_graph`; `threads`: how many batches at a time, None for one a core."""
        runtime = _runtime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        # Without VNNI, a processor adds two products in 16 bits, where these would overflow; this has it use 32.
        options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = runtime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self._past = {value.name: value for value in self._session.get_inputs() if value.name.startswith("past")}
        self._threads = threads or cores()
        self._pool = ThreadPoolExecutor(self._threads, "scorer")
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
        cache = self._cache if reuse else self._empty()
        if len(prompts) == 1:
            (logits,), self._cache = self._run(prompts, start, cache, keep=True)
            self._begun = list(prompts[0])
            return [logits]
        batches = _batches([len(ids) - start for ids in prompts], self._threads)
        done = self._pool.map(lambda rows: self._run([prompts[row] for row in rows], start, cache)[0], batches)
        found: dict[int, Logits] = {}
        for rows, logits_of_rows in zip(batches, done, strict=True):
            found |= zip(rows, logits_of_rows, strict=True)
        return [found[row] for row in range(len(prompts))]

    def _share(self, prompts: Sequence[Ids]) -> int:
        """Has the cache hold what the prompts have in common, and gives its length.

        A pass over a single token takes other kernels for attention: two are left of each prompt, and two at a time are
        added to the cache."""
        first, most = prompts[0], min(map(len, prompts)) - 2
        common = min(_common(first, ids, most) for ids in prompts)
        known = _common(first, self._begun, common)
        if known < len(self._begun):
            self._cache = {name: values[:, :, :known].copy() for name, values in self._cache.items()}
        if len(prompts) > 1 and common - known > 1:
            self._cache = self._run([first[:common]], known, self._cache, keep=True)[1]
            known = common
        self._begun = list(first[:known])
        return known

    def _empty(self) -> Cache:
        return {
            name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for name, value in self._past.items()
        }

    def _run(self, prompts: Sequence[Ids], start: int, cache: Cache, keep: bool = False) -> tuple[list[Logits], Cache]:
        """The logits after each prompt, of which `cache` holds the first `start` tokens; with `keep` the whole cache of
        the first."""
        left = [len(ids) - start for ids in prompts]
        padded = np.zeros((len(prompts), max(left)), np.int64)
        for row, ids in enumerate(prompts):
            padded[row, : left[row]] = ids[start:]
        feed: dict[str, Any] = {"input_ids": padded, "last": np.array(left, np.int64)[:, None] - 1, **cache}
        feed["attention_mask"] = np.ones((1, start + max(left)), np.int64)
        names = [name.replace("past_key_values", "present") for name in cache] if keep else []
        try:
            logits, *present = self._session.run(["logits", *names], feed)
        except Exception as error:
            # What this runtime raises has no base of its own.
            raise RuntimeError(str(error)) from error
        return list(logits[:, 0]), {name: values[0] for name, values in zip(cache, present, strict=False)}


def _runtime() -> Any:
    import onnxruntime

    return onnxruntime


def _batches(lengths: Sequence[int], threads: int) -> list[list[int]]:
    """The rows, the longest first, in batches of up to so many tokens, padding included, yet enough for all threads."""
    most = min(_TOKENS_TOGETHER, sum(lengths) // threads)
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > most:
            batches.append([])
        batches[-1].append(row)
    return batches


def _common(one: Ids, other: Ids, most: int) -> int:
    """How many tokens the two begin with in common, `most` at most."""
    most = max(0, min(most, len(one), len(other)))
    return next((i for i in range(most) if one[i] != other[i]), most)
