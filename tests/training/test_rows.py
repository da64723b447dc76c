"""The file of rows that a training reads: each row when it is needed, and never all of them."""

import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from two_ranks import cases, rows_of, trained

from distillery.records import digest_of
from distillery.training.batching import batches
from distillery.training.checkpoint import fingerprint_of
from distillery.training.hidden_states import TeacherStates
from distillery.training.rows import RowFile, TrainingRow, write_rows


def test_a_file_gives_the_rows_that_were_written(tmp_path: Path) -> None:
    rows = [*rows_of("letters")[:5], TrainingRow(prompt=(1, 2), answer=0, target=(3,))]
    write_rows(rows, tmp_path / "rows.jsonl")
    found = RowFile(tmp_path / "rows.jsonl")
    assert list(found) == rows
    assert (len(found), found[-1], found[1:5:2]) == (6, rows[-1], rows[1:5:2])
    with pytest.raises(IndexError):
        found[6]
    write_rows([], tmp_path / "none.jsonl")
    assert not RowFile(tmp_path / "none.jsonl")


def test_a_training_from_a_file_is_that_from_a_list(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("soft", "upper half", "token labels"):
        case = cases()[name]
        write_rows(case.rows, tmp_path / "rows.jsonl")
        expected = trained(tiny_model("llama"), case)["weights"]
        from_file: Any = RowFile(tmp_path / "rows.jsonl")
        found = trained(tiny_model("llama"), replace(case, rows=from_file))["weights"]
        assert all(torch.equal(found[key], weight) for key, weight in expected.items()), name


def test_an_epoch_over_many_rows_takes_little_memory(tmp_path: Path) -> None:
    def each(count: int) -> list[TrainingRow]:
        row = TrainingRow(prompt=tuple(range(1000, 1200)), letters=(300, 301), answer=0)
        return [row.model_copy(update={"answer": number % 2}) for number in range(count)]

    write_rows(each(3000), tmp_path / "rows.jsonl")

    def peak(opened: Callable[[Path], Sequence[TrainingRow]]) -> int:
        tracemalloc.start()
        rows = opened(tmp_path / "rows.jsonl")
        states = TeacherStates(torch.zeros(len(rows), 1), rows, "cpu")
        fingerprint_of(rows, [], [], {})
        for picked in batches(rows, 8, 0, 0, 512):
            states.of([rows[index] for index in picked])
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(RowFile) < 0.1 * peak(lambda path: list(RowFile(path)))


def test_a_fingerprint_is_the_digest_of_all_that_a_training_starts_from() -> None:
    rows, validation = rows_of("letters"), rows_of("letters")[:3]
    weights = {"head": torch.zeros(2, 3)}
    dumped = [[row.model_dump(mode="json") for row in part] for part in (rows, validation)]
    expected = digest_of([*dumped, ["é", 1], {"head": [2, 3]}])
    assert fingerprint_of(rows, validation, ["é", 1], weights) == expected
    assert fingerprint_of(rows, [], ["é", 1], weights) != expected
