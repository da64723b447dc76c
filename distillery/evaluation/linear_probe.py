"""A linear probe: what the base model knows of the classes without any training of its weights.

Logistic regression on the mean of the hidden states of a text's tokens, in the middle of the model
(Alain, Bengio, Understanding intermediate layers using linear classifier probes, 2016). It takes
a minute, so that a model whose training does no better was not worth training.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.evaluation.scoring import Probabilities
from distillery.models.device import choose_device, linear_layers_cast
from distillery.models.load import load_model, pad_id
from distillery.prompts import TransformersTokenizer, render_ids
from distillery.recipe import PromptRecipe
from distillery.records import Example
from distillery.training.batching import padded_inputs
from distillery.training.pruning import keep_layers

if TYPE_CHECKING:
    import torch

PROBE = "linear probe"

BATCH_SIZE = 16


def classify_states(
    base: Path,
    remote_code: bool,
    learnt: Sequence[Example],
    asked: Sequence[Example],
    prompt: PromptRecipe,
    rows_done: Callable[[int], None] | None = None,
) -> list[str | None]:
    """Learn the classes of `learnt`, rows with answers of two classes or more, and return a class
    for each row that is asked; None for a prompt that is too long.

    `base`: the model's folder. `rows_done` is told how many rows were computed."""
    from distillery.training.probing import fit_probe

    model, tokenizer = load_model(base, None, remote_code)
    keep_lower_half(model)
    wrapped = TransformersTokenizer(tokenizer)
    states_of = mean_states(model, pad_id(tokenizer), rows_done)
    known = []
    for example in learnt:
        ids = render_ids(example, prompt, wrapped)
        if ids is not None:
            known.append((ids, example.answer_key))
    classes = sorted({str(answer) for _, answer in known})
    features = states_of([ids for ids, _ in known])
    probe = fit_probe(
        features.numpy(), [classes.index(str(answer)) for _, answer in known], len(classes)
    )
    rendered = [render_ids(example, prompt, wrapped) for example in asked]
    scores = probe.scores(states_of([ids for ids in rendered if ids is not None]).numpy())
    found = iter(scores.argmax(-1).tolist())
    return [None if ids is None else classes[next(found)] for ids in rendered]


def cross_validated(
    base: Path, remote_code: bool, rows: Sequence[Example], prompt: PromptRecipe
) -> list[Probabilities]:
    """Return the probabilities of each row's classes by a probe that has not learnt from the row.

    A row has none if its prompt is too long, it has no answer, or its class has fewer than FOLDS
    rows. `base`: the model's folder."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    from distillery.training.probing import FOLDS, best_regularisation

    model, tokenizer = load_model(base, None, remote_code)
    keep_lower_half(model)
    wrapped = TransformersTokenizer(tokenizer)
    counts = Counter(row.answer_key for row in rows)
    positions, prompts = [], []
    for position, row in enumerate(rows):
        ids = render_ids(row, prompt, wrapped)
        if ids is not None and row.answer_key and counts[row.answer_key] >= FOLDS:
            positions.append(position)
            prompts.append(ids)
    found: list[Probabilities] = [None] * len(rows)
    names = sorted({str(rows[position].answer_key) for position in positions})
    if len(names) < 2:
        return found
    answers = [names.index(str(rows[position].answer_key)) for position in positions]
    states = mean_states(model, pad_id(tokenizer), None)(prompts).numpy()
    states = (states - states.mean(0)) / (states.std(0) + 1e-6)
    strength = best_regularisation(states, answers, intercept=True)
    classifier: Any = LogisticRegression(C=strength, max_iter=500)  # type: ignore[no-untyped-call]
    folds: Any = StratifiedKFold(FOLDS, shuffle=True, random_state=0)  # type: ignore[no-untyped-call]
    shares = cross_val_predict(classifier, states, answers, cv=folds, method="predict_proba")
    for position, share in zip(positions, shares.tolist(), strict=True):
        by_name = dict(zip(names, share, strict=True))
        found[position] = tuple(by_name.get(key, 0.0) for key in rows[position].keys)
    return found


def keep_lower_half(model: Any) -> None:
    """Drop the upper half of the decoder layers: what the probe reads stands below them."""
    keep_layers(model, range(max(1, len(model.get_decoder().layers) // 2)))


def mean_states(
    model: Any, padding: int, rows_done: Callable[[int], None] | None
) -> Callable[[Sequence[Sequence[int]]], "torch.Tensor"]:
    """Return a function that gives for each prompt the mean of its tokens' last states, [rows,
    hidden], in float32."""
    import torch

    device = choose_device()
    model.to(device.name).eval()

    def states_of(prompts: Sequence[Sequence[int]]) -> "torch.Tensor":
        means: list[Any] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        with torch.inference_mode(), device.autocast(), linear_layers_cast(model, device):
            for start in range(0, len(order), BATCH_SIZE):
                picked = order[start : start + BATCH_SIZE]
                inputs = padded_inputs([prompts[i] for i in picked], padding, model.device)
                states = model.get_decoder()(**inputs, use_cache=False).last_hidden_state.float()
                mask = inputs["attention_mask"][:, :, None]
                found = ((states * mask).sum(1) / mask.sum(1)).cpu()
                for index, mean in zip(picked, found, strict=True):
                    means[index] = mean
                if rows_done:
                    rows_done(len(picked))
        return torch.stack(means)

    return states_of
