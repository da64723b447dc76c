"""Children that do a part of a run's work: a deployment that a process of its own serves, and one
of them killed in the midst."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from prefect_api import OwnPrefect, wait_for

PROJECT = Path(__file__).resolve().parents[2]


@contextmanager
def served(api: OwnPrefect, flow: str, **settings: str) -> Iterator[str]:
    """Have a process of its own take the runs of a deployment of flows.`flow`, whose name is
    yielded. `settings` are added to its environment."""
    environment = os.environ | {"PREFECT_API_URL": api.url, "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    serves = f"from flows.{flow} import {flow}; {flow}.serve(name='cpu')"
    process = subprocess.Popen(
        [sys.executable, "-c", serves], cwd=PROJECT, env=environment | settings
    )
    try:
        name = f"{flow.replace('_', '-')}/cpu"
        wait_for("the deployment", lambda: api.api.get(f"/deployments/name/{name}").is_success)
        yield name
    finally:
        started = psutil.Process(process.pid)
        for each in [*started.children(recursive=True), started]:
            each.kill()
        process.wait()


@contextmanager
def one_killed(
    ready: Callable[[], bool], children: Callable[[], Sequence[psutil.Process]]
) -> Iterator[list[int]]:
    """Kill one of the `children`, once it is time (`ready`); yield its id in a list."""
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        while not killed and not ended.wait(0.01):
            if ready():
                for process in children()[:1]:
                    process.kill()
                    killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        ended.set()
        killer.join()


def children_that(matches: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """The processes started by this one, or by those, that match."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if matches(process):
                found.append(process)
        except psutil.Error:
            continue
    return found
