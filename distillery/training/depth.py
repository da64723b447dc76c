"""How deep a classifier has to be: a linear probe at each depth of the model that it starts from.

Alain, Bengio, Understanding intermediate layers using linear classifier probes, 2016: how well
linear classifiers of a layer's states tell the classes apart shows how far the model has come
there. Here they are ridge classifiers, in closed form, so that all depths together cost about one
pass over the rows; the training after it finds more in the layers than they do.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillery.models.device import choose_device, linear_layers_cast
from distillery.progress import show_rows
from distillery.training.batching import by_tokens, padded_inputs, read_shares, turning_point
from distillery.training.decisions import decide
from distillery.training.probing import short_fits
from distillery.training.rows import TrainingRow

MOST_ROWS = 1000
"""How many of the training rows, at most, the probes learn from and are asked."""

FOLDS = 4

ANSWERS = 1000
"""How many answers, at least, an agreement is counted of: few rows are split into folds in several
ways, at most five."""

PENALTY = 100.0
"""Of the ridge classifiers, whose features are standardised."""


def probed_depth(
    model: Any, rows: Sequence[TrainingRow], pad_id: int, most: int, largest_loss: float
) -> int:
    """Return the least number of first layers of `model`, at most `most`, whose probe gives the
    labels of `rows` almost as often as the best of these depths does: a share of at most
    `largest_loss` of the rows less often. `rows` are of a classifier: all have the same classes."""
    if len(rows) > MOST_ROWS:
        rows = [rows[index * len(rows) // MOST_ROWS] for index in range(MOST_ROWS)]
    states = states_by_depth(model, rows, pad_id, most)
    answers = np.array([row.answer for row in rows])
    shares = [agreement(each, answers) for each in states]
    allowed = max(shares) - largest_loss - 1e-9
    depth = next(number for number, share in enumerate(shares, 1) if share >= allowed)
    best = 1 + int(np.argmax(shares))
    rival = f"no more at any depth up to {most}"
    if best != depth:
        rival = f"{100 * max(shares):.1f} % at its best depth up to {most}, which is {best}"
    decide(
        f"{depth} of {len(model.get_decoder().layers)} layers are kept: a linear probe gives "
        f"{100 * shares[depth - 1]:.1f} % of the labels there, and {rival}"
    )
    return depth


def states_by_depth(
    model: Any, rows: Sequence[TrainingRow], pad_id: int, most: int
) -> NDArray[np.float32]:
    """Return what a head would read after each of the first `most` decoder layers, if that were
    the last one: [most, rows, hidden]. It is a mean of normalised states, as in
    `batching.read_shares`."""
    import torch

    decoder = model.get_decoder()
    device = choose_device()
    model.to(device.name).eval()
    shape = (most, len(rows), model.config.get_text_config().hidden_size)
    found = np.zeros(shape, dtype=np.float32)
    picked: list[int] = []
    done = 0
    shares = torch.empty(0)

    def watch(depth: int) -> Any:
        def read(_layer: Any, _inputs: Any, output: Any) -> None:
            states = decoder.norm(output[0] if isinstance(output, tuple) else output).float()
            found[depth, picked] = (states * shares[:, :, None]).sum(1).cpu().numpy()

        return read

    layers = list(decoder.layers)[:most]
    hooks = [layer.register_forward_hook(watch(depth)) for depth, layer in enumerate(layers)]
    try:
        with torch.inference_mode(), device.autocast(), linear_layers_cast(model, device):
            for picked in by_tokens(rows, turning_point(model)):
                batch = [rows[index] for index in picked]
                inputs = padded_inputs([row.prompt for row in batch], pad_id, model.device)
                shares = read_shares(batch, inputs["input_ids"].shape[1], model.device)
                show_rows(done, len(rows), "reading for a linear probe of each layer")
                decoder(**inputs, use_cache=False)
                done += len(picked)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def agreement(states: NDArray[np.float32], answers: NDArray[Any]) -> float:
    """Return the share of the rows that a ridge classifier of `states`, [rows, hidden], answers as
    in `answers`, cross-validated in one or several ways."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import KFold, cross_val_predict

    if len(set(answers.tolist())) < 2 or len(answers) < FOLDS:
        return 1.0
    scaled = (states - states.mean(0)) / (states.std(0) + 1e-6)
    classifier: Any = RidgeClassifier(alpha=PENALTY)  # type: ignore[no-untyped-call]
    ways = min(5, max(1, ANSWERS // len(answers)))
    shares = []
    for seed in range(ways):
        folds: Any = KFold(FOLDS, shuffle=True, random_state=seed)  # type: ignore[no-untyped-call]
        with short_fits():
            said = cross_val_predict(classifier, scaled, answers, cv=folds)
        shares.append((said == answers).mean())
    return float(np.mean(shares))
