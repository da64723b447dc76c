"""Which answers are labels: what a completion says, and the reason for which it is rejected.

The label store keeps the text of each answer and what it was read as when it came. Whoever takes
answers from the store reads their texts again, so that a newer version's reader applies to all of
them, at no cost.
"""

from collections.abc import Sequence
from dataclasses import replace

from distillery.answers import NotAnAnswer
from distillery.data.answer_tokens import packed
from distillery.labels.questions import Question
from distillery.labels.store import StoredAnswer
from distillery.recipe import TeacherRecipe
from distillery.records import Example
from distillery.teacher.answers import (
    Answer,
    CombinedAnswer,
    combine_answers,
    combine_written,
    distribution,
    in_own_order,
    of_options,
)
from distillery.teacher.budget import cost_of
from distillery.teacher.ledger import Call
from distillery.teacher.reading import parse_answer, parse_class, written_answer
from distillery.teacher.reply import Completion, storable

CUT_OFF = "no answer within"
"""What the reason of an answer begins with that max_tokens cut off. It is a label only where it
begins with its answer; a rationale, which has not reached its answer, and an answer that is written
never are."""


def stored_answer(
    question: Question, completion: Completion, recipe: TeacherRecipe, identity: str
) -> StoredAnswer:
    """Return the answer as the label store keeps it, rejected answers with their reason."""
    reason = reason_not_to_read(completion, recipe)
    letter = None
    readable = is_read(question, reason, recipe)
    if readable:
        letter, unread = read_text(question, completion.text, reason.startswith(CUT_OFF))
        reason = "" if letter else reason or unread
    pairs = None
    # The alternatives at another letter than the one answered say nothing about the answer.
    if completion.answer_letter == letter:
        pairs = completion.top_logprobs
    probabilities = tokens = None
    if pairs and recipe.asks_log_probabilities:
        probabilities = distribution(pairs, question.names)
    # Those of a text that is no label are kept too: with another schema it may be one.
    if readable and completion.tokens and recipe.asks_log_probabilities:
        tokens = packed(completion.tokens)
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
        tokens=tokens,
    )


def call_read_as(answer: StoredAnswer, completion: Completion) -> Call | None:
    """Return the call that gave a completion, now that it is read as `answer`; None for a request
    that the endpoint refused, which is recorded already."""
    call = completion.call
    if call and call.outcome == "answer" and answer.answer is None:
        return replace(call, outcome="rejected")
    return call


def read_again(question: Question, stored: StoredAnswer, recipe: TeacherRecipe) -> StoredAnswer:
    """Return a stored answer as its text is read today.

    What it was read as stays where it is read as nothing today: a stricter reader takes no label
    away that was paid for. Written answers are no labels then, since another schema may say so; an
    earlier one takes them again. The probabilities that came with it belong to the letter or class
    that it was read as; they are left out if it is another one now."""
    if not is_read(question, stored.reason, recipe):
        return stored
    letter, unread = read_text(question, stored.raw, stored.reason.startswith(CUT_OFF))
    if letter is None and question.row.format:
        return stored._replace(answer=None, reason=unread)
    if letter is None or letter == stored.answer:
        return stored
    return stored._replace(answer=letter, distribution=None, reason="")


def is_read(question: Question, reason: str, recipe: TeacherRecipe) -> bool:
    """Return whether a completion's text may be a label, given the reason against it, if any."""
    if not reason:
        return True
    if reason.startswith(CUT_OFF):
        return recipe.answers.form != "rationale" and question.row.format is None
    return reason not in reasons_of_no_answer(recipe).values()


def read_text(question: Question, text: str, cut_off: bool) -> tuple[str | None, str]:
    """Return what a text answers with: the letter, in the order shown, the class, the option's text
    or the written answer. If it is none, return None and why, as rejected.jsonl says it."""
    row = question.row
    if row.format:
        try:
            return written_answer(text, row.format.json_schema), ""
        except NotAnAnswer as error:
            return None, str(error)
    if question.by_text:
        if question.names.count(text) > 1:
            return None, "two options have the text of the answer"
        answer = text if text in question.names else None
    elif row.classes:
        answer = parse_class(text, question.names, cut_off)
    else:
        answer = parse_answer(text, question.options, cut_off)
    if answer:
        return answer, ""
    if not text.strip():
        return None, "empty answer"
    if row.classes:
        return None, f"none of the {len(question.names)} classes, or more than one"
    return None, f"no option, or more than one, of {row.keys[0]} to {row.keys[-1]}"


def reason_not_to_read(completion: Completion, recipe: TeacherRecipe) -> str:
    """Return what speaks against a completion whatever its text is, or nothing."""
    if completion.finish_reason == "length":
        return f"{CUT_OFF} {recipe.section}.max_tokens ({recipe.max_tokens})"
    return reasons_of_no_answer(recipe).get(completion.finish_reason, "")


def reasons_of_no_answer(recipe: TeacherRecipe) -> dict[str, str]:
    """Return why a completion's text is never read, by its finish reason."""
    return {
        "content_filter": "refused by the endpoint's content filter",
        "refusal": f"refused by the {recipe.who}",
        "context_length_exceeded": f"prompt longer than the {recipe.who}'s context",
    }


def accepted_answers(
    questions: Sequence[Question], answers: Sequence[StoredAnswer | None]
) -> list[Answer]:
    """Return those answers to a row's questions that are no rejections, in the row's own
    letters."""
    accepted = []
    row = questions[0].row
    keys = row.keys
    for question, stored in zip(questions, answers, strict=True):
        if stored is None or not stored.answer:
            continue
        if row.format:
            accepted.append(Answer(stored.answer))
        elif question.by_text:
            accepted.append(of_options(stored.answer, stored.distribution, row.options, keys))
        else:
            accepted.append(in_own_order(stored.answer, stored.distribution, question.order, keys))
    return accepted


def label_of_row(
    questions: Sequence[Question], answers: Sequence[StoredAnswer | None], soft: bool
) -> CombinedAnswer | None:
    """Return the label that the answers to all questions of a row give, if enough of them are
    accepted and these have a majority."""
    accepted, row = accepted_answers(questions, answers), questions[0].row
    if len(accepted) < answers_needed(row, len(answers)):
        return None
    return label_of_answers(row, accepted, soft)


def answers_needed(row: Example, asked: int) -> int:
    """Return how many of so many answers to a row must be accepted: more than half of them. Of free
    texts, one is enough."""
    return 1 if row.writes_text else asked // 2 + 1


def label_of_answers(row: Example, accepted: Sequence[Answer], soft: bool) -> CombinedAnswer | None:
    """Return the label that the accepted answers to a row (at least one) give; None for a tie of
    letters. `soft` as in `combine_answers`."""
    if row.format:
        return combine_written(accepted, texts=row.writes_text)
    return combine_answers(accepted, row.keys, soft)
