"""Frozen layers are computed once: the same training up to rounding, and when it is left alone."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_folder import OneFolder
from row_forms import row_forms

from distillery.models.load import load_model
from distillery.recipe import TrainingRecipe
from distillery.training import frozen_states
from distillery.training.loop import TrainingProgress, TrainingResult, train
from distillery.training.rows import TrainingRow

TinyModel = Callable[[str], Path]
SHARED = tuple(range(20, 60))
PROMPTS = [
    *((*SHARED, 100 + number, *range(200, 200 + number)) for number in range(8)),
    # They begin with the token that pads the others.
    (0, 5, 9, 300),
    (0, 5, 7),
    (6, 2, 41, 8, 8, 8, 7, 7, 300, 301),
]
FORMS = row_forms(SHARED)


def rows_of(form: str) -> list[TrainingRow]:
    rows = []
    for number, prompt in enumerate(PROMPTS):
        rows.append(TrainingRow(prompt=prompt, answer=number % 3, **FORMS[form]))
    return rows


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines about frozen layers."""
    name = "distillery.training.frozen_states"
    return [record.getMessage() for record in caplog.records if record.name == name]


def recipe(**more: Any) -> TrainingRecipe:
    values = {"method": "full", "first_layer": 1, "epochs": 3, "batch_size": 4}
    rates = {"learning_rate": 1e-3, "precision": "float32", "rationale_weight": 0.5}
    return TrainingRecipe.model_validate({**values, **rates, **more})


def trained(
    model: Any, rows: list[TrainingRow], settings: TrainingRecipe, **more: Any
) -> tuple[TrainingResult, int]:
    """Train `model`; return the figures, and how often its lowest layer was computed."""
    count = 0

    def called(*_: Any) -> None:
        nonlocal count
        count += 1

    hook = model.get_decoder().layers[0].mlp.register_forward_hook(called)
    _, result = train(model, rows, rows[:6], settings, pad_id=0, end_id=2, **more)
    hook.remove()
    return result, count


def losses(result: TrainingResult) -> list[float]:
    found = []
    for point in result.curve:
        assert point.validation_loss is not None
        found += [point.loss, point.validation_loss]
    return found


def both_ways(
    folder: Path, form: str, settings: TrainingRecipe, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    """Train with kept states and without; check that the figures are the same up to rounding, and
    return how often the lowest layer was computed in each."""
    with monkeypatch.context() as none_kept:
        none_kept.setattr(frozen_states, "MOST_BYTES", 0)
        without, often = trained(load_model(folder)[0], rows_of(form), settings)
    kept, rarely = trained(load_model(folder)[0], rows_of(form), settings)
    assert losses(kept) == pytest.approx(losses(without), rel=1e-4)
    assert losses(kept)[0] != losses(kept)[-2], "else this test would see nothing"
    return rarely, often


@pytest.mark.parametrize(
    ("arch", "form", "method"),
    [
        *(("llama", form, method) for form in FORMS for method in ("lora", "full")),
        ("phi3", "letters", "lora"),
        ("phi3", "letters", "qlora"),
        ("phi4mini", "texts", "full"),
        ("qwen2", "classes", "lora"),
        ("qwen3", "letters", "full"),
    ],
)
def test_training_from_kept_states_is_the_same_up_to_rounding(
    tiny_model: TinyModel, arch: str, form: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rarely, often = both_ways(tiny_model(arch), form, recipe(method=method), monkeypatch)
    assert rarely < often / 2


def test_validation_rows_need_no_states_of_the_teacher(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = load_model(tiny_model("llama"))
    rows = rows_of("letters")
    hidden = torch.zeros(len(rows) - 4, model.config.hidden_size)
    with caplog.at_level(logging.INFO, "distillery.training.frozen_states"):
        settings = recipe(hidden_weight=1.0)
        train(model, rows[4:], rows[:4], settings, pad_id=0, end_id=2, hidden=hidden)
    assert "computed once" in said(caplog)[0]


def test_layers_with_and_without_a_sliding_window_keep_their_masks(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(tiny_model("qwen2"))
    model.config.sliding_window = 16
    model.config.use_sliding_window = True
    model.config.layer_types = ["sliding_attention", "full_attention"]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rarely, often = both_ways(tmp_path, "texts", recipe(), monkeypatch)
    assert rarely < often / 2


def test_the_adapters_dropout_is_drawn_as_without(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(method="lora", lora={"dropout": 0.5})
    rarely, often = both_ways(tiny_model("llama"), "letters", settings, monkeypatch)
    assert rarely < often / 2


@pytest.mark.parametrize("form", ["letters", "texts"])
def test_training_that_was_ended_goes_on_to_the_very_same_weights(
    tiny_model: TinyModel, form: str, tmp_path: Path
) -> None:
    rows, kept = rows_of(form), OneFolder(tmp_path / "kept")

    def end(report: TrainingProgress) -> None:
        if report.step >= 6:
            raise KeyboardInterrupt

    def weights(**more: Any) -> dict[str, torch.Tensor]:
        model, _ = load_model(tiny_model("llama"))
        trained(model, rows, recipe(), **more)
        state: dict[str, torch.Tensor] = model.state_dict()
        return state

    with pytest.raises(KeyboardInterrupt):
        weights(progress=end, checkpoints=kept, checkpoint_every_s=0)
    assert kept.path.exists()
    resumed, straight = weights(checkpoints=kept), weights()
    for name, weight in straight.items():
        assert torch.equal(resumed[name], weight), name


def test_the_model_is_as_before_when_training_ends(tiny_model: TinyModel) -> None:
    model, _ = load_model(tiny_model("llama"))
    trained(model, rows_of("letters"), recipe())
    for layer in model.get_decoder().layers:
        assert "forward" not in vars(layer)
        assert not layer._forward_pre_hooks
    assert not model.get_decoder()._forward_pre_hooks


@pytest.mark.parametrize(
    "settings", [{"first_layer": 0}, {"method": "lora", "first_layer": 0}, {"epochs": 1}]
)
def test_nothing_is_kept_where_nothing_is_frozen_or_computed_twice(
    tiny_model: TinyModel, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*_: Any) -> None:
        raise AssertionError("states were computed")

    monkeypatch.setattr(frozen_states, "computed_states", unwanted)
    trained(load_model(tiny_model("llama"))[0], rows_of("letters"), recipe(**settings))


def random_below(model: Any) -> None:
    model.get_decoder().layers[0].mlp.act_fn = torch.nn.Sequential(
        torch.nn.SiLU(), torch.nn.Dropout(0.5)
    )


def embedded_before(model: Any) -> None:
    """The decoder is given no tokens, as in models whose embeddings stand before it."""
    embed = model.get_input_embeddings()

    def embedded(_decoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "input_ids": None, "inputs_embeds": embed(kwargs["input_ids"])}

    model.get_decoder().register_forward_pre_hook(embedded, with_kwargs=True)


def trained_below(model: Any) -> None:
    """Something other than embeddings and layers is trained below the frozen layer."""
    scale = torch.nn.Parameter(torch.ones(()))
    model.get_decoder().register_parameter("scale", scale)
    model.get_input_embeddings().register_forward_hook(lambda _, _args, output: output * scale)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (random_below, r"this model's last states would be others by \d\.\d+ of their norm"),
        (embedded_before, r"does not start from kept states \(TypeError\)"),
        (trained_below, r"does not start from kept states \(ValueError\)"),
    ],
)
def test_a_model_that_can_not_start_from_kept_states_is_trained_as_before(
    tiny_model: TinyModel,
    change: Callable[[Any], None],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def losses_of_changed() -> list[float]:
        model, _ = load_model(tiny_model("llama"))
        change(model)
        return losses(trained(model, rows_of("letters"), recipe())[0])

    with caplog.at_level(logging.INFO, "distillery.training.frozen_states"):
        found = losses_of_changed()
    (line,) = said(caplog)
    assert re.search(why, line), line
    monkeypatch.setattr(frozen_states, "MOST_BYTES", 0)
    assert losses_of_changed() == found, "to the last bit, with the same random numbers"


def test_states_that_would_take_too_much_memory_are_not_kept(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(frozen_states, "MOST_BYTES", 10_000)
    with caplog.at_level(logging.INFO, "distillery.training.frozen_states"):
        trained(load_model(tiny_model("llama"))[0], rows_of("letters"), recipe())
    assert said(caplog) == [
        "frozen layers are computed in every epoch: their states would take over 0.0 GiB"
    ]


def test_states_on_both_sides_of_where_the_rotary_factors_turn_are_not_kept(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    """What layers make of a token then depends on how long the row is."""
    rows = rows_of("letters")
    rows[0] = rows[0].model_copy(update={"prompt": SHARED * 13})
    with caplog.at_level(logging.INFO, "distillery.training.frozen_states"):
        trained(load_model(tiny_model("phi4mini"))[0], rows, recipe(epochs=2))
    assert said(caplog) == [
        "frozen layers are computed in every epoch: some rows have over 512 tokens"
    ]
