"""Compare answers with the rows' gold answers: right or wrong, or by the metric of written ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from distillery.evaluation.bootstrap import PairedSums, RowSums
from distillery.evaluation.metrics import row_statistics, value
from distillery.evaluation.scoreboard import GOLD
from distillery.evaluation.scoring import Answers
from distillery.evaluation.statistics import Paired, count_pairs, wilson_interval
from distillery.recipe import Metric
from distillery.records import Estimate, Example

# Each figure of a predictor asks for the same statistics, and ROUGE-L's take a millisecond a row.
statistics_of = lru_cache(maxsize=100_000)(row_statistics)


@dataclass(frozen=True)
class Gold:
    """What answers are compared with: the gold answers of each row, one or more, and the primary
    metric of written answers; None is accuracy."""

    answers: Sequence[tuple[str, ...]]
    metric: Metric | None = None

    def rights(self, answers: Answers) -> list[bool]:
        """Return row by row whether the answer is a gold one."""
        return [answer in gold for answer, gold in zip(answers, self.answers, strict=True)]

    def sums(self, answers: Answers, metric: Metric) -> RowSums:
        """Return the statistics of answers by a metric, as the bootstrap takes them."""
        import numpy as np

        def table(given: Answers) -> Any:
            rows = zip(given, self.answers, strict=True)
            return np.array([statistics_of(metric, answer, gold) for answer, gold in rows])

        best = table([gold[0] for gold in self.answers]).mean(axis=0)
        none = table([None] * len(self.answers)).mean(axis=0)
        return RowSums(metric, table(answers), best, none)

    def estimate(self, answers: Answers, metric: Metric | None) -> Estimate:
        """Return a figure of one or more rows with its 95 % interval: of accuracy and exact match
        Wilson's, of others by the bootstrap."""
        if metric is not None and not is_share(metric):
            return self.sums(answers, metric).estimate()
        right, rows = sum(self.rights(answers)), len(self.answers)
        interval = wilson_interval(right, rows)
        return Estimate(value=right / rows, low=interval.low, high=interval.high)

    def paired(self, first: Answers, second: Answers) -> Paired:
        """Return two predictors on the same rows by the primary metric."""
        metric = self.metric
        if metric is None or is_share(metric) or not self.answers:
            return count_pairs(self.rights(first), self.rights(second))
        return PairedSums(self.sums(first, metric), self.sums(second, metric))

    def row_values(self, answers: Answers) -> list[float]:
        """Return the primary figure of each row by itself (0 to 1)."""
        found = []
        for answer, gold in zip(answers, self.answers, strict=True):
            if self.metric is None:
                found.append(float(answer in gold))
            else:
                found.append(value(self.metric, statistics_of(self.metric, answer, gold)))
        return found


def is_share(metric: Metric | None) -> bool:
    """Return whether a figure is a share of rows, for which there are exact methods."""
    return metric in (None, "exact_match")


def gold_of(examples: Sequence[Example]) -> Gold:
    """Return what the answers to rows with gold answers are compared with."""
    answers = [example.right_answers for example in examples]
    answer_format = examples[0].format if examples else None
    return Gold(answers, answer_format.metric if answer_format else None)


def gold_in(rows: Sequence[Mapping[str, Any]]) -> Gold:
    """Return what the answers in lines of an answers.jsonl are compared with."""
    answers = [(row[GOLD], *row.get("references", ())) for row in rows]
    return Gold(answers, rows[0].get("metric") if rows else None)
