"""Rows that answer by letter, by class, by text and with a text of their own, as training reads
them."""

from typing import Any


def row_forms(shared: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Return by form what a TrainingRow has beside its prompt and answer. `shared`: the tokens that
    the prompts begin with, and the prompt that asks for a reason too."""
    return {
        "letters": {"letters": (7, 8, 9), "soft": (0.2, 0.3, 0.5)},
        "classes": {"letters": (500, 501, 502), "closed": True, "span": 2, "last": 0.3},
        "texts": {
            "texts": ((7,), (8, 9, 10), (8, 4)),
            "explain": (*shared, 11),
            "rationale": (12, 13),
        },
        "written": {"target": (8, 9, 10)},
    }
