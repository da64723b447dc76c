"""Whether rows are few for what they serve for: the one wording of `distillery new`, `distillery
check` and a run."""

import math
from collections.abc import Mapping

FEWEST = {"validation": 30, "test": 100}
"""Rows of these roles below which it is told that they are few: 30 tell how good a model is to
±18 points, 100 to ±10."""


def few_rows(counts: Mapping[str, int]) -> dict[str, str]:
    """Return what to tell of few rows, such as {"test rows": "40 are few: ..."}; `counts` has the
    rows by role, and of a role that it has not nothing is told."""
    told = {}
    for role, fewest in FEWEST.items():
        count = counts.get(role, fewest)
        precision, better = f"±{points(count):.0f}", f"±{points(fewest):.0f}"
        if count == 0:
            text = f"none; {fewest} tell how good a model is to {better} points"
        elif count < fewest:
            text = f"{count} are few: they tell how good a model is to {precision} points only"
            if precision != better:
                text += f" ({fewest}: {better})"
        else:
            continue
        # Of a role there are few because few are labelled, or because the recipe limits it.
        told[f"{role} rows"] = f"{text}; use more {role} rows"
    return told


def points(rows: int) -> float:
    """Return to how many points, plus or minus, so many rows tell a share or another figure between
    0 and 1: half of the 95 % interval of a share of one half, the widest there is."""
    return min(100.0, 98 / math.sqrt(max(1, rows)))
