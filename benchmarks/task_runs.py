"""Runs of whole recipes, each in a process of its own, and their figures.

`python -m benchmarks.task_runs RECIPE RESULT` runs a recipe and writes its figures to RESULT."""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.task_rows import PROJECT

WORK = PROJECT / ".distillery" / "bench-tasks"


def environment(work: Path) -> dict[str, str]:
    """Return the environment of the runs in a folder: a home of their own, whose cached stages and
    paid answers they share."""
    return {
        **os.environ,
        "DISTILLERY_HOME": str(work / "home"),
        "PREFECT_HOME": str(work / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }


def run_in_a_process(
    name: str, recipe: dict[str, Any], work: Path = WORK, settings: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a recipe and return its figures, or why it failed as `failed`.

    `settings` are added to the environment. The recipe, the output and the figures stay in `work`,
    as NAME.yaml, NAME.log and NAME.json; a run that failed leaves no figures."""
    (work / "prefect").mkdir(parents=True, exist_ok=True)
    file, result = work / f"{name}.yaml", work / f"{name}.json"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    result.unlink(missing_ok=True)
    with (work / f"{name}.log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.task_runs", str(file), str(result)],
            cwd=PROJECT,
            env={**environment(work), **(settings or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if not result.exists():
        return {"failed": f"ended with {done.returncode}; see {work / f'{name}.log'}"}
    found: dict[str, Any] = json.loads(result.read_text())
    if "failed" in found:
        result.unlink()
    return found


def run(file: str) -> dict[str, Any]:
    """Run a recipe here, and return its figures."""
    from distillery.recipe import load_recipe
    from flows.distill import distill
    from tasks.results import results_in_store

    started = time.perf_counter()
    with results_in_store():
        outcome = distill(load_recipe(file))
    board = {row.name: row for row in outcome.report.scoreboard}
    shipped = board[outcome.report.candidate]

    def accuracy(predictor: str) -> float | None:
        return round(board[predictor].accuracy, 4) if predictor in board else None

    stages = [outcome.data, outcome.labels, outcome.student, outcome.model, outcome.report]
    if outcome.teacher:
        stages += [outcome.teacher.checkpoint, outcome.teacher.model]
    return {
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
        "checkpoint": outcome.student.artifact.uri,
        "model": outcome.model.artifact.uri,
        "report": outcome.report.artifact.uri,
    }


def folder_of(uri: str) -> Path:
    """Return the folder of an artifact's files in the store of the runs."""
    from distillery.storage.manifest import FILES

    return Path(uri.removeprefix("file://")) / FILES


def main(recipe: str, result: str) -> None:
    """Run a recipe and write its figures, or the error that ended it, to `result`."""
    try:
        figures = run(recipe)
    except Exception as error:
        traceback.print_exc()
        figures = {"failed": f"{type(error).__name__}: {error}"}
    Path(result).write_text(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
