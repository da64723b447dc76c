"""The rows of the benchmark of written answers (text.py): two public sets and their splits.

TASKS_DATA is the folder with snips/train.jsonl and e2e_nlg/train.csv (SNIPS: Coucke et al., 2018,
CC0; E2E NLG: Novikova et al., 2017, CC BY-SA 4.0).
"""

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.task_rows import data_folder, distinct

SNIPS_ROWS = {"test": 300, "validation": 100, "gold": 700, "pool": 500}
E2E_FACTS = {"test": 100, "validation": 30, "gold": 60, "pool": 160}
"""Sets of facts, each with several sentences."""

Row = dict[str, Any]
"""A text and its answers: `text`, `answers`."""


def snips() -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """Return rows by split, each with one JSON text, and the schema of their objects: the fields of
    all rows in the alphabet's order. Of a field's texts the first counts; 8 of 2,800 rows have
    more."""
    lines = (data_folder() / "snips" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts, fields = [], set()
    for row in map(json.loads, lines):
        found = {name: values[0] for name, values in sorted(row["slots"].items())}
        fields |= set(found)
        texts.append((row["text"], json.dumps(found, ensure_ascii=False)))
    rows = [{"text": text, "answers": [answer]} for text, answer in distinct(texts)]
    schema = {
        "type": "object",
        "properties": {name: {"type": "string"} for name in sorted(fields)},
        "additionalProperties": False,
    }
    return split(rows, SNIPS_ROWS), schema


def e2e() -> dict[str, list[Row]]:
    """Return rows by split: facts, and the sentences that say them."""
    sentences: dict[str, list[str]] = {}
    path = data_folder() / "e2e_nlg" / "train.csv"
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            sentences.setdefault(line["mr"], []).append(line["ref"])
    return split([{"text": facts, "answers": said} for facts, said in sentences.items()], E2E_FACTS)


def split(rows: list[Row], counts: dict[str, int], seed: int = 0) -> dict[str, list[Row]]:
    """Return the rows by split, in a random order."""
    random.Random(seed).shuffle(rows)
    found, start = {}, 0
    for name, count in counts.items():
        found[name] = rows[start : start + count]
        start += count
    return found


def write_rows(path: Path, rows: Sequence[Row], answered: bool = True) -> str:
    """Write rows as CSV, a line per answer, without their answers if they are not `answered`;
    return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "answer"])
        for row in rows:
            answers = row["answers"] if answered else [""]
            writer.writerows((row["text"], answer) for answer in answers)
    return str(path)


def write_files(folder: Path, splits: dict[str, list[Row]]) -> dict[str, str]:
    """Write a file for each split, without the answers of the pool; return their paths by split."""
    paths = {}
    for name, rows in splits.items():
        paths[name] = write_rows(folder / f"{name}.csv", rows, answered=name != "pool")
    return paths
