"""The end of a run: its record is kept whatever Prefect's API says to the artifacts."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect_api import OwnPrefect

from distillery.evaluation.report import ANSWERS_FILE, PLOT_FILE, TABLE_FILE
from distillery.labels.report import Tally
from distillery.records import (
    EvaluationReport,
    GateDecision,
    Interval,
    OnnxModel,
    Outcome,
    PreparedDataset,
    ScoreRow,
    StudentCheckpoint,
    TeacherLabels,
)
from distillery.storage.artifacts import ArtifactStore
from tasks.summary import publish

pytestmark = [pytest.mark.slow]


class WithoutArtifacts(BaseHTTPRequestHandler):
    """Hands on all that is asked of a Prefect API, but refuses artifacts."""

    api = ""
    refused = 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/api/artifacts"):
            type(self).refused += 1
            status, content = 500, b"{}"
        else:
            kept = {"authorization", "content-type", "x-prefect-api-version", "prefect-csrf-token"}
            headers = {name: value for name, value in self.headers.items() if name.lower() in kept}
            path = self.path.removeprefix("/api")
            answer = httpx.request(self.command, self.api + path, content=body, headers=headers)
            status, content = answer.status_code, answer.content
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_PATCH = do_DELETE = do_POST

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def api_without_artifacts(prefect_server: OwnPrefect) -> Iterator[str]:
    WithoutArtifacts.api = prefect_server.url
    server = ThreadingHTTPServer(("127.0.0.1", 0), WithoutArtifacts)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def outcome(tmp_path: Path) -> Outcome:
    folder = tmp_path / "all"
    folder.mkdir()
    for name in (ANSWERS_FILE, PLOT_FILE, TABLE_FILE):
        (folder / name).write_text("")
    Tally().write(folder)
    artifact = ArtifactStore().put(folder)
    row = ScoreRow(
        name="student int4",
        kind="model",
        correct=1,
        rows=1,
        accuracy=1.0,
        interval=Interval(low=0.0, high=1.0),
    )
    return Outcome(
        recipe="demo",
        data=PreparedDataset(artifact=artifact, splits={}),
        teacher=None,
        labels=TeacherLabels(artifact=artifact, teacher="t", accepted=1, rejected=0, soft=False),
        student=StudentCheckpoint(
            artifact=artifact, method="full", base="b", parameters=1, steps=1
        ),
        model=OnnxModel(artifact=artifact, precision="int4", algorithm="rtn", parameters=1),
        report=EvaluationReport(
            artifact=artifact, scoreboard=(row,), candidate=row.name, answers_sha256="0" * 64
        ),
        decision=GateDecision(passed=False, reason="refused: for a test"),
        registered=None,
        delivered=None,
    )


def test_an_api_that_refuses_artifacts_fails_no_finished_run(
    outcome: Outcome, api_without_artifacts: str, caplog: pytest.LogCaptureFixture
) -> None:
    @flow
    def finished() -> Outcome:
        return publish(outcome)

    with temporary_settings({PREFECT_API_URL: api_without_artifacts}):
        state = finished(return_state=True)
        assert state.is_completed(), state
        published = state.result()
    assert WithoutArtifacts.refused == 1
    kept = ArtifactStore().read_record(f"runs/{published.run}.json")
    assert json.loads(kept)["recipe"] == "demo"
    assert f"the run is done and kept as runs/{published.run}.json, but Prefect's API" in (
        caplog.text
    )
