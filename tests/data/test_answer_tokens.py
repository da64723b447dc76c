"""The file of a teacher's probabilities for the tokens of its written answers."""

import math
from pathlib import Path

from distillery.data.answer_tokens import AnswerToken, read_answer_tokens, write_answer_tokens


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
