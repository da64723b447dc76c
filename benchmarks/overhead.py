"""What Prefect and the hand-offs cost beside the stages' own work: `make bench-overhead`.

The demo's way on a tiny random model, four times: without a server (the temporary one that a run
starts for itself) and on a server with two workers, cold and fully cached, each beside an empty
flow of as many tasks run in the same way. The last line is JSON, all in seconds:

stage_s         the stages' own time, cold, on the server
wall_s          the run's time from start to end, cold, on the server, as Prefect reports it
overhead_s      wall_s - stage_s: flows, children and hand-offs
cached_rerun_s  the same run again, all stages cached
empty_flow_s    an empty flow of as many tasks and subflows on the same worker
child_start_s   from asking for a child run to its first line of code, median of the children

The lines before it give the same without a server, as wall time of the whole command.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[1]
sys.path.append(str(PROJECT / "tests" / "support"))

from tiny_model import build_tiny_model  # noqa: E402 - the tests' own tiny model, rows and server
from tiny_recipe import recipe, write_rows  # noqa: E402
from workshop import Workshop  # noqa: E402

from distillery.records import Outcome, StageRecord  # noqa: E402


def commanded(arguments: list[str], folder: Path) -> float:
    """Seconds that a Python command takes, start of the interpreter and of its temporary server
    included."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "DISTILLERY_"))
    }
    environment |= {
        "DISTILLERY_HOME": str(folder / "home"),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    }
    (folder / "prefect").mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=PROJECT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return time.perf_counter() - started


def seconds(run: dict[str, Any]) -> float:
    return (moment(run["end_time"]) - moment(run["start_time"])).total_seconds()


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def work_of(outcome: Outcome) -> float:
    """Seconds in the stages themselves."""
    records: list[StageRecord | None] = [outcome.data, outcome.labels, outcome.student]
    records += [outcome.model, outcome.report]
    records += [outcome.registered, outcome.delivered]
    records += [outcome.teacher.checkpoint, outcome.teacher.model] if outcome.teacher else []
    return sum(record.seconds for record in records if record)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = build_tiny_model("llama", folder / "model")
        values = recipe(write_rows(folder / "rows"), base)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        alone = {
            name: round(commanded(arguments, folder / "alone"), 1)
            for name, arguments in (
                # The first command of a new home also makes Prefect's database.
                ("first_empty_flow_s", ["-m", "benchmarks.empty_flow"]),
                ("empty_flow_s", ["-m", "benchmarks.empty_flow"]),
                ("cold_s", ["-m", "flows.distill", str(folder / "recipe.yaml")]),
                ("cached_rerun_s", ["-m", "flows.distill", str(folder / "recipe.yaml")]),
            )
        }
        print(f"without a server: {json.dumps(alone)}", flush=True)

        store = folder / "store"
        workshop = Workshop(folder / "workshop", {"DISTILLERY_STORE": str(store)})
        try:
            workshop.start()
            flow = workshop.ask("/flows/", name="empty")
            entry = {"entrypoint": "benchmarks.empty_flow.empty", "work_pool_name": "cpu-pool"}
            deployment = workshop.ask("/deployments/", name="overhead", flow_id=flow["id"], **entry)
            start = f"/deployments/{deployment['id']}/create_flow_run"
            empty = [seconds(workshop.ended(workshop.ask(start))) for _ in range(3)]
            cold = workshop.distil(values)
            cached = [seconds(workshop.distil(values)) for _ in range(3)]
            stage = work_of(
                Outcome.model_validate_json(
                    (store / "records" / "runs" / f"{cold['name']}.json").read_text()
                )
            )
            children = [
                run for run in workshop.family(cold).values() if run["work_pool_name"] == "gpu-pool"
            ]
            starts = [
                (moment(run["start_time"]) - moment(run["expected_start_time"])).total_seconds()
                for run in children
            ]
        finally:
            workshop.close()
        print(
            f"on a server: empty flow {empty}, cached {cached}, children's starts {starts}",
            flush=True,
        )
        figures = {
            "stage_s": stage,
            "wall_s": seconds(cold),
            "overhead_s": seconds(cold) - stage,
            "cached_rerun_s": statistics.median(cached),
            "empty_flow_s": statistics.median(empty),
            "child_start_s": statistics.median(starts),
        }
        print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
