"""Rows as a model's batches: of similar length, padded on the left; what all prompts of a batch
share is computed once.

Prompts of one task begin alike: the system message, the instruction, often the options. In a batch
these tokens go through the model once, and each row attends to their keys and values, in training
too, where gradients flow through them. The numbers are those of whole rows up to rounding.
"""

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from distillery.models.load import contiguous_head
from distillery.training.rows import TrainingRow
from distillery.training.split_model import in_step, is_split

if TYPE_CHECKING:
    import torch

LEAST_SAVED = 64
"""The fewest tokens that a shared prefix must save for its pass of its own to pay."""

MOST_TOKENS = 8192
"""Tokens in a batch that is not trained on, at most. Small batches multiply slowly."""

MOST_ROWS = 64
"""Rows in such a batch, at most."""

LONGEST_SHARED = 4096
"""The longest sequence, in tokens, that is computed from a shared prefix; a model's own limits may
be lower."""


def batches(
    rows: Sequence[TrainingRow], size: int, seed: int, epoch: int, turn: int | None = None
) -> list[list[int]]:
    """Return an epoch as the rows' indices in batches of similar length: rows are shuffled, sorted
    within windows of 16 batches, and the batches shuffled. No batch has rows on both sides of
    `turn` tokens."""
    order = random.Random(f"{seed}/{epoch}")  # noqa: S311 - no secret, a reproducible order
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)
    window = size * 16
    grouped: list[list[int]] = []
    beyond = set(split_at_turn(rows, turn, letter_tokens=1)[1])
    # Split at `turn` first, so that every epoch has the same number of batches.
    for is_beyond in (False, True):
        side = [index for index in shuffled if (index in beyond) == is_beyond]
        for start in range(0, len(side), window):
            part = side[start : start + window]
            for picked in by_length([rows[index] for index in part], size):
                grouped.append([part[position] for position in picked])
    order.shuffle(grouped)
    return grouped


def by_length(
    rows: Sequence[TrainingRow], size: int, turn: int | None = None
) -> Iterator[list[int]]:
    """Give the rows' indices in batches of similar prompt length, for prompts that only options'
    texts may follow; the length of a written answer counts as the prompt's. No batch has rows on
    both sides of `turn` tokens."""
    for side in split_at_turn(rows, turn, letter_tokens=0):
        order = sorted(side, key=lambda index: passed_tokens(rows[index]))
        for start in range(0, len(order), size):
            yield order[start : start + size]


def by_tokens(rows: Sequence[TrainingRow], turn: int | None = None) -> Iterator[list[int]]:
    """Give the rows' indices in batches of similar prompt length that are not trained on: of at
    most MOST_ROWS rows and, with padding, MOST_TOKENS tokens. No batch has rows on both sides of
    `turn` tokens."""
    for side in split_at_turn(rows, turn, letter_tokens=0):
        batch: list[int] = []
        # The longest row of a batch is its last one.
        for index in sorted(side, key=lambda index: passed_tokens(rows[index])):
            tokens = (len(batch) + 1) * passed_tokens(rows[index])
            if batch and (len(batch) == MOST_ROWS or tokens > MOST_TOKENS):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch


def split_at_turn(
    rows: Sequence[TrainingRow], turn: int | None, letter_tokens: int
) -> tuple[list[int], list[int]]:
    """Return the indices of the rows of at most `turn` tokens, and of the longer ones. A row's
    length includes its written answer, its longest text or, for answers by letter,
    `letter_tokens`."""
    if turn is None:
        return list(range(len(rows))), []
    within: list[int] = []
    beyond: list[int] = []
    for index, row in enumerate(rows):
        follows = len(row.target) or max(map(len, row.texts), default=letter_tokens)
        length = len(row.prompt) + follows
        side = within if length <= turn else beyond
        side.append(index)
    return within, beyond


def passed_tokens(row: TrainingRow) -> int:
    """Return how many tokens of a row go through the model: its prompt and its written answer."""
    return len(row.prompt) + len(row.target)


def padded_inputs(
    ids: Sequence[Sequence[int]], pad_id: int, device: "torch.device", shared: int = 0
) -> dict[str, Any]:
    """Return left-padded model inputs, [batch, longest]; `shared` tokens, which a cache holds, come
    before them."""
    import torch

    longest = max(map(len, ids))
    tokens, mask = [], []
    for row in ids:
        padding = longest - len(row)
        tokens.append([pad_id] * padding + list(row))
        mask.append([1] * shared + [0] * padding + [1] * len(row))
    attention_mask = torch.tensor(mask, device=device)
    positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, shared:]
    return {
        "input_ids": torch.tensor(tokens, device=device),
        "attention_mask": attention_mask,
        "position_ids": positions,
    }


def forward(model: Any, ids: Sequence[Sequence[int]], kept: int, pad_id: int) -> "torch.Tensor":
    """Return the logits at each row's last `kept` tokens, [batch, kept, vocabulary]."""
    inputs = shared_inputs(model, ids, pad_id, kept)
    logits: torch.Tensor = model(**inputs, logits_to_keep=kept).logits
    return logits


def forward_written(
    model: Any, prompts: Sequence[tuple[int, ...]], texts: Sequence[tuple[int, ...]], pad_id: int
) -> "torch.Tensor":
    """Return the logits at each prompt's last token and at the tokens of the text that is written
    after it: of [batch, longest text + 1, vocabulary], the last ones."""
    inputs = written_inputs(model, prompts, texts, pad_id)
    kept = max(map(len, texts)) + 1
    logits: torch.Tensor = model(**inputs, logits_to_keep=kept).logits
    return logits


def written_inputs(
    model: Any, prompts: Sequence[tuple[int, ...]], texts: Sequence[tuple[int, ...]], pad_id: int
) -> dict[str, Any]:
    """Return the inputs of prompts and of the texts that are written after them, without what all
    prompts begin with; the prompts' last tokens are among them."""
    ids = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    return shared_inputs(model, ids, pad_id, 1, min(map(len, prompts)) - 1)


def pooled_states(model: Any, rows: Sequence[TrainingRow], pad_id: int) -> "torch.Tensor":
    """Return what the head of a classifier reads: of the last hidden states, the mean that
    `read_shares` tells, [batch, hidden]."""
    most = min(len(row.prompt) - row.span for row in rows)
    inputs = shared_inputs(model, [row.prompt for row in rows], pad_id, 1, most)
    states = model.get_decoder()(**inputs).last_hidden_state
    shares = read_shares(rows, states.shape[1], states.device)
    pooled: torch.Tensor = (states * shares[:, :, None]).sum(1)
    return pooled


def read_shares(rows: Sequence[TrainingRow], length: int, device: "torch.device") -> "torch.Tensor":
    """Return how much each of a row's last `length` tokens counts in what a head reads: [batch,
    length], each row's sum 1. The last `span` tokens count alike, the last one for `last` more."""
    import torch

    spans = torch.tensor([row.span for row in rows], device=device)[:, None]
    last = torch.tensor([row.last for row in rows], device=device)[:, None]
    read = torch.arange(length, device=device)[None, :] >= length - spans
    shares = read * (1 - last) / spans
    shares[:, -1:] += last
    return shares


def prompt_logits(
    model: Any, rows: Sequence[TrainingRow], pad_id: int, batch_size: int | None
) -> Iterator[tuple[list[int], "torch.Tensor"]]:
    """Give the prompts in batches of similar length, of `batch_size` rows or, for None, as
    `by_tokens` makes them: the rows' indices, and the logits at their last tokens, or of the mean
    state that a class is read from, [batch, vocabulary]."""
    contiguous_head(model)
    turn = turning_point(model)
    found = by_length(rows, batch_size, turn) if batch_size else by_tokens(rows, turn)
    for picked in in_step(model, found):
        if rows[0].closed:
            states = pooled_states(model, [rows[index] for index in picked], pad_id)
            yield picked, model.get_output_embeddings()(states[:, None])[:, -1]
            continue
        prompts = [rows[index].prompt for index in picked]
        yield picked, forward(model, prompts, 1, pad_id)[:, -1]


def shared_inputs(
    model: Any, ids: Sequence[Sequence[int]], pad_id: int, kept: int, most: int | None = None
) -> dict[str, Any]:
    """Return the inputs of the rows `ids`, [batch, longest], without what all of them begin with,
    which `prefill_shared` has computed; `kept` and `most` are its."""
    shared, cache = prefill_shared(model, ids, kept, most=most)
    inputs = padded_inputs([row[shared:] for row in ids], pad_id, model.device, shared)
    return {**inputs, "past_key_values": cache, "use_cache": cache is not None}


def prefill_shared(
    model: Any,
    ids: Sequence[Sequence[int]],
    kept: int,
    following: int = 0,
    most: int | None = None,
) -> tuple[int, Any]:
    """Compute the tokens that all rows begin with, each row's last `kept` excluded. Return how many
    these are and the cache that holds them for every row, or (0, None) where it does not pay.

    `following`: how many tokens are to come after the rows. `most`: how many tokens may be shared,
    at most."""
    import torch
    from transformers import DynamicCache

    if model.training and model.is_activation_checkpointing:
        # Layers that are computed again in the backward pass neither fill a cache nor read one.
        return 0, None
    if is_split(model):
        # FSDP would miss gradients that reach the last layer by its keys and values alone.
        return 0, None
    shared = common_prefix(ids, kept)
    if most is not None:
        shared = min(shared, most)
    if shared * (len(ids) - 1) < LEAST_SAVED:
        return 0, None
    if max(map(len, ids)) + following > longest_shared(model):
        return 0, None
    cache = DynamicCache()
    tokens = torch.tensor([list(ids[0][:shared])], device=model.device)
    model.get_decoder()(input_ids=tokens, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(ids))
    return shared, cache


def common_prefix(ids: Sequence[Sequence[int]], kept: int) -> int:
    """Return how many tokens all rows begin with, at least the last `kept` of each excluded."""
    # In lexicographic order, the first and the last row differ wherever any two do.
    first, last = min(map(tuple, ids)), max(map(tuple, ids))
    most = max(0, min(map(len, ids)) - kept)
    for position in range(most):
        if first[position] != last[position]:
            return position
    return most


def longest_shared(model: Any) -> int:
    """Return the longest sequence, in tokens, that may be computed from a shared prefix."""
    limits = [LONGEST_SHARED, sliding_window(model), turning_point(model)]
    return min(limit for limit in limits if limit)


def turning_point(model: Any) -> int | None:
    """Return how many tokens a sequence may have before the model turns to other rotary factors for
    the whole batch (LongRoPE, as in Phi-3 and Phi-4-mini); None for models that never do."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) != "longrope":
        return None
    key = "original_max_position_embeddings"
    found = getattr(config, key, None) or rope.get(key)
    return int(found) if found else None


def sliding_window(model: Any) -> int | None:
    """Return how many tokens, its own included, a token attends to in the layers with a sliding
    window; None where every layer attends to all."""
    kinds = attention_kinds(model)
    if kinds and "sliding_attention" not in kinds:
        return None
    window: int | None = getattr(model.config, "sliding_window", None)
    return window


def attention_kinds(model: Any) -> set[str]:
    """Return which of "full_attention" and "sliding_attention" the config gives the layers; empty
    where it does not name them."""
    return set(getattr(model.config, "layer_types", None) or ())
