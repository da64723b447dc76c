"""What a teacher says of each token of a written answer: its file, and its form in a database.

The file is Parquet with one row per answer: `example_id`; `tokens`, a list of bytes; `candidates`
and `logs`, for each token a list of bytes and a list of natural logarithms of probabilities.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FILE = "answer_tokens.parquet"

ROWS_AT_A_TIME = 64
"""Answers that are read at a time."""

GROUP_CANDIDATES = 200_000
"""Candidates in a row group of the file: those in memory while it is written, some 20 MB."""

DIGITS = 4
"""Decimal places of a logarithm in a database: a probability is then exact to 0.005 %."""

MOST_UNPACKED = 2**26
"""Bytes of JSON that the answer in a database may unfold to."""


class AnswerToken(NamedTuple):
    """A token of an answer, as the teacher's tokenizer cuts it.

    text: the bytes that it stands for, UTF-8 that may begin or end within a character; b"" is the
    end of the turn. candidates: the likeliest tokens at its position, each with the natural
    logarithm of its probability; what they leave of 1 is the probability of all others together."""

    text: bytes
    candidates: tuple[tuple[bytes, float], ...]


class AnswerTokensFile:
    """Writes the file of answers' tokens, answer by answer; its memory does not grow with them. It
    is whole once it is closed."""

    def __init__(self, path: Path) -> None:
        """Open the file `path`."""
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        lists = pa.list_(pa.binary())
        self._schema = pa.schema(
            {
                "example_id": pa.string(),
                "tokens": lists,
                "candidates": pa.list_(lists),
                "logs": pa.list_(pa.list_(pa.float32())),
            }
        )
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self._candidates = 0

    def write(self, example_id: str, tokens: Sequence[AnswerToken]) -> None:
        """Write the tokens of one answer."""
        row = {
            "example_id": example_id,
            "tokens": [token.text for token in tokens],
            "candidates": [[text for text, _ in token.candidates] for token in tokens],
            "logs": [[log for _, log in token.candidates] for token in tokens],
        }
        self._rows.append(row)
        self._candidates += sum(len(token.candidates) for token in tokens)
        if self._candidates >= GROUP_CANDIDATES:
            self._write_group()

    def close(self) -> None:
        """Write what is left, and close the file."""
        if self._rows:
            self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        import pyarrow as pa

        rows, self._rows, self._candidates = self._rows, [], 0
        self._writer.write_table(pa.Table.from_pylist(rows, schema=self._schema))


def write_answer_tokens(answers: Mapping[str, Sequence[AnswerToken]], path: Path) -> None:
    """Write the tokens of answers, by example id, to the file `path`."""
    file = AnswerTokensFile(path)
    for example_id, tokens in answers.items():
        file.write(example_id, tokens)
    file.close()


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
                yield row["example_id"], tokens_in(row)


def tokens_in(row: Mapping[str, Any]) -> tuple[AnswerToken, ...]:
    """Return the tokens in a row of the file. Raises ValueError if it has not a list of candidates
    and one of as many logarithms for each of them."""
    tokens = []
    for text, found, logs in zip(row["tokens"], row["candidates"], row["logs"], strict=True):
        tokens.append(AnswerToken(text, tuple(zip(found, logs, strict=True))))
    return tuple(tokens)


def spelled(tokens: Sequence[AnswerToken]) -> bytes:
    """Return the bytes of the text that tokens are those of."""
    return b"".join(token.text for token in tokens)


def packed(tokens: Sequence[AnswerToken]) -> bytes:
    """Return an answer's tokens for a column of a database: JSON, compressed by zlib, in which
    [token, [candidate, logarithm, candidate, ...]] stands for each, and a character for a byte.

    100 tokens with 20 candidates each take some 13 kB. As a Parquet file for each answer they would
    take 17 kB, and 20 tokens 5.7 kB instead of 3.0. zlib is a part of Python; zstd at its level 3
    makes 100 tokens no smaller."""
    values = []
    for token in tokens:
        pairs: list[str | float] = []
        for text, log in token.candidates:
            # Adding 0.0 makes 0.0 of -0.0.
            pairs += [text.decode("latin-1"), round(log, DIGITS) + 0.0]
        values.append([token.text.decode("latin-1"), pairs])
    return zlib.compress(json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode())


def unpacked(data: bytes) -> tuple[AnswerToken, ...]:
    """Return the tokens that `packed` made bytes of. Raises ValueError for any other bytes."""
    inflating = zlib.decompressobj()
    try:
        text = inflating.decompress(data, MOST_UNPACKED)
        if not inflating.eof:
            raise ValueError("cut off, or too large")
        tokens = []
        for token, pairs in json.loads(text):
            candidates = []
            for candidate, log in zip(pairs[::2], pairs[1::2], strict=True):
                if not -math.inf < log <= 0:
                    raise ValueError(f"no logarithm of a probability: {log}")
                candidates.append((candidate.encode("latin-1"), float(log)))
            tokens.append(AnswerToken(token.encode("latin-1"), tuple(candidates)))
    except (
        zlib.error,
        TypeError,
        AttributeError,
        LookupError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ValueError(f"no tokens of an answer ({type(error).__name__})") from error
    return tuple(tokens)
