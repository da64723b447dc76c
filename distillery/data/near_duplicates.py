"""Drop rows of train, gold and validation that nearly repeat a row which must stay.

Two rows are similar if the sets of word triples of their questions, and the sets of their
options, both have a Jaccard similarity of dataset.near_duplicate or more. A question of fewer
than three words, or in a script without spaces, is similar to its equals only.

Rows of train or gold that are similar to a validation or test row are dropped, also if they come
from the same source, and so are validation rows that are similar to a test row, and rows of train
that are similar to an earlier row of train. Similar rows within gold, validation and test stay, so
that adding rows to one of them removes none of it. All of this comes before sampling: a test row
that is not sampled today trains no student either.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from distillery.data.rows import asked_text, normalised
from distillery.data.splits import FITTED, Splits
from distillery.records import Example

ROUNDING = 1e-9
"""Keeps a similarity that equals the threshold from falling short of it by rounding."""


def drop_near_duplicates(splits: Splits, threshold: float) -> tuple[Splits, int]:
    """Return the splits without near duplicates, and how many rows were dropped."""
    index = SimilarRows(threshold, (row.example for rows in splits.values() for row in rows))
    kept = dict(splits)
    for row in splits.get("test", []):
        index.add(index.token_sets(row.example))
    validation = []
    for row in splits.get("validation", []):
        token_sets = index.token_sets(row.example)
        if not index.has_similar(token_sets):
            validation.append((row, token_sets))
    # Only now, because similar rows within validation stay.
    for _, token_sets in validation:
        index.add(token_sets)
    if "validation" in splits:
        kept["validation"] = [row for row, _ in validation]
    for role in FITTED:
        if role not in splits:
            continue
        kept[role] = []
        for row in splits[role]:
            token_sets = index.token_sets(row.example)
            if index.has_similar(token_sets):
                continue
            kept[role].append(row)
            if role == "train":
                index.add(token_sets)
    dropped = sum(len(splits[role]) - len(kept[role]) for role in splits)
    return kept, dropped


class TokenSets(NamedTuple):
    """The tokens of a row by their ranks, 0 being the rarest among all rows."""

    question: frozenset[int]
    options: frozenset[int]


class SimilarRows:
    """Finds similar rows exactly, by prefix filtering.

    Two sets of similarity t share one of the n - ceil(t n) + 1 rarest tokens of each, n being the
    number of its tokens: Bayardo, Ma, Srikant: Scaling up all pairs similarity search, WWW 2007.
    So the index holds these tokens only. If questions and options each have similarity t, so has
    their union, to which the filter is applied.
    """

    def __init__(self, threshold: float, examples: Iterable[Example]) -> None:
        """`examples` are all rows that will be added or looked up."""
        self.threshold = threshold
        counts: Counter[str] = Counter()
        for example in examples:
            counts.update(question_tokens(example))
            counts.update(option_tokens(example))
        by_rarity = sorted(counts, key=counts.__getitem__)
        self._ranks = {token: rank for rank, token in enumerate(by_rarity)}
        self._index: defaultdict[int, list[TokenSets]] = defaultdict(list)

    def token_sets(self, example: Example) -> TokenSets:
        """Return the tokens of a row as this index compares them."""
        return TokenSets(
            frozenset(map(self._ranks.__getitem__, question_tokens(example))),
            frozenset(map(self._ranks.__getitem__, option_tokens(example))),
        )

    def add(self, token_sets: TokenSets) -> None:
        """Add a row."""
        for rank in self.rarest(token_sets):
            self._index[rank].append(token_sets)

    def has_similar(self, token_sets: TokenSets) -> bool:
        """Return whether a similar row was added."""
        for rank in self.rarest(token_sets):
            for other in self._index.get(rank, ()):
                if self.are_similar(token_sets, other):
                    return True
        return False

    def rarest(self, token_sets: TokenSets) -> list[int]:
        """Return the tokens of which a similar row must have one."""
        ranks = sorted(token_sets.question | token_sets.options)
        return ranks[: len(ranks) - math.ceil(self.threshold * len(ranks) - ROUNDING) + 1]

    def are_similar(self, first: TokenSets, second: TokenSets) -> bool:
        """Return whether questions and options both reach the threshold."""
        for a, b in zip(first, second, strict=True):
            common = len(a & b)
            if common < self.threshold * (len(a) + len(b) - common) - ROUNDING:
                return False
        return True


def question_tokens(example: Example) -> set[str]:
    """Return the word triples of the question."""
    text = normalised(asked_text(example))
    words = re.findall(r"\w+", text) or [text]
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def option_tokens(example: Example) -> set[str]:
    """Return the options, with a line break ahead that no word triple has."""
    return {f"\n{normalised(choice)}" for choice in example.choices}
