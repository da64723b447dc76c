"""Training a student: one `train` function for LoRA, DoRA and full training alike, and the stage around it.

`train` is plain PyTorch over token ids. distillery/olive_passes.py runs it as an Olive pass, so that fine-tuning is an
Olive workflow; nothing in here knows of Olive.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from distillery.errors import TrainingError
from distillery.models.load import contiguous_head
from distillery.models.placement import placement
from distillery.recipe import TrainingRecipe
from distillery.records import CurvePoint, Record
from distillery.training.adapters import add_lora
from distillery.training.batching import batches, turning_point
from distillery.training.checkpoint import Checkpoints, TrainingState, fingerprint_of
from distillery.training.losses import TrainingRow
from distillery.training.objective import Objective, head_cast_once
from distillery.training.rows import require_rows
from distillery.training.validation import validate

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


class TrainingProgress(NamedTuple):
    """How far training is: at `point`, of `steps` in all. `rows_per_second`: this process's, while it trains.
    `seconds_left`: by the clock, validation and checkpoints included. `healing`: which step of student.healing this is,
    from 1; None for the last training."""

    point: CurvePoint
    steps: int
    rows_per_second: float
    seconds_left: float
    healing: int | None = None

    @property
    def step(self) -> int:
        return self.point.step


Progress = Callable[[TrainingProgress], None]
"""Called every 10 steps and at each epoch's end; what it raises ends the training there."""


class TrainingResult(Record):
    """`kept_step`: the step whose weights are kept, before `steps` where training.patience chose an earlier epoch's.
    `rows_per_second` is this process's; `resumed_at` the step of the checkpoint that it went on from, 0 for none."""

    steps: int
    kept_step: int
    parameters: int
    trained_parameters: int
    curve: tuple[CurvePoint, ...]
    validation_accuracy: float | None
    device: str
    precision: str
    rows_per_second: float
    resumed_at: int = 0


def train(
    model: Any,
    rows: Sequence[TrainingRow],
    validation: Sequence[TrainingRow],
    recipe: TrainingRecipe,
    *,
    pad_id: int,
    end_id: int,
    progress: Progress | None = None,
    hidden: "torch.Tensor | None" = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every_s: float = 300,
    keep_end: bool = False,
) -> tuple[Any, TrainingResult]:
    """Trains `model` (a causal language model in float32) on `rows`; returns it and the figures. `hidden`: the
    teacher's hidden states for these rows, [rows, hidden], which recipe.hidden_weight asks for.

    Goes on from the checkpoint, where there is one that fits, and saves one every `checkpoint_every_s` seconds, less
    often where saving would take more than 2 % of the time, and with `keep_end` one when it is done. Deterministic on a
    CPU for equal inputs, seed and thread count, however often it was killed. Raises TrainingError for no rows or a loss
    that is no number."""
    import torch

    require_rows(rows)
    if recipe.patience and not validation:
        raise TrainingError(
            "training.patience needs validation rows: name a split for them or carve them"
        )
    torch.manual_seed(recipe.seed)
    place = placement(recipe.precision)
    if recipe.adapts:
        # The frozen base is cast once, not at every step; peft keeps the adapter itself in float32.
        model = add_lora(
            model.to(getattr(torch, place.precision)), recipe.lora, recipe.method == "dora"
        )
    elif recipe.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    model.to(place.device).train()
    contiguous_head(model)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    trained = list(weights.values())
    turn = turning_point(model)
    per_epoch = math.ceil(
        len(batches(rows, recipe.batch_size, recipe.seed, 0, turn)) / recipe.accumulation
    )
    steps = recipe.max_steps or max(1, math.ceil(per_epoch * recipe.epochs))
    # Fused, on a CPU too: one pass over the weights in place of a dozen.
    optimiser = torch.optim.AdamW(
        trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warmup_cosine(steps, recipe.warmup))
    settings = [recipe.model_dump(mode="json"), place.device, place.precision, pad_id, end_id]
    state = TrainingState(
        fingerprint_of(rows, validation, settings, weights), weights, optimiser, schedule
    )
    if checkpoints:
        state.resume(checkpoints)
    matched = (
        {}
        if hidden is None
        else dict(zip((row.prompt for row in rows), hidden.to(place.device), strict=True))
    )
    objective = Objective(model, recipe, place, pad_id, end_id, matched)
    resumed_at = state.step
    groups = islice(_endless(rows, recipe, turn), resumed_at, None)
    began = time.perf_counter()
    trained_seconds, seen, due = 0.0, 0, began + checkpoint_every_s
    with head_cast_once(model, place):
        while state.step < steps and state.waited < (recipe.patience or math.inf):
            started = time.perf_counter()
            group = next(groups)
            count = sum(map(len, group))
            total = 0.0
            for batch in group:
                loss = objective(batch) * (len(batch) / count)
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            state.step += 1
            state.losses.append(total)
            trained_seconds += time.perf_counter() - started
            seen += count
            if not math.isfinite(total):
                raise TrainingError(
                    f"the loss is {total} at step {state.step}; lower its training.learning_rate"
                )
            epoch_ends = state.step % per_epoch == 0 or state.step == steps
            point = CurvePoint(step=state.step, loss=sum(state.losses) / len(state.losses))
            if epoch_ends and validation:
                state.accuracy, checked = validate(model, validation, pad_id=pad_id, place=place)
                if not math.isfinite(checked):
                    raise TrainingError(
                        f"the validation loss is {checked} at step {state.step}; lower its training.learning_rate"
                    )
                point = point.model_copy(
                    update={"validation_loss": checked, "validation_accuracy": state.accuracy}
                )
                if recipe.patience:
                    state.compare(checked)
            if epoch_ends or len(state.losses) == 10:
                state.curve.append(point)
                state.losses = []
                if progress:
                    left = (
                        (steps - state.step)
                        * (time.perf_counter() - began)
                        / (state.step - resumed_at)
                    )
                    progress(TrainingProgress(point, steps, seen / trained_seconds, left))
            if checkpoints and state.step < steps and (started := time.perf_counter()) >= due:
                state.keep(checkpoints)
                due = time.perf_counter() + max(
                    checkpoint_every_s, 50 * (time.perf_counter() - started)
                )
    if checkpoints and keep_end:
        state.keep(checkpoints)
    state.take_best()
    return model, TrainingResult(
        steps=state.step,
        kept_step=state.best_step or state.step,
        # An adapter is merged in the end and adds none.
        parameters=sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name),
        trained_parameters=sum(p.numel() for p in trained),
        curve=tuple(state.curve),
        validation_accuracy=state.accuracy,
        device=place.device,
        precision=place.precision,
        rows_per_second=seen / trained_seconds if seen else 0.0,
        resumed_at=resumed_at,
    )


def _endless(
    rows: Sequence[TrainingRow], recipe: TrainingRecipe, turn: int | None
) -> Iterator[list[list[TrainingRow]]]:
    """The batches of each step; no step takes of two epochs."""
    epoch = 0
    while True:
        ordered = batches(rows, recipe.batch_size, recipe.seed, epoch, turn)
        for start in range(0, len(ordered), recipe.accumulation):
            yield ordered[start : start + recipe.accumulation]
        epoch += 1


def _warmup_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    rise = max(1, round(steps * warmup))
    return lambda done: min((done + 1) / rise, 0.5 * (1 + math.cos(math.pi * done / steps)))
