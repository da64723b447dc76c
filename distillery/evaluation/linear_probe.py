"""A linear probe: what the base model knows of the classes without any training of its weights.

Logistic regression on the mean of the hidden states of a text's tokens, in the middle of the model
(Alain, Bengio, Understanding intermediate layers using linear classifier probes, 2016). It takes
a minute, so that a model whose training does no better was not worth training.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillery.evaluation.scoring import Probabilities
from distillery.models.device import choose_device, linear_layers_cast
from distillery.models.load import load_model, pad_id
from distillery.progress import show_rows
from distillery.prompts import TransformersTokenizer, render_ids
from distillery.recipe import PromptRecipe
from distillery.records import Example
from distillery.training.batching import padded_inputs
from distillery.training.pruning import keep_layers

PROBE = "linear probe"

BATCH_SIZE = 16


class TextStates:
    """The mean of the states of a prompt's tokens in the middle of a base model.

    The model is loaded when the first prompt is computed, and each prompt is computed once, so
    that all parts of an evaluation should ask one object."""

    def __init__(self, base: Path, remote_code: bool) -> None:
        self.base, self.remote_code = base, remote_code
        self.known: dict[tuple[int, ...], NDArray[np.float32]] = {}

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The lower half of the model, on its device, and its tokenizer."""
        device = choose_device()
        model, tokenizer = load_model(self.base, None, self.remote_code, device.frozen_precision)
        keep_layers(model, range(max(1, len(model.get_decoder().layers) // 2)))
        return model.to(device.name).eval(), tokenizer

    def unload(self) -> None:
        """Free the model's memory. What was computed stays."""
        self.__dict__.pop("loaded", None)

    def render(
        self, examples: Sequence[Example], prompt: PromptRecipe
    ) -> list[tuple[int, ...] | None]:
        """Return each row's prompt as token ids; None for one that is too long."""
        wrapped = TransformersTokenizer(self.loaded[1])
        rendered = [render_ids(example, prompt, wrapped) for example in examples]
        return [None if ids is None else tuple(ids) for ids in rendered]

    def means(self, prompts: Sequence[tuple[int, ...]]) -> NDArray[np.float32]:
        """Return the mean states of `prompts`, [prompts, hidden]."""
        import torch

        model, tokenizer = self.loaded
        padding, device = pad_id(tokenizer), choose_device()
        new = sorted(set(prompts) - self.known.keys(), key=lambda ids: (len(ids), ids))
        with torch.inference_mode(), device.autocast(), linear_layers_cast(model, device):
            for start in range(0, len(new), BATCH_SIZE):
                show_rows(start, len(new), "reading for a linear probe")
                picked = new[start : start + BATCH_SIZE]
                inputs = padded_inputs(picked, padding, model.device)
                states = model.get_decoder()(**inputs, use_cache=False).last_hidden_state.float()
                mask = inputs["attention_mask"][:, :, None]
                found = ((states * mask).sum(1) / mask.sum(1)).cpu().numpy()
                self.known.update(zip(picked, found, strict=True))
        return np.stack([self.known[ids] for ids in prompts])


def classify_states(
    states: TextStates,
    learnt: Sequence[Example],
    asked: Sequence[Example],
    prompt: PromptRecipe,
) -> list[str | None]:
    """Learn the classes of `learnt`, rows with answers of two classes or more, and return a class
    for each row that is asked; None for a prompt that is too long."""
    from distillery.training.probing import fit_probe

    known, answers = [], []
    for example, ids in zip(learnt, states.render(learnt, prompt), strict=True):
        if ids is not None:
            known.append(ids)
            answers.append(str(example.answer_key))
    classes = sorted(set(answers))
    probe = fit_probe(states.means(known), [classes.index(a) for a in answers], len(classes))
    rendered = states.render(asked, prompt)
    scores = probe.scores(states.means([ids for ids in rendered if ids is not None]))
    found = iter(scores.argmax(-1).tolist())
    return [None if ids is None else classes[next(found)] for ids in rendered]


def cross_validated(
    states: TextStates, rows: Sequence[Example], prompt: PromptRecipe
) -> list[Probabilities]:
    """Return the probabilities of each row's classes by a probe that has not learnt from the row.

    A row has none if its prompt is too long, it has no answer, or its class has fewer than FOLDS
    rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    from distillery.training.probing import FOLDS, best_regularisation, short_fits

    counts = Counter(row.answer_key for row in rows)
    positions, prompts = [], []
    for position, ids in enumerate(states.render(rows, prompt)):
        answer = rows[position].answer_key
        if ids is not None and answer and counts[answer] >= FOLDS:
            positions.append(position)
            prompts.append(ids)
    found: list[Probabilities] = [None] * len(rows)
    names = sorted({str(rows[position].answer_key) for position in positions})
    if len(names) < 2:
        return found
    answers = [names.index(str(rows[position].answer_key)) for position in positions]
    means = states.means(prompts)
    means = (means - means.mean(0)) / (means.std(0) + 1e-6)
    with short_fits():
        strength = best_regularisation(means, answers, intercept=True)
        classifier: Any = LogisticRegression(C=strength, max_iter=500)  # type: ignore[no-untyped-call]
        folds: Any = StratifiedKFold(FOLDS, shuffle=True, random_state=0)  # type: ignore[no-untyped-call]
        shares = cross_val_predict(classifier, means, answers, cv=folds, method="predict_proba")
    for position, share in zip(positions, shares.tolist(), strict=True):
        by_name = dict(zip(names, share, strict=True))
        found[position] = tuple(by_name.get(key, 0.0) for key in rows[position].keys)
    return found
