"""What the defaults make of tasks that nobody tuned them on: `make bench-tasks`.

    make bench-tasks       SNIPS intents (7), CLINC150 by domain (10) and the demo's moods (3)
    make bench-tasks-full  with CLINC150 whole (150) and CommonsenseQA (by choice) too; goes on
                           where it was ended

Each task has 20 answered rows a class (10 for CLINC150 whole), of which a fifth chooses and the
rest teaches, the other rows without their answers, and test rows of its own. The recipe says where
the rows are and that a local teacher labels; all else is a default. TASKS_DATA is the folder with
snips/train.jsonl, clinc150/train.csv, clinc150/domains.json and commonsense_qa/train.jsonl (SNIPS:
Coucke et al., 2018, CC0; CLINC150: Larson et al., 2019, CC BY 3.0; CommonsenseQA: Talmor et al.,
2019, MIT).

A line a task: rows, what TF-IDF makes of the gold rows and of all labels, the linear probe, the
teacher, the student, the form that ships, minutes, and what the gate said. The last line is JSON:

worst_gap_to_tfidf  points, what ships less the better TF-IDF, over the tasks whose gate passed
passed, refused     tasks by what the gate said
kept_min            what ships as a share of its teacher's accuracy, the least over all tasks
float_gap_max       points that what ships loses against the float student, the most
clinc_time_ratio    time a row with 150 classes as a multiple of that with two
minutes             all together
"""

import csv
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[1]
WORK = PROJECT / ".distillery" / "bench-tasks"

GOLD_ROWS = 20
"""Answered rows a class."""

TEST_ROWS = 600

Labelled = tuple[str, str]
"""A text and its label."""


def data_folder() -> Path:
    """Return the folder of the public sets."""
    folder = os.environ.get("TASKS_DATA")
    if not folder or not Path(folder).is_dir():
        raise SystemExit(
            "error: TASKS_DATA: name the folder with snips/, clinc150/ and commonsense_qa/"
        )
    return Path(folder)


def snips() -> list[Labelled]:
    lines = (data_folder() / "snips" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["text"], row["intent"]) for row in map(json.loads, lines)]


def clinc_intents() -> list[Labelled]:
    with (data_folder() / "clinc150" / "train.csv").open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["intent"]) for row in csv.DictReader(file)]


def clinc_domains() -> list[Labelled]:
    text = (data_folder() / "clinc150" / "domains.json").read_text(encoding="utf-8")
    domain_of: dict[str, str] = {}
    for domain, intents in json.loads(text).items():
        domain_of |= dict.fromkeys(intents, domain)
    return [(text, domain_of[intent]) for text, intent in clinc_intents()]


def moods() -> list[Labelled]:
    rows = []
    for file in sorted((PROJECT / "distillery" / "data" / "sample").glob("*.jsonl")):
        for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if row.get("answerKey"):
                options = dict(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
                rows.append((row["question"], options[row["answerKey"]]))
    return rows


TASKS: dict[str, Callable[[], list[Labelled]]] = {
    "snips": snips,
    "clinc-domains": clinc_domains,
    "moods": moods,
}
FULL: dict[str, Callable[[], list[Labelled]]] = {**TASKS, "clinc150": clinc_intents}


def distinct(rows: Sequence[Labelled]) -> list[Labelled]:
    """Return the rows without those whose text an earlier row has."""
    kept: dict[str, Labelled] = {}
    for text, label in rows:
        kept.setdefault(" ".join(text.casefold().split()), (text, label))
    return list(kept.values())


def write_files(name: str, folder: Path, seed: int = 0) -> dict[str, str]:
    """Write gold.csv, validation.csv, pool.csv and test.csv; return their paths by split."""
    rows = distinct(FULL[name]())
    random.Random(seed).shuffle(rows)
    per_class = GOLD_ROWS // 2 if name == "clinc150" else GOLD_ROWS
    counts: dict[str, int] = {}
    splits: dict[str, list[Labelled]] = {"test": rows[:TEST_ROWS]}
    splits |= {"gold": [], "validation": [], "pool": []}
    for text, label in rows[TEST_ROWS:]:
        counts[label] = counts.get(label, 0) + 1
        if counts[label] <= per_class // 5:
            splits["validation"].append((text, label))
        elif counts[label] <= per_class:
            splits["gold"].append((text, label))
        else:
            splits["pool"].append((text, ""))
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, given in splits.items():
        paths[split] = str(folder / f"{split}.csv")
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(given)
    return paths


def recipe_of(name: str, paths: dict[str, str]) -> dict[str, Any]:
    """Return the recipe of a task: where its rows are, and nothing more."""
    return {
        "name": name,
        "task": {"kind": "classify"},
        "dataset": {
            "source": "files",
            "files": {split: [path] for split, path in paths.items()},
            "splits": {
                "gold": "gold",
                "train": "pool",
                "validation": "validation",
                "test": "test",
            },
        },
        "teacher": {"kind": "local"},
        "registry": {"kind": "local", "model_name": name},
    }


def choice_recipe(folder: Path) -> dict[str, Any]:
    """Return the recipe of CommonsenseQA: the demo's settings on its rows."""
    source = data_folder() / "commonsense_qa" / "train.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines()
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, (start, end) in {
        "gold": (0, 300),
        "validation": (300, 400),
        "test": (400, 1000),
        "pool": (1000, 2000),
    }.items():
        files[split] = [str(folder / f"{split}.jsonl")]
        (folder / f"{split}.jsonl").write_text("\n".join(lines[start:end]) + "\n")
    return {
        "preset": "demo",
        "name": "commonsense-qa",
        "dataset": {"source": "files", "files": files},
        "prompt": {
            "system": "Answer with one letter: {letters}.",
            "user": "{question}\n{choices}",
        },
        "evaluation": {"rules": None},
        "registry": {"kind": "local", "model_name": "commonsense-qa"},
    }


def run_task(name: str) -> dict[str, Any]:
    """Run a task's recipe here, and return its figures."""
    from distillery.recipe import load_recipe
    from flows.distill import distill
    from tasks.results import results_in_store

    folder = WORK / "data" / name
    if name == "commonsense-qa":
        values = choice_recipe(folder)
    else:
        values = recipe_of(name, write_files(name, folder))
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    started = time.perf_counter()
    with results_in_store():
        outcome = distill(load_recipe(str(file)))
    board = {row.name: row for row in outcome.report.scoreboard}
    shipped = board[outcome.report.candidate]

    def accuracy(predictor: str) -> float | None:
        return round(board[predictor].accuracy, 4) if predictor in board else None

    stages = [outcome.data, outcome.labels, outcome.student, outcome.model, outcome.report]
    if outcome.teacher:
        stages += [outcome.teacher.checkpoint, outcome.teacher.model]
    return {
        "task": name,
        "rows": {role: split.rows for role, split in outcome.data.splits.items()},
        "classes": len(outcome.data.classes),
        "majority": accuracy("majority class"),
        "tfidf_gold": accuracy("TF-IDF on gold rows"),
        "tfidf_all": accuracy("TF-IDF + logistic regression"),
        "probe": accuracy("linear probe"),
        "teacher": accuracy("teacher"),
        "student": accuracy("student"),
        "shipped": accuracy(outcome.report.candidate),
        "form": outcome.report.candidate.removeprefix("student "),
        "megabytes": round((shipped.bytes or 0) / 1e6, 1),
        "rows_per_second": round(shipped.rows_per_second or 0, 1),
        "passed": outcome.decision.passed,
        "reason": outcome.decision.reason,
        "minutes": round((time.perf_counter() - started) / 60, 2),
        "stage_minutes": round(sum(stage.seconds for stage in stages) / 60, 2),
        "model": outcome.model.artifact.uri,
    }


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


def environment() -> dict[str, str]:
    """Return the environment of the runs: a home of their own."""
    return {
        **os.environ,
        "DISTILLERY_HOME": str(WORK / "home"),
        "PREFECT_HOME": str(WORK / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }


def in_a_process(name: str) -> dict[str, Any]:
    """Run a task in a process of its own, and return its figures."""
    result = WORK / f"{name}.json"
    result.unlink(missing_ok=True)
    (WORK / "prefect").mkdir(parents=True, exist_ok=True)
    with (WORK / f"{name}.log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.tasks", "--one", name],
            cwd=PROJECT,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        last = (WORK / f"{name}.log").read_text().strip().splitlines()[-1:]
        return {"task": name, "failed": last[0] if last else "no output"}
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def summary(results: Sequence[dict[str, Any]], ratio: float, minutes: float) -> dict[str, Any]:
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
        "clinc_time_ratio": round(ratio, 3),
        "minutes": round(minutes, 1),
    }


def main() -> None:
    parser = ArgumentParser("python -m benchmarks.tasks", description="Runs the suite of tasks.")
    parser.add_argument("--full", action="store_true", help="all tasks; keeps what is done")
    parser.add_argument("--only", action="append", help="this task; may be given more than once")
    parser.add_argument("--one", help="run a task here and write its figures")
    given = parser.parse_args()
    if given.one:
        (WORK / f"{given.one}.json").write_text(json.dumps(run_task(given.one)))
        return
    names = given.only or ([*FULL, "commonsense-qa"] if given.full else list(TASKS))
    data_folder()
    started = time.perf_counter()
    results = []
    for name in names:
        kept = WORK / f"{name}.json"
        if given.full and kept.exists():
            results.append(json.loads(kept.read_text()))
        else:
            results.append(in_a_process(name))
        print(json.dumps({key: value for key, value in results[-1].items() if key != "model"}))
        sys.stdout.flush()
    models = [result["model"] for result in results if "failed" not in result]
    ratio = class_time_ratio(folder_of(models[0])) if models else float("nan")
    print(json.dumps(summary(results, ratio, (time.perf_counter() - started) / 60)))


def folder_of(uri: str) -> Path:
    """Return the folder of a model in the store of the runs."""
    return Path(uri.removeprefix("file://"))


if __name__ == "__main__":
    main()
