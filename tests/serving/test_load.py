"""A server under load: texts that are generated at once, choices between them, what it says of
itself, and how it stops."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from guessing import Guessing, with_drafts
from own_server import OwnServer, SlowStudent, own_server, wait_until

from distillery.inference.text_student import TextStudent
from distillery.serving.limits import Limits
from distillery.serving.rounds import CHOICES_AT_ONCE, Rounds
from distillery.serving.student import Choice, ServedStudent
from distillery.training.rows import TrainingRow

Build = Callable[..., Path]
PATH = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [1, 22, 333]}},
    "required": ["n"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
WORDS = ("bread", "river", "cloud", "oven", "quiet room")


def messages(number: int) -> list[dict[str, str]]:
    """A conversation; their lengths differ by up to 80 words."""
    return [{"role": "user", "content": f"{WORDS[number % 5]} " * (1 + 11 * (number % 8))}]


def request(number: int) -> dict[str, Any]:
    """A request of one of several kinds."""
    kinds: list[dict[str, Any]] = [
        {"max_tokens": 30, "stop": ["e", "zz"]},
        {"response_format": FORMAT},
        {"max_tokens": 25, "temperature": 1.0, "seed": number},
        {"max_tokens": 40, "logprobs": True},
        {"max_tokens": 1},
        {"structured_outputs": {"choice": ["oven", "a river bank"]}},
    ]
    return {"messages": messages(number), "stream": number % 2 == 0, **kinds[number % 6]}


def answered(running: OwnServer, body: dict[str, Any]) -> tuple[str, str, list[str]]:
    """The text of an answer, why it ended, and its tokens if they are asked for."""
    with httpx.Client(trust_env=False, timeout=60) as http:
        response = http.post(running.url + PATH, json=body).raise_for_status()
    if not body["stream"]:
        choice = response.json()["choices"][0]
        entries = (choice["logprobs"] or {"content": []})["content"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    else:
        *events, done = response.text.strip().split("\n\n")
        assert done == "data: [DONE]"
        choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        reason = choices[-1]["finish_reason"]
        entries = [
            one for choice in choices for one in (choice["logprobs"] or {"content": []})["content"]
        ]
    return text, reason, [entry["token"] for entry in entries]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("arch", ["llama", "phi4mini"])
def test_many_requests_at_once_get_the_answers_that_each_gets_alone(
    arch: str, shared: bool, tiny_onnx: Build
) -> None:
    """Of a model that takes rows together, and of one that writes answers one by one."""
    student = ServedStudent(tiny_onnx(arch), threads=1, limits=Limits(batch=4))
    bodies = [request(number) for number in range(36)]
    with own_server(student, shared_prefix=shared) as running:
        alone = [answered(running, body) for body in bodies]
        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(lambda body: answered(running, body), bodies)) == alone
        assert wait_until(lambda: running.server.places == 0)
    assert isinstance(student.generator, TextStudent) is (arch == "llama")
    assert {reason for _, reason, _ in alone} == {"stop", "length"}


def post(running: OwnServer, answers: list[httpx.Response], **body: Any) -> threading.Thread:
    """Ask in a thread, which adds the answer to `answers`."""

    def ask() -> None:
        with httpx.Client(trust_env=False, timeout=60) as http:
            content = {"messages": messages(0), "max_tokens": 1} | body
            answers.append(http.post(running.url + PATH, json=content))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def test_a_choice_waits_for_a_token_and_not_for_a_text(tiny_onnx: Build) -> None:
    student = SlowStudent(tiny_onnx("llama"))
    texts: list[httpx.Response] = []
    choices: list[httpx.Response] = []
    with own_server(student) as running:
        text = post(running, texts, max_tokens=9)
        assert wait_until(lambda: student.asked == 1)
        choice = post(running, choices)
        assert wait_until(lambda: running.server.places == 2)
        # The text's first token, the choice, and no more.
        student.go_on.release(2)
        choice.join()
        assert (len(choices), len(texts)) == (1, 0)
        student.go_on.release(8)
        text.join()
    assert [response.status_code for response in choices + texts] == [200, 200]


class CountingStudent(ServedStudent):
    """Notes how many choices it makes together, and fails at those of a forbidden text."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, threads=1)
        self.made: list[int] = []
        self.go_on = threading.Event()

    def choices(self, rows: Sequence[TrainingRow]) -> list[Choice]:
        self.made.append(len(rows))
        assert self.go_on.wait(60)
        if any(self.tokenizer.encode_text("forbidden")[0] in row.prompt for row in rows):
            raise ValueError("no")
        return super().choices(rows)


def asked_behind_another(student: CountingStudent, bodies: Sequence[dict[str, Any]]) -> list[int]:
    """The statuses of the answers to `bodies`, which wait while a first choice is made."""
    student.go_on.clear()
    student.made = []
    with own_server(student) as running, ThreadPoolExecutor(len(bodies) + 1) as pool:

        def ask(body: dict[str, Any]) -> int:
            return httpx.post(running.url + PATH, json=body, trust_env=False).status_code

        first = pool.submit(ask, request(4))
        assert wait_until(lambda: student.made == [1])
        asked = [pool.submit(ask, body) for body in bodies]
        assert wait_until(lambda: running.server.places == len(bodies) + 1)
        student.go_on.set()
        assert first.result() == 200
        return [each.result() for each in asked]


def test_choices_that_wait_are_made_together(tiny_onnx: Build) -> None:
    student = CountingStudent(tiny_onnx("llama"))
    bodies = [request(4) | {"messages": messages(number)} for number in range(20)]
    assert asked_behind_another(student, bodies) == [200] * 20
    assert student.made == [1, CHOICES_AT_ONCE, 20 - CHOICES_AT_ONCE]


def test_a_choice_that_fails_leaves_those_beside_it(tiny_onnx: Build) -> None:
    student = CountingStudent(tiny_onnx("llama"))
    bodies = [request(4) for _ in range(4)]
    bodies[2] = bodies[2] | {"messages": [{"role": "user", "content": "forbidden"}]}
    assert asked_behind_another(student, bodies) == [200, 200, 500, 200]
    assert student.made == [1, 4, 1, 1, 1, 1]


def test_texts_beyond_the_slots_wait(tiny_onnx: Build) -> None:
    student = SlowStudent(tiny_onnx("llama"))
    student.limits = Limits(batch=2)
    answers: list[httpx.Response] = []
    with own_server(student) as running:
        threads = [post(running, answers, max_tokens=3) for _ in range(3)]
        assert wait_until(lambda: running.server.places == 3)
        student.go_on.release(4)
        assert wait_until(lambda: student.asked == 5)
        assert len(running.server.rounds.active) == 2
        student.go_on.release(20)
        for thread in threads:
            thread.join()
    assert [response.status_code for response in answers] == [200] * 3


def test_an_answer_that_fails_leaves_those_beside_it(
    tiny_onnx: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(ServedStudent):
        def steps(self, *arguments: Any, **settings: Any) -> Any:
            for number, step in enumerate(super().steps(*arguments, **settings)):
                if settings["seed"] == 7 and number == 3:
                    raise ValueError("no")
                yield step

    bodies = [{**request(0), "seed": seed, "stream": False, "stop": None} for seed in range(8)]
    with own_server(Failing(tiny_onnx("llama"), threads=1)) as running:
        expected = [answered(running, body) for body in bodies[:7]]
        answers: list[httpx.Response] = []
        failing = post(running, answers, **bodies[7])
        with ThreadPoolExecutor(7) as pool:
            found = list(pool.map(lambda body: answered(running, body), bodies[:7]))
        failing.join()
    assert found == expected
    assert answers[0].status_code == 500


def test_a_client_that_goes_frees_its_slot(tiny_onnx: Build) -> None:
    student = ServedStudent(tiny_onnx("llama"), threads=1, limits=Limits(batch=2))
    with own_server(student) as running:
        for _ in range(5):
            with (
                httpx.Client(trust_env=False, timeout=60) as http,
                http.stream(
                    "POST", running.url + PATH, json=request(0) | {"max_tokens": 900, "stop": None}
                ) as response,
            ):
                assert next(response.iter_lines())
        assert wait_until(lambda: running.server.places == 0 and not running.server.rounds.active)
        assert isinstance(student.generator, TextStudent)
        assert student.generator.batch.active == []
        assert answered(running, request(2))


def test_an_answer_that_was_guessed_takes_few_rounds(
    tiny_onnx: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = [0]
    next_turns = Rounds.next_turns

    def count(self: Rounds) -> Any:
        rounds[0] += 1
        return next_turns(self)

    monkeypatch.setattr(Rounds, "next_turns", count)
    student = ServedStudent(with_drafts(tiny_onnx("llama"), tmp_path), threads=1)
    body = {"messages": messages(3), "max_tokens": 30, "logprobs": True, "stream": True}
    found, took = [], []
    with own_server(student) as running:
        found.append(answered(running, body))
        generator = student.generator
        assert isinstance(generator, TextStudent)
        prompt = generator.tokenizer.encode_chat(messages(3))
        said = [token for token, _ in generator.steps(prompt, 30)]
        for right in (0, 9):
            generator.batch.drafts = Guessing([said], right)  # type: ignore[assignment]
            before = rounds[0]
            found.append(answered(running, body))
            took.append(rounds[0] - before)
    assert found[0] == found[1] == found[2]
    assert len(said) == 30
    assert took[0] >= 30
    assert took[1] <= 10


def test_messages_and_answer_stay_within_the_context_that_is_given(tiny_onnx: Build) -> None:
    student = ServedStudent(tiny_onnx("llama"), threads=1, limits=Limits(context=50))
    with own_server(student) as running:
        long = httpx.post(running.url + PATH, json={"messages": messages(7)}, trust_env=False)
        whole = httpx.post(running.url + PATH, json={"messages": messages(0)}, trust_env=False)
    assert long.status_code == 400
    assert "maximum context length is 50 tokens" in long.json()["error"]["message"]
    assert whole.json()["usage"]["total_tokens"] == 50


def figures(url: str) -> dict[str, float]:
    """The server's metrics by their names and labels."""
    response = httpx.get(f"{url}/metrics", trust_env=False).raise_for_status()
    assert response.headers["content-type"].startswith("text/plain")
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_what_it_answered_is_told_to_prometheus(tiny_onnx: Build) -> None:
    with own_server(ServedStudent(tiny_onnx("llama"), threads=1)) as running:
        assert httpx.get(f"{running.url}/health", trust_env=False).json() == {"status": "ok"}
        usages = []
        for body in ({"max_tokens": 1}, {"max_tokens": 7}):
            content = {"messages": messages(0), **body}
            answer = httpx.post(running.url + PATH, json=content, trust_env=False)
            usages.append(answer.json()["usage"])
        assert httpx.post(running.url + PATH, json={}, trust_env=False).status_code == 400
        found = figures(running.url)
    prompt = sum(usage["prompt_tokens"] for usage in usages)
    written = sum(usage["completion_tokens"] for usage in usages)
    assert found['distillery_requests_total{status="200"}'] == 2
    assert found['distillery_requests_total{status="400"}'] == 1
    assert found['distillery_tokens_total{kind="prompt"}'] == prompt
    assert found['distillery_tokens_total{kind="answer"}'] == written == 8
    assert found["distillery_requests_waiting"] == 0
    assert found["distillery_answer_seconds_count"] == 2
    assert 0 < found["distillery_first_token_seconds_sum"] < found["distillery_answer_seconds_sum"]
    assert found["process_resident_memory_bytes"] > 0


@contextmanager
def started(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server as a user starts it: its URL without /v1, and its process."""
    program = str(Path(sys.executable).with_name("distillery"))
    command = [program, "serve", str(folder), "--port", "0", "--threads", "1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield json.loads(process.stdout.readline())["url"].removesuffix("/v1"), process
        finally:
            process.kill()


def test_a_server_that_is_stopped_answers_what_is_there(tiny_onnx: Build) -> None:
    body = {"messages": messages(0), "max_tokens": 900, "stream": True}
    with (
        started(tiny_onnx("llama")) as (url, process),
        httpx.Client(trust_env=False, timeout=60) as http,
        http.stream("POST", url + PATH, json=body) as response,
    ):
        lines = response.iter_lines()
        assert next(lines)
        process.send_signal(signal.SIGTERM)

        def refused() -> bool:
            try:
                return httpx.get(f"{url}/health", trust_env=False).status_code == 503
            except httpx.TransportError:
                return True

        assert wait_until(refused)
        assert list(lines)[-2] == "data: [DONE]"
        assert process.wait(20) in (0, -signal.SIGTERM)


def test_what_is_not_answered_in_time_is_refused_when_it_stops(tiny_onnx: Build) -> None:
    student = SlowStudent(tiny_onnx("llama"))
    answers: list[httpx.Response] = []
    with own_server(student, Limits(drain_s=0.1)) as running:
        first = post(running, answers)
        assert wait_until(lambda: student.asked == 1)
        second = post(running, answers)
        assert wait_until(lambda: running.server.places == 2)
    first.join()
    second.join()
    student.go_on.release(2)
    assert [response.status_code for response in answers] == [503, 503]
    assert answers[0].json()["error"]["code"] == "server_stopping"


@pytest.mark.slow
def test_several_processes_answer_and_one_that_dies_is_replaced(tiny_onnx: Build) -> None:
    with started(tiny_onnx("llama"), "--processes", "2") as (url, process):

        def ask(number: int) -> int:
            body = request(number) | {"stream": False}
            return httpx.post(url + PATH, json=body, trust_env=False, timeout=60).status_code

        def asked(times: int) -> set[int]:
            with ThreadPoolExecutor(8) as pool:
                return set(pool.map(ask, range(times)))

        assert asked(60) == {200}
        assert figures(url)['distillery_requests_total{status="200"}'] == 60
        children = [each for each in psutil.Process(process.pid).children() if serves(each)]
        assert len(children) == 2
        for child in children:
            os.kill(child.pid, signal.SIGKILL)

        def replaced() -> bool:
            found = [each for each in psutil.Process(process.pid).children() if serves(each)]
            return len(found) == 2 and not set(children) & set(found)

        assert wait_until(replaced)
        # Only those that were started again can answer.
        assert asked(60) == {200}
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not any(each.is_running() for each in children)


def serves(process: psutil.Process) -> bool:
    """Whether it is one that Processes started, and not multiprocessing's own tracker."""
    try:
        return "spawn_main" in " ".join(process.cmdline()) and not re.search(
            "resource_tracker", " ".join(process.cmdline())
        )
    except psutil.NoSuchProcess:
        return False
