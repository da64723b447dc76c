"""The rows of the suite of tasks (tasks.py): public sets of texts and labels, and their splits.

TASKS_DATA is the folder with snips/train.jsonl, clinc150/train.csv, clinc150/domains.json and
commonsense_qa/train.jsonl (SNIPS: Coucke et al., 2018, CC0; CLINC150: Larson et al., 2019, CC BY
3.0; CommonsenseQA: Talmor et al., 2019, MIT).
"""

import csv
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]

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
            "error: TASKS_DATA: name the folder of snips/, clinc150/, commonsense_qa/ and e2e_nlg/"
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


def split_rows(name: str, seed: int = 0, test_rows: int = TEST_ROWS) -> dict[str, list[Labelled]]:
    """Return a task's rows, all with their labels, by split: gold, validation, pool and test."""
    rows = distinct(FULL[name]())
    random.Random(seed).shuffle(rows)
    per_class = GOLD_ROWS // 2 if name == "clinc150" else GOLD_ROWS
    counts: dict[str, int] = {}
    splits: dict[str, list[Labelled]] = {"test": rows[:test_rows]}
    splits |= {"gold": [], "validation": [], "pool": []}
    for text, label in rows[test_rows:]:
        counts[label] = counts.get(label, 0) + 1
        if counts[label] <= per_class // 5:
            splits["validation"].append((text, label))
        elif counts[label] <= per_class:
            splits["gold"].append((text, label))
        else:
            splits["pool"].append((text, label))
    return splits


def write_rows(path: Path, rows: Sequence[Labelled], answered: bool = True) -> str:
    """Write rows as CSV, without their labels if they are not `answered`; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((text, label if answered else "") for text, label in rows)
    return str(path)


def write_files(name: str, folder: Path) -> dict[str, str]:
    """Write gold.csv, validation.csv, pool.csv and test.csv; return their paths by split."""
    paths = {}
    for split, rows in split_rows(name).items():
        paths[split] = write_rows(folder / f"{split}.csv", rows, answered=split != "pool")
    return paths


def recipe_of(
    name: str, paths: dict[str, str], task: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the recipe of a task, by default a classifier's: where its rows are, that a local
    teacher answers, and nothing more."""
    return {
        "name": name,
        "task": task or {"kind": "classify"},
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
