"""The loss on soft labels for tokens, against a plain reference in float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from distillery.recipe import TrainingRecipe
from distillery.training.losses import written_losses
from distillery.training.rows import TrainingRow
from distillery.training.token_labels import TokenLabels
from distillery.training.token_loss import PickedLogits, taught_losses

VOCABULARY = 50
END = 3
Candidates = dict[int, float]
"""Tokens with the teacher's probabilities."""

SOFT: list[list[Candidates]] = [
    # The target's token is a candidate, is none, and a position without any.
    [{4: 0.6, 9: 0.3, 0: 0.05}, {8: 0.5, 30: 0.25}, {}, {END: 0.9, 11: 0.1}],
    [{21: 0.01}, {END: 0.7, 7: 0.2, 12: 0.05, 13: 0.025}],
    [],
]
ROWS_TARGETS = [(4, 0, 1), (7,), (5, 6)]


def labels(found: list[Candidates]) -> TokenLabels | None:
    if not found:
        return None
    most = max(map(len, found))
    ids, logs = np.zeros((len(found), most), "<i4"), np.full((len(found), most), -np.inf, "<f4")
    for position, candidates in enumerate(found):
        ids[position, : len(candidates)] = list(candidates)
        logs[position, : len(candidates)] = np.log(list(candidates.values()))
    return TokenLabels(candidates=most, ids=ids.tobytes(), logs=logs.tobytes())


ROWS = [
    TrainingRow(prompt=(1,), target=target, answer=0, soft_tokens=labels(found))
    for target, found in zip(ROWS_TARGETS, SOFT, strict=True)
]


def plain_loss(
    logits: list[float], target: int, candidates: Candidates, recipe: TrainingRecipe
) -> float:
    """Return the loss at one position, from its definition."""
    largest = max(logits)
    norm = largest + math.log(math.fsum(math.exp(each - largest) for each in logits))
    logs = [each - norm for each in logits]
    smoothing = recipe.label_smoothing
    hard = -(1 - smoothing) * logs[target] - smoothing * math.fsum(logs) / len(logs)
    if not candidates:
        return hard
    q = [*candidates.values(), max(1 - math.fsum(candidates.values()), 0.0)]
    others = math.fsum(math.exp(log) for i, log in enumerate(logs) if i not in candidates)
    p = [*(math.exp(logs[token]) for token in candidates), others]

    def heated(shares: list[float]) -> list[float]:
        raised: list[float] = [max(share, 1e-8) ** (1 / recipe.temperature) for share in shares]
        return [each / math.fsum(raised) for each in raised]

    of, against = heated(q), heated(p)
    if recipe.divergence == "reverse":
        of, against = against, of
    parts = [a * math.log(a / b) for a, b in zip(of, against, strict=True)]
    soft = recipe.temperature**2 * math.fsum(parts)
    return (1 - recipe.soft_share) * hard + recipe.soft_share * soft


def random_logits() -> torch.Tensor:
    return torch.randn(3, 4, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("weight", "smoothing"), [(0.3, 0.1), (1.0, 0.0), (0.0, 0.0)])
def test_the_loss_on_soft_labels_for_tokens(
    weight: float, smoothing: float, temperature: float, divergence: str
) -> None:
    logits = random_logits()
    recipe = TrainingRecipe(
        soft_weight=weight,
        temperature=temperature,
        divergence=divergence,
        label_smoothing=smoothing,
    )
    expected = []
    for row, found, positions in zip(ROWS, SOFT, logits.double().tolist(), strict=True):
        tokens = [*row.target, END]
        total = 0.0
        for at, token, number in zip(
            positions[-len(tokens) :], tokens, range(len(tokens)), strict=True
        ):
            total += plain_loss(at, token, found[number] if found else {}, recipe)
        expected.append(total / len(tokens))
    assert taught_losses(logits, ROWS, END, recipe).tolist() == pytest.approx(expected, rel=1e-5)
    hard = written_losses(logits, ROWS_TARGETS, END, smoothing)
    assert (hard.tolist() == pytest.approx(expected, rel=1e-5)) == (weight == 0)
    assert hard[2].item() == pytest.approx(expected[2], rel=1e-5), "a row without soft labels"


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_with_the_whole_vocabulary_as_candidates_it_is_the_full_divergence(
    temperature: float,
) -> None:
    logits, of = random_logits()[:1, :2], random_logits()[1, 1:3]
    taught = torch.log_softmax(of.double(), -1)
    whole = [{token: math.exp(log) for token, log in enumerate(row)} for row in taught.tolist()]
    row = TrainingRow(prompt=(1,), target=(4,), answer=0, soft_tokens=labels(whole))
    student = torch.log_softmax(logits[0].double() / temperature, -1)
    teacher = torch.log_softmax(taught / temperature, -1)
    expected = temperature**2 * (teacher.exp() * (teacher - student)).sum(-1).mean()
    recipe = TrainingRecipe(soft_weight=1.0, temperature=temperature)
    logits.requires_grad_()
    loss = taught_losses(logits, [row], END, recipe).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    # T (p_T - q_T), over two positions.
    slopes = temperature * (student.exp() - teacher.exp()) / 2
    assert torch.allclose(logits.grad[0].double(), slopes, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_gradients_are_those_of_plain_operations(divergence: str) -> None:
    """The same in PyTorch's own operations on the whole vocabulary, in float64."""
    recipe = TrainingRecipe(
        soft_weight=0.6, temperature=1.5, divergence=divergence, label_smoothing=0.1
    )
    logits, plain = random_logits().requires_grad_(), random_logits().double().requires_grad_()
    taught_losses(logits, ROWS, END, recipe).mean().backward()  # type: ignore[no-untyped-call]
    total = torch.zeros((), dtype=torch.float64)
    for index, (row, found) in enumerate(zip(ROWS, SOFT, strict=True)):
        tokens = [*row.target, END]
        logs = torch.log_softmax(plain[index, -len(tokens) :], -1)
        for number, token in enumerate(tokens):
            loss = -0.9 * logs[number, token] - 0.1 * logs[number].mean()
            candidates = found[number] if found else {}
            if candidates:
                others = [i for i in range(VOCABULARY) if i not in candidates]
                tail = logs[number, others].logsumexp(-1, keepdim=True)
                p = torch.cat([logs[number, list(candidates)], tail])
                left = max(1 - math.fsum(candidates.values()), 1e-8)
                q = torch.tensor([*candidates.values(), left], dtype=torch.float64).log()
                p, q = torch.log_softmax(p / 1.5, -1), torch.log_softmax(q / 1.5, -1)
                of, against = (q, p) if divergence == "forward" else (p, q)
                loss = 0.4 * loss + 0.6 * 1.5**2 * (of.exp() * (of - against)).sum()
            total = total + loss / len(tokens) / 3
    total.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert plain.grad is not None
    assert torch.allclose(logits.grad.double(), plain.grad, atol=1e-6)


def test_the_gradient_of_picked_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    # Some are picked twice, and in one place all are.
    ids = torch.tensor([[[1, 4, 4], [0, 6, 2], [5, 5, 5]], [[3, 2, 1], [0, 1, 2], [6, 5, 4]]])
    assert torch.autograd.gradcheck(PickedLogits.apply, (logits, ids))
    whole = torch.arange(7).expand(2, 3, 7)
    _, others = PickedLogits.apply(logits, whole)  # type: ignore[no-untyped-call]
    assert torch.isinf(others).all()


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_candidates_that_hold_nearly_all_leave_finite_numbers(
    precision: Any, temperature: float, divergence: str
) -> None:
    """The probability of the tail would be 1 - 1 in float32."""
    logits = torch.zeros(2, 2, VOCABULARY, dtype=precision)
    logits[0, :, 4] = 200.0
    logits[1, :, 4], logits[1, :, 9] = 90.0, 89.0
    logits.requires_grad_()
    certain: list[Candidates] = [{4: 1.0}, {4: 0.6, 9: 0.4 - 1e-7}]
    rows = [
        TrainingRow(prompt=(1,), target=(4,), answer=0, soft_tokens=labels(found))
        for found in (certain, [{9: 0.3}, {END: 1.0}])
    ]
    recipe = TrainingRecipe(soft_weight=0.9, temperature=temperature, divergence=divergence)
    losses = taught_losses(logits, rows, END, recipe)
    assert torch.isfinite(losses).all()
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().max() <= 10 * temperature
    assert logits.grad.abs().max() > 0.01


def test_the_tails_probability_is_exact_where_it_is_small() -> None:
    logits = torch.zeros(1, 2, VOCABULARY)
    logits[0, :, 4] = 40.0
    row = TrainingRow(prompt=(1,), target=(4,), answer=0, soft_tokens=labels([{4: 0.5}, {4: 0.5}]))
    found = taught_losses(logits, [row], END, TrainingRecipe(soft_weight=1.0)).item()
    tail = math.log(49) - 40
    assert found == pytest.approx(-math.log(2) - 0.5 * tail, rel=1e-5)


def test_no_copy_of_the_logits_is_kept_for_the_backward_pass() -> None:
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() >= logits.numel():
            kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    logits = random_logits().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        taught_losses(logits, ROWS, END, TrainingRecipe(soft_weight=0.5))
    assert set(kept) == {logits.untyped_storage().data_ptr()}
