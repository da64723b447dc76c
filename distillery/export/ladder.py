"""The quantisation ladder: each form of a student is built and asked the validation rows, and the smallest that loses
no more accuracy than the recipe allows is picked.

Files out of `climb`: the picked form's model folder, and ladder.json (a records.Ladder) beside its files.
"""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from distillery.data.examples import read_examples
from distillery.errors import ExportError, ModelError
from distillery.evaluation.scoreboard import plain_table, points
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
from distillery.export.rung_process import BuildingJob, Built
from distillery.processes import run_in_process
from distillery.prompts import TransformersTokenizer, render_ids
from distillery.recipe import ExportForm, ExportRecipe, PromptRecipe
from distillery.records import Ladder, Rung
from distillery.storage.working import working_folder

LADDER_FILE = "ladder.json"

CALIBRATION_PROMPTS = 128
"""As many as Olive's own default; rows are in the order of a hash, so that the first are a sample."""

_log = logging.getLogger(__name__)


def climb(
    student: ModelToScore,
    recipe: ExportRecipe,
    prompt: PromptRecipe,
    validation: Path,
    train: Path | None,
    out: Path,
    *,
    threads: int | None = None,
) -> Ladder:
    """Builds and measures each rung of `recipe` for the float `student`, and leaves the picked one in `out`.

    `validation` holds answered Examples; `train` those whose prompts gptq is calibrated on. A rung that can't be built
    or asked here is shown with the reason. Raises ExportError where none keeps to export.largest_loss."""
    _examples, gold = answered_rows(validation, "validation")
    exact = score_model(student, validation, prompt, threads, "float32")
    rungs: list[Rung] = []
    with working_folder("ladder") as work:
        calibration = (
            _calibration(student, prompt, train, work / "prompts.jsonl")
            if recipe.calibrated
            else None
        )
        for number, form in enumerate(recipe.ladder):
            started = time.perf_counter()
            try:
                job = _job(student, form, calibration, work / str(number))
                built = Built.model_validate_json(
                    run_in_process("distillery.export.rung_process", job, 60 * recipe.rung_minutes)
                )
                exported = ModelToScore(name=form.title, kind="onnx", folder=job.out)
                scored = score_model(exported, validation, prompt, threads)
                rungs.append(measured(form, built.bytes, scored, exact, gold))
            except ModelError as error:
                rungs.append(
                    Rung(form=form, note=f"left out: {_reason(error, form, work / str(number))}")
                )
            _log.info("rung %s (%.0f s)", _line(rungs[-1]), time.perf_counter() - started)
            best = pick(rungs, recipe.largest_loss)
            for other in range(number + 1):
                if other != best:
                    shutil.rmtree(work / str(other), ignore_errors=True)
        if best is None:
            raise ExportError(_refusal(rungs, recipe.largest_loss, len(gold)))
        shutil.copytree(work / str(best), out, dirs_exist_ok=True)
    right = right_answers(exact.answers, gold)
    judged = tuple(_judged(rungs, best, recipe.largest_loss))
    found = Ladder(
        rows=len(gold),
        accuracy=sum(right) / len(gold),
        largest_loss=recipe.largest_loss,
        rungs=judged,
    )
    (out / LADDER_FILE).write_text(
        json.dumps(found.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8"
    )
    return found


def _reason(error: ModelError, form: ExportForm, folder: Path) -> str:
    """Without what the reader knows, or will not find any more."""
    return str(error).removeprefix(f"{form.title}: ").replace(f"{folder}: ", "")


def _calibration(
    student: ModelToScore, prompt: PromptRecipe, train: Path | None, file: Path
) -> Path:
    from distillery.models.load import load_tokenizer

    tokenizer = TransformersTokenizer(load_tokenizer(Path(student.folder), student.remote_code))
    examples = read_examples(train) if train else []
    rendered = (
        render_ids(example, prompt, tokenizer) for example in examples[:CALIBRATION_PROMPTS]
    )
    file.write_text("".join(f"{json.dumps(ids)}\n" for ids in rendered if ids), encoding="utf-8")
    return file


def _job(
    student: ModelToScore, form: ExportForm, calibration: Path | None, out: Path
) -> BuildingJob:
    return BuildingJob(
        model=student.folder,
        adapter=student.adapter,
        remote_code=student.remote_code,
        form=form,
        calibration=str(calibration) if calibration else None,
        out=str(out),
    )


def measured(form: ExportForm, size: int, scored: Scored, exact: Scored, gold: Answers) -> Rung:
    """A rung of `size` bytes beside the float student `exact`, both asked the rows whose answers are `gold`."""
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
    """Whether a rung loses no more accuracy than allowed, by its paired 95 % interval.

    A loss that is proven (the interval lies below 0) must be proven small: no part of the interval below -largest_loss.
    A loss that is not must look small: for some 100 rows the interval reaches to -3 points even where all answers are
    the same, and to ask for proof there would refuse every rung."""
    if rung.difference is None or rung.interval is None:
        return False
    least = -largest_loss - 1e-9
    return rung.interval.low >= least or (rung.interval.high >= 0 and rung.difference >= least)


def pick(rungs: Sequence[Rung], largest_loss: float) -> int | None:
    """The place of the smallest folder that keeps to `largest_loss`; of two as small, the one that loses less."""
    fit = [place for place, rung in enumerate(rungs) if keeps_to(rung, largest_loss)]
    return min(
        fit, key=lambda place: (rungs[place].bytes, -(rungs[place].difference or 0)), default=None
    )


def _judged(rungs: Sequence[Rung], best: int, largest_loss: float) -> list[Rung]:
    """Each with its verdict."""
    judged = []
    for place, rung in enumerate(rungs):
        if place == best:
            note = "picked"
        elif keeps_to(rung, largest_loss):
            note = "no smaller"
        elif rung.difference is not None and rung.difference >= -largest_loss - 1e-9:
            note = "may lose more"
        else:
            note = rung.note or "loses more"
        judged.append(rung.model_copy(update={"picked": place == best, "note": note}))
    return judged


def _refusal(rungs: Sequence[Rung], largest_loss: float, rows: int) -> str:
    built = [rung for rung in rungs if rung.difference is not None]
    if not built:
        return f"export.ladder: no rung could be built; {rungs[0].form.title}: {rungs[0].note}"
    least = max(built, key=lambda rung: rung.difference or 0)
    return (
        f"export.largest_loss: no rung keeps to {100 * largest_loss:.1f} points on {rows} validation rows; the least "
        f"loss is that of {_line(least)}; add a rung, such as {{precision: fp16}}, or allow more"
    )


def _line(rung: Rung) -> str:
    if rung.bytes is None or rung.difference is None or rung.interval is None:
        return f"{rung.form.title}: {rung.note}"
    return f"{rung.form.title}: {rung.bytes / 1e6:.1f} MB, {100 * rung.difference:+.1f} points {points(rung.interval)}"


_TITLES = (
    "form",
    "folder",
    "accuracy",
    "points vs\nfloat [95 %]",
    "mean\n|dp|",
    "largest\n|dp|",
    "answers\nchanged",
    "verdict",
)


def table(ladder: Ladder) -> list[dict[str, str]]:
    """The ladder for people: a row for the float student, and one a rung."""
    titles = [title.replace("\n", " ") for title in _TITLES]
    return [
        dict(zip(titles, row, strict=True)) for row in (_float(ladder), *map(_cells, ladder.rungs))
    ]


def _float(ladder: Ladder) -> list[str]:
    return ["float student", "", f"{ladder.accuracy:.3f}", "", "", "", "", ""]


def _cells(rung: Rung) -> list[str]:
    if (
        rung.bytes is None
        or rung.difference is None
        or rung.interval is None
        or rung.departure is None
    ):
        return [rung.form.title, *[""] * (len(_TITLES) - 2), rung.note]
    return [
        rung.form.title,
        f"{rung.bytes / 1e6:.1f} MB",
        f"{rung.accuracy:.3f}",
        f"{100 * rung.difference:+.1f} {points(rung.interval)}",
        f"{rung.departure.mean:.4f}",
        f"{rung.departure.largest:.3f}",
        str(rung.departure.changed),
        rung.note,
    ]


def render_ladder(ladder: Ladder) -> str:
    """The same for a terminal, 120 columns at most; a line for each rung that was left out stands below."""
    built = [rung for rung in ladder.rungs if rung.bytes is not None]
    lines = [plain_table(_TITLES, [_float(ladder), *map(_cells, built)])]
    lines += [_line(rung) for rung in ladder.rungs if rung.bytes is None]
    allowed = f"export.largest_loss allows {100 * ladder.largest_loss:.1f} points on {ladder.rows} validation rows"
    return "\n".join([*lines, allowed])
