"""The rows of a labelling in parts, of which each is asked by a process of its own."""

from collections.abc import Iterable, Iterator

from distillery.labels.questions import questions
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example

CALLS_OF_A_PART = 500
"""A process takes about as long to start as others need for so many calls."""


def count_of_parts(calls: int, teacher: TeacherRecipe, processes: int) -> int:
    """Return into how many parts the rows of so many calls are cut: at most one for each process,
    and so that each has enough to do and may make a call at any time."""
    concurrency = [each.concurrency for each in (teacher, teacher.cascade) if each]
    return max(1, min(processes, calls // CALLS_OF_A_PART, *concurrency))


def rows_of_part(
    rows: Iterable[Example], prompt: PromptRecipe, teacher: TeacherRecipe, part: int, parts: int
) -> Iterator[Example]:
    """Yield the rows of one of `parts` parts, counted from 0, in their order.

    A row's part comes from its requests, those to the cheap teacher where there is one, so that
    rows with equal requests are in the same part and no two processes ask the same. (Two rows with
    only some requests in common, as may be where answers.orders leaves orders out, can be in two
    parts, and these requests be asked twice.)"""
    teacher = teacher.cheap or teacher
    once = teacher.answers.model_copy(update={"votes": 1})
    teacher = teacher.model_copy(update={"answers": once})
    for row in rows:
        lowest = min(question.key for question in questions(row, prompt, teacher, ""))
        if int(lowest[:16], 16) % parts == part:
            yield row


def share_of(teacher: TeacherRecipe, part: int, parts: int) -> TeacherRecipe:
    """Return the settings with which one of `parts` processes asks: its share of the calls at a
    time. The limits per minute, also those in the endpoint's headers, are divided among the
    processes that are at work, as teacher.shared_pace divides them among runs."""

    def share(concurrency: int) -> int:
        return concurrency // parts + (part < concurrency % parts)

    changed = {"concurrency": share(teacher.concurrency), "shared_pace": True, "processes": 1}
    teacher = teacher.model_copy(update=changed)
    if teacher.cascade is None:
        return teacher
    changed["concurrency"] = share(teacher.cascade.concurrency)
    cheap = teacher.cascade.model_copy(update=changed)
    return teacher.model_copy(update={"cascade": cheap})
