"""Canary rows: rows that a run asks again, to detect whether the teacher or a judge has changed."""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain

from distillery.errors import TeacherUnavailable
from distillery.labels.acceptance import (
    accepted_answers,
    call_read_as,
    label_of_answers,
    read_again,
    stored_answer,
)
from distillery.labels.labelling import Slots
from distillery.labels.pairs import VERDICTS
from distillery.labels.questions import Question, questions, request_key
from distillery.labels.quote import canary_rows
from distillery.labels.store import LabelStore, StoredAnswer
from distillery.prompts import render_messages
from distillery.recipe import JudgeRecipe, PromptRecipe, TeacherRecipe
from distillery.records import Example, TeacherDrift
from distillery.teacher.asking import Teacher
from distillery.teacher.budget import Spending, when_left
from distillery.teacher.endpoint import Endpoint
from distillery.teacher.failures import TOO_LARGE
from distillery.teacher.ledger import Payer
from distillery.teacher.pace import Pace, pace_of
from distillery.teacher.reply import Completion

FIRST_ANSWERS = 1000
"""A judge's answers among which its canaries are looked for."""


async def ask_canaries(
    examples: Iterable[Example],
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    endpoint: Endpoint,
    store: LabelStore,
    *,
    slots: Slots = nullcontext,
    payer: Payer | None = None,
) -> TeacherDrift:
    """Ask the canary rows among `examples` again; see `drift_of`."""
    asked = []
    for row in canary_rows(examples, prompt, recipe, endpoint.identity, store):
        asked.append(questions(row, prompt, recipe, endpoint.identity))
    return await drift_of(asked, recipe, endpoint, store, slots=slots, payer=payer)


def earlier_questions(judge: JudgeRecipe, identity: str, store: LabelStore) -> list[list[Question]]:
    """Return a judge's canaries, each a row of one question: what it has answered before, as the
    pairs of a run are new ones. Answers to other instructions or settings are left out, which
    their keys tell; the keys are hashes, and the lowest are taken, so that new answers replace few.
    """
    asked: list[list[Question]] = []
    for stored in store.first_answers(identity, FIRST_ANSWERS):
        if len(asked) == (judge.canaries.rows or 0):
            break
        row = Example(example_id=stored.example_id, question="", choices=VERDICTS)
        system = render_messages(row, judge.prompt)[0]
        messages = [system, {"role": "user", "content": stored.prompt}]
        if request_key(identity, messages, judge) == stored.request_key:
            order = tuple(range(len(VERDICTS)))
            asked.append([Question(stored.request_key, messages, order, row)])
    return asked


async def drift_of(
    asked: Sequence[Sequence[Question]],
    recipe: TeacherRecipe,
    endpoint: Endpoint,
    store: LabelStore,
    *,
    slots: Slots = nullcontext,
    payer: Payer | None = None,
) -> TeacherDrift:
    """Ask the questions of some rows again and return how many rows get another label than the
    stored answers give. No answer is stored.

    Rows that the store has no answers for are left out. `slots` and `payer` are as in `label`.
    Raises what `Teacher.ask` raises.
    """
    before = store.get_many(question.key for row_questions in asked for question in row_questions)
    for question in chain.from_iterable(asked):
        if question.key in before:
            before[question.key] = read_again(question, before[question.key], recipe)
    answered_before = [row_questions for row_questions in asked if all_in(row_questions, before)]
    pace = pace_of(recipe, endpoint, store.database)
    fresh = await ask_again(answered_before, recipe, endpoint, store, pace, slots, payer or Payer())
    after = {answer.request_key: answer for answer in fresh}
    compared = [row_questions for row_questions in answered_before if all_in(row_questions, after)]
    changed = []
    for row_questions in compared:
        old = answer_of_row(row_questions, before, recipe.soft_labels)
        new = answer_of_row(row_questions, after, recipe.soft_labels)
        if old != new:
            changed.append(row_questions[0].row.example_id)
    return TeacherDrift(
        asked=len(fresh),
        compared=len(compared),
        changed=tuple(changed),
        before=model_versions(before.values()),
        after=model_versions(fresh),
    )


async def ask_again(
    asked: Sequence[Sequence[Question]],
    recipe: TeacherRecipe,
    endpoint: Endpoint,
    store: LabelStore,
    pace: Pace,
    slots: Slots,
    payer: Payer,
) -> list[StoredAnswer]:
    """Ask all questions of these rows and return the answers that come."""
    calls_at_a_time = asyncio.Semaphore(recipe.concurrency)
    async with (
        Spending.shared(recipe, payer, store.database, store.flush, store.recover) as spending,
        Teacher(
            recipe,
            endpoint,
            pace=pace,
            spending=spending,
            book=store,
            payer=payer,
            purpose="canary",
        ) as teacher,
    ):

        async def ask(question: Question) -> StoredAnswer | None:
            async with calls_at_a_time, slots():
                completion = await ask_patiently(question, teacher, recipe, pace)
                if completion is None:
                    return None
                answer = stored_answer(question, completion, recipe, endpoint.identity)
                call = call_read_as(answer, completion)
                if call:
                    store.record(call)
                return answer

        calls = [
            when_left(partial(ask, question))
            for row_questions in asked
            for question in row_questions
        ]
        answers = await asyncio.gather(*calls)
    return [answer for answer in answers if answer]


async def ask_patiently(
    question: Question, teacher: Teacher, recipe: TeacherRecipe, pace: Pace
) -> Completion | None:
    """Ask until an answer comes or teacher.outage_s is over.

    Return None if the answer is malformed or the request is too large for the endpoint, or if it
    has answered other questions meanwhile: none of it tells whether the teacher has changed. Raises
    TeacherUnavailable otherwise.
    """
    started = time.monotonic()
    while True:
        try:
            completion = await teacher.ask(
                question.messages, question.names, question.schema, key=question.key
            )
        except TeacherUnavailable:
            if time.monotonic() - started < recipe.outage_s:
                continue
            if pace.answered_at > started:
                return None
            raise
        return None if completion.finish_reason in ("malformed", TOO_LARGE) else completion


def all_in(row_questions: Sequence[Question], answers: Mapping[str, StoredAnswer]) -> bool:
    """Return whether all questions of a row are answered."""
    return all(question.key in answers for question in row_questions)


def answer_of_row(
    row_questions: Sequence[Question], answers: Mapping[str, StoredAnswer], soft_labels: bool
) -> str | None:
    """Return the answer of the label that a row's answers give, or None if they give none."""
    accepted = accepted_answers(
        row_questions, [answers[question.key] for question in row_questions]
    )
    if not accepted:
        return None
    label = label_of_answers(row_questions[0].row, accepted, soft_labels)
    return label.letter if label else None


def model_versions(answers: Iterable[StoredAnswer]) -> tuple[str, ...]:
    """Return the versions of the model that gave these answers, sorted."""
    return tuple(sorted({answer.model_version for answer in answers}))
