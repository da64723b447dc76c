"""What the artifact store holds, what names it, and what nothing needs any more: `distillery
store list | show | gc`.

Each finished run of the flow distill leaves its Outcome as records/runs/RUN.json. A run is kept
while it is among the newest of its recipe, younger than the stated age, or the source of a model
version that is still in a registry. What no kept run and no registered model names is waste once
it has not been used for the stated age.

It is safe to collect beside runs that take less than that age: writing an artifact that is already
there, and looking at one, make it new again (see artifacts.py), and what was made new since the
listing is not removed.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

from distillery.errors import ArtifactDamaged, StoreError
from distillery.recipe import RegistryKind
from distillery.storage.artifacts import RECORDS, RESULTS, RUNS, WORK, ArtifactStore
from distillery.storage.files import UNFINISHED, StoredFile
from distillery.storage.manifest import MANIFEST

RUN_RECORDS = f"{RECORDS}/{RUNS}/"

DIGEST = re.compile(r"[0-9a-f]{64}")

Kind = Literal["artifact", "half-written", "checkpoint", "result", "record", "run"]


class ModelVersion(NamedTuple):
    registry: RegistryKind
    name: str
    version: str


class Registered(NamedTuple):
    """What the registries hold: model versions, and the digests of all artifacts that these or
    their provenance name."""

    versions: frozenset[ModelVersion]
    artifacts: frozenset[str]


UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading JSON raises that is no record."""


class Run(NamedTuple):
    """A finished run. `stages`: by an artifact's digest, the stage of this run that made it."""

    name: str
    recipe: str
    finished: datetime
    stages: dict[str, str]
    registered: ModelVersion | None
    file: StoredFile


class StoredArtifact(NamedTuple):
    """`used`: when it was last written or looked at. `named_by`: "STAGE of RUN", newest first."""

    digest: str
    bytes: int
    used: datetime
    named_by: tuple[str, ...]
    files: tuple[StoredFile, ...]


class Waste(NamedTuple):
    """Something that can be removed. `used`: the time of its newest file, or of its manifest."""

    kind: Kind
    name: str
    bytes: int
    used: datetime
    files: tuple[StoredFile, ...]


class Inventory:
    """What a store held when it was listed. Raises StoreError for a run's record that can't be
    read: without it, nobody knows what that run needs."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self.files = store.storage.find()
        self.runs: list[Run] = []
        self._folders: dict[str, list[StoredFile]] = defaultdict(list)
        for file in self.files:
            self._folders[file.name.partition("/")[0]].append(file)
            if file.name.startswith(RUN_RECORDS) and UNFINISHED not in file.name:
                self.runs.append(read_run(store, file))
        self.runs.sort(key=lambda run: run.finished, reverse=True)

    def artifacts(self) -> list[StoredArtifact]:
        """Return all whole artifacts, the last used first."""
        found = []
        for digest, files in self._folders.items():
            manifest = find_manifest(digest, files)
            if manifest is None or not DIGEST.fullmatch(digest):
                continue
            size = sum(file.bytes for file in files) - manifest.bytes
            named_by = []
            for run in self.runs:
                if digest in run.stages:
                    named_by.append(f"{run.stages[digest]} of {run.name}")
            found.append(
                StoredArtifact(digest, size, manifest.modified, tuple(named_by), tuple(files))
            )
        return sorted(found, key=lambda artifact: artifact.used, reverse=True)

    def registered_models(self) -> set[tuple[RegistryKind, str]]:
        """Return registry and name of each model that a run registered a version of."""
        return {run.registered[:2] for run in self.runs if run.registered}

    def waste(
        self,
        registered: Registered,
        older_than: timedelta,
        keep_runs: int,
        now: datetime | None = None,
    ) -> list[Waste]:
        """Return what can be removed, as the module says. `registered`: what the registries hold;
        `keep_runs`: how many of each recipe's newest runs are kept."""
        limit = (now or datetime.now(UTC)) - older_than
        kept = self._kept_runs(registered.versions, limit, keep_runs)
        needed = set(registered.artifacts)
        for run in kept:
            needed.update(run.stages)
        waste: list[Waste] = []
        remaining = set()
        for artifact in self.artifacts():
            digest, size, used, _, files = artifact
            if used < limit and digest not in needed:
                waste.append(Waste("artifact", digest, size, used, files))
            else:
                remaining.add(digest)
        waste += [leftover for leftover in self._leftovers() if leftover.used < limit]
        for file in self.files:
            if file.modified >= limit or UNFINISHED in file.name:
                continue
            if file.name.startswith(f"{RESULTS}/"):
                if not self._named_by_result(file) <= remaining:
                    waste.append(file_waste("result", file))
            elif file.name.startswith(f"{RECORDS}/") and not file.name.startswith(RUN_RECORDS):
                waste.append(file_waste("record", file))
        waste += [file_waste("run", run.file) for run in self.runs if run not in kept]
        return waste

    def remove(self, waste: Waste) -> bool:
        """Remove it unless it has been used since the listing; return whether it is gone."""
        storage = self._store.storage
        if waste.name == waste.files[0].name:
            return storage.remove(waste.files[0])
        return storage.remove_folder(waste.name, waste.files)

    def _leftovers(self) -> Iterator[Waste]:
        """Yield what was never finished, what was damaged, and the state of abandoned work."""
        for name, files in self._folders.items():
            unfinished = DIGEST.fullmatch(name) and find_manifest(name, files) is None
            if unfinished or name.startswith(UNFINISHED) or ".damaged-" in name:
                yield folder_waste("half-written", name, files)
        for file in self.files:
            if UNFINISHED in file.name and not file.name.startswith((UNFINISHED, WORK)):
                yield file_waste("half-written", file)
        checkpoints: dict[str, list[StoredFile]] = defaultdict(list)
        for file in self._folders.get(WORK, []):
            checkpoints["/".join(file.name.split("/")[:2])].append(file)
        for name, files in checkpoints.items():
            yield folder_waste("checkpoint", name, files)

    def _kept_runs(
        self, versions: frozenset[ModelVersion], limit: datetime, keep_runs: int
    ) -> list[Run]:
        kept: list[Run] = []
        seen: Counter[str] = Counter()
        for run in self.runs:
            seen[run.recipe] += 1
            if seen[run.recipe] <= keep_runs or run.finished >= limit or run.registered in versions:
                kept.append(run)
        return kept

    def _named_by_result(self, file: StoredFile) -> set[str]:
        """Return the digests that a stage's cached record names: once one of them is gone, the
        record is no hit any more. Empty where the file is no such record."""
        try:
            result = json.loads(self._store.read_object(file.name))["result"]
            if isinstance(result, str):
                result = json.loads(result)
            return set(dict(artifact_references(result)))
        except (ArtifactDamaged, *UNREADABLE):
            return set()


def read_run(store: ArtifactStore, file: StoredFile) -> Run:
    """Read records/runs/RUN.json. Raises StoreError where it holds no Outcome."""
    try:
        outcome = json.loads(store.read_object(file.name))
        model = outcome["registered"]
        version = None
        if model:
            version = ModelVersion(model["registry"], model["name"], model["version"])
        # Both are looked up later; a list or mapping in them raises TypeError here.
        hash((version, outcome["recipe"]))
        stages: dict[str, str] = {}
        for digest, stage in artifact_references(outcome):
            stages.setdefault(digest, stage)
        name = file.name.removeprefix(RUN_RECORDS).removesuffix(".json")
        return Run(name, outcome["recipe"], file.modified, stages, version, file)
    except UNREADABLE as error:
        raise StoreError(
            f"{store.url}/{file.name}: not the record of a run ({type(error).__name__}); "
            "remove the file"
        ) from error


def artifact_references(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the digest of each of the store's artifacts that a record's JSON names, and the dotted
    path to it. Registered folders are not in the store: their URIs do not end in the digest."""
    if isinstance(value, dict):
        if {"uri", "sha256", "bytes"} <= value.keys():
            uri, digest = str(value["uri"]), str(value["sha256"])
            if DIGEST.fullmatch(digest) and uri.endswith(f"/{digest}"):
                yield digest, path.removesuffix(".artifact")
        for key, item in value.items():
            yield from artifact_references(item, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for item in value:
            yield from artifact_references(item, path)


def find_manifest(folder: str, files: list[StoredFile]) -> StoredFile | None:
    """Return the file artifact.json of `folder` among `files`, if it is there."""
    for file in files:
        if file.name == f"{folder}/{MANIFEST}":
            return file
    return None


def folder_waste(kind: Kind, name: str, files: list[StoredFile]) -> Waste:
    size = sum(file.bytes for file in files)
    return Waste(kind, name, size, max(file.modified for file in files), tuple(files))


def file_waste(kind: Kind, file: StoredFile) -> Waste:
    return Waste(kind, file.name, file.bytes, file.modified, (file,))
