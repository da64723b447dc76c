"""Batch inference in shards on a server with workers of the CPU pool, and in processes beside it,
with a tiny student that is registered without any training."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from prefect_api import wait_for
from tiny_recipe import row
from workshop import COUNTING, PROJECT, Run, Workshop

STUDENT = "tiny-student"


def register(model: Path, home: Path, shared: Mapping[str, str]) -> None:
    """Register an exported model with its prompt and columns, and keep its files in the store, as
    the stages do, for machines that lack the registry's folder. In a process of its own, because
    MLflow keeps what it is told first."""
    code = (
        "import sys; from pathlib import Path\n"
        "from distillery.registry.local import LocalRegistry\n"
        "from distillery.recipe import PromptRecipe, Recipe\n"
        "from distillery.storage.artifacts import ArtifactStore\n"
        "made = {'prompt': PromptRecipe().model_dump(mode='json'),"
        " 'recipe': Recipe().model_dump(mode='json')}\n"
        "registry = LocalRegistry()\n"
        "found = registry.register(Path(sys.argv[1]), sys.argv[2], {}, made)\n"
        "assert ArtifactStore().put(Path(sys.argv[1])).sha256 == found.artifact.sha256\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(model), STUDENT],
        cwd=PROJECT,
        env=os.environ | shared | {"DISTILLERY_HOME": str(home)},
        check=True,
        capture_output=True,
    )


def write_rows(path: Path, count: int, seed: str = "new") -> Path:
    """Write rows of one easy rule, of which the fourth is bad."""
    lines = [json.dumps(row(seed, number)) for number in range(count)]
    lines[3] = '{"id": "bad"}'
    path.write_text("\n".join(lines) + "\n")
    return path


class ShardedRows:
    """A Workshop whose workers answer shards. `folder` holds all that it makes, and `server` is the
    server's own environment."""

    def __init__(self, folder: Path, model: Path, server: Mapping[str, str] | None = None) -> None:
        self.folder, self.common = folder, folder / "shared"
        self.common.mkdir(parents=True)
        self.shared = {
            "DISTILLERY_STORE": str(self.common / "store"),
            "DISTILLERY_LABELS": f"sqlite:///{self.common / 'labels.db'}",
            "DISTILLERY_REGISTRY": f"sqlite:///{self.common / 'registry.db'}",
        }
        self.registered = folder / "registered"
        register(model, self.registered, self.shared)
        self.workshop = Workshop(folder / "workshop", self.shared, server)
        # What a killed process had is free again soon.
        self.workshop.environment["LEASE_SECONDS"] = "10"

    def parameters(self, rows: Path, output: Path, **more: Any) -> dict[str, Any]:
        return {
            "model_name": STUDENT,
            "version": "1",
            "input_uri": str(rows),
            "output": str(output),
            **more,
        }

    def start_run(self, rows: Path, output: Path, **more: Any) -> Run:
        """Start a run of batch-inference/cpu."""
        workshop = self.workshop
        path = f"/deployments/{workshop.deployment('batch-inference/cpu')['id']}/create_flow_run"
        run: Run = workshop.ask(path, parameters=self.parameters(rows, output, **more))
        return run

    def finished(self, run: Run, seconds: float = 300) -> Run:
        """The run at its end, which must be Completed."""
        run = self.workshop.ended(run, seconds)
        assert run["state_name"] == "Completed", f"{run['state']}\n{self.workshop.log(run)}"
        return run

    def children(self, run: Run) -> list[Run]:
        """The child runs of a run."""
        found: list[Run] = self.workshop.ask(
            "/flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [run["id"]]}}
        )
        return found

    def child_at_work(self, run: Run, answered: int, worker: str | None = None) -> Run:
        """A child that runs, by default on any worker, once `answered` more shards have answers."""
        before = len(self.shards())

        def found() -> Run | None:
            if len(self.shards()) < before + answered:
                return None
            here = None if worker is None else self.runs_of(worker)
            for each in self.children(run):
                if each["state_type"] == "RUNNING" and (here is None or each["id"] in here):
                    return each
            return None

        child = self.workshop.until(run, "a child at work", found, 300)
        assert child
        return child

    def shards(self) -> Counter[str]:
        """How often the answers to each shard were kept, by all processes of the workers."""
        counts = self.workshop.counts()
        return Counter({key: times for key, times in counts.items() if "answer-shard-" in key})

    def kill(self, run: Run) -> None:
        """Kill the processes of a run."""
        for process in self.workshop.processes(run):
            process.kill()

    def runs_of(self, worker: str) -> set[str]:
        """The ids of the runs whose processes a worker has started."""
        found = set()
        for process in psutil.Process(self.workshop.running[worker].pid).children(recursive=True):
            try:
                found.add(process.environ().get("PREFECT__FLOW_RUN_ID", ""))
            except psutil.Error:
                continue
        return found - {""}

    def kill_machine(self, worker: str) -> None:
        """Kill a worker and the processes of its runs. The server is told at once what the
        automations find after two minutes: that the runs are dead."""
        runs = self.runs_of(worker)
        started = self.workshop.running.pop(worker)
        dead = psutil.Process(started.pid).children(recursive=True)
        started.kill()
        for process in dead:
            process.kill()
        started.wait(60)
        for run in runs:
            self.workshop.ask(f"/flow_runs/{run}/set_state", state={"type": "CRASHED"}, force=True)

    def command(
        self, rows: Path, output: Path, *options: str, home: Path, cores: set[int] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`python -m flows.batch_inference` on the workshop's server, with a store of its own in
        `home` and the same registry, on `cores`, by default on all."""
        home.mkdir()
        (home / "models").symlink_to(self.registered / "models")
        own = {
            "DISTILLERY_HOME": str(home),
            "DISTILLERY_REGISTRY": self.shared["DISTILLERY_REGISTRY"],
            "COUNT_FILE": str(home) + ".counted",
            "PYTHONPATH": f"{COUNTING}:{PROJECT}",
        }
        kept: Mapping[str, str] = self.workshop.environment
        hidden = {"DISTILLERY_STORE", "DISTILLERY_LABELS"}
        return subprocess.run(
            [
                *(sys.executable, "-m", "flows.batch_inference", STUDENT, str(rows), str(output)),
                *("--version", "1", *options),
            ],
            cwd=PROJECT,
            env={name: value for name, value in kept.items() if name not in hidden} | own,
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
            capture_output=True,
            text=True,
        )

    def start(self, workers: int, limit: int | None = None) -> None:
        """Start the server and `workers` workers of the CPU pool, each with `limit` runs at
        once."""
        self.workshop.start(pools=())
        for number in range(workers):
            self.workshop.start_worker("cpu-pool", f"cpu-{number}", limit)
        pool = "/work_pools/cpu-pool/workers/filter"
        wait_for("the workers", lambda: len(self.workshop.ask(pool)) >= workers)


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
