"""Rungs of a ladder from made-up figures."""

from typing import Any

from distillery.evaluation.statistics import paired_interval
from distillery.recipe import ExportForm
from distillery.records import Departure, Rung

FORMS = {
    "rtn": ExportForm(algorithm="rtn"),
    "int8": ExportForm(precision="int8", algorithm="rtn"),
    "fp16": ExportForm(precision="fp16"),
    "gptq": ExportForm(algorithm="gptq"),
}


def rung(
    lost: int,
    gained: int,
    rows: int,
    size: int = 1,
    right: float = 0.85,
    speed: float | None = None,
    **changes: Any,
) -> Rung:
    """A rung that is wrong on `lost` of `rows` where the float student is right, and right on
    `gained` others. `speed`: its rows a second, all of which take the same time."""
    both = round(right * rows) - lost
    own = [True] * both + [False] * lost + [True] * gained + [False] * (rows - both - lost - gained)
    floats = [True] * (both + lost) + [False] * (rows - both - lost)
    figures = {"difference": (gained - lost) / rows, "interval": paired_interval(own, floats)}
    nearly = Departure(mean=0.0123, largest=0.456, changed=lost + gained)
    fields = {
        "form": FORMS["rtn"],
        "bytes": size,
        "accuracy": sum(own) / rows,
        "departure": nearly,
        "rows_per_second": speed,
        "p50_ms": 1000 / speed if speed else None,
        **figures,
    }
    return Rung(**(fields | changes))
