"""How deep a classifier has to be: what a head would read at each depth, and which one is taken."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_model import ARCHITECTURES

from distillery.models.device import choose_device
from distillery.models.load import load_model, pad_id
from distillery.progress import shown_by
from distillery.recipe import LayerChoice
from distillery.training import depth
from distillery.training.decisions import kept_decisions
from distillery.training.depth import probed_depth, states_by_depth
from distillery.training.hidden_states import hidden_states
from distillery.training.pruning import keep_layers, resolved_layers
from distillery.training.rows import TrainingRow

TinyModel = Callable[[str], Path]

ROWS = [
    TrainingRow(
        prompt=tuple(range(3, 6 + number % 7)),
        letters=(40, 41),
        closed=True,
        span=1 + number % 3,
        last=0.25,
        answer=number % 2,
    )
    for number in range(24)
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_states_at_a_depth_are_those_that_a_model_cut_there_reads(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    monkeypatch.setattr(depth, "choose_device", lambda: choose_device("float32"))
    model, tokenizer = load_model(tiny_model(arch))
    layers = len(model.get_decoder().layers)
    shown: list[tuple[int, int, str]] = []
    with shown_by(lambda *told: shown.append(told)):
        found = states_by_depth(model, ROWS, pad_id(tokenizer), layers)
    assert shown[0] == (0, len(ROWS), "reading for a linear probe of each layer")
    assert found.shape == (layers, len(ROWS), model.config.hidden_size)
    for kept in range(layers, 0, -1):
        keep_layers(model, range(kept))
        expected = hidden_states(
            model, ROWS, pad_id=pad_id(tokenizer), device=choose_device("float32")
        )
        assert found[kept - 1] == pytest.approx(expected.numpy(), abs=1e-4)
        assert np.ptp(expected.numpy()) > 1


@pytest.mark.parametrize(
    ("most", "largest_loss", "expected", "rival"),
    [
        (4, 0.0, 3, "no more at any depth up to 4"),
        (4, 0.1, 2, "95.0 % at its best depth up to 4, which is 3"),
        (4, 0.6, 1, "95.0 % at its best depth up to 4, which is 3"),
        (2, 0.0, 2, "no more at any depth up to 2"),
    ],
)
def test_the_least_depth_within_the_loss_is_taken(
    tiny_model: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    largest_loss: float,
    expected: int,
    rival: str,
) -> None:
    model, tokenizer = load_model(tiny_model("llama"))
    shares = {1: 0.4, 2: 0.9, 3: 0.95, 4: 0.95}
    states = np.arange(1, 5)[:, None, None]
    monkeypatch.setattr(depth, "states_by_depth", lambda *given: states[: given[-1]])
    monkeypatch.setattr(depth, "agreement", lambda given, _answers: shares[int(given[0, 0])])
    with kept_decisions() as decisions:
        assert probed_depth(model, ROWS, pad_id(tokenizer), most, largest_loss) == expected
    (decision,) = decisions
    assert decision.startswith(f"{expected} of 2 layers are kept: a linear probe gives ")
    assert decision.endswith(f" of the labels there, and {rival}")


def test_a_probe_agrees_with_what_the_states_tell() -> None:
    generator = np.random.default_rng(0)
    answers = generator.integers(0, 3, 200)
    noise = generator.normal(size=(200, 8)).astype(np.float32)
    told = noise.copy()
    told[:, 5] += 8 * (answers == 1)
    told[:, 6] += 8 * (answers == 2)
    assert depth.agreement(told, answers) > 0.95
    assert depth.agreement(noise, answers) < 0.6
    assert depth.agreement(noise, np.zeros(200, dtype=int)) == 1


def test_the_number_to_keep_is_the_most_that_a_probe_takes(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(tiny_model("llama"))
    monkeypatch.setattr(depth, "agreement", lambda given, _answers: float(given.any()))
    for keep, expected in ((None, [0]), (7, [0]), (1, [0]), (0.5, [0])):
        choice = LayerChoice(keep=keep, by="probe")
        assert resolved_layers(model, choice, ROWS, pad_id(tokenizer)) == expected
    deeper = iter([0.5, 0.9, 0.5])
    monkeypatch.setattr(depth, "agreement", lambda *_: next(deeper))
    assert resolved_layers(model, LayerChoice(by="probe"), ROWS, pad_id(tokenizer)) == [0, 1]
    choice = LayerChoice(keep=1, by="probe")
    assert resolved_layers(model, choice, ROWS, pad_id(tokenizer)) == [0]
