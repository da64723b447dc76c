"""Figures of written answers: metrics, the fields one by one, valid answers and their length."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from distillery.answers import NotAnAnswer, canonical
from distillery.evaluation.gold import Gold
from distillery.evaluation.metrics import Pair, field_pairs, field_statistics, field_value
from distillery.evaluation.scoring import Answers
from distillery.evaluation.statistics import wilson_interval
from distillery.recipe import Metric
from distillery.records import AnswerFormat, Estimate, FieldFigures, WrittenFigures

OBJECT_METRICS: tuple[Metric, ...] = ("exact_match", "field_f1")
TEXT_METRICS: tuple[Metric, ...] = ("exact_match", "rouge_l", "chrf", "bleu")


def written_figures(answers: Answers, gold: Gold, answer_format: AnswerFormat) -> WrittenFigures:
    """Return a predictor's figures on one or more rows."""
    schema = answer_format.json_schema
    names = TEXT_METRICS if schema is None else OBJECT_METRICS
    if answer_format.metric not in names:
        names += (answer_format.metric,)
    valid = sum(is_valid(answer, schema) for answer in answers)
    interval = wilson_interval(valid, len(answers))
    return WrittenFigures(
        metrics={name: gold.estimate(answers, name) for name in names},
        fields=() if schema is None else field_figures(answers, gold.answers),
        valid=Estimate(value=valid / len(answers), low=interval.low, high=interval.high),
        length=float(median([len(answer) for answer in answers if answer] or [0])),
    )


def is_valid(answer: str | None, schema: Mapping[str, Any] | None) -> bool:
    """Return whether there is an answer, which meets the schema where there is one."""
    try:
        return bool(canonical(answer or "", schema))
    except NotAnAnswer:
        return False


def field_figures(answers: Answers, gold: Sequence[tuple[str, ...]]) -> tuple[FieldFigures, ...]:
    """Return the figures of each field, the one with the most rows first. Of several gold answers
    the best for the whole answer counts. A share of no value is 0."""
    rows: Counter[str] = Counter()
    expected, given, right = Counter[str](), Counter[str](), Counter[str]()
    for answer, references in zip(answers, gold, strict=True):
        best = max(references, key=lambda each: field_value(field_statistics(answer, each)))
        theirs, ours = field_pairs(best), field_pairs(answer)
        rows.update({field for field, _ in theirs})
        for counts, pairs in ((expected, theirs), (given, ours), (right, theirs & ours)):
            count_fields(counts, pairs)
    found = []
    for field in sorted({*expected, *given}, key=lambda name: (-rows[name], name)):
        found.append(
            FieldFigures(
                field=field,
                rows=rows[field],
                precision=right[field] / max(1, given[field]),
                recall=right[field] / max(1, expected[field]),
                f1=2 * right[field] / (expected[field] + given[field]),
            )
        )
    return tuple(found)


def count_fields(counts: Counter[str], pairs: Counter[Pair]) -> None:
    """Add the pairs of each field to `counts`."""
    for (field, _), number in pairs.items():
        counts[field] += number
