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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from distillery.errors import CredentialsError, RegistryError, RegistryUnavailable
from distillery.models.onnx_folder import leave_code_out
from distillery.recipe import RegistryKind
from distillery.records import Artifact, Promotion, Record, RegisteredModel
from distillery.registry.history import Actor, Event, champions_in, new_event, pin_of
from distillery.registry.manifest import (
    MANIFEST,
    Manifest,
    altered_error,
    check_content,
    copy_with_manifest,
    disk_errors,
    manifest_tags,
    verify_files,
)
from distillery.registry.signing import (
    SIGNATURE,
    SIGNATURE_TAG,
    must_be_signed,
    sign,
    verify_signature,
)
from distillery.storage.digests import FileEntry, sha256_of
from distillery.storage.working import working_folder

CHAMPION = "champion"

CHALLENGER = "challenger"

ARCHIVED = "archived"

REJECTED = "rejected"


class OtherModel(Record):
    """A version that Distillery did not register. It has no manifest, so that its files, at `uri`,
    can't be verified, and runs neither compare with it nor promote it."""

    name: str
    version: str
    uri: str


Models = list[RegisteredModel]
Others = list[OtherModel]
Events = list[Event]
"""Such names are needed because `Registry.list` hides the builtin within the class."""

UNKNOWN = Actor("unknown")


class Registry(ABC):
    """A registry of models. `location` names it in messages.

    Every method raises RegistryError if what is asked can't be done, RegistryUnavailable if the
    registry does not answer (worth a retry), and CredentialsError if it refuses the login.
    """

    kind: RegistryKind
    location: str

    def register(
        self,
        folder: Path,
        name: str,
        tags: Mapping[str, str],
        provenance: Mapping[str, Any],
        *,
        actor: Actor = UNKNOWN,
        reason: str = "",
        rejected: bool = False,
        model_sha256: str = "",
        rows_sha256: str = "",
    ) -> RegisteredModel:
        """Add the folder's content as the next version of `name`: a challenger, or `rejected`.

        If a version is the same student, it is returned instead. That is one with the same
        `model_sha256` and `rows_sha256` whose stored copy is whole, or one with the same content
        and provenance, whose stored copy is written again if it was damaged. A rejected version
        stays rejected: if its student passes the gate later, that is a version of its own.

        A manifest that an earlier download left in the folder is replaced. `tags` are for people;
        the tag `produced_by` becomes the record's. `actor` and `reason` go into the history.
        """
        with disk_errors(self.location), working_folder("register") as scratch:
            same = []
            for model in self.versions(name):
                # What was refused and is registered as good is nothing to reject.
                if rejected or model.role != REJECTED:
                    same.append(model)
            for model in same:
                known = (model.model_sha256, model.rows_sha256)
                if model_sha256 and known == (model_sha256, rows_sha256) and self.is_whole(model):
                    return model
            content = scratch / f"model-{uuid.uuid4().hex[:8]}"
            manifest = copy_with_manifest(folder, content, name, provenance)
            digest = sha256_of(content / MANIFEST)
            existing = None
            for model in same:
                if model.manifest_sha256 == digest:
                    existing = model
                    break
            if existing and self.is_whole(existing):
                return existing
            uri = self.store_folder(content, name, digest)
        if existing:
            return existing
        own_tags = manifest_tags(manifest, digest)
        if model_sha256:
            own_tags |= {"model_sha256": model_sha256, "rows_sha256": rows_sha256}
        if rejected:
            own_tags["role"] = REJECTED
        history = self.history(name)
        added = self.add_version(name, uri, {**tags, **own_tags})
        action: Literal["rejected", "registered"] = "rejected" if rejected else "registered"
        self.add_event(added, new_event(history, action, added.version, actor, reason))
        return added

    def promote(
        self, model: RegisteredModel, judged_against: str | None, actor: Actor, reason: str = ""
    ) -> Promotion:
        """Make a version the champion, if the champion still is the version `judged_against` (None:
        none), and if a pin does not bar it.

        The docstring of each registry tells how far this holds where two runs promote at once.
        """
        with self.locked(model.name):
            versions = self.versions(model.name)
            version = self.find(versions, model.name, model.version)
            champion = champion_of(versions)
            if champion == version:
                return Promotion(
                    result="stands", champion=model.version, reason="it is the champion already"
                )
            if champion is not None:
                before, held = champion.version, f"version {champion.version}"
            else:
                before, held = None, "none"
            if before != judged_against:
                return Promotion(
                    result="outpaced",
                    champion=before,
                    reason=f"the champion is {held}, no longer "
                    f"{f'version {judged_against}' if judged_against else 'none'}",
                )
            refuse_rejected(version)
            history = self.history(model.name)
            pin = pin_of(history)
            if pin and pin.pinned_above and int(model.version) <= int(pin.pinned_above):
                return Promotion(
                    result="barred",
                    champion=before,
                    reason=f"{pin.by} has pinned version {pin.version}: runs promote only versions "
                    f"above {pin.pinned_above} until `distillery models unpin {model.name}`",
                )
            event = new_event(history, "promoted", model.version, actor, reason, before)
            self.set_champion(version, champion, event)
            now = champion_of(self.versions(model.name))
        if now is None or now.version != model.version:
            return Promotion(
                result="outpaced",
                champion=now.version if now else None,
                reason="another run promoted at the same time",
            )
        return Promotion(
            result="promoted",
            champion=model.version,
            reason=f"in place of {held}" if before else "the first champion",
        )

    def pin(
        self,
        name: str,
        version: str | None,
        actor: Actor,
        reason: str = "",
        action: Literal["promoted", "rolled back"] = "promoted",
    ) -> RegisteredModel:
        """Make a version the champion and pin it: runs promote only versions that are registered
        from now on. Without `version`: the champion before the present one."""
        with self.locked(name):
            versions = self.versions(name)
            champion = champion_of(versions)
            history = self.history(name)
            if version is None:
                earlier = champions_in(history)[:-1]
                if not earlier:
                    raise RegistryError(
                        f"{name}: the history names no champion before this one; name the version, "
                        f"as `distillery models list {name}` shows it"
                    )
                version = earlier[-1]
            model = self.find(versions, name, version)
            refuse_rejected(model)
            before = None
            if champion is not None and champion.version != version:
                before = champion.version
            elif champion is not None and action == "rolled back":
                raise RegistryError(
                    f"{name} version {version} is the champion already; "
                    f"`distillery models promote {name} {version}` pins it"
                )
            event = new_event(history, action, version, actor, reason, before, versions[0].version)
            self.set_champion(model, champion if before else None, event)
        return model.model_copy(update={"role": CHAMPION})

    def unpin(self, name: str, actor: Actor, reason: str = "") -> None:
        """Let runs promote any version again."""
        with self.locked(name):
            history = self.history(name)
            pin = pin_of(history)
            if pin is None:
                raise RegistryError(f"{name}: no champion is pinned in {self.location}")
            self.add_event(
                self.get(name), new_event(history, "unpinned", pin.version, actor, reason)
            )

    def list(self, name: str | None = None) -> Models:
        """Return the versions of one model, or of all models that Distillery registered.

        They are sorted by name; the newest version of a name comes first.
        """
        names = self.names() if name is None else [name]
        models: Models = []
        for each in sorted(names):
            models += self.versions(each)
        return models

    def check_access(self, name: str) -> int:
        """Return how many versions of `name` there are. Raises what a registration would raise for
        want of a login or of a role."""
        return len(self.list(name))

    def get(self, name: str, version: str | None = None) -> RegisteredModel:
        """Return a version of a model; without `version` the champion, else the newest that is not
        rejected."""
        models = self.versions(name)
        if not models and self.others(name):
            raise RegistryError(
                f"{name}: {self.location} has no version that Distillery registered; fetch one of "
                "others' with `distillery models download`"
            )
        if not models:
            held = ", ".join(sorted(self.names())) or "none"
            raise RegistryError(f"{name}: no such model in {self.location}; it holds: {held}")
        champion = champion_of(models)
        if version is None and champion is not None:
            return champion
        if version is not None:
            return self.find(models, name, version)
        for model in models:
            if model.role != REJECTED:
                return model
        raise RegistryError(
            f"{name}: {self.location} holds rejected versions alone; --version names one"
        )

    def find(self, models: Models, name: str, version: str) -> RegisteredModel:
        """Return the version among all of `name`. Raises RegistryError if it is not there."""
        for model in models:
            if model.version == version:
                return model
        held = ", ".join(model.version for model in models) or "none"
        raise RegistryError(f"{name}: no version {version} in {self.location}; it holds: {held}")

    def provenance(self, model: RegisteredModel) -> dict[str, Any]:
        """Return the manifest: keys model, provenance and files. Reads and verifies only this
        file."""
        content: dict[str, Any] = json.loads(self.verified_manifest(model))
        return content

    def verified_manifest(self, model: RegisteredModel) -> bytes:
        """Return manifest.json. Reads and verifies only this file."""
        raw = self.read_file(model, MANIFEST)
        if hashlib.sha256(raw).hexdigest() != model.manifest_sha256:
            raise altered_error(model, MANIFEST)
        return raw

    def sign(self, model: RegisteredModel) -> RegisteredModel:
        """Sign a version that is registered, in place of a signature that it has.

        Raises CredentialsError if DISTILLERY_SIGNING_KEY is not set.
        """
        signature = sign(self.verified_manifest(model))
        if not signature:
            raise CredentialsError(
                "DISTILLERY_SIGNING_KEY: not set; set it to a PEM file (see sample.env)"
            )
        self.set_tag(model, SIGNATURE_TAG, signature)
        return model.model_copy(update={"signature": signature})

    def read_verified(self, model: RegisteredModel, file: str) -> bytes | None:
        """Return one file of the registered folder, verified against the manifest; None if the
        manifest does not list it."""
        for entry in self.provenance(model)["files"]:
            if entry["path"] == file:
                content = self.read_file(model, file)
                if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                    raise altered_error(model, file)
                return content
        return None

    def download(self, model: RegisteredModel, target: Path) -> Path:
        """Copy the registered folder to `target`, which appears only when every file is verified.

        A target that already is this model is left as it is.
        """
        if has_content(target):
            refuse_other_content(target, model)
            # It may have been signed since it was downloaded.
            with disk_errors(str(target)):
                keep_signature(target, model)
            return target
        with appearing(target) as beside:
            self.fetch_files(model, beside)
            verify_files(beside, model)
            keep_signature(beside, model)
            check_content(beside, f"{model.name} version {model.version}")
        return target

    def others(self, name: str | None = None) -> Others:
        """Return the versions of one model, or of all, that Distillery did not register, the newest
        of a name first; [] for a registry that tells of none."""
        return []

    def get_any(self, name: str, version: str | None = None) -> RegisteredModel | OtherModel:
        """Return what `get` returns or, where that is nothing of Distillery's, a version of
        others: without `version`, the newest."""
        ours = self.versions(name)
        if not any(version in (None, model.version) for model in ours):
            for model in self.others(name):
                if version in (None, model.version):
                    return model
        return self.get(name, version)

    def download_other(self, model: OtherModel, target: Path) -> Path:
        """Copy the files of another's version to `target`, unverified: it has no manifest. Python
        code is left out.

        Refused where DISTILLERY_VERIFY_KEY asks for signed models, and where it holds anything but
        a model."""
        if must_be_signed():
            raise RegistryError(
                f"{model.name} version {model.version}: not registered by Distillery, so not "
                "signed, and DISTILLERY_VERIFY_KEY asks for it"
            )
        if has_content(target):
            raise RegistryError(f"{target}: exists; move it away or name another folder")
        with appearing(target) as beside:
            self.fetch_other_files(model, beside)
            leave_code_out(beside)
            check_content(beside, f"{model.name} version {model.version}")
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

    def holds(self, model: RegisteredModel) -> bool:
        """Return whether the registered folder is complete, without a download: every byte is
        checked on this machine, the manifest and the files' sizes elsewhere."""
        try:
            content = self.verified_manifest(model)
            verify_signature(content, model.signature, f"{model.name} version {model.version}")
            return self.holds_files(model, Manifest.model_validate_json(content).files)
        except RegistryUnavailable:
            raise
        except RegistryError:
            return False

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Keep others from changing the champion of `name` meanwhile, where the registry can."""
        yield

    @abstractmethod
    def set_champion(
        self, model: RegisteredModel, before: RegisteredModel | None, event: Event
    ) -> None:
        """Add the event, make `model` the only champion, and archive the one `before`."""

    @abstractmethod
    def add_event(self, model: RegisteredModel, event: Event) -> None:
        """Add an event, of this version, to the history."""

    @abstractmethod
    def history(self, name: str) -> Events:
        """Return the events of a model, the oldest first; [] for an unknown name."""

    @abstractmethod
    def set_tag(self, model: RegisteredModel, name: str, value: str) -> None:
        """Set a tag of a version."""

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

    def fetch_other_files(self, model: OtherModel, folder: Path) -> None:
        """Copy the files of a version that `others` lists into `folder`."""
        raise NotImplementedError

    @abstractmethod
    def holds_files(self, model: RegisteredModel, files: Sequence[FileEntry]) -> bool:
        """Return whether the `files` of a manifest are all stored; see `holds`."""

    @abstractmethod
    def read_file(self, model: RegisteredModel, file: str) -> bytes:
        """Return a file of the stored folder, without verifying it."""

    def record(
        self, name: str, version: str, is_champion: bool, uri: str, tags: Mapping[str, str]
    ) -> RegisteredModel:
        """Return the record of a version, from the tags that `register` gave it. Raises
        RegistryError where somebody has changed one to what can't be read."""
        role = CHAMPION if is_champion else tags.get("role", CHALLENGER)
        if not is_champion and role not in (ARCHIVED, REJECTED):
            role = CHALLENGER
        try:
            return RegisteredModel(
                artifact=Artifact(uri=uri, sha256=tags["files_sha256"], bytes=int(tags["bytes"])),
                produced_by=tags.get("produced_by", ""),
                name=name,
                version=version,
                registry=self.kind,
                role=role,
                manifest_sha256=tags["manifest_sha256"],
                model_sha256=tags.get("model_sha256", ""),
                rows_sha256=tags.get("rows_sha256", ""),
                signature=tags.get(SIGNATURE_TAG, ""),
            )
        except ValidationError as error:
            tag = error.errors(include_input=False)[0]["loc"][-1]
            raise RegistryError(
                f"{name} version {version}: its {tag} in the registry is not valid; somebody has "
                "changed it: delete the version there, or register it again"
            ) from None


def has_content(target: Path) -> bool:
    """Return whether something other than an empty folder is there."""
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Give a folder beside `target` to fill. It becomes `target` when the block ends, and is
    removed where the block fails."""
    with disk_errors(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".downloading-", dir=target.parent))
        try:
            yield beside
            os.rename(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def champion_of(models: Models) -> RegisteredModel | None:
    """Return the champion among the versions of a model, if there is one."""
    for model in models:
        if model.role == CHAMPION:
            return model
    return None


def refuse_rejected(model: RegisteredModel) -> None:
    """Raise RegistryError for a version that the gate refused."""
    if model.role == REJECTED:
        raise RegistryError(
            f"{model.name} version {model.version} is rejected: the gate refused it; promote "
            "another version"
        )


def keep_signature(folder: Path, model: RegisteredModel) -> None:
    """Verify the signature of a folder's manifest, and write it to manifest.sig.

    Raises RegistryError if DISTILLERY_VERIFY_KEY asks for another one.
    """
    content = (folder / MANIFEST).read_bytes()
    verify_signature(content, model.signature, f"{model.name} version {model.version}")
    if model.signature:
        (folder / SIGNATURE).write_text(model.signature, encoding="ascii")


def refuse_other_content(target: Path, model: RegisteredModel) -> None:
    """Raise RegistryError unless `target` is exactly the folder of `model`."""
    try:
        verify_files(target, model)
    except RegistryError as error:
        raise RegistryError(
            f"{target}: exists and is not {model.name} version {model.version}; "
            "move it away or name another folder"
        ) from error
