"""Which registered versions a run's test rows have judged, and whether they have trained the
champion: with a real registry and real prepared rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from distillery.data.prepare import prepare
from distillery.errors import DataError
from distillery.recipe import DatasetRecipe, Recipe
from distillery.records import JudgedVersions, Outcome, PreparedDataset, RegisteredModel
from distillery.registry.history import Actor
from distillery.registry.judged import find_judged, trained_by_test_rows
from distillery.registry.local import LocalRegistry
from distillery.storage.artifacts import ArtifactStore
from tasks.judged import judged_before

pytestmark = pytest.mark.usefixtures("one_registry")

OPTIONS = ["good", "bad"]
ACTOR = Actor("a run")


def prepared(tmp_path: Path, name: str, **settings: Any) -> PreparedDataset:
    rows = tmp_path / "rows.jsonl"
    lines = [
        json.dumps(
            {
                "id": f"r{n}",
                "question": f"text {n} of {n * 7}",
                "choices": OPTIONS,
                "answerKey": "A",
            }
        )
        for n in range(200)
    ]
    rows.write_text("\n".join(lines))
    recipe = DatasetRecipe.model_validate(
        {
            "source": "files",
            "files": {"train": [str(rows)]},
            "splits": {"train": "train"},
            "carve": {"test": 0.2},
            "near_duplicate": 1,
            **settings,
        }
    )
    counts = prepare(recipe, tmp_path / name)
    return PreparedDataset(artifact=ArtifactStore().put(tmp_path / name), **dict(counts))


def registered(tmp_path: Path, number: int, data: PreparedDataset | None) -> RegisteredModel:
    folder = tmp_path / f"model-{number}"
    folder.mkdir()
    (folder / "model.onnx").write_text(f"weights {number}")
    provenance = {"data": data.model_dump(mode="json")} if data else {}
    return LocalRegistry().register(folder, tmp_path.name, {}, provenance)


def test_versions_with_the_same_test_rows_are_counted(tmp_path: Path) -> None:
    data, other = prepared(tmp_path, "data"), prepared(tmp_path, "other", seed=1)
    assert find_judged(LocalRegistry(), tmp_path.name, data).versions == ()
    for number, made_from in enumerate([data, other, data, None]):
        registered(tmp_path, number, made_from)
    found = find_judged(LocalRegistry(), tmp_path.name, data)
    assert found == JudgedVersions(
        name=tmp_path.name, rows=data.splits["test"].rows, versions=("3", "1")
    )
    assert found.line() == (
        f"these {found.rows} test rows have judged 2 versions of {tmp_path.name}; "
        "dataset.rotation brings fresh ones"
    )


def test_test_rows_that_have_trained_the_champion_are_found(tmp_path: Path) -> None:
    registry, store, name = LocalRegistry(), ArtifactStore(), tmp_path.name
    before = prepared(tmp_path, "before")
    assert trained_by_test_rows(registry, name, before, store) == ("", [])
    champion = registered(tmp_path, 1, before)
    registry.promote(champion, None, ACTOR)
    assert trained_by_test_rows(registry, name, before, store) == (champion.version, [])
    # Rounds that were not held back when the champion was trained.
    later = prepared(tmp_path, "later", rotation={"rounds": 2, "round": 1})
    version, rows = trained_by_test_rows(registry, name, later, store)
    assert (version, len(rows)) == (champion.version, later.splits["test"].rows)
    # Rounds that were.
    held_back = prepared(tmp_path, "held back", rotation={"rounds": 2, "round": 0})
    earlier, champion = champion.version, registered(tmp_path, 2, held_back)
    registry.promote(champion, earlier, ACTOR)
    assert trained_by_test_rows(registry, name, later, store) == (champion.version, [])


def test_a_rotation_to_rows_that_have_trained_the_champion_is_refused(tmp_path: Path) -> None:
    champion = registered(tmp_path, 1, prepared(tmp_path, "before"))
    LocalRegistry().promote(champion, None, ACTOR)
    rotation = {"rounds": 2, "round": 1}
    later = prepared(tmp_path, "later", rotation=rotation)
    dataset = {"splits": {"train": "pool"}, "carve": {"test": 0.2}, "rotation": rotation}
    recipe = Recipe.model_validate({"dataset": dataset, "registry": {"model_name": tmp_path.name}})
    count = later.splits["test"].rows
    with pytest.raises(
        DataError,
        match=rf"^dataset: {count} of {count} test rows have trained {tmp_path.name} version "
        rf"{champion.version}, the champion, such as row r\d+, and can't judge its successor; ",
    ):
        judged_before.fn(later, recipe)


def test_the_record_of_a_run_of_earlier_versions_is_read() -> None:
    assert Outcome.model_fields["judged"].default is None
