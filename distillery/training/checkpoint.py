"""Checkpoints: the state that training goes on from after its process has died.

A checkpoint is one file, state.pt, written by torch.save and read as weights only, so that reading
it runs no code.
"""

import hashlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from distillery.errors import StoreError
from distillery.records import CANONICAL, CurvePoint
from distillery.storage.working import working_folder
from distillery.training.decisions import decide
from distillery.training.ranks import ALONE, Ranks
from distillery.training.rows import TrainingRow
from distillery.training.split_model import (
    is_share,
    joined_state,
    joined_weights,
    own_share,
    shares_of,
    state_of,
)
from distillery.training.validation import PROOF, proven_worse

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

STATE_FILE = "state.pt"


class Checkpoints(Protocol):
    """Where a training keeps its last checkpoint."""

    def save(self, folder: Path) -> None:
        """Keep the files of `folder`, all or none, and replace what was kept before. Training goes
        on after a StoreError; any other error ends it."""

    def load(self, into: Path) -> bool:
        """Write what is kept into the folder `into`, byte for byte; return False where nothing
        complete is kept."""


class CheckpointsOfSteps(Checkpoints, Protocol):
    """Where a workflow of one or more trainings keeps their checkpoints."""

    def of(self, step: str) -> Checkpoints:
        """Return those of one training of several."""


@dataclass
class TrainingState:
    """What training goes on from.

    `fingerprint`: the digest of all that a checkpoint must have been made with. `losses`: those of
    the steps since the curve's last point. `best_*`: the epoch whose weights are kept, where
    training.patience is set, and `waited`, the number of epochs since. `right`: how much of each
    validation row (0 to 1) the epoch has right that has the most, where patience is proven;
    `epochs`: how many there were."""

    fingerprint: str
    weights: "dict[str, torch.nn.Parameter]"
    optimiser: "torch.optim.Optimizer"
    schedule: "torch.optim.lr_scheduler.LRScheduler"
    step: int = 0
    curve: list[CurvePoint] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracy: float | None = None
    best_loss: float = math.inf
    best_accuracy: float | None = None
    best_step: int = 0
    best_weights: "dict[str, torch.Tensor] | None" = None
    waited: int = 0
    right: Sequence[float] = field(default_factory=list)
    epochs: int = 0

    def keep_if_best(self, loss: float) -> None:
        """Keep the weights where `loss`, an epoch's validation loss, is the lowest so far."""
        self.waited += 1
        if loss < self.best_loss:
            self.best_loss = loss
            self.keep()

    def keep_unless_worse(self, right: Sequence[float]) -> None:
        """Keep the weights where `right`, how much of each validation row they have right, does not
        prove them worse than those of the epoch that had the most right."""
        self.waited += 1
        # More of the tokens may be right in fewer of the rows.
        most = not self.epochs or sum(right) > sum(self.right)
        # By Bonferroni's correction: that epoch was chosen out of `epochs`.
        if most or not proven_worse(right, self.right, PROOF / self.epochs):
            self.keep()
        if most:
            self.right = right
        self.epochs += 1

    def keep(self) -> None:
        """Keep the weights as the best ones."""
        self.best_accuracy = self.accuracy
        self.best_step, self.waited = self.step, 0
        self.best_weights = {
            name: own_share(weight).cpu().clone() for name, weight in self.weights.items()
        }

    def restore_best(self) -> None:
        """Go back to the weights and the accuracy of the best epoch, where one is kept."""
        if self.best_weights is None or self.best_step == self.step:
            return
        copy_weights(self.best_weights, self.weights)
        points = {point.step: point for point in self.curve}
        best, last = points[self.best_step], points[self.step]
        then, now = f"{self.best_accuracy:.3f} of the validation rows right", f"{self.accuracy:.3f}"
        by = ""
        if best.validation_tokens is not None:
            then = f"{best.validation_tokens:.3f} of the validation rows' tokens right, and the "
            then += f"loss {best.validation_loss:.3f}"
            now = f"{last.validation_tokens:.3f}, and {last.validation_loss:.3f}"
            by = ", by the tokens" if self.epochs else ", by the loss"
        decide(
            f"kept the weights of step {self.best_step} of {self.step}: they have {then}, the last "
            f"ones {now} (training.patience{by})"
        )
        self.accuracy = self.best_accuracy

    @property
    def kept_tokens(self) -> float | None:
        """The validation_tokens of the weights that are kept."""
        points = {point.step: point for point in self.curve}
        return points[self.best_step or self.step].validation_tokens

    def save(self, checkpoints: Checkpoints, ranks: Ranks = ALONE) -> None:
        """Save a checkpoint, which the first of `ranks` writes. A store that is down or full is
        logged and does not end training, which needs the checkpoint only if its process dies."""
        import torch

        best = self.best_weights
        # torch.save writes tensor by tensor; safetensors would copy them all first.
        values = {
            "fingerprint": self.fingerprint,
            "weights": joined_weights(self.weights, self.weights),
            "optimiser": joined_state(self.optimiser.state_dict(), self.weights.values()),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "curve": [point.model_dump() for point in self.curve],
            "losses": self.losses,
            "best": [
                self.best_loss,
                self.best_accuracy,
                self.best_step,
                best and joined_weights(best, self.weights),
                self.waited,
                self.accuracy,
            ],
            "proof": [self.right, self.epochs],
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        if not ranks.is_first:
            return
        try:
            with working_folder("checkpoint") as folder:
                # A file opened by Python: torch's own does not tell a full disk from other errors.
                with (folder / STATE_FILE).open("wb") as file:
                    torch.save(values, file)
                checkpoints.save(folder)
        except StoreError as error:
            _log.warning("no checkpoint at step %d: %s", self.step, error)

    def resume(self, checkpoints: Checkpoints) -> None:
        """Take over the checkpoint, if there is one. Where it can't be read or does not fit, log a
        warning and change nothing."""
        import torch

        values = self.read_fitting(checkpoints)
        if values is None:
            return
        copy_weights(shares_of(values["weights"], self.weights), self.weights)
        self.optimiser.load_state_dict(state_of(values["optimiser"], self.weights.values()))
        self.schedule.load_state_dict(values["schedule"])
        self.step, self.losses = values["step"], values["losses"]
        self.curve = [CurvePoint.model_validate(point) for point in values["curve"]]
        self.best_loss, self.best_accuracy, self.best_step = values["best"][:3]
        best, self.waited, self.accuracy = values["best"][3:]
        self.best_weights = best and shares_of(best, self.weights)
        # Earlier versions kept none.
        self.right, self.epochs = values.get("proof", ([], 0))
        torch.set_rng_state(values["random"])
        if values["cuda_random"] is not None:
            torch.cuda.set_rng_state(values["cuda_random"])
        _log.info("training goes on from its checkpoint at step %d", self.step)

    def read_fitting(self, checkpoints: Checkpoints) -> dict[str, Any] | None:
        """Return the values of the checkpoint; None where there is none, it can't be read or its
        fingerprint is another."""
        import torch

        with working_folder("checkpoint") as folder:
            if not checkpoints.load(folder):
                return None
            try:
                # Of a split model each rank needs its shares alone, and all of them read one file.
                values: dict[str, Any] = torch.load(
                    folder / STATE_FILE,
                    map_location="cpu",
                    weights_only=True,
                    mmap=any(map(is_share, self.weights.values())),
                )
                fits = values["fingerprint"] == self.fingerprint
            except Exception as error:
                # torch.load raises almost any error for a damaged file.
                _log.warning(
                    "training starts afresh: its checkpoint can't be read (%s)",
                    type(error).__name__,
                )
                return None
        if fits:
            return values
        _log.warning(
            "training starts afresh: its checkpoint is of other rows, settings, weights or hardware"
        )
        return None


class CheckpointTimer:
    """Saves a checkpoint every `every_s` seconds at most, and less often where saving would take
    more than 2 % of the time."""

    def __init__(self, checkpoints: Checkpoints, every_s: float, ranks: Ranks = ALONE) -> None:
        self.checkpoints, self.every_s, self.ranks = checkpoints, every_s, ranks
        self.due = time.perf_counter() + every_s

    def save_if_due(self, state: TrainingState) -> None:
        """Save a checkpoint of `state` if the time for the next one has come."""
        started = time.perf_counter()
        if not self.ranks.as_first_says(started >= self.due):
            return
        state.save(self.checkpoints, self.ranks)
        ended = time.perf_counter()
        self.due = ended + max(self.every_s, 50 * (ended - started))


def copy_weights(
    source: "dict[str, torch.Tensor]", target: "dict[str, torch.nn.Parameter]"
) -> None:
    """Copy the values of `source` into the parameters of the same names; of those that are split,
    both have this rank's shares."""
    for name, weight in target.items():
        own_share(weight).copy_(source[name])


def fingerprint_of(
    rows: Sequence[TrainingRow],
    validation: Sequence[TrainingRow],
    settings: list[Any],
    weights: dict[str, Any],
) -> str:
    """Return a digest of what a training starts from: rows, settings and the weights' shapes. It is
    `digest_of` their list, without a copy of the rows in memory."""
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    digest = hashlib.sha256(b"[")
    for part in (rows, validation):
        digest.update(b"[")
        for number, row in enumerate(part):
            digest.update(b"," if number else b"")
            digest.update(CANONICAL.encode(row.model_dump(mode="json")).encode())
        digest.update(b"],")
    # The rest with its closing bracket, after the rows and a comma.
    digest.update(CANONICAL.encode([settings, shapes])[1:].encode())
    return digest.hexdigest()
