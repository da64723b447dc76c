"""A Prefect server on SQLite and two workers that share folders: where things run, what is cached,
what fails, and what people see of it in a browser."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright
from prefect_api import wait_for
from tiny_recipe import recipe, row
from workshop import PROJECT, Run, Workshop

from distillery.recipe import Recipe, load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """The workers share folders and SQLite files alone."""
    folder = tmp_path_factory.mktemp("server")
    common = folder / "shared"
    common.mkdir()
    shared = {
        "DISTILLERY_STORE": str(common / "store"),
        "DISTILLERY_LABELS": f"sqlite:///{common / 'labels.db'}",
        "DISTILLERY_REGISTRY": f"sqlite:///{common / 'registry.db'}",
    }
    workshop = Workshop(folder, shared)
    try:
        workshop.start()
        yield workshop
    finally:
        workshop.close()


@pytest.fixture(scope="module")
def distilled(workshop: Workshop, files: dict[str, list[str]], tiny: Path) -> Run:
    """distill/demo with a tiny recipe, training sent to the GPU pool, as the deployment's own
    parameters say."""
    done = workshop.deployment_run("distill/demo", {"recipe": recipe(files, tiny)})
    run = workshop.newest_run("distill")
    assert done.returncode == 0, done.stdout + done.stderr + workshop.log(run)
    return run


def test_training_runs_in_the_gpu_worker_and_the_rest_in_the_cpu_worker(
    workshop: Workshop, distilled: Run
) -> None:
    runs = workshop.family(distilled)
    assert set(runs) == {"", "preparation", "preparation, teacher", "student"}
    assert distilled["state_name"] == "Completed"
    for child in ("preparation, teacher", "student"):
        assert runs[child]["work_pool_name"] == "gpu-pool"
        assert workshop.worker_that_ran(runs[child]) == ["gpu-pool"]
        assert workshop.tasks(runs[child]) == {"train": "Completed"}
    assert distilled["work_pool_name"] == "cpu-pool"
    assert workshop.worker_that_ran(distilled) == ["cpu-pool"]
    # A subflow without a deployment has no pool of its own: it runs in its parent's process.
    assert runs["preparation"]["work_pool_name"] is None
    assert workshop.worker_that_ran(runs["preparation"]) == ["cpu-pool"]
    here = {"prepare dataset", "label", "export", "ask base model", "evaluate"}
    here |= {"register", "download"}
    assert workshop.tasks(distilled) == dict.fromkeys(here, "Completed")
    assert workshop.tasks(runs["preparation"]) == {
        "gold labels": "Completed",
        "export": "Completed",
    }


def test_a_damaged_artifact_in_the_store_is_made_again_and_nothing_else(
    workshop: Workshop, distilled: Run, files: dict[str, list[str]], tiny: Path
) -> None:
    store = workshop.folder / "shared" / "store"
    (labels,) = (
        path
        for path in store.glob("*/files/labels.jsonl")
        if b'"distribution": {' in path.read_bytes()
    )
    good = labels.read_bytes()
    labels.write_bytes(good[:-2] + b"?\n")
    before = workshop.counts()
    mended = workshop.distil(recipe(files, tiny))
    states = workshop.states(mended)
    assert {name for name, state in states.items() if state != "Cached"} == {": label"}
    assert labels.read_bytes() == good
    assert workshop.scoreboard(mended) == workshop.scoreboard(distilled)
    # The answers are in the label store: nobody is asked.
    assert workshop.counts()["request"] == before["request"]


def test_the_cpu_pool_answers_a_file_with_the_registered_student(
    workshop: Workshop, distilled: Run, tmp_path: Path
) -> None:
    rows = [row("new", number) for number in range(12)]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"id": "bad"}])
    )
    parameters = {
        "model_name": "tiny-student",
        "input_uri": str(tmp_path / "rows.jsonl"),
        "output": str(tmp_path / "answers"),
    }
    done = workshop.deployment_run("batch-inference/cpu", parameters)
    run = workshop.newest_run("batch-inference")
    assert done.returncode == 0, done.stdout + done.stderr + workshop.log(run)
    assert run["work_pool_name"] == "cpu-pool"
    answers = [
        json.loads(line)
        for line in (tmp_path / "answers" / "predictions.jsonl").read_text().splitlines()
    ]
    assert [answer["example_id"] for answer in answers] == [row["id"] for row in rows]
    assert {answer["answer"] for answer in answers} <= set("ABC")
    assert len((tmp_path / "answers" / "failed.jsonl").read_text().splitlines()) == 1


@pytest.mark.security
def test_a_run_of_a_worker_opens_nothing_outside_its_folders(workshop: Workshop) -> None:
    parameters = {"model_name": "tiny-student", "input_uri": "rows.jsonl", "output": "/etc/answers"}
    done = workshop.deployment_run("batch-inference/cpu", parameters)
    assert done.returncode == 1
    run = workshop.newest_run("batch-inference")
    assert "output: '/etc/answers': this worker may not open it" in run["state"]["message"]
    assert "Traceback" not in workshop.log(run)


def _missing_layer(values: dict[str, Any], _folder: Path) -> None:
    values["student"]["layers"] = [7]


def _code_of_its_own(values: dict[str, Any], folder: Path) -> None:
    # All that can be seen without loading it is as it should be.
    tiny = Path(values["teacher"]["preparation"]["base"]["model"])
    for file in (*tiny.glob("tokenizer*"), *tiny.glob("chat_template*")):
        shutil.copy(file, folder)
    config = {"model_type": "homemade", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    values["student"] |= {"start": "base", "base": {"model": str(folder)}}
    values["student"]["training"]["hidden_weight"] = 0


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_missing_layer, "student.layers: 7 is no layer of this model, which has layers 0 to 1"),
        (
            _code_of_its_own,
            "needs Python code of its own to load; if you trust it, set trust_remote_code: true",
        ),
    ],
)
def test_a_child_that_fails_fails_its_parent_with_its_reason(
    workshop: Workshop,
    files: dict[str, list[str]],
    tiny: Path,
    tmp_path: Path,
    spoil: Callable[[dict[str, Any], Path], None],
    reason: str,
) -> None:
    values = recipe(files, tiny)
    spoil(values, tmp_path)
    done = workshop.deployment_run("distill/demo", {"recipe": values})
    assert done.returncode == 1, done.stdout + done.stderr
    parent = workshop.newest_run("distill")
    child = workshop.family(parent)["student"]
    assert (parent["state_type"], child["state_type"]) == ("FAILED", "FAILED")
    assert reason in child["state"]["message"]
    assert (
        f"train-student/gpu: the run '{child['name']}' ended as Failed"
        in parent["state"]["message"]
    )
    assert reason in parent["state"]["message"]
    workshop.wait_for_line(parent, reason)
    assert "Traceback" not in workshop.log(parent) + workshop.log(child)


@pytest.mark.parametrize(
    ("deployment", "parameters", "named"),
    [
        ("distill/demo", {"recipe": {"preset": "demo", "nmae": "x"}}, "nmae"),
        ("distill/demo", {"recipe": {"preset": "demo", "teacher": {"concurrency": 0}}}, "0"),
        (
            "batch-inference/cpu",
            {"model_name": "m", "input_uri": "f", "registry": "elsewhere"},
            "elsewhere",
        ),
        ("batch-inference/cpu", {"model_name": "m"}, "input_uri"),
    ],
)
def test_bad_parameters_are_refused_before_a_run_exists(
    workshop: Workshop, deployment: str, parameters: dict[str, Any], named: str
) -> None:
    before = workshop.ask("/flow_runs/count")
    known = workshop.deployment(deployment)
    response = workshop.api.post(
        f"/deployments/{known['id']}/create_flow_run", json={"parameters": parameters}
    )
    assert response.status_code in (409, 422), response.text
    assert named in response.text
    assert workshop.ask("/flow_runs/count") == before


def test_a_parameter_that_the_flow_does_not_have_is_refused(workshop: Workshop) -> None:
    before = workshop.ask("/flow_runs/count")
    done = workshop.deployment_run("distill/demo", {"recipe": {"preset": "demo"}, "where": "gpu"})
    assert done.returncode == 1
    assert "where" in done.stdout + done.stderr
    assert workshop.ask("/flow_runs/count") == before


def test_the_weekly_run_waits_until_it_is_switched_on(workshop: Workshop) -> None:
    lab = workshop.deployment("distill/lab")
    assert [
        (schedule["schedule"]["cron"], schedule["active"]) for schedule in lab["schedules"]
    ] == [("0 5 * * 1", False)]
    assert lab["work_pool_name"] == "cpu-pool"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page of headless Chromium that reaches nothing but this machine."""
    switches = (
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
    )
    arguments = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-sync",
        *(f"--{name}" for name in switches),
    ]
    arguments.append("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        assert chromium, "this test needs Chromium: apt-get install chromium"
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(30_000)
        yield page
        browser.close()


def screenshot(place: Page | Locator, name: str) -> None:
    """Into the folder SCREENSHOTS, if one is named."""
    if folder := os.environ.get("SCREENSHOTS"):
        place.screenshot(path=Path(folder) / f"{name}.png")


def test_the_page_of_a_run_shows_its_graph_and_its_stages(
    workshop: Workshop, distilled: Run, page: Page
) -> None:
    page.goto(f"{workshop.url}/v2/runs/flow-run/{distilled['id']}?tab=TaskRuns")
    expect(page.get_by_text(distilled["name"]).first).to_be_visible()
    expect(page.get_by_text("Completed").first).to_be_visible()
    expect(page.locator("canvas").first).to_be_visible()
    for stage in ("prepare dataset", "label", "export", "evaluate", "register", "download"):
        expect(page.get_by_text(stage, exact=True).first).to_be_visible()
    # The graph is drawn on a canvas, which takes a moment and has no text.
    page.wait_for_timeout(2000)
    screenshot(page, "run")


def test_the_summary_shows_the_way_the_scoreboard_and_the_plot(
    workshop: Workshop, distilled: Run, page: Page
) -> None:
    artifact = workshop.artifacts(distilled)["distillation"]
    page.goto(f"{workshop.url}/v2/artifacts/artifact/{artifact['id']}")
    tables = page.get_by_role("table")
    # The others are the tables of the candidate's further figures.
    expect(tables).to_have_count(7)
    stages, scoreboard = tables.nth(0), tables.nth(1)
    for stage in (
        "prepare dataset",
        "train teacher",
        "label",
        "train student",
        "evaluate",
        "download",
    ):
        expect(stages.get_by_text(stage, exact=True)).to_be_visible()
    for predictor in ("teacher", "base model", "student", "student int4"):
        expect(scoreboard.get_by_text(predictor, exact=True)).to_be_visible()
    plot = page.get_by_role("img", name="scoreboard")
    expect(plot).to_be_visible()
    assert plot.evaluate("image => image.complete && image.naturalWidth") > 100
    expect(page.get_by_text("gate: passed")).to_be_visible()
    expect(page.get_by_text("report.html")).to_be_visible()
    screenshot(page, "summary")
    screenshot(scoreboard, "scoreboard")
    # A link leads to the record of its stage.
    stages.get_by_role("link").last.click()
    expect(page.get_by_text("record-download").first).to_be_visible()


def test_the_form_of_a_deployment_explains_its_parameters(workshop: Workshop, page: Page) -> None:
    page.goto(
        f"{workshop.url}/v2/deployments/deployment/{workshop.deployment('distill/demo')['id']}/run"
    )
    for text in (
        "recipe",
        "What to make.",
        "training_deployment",
        "Where training runs",
        "refresh",
    ):
        expect(page.get_by_text(text).first).to_be_visible()
    screenshot(page, "form")


def test_the_form_sends_no_defaults_that_would_win_over_the_preset(
    workshop: Workshop, page: Page
) -> None:
    workshop.api.patch("/work_pools/cpu-pool", json={"is_paused": True}).raise_for_status()
    page.goto(
        f"{workshop.url}/v2/deployments/deployment/{workshop.deployment('distill/demo')['id']}/run"
    )
    # The form is complete a moment after it is there.
    page.wait_for_load_state("networkidle")

    def submit() -> Run | None:
        """The run; none while SQLite is locked by another writer (503)."""
        with page.expect_response("**/create_flow_run") as response:
            page.get_by_role("button", name="Submit").click()
        return response.value.json() if response.value.ok else None

    run = wait_for("the run", submit, 30)
    workshop.api.delete(f"/flow_runs/{run['id']}").raise_for_status()
    workshop.api.patch("/work_pools/cpu-pool", json={"is_paused": False}).raise_for_status()
    assert Recipe.model_validate(run["parameters"]["recipe"]) == load_recipe("demo")
    assert run["parameters"]["training_deployment"] == "train-student/gpu"


def local(workshop: Workshop, command: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(PROJECT / "deployments" / "local.py"), command]
    return subprocess.run(
        script, env=workshop.environment, capture_output=True, text=True, timeout=300
    )


def test_down_ends_everything_in_the_midst_of_a_run(
    tmp_path: Path, files: dict[str, list[str]], tiny: Path
) -> None:
    workshop = Workshop(tmp_path / "up")
    try:
        up = local(workshop, "up")
        assert up.returncode == 0, up.stdout + up.stderr
        workshop.log_in()
        values = recipe(files, tiny)
        values["teacher"]["preparation"]["training"]["epochs"] = 100_000
        workshop.start_run(values)
        wait_for("training", lambda: workshop.is_running("train-student"))
        second = local(workshop, "up")
        assert (second.returncode, second.stderr) == (1, "error: already up; `make down` first\n")
        started = {int(path.read_text()) for path in (workshop.folder / "run").glob("*.pid")}
        running = {process.pid for process in workshop.processes()}
        assert len(started) == 3
        # The server, the workers and, below these, the parent and the child.
        assert started < running
        assert len(running) >= 5

        down = local(workshop, "down")
        assert down.returncode == 0, down.stderr
        wait_for("the end of all processes", lambda: not workshop.processes(), 60)
        assert not list((workshop.folder / "run").glob("*.pid"))
        with pytest.raises(httpx.TransportError):
            workshop.api.get("/health")
    finally:
        workshop.close()
