"""Logistic regression on a model's states: the start of a classifier's head, and a rival of it."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillery.progress import show_rows

_log = logging.getLogger(__name__)

REGULARISATION = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Values of C, the inverse strength of the penalty, among which cross-validation chooses."""

FOLDS = 4

MOST_FOLDED = 20_000
"""Rows times classes above which a middle value of C is taken without cross-validation, which
would take minutes."""


@dataclass(frozen=True)
class Probe:
    """Weights [classes, hidden] and intercepts [classes]."""

    weights: NDArray[np.float32]
    intercepts: NDArray[np.float32]

    def scores(self, states: NDArray[Any]) -> NDArray[np.float32]:
        """Return the logits of `states`, [rows, hidden]: [rows, classes]."""
        found: NDArray[np.float32] = states @ self.weights.T + self.intercepts
        return found


def fit_probe(
    states: NDArray[Any], answers: Sequence[int], classes: int, intercept: bool = True
) -> Probe:
    """Fit a multinomial logistic regression of `answers` (indices below `classes`) on `states`,
    [rows, hidden]. A class without a row gets zeros.

    With `intercept` the states are standardised. Without it they are only divided by their size,
    so that the weights alone give the logits, as the rows of a model's head do. C is chosen by
    cross-validation."""
    from sklearn.linear_model import LogisticRegression

    centre = np.zeros(states.shape[1], dtype=np.float32)
    scale = np.full_like(centre, np.sqrt((states**2).mean()))
    if intercept:
        centre, scale = states.mean(0), states.std(0) + 1e-6
    weights = np.zeros((classes, states.shape[1]), dtype=np.float32)
    intercepts = np.zeros(classes, dtype=np.float32)
    found = sorted(set(answers))
    if len(found) < 2:
        return Probe(weights, intercepts)
    scaled = (states - centre) / scale
    with short_fits():
        chosen: Any = LogisticRegression(  # type: ignore[no-untyped-call]
            C=best_regularisation(scaled, answers, intercept), fit_intercept=intercept, max_iter=500
        )
        chosen.fit(scaled, answers)
    rows, offsets = chosen.coef_, np.broadcast_to(chosen.intercept_, len(chosen.coef_))
    if len(found) == 2:
        # scikit-learn keeps one row for two classes: the second's, less the first's.
        rows = np.concatenate([-rows / 2, rows / 2])
        offsets = np.concatenate([-offsets / 2, offsets / 2])
    weights[found] = rows / scale
    intercepts[found] = offsets - weights[found] @ centre
    return Probe(weights, intercepts)


@contextmanager
def short_fits() -> Iterator[None]:
    """Let scikit-learn fit small models within, on one thread, without a word where a fit ends
    before its optimum: a start of a training and a choice of C need no more."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    # The matrices are small: threads would only wait for one another.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def best_regularisation(states: NDArray[Any], answers: Sequence[int], intercept: bool) -> float:
    """Return the value of C with the best cross-validated log-loss, the strongest of equals."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    middle = REGULARISATION[len(REGULARISATION) // 2]
    counts = np.bincount(np.asarray(answers))
    rarest = int(counts[counts > 0].min())
    if rarest < FOLDS or len(states) * len(counts) > MOST_FOLDED:
        return middle
    folds: Any = StratifiedKFold(FOLDS, shuffle=True, random_state=0)  # type: ignore[no-untyped-call]
    best, best_score = middle, -np.inf
    for number, value in enumerate(REGULARISATION):
        fitted, of = number * len(states), len(REGULARISATION) * len(states)
        show_rows(fitted, of, "fitting a linear probe")
        model: Any = LogisticRegression(C=value, fit_intercept=intercept, max_iter=200)  # type: ignore[no-untyped-call]
        scores = cross_val_score(model, states, answers, cv=folds, scoring="neg_log_loss")
        if scores.mean() > best_score:
            best, best_score = value, float(scores.mean())
    _log.debug("linear probe: C %g, cross-validated log-loss %.3f", best, -best_score)
    return best
