"""labels.jsonl as it is written and read back, and after somebody has changed it."""

import json
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillery.errors import DataError
from distillery.labels.exports import import_answers, parquet_schema
from distillery.labels.files import LABELS_FILE, open_lines, read_labels, write_line
from distillery.labels.store import LabelStore
from distillery.records import TeacherLabel

pytestmark = pytest.mark.security

BUDGET = settings(max_examples=100, deadline=None, database=None, derandomize=True)
"""Inputs that are tried each time, always the same ones."""

shares = st.floats(0, 1)
labels = st.builds(
    TeacherLabel,
    example_id=st.text(max_size=9),
    answer=st.text(max_size=9),
    distribution=st.none() | st.dictionaries(st.text(max_size=3), shares, max_size=3),
    confidence=st.none() | shares,
    rationale=st.none() | st.text(max_size=20),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("labels")


@BUDGET
@given(written=st.lists(labels, max_size=4, unique_by=lambda label: label.example_id))
def test_labels_are_read_as_they_were_written(written: list[TeacherLabel], folder: Path) -> None:
    with open_lines(folder / LABELS_FILE, "w") as file:
        for label in written:
            write_line(file, label.model_dump())
    assert list(read_labels(folder).values()) == written


@BUDGET
@given(label=labels, place=shares, other=st.binary(max_size=3), cut=st.booleans())
def test_changed_labels_are_one_line(
    label: TeacherLabel, place: float, other: bytes, cut: bool, folder: Path
) -> None:
    line = json.dumps(label.model_dump(), ensure_ascii=False).encode()
    at = int(place * (len(line) - 1))
    changed = line[:at] if cut else line[:at] + other + line[at + 1 :]
    (folder / LABELS_FILE).write_bytes(line + b"\n" + changed + b"\n")
    try:
        read_labels(folder)
    except DataError as error:
        text = str(error)
        assert text.startswith(f"{folder / LABELS_FILE}:")
        assert text.endswith("label again with --refresh label")
        assert "\n" not in text


def test_a_line_that_is_no_label_is_named(tmp_path: Path) -> None:
    line = TeacherLabel(example_id="1", answer="A").model_dump_json()
    (tmp_path / LABELS_FILE).write_text(f"{line}\n{'[' * 60_000}\n")
    with pytest.raises(DataError, match=r"labels.jsonl:2: no label can be read"):
        read_labels(tmp_path)


@pytest.mark.parametrize("odd", ["[" * 60_000, "{"])
def test_an_export_with_a_distribution_that_is_no_json_is_one_line(
    tmp_path: Path, odd: str
) -> None:
    path = tmp_path / "labels.parquet"
    schema = parquet_schema()
    values = {pa.string(): odd, pa.binary(): None}
    row = [pa.array([values.get(kind, 0)], kind) for kind in schema.types]
    pq.write_table(pa.table(row, schema=schema), path)
    with (
        LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store,
        pytest.raises(DataError, match=r"labels.parquet: distribution: no JSON \("),
    ):
        import_answers(store, path)
