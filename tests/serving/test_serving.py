"""The server over real HTTP, through both SDKs and our own teacher client, also when it fails."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from own_server import SlowStudent, in_this_process, pieces_of, wait_until
from pydantic import SecretStr

from distillery.errors import CredentialsError, ModelError
from distillery.inference.abstention import write_abstention
from distillery.inference.generation import Steps
from distillery.inference.onnx_student import OnnxStudent
from distillery.models.class_tokens import ClassTokens
from distillery.records import Abstention
from distillery.serving.completion import Job
from distillery.serving.process import KEY_VARIABLE, Served, served
from distillery.serving.requests import ChatRequest
from distillery.serving.server import listen, serve
from distillery.serving.student import Choice, ServedStudent
from distillery.training.rows import TrainingRow

Build = Callable[..., Path]
MESSAGES = [
    {"role": "system", "content": "Answer with one letter."},
    {"role": "user", "content": "Where is bread {warm}?\n(A) oven\n(B) river"},
]


@pytest.fixture(scope="module")
def server(tiny_onnx: Build) -> Iterator[Served]:
    with served(tiny_onnx("llama"), "tiny", threads=1) as running:
        yield running


@pytest.fixture(scope="module")
def student(tiny_onnx: Build) -> OnnxStudent:
    return OnnxStudent(tiny_onnx("llama"), threads=1)


@pytest.fixture
def client(server: Served) -> Iterator[Any]:
    import openai

    key = server.key.get_secret_value()
    with openai.OpenAI(base_url=server.url, api_key=key, max_retries=0) as made:
        yield made


def post(server: Served, path: str = "/chat/completions", **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {server.key.get_secret_value()}"}
    content = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4} | body
    with httpx.Client(trust_env=False, timeout=60) as http:
        return http.post(server.url + path, json=content, headers=headers)


def test_openai_gets_the_models_own_log_probabilities(client: Any, student: OnnxStudent) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=1, logprobs=True, top_logprobs=20
    )
    prompt = student.tokenizer.encode_chat(MESSAGES)
    expected = student.next_token_logprobs(prompt)
    best = np.argsort(-expected, kind="stable")[:20].tolist()
    (entry,) = answer.choices[0].logprobs.content
    assert [alternative.token for alternative in entry.top_logprobs] == [
        student.token_text(token) for token in best
    ]
    assert [alternative.logprob for alternative in entry.top_logprobs] == pytest.approx(
        expected[best].tolist(), abs=1e-9
    )
    assert (entry.token, entry.logprob) == (
        entry.top_logprobs[0].token,
        entry.top_logprobs[0].logprob,
    )
    assert bytes(entry.bytes).decode() == entry.token == answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        len(prompt),
        1,
        len(prompt) + 1,
    )


def test_a_choice_is_answered_with_the_likeliest_text(client: Any, student: OnnxStudent) -> None:
    texts = ["oven", "a river bank", "cloud"]
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        logprobs=True,
        top_logprobs=3,
        extra_body={"structured_outputs": {"choice": texts}},
    )
    prompt = student.tokenizer.encode_chat(MESSAGES)
    expected = student.text_probabilities(
        prompt, [student.tokenizer.encode_text(text) for text in texts]
    )
    best = texts[expected.index(max(expected))]
    (entry,) = answer.choices[0].logprobs.content
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (best, "stop")
    assert entry.token == best
    found = {alternative.token: np.exp(alternative.logprob) for alternative in entry.top_logprobs}
    assert found == pytest.approx(dict(zip(texts, expected, strict=True)), abs=1e-6)
    assert answer.usage.completion_tokens == len(student.tokenizer.encode_text(best))


def test_openai_gets_the_models_greedy_text(client: Any, student: OnnxStudent) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=12
    )
    tokens, _ = student.generate(student.tokenizer.encode_chat(MESSAGES), 12)
    assert answer.choices[0].message.content == student.text_of(tokens)
    assert answer.choices[0].logprobs is None
    assert answer.usage.completion_tokens == 12
    assert answer.model == "tiny"


def test_the_messages_reach_the_template_unchanged(server: Served, student: OnnxStudent) -> None:
    parts = [{"type": "text", "text": "Where "}, {"type": "text", "text": "is it?"}]
    chat = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "?"},
    ]
    body = post(server, messages=chat).json()
    plain = [{"role": "user", "content": "Where is it?"}, *chat[1:]]
    assert body["usage"]["prompt_tokens"] == len(student.tokenizer.encode_chat(plain))  # type: ignore[arg-type]


def test_openai_streams_the_same_text_and_log_probabilities(client: Any) -> None:
    settings = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 12,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**settings)
    chunks = list(
        client.chat.completions.create(
            **settings, stream=True, stream_options={"include_usage": True}
        )
    )
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert (
        "".join(choice.delta.content or "" for choice in choices)
        == whole.choices[0].message.content
    )
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert entries == whole.choices[0].logprobs.content
    assert choices[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_before_it(stream: bool, client: Any) -> None:
    text = (
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=30)
        .choices[0]
        .message.content
    )
    stop = text[4:7]
    settings = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 30,
        "stop": ["never there", stop],
    }
    answer = client.chat.completions.create(**settings, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        said, reason = (
            "".join(choice.delta.content or "" for choice in choices),
            choices[-1].finish_reason,
        )
    else:
        said, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert said == text[: text.index(stop)]
    assert reason == "stop"


def test_seed_and_temperature_are_heeded(client: Any) -> None:
    def ask(seed: int, temperature: float) -> str:
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=16, temperature=temperature, seed=seed
        )
        return str(answer.choices[0].message.content)

    assert ask(1, 1.0) == ask(1, 1.0) != ask(2, 1.0)
    assert ask(1, 0) == ask(2, 0)


def test_azure_ai_inference_gets_the_same_with_and_without_v1(
    server: Served, student: OnnxStudent
) -> None:
    from azure.ai.inference import ChatCompletionsClient
    from azure.core.credentials import AzureKeyCredential

    tokens, logprobs = student.generate(student.tokenizer.encode_chat(MESSAGES), 5)
    for url in (server.url, server.url.removesuffix("/v1")):
        with ChatCompletionsClient(
            url, AzureKeyCredential(server.key.get_secret_value()), retry_total=0
        ) as client:
            answer = client.complete(
                messages=MESSAGES, max_tokens=5, model_extras={"logprobs": True, "top_logprobs": 5}
            )
            chunks = list(
                client.complete(messages=MESSAGES, model="tiny", max_tokens=5, stream=True)
            )
        entries = answer.choices[0]["logprobs"]["content"]
        assert [entry["logprob"] for entry in entries] == pytest.approx(logprobs, abs=1e-9)
        assert answer.usage.completion_tokens == len(tokens)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("sdk", ["openai", "azure-ai-inference"])
async def test_our_teacher_client_finds_log_probabilities(sdk: Any, server: Served) -> None:
    from distillery.recipe import TeacherRecipe
    from distillery.teacher.asking import probe
    from distillery.teacher.endpoint import Endpoint

    endpoint = Endpoint(server.url, "tiny", server.key, "tiny", sdk)
    result = await probe(TeacherRecipe(sdk=sdk), endpoint)
    assert result.answers
    assert result.log_probabilities
    assert result.model_version == "tiny"


def test_the_wrong_key_is_refused_by_both_sdks(server: Served) -> None:
    import openai
    from azure.ai.inference import ChatCompletionsClient
    from azure.core.credentials import AzureKeyCredential
    from azure.core.exceptions import ClientAuthenticationError

    with (
        openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "?"}])
    assert refused.value.code == "invalid_api_key"
    assert server.key.get_secret_value() not in str(refused.value)
    with (
        ChatCompletionsClient(server.url, AzureKeyCredential("wrong"), retry_total=0) as azure,
        pytest.raises(ClientAuthenticationError),
    ):
        azure.complete(messages=MESSAGES)
    for path in ("/models", "/models/tiny"):
        assert httpx.get(server.url + path, trust_env=False).status_code == 401
    assert httpx.get(server.url.removesuffix("/v1") + "/healthz", trust_env=False).json() == {
        "status": "ok"
    }


def test_the_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_an_unknown_model_or_path_is_not_found(client: Any, server: Served) -> None:
    import openai

    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    assert "'other' does not exist; this server has 'tiny'" in str(missing.value)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert post(server, "/embeddings").json()["error"]["message"] == "Not Found"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 2}, "n"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.json_schema.schema",
        ),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"tools": []}, "tools"),
    ],
)
def test_a_bad_request_is_refused_by_the_fields_name(
    body: dict[str, Any], param: str, server: Served
) -> None:
    response = post(server, **body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"].startswith(param)
    assert error["message"].startswith(param)
    assert error["type"] == "invalid_request_error"


def test_what_changes_nothing_is_taken(server: Served) -> None:
    extras: dict[str, Any] = {"presence_penalty": 0.0, "frequency_penalty": 0, "n": 1, "user": "me"}
    assert post(server, **extras, response_format={"type": "text"}).status_code == 200
    assert post(server, "/chat/completions?api-version=2024-05-01-preview").status_code == 200


def test_a_body_that_is_no_json_or_too_large_is_refused(server: Served) -> None:
    headers = {"api-key": server.key.get_secret_value(), "Content-Type": "application/json"}
    with httpx.Client(trust_env=False, headers=headers) as http:
        broken = http.post(server.url + "/chat/completions", content=b"{")
        large = http.post(server.url + "/chat/completions", content=b" " * (5 << 20))
    assert (broken.status_code, large.status_code) == (400, 413)
    assert broken.json()["error"]["message"].startswith("body: Invalid JSON")
    assert large.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context_is_refused_and_the_next_one_answered(
    stream: bool, client: Any
) -> None:
    import openai

    long = [{"role": "user", "content": "river " * 2000}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=long, max_tokens=1, stream=stream)
    assert refused.value.code == "context_length_exceeded"
    assert "maximum context length is 1024 tokens" in str(refused.value)
    assert (
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=1
        ).usage.completion_tokens
        == 1
    )


def test_an_answer_ends_where_the_context_is_full(server: Served, student: OnnxStudent) -> None:
    body = post(server, max_tokens=5000).json()
    assert body["usage"]["total_tokens"] == student.context_length
    assert body["choices"][0]["finish_reason"] == "length"


def test_many_at_once_get_their_own_answers(server: Served, student: OnnxStudent) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(number: int) -> float:
        chat = [{"role": "user", "content": f"Question {number}: where is the bread?"}]
        body = post(server, messages=chat, max_tokens=1, logprobs=True).json()
        return float(body["choices"][0]["logprobs"]["content"][0]["logprob"])

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(40)))
    for number, answer in enumerate(answers):
        chat = [{"role": "user", "content": f"Question {number}: where is the bread?"}]
        expected = student.next_token_logprobs(student.tokenizer.encode_chat(chat)).max()
        assert answer == pytest.approx(float(expected), abs=1e-9)


def test_no_packet_of_an_answer_waits_for_the_clients_acknowledgement() -> None:
    """A delayed one costs 40 ms."""
    with listen("127.0.0.1", 0) as listener:
        with socket.create_connection(listener.getsockname(), timeout=10):
            connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_the_json_of_an_answer_has_these_fields_and_no_others(server: Served) -> None:
    """The openai package's types have more fields, of which some are null and some are not sent."""
    answer = post(server, max_tokens=1, logprobs=True, top_logprobs=1).json()
    assert answer.keys() == {"id", "object", "created", "model", "choices", "usage"}
    (choice,) = answer["choices"]
    (entry,) = choice["logprobs"]["content"]
    text = choice["message"]["content"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": {"content": [entry], "refusal": None},
        "finish_reason": "length",
    }
    likeliest = {"token": text, "logprob": entry["logprob"], "bytes": list(text.encode())}
    assert entry == likeliest | {"top_logprobs": [likeliest]}
    assert answer["usage"].keys() == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert post(server, max_tokens=1).json()["choices"][0]["logprobs"] is None

    lines = post(server, max_tokens=1, stream=True, stream_options={"include_usage": True}).text
    *events, done = lines.strip().split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    head = {name: chunks[0][name] for name in ("id", "created")}
    head |= {"object": "chat.completion.chunk", "model": "tiny"}

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return head | {"choices": [choice]}

    assert chunks == [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": text}),
        chunk({}, "length"),
        head | {"choices": [], "usage": answer["usage"]},
    ]
    assert done == "data: [DONE]"


def test_the_server_answers_while_the_model_computes(tiny_onnx: Build) -> None:
    student = SlowStudent(tiny_onnx("llama"))
    with in_this_process(student) as url:
        answers: list[int] = []
        body = {"messages": MESSAGES, "max_tokens": 1}
        asking = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{url}/chat/completions", json=body, timeout=60).status_code
            )
        )
        asking.start()
        assert wait_until(lambda: student.asked == 1)
        assert httpx.get(f"{url}/healthz", timeout=5).status_code == 200
        assert answers == []
        student.go_on.release()
        asking.join()
        assert answers == [200]


def test_the_key_is_in_no_command_line_and_the_process_is_gone_afterwards(tiny_onnx: Build) -> None:
    seen: list[Served] = []

    def interrupted() -> None:
        with served(tiny_onnx("phi3"), "tiny", threads=1) as running:
            seen.append(running)
            assert (
                running.key.get_secret_value()
                not in Path(f"/proc/{running.process.pid}/cmdline").read_text()
            )
            assert running.key.get_secret_value() not in repr(running)
            assert post(running).status_code == 200
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not Path(f"/proc/{seen[0].process.pid}").exists()
    with pytest.raises(httpx.ConnectError):
        post(seen[0])


def test_a_killed_parent_leaves_no_server(tiny_onnx: Build) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from distillery.serving.process import served\n"
        "with served(Path(sys.argv[1]), 'tiny', threads=1) as running:\n"
        "    print(running.process.pid, flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tiny_onnx("llama"))], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)

    def gone() -> bool:
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rsplit(") ", 1)[1].startswith("Z")

    assert wait_until(gone)


def test_a_folder_that_cannot_be_served_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as failure, served(tmp_path, "tiny"):
        pass
    assert str(failure.value).startswith(f"{tmp_path}/genai_config.json: can't be read")
    assert "\n" not in str(failure.value)


def test_others_reach_it_only_with_a_key(tiny_onnx: Build) -> None:
    for key in (None, SecretStr("")):
        with pytest.raises(CredentialsError, match=f"--host 0.0.0.0: .*{KEY_VARIABLE}"):
            serve(tiny_onnx("llama"), "tiny", "0.0.0.0", 0, key)


def test_a_port_that_is_taken_is_named(tiny_onnx: Build) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ModelError, match=f"--host 127.0.0.1 --port {port}: "):
            serve(tiny_onnx("llama"), "tiny", port=port)


def test_log_probabilities_are_json_even_where_the_model_gives_none(tiny_onnx: Build) -> None:
    class Certain(ServedStudent):
        def choices(self, rows: Sequence[TrainingRow]) -> list[Choice]:
            logits = np.full(512, -np.inf, dtype=np.float32)
            logits[40] = 0.0
            return [logits] * len(rows)

    with in_this_process(Certain(tiny_onnx("llama"), threads=1)) as url:
        body = {"messages": MESSAGES, "max_tokens": 1, "logprobs": True, "top_logprobs": 2}
        text = httpx.post(f"{url}/chat/completions", json=body).text

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    (entry,) = json.loads(text, parse_constant=refuse)["choices"][0]["logprobs"]["content"]
    assert [alternative["logprob"] for alternative in entry["top_logprobs"]] == [0.0, -9999.0]
    assert math.isfinite(entry["logprob"])


class Broken(ServedStudent):
    """A student that fails unexpectedly, after `after` tokens."""

    def __init__(self, folder: Path, after: int) -> None:
        super().__init__(folder, threads=1)
        self.after = after

    def steps(self, *arguments: Any, **settings: Any) -> Steps:
        for number, step in enumerate(super().steps(*arguments, **settings)):
            if number == self.after:
                raise ValueError("what a library says")
            yield step


@pytest.mark.parametrize(("stream", "after"), [(False, 0), (True, 0), (True, 3)])
def test_whatever_goes_wrong_is_an_answer(stream: bool, after: int, tiny_onnx: Build) -> None:
    with in_this_process(Broken(tiny_onnx("llama"), after)) as url:
        body = {"messages": MESSAGES, "max_tokens": 8, "stream": stream}
        response = httpx.post(f"{url}/chat/completions", json=body, timeout=20)
    assert response.status_code == (200 if after else 500)
    last = response.text.strip().rpartition("\n")[2].removeprefix("data: ")
    assert json.loads(last)["error"]["message"] == "The server failed (ValueError)."
    assert "what a library says" not in response.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_template_that_refuses_the_roles_says_so(
    stream: bool, tiny_onnx: Build, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_onnx("llama"), folder)
    refusing = "{{ raise_exception('System role not supported') }}"
    (folder / "chat_template.jinja").write_text(
        f"{{% if messages[0]['role'] == 'system' %}}{refusing}{{% endif %}}?"
    )
    with in_this_process(ServedStudent(folder, threads=1)) as url:
        body = {"messages": MESSAGES, "max_tokens": 1, "stream": stream}
        refused = httpx.post(f"{url}/chat/completions", json=body, timeout=20)
        answered = httpx.post(
            f"{url}/chat/completions", json=body | {"messages": MESSAGES[1:]}, timeout=20
        )
    assert (refused.status_code, answered.status_code) == (400, 200)
    assert re.match(
        "the model's chat template refuses the messages .*", refused.json()["error"]["message"]
    )


def test_an_unsure_student_says_so_and_its_log_probabilities_stay(
    tiny_onnx: Build, tmp_path: Path
) -> None:
    """Asked for a class and, without classes, for one of some texts. No probability reaches 1."""
    names = ("refund", "delivery")
    body: dict[str, Any] = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    found = []
    for closed in (True, False):
        for threshold in (None, 1e-9, 1.0):
            folder = shutil.copytree(tiny_onnx("llama"), tmp_path / f"{closed}-{threshold}")
            if closed:
                ClassTokens(classes=names, tokens=(500, 501)).write(folder)
            else:
                body["structured_outputs"] = {"choice": list(names)}
            if threshold:
                write_abstention(Abstention(threshold=threshold, answer="nobody knows"), folder)
            pieces = pieces_of(ServedStudent(folder, threads=1), Job(ChatRequest(**body)))
            found.append(pieces)
    for plain, sure, unsure in (found[:3], found[3:]):
        assert sure == plain
        assert plain[0].text in names
        assert unsure == [replace(plain[0], text="nobody knows")]
