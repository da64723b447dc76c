"""What one client can't do to a server: keep it from others, read what others asked, reach it from
a web page of another site, or learn of the machine. Everything goes by the order of events."""

import asyncio
import json
import random
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from own_server import OwnServer, SlowStudent, own_server, wait_until
from pydantic import SecretStr

from distillery.errors import AnswerStopped, ModelError
from distillery.inference import batch_student, text_batch
from distillery.inference.batch_student import BatchStudent, load_scorer
from distillery.inference.generation import Steps
from distillery.inference.onnx_student import OnnxStudent
from distillery.inference.text_student import TextStudent
from distillery.serving import app, requests
from distillery.serving import running as server_processes
from distillery.serving import server as serving
from distillery.serving.hosts import HostCheck, own_name
from distillery.serving.limits import LARGEST_BODY, LONGEST_STOP, Limits, within_open_files
from distillery.serving.process import OWN_QUEUE
from distillery.serving.stops import StopSearch, StopText
from distillery.serving.student import ServedStudent
from distillery.training.rows import TrainingRow

pytestmark = pytest.mark.security

Build = Callable[..., Path]
MESSAGES = [{"role": "user", "content": "Where is bread warm?"}]
ONE = {"messages": MESSAGES, "max_tokens": 1}
JSON = {"Content-Type": "application/json"}
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def running(tiny_onnx: Build) -> Iterator[OwnServer]:
    with own_server(ServedStudent(tiny_onnx("llama"), threads=1), hosts=("my.example",)) as started:
        yield started


def ask(running: OwnServer, **body: Any) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=60) as http:
        return http.post(running.url + PATH, json=ONE | body)


class Asking:
    """A request in a thread of its own."""

    def __init__(self, running: OwnServer, **body: Any) -> None:
        self.status = 0
        self.text = ""
        self.thread = threading.Thread(target=self.run, args=(running, body))
        self.thread.start()

    def run(self, running: OwnServer, body: dict[str, Any]) -> None:
        response = ask(running, **body)
        self.status, self.text = response.status_code, response.text

    def result(self) -> int:
        self.thread.join(60)
        return self.status


def connect(running: OwnServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), timeout=60)


def head(length: int | None = None, host: str = "localhost", path: str = PATH) -> bytes:
    """The head of a request with a body of `length` bytes, or in chunks."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", size]
    return "\r\n".join([*lines, "", ""]).encode()


def sent(running: OwnServer, **body: Any) -> socket.socket:
    """Send a whole request, and return its connection."""
    connection = connect(running)
    content = json.dumps(ONE | body).encode()
    connection.sendall(head(len(content)) + content)
    return connection


def received(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read until the server closes: status, headers and body."""
    data = b""
    while part := connection.recv(65536):
        data += part
    start, _, body = data.partition(b"\r\n\r\n")
    first, *lines = start.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, body


def test_too_many_requests_are_told_when_to_come_again(tiny_onnx: Build) -> None:
    student = SlowStudent(tiny_onnx("llama"))
    with own_server(student, Limits(queue=2)) as running:
        first = Asking(running)
        assert wait_until(lambda: student.asked == 1)
        second = Asking(running)
        assert wait_until(lambda: running.server.places == 2)
        for seconds, expected in ((0.0, "1"), (0.2, "1"), (4.3, "9"), (100.0, "60")):
            running.server.rounds.answer_s = seconds
            refused = ask(running)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == expected
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert httpx.get(f"{running.url}/healthz", trust_env=False).status_code == 200
        running.server.rounds.answer_s = 0.0
        student.go_on.release(2)
        assert (first.result(), second.result()) == (200, 200)
        assert wait_until(lambda: running.server.places == 0)
        assert running.server.rounds.answer_s > 0
        student.go_on.release()
        assert ask(running).status_code == 200


def test_many_requests_of_one_program_wait_by_default(tiny_onnx: Build) -> None:
    student = SlowStudent(tiny_onnx("llama"))
    with own_server(student) as running:
        waiting = [sent(running) for _ in range(150)]
        assert wait_until(lambda: running.server.places == len(waiting))
        for connection in waiting:
            connection.close()
        student.go_on.release(2)
        assert wait_until(lambda: running.server.places == 0)


def test_bodies_that_do_not_come_keep_no_one_out(tiny_onnx: Build) -> None:
    """They take no place of the queue, and the one that began first gives way to another."""
    student = ServedStudent(tiny_onnx("llama"), threads=1)
    with own_server(student, Limits(queue=2, reading=3)) as running:
        slow = []
        for _ in range(3):
            slow.append(connect(running))
            slow[-1].sendall(head(100) + b'{"messages"')
            assert wait_until(lambda: len(running.server.bodies.sizes) == len(slow))
        assert running.server.places == 0
        assert ask(running).status_code == 200
        status, _, body = received(slow[0])
        assert (status, len(running.server.bodies.sizes)) == (408, 2)
        assert "while many others came" in json.loads(body)["error"]["message"]
        for connection in slow:
            connection.close()
        assert wait_until(lambda: not running.server.bodies.sizes)


def test_bodies_that_are_too_large_together_give_way(
    tiny_onnx: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "MOST_BODY_BYTES", 1000)
    student = ServedStudent(tiny_onnx("llama"), threads=1)
    with own_server(student) as running, connect(running) as slow:
        slow.sendall(head(1000) + b" " * 900)
        assert wait_until(lambda: list(running.server.bodies.sizes.values()) == [900])
        assert ask(running, user="x" * 100).status_code == 200
        assert received(slow)[0] == 408


def test_what_waits_is_bounded_by_its_size_too(
    tiny_onnx: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MOST_BODY_BYTES", 1000)
    student = SlowStudent(tiny_onnx("llama"))
    with own_server(student) as running:
        first = Asking(running, user="x" * 500)
        assert wait_until(lambda: student.asked == 1)
        assert ask(running, user="x" * 500).status_code == 429
        student.go_on.release()
        assert first.result() == 200
        assert wait_until(lambda: running.server.bytes == 0)


def test_idle_connections_give_way_to_others(tiny_onnx: Build) -> None:
    student = SlowStudent(tiny_onnx("llama"))
    with own_server(student, Limits(connections=3)) as running:
        busy = Asking(running)
        assert wait_until(lambda: student.asked == 1)
        idle = [connect(running) for _ in range(4)]
        for closed in idle[:2]:
            assert closed.recv(1) == b""
        assert httpx.get(f"{running.url}/healthz", trust_env=False).status_code == 200
        student.go_on.release()
        assert busy.result() == 200
        for connection in idle:
            connection.close()


def test_connections_that_are_all_busy_are_told(tiny_onnx: Build) -> None:
    student = SlowStudent(tiny_onnx("llama"))
    with own_server(student, Limits(connections=2)) as running:
        busy = [sent(running) for _ in range(2)]
        assert wait_until(lambda: running.server.places == 2)
        with connect(running) as refused:
            status, headers, body = received(refused)
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(body)["error"]["code"] == "too_many_connections"
        for connection in busy:
            connection.close()
        student.go_on.release(2)


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "connections"),
    [
        (1 << 20, 1 << 20, None, 2304),
        (-1, -1, None, 2304),
        (1024, 1 << 20, 5120, 2304),
        (1024, -1, 5120, 2304),
        (1024, 4096, 4096, 2304),
        (1024, 2048, 2048, 1536),
        (1024, 1024, 1024, 768),
    ],
)
def test_connections_stay_within_the_files_that_may_be_open(
    soft: int, hard: int, raised: int | None, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    infinite = resource.RLIM_INFINITY
    limit = tuple(infinite if each == -1 else each for each in (soft, hard))
    changed: list[int] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limit)
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: changed.append(new[0]))
    found = within_open_files(Limits())
    assert found.connections == connections
    assert changed == ([raised] if raised else [])
    assert found.queue + found.reading < connections
    assert (found.queue == Limits().queue) is (connections == Limits().connections)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_while_it_waits_leaves_the_queue(stream: bool, tiny_onnx: Build) -> None:
    student = SlowStudent(tiny_onnx("llama"))
    with own_server(student) as running:
        first = Asking(running)
        assert wait_until(lambda: student.asked == 1)
        others = [sent(running, stream=stream) for _ in range(4)]
        assert wait_until(lambda: running.server.places == 5)
        for other in others:
            other.close()
        assert wait_until(lambda: running.server.places == 1)
        student.go_on.release()
        assert first.result() == 200
        assert wait_until(lambda: running.server.places == 0)
        assert student.asked == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_while_its_answer_is_made_does_not_keep_the_model(
    stream: bool, tiny_onnx: Build
) -> None:
    student = SlowStudent(tiny_onnx("llama"))
    with own_server(student) as running:
        connection = sent(running, stream=stream, max_tokens=500)
        student.go_on.release(2)
        assert wait_until(lambda: student.asked == 3)
        connection.close()
        assert wait_until(student.stop.is_set)
        student.go_on.release(2)
        assert ask(running).status_code == 200
        assert student.asked == 4


class Passes:
    """Stops a student before the pass after the one of number `held`, and counts passes."""

    def __init__(self, student: ServedStudent, held: int) -> None:
        self.begun = 0
        self.held = held
        self.go_on = threading.Event()
        scorer, generator = student.needed_scorer(), student.needed_generator()
        assert isinstance(scorer, BatchStudent)
        assert isinstance(generator, TextStudent)
        scorer.run = self.around(scorer.run)  # type: ignore[method-assign]
        batch = generator.batch
        batch.run = self.around(batch.run)  # type: ignore[method-assign]

    def around(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            found = compute(*arguments, **named)
            self.begun += 1
            if self.begun == self.held:
                assert self.go_on.wait(60)
            return found

        return counted


LONG = [{"role": "user", "content": "river " * 120}]


@pytest.mark.parametrize(
    ("body", "held"),
    [
        ({"messages": LONG}, 2),
        ({"messages": LONG, "max_tokens": 9}, 2),
        ({"structured_outputs": {"choice": ["a river bank", "the oven", "a cloud"]}}, 1),
    ],
    ids=["a long prompt", "a long prompt to go on from", "texts to score"],
)
def test_a_client_that_goes_is_noticed_before_the_next_pass(
    body: dict[str, Any], held: int, tiny_onnx: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (batch_student, text_batch):
        monkeypatch.setattr(module, "LONGEST_PASS", 64)
    student = ServedStudent(tiny_onnx("llama"), threads=1)
    passes = Passes(student, held)
    with own_server(student) as running:
        connection = sent(running, **body)
        assert wait_until(lambda: passes.begun == held)
        connection.close()
        assert wait_until(student.stop.is_set)
        passes.go_on.set()
        assert wait_until(lambda: running.server.places == 0)
        assert passes.begun == held
        answer = ask(running, logprobs=True)
    fresh = OnnxStudent(tiny_onnx("llama"), threads=1)
    expected = fresh.next_token_logprobs(fresh.tokenizer.encode_chat(MESSAGES)).max()
    (entry,) = answer.json()["choices"][0]["logprobs"]["content"]
    assert entry["logprob"] == pytest.approx(float(expected), abs=1e-4)


class Deadlines:
    """Every deadline of an answer, which passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer_s: float) -> None:
        self.answer_s = answer_s
        self.started: list[tuple[asyncio.AbstractEventLoop, asyncio.Timeout]] = []
        self.timeout = asyncio.timeout
        monkeypatch.setattr(asyncio, "timeout", self)

    def __call__(self, seconds: float | None) -> asyncio.Timeout:
        made = self.timeout(seconds)
        if seconds == self.answer_s:
            self.started.append((asyncio.get_running_loop(), made))
        return made

    def expire(self, number: int) -> None:
        # The student may be asked before the answer's time begins to run.
        assert wait_until(lambda: len(self.started) > number)
        loop, deadline = self.started[number]
        loop.call_soon_threadsafe(deadline.reschedule, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_given_up(
    stream: bool, tiny_onnx: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = SlowStudent(tiny_onnx("llama"))
    deadlines = Deadlines(monkeypatch, 512.5)
    with own_server(student, Limits(answer_s=512.5)) as running:
        asking = Asking(running, stream=stream)
        assert wait_until(lambda: student.asked == 1)
        deadlines.expire(0)
        assert wait_until(student.stop.is_set)
        student.go_on.release(9)
        assert asking.result() == 503
    assert json.loads(asking.text)["error"]["code"] == "timeout"
    assert student.asked == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_late_before_its_turn_is_given_up_at_once(
    stream: bool, tiny_onnx: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is with the worker already, behind the first; the third waits for its turn."""
    student = SlowStudent(tiny_onnx("llama"))
    deadlines = Deadlines(monkeypatch, 512.5)
    with own_server(student, Limits(answer_s=512.5)) as running:
        first = Asking(running)
        assert wait_until(lambda: student.asked == 1)
        late: list[Asking] = []
        while len(late) < 2:
            late.append(Asking(running, stream=stream))
            assert wait_until(lambda: len(deadlines.started) == 1 + len(late))
        for number, asking in enumerate(late, 1):
            deadlines.expire(number)
            assert asking.result() == 503
        assert not student.stop.is_set()
        student.go_on.release()
        assert first.result() == 200
        assert wait_until(lambda: running.server.places == 0)
        student.go_on.release()
        assert ask(running).status_code == 200
    assert student.asked == 2


@pytest.mark.parametrize("start", [b"", b"POST /v1/chat", head(100)[:-2]], ids=["nothing", "", ""])
def test_headers_that_do_not_come_are_not_waited_for(start: bytes, tiny_onnx: Build) -> None:
    student = ServedStudent(tiny_onnx("llama"), threads=1)
    with own_server(student, Limits(header_s=0.1)) as running, connect(running) as connection:
        connection.sendall(start)
        status, headers, body = received(connection)
    assert (status, headers["content-type"]) == (408, "application/json")
    assert "headers did not come" in json.loads(body)["error"]["message"]


def test_a_body_that_does_not_come_is_not_waited_for(tiny_onnx: Build) -> None:
    student = ServedStudent(tiny_onnx("llama"), threads=1)
    with own_server(student, Limits(body_s=0.1)) as running, connect(running) as connection:
        connection.sendall(head(100) + b'{"messages"')
        status, _, body = received(connection)
        assert status == 408
        assert "did not come within 0.1 s" in json.loads(body)["error"]["message"]
        assert running.server.places == 0


def test_what_is_no_http_is_an_error_in_openai_s_form(running: OwnServer) -> None:
    with connect(running) as connection:
        connection.sendall(b"what?\r\n\r\n")
        status, headers, body = received(connection)
    assert (status, headers["content-type"]) == (400, "application/json")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_however_it_is_sent(
    chunked: bool, running: OwnServer
) -> None:
    part = b" " * (1 << 20)
    rounds = LARGEST_BODY // len(part) + 1
    with connect(running) as connection:
        connection.sendall(head(None if chunked else rounds * len(part)))
        for _ in range(rounds):
            connection.sendall(b"100000\r\n" + part + b"\r\n" if chunked else part)
        if chunked:
            connection.sendall(b"0\r\n\r\n")
        status, _, body = received(connection)
    assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")
    assert running.server.places == 0


def test_a_body_without_an_end_is_cut_off(running: OwnServer) -> None:
    part = b"10000\r\n" + b" " * (1 << 16) + b"\r\n"
    with connect(running) as connection:
        connection.sendall(head())
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            connection.sendall(part * 5000)
    assert wait_until(lambda: running.server.places == 0)


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("localhost", True),
        ("LOCALHOST.:8080", True),
        ("127.0.0.1:1", True),
        ("[::1]:8080", True),
        ("192.168.7.7", True),
        ("my.example:8080", True),
        (socket.gethostname(), True),
        ("my.localhost:8080", True),
        (None, True),
        ("evil.example", False),
        ("evillocalhost", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:8080", False),
        ("evil.example@localhost", False),
        ("", False),
    ],
)
def test_only_its_own_names_are_answered(
    host: str | None, answered: bool, running: OwnServer
) -> None:
    for path in ("/v1/models", "/healthz"):
        with connect(running) as connection:
            lines = [f"GET {path} HTTP/1.1", f"Host: {host}", "Connection: close", "", ""]
            if host is None:
                lines = [f"GET {path} HTTP/1.0", "", ""]
            connection.sendall("\r\n".join(lines).encode())
            status, _, body = received(connection)
        assert status == (200 if answered else 421)
        if not answered:
            message = json.loads(body)["error"]["message"]
            assert "--allow-host" in message
            assert ":8080" not in message


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("student", "student"),
        ("Student.:8080", "student"),
        ("http://student:8080/v1", "student"),
        ("https://my.example", "my.example"),
        ("[fd00::1]:8080", "fd00::1"),
    ],
)
def test_a_name_is_taken_with_its_port_and_scheme_too(given: str, name: str) -> None:
    assert own_name(given) == name
    assert HostCheck(FastAPI(), [name]).is_own(name)


@pytest.mark.parametrize(
    "given", ["", "*", "*.example", "a b", "me@student", "http://", "b\u00fccher"]
)
def test_what_is_no_name_is_refused_in_one_line(given: str, tiny_onnx: Build) -> None:
    with pytest.raises(
        ModelError, match=r"^--allow-host .*: give the name of a host, such as [a-z.]+$"
    ):
        serving.serve(tiny_onnx("llama"), "tiny", hosts=[given])


@pytest.mark.parametrize(
    "content_type",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"],
)
def test_what_a_page_may_send_without_asking_is_refused(
    content_type: str | None, running: OwnServer
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    with httpx.Client(trust_env=False) as http:
        body = json.dumps(ONE).encode()
        response = http.post(running.url + PATH, content=body, headers=headers)
        assert response.status_code == 415
        headers = {"Content-Type": "Application/JSON; charset=utf-8"}
        assert http.post(running.url + PATH, content=body, headers=headers).status_code == 200


def test_no_page_of_another_site_is_let_in(running: OwnServer) -> None:
    origin = {"Origin": "http://evil.example"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x"}
    with httpx.Client(trust_env=False) as http:
        responses = [
            http.options(running.url + PATH, headers=origin | asks),
            http.get(f"{running.url}/v1/models", headers=origin),
            http.post(running.url + PATH, json=ONE, headers=origin),
        ]
    assert [response.status_code for response in responses] == [405, 200, 200]
    for response in responses:
        assert not [name for name in response.headers if name.startswith("access-control")]
    assert responses[0].headers["allow"] == "POST"


class Failing(ServedStudent):
    """A student whose model fails with an error that tells of the machine."""

    def steps(self, *arguments: Any, **settings: Any) -> Steps:
        for number, step in enumerate(super().steps(*arguments, **settings)):
            yield step
            if number < 3:
                continue
            raise ModelError(f"{self.folder}: ONNX Runtime GenAI fails")


@pytest.mark.parametrize("stream", [False, True])
def test_no_answer_tells_of_the_machine(stream: bool, tiny_onnx: Build, tmp_path: Path) -> None:
    folder = tmp_path / "a-private-folder"
    shutil.copytree(tiny_onnx("llama"), folder)
    with own_server(Failing(folder, threads=1)) as running:
        response = ask(running, stream=stream, max_tokens=9)
    assert "private" not in response.text
    assert "The server failed (ModelError)." in response.text
    assert response.status_code == (200 if stream else 500)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stop": "x" * (LONGEST_STOP + 1)}, "stop"),
        ({"stop": ["x"] * 5}, "stop"),
        ({"max_tokens": 1 << 21}, "max_tokens"),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 1e300}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"n": 2.0}, "n"),
        ({"seed": 1 << 70}, "seed"),
        ({"model": "x" * 300}, "model"),
        ({"messages": MESSAGES * 1001}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1001}]},
            "messages",
        ),
        ({"structured_outputs": {"choice": ["x"] * 65}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["x" * 20_000]}}, "structured_outputs.choice"),
        ({"x" * 100_000: 1}, "x"),
    ],
)
def test_a_field_out_of_its_bounds_is_refused(
    body: dict[str, Any], param: str, running: OwnServer
) -> None:
    response = ask(running, **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)
    assert len(response.content) < 1000


def test_a_whole_number_may_be_written_as_a_float(running: OwnServer) -> None:
    """JSON Schema counts it as an integer."""
    floats = {"max_tokens": 1.0, "n": 1.0, "seed": 7.0, "logprobs": True, "top_logprobs": 2.0}
    response = ask(running, **floats)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"user": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"max_tokens": 1e400, "messages": [{"role": "user", "content": "?"}]}',
        b'{"temperature": NaN, "messages": [{"role": "user", "content": "?"}]}',
    ],
)
def test_a_broken_body_is_refused(content: bytes, running: OwnServer) -> None:
    with httpx.Client(trust_env=False, timeout=60) as http:
        response = http.post(running.url + PATH, content=content, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert len(response.content) < 1000


def test_stop_texts_are_found_however_the_answer_is_cut() -> None:
    """Beside a search over the whole answer: of those that are complete first, the longest."""
    draw = random.Random(0)
    for _ in range(2000):
        answer = "".join(draw.choices("ab", k=draw.randint(0, 20)))
        stops = ["".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(3)]
        expected = answer
        for end in range(1, len(answer) + 1):
            found = [stop for stop in stops if answer[:end].endswith(stop)]
            if found:
                expected = answer[: end - max(map(len, found))]
                break
        search, said, rest = StopSearch(stops), "", answer
        while rest and not search.found:
            size = draw.randint(1, 3)
            said += search.take(rest[:size])
            rest = rest[size:]
        assert said + search.held == expected
        assert len(search.held) < max(map(len, stops))


def test_the_search_for_a_stop_text_takes_time_by_the_answer_s_length() -> None:
    class Counting(list[int]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            self.reads += 1
            return super().__getitem__(index)

    stop = StopText("a" * (LONGEST_STOP - 1) + "b")
    counted = stop._shorter = Counting(stop._shorter)
    answer = ("a" * (LONGEST_STOP - 2) + "c") * 100
    assert not any(stop.follow(character) for character in answer)
    assert counted.reads <= len(answer)


@pytest.mark.parametrize("shared", [True, False])
def test_what_others_asked_can_be_forgotten(shared: bool, tiny_onnx: Build) -> None:
    """One token is the scorer's answer, and two are the generator's."""
    student = ServedStudent(tiny_onnx("llama"), threads=1)
    scorer, generator = student.needed_scorer(), student.needed_generator()
    assert isinstance(scorer, BatchStudent)
    assert isinstance(generator, TextStudent)
    computed: list[int] = []
    run, run_rows = scorer.run, generator.batch.run

    def count_run(sequences: list[list[int]], *others: Any, **named: Any) -> Any:
        computed.append(sum(map(len, sequences)))
        return run(sequences, *others, **named)

    def count(row: int, tokens: list[list[int]], *others: Any) -> Any:
        computed.append(sum(map(len, tokens)))
        return run_rows(row, tokens, *others)

    scorer.run = count_run  # type: ignore[method-assign, assignment]
    generator.batch.run = count  # type: ignore[method-assign, assignment]
    with own_server(student, shared_prefix=shared) as running:
        for max_tokens in (1, 1, 2, 2):
            assert ask(running, max_tokens=max_tokens).status_code == 200
    first, second, third, _, fourth, _ = computed
    assert (second < first) is (fourth < third) is shared
    assert bool(scorer._begun) is any(generator.batch.prompts) is shared


@pytest.mark.parametrize(
    ("host", "given", "shared"),
    [
        ("127.0.0.1", None, True),
        ("localhost", None, True),
        ("127.0.0.1", False, False),
        ("0.0.0.0", None, False),
        ("0.0.0.0", True, True),
    ],
)
def test_prefixes_are_shared_by_default_where_only_this_machine_asks(
    host: str, given: bool | None, shared: bool, tiny_onnx: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made(Exception):
        pass

    def make(*arguments: Any, **settings: Any) -> None:
        assert settings["shared_prefix"] is shared
        assert host in settings["hosts"]
        raise Made

    monkeypatch.setattr(server_processes, "create_app", make)
    with pytest.raises(Made):
        serving.serve(
            tiny_onnx("llama"), "tiny", host, 0, SecretStr("key"), shared_prefix=given, threads=1
        )


def test_a_run_s_own_server_takes_all_of_its_calls_at_once() -> None:
    from distillery.recipe import TeacherRecipe

    bounds = TeacherRecipe.model_json_schema()["properties"]["concurrency"]
    assert bounds["maximum"] < OWN_QUEUE


def test_a_prompt_in_several_passes_gives_the_same_logits(tiny_onnx: Build) -> None:
    student = OnnxStudent(tiny_onnx("llama"), threads=1)
    prompt = student.tokenizer.encode_chat([{"role": "user", "content": "river " * 100}])
    whole = student.decoder.prefill(prompt)
    for size in (32, len(prompt) - 1):
        student.decoder.forget()
        student.decoder.longest_pass = size
        parts = student.decoder.passes(prompt)
        assert [token for part in parts for token in part] == prompt
        assert min(map(len, parts)) > 1
        assert np.allclose(student.decoder.prefill(prompt), whole, atol=1e-4)


def test_a_decoder_that_is_stopped_goes_on_afterwards(tiny_onnx: Build) -> None:
    student = OnnxStudent(tiny_onnx("llama"), threads=1)
    prompt = student.tokenizer.encode_chat(MESSAGES)
    expected = student.decoder.prefill(prompt)
    student.decoder.stop.set()
    with pytest.raises(AnswerStopped):
        student.decoder.prefill(prompt)
    student.decoder.stop.clear()
    assert np.allclose(student.decoder.prefill(prompt), expected, atol=1e-4)


def test_a_scorer_that_is_stopped_goes_on_afterwards(tiny_onnx: Build) -> None:
    student, stop = load_scorer(tiny_onnx("llama"), threads=1), threading.Event()
    prompt = student.tokenizer.encode_chat(MESSAGES)
    expected = student.next_logits(prompt)
    student.heed(stop)
    stop.set()
    with pytest.raises(AnswerStopped):
        student.next_logits(prompt)
    stop.clear()
    assert np.allclose(student.next_logits(prompt), expected, atol=1e-4)


def test_a_long_prompt_and_a_long_text_in_several_passes_give_the_same(
    tiny_onnx: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = np.random.default_rng(0)
    prompt, text = (tuple(numbers.integers(5, 500, count).tolist()) for count in (301, 300))
    rows = [
        TrainingRow(prompt=prompt, letters=(70, 71, 72), answer=0),
        TrainingRow(prompt=prompt, letters=(70, 71), closed=True, span=200, last=0.3, answer=0),
        TrainingRow(prompt=prompt, texts=(text, (7, 8), (9,)), answer=0),
    ]
    found, passes = [], []
    for size in (512, 64):
        monkeypatch.setattr(batch_student, "LONGEST_PASS", size)
        student = load_scorer(tiny_onnx("llama"), threads=1)
        assert isinstance(student, BatchStudent)
        session = CountedSession(student._session)
        student._session = session
        each = []
        for row in rows:
            student.forget()
            each += student.probabilities([row])
        found.append(each)
        passes.append(session.passes)
    assert passes[0] == [302, 302, 302, 2, 300]
    assert passes[1] == [64] * 4 + [46] + [64, 238] + [64] * 4 + [46] + [2] + [64] * 4 + [44]
    for whole, parts in zip(*found, strict=True):
        assert parts == pytest.approx(whole, abs=1e-5)


class CountedSession:
    """A session of ONNX Runtime that notes the tokens of its passes."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.passes: list[int] = []

    def run_with_ort_values(self, wanted: list[str], values: dict[str, Any]) -> Any:
        self.passes.append(values["input_ids"].shape()[1])
        return self.session.run_with_ort_values(wanted, values)
