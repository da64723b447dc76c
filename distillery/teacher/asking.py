"""Asking the teacher: the one module that makes direct calls, and tries them again.

A call takes this path, each step by a method below or a module beside this one:

1. `Teacher.ask` joins the messages with the options that the endpoint accepts (options.py).
2. `Teacher._send` repeats a failed try by tenacity.
3. `Teacher._try_once` reserves its cost (budget.py), waits for its turn (pace.py), and
4. sends the request through an SDK, which makes no tries of its own (clients.py).
5. The response becomes a `Completion` (reply.py), a failure the user's error (failures.py).

Each try is one entry in the ledger (ledger.py). A try that gave no completion is recorded here; a
completion carries its entry to the reader of its text, who alone knows whether it is a label.
"""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Self

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random

from distillery.errors import DistilleryError, TeacherError
from distillery.prompts import Message
from distillery.recipe import TeacherRecipe
from distillery.records import Usage
from distillery.teacher.budget import HeldByOthers, Spending, cost_of
from distillery.teacher.clients import Response, open_client
from distillery.teacher.endpoint import Endpoint, log_in
from distillery.teacher.failures import BACKOFF, MALFORMED, CallFailed, final_error
from distillery.teacher.ledger import (
    Amounts,
    Book,
    Call,
    NoBook,
    Outcome,
    Payer,
    Purpose,
    new_call_id,
)
from distillery.teacher.options import MOST_LOGPROBS, CallOptions
from distillery.teacher.pace import LONGEST_WAIT_S, Pace, pace_of
from distillery.teacher.reply import Completion, read_completion, usage_of

MESSAGE_TOKENS = 16
"""More tokens than a chat template adds to two messages."""

FIRST_TOKENS_PER_CHARACTER = 1.0
"""Assumed until the first answer tells; more than in most languages."""

PROBE: list[Message] = [
    {"role": "system", "content": "Your output should only be one of the two choices: 'A' or 'B'."},
    {
        "role": "user",
        "content": "Question: Which is larger?\nAnswer Choices:\n(A) a mouse\n(B) a house",
    },
]


class Teacher:
    """A teacher that many workers ask at a time, to be used within `async with`.

    What the endpoint refuses once, such as a temperature, is not sent to it again in this run.
    `demand_log_probabilities`: whether it is an error if the recipe asks for log-probabilities and
    the endpoint gives none. The tries that gave no completion are recorded in `book`, and all are
    noted there before they begin, as calls of `payer` for `purpose`.
    """

    def __init__(
        self,
        recipe: TeacherRecipe,
        endpoint: Endpoint,
        *,
        pace: Pace | None = None,
        spending: Spending | None = None,
        demand_log_probabilities: bool = True,
        book: Book | None = None,
        payer: Payer | None = None,
        purpose: Purpose = "label",
    ) -> None:
        self._recipe = recipe
        self._endpoint = endpoint
        self._pace = pace or pace_of(recipe, endpoint)
        self._spending = spending or Spending(
            recipe.budget, recipe.prices, section=recipe.budget_section
        )
        self._demand_log_probabilities = demand_log_probabilities
        self._book = book or NoBook()
        self._payer = payer or Payer()
        self._purpose = purpose
        self._options = CallOptions(
            recipe.max_tokens,
            recipe.temperature,
            top_logprobs=MOST_LOGPROBS if recipe.asks_log_probabilities else 0,
            schema=recipe.answers.form == "json",
            stop=recipe.stop,
        )
        self._gave_completions = False
        # By a question's key, the tries before one that no budget was left for.
        self._tries_before: dict[str, int] = {}
        # By a question's key, when the last answer to any had come when it was refused.
        self._answered_at_refusal: dict[str, float] = {}
        self._gave_log_probabilities = False
        self._tokens_per_character: float | None = None

    async def __aenter__(self) -> Self:
        self._credential = await log_in(self._endpoint)
        self._client = open_client(
            self._endpoint, self._credential, self._recipe.concurrency, self._recipe.timeout_s
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()
        if self._credential:
            await self._credential.close()
        await self._pace.leave()

    async def ask(
        self,
        messages: list[Message],
        letters: Sequence[str],
        schema: Mapping[str, Any] | None = None,
        *,
        by_text: bool = False,
        key: str = "",
        purpose: Purpose | None = None,
    ) -> Completion:
        """Return the teacher's answer to `messages`, whose options have these `letters`; an answer
        that is written has none, and may be a JSON object that meets `schema`. `by_text`: the
        letters are texts, and the answer is the likeliest of them. `key` is the answer's key in the
        label store, and `purpose`, by default the teacher's, what it is for.

        If the endpoint refuses this question alone, or answers it with something that is no chat
        completion after it has given some, the completion has no text and says so in its
        finish_reason. Raises CredentialsError (401, 403), TeacherUnavailable after teacher.attempts
        tries or teacher.outage_s, BudgetReached, HeldByOthers where others may leave something of
        the budget, Stopped if the pace is stopped, and TeacherError for anything else that no other
        question would avoid. After HeldByOthers, a question with a `key` goes on with its tries.
        """
        entry = self._entry(key, purpose or self._purpose)
        while True:
            options = self._options
            body = options.body(letters, schema, by_text)
            try:
                completion = await self._send(messages, body, letters, entry)
            except CallFailed as failure:
                if failure.question_refusal:
                    return Completion(text="", finish_reason=failure.question_refusal)
                if failure.status == MALFORMED and self._gave_completions:
                    return Completion(text="", finish_reason="malformed")
                self._drop_refused_option(options, failure)
            else:
                try:
                    self._check_log_probabilities(options, completion)
                except TeacherError:
                    if completion.call:
                        self._book.record(replace(completion.call, outcome="rejected"))
                    raise
                return completion

    def body(
        self, letters: Sequence[str], schema: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return what a request holds beside its messages, without what the endpoint has refused.
        `letters` and `schema` as in `ask`."""
        return self._options.body(letters, schema)

    async def _send(
        self,
        messages: list[Message],
        body: dict[str, Any],
        letters: Sequence[str],
        entry: Call,
    ) -> Completion:
        """Return the answer of the first try that succeeds; raise the last CallFailed if none.
        Where HeldByOthers ends it, the next one for the same question counts its tries on."""
        before = self._tries_before.pop(entry.request_key, 0)

        def count_on(state: RetryCallState) -> None:
            state.attempt_number = max(state.attempt_number, 1 + before)

        retrying = AsyncRetrying(
            retry=retry_if_exception(self._is_worth_a_retry),
            wait=wait_before_retry,
            stop=self._gives_up,
            sleep=self._pace.sleep,
            before=count_on,
            reraise=True,
        )
        try:
            completion: Completion = await retrying(self._try_once, messages, body, letters, entry)
        except HeldByOthers:
            tries = before + retrying.statistics["attempt_number"] - 1
            if entry.request_key and tries:
                self._tries_before[entry.request_key] = tries
            raise
        return replace(completion, attempts=before + retrying.statistics["attempt_number"])

    def _is_worth_a_retry(self, error: BaseException) -> bool:
        if not isinstance(error, CallFailed):
            return False
        # Once completions have come, a whole answer that is none comes from the model, and is paid
        # for; before that it may come from a gateway.
        if error.status == MALFORMED and self._gave_completions:
            return False
        return error.is_worth_a_retry

    def _gives_up(self, state: RetryCallState) -> bool:
        # In an outage tries are rare and spread over all questions: it would take long until one
        # of them comes to its last.
        if self._pace.is_open and self._pace.silent_s >= self._recipe.outage_s:
            return True
        return state.attempt_number >= self._recipe.attempts

    async def _try_once(
        self, messages: list[Message], body: dict[str, Any], letters: Sequence[str], entry: Call
    ) -> Completion:
        """Make one try and return its answer. Raises CallFailed. `entry` is the ledger's, without
        what each try has of its own."""
        prompt = "".join(message["content"] for message in messages)
        prompt_tokens = self._estimate_tokens(prompt)
        estimate = prompt_tokens + self._recipe.max_tokens
        # A cap must hold for any text, where the pace may err. A byte-level tokenizer makes at most
        # one token of a byte.
        most = Usage(
            prompt_tokens=len(prompt.encode()) + MESSAGE_TOKENS,
            completion_tokens=self._recipe.max_tokens,
        )
        reserved, asked_at = await self._admitted(most, estimate)
        try:
            call = self._try_of(entry, most)
            self._begin(call, reserved)
            used: Usage | None = None
            try:
                started = time.perf_counter()
                response = await self._complete_in_time(messages, body)
                latency_ms = (time.perf_counter() - started) * 1000
                used = usage_of(response.payload)
                call = self._counted(call, "answer", used)
                self._pace.succeeded(response.headers)
            except CallFailed as failure:
                used = failure.billed_usage(prompt_tokens)
                call = self._counted(call, outcome_of(failure), used)
                if used and used.prompt_tokens:
                    call = replace(call, is_counted=False)
                if failure.is_worth_a_retry:
                    failure.is_alone = self._concerns_one(entry.request_key, failure)
                    hold = None if failure.is_alone else failure.retry_after
                    self._pace.failed(asked_at, hold, failure.headers)
                else:
                    self._pace.succeeded(failure.headers)
                raise
            finally:
                self._spending.settle(reserved, used)
                if call.outcome != "answer":
                    self._book.record(call)
        finally:
            self._pace.done(asked_at)
        self._gave_completions = True
        if used:
            self._learn_tokens(prompt, estimate, used)
        last = self._recipe.answers.form == "rationale"
        completion = read_completion(
            response.payload,
            letters,
            last,
            self._endpoint.redact,
            self._recipe.stop,
            own_server=self._recipe.kind == "local",
        )
        if completion.finish_reason == "content_filter":
            call = replace(call, outcome="filtered")
        return replace(completion, latency_ms=latency_ms, call=call)

    def _concerns_one(self, key: str, failure: CallFailed) -> bool:
        """Return whether a question, told by its key, has to wait alone where the endpoint says how
        long: others were answered since it was refused before."""
        if not key or failure.retry_after is None:
            return False
        answered_before = self._answered_at_refusal.get(key)
        self._answered_at_refusal[key] = self._pace.answered_at
        return answered_before is not None and self._pace.answered_at > answered_before

    async def _admitted(self, most: Usage, tokens: int) -> tuple[Amounts, float]:
        """Wait until a call may be made that takes at most `most` and about `tokens` tokens. Return
        what it has reserved, for the budget, and the time, for the pace.

        The turn comes last: nobody has one while it waits for what other calls may leave.
        """
        while True:
            reserved = await self._spending.reserve(most)
            lapses = self._spending.lapses
            try:
                asked_at = await self._turn(tokens)
            except BaseException:
                self._spending.give_back(reserved)
                raise
            if self._spending.lapses == lapses:
                return reserved, asked_at
            self._pace.done(asked_at)
            self._spending.give_back(reserved)

    async def _turn(self, tokens: int) -> float:
        """Wait until a call of about `tokens` tokens may be made and the ledger can be written;
        return the time, for the pace."""
        while True:
            await self._book.ready()
            asked_at = await self._pace.turn(tokens)
            if not self._book.is_away:
                return asked_at
            self._pace.done(asked_at)

    def _begin(self, call: Call, reserved: Amounts) -> None:
        """Note in the ledger that a call begins. If that is not possible, it is not made."""
        try:
            self._book.begin(call)
        except BaseException:
            self._spending.give_back(reserved)
            raise

    def _entry(self, key: str, purpose: Purpose) -> Call:
        """Return the ledger's entry of a call that is yet to be made."""
        prices = self._recipe.prices
        return Call(
            run=self._payer.run,
            recipe=self._payer.recipe,
            teacher=self._endpoint.identity,
            purpose=purpose,
            outcome="lost",
            request_key=key,
            prices=prices.model_dump() if prices else None,
        )

    def _try_of(self, entry: Call, most: Usage) -> Call:
        """Return the entry of a try that begins now and may take `most`."""
        return replace(
            entry,
            call_id=new_call_id(),
            called_at=datetime.now(UTC),
            is_counted=False,
            **self._amounts(most),
        )

    def _counted(self, call: Call, outcome: Outcome, used: Usage | None) -> Call:
        """Return the entry of a try that has ended. Where `used` is not known, it stays at the most
        that the try can have taken."""
        if used is None:
            return replace(call, outcome=outcome)
        return replace(call, outcome=outcome, is_counted=True, **self._amounts(used))

    def _amounts(self, usage: Usage) -> dict[str, Any]:
        """Return the fields of an entry that say what a call takes."""
        return {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "cost": cost_of(usage, self._recipe.prices),
        }

    async def _complete_in_time(self, messages: list[Message], body: dict[str, Any]) -> Response:
        try:
            async with asyncio.timeout(self._recipe.timeout_s):
                return await self._client.complete(messages, body)
        except TimeoutError:
            raise CallFailed(None, "timeout", timed_out=True) from None

    def _estimate_tokens(self, prompt: str) -> int:
        per_character = self._tokens_per_character or FIRST_TOKENS_PER_CHARACTER
        return math.ceil(len(prompt) * per_character) + MESSAGE_TOKENS

    def _learn_tokens(self, prompt: str, estimate: int, used: Usage) -> None:
        """Tell the pace what the call took, and keep the most tokens per character seen so far."""
        if prompt:
            seen = used.prompt_tokens / len(prompt)
            self._tokens_per_character = max(seen, self._tokens_per_character or 0.0)
        self._pace.settle(used.prompt_tokens + used.completion_tokens - estimate)

    def _drop_refused_option(self, tried: CallOptions, failure: CallFailed) -> None:
        """Leave out from now on what the endpoint refused; raise the error that ends the run if it
        refused none of `tried`."""
        if failure.status not in (400, 422):
            raise self._final_error(failure) from None
        if self._options != tried:
            # Another worker has left something out meanwhile, perhaps the same.
            return
        accepted = tried.without_refused(failure.param or failure.message)
        if accepted is None:
            raise self._final_error(failure) from None
        drops_log_probabilities = tried.top_logprobs and not accepted.top_logprobs
        if drops_log_probabilities and self._demand_log_probabilities:
            raise self._no_log_probabilities(f"refuses them ({failure.status})") from None
        self._options = accepted

    def _check_log_probabilities(self, options: CallOptions, completion: Completion) -> None:
        """Raise TeacherError if the endpoint leaves out the log-probabilities that `options` ask
        for, unless it has given some before or the answer was blocked."""
        if completion.top_logprobs is not None:
            self._gave_log_probabilities = True
            return
        if not options.top_logprobs or not self._demand_log_probabilities:
            return
        if not completion.text or completion.finish_reason == "content_filter":
            return
        if not self._gave_log_probabilities:
            raise self._no_log_probabilities("leaves them out")

    def _no_log_probabilities(self, what: str) -> TeacherError:
        return TeacherError(
            f"{self._recipe.section}.soft_labels: asks for log-probabilities, and "
            f"{self._endpoint.url} {what}; set {self._recipe.section}.soft_labels: false, or use a "
            "model that gives them"
        )

    def _final_error(self, failure: CallFailed) -> DistilleryError:
        return final_error(failure, self._endpoint, self._recipe.attempts, self._recipe.timeout_s)


def outcome_of(failure: CallFailed) -> Outcome:
    """Return the ledger's word for a try that gave no completion."""
    if failure.status == MALFORMED:
        return "malformed"
    if failure.question_refusal == "content_filter":
        return "filtered"
    return "retried" if failure.is_worth_a_retry else "refused"


def wait_before_retry(state: RetryCallState) -> float:
    """Return the seconds until the next try: exponential with jitter. If the endpoint says how
    long to wait, the pace holds all workers for that time, so that only the jitter is left, unless
    the question waits alone."""
    failure = state.outcome.exception() if state.outcome else None
    if isinstance(failure, CallFailed) and failure.retry_after is not None:
        alone = min(failure.retry_after, LONGEST_WAIT_S) if failure.is_alone else 0.0
        return alone + wait_random(0, 0.25)(state)
    return BACKOFF(state)


@dataclass(frozen=True)
class ProbeResult:
    """What one short question showed: whether the endpoint `answers` with text, and with
    `log_probabilities`."""

    answers: bool
    log_probabilities: bool
    model_version: str
    latency_ms: float


async def probe(
    recipe: TeacherRecipe,
    endpoint: Endpoint,
    book: Book | None = None,
    payer: Payer | None = None,
) -> ProbeResult:
    """Ask one short question, in at most two tries. `book` and `payer` as in `Teacher`. Raises
    what `Teacher.ask` raises."""
    wanted = recipe.model_copy(update={"soft_labels": True, "attempts": min(recipe.attempts, 2)})
    async with Teacher(
        wanted,
        endpoint,
        demand_log_probabilities=False,
        book=book,
        payer=payer,
        purpose="probe",
    ) as teacher:
        completion = await teacher.ask(PROBE, ("A", "B"))
    if book and completion.call:
        book.record(completion.call)
    return ProbeResult(
        answers=bool(completion.text.strip()),
        log_probabilities=completion.top_logprobs is not None,
        model_version=completion.model_version,
        latency_ms=completion.latency_ms,
    )
