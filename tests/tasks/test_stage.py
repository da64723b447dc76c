"""Which cached records count as hits, and what a stage does when its cache key can't be
computed."""

import json
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.results import ResultRecord, ResultRecordMetadata  # type: ignore[attr-defined]
from prefect.serializers import JSONSerializer

from distillery.errors import StageError
from distillery.recipe import ExportForm, OtherRecipe, TaskRecipe, TrainingRecipe
from distillery.records import Ladder, OnnxModel, Predictions, PreparedDataset, Rung, digest_of
from distillery.storage.artifacts import ArtifactStore
from tasks import stage as stages
from tasks.onnx import is_final
from tasks.results import results_in_store
from tasks.stage import content_of, is_hit, own_key, stage


def kept(record: Any) -> bytes:
    """The file in which Prefect keeps a result."""
    metadata = ResultRecordMetadata(storage_key="k", serializer=JSONSerializer())
    return ResultRecord(result=record, metadata=metadata).serialize()


@pytest.fixture
def record(tmp_path: Path) -> Predictions:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "predictions.jsonl").write_text("{}\n")
    return Predictions(artifact=ArtifactStore().put(tmp_path / "artifact"), rows=1, failed=0)


def test_a_record_of_the_stages_own_class_is_a_hit(record: Predictions) -> None:
    assert is_hit(kept(record), Predictions)


def test_a_record_of_another_stage_is_a_miss(record: Predictions) -> None:
    assert not is_hit(kept(record), PreparedDataset)


@pytest.mark.parametrize(
    "name", ["distillery.gone.Predictions", "distillery.records.Gone", "nowhere.Predictions"]
)
def test_a_record_whose_class_is_gone_is_a_miss(record: Predictions, name: str) -> None:
    file = kept(record).replace(b"distillery.records.Predictions", name.encode())
    assert isinstance(ResultRecord.deserialize(file).result, dict), (
        "Prefect hands back a plain dict"
    )
    assert not is_hit(file, Predictions)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file[: len(file) // 2],
        lambda file: b"",
        lambda file: b"[]",
        lambda file: b'{"metadata": 1}',
        lambda file: file.replace(b"sha256", b"sha255"),
        lambda file: json.dumps(json.loads(file) | {"result": 5}).encode(),
    ],
)
def test_what_can_not_be_decoded_is_a_miss(record: Predictions, spoil: Any) -> None:
    assert not is_hit(spoil(kept(record)), Predictions)


def test_a_record_that_is_not_to_be_used_again_is_a_miss(record: Predictions) -> None:
    assert not is_hit(kept(record), Predictions, lambda record: record.rows > 1)
    assert is_hit(kept(record), Predictions, lambda record: record.rows == 1)


@pytest.mark.parametrize("short", [True, False])
def test_a_ladder_is_used_again_unless_a_rung_ran_out_of_resources(
    record: Predictions, short: bool
) -> None:
    rungs = (Rung(form=ExportForm(), note="left out: why", out_of_resources=short),)
    ladder = Ladder(rows=1, accuracy=1, largest_loss=0, rungs=rungs)
    model = OnnxModel(
        artifact=record.artifact, precision="int4", algorithm="rtn", parameters=1, ladder=ladder
    )
    assert is_hit(kept(model), OnnxModel, is_final) is not short


def test_a_ladder_of_earlier_versions_is_read(record: Predictions) -> None:
    rung = Rung(form=ExportForm()).model_dump(exclude={"out_of_resources"})
    assert not Rung.model_validate(rung).out_of_resources


def test_a_record_whose_artifact_is_gone_is_a_miss(record: Predictions) -> None:
    store = ArtifactStore()
    (Path(store.storage.root) / record.artifact.sha256 / "artifact.json").unlink()
    assert not is_hit(kept(record), Predictions)


def test_a_setting_that_was_added_later_changes_no_key_at_its_default() -> None:
    """What earlier versions cached must be found again."""
    before = content_of(TrainingRecipe())
    assert "first_layer" not in before
    assert before == content_of(TrainingRecipe(first_layer=0))
    assert content_of(TrainingRecipe(first_layer=3)) == before | {"first_layer": 3}
    later = {
        "first_layer",
        "minimum_steps",
        "class_weights",
        "second_opinion",
        "gradient_checkpointing",
    }
    assert before.keys() | later | {"allow_cpu"} == TrainingRecipe.model_fields.keys()
    assert content_of(TrainingRecipe(allow_cpu=True)) == before, "where it runs changes nothing"
    assert "all_logits" not in content_of(ExportForm())
    assert content_of(ExportForm(all_logits=True))["all_logits"]
    assert "other" not in content_of(TaskRecipe())
    found = []
    for path in ("here/texts.csv", "there/texts.csv"):
        found.append(content_of(TaskRecipe(kind="classify", other=OtherRecipe(files=(path,)))))
    assert found[0] == found[1], "the files' content is part of the source's identity"
    assert found[0]["other"] == "other"


def test_the_order_of_a_schemas_fields_counts() -> None:
    """An answer is written in that order."""
    fields = {"b": {"type": "string"}, "a": {"type": "string"}}
    keys = set()
    for properties in (fields, dict(reversed(fields.items()))):
        task = TaskRecipe(kind="extract", schema={"type": "object", "properties": properties})
        keys.add(digest_of(content_of(task)))
    assert len(keys) == 2
    assert "answer_schema" not in content_of(TaskRecipe(kind="generate"))


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_a_stage_finds_its_record_again_and_passes_over_one_that_is_none(
    record: Predictions,
) -> None:
    done: list[str] = []

    @stage("count", version=1)
    def count(number: int) -> Predictions:
        done.append(own_key())
        return record

    @flow
    def counting() -> Predictions:
        return count(1)

    with results_in_store():
        assert counting() == record
        assert counting() == record
        assert len(done) == 1
        results = Path(ArtifactStore().storage.root) / "results"
        file = results / done[0]
        file.write_bytes(
            file.read_bytes().replace(
                b"distillery.records.Predictions", b"distillery.gone.Predictions"
            )
        )
        assert counting() == record
        assert counting() == record
    assert done == [done[0], f"{done[0]}-1"]


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_an_error_while_the_key_is_computed_ends_the_stage_in_one_line(
    record: Predictions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worked: list[int] = []

    @stage("fail", version=1)
    def fail(number: int) -> Predictions:
        worked.append(number)
        return record

    @flow
    def failing() -> Predictions:
        return fail(1)

    def broken(value: Any) -> Any:
        raise TypeError("no content\nof this")

    monkeypatch.setattr(stages, "content_of", broken)
    with results_in_store(), pytest.raises(StageError) as raised:
        failing()
    line = str(raised.value)
    assert (
        line == "stage fail: its cache key can't be computed (TypeError: no content of this); "
        "please report this"
    )
    assert worked == []
    assert fail.fn(1) is record, "the error is of the run whose key it was"
    assert "Error encountered when computing cache key" not in caplog.text
