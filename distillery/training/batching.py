"""Rows as a model's batches: of like length, padded on the left, and what all prompts of a batch share computed once.

Prompts of one task begin alike: the system message, the instruction, often the options. In a batch these tokens go
through the model once, and each row attends to their keys and values, in training too, where gradients flow through
them. The numbers are those of whole rows but for rounding."""

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from distillery.training.losses import TrainingRow

if TYPE_CHECKING:
    import torch

LEAST_SAVED = 64
"""Tokens that must be spared for a pass over the shared ones to pay."""

LONGEST_SHARED = 4096
"""Of any model; its own limits may be lower."""


def turning_point(model: Any) -> int | None:
    """How many tokens a sequence may have until the model turns to other rotary factors for the whole batch (LongRoPE,
    as Phi-3 and Phi-4-mini have it); None for a model that never does."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) != "longrope":
        return None
    found = getattr(config, "original_max_position_embeddings", None) or rope.get(
        "original_max_position_embeddings"
    )
    return int(found) if found else None


def batches(
    rows: Sequence[TrainingRow], size: int, seed: int, epoch: int, turn: int | None = None
) -> list[list[TrainingRow]]:
    """An epoch in batches of like length: rows shuffled, sorted within windows of 16 batches, batches shuffled. No
    batch has rows on both sides of `turn`."""
    order = random.Random(f"{seed}/{epoch}")  # noqa: S311 - no secret, a reproducible order
    shuffled = list(rows)
    order.shuffle(shuffled)
    window = size * 16
    grouped: list[list[TrainingRow]] = []
    # First by their side, so that every epoch has as many batches.
    for side in _sides(shuffled, turn, 1):
        for start in range(0, len(side), window):
            part = [shuffled[i] for i in side[start : start + window]]
            grouped += [[part[i] for i in picked] for picked in by_length(part, size)]
    order.shuffle(grouped)
    return grouped


def _sides(
    rows: Sequence[TrainingRow], turn: int | None, letter: int
) -> tuple[list[int], list[int]]:
    """The indices of the rows that end by `turn`, with their longest text or with a letter of `letter` tokens, and of
    those that go beyond."""
    beyond = [
        turn is not None and len(row.prompt) + max(map(len, row.texts), default=letter) > turn
        for row in rows
    ]
    return [i for i, far in enumerate(beyond) if not far], [
        i for i, far in enumerate(beyond) if far
    ]


def by_length(
    rows: Sequence[TrainingRow], size: int, turn: int | None = None
) -> Iterator[list[int]]:
    """The rows' indices in batches of like length, to be asked: no batch has rows on both sides of `turn`."""
    for side in _sides(rows, turn, 0):
        order = sorted(side, key=lambda i: len(rows[i].prompt))
        for start in range(0, len(order), size):
            yield order[start : start + size]


def padded_inputs(
    ids: Sequence[Sequence[int]], pad_id: int, device: str, shared: int = 0
) -> dict[str, Any]:
    """Left-padded model inputs, [batch, longest]; `shared` tokens that a cache holds come before them."""
    import torch

    longest = max(map(len, ids))
    tokens = torch.tensor(
        [[pad_id] * (longest - len(row)) + list(row) for row in ids], device=device
    )
    mask = torch.tensor(
        [[1] * shared + [0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device
    )
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, shared:]
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}


def forward(
    model: Any, ids: Sequence[Sequence[int]], kept: int, pad_id: int, device: str
) -> "torch.Tensor":
    """The logits at each row's last `kept` tokens, [batch, kept, vocabulary]."""
    shared, cache = prefilled(model, ids, kept, device)
    inputs = padded_inputs([row[shared:] for row in ids], pad_id, device, shared)
    logits: torch.Tensor = model(
        **inputs, past_key_values=cache, use_cache=cache is not None, logits_to_keep=kept
    ).logits
    return logits


def prefilled(
    model: Any, ids: Sequence[Sequence[int]], kept: int, device: str, following: int = 0
) -> tuple[int, Any]:
    """(tokens, cache): how many first tokens the rows share, each row's last `kept` left out, and the cache that holds
    them for every row; (0, None) where they are too few to pay. `following`: tokens that are to come after the rows."""
    import torch
    from transformers import DynamicCache

    shared = common_prefix(ids, kept)
    if shared * (len(ids) - 1) < LEAST_SAVED or max(map(len, ids)) + following > longest_shared(
        model
    ):
        return 0, None
    cache = DynamicCache()
    tokens = torch.tensor([list(ids[0][:shared])], device=device)
    model.get_decoder()(input_ids=tokens, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(ids))
    return shared, cache


def common_prefix(ids: Sequence[Sequence[int]], kept: int) -> int:
    """How many first tokens all rows share, at least `kept` of each left out."""
    # In the order of sequences the first and the last differ where any two do.
    first, last = min(map(tuple, ids)), max(map(tuple, ids))
    most = max(0, min(map(len, ids)) - kept)
    return next((place for place in range(most) if first[place] != last[place]), most)


def longest_shared(model: Any) -> int:
    """The longest sequence, in tokens, whose first part may come from a cache."""
    return min(
        LONGEST_SHARED,
        sliding_window(model) or LONGEST_SHARED,
        turning_point(model) or LONGEST_SHARED,
    )


def sliding_window(model: Any) -> int | None:
    """How many tokens, its own included, a token attends to in those of the model's layers that see the fewest; None
    where all see all."""
    kinds = attention_kinds(model)
    return (
        getattr(model.config, "sliding_window", None)
        if not kinds or "sliding_attention" in kinds
        else None
    )


def attention_kinds(model: Any) -> set[str]:
    """Of "full_attention" and "sliding_attention" those that the model's config gives its layers; empty where it gives
    them none by name."""
    return set(getattr(model.config, "layer_types", None) or ())
