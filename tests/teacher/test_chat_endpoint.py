"""The tests' own endpoint speaks as OpenAI's published schema says: read strictly by the types that
the package `openai` generates from it, with every key that the schema requires. A stand-in that
leaves a key out would hide that the code needs it to be left out."""

import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from chat_endpoint import ChatEndpoint, Reply, good, refused, replies, said
from openai.types import ErrorObject
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

MESSAGE_KEYS = {"role", "content", "refusal"}
CHOICE_KEYS = {"index", "message", "logprobs", "finish_reason"}
TOKEN_KEYS = {"token", "logprob", "bytes", "top_logprobs"}
"""What CreateChatCompletionResponse requires, also where it may be null: the package's types do
without."""


def posted(server: ChatEndpoint, **body: Any) -> tuple[int, Any]:
    """Return the status and the JSON of an answer, as it came over HTTP."""
    content = {"model": "m", "messages": [{"role": "user", "content": "Which?"}], **body}
    request = urllib.request.Request(
        f"{server.url}/chat/completions",
        json.dumps(content).encode(),
        {"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def unknown_keys(value: Any) -> list[str]:
    """Return the keys that no type of the package knows, at any depth."""
    if isinstance(value, list):
        return [key for each in value for key in unknown_keys(each)]
    if not isinstance(value, BaseModel):
        return []
    found = list(value.model_extra or {})
    for name in value.__class__.model_fields:
        found += unknown_keys(getattr(value, name))
    return found


@pytest.mark.parametrize(
    ("reply", "logprobs"),
    [
        (None, False),
        (None, True),
        (said("Answer: B"), False),
        (said("", finish_reason="length"), False),
        (said("So: B", top={"B": 0.75, " B": 0.125}), True),
    ],
)
def test_an_answer_is_what_the_schema_says(reply: Reply | None, logprobs: bool) -> None:
    with ChatEndpoint(replies([reply] if reply else [], good)) as server:
        status, body = posted(server, logprobs=logprobs)
    assert status == 200
    found = ChatCompletion.model_validate_json(json.dumps(body), strict=True)
    assert unknown_keys(found) == []
    (choice,) = body["choices"]
    assert choice.keys() >= CHOICE_KEYS
    assert choice["message"].keys() >= MESSAGE_KEYS
    assert (choice["logprobs"] is not None) == logprobs
    if logprobs:
        assert {"content", "refusal"} <= choice["logprobs"].keys()
        tokens = choice["logprobs"]["content"]
        assert all(token.keys() == TOKEN_KEYS for token in tokens)
        assert "".join(token["token"] for token in tokens) == choice["message"]["content"]
        assert all(-9999 <= token["logprob"] <= 0 for token in tokens)
    assert found.usage is not None
    total = found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.usage.total_tokens == total


def test_an_error_is_what_the_schema_says() -> None:
    error = refused(429, "Slow down.", code="rate_limit_exceeded", param="model", Retry_After="1")
    with ChatEndpoint(replies([error, refused(400, "No.")])) as server:
        answers = [posted(server), posted(server)]
    assert [status for status, _ in answers] == [429, 400]
    for _, body in answers:
        assert body.keys() == {"error"}
        found = ErrorObject.model_validate_json(json.dumps(body["error"]), strict=True)
        assert unknown_keys(found) == []
