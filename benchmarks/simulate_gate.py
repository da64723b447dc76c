"""Whether the gate keeps its promises: `make simulate-gate`.

Students are simulated as pairs of right and wrong answers to the same test rows, and judged by the
gate's own code. Each figure is of 2,000 pairs. A line for each scenario; the last line is JSON:

false_promotions    the largest share, over the scenarios, of truly worse challengers that pass: by
                    exactly the margin against the champion, or no better than the predictor to beat
stated_error        1 - confidence of the rules; false_promotions may be above it by no more than
                    the 95 % Monte Carlo bound, 1.96 * sqrt(p (1 - p) / 2000)
power               the smallest share of challengers as good as the champion that pass, at the
                    number of test rows that the verdict `undecided` gives
stated_power        what that number of rows promises
coverage            the smallest share, over the scenarios, of 95 % intervals that hold the true
                    difference or the true ratio
walked_down_points  the most points of true accuracy, over the scenarios, that champions have lost
                    on average after fifty weekly challengers, each truly half a point worse than
                    the champion of its week, by the default rules; they may lose the margin

The intervals are approximate (distillery/evaluation/statistics.py names their sources): where two
students of 60 % accuracy differ on few rows, the error reaches 6 %. So the exit code is 1 only if a
promise is broken by more than the Monte Carlo bound in one of the scenarios here.

The default rules compare with the champion of the week and with an anchor, the best version so far.
The anchor is tested again each week on the same rows: fifty chances for a lucky challenger. So its
confidence is 99 %. The last lines show the walk without the anchor, and what the anchor costs:
challengers that are truly half a point better each week are promoted less often, because the best
version so far is also the luckiest one.
"""

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from distillery.evaluation import statistics
from distillery.evaluation.gate import decide_difference
from distillery.evaluation.statistics import (
    POWER,
    Pairs,
    difference_interval,
    ratio_interval,
    rows_needed,
)
from distillery.recipe import BetterRule, NotWorseRule
from distillery.recipe.evaluation import DEFAULT_RULES

PAIRS, WEEKS = 2000, 50
MARGIN, CONFIDENCE = 0.02, 0.95
ACCURACY = 0.85
"""The champion's true accuracy."""
HIGHEST = 0.97
"""True accuracy that no student gets beyond."""
DISCORDANT = (0.05, 0.12, 0.2)
"""Shares of rows that one of the two alone answers right."""
ROWS = (200, 500, 1000)
WEEKLY_CHANGE, WEEKLY_DISCORDANT = 0.005, 0.12
WEEKLY_ROWS = (500, 1000, 2000)
"""On few rows most of the challengers are undecided; many rows tell a small loss from the margin,
and so let it pass."""

NOT_WORSE = NotWorseRule(kind="not_worse", margin=MARGIN, confidence=CONFIDENCE)
(ANCHOR,) = [rule for rule in DEFAULT_RULES if rule.kind == "not_worse" and rule.than == "best"]
BETTER = BetterRule(kind="better", than="base model", confidence=CONFIDENCE)


def main() -> int:
    """Simulate all; return 1 if a promise is broken."""
    generator = np.random.default_rng(0)
    # Each simulated table asks for the same few intervals.
    statistics.wilson_interval = functools.cache(statistics.wilson_interval)
    false_promotions = max(worse_that_pass(generator))
    power = min(equal_that_pass(generator))
    coverage = min(intervals_that_cover(generator))
    walked = max(-walk(generator, rows, -WEEKLY_CHANGE, anchored=True) for rows in WEEKLY_ROWS)
    for rows in WEEKLY_ROWS:
        walk(generator, rows, -WEEKLY_CHANGE, anchored=False)
    for rows in WEEKLY_ROWS:
        for anchored in (True, False):
            walk(generator, rows, WEEKLY_CHANGE, anchored)
    figures = {
        "false_promotions": round(false_promotions, 4),
        "stated_error": round(1 - CONFIDENCE, 4),
        "power": round(power, 4),
        "stated_power": POWER,
        "coverage": round(coverage, 4),
        "walked_down_points": round(walked, 2),
    }
    print(json.dumps(figures))
    kept = (
        false_promotions <= 1 - CONFIDENCE + monte_carlo_error(1 - CONFIDENCE)
        and power >= POWER - monte_carlo_error(POWER)
        and coverage >= 0.95 - monte_carlo_error(0.95)
        and walked <= 100 * MARGIN
    )
    return 0 if kept else 1


def monte_carlo_error(share: float) -> float:
    """Return how far the share of PAIRS simulated pairs may be from the true one, at 95 %."""
    return 1.96 * math.sqrt(share * (1 - share) / PAIRS)


def simulated(
    generator: np.random.Generator, rows: int, discordant: float, difference: float
) -> Iterator[Pairs]:
    """Yield PAIRS tables of a challenger, whose true accuracy is ACCURACY plus `difference`, and
    its champion."""
    first, second = (discordant + difference) / 2, (discordant - difference) / 2
    both = ACCURACY - second
    for cells in generator.multinomial(
        rows, [both, first, second, 1 - both - first - second], size=PAIRS
    ):
        yield Pairs(*map(int, cells))


def passes_not_worse(pairs: Pairs) -> bool:
    """Return whether a challenger passes against its champion."""
    return decide_difference(NOT_WORSE, pairs, -MARGIN, "").passes


def passes_better(pairs: Pairs) -> bool:
    """Return whether a student passes against the predictor that it must beat."""
    return decide_difference(BETTER, pairs, 0.0, "").passes


def worse_that_pass(generator: np.random.Generator) -> Iterator[float]:
    """Yield shares of passes of students that are exactly as bad as the rule must refuse."""
    rules: tuple[tuple[str, Callable[[Pairs], bool], float], ...] = (
        (NOT_WORSE.title, passes_not_worse, -MARGIN),
        (BETTER.title, passes_better, 0.0),
    )
    for title, passes, difference in rules:
        for rows in ROWS:
            for discordant in DISCORDANT:
                tables = simulated(generator, rows, discordant, difference)
                share = sum(map(passes, tables)) / PAIRS
                show(share, f"pass, truly {100 * difference:+.0f} points", rows, discordant, title)
                yield share


def equal_that_pass(generator: np.random.Generator) -> Iterator[float]:
    """Yield shares of passes of challengers as good as their champion, at the rows needed."""
    for discordant in DISCORDANT:
        half = round(5000 * discordant)
        expected = Pairs(
            round(10000 * ACCURACY) - half, half, half, round(10000 * (1 - ACCURACY)) - half
        )
        rows = rows_needed(expected, -MARGIN, CONFIDENCE) or 0
        share = sum(map(passes_not_worse, simulated(generator, rows, discordant, 0.0))) / PAIRS
        show(share, "pass, truly as good", rows, discordant, NOT_WORSE.title)
        yield share


def intervals_that_cover(generator: np.random.Generator) -> Iterator[float]:
    """Yield shares of 95 % intervals that hold the true difference, and the true ratio."""
    for rows in ROWS:
        for discordant in DISCORDANT:
            for difference in (-MARGIN, 0.0):
                ratio = (ACCURACY + difference) / ACCURACY
                held = held_ratio = 0
                for pairs in simulated(generator, rows, discordant, difference):
                    interval, of_ratio = difference_interval(pairs), ratio_interval(pairs)
                    held += interval.low <= difference <= interval.high
                    held_ratio += of_ratio.low <= ratio <= of_ratio.high
                show(held / PAIRS, "cover the difference", rows, discordant, f"{difference:+.2f}")
                show(held_ratio / PAIRS, "cover the ratio", rows, discordant, f"{ratio:.3f}")
                yield min(held, held_ratio) / PAIRS


def walk(generator: np.random.Generator, rows: int, change: float, anchored: bool) -> float:
    """Return the points of true accuracy that PAIRS champions have gained on average after WEEKS
    weekly challengers on the same `rows` test rows, each better than the champion by `change`.

    With `anchored` a challenger must also be not worse than the best version so far."""
    shape = (PAIRS, rows)
    champion = generator.random(shape) < ACCURACY
    best, accuracy = champion.copy(), np.full(PAIRS, ACCURACY)
    for _ in range(WEEKS):
        gains, losses = (WEEKLY_DISCORDANT + change) / 2, (WEEKLY_DISCORDANT - change) / 2
        becomes_wrong = generator.random(shape) < (losses / accuracy)[:, None]
        becomes_right = generator.random(shape) < (gains / (1 - accuracy))[:, None]
        challenger = np.where(champion, ~becomes_wrong, becomes_right)
        promoted = np.flatnonzero(all_pass(NOT_WORSE, challenger, champion))
        if anchored:
            promoted = promoted[all_pass(ANCHOR, challenger[promoted], best[promoted])]
        champion[promoted] = challenger[promoted]
        accuracy[promoted] = np.minimum(accuracy[promoted] + change, HIGHEST)
        better = champion.sum(1) > best.sum(1)
        best[better] = champion[better]
    gained = 100 * (accuracy - ACCURACY)
    print(
        f"{gained.mean():+6.2f} points after {WEEKS} weeks, 95 % of champions at least "
        f"{np.percentile(gained, 5):+.1f}: challengers {100 * change:+.1f} points, "
        f"{'with' if anchored else 'without'} the anchor, {rows:,} rows, "
        f"{WEEKLY_DISCORDANT:.0%} discordant, margin {100 * MARGIN:g} points",
        flush=True,
    )
    return float(gained.mean())


def all_pass(rule: NotWorseRule, challenger: Any, earlier: Any) -> Any:
    """Return for each pair whether the challenger passes; both are (pairs, rows) of right
    answers."""
    tables = zip(
        (challenger & earlier).sum(1).tolist(),
        (challenger & ~earlier).sum(1).tolist(),
        (~challenger & earlier).sum(1).tolist(),
        (~challenger & ~earlier).sum(1).tolist(),
        strict=True,
    )
    return np.array(
        [decide_difference(rule, Pairs(*cells), -rule.margin, "").passes for cells in tables],
        dtype=bool,
    )


def show(share: float, what: str, rows: int, discordant: float, detail: str) -> None:
    """Print one scenario."""
    print(f"{share:7.4f} {what}: {rows:,} rows, {discordant:.0%} discordant, {detail}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
