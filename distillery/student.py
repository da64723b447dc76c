"""Training a student: base models, layer-pruned starts, and one `train` function for LoRA and full training alike.

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

from distillery.errors import StoreError, TrainingError
from distillery.prompts import TransformersTokenizer, letter_ids, render_ids
from distillery.recipe import LoraRecipe, PromptRecipe, TrainingRecipe
from distillery.records import CurvePoint, Example, Record, TeacherLabel, digest_of
from distillery.store import working_folder

if TYPE_CHECKING:
    import torch

STATE_FILE = "state.pt"
HIDDEN = "hidden"
_log = logging.getLogger(__name__)


class TrainingProgress(NamedTuple):
    """How far training is. `loss`: mean since the last report. `rows_per_second`: this process's, while it trains.
    `seconds_left`: by the clock, validation and checkpoints included."""

    step: int
    steps: int
    loss: float
    rows_per_second: float
    seconds_left: float


Progress = Callable[[TrainingProgress], None]
"""Called every 10 steps and at each epoch's end; what it raises ends the training there."""


class Checkpoints(Protocol):
    """Where training keeps what it can go on from after its process has died."""

    def save(self, folder: Path) -> None:
        """Keeps the files of `folder`, all or none, in place of what was kept before. Training goes on after a
        StoreError; whatever else is raised ends it."""

    def load(self, into: Path) -> bool:
        """Writes what is kept into the folder `into`, byte for byte; False where there is nothing whole."""


class TrainingRow(Record):
    """A rendered row. `prompt`: token ids up to the assistant's first token. `letters`: the options' token ids.
    `answer`: index of the label among them. `soft`: the teacher's probabilities over them, in the same order."""

    prompt: tuple[int, ...]
    letters: tuple[int, ...]
    answer: int
    soft: tuple[float, ...] | None = None


class TrainingResult(Record):
    """`rows_per_second` is this process's; `resumed_at` the step of the checkpoint that it went on from, 0 for none."""

    steps: int
    parameters: int
    trained_parameters: int
    curve: tuple[CurvePoint, ...]
    validation_accuracy: float | None
    device: str
    precision: str
    rows_per_second: float
    resumed_at: int = 0


def training_rows(
    examples: Sequence[Example], labels: dict[str, TeacherLabel], prompt: PromptRecipe, tokenizer: Any
) -> tuple[list[TrainingRow], list[str]]:
    """Renders the rows that have a label. Returns them, and the ids of those that are over prompt.max_tokens."""
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
                letters=tuple(letter_ids(wrapped, len(example.choices))),
                answer=example.letters.index(label.answer),
                soft=soft or None,
            )
        )
    return rows, too_long


def write_rows(rows: Sequence[TrainingRow], path: Path) -> None:
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows))


def read_rows(path: Path) -> list[TrainingRow]:
    return [TrainingRow.model_validate_json(line) for line in path.read_text().splitlines()]


def keep_layers(model: Any, layers: Sequence[int]) -> None:
    """Keeps the decoder layers `layers` of a causal language model, in that order, and drops the others in place.

    Raises TrainingError where the model has no such layer."""
    import torch

    decoder = model.get_decoder()
    count = len(decoder.layers)
    wrong = [layer for layer in layers if layer >= count]
    if wrong:
        raise TrainingError(f"student.layers: {wrong[0]} is no layer of this model, which has layers 0 to {count - 1}")
    kept = [decoder.layers[layer] for layer in layers]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    decoder.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[layer] for layer in layers]


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
        raise TrainingError("student.base: found no linear layers to adapt; use training.method: full")
    return sorted(names)


def add_lora(model: Any, recipe: LoraRecipe) -> Any:
    """`model` with a fresh LoRA adapter. Raises TrainingError where lora.target_modules names what the model lacks."""
    import peft

    known = linear_modules(model)
    targets = recipe.target_modules or known
    missing = [name for name in targets if not any(f".{n}".endswith(f".{name}") for n, _ in model.named_modules())]
    if missing:
        raise TrainingError(
            f"student.training.lora.target_modules: this model has no {', '.join(missing)}; it has {', '.join(known)}"
        )
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def answer_loss(
    logits: "torch.Tensor", rows: Sequence[TrainingRow], recipe: TrainingRecipe, end_id: int
) -> "torch.Tensor":
    """The loss on the answer alone: its letter and the end of the turn, mean over the batch.

    logits: [batch, 2, vocabulary] at the last prompt token and at the letter. For the letter, with weight w and
    temperature T: (1 - w) CE(p, label) + w T^2 KL(q_T || p_T), where q is the teacher's distribution over the options
    and p the student's, over its whole vocabulary at T = 1 and else over the options (Hinton et al., Distilling the
    Knowledge in a Neural Network, 2015; the factor T^2 keeps the gradients' size). Rows without soft labels count
    with w = 0. The end of the turn adds its cross-entropy.
    """
    import torch
    import torch.nn.functional as F

    logits = logits.float()
    device = logits.device
    targets = torch.tensor([row.letters[row.answer] for row in rows], device=device)
    hard = F.cross_entropy(logits[:, 0], targets, reduction="none", label_smoothing=recipe.label_smoothing)
    ends = torch.full_like(targets, end_id)
    turn = F.cross_entropy(logits[:, 1], ends, reduction="none")
    if recipe.soft_weight == 0:
        return (hard + turn).mean()
    letter = []
    log_vocabulary = torch.log_softmax(logits[:, 0], dim=-1)
    for index, row in enumerate(rows):
        if row.soft is None:
            letter.append(hard[index])
            continue
        columns = torch.tensor(row.letters, device=device)
        teacher = torch.tensor(row.soft, device=device).clamp_min(1e-8)
        if recipe.temperature == 1:
            student = log_vocabulary[index, columns]
        else:
            teacher = torch.softmax(teacher.log() / recipe.temperature, dim=-1)
            student = torch.log_softmax(logits[index, 0, columns] / recipe.temperature, dim=-1)
        divergence = (teacher * (teacher.log() - student)).sum() * recipe.temperature**2
        letter.append((1 - recipe.soft_weight) * hard[index] + recipe.soft_weight * divergence)
    return (torch.stack(letter) + turn).mean()


def hidden_loss(student: "torch.Tensor", teacher: "torch.Tensor") -> "torch.Tensor":
    """1 - cosine of the two models' hidden states, [batch, hidden], mean over the batch: the cosine term of Sanh et
    al., DistilBERT, 2019. The states are those that the head reads at the last prompt token, so that a student that
    keeps its teacher's head learns all that the answer is made of, where a few options' probabilities tell little."""
    import torch.nn.functional as F

    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def batch_inputs(rows: Sequence[TrainingRow], pad_id: int, device: str, answers: bool = True) -> dict[str, Any]:
    """Left-padded model inputs, [batch, longest]: each prompt and, with `answers`, its letter."""
    import torch

    ids = [list(row.prompt) + ([row.letters[row.answer]] if answers else []) for row in rows]
    longest = max(map(len, ids))
    tokens = torch.tensor([[pad_id] * (longest - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "use_cache": False}


def batches(rows: Sequence[TrainingRow], size: int, seed: int, epoch: int) -> list[list[TrainingRow]]:
    """An epoch in batches of like length: rows shuffled, sorted within windows of 16 batches, batches shuffled."""
    import random

    order = random.Random(f"{seed}/{epoch}")  # noqa: S311 - no secret, a reproducible order
    shuffled = list(rows)
    order.shuffle(shuffled)
    window = size * 16
    grouped: list[list[TrainingRow]] = []
    for start in range(0, len(shuffled), window):
        part = sorted(shuffled[start : start + window], key=lambda row: len(row.prompt))
        grouped += [part[i : i + size] for i in range(0, len(part), size)]
    order.shuffle(grouped)
    return grouped


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
    if not head._forward_pre_hooks:
        head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].contiguous(),))


@dataclass
class _State:
    """What training goes on from. `fingerprint`: the digest of all that a checkpoint must have been made with;
    `losses`: those since the curve's last point."""

    fingerprint: str
    weights: "dict[str, torch.nn.Parameter]"
    optimiser: "torch.optim.Optimizer"
    schedule: "torch.optim.lr_scheduler.LRScheduler"
    step: int = 0
    curve: list[CurvePoint] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

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
        torch.set_rng_state(kept["random"])
        if kept["cuda_random"] is not None:
            torch.cuda.set_rng_state(kept["cuda_random"])
        _log.info("training goes on from its checkpoint at step %d", self.step)


def _fingerprint(
    rows: Sequence[TrainingRow], validation: Sequence[TrainingRow], settings: list[Any], weights: dict[str, Any]
) -> str:
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    return digest_of([[row.model_dump() for row in part] for part in (rows, validation)] + [settings, shapes])


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
) -> tuple[Any, TrainingResult]:
    """Trains `model` (a causal language model in float32) on `rows`; returns it and the figures. `hidden`: the
    teacher's hidden states for these rows, [rows, hidden], which recipe.hidden_weight asks for.

    Goes on from the checkpoint, where there is one that fits, and saves one every `checkpoint_every_s` seconds, less
    often where saving would take more than 2 % of the time. Deterministic on a CPU for equal inputs, seed and thread
    count, however often it was killed. Raises TrainingError for no rows or a loss that is no number."""
    import torch

    if not rows:
        raise TrainingError("no row to train on: every label was rejected or every prompt is over prompt.max_tokens")
    torch.manual_seed(recipe.seed)
    place = placement(recipe.precision)
    if recipe.method == "lora":
        # The frozen base is cast once, not at every step; peft keeps the adapter itself in float32.
        model = add_lora(model.to(getattr(torch, place.precision)), recipe.lora)
    elif recipe.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    model.to(place.device).train()
    contiguous_head(model)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    trained = list(weights.values())
    per_epoch = math.ceil(len(rows) / recipe.batch_size)
    steps = recipe.max_steps or max(1, math.ceil(per_epoch * recipe.epochs))
    # Fused, on a CPU too: one pass over the weights in place of a dozen.
    optimiser = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warmup_cosine(steps, recipe.warmup))
    settings = [recipe.model_dump(mode="json"), place.device, place.precision, pad_id, end_id]
    state = _State(_fingerprint(rows, validation, settings, weights), weights, optimiser, schedule)
    if checkpoints:
        state.resume(checkpoints)
    matched = {} if hidden is None else dict(zip((row.prompt for row in rows), hidden.to(place.device), strict=True))
    resumed_at, accuracy = state.step, None
    began = time.perf_counter()
    trained_seconds, seen, due = 0.0, 0, began + checkpoint_every_s
    for step, batch in enumerate(islice(_endless(rows, recipe), resumed_at, None), start=resumed_at + 1):
        started = time.perf_counter()
        with place.autocast(), _read_by_head(model) as states:
            logits = model(**batch_inputs(batch, pad_id, place.device), logits_to_keep=2).logits
        loss = answer_loss(logits, batch, recipe, end_id)
        if matched:
            targets = torch.stack([matched[row.prompt] for row in batch])
            loss = loss + recipe.hidden_weight * hidden_loss(states[0][:, 0], targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        state.step = step
        state.losses.append(loss.item())
        trained_seconds += time.perf_counter() - started
        seen += len(batch)
        if not math.isfinite(state.losses[-1]):
            raise TrainingError(f"the loss is {state.losses[-1]} at step {step}; lower student.training.learning_rate")
        epoch_ends = step % per_epoch == 0 or step == steps
        if epoch_ends and validation:
            accuracy = accuracy_of(model, validation, pad_id=pad_id, place=place)
        if epoch_ends or len(state.losses) == 10:
            mean = sum(state.losses) / len(state.losses)
            state.curve.append(CurvePoint(step=step, loss=mean, validation_accuracy=accuracy if epoch_ends else None))
            state.losses = []
            if progress:
                left = (steps - step) * (time.perf_counter() - began) / (step - resumed_at)
                progress(TrainingProgress(step, steps, mean, seen / trained_seconds, left))
        if step == steps:
            break
        if checkpoints and (started := time.perf_counter()) >= due:
            state.keep(checkpoints)
            due = time.perf_counter() + max(checkpoint_every_s, 50 * (time.perf_counter() - started))
    return model, TrainingResult(
        steps=steps,
        # An adapter is merged in the end and adds none.
        parameters=sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name),
        trained_parameters=sum(p.numel() for p in trained),
        curve=tuple(state.curve),
        validation_accuracy=accuracy,
        device=place.device,
        precision=place.precision,
        rows_per_second=seen / trained_seconds,
        resumed_at=resumed_at,
    )


def _endless(rows: Sequence[TrainingRow], recipe: TrainingRecipe) -> Iterator[list[TrainingRow]]:
    epoch = 0
    while True:
        yield from batches(rows, recipe.batch_size, recipe.seed, epoch)
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
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        inputs = batch_inputs([rows[i] for i in picked], pad_id, place.device, answers=False)
        yield picked, model(**inputs, logits_to_keep=1).logits[:, -1]


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
    """For each row the probabilities over its options: softmax over its letters' logits after one prefill."""
    import torch

    results: list[list[float]] = [[] for _ in rows]
    was_training = model.training
    model.eval()
    with torch.inference_mode(), place.autocast():
        for picked, logits in _prefilled(model, rows, pad_id, place, batch_size):
            for index, row_logits in zip(picked, logits.float(), strict=True):
                results[index] = torch.softmax(row_logits[list(rows[index].letters)], dim=-1).tolist()
    model.train(was_training)
    return results


def accuracy_of(model: Any, rows: Sequence[TrainingRow], *, pad_id: int, place: Placement) -> float:
    """Share (0 to 1) of rows whose most probable option is the label."""
    probabilities = option_probabilities(model, rows, pad_id=pad_id, place=place)
    right = sum(p.index(max(p)) == row.answer for p, row in zip(probabilities, rows, strict=True))
    return right / len(rows)


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
        raise TrainingError(f"student.base: {folder.name} has no tokenizer that Transformers loads") from error
    if not tokenizer.chat_template:
        raise TrainingError(f"student.base: {folder.name} has no chat template; choose an instruction-tuned model")
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

        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model, load_tokenizer(folder, remote_code)


def fine_tune(
    base: Path,
    adapter: Path | None,
    rows: Sequence[TrainingRow],
    validation: Sequence[TrainingRow],
    recipe: TrainingRecipe,
    out: Path,
    *,
    layers: Sequence[int] | None = None,
    remote_code: bool = False,
    progress: Progress | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainingResult:
    """The fine-tuning stage: an Olive workflow over `base` (with `adapter` merged in) that keeps `layers` and trains.

    Writes out/model (LoRA: the model that the adapter is for) and, for LoRA, out/adapter; out/training.json."""
    from distillery import olive_passes
    from distillery.olive_workflow import run_workflow

    out.mkdir(parents=True, exist_ok=True)
    rows_file, validation_file = out / "rows.jsonl", out / "validation.jsonl"
    write_rows(rows, rows_file)
    write_rows(validation, validation_file)
    hidden_file = _teachers_states(base, adapter, rows, recipe, out, remote_code) if recipe.hidden_weight else None
    passes: dict[str, dict[str, Any]] = {}
    if layers is not None or adapter is not None:
        model_layers = layers if layers is not None else range(layer_count(base))
        passes["keep_layers"] = {"type": "KeepLayers", "layers": list(model_layers)}
    passes["distillation"] = {
        "type": "Distillation",
        "rows": str(rows_file),
        "validation": str(validation_file),
        "hidden": str(hidden_file) if hidden_file else None,
        "recipe": recipe.model_dump(mode="json"),
        "result": str(out / "training.json"),
    }
    input_model = {
        "model_path": str(base),
        "adapter_path": str(adapter) if adapter else None,
        "load_kwargs": {"trust_remote_code": remote_code},
    }
    set_progress, set_checkpoints = olive_passes.progress.set(progress), olive_passes.checkpoints.set(checkpoints)
    try:
        only = recipe.method == "lora" and "keep_layers" not in passes
        run_workflow(input_model, passes, out, adapter_only=only)
    finally:
        olive_passes.progress.reset(set_progress)
        olive_passes.checkpoints.reset(set_checkpoints)
        rows_file.unlink()
        validation_file.unlink()
        if hidden_file:
            hidden_file.unlink()
    return _tidied(out)


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
    figures, config = out / "training.json", out / "adapter" / "adapter_config.json"
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
