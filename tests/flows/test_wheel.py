"""What is shipped holds the code and the demo's rows: no weights, labels or database."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
MADE = (
    ".safetensors",
    ".onnx",
    ".data",
    ".db",
    ".sqlite",
    ".gguf",
    ".bin",
    ".pt",
    ".onnx_adapter",
    ".npy",
    ".pkl",
)
MOST_BYTES = 1_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[zipfile.ZipInfo]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as content:
        return content.infolist()


def test_the_wheel_holds_distillery_alone(wheel: list[zipfile.ZipInfo]) -> None:
    tops = {entry.filename.split("/")[0] for entry in wheel}
    assert tops - {"distillery"} == {top for top in tops if top.endswith(".dist-info")}
    names = {entry.filename for entry in wheel}
    assert {
        "distillery/recipe/presets/demo.yaml",
        "distillery/recipe/presets/classify.yaml",
        "distillery/recipe/presets/choose.yaml",
        "distillery/data/sample/gold.jsonl",
        "distillery/py.typed",
    } <= names
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_holds_nothing_that_a_run_makes(wheel: list[zipfile.ZipInfo]) -> None:
    assert [entry.filename for entry in wheel if entry.filename.endswith(MADE)] == []
    assert [entry.filename for entry in wheel if entry.file_size > MOST_BYTES] == []


def test_the_repository_holds_nothing_that_a_run_makes() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout
    files = [PROJECT / name for name in listed.split("\0") if name]
    assert PROJECT / "distillery" / "recipe" / "recipe.py" in files
    assert [str(file) for file in files if file.name.endswith(MADE)] == []
    assert [
        str(file) for file in files if file.is_file() and file.stat().st_size > MOST_BYTES
    ] == []
    data = PROJECT / "distillery" / "data" / "sample"
    rows = {file.name for file in files if file.suffix == ".jsonl" and data not in file.parents}
    assert not rows & {
        "labels.jsonl",
        "rejected.jsonl",
        "train_data.jsonl",
        "answers.jsonl",
        "predictions.jsonl",
    }
