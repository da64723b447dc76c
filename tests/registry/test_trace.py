"""From a version to its rows, labels, cost and runs, and from a row to the versions that it
trained, by the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from registered_student import provenance, register
from typer.testing import CliRunner, Result

from distillery.cli import app
from distillery.evaluation.preferences import preference_figures
from distillery.records import Preferences, Usage
from distillery.registry.comparison import making_figures
from distillery.registry.local import LocalRegistry
from distillery.registry.trace import trace
from distillery.storage.artifacts import ArtifactStore

pytestmark = pytest.mark.usefixtures("one_registry")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["trace", *arguments])


def traced(*arguments: str) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_judge_is_paid_apart(tmp_path: Path) -> None:
    made = provenance(tmp_path / "made")
    preferences = Preferences(
        artifact=made["model"]["artifact"],
        figures=preference_figures("wise", []),
        asked=6,
        usage=Usage(prompt_tokens=900, completion_tokens=6),
        cost=0.5,
        currency="EUR",
        produced_by="mine-run-1",
    )
    made["preferences"] = preferences.model_dump(mode="json")
    register(tmp_path / "first", "judged", made)
    found = traced("judged")
    paid = {each["labels"]: (each["calls"], each["cost"]) for each in found["payments"]}
    assert paid == {"train rows": (4, 0.25), "test rows": (4, 0.25), "judge": (6, 0.5)}
    assert found["work"][-1]["stage"] == "ask judge"
    assert making_figures(made)["calls"] == 8, "what the teacher was asked"


def test_a_version_is_traced_to_rows_labels_cost_and_runs(tmp_path: Path) -> None:
    made = provenance(tmp_path / "made")
    model = register(tmp_path / "first", "traced", made)
    found = traced("traced", model.version)
    assert (found["name"], found["version"], found["role"]) == ("traced", "1", "challenger")
    assert found["run"] == "mine-run-1"
    rows = {role: split["rows"] for role, split in found["splits"].items()}
    assert rows == {"gold": 1, "train": 3, "validation": 1, "test": 2}
    assert found["splits"]["train"]["sha256"] == made["data"]["splits"]["train"]["sha256"]
    assert (found["accepted"], found["rejected"], found["teacher"]) == (2, 1, "a-large-model")
    paid = {each["labels"]: (each["calls"], each["cost"]) for each in found["payments"]}
    assert paid == {"train rows": (4, 0.25), "test rows": (4, 0.25)}
    assert [work["stage"] for work in found["work"]] == [
        "prepare dataset",
        "label",
        "label test rows",
        "train student",
        "export student",
        "evaluate",
    ]
    assert {work["run"] for work in found["work"]} == {"mine-run-1"}
    assert found["packages"]["torch"]
    assert found["verdict"] == "passes 1 rule: keeps 80 %"
    files = {file["path"] for file in found["files"]}
    assert files == {"README.md", "evaluation/answers.jsonl", "genai_config.json", "model.onnx"}

    text = run("traced").stdout
    for shown in (
        "traced version 1, challenger, not signed",
        "train rows               3  ",
        "labels                   2  accepted, 1 rejected",
        "4  calls, 1,200 tokens in, 4 out, 0.25 EUR",
        "HuggingFaceTB/SmolLM2-135M-Instruct at cccc",
        "passes 1 rule: keeps 80 %",
    ):
        assert shown in text


def test_a_manifest_of_an_earlier_version_is_traced_as_far_as_it_tells(tmp_path: Path) -> None:
    made = provenance(tmp_path / "made")
    earlier = {key: made[key] for key in ("data", "labels", "student", "evaluation", "recipe")}
    del earlier["student"]["base_license"]
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "model.onnx").write_text("weights")
    registry = LocalRegistry()
    model = registry.register(folder, "earlier", {}, {**earlier, "distillery": "0.1.0"})
    found = trace(registry, model)
    assert (found.accepted, found.code, found.verdict, found.packages) == (2, "0.1.0", "", {})
    foreign = registry.register(folder, "earlier", {}, {"data": "d", "recipe": 3})
    assert trace(registry, foreign).accepted is None
    assert run("earlier", foreign.version).exit_code == 0
    assert "version 1" in run("--row", "r1", "earlier").stdout


def test_a_row_is_traced_to_the_versions_that_it_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_registry: Path
) -> None:
    # The models of other tests are in homes that are gone.
    monkeypatch.setenv("DISTILLERY_REGISTRY", f"sqlite:///{shutil.copy(empty_registry, tmp_path)}")
    made = provenance(tmp_path / "made")
    register(tmp_path / "first", "rows", made)
    made["recipe"]["student"]["gold"] = False
    register(tmp_path / "second", "rows", made)

    def uses(row: str) -> list[tuple[str, str, str, str]]:
        found = traced("--row", row, "rows")
        return [(use["version"], use["split"], use["used"], use["label"]) for use in found]

    assert uses("r2") == [("2", "train", "trained", "B"), ("1", "train", "trained", "B")]
    assert uses("r3") == [("2", "train", "rejected", ""), ("1", "train", "rejected", "")]
    assert uses("g1") == [("2", "gold", "taught", "A"), ("1", "gold", "trained", "A")]
    assert uses("v1")[0] == ("2", "validation", "chose", "")
    assert uses("t1")[0] == ("2", "test", "tested", "")
    assert uses("nobody") == []
    register(tmp_path / "third", "others", made)
    assert [use["name"] for use in traced("--row", "r2")] == ["others", "rows", "rows"]
    line = run("--row", "r1", "rows").stdout.splitlines()[0]
    assert line == "rows  version 2  challenger  train       trained as A, confidence 0.75"
    assert run("--row", "nobody", "rows").stdout == (
        "nobody: in the data set of no registered version\n"
    )


def test_rows_that_are_no_longer_in_the_store(tmp_path: Path) -> None:
    made = provenance(tmp_path / "made")
    register(tmp_path / "first", "collected", made)
    store = Path(ArtifactStore().storage.root)
    gone = made["labels"]["artifact"]["sha256"]
    shutil.rmtree(store / gone)
    (use,) = traced("--row", "r1", "collected")
    assert (use["used"], use["missing"]) == ("unknown", gone)
    gone = made["data"]["artifact"]["sha256"]
    shutil.rmtree(store / gone)
    found = traced("--row", "r1", "collected")
    assert {(use["used"], use["missing"]) for use in found} == {("unknown", gone)}


@pytest.mark.parametrize("arguments", [(), ("mine", "1", "--row", "r1")])
def test_a_wrong_call(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert "give NAME [VERSION], or --row ID [NAME]" in done.output
