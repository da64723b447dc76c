"""labels/acceptance"""

from collections.abc import Sequence

from distillery.labels.questions import Question
from distillery.labels.store import StoredAnswer
from distillery.recipe import TeacherRecipe
from distillery.teacher.answers import (
    Answer,
    distribution,
    in_own_letters,
    parse_answer,
    parse_json,
)
from distillery.teacher.budget import cost_of
from distillery.teacher.reply import Completion, storable


def stored_answer(
    question: Question, completion: Completion, recipe: TeacherRecipe, identity: str
) -> StoredAnswer:
    read = parse_json if recipe.answers.form == "json" else parse_answer
    refused = completion.finish_reason in ("content_filter", "refusal")
    # A reason that was cut off has not come to its answer, whatever letters stand in it.
    cut = completion.finish_reason == "length" and recipe.answers.form == "rationale"
    letter = None if refused or cut else read(completion.text, question.choices)
    # The alternatives at a letter that is not the one answered with say nothing of the answer.
    pairs = completion.top_logprobs if completion.answer_letter == letter else None
    return StoredAnswer(
        request_key=question.key,
        teacher=identity,
        answer=letter,
        distribution=distribution(pairs, question.letters)
        if pairs and recipe.asks_log_probabilities
        else None,
        raw=completion.text,
        prompt_tokens=completion.usage.prompt_tokens,
        completion_tokens=completion.usage.completion_tokens,
        cached_tokens=completion.usage.cached_tokens,
        cost=cost_of(completion.usage, recipe.prices),
        latency_ms=completion.latency_ms,
        attempts=completion.attempts,
        model_version=completion.model_version,
        reason="" if letter else rejection_reason(completion, question, recipe),
        example_id=storable(question.row.example_id),
        prompt=storable(question.messages[-1]["content"]),
    )


def accepted_answers(
    several: Sequence[Question], answers: Sequence[StoredAnswer | None]
) -> list[Answer]:
    """Those answers to a row that are labels, in the row's own letters."""
    return [
        in_own_letters(stored.answer, stored.distribution, question.order)
        for question, stored in zip(several, answers, strict=True)
        if stored and stored.answer
    ]


def rejection_reason(completion: Completion, question: Question, recipe: TeacherRecipe) -> str:
    if completion.finish_reason == "content_filter":
        return "refused by the endpoint's content filter"
    if completion.finish_reason == "refusal":
        return "refused by the teacher"
    if completion.finish_reason == "context_length_exceeded":
        return "prompt longer than the teacher's context"
    if completion.finish_reason == "length":
        return f"no answer within teacher.max_tokens ({recipe.max_tokens})"
    if not completion.text.strip():
        return "empty answer"
    return f"no option, or more than one, of {question.letters[0]} to {question.letters[-1]}"
