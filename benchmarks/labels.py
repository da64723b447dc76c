"""How fast rows are labelled: `make bench-labels`, or `python -m benchmarks.labels [--soft]
[--spread] [--full]`.

--soft asks for log-probabilities. --spread has the endpoint's latencies lie between half and one
and a half of their mean: where all are the same, answers come in bunches, and waiting in a bunch is
much of what is measured. --full labels a million rows to see what memory they take, not 100,000.

2,000 multiple-choice rows, an endpoint of 64 places that takes 0.2 s a call (slow_endpoint.py, a
process of its own), and 64 calls at a time. Each contestant is a fresh interpreter that has asked
for one row more beforehand, so that all is imported; the clock runs from the first row to the last
answer, and for ours until every answer is committed and every file written. Ours has prices and a
budget, so that each call is in journal and ledger, with its cost. Medians of three, the contestants
in turn. The last line is JSON, in seconds where nothing else is said:

ideal_s               rows / places x latency
ours_azure_s          distillery.labels.label with a fresh SQLite label store, by azure-ai-inference
bare_azure_s          64 tasks of a bare asyncio loop, same SDK and bodies: nothing is stored
ours_openai_s         the same two through the openai SDK
bare_openai_s
sequential_s          the lab's loop, azure-ai-inference call after call: 100 rows, times 20
curator_s             bespokelabs-curator, cold cache, its own environment; null if it fails
share_of_bare_azure   bare / ours
share_of_bare_openai
share                 the lower of both
cpu_ms_per_call       CPU time of our process, through the SDK that takes more of it
second_run_s          2,000 rows that the label store knows: no call
second_run_100k_s     100,000 such rows
memory_rows           rows of the larger labelling, which a stub answers at once, without HTTP; with
                      journal and ledger
memory_rows_a_second
peak_10th_mib         the most memory that a tenth of these rows takes, libraries included
peak_mib              that all of them take
memory_growth         the share by which the latter is more
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from urllib.request import urlopen

from pydantic import SecretStr

from benchmarks.slow_endpoint import LETTERS, serving
from distillery.data.rows import RowReader, to_example
from distillery.evaluation.scoring_process import peak_mib
from distillery.labels.labelling import label
from distillery.labels.questions import questions
from distillery.labels.store import LabelStore, StoredAnswer
from distillery.prompts import Message, render_messages
from distillery.recipe import BudgetRecipe, Columns, PriceRecipe, PromptRecipe, TeacherRecipe
from distillery.records import Example, Usage
from distillery.teacher.asking import Teacher
from distillery.teacher.budget import cost_of
from distillery.teacher.endpoint import Endpoint, Sdk
from distillery.teacher.ledger import Call, Payer, new_call_id
from distillery.teacher.options import MOST_LOGPROBS, CallOptions
from distillery.teacher.reply import Completion

ROWS, MANY_ROWS, SEQUENTIAL_ROWS, MOST_ROWS = 2_000, 100_000, 100, 1_000_000
LATENCY_S, PLACES, SPREAD = 0.2, 64, 0.5
ROUNDS = 3
MODEL = "teacher"
PROMPT = PromptRecipe()
PRICES = PriceRecipe(input=2.5, cached_input=1.25, output=10.0)
USED = Usage(prompt_tokens=90, completion_tokens=1)
PROJECT = Path(__file__).resolve().parents[1]
SAMPLE = PROJECT / "distillery" / "data" / "sample"

CURATOR = "bespokelabs-curator==0.1.31"
CURATOR_VENV = PROJECT / ".distillery" / "bench" / "curator-venv"
CURATOR_ENVIRONMENT = {
    "TELEMETRY_ENABLED": "false",
    "CURATOR_VIEWER": "false",
    # Else it asks a server far away for prices when it is imported.
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HF_HUB_OFFLINE": "1",
}
CURATOR_SCRIPT = """
import json, sys, time
# Has tiktoken read the vocabulary that litellm ships.
import litellm.litellm_core_utils.default_encoding
from bespokelabs import curator
from datasets import Dataset

class Labeller(curator.LLM):
    def prompt(self, input):
        return input["messages"]

    def parse(self, input, response):
        return {"answer": response.strip()}

_, url, rows, generation = sys.argv
labeller = Labeller(
    model_name="teacher",
    backend="openai",
    generation_params=json.loads(generation),
    backend_params={
        "base_url": url,
        "api_key": "none",
        "max_concurrent_requests": 64,
        "max_requests_per_minute": 1_000_000_000,
        "max_tokens_per_minute": 1_000_000_000_000,
    },
)
first, *everything = json.load(open(rows))
labeller(Dataset.from_list([first]))
dataset = Dataset.from_list(everything)
started, cpu = time.perf_counter(), time.process_time()
answers = labeller(dataset).dataset["answer"]
figures = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
known = [answer for answer in answers if answer in list("ABC")]
print(json.dumps(figures | {"answers": len(known)}))
"""

Figures = dict[str, float]
Loop = Callable[[list[list[Message]]], list[str]]
"""Asks for all of these and gives back the answers."""


def synthetic_rows(count: int) -> Iterator[Example]:
    """Rows of the sample again and again, each with a number that makes it one of its own; without
    a gold answer."""
    lines = [
        line
        for path in sorted(SAMPLE.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    sample = [to_example(json.loads(line), RowReader(Columns()), "sample") for line in lines]
    for number in range(count):
        row = sample[number % len(sample)]
        changes = {
            "example_id": str(number),
            "question": f"{row.question} ({number})",
            "answer_key": None,
        }
        yield row.model_copy(update=changes)


def recipe(soft: bool) -> TeacherRecipe:
    return TeacherRecipe(
        soft_labels=soft,
        concurrency=PLACES,
        prices=PRICES,
        budget=BudgetRecipe(cost=1000.0, period="week"),
    )


def body(soft: bool) -> dict[str, Any]:
    """What `label` sends beside model and messages."""
    wanted = recipe(soft)
    return CallOptions(wanted.max_tokens, wanted.temperature, MOST_LOGPROBS if soft else 0).body(
        LETTERS
    )


@contextmanager
def timed(figures: Figures) -> Iterator[None]:
    started, cpu = time.perf_counter(), time.process_time()
    yield
    figures |= {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}


def ours(sdk: Sdk, url: str, folder: Path, rows: int, soft: bool) -> Figures:
    """`label` over the label store in `folder`, which is made where there is none."""
    endpoint = Endpoint(url, MODEL, SecretStr("none"), MODEL, sdk)
    first, *examples = synthetic_rows(1 + rows)
    figures: Figures = {}
    opened = time.perf_counter()
    with LabelStore(store_url(folder)) as store:
        figures["open_s"] = time.perf_counter() - opened
        settings = (PROMPT, recipe(soft), endpoint, store)
        payer = Payer(recipe="bench")
        asyncio.run(label([first], *settings, folder / "first", payer=payer))
        with timed(figures):
            counts = asyncio.run(label(examples, *settings, folder / "labels", payer=payer))
    assert counts.accepted == rows, counts
    return figures


class Stub(Teacher):
    """Answers at once, without HTTP, and leaves in journal and ledger what Teacher does."""

    def __init__(self, store: LabelStore, payer: Payer, endpoint: Endpoint) -> None:
        super().__init__(recipe(False), endpoint, book=store, payer=payer)
        self._store = store
        self._began = Call(
            run=payer.run,
            recipe=payer.recipe,
            teacher=MODEL,
            purpose="label",
            outcome="lost",
            prices=PRICES.model_dump(),
            is_counted=False,
        )

    async def ask(self, *_: Any, key: str = "", **__: Any) -> Completion:
        call = replace(self._began, call_id=new_call_id(), request_key=key)
        self._store.begin(call)
        await asyncio.sleep(0)
        ended = replace(
            call,
            outcome="answer",
            is_counted=True,
            prompt_tokens=USED.prompt_tokens,
            completion_tokens=USED.completion_tokens,
            cost=cost_of(USED, PRICES),
        )
        return Completion("A", "stop", usage=USED, model_version=MODEL, call=ended)


def memory(folder: Path, rows: int) -> Figures:
    """The most memory that labelling so many rows takes, which a stub answers."""
    endpoint = Endpoint("http://127.0.0.1/v1", MODEL, SecretStr("none"), MODEL, "openai")
    figures: Figures = {}
    payer = Payer(recipe="bench")
    with LabelStore(store_url(folder)) as store:
        settings = (PROMPT, recipe(False), endpoint, store, folder / "labels")
        stub = Stub(store, payer, endpoint)
        with timed(figures):
            counts = asyncio.run(
                label(synthetic_rows(rows), *settings, rows=rows, teacher=stub, payer=payer)
            )
    assert counts.accepted == rows, counts
    assert counts.cost is not None
    assert abs(counts.cost - rows * (cost_of(USED, PRICES) or 0.0)) < 1e-6, counts
    return figures | {"peak_mib": peak_mib()}


def store_url(folder: Path) -> str:
    return f"sqlite:///{folder / 'labels.db'}"


def fill(folder: Path, rows: int, soft: bool) -> Figures:
    """Puts an answer to each row, the first included, into a label store, as if it had been asked
    for."""
    figures: Figures = {}
    with timed(figures), LabelStore(store_url(folder)) as store:
        for row in synthetic_rows(1 + rows):
            for question in questions(row, PROMPT, recipe(soft), MODEL):
                store.add(
                    StoredAnswer(
                        request_key=question.key,
                        teacher=MODEL,
                        answer="A",
                        distribution={"A": 0.8, "B": 0.1, "C": 0.1} if soft else None,
                        raw="A",
                        prompt_tokens=90,
                        completion_tokens=1,
                        latency_ms=1000 * LATENCY_S,
                        attempts=1,
                        model_version=MODEL,
                        example_id=row.example_id,
                        prompt=question.messages[-1]["content"],
                    )
                )
    return figures


def rendered(rows: int) -> list[list[Message]]:
    return [render_messages(row, PROMPT) for row in synthetic_rows(rows)]


def bare_azure(url: str, soft: bool) -> Loop:
    from azure.ai.inference.aio import ChatCompletionsClient
    from azure.core.credentials import AzureKeyCredential

    async def loop(everything: list[list[Message]]) -> list[str]:
        # Its transport's own limit is 100 connections.
        async with ChatCompletionsClient(url, AzureKeyCredential("none"), retry_total=0) as client:

            async def ask(messages: list[Message]) -> str:
                asked: Any = {"model": MODEL, "messages": messages, **body(soft)}
                found: Any = await client.complete(asked, headers=headers(soft))
                return str(found.choices[0].message.content)

            return await all_of(everything, ask)

    return lambda everything: asyncio.run(loop(everything))


def bare_openai(url: str, soft: bool) -> Loop:
    from openai import AsyncOpenAI

    async def loop(everything: list[list[Message]]) -> list[str]:
        # Its own limit is 1,000 connections.
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

            async def ask(messages: list[Message]) -> str:
                asked: Any = {"model": MODEL, "messages": messages, **body(soft)}
                return str(
                    (await client.chat.completions.create(**asked)).choices[0].message.content
                )

            return await all_of(everything, ask)

    return lambda everything: asyncio.run(loop(everything))


async def all_of(
    everything: list[list[Message]], ask: Callable[[list[Message]], Awaitable[str]]
) -> list[str]:
    waiting, answers = iter(everything), list[str]()

    async def worker() -> None:
        for messages in waiting:
            answers.append(await ask(messages))

    async with asyncio.TaskGroup() as group:
        for _ in range(PLACES):
            group.create_task(worker())
    return answers


def sequential(url: str, soft: bool) -> Loop:
    from azure.ai.inference import ChatCompletionsClient
    from azure.core.credentials import AzureKeyCredential

    def loop(everything: list[list[Message]]) -> list[str]:
        answers = []
        with ChatCompletionsClient(url, AzureKeyCredential("none")) as client:
            for messages in everything:
                asked: Any = {"model": MODEL, "messages": messages, **body(soft)}
                found: Any = client.complete(asked, headers=headers(soft))
                answers.append(str(found.choices[0].message.content))
        return answers

    return loop


def headers(soft: bool) -> dict[str, str]:
    """Without it, Azure takes no log-probabilities."""
    return {"extra-parameters": "pass-through"} if soft else {}


def bare(loop: Loop, rows: int) -> Figures:
    first, *everything = rendered(1 + rows)
    loop([first])
    figures: Figures = {}
    with timed(figures):
        answers = Counter(loop(everything))
    assert answers.total() == rows
    assert set(answers) <= set(LETTERS), answers
    return figures


def contestant(name: str, url: str, folder: Path, rows: int, soft: bool) -> Figures:
    """What runs in a process of its own."""
    for sdk in get_args(Sdk):
        if name == f"ours_{sdk.partition('-')[0]}":
            return ours(sdk, url, folder, rows, soft)
    if name == "fill":
        return fill(folder, rows, soft)
    if name == "memory":
        return memory(folder, rows)
    return bare(
        {"bare_azure": bare_azure, "bare_openai": bare_openai, "sequential": sequential}[name](
            url, soft
        ),
        rows,
    )


class Bench:
    """Runs contestants against an endpoint and prints what each took."""

    def __init__(self, url: str, scratch: Path, soft: bool) -> None:
        self._url, self._scratch, self._soft = url, scratch, soft
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("DISTILLERY_", "CURATOR_", "TEACHER_"))
            and not name.lower().endswith("_proxy")
        }
        self._environment["DISTILLERY_HOME"] = str(scratch / "home")

    def run(self, name: str, rows: int, folder: str = "", calls: int | None = None) -> Figures:
        """One run, which must make so many calls, by default one a row and one before. `folder`:
        where its store is."""
        place = self._scratch / (folder or f"{name}-{time.monotonic_ns()}")
        place.mkdir(exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "benchmarks.labels",
            name,
            self._url,
            str(place),
            str(rows),
        ]
        command += ["--soft"] if self._soft else []
        return self._run(
            name, command, self._environment, rows, 1 + rows if calls is None else calls
        )

    def curator(self) -> Figures | None:
        """One run with its cache cold."""
        place = self._scratch / f"curator-{time.monotonic_ns()}"
        place.mkdir()
        (place / "script.py").write_text(CURATOR_SCRIPT)
        (place / "rows.json").write_text(
            json.dumps([{"messages": messages} for messages in rendered(1 + ROWS)])
        )
        command = [
            str(CURATOR_VENV / "bin" / "python"),
            str(place / "script.py"),
            self._url,
            str(place / "rows.json"),
        ]
        environment = self._environment | CURATOR_ENVIRONMENT
        # It also writes to the home folder and to that of Hugging Face.
        environment |= {
            "CURATOR_CACHE_DIR": str(place / "cache"),
            "HOME": str(place),
            "HF_HOME": str(place / "hf"),
        }
        try:
            # It sends another one before the clock runs, to read the limits off the headers.
            return self._run(
                "curator", [*command, json.dumps(body(self._soft))], environment, ROWS, 2 + ROWS
            )
        except (OSError, RuntimeError) as error:
            print(
                f"bespokelabs-curator can't be run: {' '.join(str(error).split())[-300:]}",
                flush=True,
            )
            return None

    def calls(self) -> Figures:
        """The endpoint's own count."""
        with urlopen(self._url.removesuffix("/v1") + "/count") as answer:
            counted: Figures = json.load(answer)
        return counted

    def _run(
        self, name: str, command: list[str], environment: dict[str, str], rows: int, calls: int
    ) -> Figures:
        before, load = self.calls()["calls"], os.getloadavg()[0]
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
        figures: Figures = json.loads(done.stdout.strip().splitlines()[-1])
        made = self.calls()["calls"] - before
        assert made == calls, f"{name}: {made} calls in place of {calls}"
        assert figures.get("answers", rows) == rows, f"{name}: {figures}"
        shown = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
        print(
            f"{name:12} {rows:6} rows, {made:4.0f} calls: {shown} (load before it {load:.1f})",
            flush=True,
        )
        return figures


def install_curator() -> bool:
    """Whether bespokelabs-curator is there, installed at the first run."""
    mark = CURATOR_VENV / "installed"
    if not (mark.exists() and mark.read_text() == CURATOR):
        print(f"installing {CURATOR} into {CURATOR_VENV.relative_to(PROJECT)} (0.9 GB)", flush=True)
        pip = [
            str(CURATOR_VENV / "bin" / "pip"),
            "install",
            "--quiet",
            "--disable-pip-version-check",
            CURATOR,
        ]
        for command in ([sys.executable, "-m", "venv", str(CURATOR_VENV)], pip):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = " ".join((done.stderr or done.stdout).split())
                print(f"bespokelabs-curator can't be installed: {said[-300:]}", flush=True)
                return False
        mark.write_text(CURATOR)
    print(
        f"{CURATOR} with {json.dumps(CURATOR_ENVIRONMENT)} and this script:\n{CURATOR_SCRIPT}",
        flush=True,
    )
    return True


def compare(bench: Bench, curator: bool) -> dict[str, list[Figures]]:
    """The figures of each contestant's runs; every other round the other way round."""
    names = [
        "ours_azure",
        "bare_azure",
        "ours_openai",
        "bare_openai",
        "sequential",
        *(["curator"] if curator else []),
    ]
    found: dict[str, list[Figures]] = defaultdict(list)
    for number in range(ROUNDS):
        for name in names[:: -1 if number % 2 else 1]:
            if name == "curator":
                if run := bench.curator():
                    found[name].append(run)
            else:
                found[name].append(
                    bench.run(name, SEQUENTIAL_ROWS if name == "sequential" else ROWS)
                )
    return found


def second_runs(bench: Bench) -> dict[str, float]:
    """Seconds over label stores that know every row."""
    bench.run("ours_openai", ROWS, "known")
    bench.run("fill", MANY_ROWS, "known_100k", calls=0)
    places = {"second_run_s": ("known", ROWS), "second_run_100k_s": ("known_100k", MANY_ROWS)}
    return {
        name: statistics.median(
            bench.run("ours_openai", rows, place, calls=0)["seconds"] for _ in range(ROUNDS)
        )
        for name, (place, rows) in places.items()
    }


def memory_of(bench: Bench, rows: int) -> Figures:
    """The memory of a labelling of so many rows, and of a tenth of them."""
    few, many = (bench.run("memory", each, calls=0) for each in (rows // 10, rows))
    return {
        "memory_rows": rows,
        "memory_rows_a_second": rows / many["seconds"],
        "peak_10th_mib": few["peak_mib"],
        "peak_mib": many["peak_mib"],
        "memory_growth": many["peak_mib"] / few["peak_mib"] - 1,
    }


def main(soft: bool, spread: float, rows: int) -> None:
    settings = map(str, (LATENCY_S, PLACES, spread))
    endpoint = serving("benchmarks.slow_endpoint", *settings)
    with tempfile.TemporaryDirectory() as scratch, endpoint as url:
        bench = Bench(url, Path(scratch), soft)
        latency = f"{LATENCY_S} s a call, give or take {spread:.0%}"
        print(
            f"{ROWS} rows, {PLACES} places, {latency}, {'soft' if soft else 'hard'} labels",
            flush=True,
        )
        runs = compare(bench, install_curator())
        again = second_runs(bench)
        grown = memory_of(bench, rows)
        counted = bench.calls()
    print(f"the endpoint: {1000 * counted['cpu_s'] / counted['calls']:.2f} ms of CPU time a call")
    median = {
        name: statistics.median(one["seconds"] for one in done)
        for name, done in runs.items()
        if done
    }
    cpu = {
        name: statistics.median(1000 * one["cpu_s"] for one in done) / ROWS
        for name, done in runs.items()
        if name.startswith(("ours", "bare"))
    }
    print("CPU ms a call: " + ", ".join(f"{name} {value:.2f}" for name, value in cpu.items()))
    figures = {
        "ideal_s": ROWS / PLACES * LATENCY_S,
        **{
            f"{name}_s": median[name]
            for name in ("ours_azure", "bare_azure", "ours_openai", "bare_openai")
        },
        "sequential_s": median["sequential"] * ROWS / SEQUENTIAL_ROWS,
        "curator_s": median.get("curator"),
        "share_of_bare_azure": median["bare_azure"] / median["ours_azure"],
        "share_of_bare_openai": median["bare_openai"] / median["ours_openai"],
        "share": min(median[f"bare_{sdk}"] / median[f"ours_{sdk}"] for sdk in ("azure", "openai")),
        "cpu_ms_per_call": max(cpu["ours_azure"], cpu["ours_openai"]),
        **again,
        **grown,
    }
    print(
        json.dumps(
            {name: value if value is None else round(value, 3) for name, value in figures.items()}
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.labels")
    parser.add_argument("--soft", action="store_true", help="ask for log-probabilities")
    parser.add_argument("--spread", action="store_true", help="latencies that differ")
    parser.add_argument("--full", action="store_true", help="a million rows for the memory")
    parser.add_argument("run", nargs="*", help="NAME URL FOLDER ROWS: one run, in this process")
    given = parser.parse_args()
    if given.run:
        name, url, folder, rows = given.run
        print(json.dumps(contestant(name, url, Path(folder), int(rows), given.soft)))
    else:
        main(given.soft, SPREAD if given.spread else 0.0, MOST_ROWS if given.full else MANY_ROWS)
