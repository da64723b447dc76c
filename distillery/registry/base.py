"""registry/base"""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distillery.errors import RegistryError, RegistryUnavailable
from distillery.recipe import RegistryKind
from distillery.records import Artifact, RegisteredModel
from distillery.registry.manifest import (
    MANIFEST,
    altered,
    copy_with_manifest,
    disk_errors,
    searchable_facts,
    verify_files,
)
from distillery.storage.digests import sha256_of
from distillery.storage.working import working_folder

CHAMPION = "champion"

CANDIDATE = "candidate"

Models = list[RegisteredModel]


class Registry(ABC):
    """Every method raises RegistryError where what is asked can't be done, RegistryUnavailable where nothing answers
    (worth a retry), and CredentialsError where the login is refused."""

    kind: RegistryKind
    place: str

    def register(
        self, folder: Path, name: str, tags: Mapping[str, str], provenance: Mapping[str, Any]
    ) -> RegisteredModel:
        """Adds the folder's content as the next version of `name`, as a candidate.

        The same content with the same provenance is the version that it already has; a stored copy that was damaged is
        then written anew. The manifest of an earlier download is replaced. `tags` are for people; the tag `produced_by`
        becomes the record's.
        """
        with disk_errors(self.place), working_folder("register") as scratch:
            content = scratch / f"model-{uuid.uuid4().hex[:8]}"
            manifest = copy_with_manifest(folder, content, name, provenance)
            digest = sha256_of(content / MANIFEST)
            existing = next(
                (model for model in self._versions(name) if model.manifest_sha256 == digest), None
            )
            if existing and self.is_whole(existing):
                return existing
            uri = self._put(content, name, digest)
        return existing or self._add(name, uri, {**tags, **searchable_facts(manifest, digest)})

    def list(self, name: str | None = None) -> Models:
        """All that was registered by Distillery, or the versions of one model; by name, the newest version first."""
        names = self._names() if name is None else [name]
        return [model for each in sorted(names) for model in self._versions(each)]

    def get(self, name: str, version: str | None = None) -> RegisteredModel:
        """A version of a model; without `version` the champion, or the newest where there is none."""
        models = self._versions(name)
        if not models:
            held = ", ".join(sorted(self._names())) or "none"
            raise RegistryError(f"{name}: no such model in {self.place}; it holds: {held}")
        if version is None:
            return next((model for model in models if model.role == CHAMPION), models[0])
        found = next((model for model in models if model.version == version), None)
        if found is None:
            held = ", ".join(model.version for model in models)
            raise RegistryError(f"{name}: no version {version} in {self.place}; it holds: {held}")
        return found

    def provenance(self, model: RegisteredModel) -> dict[str, Any]:
        """The manifest: keys model, provenance, files. Reads that file alone, and verifies it."""
        raw = self._read_manifest(model)
        if hashlib.sha256(raw).hexdigest() != model.manifest_sha256:
            raise altered(model, MANIFEST)
        content: dict[str, Any] = json.loads(raw)
        return content

    def download(self, model: RegisteredModel, target: Path) -> Path:
        """The registered folder as `target`, each file verified before `target` exists.

        A target that already is this model is left as it is.
        """
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            return self._already_there(model, target)
        with disk_errors(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=".downloading-", dir=target.parent))
            try:
                self._fetch(model, beside)
                verify_files(beside, model)
                os.rename(beside, target)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        return target

    @abstractmethod
    def promote(self, model: RegisteredModel) -> RegisteredModel:
        """Makes this version the one champion of its name; the one before it is a candidate again."""

    @abstractmethod
    def _names(self) -> tuple[str, ...]: ...

    @abstractmethod
    def _versions(self, name: str) -> Models:
        """The newest first; none for an unknown name. Versions without our tags are somebody else's and left out."""

    @abstractmethod
    def _put(self, content: Path, name: str, digest: str) -> str:
        """Stores the folder, in place of what may be there under the same digest; gives its URI."""

    @abstractmethod
    def _add(self, name: str, uri: str, tags: dict[str, str]) -> RegisteredModel: ...

    @abstractmethod
    def _fetch(self, model: RegisteredModel, folder: Path) -> None: ...

    @abstractmethod
    def _read_manifest(self, model: RegisteredModel) -> bytes: ...

    def is_whole(self, model: RegisteredModel) -> bool:
        """Whether the registered folder is there, unaltered: reads all of it."""
        with working_folder("verify") as scratch:
            try:
                self.download(model, scratch / "model")
            except RegistryUnavailable:
                raise
            except RegistryError:
                return False
        return True

    def _already_there(self, model: RegisteredModel, target: Path) -> Path:
        try:
            verify_files(target, model)
        except RegistryError as error:
            raise RegistryError(
                f"{target}: exists and is not {model.name} version {model.version}; move it away or name another folder"
            ) from error
        return target

    def _record(
        self, name: str, version: str, role: str, uri: str, tags: Mapping[str, str]
    ) -> RegisteredModel:
        return RegisteredModel(
            artifact=Artifact(uri=uri, sha256=tags["files_sha256"], bytes=int(tags["bytes"])),
            produced_by=tags.get("produced_by", ""),
            name=name,
            version=version,
            registry=self.kind,
            role=role,
            manifest_sha256=tags["manifest_sha256"],
        )
