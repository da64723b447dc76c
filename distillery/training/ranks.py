"""Training on several devices: one process, a rank, for each, which all take the same steps. A rank
computes the gradients of its share of a step's rows; the sum over all ranks is the gradient of the
whole step. Each holds the whole model, or a share of it (split_model.py).

The rows of a step are those of one device, so that steps, learning rate and student are the same up
to rounding. What differs is which numbers dropout draws.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distillery.errors import TrainingError, TrainingUnavailable
from distillery.training.rows import TrainingRow

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ranks:
    """Which of the processes that train together this is: `rank`, from 0, of `count`. `split`:
    whether they share out the model, too.

    Several need torch.distributed's process group, in which each method but `share` and `seed` is
    called by all of them; `as_first_says` by all that share out the model. What they tell each
    other are tensors: objects would be pickled."""

    rank: int = 0
    count: int = 1
    split: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that saves checkpoints, tells the progress and writes."""
        return self.rank == 0

    @property
    def holds_state(self) -> bool:
        """Whether a checkpoint needs this rank: the first one, or all where the model is split."""
        return self.is_first or self.split

    def share(
        self, batches: Sequence[Sequence[TrainingRow]]
    ) -> list[tuple[Sequence[TrainingRow], float]]:
        """Return what this rank computes of a step, each with its share of the step's rows, 0 to 1:
        some of its batches or, where there are fewer batches than ranks, some rows of each.

        Where the model is split, all ranks compute as many: a rank that has fewer gets a row of
        another one with a share of 0."""
        rows = sum(map(len, batches))
        own, most = batches[self.rank :: self.count], math.ceil(len(batches) / self.count)
        if len(batches) < self.count:
            own, most = [batch[self.rank :: self.count] for batch in batches], len(batches)
        shares = [(batch, len(batch) / rows) for batch in own if batch]
        if self.split:
            shares += [(batches[0][:1], 0.0)] * (most - len(shares))
        return shares

    def as_first_says(self, flag: bool) -> bool:
        """Return the first rank's `flag`, where all ranks must do the same."""
        if not self.split:
            return flag
        import torch
        import torch.distributed as dist

        told = torch.tensor(flag)
        dist.broadcast(told, 0)
        return bool(told)

    def seed(self, seed: int, step: int) -> None:
        """Draw other random numbers than the other ranks, which depend on `seed` and `step` alone:
        a checkpoint need not hold every rank's."""
        if self.count == 1:
            return
        import torch

        text = f"{seed}/{step}/{self.rank}"
        torch.manual_seed(random.Random(text).getrandbits(63))  # noqa: S311 - no secret

    def require_same_base(self, digest: bytes) -> None:
        """Raise TrainingError where another rank has another `digest` of the model's weights than
        the first one: frozen weights are never compared again."""
        if self.count == 1:
            return
        import torch
        import torch.distributed as dist

        own = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        told = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(told, own)
        others = [rank for rank, each in enumerate(told) if not torch.equal(each, told[0])]
        if others:
            numbers = ", ".join(map(str, others))
            which = f"rank {numbers} has" if len(others) == 1 else f"ranks {numbers} have"
            raise TrainingError(
                f"base.model: {which} other weights than rank 0; put the same files of the model "
                "on each machine, under the same path"
            )

    def start_alike(self, fingerprint: str, step: int, weights: Iterable["torch.Tensor"]) -> None:
        """Give all ranks the first one's `weights`.

        Raises TrainingUnavailable where `fingerprint`, a digest in hex digits, or `step` differ."""
        if self.count == 1:
            return
        import torch
        import torch.distributed as dist

        least = torch.tensor([step, *bytes.fromhex(fingerprint)])
        most = least.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        if not torch.equal(least, most):
            raise TrainingUnavailable(
                "the devices would not train alike: they have other rows, settings or hardware, or "
                "could not all read the checkpoint; use equal machines with the same version, "
                "and run again"
            )
        for weight in weights:
            dist.broadcast(weight.detach(), 0)

    def add_up(self, loss: float, weights: Iterable["torch.Tensor"]) -> float:
        """Give each of `weights` the sum of all ranks' gradients; return the sum of their losses.

        A weight without a gradient in any rank stays without one."""
        if self.count == 1:
            return loss
        import torch
        import torch.distributed as dist

        weights = list(weights)
        has_gradient = [float(weight.grad is not None) for weight in weights]
        told = torch.tensor([loss, *has_gradient], dtype=torch.float64)
        dist.all_reduce(told)
        under_way = []
        for weight, count in zip(weights, told[1:].tolist(), strict=True):
            if not count:
                continue
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            under_way.append(dist.all_reduce(weight.grad, async_op=True))
        for work in under_way:
            work.wait()
        return float(told[0])

    def join(self, rows: int, right: Sequence[float], loss: float) -> tuple[Sequence[float], float]:
        """Return what validation found of all `rows` rows: `right` of each, and their mean `loss`.
        Given are those of the rank's own rows: each `count`-th one, from the `rank`-th on."""
        if self.count == 1:
            return right, loss
        import torch
        import torch.distributed as dist

        told = torch.zeros(rows + 1, dtype=torch.float64)
        told[self.rank : rows : self.count] = torch.tensor(right, dtype=torch.float64)
        told[rows] = loss * len(right)
        dist.all_reduce(told)
        *joined, total = told.tolist()
        return joined, total / rows


ALONE = Ranks()
