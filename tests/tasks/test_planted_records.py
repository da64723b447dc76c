"""What somebody plants among the result records, who may write to the store and do nothing else:
it runs no code, and counts as a miss."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.results import (  # type: ignore[attr-defined]
    ResultRecord,
    ResultRecordMetadata,
    ResultStore,
)
from prefect.serializers import (
    CompressedJSONSerializer,
    CompressedPickleSerializer,
    JSONSerializer,
    PickleSerializer,
    Serializer,
)

from distillery.errors import GateRefused, TeacherUnavailable
from distillery.records import Measured, Predictions, Trial
from distillery.registry.reproduction import Reproduction
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.result_records import CLASSES, ForeignRecord, plain_record
from tasks.results import DistilleryStore, results_in_store
from tasks.stage import is_hit, own_key, stage

pytestmark = pytest.mark.security


class Trap:
    """Unpickled, it creates the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once planted code has run."""
    return tmp_path / "code-has-run"


@pytest.fixture
def record(tmp_path: Path) -> Predictions:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "predictions.jsonl").write_text("{}\n")
    return Predictions(artifact=ArtifactStore().put(tmp_path / "artifact"), rows=1, failed=0)


def planted(
    serializer: dict[str, Any], result: str, metadata: dict[str, Any] | None = None
) -> bytes:
    about = {"storage_key": "k", "serializer": serializer, **(metadata or {})}
    return json.dumps({"metadata": about, "result": result}).encode()


def written(result: Any, serializer: "Serializer[Any]") -> bytes:
    metadata = ResultRecordMetadata(storage_key="k", serializer=serializer)
    return ResultRecord(result=result, metadata=metadata).serialize()


def traps(mark: Path) -> dict[str, bytes]:
    """Records that run code, or import what they name, when Prefect decodes them."""
    touch = {"__class__": "subprocess.call", "data": {"args": ["touch", str(mark)]}}
    plain, whole = {"type": "json"}, json.dumps
    trap = written(Trap(mark), PickleSerializer())
    return {
        "pickle": trap,
        "compressed pickle": written(Trap(mark), CompressedPickleSerializer()),
        "compressed json": written({"a": touch}, CompressedJSONSerializer()),
        "no serializer": json.dumps(
            {"metadata": {"storage_key": "k"}, "result": json.loads(trap)["result"]}
        ).encode(),
        "old form": json.dumps(
            {"data": json.loads(trap)["result"], "serializer": {"type": "pickle"}}
        ).encode(),
        "bare value": whole(touch).encode(),
        "call": planted(plain, whole(touch)),
        "call within": planted(plain, whole([{"a": [touch]}])),
        "call in data": planted(
            plain, whole({"__class__": "distillery.records.Predictions", "data": {"rows": touch}})
        ),
        "error": planted(plain, whole({"__exc_type__": "builtins.exec", "message": f"{mark}"})),
        "module": planted(plain, whole({"__exc_type__": "this.that", "message": ""})),
        "another class": planted(plain, whole({"__class__": "pathlib.Path", "data": str(mark)})),
        "an alias": planted(plain, whole({"__class__": "distillery.records.BaseModel", "data": 1})),
        "a function": planted(
            plain, whole({"__class__": "distillery.records.digest_of", "data": 1})
        ),
        "own decoder": planted(plain | {"object_decoder": "subprocess.call"}, "{}"),
        "own library": planted(plain | {"jsonlib": "pickle"}, "{}"),
        "own arguments": planted(plain | {"loads_kwargs": {"cls": "x"}}, "{}"),
        "pickle twice": planted({"type": "pickle"}, "{}").replace(
            b'{"type": "pickle"}', b'{"type": "json", "type": "pickle"}'
        ),
        "metadata": planted(plain, "{}", {"expiration": {"__class__": "x"}}),
        "brackets": planted(plain, "[" * 100_000),
        "another shape": planted(plain, whole({"__class__": "distillery.records.Trial"})),
        "unhashable": planted(plain, whole({"__class__": ["subprocess.call"], "data": 1})),
        "cut off": trap[: len(trap) // 2],
        "nothing": b"",
    }


@pytest.mark.parametrize("name", traps(Path()))
def test_a_planted_record_is_a_miss_and_runs_nothing(
    name: str, mark: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = traps(mark)[name]
    assert not is_hit(content, Predictions)
    ArtifactStore().write_object(f"results/{name}", content)
    store = DistilleryStore()
    with pytest.raises(ForeignRecord):
        store.read_path(name)
    # Prefect's own look-up, and its reading of a result by key, which come here too.
    assert not ResultStore(result_storage=store).exists(name)
    with pytest.raises(ForeignRecord):
        ResultStore(result_storage=store, serializer=JSONSerializer()).read(name)
    assert not mark.exists()
    (warning,) = [line for line in caplog.messages if f"results/{name}:" in line]
    assert "see who may write to DISTILLERY_STORE" in warning
    assert "\n" not in warning
    assert caplog.records[-1].levelno == logging.WARNING


@pytest.mark.parametrize("name", ["pickle", "call", "call within"])
def test_the_traps_are_ones(name: str, mark: Path) -> None:
    """Prefect itself runs what they hold."""
    ResultRecord.deserialize(traps(mark)[name])
    assert mark.exists()


@pytest.mark.parametrize(
    "result",
    [
        (Trial(number=1, settings={"rank": 8}, measured=None, best=False),),
        Measured(correct=1, rows=2, p50_ms=1.5, bytes=3),
        Reproduction(name="a", version="1", compared=()),
        None,
        {"a": [1, "\ud800", float("inf")]},
    ],
)
def test_what_earlier_versions_wrote_is_read(result: Any) -> None:
    file = written(result, JSONSerializer())
    assert ResultRecord.deserialize(plain_record(file)) == ResultRecord.deserialize(file)


@pytest.mark.parametrize("error", [TeacherUnavailable("a"), GateRefused("b")])
def test_errors_of_our_own_are_read(error: Exception) -> None:
    found: Any = ResultRecord.deserialize(plain_record(written(error, JSONSerializer()))).result
    assert (type(found), str(found)) == (type(error), str(error))


def test_the_classes_are_records(record: Predictions) -> None:
    assert is_hit(written(record, JSONSerializer()), Predictions)
    assert "distillery.records.Outcome" in CLASSES
    last_parts = {name.rpartition(".")[2] for name in CLASSES}
    assert not last_parts & {"BaseModel", "BaseModelRecipe", "ExportForm"}


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_a_stage_does_its_work_beside_a_planted_pickle(record: Predictions, mark: Path) -> None:
    done: list[str] = []

    @stage("count", version=1)
    def count(number: int) -> Predictions:
        done.append(own_key())
        return record

    @flow
    def counting() -> Predictions:
        return count(2)

    with results_in_store():
        assert counting() == record
        pickled = traps(mark)["pickle"]
        ArtifactStore().write_object(f"results/{done[0]}", pickled)
        assert counting() == record
        assert counting() == record
        assert done == [done[0], f"{done[0]}-1"]
        assert not mark.exists()
        assert ArtifactStore().read_object(f"results/{done[0]}") == pickled, "left as evidence"
