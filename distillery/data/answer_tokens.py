"""What a teacher says of each token of a written answer, and its file.

The file is Parquet with one row per answer: `example_id`; `tokens`, a list of bytes; `candidates`
and `logs`, for each token a list of bytes and a list of natural logarithms of probabilities.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

FILE = "answer_tokens.parquet"

ROWS_AT_A_TIME = 64
"""Answers that are read at a time."""


class AnswerToken(NamedTuple):
    """A token of an answer, as the teacher's tokenizer cuts it.

    text: the bytes that it stands for, UTF-8 that may begin or end within a character; b"" is the
    end of the turn. candidates: the likeliest tokens at its position, each with the natural
    logarithm of its probability; what they leave of 1 is the probability of all others together."""

    text: bytes
    candidates: tuple[tuple[bytes, float], ...]


def write_answer_tokens(answers: Mapping[str, Sequence[AnswerToken]], path: Path) -> None:
    """Write the tokens of answers, by example id, to the file `path`."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    texts, candidates, logs = [], [], []
    for tokens in answers.values():
        texts.append([token.text for token in tokens])
        candidates.append([[text for text, _ in token.candidates] for token in tokens])
        logs.append([[log for _, log in token.candidates] for token in tokens])
    columns = {
        "example_id": pa.array(list(answers), pa.string()),
        "tokens": pa.array(texts, pa.list_(pa.binary())),
        "candidates": pa.array(candidates, pa.list_(pa.list_(pa.binary()))),
        "logs": pa.array(logs, pa.list_(pa.list_(pa.float32()))),
    }
    pq.write_table(pa.table(columns), path, compression="zstd")


def read_answer_tokens(path: Path) -> dict[str, tuple[AnswerToken, ...]]:
    """Return the tokens of the answers in a file of `write_answer_tokens`, by example id; none
    where there is no such file."""
    return dict(each_answer_tokens(path))


def each_answer_tokens(path: Path) -> Iterator[tuple[str, tuple[AnswerToken, ...]]]:
    """Yield the example id and the tokens of each answer, as `read_answer_tokens` returns them, a
    few in memory at a time."""
    import pyarrow.parquet as pq

    if not path.exists():
        return
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME):
            for row in batch.to_pylist():
                columns = (row["tokens"], row["candidates"], row["logs"])
                tokens = []
                for text, found, logs in zip(*columns, strict=True):
                    tokens.append(AnswerToken(text, tuple(zip(found, logs, strict=True))))
                yield row["example_id"], tuple(tokens)
