"""Training's figures in MLflow, and that a tracking server which fails costs no training."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from mlflow import MlflowClient

from distillery.training.tracking import EXPERIMENT, tracked


def test_settings_and_figures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'tracking.db'}"
    monkeypatch.setenv("DISTILLERY_TRACKING", url)
    for name in ("one", "two"):
        with tracked(name, {"method": "lora"}) as log:
            log(10, {"loss": 0.5, "rows_per_second": 7.0})
            log(20, {"loss": 0.25, "rows_per_second": 8.0})
    with pytest.raises(KeyboardInterrupt), tracked("three", {}):
        raise KeyboardInterrupt
    client = MlflowClient(url)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == {
        "one": "FINISHED",
        "two": "FINISHED",
        "three": "FAILED",
    }
    assert runs["two"].data.params == {"method": "lora"}
    history = client.get_metric_history(runs["two"].info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(10, 0.5), (20, 0.25)]


@pytest.fixture
def tracking_server() -> Iterator[tuple[str, list[str]]]:
    """The URL of an HTTP server on this machine, and the requests that have reached it."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            requests.append(f"{self.command} {self.path}")
            self.send_error(404)

        do_GET = do_POST = do_PUT = do_PATCH = answer

        def log_message(self, *_args: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("setting", [None, ""])
def test_without_a_setting_nothing_is_sent(
    setting: str | None,
    tracking_server: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even where MLflow's own variable names a server, which any client of its would ask."""
    url, requests = tracking_server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def train() -> None:
        with tracked("one", {"method": "lora"}) as log:
            log(1, {"loss": 0.5})

    monkeypatch.setenv("DISTILLERY_TRACKING", url)
    train()
    assert requests, "else this test would see nothing"
    requests.clear()
    if setting is None:
        monkeypatch.delenv("DISTILLERY_TRACKING")
    else:
        monkeypatch.setenv("DISTILLERY_TRACKING", setting)
    train()
    assert requests == []


def test_a_server_that_is_down_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DISTILLERY_TRACKING", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with tracked("one", {"method": "lora"}) as log:
        log(1, {"loss": 0.5})
    said = [
        record.getMessage()
        for record in caplog.records
        if "DISTILLERY_TRACKING" in record.getMessage()
    ]
    assert len(said) == 1
    assert said[0].startswith("DISTILLERY_TRACKING: no figures are kept from here on (")
