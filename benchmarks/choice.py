"""What a cheap teacher and chosen rows save: `make bench-choice`, or `python -m benchmarks.choice`.

The teachers are played by noisy_teacher.py, over HTTP: a dear one that is right on 90 % of the
rows, and a cheap one that is right on 80 %. Both know how sure they are, and what is hard for one
is mostly hard for the other. Labelling is that of a run, and the costs are those of its calls, by
simulated prices. All is done for three seeds, which decide rows, errors and choices.

cascade    teacher.cascade with several bounds: the accuracy of the labels against their cost.
           Beside it, the dear teacher is asked about as many rows, chosen at random. 300 rows of
           CommonsenseQA (COMMONSENSE_QA_DIR), and 300 of the demo's task.
selection  teacher.select: the accuracy of a student against the cost of its labels, in rounds of 60
           of 600 rows, which the dear teacher labels. The first round is chosen by words that
           were learnt from the gold rows, each other one by the student of the round before. The
           student is a stand-in that learns in a second, logistic regression on words: what it
           gains, a language model need not gain. The demo's task, and with TASKS_DATA CLINC150's
           ten domains. There is no selection of CommonsenseQA's rows: words tell nothing of its
           letters, and a small model, which learns some of them in hours
           (benchmarks/commonsense_qa.py), is no stand-in.

A line of JSON a point; accuracies from 0 to 1, costs in USD. The curves go to
docs/images/choice.png (--plot PATH for another file). The last line is JSON:

cascade    by task: accuracy and cost of the dear teacher alone, the bound that costs least of those
           whose labels are at most a point worse, and the share of the cost that it saves
selection  by task and way: the accuracy after half of the rounds and after all, and how many points
           that is above rows at random; accuracy with all rows labelled
minutes    all together

`--small` tries it out with one seed and few rows; its figures mean nothing.
"""

import argparse
import asyncio
import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, Literal

from benchmarks.slow_endpoint import serving
from benchmarks.task_rows import split_rows
from distillery.data.rows import RowReader, to_example
from distillery.data.selection import By, choose_rows
from distillery.evaluation.baselines import shares_of_words
from distillery.labels.cascade import label_in_cascade
from distillery.labels.files import LabelCounts, read_labels
from distillery.labels.labelling import label
from distillery.labels.store import LabelStore
from distillery.prompts import render_messages
from distillery.recipe import Columns, PriceRecipe, PromptRecipe, TeacherRecipe
from distillery.records import Example
from distillery.teacher.endpoint import Endpoint
from distillery.training.second_opinion import word_classifier

DEAR_RIGHT, CHEAP_RIGHT = 0.9, 0.8
DEAR_PRICES = PriceRecipe(input=2.50, output=10.00)
CHEAP_PRICES = PriceRecipe(input=0.15, output=0.60)
SEEDS = (0, 1, 2)
CASCADE_ROWS = 300
BOUNDS = (0.6, 0.75, 0.9, 0.97)
ROUND_ROWS, ROUNDS = 60, 4
POOL_ROWS = 600
CHOSEN: tuple[By, ...] = ("uncertainty", "diversity", "both")
WAYS: tuple[By | Literal["random"], ...] = ("random", *CHOSEN)
DEMO = "moods"
TASKS = (DEMO, "clinc-domains")
PROMPT = PromptRecipe(system="", user="{question}\n{choices}")
CLASS_PROMPT = PromptRecipe(system="", user="{text}", answer="class")
PLOT = Path(__file__).resolve().parents[1] / "docs" / "images" / "choice.png"

Point = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is done."""

    seeds: tuple[int, ...] = SEEDS
    cascade_rows: int = CASCADE_ROWS
    pool_rows: int = POOL_ROWS
    round_rows: int = ROUND_ROWS
    rounds: int = ROUNDS


SMALL = Sizes(seeds=(0,), cascade_rows=60, pool_rows=60, round_rows=10, rounds=2)


@dataclass(frozen=True)
class Teachers:
    """The endpoints of both, the label database, and a folder for labels. `prompt` asks both."""

    dear: Endpoint
    cheap: Endpoint
    prompt: PromptRecipe
    store: LabelStore
    folder: Path


@contextmanager
def teachers(rows: Sequence[Example], prompt: PromptRecipe, seed: int) -> Iterator[Teachers]:
    """Serve both teachers of the rows, which have gold answers, for as long as the block."""
    with TemporaryDirectory(prefix="choice-") as folder:
        gold = Path(folder) / "gold.json"
        asked = {render_messages(row, prompt)[-1]["content"]: row.answer_key for row in rows}
        gold.write_text(json.dumps(asked))
        serve = partial(serving, "benchmarks.noisy_teacher", str(gold))
        with (
            serve(f"dear {seed}", str(DEAR_RIGHT)) as dear,
            serve(f"cheap {seed}", str(CHEAP_RIGHT)) as cheap,
        ):
            endpoint = Endpoint(dear, "dear", None, "dear", "openai")
            other = replace(endpoint, url=cheap, model="cheap", identity="cheap")
            with LabelStore(f"sqlite:///{folder}/labels.db") as store:
                yield Teachers(endpoint, other, prompt, store, Path(folder))


def recipe_of(below: float | None = None) -> TeacherRecipe:
    """Return the settings of the dear teacher, with the cheap one before it if there is a bound."""
    values: dict[str, Any] = {"soft_labels": True, "prices": DEAR_PRICES, "concurrency": 16}
    if below is not None:
        values["cascade"] = {"below": below, "prices": CHEAP_PRICES, "concurrency": 16}
    return TeacherRecipe.model_validate(values)


def labelled(
    rows: Sequence[Example], asked: Teachers, below: float | None = None
) -> tuple[LabelCounts, dict[str, str]]:
    """Label rows by the dear teacher, or with a bound by both, and return the counts and the
    labels."""
    recipe, out = recipe_of(below), asked.folder / "labels"
    if recipe.cheap:
        work = label_in_cascade(
            partial(list, rows),
            asked.prompt,
            recipe,
            recipe.cheap,
            asked.dear,
            asked.cheap,
            asked.store,
            out,
            count=len(rows),
        )
    else:
        work = label(rows, asked.prompt, recipe, asked.dear, asked.store, out)
    counts = asyncio.run(work)
    return counts, {name: found.answer for name, found in read_labels(out).items()}


def accuracy(labels: dict[str, str], rows: Sequence[Example]) -> float:
    """Return the share of the rows whose label is the gold answer."""
    return mean(labels.get(row.example_id) == row.answer_key for row in rows)


def commonsense_rows(seed: int, count: int) -> list[Example]:
    """Return some rows of CommonsenseQA, each question once."""
    folder = Path(os.environ.get("COMMONSENSE_QA_DIR", ""))
    if not (folder / "train.jsonl").is_file():
        raise SystemExit(
            "error: COMMONSENSE_QA_DIR: name a folder with CommonsenseQA's train.jsonl"
        )
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(seed).shuffle(lines)
    rows: dict[str, Example] = {}
    for number, line in enumerate(lines):
        row = to_example(json.loads(line), RowReader(Columns()), f"line {number}")
        rows.setdefault(row.question.strip(), row)
        if len(rows) == count:
            break
    return list(rows.values())


def class_rows(name: str, seed: int) -> dict[str, list[Example]]:
    """Return a task's rows, all with their classes, by split."""
    splits = split_rows(name, seed)
    classes = tuple(sorted({label for rows in splits.values() for _, label in rows}))
    found = {}
    for split, rows in splits.items():
        found[split] = [
            Example(
                example_id=f"{split}-{number}", question=text, classes=classes, answer_key=label
            )
            for number, (text, label) in enumerate(rows)
        ]
    return found


def cascade_points(task: str, rows: Sequence[Example], asked: Teachers, seed: int) -> list[Point]:
    """Label the rows by both teachers with each bound, and by the dear one for as many rows at
    random; return the points, the two teachers alone among them.

    Both are asked about all rows once, and the answers are stored. A run with nothing stored makes
    the calls of its rows, each of which costs the same."""
    about = {"part": "cascade", "task": task, "seed": seed}
    # Of no answer the cheap teacher is surer than this, so that both are asked about all rows.
    counts, by_dear = labelled(rows, asked, below=1.0)
    found = counts.cascade
    assert found
    assert found.dear_rows == found.dear_asked == found.cheap_asked == len(rows)
    dear_each = (found.dear_cost or 0.0) / len(rows)
    cheap_each = (found.cheap_cost or 0.0) / len(rows)
    _, by_cheap = labelled(rows, asked, below=1e-9)
    points = []
    for way, labels, each in (("dear", by_dear, dear_each), ("cheap", by_cheap, cheap_each)):
        line = {"way": f"{way} alone", "accuracy": accuracy(labels, rows), "cost": each * len(rows)}
        points.append(about | line)
    shuffled = [row.example_id for row in rows]
    random.Random(seed).shuffle(shuffled)
    for below in BOUNDS:
        counts, labels = labelled(rows, asked, below)
        assert counts.cascade
        dear_rows = counts.cascade.dear_rows
        line = about | {"below": below, "dear_rows": dear_rows}
        cost = len(rows) * cheap_each + dear_rows * dear_each
        points.append(line | {"way": "cascade", "accuracy": accuracy(labels, rows), "cost": cost})
        # At random, the cheap one is asked about the other rows alone.
        mixed = {**by_cheap, **{name: by_dear[name] for name in shuffled[:dear_rows]}}
        cost = (len(rows) - dear_rows) * cheap_each + dear_rows * dear_each
        points.append(line | {"way": "random", "accuracy": accuracy(mixed, rows), "cost": cost})
    return points


class Student:
    """A stand-in for a student that has learnt from rows and their labels: logistic regression on
    words."""

    def __init__(self, rows: Sequence[Example], labels: Sequence[str]) -> None:
        self._model = word_classifier(10)
        self._model.fit([row.question for row in rows], labels)

    def accuracy(self, rows: Sequence[Example]) -> float:
        said = map(str, self._model.predict([row.question for row in rows]))
        return mean(found == row.answer_key for found, row in zip(said, rows, strict=True))

    def shares(self, rows: Sequence[Example]) -> list[tuple[float, ...] | None]:
        """Return the probabilities of the classes for each row."""
        names = list(map(str, self._model.classes_))
        shares: list[tuple[float, ...] | None] = []
        for found in self._model.predict_proba([row.question for row in rows]).tolist():
            by_name = dict(zip(names, found, strict=True))
            shares.append(tuple(by_name.get(name, 0.0) for name in rows[0].classes))
        return shares


def selection_points(
    task: str, splits: dict[str, list[Example]], asked: Teachers, seed: int, sizes: Sizes
) -> list[Point]:
    """Choose rows in rounds, in each of WAYS, and return a point for each round: the accuracy of
    the stand-in on the test rows; and with no row and all rows labelled."""
    gold, test, pool = splits["gold"], splits["test"], splits["pool"][: sizes.pool_rows]
    about = {"part": "selection", "task": task, "seed": seed}

    def learnt(rows: Sequence[Example], labels: dict[str, str]) -> Student:
        known = [row for row in rows if row.example_id in labels]
        answers = [*(str(row.answer_key) for row in gold), *(labels[r.example_id] for r in known)]
        return Student([*gold, *known], answers)

    counts, labels = labelled(pool, asked)
    # Some of the answers may be stored.
    each = (counts.cost or 0.0) / counts.asked
    points = []
    for way, rows in (("gold alone", pool[:0]), ("all", pool)):
        right = learnt(rows, labels).accuracy(test)
        line = {"way": way, "rows": len(rows), "accuracy": right, "cost": each * len(rows)}
        points.append(about | line)
    for way in WAYS:
        generator = random.Random(seed)
        # The last student of the first round is words on the gold rows, as in a run without one.
        shares = shares_of_words(gold, pool)
        chosen: list[int] = []
        for _ in range(sizes.rounds):
            if way == "random":
                left = sorted(set(range(len(pool))) - set(chosen))
                chosen += generator.sample(left, min(sizes.round_rows, len(left)))
            else:
                kept = frozenset(chosen)
                chosen = list(choose_rows(pool, sizes.round_rows, way, shares, kept, seed))
            student = learnt([pool[at] for at in chosen], labels)
            shares, right = student.shares(pool), student.accuracy(test)
            line = {"way": way, "rows": len(chosen), "accuracy": right, "cost": each * len(chosen)}
            points.append(about | line)
    return points


def tell(points: Sequence[Point]) -> list[Point]:
    """Print a line for each point, and return them."""
    rounded = [
        {key: round(value, 5) if isinstance(value, float) else value for key, value in each.items()}
        for each in points
    ]
    for point in rounded:
        print(json.dumps(point), flush=True)
    return rounded


def measure(sizes: Sizes) -> list[Point]:
    """Measure and print all points."""
    points: list[Point] = []
    tasks = TASKS if os.environ.get("TASKS_DATA") else (DEMO,)
    for seed in sizes.seeds:
        rows = commonsense_rows(seed, sizes.cascade_rows)
        with teachers(rows, PROMPT, seed) as asked:
            points += tell(cascade_points("commonsense_qa", rows, asked, seed))
        for task in tasks:
            splits = class_rows(task, seed)
            pool = splits["pool"][: sizes.pool_rows]
            with teachers(pool, CLASS_PROMPT, seed) as asked:
                if task == DEMO:
                    points += tell(cascade_points(task, pool[: sizes.cascade_rows], asked, seed))
                points += tell(selection_points(task, splits, asked, seed, sizes))
    return points


Curve = list[tuple[float, float, float, float]]
"""Of each place on a curve, over the seeds: the mean cost, and the mean, least and highest
accuracy."""


def curves(points: Sequence[Point], part: str, task: str) -> dict[str, Curve]:
    """Return the curves of a task by way; places are told apart by bound or by number of rows."""
    places: dict[str, dict[Any, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        if (point["part"], point["task"]) == (part, task):
            place = point.get("below", point.get("rows"))
            places[point["way"]][place].append(point)
    found = {}
    for way, by_place in places.items():
        curve = []
        for each in by_place.values():
            right = [point["accuracy"] for point in each]
            curve.append((mean(p["cost"] for p in each), mean(right), min(right), max(right)))
        found[way] = sorted(curve)
    return found


def cascade_summary(points: Sequence[Point], task: str) -> dict[str, Any]:
    """Return what the last line says of a task's cascades."""
    found = curves(points, "cascade", task)
    ((dear_cost, dear_right, _, _),) = found["dear alone"]
    ((_, cheap_right, _, _),) = found["cheap alone"]
    bounds = {}
    for below in BOUNDS:
        each = [p for p in points if p["task"] == task and p.get("below") == below]
        each = [p for p in each if p["way"] == "cascade"]
        bounds[below] = (mean(p["accuracy"] for p in each), mean(p["cost"] for p in each))
    good = [below for below, (right, _) in bounds.items() if right >= dear_right - 0.01]
    best = min(good, key=lambda below: bounds[below][1]) if good else None
    return {
        "dear_accuracy": round(dear_right, 4),
        "cheap_accuracy": round(cheap_right, 4),
        "dear_cost": round(dear_cost, 4),
        "below": best,
        "accuracy": round(bounds[best][0], 4) if best else None,
        "saved": round(1 - bounds[best][1] / dear_cost, 3) if best else None,
    }


def selection_summary(points: Sequence[Point], task: str) -> dict[str, Any]:
    """Return what the last line says of the choice of a task's rows."""
    found = curves(points, "selection", task)
    half = (len(found["random"]) - 1) // 2
    summary: dict[str, Any] = {way: round(found[way][0][1], 4) for way in ("gold alone", "all")}
    for way in WAYS:
        for name, place in (("half", half), ("end", -1)):
            right, random_right = found[way][place][1], found["random"][place][1]
            summary[f"{way}_{name}"] = round(right, 4)
            if way != "random":
                summary[f"{way}_{name}_gain"] = round(100 * (right - random_right), 2)
    return summary


COLOURS = {
    "cascade": "tab:blue",
    "random": "0.55",
    "uncertainty": "tab:orange",
    "diversity": "tab:green",
    "both": "tab:blue",
    "dear alone": "black",
    "cheap alone": "tab:red",
}

TITLES = {
    ("cascade", "commonsense_qa"): "Labels of CommonsenseQA: cascade",
    ("cascade", "moods"): "Labels of the demo's task: cascade",
    ("selection", "moods"): "Words learnt, the demo's task: chosen rows",
    ("selection", "clinc-domains"): "Words learnt, CLINC150's domains: chosen rows",
}


def plot(points: Sequence[Point], path: Path) -> None:
    """Draw accuracy against cost, a panel for each part and task: means over the seeds, and the
    range of the seeds."""
    from matplotlib.figure import Figure

    panels = [key for key in TITLES if curves(points, *key)]
    figure = Figure(figsize=(11, 4 * -(-len(panels) // 2)), layout="constrained")
    for number, key in enumerate(panels, 1):
        axes = figure.add_subplot(-(-len(panels) // 2), 2, number)
        for way, curve in curves(points, *key).items():
            if way not in COLOURS:
                continue
            costs, middle, low, high = zip(*curve, strict=True)
            style = "o-" if len(curve) > 1 else "s"
            axes.plot(costs, middle, style, color=COLOURS[way], label=way, markersize=4)
            if len(curve) > 1:
                axes.fill_between(costs, low, high, color=COLOURS[way], alpha=0.12, linewidth=0)
        axes.set(title=TITLES[key], xlabel="cost of the labels, USD", ylabel="accuracy")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a trial with few rows")
    parser.add_argument("--plot", type=Path, help="by default docs/images/choice.png")
    given = parser.parse_args()
    started = time.perf_counter()
    points = measure(SMALL if given.small else Sizes())
    if given.plot or not given.small:
        plot(points, given.plot or PLOT)
    tasks = dict.fromkeys((point["part"], point["task"]) for point in points)
    summary: dict[str, Any] = {"cascade": {}, "selection": {}}
    for part, task in tasks:
        summarise = cascade_summary if part == "cascade" else selection_summary
        summary[part][task] = summarise(points, task)
    minutes = round((time.perf_counter() - started) / 60, 1)
    print(json.dumps(summary | {"minutes": minutes}))


if __name__ == "__main__":
    main()
