"""data/near_duplicates"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from distillery.data.rows import FITTED, JUDGED, Row, Splits, normalised
from distillery.records import Example


def drop_near_duplicates(splits: Splits, threshold: float) -> tuple[Splits, int]:
    alike = _Alike(threshold, (row for rows in splits.values() for row in rows))
    for row in (row for role in JUDGED for row in splits.get(role, [])):
        alike.add(alike.sets(row))
    kept = dict(splits)
    for role in (role for role in FITTED if role in splits):
        kept[role] = []
        for row in splits[role]:
            sets = alike.sets(row)
            if not alike.knows(sets):
                kept[role].append(row)
                if role == "train":
                    alike.add(sets)
    return kept, sum(len(splits[role]) - len(kept[role]) for role in splits)


_Sets = tuple[frozenset[int], frozenset[int]]


class _Alike:
    """Finds rows that are alike (see the module's text) exactly, by prefix filtering.

    Sets of similarity t share one of the n - ceil(t n) + 1 rarest tokens of each (n tokens): Bayardo, Ma, Srikant:
    Scaling up all pairs similarity search, WWW 2007. The index holds these tokens only. Where questions and options
    each have similarity t, so has their union, on which the filter works.
    """

    def __init__(self, threshold: float, rows: Iterable[Row]) -> None:
        self._threshold = threshold
        counts = Counter(token for row in rows for part in _tokens(row.example) for token in part)
        self._rank = {
            token: rank for rank, token in enumerate(sorted(counts, key=counts.__getitem__))
        }
        self._index: defaultdict[int, list[_Sets]] = defaultdict(list)

    def sets(self, row: Row) -> _Sets:
        """The tokens of question and options by rank, the rarest being 0."""
        question, options = _tokens(row.example)
        return frozenset(map(self._rank.__getitem__, question)), frozenset(
            map(self._rank.__getitem__, options)
        )

    def add(self, sets: _Sets) -> None:
        for rank in self._rarest(sets):
            self._index[rank].append(sets)

    def knows(self, sets: _Sets) -> bool:
        """Whether a row alike was added."""
        return any(
            self._similar(sets, other)
            for rank in self._rarest(sets)
            for other in self._index.get(rank, ())
        )

    def _rarest(self, sets: _Sets) -> list[int]:
        ranks = sorted(sets[0] | sets[1])
        return ranks[: len(ranks) - math.ceil(self._threshold * len(ranks) - 1e-9) + 1]

    def _similar(self, one: _Sets, other: _Sets) -> bool:
        for a, b in zip(one, other, strict=True):
            common = len(a & b)
            if common < self._threshold * (len(a) + len(b) - common) - 1e-9:
                return False
        return True


def _tokens(example: Example) -> tuple[set[str], set[str]]:
    """The word triples of the question and the options, marked apart."""
    text = normalised(example.question)
    words = re.findall(r"\w+", text) or [text]
    triples = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
    return triples, {f"\n{normalised(choice)}" for choice in example.choices}
