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
import sqlite3
from array import array
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from distillery.data.row_store import RowStore
from distillery.data.rows import asked_text, normalised
from distillery.data.splits import FITTED
from distillery.records import Example

ROUNDING = 1e-9
"""Keeps a similarity that equals the threshold from falling short of it by rounding."""

SLACK = 1e-6
"""The same for the filter of candidates, which adds up two of them."""

COUNTERS = 2**18
"""Counters of how frequent tokens are. Where two tokens share one, a count is too high, which costs
time and changes no result: the filter is exact for any order of the tokens."""

CACHED_ROWS = 500
"""Rows whose tokens are in memory while rows are compared."""

TABLES = (
    "CREATE TABLE tokens (number INTEGER PRIMARY KEY, question BLOB, options BLOB)",
    "CREATE TABLE rare (token INTEGER, size INTEGER, rank INTEGER, number INTEGER)",
    "CREATE TABLE candidate (number INTEGER PRIMARY KEY)",
    "CREATE TABLE dropped (number INTEGER PRIMARY KEY)",
    "CREATE TABLE added (token INTEGER, size INTEGER, rank INTEGER, number INTEGER, "
    "PRIMARY KEY (token, size, rank, number)) WITHOUT ROWID",
)
"""`rare` are the rarest tokens of each row, `size` is the number of all its tokens, and `rank` that
of the token among them, from 1 for the rarest. `added` are those of the rows that were added."""


def drop_near_duplicates(store: RowStore, index: "SimilarRows") -> int:
    """Drop near duplicates from the kept rows, which `index` has read; return how many there
    were."""
    index.find_candidates()
    database = store.connection
    for number in candidates(store, "test"):
        index.add(number)
    for role in ("validation", *FITTED):
        for number in candidates(store, role):
            if index.has_similar(number):
                database.execute("INSERT INTO dropped VALUES (?)", (number,))
            elif role == "train":
                index.add(number)
        if role == "validation":
            # Only now, because similar rows within validation stay.
            for number in candidates(store, role):
                index.add(number)
    return database.execute(
        "DELETE FROM kept WHERE number IN (SELECT number FROM dropped)"
    ).rowcount


def candidates(store: RowStore, role: str) -> Iterator[int]:
    """Yield the numbers of a role's candidates in order, without those that were dropped."""
    if role in store.roles:
        found = store.connection.execute(
            "SELECT number FROM candidate JOIN kept USING (number) WHERE role = ? "
            "AND number NOT IN (SELECT number FROM dropped) ORDER BY position, number",
            (store.roles.index(role),),
        )
        for (number,) in found:
            yield number


class TokenSets(NamedTuple):
    """The tokens of a row, as numbers."""

    question: frozenset[int]
    options: frozenset[int]


class SimilarRows:
    """Finds similar rows exactly, by prefix filtering, in tables of a database.

    If questions and options each have similarity t, so has their union. Two sets of n and m tokens
    and of similarity t have at least t (n + m) / (1 + t) tokens in common. The rarest of these is
    the i-th token of one set by rarity and the j-th of the other, and the others are among the
    n - i and m - j tokens after it. So two rows are candidates only if they share a token for which
    min(n - i, m - j) + 1 is at least that number; i is then at most n - ceil(t n) + 1. Bayardo, Ma,
    Srikant: Scaling up all pairs similarity search, WWW 2007; Xiao, Wang, Lin, Yu: Efficient
    similarity joins for near duplicate detection, WWW 2008. The rule itself decides within the
    candidates.

    A token's number is Python's hash of 64 bits. All rows are `read`, then comes `find_candidates`,
    and then rows are added and looked up; only those that are candidates need be.
    """

    def __init__(self, connection: sqlite3.Connection, threshold: float) -> None:
        self.threshold = threshold
        self._share = threshold / (1 + threshold)
        self._connection = connection
        # Where many rows are alike, they are compared with the same few.
        self._token_sets = lru_cache(CACHED_ROWS)(self._read_token_sets)
        self._counts = array("I", [0]) * COUNTERS
        for table in TABLES:
            connection.execute(table)

    def read(self, rows: Iterable[tuple[int, Example]]) -> None:
        """Take rows, each with a number that names it."""
        counts, values = self._counts, []
        for number, example in rows:
            question = array("q", map(hash, question_tokens(example)))
            options = array("q", map(hash, option_tokens(example)))
            for tokens in (question, options):
                for token in tokens:
                    counts[token % COUNTERS] += 1
            values.append((number, question.tobytes(), options.tobytes()))
        self._connection.executemany("INSERT INTO tokens VALUES (?, ?, ?)", values)

    def find_candidates(self) -> None:
        """Note the rows that may be similar to another one."""
        rows = self._connection.execute("SELECT number, question, options FROM tokens")
        self._connection.executemany(
            "INSERT INTO rare VALUES (?, ?, ?, ?)",
            (
                (token, size, rank, number)
                for number, question, options in rows
                for token, size, rank in self._rarest(token_sets(question, options))
                # Else no other row has it.
                if self._counts[token % COUNTERS] > 1
            ),
        )
        self._connection.execute("CREATE INDEX by_token ON rare (token, size, rank, number)")
        shared = self._connection.execute(
            "SELECT token, size, rank, count(*) FROM rare WHERE token IN "
            "(SELECT token FROM rare GROUP BY token HAVING count(*) > 1) "
            "GROUP BY token, size, rank ORDER BY token, size, rank"
        )
        for token, group in groupby(shared, itemgetter(0)):
            first: dict[int, list[int]] = {}
            for _, size, rank, count in group:
                ranks = first.setdefault(size, [])
                ranks += [rank] * min(count, 2 - len(ranks))
            for size, last in self._last_ranks(first).items():
                self._connection.execute(
                    "INSERT OR IGNORE INTO candidate SELECT number FROM rare "
                    "WHERE token = ? AND size = ? AND rank <= ?",
                    (token, size, last),
                )

    def _last_ranks(self, first: dict[int, list[int]]) -> dict[int, int]:
        """Return for each size of row the last rank with which a token makes a row a candidate, if
        there is one. `first`: the two lowest ranks that the token has in rows of each size."""
        last: dict[int, int] = {}
        for size in first:
            for other, ranks in first.items():
                common = math.ceil(self._share * (size + other) - SLACK)
                needed = 2 if other == size else 1
                if len(ranks) >= needed and ranks[needed - 1] <= other - common + 1:
                    last[size] = max(last.get(size, 0), size - common + 1)
        return {size: rank for size, rank in last.items() if rank > 0}

    def each_candidate(self) -> Iterator[int]:
        """Yield the numbers of the rows that may be similar to another one."""
        for (number,) in self._connection.execute("SELECT number FROM candidate ORDER BY number"):
            yield number

    def add(self, number: int) -> None:
        """Add a row."""
        self._connection.executemany(
            "INSERT INTO added VALUES (?, ?, ?, ?)",
            ((*found, number) for found in self._rarest(self._token_sets(number))),
        )

    def has_similar(self, number: int) -> bool:
        """Return whether a similar row was added."""
        own = self._token_sets(number)
        seen = set()
        for token, size, rank in self._rarest(own):
            found = self._connection.execute(
                "SELECT number FROM added WHERE token = ?1 AND size BETWEEN ?2 AND ?3 "
                "AND min(?4 - ?5, size - rank) + 1 >= ?6 * (?4 + size) - ?7",
                (
                    *(token, self._fewest(size), size / self.threshold + SLACK),
                    *(size, rank, self._share, SLACK),
                ),
            )
            for (other,) in found:
                if other not in seen and self._are_similar(own, self._token_sets(other)):
                    return True
                seen.add(other)
        return False

    def _read_token_sets(self, number: int) -> TokenSets:
        """Return the tokens of a row."""
        found = self._connection.execute(
            "SELECT question, options FROM tokens WHERE number = ?", (number,)
        )
        return token_sets(*found.fetchone())

    def _rarest(self, sets: TokenSets) -> Iterator[tuple[int, int, int]]:
        """Yield the tokens of which a similar row must have one, with the number of all tokens and
        the rank of each."""
        counts = self._counts
        ranked = sorted((counts[token % COUNTERS], token) for token in sets.question | sets.options)
        size = len(ranked)
        for rank in range(1, size - self._fewest(size) + 2):
            yield ranked[rank - 1][1], size, rank

    def _fewest(self, size: int) -> int:
        """Return how many tokens a row has at least that is similar to one of `size` tokens."""
        return math.ceil(self.threshold * size - ROUNDING)

    def _are_similar(self, first: TokenSets, second: TokenSets) -> bool:
        """Return whether questions and options both reach the threshold."""
        for a, b in zip(first, second, strict=True):
            common = len(a & b)
            if common < self.threshold * (len(a) + len(b) - common) - ROUNDING:
                return False
        return True


def token_sets(question: bytes, options: bytes) -> TokenSets:
    """Return the tokens that stand in the columns of a row."""
    return TokenSets(frozenset(array("q", question)), frozenset(array("q", options)))


def question_tokens(example: Example) -> set[str]:
    """Return the word triples of the question."""
    text = normalised(asked_text(example))
    words = re.findall(r"\w+", text) or [text]
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def option_tokens(example: Example) -> set[str]:
    """Return the options, with a line break ahead that no word triple has."""
    return {f"\n{normalised(choice)}" for choice in example.choices}
