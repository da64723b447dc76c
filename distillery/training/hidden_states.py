"""A model's hidden states where its head reads them, and their file.

The file is safetensors with one tensor, `hidden`: [rows, hidden], float32, in the rows' order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.models.device import Device, linear_layers_cast
from distillery.training.batching import prompt_logits
from distillery.training.rows import TrainingRow

if TYPE_CHECKING:
    import torch

TENSOR = "hidden"


def hidden_states(
    model: Any,
    rows: Sequence[TrainingRow],
    *,
    pad_id: int,
    device: Device,
    batch_size: int | None = None,
) -> "torch.Tensor":
    """Return what the head of `model` reads at each row's last prompt token: [rows, hidden],
    float32, on the CPU. `batch_size`: see `prompt_logits`."""
    import torch

    found: list[Any] = [None] * len(rows)
    model.to(device.name).eval()
    with (
        torch.inference_mode(),
        device.autocast(),
        linear_layers_cast(model, device),
        states_read_by_head(model) as states,
    ):
        for picked, _ in prompt_logits(model, rows, pad_id, batch_size):
            batch = states.pop()[:, -1].float().cpu()
            for index, state in zip(picked, batch, strict=True):
                found[index] = state
    return torch.stack(found)


@contextmanager
def states_read_by_head(model: Any) -> Iterator[list[Any]]:
    """Collect what the head reads in the forward passes within, [batch, kept, hidden] each."""
    states: list[Any] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _head, inputs: states.append(inputs[0])
    )
    try:
        yield states
    finally:
        hook.remove()


def write_hidden_states(states: "torch.Tensor", path: Path) -> None:
    """Write states, [rows, hidden], to the file `path`."""
    from safetensors.torch import save_file

    save_file({TENSOR: states}, path)


def read_hidden_states(path: Path) -> "torch.Tensor":
    """Return the states, [rows, hidden], of a file of `write_hidden_states`."""
    from safetensors.torch import load_file

    states: torch.Tensor = load_file(path)[TENSOR]
    return states
