"""The memory that training and scoring take on a GPU with CUDA: no float32 copy of a frozen model,
less with gradient checkpointing, and none after a stage.

The model is large enough for its weights to outweigh CUDA's workspaces.
"""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_model import build_tiny_model

from distillery.evaluation.predictors import load_predictor
from distillery.evaluation.scoring import ModelToScore, ScoringJob
from distillery.models.device import choose_device, release_gpu
from distillery.readiness import shape_of
from distillery.recipe import BaseModelRecipe, PromptRecipe, TrainingRecipe
from distillery.training.fine_tune import fine_tune
from distillery.training.footprint import bytes_a_token, fixed_bytes
from distillery.training.rows import TrainingRow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WORKSPACE = 100 * 2**20
"""Bytes that CUDA's libraries, an adapter and the logits of a batch may take beside the rest."""

TOKENS = 240
ROWS = [
    TrainingRow(
        # The first tokens differ, so that rows share nothing.
        prompt=(100 + n, 30 + n % 3, *(50 + i % 200 for i in range(TOKENS - 2))),
        letters=(7, 8, 9),
        answer=n % 3,
    )
    for n in range(16)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of some 180 M parameters."""
    folder = tmp_path_factory.mktemp("base")
    return build_tiny_model(
        "llama", folder, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12
    )


def peak_of(work: Callable[[], object]) -> int:
    """Return the bytes that `work` takes of the GPU at most, and see that it gives all back."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    peak = torch.cuda.max_memory_allocated() - before
    release_gpu()
    assert torch.cuda.memory_allocated() - before < WORKSPACE
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_training_takes_the_memory_that_is_estimated(
    base: Path, tmp_path: Path, method: str, checkpointing: bool
) -> None:
    settings = {"method": method, "max_steps": 2, "gradient_checkpointing": checkpointing}
    recipe = TrainingRecipe.model_validate(settings)
    precision = choose_device().precision
    shape = shape_of(BaseModelRecipe(model=str(base)))
    assert shape is not None
    peak = peak_of(lambda: fine_tune(base, None, ROWS, [], recipe, tmp_path / "out"))
    fixed = fixed_bytes(shape, method, precision)
    batch = recipe.batch_size * TOKENS * bytes_a_token(shape, method, precision, checkpointing)
    assert 0.7 * (fixed + batch) < peak < 1.3 * (fixed + batch) + WORKSPACE
    if precision == "bfloat16" and method == "lora":
        assert fixed < 2.1 * shape.parameters, "bfloat16 alone"


def test_scoring_holds_no_float32_copy(base: Path) -> None:
    shape = shape_of(BaseModelRecipe(model=str(base)))
    assert shape is not None
    model = ModelToScore(name="base", kind="transformers", folder=str(base))
    job = ScoringJob(model=model, examples="", prompt=PromptRecipe(), threads=1)

    def score() -> None:
        predictor = load_predictor(job)
        for row in ROWS[:4]:
            found = predictor.ask(row)
            assert isinstance(found, list)
            assert sum(found) == pytest.approx(1, abs=1e-3)

    weights = 2 if choose_device().precision == "bfloat16" else 4
    assert peak_of(score) < weights * shape.parameters + WORKSPACE
