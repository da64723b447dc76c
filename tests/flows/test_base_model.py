"""A run whose base model is in an Azure ML registry: looked at before the teacher is asked,
downloaded although the connection is cut in the middle, and not asked for by a cached run."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from azure_ml_stand_in import make_certificate, resolve_localhost
from azure_registry_stand_in import Proxy, RegistryStandIn, upload
from azurite_server import Azurite
from chat_endpoint import Call, ChatEndpoint, Reply, good
from tiny_recipe import endpoint_recipe, write_rows

PROJECT = Path(__file__).resolve().parents[2]
LOCALHOST = Path(__file__).parent / "localhost"
URL = "azureml://registries/azureml/models/Tiny/versions/1"
MLMODEL = b"flavors:\n  transformers: {task: text-generation}\n"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def mlflow_folder(model: Path) -> dict[str, bytes]:
    """Return a model's files as the registry ships them: weights and tokenizer apart."""
    files = {"MLmodel": MLMODEL}
    for file in model.iterdir():
        is_tokenizer = file.name.startswith(("tokenizer", "chat_template"))
        part = "components/tokenizer" if is_tokenizer else "model"
        files[f"{part}/{file.name}"] = file.read_bytes()
    return files


def test_a_base_model_of_a_registry_through_a_whole_run(
    tmp_path: Path,
    home: Path,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = endpoint_recipe(write_rows(tmp_path / "rows"), Path("base"), "azure", method="lora")
    values["student"]["base"] = {"model": URL}
    values["student"]["training"]["soft_weight"] = 0
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    model = tiny_model("phi3")
    weights = (model / "model.safetensors").stat().st_size
    certificate = make_certificate(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate.cert))
    monkeypatch.setattr(socket, "getaddrinfo", resolve_localhost(socket.getaddrinfo))
    (tmp_path / "azurite").mkdir()
    with Azurite(tmp_path / "azurite", certificate) as azurite:
        proxy = Proxy(azurite.port)
        registry = RegistryStandIn(blob_port=azurite.port, secrets=None)
        sent_before: list[int] = []

        def script(call: Call) -> Reply:
            if not sent_before:
                assert registry.asked["datarefs"] == 1, "the registry was asked before"
                sent_before.append(proxy.sent)
                proxy.cut_after(weights // 2, away_s=8)
            return good(call)

        with proxy.running(), registry.running(certificate), ChatEndpoint(script) as teacher:
            registry.proxy_port = proxy.port
            registry.models["Tiny", "1"] = "models/tiny"
            upload(azurite.port, "models/tiny", mlflow_folder(model))
            environment = os.environ | registry.environment(certificate)
            environment |= {
                "PYTHONPATH": str(LOCALHOST),
                "PREFECT_HOME": str(tmp_path / "prefect"),
                "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
                "TEACHER_MODEL_ENDPOINT": teacher.url,
                "TEACHER_MODEL_NAME": "m",
                "TEACHER_MODEL_KEY": "k",
            }
            first = run(tmp_path, environment)
            assert sent_before[0] < weights, "the weights come once labels are there"
            assert f"base model {URL}: not on this machine; the run downloads 0.0 GB from" in first
            assert "the storage of Tiny version 1 of the registry azureml does not answer" in first
            (folder,) = (home / "models").glob("azureml-Tiny-1-*")
            assert {file.name for file in folder.iterdir()} == {f.name for f in model.iterdir()}

            before = (registry.asked.copy(), proxy.sent, len(teacher.calls))
            run(tmp_path, environment)
            assert (registry.asked, proxy.sent, len(teacher.calls)) == before


def run(folder: Path, environment: dict[str, Any]) -> str:
    """Run the recipe; return its log."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.distill", str(folder / "recipe.yaml")],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr
