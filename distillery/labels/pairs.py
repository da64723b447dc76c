"""What a judge is asked: two answers to a row, in both orders.

Each order becomes a row of its own with three options, which a judge labels as a teacher labels
rows of multiple choice: by the same requests, label store, budget and pace.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from distillery.labels.questions import hashed_rows
from distillery.prompts import fill_template, render_messages
from distillery.recipe import PromptRecipe
from distillery.records import Example

VERDICTS = ("Answer A is better", "Answer B is better", "Both answers are equally good")
"""The options A, B and C."""

COMPARISON = (
    "[The task]\n{task}\n[The end of the task]\n\n"
    "[Answer A]\n{first}\n[The end of answer A]\n\n"
    "[Answer B]\n{second}\n[The end of answer B]"
)


@dataclass(frozen=True)
class Pair:
    """The student's and the teacher's answer to a row; None where the student gave none."""

    row: Example
    student: str | None
    teacher: str

    @property
    def is_asked(self) -> bool:
        """Whether a judge is needed: equal answers are equally good, and no answer is worse."""
        return self.student not in (None, self.teacher)


def pairs_of(
    examples: Iterable[Example],
    students: Mapping[str, str | None],
    teachers: Mapping[str, str | None],
    count: int,
) -> list[Pair]:
    """Return the pairs of up to `count` rows with gold answers, chosen by a hash of their ids.

    `students` and `teachers` are answers by example_id. The gold answer stands for a teacher that
    gave none."""
    pairs = []
    for row in hashed_rows(examples, count):
        teacher = teachers.get(row.example_id) or str(row.answer_key)
        pairs.append(Pair(row, students.get(row.example_id), teacher))
    return pairs


def both_orders(example_id: str) -> tuple[str, str]:
    """Return the ids of a row's pair with the student's answer first, and with the teacher's."""
    return f"{example_id} (student first)", f"{example_id} (teacher first)"


def rows_for_judge(pairs: Iterable[Pair], prompt: PromptRecipe) -> Iterator[Example]:
    """Yield the rows that a judge labels, two for each pair that needs one. `prompt` is what the
    teacher was asked with, which says what the task is."""
    for pair in pairs:
        if not pair.is_asked:
            continue
        task = "\n\n".join(message["content"] for message in render_messages(pair.row, prompt))
        answers = (str(pair.student), pair.teacher)
        for example_id, (first, second) in zip(
            both_orders(pair.row.example_id), (answers, answers[::-1]), strict=True
        ):
            question = fill_template(COMPARISON, task=task, first=first, second=second)
            yield Example(example_id=example_id, question=question, choices=VERDICTS)
