"""Asking the teacher: both SDKs against a real HTTP endpoint."""

import asyncio
import email.utils
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from chat_endpoint import (
    Call,
    ChatEndpoint,
    Reply,
    Script,
    completion,
    good,
    refused,
    replies,
    said,
)
from exception_text import exception_text
from leaping_loop import leaping, now
from pydantic import SecretStr

from distillery.errors import CredentialsError, TeacherError, TeacherUnavailable
from distillery.prompts import Message
from distillery.recipe import TeacherRecipe
from distillery.settings import TeacherSettings
from distillery.teacher.asking import Teacher, probe
from distillery.teacher.clients import Response
from distillery.teacher.endpoint import Endpoint, Sdk, resolve_endpoint
from distillery.teacher.failures import CallFailed
from distillery.teacher.pace import Pace
from distillery.teacher.reply import Completion

KEY = "key-7f3a-very-secret"
MESSAGES = [
    {"role": "system", "content": "A or B or C"},
    {"role": "user", "content": "Which temperature?"},
]
LETTERS = ("A", "B", "C")


pytestmark = pytest.mark.usefixtures("no_backoff")


def endpoint_of(server: ChatEndpoint, sdk: Sdk, key: str | None = KEY) -> Endpoint:
    return Endpoint(server.url, "gpt-test", SecretStr(key) if key else None, "gpt-test", sdk)


async def ask(
    script: Script, sdk: Sdk, times: int = 1, **recipe: Any
) -> tuple[list[Completion], list[Call]]:
    """Ask one question so many times; return the answers and the calls that the endpoint got."""
    with ChatEndpoint(script) as server:
        async with Teacher(TeacherRecipe(**recipe), endpoint_of(server, sdk)) as teacher:
            return [await teacher.ask(MESSAGES, LETTERS) for _ in range(times)], server.calls


async def fails(script: Script, sdk: Sdk, **recipe: Any) -> tuple[Exception, list[Call]]:
    """Ask a question that ends in an error; return it and the calls that the endpoint got."""
    with ChatEndpoint(script) as server:
        async with Teacher(TeacherRecipe(**recipe), endpoint_of(server, sdk)) as teacher:
            with pytest.raises((TeacherError, CredentialsError)) as caught:
                await teacher.ask(MESSAGES, LETTERS)
        assert "\n" not in str(caught.value)
        return caught.value, server.calls


async def test_asks_for_what_the_recipe_says_and_reads_the_answer(sdk: Sdk) -> None:
    reply = said("B", top={"B": 0.8, " B": 0.1, "A": 0.05})
    (answer,), (call,) = await ask(
        lambda call: reply, sdk, soft_labels=True, max_tokens=7, temperature=0.5
    )
    assert call.path.split("?")[0] == "/v1/chat/completions"
    assert call.key == KEY
    assert call.body == {
        "model": "gpt-test",
        "messages": MESSAGES,
        "max_tokens": 7,
        "temperature": 0.5,
        "logprobs": True,
        "top_logprobs": 20,
    }
    assert (answer.text, answer.finish_reason, answer.answer_letter) == ("B", "stop", "B")
    assert [token for token, _ in answer.top_logprobs or ()] == ["B", " B", "A"]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (40, 1)
    assert answer.model_version == "teacher-2026-01-01"
    assert answer.attempts == 1
    assert answer.latency_ms > 0


async def test_asks_for_no_log_probabilities_and_no_temperature_where_the_recipe_has_none(
    sdk: Sdk,
) -> None:
    _, (call,) = await ask(good, sdk, soft_labels=False, temperature=None)
    assert set(call.body) == {"model", "messages", "max_tokens"}


async def test_log_probabilities_are_those_at_the_answer_and_not_in_the_thinking(sdk: Sdk) -> None:
    body = completion("<think>Is it C </think> Answer: A", top={"A": 0.9, "C": 0.1})
    for token in body["choices"][0]["logprobs"]["content"][:-1]:
        token["top_logprobs"] = [{"token": "C", "logprob": -0.1, "bytes": None}]
    (answer,), _ = await ask(lambda call: Reply(body), sdk, soft_labels=True)
    assert answer.answer_letter == "A"
    assert [token for token, _ in answer.top_logprobs or ()] == ["A", "C"]


async def test_takes_back_what_the_endpoint_refuses_once_for_the_whole_run(sdk: Sdk) -> None:
    def script(call: Call) -> Reply:
        if "max_tokens" in call.body:
            return refused(
                400,
                "'max_tokens' is not supported, use 'max_completion_tokens'",
                param="max_tokens",
            )
        if "temperature" in call.body:
            return refused(
                400, "Unsupported value: 'temperature' does not support 0 with this model", code="x"
            )
        if call.body.get("top_logprobs", 0) > 5:
            return refused(422, "top_logprobs: Input should be less than or equal to 5")
        return good(call)

    answers, calls = await ask(script, sdk, times=3, soft_labels=True)
    assert len(answers) == 3
    assert len(calls) == 3 + 3
    assert set(calls[-1].body) == {
        "model",
        "messages",
        "max_completion_tokens",
        "logprobs",
        "top_logprobs",
    }
    assert calls[-1].body["max_completion_tokens"] == 16
    assert calls[-1].body["top_logprobs"] == 5


async def test_a_refusal_of_another_parameter_takes_nothing_back(sdk: Sdk) -> None:
    error, calls = await fails(
        lambda call: refused(400, "temperature or so", param="messages"), sdk
    )
    assert len(calls) == 1
    assert "400: temperature or so" in str(error)


@pytest.mark.parametrize(
    "reply",
    [
        refused(400, "'logprobs' is not supported with this model", param="logprobs"),
        Reply(
            {"detail": [{"type": "extra_forbidden", "loc": ["body", "logprobs"], "input": True}]},
            422,
        ),
        said("A"),
    ],
    ids=["refused", "refused by FastAPI", "left out"],
)
async def test_soft_labels_from_an_endpoint_without_log_probabilities(
    sdk: Sdk, reply: Reply
) -> None:
    error, calls = await fails(lambda call: reply, sdk, soft_labels=True)
    assert type(error) is TeacherError
    assert "set teacher.soft_labels: false" in str(error)
    assert len(calls) == 1


@pytest.mark.parametrize("status", [401, 403])
async def test_a_wrong_key_is_named_and_never_shown(sdk: Sdk, status: int) -> None:
    error, calls = await fails(
        lambda call: refused(status, f"Incorrect API key provided: {call.key}"), sdk
    )
    assert type(error) is CredentialsError
    assert str(error).startswith("TEACHER_MODEL_KEY: refused by http://127.0.0.1")
    assert len(calls) == 1
    assert KEY not in exception_text(error)


@pytest.mark.parametrize("status", [400, 404, 429, 500])
async def test_no_error_shows_a_key_that_the_endpoint_echoes(sdk: Sdk, status: int) -> None:
    error, _ = await fails(
        lambda call: refused(status, f"odd: {call.key}", code=call.key), sdk, attempts=1
    )
    assert KEY not in exception_text(error)


async def test_an_answer_that_echoes_the_key_is_kept_without_it(sdk: Sdk) -> None:
    (answer,), _ = await ask(lambda call: said(f"Your key is {call.key}"), sdk)
    assert answer.text == "Your key is ***"


@pytest.mark.parametrize(
    "reply", [refused(404, "no such route"), refused(400, "Unknown model", code="unknown_model")]
)
async def test_an_unknown_model_names_both_settings(sdk: Sdk, reply: Reply) -> None:
    error, calls = await fails(lambda call: reply, sdk)
    assert type(error) is TeacherError
    assert "TEACHER_MODEL_NAME gpt-test" in str(error)
    assert "TEACHER_MODEL_ENDPOINT http://127.0.0.1" in str(error)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "trouble",
    [*(refused(status, "later") for status in (408, 409, 429, 500, 503)), Reply(drop=True)],
    ids=["408", "409", "429", "500", "503", "dropped"],
)
async def test_passing_trouble_is_tried_again_and_no_more_often_than_the_recipe_says(
    sdk: Sdk, trouble: Reply
) -> None:
    (answer,), calls = await ask(replies([trouble, trouble]), sdk, attempts=3)
    assert answer.text in LETTERS
    assert answer.attempts == 3
    assert len(calls) == 3
    error, calls = await fails(lambda call: trouble, sdk, attempts=3)
    assert type(error) is TeacherUnavailable
    assert "after 3 tries" in str(error)
    assert len(calls) == 3


async def test_a_slow_answer_is_given_up(sdk: Sdk) -> None:
    error, _ = await fails(lambda call: Reply(delay=30), sdk, attempts=1, timeout_s=0.2)
    assert type(error) is TeacherUnavailable
    assert "no answer within 0.2 s" in str(error)


async def test_an_endpoint_that_is_down(sdk: Sdk) -> None:
    with ChatEndpoint() as server:
        endpoint = endpoint_of(server, sdk)
    async with Teacher(TeacherRecipe(attempts=2), endpoint) as teacher:
        with pytest.raises(
            TeacherUnavailable, match=r"TEACHER_MODEL_ENDPOINT .* can't be reached after 2 tries"
        ):
            await teacher.ask(MESSAGES, LETTERS)


class ImpatientPace(Pace):
    """Keeps what the endpoint said of when to come back, and does not wait for it."""

    def __init__(self) -> None:
        super().__init__(8)
        self.told: list[float | None] = []

    def failed(self, asked_at: float, retry_after: float | None, headers: Any) -> None:
        self.told.append(retry_after)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry_after": "1"}, 1),
        ({"retry_after": email.utils.formatdate(1.7e9 + 2, usegmt=True)}, 2),
        ({"retry_after_ms": "1000"}, 1),
    ],
    ids=["seconds", "date", "milliseconds"],
)
async def test_retry_after_reaches_the_pace(
    sdk: Sdk, headers: dict[str, str], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(time=lambda: 1.7e9)
    monkeypatch.setattr("distillery.teacher.failures.time", clock)
    pace = ImpatientPace()
    with ChatEndpoint(replies([refused(429, "slow down", **headers)])) as server:
        async with Teacher(TeacherRecipe(), endpoint_of(server, sdk), pace=pace) as teacher:
            answer = await teacher.ask(MESSAGES, LETTERS)
    assert answer.attempts == len(server.calls) == 2
    assert pace.told == [seconds]


class BusyClient:
    """Refuses the first call for `seconds`, and answers the others; `asked` is when each came."""

    def __init__(self, seconds: float) -> None:
        self._headers = {"retry-after": str(seconds)}
        self.asked: list[float] = []

    async def complete(self, messages: list[Message], body: dict[str, Any]) -> Response:
        self.asked.append(now())
        if len(self.asked) == 1:
            raise CallFailed(429, "", self._headers)
        return Response(completion("A"), {})

    async def close(self) -> None:
        pass


@leaping
async def test_the_next_try_comes_when_retry_after_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = BusyClient(seconds=30)
    monkeypatch.setattr("distillery.teacher.pace.time", SimpleNamespace(monotonic=now))
    monkeypatch.setattr("distillery.teacher.asking.open_client", lambda *_: client)
    endpoint = Endpoint("http://127.0.0.1/v1", "m", SecretStr(KEY), "m", "openai")
    async with Teacher(TeacherRecipe(), endpoint) as teacher:
        answer = await teacher.ask(MESSAGES, LETTERS)
    first, second = client.asked
    assert answer.text == "A"
    assert second - first == pytest.approx(30, abs=0.3)


class PickyClient(BusyClient):
    """Refuses one question again and again for `seconds`, and answers the others."""

    async def complete(self, messages: list[Message], body: dict[str, Any]) -> Response:
        if "picky" not in messages[-1]["content"]:
            return Response(completion("A"), {})
        self.asked.append(now())
        raise CallFailed(429, "", self._headers)


@leaping
async def test_a_question_that_is_always_refused_holds_the_others_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = PickyClient(seconds=30)
    monkeypatch.setattr("distillery.teacher.pace.time", SimpleNamespace(monotonic=now))
    monkeypatch.setattr("distillery.teacher.asking.open_client", lambda *_: client)
    endpoint = Endpoint("http://127.0.0.1/v1", "m", SecretStr(KEY), "m", "openai")
    picky: list[Message] = [{"role": "user", "content": "picky"}]
    answered = [now()]
    async with Teacher(TeacherRecipe(attempts=4), endpoint) as teacher:
        refusal = asyncio.create_task(teacher.ask(picky, LETTERS, key="picky"))
        while not refusal.done():
            await teacher.ask(MESSAGES, LETTERS, key="other")
            answered.append(now())
            await asyncio.sleep(1)
        with pytest.raises(TeacherUnavailable):
            await refusal
    gaps = [later - earlier for earlier, later in itertools.pairwise(answered)]
    assert sum(gap > 5 for gap in gaps) == 1
    tries = [later - earlier for earlier, later in itertools.pairwise(client.asked)]
    assert len(tries) == 3
    assert min(tries) >= 30


async def test_a_content_filter_concerns_one_question(sdk: Sdk) -> None:
    blocked = refused(
        400, "The response was filtered (temperature)", code="content_filter", param="prompt"
    )
    answers, calls = await ask(replies([blocked]), sdk, times=2)
    assert [answer.finish_reason for answer in answers] == ["content_filter", "stop"]
    assert answers[0].text == ""
    assert len(calls) == 2


@pytest.mark.parametrize(
    "body", [{**completion("A"), "choices": []}, {}], ids=["no choices", "empty object"]
)
async def test_a_response_without_choices_is_an_empty_answer(
    sdk: Sdk, body: dict[str, Any]
) -> None:
    (answer,), _ = await ask(lambda call: Reply(body), sdk)
    assert answer.text == ""


@pytest.mark.parametrize("reply", [Reply("<html>portal</html>"), Reply([1]), Reply("x", 302)])
async def test_what_is_no_completion_names_the_endpoint(sdk: Sdk, reply: Reply) -> None:
    error, _ = await fails(lambda call: reply, sdk)
    assert "TEACHER_MODEL_ENDPOINT" in str(error)
    assert "check that it is a chat-completions endpoint" in str(error)


async def test_a_server_on_this_machine_may_ask_for_no_key(sdk: Sdk) -> None:
    with ChatEndpoint() as server:
        settings = TeacherSettings(
            model="m", endpoint=f"{server.url}/chat/completions", key=SecretStr("")
        )
        endpoint = resolve_endpoint(TeacherRecipe(sdk=sdk), settings)
        assert endpoint == Endpoint(server.url, "m", None, "m", sdk)
        async with Teacher(TeacherRecipe(), endpoint) as teacher:
            assert (await teacher.ask(MESSAGES, LETTERS)).text in LETTERS


async def test_probe_says_what_the_endpoint_gives(sdk: Sdk) -> None:
    with ChatEndpoint() as server:
        found = await probe(TeacherRecipe(), endpoint_of(server, sdk))
        assert (found.answers, found.log_probabilities) == (True, True)
        assert found.model_version == "teacher-2026-01-01"
        server.script = lambda call: said("B")
        assert not (
            await probe(TeacherRecipe(soft_labels=True), endpoint_of(server, sdk))
        ).log_probabilities
        server.script = lambda call: (
            refused(400, "no", param="logprobs") if "logprobs" in call.body else said("")
        )
        found = await probe(TeacherRecipe(), endpoint_of(server, sdk))
        assert (found.answers, found.log_probabilities) == (False, False)
