"""Batch inference in shards: `python -m benchmarks.scale_batches [--stub-rows N]`.

A tiny random model answers rows of one easy rule, in processes of this machine and on a Prefect
server with eight workers of the CPU pool, each of which has one run at a time. The server has a
PostgreSQL that is started for it: on SQLite, it stopped answering for minutes. The last line is
JSON:

shard_overhead    seconds that a shard takes beside its rows: stage, cache, lease, store, gathering
stub_overhead     with a stub that takes 20 ms for a row: the run's time on eight workers, from its
                  start to its end, over the time that the rows take on eight, less 1; of that time,
                  stub_before_s until the first child starts, while rows are cut into shards, and
                  stub_after_s from the last one's end, while the answers are gathered
identical         whether one process with one thread, one with two, two processes, other shards,
                  and workers that were killed gave the same files, byte for byte
answered_twice    shards that were answered more often than once in the run in which two children
                  and their parent are killed (kill -9)
seconds           the same rows by one process with one core (1x1), one with two (1x2), two
                  processes (2x1), in few shards and in many, without the start of the interpreter
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.append(str(PROJECT / "tests" / "support"))

from postgres_server import Postgres  # noqa: E402 - the tests' own servers
from sharded_rows import (  # noqa: E402
    STUDENT,
    ShardedRows,
    contents,
    register,
    write_rows,
)
from tiny_model import build_tiny_model  # noqa: E402

from benchmarks.overhead import moment  # noqa: E402

__all__ = ["STUDENT", "batches", "exported", "register", "rounded"]

WORKERS = 8
ROW_S = 0.02
ROWS, SHARD_ROWS, SMALL_SHARD_ROWS = 4_096, 512, 32
STUB_ROWS, STUB_SHARD_ROWS = 1_000_000, 1_024
"""Five and a half hours of rows, 42 minutes for eight workers. Workers that share a list end at
most a shard apart, here 20 s."""
KILLED_ROWS, KILLED_SHARD_ROWS = 512, 16


def exported(folder: Path) -> Path:
    """Build a tiny random model and export it."""
    from onnxruntime_genai.models.builder import create_model

    source = build_tiny_model("llama", folder / "model")
    scratch = str(folder / "scratch")
    create_model(  # type: ignore[call-arg, type-var]
        "llama", str(source), str(folder / "onnx"), "fp32", "cpu", scratch, hf_remote=False
    )
    return folder / "onnx"


def by_processes(sharded: ShardedRows, folder: Path) -> dict[str, Any]:
    """Answer ROWS rows in processes of this machine, in several ways."""
    rows = write_rows(folder / "rows.jsonl", ROWS)
    ways: dict[str, tuple[int, int, set[int] | None]] = {
        "1x1": (SHARD_ROWS, 1, {0}),
        "1x2": (SHARD_ROWS, 1, None),
        "2x1": (SHARD_ROWS, 2, None),
        "1x1, small shards": (SMALL_SHARD_ROWS, 1, {0}),
    }
    wall, files = {}, []
    for name, (shard_rows, processes, cores) in ways.items():
        out, home = folder / f"answers {name}", folder / f"home {name}"
        options = ("--shard-rows", str(shard_rows), "--processes", str(processes))
        done = sharded.command(rows, out, *options, home=home, cores=cores)
        assert done.returncode == 0, done.stderr[-3000:]
        told = re.search(r"set aside, in ([\d.]+) s;", done.stderr)
        assert told, done.stderr[-3000:]
        wall[name] = float(told[1])
        files.append(contents(out))
        print(f"{name}: {wall[name]:.1f} s", flush=True)
    more = ROWS // SMALL_SHARD_ROWS - ROWS // SHARD_ROWS
    return {
        "seconds": wall,
        "shard_overhead": (wall["1x1, small shards"] - wall["1x1"]) / more,
        "identical": all(each == files[0] for each in files),
    }


def with_stub(sharded: ShardedRows, folder: Path, count: int) -> dict[str, Any]:
    """Answer rows that take ROW_S each on the workers. Return the run's overhead."""
    rows = write_rows(folder / "stub.jsonl", count, "stub")
    with sharded.workshop.slower(stub=ROW_S):
        run = sharded.start_run(
            rows, folder / "stub", shard_rows=STUB_SHARD_ROWS, child_runs=WORKERS
        )
        run = sharded.finished(run, 3 * count * ROW_S / WORKERS + 600)
    took = (moment(run["end_time"]) - moment(run["start_time"])).total_seconds()
    ideal = count * ROW_S / WORKERS
    children = sharded.children(run)
    before = min(moment(child["start_time"]) for child in children) - moment(run["start_time"])
    after = moment(run["end_time"]) - max(moment(child["end_time"]) for child in children)
    print(f"stub: {took:.1f} s for {ideal:.1f} s, {len(children)} child runs", flush=True)
    return {
        "stub_overhead": took / ideal - 1,
        "stub_s": took,
        "stub_before_s": before.total_seconds(),
        "stub_after_s": after.total_seconds(),
        "stub_children": len(children),
    }


def with_kills(sharded: ShardedRows, folder: Path) -> dict[str, Any]:
    """Kill two children and their parent, and ask the same again. Return what was answered
    twice, and whether the files are those of one process."""
    rows = write_rows(folder / "killed.jsonl", KILLED_ROWS, "killed")
    out = folder / "killed"
    before = sharded.shards()
    with sharded.workshop.slower(row=0.05):
        run = sharded.start_run(rows, out, shard_rows=KILLED_SHARD_ROWS, child_runs=4)
        for _ in range(2):
            sharded.kill(sharded.child_at_work(run, answered=1))
        sharded.child_at_work(run, answered=2)
        sharded.kill(run)
        sharded.workshop.ended(run)
    sharded.finished(sharded.start_run(rows, out, shard_rows=KILLED_SHARD_ROWS))
    shards = sharded.shards() - before
    assert len(shards) == KILLED_ROWS // KILLED_SHARD_ROWS
    alone = folder / "alone"
    options = ("--shard-rows", str(KILLED_SHARD_ROWS))
    done = sharded.command(rows, alone, *options, home=folder / "home-alone")
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        "answered_twice": sum(times - 1 for times in shards.values()),
        "identical": contents(alone) == contents(out),
    }


def batches(stub_rows: int = STUB_ROWS) -> dict[str, Any]:
    """Return all figures."""
    with tempfile.TemporaryDirectory() as place, Postgres() as database:
        folder = Path(place)
        server = {"PREFECT_API_DATABASE_CONNECTION_URL": database.url("postgresql+asyncpg")}
        sharded = ShardedRows(folder / "sharded", exported(folder), server)
        try:
            # One more, for the run that waits.
            sharded.start(WORKERS + 1, limit=1)
            found = by_processes(sharded, folder)
            killed = with_kills(sharded, folder)
            found |= with_stub(sharded, folder, stub_rows)
        finally:
            sharded.workshop.close()
    identical = found["identical"] and killed["identical"]
    return found | {"identical": identical, "answered_twice": killed["answered_twice"]}


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """Return figures for people."""
    found = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            value = rounded(value)
        found[name] = round(value, 4) if isinstance(value, float) else value
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.scale_batches")
    parser.add_argument("--stub-rows", type=int, default=STUB_ROWS)
    print(json.dumps(rounded(batches(parser.parse_args().stub_rows))))
