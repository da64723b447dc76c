"""Answers to test rows that are right where a test says so: what the gate reads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distillery.evaluation.figures import figures_of
from distillery.evaluation.statistics import wilson_interval
from distillery.records import Example, Figures, ScoreRow

Rights = Mapping[str, Sequence[bool]]
"""By predictor, whether it is right, row by row."""


def score_row(name: str, correct: int, rows: int = 450, **figures: float | Figures) -> ScoreRow:
    return ScoreRow(
        name=name,
        kind="model",
        correct=correct,
        rows=rows,
        accuracy=correct / rows,
        interval=wilson_interval(correct, rows),
        **figures,
    )


def answers_file(path: Path, rights: Rights, start: int = 0, gold: str = "A") -> Path:
    """Write answers of which `rights` tells by predictor whether they are right. `gold` are the
    gold letters, over and over."""
    lines = []
    for number, each in enumerate(zip(*rights.values(), strict=True)):
        letter = gold[number % len(gold)]
        line: dict[str, str | None] = {"example_id": f"r{start + number}", "gold": letter}
        for name, right in zip(rights, each, strict=True):
            line[name] = letter if right else None
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    return path


def first(right: int, rows: int = 100) -> list[bool]:
    """Right on the first `right` of the rows."""
    return [number < right for number in range(rows)]


def last(right: int, rows: int = 100) -> list[bool]:
    """Right on the last `right` of the rows."""
    return first(right, rows)[::-1]


def further_figures(**update: Any) -> Figures:
    """Of the class yes, 45 of 50 rows are recalled, of no 31 of 50."""
    rows = [
        Example(example_id=str(n), question=str(n), choices=("yes", "no"), answer_key="AB"[n // 50])
        for n in range(100)
    ]
    given = ["A"] * 45 + ["B"] * 5 + ["B"] * 31 + ["A"] * 19
    probabilities = [(0.8, 0.2) if letter == "A" else (0.2, 0.8) for letter in given]
    found = figures_of(rows, given, probabilities, [(0.9, 0.1)] * 100, None)
    return found.model_copy(update={"p99_ms": 55.0, "load_s": 2.0, "first_token_ms": 30.0} | update)
