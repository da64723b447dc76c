"""The folder for answers: what is written there is whole, whatever storage it is, and what can't be
written is one line. On a local folder, on fsspec's memory and on real Azurite."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from azurite_server import ACCOUNT_KEY, Azurite, free_port
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from distillery.errors import CredentialsError, DataError, DistilleryError, StoreUnavailable
from distillery.inference.shards import LINES_NAMES, PARQUET_NAMES
from distillery.settings import RUN_OF_A_WORKER
from distillery.storage.files import Storage
from distillery.storage.output import Output

SECRET = "the-secret-line"
MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_azure_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE")]:
        monkeypatch.delenv(name)
    # fsspec keeps its file systems by URL; in each test the server may be another.
    if adlfs := sys.modules.get("adlfs"):
        adlfs.AzureBlobFileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def shared_azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    from azure.storage.blob import ContainerClient

    with Azurite(tmp_path_factory.mktemp("azurite")) as azurite:
        with ContainerClient.from_connection_string(
            azurite.connection_string, "answers"
        ) as container:
            container.create_container()
        yield azurite


@pytest.fixture
def azurite(shared_azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> Azurite:
    for name, value in shared_azurite.environment.items():
        monkeypatch.setenv(name, value)
    return shared_azurite


AZURE = pytest.param("azure", marks=pytest.mark.slow)


@pytest.fixture(params=["local", "file", "memory", AZURE])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a folder that is not there yet."""
    if request.param == "azure":
        request.getfixturevalue("azurite")
    yield {
        "local": f"{tmp_path}/new/out",
        "file": f"file://{tmp_path}/new/out",
        "memory": f"memory://{tmp_path.name}/new/out",
        "azure": f"abfs://answers/{tmp_path.name}/new/out",
    }[request.param]
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def lines(tmp_path: Path) -> list[Path]:
    """The files of answers as lines, the last one last."""
    folder = tmp_path / "lines"
    folder.mkdir()
    (folder / "failed.jsonl").write_text("failed\n")
    (folder / "predictions.jsonl").write_text("predictions\n" * 100)
    return [folder / "failed.jsonl", folder / "predictions.jsonl"]


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "parts"
    folder.mkdir()
    files = [folder / f"answers-0000{number}.parquet" for number in range(3)]
    for file in [*files, folder / "manifest.json"]:
        file.write_text(file.name)
    return [*files, folder / "manifest.json"]


def filesystem(url: str) -> tuple[Any, str]:
    found: tuple[Any, str] = fsspec.url_to_fs(url, use_listings_cache=False)
    return found


def contents(url: str) -> dict[str, bytes]:
    files, root = filesystem(url)
    return {path.rpartition("/")[2]: files.cat_file(path) for path in files.find(root)}


def put(url: str, *names: str) -> None:
    """Have files there, as of other runs and users."""
    files, root = filesystem(url)
    if "abfs" not in url:
        files.makedirs(root, exist_ok=True)
    for name in names:
        files.pipe_file(f"{root}/{name}", b"earlier")


def one_line(error: DistilleryError) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 300
    for secret in (ACCOUNT_KEY, SECRET):
        assert secret not in text + str(error.__cause__)
    return text


def test_answers_replace_those_of_an_earlier_run_and_nothing_else(
    url: str, lines: list[Path], parts: list[Path]
) -> None:
    output = Output(url, "output")
    output.try_writing()
    assert contents(url) == {}
    output.replace(lines, LINES_NAMES)
    output.replace(parts, PARQUET_NAMES)
    written = {file.name: file.read_bytes() for file in (*lines, *parts)}
    assert contents(url) == written
    put(url, "answers-00009.parquet", "manifest.json", ".writing-answers-00001.parquet")
    own = ["own.txt", ".writing-notes.txt", ".writing-failed.jsonl"]
    put(url, *own)
    output.try_writing()
    output.replace(parts, PARQUET_NAMES)
    assert contents(url) == written | dict.fromkeys(own, b"earlier")


def test_a_folder_in_the_place_of_a_file_is_known_before_any_row_is_answered(
    tmp_path: Path,
) -> None:
    (tmp_path / "out" / "predictions.jsonl").mkdir(parents=True)
    assert refused(str(tmp_path / "out")) == (
        f"output {tmp_path}/out: predictions.jsonl is a folder there; move it away"
    )


def test_a_folder_in_which_another_run_writes_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = Storage.delete

    def joined(storage: Storage, name: str) -> None:
        delete(storage, name)
        (tmp_path / "out" / "predictions.jsonl").touch()

    monkeypatch.setattr(Storage, "delete", joined)
    Output(str(tmp_path / "out"), "output").try_writing()
    assert (tmp_path / "out" / "predictions.jsonl").exists()
    monkeypatch.undo()
    Output(str(tmp_path / "new"), "output").try_writing()
    assert not (tmp_path / "new").exists()


def test_the_last_file_is_removed_first_and_written_last(
    url: str, parts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output(url, "output")
    put(url, *(file.name for file in parts))
    storage: Any = output._storage
    steps = []

    def told(step: str) -> Any:
        real = getattr(storage, step)

        def call(*arguments: Any) -> None:
            steps.append((step, arguments[-1]))
            real(*arguments)

        return call

    for step in ("delete", "upload_whole"):
        monkeypatch.setattr(storage, step, told(step))
    output.replace(parts, PARQUET_NAMES)
    names = [file.name for file in parts]
    removed = [("delete", name) for name in (names[-1], *names[:-1])]
    assert steps == [*removed, *(("upload_whole", name) for name in names)]


def test_an_upload_that_breaks_leaves_nothing_that_looks_whole(
    url: str, lines: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output(url, "output")
    put(url, "predictions.jsonl", "failed.jsonl")
    files: Any = output._storage.filesystem
    put_file = files.put_file

    def breaks(source: str, path: str) -> None:
        if path.endswith("predictions.jsonl"):
            if "abfs" not in url:
                # An object store shows nothing of it.
                files.pipe_file(path, Path(source).read_bytes()[:100])
            raise RuntimeError(SECRET)
        put_file(source, path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "put_file", breaks)
        with pytest.raises(DataError, match=r"^output .*: can't be written \(RuntimeE") as caught:
            output.replace(lines, LINES_NAMES)
    assert "; the answers are in the artifact store" in one_line(caught.value)
    assert "predictions.jsonl" not in contents(url)
    assert contents(url)["failed.jsonl"] == b"failed\n"
    output.replace(lines, LINES_NAMES)
    assert contents(url) == {file.name: file.read_bytes() for file in lines}


KILLED = """
import io, os, shutil, signal, sys
from pathlib import Path
from distillery.inference.shards import LINES_NAMES
from distillery.storage.output import Output

class Dying(io.FileIO):
    "A file over which the process dies once 20 MiB of it are read."
    def read(self, size=-1):
        if self.tell() >= 20 << 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(size)

def dying(path, mode="r", *arguments, **options):
    if str(path).endswith("predictions.jsonl") and mode == "rb":
        return Dying(path)
    return io.open(path, mode, *arguments, **options)

shutil.open = dying
shutil._USE_CP_SENDFILE = False
if sys.argv[1].startswith("abfs"):
    import adlfs.spec
    adlfs.spec.open = dying
Output(sys.argv[1], "output").replace([Path(name) for name in sys.argv[2:]], LINES_NAMES)
"""


@pytest.fixture(params=["local", AZURE])
def durable_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of storage that outlives a process."""
    if request.param == "local":
        return str(tmp_path / "out")
    request.getfixturevalue("azurite")
    return f"abfs://answers/{tmp_path.name}"


def test_a_run_that_is_killed_in_an_upload_leaves_nothing_that_looks_whole(
    durable_url: str, lines: list[Path], request: pytest.FixtureRequest
) -> None:
    lines[-1].write_bytes(os.urandom(28 * MIB))
    put(durable_url, "predictions.jsonl", "failed.jsonl")
    command = [sys.executable, "-c", KILLED, durable_url, *map(str, lines)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    if "abfs" in durable_url:
        # A part of the file was there.
        assert request.getfixturevalue("azurite").requests(
            "PUT", "predictions.jsonl", "comp=block&"
        )
    left = contents(durable_url)
    assert left.pop("failed.jsonl") == b"failed\n"
    assert {*left} <= {".writing-predictions.jsonl"}
    output = Output(durable_url, "output")
    output.try_writing()
    output.replace(lines, LINES_NAMES)
    assert contents(durable_url) == {file.name: file.read_bytes() for file in lines}


# --- what can't be written
# ------------------------------------------------------------------------------------------------


def refused(url: str) -> str:
    """The line before any row is answered."""
    with pytest.raises(DistilleryError) as caught:
        Output(url, "output").try_writing()
    return one_line(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://data.example/out", "can only be read; name a local folder or an object store"),
        ("hf://datasets/org/name", "can only be read"),
        ("abfs://c@a.dfs.core.windows.net/out?sig=SECRET", "no folder has a ? or #"),
        ("nowhere://c/out", "output nowhere://…: Protocol not known: nowhere"),
        ("abfs://c::file:///out", "a URL with :: opens another one"),
        ("memory://", "names no folder; add a bucket or container, and a path"),
        ("abfs://", "names no folder; add a bucket or container, and a path"),
        ("memory://a/out[1]", "file systems take * and [ for a pattern; choose other names"),
    ],
)
def test_an_address_that_takes_no_answers_is_one_line(url: str, said: str) -> None:
    line = refused(url.replace("SECRET", SECRET))
    assert line.startswith("output")
    assert said in line


def test_a_file_in_the_way_or_a_closed_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert refused(str(tmp_path / "file")) == (
        f"output {tmp_path}/file: can't be written (File exists); correct output"
    )

    # The tests may run as root, who may write anywhere.
    def closed(*_arguments: Any, **_options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(LocalFileSystem, "makedirs", closed)
    assert refused(str(tmp_path / "out")) == (
        f"output {tmp_path}/out: not writable (Permission denied); set output to a folder that is"
    )


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (KeyError, "can't be written (KeyError); correct output"),
        # As the errors of requests are: of the system's kind, and without a number.
        (OSError, "OSError; set output to a folder that can be written"),
    ],
)
def test_what_a_file_system_says_is_not_repeated(
    kind: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_arguments: Any, **_options: Any) -> Any:
        raise kind(f"{SECRET}\nand more")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", fails)
    line = refused(f"memory://user:{SECRET}@host/out")
    assert line == f"output memory://user:…@host/out: {told}"


@pytest.mark.slow
def test_a_missing_container_is_one_line(azurite: Azurite) -> None:
    assert refused("abfs://typo/out") == (
        "output abfs://typo/out: there is no such container; create it, or correct output"
    )


@pytest.mark.slow
def test_a_refused_login_is_one_line(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = azurite.connection_string.replace(ACCOUNT_KEY, "d3Jvbmc=")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", wrong)
    with pytest.raises(CredentialsError) as caught:
        Output("abfs://answers/out", "output").try_writing()
    line = one_line(caught.value)
    assert line.startswith("output abfs://answers/out: access is refused (403")
    assert "correct the AZURE_STORAGE_* settings" in line


def test_an_object_store_that_does_not_answer_is_waited_for(
    lines: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DISTILLERY_STORE_WAIT", "1")
    for name, value in Azurite(Path(), port=free_port()).environment.items():
        monkeypatch.setenv(name, value)
    output = Output("abfs://answers/out", "output")
    with pytest.raises(StoreUnavailable) as caught:
        output.replace(lines, LINES_NAMES)
    assert one_line(caught.value) == (
        "output abfs://answers/out: the store has not answered for 1 s (Connection refused); "
        "try again later; the answers are in the artifact store"
    )
    assert "Connection refused; trying again for up to 1 s" in caplog.text


def test_answers_do_not_go_into_a_remote_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_STORE", "memory://store/distillery")
    assert "in the store, which holds" in refused("memory://store/distillery/out")
    Output("memory://store/out", "output").try_writing()


@pytest.mark.parametrize(
    "url", ["az://store/x/out", "abfss://store/x/out", "abfs://store@a.dfs.core.windows.net/x/out"]
)
def test_the_store_is_known_however_it_is_spelt(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_STORE", "abfs://store/x")
    assert "in the store, which holds" in refused(url)


@pytest.mark.security
def test_a_worker_writes_below_what_addresses_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_OF_A_WORKER, "6d2f6a0e-0000-4000-8000-000000000000")
    assert "this worker may not open it" in refused("memory://answers/out")
    monkeypatch.setenv("DISTILLERY_DATA_PROTOCOLS", "file,memory")
    assert "this worker may not write there; add what such" in refused("memory://answers/out")
    monkeypatch.setenv("DISTILLERY_DATA_PROTOCOLS", "file,memory://answers")
    Output("memory://answers/out", "output").try_writing()
    for other in ("memory://other/out", "memory://answers/../other", "memory://answers2"):
        assert "this worker may not open it" in refused(other)
    put("memory://answers/out", "predictions.jsonl", ".writing-failed.jsonl")
    Output("memory://answers/out", "output").try_writing()
    put("memory://answers/out", "rows.jsonl")
    assert "holds other files than answers; name a new folder" in refused("memory://answers/out")
    MemoryFileSystem.store.clear()


@pytest.mark.slow
def test_memory_stays_flat_however_large_a_file_is(azurite: Azurite, tmp_path: Path) -> None:
    large = tmp_path / "predictions.jsonl"
    with large.open("wb") as file:
        for _ in range(80):
            file.write(os.urandom(4 * MIB))
    code = (
        "import sys; from pathlib import Path\n"
        "from distillery.inference.shards import LINES_NAMES\n"
        "from distillery.storage.output import Output\n"
        "def peak():\n"
        "    status = Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(x for x in status if x.startswith('VmHWM')).split()[1]) / 1024\n"
        "output = Output(sys.argv[1], 'output')\n"
        "output.try_writing()\n"
        "before = peak()\n"
        "output.replace([Path(sys.argv[2])], LINES_NAMES)\n"
        "print(before, peak() - before)\n"
    )
    command = [sys.executable, "-c", code, "abfs://answers/large", str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, more = map(float, done.stdout.split())
    print(f"320 MiB: {more:.0f} MiB more than {before:.0f}")
    assert more < 100
