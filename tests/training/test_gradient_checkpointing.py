"""Gradient checkpointing: the training without it, in less memory."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from row_forms import row_forms

from distillery.errors import TrainingError
from distillery.models.device import Device
from distillery.models.load import load_model
from distillery.recipe import TrainingRecipe
from distillery.training.loop import set_up, train, trainable_model
from distillery.training.rows import TrainingRow

TinyModel = Callable[[str], Path]

SHARED = tuple(range(20, 100))
FORMS = row_forms(SHARED)


def rows_of(form: str) -> list[TrainingRow]:
    """Return rows that begin alike for long enough to be computed from a shared prefix."""
    rows = []
    for number in range(8):
        prompt = (*SHARED, 100 + number, *range(200, 200 + number))
        rows.append(TrainingRow(prompt=prompt, answer=number % 3, **FORMS[form]))
    return rows


def recipe(**more: Any) -> TrainingRecipe:
    values = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "precision": "float32"}
    return TrainingRecipe.model_validate({"rationale_weight": 0.5, **values, **more})


def trained(
    folder: Path, form: str, settings: TrainingRecipe
) -> tuple[list[float], dict[str, torch.Tensor], int, int]:
    """Train a model; return the losses, the weights, how often its last layer was computed again in
    a backward pass, and how often its first layer was computed in a forward pass."""
    again = first = 0

    def last_called(*_: Any) -> None:
        nonlocal again
        # -1 is the id outside a backward pass.
        again += torch._C._current_graph_task_id() != -1

    def first_called(*_: Any) -> None:
        nonlocal first
        first += torch._C._current_graph_task_id() == -1

    model, _ = load_model(folder)
    model.get_decoder().layers[0].mlp.register_forward_hook(first_called)
    model.get_decoder().layers[-1].mlp.register_forward_pre_hook(last_called)
    rows = rows_of(form)
    model, result = train(model, rows, rows[:4], settings, pad_id=0, end_id=2)
    losses = []
    for point in result.curve:
        assert point.validation_loss is not None
        losses += [point.loss, point.validation_loss]
    return losses, dict(model.named_parameters()), again, first


@pytest.mark.parametrize(
    ("arch", "form", "settings"),
    [
        ("llama", "letters", {"method": "lora"}),
        ("llama", "classes", {"method": "full"}),
        ("phi4mini", "texts", {"method": "lora"}),
        ("qwen2", "letters", {"method": "dora"}),
        ("qwen2", "letters", {"method": "qlora"}),
        # The layers below the first that is trained are computed once for both epochs.
        ("llama", "texts", {"method": "full", "first_layer": 1}),
        ("phi4mini", "letters", {"method": "lora", "first_layer": 1}),
    ],
)
def test_training_is_the_same_up_to_rounding(
    tiny_model: TinyModel,
    arch: str,
    form: str,
    settings: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "distillery.training.frozen_states")
    folder = tiny_model(arch)
    losses, weights, never, first = trained(folder, form, recipe(**settings))
    found, others, again, as_often = trained(
        folder, form, recipe(gradient_checkpointing=True, **settings)
    )
    assert found == pytest.approx(losses, rel=1e-4)
    assert found[0] != found[2], "else this test would see nothing"
    apart = sum(int(((weights[name] - others[name]).abs() > 1e-4).sum()) for name in weights)
    # Adam's first steps are as long for a gradient of almost 0, whose sign is a matter of rounding.
    assert apart < 1e-3 * sum(weight.numel() for weight in weights.values())
    batches = 4
    assert (never, again) == (0, 2 * batches if form == "texts" else batches)
    # In training, what all rows begin with is no longer computed apart.
    assert as_often < first
    kept = [record for record in caplog.records if "are computed once" in record.getMessage()]
    assert len(kept) == (2 if settings.get("first_layer") else 0)


def test_dropout_is_the_same_in_both_passes(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What rows share would otherwise be dropped once for all of them, and here for each.
    monkeypatch.setattr("distillery.training.batching.LEAST_SAVED", 10**9)
    found = []
    for checkpointing in (False, True):
        settings = recipe(lora={"dropout": 0.3}, gradient_checkpointing=checkpointing)
        found.append(trained(tiny_model("llama"), "letters", settings))
    (losses, weights, _, _), (others, found_weights, _, _) = found
    assert losses == others
    assert all(torch.equal(weights[name], found_weights[name]) for name in weights)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_pass_keeps_less_for_the_way_back(tiny_model: TinyModel, method: str) -> None:
    kept: dict[bool, int] = {}
    rows = rows_of("letters")
    for checkpointing in (False, True):
        model, _ = load_model(tiny_model("llama"))
        settings = recipe(method=method, gradient_checkpointing=checkpointing)
        training = set_up(model, rows, [], settings, None, 0, 2)
        weights = {weight.data_ptr() for weight in model.parameters()}
        sizes: dict[int, int] = {}

        def keep(
            tensor: torch.Tensor, sizes: dict[int, int] = sizes, weights: set[int] = weights
        ) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if tensor.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = training.objective(rows)
        kept[checkpointing] = sum(sizes.values())
        loss.backward()  # type: ignore[no-untyped-call]
    assert 0 < kept[True] < kept[False] / 2


def test_a_model_whose_code_has_none_is_one_line(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_model(tiny_model("llama"))
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    settings = recipe(method="full", gradient_checkpointing=True)
    with pytest.raises(TrainingError, match=r"^training\.gradient_checkpointing: this model's"):
        trainable_model(model, settings, Device("cpu", "float32"))
