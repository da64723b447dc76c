"""Training a student: one `train` function for LoRA, DoRA and full training alike, and the stage around it.

`train` is plain PyTorch over token ids. distillery/olive_passes.py runs it as an Olive pass, so that fine-tuning is an
Olive workflow; nothing in here knows of Olive.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from distillery.batching import batches, by_length, forward, padded_inputs, turning_point
from distillery.errors import StoreError, TrainingError
from distillery.likelihood import forward_packed, label_likelihoods, option_scores
from distillery.losses import TrainingRow, answer_loss, hidden_loss, rationale_loss, text_loss
from distillery.prompts import Tokenizer, TransformersTokenizer, letter_ids, render_ids, text_ids
from distillery.pruning import MOST_ROWS, block_influence, chosen_layers
from distillery.recipe import HealingRecipe, LayerChoice, Layers, LoraRecipe, PromptRecipe, TrainingRecipe
from distillery.records import CurvePoint, Example, Record, TeacherLabel, digest_of
from distillery.store import working_folder

if TYPE_CHECKING:
    import torch

STATE_FILE = "state.pt"
LAYERS_FILE = "layers.json"
HIDDEN = "hidden"
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


def training_rows(
    examples: Sequence[Example],
    labels: dict[str, TeacherLabel],
    prompt: PromptRecipe,
    tokenizer: Any,
    explain: str | None = None,
) -> tuple[list[TrainingRow], list[str]]:
    """Renders the rows that have a label. Returns them, and the ids of those that are over prompt.max_tokens.

    `explain`: what asks for the reasons that labels have, where they are trained on. Raises DataError for an option
    whose text has no token, so that nothing would be learnt from it."""
    wrapped = TransformersTokenizer(tokenizer)
    rows, too_long = [], []
    for example in examples:
        label = labels.get(example.example_id)
        if label is None:
            continue
        ids = render_ids(example, prompt, wrapped)
        if ids is None:
            too_long.append(example.example_id)
            continue
        soft = label.distribution and tuple(label.distribution[letter] for letter in example.letters)
        rows.append(
            TrainingRow(
                prompt=tuple(ids),
                answer=example.letters.index(label.answer),
                soft=soft or None,
                **_what_may_follow(example, prompt, wrapped),
                **_reason(example, label, prompt, wrapped, explain),
            )
        )
    return rows, too_long


def _what_may_follow(example: Example, prompt: PromptRecipe, tokenizer: Tokenizer) -> dict[str, Any]:
    if prompt.answer == "letter":
        return {"letters": tuple(letter_ids(tokenizer, len(example.choices)))}
    return {"texts": tuple(map(tuple, text_ids(example, tokenizer)))}


def _reason(
    example: Example, label: TeacherLabel, prompt: PromptRecipe, tokenizer: Tokenizer, explain: str | None
) -> dict[str, Any]:
    if not explain or not label.rationale:
        return {}
    asked = render_ids(example, prompt, tokenizer, explain)
    reason = tokenizer.encode_text(label.rationale)
    if asked is None or not reason:
        return {}
    return {"explain": tuple(asked), "rationale": tuple(reason)}


def write_rows(rows: Sequence[TrainingRow], path: Path) -> None:
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows))


def read_rows(path: Path) -> list[TrainingRow]:
    return [TrainingRow.model_validate_json(line) for line in path.read_text().splitlines()]


def linear_modules(model: Any) -> list[str]:
    """The names of all linear layers but the head: qkv_proj and others in Phi-4-mini, q_proj and others in Llama.

    After the recommendation to adapt every linear layer (Dettmers et al., QLoRA, 2023)."""
    import torch

    head = model.get_output_embeddings()
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if not names:
        raise TrainingError("base model: found no linear layers to adapt; use training.method: full")
    return sorted(names)


def add_lora(model: Any, recipe: LoraRecipe, dora: bool = False) -> Any:
    """`model` with a fresh LoRA or DoRA adapter.

    Raises TrainingError where lora.target_modules names what is no linear layer of the decoder."""
    import peft

    known = linear_modules(model)
    targets = recipe.target_modules or known
    # Nor embeddings and head: where they are tied, an adapter of the one, merged, would change the other.
    layers = [f".{name}" for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in known]
    missing = [name for name in targets if not any(layer.endswith(f".{name}") for layer in layers)]
    if missing:
        raise TrainingError(
            f"training.lora.target_modules: {', '.join(missing)}: no linear layer of the decoder's; it has "
            f"{', '.join(known)}"
        )
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(targets),
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


@dataclass(frozen=True)
class Placement:
    """Where a model computes: `precision` is bfloat16 (autocast, float32 master weights) or float32."""

    device: str
    precision: str

    def autocast(self) -> Any:
        import torch

        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.precision == "bfloat16")


def placement(precision: str = "auto") -> Placement:
    """CUDA where there is a device; bfloat16 where `precision` is auto and the hardware multiplies in it."""
    import torch

    torch.set_flush_denormal(True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device == "cuda" else _cpu_multiplies_bfloat16()
        precision = "bfloat16" if fast else "float32"
    return Placement(device, precision)


def _cpu_multiplies_bfloat16() -> bool:
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def contiguous_head(model: Any) -> None:
    """Has the head see contiguous hidden states: for the strided slice that `logits_to_keep` makes, PyTorch's CPU
    kernels would copy the whole head once for each row of the batch."""
    head = model.get_output_embeddings()
    if _contiguous not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_contiguous)


def _contiguous(_head: Any, inputs: "tuple[torch.Tensor, ...]") -> "tuple[torch.Tensor]":
    return (inputs[0].contiguous(),)


@dataclass
class _State:
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
            self.best_loss, self.best_accuracy, self.best_step, self.waited = loss, self.accuracy, self.step, 0
            self.best_weights = {name: weight.detach().cpu().clone() for name, weight in self.weights.items()}

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
            "best": [self.best_loss, self.best_accuracy, self.best_step, self.best_weights, self.waited, self.accuracy],
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
                _log.warning("training starts afresh: its checkpoint can't be read (%s)", type(error).__name__)
                return
        if not fits:
            _log.warning("training starts afresh: its checkpoint is of other rows, settings, weights or hardware")
            return
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(kept["weights"][name])
        self.optimiser.load_state_dict(kept["optimiser"])
        self.schedule.load_state_dict(kept["schedule"])
        self.step, self.losses = kept["step"], kept["losses"]
        self.curve = [CurvePoint.model_validate(point) for point in kept["curve"]]
        self.best_loss, self.best_accuracy, self.best_step, self.best_weights, self.waited, self.accuracy = kept["best"]
        torch.set_rng_state(kept["random"])
        if kept["cuda_random"] is not None:
            torch.cuda.set_rng_state(kept["cuda_random"])
        _log.info("training goes on from its checkpoint at step %d", self.step)


def _fingerprint(
    rows: Sequence[TrainingRow], validation: Sequence[TrainingRow], settings: list[Any], weights: dict[str, Any]
) -> str:
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    return digest_of([[row.model_dump() for row in part] for part in (rows, validation)] + [settings, shapes])


@dataclass
class _Objective:
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
            loss = loss + self.recipe.rationale_weight * len(reasons) / len(rows) * self._reasons(reasons)
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

    def _matching(self, rows: Sequence[TrainingRow], states: "torch.Tensor") -> "torch.Tensor | float":
        import torch

        if not self.matched:
            return 0.0
        targets = torch.stack([self.matched[row.prompt] for row in rows])
        return self.recipe.hidden_weight * hidden_loss(states[:, 0], targets)


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

    _require(rows)
    if recipe.patience and not validation:
        raise TrainingError("training.patience needs validation rows: name a split for them or carve them")
    torch.manual_seed(recipe.seed)
    place = placement(recipe.precision)
    if recipe.adapts:
        # The frozen base is cast once, not at every step; peft keeps the adapter itself in float32.
        model = add_lora(model.to(getattr(torch, place.precision)), recipe.lora, recipe.method == "dora")
    elif recipe.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    model.to(place.device).train()
    contiguous_head(model)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    trained = list(weights.values())
    turn = turning_point(model)
    per_epoch = math.ceil(len(batches(rows, recipe.batch_size, recipe.seed, 0, turn)) / recipe.accumulation)
    steps = recipe.max_steps or max(1, math.ceil(per_epoch * recipe.epochs))
    # Fused, on a CPU too: one pass over the weights in place of a dozen.
    optimiser = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warmup_cosine(steps, recipe.warmup))
    settings = [recipe.model_dump(mode="json"), place.device, place.precision, pad_id, end_id]
    state = _State(_fingerprint(rows, validation, settings, weights), weights, optimiser, schedule)
    if checkpoints:
        state.resume(checkpoints)
    matched = {} if hidden is None else dict(zip((row.prompt for row in rows), hidden.to(place.device), strict=True))
    objective = _Objective(model, recipe, place, pad_id, end_id, matched)
    resumed_at = state.step
    groups = islice(_endless(rows, recipe, turn), resumed_at, None)
    began = time.perf_counter()
    trained_seconds, seen, due = 0.0, 0, began + checkpoint_every_s
    with _head_cast_once(model, place):
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
                raise TrainingError(f"the loss is {total} at step {state.step}; lower its training.learning_rate")
            epoch_ends = state.step % per_epoch == 0 or state.step == steps
            point = CurvePoint(step=state.step, loss=sum(state.losses) / len(state.losses))
            if epoch_ends and validation:
                state.accuracy, checked = validate(model, validation, pad_id=pad_id, place=place)
                if not math.isfinite(checked):
                    raise TrainingError(
                        f"the validation loss is {checked} at step {state.step}; lower its training.learning_rate"
                    )
                point = point.model_copy(update={"validation_loss": checked, "validation_accuracy": state.accuracy})
                if recipe.patience:
                    state.compare(checked)
            if epoch_ends or len(state.losses) == 10:
                state.curve.append(point)
                state.losses = []
                if progress:
                    left = (steps - state.step) * (time.perf_counter() - began) / (state.step - resumed_at)
                    progress(TrainingProgress(point, steps, seen / trained_seconds, left))
            if checkpoints and state.step < steps and (started := time.perf_counter()) >= due:
                state.keep(checkpoints)
                due = time.perf_counter() + max(checkpoint_every_s, 50 * (time.perf_counter() - started))
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


def _require(rows: Sequence[TrainingRow]) -> None:
    if not rows:
        raise TrainingError("no row to train on: every label was rejected or every prompt is over prompt.max_tokens")


@contextmanager
def _head_cast_once(model: Any, place: Placement) -> Iterator[None]:
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


@contextmanager
def _read_by_head(model: Any) -> Iterator[list[Any]]:
    """What the head reads in the forward passes meanwhile, [batch, kept, hidden] each."""
    states: list[Any] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _head, inputs: states.append(inputs[0]))
    try:
        yield states
    finally:
        hook.remove()


def _prefilled(
    model: Any, rows: Sequence[TrainingRow], pad_id: int, place: Placement, batch_size: int
) -> Iterator[tuple[list[int], "torch.Tensor"]]:
    """The prompts in batches of like length: the rows' indices, and the logits at their last tokens, [batch,
    vocabulary]."""
    contiguous_head(model)
    for picked in by_length(rows, batch_size, turning_point(model)):
        yield picked, forward(model, [rows[i].prompt for i in picked], 1, pad_id, place.device)[:, -1]


def hidden_states(
    model: Any, rows: Sequence[TrainingRow], *, pad_id: int, place: Placement, batch_size: int = 16
) -> "torch.Tensor":
    """What the head of `model` reads at each row's last prompt token: [rows, hidden], float32, on the CPU."""
    import torch

    found: dict[int, Any] = {}
    model.to(place.device).eval()
    with torch.inference_mode(), place.autocast(), _read_by_head(model) as states:
        for picked, _ in _prefilled(model, rows, pad_id, place, batch_size):
            found |= dict(zip(picked, states.pop()[:, -1].float().cpu(), strict=True))
    return torch.stack([found[index] for index in range(len(rows))])


def option_probabilities(
    model: Any, rows: Sequence[TrainingRow], *, pad_id: int, place: Placement, batch_size: int = 16
) -> list[list[float]]:
    """For each row the probabilities over its options after one prefill: softmax over its letters' logits, or over the
    scores of its options' texts (likelihood.py)."""
    import torch

    results: list[list[float]] = [[] for _ in rows]
    was_training = model.training
    model.to(place.device).eval()
    with torch.inference_mode(), place.autocast():
        if rows and rows[0].texts:
            found = _text_scores(model, rows, pad_id, place, batch_size)
        else:
            found = _letter_scores(model, rows, pad_id, place, batch_size)
        for index, scores in found:
            results[index] = torch.softmax(scores, dim=-1).tolist()
    model.train(was_training)
    return results


def _letter_scores(
    model: Any, rows: Sequence[TrainingRow], pad_id: int, place: Placement, batch_size: int
) -> Iterator[tuple[int, "torch.Tensor"]]:
    for picked, logits in _prefilled(model, rows, pad_id, place, batch_size):
        for index, row_logits in zip(picked, logits.float(), strict=True):
            yield index, row_logits[list(rows[index].letters)]


def _text_scores(
    model: Any, rows: Sequence[TrainingRow], pad_id: int, place: Placement, batch_size: int
) -> Iterator[tuple[int, "torch.Tensor"]]:
    contiguous_head(model)
    for picked in by_length(rows, batch_size, turning_point(model)):
        packed, logits = forward_packed(model, [rows[i] for i in picked], pad_id, place.device)
        for index, scores in zip(picked, option_scores(packed, logits)[0], strict=True):
            yield index, scores[: len(rows[index].texts)]


def validate(model: Any, rows: Sequence[TrainingRow], *, pad_id: int, place: Placement) -> tuple[float, float]:
    """(accuracy, loss): the share (0 to 1) of rows whose most probable option is the label, and the mean negative
    log-probability of the label among the options, in nats."""
    probabilities = option_probabilities(model, rows, pad_id=pad_id, place=place)
    right = sum(p.index(max(p)) == row.answer for p, row in zip(probabilities, rows, strict=True))
    loss = -sum(math.log(max(p[row.answer], 1e-12)) for p, row in zip(probabilities, rows, strict=True))
    return right / len(rows), loss / len(rows)


def accuracy_of(model: Any, rows: Sequence[TrainingRow], *, pad_id: int, place: Placement) -> float:
    """Share (0 to 1) of rows whose most probable option is the label."""
    return validate(model, rows, pad_id=pad_id, place=place)[0]


def end_of_turn_id(tokenizer: Any) -> int:
    """The id of the token that ends the assistant's turn: what the chat template writes after an answer."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "A"}]
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    answered = tokenizer.apply_chat_template(messages, tokenize=False)
    if answered.startswith(asked + "A"):
        ids = tokenizer.encode(answered[len(asked) + 1 :], add_special_tokens=False)
        if ids:
            return int(ids[0])
    return int(tokenizer.eos_token_id)


def pad_id(tokenizer: Any) -> int:
    """The padding token's id; the end token's where there is none (padding is masked, so any id serves)."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def load_tokenizer(folder: Path, remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    except (OSError, ValueError) as error:
        raise TrainingError(f"base model: {folder.name} has no tokenizer that Transformers loads") from error
    if not tokenizer.chat_template:
        raise TrainingError(f"base model: {folder.name} has no chat template; choose an instruction-tuned model")
    return tokenizer


def load_model(folder: Path, adapter: Path | None = None, remote_code: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder of safetensors, in float32, an adapter merged in."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="float32",
        # On a CPU, PyTorch's fused attention is slower than plain products for prompts of some hundred tokens.
        attn_implementation="sdpa" if torch.cuda.is_available() else "eager",
        use_safetensors=True,
        trust_remote_code=remote_code,
    )
    if adapter is not None:
        import peft

        # peft freezes what an adapter is for; merged, it is a model like any other.
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().requires_grad_(True)
    return model, load_tokenizer(folder, remote_code)


def fine_tune(
    base: Path,
    adapter: Path | None,
    rows: Sequence[TrainingRow],
    validation: Sequence[TrainingRow],
    recipe: TrainingRecipe,
    out: Path,
    *,
    layers: Layers | None = None,
    healing: Sequence[HealingRecipe] = (),
    whole: bool = False,
    remote_code: bool = False,
    progress: Progress | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainingResult:
    """The fine-tuning stage: an Olive workflow over `base` (with `adapter` merged in) that goes through `healing`, each
    a cut and a training, keeps `layers` and trains.

    Writes out/model (LoRA: the model that the adapter is for) and, for LoRA, out/adapter; out/training.json, and
    out/healing-1.json and so on; and where layers were chosen, out/layers.json: those kept, cut by cut. An adapter for
    `base` as it is goes without it, unless `whole`: a reader of the checkpoint has no such `base` then."""
    from distillery import olive_passes
    from distillery.olive_workflow import run_workflow

    _require(rows)
    out.mkdir(parents=True, exist_ok=True)
    inputs = {"rows": out / "rows.jsonl", "validation": out / "validation.jsonl"}
    write_rows(rows, inputs["rows"])
    write_rows(validation, inputs["validation"])
    steps = [*((step.layers, step.training) for step in healing), (layers, recipe)]
    if any(training.hidden_weight for _, training in steps):
        inputs["hidden"] = _teachers_states(base, adapter, rows, recipe, out, remote_code)
    files = {name: str(file) for name, file in inputs.items()}
    passes: dict[str, dict[str, Any]] = {}
    for number, (cut, training) in enumerate(steps, 1):
        last = number == len(steps)
        if cut is not None or (number == 1 and adapter is not None):
            passes[f"keep_layers_{number}"] = {
                "type": "KeepLayers",
                "layers": cut.model_dump() if isinstance(cut, LayerChoice) else cut and list(cut),
                "rows": files["rows"],
                "kept": str(out / LAYERS_FILE),
            }
        passes[f"distillation_{number}"] = {
            "type": "Distillation",
            **files,
            "recipe": training.model_dump(mode="json"),
            "result": str(out / ("training.json" if last else f"healing-{number}.json")),
            "step": f"step-{number}" if healing else None,
            "healing": None if last else number,
        }
    input_model = {
        "model_path": str(base),
        "adapter_path": str(adapter) if adapter else None,
        "load_kwargs": {"trust_remote_code": remote_code},
    }
    set_progress, set_checkpoints = olive_passes.progress.set(progress), olive_passes.checkpoints.set(checkpoints)
    try:
        run_workflow(input_model, passes, out, adapter_only=recipe.adapts and len(passes) == 1 and not whole)
    finally:
        olive_passes.progress.reset(set_progress)
        olive_passes.checkpoints.reset(set_checkpoints)
        for file in inputs.values():
            file.unlink()
    return _tidied(out)


def resolved_layers(
    model: Any, layers: Sequence[int] | LayerChoice | None, rows: Sequence[TrainingRow], pad_id: int
) -> list[int]:
    """The decoder layers that `layers` names or chooses, in order; block influence is measured on some of `rows`."""
    count = len(model.get_decoder().layers)
    if not isinstance(layers, LayerChoice):
        return list(range(count) if layers is None else layers)
    if layers.by != "block_influence":
        return chosen_layers(layers, count)
    place = placement("float32")
    model.to(place.device).eval()
    picked = [rows[i * len(rows) // MOST_ROWS] for i in range(MOST_ROWS)] if len(rows) > MOST_ROWS else rows
    prompts = [[picked[i].prompt for i in part] for part in by_length(picked, 8, turning_point(model))]
    inputs = [padded_inputs(part, pad_id, place.device) for part in prompts]
    return chosen_layers(layers, count, block_influence(model, inputs))


def _teachers_states(
    base: Path, adapter: Path | None, rows: Sequence[TrainingRow], recipe: TrainingRecipe, out: Path, remote_code: bool
) -> Path:
    """A file with the hidden states of the whole start model, which is the teacher, in the rows' order."""
    from safetensors.torch import save_file

    teacher, tokenizer = load_model(base, adapter, remote_code)
    states = hidden_states(teacher, rows, pad_id=pad_id(tokenizer), place=placement(recipe.precision))
    save_file({HIDDEN: states}, out / "hidden.safetensors")
    return out / "hidden.safetensors"


def _tidied(out: Path) -> TrainingResult:
    """Takes from the files what differs between equal runs: speed, resumption, the base's path, the order of a set."""
    config = out / "adapter" / "adapter_config.json"
    for figures in [*out.glob("healing-*.json"), out / "training.json"]:
        result = TrainingResult.model_validate_json(figures.read_text())
        figures.write_text(result.model_dump_json(exclude={"rows_per_second", "resumed_at"}))
    if config.exists():
        values = json.loads(config.read_text())
        changed = {"base_model_name_or_path": None, "target_modules": sorted(values["target_modules"])}
        config.write_text(json.dumps(values | changed, indent=2))
    return result


def parts(checkpoint: Path, base: Path) -> tuple[Path, Path | None]:
    """(model folder, adapter folder or None) of a checkpoint's folder; `base` is the model where it holds none."""
    model, adapter = checkpoint / "model", checkpoint / "adapter"
    return (model if model.is_dir() else base), (adapter if adapter.is_dir() else None)


def parameter_count(folder: Path) -> int:
    """The parameters in a folder's safetensors; tied weights are stored, and counted, once."""
    from math import prod

    from safetensors import safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            count += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count


def tensor_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names += tensors.keys()
    return names


def layer_count(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    return int(config["num_hidden_layers"])
