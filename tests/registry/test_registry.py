"""Both registries: register and download, tampering, duplicates, champions, and the message for
whatever is missing or down.

The local registry is real MLflow on real SQLite. Azure's is the real MLClient,
DefaultAzureCredential and azure-storage-blob against azure_ml_stand_in.py and real Azurite.
"""

import base64
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from azure_ml_stand_in import (
    CONTAINER,
    AzureMLStandIn,
    container_sas,
    resolve_localhost,
)
from azurite_server import ACCOUNT, ACCOUNT_KEY, Azurite, Certificate, free_port
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from postgres_server import Postgres
from prefect import flow
from prefect_api import wait_for

import tasks.registry
from distillery.commands import models
from distillery.errors import (
    CredentialsError,
    DistilleryError,
    ModelGone,
    RegistryError,
    RegistryUnavailable,
)
from distillery.recipe import RegistryRecipe
from distillery.records import Artifact, GateDecision, RegisteredModel
from distillery.registry.azureml import AZURE_DEADLINE, AzureRegistry, fetch_blobs
from distillery.registry.base import OtherModel, Registry
from distillery.registry.comparison import compare_models, find_subject
from distillery.registry.history import (
    Actor,
    Event,
    champions_in,
    event_tag,
    new_event,
    pin_of,
    taken_down,
)
from distillery.registry.local import LocalRegistry
from distillery.registry.open import open_registry
from distillery.serving.ask import Asker
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import digest_of_files, list_files, sha256_of
from tasks.stage import is_whole

PROVENANCE = {"data": "d" * 64, "teacher": {"identity": "t"}, "evaluation": {"accuracy": 0.875}}
ARTIFACT = Artifact(uri="file:///model", sha256="d" * 64, bytes=1)
AZURE_NAMES = (
    "AZUREML_SUBSCRIPTION_ID",
    "AZUREML_RESOURCE_GROUP",
    "AZUREML_WS_NAME",
    "AZUREML_WORKSPACE_NAME",
)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISTILLERY_STORE", "DISTILLERY_REGISTRY", *AZURE_NAMES):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "onnx")


def model_folder(folder: Path, weights: bytes = b"\x00\x01weights" * 1000) -> Path:
    """Return a folder like an exported model's, with files that Azure ML's own upload would drop: a
    .gitignore and what it names."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "genai_config.json").write_text("{}")
    (folder / "model.onnx.data").write_bytes(weights)
    (folder / "tokenizer" / "vocabulary.txt").write_text("grüße\n", encoding="utf-8")
    (folder / ".gitignore").write_text("*.data\n")
    return folder


def one_line(error: DistilleryError) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_a_registry_whose_making_was_killed_can_still_be_made(tmp_path: Path) -> None:
    database = tmp_path / "registry.db"
    url = f"sqlite:///{database}"
    code = f"from distillery.registry.local import LocalRegistry; LocalRegistry({url!r}).list()"
    with subprocess.Popen([sys.executable, "-c", code]) as process:

        def has_some_tables() -> bool:
            return any(file.stat().st_size for file in tmp_path.glob(".registry-*/registry.db"))

        wait_for("the first tables", has_some_tables, 120)
        process.kill()
    assert not database.exists()
    assert LocalRegistry(url).list() == []
    assert database.exists()


class RegistryCase:
    """A registry and access to its storage: `damage(model, file, change)` replaces the content of a
    stored file by `change(content)`. None stands for a file that does not exist."""

    def __init__(
        self, registry: Registry, damage: Callable[[RegisteredModel, str, Any], None]
    ) -> None:
        self.registry, self.damage = registry, damage


@pytest.fixture
def local(own_registry: None) -> RegistryCase:
    def damage(model: RegisteredModel, file: str, change: Any) -> None:
        path = Path(model.artifact.uri) / file
        content = change(path.read_bytes() if path.exists() else None)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)

    return RegistryCase(LocalRegistry(), damage)


@pytest.fixture
def stand_in(certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> Iterator[AzureMLStandIn]:
    """Azure ML with its storage down, until a test says where it is."""
    arm = AzureMLStandIn(blob_port=free_port(), secrets=container_sas())
    monkeypatch.setattr(socket, "getaddrinfo", resolve_localhost(socket.getaddrinfo))
    for name in ("AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_CLIENT_SECRET"):
        monkeypatch.delenv(name, raising=False)
    with arm.running(certificate):
        for name, value in arm.environment(certificate).items():
            monkeypatch.setenv(name, value)
        yield arm


@pytest.fixture
def azure(
    stand_in: AzureMLStandIn, blob_port: int, certificate: Certificate
) -> Iterator[RegistryCase]:
    from azure.storage.blob import ContainerClient

    stand_in.blob_port = blob_port
    url = f"https://{ACCOUNT}.blob.localhost:{blob_port}"
    with ContainerClient(
        url, CONTAINER, credential={"account_name": ACCOUNT, "account_key": ACCOUNT_KEY}
    ) as container:
        container.create_container()

        def damage(model: RegisteredModel, file: str, change: Any) -> None:
            blob = container.get_blob_client(f"{model.artifact.uri.split('/paths/')[1]}{file}")
            content = change(blob.download_blob().readall() if blob.exists() else None)
            if content is None:
                blob.delete_blob()
            else:
                blob.upload_blob(content, overwrite=True)

        yield RegistryCase(AzureRegistry(), damage)
        container.delete_container()


def flip_a_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


BOTH = pytest.mark.parametrize("kind", ["local", pytest.param("azure", marks=pytest.mark.slow)])


@pytest.fixture
def case(kind: str, request: pytest.FixtureRequest) -> RegistryCase:
    found: RegistryCase = request.getfixturevalue(kind)
    return found


@BOTH
def test_what_is_registered_is_downloaded_unchanged(
    case: RegistryCase, folder: Path, tmp_path: Path
) -> None:
    registry = case.registry
    model = registry.register(
        folder, "student", {"produced_by": "run-7", "task": "tone"}, PROVENANCE
    )

    files = list_files(folder)
    assert (model.name, model.version, model.role, model.registry) == (
        "student",
        "1",
        "challenger",
        registry.kind,
    )
    assert model.produced_by == "run-7"
    assert model.artifact.sha256 == digest_of_files(files)
    assert model.artifact.bytes == sum(file.bytes for file in files)
    assert registry.list() == registry.list("student") == [model]
    assert registry.get("student") == registry.get("student", "1") == model

    manifest = registry.provenance(model)
    assert manifest["model"] == "student"
    assert manifest["provenance"] == PROVENANCE
    assert {file["path"]: file["sha256"] for file in manifest["files"]} == {
        file.path: file.sha256 for file in files
    }

    target = registry.download(model, tmp_path / "deep" / "down")
    assert sha256_of(target / "manifest.json") == model.manifest_sha256
    (target / "manifest.json").unlink()
    assert list_files(target) == files
    assert [path.name for path in target.parent.iterdir()] == ["down"]


@BOTH
def test_access_is_checked_without_a_trace_among_the_models(
    case: RegistryCase, folder: Path
) -> None:
    registry = case.registry
    assert [registry.check_access("student"), registry.check_access("student")] == [0, 0]
    assert registry.list() == []
    registry.register(folder, "student", {}, PROVENANCE)
    assert registry.check_access("student") == 1


@pytest.mark.slow
def test_a_role_that_only_reads_is_told_before_anything_is_registered(
    azure: RegistryCase, stand_in: AzureMLStandIn
) -> None:
    stand_in.reader = True
    assert azure.registry.list("student") == []
    with pytest.raises(CredentialsError) as caught:
        azure.registry.check_access("student")
    assert one_line(caught.value) == (
        "Azure ML workspace ws refuses access (403): give the login the role AzureML Data "
        "Scientist there"
    )


@pytest.mark.slow
def test_storage_that_may_only_be_read_names_the_role_of_the_storage(
    azure: RegistryCase, stand_in: AzureMLStandIn
) -> None:
    stand_in.secrets = container_sas(writes=False)
    with pytest.raises(CredentialsError) as caught:
        azure.registry.check_access("student")
    assert one_line(caught.value) == (
        f"Azure ML workspace ws: its storage {ACCOUNT} refuses access (403): give the login the "
        "role Storage Blob Data Contributor there"
    )


def test_marks_of_folders_are_no_files(tmp_path: Path) -> None:
    held = {"place/": b"", "place/sub/": b"", "place/sub/file": b"content", "placed": b""}

    container: Any = SimpleNamespace(
        list_blobs=lambda **_: [SimpleNamespace(name=name, metadata=None) for name in held],
        download_blob=lambda name: SimpleNamespace(readinto=lambda file: file.write(held[name])),
    )
    fetch_blobs(container, "place", tmp_path)
    assert [file.path for file in list_files(tmp_path)] == ["sub/file"]


@BOTH
def test_the_same_content_is_registered_once(
    case: RegistryCase, folder: Path, tmp_path: Path
) -> None:
    registry = case.registry
    first = registry.register(folder, "student", {}, PROVENANCE)
    assert registry.register(folder, "student", {}, PROVENANCE) == first
    downloaded = registry.download(first, tmp_path / "down")
    assert registry.register(downloaded, "student", {}, PROVENANCE) == first
    assert registry.list("student") == [first]

    second = registry.register(folder, "student", {}, {**PROVENANCE, "data": "e" * 64})
    assert (second.version, second.artifact.sha256) == ("2", first.artifact.sha256)
    other = registry.register(folder, "another", {}, PROVENANCE)
    assert registry.list() == [other, second, first]


ME = Actor("run-7", "id-7")


@BOTH
def test_a_signature_is_kept_with_its_version(
    case: RegistryCase, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = case.registry
    model = registry.register(folder, "student", {"task": "tone"}, PROVENANCE)
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    monkeypatch.setenv("DISTILLERY_SIGNING_KEY", pem.decode())
    registry.promote(model, None, ME)
    signed = registry.sign(registry.get("student"))
    assert registry.list("student") == [signed]
    assert (signed.role, signed.content_id) == ("champion", model.content_id)
    target = registry.download(signed, tmp_path / "down")
    signature = base64.b64decode((target / "manifest.sig").read_bytes())
    key.public_key().verify(signature, (target / "manifest.json").read_bytes())


def versions(case: RegistryCase, folder: Path, count: int) -> list[RegisteredModel]:
    """Register `count` versions of one model."""
    registered = []
    for number in range(1, count + 1):
        content = model_folder(folder / f"version-{number}", b"%d" % number)
        registered.append(case.registry.register(content, "student", {}, PROVENANCE, actor=ME))
    return registered


def roles(registry: Registry) -> dict[str, str]:
    return {model.version: model.role for model in registry.list("student")}


def told(registry: Registry) -> list[tuple[str, str, str | None]]:
    """Return the history's actions, versions and the champions before."""
    history = registry.history("student")
    return [(event.action, event.version, event.before) for event in history]


@BOTH
def test_a_run_promotes_only_over_the_champion_that_it_has_judged(
    case: RegistryCase, tmp_path: Path
) -> None:
    registry = case.registry
    first, second, third = versions(case, tmp_path, 3)
    assert registry.get("student") == third

    promoted = registry.promote(first, None, ME, "it passes")
    assert (promoted.result, promoted.champion) == ("promoted", "1")
    assert registry.get("student") == first.model_copy(update={"role": "champion"})
    outpaced = registry.promote(second, None, ME)
    assert (outpaced.result, outpaced.champion) == ("outpaced", "1")
    assert outpaced.reason == "the champion is version 1, no longer none"
    assert registry.promote(second, "3", ME).result == "outpaced"
    assert roles(registry) == {"1": "champion", "2": "challenger", "3": "challenger"}

    assert registry.promote(second, "1", ME).result == "promoted"
    assert registry.promote(second, "1", ME).result == "stands"
    assert roles(registry) == {"1": "archived", "2": "champion", "3": "challenger"}
    assert registry.get("student").content_id == second.content_id
    with pytest.raises(RegistryError, match="no version 7"):
        registry.promote(first.model_copy(update={"version": "7"}), "2", ME)

    registered: list[tuple[str, str, str | None]] = []
    registered += [("registered", number, None) for number in ("1", "2", "3")]
    assert told(registry) == [*registered, ("promoted", "1", None), ("promoted", "2", "1")]
    event = registry.history("student")[3]
    assert (event.by, event.run_id, event.reason) == ("run-7", "id-7", "it passes")
    assert event.line.endswith("version 1 promoted  by run-7 (run id-7): it passes")
    assert registry.history("nobody") == []


@BOTH
def test_a_rollback_pins_and_only_a_new_version_is_promoted_over_it(
    case: RegistryCase, tmp_path: Path
) -> None:
    registry = case.registry
    first, second, third = versions(case, tmp_path, 3)
    for model, before in ((first, None), (second, "1"), (third, "2")):
        registry.promote(model, before, ME)
    user = Actor("somebody")
    back = registry.pin("student", None, user, "complaints", "rolled back")
    assert (back.version, back.role) == ("2", "champion")
    assert roles(registry) == {"1": "archived", "2": "champion", "3": "archived"}
    assert told(registry)[-1] == ("rolled back", "2", "3")

    for model in (first, third):
        barred = registry.promote(model, "2", ME)
        assert (barred.result, barred.champion) == ("barred", "2")
        assert barred.reason == (
            "somebody has pinned version 2: runs promote only versions above 3 until "
            "`distillery models unpin student`"
        )
    assert registry.promote(second, "2", ME).result == "stands"
    # Once more, it goes back further, not forth again.
    assert registry.pin("student", None, user, "", "rolled back").version == "1"
    fourth = registry.register(
        model_folder(tmp_path / "fourth", b"4"), "student", {}, PROVENANCE, actor=ME
    )
    assert registry.promote(fourth, "1", ME).result == "promoted"
    # The pin still bars what was there before it.
    assert registry.promote(third, "4", ME).result == "barred"
    assert taken_down(registry.history("student")) == {"2", "3"}
    registry.unpin("student", user)
    assert registry.promote(third, "4", ME).result == "promoted"
    with pytest.raises(RegistryError, match="student: no champion is pinned in"):
        registry.unpin("student", user)
    assert [event.action for event in registry.history("student")[-2:]] == ["unpinned", "promoted"]


def test_the_champions_before_this_one() -> None:
    """An earlier release, which writes no history, promoted 3 after 2."""
    history: list[Event] = []
    acts: tuple[tuple[Any, str, str | None], ...] = (
        ("promoted", "2", "1"),
        ("registered", "4", None),
        ("promoted", "4", "3"),
    )
    for action, version, before in acts:
        history.append(new_event(history, action, version, ME, before=before))
    assert champions_in(history) == ["1", "2", "3", "4"]
    history.append(new_event(history, "rolled back", "2", ME, before="4"))
    assert champions_in(history) == ["1", "2"]
    assert champions_in([]) == []


def test_there_is_nothing_to_roll_back_to(local: RegistryCase, tmp_path: Path) -> None:
    registry = local.registry
    (first,) = versions(local, tmp_path, 1)
    registry.promote(first, None, ME)
    with pytest.raises(RegistryError, match="the history names no champion before this one"):
        registry.pin("student", None, ME, "", "rolled back")
    with pytest.raises(RegistryError, match="version 1 is the champion already"):
        registry.pin("student", "1", ME, "", "rolled back")
    assert registry.pin("student", "1", ME).version == "1"
    assert pin_of(registry.history("student")) is not None


@BOTH
def test_a_refused_student_is_kept_as_rejected_and_never_promoted(
    case: RegistryCase, folder: Path, tmp_path: Path
) -> None:
    registry = case.registry
    student: Any = {"model_sha256": "a" * 64, "rows_sha256": "b" * 64}
    bad = registry.register(
        folder, "student", {}, PROVENANCE, actor=ME, reason="worse", rejected=True, **student
    )
    assert (bad.version, bad.role) == ("1", "rejected")
    assert registry.register(folder, "student", {}, {}, rejected=True, **student) == bad
    assert registry.history("student")[0].reason == "worse"
    with pytest.raises(RegistryError, match="holds rejected versions alone"):
        registry.get("student")
    assert registry.get("student", "1") == bad
    for act in (
        lambda: registry.promote(bad, None, ME),
        lambda: registry.pin("student", "1", ME),
    ):
        with pytest.raises(RegistryError, match="student version 1 is rejected: the gate refused"):
            act()
    # Under other rules it passes: that is another version, and is not rejected any more.
    good = registry.register(folder, "student", {}, PROVENANCE, actor=ME, **student)
    assert (good.version, good.role) == ("2", "challenger")
    assert registry.register(folder, "student", {}, {}, rejected=True, **student) == good


@BOTH
def test_a_version_is_what_the_student_is(case: RegistryCase, folder: Path, tmp_path: Path) -> None:
    """The same model and the same test rows: whatever the provenance says of times and speeds."""
    registry = case.registry
    student: Any = {"model_sha256": "a" * 64, "rows_sha256": "b" * 64}
    first = registry.register(folder, "student", {}, {"seconds": 1}, **student)
    other_answers = model_folder(tmp_path / "other", b"the same but for an answer")
    assert registry.register(other_answers, "student", {}, {"seconds": 2}, **student) == first
    other_rows = student | {"rows_sha256": "c" * 64}
    assert registry.register(other_answers, "student", {}, {}, **other_rows).version == "2"
    case.damage(first, "model.onnx.data", flip_a_byte)
    assert registry.register(other_answers, "student", {}, {"seconds": 2}, **student).version == "3"


@BOTH
def test_one_file_is_read_and_verified(case: RegistryCase, folder: Path) -> None:
    registry = case.registry
    model = registry.register(folder, "student", {}, PROVENANCE)
    assert registry.read_verified(model, "genai_config.json") == b"{}"
    assert registry.read_verified(model, "evaluation/answers.jsonl") is None
    case.damage(model, "genai_config.json", lambda content: b"[]")
    with pytest.raises(RegistryError, match=r"student version 1: genai_config\.json: "):
        registry.read_verified(model, "genai_config.json")


@BOTH
def test_what_a_cached_run_asks_of_the_registry_is_no_download(
    case: RegistryCase, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged byte is found on this machine; elsewhere it is found by the download."""
    registry = case.registry
    first = registry.register(folder, "student", {}, PROVENANCE)
    second = registry.register(folder, "student", {}, {"number": 2})
    other = registry.register(folder, "student", {}, {"number": 3})
    case.damage(second, "model.onnx.data", flip_a_byte)
    case.damage(other, "genai_config.json", lambda content: None)

    def no_download(*arguments: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(type(registry), "fetch_files", no_download)
    assert [is_whole(model) for model in (first, second, other)] == [
        *(True, kind == "azure", False)
    ]
    case.damage(first, "manifest.json", lambda content: b"{}")
    assert not registry.holds(first)


def test_an_entry_of_the_history_that_can_not_be_read_is_named(
    local: RegistryCase, folder: Path
) -> None:
    registry = local.registry
    registry.register(folder, "student", {}, PROVENANCE)
    assert isinstance(registry, LocalRegistry)
    with registry.mlflow() as client:
        client.set_registered_model_tag("student", "history_0", "mine")
    with pytest.raises(RegistryError, match="student: tag history_0: can't be read"):
        registry.history("student")


def test_a_clock_that_is_behind_and_a_long_reason(local: RegistryCase, folder: Path) -> None:
    late = Event(at="2999-01-01T00:00:00.000000+00:00", action="registered", version="1", by="x")
    event = new_event([late], "promoted", "1", ME, "why \n" * 1000)
    assert event.at == "2999-01-01T00:00:00.000001+00:00"
    assert len(event_tag(event)[1]) < 1000
    assert "\n" not in event.line


PROMOTE = """
import sys, time
from pathlib import Path
from distillery.registry.history import Actor
from distillery.registry.local import LocalRegistry
folder, version = Path(sys.argv[1]), sys.argv[2]
registry = LocalRegistry()
model = registry.get("student", version)
(folder / f"ready-{version}").touch()
while len(list(folder.glob("ready-*"))) < 2:
    time.sleep(0.001)
print(registry.promote(model, None, Actor(f"run {version}")).result)
"""


def promote_at_once(folder: Path) -> list[str]:
    """Have two processes promote versions 1 and 2 at once; return what each of them tells."""
    command = [sys.executable, "-c", PROMOTE, str(folder)]
    started = [
        subprocess.Popen([*command, version], stdout=subprocess.PIPE, text=True)
        for version in ("1", "2")
    ]
    return [process.communicate(timeout=120)[0].strip() for process in started]


def test_two_processes_that_promote_at_once_leave_one_champion_and_tell_it(
    local: RegistryCase, tmp_path: Path
) -> None:
    versions(local, tmp_path, 2)
    results = promote_at_once(tmp_path)
    assert sorted(results) == ["outpaced", "promoted"]
    champion = local.registry.get("student")
    assert results[int(champion.version) - 1] == "promoted"
    assert [event.action for event in local.registry.history("student")] == [
        "registered",
        "registered",
        "promoted",
    ]


@pytest.mark.slow
def test_two_processes_that_promote_at_once_on_postgresql(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Postgres() as server:
        monkeypatch.setenv("DISTILLERY_REGISTRY", server.url())
        case = RegistryCase(LocalRegistry(), lambda model, file, change: None)
        versions(case, tmp_path, 2)
        assert sorted(promote_at_once(tmp_path)) == ["outpaced", "promoted"]
        actions = [event.action for event in case.registry.history("student")]
        assert actions == ["registered", "registered", "promoted"]


@pytest.mark.slow
def test_a_model_goes_to_mlflows_own_server_and_comes_back(
    home: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server takes no path of another machine as a version's source."""
    port = free_port()
    database = f"sqlite:///{tmp_path / 'server.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for("MLflow's server", lambda: answers(f"{url}/health"), 120)
        monkeypatch.setenv("DISTILLERY_REGISTRY", url)
        registry = LocalRegistry()
        model = registry.register(folder, "student", {}, PROVENANCE)
        assert registry.promote(model, None, ME).result == "promoted"
        found = registry.get("student")
        assert (found.version, found.role) == ("1", "champion")
        assert registry.register(folder, "student", {}, PROVENANCE).version == "1"
        got = registry.download(found, tmp_path / "got")
        assert (got / "model.onnx.data").read_bytes() == (folder / "model.onnx.data").read_bytes()
        # As on a machine that shares the registry and the store, and has no such folder.
        shutil.rmtree(home / "models" / "student")
        with pytest.raises(ModelGone, match="register it again"):
            registry.download(found, tmp_path / "again")
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).is_success
    except httpx.HTTPError:
        return False


def test_a_promotion_that_another_run_overwrites_is_told(
    local: RegistryCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind MLflow's own server, where nothing is locked."""
    registry = local.registry
    first, second = versions(local, tmp_path, 2)
    own = registry.set_champion

    def overwritten(model: RegisteredModel, before: RegisteredModel | None, event: Event) -> None:
        own(model, before, event)
        own(second, None, event)

    monkeypatch.setattr(registry, "set_champion", overwritten)
    told = registry.promote(first, None, ME)
    assert (told.result, told.champion) == ("outpaced", "2")
    assert told.reason == "another run promoted at the same time"


@pytest.mark.slow
def test_azure_versions_of_earlier_releases_have_roles(
    azure: RegistryCase, stand_in: AzureMLStandIn, folder: Path
) -> None:
    registry = azure.registry
    model = registry.register(folder, "student", {}, PROVENANCE)
    stand_in.versions["student"]["1"]["properties"]["tags"]["role"] = "candidate"
    assert registry.get("student").role == "challenger"
    assert registry.promote(model, None, ME).result == "promoted"


@BOTH
@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model.onnx.data", flip_a_byte),
        ("model.onnx.data", lambda content: None),
        ("manifest.json", lambda content: content.replace(b"0.875", b"0.975")),
        ("manifest.json", lambda content: None),
        ("extra.py", lambda content: b"import os"),
    ],
    ids=["flipped byte", "missing file", "edited manifest", "missing manifest", "added file"],
)
def test_a_tampered_folder_is_refused(
    case: RegistryCase, folder: Path, tmp_path: Path, file: str, change: Callable[[Any], Any]
) -> None:
    registry = case.registry
    model = registry.register(folder, "student", {}, PROVENANCE)
    case.damage(model, file, change)

    with pytest.raises(RegistryError) as caught:
        registry.download(model, tmp_path / "down")
    assert f"student version 1: {file}: " in one_line(caught.value)
    assert not (tmp_path / "down").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".downloading")]
    if file == "manifest.json":
        with pytest.raises(RegistryError, match=r"manifest\.json"):
            registry.provenance(model)


@BOTH
def test_registering_again_mends_a_damaged_copy(
    case: RegistryCase, folder: Path, tmp_path: Path
) -> None:
    registry = case.registry
    model = registry.register(folder, "student", {}, PROVENANCE)
    case.damage(model, "model.onnx.data", flip_a_byte)
    assert registry.register(folder, "student", {}, PROVENANCE) == model
    assert registry.list("student") == [model]
    assert (registry.download(model, tmp_path / "down") / "model.onnx.data").read_bytes() == (
        folder / "model.onnx.data"
    ).read_bytes()


@BOTH
def test_what_is_not_there(case: RegistryCase, folder: Path) -> None:
    registry = case.registry
    assert registry.list() == registry.list("nobody") == []
    with pytest.raises(RegistryError, match=r"nobody: no such model in .*; it holds: none"):
        registry.get("nobody")
    registry.register(folder, "student", {}, PROVENANCE)
    with pytest.raises(RegistryError, match=r"nobody: no such model in .*; it holds: student"):
        registry.get("nobody")
    with pytest.raises(RegistryError, match=r"student: no version 9 in .*; it holds: 1"):
        registry.get("student", "9")


@pytest.mark.usefixtures("own_registry")
def test_a_folder_of_the_artifact_store_keeps_its_digest(folder: Path) -> None:
    store = ArtifactStore()
    artifact = store.put(folder)
    model = LocalRegistry().register(store.fetch(artifact), "student", {}, PROVENANCE)
    assert model.artifact.sha256 == artifact.sha256
    assert store.holds(artifact)


@pytest.mark.usefixtures("own_registry")
def test_a_moved_home_loses_nothing(
    home: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LocalRegistry().register(folder, "student", {}, PROVENANCE)
    home.rename(tmp_path / "moved")
    monkeypatch.setenv("DISTILLERY_HOME", str(tmp_path / "moved"))
    moved = LocalRegistry()
    assert moved.get("student") == model
    assert (moved.download(model, tmp_path / "down") / "genai_config.json").exists()


@pytest.fixture
def shared(
    empty_registry: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RegisteredModel:
    """A model in a registry and a store that lie outside of this machine's home."""
    monkeypatch.setenv("DISTILLERY_REGISTRY", f"sqlite:///{shutil.copy(empty_registry, tmp_path)}")
    monkeypatch.setenv("DISTILLERY_STORE", str(tmp_path / "store"))
    return LocalRegistry().register(folder, "student", {}, PROVENANCE)


def test_another_machine_takes_what_it_lacks_from_the_store(
    shared: RegisteredModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_HOME", str(tmp_path / "elsewhere"))
    other = LocalRegistry()
    assert other.provenance(other.get("student"))["provenance"] == PROVENANCE
    with pytest.raises(
        RegistryError, match=r"student version 1 is gone, and .*/store does not have it either; reg"
    ):
        other.download(shared, tmp_path / "down")

    stored = ArtifactStore().put(folder)
    assert stored.sha256 == shared.artifact.sha256
    target = other.download(shared, tmp_path / "down")
    assert sha256_of(target / "manifest.json") == shared.manifest_sha256
    assert other.register(folder, "student", {}, PROVENANCE) == shared
    assert other.holds(shared)
    manifest = tmp_path / "store" / "manifests" / f"{shared.manifest_sha256}.json"
    manifest.write_bytes(flip_a_byte(manifest.read_bytes()))
    with pytest.raises(RegistryError, match=r"student version 1: manifest\.json: "):
        other.download(shared, tmp_path / "again")
    manifest.unlink()
    assert not other.is_whole(shared)


def test_a_store_that_has_moved_gets_the_manifest_from_the_machine_that_has_it(
    shared: RegisteredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_STORE", str(tmp_path / "new"))
    ArtifactStore().put(LocalRegistry().download(shared, tmp_path / "down"))
    monkeypatch.setenv("DISTILLERY_HOME", str(tmp_path / "elsewhere"))
    assert LocalRegistry().provenance(shared)["provenance"] == PROVENANCE


@pytest.mark.usefixtures("own_registry")
def test_download_replaces_nothing_but_what_it_made(folder: Path, tmp_path: Path) -> None:
    registry = LocalRegistry()
    model = registry.register(folder, "student", {}, PROVENANCE)
    target = registry.download(model, tmp_path / "down")
    assert registry.download(model, target) == target
    (target / "mine.txt").write_text("mine")
    with pytest.raises(RegistryError, match="exists and is not student version 1"):
        registry.download(model, target)
    assert (target / "mine.txt").exists()


@pytest.mark.usefixtures("own_registry")
def test_more_versions_than_one_page_of_mlflow(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    registry = LocalRegistry()
    model = registry.register(folder, "student", {}, PROVENANCE)
    whole = MlflowClient.search_model_versions

    def two_a_page(client: Any, text: str, **options: Any) -> Any:
        return whole(client, text, max_results=2, **options)

    monkeypatch.setattr(MlflowClient, "search_model_versions", two_a_page)
    for number in range(4):
        registry.register(folder, "student", {}, {"number": number})
    assert [each.version for each in registry.list("student")] == ["5", "4", "3", "2", "1"]
    assert registry.list("student")[-1] == model


@pytest.mark.usefixtures("own_registry")
def test_versions_of_others_are_left_out(folder: Path) -> None:
    from mlflow import MlflowClient

    registry = LocalRegistry()
    registry.register(folder, "student", {}, PROVENANCE)
    url = f"sqlite:///{Path(registry.get('student').artifact.uri).parents[2] / 'registry.db'}"
    MlflowClient(tracking_uri=url, registry_uri=url).create_model_version(
        "student", source=str(folder)
    )
    assert [model.version for model in registry.list("student")] == ["1"]


REGISTER = """
import sys
from pathlib import Path
from distillery.registry.local import LocalRegistry
print(LocalRegistry().register(Path(sys.argv[1]), "student", {}, {"process": sys.argv[2]}).version)
"""


def test_two_processes_open_a_new_registry_at_once(folder: Path) -> None:
    command = [sys.executable, "-c", REGISTER, str(folder)]
    started = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    answers = [process.communicate(timeout=120)[0].strip() for process in started]
    assert sorted(answers) == ["1", "2"]


@pytest.mark.usefixtures("own_registry")
def test_nothing_to_register(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in (
        (tmp_path / "none", "no such folder"),
        (tmp_path / "empty", "the folder is empty"),
    ):
        with pytest.raises(RegistryError, match=words):
            LocalRegistry().register(folder, "student", {}, PROVENANCE)


@pytest.mark.usefixtures("own_registry")
def test_a_manifest_of_the_models_own_is_not_overwritten(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"mine": true}')
    with pytest.raises(RegistryError, match=r"onnx/manifest\.json: .* rename yours"):
        LocalRegistry().register(folder, "student", {}, PROVENANCE)


def test_a_registry_that_is_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "notes.txt").write_text(
        "not a database, and longer than a header of SQLite would be" * 10
    )
    for url, kind in (
        (f"sqlite:///{tmp_path / 'notes.txt'}", RegistryError),
        (f"sqlite:///{tmp_path / 'notes.txt' / 'registry.db'}", RegistryError),
        (f"http://somebody:secret@127.0.0.1:{free_port()}", RegistryUnavailable),
    ):
        with pytest.raises(kind) as caught:
            LocalRegistry(url).list()
        assert "secret" not in one_line(caught.value) + str(caught.value.__cause__)


def test_open_registry_follows_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert isinstance(open_registry(RegistryRecipe()), LocalRegistry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AZUREML_WS_NAME", "ws")
    with pytest.raises(CredentialsError) as caught:
        open_registry(RegistryRecipe(kind="azureml"))
    assert one_line(caught.value) == (
        "AZUREML_SUBSCRIPTION_ID, AZUREML_RESOURCE_GROUP: not set or empty; set them in "
        f"{tmp_path}/.env (copy sample.env) or in the environment"
    )
    for name in AZURE_NAMES[:3]:
        monkeypatch.setenv(name, "x")
    assert open_registry(RegistryRecipe(kind="azureml")).kind == "azureml"


@pytest.mark.slow
def test_azure_gets_the_version_that_the_lab_registers(
    azure: RegistryCase, stand_in: AzureMLStandIn, folder: Path
) -> None:
    model = azure.registry.register(folder, "student", {"task": "tone"}, PROVENANCE)
    properties = stand_in.versions["student"]["1"]["properties"]
    assert properties["modelType"] == "custom_model"
    assert properties["modelUri"].endswith(
        f"/workspaceblobstore/paths/distillery/student/{model.manifest_sha256}/"
    )
    tags = dict(properties["tags"])
    (event,) = [tags.pop(name) for name in list(tags) if name.startswith("history_")]
    assert json.loads(event)["action"] == "registered"
    assert tags == {
        "task": "tone",
        "role": "challenger",
        "manifest_sha256": model.manifest_sha256,
        "files_sha256": model.artifact.sha256,
        "bytes": str(model.artifact.bytes),
    }
    assert "sig=" not in json.dumps(properties)


LAB = "fine-tuning-phi-4-mini-onnx-int4-cpu"


@pytest.mark.slow
def test_azure_models_of_others_are_listed_and_downloaded(
    azure: RegistryCase,
    stand_in: AzureMLStandIn,
    tiny_onnx: Callable[..., Path],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Registered as the lab's notebook does: by the SDK's own upload, of a folder around the
    model's."""
    from azure.ai.ml.entities import Model

    registry = azure.registry
    assert isinstance(registry, AzureRegistry)
    lab = tmp_path / "phi-4-mini" / "onnx"
    shutil.copytree(tiny_onnx("phi3"), lab / "model")
    registry._client.models.create_or_update(
        Model(path=lab, type="custom_model", name=LAB, description="Fine tuning by MSFT Olive")
    )
    single = Model(path=lab / "model" / "model.onnx", type="custom_model", name="single")
    registry._client.models.create_or_update(single)
    ours = registry.register(folder, "student", {}, PROVENANCE)

    assert registry.list() == [ours]
    assert [(other.name, other.version) for other in registry.others()] == [
        *((LAB, "1"), ("single", "1")),
    ]
    assert registry.others("student") == []
    with pytest.raises(RegistryError, match=f"{LAB}: .* has no version that Distillery registered"):
        registry.get(LAB)
    assert registry.get_any("student") == ours
    with pytest.raises(RegistryError, match="student: no version 7"):
        registry.get_any("student", "7")

    capsys.readouterr()
    models.list_models(registry="azureml")
    listed = capsys.readouterr().out.splitlines()
    assert f"{LAB}  version 1  unverified        azureml://" in listed[1]
    target = tmp_path / "down"
    models.download_model(LAB, target, registry="azureml")
    assert capsys.readouterr().out.splitlines() == [
        f"{LAB} version 1 in {target}, unverified: it has no manifest",
        f"ask it by: distillery ask {target / 'model'}",
    ]
    assert list_files(target) == list_files(lab)
    Asker(target / "model", options=("oven", "river")).answer("Where is bread warm?", print)
    assert "oven" in capsys.readouterr().out
    row = {"question": "Where is bread?", "choices": ["oven", "river"], "answerKey": "A"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row))
    theirs = find_subject(f"azureml:{LAB}:1", "local")
    assert compare_models(theirs, find_subject(str(target / "model"), "local"), rows).rows == 1
    single_other = registry.others("single")[0]
    registry.download_other(single_other, tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.onnx"]

    with pytest.raises(RegistryError, match="down: exists; move it away"):
        registry.download_other(single_other, target)
    monkeypatch.setenv("DISTILLERY_VERIFY_KEY", "any")
    with pytest.raises(RegistryError, match="so not signed, and DISTILLERY_VERIFY_KEY asks for it"):
        registry.download_other(single_other, tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("azureml://jobs/1/outputs/artifacts/paths/model", "no folder of a datastore; fetch"),
        ("azureml://datastores/workspaceblobstore/paths/none", "holds no file"),
        ("azureml://datastores/other/paths/model", "Datastore other was not found"),
    ],
)
def test_azure_models_of_others_that_can_not_be_fetched(
    azure: RegistryCase, uri: str, words: str, tmp_path: Path
) -> None:
    other = OtherModel(name="theirs", version="1", uri=uri)
    with pytest.raises(RegistryError, match=words) as caught:
        azure.registry.download_other(other, tmp_path / "down")
    one_line(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "secrets", [{"secretsType": "AccountKey", "key": ACCOUNT_KEY}, None], ids=["key", "login"]
)
def test_azure_storage_by_key_or_by_login(
    azure: RegistryCase,
    stand_in: AzureMLStandIn,
    folder: Path,
    tmp_path: Path,
    secrets: dict[str, str] | None,
) -> None:
    stand_in.secrets = secrets
    model = azure.registry.register(folder, "student", {}, PROVENANCE)
    assert azure.registry.download(model, tmp_path / "down").is_dir()


ASK = """
from distillery.errors import DistilleryError
from distillery.registry.azureml import AzureRegistry
try:
    AzureRegistry().list()
except DistilleryError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_azure_without_a_login_says_one_line_and_no_more(
    stand_in: AzureMLStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("IDENTITY_ENDPOINT", "IDENTITY_HEADER"):
        monkeypatch.delenv(name)
    # An empty PATH hides az and its kin, an empty HOME their logins.
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    answer = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, timeout=60)
    assert answer.stdout == (
        "CredentialsError no Azure login: run `az login`, or set AZURE_CLIENT_ID, AZURE_TENANT_ID "
        "and AZURE_CLIENT_SECRET\n"
    )
    assert answer.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, CredentialsError, "refuses the login"),
        (403, CredentialsError, "refuses access"),
        (400, RegistryError, "answered 400"),
        (503, RegistryUnavailable, "does not answer"),
    ],
)
def test_azure_refuses(
    stand_in: AzureMLStandIn, status: int, kind: type[DistilleryError], words: str
) -> None:
    stand_in.status = status
    with pytest.raises(kind, match=words) as caught:
        AzureRegistry().list("student")
    one_line(caught.value)


@pytest.mark.slow
def test_azure_workspace_that_does_not_exist(
    stand_in: AzureMLStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZUREML_WS_NAME", "typo")
    with pytest.raises(RegistryError, match="workspace typo") as caught:
        AzureRegistry().get("student")
    one_line(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["refused", "silent"])
def test_azure_with_its_storage_down(stand_in: AzureMLStandIn, folder: Path, answer: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if answer == "silent":
            stand_in.blob_port = listener.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(
            RegistryUnavailable, match=f"storage {ACCOUNT} does not answer"
        ) as caught:
            AzureRegistry().register(folder, "student", {}, PROVENANCE)
        assert time.monotonic() - start < AZURE_DEADLINE
    assert "sig=" not in one_line(caught.value)
    assert caught.value.__cause__ is None
    assert stand_in.versions == {}


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["refused", "silent"])
def test_azure_that_is_down(stand_in: AzureMLStandIn, answer: str) -> None:
    assert AzureRegistry().list() == []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stand_in.port = listener.getsockname()[1] if answer == "silent" else free_port()
        start = time.monotonic()
        with pytest.raises(RegistryUnavailable, match="does not answer"):
            AzureRegistry().list()
        assert time.monotonic() - start < AZURE_DEADLINE


def test_azurite_that_is_not_installed_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npm ci --prefix tests/support/azurite"):
        Azurite(tmp_path).start()


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("away", [True, False])
def test_judging_and_promoting_are_tried_again_when_the_registry_is_away(
    away: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = RegistryUnavailable if away else RegistryError
    asked = []

    def fails(recipe: RegistryRecipe) -> Any:
        asked.append(recipe)
        raise kind("the registry does not answer")

    monkeypatch.setattr(tasks.registry, "open_registry", fails)
    monkeypatch.setattr(tasks.registry, "produced_by", lambda: "run-7")
    model = RegisteredModel(
        artifact=ARTIFACT, name="student", version="1", registry="local", manifest_sha256="d" * 64
    )

    @flow
    def promoting() -> None:
        decision = GateDecision(passed=True, reason="passed: all well")
        tasks.registry.promote.with_options(retry_delay_seconds=0)(model, decision)

    with pytest.raises(kind, match="does not answer"):
        promoting()
    assert len(asked) == (3 if away else 1)
    assert tasks.registry.apply_gate.retries == tasks.registry.promote.retries == 2
