"""Answers to test rows that are right where a test says so: what the gate reads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from distillery.evaluation.statistics import wilson_interval
from distillery.records import Figures, ScoreRow

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
