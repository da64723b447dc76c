"""A model's hidden states where its head reads them, and their file.

Of a row whose answer is chosen that is one state, at the last prompt token; of a written answer one
for each of its tokens and the end of the turn, at the token before each. The file is NumPy's, one
array [states, hidden], one row's states after the other's in the rows' order. It is read where it
lies, so that a training keeps in memory what its batches need: the states of 10,000 answers of 40
tokens are 0.5 GB at 576 numbers a state, and 2.5 GB at 3,072.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distillery.models.device import Device, linear_layers_cast
from distillery.progress import show_rows
from distillery.training.batching import (
    by_tokens,
    prompt_logits,
    turning_point,
    written_inputs,
)
from distillery.training.rows import TrainingRow

if TYPE_CHECKING:
    import torch


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
    done, told = 0, "reading the states before the head"
    show_rows(0, len(rows), told)
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
            done += len(picked)
            show_rows(done, len(rows), told)
    return torch.stack(found)


def written_states(
    model: Any, rows: Sequence[TrainingRow], *, pad_id: int, device: Device
) -> Iterator[tuple[int, "torch.Tensor"]]:
    """Give each row's index and what the head of `model` reads before each token of its written
    answer and before the end of the turn: [tokens + 1, hidden], on the CPU."""
    import torch

    model.to(device.name).eval()
    with torch.inference_mode(), device.autocast(), linear_layers_cast(model, device):
        for picked in by_tokens(rows, turning_point(model)):
            prompts = [rows[index].prompt for index in picked]
            texts = [rows[index].target for index in picked]
            inputs = written_inputs(model, prompts, texts, pad_id)
            states = model.get_decoder()(**inputs).last_hidden_state.float().cpu()
            for index, found in zip(picked, states, strict=True):
                yield index, found[-state_count(rows[index]) :]


def state_count(row: TrainingRow) -> int:
    """Return how many states are kept of a row."""
    return len(row.target) + 1


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


def write_hidden_states(
    model: Any, rows: Sequence[TrainingRow], path: Path, *, pad_id: int, device: Device
) -> None:
    """Write the states of `model` for `rows` to the file `path`: in float32 where answers are
    chosen. Where they are written, in float16 and at length 1: only the direction is learnt, and
    its cosine changes by 1e-6, and by 4e-6 at most in 20,000 random states."""
    import torch

    if not rows[0].target:
        found = hidden_states(model, rows, pad_id=pad_id, device=device)
        np.save(path, found.numpy(), allow_pickle=False)
        return
    starts = list(accumulate(map(state_count, rows), initial=0))
    width = model.get_input_embeddings().weight.shape[-1]
    header = {"descr": "<f2", "fortran_order": False, "shape": (starts[-1], width)}
    # Written, not mapped: a full disk is then an error, and no signal that ends the process.
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        begin = file.tell()
        for index, states in written_states(model, rows, pad_id=pad_id, device=device):
            short = torch.nn.functional.normalize(states, dim=-1).half()
            file.seek(begin + starts[index] * width * short.element_size())
            file.write(short.numpy().tobytes())


def read_hidden_states(path: Path) -> "torch.Tensor":
    """Return the states, [states, hidden], of a file of `write_hidden_states`, which are read when
    they are used."""
    import torch

    # Copied on writing, which nobody does: PyTorch warns of arrays that can't be written.
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))


def key_of(row: TrainingRow) -> bytes:
    """Return what a row's states are found by: a digest, since the tokens of all rows would take
    far more memory."""
    return hashlib.blake2b(repr((row.prompt, row.target)).encode(), digest_size=16).digest()


class TeacherStates:
    """A teacher's hidden states for the rows of a training: `states`, [states, hidden], as
    `write_hidden_states` orders them. `device`: where they are needed."""

    def __init__(self, states: "torch.Tensor", rows: Sequence[TrainingRow], device: str) -> None:
        """Raises ValueError where there are more or fewer states than `rows` have."""
        self.states, self.device = states, device
        self.starts: dict[bytes, int] = {}
        start = 0
        for row in rows:
            self.starts[key_of(row)] = start
            start += state_count(row)
        if start != len(states):
            raise ValueError(f"{len(states)} hidden states for rows that have {start}")

    def of(self, rows: Sequence[TrainingRow]) -> "torch.Tensor":
        """Return the states of `rows`, one row's after the other's, [states, hidden]."""
        import torch

        found = []
        for row in rows:
            start = self.starts[key_of(row)]
            found.append(self.states[start : start + state_count(row)])
        return torch.cat(found).to(self.device)
