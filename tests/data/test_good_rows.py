"""Copies of files without their bad rows: nothing else changes, and nothing is lost."""

import json
import os
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from distillery.data.good_rows import GROUP_ROWS, GoodCopy, refuse_good_copies, write_good_copies
from distillery.data.readers import open_table
from distillery.errors import DataError


def write_good_copy(path: Path, reasons: dict[int, str]) -> GoodCopy:
    return write_good_copies({path: reasons})[path]


def faults_of(path: Path) -> dict[int, str]:
    with open_table("DATA", path) as table:
        return {row.line: row.fault for row in table.rows if row.fault}


def bad_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_left_of_a_csv_is_as_it_was_byte_for_byte(tmp_path: Path) -> None:
    rows = [
        b'\xef\xbb\xbf"text","label"\r\n',
        b'"one\nin two lines",a\r\n',
        b"two, and,b\r\n",
        b"\r\n",
        b'"three""s",  c \n',
        b"f\xe9ur,d\n",
        b'"five"x,"e\n',
        b"six,f",
    ]
    path = tmp_path / "rows.csv"
    path.write_bytes(b"".join(rows))
    faults = faults_of(path)
    assert list(faults) == [4, 7, 8]
    good, bad = write_good_copy(path, faults)
    assert (good.name, bad.name) == ("rows-good.csv", "rows-bad.jsonl")
    assert good.read_bytes() == b"".join([*rows[:2], rows[4], rows[7]])
    assert bad_rows(bad) == [
        {"line": 4, "reason": faults[4], "row": "two, and,b"},
        {"line": 7, "reason": "not UTF-8; save the file in that encoding", "row": "f�ur,d"},
        {"line": 8, "reason": faults[8], "row": '"five"x,"e'},
    ]
    assert path.read_bytes() == b"".join(rows)
    with open_table("DATA", good) as table:
        assert [row.fault for row in table.rows] == [""] * 3


def test_what_is_left_of_jsonl_and_a_row_that_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_ROW_MB", "0.001")
    rows = ['{"text": "a"}\n', "no JSON\n", "\n", f'{{"text": "{"b" * 2000}"}}\n', '{"text": "c"}']
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(rows))
    good, bad = write_good_copy(path, {2: "no JSON", 4: "long"})
    assert good.read_text() == rows[0] + rows[4]
    assert bad_rows(bad) == [
        {"line": 2, "reason": "no JSON", "row": "no JSON"},
        {"line": 4, "reason": "long", "row": None},
    ]
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while it was read; run"):
        write_good_copy(path, {2: "no JSON"})


def test_what_is_left_of_parquet_has_its_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": ["a", None, "c"],
            "day": [date(2026, 1, day) for day in (1, 2, 3)],
            "tags": pa.array([["x"], ["y", "z"], None], pa.list_(pa.string())),
        }
    )
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    good, bad = write_good_copy(path, {2: "empty"})
    left = pq.read_table(good)
    assert left.schema.equals(table.schema)
    assert left.equals(table.take([0, 2]))
    row = {"text": None, "day": "2026-01-02", "tags": ["y", "z"]}
    assert bad_rows(bad) == [{"line": 2, "reason": "empty", "row": row}]


def test_no_copy_takes_the_place_of_another_file(tmp_path: Path) -> None:
    rows, other = tmp_path / "rows.csv", tmp_path / "rows-good.csv"
    refuse_good_copies([rows], [rows], force=False)
    with pytest.raises(DataError, match=r"rows-bad\.jsonl: would be written for two files"):
        refuse_good_copies([rows, tmp_path / "rows.jsonl"], [], force=True)
    other.touch()
    with pytest.raises(DataError, match=r"rows-good\.csv: exists; rename it, or say --force"):
        refuse_good_copies([rows], [rows], force=False)
    refuse_good_copies([rows], [rows], force=True)
    with pytest.raises(DataError, match=r"rows-good\.csv: is read too, and the copy of .* would"):
        refuse_good_copies([rows], [rows, other], force=True)
    with pytest.raises(DataError, match=r"can't be copied to .*rows-good\.csv \(No such file"):
        write_good_copy(tmp_path / "none" / "rows.csv", {2: "empty"})
    with pytest.raises(DataError, match=r"rows-good\.csv: is read too"):
        refuse_good_copies([Path(os.path.relpath(rows))], [other], force=True)


def test_a_copy_takes_the_place_of_a_link_and_not_of_what_it_leads_to(tmp_path: Path) -> None:
    rows, kept, good = (tmp_path / f"{name}.csv" for name in ("rows", "kept", "rows-good"))
    rows.write_text("text,label\n,a\ntwo,b\n")
    kept.write_text("kept")
    good.symlink_to(rows)
    with pytest.raises(DataError, match=r"rows-good\.csv: is read too"):
        refuse_good_copies([rows], [rows], force=True)
    good.unlink()
    good.symlink_to(kept)
    refuse_good_copies([rows], [rows], force=True)
    write_good_copy(rows, {2: "empty"})
    assert kept.read_text() == "kept"
    assert good.read_text() == "text,label\ntwo,b\n"
    good.unlink()
    good.symlink_to(tmp_path / "none")
    with pytest.raises(DataError, match=r"rows-good\.csv: exists"):
        refuse_good_copies([rows], [rows], force=False)


def test_where_a_file_cannot_be_copied_nothing_is_written(tmp_path: Path) -> None:
    rows, none = tmp_path / "rows.csv", tmp_path / "none.parquet"
    rows.write_text("text,label\n,a\ntwo,b\n")
    none.write_bytes(b"PAR1")
    earlier = tmp_path / "rows-good.csv"
    earlier.write_text("earlier")
    with pytest.raises(DataError, match=r"none\.parquet: can't be copied to .*none-good\.parquet"):
        write_good_copies({rows: {2: "empty"}, none: {1: "empty"}})
    assert earlier.read_text() == "earlier"
    assert set(tmp_path.iterdir()) == {rows, none, earlier}


@pytest.mark.parametrize("limit", ["1", "0.001"])
def test_a_row_that_has_swallowed_others_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setenv("DISTILLERY_ROW_MB", limit)
    path = tmp_path / "rows.csv"
    good = "".join(f"message {number},a\n" for number in range(199))
    path.write_text(f'text,label\none,a\n"two,b\n{good}\n')
    faults = faults_of(path)
    assert next(iter(faults)) == 3
    last = 202 if limit == "1" else 81
    with pytest.raises(DataError, match=rf"rows\.csv:3: .*; the row goes on to line {last}, so "):
        write_good_copy(path, faults)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("length", [999, 1000, 1001, 66_536, 66_537])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_numbers_of_lines_hold_whatever_ends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, length: int
) -> None:
    monkeypatch.setenv("DISTILLERY_ROW_MB", "0.001")
    long = '{"text": "' + "x" * (length - 12) + '"}'
    assert len(long) == length
    rows = ['{"text": "a"}', "no JSON", long, '{"text": "b"}', "none", '{"text": "c"}', ""]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(end.join(rows).encode())
    faults = faults_of(path)
    assert list(faults) == ([2, 5] if length <= 1000 else [2, 3, 5])
    good, bad = write_good_copy(path, faults)
    left = [text for number, text in enumerate(rows, 1) if number not in faults]
    assert good.read_bytes() == end.join(left).encode()
    row = [] if length <= 1000 else [None]
    assert [each["row"] for each in bad_rows(bad)] == ["no JSON", *row, "none"]


def test_parquet_has_large_row_groups_and_columns_that_cannot_be_filtered(tmp_path: Path) -> None:
    count = GROUP_ROWS + 1000
    table = pa.table({"text": pa.array(map(str, range(count)), pa.string_view())})
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    bad = {1: "bad", 256: "bad", 257: "bad", 300: "bad", count: "bad"}
    good = pq.ParquetFile(write_good_copy(path, bad).good)
    assert good.num_row_groups == 2
    assert good.schema_arrow.equals(table.schema)
    left = [number for number in range(count) if number + 1 not in bad]
    assert good.read()["text"].to_pylist() == list(map(str, left))
