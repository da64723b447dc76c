"""Probabilities and tokens from logits."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillery.errors import ModelError

Logits = NDArray[np.float32]
"""One logit for each token of the vocabulary, [vocabulary]."""


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return natural log-probabilities in float64 for logits of one dimension."""
    shifted = logits.astype(np.float64) - float(logits.max())
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def softmax(logits: NDArray[Any]) -> list[float]:
    """Return probabilities, computed in float64, for logits of one dimension."""
    probabilities: list[float] = np.exp(log_softmax(logits)).tolist()
    return probabilities


Draw = Callable[[Logits], int]
"""Takes a token from logits, [vocabulary]."""


def likeliest(logits: Logits) -> int:
    """Return the most probable token. Raises ModelError as `require_finite` does."""
    token = int(logits.argmax())
    require_finite(logits[token])
    return token


def require_finite(largest: Any) -> None:
    """Raise ModelError unless the largest of logits is a finite number: else there is one that is
    NaN or infinite, or no token may follow."""
    if not np.isfinite(largest):
        raise ModelError(f"its largest logit is {largest}, so that no token can be taken")


def token_sampler(
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    top_k: int | None = None,
) -> Draw:
    """Return a function that takes a token from logits.

    At temperature 0 it is the most probable one; else it is drawn from the smallest set of tokens
    that holds `top_p` of the probability (Holtzman et al., The Curious Case of Neural Text
    Degeneration, 2020). With `top_k`, only that many of the most probable tokens count. The
    function raises ModelError as `require_finite` does.
    """
    if temperature == 0:
        return likeliest
    generator = np.random.default_rng(seed)

    def draw(logits: Logits) -> int:
        require_finite(logits.max())
        shifted = logits.astype(np.float64) - logits.max()
        probabilities = np.exp(log_softmax(shifted / temperature))
        order = np.argsort(-probabilities, kind="stable")[:top_k]
        total = np.cumsum(probabilities[order])
        kept = order[: int(np.searchsorted(total, top_p * total[-1])) + 1]
        share = probabilities[kept] / probabilities[kept].sum()
        return int(generator.choice(kept, p=share))

    return draw


def pooled(each: Logits, last: float) -> Logits:
    """Return the mean of the logits at several tokens, [tokens, vocabulary], where the last one
    counts for `last` (0 to 1) more."""
    found: Logits = (1 - last) * each.mean(0) + last * each[-1]
    return found
