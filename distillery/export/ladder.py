"""The quantisation ladder: build a student in each of several forms, ask each the validation rows,
and keep the fastest or the smallest that loses no more accuracy, or of the metric of written
answers, than the recipe allows.

Files out of `climb`: the kept form's model folder, and beside its files ladder.json, a
records.Ladder without what was timed: equal runs leave equal files.
"""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

from distillery.data.examples import read_examples, write_examples
from distillery.errors import ExportError, ModelError, OutOfResources
from distillery.evaluation.gold import Gold, gold_of
from distillery.evaluation.scoring import (
    ModelToScore,
    Scored,
    answered_rows,
    departure,
    score_model,
)
from distillery.evaluation.statistics import difference_interval
from distillery.export.choice import candidates, keeps_to, pick, reason_for, refusal, with_verdicts
from distillery.export.ladder_table import describe_rung
from distillery.export.rung_process import BuildingJob, Built
from distillery.labels.files import read_labels
from distillery.machine import machine_name
from distillery.models.load import load_tokenizer
from distillery.processes import run_in_process
from distillery.progress import ShowProgress, show_nothing
from distillery.prompts import TransformersTokenizer, render_ids
from distillery.recipe import ExportForm, ExportRecipe, PromptRecipe
from distillery.records import Ladder, Rung
from distillery.storage.working import working_folder

LADDER_FILE = "ladder.json"

CALIBRATION_PROMPTS = 128
"""Olive's own default. Rows are in the order of a hash, so that the first are a sample."""

NOT_NEEDED = "not built: a quantised form keeps to the loss"

ROUNDS = 3

TIMED_ROWS = 50
"""Rows of a round, the first ones: with their median over the rounds, the speed of a rung is within
choice.NOISE of that which it has on another day."""

_log = logging.getLogger(__name__)


def climb(
    student: ModelToScore,
    recipe: ExportRecipe,
    prompt: PromptRecipe,
    validation: Path,
    train: Path | None,
    out: Path,
    *,
    labels: Path | None = None,
    threads: int | None = None,
    progress: ShowProgress = show_nothing,
) -> Ladder:
    """Build and measure each rung of `recipe` for the float `student`, and copy the picked one to
    `out`.

    `validation` holds answered Examples, `train` those whose prompts gptq is calibrated on, and of
    which export.training_rows are asked too, if the folder `labels` has labels for them.
    `progress` is shown the rungs that are done, and the passes or rows of the one under way. A rung
    that can't be built or asked is shown with the reason. Raises ExportError where no rung keeps to
    export.largest_loss and to the bounds of export.choose.

    A rung's speed is that with which it answered the first rows. Where speed decides between
    several, these are timed again, in turns."""
    loss, choose = recipe.largest_loss, recipe.choose
    rungs: list[Rung] = []
    with working_folder("ladder") as work:
        asked, learnt = validation, 0
        if recipe.training_rows and train and labels:
            asked = work / "rows.jsonl"
            learnt = write_rows_to_ask(validation, train, labels, recipe.training_rows, asked)
        examples, _ = answered_rows(asked, "validation")
        gold = gold_of(examples)
        show_float = partial(show_part, progress, 0, len(recipe.ladder), "float student")
        exact = score_model(student, asked, prompt, threads, "float32", progress=show_float)
        calibration = None
        if recipe.calibrated:
            calibration = work / "prompts.jsonl"
            write_prompts(student, prompt, train, calibration)
        left: list[int] = []
        for index, form in enumerate(recipe.ladder):
            quantised_keeps = any(rung.form.quantised and keeps_to(rung, loss) for rung in rungs)
            if quantised_keeps and not form.quantised:
                rungs.append(Rung(form=form, note=NOT_NEEDED))
                continue
            started = time.perf_counter()
            folder = work / str(index)
            title = f"rung {index + 1} of {len(recipe.ladder)}, {form.title}"
            show_rung = partial(show_part, progress, index, len(recipe.ladder), title)
            try:
                size = build_rung(
                    student, form, calibration, folder, recipe.rung_minutes, show_rung
                )
                exported = ModelToScore(name=form.title, kind="onnx", folder=str(folder))
                scored = score_model(exported, asked, prompt, threads, progress=show_rung)
                rungs.append(measured(form, size, scored, exact, gold))
            except ModelError as error:
                # Without what the reader knows already, or will not find any more.
                reason = str(error).removeprefix(f"{form.title}: ").replace(f"{folder}: ", "")
                short = isinstance(error, OutOfResources)
                rungs.append(Rung(form=form, note=f"left out: {reason}", out_of_resources=short))
            _log.info("rung %s (%.0f s)", describe_rung(rungs[-1]), time.perf_counter() - started)
            left = candidates(rungs, loss, choose)
            for other in range(index + 1):
                if other not in left:
                    shutil.rmtree(work / str(other), ignore_errors=True)
        if len(left) > 1:
            first_rows = work / "first_rows.jsonl"
            write_examples(examples[:TIMED_ROWS], first_rows)
            rungs = timed_in_turns(rungs, left, work, first_rows, prompt, threads, progress)
        best = pick(rungs, loss, choose)
        if best is None:
            raise ExportError(refusal(rungs, loss, choose, len(examples), learnt))
        shutil.copytree(work / str(best), out, dirs_exist_ok=True)
    ladder = Ladder(
        rows=len(examples),
        training_rows=learnt,
        accuracy=gold.estimate(exact.answers, gold.metric).value,
        largest_loss=loss,
        choose=choose,
        reason=reason_for(rungs, loss, choose),
        machine=machine_name(),
        rungs=tuple(with_verdicts(rungs, best, loss, choose)),
        metric=gold.metric,
    )
    # Without what was timed, which differs between equal runs.
    written = ladder.model_dump(
        mode="json",
        exclude={
            "reason": True,
            "machine": True,
            "rungs": {"__all__": {"p50_ms": True, "rows_per_second": True}},
        },
    )
    text = json.dumps(written, indent=1)
    (out / LADDER_FILE).write_text(f"{text}\n", encoding="utf-8")
    return ladder


def write_rows_to_ask(validation: Path, train: Path, labels: Path, most: int, file: Path) -> int:
    """Write the validation rows to `file`, and after them at most `most` training rows with the
    teacher's labels for answers. Return how many these are."""
    rows = read_examples(validation)
    found = read_labels(labels)
    learnt = 0
    # In the order of a hash, so that the first are a sample.
    for example in read_examples(train):
        if learnt == most:
            break
        if example.example_id in found:
            label = found[example.example_id]
            taught = {"answer_key": label.answer, "references": label.references}
            rows.append(example.model_copy(update=taught))
            learnt += 1
    write_examples(rows, file)
    return learnt


def show_part(
    progress: ShowProgress, done: int, of: int, title: str, _done: int, _of: int, text: str
) -> None:
    """Show how far one part of the ladder is as a text, with the rungs that are done."""
    progress(done, of, f"{title}: {text}")


def write_prompts(
    student: ModelToScore, prompt: PromptRecipe, train: Path | None, file: Path
) -> None:
    """Write the first training rows' prompts to `file`, each line a JSON list of token ids; a row
    whose prompt is too long is left out."""
    tokenizer = TransformersTokenizer(load_tokenizer(Path(student.folder), student.remote_code))
    examples = read_examples(train) if train else []
    lines = []
    for example in examples[:CALIBRATION_PROMPTS]:
        ids = render_ids(example, prompt, tokenizer)
        if ids:
            lines.append(f"{json.dumps(ids)}\n")
    file.write_text("".join(lines), encoding="utf-8")


def build_rung(
    student: ModelToScore,
    form: ExportForm,
    calibration: Path | None,
    out: Path,
    minutes: float,
    progress: ShowProgress,
) -> int:
    """Build a form of the student into `out`, in a process of its own; return its size in bytes.

    Raises ModelError where that fails or takes longer than `minutes`."""
    job = BuildingJob(
        model=student.folder,
        adapter=student.adapter,
        remote_code=student.remote_code,
        form=form,
        calibration=str(calibration) if calibration else None,
        out=str(out),
    )
    result = run_in_process("distillery.export.rung_process", job, 60 * minutes, progress)
    return Built.model_validate_json(result).bytes


def measured(form: ExportForm, size: int, scored: Scored, exact: Scored, gold: Gold) -> Rung:
    """Return a rung of `size` bytes beside the float student `exact`; both were asked the rows that
    `gold` judges."""
    pairs = gold.paired(scored.answers, exact.answers)
    rung = Rung(
        form=form,
        bytes=size,
        accuracy=pairs.values[0],
        difference=pairs.difference,
        interval=difference_interval(pairs),
        departure=departure(scored, exact, written=gold.metric is not None),
    )
    return with_speed(rung, scored.latencies_ms)


def with_speed(rung: Rung, latencies_ms: Sequence[float]) -> Rung:
    """Return the rung with its speed by the latencies of rows that were asked one after another;
    without one where no row could be asked."""
    p50_ms = rows_per_second = None
    if latencies_ms:
        p50_ms = median(latencies_ms)
        rows_per_second = 1000 * len(latencies_ms) / sum(latencies_ms)
    return rung.model_copy(update={"p50_ms": p50_ms, "rows_per_second": rows_per_second})


def timed_in_turns(
    rungs: Sequence[Rung],
    indices: Sequence[int],
    work: Path,
    rows: Path,
    prompt: PromptRecipe,
    threads: int | None,
    progress: ShowProgress,
) -> list[Rung]:
    """Return the rungs with the speeds of those at `indices` measured anew: in ROUNDS rounds, in
    each of which all of them answer `rows`, so that other work on the machine slows all alike. A
    row's latency is its median over the rounds. The rungs' models are in folders of `work` by their
    index. A rung that fails here keeps the speed that it has."""
    latencies: dict[int, list[Sequence[float]]] = {index: [] for index in indices}
    for number in range(ROUNDS):
        # Back and forth: what changes in the course of a round does not favour the first.
        for index in indices if number % 2 == 0 else reversed(indices):
            if index not in latencies:
                continue
            title = rungs[index].form.title
            about = f"speeds, round {number + 1} of {ROUNDS}, {title}"
            show_round = partial(show_part, progress, len(rungs), len(rungs), about)
            model = ModelToScore(name=title, kind="onnx", folder=str(work / str(index)))
            try:
                scored = score_model(
                    model, rows, prompt, threads, progress=show_round, timed_rows=TIMED_ROWS
                )
            except ModelError as error:
                _log.warning("%s keeps its first speed: %s", title, error)
                del latencies[index]
                continue
            latencies[index].append(scored.latencies_ms)
    timed = list(rungs)
    for index, rounds in latencies.items():
        each_row = [median(row) for row in zip(*rounds, strict=True)]
        timed[index] = with_speed(rungs[index], each_row)
        _log.info("speed of %s, in turns", describe_rung(timed[index]))
    return timed
