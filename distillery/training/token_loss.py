"""The loss on written answers for whose tokens the teacher gave probabilities."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from distillery.recipe import TrainingRecipe
from distillery.training.losses import divergence, written_targets
from distillery.training.rows import TrainingRow


def taught_losses(
    logits: torch.Tensor, rows: Sequence[TrainingRow], end_id: int, recipe: TrainingRecipe
) -> torch.Tensor:
    """Return the loss on written answers, a mean over a row's tokens and the end of the turn,
    [batch]: at a token with a soft label (1 - w) CE + w T^2 D(q_T, p_T), at the others CE, the
    cross-entropy of `written_losses`.

    logits: as `written_targets` takes them. The teacher says the probabilities q of K candidates,
    and what they leave of 1 is that of all other tokens together, the tail. These K + 1 outcomes
    are compared, with p the student's probabilities of the same outcomes:

        q_T(i) = q(i)^(1/T) / sum_j q(j)^(1/T)    p_T(i) = p(i)^(1/T) / sum_j p(j)^(1/T)

    for i and j among the outcomes, and D as in `choice_loss`. So the tail counts at a temperature
    as one outcome does. Without it, a student would learn that the candidates are all that there
    is. (TRL's server distillation keeps a tail for that reason: `loss_add_tail`.)"""
    logits = logits.float()
    targets = written_targets(logits, [row.target for row in rows], end_id)
    ids, logs = padded_candidates(rows, logits.shape[1], logits.device)
    is_candidate = torch.isfinite(logs)
    said = targets.clamp_min(0)[..., None]
    # The target's logit is picked too. It stands in for candidates that are missing.
    picked, others = PickedLogits.apply(  # type: ignore[no-untyped-call]
        logits, torch.cat([said, torch.where(is_candidate, ids, said)], -1)
    )
    at_target = picked[..., 0]
    candidates = picked[..., 1:].masked_fill(~is_candidate, -torch.inf)
    in_tail = ~(is_candidate & (ids == said)).any(-1)
    tail = torch.where(in_tail, torch.logaddexp(others, at_target), others)
    # Their softmax is the student's probabilities of the outcomes, and their log-sum-exp that of
    # the whole vocabulary: no small difference of large numbers is taken.
    scores = torch.cat([candidates, tail[..., None]], -1)
    log_z = scores.logsumexp(-1)
    hard = log_z - at_target
    if recipe.label_smoothing:
        even = log_z - logits.mean(-1)
        hard = (1 - recipe.label_smoothing) * hard + recipe.label_smoothing * even
    taught = logs.exp()
    left = (1 - taught.sum(-1, keepdim=True)).clamp_min(0)
    outcomes = torch.cat([taught, left], -1)
    soft = divergence(scores, outcomes, recipe.temperature, recipe.divergence)
    weights = recipe.soft_share * is_candidate.any(-1)
    losses: torch.Tensor = (1 - weights) * hard + weights * soft
    losses = losses.masked_fill(targets < 0, 0)
    return losses.sum(-1) / (targets >= 0).sum(-1)


def padded_candidates(
    rows: Sequence[TrainingRow], positions: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of the teacher's candidates and the logarithms of their probabilities at
    the last `positions` of left-padded rows, [batch, positions, most candidates] each; -inf where
    there is no candidate."""
    most = max(row.soft_tokens.candidates for row in rows if row.soft_tokens)
    ids = torch.zeros(len(rows), positions, most, dtype=torch.long)
    logs = torch.full(ids.shape, -torch.inf)
    for index, row in enumerate(rows):
        if row.soft_tokens:
            own_ids, own_logs = row.soft_tokens.arrays()
            length, width = own_ids.shape
            ids[index, -length:, :width] = torch.tensor(own_ids)
            logs[index, -length:, :width] = torch.tensor(own_logs)
    return ids.to(device), logs.to(device)


class PickedLogits(torch.autograd.Function):
    """Of logits, [..., vocabulary], those of the tokens `ids`, [..., picked], and the log-sum-exp
    of all others, [...], -inf where there are none.

    PyTorch's own operations would keep a copy of the logits without the picked ones for the
    backward pass, and make a gradient of the logits' shape for each operation."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, ids: torch.Tensor) -> Any:
        others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1)
        ctx.save_for_backward(logits, ids, others)
        return logits.gather(-1, ids), others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_picked: torch.Tensor, of_others: torch.Tensor) -> Any:
        logits, ids, others = ctx.saved_tensors
        gradient = (logits - others[..., None]).exp_().mul_(of_others[..., None])
        # Picked tokens are no others, whatever stands there now.
        gradient.scatter_(-1, ids, 0.0).scatter_add_(-1, ids, of_picked)
        return gradient, None
