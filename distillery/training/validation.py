"""training/validation"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from distillery.models.load import contiguous_head
from distillery.models.placement import Placement
from distillery.training.batching import by_length, turning_point
from distillery.training.likelihood import forward_packed, option_scores
from distillery.training.losses import TrainingRow
from distillery.training.objective import prefilled_states

if TYPE_CHECKING:
    import torch


def option_probabilities(
    model: Any, rows: Sequence[TrainingRow], *, pad_id: int, place: Placement, batch_size: int = 16
) -> list[list[float]]:
    """For each row the probabilities over its options after one prefill: softmax over its letters' logits, or over the
    scores of its options' texts (likelihood.py)."""
    import torch

    results: list[list[float]] = [[] for _ in rows]
    was_training = model.training
    model.to(place.device).eval()
    with torch.inference_mode(), place.autocast():
        if rows and rows[0].texts:
            found = _text_scores(model, rows, pad_id, place, batch_size)
        else:
            found = _letter_scores(model, rows, pad_id, place, batch_size)
        for index, scores in found:
            results[index] = torch.softmax(scores, dim=-1).tolist()
    model.train(was_training)
    return results


def _letter_scores(
    model: Any, rows: Sequence[TrainingRow], pad_id: int, place: Placement, batch_size: int
) -> Iterator[tuple[int, "torch.Tensor"]]:
    for picked, logits in prefilled_states(model, rows, pad_id, place, batch_size):
        for index, row_logits in zip(picked, logits.float(), strict=True):
            yield index, row_logits[list(rows[index].letters)]


def _text_scores(
    model: Any, rows: Sequence[TrainingRow], pad_id: int, place: Placement, batch_size: int
) -> Iterator[tuple[int, "torch.Tensor"]]:
    contiguous_head(model)
    for picked in by_length(rows, batch_size, turning_point(model)):
        packed, logits = forward_packed(model, [rows[i] for i in picked], pad_id, place.device)
        for index, scores in zip(picked, option_scores(packed, logits)[0], strict=True):
            yield index, scores[: len(rows[index].texts)]


def validate(
    model: Any, rows: Sequence[TrainingRow], *, pad_id: int, place: Placement
) -> tuple[float, float]:
    """(accuracy, loss): the share (0 to 1) of rows whose most probable option is the label, and the mean negative
    log-probability of the label among the options, in nats."""
    probabilities = option_probabilities(model, rows, pad_id=pad_id, place=place)
    right = sum(p.index(max(p)) == row.answer for p, row in zip(probabilities, rows, strict=True))
    loss = -sum(
        math.log(max(p[row.answer], 1e-12)) for p, row in zip(probabilities, rows, strict=True)
    )
    return right / len(rows), loss / len(rows)


def accuracy_of(model: Any, rows: Sequence[TrainingRow], *, pad_id: int, place: Placement) -> float:
    """Share (0 to 1) of rows whose most probable option is the label."""
    return validate(model, rows, pad_id=pad_id, place=place)[0]
