"""How well a model in training answers rows whose labels are known."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

from distillery.models.device import Device
from distillery.models.load import contiguous_head
from distillery.training.batching import (
    by_length,
    forward_written,
    prompt_logits,
    turning_point,
)
from distillery.training.likelihood import forward_packed, option_scores
from distillery.training.losses import written_losses, written_targets
from distillery.training.rows import TrainingRow
from distillery.training.split_model import in_step

if TYPE_CHECKING:
    import torch

PROOF = 0.025
"""How probable it is at most that an epoch which is no worse than another is taken for worse."""

WRITTEN_ROWS = 8
"""Rows of written answers in a batch: each has logits over the vocabulary for each of its
tokens."""


def validate(
    model: Any, rows: Sequence[TrainingRow], *, pad_id: int, device: Device
) -> tuple[list[bool], float]:
    """Return (right, loss): whether each row's most probable option is its label, and the mean
    negative log-probability of the labels among the options, in nats."""
    right, logs = [], []
    found = option_probabilities(model, rows, pad_id=pad_id, device=device)
    for probabilities, row in zip(found, rows, strict=True):
        right.append(probabilities.index(max(probabilities)) == row.answer)
        logs.append(math.log(max(probabilities[row.answer], 1e-12)))
    return right, -sum(logs) / len(rows)


def validate_written(
    model: Any, rows: Sequence[TrainingRow], *, pad_id: int, end_id: int, device: Device
) -> tuple[list[float], float]:
    """Return (shares, loss) for written answers: of each row's answer and the end of the turn, the
    share (0 to 1) of tokens that are the likeliest behind those before them, and the loss that
    training has without label smoothing. At a share of 1, nothing else would be written."""
    shares = [0.0] * len(rows)
    losses = [0.0] * len(rows)
    with evaluated(model, device):
        contiguous_head(model)
        for picked in in_step(model, by_length(rows, WRITTEN_ROWS, turning_point(model))):
            batch = [rows[index] for index in picked]
            texts = [row.target for row in batch]
            logits = forward_written(model, [row.prompt for row in batch], texts, pad_id)
            targets = written_targets(logits, texts, end_id)
            # Before a text, a target is negative, which no token is.
            likeliest = (logits.argmax(-1) == targets).sum(-1).tolist()
            found = written_losses(logits, texts, end_id).tolist()
            for index, text, count, loss in zip(picked, texts, likeliest, found, strict=True):
                shares[index], losses[index] = count / (len(text) + 1), loss
    return shares, fmean(losses)


@contextmanager
def evaluated(model: Any, device: Device) -> Iterator[None]:
    """Put the model on its device, in evaluation mode, for passes without gradients."""
    import torch

    was_training = model.training
    model.to(device.name).eval()
    with torch.inference_mode(), device.autocast():
        yield
    model.train(was_training)


def proven_worse(now: Sequence[float], before: Sequence[float], chance: float = PROOF) -> bool:
    """Return whether a model that has `now` of each row right is worse than one that has `before`
    of it, by the exact one-sided sign test of the rows that differ. Where a row is right or wrong
    as a whole, this is McNemar's test (1947). `chance`: how probable it may be that a model which
    is no worse is taken for it."""
    from scipy.stats import binomtest

    lost = sum(still < was for still, was in zip(now, before, strict=True))
    won = sum(still > was for still, was in zip(now, before, strict=True))
    if lost <= won:
        return False
    return bool(binomtest(lost, lost + won, alternative="greater").pvalue <= chance)


def accuracy_of(model: Any, rows: Sequence[TrainingRow], *, pad_id: int, device: Device) -> float:
    """Return the share (0 to 1) of rows whose most probable option is the label."""
    return fmean(validate(model, rows, pad_id=pad_id, device=device)[0])


def option_probabilities(
    model: Any,
    rows: Sequence[TrainingRow],
    *,
    pad_id: int,
    device: Device,
    batch_size: int | None = None,
    batch_done: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Return for each row the probabilities over its options after one forward pass of its prompt:
    softmax over its letters' logits, or over the scores of its options' texts (likelihood.py).

    `batch_size`: see `prompt_logits`; 16 where options' texts are scored. `batch_done` is told
    after each batch how many rows it had."""
    import torch

    results: list[list[float]] = [[] for _ in rows]
    with evaluated(model, device):
        if rows and rows[0].texts:
            found = text_scores(model, rows, pad_id, batch_size or 16)
        else:
            found = letter_scores(model, rows, pad_id, batch_size)
        for picked, scores in found:
            for index, row_scores in zip(picked, scores, strict=True):
                results[index] = torch.softmax(row_scores, dim=-1).tolist()
            if batch_done:
                batch_done(len(picked))
    return results


def letter_scores(
    model: Any, rows: Sequence[TrainingRow], pad_id: int, batch_size: int | None
) -> Iterator[tuple[list[int], list["torch.Tensor"]]]:
    """Give each batch's row indices, and for each row the logits of its letters, [options]."""
    for picked, logits in prompt_logits(model, rows, pad_id, batch_size):
        scores = []
        for index, row_logits in zip(picked, logits.float(), strict=True):
            scores.append(row_logits[list(rows[index].letters)])
        yield picked, scores


def text_scores(
    model: Any, rows: Sequence[TrainingRow], pad_id: int, batch_size: int
) -> Iterator[tuple[list[int], list["torch.Tensor"]]]:
    """Give each batch's row indices, and for each row the scores of its options' texts,
    [options]."""
    contiguous_head(model)
    for picked in in_step(model, by_length(rows, batch_size, turning_point(model))):
        packed, logits = forward_packed(model, [rows[index] for index in picked], pad_id)
        padded, _ = option_scores(packed, logits)
        scores = []
        for index, row_scores in zip(picked, padded, strict=True):
            scores.append(row_scores[: len(rows[index].texts)])
        yield picked, scores
