"""How fast a CPU answers: `make bench-inference`, or `python -m benchmarks.inference [--only
CONTEST] [--threads N] [--rows N] [--processor avx2]`.

The base model of the demo, by four contestants, on one thread and on two, in five contests:

choice    the sample's test rows, one after another, as a server gets them: the probabilities over
          the option letters at the assistant's first token
file      the same rows at once: batches are allowed
apart     as choice, but no prompt begins like another; in the settings of choice
text      rows one after another, answered by their options' texts: the softmax over the texts' mean
          log-probabilities; CommonsenseQA's with five options where COMMONSENSE_QA_DIR is set
generate  prompts one after another, each with 64 tokens after it, the most probable ones

ours       the product's own calls, over an export by one of FORMS: those of the server, in `file`
           and `text` those of batch inference; in `file` it also renders and tokenizes the rows and
           writes the predictions
llama_cpp  llama.cpp as it is built on this machine, with the processor's own instructions
hf         Transformers in PyTorch, in bfloat16 or float32
openvino   OpenVINO over optimum-intel's export, with weights in 8 or 4 bits

The others get token ids. What prompts begin with alike is computed once by each. The contestants
are in benchmarks/inference_contestants.py. Each one's settings are tried on a few rows, for each
contest and number of threads, and the fastest are kept. Then medians of three, each a fresh process
that has answered some rows beforehand, the order turned round every other time. llama.cpp and
OpenVINO are in an environment of their own, .venv-peers; one that is not there is told of in one
line, and its figures are null.

The last line is JSON:

CONTEST_ratio_PEER  ours over the peer's rows a second (of generate, tokens a second), on one
                    thread; the same on two under a name that ends in _2
machine             the processor and its cores
processor           what it was taken for: native, avx2 or avx512_vnni
prompts             for each contest, how many rows, their mean tokens, and how many of these all
                    of them begin with
contests            for each contest, number of threads and contestant: its settings; speed, rows or
                    tokens a second; load_s, seconds until the model is ready; rss_mb, the process's
                    peak memory in MiB, its Python and libraries included; cores_busy; accuracy,
                    0 to 1; same_answer, the share of rows with the answer of Transformers in
                    float32; from_fp32, the mean distance of a probability from that one's. In
                    generate, same_answer is the share of tokens before the first other one.

The base model knows nothing of the demo's task, so that its accuracy is about chance there, and
many of its letters nearly tie.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

from benchmarks.inference_contestants import TOKENS, Job, Row, Settings, common_start
from benchmarks.inference_files import (
    NARROWER,
    PEERS,
    PLACE,
    PROJECT,
    apart_rows,
    choice_rows,
    make_files,
    missing_peers,
    narrow,
    text_rows,
)
from distillery.machine import machine_name
from distillery.recipe import ExportForm, load_recipe

ROUNDS, THREADS = 3, (1, 2)

Runs = dict[str, list[dict[str, Any]]]
"""The figures of each contestant's processes."""


class Contest(NamedTuple):
    """`method`: what of a `Contestant` is timed. `rows`: how many are asked, `trial_rows` of them
    to choose settings and `warm_up` before the time is taken."""

    method: str
    rows: int
    trial_rows: int
    warm_up: int


CONTESTS = {
    "choice": Contest("choice", 240, 48, 16),
    "file": Contest("file", 240, 48, 16),
    "apart": Contest("choice", 96, 0, 8),
    "text": Contest("text", 60, 20, 5),
    "generate": Contest("generate", 6, 3, 1),
}

FORMS: list[Settings] = [
    {"precision": "int4", "algorithm": "k_quant_high", "block_size": 64},
    {"precision": "int4", "algorithm": "rtn", "block_size": 64},
    {"precision": "int8", "algorithm": "rtn", "block_size": 64},
]
"""Fields of an ExportForm."""
if "dynamic" in get_args(ExportForm.model_fields["algorithm"].annotation):
    FORMS.append({"precision": "int8", "algorithm": "dynamic"})

SETTINGS: dict[str, list[Settings]] = {
    "ours": FORMS,
    "llama_cpp": [{"weights": "Q4_0"}, {"weights": "Q4_1"}, {"weights": "Q8_0"}],
    "hf": [
        {"dtype": "float32", "attention": "sdpa"},
        {"dtype": "bfloat16", "attention": "eager"},
        {"dtype": "bfloat16", "attention": "sdpa"},
    ],
    "openvino": [
        {"weights": "int8", "precision": "f32"},
        {"weights": "int8", "precision": "bf16"},
        {"weights": "int4", "precision": "f32"},
        {"weights": "int4", "precision": "bf16"},
    ],
}
BATCHES = {"ours": [1], "llama_cpp": [1, 16], "hf": [16], "openvino": [16]}
"""Rows that may be computed together in `file`. Ours chooses by itself."""
REFERENCE = SETTINGS["hf"][0]
PEER_NAMES = [name for name in SETTINGS if name != "ours"]


def settings_of(name: str, contest: str) -> list[Settings]:
    """Return the settings that a contestant tries in a contest."""
    if contest != "file" or BATCHES[name] == [1]:
        return SETTINGS[name]
    pairs = product(SETTINGS[name], BATCHES[name])
    return [{**settings, "batch": batch} for settings, batch in pairs]


class Bench:
    """The contests among contestants, over files and the rows of each contest. `environment`: what
    their processes find beside this one's variables."""

    def __init__(
        self,
        names: Sequence[str],
        files: dict[str, Any],
        rows: dict[str, list[Row]],
        environment: dict[str, str],
    ) -> None:
        self.names, self.files, self.rows = list(names), files, rows
        self.environment = os.environ | environment
        self.references: dict[str, Any] = {}
        self.chosen: dict[tuple[str, int], dict[str, Settings]] = {}

    def compete(self, contest: str, threads: int, chosen: dict[str, Settings]) -> Runs:
        """Return ROUNDS processes' figures of each contestant in its settings."""
        runs: Runs = defaultdict(list)
        for number in range(ROUNDS):
            for name in self.names[:: -1 if number % 2 else 1]:
                runs[name].append(
                    self.run(name, chosen[name], threads, contest, self.rows[contest])
                )
        return runs

    def choose(self, contest: str, threads: int) -> dict[str, Settings]:
        """Return each contestant's fastest settings; see `fastest`."""
        # The rows of `apart` ask for the same as those of `choice`, only longer.
        tried = "choice" if contest == "apart" else contest
        if (tried, threads) not in self.chosen:
            found = {name: self.fastest(name, tried, threads) for name in self.names}
            self.chosen[tried, threads] = found
        return self.chosen[tried, threads]

    def fastest(self, name: str, contest: str, threads: int) -> Settings:
        """Return a contestant's fastest settings, by one trial of each."""
        tried = settings_of(name, contest)
        rows = self.rows[contest][: CONTESTS[contest].trial_rows]
        speeds = [self.run(name, one, threads, contest, rows)["speed"] for one in tried]
        return tried[speeds.index(max(speeds))]

    def reference(self, contest: str) -> Any:
        """Return the answers of Transformers in float32."""
        # The rows of `file` are those of `choice`.
        key = "choice" if contest == "file" else contest
        if key not in self.references:
            found = self.run("hf", REFERENCE, 1, key, self.rows[key])
            self.references[key] = found["answers"]
        return self.references[key]

    def run(
        self, name: str, settings: Settings, threads: int, contest: str, rows: list[Row]
    ) -> dict[str, Any]:
        """Return the figures of one process, and print them but for the answers."""
        of = CONTESTS[contest]
        job: Job = {
            "contestant": name,
            "settings": settings,
            "threads": threads,
            "files": self.files,
            "method": of.method,
            "rows": rows,
            "warm_up": of.warm_up,
        }
        path = PLACE / f"job-{os.getpid()}.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        python = str(PEERS / "python") if name in ("llama_cpp", "openvino") else sys.executable
        command = [python, "-m", "benchmarks.inference_contestants", str(path)]
        load = os.getloadavg()[0]
        done = subprocess.run(
            command, cwd=PROJECT, env=self.environment, capture_output=True, text=True
        )
        path.unlink()
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        shown = [f"{key} {value:.2f}" for key, value in found.items() if key != "answers"]
        what = f"{contest}, {threads} threads, {len(rows)} rows: {name} {json.dumps(settings)}"
        print(f"{what}: {', '.join(shown)} (load before it {load:.1f})", flush=True)
        return found


def figures(runs: list[dict[str, Any]], reference: Any, rows: list[Row]) -> dict[str, Any]:
    """Return one contestant's medians in a contest, and how the answers of its first process agree
    with the reference's."""
    found: dict[str, Any] = {}
    for key in ("speed", "load_s", "rss_mb", "cores_busy"):
        found[key] = round(statistics.median(run[key] for run in runs), 2)
    return found | agreement(runs[0]["answers"], reference, rows)


def agreement(answers: Any, reference: Any, rows: list[Row]) -> dict[str, float]:
    """Return accuracy, same_answer and from_fp32 for probabilities, or same_answer for tokens; see
    the module."""
    pairs = list(zip(answers, reference, strict=True))
    if isinstance(answers[0][0], int):
        same = 0
        for said, known in pairs:
            for token, other in zip(said, known, strict=True):
                if token != other:
                    break
                same += 1
        return {"same_answer": round(same / (len(pairs) * TOKENS), 3)}
    best = [found.index(max(found)) for found in answers]
    known = [found.index(max(found)) for found in reference]
    apart = []
    for found, other in pairs:
        apart += [abs(a - b) for a, b in zip(found, other, strict=True)]
    return {
        "accuracy": share(best, [row["gold"] for row in rows]),
        "same_answer": share(best, known),
        "from_fp32": round(statistics.mean(apart), 4),
    }


def share(found: Sequence[int], known: Sequence[int]) -> float:
    """Return the share (0 to 1) of places where both are equal."""
    return round(statistics.mean(a == b for a, b in zip(found, known, strict=True)), 3)


def ratios(contests: dict[str, dict[int, dict[str, Any]]]) -> dict[str, float | None]:
    """Return CONTEST_ratio_PEER of all contests, peers and numbers of threads; None where either
    was not asked."""
    found: dict[str, float | None] = {}
    for threads, contest, peer in product(THREADS, CONTESTS, PEER_NAMES):
        by_name = contests.get(contest, {}).get(threads, {})
        suffix = "" if threads == 1 else f"_{threads}"
        ratio = None
        if "ours" in by_name and peer in by_name:
            ratio = round(by_name["ours"]["speed"] / by_name[peer]["speed"], 2)
        found[f"{contest}_ratio_{peer}{suffix}"] = ratio
    return found


def prompts_of(rows: dict[str, list[Row]]) -> dict[str, Any]:
    """Return what the module says of `prompts`."""
    found = {}
    for contest, asked in rows.items():
        prompts = [row["prompt"] for row in asked]
        tokens = round(statistics.mean(map(len, prompts)), 1)
        found[contest] = {
            "rows": len(prompts),
            "tokens": tokens,
            "begin_alike": common_start(prompts),
        }
    return found


def contest_rows(base: Path, most: int) -> dict[str, list[Row]]:
    """Return the rows of each contest, at most `most`."""
    counts = {name: min(contest.rows, most) for name, contest in CONTESTS.items()}
    choice = choice_rows(load_recipe("demo"), base, max(counts.values()))
    return {
        "choice": choice[: counts["choice"]],
        "file": choice[: counts["file"]],
        "apart": apart_rows(choice[: counts["apart"]]),
        "text": text_rows(base, counts["text"]),
        "generate": choice[: counts["generate"]],
    }


def main(arguments: Sequence[str]) -> None:
    """Hold the contests and print the figures."""
    parser = argparse.ArgumentParser("python -m benchmarks.inference")
    parser.add_argument("--only", choices=list(CONTESTS), action="append", help="may be repeated")
    parser.add_argument("--threads", type=int, choices=THREADS)
    parser.add_argument("--rows", type=int, default=240, help="at most so many in each contest")
    parser.add_argument("--processor", choices=["native", *NARROWER], default="native")
    given = parser.parse_args(arguments)
    missing = missing_peers()
    environment: dict[str, str] = {}
    if given.processor != "native":
        environment = narrow(given.processor)
        missing["llama_cpp"] = "it is compiled for this machine's processor"
    for name, reason in missing.items():
        print(f"{name} is left out, and its figures are null: {reason}", flush=True)
    files = make_files(load_recipe("demo"), FORMS, missing)
    rows = contest_rows(Path(files["base"]), given.rows)
    prompts = prompts_of(rows)
    print(f"{machine_name()}; {json.dumps(prompts)}", flush=True)

    bench = Bench([name for name in SETTINGS if name not in missing], files, rows, environment)
    contests: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for threads in [given.threads] if given.threads else THREADS:
        for contest in given.only or CONTESTS:
            chosen = bench.choose(contest, threads)
            runs = bench.compete(contest, threads, chosen)
            by_name = {}
            for name, done in runs.items():
                found = figures(done, bench.reference(contest), rows[contest])
                by_name[name] = {"settings": chosen[name], **found}
                print(f"{contest}, {threads} threads: {name} {json.dumps(by_name[name])}")
            contests[contest][threads] = by_name
    print(
        json.dumps(
            {
                **ratios(contests),
                "machine": machine_name(),
                "processor": given.processor,
                "prompts": prompts,
                "contests": contests,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
