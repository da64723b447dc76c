"""The training loop: one `train` function for LoRA, QLoRA, DoRA and full training.

In: a model in PyTorch, rows of token ids and a recipe. Out: the trained model and the figures. It
is plain PyTorch; training/olive_passes.py runs it as a pass of an Olive workflow. On several
devices each runs this same loop (training/ranks.py).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from distillery.errors import TrainingError
from distillery.models.device import Device, choose_device, linear_layers_cast
from distillery.models.four_bits import quantise_linear_layers, unpacked_count
from distillery.models.load import contiguous_head
from distillery.recipe import TrainingRecipe
from distillery.records import CurvePoint, Record
from distillery.training.adapters import add_lora
from distillery.training.batching import batches, turning_point
from distillery.training.checkpoint import (
    Checkpoints,
    CheckpointTimer,
    TrainingState,
    fingerprint_of,
)
from distillery.training.decisions import decide
from distillery.training.hidden_states import TeacherStates
from distillery.training.losses import balanced_weights
from distillery.training.objective import Objective
from distillery.training.ranks import ALONE, Ranks
from distillery.training.rows import TrainingRow, require_rows
from distillery.training.split_model import is_share, join_model, split_model
from distillery.training.validation import validate, validate_written

if TYPE_CHECKING:
    import torch

STEPS_PER_POINT = 10
"""After how many steps the curve gets a point, if no epoch ends before."""

EPOCHS_PROVEN_WORSE = 3
"""After how many epochs in a row that validation rows prove worse than the best one training ends,
with training.patience: proven. A learning rate that falls may still mend one or two."""


class TrainingProgress(NamedTuple):
    """How far training is: at `point`, of `steps` in all.

    `rows_per_second`: of all devices together, while this process takes steps. `seconds_left`: by
    the clock, with validation and checkpoints. `healing`: which step of student.healing this is,
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
"""Called every 10 steps and at each epoch's end; an error that it raises ends the training."""


class TrainingResult(Record):
    """The figures of a training. `kept_step`: the step whose weights are kept, before `steps` where
    training.patience chose an earlier epoch. `rows_per_second`: see TrainingProgress. `resumed_at`:
    the step of the checkpoint that it went on from, 0 for none. `validation_tokens`: of the weights
    that are kept, see `CurvePoint`. `decisions`: see decisions.py."""

    steps: int
    kept_step: int
    parameters: int
    trained_parameters: int
    curve: tuple[CurvePoint, ...]
    validation_accuracy: float | None
    validation_tokens: float | None = Field(None, exclude_if=lambda share: share is None)
    device: str
    precision: str
    rows_per_second: float
    resumed_at: int = 0
    decisions: tuple[str, ...] = ()


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
    ranks: Ranks = ALONE,
) -> tuple[Any, TrainingResult]:
    """Train `model` on `rows`; return it and the figures. It is a causal language model in float32;
    the base of an adapter may be in the precision of the computation instead.

    Rows of classes put a ClassHead on the model, which is still there afterwards. `hidden`: the
    teacher's hidden states for these rows, [states, hidden], as hidden_states.py orders them, which
    recipe.hidden_weight needs. Training goes on from the checkpoint where there is one that fits.
    It saves one every `checkpoint_every_s` seconds, less often where saving would take more than
    2 % of the time, and with `keep_end` another one when it is done. Deterministic on a CPU for
    equal inputs, seed and number of threads, however often it was killed.

    `ranks`: with several, each calls this with the same arguments, and all return the same; the
    first one alone saves checkpoints. Where they share out the model, it alone returns the weights,
    and its model makes no pass any more. Raises TrainingError for no rows or for a loss that is NaN
    or infinite."""
    training = set_up(model, rows, validation, recipe, hidden, pad_id, end_id, ranks)
    if checkpoints:
        training.resume(checkpoints)
    training.start_alike()
    timer = None
    if checkpoints and ranks.holds_state:
        timer = CheckpointTimer(checkpoints, checkpoint_every_s, ranks)
    with (
        linear_layers_cast(training.model, training.device, frozen_only=True),
        training.frozen_states(rows, validation),
    ):
        for group in training.remaining_steps(rows):
            training.take_step(group)
            if training.epoch_ends or len(training.state.losses) == STEPS_PER_POINT:
                training.add_point(validation)
                if progress:
                    progress(training.progress())
            if timer and training.state.step < training.steps:
                timer.save_if_due(training.state)
    if checkpoints and keep_end and ranks.holds_state:
        training.state.save(checkpoints, ranks)
    training.state.restore_best()
    result = training.result()
    if ranks.split:
        join_model(training.model)
    return training.model, result


@dataclass
class Training:
    """A training under way: its state, what each step needs, and the clocks of this process.

    `steps` in all, of which `steps_per_epoch` are an epoch; a step never spans two epochs."""

    model: Any
    recipe: TrainingRecipe
    device: Device
    objective: Objective
    state: TrainingState
    steps: int
    steps_per_epoch: int
    ranks: Ranks = ALONE
    resumed_at: int = 0
    rows_seen: int = 0
    seconds_in_steps: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def resume(self, checkpoints: Checkpoints) -> None:
        """Go on from the checkpoint, where there is one that fits."""
        self.state.resume(checkpoints)
        self.resumed_at = self.state.step
        self.began = time.perf_counter()

    def start_alike(self) -> None:
        """See to it that all ranks go on from the same weights at the same step."""
        self.ranks.start_alike(self.state.fingerprint, self.state.step, self.whole_weights)

    @property
    def whole_weights(self) -> list["torch.nn.Parameter"]:
        """The weights in training that every rank holds; FSDP sees to those that are split."""
        return [weight for weight in self.state.weights.values() if not is_share(weight)]

    def frozen_states(
        self, rows: Sequence[TrainingRow], validation: Sequence[TrainingRow]
    ) -> AbstractContextManager[None]:
        """Return a context in which passes of these rows skip the frozen layers, where training
        goes through the rows more than once. Ranks that share out the model skip none."""
        from distillery.training.frozen_states import frozen_states_kept

        if self.ranks.split or self.steps <= self.steps_per_epoch or self.state.step == self.steps:
            return nullcontext()
        objective = self.objective
        kept: AbstractContextManager[None] = frozen_states_kept(
            self.model, rows, validation, objective, pad_id=objective.pad_id, device=self.device
        )
        return kept

    def remaining_steps(self, rows: Sequence[TrainingRow]) -> Iterator[list[list[TrainingRow]]]:
        """Give the batches of each step that is left, until the last one or until training.patience
        epochs brought nothing better."""
        recipe = self.recipe
        patience = EPOCHS_PROVEN_WORSE if recipe.patience == "proven" else recipe.patience
        groups = endless_steps(
            rows, recipe.batch_size, recipe.accumulation, recipe.seed, turning_point(self.model)
        )
        for step in islice(groups, self.state.step, self.steps):
            if patience and self.state.waited >= patience:
                return
            yield [[rows[index] for index in picked] for picked in step]

    def take_step(self, group: Sequence[Sequence[TrainingRow]]) -> None:
        """Change the weights once, by the mean loss over all rows of the batches in `group`.

        Raises TrainingError where the loss is NaN or infinite."""
        import torch

        started = time.perf_counter()
        count, total = sum(map(len, group)), 0.0
        self.ranks.seed(self.recipe.seed, self.state.step)
        for batch, share in self.ranks.share(group):
            loss = self.objective(batch) * share
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        total = self.ranks.add_up(total, self.whole_weights)
        torch.nn.utils.clip_grad_norm_(self.state.weights.values(), self.recipe.max_grad_norm)
        self.state.optimiser.step()
        self.state.schedule.step()
        self.state.optimiser.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.losses.append(total)
        self.seconds_in_steps += time.perf_counter() - started
        self.rows_seen += count
        require_finite(total, "loss", self.state.step)

    @property
    def epoch_ends(self) -> bool:
        """Whether the last step taken ends an epoch or the whole training."""
        return self.state.step % self.steps_per_epoch == 0 or self.state.step == self.steps

    def add_point(self, validation: Sequence[TrainingRow]) -> None:
        """Add the mean loss since the last point to the curve, and at the end of an epoch the
        figures on `validation`, by which the best epoch is kept."""
        state = self.state
        point = CurvePoint(step=state.step, loss=sum(state.losses) / len(state.losses))
        if self.epoch_ends and validation:
            right, loss = self.validate(validation)
            require_finite(loss, "validation loss", state.step)
            state.accuracy = fmean(share == 1 for share in right)
            figures = {"validation_loss": loss, "validation_accuracy": state.accuracy}
            if validation[0].target:
                figures["validation_tokens"] = fmean(right)
            point = point.model_copy(update=figures)
            if self.recipe.patience == "proven":
                state.keep_unless_worse(right)
            elif self.recipe.patience:
                state.keep_if_best(loss)
        state.curve.append(point)
        state.losses = []

    def validate(self, rows: Sequence[TrainingRow]) -> tuple[Sequence[float], float]:
        """Return how much of each row is right (0 to 1), and the loss: all or nothing where an
        answer is chosen, the share of its tokens where it is written. Ranks share the rows out."""
        model, device, pad_id = self.model, self.device, self.objective.pad_id
        own = rows[self.ranks.rank :: self.ranks.count]
        # With a split model, a rank without rows makes the others' passes.
        asked = own or (rows[:1] if self.ranks.split else [])
        right: Sequence[float] = []
        loss = 0.0
        if asked and asked[0].target:
            end_id = self.objective.end_id
            right, loss = validate_written(
                model, asked, pad_id=pad_id, end_id=end_id, device=device
            )
        elif asked:
            right, loss = validate(model, asked, pad_id=pad_id, device=device)
        return self.ranks.join(len(rows), right[: len(own)], loss)

    @property
    def rows_per_second(self) -> float:
        """Of all devices together, while this process takes steps; 0 before the first one."""
        return self.rows_seen / self.seconds_in_steps if self.rows_seen else 0.0

    def progress(self) -> TrainingProgress:
        """Return how far training is, at the curve's last point."""
        seconds = time.perf_counter() - self.began
        left = (self.steps - self.state.step) * seconds / (self.state.step - self.resumed_at)
        return TrainingProgress(self.state.curve[-1], self.steps, self.rows_per_second, left)

    def result(self) -> TrainingResult:
        """Return the figures of the whole training."""
        from distillery.training.class_head import CLASS_ROWS

        state = self.state
        parameters = 0
        for name, weight in self.model.named_parameters():
            # An adapter is merged in the end, and so are the rows of a class head.
            if ".lora_" not in name and not name.endswith(CLASS_ROWS):
                parameters += unpacked_count(weight)
        return TrainingResult(
            steps=state.step,
            kept_step=state.best_step or state.step,
            parameters=parameters,
            trained_parameters=sum(weight.numel() for weight in state.weights.values()),
            curve=tuple(state.curve),
            validation_accuracy=state.accuracy,
            validation_tokens=state.kept_tokens,
            device=self.device.name,
            precision=self.device.precision,
            rows_per_second=self.rows_per_second,
            resumed_at=self.resumed_at,
        )


def set_up(
    model: Any,
    rows: Sequence[TrainingRow],
    validation: Sequence[TrainingRow],
    recipe: TrainingRecipe,
    hidden: "torch.Tensor | None",
    pad_id: int,
    end_id: int,
    ranks: Ranks = ALONE,
) -> Training:
    """Return a training at step 0: the model on its device with the weights to train, and the
    optimiser, the schedule and the objective. The parameters are those of `train`."""
    import torch

    from distillery.training.class_head import add_class_head, start_from_probe

    require_rows(rows)
    if recipe.patience_needs_validation and not validation:
        raise TrainingError(
            "training.patience needs validation rows: name a split for them or carve them"
        )
    torch.manual_seed(recipe.seed)
    device = choose_device(recipe.precision)
    model = trainable_model(model, recipe, device)
    head = add_class_head(model, rows[0].letters) if rows[0].closed else None
    if ranks.split:
        # An adapter is small.
        trained = (weight for weight in model.parameters() if weight.requires_grad)
        split_model(model, device, not_split=list(trained) if recipe.adapts else [])
    model.to(device.name).train()
    contiguous_head(model)
    # A student that learns its teacher's states keeps the rows that read them.
    if head and hidden is None:
        start_from_probe(model, head, rows, pad_id=pad_id, device=device, seed=recipe.seed)
        model.train()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    first_epoch = batches(rows, recipe.batch_size, recipe.seed, 0, turning_point(model))
    steps_per_epoch = math.ceil(len(first_epoch) / recipe.accumulation)
    steps = steps_to_train(recipe, steps_per_epoch)
    optimiser = torch.optim.AdamW(
        list(weights.values()),
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        # One pass over the weights instead of a dozen, on a CPU too.
        fused=True,
    )
    factor = warmup_cosine(steps, recipe.warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    # What changes rounding at most is no reason to start afresh.
    counted = recipe.model_dump(mode="json", exclude={"allow_cpu", "gradient_checkpointing"})
    settings = [counted, device.name, device.precision, pad_id, end_id]
    fingerprint = fingerprint_of(rows, validation, settings, weights)
    teacher_states = None
    if hidden is not None:
        teacher_states = TeacherStates(hidden, rows, device.name)
    class_weights = None
    if recipe.class_weights == "balanced" and rows[0].closed:
        class_weights = balanced_weights(rows, len(rows[0].letters))
    objective = Objective(model, recipe, device, pad_id, end_id, teacher_states, class_weights)
    if ranks.split and recipe.rationale_weight:
        stand_in = next((row for row in rows if row.rationale), None)
        objective = replace(objective, stand_in=stand_in)
    state = TrainingState(fingerprint, weights, optimiser, schedule)
    return Training(model, recipe, device, objective, state, steps, steps_per_epoch, ranks)


def steps_to_train(recipe: TrainingRecipe, steps_per_epoch: int) -> int:
    """Return the optimiser steps of the whole training."""
    if recipe.max_steps:
        return recipe.max_steps
    steps = max(1, math.ceil(steps_per_epoch * recipe.epochs))
    if steps < recipe.minimum_steps:
        decide(
            f"training for {recipe.minimum_steps / steps_per_epoch:.1f} epochs: "
            f"{recipe.epochs:g} would be {steps} steps, and training.minimum_steps is "
            f"{recipe.minimum_steps}"
        )
        return recipe.minimum_steps
    return steps


def trainable_model(model: Any, recipe: TrainingRecipe, device: Device) -> Any:
    """Return `model` with the weights frozen that the recipe does not train, or with a new adapter.

    Raises TrainingError where the model has no layer recipe.first_layer, or its code no gradient
    checkpointing."""
    import torch

    layers = model.get_decoder().layers
    first = len(layers) // 2 if recipe.first_layer == "half" else recipe.first_layer
    if first >= len(layers):
        raise TrainingError(
            f"training.first_layer: {first}, but this model has layers 0 to "
            f"{len(layers) - 1}; choose one of these"
        )
    if recipe.adapts:
        # The frozen base is cast once, not at every step; peft keeps the adapter in float32. A base
        # that was loaded so is left alone: its rotary frequencies are in float32.
        precision = getattr(torch, device.precision)
        if model.dtype != precision:
            model = model.to(precision)
        if recipe.method == "qlora":
            quantise_linear_layers(model, device)
        model = add_lora(model, recipe.lora, recipe.method == "dora", first)
    else:
        if recipe.freeze_embeddings or first:
            model.get_input_embeddings().requires_grad_(False)
        for layer in layers[:first]:
            layer.requires_grad_(False)
    if recipe.gradient_checkpointing:
        try:
            model.activation_checkpointing_enable()
        except ValueError as error:
            raise TrainingError(
                "training.gradient_checkpointing: this model's code has none; remove the setting"
            ) from error
        # Only reentrant checkpoints need inputs with a gradient, which would flow through the
        # frozen layers, too.
        model.disable_input_require_grads()
    return model


def endless_steps(
    rows: Sequence[TrainingRow], batch_size: int, accumulation: int, seed: int, turn: int | None
) -> Iterator[list[list[int]]]:
    """Give the batches of each step as the rows' indices, epoch after epoch; a step never spans two
    epochs."""
    epoch = 0
    while True:
        ordered = batches(rows, batch_size, seed, epoch, turn)
        for start in range(0, len(ordered), accumulation):
            yield ordered[start : start + accumulation]
        epoch += 1


def warmup_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """Return the factor of the learning rate by steps done: a linear rise over the share `warmup`
    of `steps`, and a cosine that falls to 0 at the end (Loshchilov and Hutter, SGDR, 2017)."""
    rise = max(1, round(steps * warmup))

    def factor(done: int) -> float:
        return min((done + 1) / rise, 0.5 * (1 + math.cos(math.pi * done / steps)))

    return factor


def require_finite(value: float, name: str, step: int) -> None:
    """Raise TrainingError where `value`, the loss that `name` says, is NaN or infinite."""
    if not math.isfinite(value):
        raise TrainingError(f"the {name} is {value} at step {step}; lower training.learning_rate")
