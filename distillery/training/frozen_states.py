"""The states that enter the first trained layer, computed once for all epochs.

Below that layer nothing is trained, and what the layers there make of a token depends on the tokens
before it alone. Their states are computed before the first step and kept by the tokens that lead to
them, so that beginnings that rows share are kept once. Every pass afterwards skips the frozen
layers: the first trained one reads what is kept. Masks, positions and caches stay with the model's
own code.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch

from distillery.models.device import Device
from distillery.training.batching import by_length, by_tokens, shared_inputs, turning_point
from distillery.training.hidden_states import states_read_by_head
from distillery.training.likelihood import pack_shared
from distillery.training.rows import TrainingRow

_log = logging.getLogger(__name__)

MOST_BYTES = 2**30
"""How much memory the kept states take, at most. Beyond it, every pass computes them anew."""

NODE_BYTES = 170
"""What the number of a beginning takes in memory, beside its state."""

ANEW = "frozen layers are computed in every epoch"

REFUSALS = (AttributeError, IndexError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model raises whose code is not made of layers that can be skipped."""

TEXTS_OR_REASONS = 16
"""Rows in a batch whose options' texts, or the teacher's reasons, go through the frozen layers."""

COMPARED_ROWS = 8

LARGEST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.05}
"""By precision: how far the states that the head reads may be from those without kept states, as a
share of their norm. Rounding alone makes a tenth of it."""


class FrozenStates:
    """The states that enter layer `frozen` of a decoder, by the tokens that lead to each.

    `nodes` numbers the beginnings of all sequences: a beginning is the number of the one before it,
    0 for none, and its last token. `table`: the states by that number, [beginnings + 1, hidden],
    in main memory."""

    def __init__(self, model: Any, frozen: int, pad_id: int) -> None:
        self.decoder = model.get_decoder()
        layers = dict(enumerate(self.decoder.layers))
        self.below = {number: layer for number, layer in layers.items() if number < frozen}
        self.above = {number: layer for number, layer in layers.items() if number >= frozen}
        self.first = layers[frozen]
        self.pad_id = pad_id
        self.nodes: dict[tuple[int, int], int] = {}
        self.table = torch.empty(0)
        self.kept: set[int] = set()
        # The beginning that a cache holds for all rows: its length and its number.
        self.held: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()
        self.numbers = torch.empty(0)

    def add(self, ids: Sequence[int]) -> None:
        """Number the beginnings of a sequence."""
        node = 0
        for token in ids:
            node = self.nodes.setdefault((node, token), len(self.nodes) + 1)

    def find(self, _decoder: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        """Find the numbers of the tokens that the decoder is given, [batch, length]; 0 for padding
        (a forward pre-hook)."""
        tokens, cache = kwargs["input_ids"], kwargs.get("past_key_values")
        length, start = self.held.get(cache, (0, 0)) if cache is not None else (0, 0)
        places = kwargs.get("position_ids")
        if places is None:
            places = torch.arange(tokens.shape[1]).expand(tokens.shape)
        # The mask of packed options has another shape. There, padding sees itself alone, and so
        # has the state of a row's first token.
        mask, real = kwargs.get("attention_mask"), torch.ones_like(tokens)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            real = mask[:, -tokens.shape[1] :]
        numbers = []
        for row, positions, is_real in zip(
            tokens.tolist(), places.tolist(), real.tolist(), strict=True
        ):
            path: list[int] = []
            found = []
            for token, position, counts in zip(row, positions, is_real, strict=True):
                if not counts or position < length:
                    found.append(0)
                    continue
                # An option begins where the one before it did.
                del path[position - length :]
                before = path[-1] if path else start
                node = self.nodes.get((before, token), 0)
                if not node and token != self.pad_id:
                    raise LookupError("a token has no kept state")
                path.append(node)
                found.append(node)
            numbers.append(found)
        self.numbers = torch.tensor(numbers)
        if cache is not None and cache not in self.held:
            self.held[cache] = (tokens.shape[1], numbers[0][-1])

    def keep(self, _layer: Any, args: Any) -> None:
        """Keep the states that enter the first trained layer (a forward pre-hook)."""
        states = args[0].flatten(0, 1).cpu()
        if not len(self.table):
            shape = (len(self.nodes) + 1, states.shape[-1])
            self.table = torch.zeros(shape, dtype=states.dtype)
        rows, nodes = [], []
        for row, node in enumerate(self.numbers.flatten().tolist()):
            if node and node not in self.kept:
                self.kept.add(node)
                rows.append(row)
                nodes.append(node)
        self.table[nodes] = states[rows]

    def read(self, _layer: Any, args: Any) -> Any:
        """Give the first trained layer the kept states (a forward pre-hook)."""
        return (self.table[self.numbers].to(args[0].device), *args[1:])

    @contextmanager
    def computed(self) -> Iterator[None]:
        """Keep the states of the passes within, which go through the frozen layers alone."""
        with torch.no_grad(), skipped(self.above), self.hooked(self.keep):
            yield

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the passes within start from the kept states."""
        with skipped(self.below), self.hooked(self.read):
            yield

    @contextmanager
    def hooked(self, at_first: Callable[..., Any]) -> Iterator[None]:
        """Call `find` before each pass within, and `at_first` where it enters the first trained
        layer."""
        hooks = [
            self.decoder.register_forward_pre_hook(self.find, with_kwargs=True),
            self.first.register_forward_pre_hook(at_first),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def skipped(layers: dict[int, Any]) -> Iterator[None]:
    """Let decoder layers, by number, return what they are given within."""
    for number, layer in layers.items():
        layer.forward = partial(hand_on, number)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def hand_on(
    number: int, states: torch.Tensor, *_args: Any, past_key_values: Any = None, **_kwargs: Any
) -> torch.Tensor:
    """Return `states`. A cache counts their tokens for layer `number`, since masks go by that."""
    if past_key_values is not None:
        counted = states.new_zeros(len(states), 1, states.shape[1], 1)
        past_key_values.update(counted, counted, number)
    return states


def frozen_layers(model: Any) -> int:
    """Return how many decoder layers, from the first, are not trained; 0 where the embeddings
    are."""
    if model.get_input_embeddings().weight.requires_grad:
        return 0
    count = 0
    for layer in model.get_decoder().layers:
        if any(weight.requires_grad for weight in layer.parameters()):
            break
        count += 1
    return count


@contextmanager
def frozen_states_kept(
    model: Any,
    rows: Sequence[TrainingRow],
    validation: Sequence[TrainingRow],
    loss: Callable[[Sequence[TrainingRow]], Any],
    *,
    pad_id: int,
    device: Device,
) -> Iterator[None]:
    """Compute the frozen layers' states of `rows`, and let the passes within start from them.

    Nothing changes where no layer is frozen, and, with a line in the log, where the states would
    take more than MOST_BYTES or a batch's numbers are others than without them. `loss`: the
    objective, by which a batch of `rows` is compared."""
    frozen = frozen_layers(model)
    states = None
    if 0 < frozen < len(model.get_decoder().layers):
        # What is random in training stays as it is without this.
        gpus = [torch.cuda.current_device()] if device.name == "cuda" else []
        with torch.random.fork_rng(gpus):
            states = computed_states(model, frozen, rows, validation, pad_id, device)
            if states and not agrees(model, states, compared_rows(rows), loss, device):
                states = None
    if states is None:
        yield
        return
    with states.used():
        yield


def computed_states(
    model: Any,
    frozen: int,
    rows: Sequence[TrainingRow],
    validation: Sequence[TrainingRow],
    pad_id: int,
    device: Device,
) -> FrozenStates | None:
    """Return the states of all rows that enter layer `frozen`; None where they would be too large,
    or the rows too long."""
    states = FrozenStates(model, frozen, pad_id)
    turn = turning_point(model)
    embeddings = model.get_input_embeddings().weight
    bytes_each = NODE_BYTES + embeddings.shape[-1] * embeddings.element_size()
    for row in chain(rows, validation):
        for ids in sequences_of(row):
            if turn and len(ids) > turn:
                _log.info("%s: some rows have over %d tokens", ANEW, turn)
                return None
            states.add(ids)
        if len(states.nodes) * bytes_each > MOST_BYTES:
            _log.info("%s: their states would take over %.1f GiB", ANEW, MOST_BYTES / 2**30)
            return None
    try:
        with states.computed(), device.autocast():
            for inputs in inputs_of(model, [*rows, *validation], pad_id):
                states.decoder(**inputs)
    except REFUSALS as error:
        _log.info(
            "%s: this model's code does not start from kept states (%s)", ANEW, type(error).__name__
        )
        return None
    return states


def agrees(
    model: Any,
    states: FrozenStates,
    rows: Sequence[TrainingRow],
    loss: Callable[[Sequence[TrainingRow]], Any],
    device: Device,
) -> bool:
    """Return whether a pass over `rows` from the kept states is the one without them, and tell of
    it in the log."""
    try:
        gap = difference(model, states, rows, loss)
    except REFUSALS as error:
        _log.info(
            "%s: this model's code does not start from kept states (%s)", ANEW, type(error).__name__
        )
        return False
    if gap > LARGEST_DIFFERENCE[device.precision]:
        _log.info(
            "%s: from kept states, this model's last states would be others by %.3f of their norm",
            ANEW,
            gap,
        )
        return False
    _log.info(
        "%d frozen layers are computed once: their states take %.0f MiB of memory",
        len(states.below),
        states.table.nbytes / 2**20,
    )
    return True


def sequences_of(row: TrainingRow) -> Iterator[tuple[int, ...]]:
    """Give the sequences of tokens that a training computes of a row."""
    if row.texts:
        for text in row.texts:
            yield (*row.prompt, *text)
    else:
        yield answered(row)
    if row.rationale:
        yield row.explain + row.rationale


def answered(row: TrainingRow) -> tuple[int, ...]:
    """Return a row's prompt and the written answer or the letter after it; after a prompt about
    classes comes nothing."""
    if row.closed:
        return row.prompt
    return row.prompt + (row.target or (row.letters[row.answer],))


def inputs_of(model: Any, rows: Sequence[TrainingRow], pad_id: int) -> Iterator[dict[str, Any]]:
    """Give the decoder's inputs for all sequences of `rows`, in batches that depend on `rows`
    alone, so that a training that goes on from a checkpoint finds the very same states."""
    for picked in by_length(rows, TEXTS_OR_REASONS) if rows[0].texts else by_tokens(rows):
        batch = [rows[index] for index in picked]
        if batch[0].texts:
            yield pack_shared(model, batch, pad_id).inputs
        else:
            yield shared_inputs(model, [answered(row) for row in batch], pad_id, 1)
    reasons = [row.explain + row.rationale for row in rows if row.rationale]
    for start in range(0, len(reasons), TEXTS_OR_REASONS):
        yield shared_inputs(model, reasons[start : start + TEXTS_OR_REASONS], pad_id, 1)


def compared_rows(rows: Sequence[TrainingRow]) -> list[TrainingRow]:
    """Return rows of all lengths, from the shortest to the longest."""
    ordered = sorted(range(len(rows)), key=lambda index: len(rows[index].prompt))
    count = min(len(ordered), COMPARED_ROWS)
    picked = [ordered[index * (len(ordered) - 1) // max(count - 1, 1)] for index in range(count)]
    return [rows[index] for index in picked]


def difference(
    model: Any,
    states: FrozenStates,
    rows: Sequence[TrainingRow],
    loss: Callable[[Sequence[TrainingRow]], Any],
) -> float:
    """Return how far the states that the head reads are from those without kept states, as a share
    of their norm."""
    trained_below = []
    hook = states.first.register_forward_pre_hook(
        lambda _layer, args: trained_below.append(args[0].requires_grad)
    )
    try:
        expected = last_states(model, rows, loss)
    finally:
        hook.remove()
    if any(trained_below):
        raise ValueError("something below the first trained layer is trained")
    with states.used():
        found = last_states(model, rows, loss)
    return float((found - expected).norm() / expected.norm())


def last_states(
    model: Any, rows: Sequence[TrainingRow], loss: Callable[[Sequence[TrainingRow]], Any]
) -> torch.Tensor:
    """Return what the head reads at the last prompt tokens or, where answers are written, at the
    last tokens: [batch, hidden], with the same random numbers in every call."""
    torch.manual_seed(0)
    with states_read_by_head(model) as read:
        loss(rows)
    # Of a short answer, the first state may be that of padding.
    position = -1 if rows[0].target else 0
    last: torch.Tensor = read[0][:, position].detach().float()
    return last
