"""training/checkpoint"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from distillery.errors import StoreError
from distillery.records import CurvePoint, digest_of
from distillery.storage.working import working_folder
from distillery.training.losses import TrainingRow

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

STATE_FILE = "state.pt"


class Checkpoints(Protocol):
    """Where training keeps what it can go on from after its process has died."""

    def save(self, folder: Path) -> None:
        """Keeps the files of `folder`, all or none, in place of what was kept before. Training goes on after a
        StoreError; whatever else is raised ends it."""

    def load(self, into: Path) -> bool:
        """Writes what is kept into the folder `into`, byte for byte; False where there is nothing whole."""

    def of(self, step: str) -> "Checkpoints":
        """A place of its own for one step of several."""
        ...


@dataclass
class TrainingState:
    """What training goes on from. `fingerprint`: the digest of all that a checkpoint must have been made with;
    `losses`: those since the curve's last point. `best_*`: of the epoch with the lowest validation loss, where
    training.patience asks for it, and `waited` the epochs since."""

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

    def compare(self, loss: float) -> None:
        """Keeps the weights of the best epoch so far."""
        self.waited += 1
        if loss < self.best_loss:
            self.best_loss, self.best_accuracy, self.best_step, self.waited = (
                loss,
                self.accuracy,
                self.step,
                0,
            )
            self.best_weights = {
                name: weight.detach().cpu().clone() for name, weight in self.weights.items()
            }

    def take_best(self) -> None:
        import torch

        if self.best_weights is None or self.best_step == self.step:
            return
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.best_weights[name])
        self.accuracy = self.best_accuracy

    def keep(self, checkpoints: Checkpoints) -> None:
        """Saves a checkpoint. A store that is down or full does not end training, which needs it only if it dies."""
        import torch

        # torch.save writes tensor by tensor, where safetensors would copy them all first; loaded as weights only, its
        # files run no code either.
        values = {
            "fingerprint": self.fingerprint,
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "curve": [point.model_dump() for point in self.curve],
            "losses": self.losses,
            "best": [
                self.best_loss,
                self.best_accuracy,
                self.best_step,
                self.best_weights,
                self.waited,
                self.accuracy,
            ],
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        try:
            with working_folder("checkpoint") as folder:
                # A file of Python's, since torch's own does not tell a full disk from other errors.
                with (folder / STATE_FILE).open("wb") as file:
                    torch.save(values, file)
                checkpoints.save(folder)
        except StoreError as error:
            _log.warning("no checkpoint at step %d: %s", self.step, error)

    def resume(self, checkpoints: Checkpoints) -> None:
        """Takes over the checkpoint; where it can't be read or does not fit, says so and changes nothing."""
        import torch

        with working_folder("checkpoint") as folder:
            if not checkpoints.load(folder):
                return
            try:
                kept = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
                fits = kept["fingerprint"] == self.fingerprint
            except Exception as error:
                # The reader raises almost anything at a damaged file.
                _log.warning(
                    "training starts afresh: its checkpoint can't be read (%s)",
                    type(error).__name__,
                )
                return
        if not fits:
            _log.warning(
                "training starts afresh: its checkpoint is of other rows, settings, weights or hardware"
            )
            return
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(kept["weights"][name])
        self.optimiser.load_state_dict(kept["optimiser"])
        self.schedule.load_state_dict(kept["schedule"])
        self.step, self.losses = kept["step"], kept["losses"]
        self.curve = [CurvePoint.model_validate(point) for point in kept["curve"]]
        (
            self.best_loss,
            self.best_accuracy,
            self.best_step,
            self.best_weights,
            self.waited,
            self.accuracy,
        ) = kept["best"]
        torch.set_rng_state(kept["random"])
        if kept["cuda_random"] is not None:
            torch.cuda.set_rng_state(kept["cuda_random"])
        _log.info("training goes on from its checkpoint at step %d", self.step)


def fingerprint_of(
    rows: Sequence[TrainingRow],
    validation: Sequence[TrainingRow],
    settings: list[Any],
    weights: dict[str, Any],
) -> str:
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    return digest_of(
        [[row.model_dump() for row in part] for part in (rows, validation)] + [settings, shapes]
    )
