"""Each loss against a plain reference in float64."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from distillery.models.load import load_model
from distillery.recipe import TrainingRecipe
from distillery.training.loop import set_up
from distillery.training.losses import (
    answer_loss,
    balanced_weights,
    choice_loss,
    hidden_loss,
    option_loss,
    text_loss,
    written_losses,
)
from distillery.training.rows import TrainingRow

ROWS = [
    TrainingRow(prompt=(1, 2), letters=(5, 6, 7), answer=0, soft=(0.7, 0.2, 0.1)),
    TrainingRow(prompt=(1,), letters=(6, 5, 9), answer=2, soft=(0.1, 0.1, 0.8)),
    TrainingRow(prompt=(1,), letters=(5, 6), answer=1),
]


def log_softmax(values: list[float], temperature: float = 1.0) -> list[float]:
    scaled = [value / temperature for value in values]
    norm = math.log(sum(math.exp(value) for value in scaled))
    return [value - norm for value in scaled]


def divergence(teacher: list[float], scores: list[float], recipe: TrainingRecipe) -> float:
    """T^2 D of the teacher's probabilities and the student's scores, from their definitions."""
    raised: list[float] = [q ** (1 / recipe.temperature) for q in teacher]
    q = [value / sum(raised) for value in raised]
    p = [math.exp(value) for value in log_softmax(scores, recipe.temperature)]
    of, against = (q, p) if recipe.divergence == "forward" else (p, q)
    return recipe.temperature**2 * sum(
        a * math.log(a / b) for a, b in zip(of, against, strict=True)
    )


@pytest.mark.parametrize("divergence_of", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("soft_weight", [0.0, 0.3, 1.0])
def test_the_loss_on_a_letter(soft_weight: float, temperature: float, divergence_of: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 50)
    recipe = TrainingRecipe(
        soft_weight=soft_weight, temperature=temperature, divergence=divergence_of
    )
    expected = 0.0
    for row, (letter, turn) in zip(ROWS, logits.double().tolist(), strict=True):
        logs = log_softmax(letter)
        hard = loss = -logs[row.letters[row.answer]]
        if row.soft and soft_weight:
            said = math.log(sum(math.exp(logs[i]) for i in row.letters))
            soft = divergence(list(row.soft), [letter[i] for i in row.letters], recipe) - said
            loss = (1 - soft_weight) * hard + soft_weight * soft
        expected += loss - log_softmax(turn)[3]
    assert answer_loss(logits, ROWS, recipe, end_id=3).item() == pytest.approx(
        expected / 3, rel=1e-5
    )


def test_forward_at_temperature_one_is_the_divergence_from_the_whole_vocabulary() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 50)
    letter, turn = logits[0].double().tolist()
    p = [math.exp(value) for value in log_softmax(letter)]
    expected = sum(
        q * math.log(q / p[i]) for q, i in zip(ROWS[0].soft or (), ROWS[0].letters, strict=True)
    )
    loss = answer_loss(logits, ROWS[:1], TrainingRecipe(soft_weight=1.0), end_id=3)
    assert loss.item() == pytest.approx(expected - log_softmax(turn)[3], rel=1e-5)


def test_label_smoothing_spreads_a_share_over_the_vocabulary() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 50)
    expected = 0.0
    for row, (letter, turn) in zip(ROWS, logits.double().tolist(), strict=True):
        logs = log_softmax(letter)
        expected -= (
            0.9 * logs[row.letters[row.answer]] + 0.1 * sum(logs) / 50 + log_softmax(turn)[3]
        )
    assert answer_loss(
        logits, ROWS, TrainingRecipe(label_smoothing=0.1), 3
    ).item() == pytest.approx(expected / 3, rel=1e-5)


@pytest.mark.parametrize("divergence_of", ["forward", "reverse"])
def test_soft_labels_that_are_certain_give_finite_gradients(
    divergence_of: Literal["forward", "reverse"],
) -> None:
    scores = torch.tensor([[4.0, -200.0, 1.0]], requires_grad=True)
    row = TrainingRow(prompt=(1,), letters=(5, 6, 7), answer=0, soft=(1.0, 0.0, 0.0))
    loss = choice_loss(scores, [row], 1.0, divergence_of)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss).all()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("soft_weight", [0.0, 0.3])
def test_the_loss_on_a_text(soft_weight: float, smoothing: float) -> None:
    torch.manual_seed(0)
    scores, likelihoods = -3 * torch.rand(3, 3), -torch.rand(3)
    scores[2, 2] = -torch.inf
    recipe = TrainingRecipe(soft_weight=soft_weight, temperature=2.0, label_smoothing=smoothing)
    expected = 0.0
    for row, row_scores, said in zip(
        ROWS, scores.double().tolist(), likelihoods.double().tolist(), strict=True
    ):
        own = row_scores[: len(row.letters)]
        logs = log_softmax(own)
        loss = -(1 - smoothing) * logs[row.answer] - smoothing * sum(logs) / len(logs)
        if row.soft:
            loss = (1 - soft_weight) * loss + soft_weight * divergence(list(row.soft), own, recipe)
        expected += loss - said
    assert text_loss(scores, likelihoods, ROWS, recipe).item() == pytest.approx(
        expected / 3, rel=1e-5
    )


UNEVEN = [
    TrainingRow(prompt=(1,), letters=(5, 6), answer=1, soft=(0.25, 0.75)),
    TrainingRow(prompt=(1,), letters=(6, 5, 9, 8), answer=3, soft=(0.1, 0.1, 0.2, 0.6)),
]
"""Rows of two and of four options, with probabilities."""


@pytest.mark.parametrize("divergence_of", ["forward", "reverse"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_rows_of_fewer_options_than_others_have_no_more(
    divergence_of: Literal["forward", "reverse"], smoothing: float
) -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 4)
    scores[0, 2:] = -torch.inf
    recipe = TrainingRecipe(
        soft_weight=0.4, temperature=2.0, divergence=divergence_of, label_smoothing=smoothing
    )
    found = option_loss(scores, UNEVEN, recipe)
    for row, row_scores, loss in zip(UNEVEN, scores.double().tolist(), found, strict=True):
        own = row_scores[: len(row.letters)]
        logs = log_softmax(own)
        hard = -(1 - smoothing) * logs[row.answer] - smoothing * sum(logs) / len(logs)
        expected = 0.6 * hard + 0.4 * divergence(list(row.soft or ()), own, recipe)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_on_a_letter_counts_a_rows_own_letters_alone() -> None:
    """The first token of the vocabulary, with which shorter lists are filled up, is likely."""
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 50)
    logits[:, 0, 0] = 5.0
    recipe = TrainingRecipe(soft_weight=1.0, temperature=2.0)
    expected = 0.0
    for row, (letter, turn) in zip(UNEVEN, logits.double().tolist(), strict=True):
        logs = log_softmax(letter)
        said = math.log(sum(math.exp(logs[i]) for i in row.letters))
        own = [letter[i] for i in row.letters]
        expected += divergence(list(row.soft or ()), own, recipe) - said - log_softmax(turn)[3]
    found = answer_loss(logits, UNEVEN, recipe, end_id=3).item()
    assert found == pytest.approx(expected / 2, rel=1e-5)


def test_the_hidden_loss() -> None:
    torch.manual_seed(0)
    own, taught = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    cosines = [
        float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
        for a, b in zip(own, taught, strict=True)
    ]
    assert float(hidden_loss(own, taught)) == pytest.approx(1 - sum(cosines) / 3, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_on_a_reason_or_a_written_answer(smoothing: float) -> None:
    torch.manual_seed(0)
    # The first token of the vocabulary is one of a text's, and counts.
    texts = [(4, 0, 1), (7,)]
    logits = torch.randn(2, 4, 50)
    expected = []
    for text, places in zip(texts, logits.double().tolist(), strict=True):
        tokens = [*text, 3]
        total = 0.0
        for at, token in zip(places[len(places) - len(tokens) :], tokens, strict=True):
            logs = log_softmax(at)
            total -= (1 - smoothing) * logs[token] + smoothing * sum(logs) / len(logs)
        expected.append(total / len(tokens))
    found = written_losses(logits, texts, end_id=3, label_smoothing=smoothing)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_balanced_weights_are_scikit_learns_and_a_class_without_a_row_has_none() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    answers = [0] * 12 + [1] * 3 + [3] * 1
    rows = [TrainingRow(prompt=(1,), letters=(5, 6, 7, 8), answer=each) for each in answers]
    present = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=np.array(answers))
    found = balanced_weights(rows, 4)
    assert [found[0], found[1], found[3]] == pytest.approx(present.tolist())
    assert found[2] == 0
    assert sum(found[each] for each in answers) == pytest.approx(len(rows))


@pytest.mark.parametrize("soft_weight", [0.0, 0.4])
def test_class_weights_weigh_the_labels_and_not_the_teachers_probabilities(
    soft_weight: float,
) -> None:
    scores = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    scores[2, 2] = -torch.inf
    recipe = TrainingRecipe(soft_weight=soft_weight, label_smoothing=0.1)
    weights = [3.0, 0.5, 0.25]
    hard = option_loss(scores, ROWS, recipe.model_copy(update={"soft_weight": 0}))
    soft = choice_loss(scores, ROWS, 1.0, "forward")
    found = option_loss(scores, ROWS, recipe, weights)
    for number, row in enumerate(ROWS):
        share = soft_weight if row.soft else 0
        expected = (1 - share) * weights[row.answer] * hard[number]
        if share:
            expected += share * soft[number]
        assert found[number].item() == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize(("class_weights", "expected"), [("none", None), ("balanced", [2 / 3, 2])])
def test_training_on_classes_weighs_them_if_the_recipe_says_so(
    tiny_model: Callable[[str], Path], class_weights: str, expected: list[float] | None
) -> None:
    model, _ = load_model(tiny_model("llama"))
    rows = [
        TrainingRow(prompt=(7, 8, number), letters=(500, 501), closed=True, answer=number // 3)
        for number in range(4)
    ]
    recipe = TrainingRecipe(method="full", class_weights=class_weights, max_steps=1)
    objective = set_up(model, rows, [], recipe, None, 0, 0).objective
    assert objective.class_weights == (expected and pytest.approx(expected))
    plain = replace(objective, class_weights=None)
    assert (objective(rows).item() == plain(rows).item()) == (expected is None)
