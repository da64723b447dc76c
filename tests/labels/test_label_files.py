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
from distillery.labels.files import (
    LABELS_FILE,
    LabelFiles,
    open_lines,
    read_labels,
    train_line,
    write_line,
)
from distillery.labels.store import LabelStore
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example, TeacherLabel, Usage

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
@given(question=st.text(), answer=st.text(max_size=9))
def test_a_line_to_train_on_is_as_json_dumps_writes_it(question: str, answer: str) -> None:
    values = {"Question": question, "Answer": answer}
    assert train_line(question, answer) == json.dumps(values, ensure_ascii=False) + "\n"


def test_the_bytes_of_the_files_stay_as_they_are(tmp_path: Path) -> None:
    """Equal labels give equal artifacts with every version, which caches go by."""
    choice = Example(example_id="1", question='“é” "猫"\n', choices=("x", "y"), answer_key="B")
    recipe = TeacherRecipe(filters={"agreement_with_gold": True, "minimum_accepted": 0})
    files = LabelFiles(tmp_path, PromptRecipe(user="{question}{choices}"), recipe)
    usage = Usage(prompt_tokens=90, completion_tokens=1)
    soft = {"A": 0.1 + 0.2, "B": 1e-07}
    files.accept(choice, TeacherLabel(example_id="1", answer="B", usage=usage))
    files.accept(choice, TeacherLabel(example_id="2", answer="B", distribution=soft, confidence=1))
    files.accept(choice, TeacherLabel(example_id="3", answer="A"))
    written = TeacherLabel(example_id="4", answer='{"a": 1}', references=("b",), rationale="so")
    files.accept(choice.model_copy(update={"answer_key": None}), written, question="asked")
    files.reject(choice, "empty answer", "\t")
    tally = files.tally
    assert (tally.rows, tally.accepted, tally.rejected.total()) == (5, 3, 2)
    files.close()
    zero = '"usage": {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}}'
    hard = '"distribution": null, "confidence": null, "rationale": null, '
    assert (tmp_path / LABELS_FILE).read_text("utf-8").splitlines() == [
        '{"example_id": "1", "answer": "B", ' + hard + '"usage": {"prompt_tokens": 90, '
        '"completion_tokens": 1, "cached_tokens": 0}}',
        '{"example_id": "2", "answer": "B", "distribution": {"A": 0.30000000000000004, '
        '"B": 1e-07}, "confidence": 1.0, "rationale": null, ' + zero,
        '{"example_id": "4", "answer": "{\\"a\\": 1}", "distribution": null, "confidence": null, '
        '"rationale": "so", "references": ["b"], ' + zero,
    ]
    asked = '“é” \\"猫\\"\\n(A) x\\n(B) y'
    assert (tmp_path / "train_data.jsonl").read_text("utf-8").splitlines() == [
        f'{{"Question": "{asked}", "Answer": "B"}}',
        f'{{"Question": "{asked}", "Answer": "B"}}',
        '{"Question": "asked", "Answer": "{\\"a\\": 1}"}',
        '{"Question": "asked", "Answer": "b"}',
    ]
    assert (tmp_path / "rejected.jsonl").read_text("utf-8").splitlines() == [
        '{"example_id": "1", "reason": "gold says otherwise", "raw": "A"}',
        '{"example_id": "1", "reason": "empty answer", "raw": "\\t"}',
    ]


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
