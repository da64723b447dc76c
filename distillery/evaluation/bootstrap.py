"""Intervals of figures that are no share of rows, by one bootstrap over rows.

A figure of metrics.py is a function of sums over rows. A resample draws as many rows as there are,
each as often as chance has it, for both of two predictors the same (Efron, Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13; for paired comparisons of texts: Koehn, Statistical
Significance Tests for Machine Translation Evaluation, EMNLP 2004). The bounds of an interval are
quantiles of the resamples' figures.

Where few rows are wrong, or two predictors differ on few rows, a plain bootstrap is too sure: where
they differ on none, its interval has no width. So each resample is spread further by the chance of
two more rows, which are spread evenly over the cells right and wrong of each predictor, as Agresti
and Min add them for shares (Simple improved confidence intervals for comparing matched proportions,
Statistics in Medicine 24, 2005, 729-740); the figure itself stays as it is.
benchmarks/simulate_metrics.py measures how often intervals hold what they should.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from distillery.evaluation.metrics import value
from distillery.recipe import Metric
from distillery.records import Estimate, Interval

RESAMPLES = 2000

SEED = 0

ADDED_ROWS = 2

LARGEST_RATIO = 100
"""A ratio of two figures counts as this at most: where the second one is all but 0, more says
nothing."""

BLOCK = 100
"""Resamples that are summed together: whole, those of 100,000 rows would take 1.6 GB."""


@dataclass(frozen=True, eq=False)
class RowSums:
    """A predictor's statistics of a metric, [rows, statistics], with those that all of a row's gold
    answer and no answer have on average over the rows, [statistics] each."""

    metric: Metric
    rows: Any
    best: Any
    none: Any

    @property
    def value(self) -> float:
        return value(self.metric, self.rows.sum(axis=0).tolist())

    def estimate(self, confidence: float = 0.95) -> Estimate:
        """Return the figure with its interval, in [0, 1]."""
        import numpy as np

        cells = np.stack([self.best, self.none])
        found = figures(self.metric, resampled_sums(self.rows) + spread(cells))
        interval = around(self.value, found, confidence)
        return Estimate(value=self.value, low=interval.low, high=interval.high)


@dataclass(frozen=True, eq=False)
class PairedSums:
    """Two predictors on the same rows, one or more, by the same metric."""

    first: RowSums
    second: RowSums

    @property
    def rows(self) -> int:
        return len(self.first.rows)

    @property
    def values(self) -> tuple[float, float]:
        """The figures of both."""
        return self.first.value, self.second.value

    @property
    def difference(self) -> float:
        """The first's figure minus the second's."""
        return self.first.value - self.second.value

    @cached_property
    def resampled(self) -> tuple[Any, Any]:
        """The figures of both, [RESAMPLES] each."""
        import numpy as np

        first, second = self.first, self.second
        kept = first.rows.shape[1]
        cells = []
        for ours in (first.best, first.none):
            for theirs in (second.best, second.none):
                cells.append(np.concatenate([ours, theirs]))
        sums = resampled_sums(np.hstack([first.rows, second.rows])) + spread(np.stack(cells))
        return figures(first.metric, sums[:, :kept]), figures(second.metric, sums[:, kept:])

    def difference_interval(self, confidence: float, weight: float = 1.0) -> Interval:
        """Return the interval of the first's figure minus `weight` times the second's."""
        ours, theirs = self.resampled
        observed = self.first.value - weight * self.second.value
        return around(observed, ours - weight * theirs, confidence)

    def ratio_interval(self, confidence: float) -> Interval:
        """Return the interval of the first's figure divided by the second's, which must be above
        0; up to LARGEST_RATIO."""
        import numpy as np

        ours, theirs = self.resampled
        ratios = np.minimum(ours / np.maximum(theirs, np.finfo(float).tiny), LARGEST_RATIO)
        return around(self.first.value / self.second.value, ratios, confidence)


def resampled_sums(rows: Any) -> Any:
    """Return the sums of statistics, [rows, statistics], over the rows of each resample:
    [RESAMPLES, statistics]. The rows drawn depend on their number alone."""
    import numpy as np

    return np.concatenate([counts.astype(float) @ rows for counts in drawn(len(rows))])


@lru_cache(maxsize=1)
def drawn(rows: int) -> list[Any]:
    """Return how often each resample has each row, [BLOCK, rows] for each block of resamples."""
    import numpy as np

    generator = np.random.default_rng(SEED)
    shares, blocks = np.full(rows, 1 / rows), []
    for _ in range(RESAMPLES // BLOCK):
        # No row is drawn 255 times.
        blocks.append(generator.multinomial(rows, shares, size=BLOCK).astype(np.uint8))
    return blocks


def spread(cells: Any) -> Any:
    """Return what ADDED_ROWS rows on average, evenly from the `cells`, [cells, statistics], add to
    each resample beyond their average: [RESAMPLES, statistics]. Their numbers are Poisson's, as
    those of a row in resamples are."""
    import numpy as np

    generator = np.random.default_rng(SEED + 1)
    average = ADDED_ROWS / len(cells)
    counts = generator.poisson(average, size=(RESAMPLES, len(cells)))
    return (counts - average) @ cells


def figures(metric: Metric, sums: Any) -> Any:
    """Return the figure of each resample, in [0, 1], of sums, [RESAMPLES, statistics]."""
    import numpy as np

    # The spread may take more from a sum than is there.
    each = [value(metric, row) for row in np.maximum(sums, 0).tolist()]
    return np.clip(each, 0, 1)


def around(observed: float, found: Any, confidence: float) -> Interval:
    """Return the quantiles of resampled figures, with the observed one between them."""
    import numpy as np

    tail = (1 - confidence) / 2
    low, high = np.quantile(found, (tail, 1 - tail)).tolist()
    return Interval(low=min(low, observed), high=max(high, observed))
