"""Which rung of a ladder is delivered, and what is said of each: from the figures alone."""

import math
from collections.abc import Sequence

from distillery.export.ladder_table import describe_rung, rows_in_words
from distillery.recipe import Choose
from distillery.records import Rung

ROUNDING = 1e-9
"""A rung that is at the limit, but for rounding, keeps to it."""

NOISE = 0.05
"""The share by which the speeds of two rungs may differ from run to run, so that it decides
nothing."""


def keeps_to(rung: Rung, largest_loss: float) -> bool:
    """Return whether a rung loses no more accuracy than `largest_loss`.

    If the paired 95 % interval excludes zero, so that the loss is proven, all of it must lie within
    `largest_loss`; otherwise the point estimate must. To ask for proof there too would refuse every
    rung: with some 100 rows, the interval reaches to -3 points even where all answers are the
    same."""
    if rung.difference is None or rung.interval is None:
        return False
    least = -largest_loss - ROUNDING
    if rung.interval.low >= least:
        return True
    return rung.interval.high >= 0 and rung.difference >= least


def goes_by_speed(choose: Choose) -> bool:
    """Return whether the fastest of the rungs is taken that keep to loss and bounds, and not the
    smallest."""
    if isinstance(choose, str):
        return choose == "fastest"
    return choose.bytes is not None


def excess(rung: Rung, choose: Choose) -> float:
    """Return how many times the bound a rung takes, of two bounds by the worse one; 0 without
    bounds. Above 1 it is not within them."""
    if isinstance(choose, str):
        return 0.0
    shares = [0.0]
    if choose.latency_ms is not None:
        latency = math.inf if rung.p50_ms is None else rung.p50_ms
        shares.append(latency / choose.latency_ms)
    if choose.bytes is not None:
        shares.append((rung.bytes or 0) / choose.bytes)
    return max(shares)


def eligible(rungs: Sequence[Rung], largest_loss: float, choose: Choose) -> list[int]:
    """Return the indices of the rungs that keep to `largest_loss` and are within the bounds."""
    found = []
    for index, rung in enumerate(rungs):
        if keeps_to(rung, largest_loss) and excess(rung, choose) <= 1:
            found.append(index)
    return found


def candidates(rungs: Sequence[Rung], largest_loss: float, choose: Choose) -> list[int]:
    """Return the indices of the rungs of which one is taken, whatever their speeds turn out to
    be."""
    if choose == "smallest":
        picked = pick(rungs, largest_loss, choose)
        return [] if picked is None else [picked]
    if not isinstance(choose, str):
        choose = choose.model_copy(update={"latency_ms": None})
    return eligible(rungs, largest_loss, choose)


def without_slower(rungs: Sequence[Rung], indices: Sequence[int]) -> list[int]:
    """Return those of the rungs at `indices` whose rows a second are within NOISE of the most."""
    speeds = {index: rungs[index].rows_per_second or 0.0 for index in indices}
    most = max(speeds.values(), default=0.0)
    return [index for index, speed in speeds.items() if speed >= most * (1 - NOISE)]


def pick(rungs: Sequence[Rung], largest_loss: float, choose: Choose) -> int | None:
    """Return the index of the rung that `choose` takes; None where no rung keeps to `largest_loss`
    and the bounds.

    By speed, rungs within NOISE of the fastest are equals. Of equals the smallest is taken, and of
    those the one that loses less."""
    found = eligible(rungs, largest_loss, choose)
    if goes_by_speed(choose):
        found = without_slower(rungs, found)
    return min(
        found, key=lambda index: (rungs[index].bytes, -(rungs[index].difference or 0)), default=None
    )


def reason_for(rungs: Sequence[Rung], largest_loss: float, choose: Choose) -> str:
    """Return what the rung is that `pick` returns, beside the others that it could have been."""
    found = eligible(rungs, largest_loss, choose)
    within = "keep to the loss" if isinstance(choose, str) else "keep to the loss and the bounds"
    if len(found) == 1:
        return f"the only form to {within}"
    if not goes_by_speed(choose):
        return f"the smallest of {len(found)} forms that {within}"
    fastest = f"the fastest of {len(found)} forms that {within}"
    equals = without_slower(rungs, found)
    if len(equals) == 1:
        return fastest
    return f"the smallest of {len(equals)} forms within {100 * NOISE:.0f} % of {fastest}"


def with_verdicts(
    rungs: Sequence[Rung], picked: int, largest_loss: float, choose: Choose
) -> list[Rung]:
    """Return the rungs with the verdict on each in its note."""
    judged = []
    for index, rung in enumerate(rungs):
        if index == picked:
            note = "picked"
        elif keeps_to(rung, largest_loss) and excess(rung, choose) > 1:
            note = "out of bounds"
        elif keeps_to(rung, largest_loss):
            note = "no faster" if goes_by_speed(choose) else "no smaller"
        elif rung.difference is not None and rung.difference >= -largest_loss - ROUNDING:
            note = "may lose more"
        else:
            note = rung.note or "loses more"
        judged.append(rung.model_copy(update={"picked": index == picked, "note": note}))
    return judged


def refusal(
    rungs: Sequence[Rung], largest_loss: float, choose: Choose, rows: int, training_rows: int
) -> str:
    """Return why no rung is picked, and what to do."""
    built = [rung for rung in rungs if rung.difference is not None]
    if not built:
        return f"export.ladder: no rung could be built; {rungs[0].form.title}: {rungs[0].note}"
    points, asked = f"{100 * largest_loss:.1f} points", rows_in_words(rows, training_rows)
    kept = [rung for rung in built if keeps_to(rung, largest_loss)]
    if kept and not isinstance(choose, str):
        nearest = min(kept, key=lambda rung: excess(rung, choose))
        return (
            f"export.choose: no rung that keeps to {points} on {asked} is within {choose.title}; "
            f"the nearest is {describe_rung(nearest)}; allow more there, or add a rung"
        )
    best = max(built, key=lambda rung: rung.difference or 0)
    return (
        f"export.largest_loss: no rung keeps to {points} on {asked}; the least loss is that of "
        f"{describe_rung(best)}; add a rung, such as {{precision: fp16}}, or allow more"
    )
