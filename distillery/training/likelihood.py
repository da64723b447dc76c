"""Options scored by the likelihood of their texts.

All options of a row follow its prompt in one sequence, none of them sees another, and so the prompt
is computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distillery.training.batching import attention_kinds, prefill_shared, sliding_window
from distillery.training.rows import TrainingRow

if TYPE_CHECKING:
    import torch

MIXED = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Packed:
    """A batch whose rows carry all their options.

    `inputs`: the model's inputs, [batch, longest prompt + longest options], prompts padded on the
    left and options on the right. For the option tokens, [batch, longest options] each: `tokens`;
    `option`, the index of the option that a token belongs to, -1 for padding; and `before`, the
    index among the kept logits that predicts the token."""

    inputs: dict[str, Any]
    tokens: "torch.Tensor"
    option: "torch.Tensor"
    before: "torch.Tensor"

    @property
    def kept(self) -> int:
        """How many of the last positions' logits are needed: the last prompt token's and those of
        the options."""
        return self.tokens.shape[1] + 1


def forward_packed(
    model: Any, rows: Sequence[TrainingRow], pad_id: int
) -> tuple[Packed, "torch.Tensor"]:
    """Compute rows with texts in one pass. Return how they are packed, and the logits, [batch,
    packed.kept, vocabulary]."""
    packed = pack_shared(model, rows, pad_id)
    return packed, model(**packed.inputs, logits_to_keep=packed.kept).logits


def pack_shared(model: Any, rows: Sequence[TrainingRow], pad_id: int) -> Packed:
    """Return rows with texts as one batch, without what all prompts begin with, which
    `prefill_shared` has computed."""
    following = max(len(text) for row in rows for text in row.texts)
    shared, cache = prefill_shared(model, [row.prompt for row in rows], 1, following)
    packed = pack(
        rows,
        pad_id,
        model.device,
        model.config._attn_implementation,
        shared,
        sliding_window(model),
        mixed=attention_kinds(model) == MIXED,
    )
    packed.inputs.update(past_key_values=cache, use_cache=cache is not None)
    return packed


def pack(
    rows: Sequence[TrainingRow],
    pad_id: int,
    device: "torch.device",
    attention: str,
    shared: int = 0,
    window: int | None = None,
    mixed: bool = False,
) -> Packed:
    """Return rows with texts as one batch, without their first `shared` tokens: a cache holds them.

    `attention`: the model's implementation, "sdpa" or "eager". `window`: the model's sliding
    window, which the model would not apply to a mask that is given to it; the shared tokens lie
    within it. `mixed`: whether some layers have the window and others do not, so that they take a
    mask each."""
    import torch

    prompts = max(len(row.prompt) for row in rows) - shared
    width = prompts + max(sum(map(len, row.texts)) for row in rows)
    packed = [pack_row(row, pad_id, shared, prompts, width) for row in rows]
    columns = zip(*packed, strict=True)
    tokens, group, position, before = [torch.tensor(part, device=device) for part in columns]
    own, others = group[:, :, None], group[:, None, :]
    # A token sees the prompt (group 0) and its own option.
    seen = (others == 0) | ((others == own) & (others > 0))
    near = seen
    # Only for models with a window: the distances would be the largest tensor here.
    if window:
        near = seen & (position[:, :, None] - position[:, None, :] < window)
    mask: Any = attention_mask(near, shared, attention)
    if mixed:
        mask = {
            "full_attention": attention_mask(seen, shared, attention),
            "sliding_attention": mask,
        }
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": position}
    return Packed(inputs, tokens[:, prompts:], group[:, prompts:] - 1, before)


def pack_row(
    row: TrainingRow, pad_id: int, shared: int, prompts: int, width: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return a row's tokens, groups and positions, `width` each, and for each option token, padded
    to `width` - `prompts`, the index among the kept logits that predicts it.

    The prompt is padded on the left to `prompts` tokens. The group is 0 for the prompt, 1 and up
    for the options and -1 for padding."""
    own, start = row.prompt[shared:], len(row.prompt)
    padding = prompts - len(own)
    ids = [pad_id] * padding + list(own)
    groups = [-1] * padding + [0] * len(own)
    positions = [0] * padding + list(range(shared, start))
    before: list[int] = []
    for number, text in enumerate(row.texts, 1):
        # The last prompt token, at index 0, predicts an option's first token; the token before each
        # other one predicts it.
        before += [0, *range(len(before) + 1, len(before) + len(text))]
        ids += text
        groups += [number] * len(text)
        positions += range(start, start + len(text))
    rest = width - len(ids)
    return (
        ids + [pad_id] * rest,
        groups + [-1] * rest,
        positions + [0] * rest,
        before + [0] * rest,
    )


def attention_mask(seen: "torch.Tensor", shared: int, attention: str) -> "torch.Tensor":
    """Return the mask that a model takes, [batch, 1, length, shared + length], of which tokens see
    which, `seen`: [batch, length, length]; all of them see the `shared` ones and none a later one.

    The implementation "sdpa" takes truth values; "eager" adds the mask to the scores."""
    import torch

    batch, length, _ = seen.shape
    index = torch.arange(length, device=seen.device)
    # A padding token sees itself: with nothing to see, its numbers would be NaN.
    itself = torch.eye(length, dtype=torch.bool, device=seen.device)
    own = (seen & (index[None, :] <= index[:, None])) | itself
    before = torch.ones(batch, length, shared, dtype=torch.bool, device=seen.device)
    whole = torch.cat((before, own), -1)[:, None]
    if attention != "eager":
        return whole
    scores = torch.zeros(whole.shape, device=seen.device)
    return scores.masked_fill(~whole, torch.finfo(torch.float32).min)


def option_scores(packed: Packed, logits: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return each option's score, [batch, options]: the mean log-probability of its tokens, -inf
    where a row has fewer options; and the log-probability of each option token, [batch, longest
    options], 0 for padding.

    logits: [batch, packed.kept, vocabulary]."""
    import torch

    logits = logits.float()
    batch = torch.arange(len(logits), device=logits.device)[:, None]
    norms = logits.logsumexp(-1)
    is_option = packed.option >= 0
    predicted = logits[batch, packed.before, packed.tokens] - norms[batch, packed.before]
    token_logs = predicted.masked_fill(~is_option, 0.0)
    shape = (len(logits), int(packed.option.max()) + 1)
    index = packed.option.clamp_min(0)
    sums = torch.zeros(shape, device=logits.device).scatter_add(1, index, token_logs)
    counts = torch.zeros(shape, device=logits.device).scatter_add(1, index, is_option.float())
    return (sums / counts.clamp_min(1)).masked_fill(counts == 0, -torch.inf), token_logs


def label_likelihoods(
    packed: Packed,
    logits: "torch.Tensor",
    token_logs: "torch.Tensor",
    rows: Sequence[TrainingRow],
    end_id: int,
) -> "torch.Tensor":
    """Return the mean log-probability of the label's tokens and of the end of the turn after them,
    [batch].

    logits: [batch, packed.kept, vocabulary]; token_logs: as `option_scores` returns it."""
    import torch

    answers = torch.tensor([row.answer for row in rows], device=logits.device)
    own = packed.option == answers[:, None]
    index = torch.arange(own.shape[1], device=logits.device)
    last = torch.where(own, index, -1).max(-1).values + 1
    after = logits[torch.arange(len(rows), device=logits.device), last].float()
    end = after[:, end_id] - after.logsumexp(-1)
    return ((token_logs * own).sum(-1) + end) / (own.sum(-1) + 1)
