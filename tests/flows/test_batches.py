"""Runs that end as waiting because their batches are under way: one that is started by hand, and
one of a deployment, which goes on by itself."""

import asyncio
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from batch_endpoint import BatchEndpoint, Plan
from batch_runs import left_in_book
from prefect import flow, get_client
from prefect.runner import Runner
from prefect_api import OwnPrefect
from tiny_recipe import endpoint_recipe, write_rows

from tasks.batches import STATE

PROJECT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WAITS = """
from pathlib import Path
from prefect import flow
from distillery.errors import Waiting
from tasks.batches import end_as_waiting

@flow
def waits(marker: str) -> str:
    if Path(marker).exists():
        return "all answers are here"
    Path(marker).touch()
    end_as_waiting(Waiting("1 batch is under way", 1))
"""


def test_a_run_of_a_deployment_is_scheduled_to_go_on(
    prefect_api: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    monkeypatch.setenv("PYTHONPATH", f"{PROJECT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    waits: Any = flow.from_source(str(tmp_path), "waits.py:waits")
    runner = Runner(name="test", query_seconds=1)
    deployed: Any = runner.add_flow(waits, name="waits")
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(
            deployed, parameters={"marker": str(tmp_path / "marker")}
        )
        start(runner)
        state = client.read_flow_run(run.id).state
        assert state is not None
        assert (state.name, state.message) == (STATE, "1 batch is under way")
        assert state.is_scheduled()
        assert state.state_details.scheduled_time is not None
        assert state.state_details.scheduled_time < datetime.now(UTC) + timedelta(seconds=2)
        start(runner)
        state = client.read_flow_run(run.id).state
        assert state is not None
        assert state.is_completed(), state


def start(runner: Runner) -> None:
    """Let the runner start what is due, and wait for it."""
    asyncio.run(runner.start(run_once=True))


def test_a_run_started_by_hand_ends_as_waiting_and_the_next_takes_the_answers_in(
    prefect_server: OwnPrefect, tiny_model: Any, home: Path, own_registry: None, tmp_path: Path
) -> None:
    values = endpoint_recipe(write_rows(tmp_path / "rows"), tiny_model("llama"), "batched")
    values["teacher"]["batch"] = {"wait_s": 0, "direct_below": 2}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    kept = {name: text for name, text in os.environ.items() if not name.startswith("PREFECT_")}
    with BatchEndpoint(lambda _: Plan(looks=1)) as service:
        environment = kept | {
            "PREFECT_API_URL": prefect_server.url,
            "PREFECT_HOME": str(tmp_path / "prefect"),
            "TEACHER_MODEL_ENDPOINT": service.url,
            "TEACHER_MODEL_NAME": "m",
            "TEACHER_MODEL_KEY": "k",
        }

        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "flows.distill", str(path)],
                cwd=PROJECT,
                env=environment,
                capture_output=True,
                text=True,
            )

        first = run()
        assert first.returncode == 4, first.stderr[-4000:]
        assert "waiting: 1 batch is under way, 0 of " in first.stderr.splitlines()[-1]
        assert len(service.batches) == 1
        second = run()
        assert second.returncode == 0, second.stderr[-4000:]
        # Train and test rows were in one batch, and none was asked twice.
        assert len(service.batches) == 1
        assert set((service.answered + service.asked).values()) == {1}
    assert left_in_book(f"sqlite:///{home / 'labels.db'}") == (0, 0)
