"""Bytes near those that were written, for tests by hypothesis of what reads them."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

texts = st.text(st.characters() | st.sampled_from("\ud800\0\n"), max_size=20)


def values(keys: Sequence[str]) -> st.SearchStrategy[Any]:
    """Return values of JSON, in whose mappings some of the `keys` stand."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | texts,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(keys) | texts, inner, max_size=4)
        ),
        max_leaves=10,
    )


@st.composite
def spoilt(
    draw: st.DrawFn,
    content: bytes,
    keys: Sequence[str],
    deep: str,
    parts: Callable[[Any], list[Any]] = lambda outer: [outer],
) -> bytes:
    """Return bytes near `content`, a mapping in JSON: cut off, with other bytes in it, with another
    value in one of its `parts`, endless brackets under the key `deep`, or none of it."""
    way = draw(st.sampled_from(["cut", "bytes", "value", "json", "deep", "any"]))
    if way == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    if way == "bytes":
        place = draw(st.integers(0, len(content) - 1))
        return content[:place] + draw(st.binary(max_size=3)) + content[place + 1 :]
    if way == "value":
        outer: Any = json.loads(content)
        part = draw(st.sampled_from(parts(outer)))
        part[draw(st.sampled_from(sorted(part)))] = draw(values(keys))
        return json.dumps(outer).encode()
    if way == "json":
        return json.dumps(draw(values(keys))).encode()
    if way == "deep":
        return f'{{"{deep}":'.encode() + b"[" * 60_000
    return draw(st.binary(max_size=60))


def one_line(text: str) -> None:
    assert "\n" not in text
    assert len(text) < 1_000


def varint(number: int) -> bytes:
    """Return a number as Thrift writes it: 7 bits a byte, the lowest first."""
    digits = b""
    while number > 127:
        digits += bytes([number & 127 | 128])
        number >>= 7
    return digits + bytes([number])
