"""What the defaults make of tasks that nobody tuned them on: `make bench-tasks`.

    make bench-tasks       SNIPS intents (7), CLINC150 by domain (10) and the demo's moods (3)
    make bench-tasks-full  with CLINC150 whole (150) and CommonsenseQA (by choice) too; goes on
                           where it was ended
    make bench-tasks-endpoint
                           the three with an endpoint for a teacher: see task_curve.py

Each task has 20 answered rows a class (10 for CLINC150 whole), of which a fifth chooses and the
rest teaches, the other rows without their answers, and test rows of its own. The recipe says where
the rows are and that a local teacher labels; all else is a default. TASKS_DATA is the folder of the
public sets (task_rows.py).

A line a task: rows, what TF-IDF makes of the gold rows and of all labels, the linear probe, the
teacher, the student, the form that ships, minutes, and what the gate said. The last line is JSON:

worst_gap_to_tfidf  points, what ships less the better TF-IDF, over the tasks whose gate passed
passed, refused     tasks by what the gate said
kept_min            what ships as a share of its teacher's accuracy, the least over all tasks
float_gap_max       points that what ships loses against the float student, the most
clinc_time_ratio    time a row with 150 classes as a multiple of that with two
minutes             all together
"""

import json
import shutil
import statistics
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import task_curve
from benchmarks.task_rows import FULL, TASKS, data_folder, recipe_of, write_files
from benchmarks.task_runs import WORK, folder_of, run_in_a_process


def choice_recipe(folder: Path) -> dict[str, Any]:
    """Return the recipe of CommonsenseQA, whose rows have options of their own."""
    source = data_folder() / "commonsense_qa" / "train.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines()
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, (start, end) in {
        "gold": (0, 300),
        "validation": (300, 400),
        "test": (400, 1000),
        "train": (1000, 2000),
    }.items():
        files[split] = [str(folder / f"{split}.jsonl")]
        (folder / f"{split}.jsonl").write_text("\n".join(lines[start:end]) + "\n")
    return {
        "name": "commonsense-qa",
        "task": {"kind": "choice"},
        "dataset": {"source": "files", "files": files},
        "teacher": {"kind": "local"},
        "registry": {"kind": "local", "model_name": "commonsense-qa"},
    }


def task_recipe(name: str) -> dict[str, Any]:
    """Write the rows of a task, and return its recipe."""
    folder = WORK / "data" / name
    if name == "commonsense-qa":
        return choice_recipe(folder)
    return recipe_of(name, write_files(name, folder))


def class_time_ratio(folder: Path) -> float:
    """Return the median time of a row with 150 classes as a multiple of that with two: of the same
    student, whose head has as many rows."""
    from distillery.export.head import keep_rows
    from distillery.inference.onnx_student import OnnxStudent

    texts = [f"message number {number} asks for something" for number in range(60)]
    students = {}
    with TemporaryDirectory() as work:
        for count in (2, 150):
            copy = Path(work) / str(count)
            shutil.copytree(folder, copy)
            # The head has a row a class already; what the rows hold does not matter for the time.
            if not keep_rows(copy, [number % 2 for number in range(count)]):
                raise SystemExit(f"error: {folder}: its head can't be cut")
            students[count] = OnnxStudent(copy)
        times: dict[int, list[float]] = {count: [] for count in students}
        for turn in range(4):
            for count, student in students.items():
                for text in texts:
                    prompt = student.tokenizer.encode_chat([{"role": "user", "content": text}])
                    started = time.perf_counter()
                    student.class_probabilities(prompt, range(count))
                    if turn:
                        times[count].append(time.perf_counter() - started)
    return statistics.median(times[150]) / statistics.median(times[2])


ARTIFACTS = ("checkpoint", "model", "report")
"""Figures that name folders of this machine."""


def summary(
    results: Sequence[dict[str, Any]], ratio: float | None, minutes: float
) -> dict[str, Any]:
    """Return the last line."""
    whole = [result for result in results if "failed" not in result]
    gaps, kept, losses = [], [], []
    for result in whole:
        kept.append(result["shipped"] / result["teacher"])
        losses.append(100 * (result["student"] - result["shipped"]))
        rivals = [result["tfidf_gold"], result["tfidf_all"]]
        if result["passed"] and any(rivals):
            best = max(rival for rival in rivals if rival is not None)
            gaps.append(100 * (result["shipped"] - best))
    passed = sum(result["passed"] for result in whole)
    return {
        "worst_gap_to_tfidf": round(min(gaps), 2) if gaps else None,
        "passed": passed,
        "refused": len(results) - passed,
        "kept_min": round(min(kept), 4) if kept else None,
        "float_gap_max": round(max(losses), 2) if losses else None,
        "clinc_time_ratio": None if ratio is None else round(ratio, 3),
        "minutes": round(minutes, 1),
    }


def main() -> None:
    parser = ArgumentParser("python -m benchmarks.tasks", description="Runs the suite of tasks.")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--full", action="store_true", help="all tasks; keeps what is done")
    kind.add_argument("--endpoint", action="store_true", help="learning curves of an endpoint")
    parser.add_argument("--only", action="append", help="this task; may be given more than once")
    parser.add_argument("--small", action="store_true", help="with --endpoint: a trial of it")
    given = parser.parse_args()
    data_folder()
    if given.endpoint:
        task_curve.run_curves(given.only or list(TASKS), given.small)
        return
    names = given.only or ([*FULL, "commonsense-qa"] if given.full else list(TASKS))
    started = time.perf_counter()
    results = []
    for name in names:
        kept = WORK / f"{name}.json"
        if given.full and kept.exists():
            figures = json.loads(kept.read_text())
        else:
            figures = run_in_a_process(name, task_recipe(name))
        results.append({"task": name, **figures})
        print(
            json.dumps({key: value for key, value in results[-1].items() if key not in ARTIFACTS})
        )
        sys.stdout.flush()
    models = [result["model"] for result in results if result.get("classes")]
    ratio = class_time_ratio(folder_of(models[0])) if models else None
    print(json.dumps(summary(results, ratio, (time.perf_counter() - started) / 60)))


if __name__ == "__main__":
    main()
