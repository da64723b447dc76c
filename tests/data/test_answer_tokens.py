"""The file of a teacher's probabilities for the tokens of its written answers."""

import contextlib
import json
import math
import zlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillery.data.answer_tokens import (
    MOST_UNPACKED,
    AnswerToken,
    AnswerTokensFile,
    packed,
    read_answer_tokens,
    unpacked,
    write_answer_tokens,
)

BUDGET = settings(max_examples=100, deadline=None, database=None, derandomize=True)
"""Inputs that are tried each time, always the same ones."""

candidates = st.lists(st.tuples(st.binary(max_size=4), st.floats(-50, 0)), max_size=4)
answers = st.lists(st.builds(AnswerToken, st.binary(max_size=4), candidates.map(tuple)), max_size=6)


def test_tokens_come_back_as_they_were_written(tmp_path: Path) -> None:
    # The two halves of a character of UTF-8, then the end of the turn.
    first, second = "é".encode()[:1], "é".encode()[1:]
    tokens = (
        AnswerToken(first, ((first, -0.5), (b" the", -1.0))),
        AnswerToken(second, ()),
        AnswerToken(b"", ((b"", 0.0),)),
    )
    path = tmp_path / "answer_tokens.parquet"
    write_answer_tokens({"row-1": tokens, "row-2": ()}, path)
    assert read_answer_tokens(path) == {"row-1": tokens, "row-2": ()}


def test_logarithms_keep_the_precision_of_float32(tmp_path: Path) -> None:
    path = tmp_path / "answer_tokens.parquet"
    write_answer_tokens({"row": [AnswerToken(b"a", ((b"a", math.log(0.3)),))]}, path)
    (token,) = read_answer_tokens(path)["row"]
    assert math.isclose(math.exp(token.candidates[0][1]), 0.3, rel_tol=1e-6)


def test_no_file_means_no_tokens(tmp_path: Path) -> None:
    assert read_answer_tokens(tmp_path / "answer_tokens.parquet") == {}


def test_a_long_file_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillery.data.answer_tokens.GROUP_CANDIDATES", 5)
    token = AnswerToken(b"a", ((b"a", -0.5), (b"b", -1.0)))
    found = {f"row-{number}": (token,) * (number % 3) for number in range(11)}
    path = tmp_path / "answer_tokens.parquet"
    file = AnswerTokensFile(path)
    for example_id, tokens in found.items():
        file.write(example_id, tokens)
    assert len(file._rows) == 2, "no more than a part is in memory"
    file.close()
    assert pq.ParquetFile(path).num_row_groups == 4
    assert read_answer_tokens(path) == found


@BUDGET
@given(tokens=answers)
def test_packed_tokens_are_exact_to_four_places(tokens: list[AnswerToken]) -> None:
    found = unpacked(packed(tokens))
    assert [token.text for token in found] == [token.text for token in tokens]
    for ours, theirs in zip(found, tokens, strict=True):
        assert [text for text, _ in ours.candidates] == [text for text, _ in theirs.candidates]
        for (_, log), (_, exact) in zip(ours.candidates, theirs.candidates, strict=True):
            assert log == pytest.approx(exact, abs=5.1e-5)
            assert str(log) != "-0.0"


odd: list[tuple[Any, str]] = [
    (5, "no tokens"),
    ([5], "no tokens"),
    ([["a"]], "not enough values"),
    ([["a", ["b"]]], "zip"),
    ([["a", ["b", "c"]]], "no tokens"),
    ([["a", ["b", 0.5]]], "no logarithm"),
    ([["a", ["b", math.nan]]], "no logarithm"),
    ([["a", ["b", -math.inf]]], "no logarithm"),
    ([["a", [5, -1.0]]], "no tokens"),
    ([["a", ["b", -(10**400)]]], "no tokens"),
    ([["a", {}]], "no tokens"),
    ([["日", []]], "latin-1"),
    ([[None, []]], "no tokens"),
]


@pytest.mark.parametrize(("value", "reason"), odd)
def test_other_json_is_no_tokens(value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        unpacked(zlib.compress(json.dumps(value).encode()))
    assert "\n" not in str(caught.value)


@pytest.mark.security
def test_other_bytes_are_no_tokens() -> None:
    whole = packed([AnswerToken(b"a", ((b"a", -0.5),))])
    bomb = zlib.compress(b" " * (MOST_UNPACKED + 9))
    deep = zlib.compress(b"[" * 100_000)
    for data in (b"", whole[:-1], b"x" + whole, bomb, deep, zlib.compress(b"\xff")):
        with pytest.raises(ValueError):  # noqa: PT011 - several reasons
            unpacked(data)


@pytest.mark.security
@BUDGET
@given(tokens=answers, at=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_changed_byte_is_told_or_harmless(tokens: list[AnswerToken], at: int, byte: int) -> None:
    data = bytearray(packed(tokens))
    data[at % len(data)] = byte
    with contextlib.suppress(ValueError):
        unpacked(bytes(data))
