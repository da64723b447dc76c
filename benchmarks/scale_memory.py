"""How the memory of a stage grows with its rows: `python -m benchmarks.scale_memory [ROWS MORE]`,
by default 100,000 and 1,000,000 rows.

Each stage runs in a fresh interpreter, with few rows and with many. The last line is JSON: of each
stage the seconds and the most memory in MiB, libraries included, with either number of rows, and

memory_growth    the worst ratio of the most memory with many rows to that with few

Stages:
prepare_apart    data preparation with dataset.near_duplicate: 1, where rows must be equal to count
                 as near duplicates
prepare          with the default of dataset.near_duplicate
label            labelling (labels.py), from a stub that answers at once, with journal and ledger
answer           batch inference in shards by a tiny random model, to Parquet, in one process

The rows are those of the shipped sample again and again, in each of which another word is replaced
by another number.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.labels import SAMPLE, memory
from benchmarks.scale_batches import STUDENT, exported, register
from distillery.data.prepare import prepare
from distillery.evaluation.scoring_process import peak_mib
from distillery.recipe import DatasetRecipe

FEW_ROWS, MANY_ROWS = 100_000, 1_000_000
APART = 1.0
"""The threshold of near duplicates in the stage prepare_apart."""

STAGES = ("prepare_apart", "prepare", "label", "answer")

Figures = dict[str, float]


def write_rows(path: Path, count: int) -> None:
    """Write so many rows of choices to a JSONL file."""
    lines = [
        line
        for file in sorted(SAMPLE.glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    sample = [json.loads(line) for line in lines]
    with path.open("w", encoding="utf-8", newline="\n") as out:
        for number in range(count):
            row = sample[number % len(sample)]
            words = row["question"].split()
            words[number // len(sample) % len(words)] = str(number)
            out.write(json.dumps({**row, "id": str(number), "question": " ".join(words)}) + "\n")


def prepared(rows: Path, out: Path, threshold: float) -> Figures:
    """Prepare the rows of a file, in this process."""
    recipe = DatasetRecipe(
        source="files",
        files={"train": (str(rows),)},
        splits={"train": "train"},
        carve={"gold": 0.1, "validation": 0.01, "test": 0.02},
        near_duplicate=threshold,
    )
    started = time.perf_counter()
    counts = prepare(recipe, out)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak_mib": peak_mib(),
        "kept": sum(split.rows for split in counts.splits.values()),
    }


def answered(rows: Path, out: Path) -> Figures:
    """Answer the rows of a file, in this process."""
    from flows.batch_inference import main

    started = time.perf_counter()
    code = main([STUDENT, str(rows), str(out / "answers"), "--version", "1", "--form", "parquet"])
    assert code == 0
    return {"seconds": time.perf_counter() - started, "peak_mib": peak_mib()}


def stage(name: str, rows: Path, out: Path, count: int) -> Figures:
    """Run a stage in this process."""
    if name == "label":
        return memory(out, count)
    if name == "answer":
        return answered(rows, out)
    threshold = APART if name == "prepare_apart" else DatasetRecipe().near_duplicate
    return prepared(rows, out, threshold)


def measured(name: str, rows: Path, out: Path, count: int, student: Path | None = None) -> Figures:
    """Run a stage in a process of its own. `student`: an exported model, for the stage answer."""
    out.mkdir()
    command = [sys.executable, "-m", "benchmarks.scale_memory"]
    command += ["--stage", name, str(rows), str(out), str(count)]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DISTILLERY_", "TEACHER_"))
    }
    environment["DISTILLERY_HOME"] = str(out / "home")
    environment["PREFECT_HOME"] = str(out / "prefect")
    if student and name == "answer":
        register(student, out / "home", {})
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def memory_growth(few: int = FEW_ROWS, many: int = MANY_ROWS) -> dict[str, Any]:
    """Run each stage with few and with many rows, and return what they took."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        student = exported(scratch / "student")
        for name in STAGES:
            peaks = []
            for size, count in (("few", few), ("many", many)):
                rows = scratch / f"{size}.jsonl"
                if not rows.exists():
                    write_rows(rows, count)
                figures = measured(name, rows, scratch / f"{name}-{size}", count, student)
                print(f"{name}, {count:,} rows: {figures}", flush=True)
                peaks.append(figures["peak_mib"])
                for kind in ("seconds", "peak_mib"):
                    found[f"{name}_{size}_{kind}"] = round(figures[kind], 2)
            found[f"{name}_growth"] = round(peaks[1] / peaks[0], 3)
    worst = max(value for key, value in found.items() if key.endswith("_growth"))
    return {**found, "memory_growth": worst}


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.scale_memory")
    parser.add_argument("--stage", nargs=4, metavar=("NAME", "FILE", "FOLDER", "ROWS"))
    parser.add_argument("rows", nargs="*", type=int, default=[FEW_ROWS, MANY_ROWS])
    given = parser.parse_args()
    if given.stage:
        name, file, folder, rows = given.stage
        print(json.dumps(stage(name, Path(file), Path(folder), int(rows))))
    else:
        print(json.dumps(memory_growth(*given.rows)))
