"""Texts of rows, names and teachers' words inside Markdown: they show as they are written.

Prefect's pages render Markdown in artifacts, in their descriptions and in each cell of a table.
There a text must not make a link, an image that the reader's browser would fetch, or HTML. Bare
addresses, of which GitHub's Markdown makes links, keep their scheme, `www.` or `@` as code.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

INLINE = re.compile(r"[\\`*<&|~]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])")
"""Signs that begin or end markup inside a line: an underscore at a word's edge, and a closing
bracket that an address may follow. Others, as in "[0.1, 0.2]", mean nothing by themselves."""

BLOCK = re.compile(r"[#>]|[-+=](?=\s|[-=]|$)|(?<=\d)[.)](?=\s|$)")
"""Signs that make a heading, quote, list or rule at the beginning of a line."""

ADDRESS = re.compile(r"(?:https?://|ftp://|www\.|(?<=\S)@(?=[-\w\\]+\.))+", re.IGNORECASE)
"""What makes a link of a bare address. A backslash does not help: some programs, Prefect's newer
page among them, look for addresses in the text that has been read already."""


def escape(text: str) -> str:
    """Return a text in one line that Markdown shows as it is, in a table's cell too."""
    escaped = INLINE.sub(r"\\\g<0>", " ".join(text.split()))
    start = len(escaped) - len(escaped.lstrip("0123456789"))
    if BLOCK.match(escaped, start):
        escaped = f"{escaped[:start]}\\{escaped[start:]}"
    return ADDRESS.sub(r"`\g<0>`", escaped)


def link(text: str, address: str) -> str:
    """Return a link to an address of our own, under a text that is shown as it is."""
    shown = re.sub(r"(?<!\\)[\[\]]", r"\\\g<0>", escape(text))
    return f"[{shown}]({address})"


def code(text: str) -> str:
    """Return a text as code, in one line. Backticks, which would end it, become apostrophes."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, all columns but the first aligned to the right. Cells are escaped."""
    lines = [list(map(escape, titles)), [":--", *["--:"] * (len(titles) - 1)]]
    lines += [list(map(escape, row)) for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def escape_cells(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a table of Prefect's with their texts escaped; other values stay."""
    escaped = []
    for row in rows:
        cells = {}
        for name, value in row.items():
            cells[name] = escape(value) if isinstance(value, str) else value
        escaped.append(cells)
    return escaped
