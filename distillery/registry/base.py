"""What all registries share: register, list, find, download and verify models.

A model is registered as its folder with a manifest.json inside (see manifest.py). The sha256 of
the manifest is a tag of the version, so a folder that was altered after its registration is
refused when it is downloaded.
"""

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
    altered_error,
    copy_with_manifest,
    disk_errors,
    manifest_tags,
    verify_files,
)
from distillery.storage.digests import sha256_of
from distillery.storage.working import working_folder

CHAMPION = "champion"

CANDIDATE = "candidate"

Models = list[RegisteredModel]
"""Such a name is needed because `Registry.list` hides the builtin within the class."""


class Registry(ABC):
    """A registry of models. `location` names it in messages.

    Every method raises RegistryError if what is asked can't be done, RegistryUnavailable if the
    registry does not answer (worth a retry), and CredentialsError if it refuses the login.
    """

    kind: RegistryKind
    location: str

    def register(
        self, folder: Path, name: str, tags: Mapping[str, str], provenance: Mapping[str, Any]
    ) -> RegisteredModel:
        """Add the folder's content as the next version of `name`, as a candidate.

        If a version has the same content and provenance, it is returned instead, and its stored
        copy is written again if it was damaged. A manifest that an earlier download left in the
        folder is replaced. `tags` are for people; the tag `produced_by` becomes the record's.
        """
        with disk_errors(self.location), working_folder("register") as scratch:
            content = scratch / f"model-{uuid.uuid4().hex[:8]}"
            manifest = copy_with_manifest(folder, content, name, provenance)
            digest = sha256_of(content / MANIFEST)
            existing = None
            for model in self.versions(name):
                if model.manifest_sha256 == digest:
                    existing = model
                    break
            if existing and self.is_whole(existing):
                return existing
            uri = self.store_folder(content, name, digest)
        if existing:
            return existing
        return self.add_version(name, uri, {**tags, **manifest_tags(manifest, digest)})

    def list(self, name: str | None = None) -> Models:
        """Return the versions of one model, or of all models that Distillery registered.

        They are sorted by name; the newest version of a name comes first.
        """
        names = self.names() if name is None else [name]
        models: Models = []
        for each in sorted(names):
            models += self.versions(each)
        return models

    def get(self, name: str, version: str | None = None) -> RegisteredModel:
        """Return a version of a model; without `version` the champion, else the newest."""
        models = self.versions(name)
        if not models:
            held = ", ".join(sorted(self.names())) or "none"
            raise RegistryError(f"{name}: no such model in {self.location}; it holds: {held}")
        for model in models:
            if model.version == version or (version is None and model.role == CHAMPION):
                return model
        if version is None:
            return models[0]
        held = ", ".join(model.version for model in models)
        raise RegistryError(f"{name}: no version {version} in {self.location}; it holds: {held}")

    def provenance(self, model: RegisteredModel) -> dict[str, Any]:
        """Return the manifest: keys model, provenance and files. Reads and verifies only this
        file."""
        raw = self.read_manifest(model)
        if hashlib.sha256(raw).hexdigest() != model.manifest_sha256:
            raise altered_error(model, MANIFEST)
        content: dict[str, Any] = json.loads(raw)
        return content

    def download(self, model: RegisteredModel, target: Path) -> Path:
        """Copy the registered folder to `target`, which appears only when every file is verified.

        A target that already is this model is left as it is.
        """
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            refuse_other_content(target, model)
            return target
        with disk_errors(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=".downloading-", dir=target.parent))
            try:
                self.fetch_files(model, beside)
                verify_files(beside, model)
                os.rename(beside, target)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        return target

    def is_whole(self, model: RegisteredModel) -> bool:
        """Return whether the registered folder is complete and unaltered. Reads all of it."""
        with working_folder("verify") as scratch:
            try:
                self.download(model, scratch / "model")
            except RegistryUnavailable:
                raise
            except RegistryError:
                return False
        return True

    @abstractmethod
    def promote(self, model: RegisteredModel) -> RegisteredModel:
        """Make this version the only champion of its name; the one before is a candidate again."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Return the names of the registered models."""

    @abstractmethod
    def versions(self, name: str) -> Models:
        """Return the versions of a model, the newest first; [] for an unknown name.

        Versions without the manifest's tags were registered by others and are left out.
        """

    @abstractmethod
    def store_folder(self, content: Path, name: str, digest: str) -> str:
        """Store a folder and return its URI. Replaces what is stored under the same digest."""

    @abstractmethod
    def add_version(self, name: str, uri: str, tags: dict[str, str]) -> RegisteredModel:
        """Add a version that points to a stored folder."""

    @abstractmethod
    def fetch_files(self, model: RegisteredModel, folder: Path) -> None:
        """Copy the stored files into `folder`, without verifying them."""

    @abstractmethod
    def read_manifest(self, model: RegisteredModel) -> bytes:
        """Return the stored manifest.json, without verifying it."""

    def record(
        self, name: str, version: str, is_champion: bool, uri: str, tags: Mapping[str, str]
    ) -> RegisteredModel:
        """Return the record of a version, from the tags that `register` gave it."""
        return RegisteredModel(
            artifact=Artifact(uri=uri, sha256=tags["files_sha256"], bytes=int(tags["bytes"])),
            produced_by=tags.get("produced_by", ""),
            name=name,
            version=version,
            registry=self.kind,
            role=CHAMPION if is_champion else CANDIDATE,
            manifest_sha256=tags["manifest_sha256"],
        )


def refuse_other_content(target: Path, model: RegisteredModel) -> None:
    """Raise RegistryError unless `target` is exactly the folder of `model`."""
    try:
        verify_files(target, model)
    except RegistryError as error:
        raise RegistryError(
            f"{target}: exists and is not {model.name} version {model.version}; "
            "move it away or name another folder"
        ) from error
