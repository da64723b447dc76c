"""Layer cuts: which layers each way keeps, and that those are the ones that the model then has."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_model import ARCHITECTURES

from distillery.errors import TrainingError
from distillery.models.load import load_model, pad_id
from distillery.recipe import LayerChoice
from distillery.training.batching import padded_inputs
from distillery.training.pruning import block_influence, chosen_layers, keep_layers

TinyModel = Callable[[str], Path]


@pytest.mark.parametrize(
    ("by", "keep", "expected"),
    [
        ("early_and_last", 4, [0, 1, 2, 9]),
        ("early_and_last", 1, [9]),
        ("even", 4, [0, 3, 6, 9]),
        ("even", 1, [9]),
        ("even", 10, list(range(10))),
        ("block_influence", 3, [0, 4, 9]),
    ],
)
def test_the_layers_of_each_choice(by: str, keep: int, expected: list[int]) -> None:
    influence = [0.9, 0.1, 0.1, 0.2, 0.5, 0.1, 0.3, 0.1, 0.1, 0.8]
    assert chosen_layers(LayerChoice(keep=keep, by=by), 10, influence) == expected


def test_more_layers_than_there_are_is_one_line() -> None:
    with pytest.raises(
        TrainingError, match=r"student.layers.keep: 11, but this model has 10 layers; keep fewer"
    ):
        chosen_layers(LayerChoice(keep=11), 10)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kept_layers_are_the_named_ones(tiny_model: TinyModel, arch: str, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_model(arch))
    second = model.get_decoder().layers[1].mlp.down_proj.weight.clone()
    keep_layers(model, [1])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    kept, _ = load_model(tmp_path)
    assert kept.config.num_hidden_layers == len(kept.get_decoder().layers) == 1
    assert torch.equal(kept.get_decoder().layers[0].mlp.down_proj.weight, second)
    with pytest.raises(TrainingError, match="layers: 7 is no layer"):
        keep_layers(kept, [0, 7])


def test_block_influence_is_one_less_the_mean_cosine_over_tokens(tiny_model: TinyModel) -> None:
    model, tokenizer = load_model(tiny_model("llama"))
    prompts = [[5, 9, 300, 41], [7, 8]]
    batches = [padded_inputs(prompts, pad_id(tokenizer), model.device)]
    sums, tokens = [0.0, 0.0], 0
    for prompt in prompts:
        # The last hidden state is normalised; the second layer's own output is caught before that.
        caught: list[torch.Tensor] = []
        hook = model.model.norm.register_forward_pre_hook(
            lambda _norm, inputs, caught=caught: caught.append(inputs[0])
        )
        states = [
            *model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[:2],
            caught[0],
        ]
        hook.remove()
        for layer in range(2):
            for before, after in zip(
                states[layer][0].double(), states[layer + 1][0].double(), strict=True
            ):
                sums[layer] += (before @ after / (before.norm() * after.norm())).item()
        tokens += len(prompt)
    assert block_influence(model, batches) == pytest.approx(
        [1 - total / tokens for total in sums], abs=1e-5
    )
