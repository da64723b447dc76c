"""Written answers over HTTP: their limit, and schemas, the model's own and those of requests."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from own_server import pieces_of

from distillery.data.examples import write_format
from distillery.inference.generation import Steps
from distillery.inference.onnx_student import OnnxStudent
from distillery.records import AnswerFormat
from distillery.serving.completion import Job
from distillery.serving.limits import LONGEST_SCHEMA
from distillery.serving.process import Served, served
from distillery.serving.requests import ApiError, ChatRequest
from distillery.serving.student import ServedStudent

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["oven", "a bridge"]}},
    "required": ["kind"],
    "additionalProperties": False,
}
OTHER: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"enum": [1, 22, 333]}, "é": {"const": "ü\n"}},
    "required": ["n", "é"],
    "additionalProperties": False,
}
MESSAGES: Any = [{"role": "user", "content": "Where is bread warm?"}]
FIELDS = AnswerFormat(max_tokens=40, json_schema=SCHEMA, metric="field_f1")
TEXT = AnswerFormat(max_tokens=7, metric="rouge_l")


def folder_with(form: AnswerFormat, source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    write_format(target, form)
    return target


@pytest.fixture(scope="module")
def fields(
    tiny_onnx: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = folder_with(FIELDS, tiny_onnx("llama"), tmp_path_factory.mktemp("fields") / "model")
    with served(folder, "tiny", threads=1) as server:
        yield server


def client_of(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key=server.key.get_secret_value(), max_retries=0)


def asked_with(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("form", "schema"),
    [
        (None, SCHEMA),
        (asked_with(OTHER), OTHER),
        (asked_with(OTHER, strict=True, description="An answer."), OTHER),
        ({"type": "json_object"}, SCHEMA),
    ],
)
def test_an_answer_meets_the_schema(
    fields: Served, form: Any, schema: dict[str, Any], stream: bool
) -> None:
    """Even of a random model, and of one that draws its tokens."""
    body: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 1.5, "seed": 4}
    if form:
        body["response_format"] = form
    with client_of(fields) as client:
        if stream:
            chunks = list(client.chat.completions.create(stream=True, **body))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            choice = client.chat.completions.create(**body).choices[0]
            text, reason = choice.message.content, choice.finish_reason
    assert reason == "stop"
    found = json.loads(text)
    assert found.keys() == schema["properties"].keys()
    assert text == json.dumps(found, ensure_ascii=False), "no token is spent on other blanks"


def test_log_probabilities_are_the_model_s_own(fields: Served) -> None:
    """Held or not, a token is as probable as the model finds it."""
    with client_of(fields) as client:
        made = client.chat.completions.create(
            model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3
        )
    content = made.choices[0].logprobs
    assert content
    assert content.content
    first = content.content[0]
    assert first.token.startswith("{")
    assert first.logprob < first.top_logprobs[0].logprob, "the model would say something else"
    assert made.usage
    assert made.usage.completion_tokens == len(content.content)


@pytest.mark.parametrize("stream", [False, True])
def test_those_for_labels_are_of_what_may_follow(
    tiny_onnx: Callable[..., Path], tmp_path: Path, stream: bool
) -> None:
    """With the end of the turn, and the bytes of parts of characters."""
    folder = folder_with(FIELDS, tiny_onnx("llama"), tmp_path / "model")
    body: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 1.5, "seed": 4}
    body |= {"logprobs": True, "top_logprobs": 3, "response_format": asked_with(OTHER)}
    with served(folder, "tiny", threads=1, for_labels=True) as server, client_of(server) as client:
        if stream:
            chunks = list(client.chat.completions.create(stream=True, **body))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            parts = [chunk.choices[0].logprobs for chunk in chunks]
            content = [entry for part in parts if part for entry in part.content or ()]
        else:
            choice = client.chat.completions.create(**body).choices[0]
            assert choice.logprobs
            text, content = str(choice.message.content), choice.logprobs.content or []
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode() == text
    assert any(entry.token == "\ufffd" for entry in content), "a part of a character"
    *_, last = content
    assert (last.token, last.bytes, last.logprob) == ("<|im_end|>", [], 0.0)
    assert [other.logprob for other in last.top_logprobs] == [0.0, -9999.0, -9999.0]
    named = [entry.top_logprobs for entry in content if entry.top_logprobs[1].logprob == -9999.0]
    assert len(named) > len(content) / 2, "the schema leaves one token at most places"


def test_bytes_that_nobody_knows_are_told(tiny_onnx: Callable[..., Path], tmp_path: Path) -> None:
    folder = folder_with(TEXT, tiny_onnx("llama"), tmp_path / "model")
    student = ServedStudent(folder, threads=1, for_labels=True)
    student.end_ids = frozenset()
    broken = json.loads((folder / "tokenizer.json").read_text())
    broken["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(broken))
    request = ChatRequest.model_validate({"messages": MESSAGES, "logprobs": True})
    with pytest.raises(ApiError, match=r"^logprobs: .* with this tokenizer") as caught:
        pieces_of(student, Job(request))
    assert caught.value.status == 400


def test_text_is_asked_for_and_the_limit_of_the_request_counts(fields: Served) -> None:
    with client_of(fields) as client:
        free = client.chat.completions.create(
            model="tiny", messages=MESSAGES, response_format={"type": "text"}, max_tokens=5
        )
        cut = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=3)
        one = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1)
    assert not str(free.choices[0].message.content).startswith("{")
    assert cut.choices[0].finish_reason == "length"
    assert str(cut.choices[0].message.content).startswith("{")
    assert str(one.choices[0].message.content).startswith("{")


@pytest.mark.parametrize(
    ("form", "told"),
    [
        (asked_with({"type": "strin"}), "Invalid type"),
        (asked_with({"$ref": "http://127.0.0.1:9/x"}), "127.0.0.1:9"),
        (asked_with({"type": "array", "uniqueItems": True}, strict=True), "uniqueItems"),
        (asked_with({"description": "x" * LONGEST_SCHEMA}), "a schema may have 65536 characters"),
        ({"type": "json_schema"}, "json_schema: Field required"),
        ({"type": "xml"}, "response_format"),
    ],
)
def test_a_schema_that_can_t_be_held_is_refused(fields: Served, form: Any, told: str) -> None:
    with client_of(fields) as client, pytest.raises(openai.BadRequestError, match=told):
        client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=form)


def test_a_choice_among_texts_is_no_json(fields: Served) -> None:
    body = {
        "messages": MESSAGES,
        "structured_outputs": {"choice": ["a", "b"]},
        "response_format": {"type": "json_object"},
    }
    headers = {"Authorization": f"Bearer {fields.key.get_secret_value()}"}
    answer = httpx.post(
        f"{fields.url}/chat/completions", json=body, headers=headers, trust_env=False
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format"


def test_free_text_ends_at_the_limit_of_its_format(
    tiny_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    folder = folder_with(TEXT, tiny_onnx("llama"), tmp_path / "model")
    student = OnnxStudent(folder, threads=1)
    prompt = student.tokenizer.encode_chat(MESSAGES)
    expected = student.write(prompt, TEXT)
    assert (expected.tokens, expected.finished) == (7, False), "a random model does not end"
    with served(folder, "tiny", threads=1) as server, client_of(server) as client:
        default = client.chat.completions.create(model="tiny", messages=MESSAGES)
        longer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20)
    assert default.choices[0].finish_reason == "length"
    # One more, since the eighth could have been the end.
    assert default.usage
    assert default.usage.completion_tokens == 8
    assert longer.usage
    assert longer.usage.completion_tokens == 20


class SpeakingStudent(ServedStudent):
    """A student that says these tokens."""

    said: tuple[int, ...] = ()

    def steps(self, *_: Any, **__: Any) -> Steps:
        for token in self.said:
            yield token, np.zeros(512, np.float32)


@pytest.mark.parametrize("end", [(), (2,)], ids=["cut off", "ended"])
@pytest.mark.parametrize("cut", [0, 1, 2], ids=["whole", "in a character", "in another"])
def test_the_pieces_of_a_text_are_the_whole_text(
    tiny_onnx: Callable[..., Path], cut: int, end: tuple[int, ...]
) -> None:
    """Of characters that take several tokens, with and without texts that stop it."""
    student = SpeakingStudent(tiny_onnx("llama"), threads=1)
    tokens = student.tokenizer.encode_text('面包 "🥖" 👩‍🍳')
    tokens = tokens[: len(tokens) - cut]
    student.said = (*tokens, *end)
    whole = student.text_of(tokens)
    assert whole.endswith("\ufffd") is (cut > 0)
    body: dict[str, Any] = {"messages": MESSAGES, "temperature": 0}
    found = {}
    for stops in ((), ("never", "🥖!"), ('🥖"',), ("\ufffd",)):
        request = ChatRequest(**body, stop=list(stops))
        pieces = pieces_of(student, Job(request))
        found[stops] = "".join(piece.text for piece in pieces), pieces[-1].finish_reason
    reason = "stop" if end else "length"
    assert found[()] == found["never", "🥖!"] == (whole, reason)
    assert found['🥖"',] == ('面包 "', "stop")
    assert found["\ufffd",] == (whole.partition("\ufffd")[0], "stop" if cut else reason)
