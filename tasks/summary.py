"""What people see of a run: one Markdown artifact, and the same in the terminal."""

from prefect.artifacts import create_markdown_artifact

from distillery.evaluation import headline, render_table
from distillery.records import OnnxModel, Outcome, StageRecord, StudentCheckpoint
from distillery.store import ArtifactStore
from tasks.stage import produced_by


def _stages(outcome: Outcome) -> list[tuple[str, StageRecord, str]]:
    """(stage, its record, its figures) in the order of the way."""
    data, labels, report = outcome.data, outcome.labels, outcome.report
    rows = ", ".join(f"{split.rows} {name}" for name, split in data.splits.items())
    stages: list[tuple[str, StageRecord, str]] = [("prepare dataset", data, rows)]
    if outcome.teacher:
        stages.append(("train teacher", outcome.teacher.checkpoint, _trained(outcome.teacher.checkpoint)))
        stages.append(("export teacher", outcome.teacher.model, _built(outcome.teacher.model)))
    asked = f"{labels.accepted} accepted, {labels.rejected} rejected, {labels.asked} calls"
    stages.append(("label", labels, asked))
    stages.append(("train student", outcome.student, _trained(outcome.student)))
    stages.append(("export student", outcome.model, _built(outcome.model)))
    stages.append(("evaluate", report, f"{report.scoreboard[0].rows} test rows, each model in a process of its own"))
    if outcome.registered:
        model = outcome.registered
        stages.append(("register", model, f"{model.name} version {model.version} ({model.registry})"))
    if outcome.delivered:
        stages.append(("download", outcome.delivered, "every file's sha256 checked"))
    return stages


def _trained(record: StudentCheckpoint) -> str:
    accuracy = "" if record.validation_accuracy is None else f", validation accuracy {record.validation_accuracy:.2f}"
    return f"{record.parameters / 1e6:.1f} M parameters, {record.method}, {record.steps} steps{accuracy}"


def _built(record: OnnxModel) -> str:
    return f"{record.precision} {record.algorithm}, {record.bytes / 1e6:.1f} MB"


def publish(outcome: Outcome) -> Outcome:
    """Writes the run's Markdown artifact; returns the outcome with the run's name."""
    named = outcome.model_copy(update={"run": produced_by()})
    scoreboard = (ArtifactStore().fetch(outcome.report.artifact) / "scoreboard.md").read_text()
    lines = ["| stage | figures | seconds | from run |", "|---|---|---|---|"]
    for name, record, figures in _stages(named):
        lines.append(f"| {name} | {figures} | {record.seconds:.0f} | {record.produced_by} |")
    create_markdown_artifact(
        key="distillation",
        markdown="\n".join([f"# {named.run}", "", *lines, "", scoreboard, "", f"**Gate:** {outcome.decision.reason}"]),
        description="The way, the scoreboard and the gate",
    )
    return named


def render(outcome: Outcome) -> str:
    """The terminal's summary: each stage with the run it came from, the scoreboard, the gate."""
    lines = []
    for name, record, figures in _stages(outcome):
        here = record.produced_by.startswith(outcome.run)
        origin = f"{record.seconds:6.1f} s" if here else f"cached from {record.produced_by}"
        lines.append(f"{name:16} {figures:64} {origin}")
    board, gate = outcome.report.scoreboard, "passed" if outcome.decision.passed else "refused"
    verdict = f"gate: {gate}: {outcome.decision.reason.removeprefix(f'{gate}: ')}"
    lines += ["", render_table(board), "", headline(board, outcome.report.candidate), verdict]
    return "\n".join(lines)
