"""Weights that are loaded in bfloat16, as on a GPU: the same as cast ones, an adapter merged in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distillery.evaluation.predictors import load_predictor
from distillery.evaluation.scoring import ModelToScore, ScoringJob
from distillery.models.device import Device, choose_device
from distillery.models.load import load_model, pad_id
from distillery.recipe import PromptRecipe, TrainingRecipe
from distillery.training.fine_tune import fine_tune
from distillery.training.loop import train
from distillery.training.rows import TrainingRow

TinyModel = Callable[[str], Path]

GPU = Device("cuda", "bfloat16")

ROWS = [
    TrainingRow(prompt=(20, 21, 30 + n % 3, 40, 50 + n), letters=(7, 8, 9), answer=n % 3)
    for n in range(12)
]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All models that training and scoring load within a test, as they were loaded."""
    found: list[Any] = []

    def load(*args: Any) -> tuple[Any, Any]:
        model, tokenizer = load_model(*args)
        found.append(precisions(model))
        return model, tokenizer

    monkeypatch.setattr("distillery.models.load.load_model", load)
    monkeypatch.setattr("distillery.training.job.load_model", load)
    monkeypatch.setattr("distillery.training.olive_passes.load_model", load)
    monkeypatch.setattr("distillery.training.fine_tune.load_model", load)
    return found


def precisions(model: Any) -> set[torch.dtype]:
    return {weight.dtype for weight in model.parameters()}


def test_only_a_gpu_holds_frozen_weights_in_bfloat16() -> None:
    assert GPU.frozen_precision == "bfloat16"
    assert Device("cuda", "float32").frozen_precision == "float32"
    assert Device("cpu", "bfloat16").frozen_precision == "float32"


@pytest.mark.parametrize("arch", ["llama", "phi4mini"])
def test_loading_in_bfloat16_rounds_weights_and_no_rotary_frequency(
    tiny_model: TinyModel, arch: str
) -> None:
    exact, _ = load_model(tiny_model(arch))
    rounded, _ = load_model(tiny_model(arch), precision="bfloat16")
    assert precisions(rounded) == {torch.bfloat16}
    for given, found in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(given.to(torch.bfloat16), found)
    for given, found in zip(exact.buffers(), rounded.buffers(), strict=True):
        assert torch.equal(given, found)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_on_a_base_in_bfloat16(
    tiny_model: TinyModel, tmp_path: Path, method: str
) -> None:
    """It learns as on a float32 base that is cast, and is merged as exactly as bfloat16 holds."""
    base = tiny_model("phi4mini")
    settings = {"method": method, "epochs": 6, "learning_rate": 0.02, "precision": "bfloat16"}
    recipe = TrainingRecipe.model_validate(settings)
    curves = []
    for precision in ("float32", "bfloat16"):
        model, tokenizer = load_model(base, precision=precision)
        model, result = train(model, ROWS, ROWS, recipe, pad_id=pad_id(tokenizer), end_id=4)
        curves.append([point.loss for point in result.curve])
        assert precisions(model) == {torch.bfloat16, torch.float32}, "base, adapter"
    # The two differ by their rotary frequencies, which are rounded where the model is cast, and
    # soon by where training has gone.
    assert curves[1][0] == pytest.approx(curves[0][0], rel=0.01)
    assert curves[1][-1] < curves[1][0] / 10
    model.save_pretrained(tmp_path)
    exact, _ = load_model(base, tmp_path)
    rounded, _ = load_model(base, tmp_path, precision="bfloat16")
    assert precisions(rounded) == {torch.bfloat16}
    for given, found in zip(exact.parameters(), rounded.parameters(), strict=True):
        # Base and sum are rounded, by half of the last of 8 bits each.
        most = 2**-8 * float(given.detach().abs().max())
        assert torch.allclose(given, found.float(), rtol=2**-7, atol=most)


@pytest.mark.parametrize(
    ("method", "expected"), [("lora", torch.bfloat16), ("full", torch.float32)]
)
def test_training_on_a_gpu_loads_only_a_frozen_base_in_bfloat16(
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loaded: list[Any],
    method: str,
    expected: torch.dtype,
) -> None:
    base = tiny_model("llama")
    recipe = TrainingRecipe.model_validate({"method": method, "max_steps": 1, "hidden_weight": 1.0})
    monkeypatch.setattr("distillery.training.job.choose_device", lambda _: GPU)
    fine_tune(base, None, ROWS, [], recipe, tmp_path / "gpu")
    assert loaded[-1] == {expected}
    monkeypatch.setattr("distillery.training.job.choose_device", choose_device)
    fine_tune(base, None, ROWS, [], recipe, tmp_path / "cpu")
    assert loaded[-1] == {torch.float32}


def test_scoring_moves_no_float32_weight_to_a_gpu(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, loaded: list[Any]
) -> None:
    moved: list[tuple[str, set[torch.dtype]]] = []
    monkeypatch.setattr("distillery.models.device.choose_device", lambda _: GPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**12, 10**12))
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, name: moved.append((name, precisions(self)))
    )
    model = ModelToScore(name="tiny", kind="transformers", folder=str(tiny_model("llama")))
    job = ScoringJob(model=model, examples="", prompt=PromptRecipe(), threads=1, precision="auto")
    assert load_predictor(job).ran_on == "cuda bfloat16"
    assert loaded == [{torch.bfloat16}]
    assert moved == [("cuda", {torch.bfloat16})]


@pytest.mark.parametrize(("room", "ran_on"), [(10**9, "cuda bfloat16"), (0, "cpu float32")])
def test_a_model_that_does_not_fit_the_gpu_is_scored_on_the_processor(
    room: int, ran_on: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a training in 4 bits: the student is scored in floats."""
    moved: list[tuple[str, set[torch.dtype]]] = []
    monkeypatch.setattr("distillery.models.device.choose_device", lambda _: GPU)
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, name: moved.append((name, precisions(self)))
    )
    base = tiny_model("llama")
    weights = 2 * sum(weight.numel() for weight in load_model(base)[0].parameters())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, weights + room))
    model = ModelToScore(name="tiny", kind="transformers", folder=str(base))
    job = ScoringJob(model=model, examples="", prompt=PromptRecipe(), threads=1, precision="auto")
    assert load_predictor(job).ran_on == ran_on
    name, precision = ran_on.split()
    assert moved == [(name, {getattr(torch, precision)})]
