"""Whether a teacher's labels are worth training on, before a student is trained."""

import logging
import math
from collections.abc import Mapping

from distillery.errors import TeacherError

_log = logging.getLogger(__name__)

NEARLY_ALL = 0.95
"""Share of one answer among the labels from which they count as nearly all the same."""


LARGEST_RISE = 0.1
"""How much larger an answer's share of the labels may be than that of the gold answers, before
anybody is told."""

STANDARD_ERRORS = 3
"""How many of its standard errors such a difference has, for it to be no chance."""


def total_variation(labels: Mapping[str, int], gold: Mapping[str, int]) -> float:
    """Return the total variation distance (0 to 1) of two distributions, given as counts: half the
    sum of the absolute differences of their shares (Levin, Peres, Markov Chains and Mixing Times,
    2017, section 4.1)."""
    ours, theirs = sum(labels.values()), sum(gold.values())
    total = 0.0
    for key in labels.keys() | gold.keys():
        total += abs(labels.get(key, 0) / ours - gold.get(key, 0) / theirs)
    return total / 2


def refuse_collapsed(
    labels: Mapping[str, int], gold: Mapping[str, int], largest_shift: float
) -> None:
    """Raise TeacherError where labels are nearly all the same and gold answers are not, or where
    their shares are further than `largest_shift` from those of the gold answers.

    `labels` and `gold` are counts by answer. Without either there is nothing to compare."""
    if not sum(labels.values()) or not sum(gold.values()):
        return
    answer = max(labels, key=lambda key: labels[key])
    share = labels[answer] / sum(labels.values())
    expected = gold.get(answer, 0) / sum(gold.values())
    way_out = (
        "look at the labels (distillery artifacts, look.jsonl), give the teacher more gold rows or "
        "another prompt or base model, or set teacher.largest_shift: 1 if the shares are right"
    )
    if share >= NEARLY_ALL > expected:
        raise TeacherError(
            f"{share:.0%} of the labels are {answer!r}, but {expected:.0%} of the gold answers: "
            f"the student would learn one answer; {way_out}"
        )
    shift = total_variation(labels, gold)
    if shift > largest_shift:
        raise TeacherError(
            f"the labels' shares are {shift:.2f} from those of the gold answers (total variation "
            f"distance; {answer!r}: {share:.0%} for {expected:.0%}), more than "
            f"teacher.largest_shift ({largest_shift:g}); {way_out}"
        )


def leaning(labels: Mapping[str, int], gold: Mapping[str, int]) -> str | None:
    """Return what to tell of labels that lean to one answer, and warn of it in the log: its share
    is more than LARGEST_RISE above that of the gold answers, and by more than chance. None for
    labels that do not, and where there is nothing to compare.

    `labels` and `gold` are counts by answer."""
    given, known = sum(labels.values()), sum(gold.values())
    if not given or not known:
        return None
    rises = {key: labels[key] / given - gold.get(key, 0) / known for key in labels}
    answer = max(rises, key=lambda key: rises[key])
    together = (labels[answer] + gold.get(answer, 0)) / (given + known)
    error = math.sqrt(together * (1 - together) * (1 / given + 1 / known))
    if rises[answer] <= max(LARGEST_RISE, STANDARD_ERRORS * error):
        return None
    told = (
        f"the labels lean to {answer!r}: {labels[answer] / given:.0%} of them, but "
        f"{gold.get(answer, 0) / known:.0%} of the gold answers; check some of these rows: where "
        "the teacher is wrong, the student learns it too, and gold rows like them would help"
    )
    _log.warning("%s", told)
    return told
