"""How much load a server holds: `make bench-serving`, or `python -m benchmarks.serving [--only
CONTEST] [--seconds N] [--rounds N] [--threads N] [--soak MINUTES]`.

The base model of the demo behind two servers, `distillery serve` and llama.cpp's own (by
xllamacpp), both with weights of 4 bits, asked the same requests over HTTP by 1 to 32 users. Each
user asks again as soon as it has its answer.

choice      the sample's test rows, answered by one token with the 5 likeliest ones
generation  the same rows, answered by at most 64 tokens, as a stream

Each server tries its FORMS for some seconds, at 8 users, and keeps the fastest for each contest.
The servers take turns at each number of users, the order turned round every other time; one that
is not asked computes nothing. A server has the first `--threads` cores, and the users, which are
coroutines of this process, have the others.

Then the soak, for our server alone: choices, texts of all lengths and streams by 8 users, of which
some go in the middle of their answers. Its memory is read every SAMPLE_S seconds.

The last line is JSON:

CONTEST_ratio_min   the smallest ratio, over all numbers of users, of our rate to llama.cpp's:
                    requests a second in choice, tokens a second in generation
errors              answers other than 200, and answers without an end; both servers', soak included
soak_growth         our server's memory in the last fifth of the soak over that in the second
                    fifth, less 1
machine             the processor and its cores
contests            for each contest, number of users and server: requests and tokens a second;
                    p50, p95 and p99 of the seconds of an answer; in generation also of those to
                    the first token; errors; cores_busy, processor seconds of the server a second;
                    memory in MiB
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.distil import read
from benchmarks.inference_contestants import Settings, form_title
from benchmarks.inference_files import PROJECT, exported, gguf_file, rounded_gguf
from distillery.machine import machine_name
from distillery.models.base import base_folder
from distillery.prompts import Message, render_messages
from distillery.recipe import ExportForm, Recipe, load_recipe

USERS = (1, 2, 4, 8, 16, 32)
TRIED_BY = 8
"""Users who try the forms, and who ask in the soak."""

TRIAL_S = 6.0
SAMPLE_S = 5.0
TOKENS = 64
ROWS = 240

FORMS: dict[str, list[Settings]] = {
    "ours": [
        {"precision": "int4", "algorithm": "rtn", "block_size": 64},
        {"precision": "int4", "algorithm": "k_quant_high", "block_size": 64},
    ],
    "llama_cpp": [
        {"weights": "Q4_0", "slots": 8},
        {"weights": "Q4_0", "slots": 32},
        {"weights": "Q4_1", "slots": 8},
    ],
}

CONTESTS: dict[str, dict[str, Any]] = {
    "choice": {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 5},
    "generation": {
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
}
"""What the requests of each contest have beside their messages."""

COUNTED = {"choice": "requests_s", "generation": "tokens_s"}
"""The rate that counts in each contest."""


class Unfinished(Exception):
    """An answer that is an error, or has no end."""


@dataclass
class Load:
    """What users found: seconds to the first token and to the end of each answer, and counts."""

    first_s: list[float] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: int = 0

    def figures(self, seconds: float) -> dict[str, Any]:
        """Return what the module says of a load that took `seconds`."""
        found: dict[str, Any] = {
            "requests_s": round(len(self.answer_s) / seconds, 2),
            "tokens_s": round(self.tokens / seconds, 1),
            "answer_s": percentiles(self.answer_s),
            "errors": self.errors,
        }
        if self.first_s:
            found["first_token_s"] = percentiles(self.first_s)
        return found


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p95 and p99."""
    ordered = sorted(seconds) or [float("nan")]
    found = {}
    for share in (50, 95, 99):
        index = min(len(ordered) - 1, len(ordered) * share // 100)
        found[f"p{share}"] = round(ordered[index], 4)
    return found


class Server:
    """A server in a process of its own, on the first cores. `url` ends in /v1."""

    def __init__(self, command: list[str], threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment.pop("DISTILLERY_SERVER_KEY", None)
        self.process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: keep_to(range(threads)),
        )
        assert self.process.stdout
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{command}: does not start")
        url = json.loads(line)["url"] if line.startswith("{") else f"{line}/v1"
        self.url = f"{url}/chat/completions"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    @property
    def processor_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    @property
    def memory_mib(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 2**20


def keep_to(cores: Sequence[int]) -> None:
    """Keep this process to some cores, where the system can."""
    if hasattr(os, "sched_setaffinity") and len(cores) > 0:
        os.sched_setaffinity(0, cores)


class Bench:
    """Servers of two kinds, and the requests that they are asked. `errors`: of all loads."""

    def __init__(self, demo: Recipe, threads: int) -> None:
        assert demo.teacher.preparation
        base = base_folder(demo.teacher.preparation.base)
        self.threads = threads
        self.folders = {}
        for settings in FORMS["ours"]:
            self.folders[form_title(settings)] = exported(base, ExportForm(**settings))
        self.files = {"Q4_0": rounded_gguf(gguf_file(), "Q4_0"), "Q4_1": gguf_file()}
        rows = read("test")[:ROWS]
        self.messages = [render_messages(example, demo.prompt) for example in rows]
        self.errors = 0

    @contextmanager
    def served(self, name: str, settings: Settings) -> Iterator[Server]:
        """Run a server within the `with` block."""
        threads = str(self.threads)
        if name == "ours":
            program = Path(sys.executable).with_name("distillery")
            command = [str(program), "serve", str(self.folders[form_title(settings)])]
            command += ["--port", "0", "--threads", threads]
        else:
            command = [sys.executable, "-m", "benchmarks.serving_peer"]
            command += [str(self.files[settings["weights"]]), threads, str(settings["slots"])]
        server = Server(command, self.threads)
        try:
            yield server
        finally:
            server.stop()

    def load(self, server: Server, contest: str, users: int, seconds: float) -> dict[str, Any]:
        """Return the figures of one load, after a second of warming up."""
        asyncio.run(self.ask(server, contest, users, 1.0))
        started, processor = time.perf_counter(), server.processor_s
        found = asyncio.run(self.ask(server, contest, users, seconds))
        taken = time.perf_counter() - started
        self.errors += found.errors
        return {
            **found.figures(taken),
            "cores_busy": round((server.processor_s - processor) / taken, 3),
            "memory_mib": round(server.memory_mib),
        }

    async def ask(self, server: Server, contest: str, users: int, seconds: float) -> Load:
        """Let users ask for some seconds, each a different part of the rows."""
        load, deadline = Load(), time.perf_counter() + seconds
        async with session() as http:

            async def user(number: int) -> None:
                turn = number * len(self.messages) // users
                while time.perf_counter() < deadline:
                    body = {"messages": self.messages[turn % len(self.messages)]}
                    turn += 1
                    await answer(http, server.url, body | CONTESTS[contest], load)

            await asyncio.gather(*map(user, range(users)))
        return load

    def fastest(self, name: str, contest: str) -> Settings:
        """Return the form by which a server is fastest in a contest, by one trial of each."""
        speeds = []
        for settings in FORMS[name]:
            with self.served(name, settings) as server:
                found = self.load(server, contest, TRIED_BY, TRIAL_S)
            speeds.append(found[COUNTED[contest]])
            print(f"{contest}, tried: {name} {json.dumps(settings)} {speeds[-1]}", flush=True)
        return FORMS[name][speeds.index(max(speeds))]

    def compete(self, contest: str, seconds: float, rounds: int) -> dict[str, Any]:
        """Return the figures of each number of users and server: of `rounds` loads that with the
        median rate."""
        chosen = {name: self.fastest(name, contest) for name in FORMS}
        runs: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
        with (
            self.served("ours", chosen["ours"]) as ours,
            self.served("llama_cpp", chosen["llama_cpp"]) as peer,
        ):
            servers = {"ours": ours, "llama_cpp": peer}
            for number in range(rounds):
                for users in USERS:
                    for name in list(servers)[:: -1 if number % 2 else 1]:
                        found = self.load(servers[name], contest, users, seconds)
                        runs[users, name].append(found)
                        print(f"{contest}, {users} users: {name} {json.dumps(found)}", flush=True)
        table: dict[str, Any] = {"settings": chosen}
        for (users, name), loads in runs.items():
            middle = sorted(loads, key=lambda each: each[COUNTED[contest]])[len(loads) // 2]
            table.setdefault(str(users), {})[name] = middle
        return table

    def soak(self, minutes: float) -> float:
        """Return by how much our server's memory grows; see the module."""
        samples: list[float] = []
        with self.served("ours", FORMS["ours"][0]) as server:
            load = asyncio.run(self.soak_users(server, minutes * 60, samples))
        self.errors += load.errors
        part = max(1, len(samples) // 5)
        before = statistics.median(samples[part : 2 * part] or samples)
        after = statistics.median(samples[-part:])
        print(f"soak: {len(load.answer_s)} answers, {before:.0f} MiB, then {after:.0f} MiB")
        return round(after / before - 1, 4)

    async def soak_users(self, server: Server, seconds: float, samples: list[float]) -> Load:
        """Let users ask all kinds of requests, and read the server's memory into `samples`."""
        load, deadline = Load(), time.perf_counter() + seconds
        async with session() as http:

            async def user(number: int) -> None:
                draw = random.Random(number)
                while time.perf_counter() < deadline:
                    body = any_request(draw, self.messages)
                    if draw.random() < 0.1:
                        await leave_early(http, server.url, body, draw.random())
                    else:
                        await answer(http, server.url, body, load)

            async def watch() -> None:
                while time.perf_counter() < deadline:
                    await asyncio.sleep(min(SAMPLE_S, seconds / 20))
                    samples.append(server.memory_mib)

            await asyncio.gather(watch(), *map(user, range(TRIED_BY)))
        return load


def any_request(draw: random.Random, messages: Sequence[list[Message]]) -> dict[str, Any]:
    """Return a request of any kind: a choice, or a text of some length, with or without a stream, a
    stop text and a schema."""
    asked = draw.choice(messages)
    if draw.random() < 0.5:
        return {"messages": asked, **CONTESTS["choice"]}
    body: dict[str, Any] = {"messages": asked * draw.choice((1, 1, 1, 2, 8))}
    body |= {"max_tokens": draw.randint(2, 2 * TOKENS), "temperature": draw.choice((0, 1))}
    if draw.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if draw.random() < 0.3:
        body["stop"] = ["\n\n", "e " * 20]
    if draw.random() < 0.2:
        body["response_format"] = {"type": "json_object"}
    return body


def session() -> aiohttp.ClientSession:
    """Return a client without limits of its own. Each request has a connection of its own, since
    llama.cpp's server closes those that it has answered, at times while the next request comes."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600))


async def answer(http: aiohttp.ClientSession, url: str, body: dict[str, Any], load: Load) -> None:
    """Ask for an answer and add what it took to `load`."""
    started = time.perf_counter()
    try:
        async with http.post(url, json=body) as response:
            if response.status != 200:
                raise Unfinished(f"{response.status}: {(await response.text())[:200]}")
            if body.get("stream"):
                first, usage = await read_stream(response)
                load.first_s.append(first - started)
            else:
                usage = (await response.json())["usage"]
    except (aiohttp.ClientError, OSError, KeyError, Unfinished, TimeoutError) as error:
        load.errors += 1
        print(f"error: {type(error).__name__} {str(error)[:200]}", flush=True)
        return
    load.answer_s.append(time.perf_counter() - started)
    load.tokens += usage["completion_tokens"]


async def read_stream(response: aiohttp.ClientResponse) -> tuple[float, dict[str, int]]:
    """Return when the first text of a stream came, and the usage that it ends with."""
    first, usage = 0.0, b""
    is_over = False
    async for line in response.content:
        if not first and b'"content":"' in line and b'"content":""' not in line:
            first = time.perf_counter()
        if b'"usage":{' in line:
            usage = line
        is_over = is_over or line.startswith(b"data: [DONE]")
    if not (is_over and usage):
        raise Unfinished("a stream without an end")
    found: dict[str, int] = json.loads(usage.removeprefix(b"data: "))["usage"]
    return first or time.perf_counter(), found


async def leave_early(
    http: aiohttp.ClientSession, url: str, body: dict[str, Any], seconds: float
) -> None:
    """Ask, and go before the answer has come."""
    try:
        async with asyncio.timeout(seconds), http.post(url, json=body) as response:
            await response.read()
    except (TimeoutError, aiohttp.ClientError):
        return


def ratio_min(table: dict[str, Any] | None, rate: str) -> float | None:
    """Return the smallest ratio of our rate to llama.cpp's over all numbers of users."""
    if table is None:
        return None
    ratios = []
    for users in USERS:
        load = table[str(users)]
        ratios.append(float(load["ours"][rate] / load["llama_cpp"][rate]))
    return round(min(ratios), 2)


def main(arguments: Sequence[str]) -> None:
    """Hold the contests and the soak, and print the figures."""
    parser = argparse.ArgumentParser("python -m benchmarks.serving")
    parser.add_argument("--only", choices=[*CONTESTS, "soak"], action="append")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="cores of a server")
    parser.add_argument("--soak", type=float, default=10.0, metavar="MINUTES")
    given = parser.parse_args(arguments)
    asked = given.only or [*CONTESTS, "soak"]
    bench = Bench(load_recipe("demo"), given.threads)
    machine = machine_name()
    print(machine, flush=True)
    keep_to(range(given.threads, psutil.cpu_count() or 1))
    tables: dict[str, Any] = {}
    for contest in CONTESTS:
        if contest in asked:
            tables[contest] = bench.compete(contest, given.seconds, given.rounds)
    growth = bench.soak(given.soak) if "soak" in asked and given.soak else None
    found: dict[str, Any] = {}
    for contest, rate in COUNTED.items():
        found[f"{contest}_ratio_min"] = ratio_min(tables.get(contest), rate)
    found |= {"errors": bench.errors, "soak_growth": growth}
    found |= {"machine": machine, "contests": tables}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
