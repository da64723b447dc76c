"""Training and scoring on a GPU with CUDA: the answers of a CPU, and the memory that it takes."""

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import build_tiny_model

from distillery.data.examples import write_examples
from distillery.evaluation.scoring import ModelToScore, Scored, score_model
from distillery.labels.known import gold_labels
from distillery.models.device import choose_device
from distillery.models.load import load_tokenizer
from distillery.readiness import MEMORY_FACTOR
from distillery.recipe import PromptRecipe, TrainingRecipe
from distillery.records import Example
from distillery.training.fine_tune import fine_tune
from distillery.training.loop import TrainingResult
from distillery.training.rows import training_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPT = PromptRecipe(system="Pick.", user="{question}\n{choices}", choice="{letter}) {text}")
WORDS = ("bread", "river", "cloud")
ROWS = [
    Example(
        example_id=str(number),
        question=f"{WORDS[number % 3]} number {number}",
        choices=("oven", "bridge", "rain"),
        answer_key="ABC"[number % 3],
    )
    for number in range(48)
]


def trained(
    base: Path, out: Path, method: str, epochs: int = 12, learning_rate: float = 0.01
) -> TrainingResult:
    """Train `base` on two thirds of ROWS, and choose by the others."""
    recipe = TrainingRecipe.model_validate(
        {"method": method, "epochs": epochs, "learning_rate": learning_rate}
    )
    tokenizer, labels = load_tokenizer(base), gold_labels(ROWS)
    rows, _ = training_rows(ROWS[:32], labels, PROMPT, tokenizer)
    validation, _ = training_rows(ROWS[32:], labels, PROMPT, tokenizer)
    return fine_tune(base, None, rows, validation, recipe, out)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_training_runs_on_the_gpu_and_learns(
    tiny_model: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    result = trained(tiny_model("llama"), tmp_path, method)
    assert (result.device, result.precision) == ("cuda", choose_device().precision)
    assert result.curve[-1].loss < 0.5 * result.curve[0].loss
    assert result.validation_accuracy is not None
    assert result.validation_accuracy > 0.8


def test_a_gpu_scores_as_a_cpu_does(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    write_examples(ROWS, file)
    model = ModelToScore(name="tiny", kind="transformers", folder=str(tiny_model("llama")))

    def probabilities(scored: Scored) -> np.ndarray:
        assert all(scored.probabilities)
        return np.array(scored.probabilities)

    exact = score_model(model, file, PROMPT, precision="float32")
    fast = score_model(model, file, PROMPT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    on_cpu = score_model(model, file, PROMPT, precision="float32")
    assert exact.ran_on != on_cpu.ran_on
    assert exact.answers == on_cpu.answers
    np.testing.assert_allclose(probabilities(exact), probabilities(on_cpu), atol=1e-3)
    np.testing.assert_allclose(probabilities(fast), probabilities(on_cpu), atol=0.05)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_training_takes_no_more_memory_than_is_estimated(tmp_path: Path, method: str) -> None:
    """`distillery check` estimates the memory of a training from the float32 weights. The model is
    large enough for them to outweigh what the rows take; half as much again is left for that and
    for the optimiser's scratch memory."""
    base = build_tiny_model("llama", tmp_path / "base", hidden_size=1024, num_hidden_layers=12)
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = trained(base, tmp_path / "out", method, epochs=1, learning_rate=1e-5)
    peak = torch.cuda.max_memory_allocated() - before
    weights = 4 * result.parameters
    assert weights / 2 < peak < 1.5 * MEMORY_FACTOR[method] * weights
