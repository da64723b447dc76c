"""Fixtures for all tests: a home for each test, and tiny random models that pass the whole chain in
seconds."""

import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from azure_ml_stand_in import make_certificate
from azurite_server import Azurite, Certificate
from postgres_server import Postgres
from prefect_api import OwnPrefect
from tenacity import wait_none
from tiny_model import build_tiny_model

from distillery.registry.local import LocalRegistry
from distillery.teacher.endpoint import Sdk

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with slow tests first, those of whole runs before all: a long file that begins
    last leaves the other worker idle. `make test-all` hands files out in this order."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent.name != "e2e"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DISTILLERY_HOME in a folder of this test's own."""
    folder = tmp_path / "home"
    monkeypatch.setenv("DISTILLERY_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True)
def subnormal_numbers() -> None:
    """Have the processor tell the smallest numbers from 0 again: training has it take them for 0,
    in its thread from then on, and hypothesis refuses to work so."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_flush_denormal(False)


@pytest.fixture
def earlier_home(home: Path) -> Path:
    """DISTILLERY_HOME, as a version of November 2026 left it: see golden/make_earlier.py."""
    packed = Path(__file__).parent / "golden" / "earlier" / "home.tar.xz"
    with tarfile.open(packed) as content:
        content.extractall(home.parent, filter="data")
    return home


@pytest.fixture(params=["azure-ai-inference", "openai"])
def sdk(request: pytest.FixtureRequest) -> Sdk:
    """Each of the two SDKs that ask a teacher, in turn."""
    name: Sdk = request.param
    return name


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that fail are tried again at once."""
    for module in ("asking", "batch"):
        monkeypatch.setattr(f"distillery.teacher.{module}.BACKOFF", wait_none())


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Of a label store of this test's own."""
    return f"sqlite:///{tmp_path / 'labels.db'}"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL server for all tests of this process that do not stop it."""
    with Postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: Postgres) -> Iterator[str]:
    """Of a database of this test's own."""
    with postgres_server.new_database() as url:
        yield url


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of a registry without models, to be copied: MLflow takes seconds to make its
    tables."""
    folder = tmp_path_factory.mktemp("empty-registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLERY_HOME", str(folder))
        LocalRegistry(f"sqlite:///{folder / 'registry.db'}").list()
    return folder / "registry.db"


@pytest.fixture(scope="module")
def registry_url(tmp_path_factory: pytest.TempPathFactory, empty_registry: Path) -> str:
    return f"sqlite:///{shutil.copy(empty_registry, tmp_path_factory.mktemp('registry'))}"


@pytest.fixture
def one_registry(monkeypatch: pytest.MonkeyPatch, registry_url: str) -> None:
    """One registry for all tests of a module."""
    monkeypatch.setenv("DISTILLERY_REGISTRY", registry_url)


@pytest.fixture
def own_registry(home: Path, empty_registry: Path) -> None:
    """A registry of this test's own, in its home."""
    home.mkdir()
    shutil.copy(empty_registry, home)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnPrefect]:
    """A Prefect server for all tests of this process: it takes ten seconds to start."""
    with OwnPrefect(tmp_path_factory.mktemp("prefect-server")) as server:
        yield server


@pytest.fixture
def prefect_api(prefect_server: OwnPrefect) -> Iterator[None]:
    """Flows that run in this process do so on the server."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: prefect_server.url}):
        yield


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """Of a service of Azure that a test stands in for."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def blob_port(tmp_path_factory: pytest.TempPathFactory, certificate: Certificate) -> Iterator[int]:
    """The port of blob storage over TLS with this certificate."""
    with Azurite(tmp_path_factory.mktemp("azurite"), certificate) as azurite:
        yield azurite.port


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model(arch)`: the folder of a random 2-layer model with 512 tokens; arch is of
    tiny_model.ARCHITECTURES."""

    @cache
    def build(arch: str) -> Path:
        return build_tiny_model(arch, tmp_path_factory.mktemp(f"tiny-{arch}"))

    return build


@pytest.fixture(scope="session")
def tiny_onnx(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`tiny_onnx(arch, precision="fp32")`: the tiny model for ONNX Runtime GenAI; precision is fp32
    or int4."""

    @cache
    def export(arch: str, precision: str = "fp32") -> Path:
        from onnxruntime_genai.models.builder import create_model

        folder = tmp_path_factory.mktemp(f"tiny-{arch}-{precision}")
        scratch = tmp_path_factory.mktemp("builder-cache")
        source = str(tiny_model(arch))
        # Its decorator, torch.no_grad, hides its signature.
        create_model(  # type: ignore[call-arg, type-var]
            arch, source, str(folder), precision, "cpu", str(scratch), hf_remote=False
        )
        return folder

    return export


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """In CI, a test that was skipped or failed as expected has failed, unless it needs a GPU or an
    Azure account."""
    outcome = yield
    report = outcome.get_result()
    exempt = item.get_closest_marker("gpu") or item.get_closest_marker("azure_live")
    if os.environ.get("CI") and report.skipped and not exempt:
        report.outcome = "failed"
        told = "skipped or expected to fail, which is an error in CI"
        report.longrepr = f"{item.nodeid}: {told}: {report.longrepr}"
