"""The loss of a batch: one forward pass of its rows, and the losses that the recipe weighs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distillery.models.device import Device
from distillery.recipe import TrainingRecipe
from distillery.training.batching import forward, forward_written, pooled_states
from distillery.training.hidden_states import TeacherStates, states_read_by_head
from distillery.training.likelihood import forward_packed, label_likelihoods, option_scores
from distillery.training.losses import (
    answer_loss,
    hidden_loss,
    option_loss,
    padded_tensor,
    text_loss,
    written_hidden_loss,
    written_losses,
    written_targets,
)
from distillery.training.rows import TrainingRow

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Objective:
    """What training minimises. `teacher_states`: the teacher's hidden states, None where they are
    not learnt. `class_weights`: how much a label of each class counts; None for rows
    that have no classes, or whose labels count alike. `stand_in`: a row with a reason, which is
    computed for nothing where a batch has none, so that all ranks make the same passes; None where
    each may make its own."""

    model: Any
    recipe: TrainingRecipe
    device: Device
    pad_id: int
    end_id: int
    teacher_states: TeacherStates | None
    class_weights: Sequence[float] | None = None
    stand_in: TrainingRow | None = None

    def __call__(self, rows: Sequence[TrainingRow]) -> "torch.Tensor":
        """Return the loss of a batch, a scalar."""
        if rows[0].closed:
            return self.class_answers(rows)
        if rows[0].target:
            loss = self.written_answers(rows)
        else:
            loss = self.text_answers(rows) if rows[0].texts else self.letter_answers(rows)
        reasons = [row for row in rows if row.rationale]
        # A mean over the batch, to which rows without a reason add nothing.
        weight = self.recipe.rationale_weight * len(reasons) / len(rows)
        if not reasons and self.stand_in:
            reasons = [self.stand_in]
        if self.recipe.rationale_weight and reasons:
            loss = loss + weight * self.rationales(reasons)
        return loss

    def letter_answers(self, rows: Sequence[TrainingRow]) -> "torch.Tensor":
        """Return the loss on answers by letter and on the hidden states, from one forward pass."""
        ids = [(*row.prompt, row.letters[row.answer]) for row in rows]
        with self.device.autocast(), states_read_by_head(self.model) as states:
            logits = forward(self.model, ids, 2, self.pad_id)
        loss = answer_loss(logits, rows, self.recipe, self.end_id)
        return loss + self.hidden(rows, states[0])

    def class_answers(self, rows: Sequence[TrainingRow]) -> "torch.Tensor":
        """Return the loss on answers by class and on the hidden states, from one forward pass. No
        other token and no end of turn is learnt, because none is ever said."""
        with self.device.autocast():
            states = pooled_states(self.model, rows, self.pad_id)[:, None]
            logits = self.model.get_output_embeddings()(states)
        columns, _ = padded_tensor([row.letters for row in rows], logits.device)
        scores = logits[:, -1].float().gather(1, columns)
        losses = option_loss(scores, rows, self.recipe, self.class_weights)
        return losses.mean() + self.hidden(rows, states)

    def text_answers(self, rows: Sequence[TrainingRow]) -> "torch.Tensor":
        """Return the loss on answers by text and on the hidden states, from one forward pass."""
        with self.device.autocast(), states_read_by_head(self.model) as states:
            packed, logits = forward_packed(self.model, rows, self.pad_id)
        scores, token_logs = option_scores(packed, logits)
        likelihoods = label_likelihoods(packed, logits, token_logs, rows, self.end_id)
        return text_loss(scores, likelihoods, rows, self.recipe) + self.hidden(rows, states[0])

    def written_answers(self, rows: Sequence[TrainingRow]) -> "torch.Tensor":
        """Return the loss on written answers and on the hidden states, from one forward pass."""
        from distillery.training.token_loss import taught_losses

        recipe = self.recipe
        prompts, texts = [row.prompt for row in rows], [row.target for row in rows]
        with self.device.autocast(), states_read_by_head(self.model) as states:
            logits = forward_written(self.model, prompts, texts, self.pad_id)
        if recipe.soft_share and any(row.soft_tokens for row in rows):
            losses = taught_losses(logits, rows, self.end_id, recipe)
        else:
            losses = written_losses(logits, texts, self.end_id, recipe.label_smoothing)
        loss = losses.mean()
        if self.teacher_states:
            own = states[0][written_targets(logits, texts, self.end_id) >= 0]
            taught, counts = self.teacher_states.of(rows), [len(text) + 1 for text in texts]
            loss = loss + recipe.hidden_weight * written_hidden_loss(own, taught, counts)
        return loss

    def hidden(self, rows: Sequence[TrainingRow], states: "torch.Tensor") -> "torch.Tensor | float":
        """Return the weighted loss on the states that the head has read at the last prompt tokens,
        the first ones of `states`: [batch, kept, hidden]; 0 where they are not learnt."""
        if not self.teacher_states:
            return 0.0
        targets = self.teacher_states.of(rows)
        return self.recipe.hidden_weight * hidden_loss(states[:, 0], targets)

    def rationales(self, rows: Sequence[TrainingRow]) -> "torch.Tensor":
        """Return the loss on the teacher's reasons; every row has one."""
        asked, reasons = [row.explain for row in rows], [row.rationale for row in rows]
        with self.device.autocast():
            logits = forward_written(self.model, asked, reasons, self.pad_id)
        return written_losses(logits, reasons, self.end_id).mean()
