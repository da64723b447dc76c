"""How much a teacher's probabilities are worth beside its labels, by answered rows.

A student can learn a mixture of both: with a share w, w p + (1 - w) e, where p are the teacher's
probabilities and e is 1 for its label and 0 for the rest. If the probabilities are calibrated, they
are the best guess at the right answer themselves; if the teacher is surer in truth than it says,
its labels are nearer to it.
"""

from collections.abc import Sequence

PRIOR_ROWS = 20
"""Rows' worth of trust that the probabilities are calibrated, so that a few rows decide little."""


def calibrated_share(probabilities: Sequence[Sequence[float]], right: Sequence[int]) -> float:
    """Return the share w (0 to 1) whose mixtures have the least Brier score (Brier, Verification of
    Forecasts Expressed in Terms of Probability, 1950) on the rows, after `PRIOR_ROWS` for which it
    is 1.

    `probabilities`: of each row, [rows, classes]; `right`: the index of its right class. The sum
    over rows of |e + w (p - e) - y|^2, with y the right answer, is least at w = sum (p - e)(y - e)
    / sum |p - e|^2. It is 1 where the probabilities are 0 and 1 alone, or there are no rows."""
    import numpy as np

    if not len(probabilities):
        return 1.0
    p = np.asarray(probabilities, dtype=float)
    classes = np.eye(p.shape[1])
    labels = classes[p.argmax(1)]
    distances = ((p - labels) ** 2).sum(1)
    prior = PRIOR_ROWS * distances.mean()
    if prior == 0:
        return 1.0
    gained = ((p - labels) * (classes[list(right)] - labels)).sum(1)
    share = (gained.sum() + prior) / (distances.sum() + prior)
    return float(np.clip(share, 0.0, 1.0))
