"""The whole way as `python -m flows.distill RECIPE` takes it, shaped like the demo, on a tiny
random model: what runs, what is cached, and what it costs, counted by counting/sitecustomize.py
inside the runs' own processes. All runs share a Prefect server; test_written.py has runs that start
their own."""

import html
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_endpoint import Call, ChatEndpoint, Reply, said
from prefect_api import OwnPrefect, wait_for
from tiny_recipe import ROWS, endpoint_recipe, recipe, write_rows

from distillery.records import Artifact
from distillery.storage.artifacts import ArtifactStore

PROJECT = Path(__file__).resolve().parents[2]
COUNTING = Path(__file__).parent / "counting"
STAGES = (
    "prepare dataset",
    "train teacher",
    "export teacher",
    "label",
    "train student",
    "export student",
    "ask base model",
    "evaluate",
    "register",
    "download",
)
APART = (": judged before", ": last student", ": gate", ": promote", ": report")
"""What is never cached."""
PREDICTORS = (
    "gold",
    "majority class",
    "TF-IDF + logistic",
    "TF-IDF on gold rows",
    "teacher",
    "base model",
    "student",
    "student int4",
)
STUDENT_STEPS = 2 * -(-(ROWS["train"] + ROWS["gold"]) // 8)
"""Two epochs of labelled and gold rows in batches of 8."""
PAID_STEPS = 2 * -(-ROWS["train"] // 8)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Run:
    """What a run printed, and what `counts` saw it do: step, request, serve."""

    name: str
    out: str
    log: str
    counts: Counter[str]

    @property
    def stages(self) -> dict[str, str]:
        """Each stage's line of the summary."""
        known = {
            stage: line
            for line in self.out.splitlines()
            for stage in STAGES
            if line.startswith(f"{stage} ")
        }
        assert tuple(known) == STAGES, self.out
        return known

    @property
    def scoreboard(self) -> str:
        return self.out.partition("predictor ")[2].partition("\ngate:")[0]

    @property
    def page(self) -> Path:
        return Path(self.out.rpartition("\nreport: ")[2].strip())

    @property
    def gate(self) -> str:
        return self.out.partition("\ngate:")[2]


class Workshop:
    """A home of its own, in which runs follow each other. `registry` is the file of a registry
    without models."""

    def __init__(self, folder: Path, base: Path, prefect: OwnPrefect, registry: Path) -> None:
        self.folder, self.base, self.prefect = folder, base, prefect
        self.home = folder / "home"
        self.home.mkdir()
        shutil.copy(registry, self.home)
        self.files = write_rows(folder / "rows")

    def run(self, files: dict[str, list[str]] | None = None, **evaluation: float) -> Run:
        return self.distil(recipe(files or self.files, self.base, **evaluation))

    def distil(self, values: dict[str, Any], *arguments: str, **environment: str) -> Run:
        return self.ended(0, values, *arguments, **environment)

    def ended(
        self, status: int, values: dict[str, Any], *arguments: str, **environment: str
    ) -> Run:
        """Run a recipe, which must end with this exit status."""
        path, counted = self.folder / "recipe.yaml", self.folder / "counted"
        path.write_text(yaml.safe_dump(values))
        counted.write_text("")
        done = subprocess.run(
            [sys.executable, "-m", "flows.distill", str(path), *arguments],
            cwd=PROJECT,
            env=self.environment
            | {"PYTHONPATH": str(COUNTING), "COUNT_FILE": str(counted), **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr[-4000:]
        name = done.stderr.partition("Beginning flow run '")[2].partition("'")[0]
        return Run(name, done.stdout, done.stderr, Counter(counted.read_text().split()))

    def refusal(self, values: dict[str, Any]) -> str:
        """What a run of this recipe logs, which must end with exit 1."""
        path = self.folder / "bad.yaml"
        path.write_text(yaml.safe_dump(values))
        done = self.flow("distill", str(path))
        assert done.returncode == 1
        return done.stderr

    def flow(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", f"flows.{name}", *arguments],
            cwd=PROJECT,
            env=self.environment,
            capture_output=True,
            text=True,
        )

    def trace(self, *arguments: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "distillery.cli", "trace", *arguments, "--json"],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    @property
    def environment(self) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")
        }
        return kept | {
            "DISTILLERY_HOME": str(self.home),
            "PREFECT_API_URL": self.prefect.url,
            "PREFECT_HOME": str(self.folder / "prefect"),
        }

    def states(self, run: Run) -> dict[str, str]:
        """Each stage of the run and its subflows, as 'FLOW: TASK', with its state's name in
        Prefect's database. What is never cached is no stage."""
        return {name: state for name, state in self.tasks(run).items() if name not in APART}

    def tasks(self, run: Run) -> dict[str, str]:
        """Each task run of the run and its subflows, likewise, once the server has recorded all of
        them: `report` is the last."""

        def recorded() -> dict[str, str] | None:
            found = self.tasks_so_far(run)
            return found if found.get(": report") == "Completed" else None

        return wait_for(f"the tasks of {run.name}", recorded, 60)

    def tasks_so_far(self, run: Run) -> dict[str, str]:
        query = """
            SELECT flow_run.name, task_run.name, task_run.state_name
            FROM task_run JOIN flow_run ON task_run.flow_run_id = flow_run.id
            WHERE (flow_run.name = :name OR flow_run.name LIKE :name || ',%')
            AND task_run.id NOT IN (
                SELECT parent_task_run_id FROM flow_run WHERE parent_task_run_id IS NOT NULL
            )
        """
        rows = self.query(query, {"name": run.name})
        return {
            f"{flow.removeprefix(run.name).strip(', ')}: {task}": state
            for flow, task, state in rows
        }

    def query(self, query: str, values: Any) -> list[Any]:
        """Ask Prefect's database."""
        file = f"file:{self.prefect.database}?mode=ro"
        with closing(sqlite3.connect(file, uri=True, timeout=60)) as database:
            return database.execute(query, values).fetchall()

    def artifact(self, key: str) -> Any:
        """The data of the newest artifact of this key."""
        query = "SELECT data FROM artifact WHERE key = ? ORDER BY created DESC LIMIT 1"
        ((data,),) = self.query(query, (key,))
        # A table is kept as the text of its JSON.
        return json.loads(json.loads(data)) if data.startswith('"') else json.loads(data)

    def record(self, run: Run, stage: str, **known: Any) -> dict[str, Any]:
        """The record that a stage of the run left with Prefect and in which `known` stands."""
        for path in (self.home / "store" / "results").glob(f"{stage}-*"):
            record: dict[str, Any] = json.loads(json.loads(path.read_text())["result"])["data"]
            if known.items() <= record.items() and record["produced_by"].startswith(run.name):
                return record
        raise AssertionError(f"no record of {stage} by {run.name} with {known}")

    def run_record(self, run: Run) -> dict[str, Any]:
        """The record that a whole run left in the store."""
        path = self.home / "store" / "records" / "runs" / f"{run.name}.json"
        record: dict[str, Any] = json.loads(path.read_text())
        return record

    def registered(self) -> dict[str, list[Any]]:
        """All that the registry's database holds of models: versions, champions and history."""
        found = {}
        with closing(sqlite3.connect(f"file:{self.home}/registry.db?mode=ro", uri=True)) as known:
            for table in (
                "registered_models",
                "registered_model_tags",
                "registered_model_aliases",
                "model_versions",
                "model_version_tags",
            ):
                found[table] = known.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
        return found


@pytest.fixture(scope="module")
def new_workshop(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[[str], Path],
    prefect_server: OwnPrefect,
    empty_registry: Path,
) -> Callable[..., Workshop]:
    """`new_workshop(name, arch="llama")`: a workshop with a tiny model as the base."""

    def make(name: str, arch: str = "llama") -> Workshop:
        folder = tmp_path_factory.mktemp(name)
        return Workshop(folder, tiny_model(arch), prefect_server, empty_registry)

    return make


@pytest.fixture(scope="module")
def workshop(new_workshop: Callable[..., Workshop]) -> Workshop:
    return new_workshop("workshop")


@pytest.fixture(scope="module")
def first(workshop: Workshop) -> Run:
    return workshop.run()


def test_the_first_run_goes_the_whole_way(workshop: Workshop, first: Run) -> None:
    # A name may go on in the next line.
    names = [
        name.removesuffix(" regression")
        for name in re.findall(r"(?m)^(\S.*?) +\d\.\d{3} \[", first.scoreboard.split("\n\n")[0])
    ]
    assert tuple(names) == PREDICTORS
    assert not any("cached" in line for line in first.stages.values())
    assert f"test rows: {ROWS['test']} are few: they tell how good a model is" in first.log
    assert set(workshop.states(first).values()) == {"Completed"}
    assert {": gate", ": promote"} <= workshop.tasks(first).keys()
    assert first.counts["request"] == ROWS["train"]
    assert f"{ROWS['train']} accepted, 0 rejected, {ROWS['train']} calls" in first.stages["label"]
    assert first.counts["serve"] == 1
    assert first.counts["step"] > STUDENT_STEPS
    downloaded = Path(first.log.partition("tiny-student version 1 verified in ")[2].splitlines()[0])
    assert workshop.home / "downloads" in downloaded.parents
    assert (downloaded / "genai_config.json").is_file()
    assert (downloaded / "manifest.json").is_file()
    assert "tiny-student version 1 (local)" in first.stages["register"]
    page = first.page.read_text()
    assert f"<h1>{first.name}</h1>" in page
    assert first.page.is_relative_to(workshop.home / "store")
    assert "registered as tiny-student version 1" in page
    assert page.count('<tr role="row" data-gold') == ROWS["test"]


def test_the_same_run_again_computes_nothing_and_prints_the_same(
    workshop: Workshop, first: Run
) -> None:
    values = recipe(workshop.files, workshop.base)
    again = workshop.distil(values, PYTHONPROFILEIMPORTTIME="1")
    assert again.scoreboard == first.scoreboard
    # PyTorch takes more than a second to import.
    assert re.search(r"(?m)^import time: .*\| +prefect$", again.log)
    assert not re.search(r"(?m)^import time: .*\| +torch$", again.log)
    for stage, line in again.stages.items():
        assert f"cached from {first.name}" in line, stage
    assert workshop.states(again) == dict.fromkeys(workshop.states(first), "Cached")
    assert again.counts == Counter()
    assert (workshop.tasks(again)[": gate"], workshop.tasks(again)[": promote"]) == (
        "Completed",
        "Completed",
    )
    assert f"<h1>{again.name}</h1>" in again.page.read_text()
    # The champion's answers are kept for the page.
    answers = workshop.run_record(again)["decision"]["champion_answers"]
    assert ArtifactStore(str(workshop.home / "store")).holds(Artifact.model_validate(answers))


def test_one_more_row_costs_one_request_and_a_training(workshop: Workshop, first: Run) -> None:
    more = workshop.run(write_rows(workshop.folder / "one-more", train=1))
    rows = ROWS["train"] + 1
    assert f"{rows} train" in more.stages["prepare dataset"]
    assert f"{rows} accepted, 0 rejected, 1 calls" in more.stages["label"]
    # 101 rows are as many batches as 100.
    assert more.counts == {"serve": 1, "request": 1, "step": STUDENT_STEPS}
    ran = {task for task, state in workshop.states(more).items() if state == "Completed"}
    # The teacher learnt from the gold rows, and the base model is asked the test rows: both are
    # what they were.
    assert ran >= {": prepare dataset", ": label", "student: train", ": export", ": evaluate"}
    assert not ran & {
        "preparation: gold labels",
        "preparation, teacher: train",
        "preparation: export",
        ": ask base model",
    }


def test_fresh_test_rows_judge_a_champion_that_has_not_seen_them(
    new_workshop: Callable[..., Workshop],
) -> None:
    workshop = new_workshop("rotation")
    values = endpoint_recipe(workshop.files, workshop.base, "rounds", method="lora", soft_weight=0)
    values["teacher"] = {"kind": "gold"}
    values["dataset"] |= {"splits": {"train": "train"}, "carve": {"test": 0.2}}
    values["dataset"]["rotation"] = {"rounds": 2, "round": 0}
    values["evaluation"] = {"rules": [{"kind": "not_worse", "margin": 0.9}]}
    first = workshop.distil(values)
    assert "have judged" not in first.out + first.log
    again = workshop.distil(values)
    said = re.compile(r"these \d+ test rows have judged 1 version of rounds; dataset.rotation")
    assert said.search(again.out)
    assert said.search(again.log)

    values["dataset"]["rotation"] = {"rounds": 2, "round": 1}
    values["student"]["training"]["seed"] = 1
    fresh = workshop.distil(values)
    assert "have judged" not in fresh.out
    assert "rounds version 1 has answered none of these test rows and is asked them" in fresh.log
    assert re.search(r"points .* against rounds version 1 on \d+ shared rows", fresh.out)
    values["student"]["training"]["seed"] = 0
    same = workshop.distil(values)
    assert same.counts["step"] == 0, "the train rows are the same"

    # Rows that have trained the champion.
    values["dataset"]["rotation"] = {"rounds": 3, "round": 2}
    assert re.search(
        r"(?m)^error: dataset: \d+ of \d+ test rows have trained rounds version \d, the champion, "
        r"such as row train-\d+, and can't judge its successor; leave dataset\.seed",
        workshop.refusal(values),
    )


def test_another_limit_of_the_gate_runs_no_work_again(workshop: Workshop, first: Run) -> None:
    other = workshop.run(maximum_loss=0.5)
    ran = {task for task, state in workshop.states(other).items() if state != "Cached"}
    # The registered model carries its recipe, so that the entry, not the model, is looked at again.
    assert ran <= {": register", ": download"}
    assert other.counts == Counter()
    assert "passes all rules: at most 50 points worse than the champion" in other.gate
    assert "tiny-student version 1 " in other.stages["register"]


def test_a_registered_student_is_traced_and_made_again(workshop: Workshop, first: Run) -> None:
    found = workshop.trace("tiny-student", "1")
    assert found["run"] == first.name
    assert [work["stage"] for work in found["work"]] == [
        stage for stage in STAGES if stage not in ("register", "download")
    ]
    assert {split: rows["rows"] for split, rows in found["splits"].items()} == ROWS
    assert found["verdict"] == "passed: the recipe has no rules for the gate"
    assert "README.md" in [file["path"] for file in found["files"]]
    (use,) = workshop.trace("--row", "train-0", "tiny-student")[-1:]
    assert (use["version"], use["used"]) == ("1", "trained")

    cached = workshop.home / "store" / "results"
    kept = {path: path.stat().st_mtime_ns for path in cached.iterdir()}
    versions = workshop.trace("tiny-student")["version"]
    done = workshop.flow("reproduce", "tiny-student", "1", "--json")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    compared = {each["what"]: each for each in json.loads(done.stdout)["compared"]}
    sizes = {f"{split} rows": rows for split, rows in ROWS.items()}
    sizes |= {"labels": ROWS["train"], "probabilities": ROWS["train"], "answers": ROWS["test"]}
    assert {what: compared[what]["of"] for what in sizes} == sizes
    assert {what: compared[what]["different"] for what in sizes} == dict.fromkeys(sizes, 0)
    now = {path: path.stat().st_mtime_ns for path in cached.iterdir()}
    assert {path for path in kept if now[path] != kept[path]} == set()
    assert workshop.trace("tiny-student")["version"] == versions
    assert not list((workshop.home / "work").iterdir())


@pytest.mark.parametrize(
    "stages",
    [("prepare-dataset", "train"), ("label", "export")],
    ids=" and ".join,
)
def test_an_artifact_that_is_gone_or_damaged_is_made_again_and_nothing_else(
    workshop: Workshop, first: Run, stages: tuple[str, str]
) -> None:
    """Two artifacts are gone at once. The stage between theirs takes its own from the cache."""
    known: dict[str, tuple[str, dict[str, Any]]] = {
        "prepare-dataset": (": prepare dataset", {}),
        "label": (": label", {"accepted": ROWS["train"]}),
        "train": ("student: train", {"method": "full"}),
        "export": (": export", {"precision": "int4"}),
    }
    lost, store = {}, workshop.home / "store"
    for stage in stages:
        task, values = known[stage]
        lost[task] = store / workshop.record(first, stage, **values)["artifact"]["sha256"]
        if stage == "export":
            # Damaged is as good as gone.
            (lost[task] / "files" / "genai_config.json").write_text("{}")
        else:
            shutil.rmtree(lost[task])
    mended = workshop.run()
    states = workshop.states(mended)
    assert {name for name, state in states.items() if state != "Cached"} == lost.keys()
    for folder in lost.values():
        assert ArtifactStore(str(store)).holds(Artifact(uri="", sha256=folder.name, bytes=0))
    assert mended.scoreboard == first.scoreboard
    # Labels that are lost are written from the label store: they were paid for.
    assert mended.counts["request"] == 0
    assert mended.counts["step"] == (STUDENT_STEPS if "train" in stages else 0)


@dataclass(frozen=True)
class Paid:
    """A run with a paid endpoint, and what it was given."""

    workshop: Workshop
    endpoint: ChatEndpoint
    values: dict[str, Any]
    environment: dict[str, str]
    run: Run


@pytest.fixture(scope="module")
def paid(new_workshop: Callable[..., Workshop]) -> Iterator[Paid]:
    workshop = new_workshop("paid")
    values = endpoint_recipe(workshop.files, workshop.base, "paid", method="lora")
    with ChatEndpoint() as endpoint:
        environment = {
            "TEACHER_MODEL_ENDPOINT": endpoint.url,
            "TEACHER_MODEL_NAME": "m",
            "TEACHER_MODEL_KEY": "k",
        }
        run = workshop.distil(values, **environment)
        yield Paid(workshop, endpoint, values, environment, run)


def test_reproducing_pays_no_teacher(paid: Paid) -> None:
    workshop, calls = paid.workshop, len(paid.endpoint.calls)
    done = workshop.flow("reproduce", "paid", "1")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.endswith("version 1: rows, labels and answers are the same\n")

    # Another row in the source: it has no answer.
    write_rows(workshop.folder / "rows", train=1)
    done = workshop.flow("reproduce", "paid", "1")
    write_rows(workshop.folder / "rows")
    assert (done.returncode, done.stdout) == (1, "")
    assert "the label database lacks 1 answers of paid, which is not asked" in done.stderr
    assert len(paid.endpoint.calls) == calls


def test_what_an_answer_does_not_depend_on_asks_nothing_again(paid: Paid) -> None:
    """With a paid endpoint: the student's LoRA rank, a moved store, another SDK, another URL, a
    stage done afresh."""
    workshop, endpoint, teacher = paid.workshop, paid.endpoint, paid.environment
    values = deepcopy(paid.values)
    with ChatEndpoint() as elsewhere:
        assert len(endpoint.calls) == ROWS["train"] + ROWS["test"]
        assert set(workshop.states(paid.run).values()) == {"Completed"}

        values["student"]["training"]["lora"] = {"rank": 4}
        ranked = workshop.distil(values, **teacher)
        assert ranked.counts["step"] == PAID_STEPS
        cached = {name for name, state in workshop.states(ranked).items() if state == "Cached"}
        assert cached == {": prepare dataset", ": label", ": ask base model"}

        moved = workshop.folder / "moved"
        (workshop.home / "store").rename(moved)
        values["teacher"]["sdk"] = "azure-ai-inference"
        elsewhere_now = teacher | {
            "TEACHER_MODEL_ENDPOINT": elsewhere.url,
            "DISTILLERY_STORE": str(moved),
        }
        again = workshop.distil(values, **elsewhere_now)
        assert set(workshop.states(again).values()) == {"Cached"}
        assert again.scoreboard == ranked.scoreboard
        assert f"nothing new: paid version 2 of {ranked.name} stands" in again.gate

        afresh = workshop.distil(
            values, "--refresh", "train student", "--refresh", "export student", **elsewhere_now
        )
        assert afresh.counts["step"] == PAID_STEPS
        done = {name for name, state in workshop.states(afresh).items() if state != "Cached"}
        assert done == {": export", "student: train"}
        assert len(endpoint.calls) + len(elsewhere.calls) == ROWS["train"] + ROWS["test"]

        values["teacher"]["canaries"] = {"rows": 5, "stop": True}
        watched = workshop.distil(values, **elsewhere_now)
        assert "0 of 5 canary rows are answered otherwise" in watched.log
        assert len(elsewhere.calls) == 5
        assert watched.counts["step"] == 0


def test_a_ladder_shows_its_rungs_and_hands_on_the_smallest_that_keeps_to_the_loss(
    new_workshop: Callable[..., Workshop],
) -> None:
    """The student learns from the rows' own answers."""
    workshop = new_workshop("ladder")
    values = endpoint_recipe(workshop.files, workshop.base, "rungs", method="lora", soft_weight=0)
    values["teacher"] = {"kind": "gold"}
    rungs = [
        {"precision": "fp16"},
        {"precision": "fp32", "adapter_apart": True},
        {"algorithm": "gptq"},
    ]
    values["export"] = {"ladder": rungs, "largest_loss": 1.0, "choose": "smallest"}
    run = workshop.distil(values)
    states = workshop.states(run)
    assert (states[": gold labels"], states[": export ladder"]) == ("Completed", "Completed")
    assert f"{ROWS['train']} accepted, 0 rejected, 0 calls" in run.out
    assert re.search(r"export student +int4 gptq, [\d.]+ MB, picked of 3 forms", run.out)
    shown = {
        title: re.search(rf"(?m)^{title} .*\[.*$", run.out)
        for title in ("fp16", "fp32, apart", "int4 gptq/32")
    }
    assert all(shown.values()), run.out
    assert "export.largest_loss allows 100.0 points on 20 validation rows" in run.out
    assert "student int4 is right on" in run.out
    assert "its options' probabilities depart from the float student's by 0." in run.out
    tables = workshop.artifact("quantisation-ladder")
    assert [row["form"] for row in tables] == [
        "float student",
        "fp16",
        "fp32, apart",
        "int4 gptq/32",
    ]
    assert [row["verdict"] for row in tables] == ["", "no smaller", "no smaller", "picked"]
    downloaded = Path(run.log.partition("rungs version 1 verified in ")[2].splitlines()[0])
    assert json.loads((downloaded / "ladder.json").read_text())["rows"] == ROWS["validation"]

    again = workshop.distil(values)
    assert set(workshop.states(again).values()) == {"Cached"}
    assert "int4 gptq/32" in again.out

    # Another precision is another column of the answers, and is compared with the champion's all
    # the same.
    values["export"] = {"precision": "fp16"}
    values["evaluation"]["maximum_loss"] = 0.9
    half = workshop.distil(values)
    assert {name for name, state in workshop.states(half).items() if state == "Completed"} >= {
        ": export",
        ": evaluate",
    }
    assert "passed: student fp16 passes all rules" in half.gate
    assert f"against rungs version 1 on {ROWS['test']} shared rows" in half.gate


def test_labels_that_are_there_already_need_no_teacher(workshop: Workshop, first: Run) -> None:
    values = endpoint_recipe(workshop.files, workshop.base, "own", max_steps=2, soft_weight=0)
    file = workshop.folder / "labels.jsonl"
    rows = [json.loads(line) for line in Path(workshop.files["train"][0]).read_text().splitlines()]
    file.write_text(
        "".join(json.dumps({"example_id": row["id"], "answer": "B"}) + "\n" for row in rows[:40])
    )
    values["teacher"] = {"kind": "file", "files": [str(file)]}
    imported = workshop.distil(values)
    assert "40 accepted, 20 rejected, 0 calls" in imported.out
    assert workshop.states(imported)[": prepare dataset"] == "Cached"
    file.write_text(file.read_text().replace('"B"', '"A"'))
    changed = workshop.distil(values)
    assert {name for name, state in workshop.states(changed).items() if state == "Completed"} >= {
        ": labels from files",
        "student: train",
    }


def test_a_student_that_is_cut_in_steps_and_answers_by_text(
    new_workshop: Callable[..., Workshop],
) -> None:
    workshop = new_workshop("steps", "qwen3")
    values = endpoint_recipe(
        workshop.files, workshop.base, "steps", soft_weight=0, epochs=12, learning_rate=0.01
    )
    values["teacher"] = {"kind": "gold"}
    step = {"layers": {"keep": 2, "by": "even"}, "training": {"method": "full", "max_steps": 3}}
    values["student"] |= {
        "healing": [step],
        "layers": {"keep": 1, "by": "block_influence"},
        "prompt": {"system": "", "user": "{question}", "answer": "text"},
    }
    run = workshop.distil(values)
    assert run.counts["step"] == 3 + 12 * -(-ROWS["train"] // 8)
    record = workshop.record(run, "train")
    folder = workshop.home / "store" / record["artifact"]["sha256"] / "files"
    cuts = json.loads((folder / "layers.json").read_text())
    assert (cuts[0], len(cuts[1])) == ([0, 1], 1)
    assert json.loads((folder / "healing-1.json").read_text())["steps"] == 3
    accuracy = {
        name: float(value)
        for name, value in re.findall(r"(?m)^(\S.*?) +(\d\.\d{3}) \[", run.scoreboard)
    }
    assert accuracy["student"] > 0.6, "chance is 0.33"
    assert abs(accuracy["student"] - accuracy["student int4"]) <= 0.3

    rows, out = workshop.folder / "rows.jsonl", workshop.folder / "answers"
    rows.write_text(Path(workshop.files["test"][0]).read_text())
    done = workshop.flow("batch_inference", "steps", str(rows), str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    gold = [json.loads(line)["answerKey"] for line in rows.read_text().splitlines()]
    right = sum(answer["answer"] == key for answer, key in zip(answers, gold, strict=True)) / len(
        gold
    )
    assert right == pytest.approx(accuracy["student int4"])


def test_a_teacher_that_answers_by_text_and_the_student_that_starts_from_it(
    new_workshop: Callable[..., Workshop],
) -> None:
    """The options stand in another order in each row, and no prompt shows them: their letters tell
    nothing."""
    workshop = new_workshop("by-text", "qwen3")
    for paths in workshop.files.values():
        lines = [json.loads(line) for line in Path(paths[0]).read_text().splitlines()]
        for number, line in enumerate(lines):
            texts, turn = line["choices"]["text"], number // 3 % 3
            line["choices"]["text"] = texts[turn:] + texts[:turn]
            line["answerKey"] = "ABC"["ABC".index(line["answerKey"]) - turn]
        Path(paths[0]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = recipe(workshop.files, workshop.base)
    values["prompt"] = {"system": "", "user": "{question}", "answer": "text"}
    values["teacher"]["preparation"]["training"] |= {"epochs": 16, "learning_rate": 0.01}
    values["student"] |= {"layers": None}
    run = workshop.distil(values)
    assert run.counts["request"] == ROWS["train"]
    accuracy = {
        name: float(value)
        for name, value in re.findall(r"(?m)^(\S.*?) +(\d\.\d{3}) \[", run.scoreboard)
    }
    assert min(accuracy[name] for name in ("teacher", "student", "student int4")) > 0.6
    labels = workshop.record(run, "label")
    folder = workshop.home / "store" / labels["artifact"]["sha256"] / "files"
    lines = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]
    assert len(lines) == ROWS["train"]
    for line in lines:
        assert sum(line["distribution"].values()) == pytest.approx(1)
        assert line["answer"] == max(line["distribution"], key=line["distribution"].__getitem__)

    again = workshop.distil(values, "--refresh", "label")
    assert workshop.states(again)[": label"] == "Completed"
    assert again.counts["request"] == 0, "all answers are in the label database"
    assert again.scoreboard == run.scoreboard


def test_a_search_measures_its_trials_and_goes_on_from_what_is_cached(
    new_workshop: Callable[..., Workshop],
) -> None:
    workshop = new_workshop("search")
    values = endpoint_recipe(
        workshop.files, workshop.base, "searched", soft_weight=0, method="lora", max_steps=4
    )
    values["teacher"] = {"kind": "gold"}
    (workshop.folder / "recipe.yaml").write_text(yaml.safe_dump(values))

    def search(trials: int, keep: str = "[2]") -> tuple[list[str], Counter[str]]:
        counted = workshop.folder / "counted"
        counted.write_text("")
        space = workshop.folder / "space.yaml"
        space.write_text(
            f"rank: [2, 4]\nkeep: {keep}\nlearning_rate: [0.001, 0.1]\ntrials: {trials}\n"
        )
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "flows.search",
                str(workshop.folder / "recipe.yaml"),
                str(space),
            ],
            cwd=PROJECT,
            env=workshop.environment | {"PYTHONPATH": str(COUNTING), "COUNT_FILE": str(counted)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()[2:], Counter(counted.read_text().split())

    first, counts = search(2)
    assert counts["step"] == 2 * 4
    assert len(first) == 2
    assert any(line.startswith("| * |") for line in first)
    more, counts = search(3)
    assert counts["step"] == 4
    assert {line.partition("|")[2].split("|", 1)[1] for line in first} <= {
        line.partition("|")[2].split("|", 1)[1] for line in more
    }
    deep, _ = search(4, keep="[2, 9]")
    failed = [line.split("|")[2].strip() for line in deep if "| failed |" in line]
    assert 0 < len(failed) < 4
    said = "failed: student.layers.keep: 9, but this model has 2 layers; keep fewer"
    assert [line for line in deep if "failed: " in line] == [
        f"Trial {number} {said}" for number in sorted(failed)
    ]


def test_a_refused_student_changes_no_registry_and_fails_the_run_where_the_recipe_says_so(
    workshop: Workshop, first: Run
) -> None:
    before, folders = workshop.registered(), sorted((workshop.home / "models").rglob("*"))
    assert before["model_versions"]
    assert before["registered_model_aliases"]
    values = recipe(workshop.files, workshop.base)
    values["evaluation"] = {"rules": [{"kind": "rows", "minimum": 1000}]}
    completed = workshop.distil(values)
    assert "refused" in completed.gate
    values["evaluation"]["on_refusal"] = "fail"
    failed = workshop.ended(3, values)
    assert failed.gate.partition("report:")[0] == completed.gate.partition("report:")[0]
    assert failed.page.is_file(), "all is recorded"
    (line,) = [line for line in failed.log.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: gate: refused: ")
    assert line.endswith("(evaluation.on_refusal: fail)")
    query = "SELECT state_name FROM flow_run WHERE name = ?"
    states = [workshop.query(query, (run.name,)) for run in (completed, failed)]
    assert states == [[("Completed",)], [("Failed",)]]
    assert workshop.registered() == before
    assert sorted((workshop.home / "models").rglob("*")) == folders
    for run in (completed, failed):
        record = workshop.run_record(run)
        for what in ("registered", "rejected", "promotion", "delivered"):
            assert record[what] is None, what
        decision = record["decision"]
        assert (decision["passed"], decision["verdicts"][0]["verdict"]) == (False, "undecided")
        assert decision["verdicts"][0]["rows_needed"] == 1000
        reason = decision["reason"]
        assert reason.startswith("refused: student int4 does not pass: at least 1,000 test rows")
        assert reason in " ".join(run.gate.split())
        assert html.escape(reason) in run.page.read_text()
        assert not {": promote"} & workshop.tasks(run).keys()


def unsure_of_half(call: Call) -> Reply:
    """The answers of `good`, with less confidence for every second question."""
    letter = "ABC"[sum(call.question.encode()) % 3]
    share = 0.95 if len(call.question) % 2 else 0.5
    others = dict.fromkeys({*"ABC"} - {letter}, (1 - share) / 2)
    return said(letter, top={letter: share, **others})


def test_a_cheap_teacher_labels_chosen_rows(new_workshop: Callable[..., Workshop]) -> None:
    """Both endpoints are asked what they should be, once; the run is found in the cache afterwards
    although a champion has come, and can be reproduced."""
    workshop = new_workshop("chosen")
    values = endpoint_recipe(workshop.files, workshop.base, "chosen", method="lora")
    values["teacher"] |= {
        "prices": {"input": 100, "output": 100},
        "cascade": {"below": 0.8, "sdk": "openai", "prices": {"input": 10, "output": 10}},
        "select": {"rows": 30},
    }
    with ChatEndpoint() as dear, ChatEndpoint(unsure_of_half) as cheap:
        environment: dict[str, str] = {}
        for kind, server in (("TEACHER", dear), ("CHEAP", cheap)):
            environment |= {
                f"{kind}_MODEL_ENDPOINT": server.url,
                f"{kind}_MODEL_NAME": kind.lower(),
                f"{kind}_MODEL_KEY": "k",
            }
        run = workshop.distil(values, **environment)
        asked = {call.question for call in cheap.calls}
        assert len(asked) == len(cheap.calls) == 30
        unsure = {question for question in asked if len(question) % 2 == 0}
        of_test = [call.question for call in dear.calls if call.question not in asked]
        assert len(of_test) == ROWS["test"], "the test rows are the teacher's own"
        assert {call.question for call in dear.calls} & asked == unsure
        assert "30 of 60 train rows are labelled; chosen by uncertainty and diversity" in run.out
        page = html.unescape(run.page.read_text())
        for told in ("saved against the teacher alone", "saved by choosing rows"):
            assert told in page

        calls = len(dear.calls) + len(cheap.calls)
        again = workshop.distil(values, **environment)
        assert set(workshop.states(again).values()) == {"Cached"}
        done = workshop.flow("reproduce", "chosen", "1")
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        assert done.stdout.endswith("version 1: rows, labels and answers are the same\n")
        assert len(dear.calls) + len(cheap.calls) == calls
