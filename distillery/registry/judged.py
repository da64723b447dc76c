"""What the registered versions of a model have to do with a run's test rows: which of them these
have judged, and whether they have trained the champion.

Both are told from the versions' manifests, whose provenance has the record of the data. Versions
without it, which were registered otherwise, count as not judged.
"""

from typing import Any

from distillery.data.examples import read_examples
from distillery.data.rows import content_of_row
from distillery.errors import ArtifactDamaged, ModelGone
from distillery.records import Artifact, JudgedVersions, PreparedDataset, RegisteredModel
from distillery.registry.base import Registry, champion_of
from distillery.storage.artifacts import ArtifactStore


def find_judged(registry: Registry, name: str, data: PreparedDataset) -> JudgedVersions:
    """Return the versions of `name` that the test rows of `data` have judged, the newest first.

    These are the versions whose test split has the same digest. The manifest of each version is
    read, and nothing else. Raises RegistryError where a manifest is altered."""
    versions = []
    for model in registry.list(name):
        test = recorded_data(registry, model).get("splits", {}).get("test", {})
        if test.get("sha256") == data.splits["test"].sha256:
            versions.append(model.version)
    return JudgedVersions(name=name, rows=data.splits["test"].rows, versions=tuple(versions))


def trained_by_test_rows(
    registry: Registry, name: str, data: PreparedDataset, store: ArtifactStore
) -> tuple[str, list[str]]:
    """Return the champion's version, and the ids of those test rows of `data` that stand in the
    champion's train or gold rows, by their content.

    Without a champion, or where its rows are not in `store`, the version is "" or no row is found.
    """
    champion = champion_of(registry.list(name))
    if champion is None:
        return "", []
    theirs = recorded_data(registry, champion)
    splits = theirs.get("splits", {})
    if splits.get("test", {}).get("sha256") == data.splits["test"].sha256:
        # One data set's test rows are never among its train rows.
        return champion.version, []
    learnt = set()
    try:
        for role in ("gold", "train"):
            if role in splits:
                folder = store.fetch(Artifact.model_validate(theirs["artifact"]))
                for example in read_examples(folder / splits[role]["file"]):
                    learnt.add(content_of_row(example))
    except ArtifactDamaged:
        return champion.version, []
    found = []
    own = data.rows("test")
    for example in read_examples(store.fetch(own.artifact) / own.file):
        if content_of_row(example) in learnt:
            found.append(example.example_id)
    return champion.version, found


def recorded_data(registry: Registry, model: RegisteredModel) -> dict[str, Any]:
    """Return the record of the data that a version was made from; empty where there is none."""
    try:
        data: Any = registry.provenance(model)["provenance"].get("data")
    except ModelGone:
        return {}
    return data if isinstance(data, dict) else {}
