"""Weights that are cast once: which layers, to what, and that they come back. And a worker that
should have a GPU."""

import weakref
from typing import Any

import pytest
import torch

from distillery.errors import TrainingUnavailable
from distillery.models.device import (
    Device,
    check_gpu,
    choose_device,
    linear_layers_cast,
    release_gpu,
)


class Model(torch.nn.Module):
    """A trained and a frozen layer, and a head tied to the embedding, all frozen but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 4)
        self.trained, self.frozen = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.requires_grad_(False)
        self.trained.requires_grad_(True)


def test_frozen_layers_are_cast_and_come_back() -> None:
    model = Model()
    trained, frozen, tied = model.trained.weight, model.frozen.weight, model.embedding.weight
    with linear_layers_cast(model, Device("cpu", "bfloat16"), frozen_only=True):
        assert model.trained.weight is trained
        assert model.frozen.weight.dtype == model.head.weight.dtype == torch.bfloat16
        # Autocast leaves embeddings in float32, so a tied one stays as it is.
        assert model.embedding.weight is tied
        assert torch.equal(model.frozen.weight, frozen.to(torch.bfloat16))
    assert model.frozen.weight is frozen
    assert model.head.weight is model.embedding.weight is tied


def test_all_layers_are_cast_where_nothing_is_trained_and_none_in_float32() -> None:
    model = Model()
    trained = model.trained.weight
    with linear_layers_cast(model, Device("cpu", "bfloat16")):
        assert model.trained.weight.dtype == torch.bfloat16
    assert model.trained.weight is trained
    with linear_layers_cast(model, Device("cpu", "float32")):
        assert model.frozen.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("amx", "avx512", "name", "precision"),
    [
        (True, True, "Intel(R) Xeon(R) Processor, 2 cores", "bfloat16"),
        (False, True, "Intel(R) Xeon(R) Processor, 2 cores", "float32"),
        (False, True, "AMD EPYC 9V74 80-Core Processor, 2 cores", "bfloat16"),
        (False, False, "AMD EPYC 7763 64-Core Processor, 2 cores", "float32"),
    ],
)
def test_a_processor_multiplies_in_bfloat16_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, name: str, precision: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr("distillery.models.device.machine_name", lambda: name)
    assert choose_device() == Device("cpu", precision)


@pytest.mark.parametrize(
    ("built_for", "reason"),
    [(None, "is built without CUDA: install one that has it"), ("13.0", "finds no GPU: see what")],
)
def test_a_worker_that_should_have_a_gpu_and_has_none(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, reason: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", built_for)
    check_gpu(allow_cpu=False)
    monkeypatch.setenv("DISTILLERY_NEEDS_GPU", "true")
    with pytest.raises(TrainingUnavailable, match=reason) as caught:
        check_gpu(allow_cpu=False)
    assert str(caught.value).endswith("or set training.allow_cpu: true in the recipe")
    assert "\n" not in str(caught.value)
    check_gpu(allow_cpu=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_gpu(allow_cpu=False)


def test_memory_of_models_that_are_gone_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Model()
    # A reference to itself, as hooks make them.
    model.itself = [model]
    gone = weakref.ref(model)
    del model
    alive_at: list[bool] = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: alive_at.append(gone() is not None))
    release_gpu()
    assert alive_at == [], "this process has no GPU"
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    release_gpu()
    assert alive_at == [False]
