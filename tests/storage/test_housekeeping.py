"""What the store's garbage collection keeps and what it takes, on real folders, a real registry and
real Azurite."""

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from azurite_server import Azurite, free_port

from distillery.errors import RegistryUnavailable, StoreError
from distillery.records import (
    Artifact,
    EvaluationReport,
    GateDecision,
    Interval,
    OnnxModel,
    Outcome,
    PreparedDataset,
    Record,
    RegisteredModel,
    ScoreRow,
    Split,
    StudentCheckpoint,
    TeacherLabels,
)
from distillery.registry.local import LocalRegistry
from distillery.registry.references import find_registered
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.housekeeping import Inventory, Waste

MONTH = timedelta(days=30)
OLD = 40 * 86400


pytestmark = pytest.mark.usefixtures("one_registry")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


@pytest.fixture
def put(store: ArtifactStore, tmp_path: Path) -> Callable[[str], Artifact]:
    return lambda content: put_into(store, tmp_path, content)


def put_into(store: ArtifactStore, tmp_path: Path, content: str) -> Artifact:
    folder = tmp_path / "sources" / content
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text(content)
    return store.put(folder)


def outcome(
    recipe: str, data: Artifact, model: Artifact, registered: RegisteredModel | None = None
) -> str:
    """A run's record. Labels and student are what the data and the model are."""
    digest = "d" * 64
    row = ScoreRow(
        name="student",
        kind="model",
        correct=1,
        rows=1,
        accuracy=1.0,
        interval=Interval(low=0.0, high=1.0),
    )
    record: Record = Outcome(
        recipe=recipe,
        data=PreparedDataset(
            artifact=data, splits={"train": Split(file="train.jsonl", rows=1, sha256=digest)}
        ),
        teacher=None,
        labels=TeacherLabels(artifact=data, teacher="t", accepted=1, rejected=0, soft=False),
        student=StudentCheckpoint(artifact=model, method="full", base="b", parameters=1, steps=1),
        model=OnnxModel(artifact=model, precision="int4", algorithm="rtn", parameters=1),
        report=EvaluationReport(
            artifact=model, scoreboard=(row,), candidate="student", answers_sha256=digest
        ),
        decision=GateDecision(passed=True, reason="good"),
        registered=registered,
        delivered=None,
    )
    return record.model_dump_json()


def age(store: ArtifactStore, *prefixes: str, seconds: float = OLD) -> None:
    """Makes all files below the prefixes, or all there are, as old as that."""
    moment = time.time() - seconds
    for file in store.storage.find():
        if file.name.startswith(prefixes or ("",)):
            os.utime(Path(store.storage.root) / file.name, (moment, moment))


def find_waste(
    store: ArtifactStore, inventory: Inventory, keep_runs: int, now: datetime | None = None
) -> list[Waste]:
    """As `distillery store gc` finds it, which asks the registries."""
    registered = find_registered(inventory.registered_models(), store.storage.is_local)
    return inventory.waste(registered, MONTH, keep_runs, now)


def collect(store: ArtifactStore, keep_runs: int = 3) -> list[Waste]:
    inventory = Inventory(store)
    return [waste for waste in find_waste(store, inventory, keep_runs) if inventory.remove(waste)]


def names(found: list[Waste], kind: str) -> set[str]:
    return {waste.name for waste in found if waste.kind == kind}


def test_the_newest_runs_of_each_recipe_keep_what_they_name(
    store: ArtifactStore, put: Callable[[str], Artifact]
) -> None:
    data, models = put("data"), [put(f"model {number}") for number in range(5)]
    unnamed, other = put("unnamed"), put("another recipe's")
    for number, model in enumerate(models):
        store.write_record(f"runs/demo-{number}.json", outcome("demo", data, model))
    store.write_record("runs/lab-0.json", outcome("lab", data, other))
    age(store)
    for number in range(5):
        age(store, f"records/runs/demo-{number}", seconds=OLD - number)
    removed = collect(store)
    assert names(removed, "artifact") == {unnamed.sha256, models[0].sha256, models[1].sha256}
    assert names(removed, "run") == {"records/runs/demo-0.json", "records/runs/demo-1.json"}
    assert len(removed) == 5
    assert {a.digest for a in Inventory(store).artifacts()} == {
        a.sha256 for a in (data, other, *models[2:])
    }
    assert all(store.holds(artifact) for artifact in (data, other, *models[2:]))
    assert not Path(store.storage.root, unnamed.sha256).exists()
    age(store)
    assert collect(store) == []


def test_what_is_young_stays(store: ArtifactStore, put: Callable[[str], Artifact]) -> None:
    old, young = put("old"), put("young")
    age(store)
    store.write_record("runs/demo-0.json", outcome("demo", old, old))
    put("young")
    assert collect(store, keep_runs=0) == [], "the run is young, and so is what was put again"
    age(store, "records", seconds=29 * 86400)
    assert collect(store, keep_runs=0) == []
    age(store, "records")
    assert names(collect(store, keep_runs=0), "artifact") == {old.sha256}
    assert store.holds(young)


def test_nothing_is_removed_that_is_used_meanwhile(
    store: ArtifactStore, put: Callable[[str], Artifact], tmp_path: Path
) -> None:
    artifacts = {use: put(use) for use in ("put", "fetch", "holds", "nothing")}
    age(store)
    inventory = Inventory(store)
    found = find_waste(store, inventory, 0)
    assert len(found) == 4
    put("put")
    store.fetch(artifacts["fetch"])
    assert store.holds(artifacts["holds"])
    assert [waste.name for waste in found if inventory.remove(waste)] == [
        artifacts["nothing"].sha256
    ]
    assert [use for use, artifact in artifacts.items() if store.holds(artifact)] == [
        "put",
        "fetch",
        "holds",
    ]


@pytest.fixture
def registered(tmp_path: Path, put: Callable[[str], Artifact]) -> RegisteredModel:
    """A version whose provenance names the artifact 'labels', which no run's record does."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.onnx").write_text("weights")
    labels = TeacherLabels(artifact=put("labels"), teacher="t", accepted=1, rejected=0, soft=False)
    return LocalRegistry().register(
        folder, tmp_path.name, {}, {"labels": labels.model_dump(mode="json")}
    )


def test_a_registered_model_keeps_what_it_came_from_until_it_is_deleted(
    store: ArtifactStore,
    put: Callable[[str], Artifact],
    registered: RegisteredModel,
    registry_url: str,
) -> None:
    from mlflow import MlflowClient

    data, labels = put("data"), put("labels")
    store.write_record("runs/demo-0.json", outcome("demo", data, data, registered))
    age(store)
    assert collect(store, keep_runs=0) == []
    MlflowClient(registry_url, registry_url).delete_model_version(
        registered.name, registered.version
    )
    removed = collect(store, keep_runs=0)
    assert names(removed, "artifact") == {data.sha256, labels.sha256}
    assert names(removed, "run") == {"records/runs/demo-0.json"}


def test_a_registered_model_that_no_run_names_keeps_what_it_came_from(
    store: ArtifactStore, put: Callable[[str], Artifact], registered: RegisteredModel
) -> None:
    """Its run ended before it kept its record, or the record was removed."""
    assert registered.version
    labels, unnamed = put("labels"), put("other")
    age(store)
    assert names(collect(store, keep_runs=0), "artifact") == {unnamed.sha256}
    assert store.holds(labels)


def test_a_registry_that_does_not_answer_leaves_all_as_it_is(
    store: ArtifactStore,
    put: Callable[[str], Artifact],
    registered: RegisteredModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put("unnamed")
    store.write_record("runs/demo-0.json", outcome("demo", put("data"), put("data"), registered))
    age(store)
    before = store.storage.find()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("DISTILLERY_REGISTRY", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(RegistryUnavailable, match="does not answer"):
        collect(store, keep_runs=0)
    assert store.storage.find() == before


def test_a_record_that_is_none_leaves_all_as_it_is(
    store: ArtifactStore, put: Callable[[str], Artifact]
) -> None:
    put("unnamed")
    for content in ("{", "[]", '{"recipe": "demo"}'):
        store.write_record("runs/demo-0.json", content)
        age(store)
        with pytest.raises(
            StoreError,
            match=r"records/runs/demo-0\.json: not the record of a run .*; remove the file",
        ):
            Inventory(store)


def test_what_was_never_finished_goes_when_it_is_old(
    store: ArtifactStore, put: Callable[[str], Artifact], tmp_path: Path
) -> None:
    root, whole, half = Path(store.storage.root), put("whole"), put("half")
    store.write_record("runs/demo-0.json", outcome("demo", whole, whole))
    (root / half.sha256 / "artifact.json").unlink()
    store.write_record("train-abc.json", "{}")
    store.save_checkpoint("train-1", tmp_path / "sources" / "whole")
    for name in (
        ".writing-1/files/file",
        f"{whole.sha256}.damaged-1/files/file",
        "results/.writing-2",
        "mine/file",
    ):
        store.write_object(name, b"content")
    assert collect(store) == []
    age(store)
    assert {(waste.kind, waste.name) for waste in collect(store)} == {
        ("half-written", half.sha256),
        ("half-written", ".writing-1"),
        ("half-written", f"{whole.sha256}.damaged-1"),
        ("half-written", "results/.writing-2"),
        ("checkpoint", "work/train-1"),
        ("record", "records/train-abc.json"),
    }
    assert {file.name.partition("/")[0] for file in store.storage.find()} == {
        whole.sha256,
        "records",
        "mine",
    }
    assert store.holds(whole)


def as_prefect_keeps_it(record: Record | None) -> bytes:
    from prefect.results import ResultRecord, ResultRecordMetadata  # type: ignore[attr-defined]
    from prefect.serializers import JSONSerializer

    metadata = ResultRecordMetadata(serializer=JSONSerializer(), storage_key="key")
    return ResultRecord(result=record, metadata=metadata).serialize()


def test_results_go_with_their_artifacts(
    store: ArtifactStore, put: Callable[[str], Artifact], registered: RegisteredModel
) -> None:
    kept, gone = put("kept"), put("gone")
    run = outcome("demo", kept, kept)
    store.write_record("runs/demo-0.json", run)
    results: dict[str, Record | None] = {
        "kept": OnnxModel(artifact=kept, precision="int4", algorithm="rtn", parameters=1),
        "gone": OnnxModel(artifact=gone, precision="int4", algorithm="rtn", parameters=1),
        "whole run": Outcome.model_validate_json(run),
        "half run": Outcome.model_validate_json(outcome("demo", kept, gone)),
        "registered": registered,
        "nothing": None,
    }
    for name, record in results.items():
        store.write_object(f"results/{name}", as_prefect_keeps_it(record))
    store.write_object("results/no JSON", b"\x80")
    age(store)
    store.write_object("results/young", as_prefect_keeps_it(results["gone"]))
    assert names(collect(store), "result") == {"results/gone", "results/half run"}
    assert {file.name for file in store.storage.find("results")} == {
        f"results/{name}"
        for name in ("kept", "whole run", "registered", "nothing", "no JSON", "young")
    }


def test_who_names_what(store: ArtifactStore, put: Callable[[str], Artifact]) -> None:
    data, model, unnamed = put("data"), put("model"), put("unnamed")
    store.write_record("runs/demo-0.json", outcome("demo", data, model))
    store.write_record("runs/demo-1.json", outcome("demo", data, data))
    age(store, "records/runs/demo-0", seconds=1)
    age(store, unnamed.sha256, seconds=90)
    found = {artifact.digest: artifact for artifact in Inventory(store).artifacts()}
    assert found[data.sha256].named_by == ("data of demo-1", "data of demo-0")
    assert found[model.sha256].named_by == ("student of demo-0",)
    assert found[unnamed.sha256].named_by == ()
    assert [artifact.bytes for artifact in found.values()][-1] == len("unnamed") == unnamed.bytes
    assert datetime.now(UTC) - found[unnamed.sha256].used >= timedelta(seconds=90)


@pytest.mark.slow
def test_the_same_on_azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adlfs import AzureBlobFileSystem  # type: ignore[import-untyped]
    from azure.storage.blob import ContainerClient

    AzureBlobFileSystem.clear_instance_cache()
    (tmp_path / "azurite").mkdir()
    with Azurite(tmp_path / "azurite") as azurite:
        for name, value in azurite.environment.items():
            monkeypatch.setenv(name, value)
        with ContainerClient.from_connection_string(
            azurite.connection_string, "distillery"
        ) as container:
            container.create_container()
        store = ArtifactStore("abfs://distillery/store")
        kept, gone, used, half = (
            put_into(store, tmp_path, name) for name in ("kept", "gone", "used", "half")
        )
        store.write_record("runs/demo-0.json", outcome("demo", kept, kept))
        store.write_object(
            "results/gone",
            as_prefect_keeps_it(
                OnnxModel.model_validate_json(
                    json.dumps(
                        {
                            "artifact": gone.model_dump(),
                            "precision": "int4",
                            "algorithm": "rtn",
                            "parameters": 1,
                        }
                    )
                )
            ),
        )
        store.save_checkpoint("train-1", tmp_path / "sources" / "kept")
        (manifest,) = (
            file for file in store.storage.find(half.sha256) if file.name.endswith("artifact.json")
        )
        assert store.storage.remove(manifest)

        inventory, later = Inventory(store), datetime.now(UTC) + timedelta(days=40)
        found = find_waste(store, inventory, 1, later)
        assert {(waste.kind, waste.name) for waste in found} == {
            ("artifact", gone.sha256),
            ("artifact", used.sha256),
            ("half-written", half.sha256),
            ("checkpoint", "work/train-1"),
            ("result", "results/gone"),
        }
        # A run counts on one, another is being written anew.
        store.storage.touch(f"{used.sha256}/artifact.json")
        put_into(store, tmp_path, "half")
        assert names([waste for waste in found if not inventory.remove(waste)], "artifact") == {
            used.sha256
        }
        assert [store.holds(artifact) for artifact in (kept, gone, used, half)] == [
            True,
            False,
            True,
            True,
        ]
        assert {file.name.partition("/")[0] for file in store.storage.find()} == {
            kept.sha256,
            used.sha256,
            half.sha256,
            "records",
        }


def test_a_shared_store_is_not_judged_by_a_registry_of_this_machine_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DISTILLERY_REGISTRY")
    line = r"DISTILLERY_REGISTRY: not set, .*; set it to the registry of the runs"
    with pytest.raises(StoreError, match=line):
        find_registered({("local", "student")}, store_is_local=False)
    nothing = find_registered(set(), store_is_local=False)
    assert not nothing.versions
    assert not nothing.artifacts
