"""Which rows teach a student most, under a limit on their number (teacher.select).

uncertainty: the rows with the smallest margin between the two likeliest answers (Settles, Active
Learning Literature Survey, 2009, section 3.1).

diversity and both: each next row is drawn with a probability that grows with the square of its
distance from all rows before it, as k-means++ draws its centres (Arthur, Vassilvitskii, k-means++,
SODA 2007). For diversity it is the distance of the rows' topics: TF-IDF of their words in fewer
dimensions (Deerwester et al., Indexing by Latent Semantic Analysis, 1990). In all dimensions, rows
with rare words are the most distant, and students learnt less from them than from rows at random.
For both it is that of the gradients that the rows would give a linear classifier of topics, if its
likeliest answer were right: the product of what its probabilities lack to that answer and of the
topics. Such gradients are long for unsure rows and differ for rows with other topics or other
likely answers (BADGE: Ash et al., Deep Batch Active Learning by Diverse, Uncertain Gradient Lower
Bounds, ICLR 2020).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distillery.records import Example, Record

By = Literal["uncertainty", "diversity", "both"]

Floats = NDArray[np.floating[Any]]

TOPICS = 100
"""Dimensions of a row's topics."""

BLOCK = 2048
"""Rows whose distances from as many others are computed together, in some 16 MB each."""

PROPOSALS = 128
"""Rows that are drawn between two looks at all distances."""

NOTHING = 1e-4
"""Distances below this share of a row's own length are none: so large are errors of rounding."""

SHOWN_EVERY = 50
"""Rows drawn between two reports of progress."""

SELECTION_FILE = "selection.jsonl"


class ChosenRow(Record):
    """A line of selection.jsonl: why a row is labelled.

    `why`: learnt, the last student learnt from it, or its answers are stored; unsure, by
    uncertainty; different, by its distance from the rows before it. `uncertainty`: 1 less the
    margin between its two likeliest answers (0 to 1); None where nobody was asked. `distance`: the
    square of that from the rows before it, when it was drawn; None for the first of all."""

    example_id: str
    why: Literal["learnt", "unsure", "different"]
    uncertainty: float | None = None
    distance: float | None = None


def choose_rows(
    rows: Sequence[Example],
    count: int,
    by: By,
    shares: Sequence[Sequence[float] | None] | None = None,
    learnt: frozenset[int] = frozenset(),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, ChosenRow]:
    """Return up to `count` of the rows, and those at the positions `learnt` beside, by position and
    in the order in which they are chosen.

    `shares`: for each row the probabilities of its options, or None for a row that could not be
    asked; by uncertainty and by both need them. Equal arguments give equal choices. `progress` is
    as in `draw_distant`."""
    chosen = {
        position: ChosenRow(example_id=rows[position].example_id, why="learnt")
        for position in sorted(learnt)
    }
    unsure = None if shares is None else uncertainty(shares)
    picked: list[tuple[int, float | None]]
    if by == "uncertainty":
        if unsure is None:
            raise ValueError("by uncertainty needs the probabilities of the rows")
        # A stable sort: equally unsure rows stay in the order of the rows.
        order = [int(p) for p in np.argsort(-unsure, kind="stable") if p not in learnt]
        picked = [(position, None) for position in order[:count]]
    else:
        weights = np.ones((len(rows), 1), dtype=np.float32)
        if by == "both":
            if shares is None or unsure is None:
                raise ValueError("by both needs the probabilities of the rows")
            weights = gradients(shares) if have_equal_options(rows) else unsure[:, None]
        topics = topics_of([row.question for row in rows])
        picked = draw_distant(
            topics,
            weights,
            count,
            sorted(learnt),
            seed,
            from_zero=by == "both",
            progress=progress,
        )
    for position, distance in picked:
        chosen[position] = ChosenRow(
            example_id=rows[position].example_id,
            why="unsure" if by == "uncertainty" else "different",
            uncertainty=None if unsure is None else round(float(unsure[position]), 6),
            distance=distance,
        )
    return chosen


def uncertainty(shares: Sequence[Sequence[float] | None]) -> Floats:
    """Return 1 less the margin between the two likeliest answers of each row, [rows]; 0 for a row
    that could not be asked, from which a student could not learn."""
    found = np.zeros(len(shares), dtype=np.float32)
    for position, row in enumerate(shares):
        if row is not None:
            highest = sorted(row, reverse=True)
            second = highest[1] if len(highest) > 1 else 0.0
            found[position] = 1.0 - (highest[0] - second)
    return found


def gradients(shares: Sequence[Sequence[float] | None]) -> Floats:
    """Return what each row's probabilities lack to its likeliest answer, [rows, options]: zeros for
    a row that could not be asked."""
    width = max((len(row) for row in shares if row is not None), default=1)
    found = np.zeros((len(shares), width), dtype=np.float32)
    for position, row in enumerate(shares):
        if row is not None:
            found[position] = row
            found[position, int(np.argmax(row))] -= 1.0
    return found


def have_equal_options(rows: Sequence[Example]) -> bool:
    """Return whether all rows have the same classes or options, in the same order."""
    return len({(row.classes, row.choices) for row in rows}) == 1


def topics_of(texts: Sequence[str]) -> Floats:
    """Return the topics of texts, [texts, topics], in vectors of length 1; zeros for a text without
    words."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    words: Any = TfidfVectorizer(sublinear_tf=True, dtype=np.float32)  # type: ignore[no-untyped-call]
    try:
        terms = words.fit_transform(texts)
    except ValueError:
        # No text has a word of two letters.
        return np.zeros((len(texts), 1), dtype=np.float32)
    dimensions = min(TOPICS, min(terms.shape) - 1)
    if dimensions < 1:
        return np.asarray(normalize(terms.toarray()), dtype=np.float32)
    reduced: Any = TruncatedSVD(dimensions, random_state=0)  # type: ignore[no-untyped-call]
    return np.asarray(normalize(reduced.fit_transform(terms)), dtype=np.float32)


def draw_distant(
    topics: Floats,
    weights: Floats,
    count: int,
    start: Sequence[int],
    seed: int,
    from_zero: bool,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[int, float | None]]:
    """Return up to `count` rows with the square of each one's distance from those before it,
    drawn as the docstring of this module says.

    A row is the product of its `weights`, [rows, options], and its `topics`, [rows, topics].
    `start`: rows that are there already; without any, the longest is the first. `from_zero`: a row
    of no length counts as there already too, so that what teaches nothing is far from nothing. Rows
    that are no distance from those before, or have no length, come last, in order. `progress` takes
    the rows drawn and those to draw.

    To look at all rows takes as long for PROPOSALS drawn rows as for a few. So that many are drawn
    by the distances of the last look, which may be too large by now, and each is taken with the
    probability by which they are: as if it had been looked before each (rejection sampling)."""
    generator = np.random.default_rng(seed)
    lengths = squares(weights) * squares(topics)
    distances = lengths.copy() if from_zero else np.where(lengths > 0, np.inf, 0.0)
    free = np.ones(len(lengths), dtype=bool)
    picked: list[tuple[int, float | None]] = []
    if not len(start) and lengths.any():
        start = [int(np.argmax(lengths))]
        picked = [(start[0], None)]
    new = list(start)
    wanted = min(count, len(lengths) - len(start) + len(picked))
    while len(picked) < wanted:
        nearest_of(topics, weights, lengths, new, distances)
        free[new] = False
        distances[new] = 0.0
        new = []
        reached = np.cumsum(distances, dtype=np.float64)
        if reached[-1] <= 1e-9:
            rest = np.flatnonzero(free)[: wanted - len(picked)]
            return picked + [(int(position), 0.0) for position in rest]
        drawn = np.searchsorted(reached, generator.random(PROPOSALS) * reached[-1], side="right")
        for position, chance in zip(drawn.tolist(), generator.random(PROPOSALS), strict=True):
            if position == len(lengths):
                continue
            now = float(distances[position])
            if new:
                itself = slice(position, position + 1)
                now = min(now, float(from_nearest(topics, weights, lengths, itself, new)[0]))
            if chance * distances[position] < now:
                new.append(position)
                picked.append((position, round(now, 6)))
                if progress and not len(picked) % SHOWN_EVERY:
                    progress(len(picked), wanted)
            if len(picked) == wanted:
                break
    return picked


def nearest_of(
    topics: Floats, weights: Floats, lengths: Floats, start: Sequence[int], distances: Floats
) -> None:
    """Lower `distances`, [rows], to those from the nearest row of `start`; all are squares, as
    `lengths` are. BLOCK rows at a time: products of matrices take a small part of the time that one
    row after the other takes."""
    for first in range(0, len(start), BLOCK):
        some = list(start[first : first + BLOCK])
        for low in range(0, len(lengths), BLOCK):
            rows = slice(low, low + BLOCK)
            nearer = from_nearest(topics, weights, lengths, rows, some)
            np.minimum(distances[rows], nearer, out=distances[rows])


def from_nearest(
    topics: Floats, weights: Floats, lengths: Floats, rows: slice, others: list[int]
) -> Floats:
    """Return the squares of the distances of some rows from the nearest of `others`."""
    found = topics[rows] @ topics[others].T
    found *= weights[rows] @ weights[others].T
    found *= -2
    found += lengths[others]
    nearest: Floats = found.min(1) + lengths[rows]
    nearest[nearest < NOTHING * lengths[rows]] = 0.0
    return nearest


def squares(vectors: Floats) -> Floats:
    """Return the squares of the lengths of vectors, [vectors, dimensions]."""
    found: Floats = np.einsum("ij,ij->i", vectors, vectors)
    return found
