"""The head of a classifier: a row for each class among those of the vocabulary.

The rows start as a linear probe, a logistic regression on the states that the head reads, and are
then trained with the rest: Kumar et al., Fine-Tuning can Distort Pretrained Features and
Underperform Out-of-Distribution, ICLR 2022 (LP-FT). From rows that know nothing, the first steps
would bend the model's states instead.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distillery.models.device import Device
from distillery.training.hidden_states import hidden_states
from distillery.training.probing import fit_probe
from distillery.training.rows import TrainingRow
from distillery.training.split_model import own_share, share_of

MOST_ROWS = 2000
"""How many rows the probe learns from, at most."""

CLASS_ROWS = ".rows"
"""How the name of a ClassHead's parameter ends."""


class ClassHead(torch.nn.Module):
    """A model's head whose logits at `tokens` come from `rows`, [classes, hidden], which are
    trained in float32 whatever becomes of the head."""

    def __init__(self, head: Any, tokens: Sequence[int], rows: torch.Tensor) -> None:
        super().__init__()
        self.head = head
        self.rows = torch.nn.Parameter(rows)
        self.tokens: torch.Tensor
        self.register_buffer("tokens", torch.tensor(tokens), persistent=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits, [batch, positions, vocabulary], in float32."""
        logits: torch.Tensor = self.head(states).float()
        with torch.autocast(states.device.type, enabled=False):
            scores = states.float() @ self.rows.T
        return logits.index_copy(-1, self.tokens, scores)


def add_class_head(model: Any, tokens: Sequence[int]) -> ClassHead:
    """Put a ClassHead on `model` for the classes' `tokens`, with the rows that stand in the head,
    and return it."""
    head = model.get_output_embeddings()
    rows = head.weight.detach()[list(tokens)].float().clone()
    placed = ClassHead(head, tokens, rows).to(head.weight.device)
    model.set_output_embeddings(placed)
    return placed


def start_from_probe(
    model: Any,
    placed: ClassHead,
    rows: Sequence[TrainingRow],
    *,
    pad_id: int,
    device: Device,
    seed: int,
) -> None:
    """Give the ClassHead of `model` the rows of a probe on the labels of `rows`."""
    if len(rows) > MOST_ROWS:
        picked = random.Random(seed).sample(range(len(rows)), MOST_ROWS)  # noqa: S311 - no secret
        rows = [rows[index] for index in picked]
    states = hidden_states(model, rows, pad_id=pad_id, device=device)
    answers = [row.answer for row in rows]
    found = fit_probe(states.numpy(), answers, len(placed.tokens), intercept=False)
    own_share(placed.rows).copy_(own_share(share_of(torch.from_numpy(found.weights), placed.rows)))


def remove_class_head(model: Any, placed: ClassHead) -> None:
    """Write the rows of `placed` into the head that it stands for, and put that back."""
    head = placed.head
    with torch.no_grad():
        head.weight[placed.tokens] = placed.rows.to(head.weight.dtype)
    model.set_output_embeddings(head)


def add_rows_to_adapter(model: Any, placed: ClassHead, adapter: Path) -> None:
    """Add the rows of `placed` to the files of an adapter, as peft's trainable tokens, so that who
    loads the adapter on its base gets them too. `model`: the base, with its own head."""
    from safetensors.torch import load_file, save_file

    tied = model.get_input_embeddings().weight is placed.head.weight
    layer = model.get_input_embeddings() if tied else placed.head
    name = next(name for name, module in model.named_modules() if module is layer)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = f"base_model.model.{name}.token_adapter.trainable_tokens_delta"
    tensors[key] = placed.rows.detach().cpu().contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    config["trainable_token_indices"] = {name.rsplit(".", 1)[-1]: placed.tokens.tolist()}
    path.write_text(json.dumps(config, indent=2))
