"""Decide which row serves for what: order, carving, leaks, copies and ids.

A row's position in [0, 1) is a hash of the recipe's seed and the row's content (`rows.Row`), so
rows of equal content share a position, and neither other rows nor a corrected answer move a row.
  Order      Rows are sorted by position: the order in the source changes nothing.
  Carving    Consecutive intervals of positions go to gold, validation and test, in this order,
             and the rest to train. The caller samples by keeping the lowest positions. With
             dataset.rotation, as many intervals for test as it has rounds follow each other, of
             which the caller keeps one.
  Leaks      Rows of train or gold with the content of a validation or test row stop the run,
             and so do validation rows with that of a test row: validation rows choose, and test
             rows judge the choice. Among rows carved from the same source there are none: they
             share a position.
  Copies     Of train rows with equal content the first stays: the one with an answer, if any.
             With task.kind: classify a train row without an answer is also dropped where an
             answered copy of it was carved.
             Copies within gold, validation and test stay, so that adding rows removes none.
  References Where answers are written, rows of equal content may have different answers, each as
             good as the others. In train, validation and test they become one row, whose further
             answers are its `references`: the teacher is asked once, and an answer is judged by
             all of them. In gold each stays a row of its own, since each can be learnt.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from distillery.data.rows import Row
from distillery.errors import DataError

ROLES = ("gold", "train", "validation", "test")
FITTED = ("gold", "train")
"""Roles whose rows train a model."""

JUDGED = ("validation", "test")
"""Roles whose rows judge a model."""

MOST_LISTED = 20
"""Leaks of a role that an error names."""

Splits = dict[str, list[Row]]
"""Rows by role."""


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Return the rows by position, and give copies that are named by their content ids of their
    own: a second row of equal content gets the suffix -2, and so on."""
    counts: Counter[str] = Counter()
    ordered = []
    for row in sorted(rows, key=sort_key):
        if row.example.example_id == row.content:
            counts[row.content] += 1
            if counts[row.content] > 1:
                example_id = f"{row.content}-{counts[row.content]}"
                example = row.example.model_copy(update={"example_id": example_id})
                row = replace(row, example=example)
        ordered.append(row)
    return ordered


def sort_key(row: Row) -> tuple[float, bool, str]:
    """Sort by position; of equal content, the row with an answer comes first."""
    return row.position, row.example.answer_key is None, row.example.model_dump_json()


def carve(splits: Splits, shares: Mapping[str, float]) -> Splits:
    """Move shares (0 to 1) of the train rows with an answer to other roles.

    The others stay, save copies of rows with an answer: those are dropped, because what they repeat
    may be a test row.
    """
    carved: Splits = {role: [] for role in ROLES if role in shares}
    carved["train"] = []
    answered = {row.content for row in splits["train"] if row.example.answer_key is not None}
    for row in splits["train"]:
        if row.example.answer_key is None:
            if row.content not in answered:
                carved["train"].append(row)
            continue
        edge = 0.0
        for role in carved:
            edge += shares.get(role, 1.0)  # train, the last, takes the rest
            if row.position < edge:
                break
        carved[role].append(row)
    return {**splits, **carved}


def join_references(splits: Splits) -> Splits:
    """Return the splits with one row for rows of equal content, save in gold: the first, with the
    other answers, each once, as its references."""
    joined = dict(splits)
    for role in ("train", *JUDGED):
        answers: dict[str, dict[str, None]] = {}
        for row in splits.get(role, []):
            found = answers.setdefault(row.content, {})
            if row.example.answer_key is not None:
                found[row.example.answer_key] = None
        if role in splits:
            joined[role] = []
        for row in drop_copies(splits.get(role, [])):
            references = tuple(answers[row.content])[1:]
            example = row.example.model_copy(update={"references": references})
            joined[role].append(replace(row, example=example))
    return joined


def test_interval(shares: Mapping[str, float], number: int) -> tuple[float, float]:
    """Return the lowest position of the test rows of round `number`, from 0, and the position after
    the highest. `shares` are those of dataset.carve."""
    before = shares.get("gold", 0.0) + shares.get("validation", 0.0)
    return before + number * shares["test"], before + (number + 1) * shares["test"]


class Leaks:
    """Rows of train or gold that also stand in validation or test, and rows of validation that
    stand in test."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._listed: dict[str, list[str]] = {role: [] for role in ROLES}

    def find(self, splits: Splits) -> None:
        """Note the leaks among rows, which come with all of equal content."""
        judged: dict[str, str] = {}
        for role in reversed(ROLES):
            rows = splits.get(role, [])
            for row in rows:
                if row.content in judged:
                    self._counts[role] += 1
                    self._first.setdefault(role, row.where)
                    if self._counts[role] <= MOST_LISTED:
                        self._listed[role].append(f"{row.where} = {judged[row.content]}")
            if role in JUDGED:
                judged |= {row.content: row.where for row in rows}

    def refuse(self) -> None:
        """Raise DataError if there are leaks. It names those of all roles, so that one look mends
        them."""
        found = []
        for role in reversed(ROLES):
            if count := self._counts[role]:
                others = "test" if role == "validation" else "validation or test"
                more = f" and {count - MOST_LISTED} more" if count > MOST_LISTED else ""
                found.append(
                    f"{self._first[role]}: a row of {role} may not stand in {others} too; "
                    f"found {count}: {', '.join(self._listed[role])}{more}"
                )
        if found:
            raise DataError(
                f"{'; '.join(found)}; remove them from one of the two, or carve validation and "
                "test out of the train rows (dataset.carve)"
            )


def drop_copies(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without those whose content an earlier row has."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.content, row)
    return list(first.values())


def file_and_line(where: str) -> tuple[str, int]:
    """Split FILE:LINE, so that line 9 is sorted before line 10."""
    name, _, line = where.rpartition(":")
    return name, int(line)


def refuse_empty(counts: Mapping[str, int]) -> None:
    """Raise DataError for a role without rows."""
    for role, count in counts.items():
        if not count:
            raise DataError(
                f"dataset: no row is left for {role} after carving and dropping rows similar to "
                "those of another split; add rows, or change dataset.carve or "
                "dataset.near_duplicate"
            )
