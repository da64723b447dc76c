"""What a model that writes its answers must beat: the answer to the most similar row, and for JSON
objects a dictionary of the values seen.

NEAREST gives the answer to the learnt row whose text is the nearest by TF-IDF. DICTIONARY gives
each field the values that stand in the row's text, as whole words and the longest first, of all
that learnt and gold rows have for the field; a field that the schema requires and that has none
gets its most frequent value.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distillery.answers import NotAnAnswer, canonical
from distillery.evaluation.metrics import plain
from distillery.evaluation.scoring import Answers
from distillery.records import Example

NEAREST = "nearest answer"
DICTIONARY = "field dictionary"

ASKED_TOGETHER = 500
"""Rows whose cosines with all learnt rows are in memory at a time."""


def written_baselines(
    examples: Sequence[Example],
    learnt: Sequence[Example],
    gold: Sequence[Example],
    schema: Mapping[str, Any] | None,
) -> tuple[dict[str, Answers], list[str]]:
    """Return the baselines' answers to `examples` by name, and a note on each that is left out. All
    rows of `learnt` and `gold` are answered; `schema` is that of the answers, None for text."""
    names = [NEAREST] if schema is None else [NEAREST, DICTIONARY]
    if not learnt:
        return {}, [
            f"{name} is left out: there is no answered row to learn from." for name in names
        ]
    answers: dict[str, Answers] = {NEAREST: nearest_answers(learnt, examples)}
    if schema is not None:
        answers[DICTIONARY] = dictionary_answers([*learnt, *gold], examples, schema)
    return answers, []


def text_of(example: Example) -> str:
    """Return all that a row tells: its text, and the further columns that prompts show."""
    return "\n".join([example.question, *example.fields.values()])


def nearest_answers(learnt: Sequence[Example], examples: Sequence[Example]) -> list[str | None]:
    """Return for each example the answer to the learnt row with the highest cosine of TF-IDF, over
    words and pairs of words with sublinear term frequencies; the first of equals."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    # Signs count too, so that no text is without a token.
    pattern = r"\w+|[^\w\s]"
    vectorizer: Any = TfidfVectorizer(  # type: ignore[no-untyped-call]
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=pattern
    )
    known = vectorizer.fit_transform(map(text_of, learnt))
    answers = []
    for start in range(0, len(examples), ASKED_TOGETHER):
        asked = vectorizer.transform(map(text_of, examples[start : start + ASKED_TOGETHER]))
        # The vectors have length 1, so that products are cosines.
        for position in (asked @ known.T).toarray().argmax(axis=1).tolist():
            answers.append(learnt[position].answer_key)
    return answers


def dictionary_answers(
    rows: Sequence[Example], examples: Sequence[Example], schema: Mapping[str, Any]
) -> list[str | None]:
    """Return for each example the object of the values that stand in its text; None where that does
    not meet the schema. Fields of fields are left out."""
    values = seen_values(rows)
    longest_first = {field: in_words(counts) for field, counts in values.items()}
    lists = listed_fields(rows)
    answers: list[str | None] = []
    for example in examples:
        text = f" {words_of(text_of(example))} "
        found: dict[str, Any] = {}
        for field, counts in values.items():
            inside = list(values_in(text, longest_first[field]))
            if not inside and field in schema.get("required", ()):
                inside = [json.loads(counts.most_common(1)[0][0])]
            if inside:
                found[field] = inside if field in lists else inside[0]
        try:
            answers.append(canonical(json.dumps(found), schema))
        except NotAnAnswer:
            answers.append(None)
    return answers


def seen_values(rows: Sequence[Example]) -> dict[str, Counter[str]]:
    """Count the values of each field, as JSON texts; a list's values are values each."""
    values: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for field, found in fields_of(row):
            for each in found if isinstance(found, list) else [found]:
                if plain(each) and not isinstance(each, dict | list):
                    values[field][json.dumps(each, ensure_ascii=False)] += 1
    return values


def listed_fields(rows: Sequence[Example]) -> set[str]:
    """Return the fields whose values are lists."""
    return {field for row in rows for field, found in fields_of(row) if isinstance(found, list)}


def fields_of(row: Example) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a row's answer; none where it is no JSON object."""
    try:
        found = json.loads(row.answer_key or "{}")
    except ValueError:
        return
    if isinstance(found, dict):
        yield from found.items()


def in_words(counts: Counter[str]) -> list[tuple[str, Any]]:
    """Return values that have words, with their words, blanks around each: the longest first, of
    equally long ones the most frequent."""
    found = []
    for value in sorted(counts, key=lambda each: (-len(each), -counts[each], each)):
        words = words_of(plain(json.loads(value)))
        if words:
            found.append((f" {words} ", json.loads(value)))
    return found


def values_in(text: str, values: Sequence[tuple[str, Any]]) -> Iterator[Any]:
    """Yield the values whose words stand in a text of words with blanks around each. What a value
    has taken of the text, no later one takes again."""
    for words, value in values:
        if words in text:
            text = text.replace(words, " \0 ", 1)
            yield value


def words_of(text: str) -> str:
    """Return the words of a text, without regard to case and punctuation, with a blank between."""
    return " ".join(re.findall(r"[^\W_]+", plain(text)))
