"""Tables of texts and labels, as people bring them for a classifier."""

import csv
import random
from pathlib import Path
from typing import Any

WORDS = {
    "bread": ["oven", "flour", "crust", "loaf", "dough", "bake", "rye", "slice", "toast", "yeast"],
    "river": [
        "bridge",
        "water",
        "flow",
        "bank",
        "swim",
        "boat",
        "fish",
        "stream",
        "current",
        "dam",
    ],
    "cloud": ["rain", "wind", "storm", "grey", "sky", "drizzle", "thunder", "fog", "damp", "hail"],
}


def texts(answered: int, unanswered: int = 0) -> list[dict[str, Any]]:
    """Rows of `text` and `label`, no two alike; those without a label come last."""
    rows = []
    for number in range(answered + unanswered):
        order = random.Random(number)
        label = list(WORDS)[number % len(WORDS)]
        text = f"note {number} on " + " ".join(order.choices(WORDS[label], k=8))
        rows.append({"text": text, "label": label if number < answered else ""})
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows, and return the path; the first one's keys are the columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_texts(path: Path, answered: int, unanswered: int = 0) -> str:
    """Write the rows of `texts`, and return the path."""
    return write_csv(path, texts(answered, unanswered))
