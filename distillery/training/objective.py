"""training/objective"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distillery.models.load import contiguous_head
from distillery.models.placement import Placement
from distillery.recipe import TrainingRecipe
from distillery.training.batching import by_length, forward, turning_point
from distillery.training.likelihood import forward_packed, label_likelihoods, option_scores
from distillery.training.losses import (
    TrainingRow,
    answer_loss,
    hidden_loss,
    rationale_loss,
    text_loss,
)

if TYPE_CHECKING:
    import torch

HIDDEN = "hidden"
"""The name of the teacher's hidden states in their safetensors file."""


@dataclass
class Objective:
    """The loss of a batch. `matched`: the teacher's hidden states by prompt, empty where they are not learnt."""

    model: Any
    recipe: TrainingRecipe
    place: Placement
    pad_id: int
    end_id: int
    matched: "dict[tuple[int, ...], torch.Tensor]"

    def __call__(self, rows: Sequence[TrainingRow]) -> "torch.Tensor":
        loss = self._by_text(rows) if rows[0].texts else self._by_letter(rows)
        reasons = [row for row in rows if row.rationale] if self.recipe.rationale_weight else []
        if reasons:
            # A mean over the batch: rows without a reason add nothing to it.
            loss = loss + self.recipe.rationale_weight * len(reasons) / len(rows) * self._reasons(
                reasons
            )
        return loss

    def _by_letter(self, rows: Sequence[TrainingRow]) -> "torch.Tensor":
        ids = [(*row.prompt, row.letters[row.answer]) for row in rows]
        with self._autocast() as states:
            logits = forward(self.model, ids, 2, self.pad_id, self.place.device)
        return answer_loss(logits, rows, self.recipe, self.end_id) + self._matching(rows, states[0])

    def _by_text(self, rows: Sequence[TrainingRow]) -> "torch.Tensor":
        with self._autocast() as states:
            packed, logits = forward_packed(self.model, rows, self.pad_id, self.place.device)
        scores, each = option_scores(packed, logits)
        likelihoods = label_likelihoods(packed, logits, each, rows, self.end_id)
        return text_loss(scores, likelihoods, rows, self.recipe) + self._matching(rows, states[0])

    def _reasons(self, rows: Sequence[TrainingRow]) -> "torch.Tensor":
        ids = [row.explain + row.rationale for row in rows]
        kept = max(len(row.rationale) for row in rows) + 1
        with self._autocast():
            logits = forward(self.model, ids, kept, self.pad_id, self.place.device)
        return rationale_loss(logits, rows, self.end_id)

    @contextmanager
    def _autocast(self) -> Iterator[list[Any]]:
        with self.place.autocast(), _read_by_head(self.model) as states:
            yield states

    def _matching(
        self, rows: Sequence[TrainingRow], states: "torch.Tensor"
    ) -> "torch.Tensor | float":
        import torch

        if not self.matched:
            return 0.0
        targets = torch.stack([self.matched[row.prompt] for row in rows])
        return self.recipe.hidden_weight * hidden_loss(states[:, 0], targets)


@contextmanager
def head_cast_once(model: Any, place: Placement) -> Iterator[None]:
    """Gives a head that is not trained a weight in bfloat16 meanwhile, where autocast would cast it at every step."""
    import torch

    head = model.get_output_embeddings()
    weight = head.weight
    if place.precision == "bfloat16" and not weight.requires_grad:
        head.weight = torch.nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    try:
        yield
    finally:
        head.weight = weight


@contextmanager
def _read_by_head(model: Any) -> Iterator[list[Any]]:
    """What the head reads in the forward passes meanwhile, [batch, kept, hidden] each."""
    states: list[Any] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _head, inputs: states.append(inputs[0])
    )
    try:
        yield states
    finally:
        hook.remove()


def prefilled_states(
    model: Any, rows: Sequence[TrainingRow], pad_id: int, place: Placement, batch_size: int
) -> Iterator[tuple[list[int], "torch.Tensor"]]:
    """The prompts in batches of like length: the rows' indices, and the logits at their last tokens, [batch,
    vocabulary]."""
    contiguous_head(model)
    for picked in by_length(rows, batch_size, turning_point(model)):
        yield (
            picked,
            forward(model, [rows[i].prompt for i in picked], 1, pad_id, place.device)[:, -1],
        )


def hidden_states(
    model: Any, rows: Sequence[TrainingRow], *, pad_id: int, place: Placement, batch_size: int = 16
) -> "torch.Tensor":
    """What the head of `model` reads at each row's last prompt token: [rows, hidden], float32, on the CPU."""
    import torch

    found: dict[int, Any] = {}
    model.to(place.device).eval()
    with torch.inference_mode(), place.autocast(), _read_by_head(model) as states:
        for picked, _ in prefilled_states(model, rows, pad_id, place, batch_size):
            found |= dict(zip(picked, states.pop()[:, -1].float().cpu(), strict=True))
    return torch.stack([found[index] for index in range(len(rows))])
