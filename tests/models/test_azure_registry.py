"""Base models of an Azure ML registry: which files are taken from where, and a download that goes
on after whatever ends it.

The slow tests ask the real MLClient, azure-storage-blob and real Azurite, through a proxy that
cuts connections (azure_registry_stand_in.py)."""

import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
from azure.core.exceptions import HttpResponseError, ServiceRequestError
from azure_ml_stand_in import resolve_localhost
from azure_registry_stand_in import (
    LAYOUTS,
    TRANSFORMERS,
    Proxy,
    RegistryStandIn,
    in_layout,
    upload,
)
from azurite_server import Certificate
from tenacity import wait_none

from distillery.errors import (
    CredentialsError,
    DistilleryError,
    ModelUnavailable,
    RecipeError,
    TrainingError,
)
from distillery.models import azure_registry
from distillery.models.azure_registry import (
    AzureModel,
    download,
    downloaded_folder,
    fetch_small_files,
    parse_azureml,
    placed,
)
from distillery.models.base import base_folder, local_config, local_copy
from distillery.models.inspect import parameter_count, parameters_of_config
from distillery.recipe import BaseModelRecipe

TinyModel = Callable[[str], Path]
MODEL = AzureModel("azureml", "Tiny", "3")
URL = "azureml://registries/azureml/models/Tiny/versions/3"


def text_of(files: Mapping[str, bytes]) -> Callable[[str], str]:
    return lambda name: files[name].decode()


FILES = {"config.json": b"{}", "model.safetensors": b"w" * 50, "tokenizer.json": b"[]"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_parts_of_each_layout_come_together(layout: str) -> None:
    held = in_layout(layout, FILES)
    found = placed(tuple(held), text_of(held), "Tiny")
    assert {path: held[name] for path, name in found.items()} == FILES


def test_the_tokenizers_own_files_win_and_code_comes_along() -> None:
    held = in_layout("components", FILES)
    held["mlflow_model_folder/model/tokenizer.json"] = b"of the model"
    held["mlflow_model_folder/model/own_code.py"] = b""
    held["mlflow_model_folder/model/sub/more.json"] = b""
    found = placed(tuple(held), text_of(held), "Tiny")
    assert found["tokenizer.json"] == "mlflow_model_folder/components/tokenizer/tokenizer.json"
    assert set(found) == {*FILES, "own_code.py", "sub/more.json"}


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ({"a/MLmodel": b"flavors: {sklearn: {}}"}, "its MLmodel names the flavours sklearn, none"),
        ({"a/MLmodel": b"[:"}, "its MLmodel names the flavours -, none of hftransformersv2"),
        ({"a/MLmodel": TRANSFORMERS.encode(), "a/config.json": b""}, "has no config.json where"),
        ({"a/model.onnx": b""}, "has no config.json where Transformers models have it"),
        ({"config.json": b"", "../x.json": b""}, r"the file \.\./x\.json leads out"),
    ],
)
def test_what_transformers_can_not_load_is_refused(held: dict[str, bytes], text: str) -> None:
    with pytest.raises(TrainingError, match=text):
        placed(tuple(held), text_of(held), "Tiny")


class Blobs:
    """A container in memory. `fail` is asked before each read, `fail_listing` when the blobs are
    listed; both may raise."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.read: list[tuple[str, int, int]] = []
        self.md5 = {name: hashlib.md5(content).digest() for name, content in files.items()}
        self.fail: Callable[[int], None] = lambda _count: None
        self.fail_listing: Callable[[int], None] = lambda _count: None
        self.listed = 0
        self.opened = 0

    def open(self, _model: AzureModel) -> "tuple[Blobs, str]":
        self.opened += 1
        return self, ""

    def list_blobs(self, **_options: Any) -> Iterator[Any]:
        self.listed += 1
        for name, content in self.files.items():
            settings = SimpleNamespace(content_md5=self.md5[name])
            yield SimpleNamespace(
                name=name, size=len(content), content_settings=settings, metadata=None
            )
            self.fail_listing(self.listed)
        yield SimpleNamespace(
            name="sub",
            size=0,
            content_settings=SimpleNamespace(content_md5=None),
            metadata={"hdi_isfolder": "true"},
        )

    def download_blob(self, name: str, offset: int, length: int, max_concurrency: int) -> Any:
        self.read.append((name, offset, length))
        self.fail(len(self.read))
        content = self.files[name][offset : offset + length]
        return SimpleNamespace(readall=lambda: content)


@pytest.fixture
def blobs(monkeypatch: pytest.MonkeyPatch) -> Blobs:
    """A model whose weights are read in five ranges."""
    held = Blobs(FILES)
    monkeypatch.setattr(azure_registry, "open_storage", held.open)
    monkeypatch.setattr(azure_registry, "RANGE", 10)
    monkeypatch.setattr(azure_registry, "CHUNK", 5)
    monkeypatch.setattr(azure_registry, "BACKOFF", wait_none())
    return held


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_download_is_whole_or_not_there(blobs: Blobs, home: Path) -> None:
    told = []
    assert local_copy(BaseModelRecipe(model=URL)) is None
    folder = download(MODEL, lambda done, of, text: told.append((done, of, text)))
    assert folder == MODEL.folder == local_copy(BaseModelRecipe(model=URL))
    assert folder.parent == home / "models"
    assert content(folder) == FILES
    assert told[-1] == (54, 54, "download of Tiny")
    assert [done for done, _, _ in told] == [2, 4, 14, 24, 34, 44, 54]
    reads = len(blobs.read)
    assert download(MODEL) == folder
    assert (len(blobs.read), blobs.opened) == (reads, 1)


def test_config_and_tokenizer_come_first(blobs: Blobs) -> None:
    base = BaseModelRecipe(model=URL)
    assert local_config(base) is None
    assert fetch_small_files(MODEL) == 50
    assert content(MODEL.unfinished) == {k: v for k, v in FILES.items() if len(v) < 50}
    assert (local_copy(base), local_config(base)) == (None, MODEL.unfinished)
    blobs.read.clear()
    download(MODEL)
    assert blobs.read == [("model.safetensors", at, 10) for at in range(0, 50, 10)]
    assert local_config(base) == MODEL.folder


def test_a_model_without_safetensors_is_refused_before_it_is_downloaded(blobs: Blobs) -> None:
    del blobs.files["model.safetensors"]
    with pytest.raises(TrainingError, match=r"Tiny version 3 .* has no \.safetensors"):
        fetch_small_files(MODEL)
    assert not blobs.read


def test_what_ends_in_the_middle_goes_on_where_it_was(blobs: Blobs) -> None:
    def interrupt(count: int) -> None:
        if count == 5:
            raise KeyboardInterrupt

    blobs.fail = interrupt
    with pytest.raises(KeyboardInterrupt):
        download(MODEL)
    assert not MODEL.folder.exists()
    assert len(content(MODEL.unfinished)["model.safetensors.part"]) == 20
    blobs.read.clear()
    blobs.fail = lambda _count: None
    assert content(download(MODEL)) == FILES
    assert blobs.read == [("model.safetensors", at, 10) for at in (20, 30, 40)]


def test_an_outage_is_waited_out(blobs: Blobs, caplog: pytest.LogCaptureFixture) -> None:
    def fail(count: int) -> None:
        if count in (3, 4, 6):
            raise ServiceRequestError("https://storage/?sig=secret")

    blobs.fail = fail
    assert content(download(MODEL)) == FILES
    assert blobs.read.count(("model.safetensors", 0, 10)) == 3
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 2
    assert "does not answer (ServiceRequestError); trying again" in told[0]
    assert "secret" not in caplog.text


def test_a_listing_that_breaks_off_is_asked_again(blobs: Blobs) -> None:
    def fail(count: int) -> None:
        if count < 3:
            raise ServiceRequestError("https://storage/?sig=secret")

    blobs.fail_listing = fail
    assert content(download(MODEL)) == FILES
    assert blobs.listed == 3


def test_a_long_outage_ends_the_run_and_keeps_what_is_there(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(count: int) -> None:
        if count > 4:
            raise ServiceRequestError("https://storage/?sig=secret")

    monkeypatch.setenv("DISTILLERY_STORE_WAIT", "0.1")
    monkeypatch.setattr(azure_registry, "BACKOFF", lambda _state: 0.02)
    blobs.fail = fail
    with pytest.raises(ModelUnavailable, match="run again, and the download goes on") as found:
        download(MODEL)
    assert "secret" not in str(found.value)
    assert found.value.__cause__ is None
    assert len(content(MODEL.unfinished)["model.safetensors.part"]) == 20


def test_a_damaged_file_is_not_kept(blobs: Blobs) -> None:
    blobs.md5["model.safetensors"] = b"0" * 16
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors was damaged on the way"):
        download(MODEL)
    assert not MODEL.folder.exists()
    assert "model.safetensors.part" not in content(MODEL.unfinished)
    blobs.md5["model.safetensors"] = hashlib.md5(FILES["model.safetensors"]).digest()
    assert content(download(MODEL)) == FILES


def test_a_short_answer_counts_as_an_outage(blobs: Blobs) -> None:
    whole = blobs.files["model.safetensors"]

    def fail(count: int) -> None:
        # The second of the weights' ranges comes short, once.
        blobs.files["model.safetensors"] = whole[:15] if count == 4 else whole

    blobs.fail = fail
    assert content(download(MODEL)) == FILES
    assert blobs.read.count(("model.safetensors", 10, 10)) == 2


def test_a_key_that_has_run_out_is_renewed_once(blobs: Blobs) -> None:
    def refuse(status: int, *counts: int) -> Callable[[int], None]:
        def fail(count: int) -> None:
            if count in counts:
                error = HttpResponseError("sig=secret")
                error.status_code = status
                raise error

        return fail

    blobs.fail = refuse(403, 4)
    assert content(download(MODEL)) == FILES
    assert blobs.opened == 2
    other = AzureModel("azureml", "Tiny", "4")
    blobs.fail = refuse(403, *range(1000))
    with pytest.raises(CredentialsError, match=r"refuses the login \(403\): run `az login` again"):
        download(other)


def test_a_tree_of_an_earlier_version_is_replaced_if_it_lacks_its_tokenizer(
    blobs: Blobs, home: Path
) -> None:
    for name, held in in_layout("components", FILES).items():
        path = home / "models" / "azureml-Tiny-3" / "Tiny" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(held)
    base = BaseModelRecipe(model=URL)
    assert local_copy(base) is None
    weights = home / "models" / "azureml-Tiny-3" / "Tiny" / "mlflow_model_folder" / "model"
    (weights / "tokenizer.json").write_text("{}")
    assert local_copy(base) == weights
    (weights / "tokenizer.json").unlink()
    assert content(download(MODEL)) == FILES
    assert [path.name for path in (home / "models").iterdir() if path.name[0] != "."] == [
        MODEL.folder.name
    ]


def test_models_whose_names_are_parted_elsewhere_lie_apart(blobs: Blobs, home: Path) -> None:
    ours, theirs = AzureModel("azureml", "meta-X", "1"), AzureModel("azureml-meta", "X", "1")
    earlier = home / "models" / "azureml-meta-X-1"
    earlier.mkdir(parents=True)
    (earlier / "config.json").write_text("{}")
    assert (downloaded_folder(ours), downloaded_folder(theirs)) == (None, None)
    assert ours.unfinished != theirs.unfinished
    assert content(download(ours)) == FILES
    assert (downloaded_folder(ours), downloaded_folder(theirs)) == (ours.folder, None)
    assert earlier.exists()


def test_a_full_disk_is_one_line(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_source: Any, _target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(DistilleryError, match="the disk is full; free some space"):
        download(MODEL)


@pytest.mark.parametrize(
    "url",
    [
        "azureml://registries/azureml/models/Tiny",
        "azureml://registries/azureml/models//versions/3",
        "azureml://registries/azureml/models/Tiny/labels/latest",
    ],
)
def test_an_address_of_another_form_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match="azureml://registries/REGISTRY/models/NAME"):
        parse_azureml(url)


@pytest.mark.parametrize("arch", ["llama", "phi4mini", "qwen3"])
def test_the_parameters_are_told_by_the_config_alone(
    arch: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model(arch) / "config.json").read_bytes())
    assert parameters_of_config(tmp_path) == parameter_count(tiny_model(arch))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of_nobody"}))
    assert parameters_of_config(tmp_path) is None


@pytest.fixture
def proxy(blob_port: int) -> Iterator[Proxy]:
    between = Proxy(blob_port)
    with between.running():
        yield between


@pytest.fixture
def registry(
    certificate: Certificate, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RegistryStandIn]:
    """A registry with no model yet."""
    stand_in = RegistryStandIn(blob_port=proxy.port, secrets=None, proxy_port=proxy.port)
    monkeypatch.setattr(socket, "getaddrinfo", resolve_localhost(socket.getaddrinfo))
    for name in ("AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_CLIENT_SECRET"):
        monkeypatch.delenv(name, raising=False)
    with stand_in.running(certificate):
        for name, value in stand_in.environment(certificate).items():
            monkeypatch.setenv(name, value)
        yield stand_in


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_through_the_real_sdk(
    layout: str,
    registry: RegistryStandIn,
    blob_port: int,
    tiny_model: TinyModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from azure.ai.ml import MLClient
    from azure.identity import DefaultAzureCredential

    from distillery.models.load import load_model

    original = tiny_model("phi4mini")
    files = {path.name: path.read_bytes() for path in original.iterdir()}
    held = in_layout(layout, files)
    upload(blob_port, f"models/{layout}", held)
    # A neighbour whose name begins the same.
    upload(blob_port, f"models/{layout}-2", {"config.json": b"{}"})
    registry.models["Tiny", "3"] = f"models/{layout}"
    registry.throttled = 1

    caplog.set_level(logging.INFO, "distillery")
    folder = base_folder(BaseModelRecipe(model=URL))
    assert content(folder) == files
    assert "downloading Tiny version 3 of the registry azureml, 0.00 of 0.00 GB" in caplog.text
    assert registry.asked == {"discovery": 1, "models": 1, "datarefs": 1}
    model, tokenizer = load_model(folder)
    same, _ = load_model(original)
    ids = tokenizer("Question", return_tensors="pt")["input_ids"]
    assert model(ids).logits.equal(same(ids).logits)

    # The stand-in answers as azure-ai-ml's own download expects: it gives the same bytes. (It takes
    # the neighbour for a part of the model.)
    client = MLClient(DefaultAzureCredential(), registry_name="azureml", enable_telemetry=False)
    client.models.download("Tiny", "3", str(tmp_path / "sdk"))
    got = {}
    for path in (tmp_path / "sdk").rglob("*"):
        if path.is_file():
            name = path.relative_to(tmp_path / "sdk" / "Tiny" / layout).as_posix()
            got[name] = path.read_bytes()
    assert got.pop("-2/config.json") == b"{}"
    assert got == held


WEIGHTS = os.urandom(6 << 20)
BIG = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": WEIGHTS}


@pytest.fixture
def big(
    registry: RegistryStandIn, blob_port: int, monkeypatch: pytest.MonkeyPatch
) -> RegistryStandIn:
    """A registry with a model of 6 MiB, which is read by ranges of 1 MiB."""
    monkeypatch.setattr(azure_registry, "RANGE", 1 << 20)
    monkeypatch.setattr(azure_registry, "CHUNK", 1 << 18)
    upload(blob_port, "models/big", in_layout("components", BIG))
    registry.models["Tiny", "3"] = "models/big"
    return registry


@pytest.mark.slow
def test_a_connection_that_is_cut_is_taken_up_again(
    big: RegistryStandIn, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    # caplog also holds what the SDK logs to itself: it listens to loggers that do not propagate.
    told: SimpleQueue[logging.LogRecord] = SimpleQueue()
    listener = QueueHandler(told)
    listener.setLevel(logging.WARNING)
    logging.getLogger().addHandler(listener)
    try:
        proxy.cut_after(3 << 20, away_s=4)
        assert content(download(MODEL)) == BIG
    finally:
        logging.getLogger().removeHandler(listener)
    # What was there is not sent again: at most the range that was under way, and TLS.
    assert 6 << 20 < proxy.sent < 8 << 20
    assert "the storage of Tiny version 3 of the registry azureml does not answer" in caplog.text
    names = {told.get().name for _ in range(told.qsize())}
    assert names == {"distillery.models.azure_registry"}


@pytest.mark.slow
def test_a_process_that_was_killed_is_taken_up_again(
    big: RegistryStandIn, proxy: Proxy, tmp_path: Path
) -> None:
    program = tmp_path / "download.py"
    program.write_text(
        "import socket\n"
        "from azure_ml_stand_in import resolve_localhost\n"
        "from distillery.models import azure_registry\n"
        "socket.getaddrinfo = resolve_localhost(socket.getaddrinfo)\n"
        "azure_registry.RANGE, azure_registry.CHUNK = 1 << 20, 1 << 18\n"
        f"azure_registry.download(azure_registry.parse_azureml({URL!r}))\n"
    )
    path = os.pathsep.join([".", "tests/support"])
    proxy.bytes_per_s = 2e6
    child = subprocess.Popen([sys.executable, str(program)], env=os.environ | {"PYTHONPATH": path})
    part = MODEL.unfinished / "model.safetensors.part"
    end = time.monotonic() + 60
    while time.monotonic() < end and not (part.exists() and part.stat().st_size >= 3 << 20):
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not MODEL.folder.exists()
    there = part.stat().st_size
    assert 3 << 20 <= there < 6 << 20

    proxy.bytes_per_s, sent = None, proxy.sent
    assert content(download(MODEL)) == BIG
    assert proxy.sent - sent < (6 << 20) - there + (1 << 19)


@pytest.mark.slow
def test_a_key_that_runs_out_in_the_middle(big: RegistryStandIn, proxy: Proxy) -> None:
    big.key_seconds, proxy.bytes_per_s = 2, 1.5e6
    assert content(download(MODEL)) == BIG
    assert big.asked["datarefs"] > 1


@pytest.mark.slow
def test_what_the_registry_lacks_or_refuses_is_one_line(
    registry: RegistryStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="there is no Tiny version 3 of the registry azureml"):
        fetch_small_files(MODEL)
    with pytest.raises(RecipeError, match="there is no Tiny version 3 of the registry other"):
        fetch_small_files(AzureModel("other", "Tiny", "3"))
    registry.status = 403
    with pytest.raises(CredentialsError, match="give the login the role AzureML Registry User"):
        fetch_small_files(MODEL)
    registry.status = 400
    with pytest.raises(TrainingError, match=r"refuses Tiny \(400"):
        fetch_small_files(MODEL)
    monkeypatch.delenv("IDENTITY_ENDPOINT")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "dev")
    with pytest.raises(CredentialsError, match="no Azure login for the registry azureml: run"):
        fetch_small_files(MODEL)
