"""Progress: what a line says, what goes to the log, and what a terminal shows."""

import io
import time
from typing import Any

import pytest
from prefect import flow, task
from rich.console import Console
from still_clock import StillClock

from distillery.recipe import load_recipe
from flows.distill import planned
from tasks import progress as progress_module
from tasks.progress import StageProgress, clock, conclude, displayed_by, progress_of, show
from tasks.terminal import LiveDisplay, PlannedStage


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> StillClock:
    clock = StillClock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def drawn(display: LiveDisplay) -> list[str]:
    """The lines that a terminal of 100 columns shows."""
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    console.print(display)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.2, "0:00"), (59.6, "1:00"), (75, "1:15"), (3_725, "1:02:05")]
)
def test_a_duration_as_a_clock_shows_it(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_a_line_has_what_is_done_the_rate_and_the_time_left(still: StillClock) -> None:
    progress = StageProgress("label")
    assert (progress.line(), progress.share) == ("", None)
    progress.show(100, 1001, "rows")
    assert progress.line() == "100 of 1001 rows"
    still.now += 10
    progress.show(400, 1001, "rows")
    assert progress.line() == "400 of 1001 rows, 30.0 rows/s, 0:20 left"
    assert progress.share == pytest.approx(400 / 1001)


def test_the_rate_is_measured_from_when_the_first_unit_is_begun(still: StillClock) -> None:
    progress = StageProgress("evaluate")
    progress.show(0, 90, "rows", "loading base model")
    still.now += 20
    assert progress.log_line() == "0 of 90 rows, loading base model, at work for 0:20"
    progress.show(0, 90, "rows", "asking base model")
    still.now += 10
    progress.show(30, 90, "rows", "asking base model")
    assert progress.line() == "30 of 90 rows, asking base model, 3.0 rows/s, 0:20 left"
    assert progress.log_line() == progress.line()
    progress.show(30, 90, "rows", "loading student")
    still.now += 10
    assert progress.line() == "30 of 90 rows, loading student, 1.5 rows/s, 0:40 left"


def test_a_new_count_has_a_rate_of_its_own(still: StillClock) -> None:
    progress = StageProgress("evaluate")
    progress.show(0, 20, "rows", "reading for a linear probe")
    still.now += 100
    progress.show(20, 20, "rows", "reading for a linear probe")
    progress.show(10, 90, "rows", "asking student")
    still.now += 10
    progress.show(30, 90, "rows", "asking student")
    assert progress.line() == "30 of 90 rows, asking student, 2.0 rows/s, 0:30 left"
    progress.show(35, 90, "steps", "loss 0.5")
    still.now += 10
    progress.show(45, 90, "steps", "loss 0.5")
    assert progress.line() == "45 of 90 steps, loss 0.5, 1.0 steps/s, 0:45 left"


def test_what_the_stage_knows_of_its_speed_is_not_reckoned_again(still: StillClock) -> None:
    progress = StageProgress("train")
    progress.show(10, 100, "steps", "loss 0.5, 7.0 rows/s", seconds_left=61)
    still.now += 10
    assert progress.line() == "10 of 100 steps, loss 0.5, 7.0 rows/s, 1:01 left"


def test_parts_that_take_unequal_times_have_no_rate_and_no_time_left(still: StillClock) -> None:
    progress = StageProgress("export")
    progress.show(0, 3, "", "pass 1 of 3, merge")
    still.now += 10
    progress.show(1, 3, "", "pass 2 of 3, quantise")
    still.now += 10
    assert progress.line() == "pass 2 of 3, quantise"
    assert progress.log_line() == "pass 2 of 3, quantise, at work for 0:20"
    assert progress.share == pytest.approx(1 / 3)


def test_outside_a_stage_nothing_is_shown() -> None:
    show(1, 2, "rows")


def test_the_display_shows_what_is_done_running_and_to_come(still: StillClock) -> None:
    planned = [PlannedStage(f"{part} student", part) for part in ("train", "export", "evaluate")]
    display = LiveDisplay([PlannedStage("train teacher", "train"), *planned])
    assert "starting a Prefect server" in drawn(display)[-1]
    display.stage_begins("train")
    display.stage_ends("Cached", completed=True)
    display.stage_begins("train")
    work = StageProgress("train")
    display.work_begins(work)
    work.show(0, 8, "steps")
    still.now += 4
    work.show(2, 8, "steps", "loss 0.1")
    lines = drawn(display)
    assert lines[0] == "✓ train teacher cached"
    assert lines[1].endswith("train student 2 of 8 steps, loss 0.1, 0.5 steps/s, 0:12 left 0:04")
    assert lines[3:] == ["· export student", "· evaluate student"]
    work.conclusion = "16 rows"
    display.stage_ends("Completed", completed=True)
    display.stage_begins("export")
    display.stage_ends("Failed", completed=False)
    display.stage_begins("unplanned")
    lines = drawn(display)
    assert lines[1] == "✓ train student 16 rows 0:04"
    assert lines[2].startswith("✗ export student")
    assert lines[3] == "· evaluate student"
    assert lines[4].endswith("unplanned")


def test_a_stage_that_is_tried_again_is_one_line() -> None:
    display = LiveDisplay(
        [PlannedStage("train teacher", "train"), PlannedStage("train student", "train")]
    )
    display.stage_begins("train")
    display.stage_begins("train")
    assert [stage.state for stage in display.stages] == ["running", "to come"]


def test_a_run_is_planned_with_each_stage_once() -> None:
    titles = [stage.title for stage in planned(load_recipe("demo"))]
    assert titles[-4:] == ["register", "promote", "download", "report"]
    assert len(titles) == len(set(titles))


def worked(seconds: float) -> list[tuple[float, str]]:
    """Run a flow whose task works for a while; return the progress artifact's data at its end."""
    from prefect.artifacts import Artifact

    @task
    def work() -> None:
        with progress_of("slow work"):
            for done in range(5):
                show(done, 5, "rows")
                time.sleep(seconds / 5)
            conclude("5 rows, all of them")

    @flow
    def working() -> None:
        work()

    working()
    kept: Any = Artifact.get("slow-work")
    return [(kept.data, kept.description)] if kept else []


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_without_a_display_the_log_tells_and_the_artifact_shows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress_module, "PUBLISH_S", 0.1)
    monkeypatch.setattr(progress_module, "LOG_S", 0.2)
    ((percent, text),) = worked(3)
    assert float(percent) > 0
    assert " of 5 rows" in text
    told = [record.message for record in caplog.records if record.message.startswith("slow work: ")]
    assert len(told) >= 3
    assert any(" of 5 rows, " in line for line in told)
    assert "5 rows, all of them" in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_a_display_takes_the_place_of_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress_module, "PUBLISH_S", 0.1)
    monkeypatch.setattr(progress_module, "LOG_S", 0.2)
    display = LiveDisplay([PlannedStage("the work", "slow work")])
    display.stage_begins("slow work")
    with displayed_by(display):
        worked(1)
    assert not [record for record in caplog.records if record.message.startswith("slow work: ")]
    assert display.stages[0].progress is not None
    assert display.stages[0].progress.conclusion == "5 rows, all of them"
