"""Further figures of a predictor: per class, calibration, divergence from the teacher, latency."""

from collections.abc import Sequence
from typing import Any

from distillery.evaluation.gold import gold_of
from distillery.evaluation.option_order import Reordered, option_text
from distillery.evaluation.scoring import Answers, Probabilities, Scored
from distillery.evaluation.selective import asked_rows, coverage_curve, given_answers
from distillery.evaluation.statistics import (
    calibration_interval,
    macro_f1_interval,
    mean_interval,
    wilson_interval,
)
from distillery.evaluation.written_figures import written_figures
from distillery.labels.report import BINS, expected_calibration_error
from distillery.records import (
    Bin,
    Calibration,
    ClassFigures,
    Confusion,
    Estimate,
    Example,
    Figures,
    OrderRobustness,
)

SMALLEST_PROBABILITY = 1e-12
"""A student's probability of 0 counts as this in a divergence, which would be infinite."""

NO_ANSWER = "\0"
"""The label of a missing answer; no option's text has this character alone."""


def figures_of(
    examples: Sequence[Example],
    answers: Answers,
    probabilities: Sequence[Probabilities] | None,
    teacher: Sequence[Probabilities] | None,
    scored: Scored | None,
) -> Figures:
    """Return a predictor's figures on answered `examples` (1 or more).

    `probabilities` are the predictor's over each row's options, `teacher` the teacher's, if known
    and another's; `scored` is what was measured of a model."""
    answer_format = examples[0].format
    if answer_format is not None:
        written = written_figures(answers, gold_of(examples), answer_format)
        return Figures(written=written, **(measured(scored) if scored else {}))
    by_text = same_options(examples)
    labels = max((example.keys for example in examples), key=len)
    if by_text:
        labels = examples[0].options
    gold, given = [], []
    for example, letter in zip(examples, answers, strict=True):
        gold.append(class_of(example, example.answer_key, by_text))
        given.append(class_of(example, letter, by_text))
    confusion = confusion_of(gold, given, labels)
    classes = class_figures(gold, given, labels)
    macro_f1 = sum(each.f1 for each in classes) / len(classes)
    interval = macro_f1_interval(confusion.counts)
    calibration = divergence = None
    if probabilities is not None:
        calibration = calibration_of(examples, answers, probabilities)
        if teacher is not None:
            divergence = divergence_of(probabilities, teacher)
    figures = Figures(
        macro_f1=Estimate(value=macro_f1, low=interval.low, high=interval.high),
        classes=classes,
        confusion=confusion,
        calibration=calibration,
        kl_from_teacher=divergence,
    )
    if scored is not None:
        return figures.model_copy(update=measured(scored))
    return figures


def same_options(examples: Sequence[Example]) -> bool:
    """Return whether all rows have the same options, in whatever order, so that these are
    classes."""
    first = examples[0].options
    if len(set(first)) < len(first):
        return False
    return all(
        example.options is first or sorted(example.options) == sorted(first) for example in examples
    )


def class_of(example: Example, letter: str | None, by_text: bool) -> str:
    """Return the class that an answer gives: the option's text, or its letter. A letter that the
    row does not have is no answer."""
    text = option_text(example, letter)
    if text is None or letter is None:
        return NO_ANSWER
    return text if by_text else letter


def confusion_of(gold: Sequence[str], given: Sequence[str], labels: Sequence[str]) -> Confusion:
    """Count the gold labels (rows) by the given ones (columns, the last for no answer)."""
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(gold, given, labels=[*labels, NO_ANSWER])[:-1]
    return Confusion(labels=tuple(labels), counts=tuple(map(tuple, counts.tolist())))


def class_figures(
    gold: Sequence[str], given: Sequence[str], labels: Sequence[str]
) -> tuple[ClassFigures, ...]:
    """Return the figures of each class that is a gold label. The precision of a class that was
    never answered is 0."""
    from sklearn.metrics import precision_recall_fscore_support

    present = [label for label in labels if label in set(gold)]
    columns = precision_recall_fscore_support(gold, given, labels=present, zero_division=0.0)
    classes = []
    for label, precision, recall, f1, rows in zip(present, *columns, strict=True):
        interval = wilson_interval(round(recall * rows), int(rows))
        classes.append(
            ClassFigures(
                label=label,
                rows=int(rows),
                precision=float(precision),
                recall=float(recall),
                f1=float(f1),
                recall_low=interval.low,
                recall_high=interval.high,
            )
        )
    return tuple(classes)


def calibration_of(
    examples: Sequence[Example], answers: Answers, probabilities: Sequence[Probabilities]
) -> Calibration | None:
    """Return how far the confidence, which is the probability of the given answer, is from the
    share of right answers; None where no row has both.

    The expected calibration error with equally wide bins: Guo et al., On Calibration of Modern
    Neural Networks, ICML 2017."""
    import numpy as np

    confidence, right = [], []
    for example, letter, row in zip(examples, answers, probabilities, strict=True):
        if row is not None and letter is not None and letter in example.keys:
            confidence.append(row[example.keys.index(letter)])
            right.append(letter == example.answer_key)
    if not confidence:
        return None
    confidences, rights = np.array(confidence), np.array(right)
    numbers = np.minimum((confidences * BINS).astype(int), BINS - 1)
    bins = []
    for number in range(BINS):
        inside = numbers == number
        if inside.any():
            group = Bin(
                low=number / BINS,
                high=(number + 1) / BINS,
                rows=int(inside.sum()),
                confidence=float(confidences[inside].mean()),
                accuracy=float(rights[inside].mean()),
            )
            bins.append(group)
    interval = calibration_interval(numbers.tolist(), (confidences - rights).tolist())
    return Calibration(
        error=expected_calibration_error(bins),
        low=interval.low,
        high=interval.high,
        bins=tuple(bins),
    )


def confidence_figures(
    examples: Sequence[Example],
    answers: Answers,
    probabilities: Sequence[Probabilities],
    threshold: float | None,
) -> dict[str, object]:
    """Return the accuracy of a predictor's confident answers, by its names in Figures.
    `threshold`: its own, if it abstains."""
    rows = asked_rows(examples, answers, probabilities)
    found: dict[str, object] = {"coverage": coverage_curve(rows, len(examples))}
    if threshold is not None:
        found["given"] = given_answers(rows, len(examples), threshold)
    return found


def divergence_of(
    probabilities: Sequence[Probabilities], teacher: Sequence[Probabilities]
) -> Estimate | None:
    """Return the mean Kullback-Leibler divergence of `probabilities` from the teacher's, in nats,
    over the rows where both are known: sum over the options of p log(p / q), where p is the
    teacher's (Kullback, Leibler, On information and sufficiency, Annals of Mathematical Statistics
    22, 1951). None where there are fewer than two such rows."""
    import numpy as np
    from scipy.special import rel_entr

    divergences = []
    for own, theirs in zip(probabilities, teacher, strict=True):
        if own is not None and theirs is not None:
            student = np.maximum(own, SMALLEST_PROBABILITY)
            divergences.append(float(rel_entr(theirs, student).sum()))
    if len(divergences) < 2:
        return None
    mean = sum(divergences) / len(divergences)
    interval = mean_interval(divergences)
    return Estimate(value=mean, low=max(0.0, interval.low), high=interval.high)


def measured(scored: Scored) -> dict[str, Any]:
    """Return the figures that a model's process measured, by their names in Figures."""
    import numpy as np

    found: dict[str, Any] = {
        "first_token_ms": scored.first_token_ms,
        "load_s": scored.load_s,
        "tokens_per_second": scored.tokens_per_second,
    }
    if scored.reordered and scored.reordered.rows:
        found["order_robustness"] = order_robustness(scored.reordered)
    if scored.latencies_ms:
        percentiles = np.percentile(scored.latencies_ms, (50, 95, 99)).tolist()
        found |= dict(zip(("p50_ms", "p95_ms", "p99_ms"), percentiles, strict=True))
    return found


def order_robustness(reordered: Reordered) -> OrderRobustness:
    """Return the share of one or more rows that were answered alike, with its interval."""
    interval = wilson_interval(reordered.alike, reordered.rows)
    return OrderRobustness(
        rows=reordered.rows,
        alike=reordered.alike,
        value=reordered.alike / reordered.rows,
        low=interval.low,
        high=interval.high,
        seconds=reordered.seconds,
    )
