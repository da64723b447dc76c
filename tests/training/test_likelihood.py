"""Options by the likelihood of their texts: packed in one pass, they score as each does alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import ARCHITECTURES

from distillery.models.device import choose_device
from distillery.models.load import load_model, pad_id
from distillery.training.likelihood import forward_packed, label_likelihoods, option_scores, pack
from distillery.training.rows import TrainingRow
from distillery.training.validation import option_probabilities

TinyModel = Callable[[str], Path]
ROWS = [
    TrainingRow(prompt=(5, 9, 300, 41), texts=((7,), (8, 9, 10), (8, 4)), answer=1),
    TrainingRow(prompt=(6, 2), texts=((12, 13), (300,)), answer=0),
]
END = 3


def alone(model: Any, prompt: tuple[int, ...], text: tuple[int, ...]) -> list[float]:
    """The log-probability of each token of a text after its prompt, from a pass of their own."""
    logs = torch.log_softmax(model(torch.tensor([[*prompt, *text]])).logits[0].double(), -1)
    return [float(logs[len(prompt) + index - 1, token]) for index, token in enumerate(text)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_options_score_as_each_by_itself(
    tiny_model: TinyModel, arch: str, attention: str
) -> None:
    model, tokenizer = load_model(tiny_model(arch))
    model.set_attn_implementation(attention)
    with torch.inference_mode():
        packed = pack(ROWS, pad_id(tokenizer), torch.device("cpu"), attention)
        logits = model(**packed.inputs, logits_to_keep=packed.kept).logits
        scores, each = option_scores(packed, logits)
        said = label_likelihoods(packed, logits, each, ROWS, END)
        for index, row in enumerate(ROWS):
            expected = [alone(model, row.prompt, text) for text in row.texts]
            means = [sum(logs) / len(logs) for logs in expected]
            assert scores[index, : len(means)].tolist() == pytest.approx(means, abs=1e-4)
            whole = alone(model, row.prompt, (*row.texts[row.answer], END))
            assert float(said[index]) == pytest.approx(sum(whole) / len(whole), abs=1e-4)
    assert scores[1, 2] == -torch.inf


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("arch", "kinds"),
    [
        ("phi3", None),
        ("qwen2", ["sliding_attention", "sliding_attention"]),
        ("qwen2", ["full_attention", "sliding_attention"]),
        ("qwen2", ["full_attention", "full_attention"]),
    ],
)
def test_a_sliding_window_holds_for_packed_options_too(
    tiny_model: TinyModel, arch: str, kinds: list[str] | None, attention: str
) -> None:
    model, _ = load_model(tiny_model(arch))
    model.set_attn_implementation(attention)
    row = TrainingRow(prompt=tuple(range(20, 60)), texts=((7,), (8, 9, 10)), answer=1)

    def score() -> tuple[float, float]:
        with torch.inference_mode():
            packed, logits = forward_packed(model, [row, ROWS[1]], 0)
            return float(option_scores(packed, logits)[0][0, 1]), sum(
                alone(model, row.prompt, row.texts[1])
            ) / 3

    whole = score()
    model.config.sliding_window = 16
    if kinds:
        model.config.layer_types = kinds
        model.get_decoder().has_sliding_layers = "sliding_attention" in kinds
        for layer, kind in zip(model.get_decoder().layers, kinds, strict=True):
            layer.attention_type = layer.self_attn.layer_type = kind
            layer.self_attn.sliding_window = 16 if kind == "sliding_attention" else None
    cut = score()
    assert cut[0] == pytest.approx(cut[1], abs=1e-4)
    assert whole[0] == pytest.approx(whole[1], abs=1e-4)
    assert (abs(whole[0] - cut[0]) > 0.01) == (kinds is None or "sliding_attention" in kinds)


def test_probabilities_over_texts_are_the_softmax_of_their_scores(tiny_model: TinyModel) -> None:
    model, tokenizer = load_model(tiny_model("llama"))
    device, pad = choose_device("float32"), pad_id(tokenizer)
    found = option_probabilities(model, ROWS, pad_id=pad, device=device, batch_size=1)
    with torch.inference_mode():
        for row, probabilities in zip(ROWS, found, strict=True):
            logs = [alone(model, row.prompt, text) for text in row.texts]
            expected = torch.softmax(torch.tensor([sum(part) / len(part) for part in logs]), -1)
            assert probabilities == pytest.approx(expected.tolist(), abs=1e-4)
