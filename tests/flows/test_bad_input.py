"""Bad input ends a run with exit 1 and one clear line: each flow as a process of its own, on a real
Prefect server."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_endpoint import Call, ChatEndpoint, Reply, good, refused, said
from prefect_api import OwnPrefect
from tiny_recipe import ROWS, recipe, write_rows

from distillery.errors import DataError
from distillery.readiness import check_data
from distillery.recipe import PromptRecipe, Recipe
from distillery.registry.local import LocalRegistry

PROJECT = Path(__file__).resolve().parents[2]
COUNTING = Path(__file__).parent / "counting"
FULL_DISK = Path(__file__).parent / "full_disk"
KEY = "the-right-key-of-the-test"
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d\.\d{3} \| (INFO|WARNING|ERROR) ")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def prefect(prefect_server: OwnPrefect, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a flow: one Prefect server and one place for results for all runs here."""
    return {
        "PREFECT_API_URL": prefect_server.url,
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "PYTHONWARNINGS": "ignore",
    }


class Bench:
    """A recipe and rows that are good, to be spoilt in one way, and the run that must then end with
    one line."""

    def __init__(self, folder: Path, base: Path, prefect: dict[str, str]) -> None:
        self.folder, self.prefect = folder, prefect
        self.files = write_rows(folder / "rows")
        self.recipe = recipe(self.files, base)

    def ask(self, url: str, key: str = KEY, **teacher: Any) -> None:
        """Has the recipe ask an endpoint, with `key`, instead of a teacher of its own."""
        self.recipe["student"] = {"base": self.recipe["teacher"]["preparation"]["base"]}
        self.recipe["teacher"] = {"kind": "endpoint", "attempts": 1, **teacher}
        names = {"TEACHER_MODEL_NAME": "m", "TEACHER_MODEL_ENDPOINT": url, "TEACHER_MODEL_KEY": key}
        self.prefect = self.prefect | names

    def spoil(self, split: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Changes the third row of a split."""
        path = Path(self.files[split][0])
        lines = path.read_text().splitlines()
        row = json.loads(lines[2])
        change(row)
        path.write_text("\n".join([*lines[:2], json.dumps(row), *lines[3:]]))

    def refusal(self, *, path: str = "") -> str:
        """The line with which the run of the recipe is refused; `path` goes before Python's own."""
        file = self.folder / "bad.yaml"
        file.write_text(yaml.safe_dump(self.recipe))
        return self.line_of("flows.distill", str(file), path=path)

    def line_of(self, module: str, *arguments: str, path: str = "") -> str:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=PROJECT,
            env=os.environ | self.prefect | ({"PYTHONPATH": path} if path else {}),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1, done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert KEY not in done.stderr
        *log, line = done.stderr.splitlines()
        assert [other for other in log if not LOG_LINE.match(other)] == []
        assert line.startswith("error: ")
        return line


@pytest.fixture
def bench(
    tmp_path: Path,
    tiny_model: Callable[[str], Path],
    prefect: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    for name in ("NAME", "ENDPOINT", "KEY"):
        monkeypatch.delenv(f"TEACHER_MODEL_{name}", raising=False)
    return Bench(tmp_path, tiny_model("llama"), prefect)


def test_no_credentials(bench: Bench) -> None:
    bench.ask("")
    for name in ("NAME", "ENDPOINT", "KEY"):
        del bench.prefect[f"TEACHER_MODEL_{name}"]
    assert (
        "TEACHER_MODEL_NAME, TEACHER_MODEL_ENDPOINT, TEACHER_MODEL_KEY: not set or empty; set them"
        in bench.refusal()
    )


def test_a_wrong_key(bench: Bench) -> None:
    def script(call: Call) -> Reply:
        return (
            good(call)
            if call.key == KEY
            else refused(401, f"Incorrect API key provided: {call.key}")
        )

    with ChatEndpoint(script) as server:
        bench.ask(server.url, key="the-wrong-key-of-the-test")
        line = bench.refusal()
    assert f"TEACHER_MODEL_KEY: refused by {server.url} (401); check that it is the key" in line
    assert "the-wrong-key-of-the-test" not in line


def test_an_unknown_model(bench: Bench) -> None:
    with ChatEndpoint(
        lambda _call: refused(404, "The model does not exist", code="model_not_found")
    ) as server:
        bench.ask(server.url)
        assert (
            f"TEACHER_MODEL_NAME m: not found at TEACHER_MODEL_ENDPOINT {server.url}"
            in bench.refusal()
        )


def test_an_endpoint_that_is_down(bench: Bench) -> None:
    with ChatEndpoint(good) as server:
        bench.ask(server.url, outage_s=1)
    line = bench.refusal()
    assert f"TEACHER_MODEL_ENDPOINT {server.url}: can't be reached" in line
    assert "check the URL and that it runs" in line


@pytest.mark.parametrize(
    "script", [lambda _call: said("A"), lambda _call: refused(400, "logprobs is not supported")]
)
def test_an_endpoint_without_log_probabilities(
    bench: Bench, script: Callable[[Call], Reply]
) -> None:
    with ChatEndpoint(script) as server:
        bench.ask(server.url, soft_labels=True)
        line = bench.refusal()
    assert "teacher.soft_labels: asks for log-probabilities" in line
    assert "set teacher.soft_labels: false" in line


def test_a_budget_that_does_not_reach_to_the_test_rows_ends_the_run_before_it_trains(
    bench: Bench,
) -> None:
    counted = bench.folder / "counted"
    counted.touch()
    with ChatEndpoint() as server:
        bench.ask(server.url, identity="capped", budget={"calls": ROWS["train"] + 1})
        bench.prefect |= {"COUNT_FILE": str(counted)}
        line = bench.refusal(path=str(COUNTING))
        assert len(server.calls) == ROWS["train"] + 1
    assert (
        "teacher.budget.calls: 61 of 61 spent in this run, and the next call could exceed it"
        in line
    )
    assert set(counted.read_text().split()) == {"request"}


def test_reasons_that_no_label_has(bench: Bench) -> None:
    bench.ask("")
    labels = [{"example_id": f"train-{number}", "answer": "A"} for number in range(ROWS["train"])]
    file = bench.folder / "labels.jsonl"
    file.write_text("".join(json.dumps(label) + "\n" for label in labels))
    bench.recipe["teacher"] = {"kind": "file", "files": [str(file)]}
    bench.recipe["student"]["training"] = {"rationale_weight": 1.0}
    assert "training.rationale_weight is above 0, but no label has a reason" in bench.refusal()


def test_a_missing_column(bench: Bench) -> None:
    bench.recipe["dataset"]["columns"] = {"question": "text"}
    line = bench.refusal()
    assert "no column 'text'" in line
    assert "set dataset.columns.question to the one that is meant" in line


def test_an_option_that_a_teacher_by_text_is_not_asked(bench: Bench) -> None:
    bench.recipe["prompt"] |= {"user": "{question}", "answer": "text"}
    bench.spoil("train", lambda row: row["choices"]["text"].__setitem__(1, "o" * 20_000))
    line = bench.refusal()
    assert "option 2 has 20,000 characters, and the run's own teacher is asked by text" in line
    with pytest.raises(DataError, match="option 2 has 20,000 characters"):
        list(check_data(Recipe.model_validate(bench.recipe)))


def test_an_answer_key_that_is_no_option(bench: Bench) -> None:
    bench.spoil("test", lambda row: row.update(answerKey="F"))
    line = bench.refusal()
    assert f"{bench.files['test'][0]}:3: answerKey" in line
    assert "'F'" in line


def test_an_empty_file(bench: Bench) -> None:
    Path(bench.files["gold"][0]).write_text("")
    assert (
        f"{bench.files['gold'][0]}: empty, without a single row; correct dataset.files.gold"
        in bench.refusal()
    )


def test_an_unknown_recipe_key(bench: Bench) -> None:
    bench.recipe["student"]["layer"] = 1
    assert (
        "bad.yaml: student.layer: unknown key; remove it or correct its spelling" in bench.refusal()
    )


def test_a_base_model_that_needs_code_of_its_own(
    bench: Bench, tiny_model: Callable[[str], Path]
) -> None:
    base = bench.folder / "base"
    base.mkdir()
    for file in tiny_model("llama").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    own = {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (base / "config.json").write_text(
        json.dumps(json.loads((base / "config.json").read_text()) | own)
    )
    (base / "code.py").write_text(f"open({str(base / 'ran')!r}, 'w').close()\n")
    bench.recipe["teacher"]["preparation"]["base"]["model"] = str(base)
    line = bench.refusal()
    assert f"{base} needs Python code of its own to load" in line
    assert "trust_remote_code: true" in line
    assert "DISTILLERY_REMOTE_CODE" in line
    assert not (base / "ran").exists()


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("azureml://registries/azureml/models/Tiny/versions/1", "no Azure login for the registry"),
        ("base", "it has no chat template; choose an instruction-tuned model"),
    ],
)
def test_a_base_model_that_can_not_be_used_is_told_before_a_teacher_is_asked(
    model: str, text: str, bench: Bench, tiny_model: Callable[[str], Path]
) -> None:
    base = bench.folder / "base"
    base.mkdir()
    for file in tiny_model("llama").iterdir():
        if file.name != "chat_template.jinja":
            (base / file.name).write_bytes(file.read_bytes())
    bench.recipe["teacher"]["preparation"]["base"]["model"] = model.replace("base", str(base))
    # The logins of a developer alone, of which none is found.
    bench.prefect = bench.prefect | {"AZURE_TOKEN_CREDENTIALS": "dev"}
    with ChatEndpoint(good) as server:
        bench.ask(server.url)
        assert text in bench.refusal()
        assert not server.calls


def test_a_disk_that_is_full_while_exporting(bench: Bench, home: Path) -> None:
    line = bench.refusal(path=str(FULL_DISK))
    assert (
        f"{home / 'work'}: the disk is full (File too large); "
        "free some space or move DISTILLERY_HOME" in line
    )
    assert list((home / "work").iterdir()) == []


@pytest.mark.parametrize("file", ["model.onnx.data", "manifest.json"])
def test_a_registered_folder_that_was_tampered_with(bench: Bench, file: str) -> None:
    folder = bench.folder / "model"
    folder.mkdir()
    (folder / "model.onnx.data").write_bytes(bytes(1000))
    provenance = {"prompt": PromptRecipe().model_dump(), "recipe": Recipe().model_dump(mode="json")}
    model = LocalRegistry().register(folder, "tiny-student", {}, provenance)
    stored = Path(model.artifact.uri) / file
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(content)
    out = bench.folder / "answers"
    line = bench.line_of("flows.batch_inference", "tiny-student", bench.files["test"][0], str(out))
    assert (
        f"tiny-student version 1: {file}: missing, added or altered since it was registered" in line
    )
    assert not out.exists()
