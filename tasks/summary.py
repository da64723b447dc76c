"""What people see of a finished run: artifacts in the UI, and the same in the terminal."""

import json
from base64 import b64encode
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from httpx import HTTPError
from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_UI_URL

from distillery.errors import DistilleryError, StoreError, one_line
from distillery.evaluation.advice import advice_of, next_step
from distillery.evaluation.doubtful import DOUBTFUL_FILE
from distillery.evaluation.figures_table import render_figures
from distillery.evaluation.report import ANSWERS_FILE, PLOT_FILE, TABLE_FILE
from distillery.evaluation.scoreboard import (
    GOLD,
    TEACHER,
    describe_waiting,
    headline,
    render_table,
)
from distillery.evaluation.verdicts import render_verdicts, render_verdicts_markdown
from distillery.export.ladder_table import render_ladder, rows_in_words, table
from distillery.labels.files import REJECTED_FILE
from distillery.labels.report import LOOK_FILE, RELIABILITY_FILE, read_report
from distillery.markdown import code, escape, escape_cells, link
from distillery.recipe import JUDGE
from distillery.records import (
    CallTotal,
    OnnxModel,
    Outcome,
    Preferences,
    StageRecord,
    StudentCheckpoint,
    TeacherLabels,
)
from distillery.report.facts import labelling_facts
from distillery.report.kept import page_path
from distillery.report.page import StageLine
from distillery.storage.artifacts import ArtifactStore, run_record
from distillery.storage.database import Database
from distillery.teacher.ledger import CALLS, sum_of, totals
from tasks.labels import payer_of_run
from tasks.report import report_page
from tasks.stage import produced_by

LEDGER_WAIT_S = 5.0
"""Seconds to wait for the ledger at the end of a run, which needs it for nothing else."""

_ROWS = 200


def _stages(outcome: Outcome) -> list[tuple[str, StageRecord, str]]:
    """Return (stage, its record, its figures) in the order of the run."""
    data, labels, report = outcome.data, outcome.labels, outcome.report
    rows = ", ".join(f"{split.rows} {name}" for name, split in data.splits.items())
    stages: list[tuple[str, StageRecord, str]] = [("prepare dataset", data, rows)]
    if outcome.teacher:
        stages.append(
            ("train teacher", outcome.teacher.checkpoint, _trained(outcome.teacher.checkpoint))
        )
        stages.append(("export teacher", outcome.teacher.model, _built(outcome.teacher.model)))
    if outcome.selection:
        stages.append(("select rows", outcome.selection, outcome.selection.line()))
    asked = f"{labels.accepted} accepted, {labels.rejected} rejected, {labels.calls} calls"
    stages.append(("label", labels, asked))
    stages.append(("train student", outcome.student, _trained(outcome.student)))
    stages.append(("export student", outcome.model, _built(outcome.model)))
    asked = f"{report.scoreboard[0].rows} test rows"
    if outcome.base_answers:
        stages.append(("ask base model", outcome.base_answers, asked))
    stages.append(("evaluate", report, f"{asked}, each model in a process of its own"))
    if outcome.preferences:
        found = outcome.preferences
        counts = f"{found.figures.wins} wins, {found.figures.ties} ties, "
        counts += f"{found.figures.losses} losses, {found.asked} answers"
        stages.append(("ask judge", found, counts))
    if outcome.registered:
        model = outcome.registered
        stages.append(
            ("register", model, f"{model.name} version {model.version} ({model.registry})")
        )
    if outcome.delivered:
        stages.append(("download", outcome.delivered, "every file's sha256 checked"))
    return stages


def _decisions(outcome: Outcome) -> list[str]:
    """Return a line for each decision of a training, with the stage that made it."""
    lines = []
    for name, record, _ in _stages(outcome):
        if isinstance(record, StudentCheckpoint):
            lines += [f"{name}: {decision}" for decision in record.decisions]
    return lines


def _trained(record: StudentCheckpoint) -> str:
    accuracy = ""
    if record.validation_accuracy is not None:
        accuracy = f", validation accuracy {record.validation_accuracy:.2f}"
        if record.validation_tokens is not None:
            accuracy = (
                f", of the validation answers {record.validation_accuracy:.2f} are all right, "
                f"{record.validation_tokens:.2f} of their tokens"
            )
    size = f"{record.parameters / 1e6:.1f} M parameters"
    return f"{size}, {record.method}, {record.steps} steps{accuracy}"


def _built(record: OnnxModel) -> str:
    picked = f", picked of {len(record.ladder.rungs)} forms" if record.ladder else ""
    abstains = f", abstains below {record.abstention.threshold:.3f}" if record.abstention else ""
    size = f"{record.bytes / 1e6:.1f} MB"
    return f"{record.precision} {record.algorithm}, {size}{picked}{abstains}"


def publish(outcome: Outcome) -> Outcome:
    """Keep the run in the store, and leave the artifacts that people look at. Return the outcome
    with the run's name.

    The record comes first: all work is done and perhaps paid for, so that a page that
    can't be made, or a Prefect API that takes no artifacts, is a warning in the log."""
    named = outcome.model_copy(update={"run": produced_by(), "paid": _paid_in_run()})
    store = ArtifactStore()
    store.write_record(run_record(named.run), named.model_dump_json(indent=1))
    try:
        stages = []
        for name, record, figures in _stages(named):
            if isinstance(record, StudentCheckpoint):
                figures = "; ".join([figures, *record.decisions])
            stages.append(StageLine(name, figures, record.seconds, record.produced_by))
        page = report_page(named, verdict(named), stages)
        named = named.model_copy(update={"page": page})
        store.write_record(run_record(named.run), named.model_dump_json(indent=1))
    except (DistilleryError, HTTPError, PrefectException) as error:
        _warn(named, "its page can't be made", error)
    try:
        create_artifacts(named, store)
    except (HTTPError, PrefectException) as error:
        _warn(named, "Prefect's API took no artifacts", error)
    get_run_logger().info("%s", verdict(named))
    if advice := advice_of(named):
        get_run_logger().warning("%s", advice)
    return named


def _paid_in_run() -> tuple[CallTotal, ...] | None:
    """Return all calls of this run from the ledger; None where it can't be read."""
    try:
        with closing(Database(wait_s=LEDGER_WAIT_S)) as database:
            whose = CALLS.c.run == payer_of_run().run
            return tuple(totals(database, ("teacher", "purpose", "outcome"), whose))
    except StoreError as error:
        get_run_logger().warning("what this run has paid can't be told: %s", error)
        return None


def _warn(outcome: Outcome, what: str, error: Exception) -> None:
    get_run_logger().warning(
        "the run is done and kept as %s, but %s (%s); run the recipe again to get it",
        run_record(outcome.run),
        what,
        one_line(error) or type(error).__name__,
    )


def create_artifacts(outcome: Outcome, store: ArtifactStore) -> None:
    """Create a run's artifacts in Prefect: its summary, each stage's record, the rejected labels
    and the rows on which student and teacher differ."""
    lines = ["| stage | figures | seconds | from run | record |", "|---|---|---|---|---|"]
    for name, record, figures in _stages(outcome):
        key = f"record-{name.replace(' ', '-')}"
        kept = create_markdown_artifact(
            key=key, markdown=_as_json(record), description=escape(f"{name}: {figures}")
        )
        run = link(record.produced_by, _link("runs/flow-run", record.run_id))
        digest = link(record.artifact.sha256[:12], _link("artifacts/artifact", kept))
        lines.append(f"| {name} | {escape(figures)} | {record.seconds:.0f} | {run} | {digest} |")
    report = store.fetch(outcome.report.artifact)
    parts = [f"# {escape(outcome.run)}", "\n".join(lines), (report / TABLE_FILE).read_text()]
    parts += [
        _picture("scoreboard", report / PLOT_FILE),
        f"**Teacher:** {escape(_teachers_pay(outcome))}",
    ]
    parts += [f"**Judge:** {escape(line)}" for line in _of_judge(outcome)]
    if outcome.page:
        # No link: a browser follows none from a server's page to a file.
        parts.append(
            f"**Report:** {code(str(page_path(store, outcome.page)))}, or on another machine: "
            f"{code(f'distillery report {outcome.run}')}"
        )
    if outcome.decision.verdicts:
        parts.append(render_verdicts_markdown(outcome.decision.verdicts))
    if outcome.judged and outcome.judged.versions:
        parts.append(f"**Test rows:** {escape(outcome.judged.line())}")
    parts.append(f"**{escape(verdict(outcome))}**")
    if advice := advice_of(outcome):
        parts.append(escape(advice))
    create_markdown_artifact(
        key="distillation",
        markdown="\n\n".join(parts),
        description="The way, the scoreboard and the gate",
    )
    _labelling(outcome, store.fetch(outcome.labels.artifact))
    _table(
        "rejected-labels",
        "Rows without a label",
        _rows(store.fetch(outcome.labels.artifact) / REJECTED_FILE),
    )
    if ladder := outcome.model.ladder:
        _table(
            "quantisation-ladder",
            f"The student's forms on {rows_in_words(ladder.rows, ladder.training_rows)}",
            table(ladder),
        )
    _table(
        "student-and-teacher-differ",
        "Test rows with two answers",
        _differences(report, outcome.report.candidate),
    )


def verdict(outcome: Outcome) -> str:
    """Return the gate's decision in one line, with what was registered."""
    decision, model = outcome.decision, outcome.registered
    reason = decision.reason.partition(": ")[2]
    if model is None:
        kept = "nothing is registered"
        if outcome.rejected and outcome.rejected.role == "rejected":
            kept = f"kept as {outcome.rejected.name} version {outcome.rejected.version}"
        return f"gate: refused: {reason}; {kept}"
    version = f"{model.name} version {model.version}"
    if not _is_own(outcome, model):
        text = f"nothing new: {version} of {model.produced_by} stands"
    else:
        text = f"registered as {version}"
    promotion = outcome.promotion
    if promotion and promotion.result in ("outpaced", "barred"):
        text += f", not promoted: {promotion.reason}"
    return f"gate: {'passed' if decision.passed else 'refused'}: {reason}; {text}"


def _is_own(outcome: Outcome, record: StageRecord) -> bool:
    return record.produced_by.startswith(outcome.run)


def _labelling(outcome: Outcome, folder: Path) -> None:
    """Leave an artifact on the teacher's answers: figures, reliability, cost, and rows worth a
    look."""
    report = read_report(folder)
    lines = ["| | |", "|---|---|"]
    for name, figure in labelling_facts(outcome.labels, report, outcome.selection):
        lines.append(f"| {escape(name)} | {escape(figure)} |")
    parts = [f"# Labels of {escape(outcome.labels.teacher)}", "\n".join(lines)]
    if (folder / RELIABILITY_FILE).exists():
        parts.append(_picture("reliability", folder / RELIABILITY_FILE))
    create_markdown_artifact(
        key="labelling-report", markdown="\n\n".join(parts), description=escape(report.line())
    )
    _table(
        "labels-worth-a-look",
        "Sure labels that gold contradicts, and unsure ones",
        _rows(folder / LOOK_FILE),
    )


def _picture(name: str, file: Path) -> str:
    return f"![{name}](data:image/png;base64,{b64encode(file.read_bytes()).decode()})"


def _teachers_pay(outcome: Outcome) -> str:
    return _paid(outcome, outcome.labels.teacher, outcome.labels.teacher, outcome.labels)


def _paid(outcome: Outcome, model: str, identity: str, work: TeacherLabels | Preferences) -> str:
    """Return what was paid to a teacher, or to a judge: in this run, and in an earlier one for the
    labels or preferences that this run has from it. `identity` is the model's name in the
    ledger."""
    earlier = None
    if not _is_own(outcome, work) or outcome.paid is None:
        calls = work.calls if isinstance(work, TeacherLabels) else work.asked
        total = CallTotal(calls=calls, usage=work.usage, cost=work.cost, currency=work.currency)
        where = "this run" if _is_own(outcome, work) else work.produced_by
        earlier = f"{_in_words(total)}, in {where}"
    if outcome.paid is None:
        return f"{model}: {earlier}"
    own = [each for each in outcome.paid if each.teacher == identity]
    here = "none in this run"
    if own:
        parts: Counter[str] = Counter()
        for each in own:
            parts[f"{each.purpose}: {each.outcome}"] += each.calls
        listed = ", ".join(f"{part} {count:,}" for part, count in parts.most_common())
        currency = next((each.currency for each in own if each.currency), "")
        here = f"{_in_words(sum_of(own, currency))}, in this run ({listed})"
    return f"{model}: {earlier}; {here}" if earlier else f"{model}: {here}"


def _in_words(total: CallTotal) -> str:
    usage = total.usage
    tokens = f"{usage.prompt_tokens:,} tokens in, {usage.completion_tokens:,} out"
    estimated = f" ({total.estimated:,} calls estimated)" if total.estimated else ""
    cost = "" if total.cost is None else f", {total.cost:.2f} {total.currency}"
    return f"{total.calls:,} calls, {tokens}{estimated}{cost}"


def _of_judge(outcome: Outcome) -> list[str]:
    """Return lines on what a judge said and cost, and how its canaries were answered."""
    lines, found = [], outcome.preferences
    if found:
        judge = found.figures.judge
        lines += [found.figures.line(), _paid(outcome, judge, f"{JUDGE}{judge}", found)]
    if outcome.judge_drift:
        lines.append(outcome.judge_drift.line())
    return lines


def _as_json(record: StageRecord) -> str:
    return f"```json\n{record.model_dump_json(indent=1)}\n```"


def _link(place: str, identity: object) -> str:
    """Return a page's address in the UI, relative where no server with a UI is set."""
    return f"{PREFECT_UI_URL.value() or ''}/v2/{place}/{identity}"


def _table(key: str, description: str, rows: list[dict[str, Any]]) -> None:
    more = f"; the first {_ROWS} of {len(rows)}" if len(rows) > _ROWS else ""
    create_table_artifact(
        escape_cells(rows[:_ROWS]), key=key, description=f"{description} ({len(rows)}){more}"
    )


def _rows(file: Path) -> list[dict[str, Any]]:
    # Not splitlines: JSON leaves Unicode's line separators in a teacher's answer as they are.
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def _differences(folder: Path, candidate: str) -> list[dict[str, Any]]:
    columns = ("example_id", GOLD, TEACHER, candidate)
    rows = _rows(folder / ANSWERS_FILE)
    return [{name: row[name] for name in columns} for row in rows if row[TEACHER] != row[candidate]]


def render(outcome: Outcome) -> str:
    """Return the terminal's summary: each stage with the run it came from, the scoreboard, the
    gate."""
    lines = []
    for name, record, figures in _stages(outcome):
        origin = (
            f"{record.seconds:6.1f} s"
            if _is_own(outcome, record)
            else f"cached from {record.produced_by}"
        )
        lines.append(f"{name:16} {figures:64} {origin}")
    decisions = _decisions(outcome)
    if decisions:
        lines += ["", *decisions]
    if outcome.judged and outcome.judged.versions:
        lines += ["", outcome.judged.line()]
    # Test rows and canaries may be paid for where the training rows' answers were known.
    is_paid = any(each.teacher == outcome.labels.teacher for each in outcome.paid or ())
    if outcome.teacher is None and (outcome.labels.calls or is_paid):
        lines += ["", f"teacher: {_teachers_pay(outcome)}"]
    if of_judge := _of_judge(outcome):
        lines += ["", *(f"judge: {line}" for line in of_judge)]
    board = outcome.report.scoreboard
    lines += ["", render_ladder(outcome.model.ladder)] if outcome.model.ladder else []
    lines += [
        "",
        render_table(board),
        "",
        headline(board, outcome.report.candidate),
    ]
    if waiting := describe_waiting(board):
        lines.append(waiting)
    tables = [render_figures(board)]
    if outcome.decision.verdicts:
        tables.append(render_verdicts(outcome.decision.verdicts))
    # What earlier versions evaluated has no figures.
    for text in filter(None, tables):
        lines += ["", text]
    lines += ["", verdict(outcome)]
    if advice := advice_of(outcome):
        lines.append(advice)
    if following := next_step(outcome):
        lines.append(following)
    doubtful = ArtifactStore().fetch(outcome.report.artifact) / DOUBTFUL_FILE
    if doubtful.exists():
        lines.append(f"labels to check: {doubtful}")
    if outcome.page:
        lines.append(f"report: {page_path(ArtifactStore(), outcome.page)}")
    return "\n".join(lines)
