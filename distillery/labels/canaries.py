"""labels/canaries"""

import asyncio
import heapq
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from hashlib import sha256

from distillery.errors import TeacherUnavailable
from distillery.labels.acceptance import accepted_answers, stored_answer
from distillery.labels.labelling import Slots
from distillery.labels.questions import Question, questions
from distillery.labels.store import LabelStore, StoredAnswer
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example, TeacherDrift
from distillery.teacher.answers import combine_answers
from distillery.teacher.asking import Teacher
from distillery.teacher.budget import Spending
from distillery.teacher.endpoint import Endpoint
from distillery.teacher.pace import Pace


async def ask_canaries(
    examples: Iterable[Example],
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    endpoint: Endpoint,
    store: LabelStore,
    *,
    slots: Slots = nullcontext,
    spent: dict[str, float] | None = None,
) -> TeacherDrift:
    """Asks those of teacher.canaries.rows of `examples` again that the store holds, and compares; nothing is stored.
    Which rows is told by a hash of their ids, so that new rows move few. `slots` and `spent` as in `label`. Raises what
    `Teacher.ask` does."""
    chosen = heapq.nsmallest(
        recipe.canaries.rows, examples, key=lambda row: sha256(row.example_id.encode()).digest()
    )
    asked = [questions(row, prompt, recipe, endpoint.identity) for row in chosen]
    known = store.get_many(one.key for several in asked for one in several)
    there = [
        (row, several)
        for row, several in zip(chosen, asked, strict=True)
        if all(q.key in known for q in several)
    ]
    places = asyncio.Semaphore(recipe.concurrency)
    pace = Pace(recipe.concurrency, recipe.requests_per_minute, recipe.tokens_per_minute)
    spending = Spending(recipe.budget, recipe.prices, spent)
    async with Teacher(recipe, endpoint, pace=pace, spending=spending) as teacher:

        async def again(question: Question) -> StoredAnswer | None:
            """None where no answer comes, which tells nothing of the teacher."""
            started = time.monotonic()
            async with places, slots():
                while True:
                    try:
                        completion = await teacher.ask(question.messages, question.letters)
                    except TeacherUnavailable:
                        if time.monotonic() - started < recipe.outage_s:
                            continue
                        if pace.answered_at > started:
                            return None
                        raise
                    malformed = completion.finish_reason == "malformed"
                    return (
                        None
                        if malformed
                        else stored_answer(question, completion, recipe, endpoint.identity)
                    )

        answers = await asyncio.gather(*(again(one) for _, several in there for one in several))
    fresh = [answer for answer in answers if answer]
    by_key = {answer.request_key: answer for answer in fresh}
    compared = [
        (row, several) for row, several in there if all(one.key in by_key for one in several)
    ]
    changed = [
        row.example_id
        for row, several in compared
        if _whole(row, several, known, recipe) != _whole(row, several, by_key, recipe)
    ]
    return TeacherDrift(
        asked=len(fresh),
        compared=len(compared),
        changed=tuple(changed),
        before=tuple(sorted({answer.model_version for answer in known.values()})),
        after=tuple(sorted({answer.model_version for answer in fresh})),
    )


def _whole(
    row: Example,
    several: Sequence[Question],
    answers: Mapping[str, StoredAnswer],
    recipe: TeacherRecipe,
) -> str | None:
    """The letter that a row's answers come to."""
    found = accepted_answers(several, [answers[one.key] for one in several])
    whole = combine_answers(found, row.letters, recipe.soft_labels) if found else None
    return whole.letter if whole else None
