"""What differs between a written answer and a gold answer, word by word."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Literal, NamedTuple


class Piece(NamedTuple):
    """A part of an answer: both have it, gold lacks it (added), or the answer does (missing)."""

    kind: Literal["same", "added", "missing"]
    text: str


def pieces(answer: str, references: Sequence[str]) -> list[Piece]:
    """Return an answer in pieces beside the most similar of one or more gold answers."""
    own = words(answer)
    nearest = max(map(words, references), key=lambda gold: matcher(gold, own).quick_ratio())
    found = []
    for kind, start, end, own_start, own_end in matcher(nearest, own).get_opcodes():
        if kind == "equal":
            found.append(Piece("same", "".join(own[own_start:own_end])))
            continue
        if end > start:
            found.append(Piece("missing", "".join(nearest[start:end])))
        if own_end > own_start:
            found.append(Piece("added", "".join(own[own_start:own_end])))
    return found


def matcher(gold: list[str], own: list[str]) -> SequenceMatcher[str]:
    # To look for each blank at every other would take seconds for a page of text.
    return SequenceMatcher(str.isspace, gold, own, autojunk=False)


def words(text: str) -> list[str]:
    """Return a text in words, signs and white space, which make it up."""
    return re.findall(r"\w+|\s+|[^\w\s]", text)
