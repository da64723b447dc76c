"""Guess which columns of a table hold the texts and the labels of a classifier.

A column's name decides where it is a usual one, and its content otherwise: texts are long and
hardly ever repeat, labels are few and short and repeat. What stays open is an error that names the
columns, not a guess.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from distillery.errors import DataError

TEXT_NAMES = frozenset(
    {
        *("text", "texts", "message", "question", "utterance", "body", "content", "sentence"),
        *("query", "review", "comment", "description", "email", "mail", "post", "tweet"),
        *("document", "input", "prompt", "request"),
    }
)

TITLE_NAMES = frozenset(["title", "subject", "headline"])
"""Columns that are shown ahead of the text if there is one."""

LABEL_NAMES = frozenset(
    {
        *("label", "labels", "intent", "category", "class", "topic", "target", "tag"),
        *("sentiment", "mood", "kind", "department"),
    }
)

FEWEST_WORDS = 2.0
"""Mean number of words from which a column's values can be texts."""

MOST_WORDS = 6.0
"""Mean number of words up to which they can be labels."""

DISTINCT_TEXTS = 0.8
"""Share of a column's values that must be distinct for texts."""

REPEATS = 4
"""How often each label occurs on average, at least, in a column that is found by its content."""


@dataclass
class Column:
    """What the values of a column are like. `counts`: how often each text occurs; `words`: of all
    of them together; `other`: values that are neither text nor a whole number."""

    counts: Counter[str] = field(default_factory=Counter)
    words: int = 0
    other: int = 0

    @property
    def filled(self) -> int:
        return self.counts.total()

    @property
    def mean_words(self) -> float:
        return self.words / max(1, self.filled)

    @property
    def may_be_text(self) -> bool:
        return (
            self.filled > self.other
            and self.mean_words >= FEWEST_WORDS
            and len(self.counts) >= DISTINCT_TEXTS * self.filled
        )

    @property
    def may_be_label(self) -> bool:
        return (
            self.filled > self.other
            and self.mean_words <= MOST_WORDS
            and len(self.counts) >= 2
            and len(self.counts) * REPEATS <= self.filled
        )

    @property
    def is_free_text(self) -> bool:
        """Whether a column with a label's name holds none, such as a topic in free words."""
        return self.mean_words > MOST_WORDS or len(self.counts) > DISTINCT_TEXTS * self.filled


class ChosenColumns(NamedTuple):
    """The columns of the texts, one or more, and of the label, each with the reason."""

    texts: tuple[str, ...]
    label: str
    text_reason: str
    label_reason: str


def column_contents(rows: Iterable[Mapping[str, Any]]) -> dict[str, Column]:
    """Return what the columns of the rows are like, in the order of their first occurrence."""
    columns: dict[str, Column] = {}
    for values in rows:
        for name, value in values.items():
            column = columns.setdefault(name, Column())
            if value is None or (isinstance(value, str) and not value.strip()):
                continue
            if isinstance(value, str | int):
                text = str(value).strip()
                column.counts[text] += 1
                column.words += len(text.split())
            else:
                column.other += 1
    return columns


def choose_columns(
    columns: Mapping[str, Column], texts: Sequence[str] = (), label: str | None = None
) -> ChosenColumns:
    """Return the columns to use; `texts` and `label` are those that the user has named.

    Raises DataError, in one line, if a named column is missing or none or several come into
    question."""
    for option, named in [*(("--text", text) for text in texts), ("--label", label)]:
        if named is not None and named not in columns:
            raise DataError(f"{option} {named}: no such column, only {listed(columns)}")
    chosen_label, label_reason = choose_label(columns, texts, label)
    others = {name: column for name, column in columns.items() if name != chosen_label}
    chosen_texts, text_reason = choose_texts(others, texts, chosen_label)
    if chosen_label in columns[chosen_label].counts:
        raise DataError(
            f"{chosen_label!r} is the name of a column and a value in it: put the names of the "
            "columns into the file's first line, such as text,label"
        )
    return ChosenColumns(chosen_texts, chosen_label, text_reason, label_reason)


def choose_label(
    columns: Mapping[str, Column], texts: Sequence[str], label: str | None
) -> tuple[str, str]:
    """Return the label's column and the reason. Raises DataError."""
    if label is not None:
        return label, "named by --label"
    left = {name: column for name, column in columns.items() if name not in texts}
    by_name = [
        name
        for name, column in left.items()
        if plain(name) in LABEL_NAMES and not column.is_free_text
    ]
    by_content = [name for name, column in left.items() if column.may_be_label]
    for found, reason in ((by_name, "by name"), (by_content, "few values that repeat")):
        if len(found) == 1:
            return found[0], reason
        if found:
            raise DataError(
                f"the label may be any of the columns {listed(found)}; name it, such as "
                f"--label {found[0]}"
            )
    raise DataError(
        f"no column looks like a label, which has few values that repeat, among {listed(columns)}; "
        "name it by --label, or add one that is empty in the rows that the teacher labels"
    )


def choose_texts(
    columns: Mapping[str, Column], texts: Sequence[str], label: str
) -> tuple[tuple[str, ...], str]:
    """Return the texts' columns and the reason. Raises DataError."""
    if label in texts:
        raise DataError(f"--text {label}: it is the label's column, too; name another one")
    if texts:
        return tuple(texts), "named by --text"
    titles = [
        name for name, column in columns.items() if plain(name) in TITLE_NAMES and column.counts
    ]
    by_name = [
        name for name, column in columns.items() if plain(name) in TEXT_NAMES and column.counts
    ]
    by_content = [
        name for name, column in columns.items() if column.may_be_text and name not in titles
    ]
    for found, reason in ((by_name, "by name"), (by_content, "texts that hardly ever repeat")):
        if len(found) == 1:
            return (*titles, *found), reason
        if found:
            several = " ".join(f"--text {name}" for name in found)
            raise DataError(
                f"the text may be any of the columns {listed(found)}; name it, such as "
                f"--text {found[0]}, or several of them, such as {several}"
            )
    if len(titles) == 1:
        return (titles[0],), "by name"
    raise DataError(
        f"no column besides {label!r} looks like texts of several words; name one by --text"
    )


def plain(name: str) -> str:
    """Return a column's name in lower case, without all but its letters."""
    return re.sub(r"[\W\d_]", "", name.casefold())


def listed(names: Iterable[str]) -> str:
    """Return the names in quotes."""
    return ", ".join(map(repr, names))
