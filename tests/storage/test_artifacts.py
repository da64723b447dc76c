"""The artifact store: content-addressed, whole or not there, verified on the way out, and through
outages. On a local folder, on fsspec's memory and on real Azurite."""

import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from azurite_server import ACCOUNT, ACCOUNT_KEY, Azurite, free_port

from distillery.errors import (
    ArtifactDamaged,
    CredentialsError,
    DistilleryError,
    StoreError,
    StoreUnavailable,
)
from distillery.records import Artifact
from distillery.settings import LocalSettings
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.cache import Cache
from distillery.storage.files import Storage
from distillery.storage.manifest import MANIFEST
from distillery.storage.working import working_folder

TESTS = Path(__file__).parents[1] / "support"
MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_text("one")
    (source / "deep" / "b.bin").write_bytes(bytes(3 * MIB))
    (source / "empty").touch()
    return source


@pytest.fixture(autouse=True)
def no_azure_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("DISTILLERY_STORE", raising=False)
    # fsspec keeps its file systems by URL; in each test the server is another.
    if adlfs := sys.modules.get("adlfs"):
        adlfs.AzureBlobFileSystem.clear_instance_cache()


def lead_to(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in azurite.environment.items():
        monkeypatch.setenv(name, value)


def with_container(azurite: Azurite) -> Azurite:
    from azure.storage.blob import ContainerClient

    with ContainerClient.from_connection_string(
        azurite.connection_string, "distillery"
    ) as container:
        container.create_container()
    return azurite


@pytest.fixture(scope="module")
def shared_azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with Azurite(tmp_path_factory.mktemp("azurite")) as azurite:
        yield with_container(azurite)


@pytest.fixture
def azurite(shared_azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> Azurite:
    lead_to(shared_azurite, monkeypatch)
    return shared_azurite


@pytest.fixture
def own_azurite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Azurite]:
    """One that a test may stop."""
    (tmp_path / "azurite").mkdir()
    with Azurite(tmp_path / "azurite") as azurite:
        lead_to(with_container(azurite), monkeypatch)
        yield azurite


AZURE = pytest.param("azure", marks=pytest.mark.slow)


@pytest.fixture(params=["local", "memory", AZURE])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "store")
    if request.param == "azure":
        request.getfixturevalue("azurite")
    return {"memory": "memory://", "azure": "abfs://distillery/"}[request.param] + tmp_path.name


@pytest.fixture(params=["local", AZURE])
def durable_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of storage that outlives a process."""
    if request.param == "local":
        return str(tmp_path / "store")
    request.getfixturevalue("azurite")
    return f"abfs://distillery/{tmp_path.name}"


@pytest.fixture
def store(url: str, tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(url, cache=tmp_path / "cache")


def one_line(error: DistilleryError) -> str:
    text = str(error)
    assert "\n" not in text
    assert ACCOUNT_KEY not in text + str(error.__cause__)
    assert len(text) < 300
    return text


def fetched(store: ArtifactStore, artifact: Artifact, tmp_path: Path) -> Path:
    """As another machine does: without what is in this one's cache."""
    return ArtifactStore(store.url, cache=tmp_path / f"cache-{time.monotonic_ns()}").fetch(artifact)


def test_what_goes_in_comes_out(store: ArtifactStore, folder: Path) -> None:
    artifact = store.put(folder)
    content = store.fetch(artifact)
    assert (content / "a.txt").read_text() == "one"
    assert (content / "deep" / "b.bin").stat().st_size == 3 * MIB
    assert artifact.bytes == 3 + 3 * MIB
    assert sorted(p.name for p in content.rglob("*") if p.is_file()) == ["a.txt", "b.bin", "empty"]
    assert store.fetch(artifact) == content
    assert [entry.path for entry in store.files(artifact.sha256)] == [
        "a.txt",
        "deep/b.bin",
        "empty",
    ]


def test_equal_content_has_one_digest_and_is_written_once(
    store: ArtifactStore, folder: Path
) -> None:
    first = store.put(folder)
    before = store.storage.find()
    assert store.put(folder) == first
    assert store.storage.find() == before
    (folder / "a.txt").write_text("two")
    assert store.put(folder).sha256 != first.sha256


def test_an_unknown_artifact_is_damaged(store: ArtifactStore) -> None:
    nowhere = Artifact(uri=f"{store.url}/x", sha256="0" * 64, bytes=1)
    assert not store.holds(nowhere)
    with pytest.raises(ArtifactDamaged, match="run its stage again"):
        store.fetch(nowhere)


def remove(storage: Storage, name: str) -> None:
    (file,) = (file for file in storage.find() if file.name == name)
    assert storage.remove(file)


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "remove", "no manifest", "other manifest", "half manifest"]
)
def test_damage_is_noticed_and_mended_by_storing_again(
    store: ArtifactStore, folder: Path, tmp_path: Path, damage: str
) -> None:
    artifact = store.put(folder)
    file, manifest = f"{artifact.sha256}/files/deep/b.bin", f"{artifact.sha256}/{MANIFEST}"
    if damage == "flip":
        store.storage.write(file, b"\x01" + bytes(3 * MIB - 1))
    elif damage == "cut":
        store.storage.write(file, bytes(100))
    elif damage == "remove":
        remove(store.storage, file)
    elif damage == "no manifest":
        remove(store.storage, manifest)
    elif damage == "other manifest":
        store.storage.write(manifest, b'{"files": []}')
    else:
        store.storage.write(manifest, store.storage.read(manifest)[:40])
    # Of object storage only reading shows what has the right size; the reader sees to it that no
    # other one is misled.
    only_reading_shows = damage == "flip" and not store.storage.is_local
    assert store.holds(artifact) == only_reading_shows
    with pytest.raises(ArtifactDamaged, match="run its stage again"):
        fetched(store, artifact, tmp_path)
    assert not store.holds(artifact)
    assert store.put(folder) == artifact
    assert store.holds(artifact)
    assert (fetched(store, artifact, tmp_path) / "deep" / "b.bin").read_bytes() == bytes(3 * MIB)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="empty folder"):
        ArtifactStore(str(tmp_path / "store")).put(tmp_path / "empty")


def test_a_manifest_can_not_name_a_file_outside(store: ArtifactStore, folder: Path) -> None:
    artifact = store.put(folder)
    manifest = f"{artifact.sha256}/{MANIFEST}"
    store.storage.write(manifest, store.storage.read(manifest).replace(b"a.txt", b"../a.txt"))
    with pytest.raises(ArtifactDamaged, match="outside the folder"):
        store.fetch(artifact)


KILLED = """
import os, sys, signal
from pathlib import Path
from distillery.storage.files import Storage
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.manifest import MANIFEST

when, url, folder, checkpoint = sys.argv[1:]
upload, uploads = Storage.upload, []

def dies_uploading(storage, source, name):
    if len(uploads) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    uploads.append(name)
    upload(storage, source, name)

def dies_at_the_end(storage, name, content):
    assert name.endswith(MANIFEST)
    os.kill(os.getpid(), signal.SIGKILL)

if when == "in the middle":
    Storage.upload = dies_uploading
else:
    Storage.write = Storage.create = dies_at_the_end
store = ArtifactStore(url)
store.save_checkpoint(checkpoint, Path(folder)) if checkpoint else store.put(Path(folder))
"""


def kill_a_writer(when: str, url: str, folder: Path, checkpoint: str = "") -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, when, url, str(folder), checkpoint])
    assert killed.returncode == -signal.SIGKILL


WHEN = pytest.mark.parametrize("when", ["in the middle", "before the manifest"])


@WHEN
def test_a_writer_killed_leaves_nothing_that_counts(
    durable_url: str, folder: Path, tmp_path: Path, when: str
) -> None:
    kill_a_writer(when, durable_url, folder)
    store = ArtifactStore(durable_url)
    half = store.storage.find()
    assert len([file for file in half if "/files/" in file.name]) == (
        1 if when == "in the middle" else 3
    )
    artifact = ArtifactStore(str(tmp_path / "another")).put(folder)
    assert not store.holds(artifact)
    with pytest.raises(ArtifactDamaged):
        store.fetch(artifact)
    assert store.put(folder).sha256 == artifact.sha256
    assert store.holds(artifact)
    assert (store.fetch(artifact) / "deep" / "b.bin").read_bytes() == bytes(3 * MIB)


@WHEN
def test_a_kill_while_saving_leaves_the_checkpoint_before(
    durable_url: str, folder: Path, tmp_path: Path, when: str
) -> None:
    store = ArtifactStore(durable_url)
    store.save_checkpoint("train-1", folder)
    (folder / "a.txt").write_text("two")
    kill_a_writer(when, durable_url, folder, "train-1")
    assert loaded(store, "train-1", tmp_path / "first") == "one"
    (folder / "a.txt").write_text("three")
    store.save_checkpoint("train-1", folder)
    assert loaded(store, "train-1", tmp_path / "second") == "three"
    assert {file.name.split("/")[2][:6] for file in store.storage.find("work/train-1")} == {
        "000003"
    }


def loaded(store: ArtifactStore, key: str, into: Path) -> str | None:
    into.mkdir()
    if not store.load_checkpoint(key, into):
        assert list(into.iterdir()) == []
        return None
    assert [path.name for path in into.parent.glob(".writing-*")] == []
    assert (into / "deep" / "b.bin").stat().st_size == 3 * MIB
    return (into / "a.txt").read_text()


def test_checkpoints(store: ArtifactStore, folder: Path, tmp_path: Path) -> None:
    assert loaded(store, "train-1", tmp_path / "none") is None
    store.save_checkpoint("train-1", folder)
    store.save_checkpoint("train-10", folder)
    (folder / "a.txt").write_text("two")
    store.save_checkpoint("train-1", folder)
    assert loaded(store, "train-1", tmp_path / "newest") == "two"
    assert loaded(store, "train-10", tmp_path / "other") == "one"
    store.drop_checkpoint("train-1")
    store.drop_checkpoint("train-1")
    assert loaded(store, "train-1", tmp_path / "dropped") is None
    assert {file.name.split("/")[1] for file in store.storage.find("work")} == {"train-10"}


def test_of_two_checkpoints_the_newest_whole_one_counts(
    store: ArtifactStore, folder: Path, tmp_path: Path
) -> None:
    store.save_checkpoint("train-1", folder)
    (old,) = {file.name.split("/")[2] for file in store.storage.find("work")}
    for file in store.storage.find(f"work/train-1/{old}"):
        name = file.name.replace(old, "000002-deadbeef")
        store.storage.write(name, store.storage.read(file.name).replace(b"one", b"two"))
    assert loaded(store, "train-1", tmp_path / "into") == "one"


def test_small_objects(store: ArtifactStore) -> None:
    store.write_object("results/deep/key", b"\x00one")
    store.write_object("results/deep/key", b"\x00two")
    assert store.read_object("results/deep/key") == b"\x00two"
    store.write_record("runs/demo-1.json", "{}")
    assert (
        store.read_record("runs/demo-1.json")
        == store.read_object("records/runs/demo-1.json").decode()
        == "{}"
    )
    assert [file.name for file in store.storage.find()] == [
        "records/runs/demo-1.json",
        "results/deep/key",
    ]
    with pytest.raises(ArtifactDamaged, match="none: not in the store; do both sides use one"):
        store.read_object("results/none")
    for name in ("../outside", "records/../../outside", "/outside"):
        with pytest.raises(StoreError, match="leads out of the store"):
            store.write_object(name, b"")


def test_only_what_was_not_touched_is_removed(durable_url: str) -> None:
    store = ArtifactStore(durable_url)
    store.write_object("deep/a", b"1")
    store.write_object("deep/b", b"2")
    listed = store.storage.find("deep")
    time.sleep(0.01)
    store.storage.touch("deep/b")
    assert not store.storage.remove(listed[1])
    assert store.read_object("deep/b") == b"2"
    assert not store.storage.remove_folder("deep", listed)
    assert store.read_object("deep/b") == b"2"
    assert store.storage.remove_folder("deep", store.storage.find("deep"))
    assert store.storage.find() == []
    with pytest.raises(FileNotFoundError):
        store.storage.touch("deep/b")
    assert store.storage.find() == []


@pytest.mark.parametrize("use", ["put", "holds", "fetch"])
def test_use_makes_an_old_artifact_new(folder: Path, tmp_path: Path, use: str) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    artifact = store.put(folder)
    manifest = tmp_path / "store" / artifact.sha256 / MANIFEST
    os.utime(manifest, (0, 0))
    getattr(store, use)(folder if use == "put" else artifact)
    assert datetime.now(UTC) - store.storage.modified(f"{artifact.sha256}/{MANIFEST}") < timedelta(
        minutes=1
    )


# --- two writers, large files
# ------------------------------------------------------------------------------------------------

PUT = """
import sys
from pathlib import Path
from distillery.storage.artifacts import ArtifactStore
store = ArtifactStore(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
artifact = store.put(Path(sys.argv[2]))
print(artifact.sha256, store.holds(artifact))
"""


def test_two_writers_at_once_make_one_whole_artifact(durable_url: str, tmp_path: Path) -> None:
    source = tmp_path / "large"
    source.mkdir()
    # More than goes in one request, so that its blocks come from both.
    (source / "weights").write_bytes(os.urandom(70 * MIB))
    (source / "config").write_text("{}")
    command = [sys.executable, "-c", PUT, durable_url, str(source)]
    pipe = subprocess.PIPE
    writers = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    answers = [writer.communicate(timeout=120) for writer in writers]
    artifact = ArtifactStore(str(tmp_path / "another")).put(source)
    assert [answer for answer, _ in answers] == [f"{artifact.sha256} True\n"] * 2, answers
    store = ArtifactStore(durable_url)
    names = [file.name for file in store.storage.find()]
    assert names == [
        f"{artifact.sha256}/{name}" for name in (MANIFEST, "files/config", "files/weights")
    ]
    assert (store.fetch(artifact) / "weights").read_bytes() == (source / "weights").read_bytes()


MEMORY = """
import sys
from pathlib import Path
from distillery.storage.artifacts import ArtifactStore

def peak():
    # Of this program alone; ru_maxrss would begin at what the process that started it had.
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

small, large = Path(sys.argv[2]), Path(sys.argv[3])
store = ArtifactStore(sys.argv[1])
store.fetch(store.put(small))
before = peak()
artifact = store.put(large)
up = peak()
store.fetch(artifact)
print(before, up - before, peak() - before)
"""


@pytest.mark.slow
def test_memory_stays_flat_however_large_a_file_is(
    azurite: Azurite, folder: Path, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.mkdir()
    for name, blocks in (("weights", 75), ("what one request could take", 15)):
        with (large / name).open("wb") as file:
            for _ in range(blocks):
                file.write(os.urandom(4 * MIB))
    command = [
        sys.executable,
        "-c",
        MEMORY,
        f"abfs://distillery/{tmp_path.name}",
        str(folder),
        str(large),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, up, down = map(float, done.stdout.split())
    print(f"360 MiB: {up:.0f} MiB more than {before:.0f} up, {down:.0f} down")
    assert max(up, down) < 150


# --- outages
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_outage_in_the_midst_of_writing_is_waited_out(
    own_azurite: Azurite, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "many"
    source.mkdir()
    for number in range(300):
        (source / f"{number:03d}").write_bytes(os.urandom(20_000))
    store = ArtifactStore("abfs://distillery/store", cache=tmp_path / "cache")
    found: list[Artifact] = []
    writer = threading.Thread(target=lambda: found.append(store.put(source)))
    writer.start()
    while len(ArtifactStore(store.url).storage.find()) < 10:
        time.sleep(0.01)
    own_azurite.stop()
    time.sleep(4)
    assert writer.is_alive()
    assert found == []
    restarted = time.monotonic()
    own_azurite.start()
    writer.join(60)
    print(f"whole {time.monotonic() - restarted:.1f} s after the store's return")
    assert "abfs://distillery/store: Connection refused; trying again for up to 90 s" in caplog.text
    assert len(list(store.fetch(found[0]).iterdir())) == 300


@pytest.mark.slow
def test_a_longer_outage_is_one_clear_line(
    own_azurite: Azurite, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_STORE_WAIT", "3")
    store = ArtifactStore("abfs://distillery/store", cache=tmp_path / "cache")
    artifact = store.put(folder)
    own_azurite.stop()
    for operation in (
        lambda: store.put(folder),
        lambda: store.fetch(artifact),
        lambda: store.save_checkpoint("key", folder),
    ):
        start = time.monotonic()
        with pytest.raises(StoreUnavailable) as caught:
            operation()
        assert one_line(caught.value) == (
            "abfs://distillery/store: the store has not answered for 3 s (Connection refused); "
            "try again later"
        )
        assert 1 < time.monotonic() - start < 8


class Answers(http.server.BaseHTTPRequestHandler):
    """Gives the statuses of `coming`, then 404."""

    coming: list[int]

    def do_HEAD(self) -> None:
        self.send_response(self.coming.pop() if self.coming else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Answers]]:
    """A blob service that answers as a test wants."""
    handler = type("Handler", (Answers,), {"coming": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lead_to(Azurite(Path(), port=server.server_address[1]), monkeypatch)
        yield handler
        server.shutdown()


NOWHERE = Artifact(uri="", sha256="0" * 64, bytes=1)


@pytest.mark.parametrize("status", [408, 412, 429, 500, 503])
def test_what_passes_by_itself_is_waited_for(answers: type[Answers], status: int) -> None:
    answers.coming = [status] * 3
    assert not ArtifactStore("abfs://distillery/store").holds(NOWHERE)
    assert answers.coming == []


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (400, StoreError, "the store refuses (400); correct DISTILLERY_STORE"),
        (401, CredentialsError, "access is refused (401); correct the AZURE_STORAGE_* settings"),
        (403, CredentialsError, "access is refused (403); correct the AZURE_STORAGE_* settings"),
    ],
)
def test_what_does_not_pass_fails_at_once(
    answers: type[Answers], status: int, kind: type[DistilleryError], said: str
) -> None:
    answers.coming = [status] * 9
    with pytest.raises(kind) as caught:
        ArtifactStore("abfs://distillery/store").holds(NOWHERE)
    assert said in one_line(caught.value)
    assert len(answers.coming) == 8


@pytest.mark.parametrize("silence", ["refused", "none answers"])
def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch, silence: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1] if silence == "none answers" else free_port()
        lead_to(Azurite(Path(), port=port), monkeypatch)
        store = ArtifactStore("abfs://distillery/store", wait_s=1)
        # In place of half a minute.
        transport = store.storage.filesystem.service_client._pipeline._transport
        transport.connection_config.read_timeout = 1
        start = time.monotonic()
        with pytest.raises(StoreUnavailable, match="has not answered for 1 s"):
            store.holds(NOWHERE)
        assert time.monotonic() - start < 20


@pytest.mark.slow
def test_a_missing_container_is_one_clear_line(azurite: Azurite, folder: Path) -> None:
    store = ArtifactStore("abfs://typo/store")
    assert not store.holds(NOWHERE)
    for operation in (lambda: store.put(folder), lambda: store.write_object("results/key", b"")):
        with pytest.raises(StoreError) as caught:
            operation()
        assert one_line(caught.value) == (
            "abfs://typo/store: there is no such container; create it, or correct DISTILLERY_STORE"
        )


@pytest.mark.slow
def test_a_wrong_key_is_one_clear_line(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = azurite.connection_string.replace(ACCOUNT_KEY, "d3Jvbmc=")
    lead_to(azurite, monkeypatch)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", wrong)
    with pytest.raises(CredentialsError, match=r"access is refused \(403") as caught:
        ArtifactStore("abfs://distillery/store").holds(NOWHERE)
    assert "d3Jvbmc=" not in one_line(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "; name the account in the URL, or correct AZURE_STORAGE_CONNECTION_STRING"),
        (
            {"AZURE_STORAGE_CONNECTION_STRING": "AccountKey=hidden"},
            "; name the account in the URL, or correct AZURE_",
        ),
        (
            {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT},
            "no key and no Azure login; run `az login`, or set AZURE_STORAGE_",
        ),
    ],
)
def test_missing_credentials_are_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], said: str
) -> None:
    # Of the ways to log in, the one that asks nobody.
    for name, value in {**settings, "AZURE_TOKEN_CREDENTIALS": "EnvironmentCredential"}.items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    with pytest.raises(DistilleryError) as caught:
        ArtifactStore("abfs://distillery/store").holds(NOWHERE)
    assert said in one_line(caught.value)
    assert "hidden" not in str(caught.value)
    assert time.monotonic() - start < 10


LOGIN = """
import socket, sys
from pathlib import Path
from azure_ml_stand_in import resolve_localhost
socket.getaddrinfo = resolve_localhost(socket.getaddrinfo)
from distillery.storage.artifacts import ArtifactStore
store = ArtifactStore(sys.argv[1])
print(len(list(store.fetch(store.put(Path(sys.argv[2]))).iterdir())))
"""


@pytest.mark.slow
def test_without_a_key_the_azure_login_is_taken(folder: Path, tmp_path: Path) -> None:
    from azure_ml_stand_in import AzureMLStandIn, make_certificate

    certificate = make_certificate(tmp_path)
    (tmp_path / "azurite").mkdir()
    login = AzureMLStandIn(blob_port=0, secrets=None)
    with Azurite(tmp_path / "azurite", certificate) as azurite, login.running(certificate):
        from azure.storage.blob import ContainerClient

        with ContainerClient.from_connection_string(
            azurite.connection_string, "distillery", connection_verify=str(certificate.cert)
        ) as container:
            container.create_container()
        url = f"abfs://distillery@{ACCOUNT}.blob.localhost:{azurite.port}/store"
        environment = os.environ | {
            "SSL_CERT_FILE": str(certificate.cert),
            "PYTHONPATH": str(TESTS),
        }
        environment |= {
            name: value
            for name, value in login.environment(certificate).items()
            if "IDENTITY" in name
        }
        command = [sys.executable, "-c", LOGIN, url, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_an_unknown_protocol_is_one_clear_line() -> None:
    with pytest.raises(StoreError, match="DISTILLERY_STORE nothing://…: "):
        ArtifactStore("nothing://somewhere")


def test_settings_that_are_no_numbers_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_CACHE_GB", "much")
    with pytest.raises(
        DistilleryError,
        match=r"^DISTILLERY_CACHE_GB: .*valid number.*; correct it in the environment",
    ):
        LocalSettings()


# --- the cache
# ------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from distillery.storage.cache import Cache
Cache(Path(sys.argv[1]), 0).hold(sys.argv[2])
print("held", flush=True)
time.sleep(600)
"""


def entry(cache: Path, letter: str, used: int) -> Path:
    folder = cache / (letter * 64)
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "weights").write_bytes(bytes(1000))
    os.utime(folder, (used, used))
    return folder


def test_the_least_recently_used_goes_first_but_none_in_use(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    oldest, old, new = entry(cache, "a", 1), entry(cache, "b", 2), entry(cache, "c", 3)
    command = [sys.executable, "-c", HOLD, str(cache), oldest.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as user:
        try:
            assert user.stdout is not None
            assert user.stdout.readline() == "held\n"
            # It has become the newest, and stays in use when it is the oldest again.
            os.utime(oldest, (1, 1))
            Cache(cache, 3000).make_room(0)
            assert (oldest.exists(), old.exists(), new.exists()) == (True, True, True)
            Cache(cache, 3000).make_room(1)
            assert (oldest.exists(), old.exists(), new.exists()) == (True, False, True)
            Cache(cache, 0).make_room(0)
            assert (oldest.exists(), new.exists()) == (True, False)
        finally:
            user.kill()
    Cache(cache, 0).make_room(0)
    assert not oldest.exists()


def test_a_process_does_not_evict_what_it_holds_itself(tmp_path: Path) -> None:
    held, free = entry(tmp_path, "a", 1), entry(tmp_path, "b", 2)
    Cache(tmp_path, 0).hold(held.name)
    Cache(tmp_path, 0).make_room(0)
    assert (held.exists(), free.exists()) == (True, False)


def test_a_copy_stays_until_the_last_of_its_users_is_gone(tmp_path: Path) -> None:
    folder = entry(tmp_path, "a", 1)
    command = [sys.executable, "-c", HOLD, str(tmp_path), folder.name]
    users = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for user in users:
            assert user.stdout is not None
            assert user.stdout.readline() == "held\n"
        users[0].kill()
        users[0].wait()
        Cache(tmp_path, 0).make_room(0)
        assert folder.exists()
    finally:
        for user in users:
            user.kill()
            with user:
                user.wait()
    Cache(tmp_path, 0).make_room(0)
    assert not folder.exists()
    assert list((tmp_path / "locks").glob("*.use-*")) == [], "killed users' files are removed"


def test_what_a_killed_reader_left_is_evicted_too(tmp_path: Path) -> None:
    left = entry(tmp_path, "a", 1).rename(tmp_path / f"{'a' * 64}.reading-x")
    Cache(tmp_path, 0).make_room(0)
    assert not left.exists()


FETCH = """
import sys
from distillery.records import Artifact
from distillery.storage.artifacts import ArtifactStore
store = ArtifactStore(sys.argv[1])
for digest in sys.argv[2:]:
    store.fetch(Artifact(uri="", sha256=digest, bytes=0))
"""


@pytest.mark.slow
def test_the_cache_of_a_remote_store_keeps_to_its_limit(
    azurite: Azurite, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"abfs://distillery/{tmp_path.name}"
    digests = []
    for number in range(4):
        source = tmp_path / str(number)
        source.mkdir()
        (source / "weights").write_bytes(bytes([number]) * 1_000_000)
        digests.append(ArtifactStore(url).put(source).sha256)
    monkeypatch.setenv("DISTILLERY_CACHE_GB", "0.0025")

    def cached_after(*numbers: int) -> list[int]:
        subprocess.run(
            [sys.executable, "-c", FETCH, url, *(digests[number] for number in numbers)], check=True
        )
        return [number for number in range(4) if (home / "cache" / digests[number]).exists()]

    assert cached_after(0) == [0]
    assert cached_after(1) == [0, 1]
    assert cached_after(0) == [0, 1]
    assert cached_after(2) == [0, 2]
    assert cached_after(1, 2, 3) == [1, 2, 3], "none that this one process was given may go"


def test_a_damaged_copy_in_the_cache_is_fetched_anew(folder: Path, tmp_path: Path) -> None:
    store = ArtifactStore(f"memory://{tmp_path.name}", cache=tmp_path / "cache")
    artifact = store.put(folder)
    (store.fetch(artifact) / "a.txt").write_text("two")
    assert (store.fetch(artifact) / "a.txt").read_text() == "one"


def test_one_bad_read_takes_nothing_from_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared artifact counts as damaged, and is made again, if two reads in a row are bad."""
    store = ArtifactStore(f"memory://{tmp_path.name}", cache=tmp_path / "cache")
    artifact = store.put(folder)
    download = Storage.download
    damaged: list[str] = []

    def damages_once(storage: Storage, name: str, target: Path) -> None:
        download(storage, name, target)
        if not damaged:
            damaged.append(name)
            target.write_bytes(b"\x01" * target.stat().st_size)

    monkeypatch.setattr(Storage, "download", damages_once)
    assert (store.fetch(artifact) / "a.txt").read_text() == "one"
    assert len(damaged) == 1
    assert store.holds(artifact)


# --- disks
# ------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_clear_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distillery.storage.working.shutil.copyfile", full)
    with pytest.raises(StoreError, match="the disk is full; free some space"):
        ArtifactStore(str(tmp_path / "store")).put(folder)


def write(target: Path) -> None:
    target.write_bytes(b"1")


def copy(target: Path) -> None:
    # shutil.Error, a list of what failed, without an errno.
    (target.parent / "source").mkdir()
    (target.parent / "source" / target.name).write_bytes(b"1")
    shutil.copytree(target.parent / "source", target.parent, dirs_exist_ok=True)


def save(target: Path) -> None:
    raise RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fill", [write, copy, save])
def test_a_working_folder_says_in_one_line_that_the_disk_is_full(
    fill: Callable[[Path], None], home: Path
) -> None:
    def fill_it() -> None:
        with working_folder("test") as folder:
            (folder / "file").symlink_to("/dev/full")
            fill(folder / "file")

    with pytest.raises(
        StoreError, match=r"the disk is full .*; free some space or move DISTILLERY_HOME"
    ) as caught:
        fill_it()
    assert str(caught.value).startswith(f"{home / 'work'}: ")
    assert list((home / "work").iterdir()) == []


def test_a_working_folder_leaves_other_errors_as_they_are() -> None:
    with pytest.raises(FileNotFoundError), working_folder("test") as folder:
        (folder / "none").read_bytes()
