"""A student that is made again on a schedule: what is asked again, what is promoted, what is
refused, what a rollback holds, and two runs that promote at once. On a Prefect server with two
workers."""

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_endpoint import ChatEndpoint, said
from prefect_api import wait_for
from tiny_recipe import ROWS, RULE, endpoint_recipe, recipe
from tiny_recipe import row as tiny_row
from workshop import PROJECT, Run, Workshop

from distillery.storage.digests import list_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

NAME = "tiny-weekly"
STAGES = {": prepare dataset", ": label", "student: train", ": export", ": evaluate"}
RULES = [
    {"kind": "better", "than": "majority class"},
    {"kind": "not_worse", "margin": 0.2, "confidence": 0.8},
    {"kind": "not_worse", "than": "best", "margin": 0.2, "confidence": 0.8},
]


class Weekly:
    """The recipe of a student that learns from a file of labels, and the deployment that makes it
    again on a schedule."""

    def __init__(self, workshop: Workshop, files: dict[str, list[str]], tiny: Path) -> None:
        self.workshop = workshop
        self.home = workshop.folder / "cpu-pool" / "home"
        self.labels = workshop.folder / "labels.jsonl"
        lines = Path(files["train"][0]).read_text().splitlines()
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.recipe = recipe(files, tiny) | {
            "teacher": {"kind": "file", "files": [str(self.labels)]},
            "student": {
                "base": {"model": str(tiny)},
                "training": {"method": "full", "epochs": 12, "learning_rate": 0.01},
            },
            "export": {"precision": "fp32"},
            "evaluation": {"rules": RULES},
            "registry": {"model_name": NAME},
        }
        self.deployment = workshop.deployment("distill/demo")["id"]

    def make(self, recipe: dict[str, Any]) -> None:
        """Let the schedule make this recipe from now on."""
        parameters = {"recipe": recipe, "training_deployment": "train-student/gpu"}
        changed = {"parameters": parameters}
        self.workshop.api.patch(f"/deployments/{self.deployment}", json=changed).raise_for_status()

    def label(self, answer: Callable[[dict[str, Any]], str], rows: int) -> None:
        """Write the labels of the first `rows` rows anew."""
        lines = []
        for row in self.rows[:rows]:
            lines.append(json.dumps({"example_id": row["id"], "answer": answer(row)}) + "\n")
        self.labels.write_text("".join(lines))

    def scheduled_run(self) -> Run:
        """Switch a schedule of each ten seconds on until one run has started; return it, ended."""
        known = {run["id"] for run in self.scheduled("RUNNING", "COMPLETED", "FAILED", "CRASHED")}
        schedules = f"/deployments/{self.deployment}/schedules"
        often = [{"schedule": {"interval": 10}, "active": True}]
        created = self.workshop.api.post(schedules, json=often).raise_for_status().json()

        def started() -> Run | None:
            for run in self.scheduled("RUNNING", "COMPLETED", "FAILED", "CRASHED"):
                if run["id"] not in known:
                    return run
            return None

        try:
            run = wait_for("a scheduled run", started, 120)
        finally:
            self.workshop.api.delete(f"{schedules}/{created[0]['id']}").raise_for_status()
        run = self.workshop.ended(run)
        assert run["state_name"] == "Completed", f"{run['state']}\n{self.workshop.log(run)}"
        # The schedule may have made another run before it was deleted.
        for other in self.scheduled("SCHEDULED", "PENDING", "RUNNING"):
            state = {"state": {"type": "CANCELLED"}, "force": True}
            path = f"/flow_runs/{other['id']}/set_state"
            self.workshop.api.post(path, json=state).raise_for_status()
        return run

    def scheduled(self, *states: str) -> list[Run]:
        """The deployment's runs that its schedule has made."""
        runs: list[Run] = self.workshop.ask(
            "/flow_runs/filter",
            deployments={"id": {"any_": [self.deployment]}},
            flow_runs={"state": {"type": {"any_": list(states)}}},
        )
        return [run for run in runs if run["auto_scheduled"]]

    def verdict(self, run: Run) -> str:
        """What the run's summary says of the gate."""
        summary = self.workshop.artifacts(run)["distillation"]["data"]
        (line,) = re.findall(r"^\*\*(gate: .*)\*\*$", summary, re.MULTILINE)
        return str(line)

    def models(self, *arguments: str) -> str:
        """What `distillery models ...` prints on the worker's machine."""
        done = subprocess.run(
            [sys.executable, "-m", "distillery.cli", "models", *arguments],
            env=self.workshop.environment | {"DISTILLERY_HOME": str(self.home)},
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def teacher() -> Iterator[ChatEndpoint]:
    with ChatEndpoint() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def weekly(
    tmp_path_factory: pytest.TempPathFactory,
    files: dict[str, list[str]],
    tiny: Path,
    teacher: ChatEndpoint,
) -> Iterator[Weekly]:
    folder = tmp_path_factory.mktemp("weekly")
    common = folder / "shared"
    common.mkdir()
    workshop = Workshop(
        folder,
        {
            "DISTILLERY_STORE": str(common / "store"),
            "DISTILLERY_LABELS": f"sqlite:///{common / 'labels.db'}",
            "DISTILLERY_REGISTRY": f"sqlite:///{common / 'registry.db'}",
            "TEACHER_MODEL_ENDPOINT": teacher.url,
            "TEACHER_MODEL_NAME": "m",
            "TEACHER_MODEL_KEY": "k",
        },
        # Of a schedule's runs, 100 would be written at a time, which a server on SQLite waits for.
        server={
            "PREFECT_SERVER_SERVICES_SCHEDULER_MIN_RUNS": "1",
            "PREFECT_SERVER_SERVICES_SCHEDULER_MAX_RUNS": "2",
        },
    )
    try:
        workshop.start()
        yield Weekly(workshop, files, tiny)
    finally:
        workshop.close()


def right(row: dict[str, Any]) -> str:
    return RULE[row["question_concept"]]


def test_a_worse_student_is_refused_and_a_rollback_stands(weekly: Weekly, tmp_path: Path) -> None:
    weekly.make(weekly.recipe)
    weekly.label(right, rows=57)
    assert f"registered as {NAME} version 1" in weekly.verdict(weekly.scheduled_run())
    weekly.models("download", NAME, str(tmp_path / "first"))

    weekly.label(lambda _row: "A", rows=60)
    refused = weekly.verdict(weekly.scheduled_run())
    assert refused.startswith("gate: refused: student fp32 does not pass: better than majority")
    assert f"against {NAME} version 1 on 40 shared rows" in refused
    assert refused.endswith("; nothing is registered")

    weekly.label(right, rows=60)
    assert f"registered as {NAME} version 2" in weekly.verdict(weekly.scheduled_run())
    assert "version 2 promoted in place of version 1" in weekly.models("history", NAME)

    weekly.models("rollback", NAME, "--reason", "complaints")
    weekly.models("download", NAME, str(tmp_path / "again"))
    assert list_files(tmp_path / "again") == list_files(tmp_path / "first")
    # The same student as in the third week, all from the cache.
    run = weekly.scheduled_run()
    assert set(weekly.workshop.states(run).values()) == {"Cached"}
    assert ", not promoted: " in weekly.verdict(run)
    weekly.models("download", NAME, str(tmp_path / "after"))
    assert list_files(tmp_path / "after") == list_files(tmp_path / "first")
    last = weekly.models("history", NAME).splitlines()[-1]
    assert "version 1 rolled back in place of version 2, pinned" in last
    assert last.endswith(": complaints")


def test_a_schedule_does_what_is_new_and_no_more(
    weekly: Weekly, teacher: ChatEndpoint, files: dict[str, list[str]], tiny: Path, tmp_path: Path
) -> None:
    """New rows in a folder, a teacher that has changed, and answers that are too old."""
    workshop, folder = weekly.workshop, tmp_path / "rows"
    folder.mkdir()
    shutil.copy(files["train"][0], folder / "first.jsonl")
    values = endpoint_recipe({**files, "train": [str(folder)]}, tiny, "paid-weekly")
    weekly.make(values)

    def asked() -> tuple[Run, int]:
        before = len(teacher.calls)
        return weekly.scheduled_run(), len(teacher.calls) - before

    def done(run: Run) -> set[str]:
        """The stages that have done work."""
        states = workshop.states(run)
        assert states.keys() >= STAGES
        return {name for name in STAGES if states[name] != "Cached"}

    _, calls = asked()
    assert calls == ROWS["train"] + ROWS["test"], "no answers from before to compare with"
    run, calls = asked()
    assert calls == 20, "the canaries"
    workshop.wait_for_line(run, "0 of 20 canary rows are answered otherwise")
    assert not done(run)

    later = [json.dumps(tiny_row("later", number)) + "\n" for number in range(3)]
    (folder / "later.jsonl").write_text("".join(later))
    run, calls = asked()
    assert calls == 19 + 3, "one of the new rows is a canary from now on"
    assert done(run) == STAGES

    values["teacher"]["max_age"] = 30
    weekly.make(values)
    database = sqlite3.connect(workshop.folder / "shared" / "labels.db")
    with database:
        database.execute(
            "UPDATE teacher_answers SET created_at = '2020-01-01 00:00:00.000000' "
            "WHERE teacher = 'paid-weekly' AND example_id IN ('train-0', 'later-1')"
        )
    database.close()
    teacher.script = lambda call: said("B", top={"B": 1.0})
    run, calls = asked()
    assert calls == 20 + 2
    workshop.wait_for_line(run, "more than teacher.canaries.threshold (10%)")
    assert "teacher-drift" in workshop.artifacts(run)
    assert done(run) == STAGES - {": prepare dataset"}


def test_two_runs_at_once_leave_one_champion(weekly: Weekly) -> None:
    weekly.label(right, rows=60)
    workshop, runs = weekly.workshop, []
    for deployment, epochs in (("distill/demo", 1), ("distill/lab", 2)):
        values = json.loads(json.dumps(weekly.recipe))
        values["student"]["training"]["epochs"] = epochs
        values["evaluation"] = {"rules": []}
        values["registry"]["model_name"] = "tiny-twins"
        runs.append(workshop.start_run(values, deployment))
    for run in runs:
        ended = workshop.ended(run)
        assert ended["state_name"] == "Completed", workshop.log(run)
    listed = weekly.models("list", "tiny-twins").splitlines()
    assert [sum(role in line for line in listed) for role in ("champion", "archived")] == [1, 1]
    # Whoever came second was judged against the first.
    told = weekly.models("history", "tiny-twins")
    assert len(re.findall(r"version (\d) promoted in place of version (?!\1)\d", told)) == 1
