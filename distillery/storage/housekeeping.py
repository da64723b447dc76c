"""What is in the artifact store, who names it, and what nobody needs any more: `distillery store list | show | gc`.

Each finished run of the flow distill leaves its Outcome as records/runs/RUN.json. A run is kept while it is among the
newest of its recipe, young, or the source of a model version that is still in the registry. What no kept run and no
registered model names is waste once it has not been used for the stated age. Writing an artifact that is already there,
and looking at one, make it new again (store.py), and what is made new in the meantime is not removed; so collecting is
safe beside runs that take less than that age.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Set
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

from distillery.errors import ArtifactDamaged, StoreError
from distillery.recipe import RegistryRecipe
from distillery.settings import LocalSettings
from distillery.storage.artifacts import RECORDS, RESULTS, RUNS, WORK, ArtifactStore
from distillery.storage.files import ASIDE, StoredFile
from distillery.storage.manifest import MANIFEST

RUN_RECORDS = f"{RECORDS}/{RUNS}/"

_DIGEST = re.compile(r"[0-9a-f]{64}")

Kind = Literal["artifact", "half-written", "checkpoint", "result", "record", "run"]

Version = tuple[str, str, str]
"""Registry, name and version of a registered model."""


class Run(NamedTuple):
    """A finished run. `names`: digest of each artifact that its Outcome names, and the stage that made it."""

    name: str
    recipe: str
    finished: datetime
    names: dict[str, str]
    registered: Version | None
    file: StoredFile


class StoredArtifact(NamedTuple):
    """`used`: when it was last written or looked at. `named_by`: 'STAGE of RUN', the newest run first."""

    digest: str
    bytes: int
    used: datetime
    named_by: tuple[str, ...]
    files: tuple[StoredFile, ...]


class Waste(NamedTuple):
    """Something that can go. `used` is the time of its newest file, or of its manifest."""

    kind: Kind
    name: str
    bytes: int
    used: datetime
    files: tuple[StoredFile, ...]


class Inventory:
    """What a store held when it was listed. Raises StoreError for a run's record that can't be read."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self.files = store.storage.find()
        self._folders: dict[str, list[StoredFile]] = defaultdict(list)
        for file in self.files:
            self._folders[file.name.partition("/")[0]].append(file)
        self.runs = sorted(
            (
                self._run(file)
                for file in self.files
                if file.name.startswith(RUN_RECORDS) and ASIDE not in file.name
            ),
            key=lambda run: run.finished,
            reverse=True,
        )

    def artifacts(self) -> list[StoredArtifact]:
        """All whole artifacts, the last used first."""
        found = []
        for digest, files in self._digests():
            if manifest := _manifest(files):
                size = sum(file.bytes for file in files if file is not manifest)
                named_by = tuple(
                    f"{run.names[digest]} of {run.name}" for run in self.runs if digest in run.names
                )
                found.append(
                    StoredArtifact(digest, size, manifest.modified, named_by, tuple(files))
                )
        return sorted(found, key=lambda artifact: artifact.used, reverse=True)

    def waste(
        self, older_than: timedelta, keep_runs: int, now: datetime | None = None
    ) -> list[Waste]:
        """What can go: see the module. Asks the registries; raises what they raise where they do not answer."""
        limit = (now or datetime.now(UTC)) - older_than
        versions, needed = _registered(
            self._store, {run.registered[:2] for run in self.runs if run.registered}
        )
        kept = self._kept(limit, keep_runs, versions)
        for run in kept:
            needed |= run.names.keys()
        artifacts = {artifact.digest: artifact for artifact in self.artifacts()}
        unused = [a for a in artifacts.values() if a.used < limit and a.digest not in needed]
        there = artifacts.keys() - {artifact.digest for artifact in unused}
        old = [file for file in self.files if file.modified < limit and ASIDE not in file.name]
        hand_offs = [
            file
            for file in old
            if file.name.startswith(f"{RECORDS}/") and not file.name.startswith(RUN_RECORDS)
        ]
        return [
            *(Waste("artifact", a.digest, a.bytes, a.used, a.files) for a in unused),
            *(waste for waste in self._leftovers() if waste.used < limit),
            *(_file("result", file) for file in old if self._is_dead_result(file, there)),
            *(_file("record", file) for file in hand_offs),
            *(_file("run", run.file) for run in self.runs if run not in kept),
        ]

    def remove(self, waste: Waste) -> bool:
        """Removes it unless it has been used since it was listed; returns whether it is gone."""
        storage = self._store.storage
        if waste.name == waste.files[0].name:
            return storage.remove(waste.files[0])
        return storage.remove_folder(waste.name, waste.files)

    def _digests(self) -> Iterator[tuple[str, list[StoredFile]]]:
        return ((name, files) for name, files in self._folders.items() if _DIGEST.fullmatch(name))

    def _leftovers(self) -> Iterator[Waste]:
        """What was never finished, was damaged, or is the state of work that nobody went on with."""
        for name, files in self._folders.items():
            if (
                name.startswith(ASIDE)
                or ".damaged-" in name
                or (_DIGEST.fullmatch(name) and not _manifest(files))
            ):
                yield _folder("half-written", name, files)
        for file in self.files:
            if ASIDE in file.name and not file.name.startswith((ASIDE, WORK)):
                yield _file("half-written", file)
        works: dict[str, list[StoredFile]] = defaultdict(list)
        for file in self._folders.get(WORK, []):
            works["/".join(file.name.split("/")[:2])].append(file)
        yield from (_folder("checkpoint", name, files) for name, files in works.items())

    def _kept(self, limit: datetime, keep_runs: int, versions: set[Version]) -> list[Run]:
        kept: list[Run] = []
        seen: Counter[str] = Counter()
        for run in self.runs:
            seen[run.recipe] += 1
            if seen[run.recipe] <= keep_runs or run.finished >= limit or run.registered in versions:
                kept.append(run)
        return kept

    def _is_dead_result(self, file: StoredFile, there: Set[str]) -> bool:
        """Whether it is a stage's cached record that points to an artifact which is gone, and so is no hit any more."""
        if not file.name.startswith(f"{RESULTS}/"):
            return False
        try:
            result = json.loads(self._store.read_object(file.name))["result"]
            named = dict(_artifacts(json.loads(result) if isinstance(result, str) else result))
        except (ArtifactDamaged, ValueError, KeyError, TypeError):
            return False
        return bool(named.keys() - there)

    def _run(self, file: StoredFile) -> Run:
        try:
            outcome = json.loads(self._store.read_object(file.name))
            model = outcome["registered"]
            version = (model["registry"], model["name"], model["version"]) if model else None
            names: dict[str, str] = {}
            for digest, stage in _artifacts(outcome):
                names.setdefault(digest, stage)
            name = file.name.removeprefix(RUN_RECORDS).removesuffix(".json")
            return Run(name, outcome["recipe"], file.modified, names, version, file)
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self._store.url}/{file.name}: no record of a run ({type(error).__name__}); remove the file"
            ) from error


def _registered(
    store: ArtifactStore, models: set[tuple[str, str]]
) -> tuple[set[Version], set[str]]:
    """All versions of the models in the registries, and the artifacts that their provenance names."""
    from distillery.registry.open import open_registry

    if (
        not store.storage.is_local
        and not LocalSettings().registry
        and any(kind == "local" for kind, _ in models)
    ):
        raise StoreError(
            "DISTILLERY_REGISTRY: not set, so that this machine's own registry would be asked which models of a shared "
            "store are registered; set it to the registry of the runs"
        )
    versions: set[Version] = set()
    named: set[str] = set()
    for kind, name in sorted(models):
        registry = open_registry(RegistryRecipe.model_validate({"kind": kind, "model_name": name}))
        for model in registry.list(name):
            versions.add((kind, name, model.version))
            # Other machines take a registered folder from the store.
            named.add(model.artifact.sha256)
            named |= dict(_artifacts(registry.provenance(model)["provenance"])).keys()
    return versions, named


def _artifacts(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(digest, place) of each artifact of the store in a record's JSON; registered folders lie elsewhere."""
    if isinstance(value, dict):
        if {"uri", "sha256", "bytes"} <= value.keys() and value["uri"].endswith(
            f"/{value['sha256']}"
        ):
            yield value["sha256"], where.removesuffix(".artifact")
        for key, item in value.items():
            yield from _artifacts(item, f"{where}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for item in value:
            yield from _artifacts(item, where)


def _manifest(files: list[StoredFile]) -> StoredFile | None:
    return next(
        (
            file
            for file in files
            if file.name.endswith(f"/{MANIFEST}") and file.name.count("/") == 1
        ),
        None,
    )


def _folder(kind: Kind, name: str, files: list[StoredFile]) -> Waste:
    size, newest = sum(file.bytes for file in files), max(file.modified for file in files)
    return Waste(kind, name, size, newest, tuple(files))


def _file(kind: Kind, file: StoredFile) -> Waste:
    return Waste(kind, file.name, file.bytes, file.modified, (file,))
