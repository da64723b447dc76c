"""Ask all predictors the same test rows, and write down how they compare (see report.py)."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from distillery.errors import ModelError
from distillery.evaluation.baselines import BASELINES, score_baselines
from distillery.evaluation.doubtful import DOUBTFUL_FILE, Doubtful, doubtful_rows, write_doubtful
from distillery.evaluation.figures import confidence_figures, figures_of
from distillery.evaluation.gold import Gold, gold_of
from distillery.evaluation.linear_probe import (
    PROBE,
    TextStates,
    classify_states,
    cross_validated,
)
from distillery.evaluation.option_order import ORDER_ROWS
from distillery.evaluation.report import write_answers, write_report, write_rows
from distillery.evaluation.scoreboard import GOLD, TEACHER, describe_waiting
from distillery.evaluation.scoring import (
    Answers,
    ModelToScore,
    Probabilities,
    Scored,
    answered_rows,
    departure,
    score_model,
)
from distillery.evaluation.statistics import difference_interval
from distillery.machine import machine_name, usable_cores
from distillery.progress import ShowProgress, show_nothing, shown_by
from distillery.recipe import Columns, PromptRecipe
from distillery.records import Example, Interval, ScoreRow

_log = logging.getLogger(__name__)


def evaluate(
    models: Sequence[ModelToScore],
    teacher: str | Mapping[str, str],
    test: Path,
    learnt: Sequence[Example],
    prompt: PromptRecipe,
    candidate: str,
    out: Path,
    *,
    gold: Sequence[Example] = (),
    validation: Sequence[Example] = (),
    teacher_probabilities: Mapping[str, Mapping[str, float]] | None = None,
    float_model: str | None = None,
    states: TextStates | None = None,
    columns: Columns | None = None,
    fields: Sequence[str] = (),
    threshold: float | None = None,
    asked_before: Mapping[str, Scored] | None = None,
    known: Mapping[str, Mapping[int, Path]] | None = None,
    threads: int | None = None,
    progress: ShowProgress = show_nothing,
) -> tuple[ScoreRow, ...]:
    """Score every model and the baselines on the rows of `test`; write the report's files to `out`.

    `teacher` is the name of one of `models`, or an endpoint's answers by example_id, to which
    `teacher_probabilities` of the letters may belong, for some rows or all. The baselines learn
    from `learnt` and `gold` (see baselines.py). `candidate` is the model that may be registered,
    and `float_model` the one that it was exported from: the report tells how far the two depart
    from each other. The candidate is also asked up to ORDER_ROWS rows in another order of options.
    From `states` the linear probe learns `gold`, answers the rows, and doubts the labels of `gold`
    and `validation`; they are unloaded before the models are asked. `columns` and `fields` are the
    recipe's, for doubtful.csv. `threshold`: the confidence below which the candidate abstains; the
    scoreboard counts its likeliest answers all the same, and the figures tell what the threshold
    makes of them. `asked_before`: what came of models, by name, that were asked these rows before
    and are not asked again; `known`: the files of the slices of rows of which that is so, by model
    (slices.py). `progress` is shown the rows done of the models that are asked together. Raises
    DataError for test rows without gold answers, and ModelError for a model that can't be
    scored."""
    examples, letters = answered_rows(test)
    gold_answers, writes = gold_of(examples), examples[0].format is not None
    baselines, notes = score_baselines(examples, learnt, gold)
    answers: dict[str, Answers] = {GOLD: letters, **baselines}
    doubtful: list[Doubtful] = []
    if states is not None:
        progress(0, len(examples), "loading the base model for a linear probe")
        with shown_by(progress):
            answers[PROBE] = classify_states(states, gold, examples, prompt)
            doubtful = doubtful_by_probe(states, gold, validation, prompt)
        states.unload()
    probabilities: dict[str, Sequence[Probabilities]] = {}
    teacher_name = TEACHER
    if isinstance(teacher, str):
        teacher_name = teacher
    else:
        answers[TEACHER] = [teacher.get(example.example_id) for example in examples]
        if teacher_probabilities:
            probabilities[TEACHER] = in_order(examples, teacher_probabilities)
    names = [*answers, *(model.name for model in models)]
    check_names(names, teacher_name, candidate)
    scored: dict[str, Scored] = {}
    measured: dict[str, dict[str, float | None]] = {}
    asked_before = asked_before or {}
    to_ask = sum(model.name not in asked_before for model in models)
    total = to_ask * len(examples) + min(len(examples), ORDER_ROWS)
    before = 0
    for model in models:
        if model.name in asked_before:
            found = asked_before[model.name]
        else:
            progress(before, total, f"loading {model.name}")
            show_asking = partial(show_rows_of_all, progress, f"asking {model.name}", before, total)
            reorder = model.name == candidate
            found = score_model(
                model,
                test,
                prompt,
                threads,
                progress=show_asking,
                reorder=reorder,
                known=(known or {}).get(model.name),
            )
            _log.info("scored %s: %.1f rows a second", model.name, found.rows_per_second)
            before += len(examples)
            if reorder:
                before += min(len(examples), ORDER_ROWS)
        scored[model.name] = found
        answers[model.name] = found.answers
        probabilities[model.name] = found.probabilities
        measured[model.name] = {"parameters": model.parameters, "bytes": model.bytes}
        measured[model.name] |= measured_figures(found)
    progress(total, total, "writing the report")
    figures = {}
    for name in answers:
        if name != GOLD:
            theirs = None if name == teacher_name else probabilities.get(teacher_name)
            figures[name] = figures_of(
                examples, answers[name], probabilities.get(name), theirs, scored.get(name)
            )
    rows = []
    for name in answers:
        row = score_row(name, answers, teacher_name, gold_answers)
        row = row.model_copy(update=measured.get(name))
        if name == candidate:
            confident = confidence_figures(examples, answers[name], probabilities[name], threshold)
            figures[name] = figures[name].model_copy(update=confident)
            row = row.model_copy(update={"figures": figures[name]})
            if float_model:
                departed = departure(scored[candidate], scored[float_model], writes)
                row = row.model_copy(update={"departure": departed})
        rows.append(row)
    notes += measuring_notes(scored, threads or usable_cores(), writes)
    if waiting := describe_waiting(rows):
        notes.append(waiting)
    for name in asked_before:
        notes.append(f"{name}: its speed may be of an earlier run with the same rows.")
    shipped = (candidate, teacher_name)
    doubted = doubtful_rows(
        "test",
        examples,
        {name: probabilities[name] for name in shipped if name in probabilities},
        {name: answers[name] for name in shipped},
    )
    doubtful = doubted + doubtful
    if doubtful:
        notes.append(
            f"{len(doubtful)} labels are contradicted with confidence; {DOUBTFUL_FILE} lists them."
        )
    write_report(out, rows, candidate, teacher_name, scored, notes, figures)
    write_answers(out, examples, answers)
    write_rows(out, examples, answers, probabilities, scored)
    if not writes:
        write_doubtful(out, doubtful, columns or Columns(), fields)
    return tuple(rows)


def doubtful_by_probe(
    states: TextStates,
    gold: Sequence[Example],
    validation: Sequence[Example],
    prompt: PromptRecipe,
) -> list[Doubtful]:
    """Return the gold and validation rows whose labels the linear probe contradicts."""
    shares = cross_validated(states, [*gold, *validation], prompt)
    found = doubtful_rows("gold", gold, {PROBE: shares[: len(gold)]})
    return found + doubtful_rows("validation", validation, {PROBE: shares[len(gold) :]})


def in_order(
    examples: Sequence[Example], distributions: Mapping[str, Mapping[str, float]]
) -> list[Probabilities]:
    """Return the probabilities over each row's options from those of letters by example_id. A
    letter that is not there has 0."""
    found: list[Probabilities] = []
    for example in examples:
        letters = distributions.get(example.example_id)
        if letters is None:
            found.append(None)
        else:
            found.append(tuple(letters.get(letter, 0.0) for letter in example.keys))
    return found


def show_rows_of_all(
    progress: ShowProgress, text: str, before: int, total: int, done: int, _of: int, _text: str
) -> None:
    """Show the rows that one model has done as rows of all models together."""
    progress(before + done, total, text)


def check_names(names: Sequence[str], teacher: str, candidate: str) -> None:
    """Raise ModelError for a name that two rows of the scoreboard have, or that none has."""
    for name, count in Counter(names).items():
        if count > 1:
            raise ModelError(f"two lines of the scoreboard are named {name!r}; rename one")
    for name in (teacher, candidate):
        if name not in names:
            raise ModelError(f"no model to score is named {name!r}, only {', '.join(names)}")


def score_row(name: str, answers: Mapping[str, Answers], teacher: str, gold: Gold) -> ScoreRow:
    """Return a predictor's row of the scoreboard, with what follows from its answers alone."""
    own, rows = answers[name], len(gold.answers)
    estimate = gold.estimate(own, gold.metric)
    kind: Literal["reference", "baseline", "model"] = "model"
    interval = Interval(low=estimate.low, high=estimate.high)
    if name == GOLD:
        kind, interval = "reference", Interval(low=1, high=1)
    elif name in (*BASELINES, PROBE):
        kind = "baseline"
    versus_teacher = agreement = None
    if name not in (GOLD, teacher):
        theirs = answers[teacher]
        versus_teacher = difference_interval(gold.paired(own, theirs))
        agreed = 0
        for letter, their_letter in zip(own, theirs, strict=True):
            agreed += letter is not None and letter == their_letter
        agreement = agreed / rows
    return ScoreRow(
        name=name,
        kind=kind,
        correct=sum(gold.rights(own)),
        rows=rows,
        accuracy=estimate.value,
        interval=interval,
        versus_teacher=versus_teacher,
        agreement=agreement,
        metric=gold.metric,
    )


def measured_figures(scored: Scored) -> dict[str, float | None]:
    """Return a model's speed, latency and memory, and how far other work slowed it down, by their
    names in a ScoreRow."""
    import numpy as np

    figures: dict[str, float | None] = {"peak_mib": scored.peak_mib, "waited": scored.waited}
    if scored.latencies_ms:
        figures["rows_per_second"] = scored.rows_per_second
        figures["p50_ms"], figures["p95_ms"] = np.percentile(scored.latencies_ms, (50, 95)).tolist()
    return figures


def measuring_notes(scored: Mapping[str, Scored], threads: int, writes: bool = False) -> list[str]:
    """Return notes on where and how the models were measured, and on prompts that are too long;
    `writes`: answers are written, of which some are none."""
    if not scored:
        return []
    where = "; ".join(f"{name}: {result.ran_on}" for name, result in scored.items())
    notes = [f"Measured one row at a time on {machine_name()}, {threads} threads ({where})."]
    for name, result in scored.items():
        unasked = result.answers.count(None)
        timed = len(result.latencies_ms)
        if timed + unasked < len(result.answers):
            notes.append(
                f"{name}: speed and latency are of the first {timed} rows; the others were asked "
                "in batches, which give the same answers."
            )
        if unasked and writes:
            reasons = Counter(reason for reason in result.no_answer if reason)
            counted = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(5))
            notes.append(f"{name}: {unasked} rows have no answer and count as wrong: {counted}.")
        elif unasked:
            notes.append(
                f"{name}: {unasked} prompts are over prompt.max_tokens and count as wrong."
            )
        again = result.reordered
        if again:
            notes.append(
                f"{name}: {again.rows} rows were asked again with their options in another order, "
                f"which took {again.seconds:.1f} s."
            )
    return notes
