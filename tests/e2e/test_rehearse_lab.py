"""The preset lab, whole and unchanged, against stand-ins of its services on this machine; `make
rehearse-lab` runs it and shows what the runs print.

Nothing of Distillery is replaced: each command is a process of its own, with a temporary Prefect
server where it is a flow. It is led to the stand-ins by the services' own settings and by the
names of hosts (localhost/sitecustomize.py). The data set's rows are real; the base model is tiny
(knowing_model.py) and is built so that it passes the preset's gate.
"""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from azure_hosts import FOUNDRY
from azure_ml_stand_in import CONTAINER as WORKSPACE_CONTAINER
from azure_ml_stand_in import container_sas, make_certificate, resolve_localhost
from azure_registry_stand_in import CONTAINER as REGISTRY_CONTAINER
from azure_registry_stand_in import Proxy, RegistryStandIn, create_container, in_layout, upload
from azurite_server import Azurite
from chat_endpoint import Call, ChatEndpoint, Reply, refused, said
from hub_stand_in import HubStandIn
from knowing_model import build_knowing_model

from distillery.data.examples import read_examples
from distillery.data.prepare import prepare
from distillery.models.azure_registry import parse_azureml
from distillery.prompts import render_messages
from distillery.recipe import DatasetRecipe, load_recipe
from distillery.records import Example, Outcome

PROJECT = Path(__file__).resolve().parents[2]
LOCALHOST = Path(__file__).parent / "localhost"
LAB = load_recipe("lab")
BASE = parse_azureml(LAB.student_base.model)
MODEL = LAB.registry.model_name
ROWS = {"train": 1200, "validation": 200}
"""A tenth of train is tested, and the preset's 1,000 rows are labelled."""

WRONG = 0.1
"""The share of the teacher's answers that are wrong."""

STYLES = (
    "{letter}",
    "{letter}. {text}",
    "The answer is ({letter}) {text}.",
    "<think>\n{text} fits best.\n</think>\n\n**Answer: {letter}**",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Rehearsal:
    """The lab's services on this machine, and a machine that uses them."""

    def __init__(
        self,
        folder: Path,
        rows: Mapping[str, Sequence[dict[str, Any]]],
        answers: Mapping[str, Example],
    ) -> None:
        self.folder, self.answers = folder, answers
        self.hub = HubStandIn(rows)
        self.certificate = make_certificate(folder, FOUNDRY)
        self.teacher = ChatEndpoint(self.answer, self.certificate)
        (folder / "azurite").mkdir()
        self.storage = Azurite(folder / "azurite", self.certificate)
        self.proxy = Proxy(self.storage.port)
        # The registry that holds the base model, and the workspace.
        self.azure_ml = RegistryStandIn(blob_port=self.storage.port, secrets=container_sas())
        self.cut_at: int | None = None
        self.sent_before_labels: int | None = None

    def start(self, stack: ExitStack) -> None:
        for service in (self.hub, self.teacher, self.storage):
            stack.enter_context(service)
        stack.enter_context(self.proxy.running())
        stack.enter_context(self.azure_ml.running(self.certificate))
        self.azure_ml.proxy_port = self.proxy.port
        create_container(self.storage.port, WORKSPACE_CONTAINER)

    def answer(self, call: Call) -> Reply:
        """Answer as one of several large models would, mostly rightly."""
        if call.question not in self.answers:
            # `distillery check` asks a question of its own.
            return said("A") if call.path.startswith("/models/") else refused(404, "not found")
        if self.sent_before_labels is None:
            self.sent_before_labels = self.proxy.sent
            if self.cut_at is not None:
                self.proxy.cut_after(self.cut_at, away_s=6)
        row = self.answers[call.question]
        chance = random.Random(row.question)
        letter = row.answer_key or ""
        if chance.random() < WRONG:
            letter = chance.choice([other for other in row.keys if other != letter])
        text = row.options[row.keys.index(letter)]
        return said(chance.choice(STYLES).format(letter=letter, text=text))

    @property
    def requests(self) -> dict[str, int]:
        """How many requests each service has answered."""
        workspace = self.azure_ml.asked["workspace"]
        return {
            "hub": len(self.hub.asked),
            "teacher": len(self.teacher.calls),
            "registry": self.azure_ml.asked.total() - workspace,
            "registry's storage": self.storage.requests(f" /{REGISTRY_CONTAINER}"),
            "workspace": workspace,
            "workspace's storage": self.storage.requests(f" /{WORKSPACE_CONTAINER}"),
        }

    @property
    def models_read(self) -> int:
        """How many requests have read a part of a model: the base, or a registered student."""
        weights = self.storage.requests(f"GET /{REGISTRY_CONTAINER}/", ".safetensors")
        return weights + self.storage.requests(f"GET /{WORKSPACE_CONTAINER}/", "model.onnx")

    @property
    def environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PREFECT_", "AZURE_", "HF_"))
        }
        return (
            kept
            | self.azure_ml.environment(self.certificate)
            | {
                "PYTHONPATH": str(LOCALHOST),
                "PREFECT_HOME": str(self.folder / "prefect"),
                "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                "HF_ENDPOINT": self.hub.url,
                "HF_HOME": str(self.folder / "hf"),
                "SSL_CERT_FILE": str(self.certificate.cert),
                "TEACHER_MODEL_ENDPOINT": f"https://{FOUNDRY}:{self.teacher.port}/models",
                "TEACHER_MODEL_NAME": "DeepSeek-V3",
                "TEACHER_MODEL_KEY": "not-a-key",
            }
        )

    def run(self, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command, which must succeed, and show what it prints."""
        print(f"\n$ python -m {module} {' '.join(arguments)}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=PROJECT,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        print(done.stdout, flush=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done

    def distil(self) -> tuple[dict[str, Any], str]:
        """Run the preset; return its figures and its log."""
        before, began = self.requests, time.monotonic()
        done = self.run("flows.distill", "lab")
        figures: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
        figures["requests"] = {name: count - before[name] for name, count in self.requests.items()}
        return figures, done.stdout + done.stderr

    def outcome(self) -> Outcome:
        """Return the records of the last run."""
        runs = self.folder / "home" / "store" / "records" / "runs"
        last = max(runs.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return Outcome.model_validate_json(last.read_text())


def read_rows() -> dict[str, list[dict[str, Any]]]:
    """Return the hub's splits, of real rows."""
    folder = os.environ.get("COMMONSENSE_QA_DIR")
    assert folder, "COMMONSENSE_QA_DIR: not set; it names a folder with CommonsenseQA's train.jsonl"
    lines = (Path(folder) / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: sum(ROWS.values())]]
    return {"train": rows[: ROWS["train"]], "validation": rows[ROWS["train"] :]}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return read_rows()


@pytest.fixture(scope="module")
def prepared(
    rows: dict[str, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Example]]:
    """The rows by role, as the preset parts them."""
    folder = tmp_path_factory.mktemp("rows")
    files = {}
    for split, values in rows.items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in values))
        files[split] = [str(path)]
    recipe = LAB.dataset.model_dump() | {"source": "files", "files": files}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLERY_HOME", str(folder / "home"))
        counts = prepare(DatasetRecipe.model_validate(recipe), folder / "out")
    found = {}
    for role, written in counts.splits.items():
        found[role] = read_examples(folder / "out" / written.file)
    return found


@pytest.fixture(scope="module")
def base(
    prepared: dict[str, list[Example]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files of the base model, which knows the test rows."""
    folder = tmp_path_factory.mktemp("base")
    build_knowing_model(prepared["test"], prepared["train"], folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def rehearsal(
    rows: dict[str, list[dict[str, Any]]],
    prepared: dict[str, list[Example]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Rehearsal]:
    answers = {}
    for examples in prepared.values():
        for row in examples:
            answers[render_messages(row, LAB.prompt)[-1]["content"]] = row
    # The test itself writes into the storage.
    monkeypatch.setattr(socket, "getaddrinfo", resolve_localhost(socket.getaddrinfo))
    made = Rehearsal(tmp_path, rows, answers)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(made.certificate.cert))
    with ExitStack() as stack:
        made.start(stack)
        yield made


def offer(rehearsal: Rehearsal, layout: str, base: dict[str, bytes]) -> None:
    """Put the base model into the registry."""
    upload(rehearsal.storage.port, "models/phi", in_layout(layout, base))
    rehearsal.azure_ml.models[BASE.name, BASE.version] = "models/phi"


def distil_first(
    rehearsal: Rehearsal,
    prepared: dict[str, list[Example]],
    base: dict[str, bytes],
    home: Path,
    disturbed: bool,
) -> tuple[dict[str, Any], Outcome]:
    """Run the preset for the first time and check what became of it; return its figures and
    records. `disturbed`: whether the services failed for a moment."""
    weights = len(base["model.safetensors"])
    first, log = rehearsal.distil()
    outcome = rehearsal.outcome()
    first["stages"] = stage_seconds(outcome)
    first["accuracy"] = outcome.report.row(outcome.report.candidate).accuracy
    asked = len(prepared["train"]) + len(prepared["test"])
    assert (
        first["requests"]["teacher"] == asked == LAB.dataset.sample["train"] + len(prepared["test"])
    )
    for call in rehearsal.teacher.calls[-asked:]:
        assert call.path.startswith("/models/chat/completions?")
        assert call.headers["user-agent"].startswith("azsdk-python-ai-inference")
    assert (outcome.labels.accepted, outcome.labels.rejected) == (len(prepared["train"]), 0)
    assert outcome.decision.passed, outcome.decision.reason
    assert outcome.promotion
    assert outcome.promotion.result == "promoted"
    assert f"registered as {MODEL} version 1" in log
    # Small files are looked at before the labels are paid, and the weights come after that.
    assert rehearsal.sent_before_labels is not None
    assert rehearsal.sent_before_labels < weights < rehearsal.proxy.sent
    (folder,) = (home / "models").glob("azureml-*")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == base
    storage_is_away = f"the storage of {BASE.title} does not answer"
    assert (storage_is_away in log) == disturbed
    # The SDK's own words for it.
    assert "Incomplete download" not in log
    throttled = " ".join(rehearsal.azure_ml.refused)
    assert ("/registries/" in throttled) == ("/workspaces/" in throttled) == disturbed
    return first, outcome


def test_the_lab_whose_services_are_cut_and_throttled(
    rehearsal: Rehearsal, prepared: dict[str, list[Example]], base: dict[str, bytes], home: Path
) -> None:
    offer(rehearsal, "data", base)
    rehearsal.cut_at = len(base["model.safetensors"]) // 2
    rehearsal.azure_ml.throttled = 1
    first, _ = distil_first(rehearsal, prepared, base, home, disturbed=True)
    print(json.dumps({"rehearsal": "cut and throttled", "first": first}))


def test_the_lab_from_first_to_last(
    rehearsal: Rehearsal,
    prepared: dict[str, list[Example]],
    base: dict[str, bytes],
    tmp_path: Path,
    home: Path,
) -> None:
    offer(rehearsal, "components", base)
    checked = rehearsal.run("distillery.cli", "check", "lab").stdout
    assert re.search(r"(?m)^ok +teacher endpoint", checked)
    assert rehearsal.models_read == 0

    first, outcome = distil_first(rehearsal, prepared, base, home, disturbed=False)
    models_read = rehearsal.models_read
    assert models_read > 0
    again, log = rehearsal.distil()
    assert again["requests"]["teacher"] == 0
    # The commit that the branch is today.
    assert again["requests"]["hub"] == 1
    assert again["requests"]["registry"] == again["requests"]["registry's storage"] == 0
    assert rehearsal.models_read == models_read
    assert log.count("cached from") == len(first["stages"])

    student = tmp_path / "student"
    listed = rehearsal.run("distillery.cli", "models", "list", "--registry", "azureml").stdout
    assert re.search(rf"{MODEL}  version 1  champion", listed)
    rehearsal.run(
        "distillery.cli", "models", "download", MODEL, str(student), "--registry", "azureml"
    )
    row = prepared["test"][0]
    told = rehearsal.run(
        "distillery.cli", "ask", str(student), row.question, "--options", *row.options
    ).stdout
    assert len(told.splitlines()) == len(row.options)
    assert told.startswith(f"{row.answer_key}  {row.choices[row.keys.index(row.answer_key or '')]}")

    questions = tmp_path / "questions.jsonl"
    lines = []
    for row in prepared["test"]:
        choices = {"label": row.keys, "text": row.choices}
        lines.append(
            json.dumps({"id": row.example_id, "question": row.question, "choices": choices}) + "\n"
        )
    questions.write_text("".join(lines))
    rehearsal.run(
        "flows.batch_inference",
        MODEL,
        str(questions),
        str(tmp_path / "answers"),
        "--registry",
        "azureml",
    )
    answered = {}
    for line in (tmp_path / "answers" / "predictions.jsonl").read_text().splitlines():
        answered[json.loads(line)["example_id"]] = json.loads(line)["answer"]
    right = sum(answered[row.example_id] == row.answer_key for row in prepared["test"])
    assert right == outcome.report.row(outcome.report.candidate).correct

    print(json.dumps({"rehearsal": "from first to last", "first": first, "again": again}))


def stage_seconds(outcome: Outcome) -> dict[str, float]:
    """Return the seconds that each stage's work took, in the run that did it."""
    records = {
        "prepare dataset": outcome.data,
        "label": outcome.labels,
        "train student": outcome.student,
        "export student": outcome.model,
        "ask base model": outcome.base_answers,
        "evaluate": outcome.report,
        "register": outcome.registered,
        "download": outcome.delivered,
    }
    return {name: round(record.seconds, 1) for name, record in records.items() if record}
