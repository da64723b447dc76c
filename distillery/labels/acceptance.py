"""Which answers are labels: what a completion says, and the reason for which it is rejected."""

from collections.abc import Sequence

from distillery.labels.questions import Question
from distillery.labels.store import StoredAnswer
from distillery.recipe import TeacherRecipe
from distillery.teacher.answers import (
    Answer,
    distribution,
    in_own_order,
    parse_answer,
    parse_class,
    parse_json,
)
from distillery.teacher.budget import cost_of
from distillery.teacher.reply import Completion, storable


def stored_answer(
    question: Question, completion: Completion, recipe: TeacherRecipe, identity: str
) -> StoredAnswer:
    """Return the answer as the label store keeps it, rejected answers with their reason."""
    letter = answered_letter(question, completion, recipe.answers.form)
    reason = ""
    if letter is None:
        reason = rejection_reason(question, completion, recipe.max_tokens)
    pairs = None
    # The alternatives at another letter than the one answered say nothing about the answer.
    if completion.answer_letter == letter:
        pairs = completion.top_logprobs
    probabilities = None
    if pairs and recipe.asks_log_probabilities:
        probabilities = distribution(pairs, question.keys)
    return StoredAnswer(
        request_key=question.key,
        teacher=identity,
        answer=letter,
        distribution=probabilities,
        raw=completion.text,
        prompt_tokens=completion.usage.prompt_tokens,
        completion_tokens=completion.usage.completion_tokens,
        cached_tokens=completion.usage.cached_tokens,
        cost=cost_of(completion.usage, recipe.prices),
        latency_ms=completion.latency_ms,
        attempts=completion.attempts,
        model_version=completion.model_version,
        reason=reason,
        example_id=storable(question.row.example_id),
        prompt=storable(question.messages[-1]["content"]),
    )


def answered_letter(question: Question, completion: Completion, form: str) -> str | None:
    """Return the letter, in the order shown, or the class that a completion answers with, or None.

    `form` is teacher.answers.form: letter, json or rationale.
    """
    if completion.finish_reason in ("content_filter", "refusal"):
        return None
    # A rationale that was cut off has not reached its answer, whatever letters it mentions.
    if form == "rationale" and completion.finish_reason == "length":
        return None
    if question.row.classes:
        return parse_class(completion.text, question.keys)
    if form == "json":
        return parse_json(completion.text, question.options)
    return parse_answer(completion.text, question.options)


def rejection_reason(question: Question, completion: Completion, max_tokens: int) -> str:
    """Return why a completion without a letter is no label, as rejected.jsonl says it."""
    if completion.finish_reason == "content_filter":
        return "refused by the endpoint's content filter"
    if completion.finish_reason == "refusal":
        return "refused by the teacher"
    if completion.finish_reason == "context_length_exceeded":
        return "prompt longer than the teacher's context"
    if completion.finish_reason == "length":
        return f"no answer within teacher.max_tokens ({max_tokens})"
    if not completion.text.strip():
        return "empty answer"
    if question.row.classes:
        return f"none of the {len(question.keys)} classes, or more than one"
    return f"no option, or more than one, of {question.keys[0]} to {question.keys[-1]}"


def accepted_answers(
    questions: Sequence[Question], answers: Sequence[StoredAnswer | None]
) -> list[Answer]:
    """Return those answers to a row's questions that have a letter or class, in the row's own
    letters."""
    accepted = []
    for question, stored in zip(questions, answers, strict=True):
        if stored and stored.answer:
            accepted.append(
                in_own_order(stored.answer, stored.distribution, question.order, question.keys)
            )
    return accepted
