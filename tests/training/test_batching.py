"""What prompts share is computed once: how much they share, and that numbers and gradients stay."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import ARCHITECTURES

from distillery.models.device import choose_device
from distillery.models.load import load_model
from distillery.training.batching import (
    batches,
    common_prefix,
    forward,
    prefill_shared,
    turning_point,
)
from distillery.training.likelihood import forward_packed, option_scores
from distillery.training.rows import TrainingRow
from distillery.training.validation import option_probabilities

TinyModel = Callable[[str], Path]
SHARED = tuple(range(20, 60))
PROMPTS = [(*SHARED, 5, 9, 300, 41), (*SHARED, 6), (*SHARED, 5, 9, 7), (*SHARED, 6, 300)]


@pytest.mark.parametrize(
    ("ids", "kept", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4]], 1, 2),
        ([[1, 2, 3], [1, 2, 3]], 1, 2),
        ([[1, 2, 3], [1, 2, 3]], 2, 1),
        ([[1, 2, 3], [1, 2], [1, 2, 9]], 1, 1),
        ([[1], [1, 2]], 2, 0),
        ([[1, 2], [3, 4]], 1, 0),
    ],
)
def test_what_rows_share(ids: list[list[int]], kept: int, expected: int) -> None:
    assert common_prefix(ids, kept) == expected


def alone(model: Any, ids: tuple[int, ...], kept: int) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([ids])).logits[0, -kept:]
    return logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_batch_with_a_shared_beginning_has_the_numbers_of_its_rows(
    tiny_model: TinyModel, arch: str, attention: str
) -> None:
    model, _ = load_model(tiny_model(arch))
    model.set_attn_implementation(attention)
    shared, cache = prefill_shared(model, PROMPTS, 1)
    assert (shared, cache.get_seq_length()) == (40, 40)
    logits = forward(model, PROMPTS, 1, 0)
    for index, ids in enumerate(PROMPTS):
        assert torch.allclose(logits[index], alone(model, ids, 1), atol=1e-4)
    rows = [TrainingRow(prompt=ids, texts=((7,), (8, 9, 10)), answer=0) for ids in PROMPTS]
    packed, logits = forward_packed(model, rows, 0)
    assert packed.inputs["input_ids"].shape[1] == 8
    for index, row in enumerate(rows):
        logs = torch.log_softmax(alone(model, (*row.prompt, 8, 9, 10), 4), -1)
        expected = float(logs[0, 8] + logs[1, 9] + logs[2, 10]) / 3
        assert float(option_scores(packed, logits)[0][index, 1]) == pytest.approx(
            expected, abs=1e-4
        )


def test_gradients_flow_through_what_is_shared(tiny_model: TinyModel) -> None:
    def gradients(run: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
        model, _ = load_model(tiny_model("llama"))
        run(model.train()).backward()  # type: ignore[no-untyped-call]
        return {
            name: weight.grad
            for name, weight in model.named_parameters()
            if weight.grad is not None
        }

    together = gradients(lambda model: forward(model, PROMPTS, 1, 0).logsumexp(-1).sum())
    apart = gradients(
        lambda model: sum(
            (alone(model, ids, 1).logsumexp(-1).sum() for ids in PROMPTS), torch.tensor(0.0)
        )
    )
    assert together.keys() == apart.keys()
    for name, gradient in apart.items():
        assert torch.allclose(together[name], gradient, atol=1e-3 * float(gradient.abs().max())), (
            name
        )


@pytest.mark.parametrize("form", ["letters", "texts"])
def test_no_batch_lies_on_both_sides_of_where_the_rotary_factors_turn(
    tiny_model: TinyModel, form: str
) -> None:
    """The tiny phi4mini turns beyond 512 tokens, for all rows of a batch at once."""
    model, _ = load_model(tiny_model("phi4mini"))
    assert turning_point(model) == 512
    options: dict[str, Any] = (
        {"letters": (7, 8)} if form == "letters" else {"texts": ((7,), (8, 9))}
    )
    prompts = [
        tuple(5 + (position * 7 + length) % 400 for position in range(length))
        for length in (490, 512, 520, 530)
    ]
    rows = [TrainingRow(prompt=prompt, answer=0, **options) for prompt in prompts]
    device = choose_device("float32")
    single, together = (
        torch.tensor(option_probabilities(model, rows, pad_id=0, device=device, batch_size=size))
        for size in (1, 4)
    )
    assert torch.allclose(single, together, atol=1e-4)
    found = batches(rows, 4, 0, 0, 512)
    groups = [sorted(len(rows[index].prompt) for index in picked) for picked in found]
    assert sorted(groups) == [[490], [512, 520, 530]], (
        "trained on, an option comes after the prompt"
    )
    assert len(batches(rows, 4, 0, 0)) == 1
    assert {len(batches(rows * 40, 8, 0, epoch, 512)) for epoch in range(8)} == {20}


def test_long_prompts_and_small_savings_are_computed_whole(tiny_model: TinyModel) -> None:
    model, _ = load_model(tiny_model("llama"))
    assert prefill_shared(model, PROMPTS[:1], 1) == (0, None)
    assert prefill_shared(model, [(1, 2, 3), (1, 2, 4)], 1) == (0, None)
    model.config.sliding_window = 42
    assert prefill_shared(model, PROMPTS, 1) == (0, None)
