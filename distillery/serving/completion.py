"""From a chat request to the student's answer, piece by piece, with its log-probabilities."""

import math
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionTokenLogprob
from openai.types.chat.chat_completion_token_logprob import TopLogprob

from distillery.errors import ModelError, SchemaNotHeld
from distillery.inference.generation import most_tokens
from distillery.inference.guide import Guide
from distillery.inference.logits import Logits, log_softmax, token_sampler
from distillery.models.class_tokens import ClassTokens
from distillery.serving.requests import (
    ApiError,
    ChatRequest,
    ObjectFormat,
    SchemaFormat,
    TextFormat,
)
from distillery.serving.stops import StopSearch
from distillery.serving.student import ServedStudent
from distillery.training.rows import TrainingRow

IMPOSSIBLE = -9999.0
"""The log-probability that OpenAI writes for what is all but impossible: JSON has no infinity."""

ANY_OBJECT = {"type": "object"}
"""The schema of response_format json_object."""


@dataclass
class Piece:
    """A part of an answer: text that is final, and the log-probabilities of its tokens.

    The last piece of an answer has the `finish_reason`.
    """

    text: str
    logprobs: list[ChatCompletionTokenLogprob]
    finish_reason: Literal["stop", "length"] | None = None


@dataclass(eq=False)
class Job:
    """A request on its way through the worker thread, which counts the tokens here.

    `cancelled` is set by the event loop if the client has gone, the answer takes too long or is
    complete; the worker reads it between two passes of the model. `refusal`: what a client is told
    whose answer is not waited for. `size`: bytes of the request. `came` and `spoke`: when the
    request and the first piece of its answer came, in seconds of time.monotonic.
    """

    request: ChatRequest
    size: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    refusal: ApiError | None = None
    came: float = field(default_factory=time.monotonic)
    spoke: float | None = None

    @property
    def usage(self) -> CompletionUsage:
        return CompletionUsage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
        )


def is_choice(student: ServedStudent, request: ChatRequest) -> bool:
    """Return whether an answer is chosen, in the passes of its prompt, and not generated."""
    return bool(student.classes or request.structured_outputs or request.limit == 1)


Completion = Generator[Piece | TrainingRow, Any, None]
"""Yields an answer's pieces. A choice yields first the row that it is about, and is sent what
`ServedStudent.choices` finds of it: so choices that wait can be asked together."""


def complete(student: ServedStudent, job: Job) -> Completion:
    """Yield the whole answer, a piece for each token, which may be empty: text that may begin a
    stop text is held back.

    Log-probabilities are the model's own, of all tokens. If the student is served `for_labels`,
    they are those of the tokens that the answer's schema leaves: the label is written by these, and
    a student that learns from it is held to the schema too. The end of the turn has an entry then,
    without bytes.

    Raises ApiError if the messages leave no room in the context.
    """
    request = job.request
    messages = [{"role": message.role, "content": message.text} for message in request.messages]
    try:
        prompt = student.tokenizer.encode_chat(messages)
    except ModelError as error:
        # It tells of the template and the roles alone.
        raise ApiError(400, str(error), param="messages") from error
    job.prompt_tokens = len(prompt)
    room = student.context_length - len(prompt)
    if room < 1:
        raise ApiError(
            400,
            f"This model's maximum context length is {student.context_length} tokens; "
            f"the messages have {len(prompt)}.",
            code="context_length_exceeded",
            param="messages",
        )
    chooses = student.classes or request.structured_outputs
    if chooses and isinstance(request.response_format, ObjectFormat | SchemaFormat):
        raise ApiError(
            400,
            "response_format: the answer is one of several texts or classes, and no JSON",
            param="response_format",
        )
    if student.classes:
        yield from choose_class(student, job, prompt, student.classes)
        return
    if request.structured_outputs:
        yield from choose_text(student, job, prompt, request.structured_outputs.choice)
        return
    if request.logprobs and student.for_labels:
        require_token_bytes(student)
    guide = guide_of(student, request)
    sampling: dict[str, Any] = {
        "temperature": request.temperature or 0.0,
        "top_p": request.top_p or 1.0,
        "seed": request.seed,
    }
    if request.limit == 1:
        logits = yield TrainingRow(prompt=tuple(prompt), answer=0)
        allowed = guide.masked(logits) if guide else logits
        token = token_sampler(**sampling)(allowed)
        steps = iter([(token, allowed if student.for_labels else logits)])
    else:
        most = most_tokens(student.format) if student.format else room
        steps = student.steps(
            prompt,
            min(request.limit or most, room),
            guide=guide,
            held=student.for_labels,
            **sampling,
        )
    stream = student.text_stream()
    search = StopSearch(request.stops)
    entries: list[ChatCompletionTokenLogprob] = []
    for token, logits in steps:
        is_end = token in student.end_ids
        if request.logprobs and (student.for_labels or not is_end):
            entries.append(token_logprobs(student, token, logits, request.top_logprobs or 0))
        if is_end:
            yield Piece(search.take(stream.rest()) + search.held, entries, "stop")
            return
        job.completion_tokens += 1
        text = search.take(stream.take(token))
        if search.found:
            yield Piece(text, entries, "stop")
            return
        # Log-probabilities come with the text that they belong to.
        yield Piece(text, entries if text else [])
        if text:
            entries = []
    text = search.take(stream.rest())
    yield Piece(text + search.held, entries, "stop" if search.found else "length")


def require_token_bytes(student: ServedStudent) -> None:
    """Raise ApiError for a student whose tokens' bytes can't be told."""
    try:
        student.token_bytes(0)
    except SchemaNotHeld as error:
        raise ApiError(400, f"logprobs: {error}", param="logprobs") from error


def guide_of(student: ServedStudent, request: ChatRequest) -> Guide | None:
    """Return what holds the answer to the schema that the request names, or else to the student's
    own; None where there is none.

    Raises ApiError for a schema that answers can't be held to."""
    asked = request.response_format
    if isinstance(asked, SchemaFormat):
        try:
            return student.guides.start(
                asked.json_schema.schema_, strict=bool(asked.json_schema.strict)
            )
        except SchemaNotHeld as error:
            raise ApiError(
                400, f"response_format: {error}", param="response_format.json_schema.schema"
            ) from error
    if isinstance(asked, TextFormat):
        return None
    if student.format and student.format.json_schema is not None:
        return student.guides.start(student.format.json_schema)
    return student.guides.start(ANY_OBJECT) if isinstance(asked, ObjectFormat) else None


def choose_text(
    student: ServedStudent, job: Job, prompt: list[int], choice: list[str]
) -> Completion:
    """Yield the likeliest text as the whole answer; see `likeliest` and `unless_unsure`."""
    texts = [student.tokenizer.encode_text(text) for text in choice]
    if len(prompt) + max(map(len, texts)) > student.context_length:
        raise ApiError(
            400, "The messages and a choice are longer than the context.", "context_length_exceeded"
        )
    row = TrainingRow(prompt=tuple(prompt), texts=tuple(map(tuple, texts)), answer=0)
    probabilities = yield row
    answer = likeliest(job, choice, probabilities)
    job.completion_tokens = len(texts[choice.index(answer.text)])
    yield unless_unsure(student, answer, max(probabilities))


def choose_class(
    student: ServedStudent, job: Job, prompt: list[int], classes: ClassTokens
) -> Completion:
    """Yield the likeliest class as the whole answer, which took one token; see `likeliest` and
    `unless_unsure`. A request with structured_outputs.choice gets one of those.

    Raises ApiError if it names what is no class."""
    token_of = dict(zip(classes.classes, classes.tokens, strict=True))
    names = list(token_of)
    if job.request.structured_outputs:
        names = job.request.structured_outputs.choice
    for name in names:
        if name not in token_of:
            raise ApiError(
                400,
                f"The model answers with one of its {len(token_of)} classes, and {name[:100]!r} is "
                "none.",
                param="structured_outputs",
            )
    row = TrainingRow(
        prompt=tuple(prompt),
        letters=tuple(token_of[name] for name in names),
        closed=True,
        span=classes.span(prompt),
        last=classes.last,
        answer=0,
    )
    probabilities = yield row
    job.completion_tokens = 1
    yield unless_unsure(student, likeliest(job, names, probabilities), max(probabilities))


def unless_unsure(student: ServedStudent, answer: Piece, probability: float) -> Piece:
    """Return the answer or, if its probability is below the student's threshold, what the student
    says when it abstains. The log-probabilities stay those of the likeliest answer."""
    abstention = student.abstention
    if abstention and abstention.abstains(probability):
        return replace(answer, text=abstention.answer)
    return answer


def likeliest(job: Job, choice: Sequence[str], probabilities: Sequence[float]) -> Piece:
    """Return the text of `choice` with the highest probability as the whole answer.

    Each text counts as one token in the log-probabilities, which are those among the texts.
    """
    order = sorted(range(len(choice)), key=lambda index: -probabilities[index])
    best = order[0]
    if not job.request.logprobs:
        return Piece(choice[best], [], "stop")
    ranked = []
    for index in order:
        logprob = IMPOSSIBLE
        if probabilities[index] > 0:
            logprob = math.log(probabilities[index])
        encoded = list(choice[index].encode())
        ranked.append(TopLogprob(token=choice[index], logprob=logprob, bytes=encoded))
    entry = with_alternatives(ranked[0], ranked[: job.request.top_logprobs or 0])
    return Piece(choice[best], [entry], "stop")


def token_logprobs(
    student: ServedStudent, token: int, logits: Logits, count: int
) -> ChatCompletionTokenLogprob:
    """Return the log-probability of a token, and those of the `count` likeliest tokens."""
    logprobs = log_softmax(logits)
    likeliest: list[int] = []
    if count:
        some = np.argpartition(-logprobs, min(count, len(logprobs) - 1))[:count]
        likeliest = some[np.argsort(-logprobs[some], kind="stable")].tolist()
    alternatives = [name_token(student, other, float(logprobs[other])) for other in likeliest]
    return with_alternatives(name_token(student, token, float(logprobs[token])), alternatives)


def name_token(student: ServedStudent, token: int, logprob: float) -> TopLogprob:
    """Return a token's text, bytes and log-probability.

    A token that is a part of a character has the text U+FFFD, and no bytes unless the student is
    served `for_labels`: to tell them takes a copy of the vocabulary.
    """
    text = student.token_text(token)
    encoded = None if "\ufffd" in text else list(text.encode())
    if student.for_labels:
        known = student.token_bytes(token)
        encoded = None if known is None else list(known)
    if not math.isfinite(logprob):
        logprob = IMPOSSIBLE
    return TopLogprob(token=text, logprob=logprob, bytes=encoded)


def with_alternatives(
    token: TopLogprob, alternatives: list[TopLogprob]
) -> ChatCompletionTokenLogprob:
    return ChatCompletionTokenLogprob(
        token=token.token, logprob=token.logprob, bytes=token.bytes, top_logprobs=alternatives
    )
