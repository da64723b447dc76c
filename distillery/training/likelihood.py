"""Options scored by the likelihood of their texts. All of a row's options follow its prompt in one sequence, each blind
to the others, so that the prompt is computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distillery.training.batching import attention_kinds, prefilled, sliding_window
from distillery.training.losses import TrainingRow

if TYPE_CHECKING:
    import torch

MIXED = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Packed:
    """`inputs`: the model's, [batch, longest prompt + longest options], prompts padded on the left and options on the
    right. Of the option tokens, [batch, longest options]: `tokens`; `option`, which one a token belongs to, -1 for
    padding; and `before`, the place among the kept logits that predicts it."""

    inputs: dict[str, Any]
    tokens: "torch.Tensor"
    option: "torch.Tensor"
    before: "torch.Tensor"

    @property
    def kept(self) -> int:
        """How many of the last positions' logits are needed: the prompt's last token's and the options'."""
        return self.tokens.shape[1] + 1


def forward_packed(
    model: Any, rows: Sequence[TrainingRow], pad_id: int, device: str
) -> tuple[Packed, "torch.Tensor"]:
    """Rows with texts in one pass: how they are packed, and the logits, [batch, packed.kept, vocabulary]."""
    following = max(len(text) for row in rows for text in row.texts)
    shared, cache = prefilled(model, [row.prompt for row in rows], 1, device, following)
    attention, mixed = model.config._attn_implementation, attention_kinds(model) == MIXED
    packed = pack(rows, pad_id, device, attention, shared, sliding_window(model), mixed)
    output = model(
        **packed.inputs,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=packed.kept,
    )
    return packed, output.logits


def pack(
    rows: Sequence[TrainingRow],
    pad_id: int,
    device: str,
    attention: str,
    shared: int = 0,
    window: int | None = None,
    mixed: bool = False,
) -> Packed:
    """Rows with texts as one batch, less the first `shared` tokens, which a cache holds. `attention`: the model's
    implementation; sdpa takes the mask as truth values, eager adds it to the scores. `window`: the model's sliding
    window, which it would not lay over a mask of ours; a shared beginning lies within it. `mixed`: that it has layers
    with the window and layers without, which take a mask each."""
    import torch

    prompts = max(len(row.prompt) for row in rows) - shared
    width = max(sum(map(len, row.texts)) for row in rows)
    ids, groups, positions, before = [], [], [], []
    for row in rows:
        own, start = row.prompt[shared:], len(row.prompt)
        padding = prompts - len(own)
        row_ids, row_groups = [pad_id] * padding + list(own), [-1] * padding + [0] * len(own)
        row_positions = [0] * padding + list(range(shared, start))
        row_before: list[int] = []
        for number, text in enumerate(row.texts, 1):
            # An option's first token is predicted by the prompt's last, place 0; the others by the one before.
            row_before += [
                0 if place == 0 else len(row_before) + place for place in range(len(text))
            ]
            row_ids += text
            row_groups += [number] * len(text)
            row_positions += range(start, start + len(text))
        rest = prompts + width - len(row_ids)
        ids.append(row_ids + [pad_id] * rest)
        groups.append(row_groups + [-1] * rest)
        positions.append(row_positions + [0] * rest)
        before.append(row_before + [0] * rest)
    tokens, group = torch.tensor(ids, device=device), torch.tensor(groups, device=device)
    places = torch.arange(prompts + width, device=device)
    seen = (group[:, None, :] == 0) | (
        (group[:, None, :] == group[:, :, None]) & (group[:, None, :] > 0)
    )
    at = torch.tensor(positions, device=device)
    # Not for models without a window: it would be the largest thing here.
    near = seen & (at[:, :, None] - at[:, None, :] < window) if window else seen

    def mask(seen: "torch.Tensor") -> "torch.Tensor":
        # A token of padding sees itself: with nothing at all to see its numbers would be none.
        own = (seen & (places[None, :] <= places[:, None])) | torch.eye(
            len(places), dtype=torch.bool, device=device
        )
        before = torch.ones(len(rows), len(places), shared, dtype=torch.bool, device=device)
        whole = torch.cat((before, own), -1)[:, None]
        if attention == "eager":
            return torch.zeros(whole.shape, device=device).masked_fill(
                ~whole, torch.finfo(torch.float32).min
            )
        return whole

    masks = {"full_attention": mask(seen), "sliding_attention": mask(near)} if mixed else mask(near)
    inputs = {"input_ids": tokens, "attention_mask": masks, "position_ids": at}
    return Packed(
        inputs, tokens[:, prompts:], group[:, prompts:] - 1, torch.tensor(before, device=device)
    )


def option_scores(packed: Packed, logits: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Each option's score, [batch, options]: the mean log-probability of its tokens, -inf where a row has fewer; and
    the log-probability of each option token, [batch, longest options], 0 for padding.

    logits: [batch, packed.kept, vocabulary]."""
    import torch

    logits = logits.float()
    batch = torch.arange(len(logits), device=logits.device)[:, None]
    norms = logits.logsumexp(-1)
    theirs = packed.option >= 0
    each = (logits[batch, packed.before, packed.tokens] - norms[batch, packed.before]).masked_fill(
        ~theirs, 0.0
    )
    shape = (len(logits), int(packed.option.max()) + 1)
    index = packed.option.clamp_min(0)
    sums = torch.zeros(shape, device=logits.device).scatter_add(1, index, each)
    counts = torch.zeros(shape, device=logits.device).scatter_add(1, index, theirs.float())
    return (sums / counts.clamp_min(1)).masked_fill(counts == 0, -torch.inf), each


def label_likelihoods(
    packed: Packed,
    logits: "torch.Tensor",
    each: "torch.Tensor",
    rows: Sequence[TrainingRow],
    end_id: int,
) -> "torch.Tensor":
    """[batch]: the mean log-probability of the label's tokens and of the end of the turn after them.

    logits: [batch, packed.kept, vocabulary]; each: as `option_scores` gives it."""
    import torch

    answers = torch.tensor([row.answer for row in rows], device=logits.device)
    own = packed.option == answers[:, None]
    places = torch.arange(own.shape[1], device=logits.device)
    last = torch.where(own, places, -1).max(-1).values + 1
    after = logits[torch.arange(len(rows), device=logits.device), last].float()
    end = after[:, end_id] - after.logsumexp(-1)
    return ((each * own).sum(-1) + end) / (own.sum(-1) + 1)
