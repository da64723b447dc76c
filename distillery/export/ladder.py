"""The quantisation ladder: build a student in each of several forms, ask each the validation rows,
and keep the smallest that loses no more accuracy than the recipe allows.

Files out of `climb`: the kept form's model folder, and beside its files ladder.json, a
records.Ladder.
"""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from distillery.data.examples import read_examples, write_examples
from distillery.errors import ExportError, ModelError, OutOfResources
from distillery.evaluation.scoring import (
    Answers,
    ModelToScore,
    Scored,
    answered_rows,
    departure,
    right_answers,
    score_model,
)
from distillery.evaluation.statistics import paired_interval
from distillery.export.ladder_table import describe_rung, rows_in_words
from distillery.export.rung_process import BuildingJob, Built
from distillery.labels.files import read_labels
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

NOT_NEEDED = "not built: a smaller form keeps to the loss"

ROUNDING = 1e-9
"""A rung that is at the limit, but for rounding, keeps to it."""

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
    export.largest_loss."""
    rungs: list[Rung] = []
    with working_folder("ladder") as work:
        asked, learnt = validation, 0
        if recipe.training_rows and train and labels:
            asked = work / "rows.jsonl"
            learnt = write_rows_to_ask(validation, train, labels, recipe.training_rows, asked)
        _examples, gold = answered_rows(asked, "validation")
        show_float = partial(show_part, progress, 0, len(recipe.ladder), "float student")
        exact = score_model(student, asked, prompt, threads, "float32", progress=show_float)
        calibration = None
        if recipe.calibrated:
            calibration = work / "prompts.jsonl"
            write_prompts(student, prompt, train, calibration)
        best = None
        for index, form in enumerate(recipe.ladder):
            if best is not None and recipe.ladder[best].quantised and not form.quantised:
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
            best = pick(rungs, recipe.largest_loss)
            for other in range(index + 1):
                if other != best:
                    shutil.rmtree(work / str(other), ignore_errors=True)
        if best is None:
            raise ExportError(refusal(rungs, recipe.largest_loss, len(gold), learnt))
        shutil.copytree(work / str(best), out, dirs_exist_ok=True)
    rungs = with_verdicts(rungs, best, recipe.largest_loss)
    ladder = Ladder(
        rows=len(gold),
        training_rows=learnt,
        accuracy=sum(right_answers(exact.answers, gold)) / len(gold),
        largest_loss=recipe.largest_loss,
        rungs=tuple(rungs),
    )
    text = json.dumps(ladder.model_dump(mode="json"), indent=1)
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
            answer = found[example.example_id].answer
            rows.append(example.model_copy(update={"answer_key": answer}))
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


def measured(form: ExportForm, size: int, scored: Scored, exact: Scored, gold: Answers) -> Rung:
    """Return a rung of `size` bytes beside the float student `exact`; both were asked the rows
    whose answers are `gold`."""
    own, floats = right_answers(scored.answers, gold), right_answers(exact.answers, gold)
    return Rung(
        form=form,
        bytes=size,
        accuracy=sum(own) / len(gold),
        difference=(sum(own) - sum(floats)) / len(gold),
        interval=paired_interval(own, floats),
        departure=departure(scored, exact),
    )


def keeps_to(rung: Rung, largest_loss: float) -> bool:
    """Return whether a rung loses no more accuracy than `largest_loss`.

    If the paired 95 % interval excludes zero, so that the loss is proven, all of it must lie within
    `largest_loss`; otherwise the point estimate must. To ask for proof there too would refuse every
    rung: with some 100 rows, the interval reaches to -3 points even where all answers are the
    same."""
    if rung.difference is None or rung.interval is None:
        return False
    least = -largest_loss - ROUNDING
    if rung.interval.low >= least:
        return True
    return rung.interval.high >= 0 and rung.difference >= least


def pick(rungs: Sequence[Rung], largest_loss: float) -> int | None:
    """Return the index of the smallest rung that keeps to `largest_loss`, of equals the one that
    loses less; None where no rung does."""
    kept = [index for index, rung in enumerate(rungs) if keeps_to(rung, largest_loss)]
    return min(
        kept, key=lambda index: (rungs[index].bytes, -(rungs[index].difference or 0)), default=None
    )


def with_verdicts(rungs: Sequence[Rung], picked: int, largest_loss: float) -> list[Rung]:
    """Return the rungs with the verdict on each in its note."""
    judged = []
    for index, rung in enumerate(rungs):
        if index == picked:
            note = "picked"
        elif keeps_to(rung, largest_loss):
            note = "no smaller"
        elif rung.difference is not None and rung.difference >= -largest_loss - ROUNDING:
            note = "may lose more"
        else:
            note = rung.note or "loses more"
        judged.append(rung.model_copy(update={"picked": index == picked, "note": note}))
    return judged


def refusal(rungs: Sequence[Rung], largest_loss: float, rows: int, training_rows: int) -> str:
    """Return why no rung is picked, and what to do."""
    built = [rung for rung in rungs if rung.difference is not None]
    if not built:
        return f"export.ladder: no rung could be built; {rungs[0].form.title}: {rungs[0].note}"
    best = max(built, key=lambda rung: rung.difference or 0)
    return (
        f"export.largest_loss: no rung keeps to {100 * largest_loss:.1f} points on "
        f"{rows_in_words(rows, training_rows)}; the least loss is that of {describe_rung(best)}; "
        "add a rung, such as {precision: fp16}, or allow more"
    )
