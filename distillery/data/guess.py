"""Guess which columns of a table hold the texts, their options, and their labels or answers, and
the schema of answers that are objects.

A column's name decides where it is a usual one, and its content otherwise: texts are long and
hardly ever repeat, labels are few and short and repeat, fields are JSON objects, and options are
lists of texts. What stays open is an error that names the columns, not a guess.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from string import ascii_lowercase
from typing import Any, NamedTuple

from distillery.data.readers import shown
from distillery.data.rows import to_options
from distillery.errors import DataError
from distillery.recipe import TaskKind

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

ANSWER_NAMES = frozenset(
    {
        *("answer", "answers", "output", "response", "reply", "completion", "summary", "reference"),
        *("target", "translation", "rewrite", "result"),
    }
)
"""Columns of text that is an answer."""

OPTION_NAMES = frozenset({"choices", "options", "candidates", "alternatives"})
"""Columns of a row's options."""

KEY_NAMES = frozenset(
    {
        *("answerkey", "answer", "label", "correct", "correctanswer", "correctoption", "gold"),
        *("target", "solution"),
    }
)
"""Columns of the option that is right."""

FEWEST_WORDS = 2.0
"""Mean number of words from which a column's values can be texts."""

MOST_WORDS = 6.0
"""Mean number of words up to which they can be labels."""

DISTINCT_TEXTS = 0.8
"""Share of a column's values that must be distinct for texts."""

REPEATS = 4
"""How often each label occurs on average, at least, in a column that is found by its content."""

JOIN_PAGE = "docs/how-to/text.md"
"""Where a script puts the columns of fields into one."""

JOIN_OPTIONS_PAGE = "docs/how-to/choice.md"
"""Where a script puts the columns of options into one."""


@dataclass
class Column:
    """What the values of a column are like. `counts`: how often each text occurs; `words`: of all
    of them together; `other`: values that are neither text nor a whole number; `objects`: values
    that are JSON objects, and `options`: those that are a row's options (rows.py), as they stand or
    as text."""

    counts: Counter[str] = field(default_factory=Counter)
    words: int = 0
    other: int = 0
    objects: int = 0
    options: int = 0

    @property
    def filled(self) -> int:
        return self.counts.total()

    @property
    def mean_words(self) -> float:
        return self.words / max(1, self.filled)

    @property
    def may_be_fields(self) -> bool:
        """Whether more than half of the values are JSON objects."""
        apart = sum(1 for text in self.counts if not text.startswith("{"))
        return self.objects > apart

    @property
    def may_be_options(self) -> bool:
        """Whether more than half of the values are options."""
        return 2 * self.options > self.filled + self.other

    @property
    def may_be_dicts(self) -> bool:
        """Whether more than half of the values are in braces and no JSON objects, such as the
        dictionaries that Python prints."""
        in_braces = sum(
            count for text, count in self.counts.items() if text[0] == "{" and text[-1] == "}"
        )
        return 2 * (in_braces - self.objects) > self.filled

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
    """The columns of the texts, one or more, and of the label or answer, each with the reason, the
    kind of task that they are for, and with kind `choice` the column of the options."""

    texts: tuple[str, ...]
    label: str
    text_reason: str
    label_reason: str
    kind: TaskKind = "classify"
    options: str | None = None


def column_contents(rows: Iterable[Mapping[str, Any]]) -> dict[str, Column]:
    """Return what the columns of the rows are like, in the order of their first occurrence."""
    columns: dict[str, Column] = {}
    for values in rows:
        for name, value in values.items():
            column = columns.setdefault(name, Column())
            if value is None or (isinstance(value, str) and not value.strip()):
                continue
            said = json_in(value)
            column.objects += isinstance(said, dict)
            column.options += are_options(said)
            if isinstance(value, str | int):
                text = str(value).strip()
                column.counts[text] += 1
                column.words += len(text.split())
            else:
                column.other += 1
    return columns


def json_in(value: Any) -> Any:
    """Parse a text that is a JSON object or list; return other values unchanged."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def are_options(value: Any) -> bool:
    """Return whether a parsed value is a row's options."""
    if isinstance(value, str):
        return False
    try:
        to_options(value, "")
    except DataError:
        return False
    return True


def columns_of_options(columns: Collection[str]) -> list[str]:
    """Return the columns that are named as each row's options are, one a column: option_a, option_b
    or choice1, choice2, or a, b and so on."""
    found: dict[str, list[str]] = {}
    for name in columns:
        match = re.fullmatch(r"(option|choice|answer)s?[\W_]*([a-z]|\d)", name.casefold())
        if match:
            found.setdefault(match[1], []).append(name)
    by_letter = {name.casefold(): name for name in columns}
    found["letters"] = [
        by_letter[each] for each in takewhile(by_letter.__contains__, ascii_lowercase)
    ]
    return next((names for names in found.values() if len(names) > 1), [])


def guess_schema(values: Iterable[Any]) -> dict[str, Any]:
    """Return a JSON Schema that the JSON objects among the values meet: the types of their fields,
    none of them required, and no others."""
    fields: dict[str, list[Any]] = {}
    for found in map(json_in, values):
        if isinstance(found, dict):
            for name, value in found.items():
                fields.setdefault(name, []).append(value)
    properties = {name: guess_type(known) for name, known in fields.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def guess_type(values: Sequence[Any]) -> dict[str, Any]:
    """Return the JSON Schema of a field that has these values."""
    names = {
        *("boolean" for value in values if isinstance(value, bool)),
        *("integer" for value in values if type(value) is int),
        *("number" for value in values if isinstance(value, float)),
        *("string" for value in values if isinstance(value, str)),
        *("array" for value in values if isinstance(value, list)),
        *("object" for value in values if isinstance(value, dict)),
        *("null" for value in values if value is None),
    }
    if "number" in names:
        names.discard("integer")
    kinds = sorted(names)
    found: dict[str, Any] = {"type": kinds[0] if len(kinds) == 1 else kinds}
    if "object" in names:
        found |= guess_schema(values) | {"type": found["type"]}
    items = [item for value in values if isinstance(value, list) for item in value]
    if items:
        found["items"] = guess_type(items)
    return found


def choose_columns(
    columns: Mapping[str, Column],
    texts: Sequence[str] = (),
    label: str | None = None,
    kind: TaskKind | None = None,
) -> ChosenColumns:
    """Return the columns to use; `texts`, `label` and `kind` are those that the user has named.
    Where the kind is not named, it is choice for rows with options, extract for a label that is
    JSON objects, and else classify.

    Raises DataError, in one line, if a named column is missing or none or several come into
    question."""
    for option, named in [*(("--text", text) for text in texts), ("--label", label)]:
        if named is not None and named not in columns:
            raise DataError(f"{option} {named}: no such column, only {listed(columns)}")
    options = choose_options(columns, {*texts, label}, kind)
    if options:
        kind = "choice"
        columns = {name: column for name, column in columns.items() if name != options}
    if kind is None:
        labels = columns.keys() - set(texts) if label is None else {label}
        kind = "extract" if any(columns[name].may_be_fields for name in labels) else "classify"
    try:
        if kind == "choice":
            chosen_label, label_reason = choose_key(columns, texts, label)
        elif kind == "classify":
            chosen_label, label_reason = choose_label(columns, texts, label)
        else:
            chosen_label, label_reason = choose_answer(columns, texts, label, kind)
    except DataError:
        # They are the likelier reason why there is none.
        refuse_dicts({name: columns[name] for name in columns if name not in texts})
        raise
    refuse_dicts({chosen_label: columns[chosen_label]})
    others = {name: column for name, column in columns.items() if name != chosen_label}
    chosen_texts, text_reason = choose_texts(others, texts, chosen_label)
    if chosen_label in columns[chosen_label].counts:
        raise DataError(
            f"{chosen_label!r} is the name of a column and a value in it: put the names of the "
            "columns into the file's first line, such as text,label"
        )
    return ChosenColumns(chosen_texts, chosen_label, text_reason, label_reason, kind, options)


def refuse_dicts(columns: Mapping[str, Column]) -> None:
    """Raise DataError if one of the columns has answers that are meant as JSON objects, and are
    none."""
    for name, column in columns.items():
        if column.may_be_dicts:
            raise DataError(
                f"the column {name!r} has values in braces that are no JSON objects, such as "
                f"{shown(next(iter(column.counts)))}; JSON has double quotes, null, true and "
                "false: in Python, write the column by json.dumps; or name another column by "
                "--label"
            )


def choose_options(
    columns: Mapping[str, Column], others: Collection[str | None], kind: TaskKind | None
) -> str | None:
    """Return the column of the rows' options, which is none of the `others`; None for another kind
    of task. Where the kind is not named, the column has a usual name: lists of texts may be much
    else. Raises DataError for several, and for kind `choice` without one."""
    found = [name for name in columns if name not in others and columns[name].may_be_options]
    by_name = [name for name in found if plain(name) in OPTION_NAMES]
    if kind == "choice":
        found = by_name or found
    elif kind is None:
        found = by_name
    else:
        return None
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"the options may be any of the columns {listed(found)}; leave the others out"
        )
    if kind is None:
        return None
    hint = hint_of_options(columns) or (
        '; put those of each row into a column choices, as a list of texts such as ["bank", '
        '"library"]'
    )
    raise DataError(f"no column looks like options among {listed(columns)}{hint}")


def choose_key(
    columns: Mapping[str, Column], texts: Sequence[str], label: str | None
) -> tuple[str, str]:
    """Return the column of the right option and the reason. Raises DataError."""
    if label is not None:
        return label, "named by --label"
    found = [name for name in columns if name not in texts and plain(name) in KEY_NAMES]
    if len(found) == 1:
        return found[0], "by name"
    if found:
        raise DataError(
            f"the right option may be in any of the columns {listed(found)}; name it, such as "
            f"--label {found[0]}"
        )
    raise DataError(
        f"no column looks like the right option among {listed(columns)}; name it by --label, or "
        "add one that is empty in the rows that the teacher answers"
    )


def choose_answer(
    columns: Mapping[str, Column], texts: Sequence[str], label: str | None, kind: TaskKind
) -> tuple[str, str]:
    """Return the column of written answers and the reason. Raises DataError."""
    if label is not None:
        return label, "named by --label"
    left = {name: column for name, column in columns.items() if name not in texts}
    if kind == "extract":
        found, reason = [name for name in left if left[name].may_be_fields], "JSON objects"
    else:
        found, reason = [name for name in left if plain(name) in ANSWER_NAMES], "by name"
    if len(found) == 1:
        return found[0], reason
    if found:
        raise DataError(
            f"the answer may be any of the columns {listed(found)}; name it, such as "
            f"--label {found[0]}"
        )
    if kind == "extract":
        raise DataError(
            f"no column looks like JSON objects among {listed(columns)}; with a column for each "
            'field, put them into one, such as {"place": "bar", "people": 4}, by a script as in '
            f"{JOIN_PAGE}, and leave that empty in the rows that the teacher answers"
        )
    raise DataError(f"no column looks like answers among {listed(columns)}; name it by --label")


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
            hint = ""
            if reason != "by name":
                hint = (
                    "; if they are fields of one answer, put them into a column of JSON objects, "
                    f"by a script as in {JOIN_PAGE}"
                )
            raise DataError(
                f"the label may be any of the columns {listed(found)}; name it, such as "
                f"--label {found[0]}{hint}"
            )
    raise DataError(
        f"no column looks like a label, which has few values that repeat, among {listed(columns)}; "
        "name it by --label, or add one that is empty in the rows that the teacher labels"
        f"{hint_of_options(left)}"
    )


def hint_of_options(columns: Mapping[str, Column]) -> str:
    """Return what to say of columns that may hold the rows' options."""
    for name, column in columns.items():
        if column.may_be_options:
            return f"; if {name!r} holds the options of each row, say --task choice too"
    for name, column in columns.items():
        if plain(name) in OPTION_NAMES and column.counts:
            return (
                f"; if {name!r} holds the options of each row, write them as a list of texts such "
                f'as ["bank", "library"], in place of {shown(next(iter(column.counts)))}'
            )
    apart = columns_of_options(columns)
    if apart:
        return (
            f"; if {listed(apart)} are the options of each row, put them into one column, choices, "
            f"by a script as in {JOIN_OPTIONS_PAGE}"
        )
    return ""


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
        name
        for name, column in columns.items()
        if column.may_be_text and not column.may_be_options and name not in titles
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
