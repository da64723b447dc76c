"""The readers of tables: what is too large, too deep or no text is one bad row or one line, and
what was written is what is read."""

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spoilt import varint

from distillery.data.good_rows import write_good_copies
from distillery.data.look import look
from distillery.data.readers import TableRow, open_table, read_columns, read_file
from distillery.data.rows import RowReader
from distillery.errors import DataError
from distillery.inference.batch import FailedRow, InputRow, read_rows
from distillery.labels.known import read_label_files
from distillery.recipe import Columns
from distillery.records import Example

pytestmark = pytest.mark.security

LIMIT = 10_000
"""Characters or bytes of a row in these tests."""

LABELLED = RowReader(Columns(question="text", choices=None, answer="label"), classify=True)
CHOSEN = RowReader(Columns(question="text", choices="choices", answer="answer"))

BUDGET = settings(max_examples=150, deadline=None, database=None, derandomize=True)
"""Inputs that are tried each time, always the same ones."""


@pytest.fixture(autouse=True)
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_ROW_MB", str(LIMIT / 1e6))


def rows_of(path: Path) -> list[TableRow]:
    with open_table("input_uri", path) as table:
        return list(table.rows)


def faults_of(path: Path) -> dict[int, str]:
    """Return the faults of a file's rows by line."""
    return {row.line: row.fault for row in rows_of(path) if row.fault}


def one_line(text: str) -> str:
    """Return a text that is short, in one line, and can be written in UTF-8."""
    assert "\n" not in text
    assert len(text) < 5_000
    text.encode()
    return text


def equal_texts(text: str, count: int) -> Any:
    """Return `count` times a text as a pyarrow array that holds it once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([text]))


def write_table(path: Path, columns: dict[str, Any], **how: Any) -> None:
    """Write a Parquet file that does not tell what its arrays were in Arrow."""
    pq.write_table(pa.table(columns), path, compression="zstd", store_schema=False, **how)


# Long lines and rows


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_a_line_of_json_that_is_too_long_is_one_bad_row(tmp_path: Path, end: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"text": "short"})
    long = json.dumps({"text": "x" * 3 * LIMIT})
    path.write_bytes(f"{good}\n{long}\n{good}{end}".encode())
    assert [row.values for row in rows_of(path)] == [{"text": "short"}, {}, {"text": "short"}]
    fault = "more than 0.01 MB in one row; shorten it, or raise DISTILLERY_ROW_MB"
    assert faults_of(path) == {2: fault}
    with pytest.raises(DataError, match=r"rows.jsonl:2: more than 0.01 MB in one row"):
        list(read_file("dataset.files.train", path).rows)


def test_rows_of_labels_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"example_id": "a"}\nno label\n')
    rows = read_columns([str(path)], {"example_id": "the row's id"})
    assert next(rows) == (f"{path}:1", {"example_id": "a"})
    with pytest.raises(DataError, match=r"labels.jsonl:2: no JSON object"):
        next(rows)


def test_a_row_of_csv_is_as_long_as_the_setting_allows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    cell = "y" * (LIMIT - 10)
    many = ",".join(["z"] * LIMIT)
    path.write_text(f"text,label\n{cell},a\n{'x' * 9 * LIMIT},b\n{many}\nc,d\n", newline="")
    values = [row.values for row in rows_of(path)]
    assert values == [{"text": cell, "label": "a"}, {}, {}, {"text": "c", "label": "d"}]
    assert list(faults_of(path)) == [3, 4]


def test_a_cell_of_csv_may_have_more_than_pythons_own_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_ROW_MB", "1")
    csv.field_size_limit(131_072)
    path = tmp_path / "rows.csv"
    path.write_text(f"text\n{'x' * 900_000}\n")
    assert [len(row.values["text"]) for row in rows_of(path)] == [900_000]


def test_a_quote_that_is_never_closed_ends_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    lines = "".join(f"row {number},a\n" for number in range(3_000))
    path.write_text(f'text,label\n"never closed,a\n{lines}')
    rows = rows_of(path)
    assert rows[0].fault.startswith("more than 0.01 MB in one row")
    assert rows[-1].values == {"text": "row 2999", "label": "a"}
    assert [row.line for row in rows[1:3]] == [rows[1].line, rows[1].line + 1]


def test_a_header_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",".join(f"c{number}" for number in range(LIMIT)))
    with pytest.raises(DataError, match=r"rows.csv:1: more than 0.01 MB in one row"):
        rows_of(path)


# Deep and odd values


DEEP = "[" * 60_000
HALF = "\ud800"


def test_brackets_without_end_in_a_cell_are_a_bad_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_ROW_MB", "1")
    path = tmp_path / "rows.csv"
    path.write_text(f'text,choices,answer\nWhy?,{DEEP},A\nHow?,"[""a"",""b""]",A\n')
    first, second = read_rows(path, CHOSEN)
    assert isinstance(first, FailedRow)
    assert one_line(first.reason).startswith("choices: no JSON (")
    assert isinstance(second, InputRow)


@pytest.mark.parametrize("odd", [DEEP, '{"A": 1e999}', '{"A": %s}' % ("9" * 400), '{"A": NaN}'])
def test_odd_probabilities_of_a_label_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    monkeypatch.setenv("DISTILLERY_ROW_MB", "1")
    path = tmp_path / "labels.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["example_id", "answer", "distribution"], ["1", "A", odd]])
    row = Example(example_id="1", question="Why?", choices=("a", "b"))
    with pytest.raises(DataError, match=r"labels.csv:2: distribution: must be probabilities"):
        read_label_files([str(path)], [row])


def test_a_reason_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps({"example_id": "1", "answer": "A", "rationale": HALF}))
    row = Example(example_id="1", question="Why?", choices=("a", "b"))
    with pytest.raises(DataError, match=r"labels.jsonl:1: rationale: half of a surrogate pair"):
        read_label_files([str(path)], [row])


@pytest.mark.parametrize(
    ("odd", "said"),
    [(HALF, "half of a surrogate pair, which is no character"), ("\0", "a NUL character")],
)
@pytest.mark.parametrize("column", ["id", "text", "label"])
def test_what_is_no_text_in_an_id_text_or_label_is_a_bad_row(
    tmp_path: Path, column: str, odd: str, said: str
) -> None:
    rows = [{"id": "1", "text": "a", "label": "x"}, {"id": "2", "text": "b", "label": "y"}]
    bad = {"id": "3", "text": "c", "label": "x", column: f"c{odd}c"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, bad, *rows]))
    results = list(read_rows(path, LABELLED))
    # The label is not read where rows are only answered.
    failed = [result for result in results if isinstance(result, FailedRow)]
    assert [(row.line, said in row.reason) for row in failed] == (
        [] if column == "label" else [(3, True)]
    )
    for row in failed:
        one_line(row.model_dump_json())
    found = look([path])
    assert len(found.rows) == (5 if column == "id" else 4)
    for wrong in found.bad:
        assert said in one_line(str(wrong))


def test_a_file_in_utf_16_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\na,b\n".encode("utf-16"))
    with pytest.raises(DataError) as caught:
        list(read_rows(path, LABELLED))
    one_line(str(caught.value))


def test_a_long_or_broken_name_of_a_column_or_label_is_shortened(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('"a\nb",' + "c" * 2_000 + ",d" * 500 + "\n")
    with pytest.raises(DataError) as caught:
        list(read_rows(path, LABELLED))
    assert "no column 'text', only 'a\\nb', 'ccc" in one_line(str(caught.value))
    label = tmp_path / "labels.jsonl"
    label.write_text(json.dumps({"text": "a", "choices": ["a", "b"], "answer": "x\n" * 3_000}))
    (failed,) = read_rows(label, CHOSEN)
    assert isinstance(failed, FailedRow)
    assert "is no option" in one_line(failed.reason)


# Parquet that unfolds


def test_a_parquet_row_that_unfolds_too_far_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    texts = pa.array(["short", "x" * 2 * LIMIT, "short"])
    write_table(path, {"text": texts, "other": texts})
    assert [row.values.get("text") for row in rows_of(path)] == ["short", None, "short"]
    assert list(faults_of(path)) == [2]


def test_the_columns_of_a_row_count_together(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    half = pa.array(["x" * (LIMIT * 2 // 5)])
    write_table(path, {"a": half, "b": half})
    assert not faults_of(path)
    write_table(path, {"a": half, "b": half, "c": half})
    assert list(faults_of(path)) == [1]


@pytest.mark.parametrize(
    "kind", [pa.utf8(), pa.large_utf8(), pa.binary(), pa.json_(pa.utf8()), pa.string_view()]
)
def test_a_list_of_equal_texts_is_measured_before_it_unfolds(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "rows.parquet"
    texts = pa.array(["x" * 100] * (LIMIT // 50))
    if isinstance(kind, pa.BaseExtensionType):
        texts = pa.ExtensionArray.from_storage(kind, texts)
    else:
        texts = texts.cast(kind)
    lists = pa.ListArray.from_arrays(pa.array([0, 2, len(texts)]), texts)
    write_table(path, {"choices": lists, "deep": pa.StructArray.from_arrays([lists], ["text"])})
    first, second = rows_of(path)
    assert len(first.values["choices"]) == 2
    assert first.values["deep"] == {"text": first.values["choices"]}
    assert second.fault.startswith("more than 0.01 MB in one row")


def test_a_map_of_equal_texts_is_measured_before_it_unfolds(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pairs = [[("a", "b")], None, [("k", "x" * 1000)] * 20, [("a", "b")]]
    write_table(path, {"map": pa.array(pairs, pa.map_(pa.utf8(), pa.utf8()))})
    assert [row.values.get("map") for row in rows_of(path)] == [pairs[0], None, None, pairs[3]]
    assert list(faults_of(path)) == [3]


@pytest.mark.parametrize("of", ["texts", "dictionary"])
def test_a_page_that_unfolds_too_far_is_one_line(tmp_path: Path, of: str) -> None:
    path = tmp_path / "rows.parquet"
    zeros = pa.array(["\0" * 100 * LIMIT])
    write_table(path, {"text": zeros}, use_dictionary=of == "dictionary")
    assert path.stat().st_size < LIMIT
    with pytest.raises(DataError, match=r"rows.parquet: row group 1 unfolds to [12] MB at a time"):
        rows_of(path)


def test_lists_of_nothing_that_unfold_too_far_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    lists = pa.ListArray.from_arrays(pa.array([0, 100 * LIMIT]), pa.nulls(100 * LIMIT, pa.int8()))
    write_table(path, {"list": lists})
    assert path.stat().st_size < LIMIT
    with pytest.raises(DataError, match=r"rows.parquet: row group 1 unfolds to 16 MB at a time"):
        rows_of(path)


def test_lists_whose_encoding_hides_their_size_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    encoding = {
        "use_dictionary": False,
        "column_encoding": {"list.list.element": "DELTA_BYTE_ARRAY"},
    }
    write_table(path, {"list": pa.array([["a", "ab"]])}, **encoding)
    with pytest.raises(DataError, match=r"'list.list.element' are written as DELTA_BYTE_ARRAY"):
        rows_of(path)
    write_table(
        path,
        {"text": pa.array(["a", "ab"])},
        use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
    )
    assert [row.values["text"] for row in rows_of(path)] == ["a", "ab"]


def test_all_rows_of_a_data_set_unfold_to_no_more_than_the_setting_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.parquet"
    write_table(path, {"text": equal_texts("x" * 1_000, 2_000), "label": equal_texts("a", 2_000)})
    monkeypatch.setenv("DISTILLERY_TABLE_MB", "1")
    said = (
        r"rows.parquet: its rows unfold to more than 1 MB; take fewer, or raise DISTILLERY_TABLE_MB"
    )
    with pytest.raises(DataError, match=said):
        list(read_file("dataset.files.train", path).rows)
    with pytest.raises(DataError, match=said):
        look([path])
    # Row by row there is no end to a file.
    assert len(rows_of(path)) == 2_000


def test_the_footers_sizes_are_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_table(path, {"text": pa.array(["\0" * 100 * LIMIT])}, use_dictionary=False)
    size = pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    content = path.read_bytes()
    # Thrift writes the size zigzag, 7 bits a byte. It stands in the footer alone.
    lied = content.replace(varint(2 * size), varint(2 * (1 << 14)).ljust(3, b"\0"))
    if lied == content or len(lied) != len(content):
        pytest.fail("the footer holds its sizes in another way")
    path.write_bytes(lied)
    with pytest.raises(DataError, match=r"row group 1 unfolds to 1 MB at a time"):
        rows_of(path)


MEASURE = """
import resource, sys
from pathlib import Path
from distillery.data.readers import open_table

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def read(path):
    with open_table("input_uri", Path(path)) as table:
        return sum(1 for row in table.rows)

small, large = sys.argv[1:]
read(small)
before = peak()
print(read(large), (peak() - before) // 1024)
"""


def rows_and_memory(small: Path, large: Path) -> tuple[int, int]:
    """Return how many rows a file has, and how many MiB more its reading takes than a small
    file's."""
    command = [sys.executable, "-c", MEASURE, str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, memory = done.stdout.split()
    return int(rows), int(memory)


def test_memory_stays_flat_while_a_parquet_file_unfolds_to_gigabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_ROW_MB", "0.5")
    write_table(tmp_path / "small.parquet", {"text": pa.array(["a"])})
    columns = {f"c{number}": equal_texts("x" * 400_000, 256) for number in range(16)}
    write_table(tmp_path / "wide.parquet", columns)
    lists = pa.ListArray.from_arrays(pa.array([0, 2_000]), equal_texts("x" * 400_000, 2_000))
    write_table(tmp_path / "lists.parquet", {"list": lists})
    # Unfolded they are 1.6 GB and 0.8 GB.
    wide = rows_and_memory(tmp_path / "small.parquet", tmp_path / "wide.parquet")
    in_lists = rows_and_memory(tmp_path / "small.parquet", tmp_path / "lists.parquet")
    assert (wide[0], in_lists[0]) == (256, 1)
    assert max(wide[1], in_lists[1]) < 100


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_memory_stays_flat_while_a_line_has_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setenv("DISTILLERY_ROW_MB", "1")
    small, large = tmp_path / f"small.{suffix}", tmp_path / f"large.{suffix}"
    small.write_text('{"a": 1}\n' * 3)
    with large.open("w") as file:
        file.write("text\n" if suffix == "csv" else '{"a": "')
        for _ in range(100):
            file.write("x" * 1_000_000)
        file.write("\n1\n")
    rows, memory = rows_and_memory(small, large)
    assert rows == 2
    assert memory < 30


# What hypothesis finds

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@BUDGET
@given(rows=st.lists(st.dictionaries(names, values, max_size=4), min_size=1, max_size=5))
def test_rows_of_json_are_read_as_they_were_written(
    rows: list[dict[str, Any]], folder: Path
) -> None:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.values for row in rows_of(path)] == rows
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    path.write_bytes(f"\ufeff{lines}".encode())
    assert [row.values for row in rows_of(path)] == rows


@BUDGET
@given(
    header=st.lists(names, min_size=2, max_size=4, unique=True),
    rows=st.lists(st.lists(texts, min_size=4, max_size=4), min_size=1, max_size=5),
    bom=st.booleans(),
)
def test_rows_of_csv_are_read_as_they_were_written(
    header: list[str], rows: list[list[str]], bom: bool, folder: Path
) -> None:
    path = folder / "rows.csv"
    cut = [row[: len(header)] for row in rows]
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([header, *cut])
    path.write_bytes(
        text.getvalue().encode("utf-8-sig" if bom or header[0][0] == "\ufeff" else "utf-8")
    )
    assert [row.values for row in rows_of(path)] == [
        dict(zip(header, row, strict=True)) for row in cut
    ]


@BUDGET
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "id": st.integers(-(2**63), 2**63 - 1) | st.none(),
                "text": texts | st.none(),
                "choices": st.lists(texts | st.none(), max_size=4) | st.none(),
                "label": st.fixed_dictionaries({"a": texts, "b": st.lists(texts, max_size=2)}),
                "weight": st.floats(allow_nan=False) | st.none(),
            }
        ),
        min_size=1,
        max_size=8,
    ),
    version=st.sampled_from(["1.0", "2.0"]),
    group=st.integers(1, 8),
    dictionary=st.booleans(),
)
def test_rows_of_parquet_are_read_as_they_were_written(
    rows: list[dict[str, Any]], version: str, group: int, dictionary: bool, folder: Path
) -> None:
    path = folder / "rows.parquet"
    pq.write_table(
        pa.Table.from_pylist(rows),
        path,
        data_page_version=version,
        row_group_size=group,
        use_dictionary=dictionary,
    )
    assert [(row.line, row.values, row.fault) for row in rows_of(path)] == [
        (number, row, "") for number, row in enumerate(rows, 1)
    ]


WHOLE = {
    "rows.jsonl": b'{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n',
    "rows.csv": b'text,label\n"a ""b""",x\nb,y\n',
}


def try_to_read(path: Path) -> None:
    """Read a file in every way that there is. Raises nothing but DataError, in one line."""
    for reader in (LABELLED, CHOSEN):
        try:
            for row in read_rows(path, reader):
                one_line(row.model_dump_json())
        except DataError as error:
            one_line(str(error))
    try:
        found = look([path])
        for wrong in found.bad:
            one_line(str(wrong))
        if found.bad:
            reasons = {wrong.line: wrong.reason for wrong in found.bad}
            copy = write_good_copies({path: reasons})[path]
            left = look([copy.good])
            assert not left.bad
            assert [row.content for row in left.rows] == [row.content for row in found.rows]
            told = [json.loads(line) for line in copy.bad.read_text(encoding="utf-8").splitlines()]
            assert [row["line"] for row in told] == [wrong.line for wrong in found.bad]
    except DataError as error:
        one_line(str(error))


@BUDGET
@given(name=st.sampled_from(sorted(WHOLE)), content=st.binary(max_size=200))
def test_any_bytes_are_rows_or_one_line(name: str, content: bytes, folder: Path) -> None:
    path = folder / name
    for bytes_ in (content, WHOLE[name] + content, content + WHOLE[name]):
        path.write_bytes(bytes_)
        try_to_read(path)


odd_texts = st.text(st.characters() | st.sampled_from("\ud800\udfff\0\n\u2028"), max_size=9)
odd_values = values | odd_texts | st.lists(odd_texts, max_size=4)


@BUDGET
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"text": odd_values, "label": odd_values, "choices": odd_values},
            optional={"id": odd_values, "answer": odd_values},
        )
    )
)
def test_any_values_are_rows_or_one_line(rows: list[dict[str, Any]], folder: Path) -> None:
    path = folder / "values.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try_to_read(path)


@pytest.fixture(scope="module")
def parquet_content(folder: Path) -> bytes:
    path = folder / "whole.parquet"
    rows = [
        {"text": f"text {n % 3}", "label": "ab"[n % 2], "choices": ["a", "b"]} for n in range(20)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
    return path.read_bytes()


@BUDGET
@given(places=st.lists(st.floats(0, 1), max_size=3), byte=st.integers(0, 255), cut=st.booleans())
def test_changed_parquet_files_are_rows_or_one_line(
    places: list[float], byte: int, cut: bool, folder: Path, parquet_content: bytes
) -> None:
    content = bytearray(parquet_content)
    for place in places:
        content[math.floor(place * (len(content) - 1))] = byte
    path = folder / "changed.parquet"
    path.write_bytes(content[: int(places[0] * len(content))] if cut and places else content)
    try_to_read(path)
