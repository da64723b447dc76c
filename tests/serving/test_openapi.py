"""The server against two schemas: its own OpenAPI document, by schemathesis, and the openai
package's own types, strictly."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis_checks
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject
from own_server import OwnServer, own_server
from pydantic import BaseModel

from distillery.serving.limits import LONGEST_STOP, MOST_MESSAGES, MOST_STOPS, MOST_TOKENS
from distillery.serving.openapi import openapi_document
from distillery.serving.student import ServedStudent

pytestmark = pytest.mark.security

CHAT = "/v1/chat/completions"
EXAMPLES = 150
"""Requests that schemathesis makes for each operation and kind of data, at most."""

MALFORMED = int(os.environ.get("MALFORMED_REQUESTS", "2000"))
"""Requests that break the document. `MALFORMED_REQUESTS=10000 pytest -s -k malformed` takes six
minutes: none of them was answered by a status from 500 on."""

BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Where is bread warm?"}],
    "max_tokens": 6,
}


@pytest.fixture(scope="module")
def running(tiny_onnx: Callable[..., Path]) -> Iterator[OwnServer]:
    with own_server(ServedStudent(tiny_onnx("llama"), threads=1)) as started:
        yield started


def own_fields(answer: BaseModel) -> None:
    """Fail for a field that the openai package does not know."""
    assert not answer.model_extra
    for _, value in answer:
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, BaseModel):
                own_fields(each)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"logprobs": True, "top_logprobs": 3},
        {"stop": "e"},
        {"response_format": {"type": "json_object"}, "logprobs": True},
        {"structured_outputs": {"choice": ["a", "b"]}, "logprobs": True, "top_logprobs": 2},
    ],
)
def test_answers_are_of_openai_s_own_types(changed: dict[str, Any], running: OwnServer) -> None:
    with httpx.Client(trust_env=False, timeout=60, base_url=running.url) as http:
        whole = http.post(CHAT, json=BODY | changed).text
        options = {"stream": True, "stream_options": {"include_usage": True}}
        lines = http.post(CHAT, json=BODY | changed | options).text
    own_fields(ChatCompletion.model_validate_json(whole, strict=True))
    *events, done = lines.strip().split("\n\n")
    assert done == "data: [DONE]"
    for event in events:
        chunk = ChatCompletionChunk.model_validate_json(event.removeprefix("data: "), strict=True)
        own_fields(chunk)


def test_models_and_errors_are_of_openai_s_own_types(running: OwnServer) -> None:
    with httpx.Client(trust_env=False, timeout=60, base_url=running.url) as http:
        models = http.get("/v1/models").json()
        one = http.get("/v1/models/tiny").text
        errors = [
            http.get("/v1/models/other"),
            http.get("/v1/nothing"),
            http.post(CHAT, json={}),
            http.post(CHAT, content=b"{}"),
            http.post(CHAT, json=BODY | {"model": "other"}),
            http.put(CHAT, json=BODY),
            http.get("/healthz", headers={"Host": "evil.example"}),
        ]
    assert models.keys() == {"object", "data"}
    for text in (one, *map(json.dumps, models["data"])):
        own_fields(Model.model_validate_json(text, strict=True))
    statuses = [404, 404, 400, 415, 404, 405, 421]
    assert [error.status_code for error in errors] == statuses
    for error in errors:
        body = error.json()
        assert body.keys() == {"error"}
        own_fields(ErrorObject.model_validate(body["error"], strict=True))


@pytest.mark.slow
def test_schemathesis_finds_no_answer_that_its_document_does_not_tell(
    running: OwnServer, tmp_path: Path
) -> None:
    """A fixed budget and no chance. The check of what is allowed is our own, because the document
    can't say that a prompt is longer than the context."""
    options = ["--phases", "coverage,fuzzing", "--max-examples", str(EXAMPLES)]
    options += ["--exclude-checks", "positive_data_acceptance"]
    found = schemathesis(running, tmp_path, *options)
    assert found["operations"]["tested"] == 5
    assert found["test_cases"]["generated"] > 400


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_malformed_requests_end_in_no_error_of_the_server(
    running: OwnServer, tmp_path: Path
) -> None:
    """None is answered by a status from 500 on, and none takes longer than 30 seconds."""
    options = ["--phases", "fuzzing", "--mode", "negative", "--max-examples", str(MALFORMED)]
    options += ["--include-path", CHAT, "--checks", "not_a_server_error"]
    found = schemathesis(running, tmp_path, *options, "--request-timeout", "30")
    assert found["test_cases"]["generated"] >= MALFORMED


def schemathesis(running: OwnServer, folder: Path, *options: str) -> dict[str, Any]:
    """Return the report of a run that found nothing; the server still answers then."""
    report = folder / "report.json"
    command = [str(Path(sys.executable).parent / "schemathesis"), "run"]
    command += [f"{running.url}/v1/openapi.json", "--generation-deterministic"]
    command += ["--continue-on-failure", "--report-json-path", str(report), *options]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "SCHEMATHESIS_HOOKS": schemathesis_checks.__file__},
    )
    found: dict[str, Any] = json.loads(report.read_text())
    print(f"schemathesis tried {found['test_cases']['generated']} requests")
    assert done.returncode == 0, done.stdout
    assert running.server.places == 0
    with httpx.Client(trust_env=False, timeout=60, base_url=running.url) as http:
        assert http.post(CHAT, json=BODY).status_code == 200
    return found


def test_the_document_has_the_server_s_own_bounds() -> None:
    document = openapi_document(with_key=True)
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    (tokens, _) = fields["max_tokens"]["anyOf"]
    assert (tokens["minimum"], tokens["maximum"]) == (1, MOST_TOKENS)
    text, texts, _ = fields["stop"]["anyOf"]
    assert (text["maxLength"], texts["maxItems"]) == (LONGEST_STOP, MOST_STOPS)
    assert fields["messages"]["maxItems"] == MOST_MESSAGES
    assert document["paths"]["/v1/chat/completions"]["post"]["security"]
    assert "security" not in document["paths"]["/healthz"]["get"]
