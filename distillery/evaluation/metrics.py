"""Figures of written answers, from 0 to 1.

Each is a function of sums over the rows, so that one bootstrap over rows gives the interval of any
(see bootstrap.py): `row_statistics` gives what a row adds, `value` the figure of the sums.
  exact_match  the share of answers that are a gold answer, letter by letter
  field_f1     micro-F1 of the fields of JSON objects: of all pairs of a field and its value
  rouge_l      mean F1 of the longest common subsequence of words: Lin, ROUGE: A Package for
               Automatic Evaluation of Summaries, ACL 2004, as rouge-score computes it
  chrf         F of character n-grams, recall counted twice: Popović, chrF: character n-gram
               F-score for automatic MT evaluation, WMT 2015
  bleu         Papineni et al., BLEU: a Method for Automatic Evaluation of Machine Translation, ACL
               2002. Both as sacrebleu computes them: Post, A Call for Clarity in Reporting BLEU
               Scores, WMT 2018
Of several gold answers the one counts that is the best for the answer; BLEU counts the n-grams of
all and the nearest length. A missing answer counts as an empty text.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from distillery.recipe import Metric

Pair = tuple[str, str]
"""The path of a field, such as address/city, and one of its values as `plain` writes it."""


def row_statistics(
    metric: Metric, answer: str | None, references: Sequence[str]
) -> tuple[float, ...]:
    """Return what a row adds to the sums of a metric. `references` are its gold answers, of which
    there is at least one; each metric has its own number of statistics."""
    if metric == "exact_match":
        return (float(answer in references), 1.0)
    if metric == "field_f1":
        return max((field_statistics(answer, each) for each in references), key=field_value)
    if metric == "rouge_l":
        return (rouge_scorer().score_multi(references, answer or "")["rougeL"].fmeasure, 1.0)
    # sacrebleu's own significance tests take a row's statistics by this function, too.
    (statistics,) = sacrebleu_metric(metric)._extract_corpus_statistics(
        [answer or ""], [[reference] for reference in references]
    )
    return tuple(map(float, statistics))


def value(metric: Metric, sums: Sequence[float]) -> float:
    """Return a metric, from 0 to 1, of the sums over rows of their statistics."""
    if metric in ("exact_match", "rouge_l"):
        return sums[0] / sums[1]
    if metric == "field_f1":
        return field_value(sums)
    found = sacrebleu_metric(metric)._compute_score_from_stats(list(sums))
    return min(1.0, float(found.score) / 100)


def metric_of(
    metric: Metric, answers: Sequence[str | None], gold: Sequence[Sequence[str]]
) -> float:
    """Return a metric of answers, row by row with their gold answers."""
    rows = [
        row_statistics(metric, answer, references)
        for answer, references in zip(answers, gold, strict=True)
    ]
    return value(metric, [sum(column) for column in zip(*rows, strict=True)])


def field_statistics(answer: str | None, reference: str) -> tuple[float, float]:
    """Return twice the pairs that two JSON objects share, and the pairs of both together."""
    given, gold = field_pairs(answer), field_pairs(reference)
    return 2.0 * (given & gold).total(), float(given.total() + gold.total())


def field_value(sums: Sequence[float]) -> float:
    """Return F1; 1 where there is no field, neither in the answers nor in gold."""
    return sums[0] / sums[1] if sums[1] else 1.0


def field_pairs(text: str | None) -> Counter[Pair]:
    """Count the pairs of a JSON text. A list's values are pairs of the list's field each, whatever
    their order, and null or an empty text is none, like a field that is left out. What is no JSON
    has no pairs."""
    try:
        return Counter(each_pair(json.loads(text or "{}")))
    except (ValueError, RecursionError):
        return Counter()


def each_pair(found: Any, path: str = "") -> Iterator[Pair]:
    """Yield the pairs of a JSON value."""
    if isinstance(found, dict):
        for name, inner in found.items():
            yield from each_pair(inner, f"{path}/{name}" if path else name)
    elif isinstance(found, list):
        for inner in found:
            yield from each_pair(inner, path)
    elif text := plain(found):
        yield path, text


def plain(found: Any) -> str:
    """Return a JSON value as the text that is compared: whole numbers without a point, texts
    without regard to case, width of characters and white space; "" for null."""
    if found is None:
        return ""
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    text = found if isinstance(found, str) else json.dumps(found)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class Words:
    """Words for ROUGE: in any script, where rouge-score's own tokenizer knows a to z and digits
    alone; of those it makes the same words."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@cache
def rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=Words())


@cache
def sacrebleu_metric(metric: Metric) -> Any:
    """Return sacrebleu's chrF or BLEU with its defaults. But where no answer has four words, BLEU
    goes by the n-grams that there are (effective order): it would be 0 even for gold answers."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU(effective_order=True) if metric == "bleu" else CHRF()
