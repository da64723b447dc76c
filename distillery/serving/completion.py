"""serving/completion"""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distillery.inference.logits import Logits, log_softmax
from distillery.inference.onnx_student import OnnxStudent
from distillery.serving.requests import ApiError, ChatRequest


@dataclass
class Piece:
    """A part of an answer: text that is settled, and the log-probabilities of the tokens taken since the last part."""

    text: str
    logprobs: list[dict[str, Any]]
    finish_reason: str | None = None


@dataclass
class Job:
    """One request on its way through the worker thread. `cancelled`: the client has gone."""

    request: ChatRequest
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def usage(self) -> dict[str, int]:
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


def complete(student: OnnxStudent, job: Job) -> Iterator[Piece]:
    """The answer in pieces; the last one has the finish reason. Text that may be the start of a stop text is held back.

    Raises ApiError where the messages leave no room in the context."""
    request = job.request
    prompt = student.tokenizer.encode_chat(
        [{"role": m.role, "content": m.text} for m in request.messages]
    )
    job.prompt_tokens = len(prompt)
    room = student.context_length - len(prompt)
    if room < 1:
        raise ApiError(
            400,
            f"This model's maximum context length is {student.context_length} tokens; the messages have {len(prompt)}.",
            code="context_length_exceeded",
            param="messages",
        )
    if request.structured_outputs:
        yield _chosen(student, job, prompt, request.structured_outputs.choice)
        return
    steps = student.steps(
        prompt,
        min(request.limit or room, room),
        temperature=request.temperature or 0.0,
        top_p=request.top_p or 1.0,
        seed=request.seed,
    )
    stream = student.text_stream()
    held, entries, reason = "", [], "length"
    for token, logits in steps:
        if token in student.end_ids:
            reason = "stop"
            break
        job.completion_tokens += 1
        held += stream.decode(token)
        if request.logprobs:
            entries.append(_token_logprobs(student, token, logits, request.top_logprobs or 0))
        end, settled = _stop_at(held, request.stops)
        if end is not None:
            held, reason = held[:end], "stop"
            break
        if settled:
            yield Piece(held[:settled], entries)
            held, entries = held[settled:], []
    yield Piece(held, entries, reason)


def _chosen(student: OnnxStudent, job: Job, prompt: list[int], choice: list[str]) -> Piece:
    """The likeliest text as the whole answer. Its log-probabilities are those among the texts, an entry in all."""
    texts = [student.tokenizer.encode_text(text) for text in choice]
    if len(prompt) + max(map(len, texts)) > student.context_length:
        raise ApiError(
            400, "The messages and a choice are longer than the context.", "context_length_exceeded"
        )
    probabilities = student.text_probabilities(prompt, texts)
    order = sorted(range(len(choice)), key=lambda i: -probabilities[i])
    job.completion_tokens = len(texts[order[0]])
    entries = [
        {
            "token": choice[i],
            "logprob": _number(math.log(probabilities[i] or math.nan)),
            "bytes": list(choice[i].encode()),
        }
        for i in order
    ]
    top = entries[: job.request.top_logprobs or 0]
    return Piece(
        choice[order[0]],
        [{**entries[0], "top_logprobs": top}] if job.request.logprobs else [],
        "stop",
    )


def _stop_at(text: str, stops: list[str]) -> tuple[int | None, int]:
    """Where the first stop text begins, if one is there; how many characters can't belong to one that is to come."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    partial = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return min(found, default=None), len(text) - max(partial, default=0)


def _token_logprobs(student: OnnxStudent, token: int, logits: Logits, top: int) -> dict[str, Any]:
    """One entry of choices[].logprobs.content."""
    logprobs = log_softmax(logits)
    best: list[int] = []
    if top:
        some = np.argpartition(-logprobs, min(top, len(logprobs) - 1))[:top]
        best = some[np.argsort(-logprobs[some], kind="stable")].tolist()
    return {
        **_named(student, token, float(logprobs[token])),
        "top_logprobs": [_named(student, other, float(logprobs[other])) for other in best],
    }


def _named(student: OnnxStudent, token: int, logprob: float) -> dict[str, Any]:
    text = student.token_text(token)
    in_full = "\ufffd" not in text
    return {
        "token": text,
        "logprob": _number(logprob),
        "bytes": list(text.encode()) if in_full else None,
    }


def _number(logprob: float) -> float:
    """JSON knows no infinity; OpenAI writes -9999 for what is all but impossible."""
    return logprob if math.isfinite(logprob) else -9999.0
