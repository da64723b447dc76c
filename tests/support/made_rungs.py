"""Rungs of a ladder, and a ladder, from made-up figures."""

from typing import Any

from distillery.evaluation.statistics import paired_interval
from distillery.export.choice import reason_for, with_verdicts
from distillery.recipe import ExportForm
from distillery.records import Departure, Ladder, Rung

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


def timed_ladder() -> Ladder:
    """A ladder of four forms: a small slow one, a fast one that is picked, one that loses too much
    and one that could not be built."""
    rungs = [
        rung(1, 0, 100, size=80_000_000, speed=40),
        rung(0, 0, 100, size=120_000_000, speed=80, form=FORMS["int8"]),
        rung(9, 0, 100, size=60_000_000, speed=50, form=ExportForm(block_size=128)),
        Rung(form=FORMS["gptq"], note="left out: no time"),
    ]
    return Ladder(
        rows=100,
        accuracy=0.85,
        largest_loss=0.02,
        choose="fastest",
        reason=reason_for(rungs, 0.02, "fastest"),
        machine="A processor, 2 cores",
        rungs=tuple(with_verdicts(rungs, 1, 0.02, "fastest")),
    )


def earlier_ladder() -> Ladder:
    """The same ladder as a version left it that knew nothing of speeds."""
    before = timed_ladder().model_dump(mode="json")
    for name in ("choose", "reason", "machine"):
        del before[name]
    for one in before["rungs"]:
        del one["p50_ms"], one["rows_per_second"]
    return Ladder.model_validate(before)
