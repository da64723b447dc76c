"""What an endpoint's labels gain over gold rows alone: `make bench-tasks-endpoint`, or
`python -m benchmarks.tasks --endpoint`.

A learning curve for each of the three tasks of tasks.py, with the same rows. The endpoint is played
by noisy_teacher.py: over HTTP, it gives the gold answers with 15 % errors and calibrated
probabilities. The points of a curve are students that learn from the gold rows alone, and from
these and 10, 30 and 100 % of the other rows, which the endpoint labels. Each share holds the rows
of the smaller ones, and all runs keep their answers in one database, so that no answer is asked for
twice. The recipe is that of the how-to guides for an endpoint: soft labels with weight 0.5; all
else is a default. Stages that an earlier run of the benchmark has done come from the cache.

A line a point: how many gold rows and labelled rows the student learns from, the accuracy on the
test rows of TF-IDF (logistic regression, from the same rows and labels as the student), the
teacher, the float student and the form that ships, whether the gate passed it, and minutes. With
gold rows alone, the gate has the gold answers for a teacher. A table in Markdown follows. The last
line is JSON:

tasks           tasks whose curve is whole
points          points that were measured
failed          points that failed; their lines say why
gain_over_gold  by task, in points: what ships with all labels less what ships with gold rows alone
shipped         by task, the accuracy of what ships with all labels
passed          tasks whose student with all labels passes the gate
minutes         all together

`--small` tries it out, with 30 test rows, 60 other rows and 3 training steps; its figures mean
nothing.
"""

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.slow_endpoint import serving
from benchmarks.task_rows import TEST_ROWS, Labelled, recipe_of, split_rows, write_rows
from benchmarks.task_runs import WORK, run_in_a_process
from distillery.markdown import markdown_table

SHARES = (0, 10, 30, 100)
"""Percent of the unlabelled rows that the endpoint labels, at each point."""

SOFT_WEIGHT = 0.5
"""The weight of an endpoint's probabilities in docs/how-to/students.md."""

SMALL_TEST_ROWS, SMALL_POOL_ROWS, SMALL_STEPS = 30, 60, 3

ACCURACIES = {
    "tfidf": "TF-IDF, same rows",
    "teacher": "teacher",
    "student": "float student",
    "shipped": "what ships",
}
"""The accuracies of a point, with their titles in the table."""


def nested_subsets(rows: Sequence[Labelled], seed: int = 0) -> dict[int, list[Labelled]]:
    """Return a random part of the rows for each of SHARES but 0; a larger one holds the smaller."""
    # In the order of split_rows, the classes that were the first to have their gold rows are first.
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return {share: shuffled[: len(rows) * share // 100] for share in SHARES if share}


def write_task(name: str, folder: Path, small: bool) -> dict[str, str]:
    """Write the rows of a task: gold, validation and test, the pool of each share without labels,
    and answers.json, the classes of all texts that the endpoint is asked. Return the paths of the
    rows by name."""
    splits = split_rows(name, test_rows=SMALL_TEST_ROWS if small else TEST_ROWS)
    pool = splits.pop("pool")[: SMALL_POOL_ROWS if small else None]
    paths = {}
    for split, rows in splits.items():
        paths[split] = write_rows(folder / f"{split}.csv", rows)
    for share, rows in nested_subsets(pool).items():
        paths[f"pool-{share}"] = write_rows(folder / f"pool-{share}.csv", rows, answered=False)
    asked = dict([*pool, *splits["validation"], *splits["test"]])
    (folder / "answers.json").write_text(json.dumps(asked), encoding="utf-8")
    return paths


def point_recipe(name: str, share: int, paths: dict[str, str], small: bool) -> dict[str, Any]:
    """Return the recipe of a point: the gold rows alone, or with the rows that an endpoint labels.
    Each point has a model name of its own, so that the gate does not compare it with another."""
    recipe = recipe_of(f"{name}-endpoint-{share}", paths)
    training: dict[str, Any] = {}
    if share:
        recipe["dataset"]["splits"]["train"] = f"pool-{share}"
        recipe["teacher"] = {"kind": "endpoint", "soft_labels": True}
        training["soft_weight"] = SOFT_WEIGHT
    else:
        recipe["dataset"]["splits"] |= {"train": "gold"}
        del recipe["dataset"]["splits"]["gold"]
        recipe["teacher"] = {"kind": "gold"}
    if small:
        training["max_steps"] = SMALL_STEPS
    recipe["student"] = {"training": training}
    return recipe


def measured(name: str, share: int, figures: dict[str, Any]) -> dict[str, Any]:
    """Return the line of a point from the figures of its run."""
    line = {"task": name, "share": share}
    if "failed" in figures:
        return {**line, "failed": figures["failed"]}
    rows = figures["rows"]
    return {
        **line,
        "gold": rows["gold"] if share else rows["train"],
        "labelled": rows["train"] if share else 0,
        "tfidf": figures["tfidf_all"],
        # Without a teacher, the run's report has the gold answers in its place.
        "teacher": figures["teacher"] if share else None,
        "student": figures["student"],
        "shipped": figures["shipped"],
        "form": figures["form"],
        "passed": figures["passed"],
        "minutes": figures["minutes"],
    }


def task_points(name: str, work: Path, small: bool) -> list[dict[str, Any]]:
    """Measure the points of a task, print a line each, and return them."""
    folder = work / "data" / f"{name}-endpoint"
    paths = write_task(name, folder, small)
    points = []
    with serving("benchmarks.noisy_teacher", str(folder / "answers.json")) as url:
        settings = {
            "TEACHER_MODEL_ENDPOINT": url,
            "TEACHER_MODEL_NAME": "noisy-teacher",
            "TEACHER_MODEL_KEY": "none",
        }
        for share in SHARES:
            recipe = point_recipe(name, share, paths, small)
            figures = run_in_a_process(recipe["name"], recipe, work, settings)
            points.append(measured(name, share, figures))
            print(json.dumps(points[-1]), flush=True)
    return points


def table_of(points: Sequence[dict[str, Any]]) -> str:
    """Return the curves as a table in Markdown."""
    rows = []
    for point in points:
        if "failed" in point:
            continue
        accuracies = []
        for key in ACCURACIES:
            accuracies.append("" if point[key] is None else f"{point[key]:.3f}")
        rows.append([point["task"], f"{point['labelled']:,}", *accuracies])
    return markdown_table(["task", "rows labelled", *ACCURACIES.values()], rows)


def summary(points: Sequence[dict[str, Any]], minutes: float) -> dict[str, Any]:
    """Return the last line."""
    whole = [point for point in points if "failed" not in point]
    gains, shipped, passed = {}, {}, 0
    for name in dict.fromkeys(point["task"] for point in whole):
        curve = {point["share"]: point for point in whole if point["task"] == name}
        if curve.keys() == set(SHARES):
            first, last = curve[SHARES[0]], curve[SHARES[-1]]
            gains[name] = round(100 * (last["shipped"] - first["shipped"]), 2)
            shipped[name] = last["shipped"]
            passed += last["passed"]
    return {
        "tasks": len(gains),
        "points": len(whole),
        "failed": len(points) - len(whole),
        "gain_over_gold": gains,
        "shipped": shipped,
        "passed": passed,
        "minutes": round(minutes, 1),
    }


def run_curves(names: Sequence[str], small: bool) -> None:
    """Measure the curves of the tasks, and print them."""
    work = WORK.with_name("bench-tasks-small") if small else WORK
    started = time.perf_counter()
    points = []
    for name in names:
        points += task_points(name, work, small)
    print(f"\n{table_of(points)}\n")
    print(json.dumps(summary(points, (time.perf_counter() - started) / 60)))
