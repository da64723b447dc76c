"""Whether the 95 % intervals of distillery/evaluation/bootstrap.py hold what they should:
`python -m benchmarks.simulate_metrics`.

Two students are simulated that find fields of rows: some rows
are harder than others, and to nine fields of ten a student has the luck that both share. A line
for each number of rows and true field F1: the share of intervals that hold the true F1, and that of
paired intervals that hold the true difference; by quantiles of a plain bootstrap, by bias-corrected
and accelerated ones (BCa: Efron, Better bootstrap confidence intervals, JASA 82, 1987), and by
bootstrap.py. The last line is JSON: the smallest share over the lines, of each.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import norm

from distillery.evaluation.bootstrap import PairedSums, RowSums, resampled_sums

TRIALS = 500
ROWS = (30, 100, 300, 1000)
LEVELS = (0.7, 0.95, 0.99)
ALIKE = 0.9
MOST_FIELDS = 8


def main() -> None:
    generator = np.random.default_rng(0)
    smallest: dict[str, float] = {}
    for rows in ROWS:
        for level in LEVELS:
            for name, share in coverage(generator, rows, level).items():
                smallest[name] = min(smallest.get(name, 1.0), round(share, 3))
    print(json.dumps(smallest))


def coverage(generator: np.random.Generator, rows: int, level: float) -> dict[str, float]:
    """Return the shares of TRIALS intervals that hold the true figure, and print them."""
    both = students(generator, 1_000_000, level).sum(axis=0)
    true = {"one": f1(both[:2]), "difference": f1(both[:2]) - f1(both[2:])}
    held: dict[str, int] = {}
    for _ in range(TRIALS):
        table = students(generator, rows, level)
        full = np.array([table[:, 1].mean(), table[:, 1].mean()])
        sides = []
        for columns in (table[:, :2], table[:, 2:]):
            # A row without an answer has its gold fields alone: half of those of a right answer.
            sides.append(RowSums("field_f1", columns, full, np.array([0, full[1] / 2])))
        estimate, interval = sides[0].estimate(), PairedSums(*sides).difference_interval(0.95)
        found: dict[str, tuple[float, ...]] = {
            "one, here": (estimate.low, estimate.high),
            "difference, here": (interval.low, interval.high),
        }
        figures: dict[str, Callable[[Any], Any]] = {
            "one": lambda sums: f1(sums[..., :2]),
            "difference": lambda sums: f1(sums[..., :2]) - f1(sums[..., 2:]),
        }
        for name, figure in figures.items():
            resampled = figure(resampled_sums(table))
            found[f"{name}, plain"] = tuple(np.quantile(resampled, (0.025, 0.975)))
            found[f"{name}, BCa"] = accelerated(figure, table, resampled)
        for name, (low, high) in found.items():
            value = true[name.partition(",")[0]]
            held[name] = held.get(name, 0) + (low - 1e-9 <= value <= high + 1e-9)
    shares = {name: count / TRIALS for name, count in sorted(held.items())}
    texts = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
    print(f"{rows:,} rows, F1 {true['one']:.3f}: {texts}", flush=True)
    return shares


def students(generator: np.random.Generator, rows: int, level: float) -> Any:
    """Return the statistics of field F1 of two equally good students, [rows, 4]."""
    gold = 1 + np.minimum(generator.poisson(1.5, rows), MOST_FIELDS - 1)
    ease = generator.beta(4 * level, 4 * (1 - level), rows)[:, None]
    luck = generator.random((rows, MOST_FIELDS))
    columns = []
    for _ in range(2):
        own = np.where(generator.random(luck.shape) < ALIKE, luck, generator.random(luck.shape))
        right = ((own < ease) & (np.arange(MOST_FIELDS) < gold[:, None])).sum(axis=1)
        # Of the fields that are not right, one in three rows leaves one out.
        given = gold - ((generator.random(rows) < 0.3) & (right < gold))
        columns += [2 * right, given + gold]
    return np.stack(columns, axis=1).astype(float)


def f1(sums: Any) -> Any:
    return sums[..., 0] / sums[..., 1]


def accelerated(figure: Callable[[Any], Any], table: Any, resampled: Any) -> tuple[float, ...]:
    """Return the BCa interval."""
    sums = table.sum(axis=0)
    left_out = figure(sums - table)
    apart = left_out.mean() - left_out
    spread = 6 * (apart @ apart) ** 1.5
    acceleration = (apart**3).sum() / spread if spread else 0.0
    observed = figure(sums)
    below = ((resampled < observed).mean() + (resampled <= observed).mean()) / 2
    bias = norm.ppf(np.clip(below, 1e-4, 1 - 1e-4))
    tails = bias + norm.ppf((0.025, 0.975))
    return tuple(np.quantile(resampled, norm.cdf(bias + tails / (1 - acceleration * tails))))


if __name__ == "__main__":
    main()
