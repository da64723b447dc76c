"""Training and scoring on a GPU with CUDA: the answers of a CPU, and the memory that it takes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from distillery.data.examples import write_examples
from distillery.evaluation.scoring import ModelToScore, Scored, score_model
from distillery.labels.known import gold_labels
from distillery.models.device import choose_device
from distillery.models.load import load_tokenizer
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


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_training_runs_on_the_gpu_and_learns(
    tiny_model: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    result = trained(tiny_model("llama"), tmp_path, method)
    assert (result.device, result.precision) == ("cuda", choose_device().precision)
    assert result.curve[-1].loss < 0.5 * result.curve[0].loss
    assert result.validation_accuracy is not None
    assert result.validation_accuracy > 0.8


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_gpus_that_split_a_model_learn(
    tiny_model: Callable[[str], Path], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_DEVICES", "2")
    one = trained(tiny_model("llama"), tmp_path / "whole", method)
    monkeypatch.setenv("DISTILLERY_FSDP", "true")
    split = trained(tiny_model("llama"), tmp_path / "split", method)
    assert split.curve[0].loss == pytest.approx(one.curve[0].loss, rel=0.02)
    assert split.curve[-1].loss < 0.5 * split.curve[0].loss


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
