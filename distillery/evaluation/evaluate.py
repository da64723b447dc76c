"""Evaluation: all predictors on the same test rows, the scoreboard in four forms, and the gate before the registry.

Files out of `evaluate`: report.json (the scoreboard and what was measured where), answers.jsonl (a test row a line:
example_id, gold and each predictor's letter or null), scoreboard.md, scoreboard.png. answers.jsonl is the same byte for
byte for equal answers; the other three hold measured speeds.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distillery.errors import ModelError
from distillery.evaluation.baselines import MAJORITY, TFIDF, score_baselines
from distillery.evaluation.scoreboard import (
    ANSWERS_FILE,
    GOLD,
    PLOT_FILE,
    REPORT_FILE,
    TABLE_FILE,
    TEACHER,
    headline,
    plot_scoreboard,
    render_markdown,
)
from distillery.evaluation.scoring import (
    Answers,
    ModelToScore,
    Scored,
    answered_rows,
    departure,
    right_answers,
    score_model,
)
from distillery.evaluation.statistics import paired_interval, wilson
from distillery.machine import machine_name, usable_cores
from distillery.recipe import PromptRecipe
from distillery.records import Departure, Example, Interval, ScoreRow

_log = logging.getLogger(__name__)


def evaluate(
    models: Sequence[ModelToScore],
    teacher: str | Mapping[str, str],
    test: Path,
    train: Path | None,
    prompt: PromptRecipe,
    candidate: str,
    out: Path,
    *,
    float_model: str | None = None,
    threads: int | None = None,
) -> tuple[ScoreRow, ...]:
    """Scores every model and the baselines on the rows of `test`, and writes the report into `out` (see the module).

    `teacher` is the name of one of `models`, or an endpoint's letters by example_id. `train` holds answered Examples,
    from which the baselines learn; without it they are left out. `candidate` is the model that may be registered, and
    `float_model` the one that it was exported from: how far the two are apart is a figure of the report.
    Raises DataError for test rows that can't serve, ModelError for a model that can't be scored."""
    examples, gold = answered_rows(test)
    teacher_name = teacher if isinstance(teacher, str) else TEACHER
    baselines, notes = score_baselines(examples, train)
    answers: dict[str, Answers] = {GOLD: gold, **baselines}
    if not isinstance(teacher, str):
        answers[TEACHER] = [teacher.get(example.example_id) for example in examples]
    _check_names([*answers, *(model.name for model in models)], teacher_name, candidate)
    scored: dict[str, Scored] = {}
    for model in models:
        scored[model.name] = score_model(model, test, prompt, threads)
        answers[model.name] = scored[model.name].answers
        _log.info("scored %s: %.1f rows a second", model.name, scored[model.name].rows_per_second)
    by_name = {model.name: model for model in models}
    apart = {candidate: departure(scored[candidate], scored[float_model])} if float_model else {}
    rows = tuple(
        _score_row(
            name, answers, teacher_name, by_name.get(name), scored.get(name), apart.get(name)
        )
        for name in answers
    )
    notes += _measuring_notes(scored, threads or usable_cores())
    _write_report(out, rows, candidate, teacher_name, scored, notes)
    _write_answers(out / ANSWERS_FILE, examples, answers)
    return rows


def _check_names(names: list[str], teacher: str, candidate: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ModelError(f"two lines of the scoreboard are named {name!r}; rename one")
    for name in (teacher, candidate):
        if name not in names:
            raise ModelError(f"no model to score is named {name!r}, only {', '.join(names)}")


def _score_row(
    name: str,
    answers: Mapping[str, Answers],
    teacher: str,
    model: ModelToScore | None,
    scored: Scored | None,
    apart: Departure | None,
) -> ScoreRow:
    gold, own = answers[GOLD], answers[name]
    right = right_answers(own, gold)
    correct = sum(right)
    compared = name not in (GOLD, teacher)
    agreed = sum(a is not None and a == b for a, b in zip(own, answers[teacher], strict=True))
    return ScoreRow(
        name=name,
        kind="reference" if name == GOLD else "baseline" if name in (MAJORITY, TFIDF) else "model",
        correct=correct,
        rows=len(gold),
        accuracy=correct / len(gold),
        interval=Interval(low=1, high=1) if name == GOLD else wilson(correct, len(gold)),
        versus_teacher=paired_interval(right, right_answers(answers[teacher], gold))
        if compared
        else None,
        agreement=agreed / len(gold) if compared else None,
        parameters=model.parameters if model else None,
        bytes=model.bytes if model else None,
        departure=apart,
        **(_speeds(scored) if scored else {}),
    )


def _speeds(scored: Scored) -> dict[str, float | None]:
    import numpy as np

    p50, p95 = (
        np.percentile(scored.latencies_ms, (50, 95)).tolist()
        if scored.latencies_ms
        else (None, None)
    )
    return {
        "rows_per_second": scored.rows_per_second or None,
        "p50_ms": p50,
        "p95_ms": p95,
        "peak_mib": scored.peak_mib,
    }


def _measuring_notes(scored: Mapping[str, Scored], threads: int) -> list[str]:
    where = "; ".join(f"{name}: {result.ran_on}" for name, result in scored.items())
    notes = (
        [f"Measured one row at a time on {machine_name()}, {threads} threads ({where})."]
        if scored
        else []
    )
    for name, result in scored.items():
        unasked = result.answers.count(None)
        if unasked:
            notes.append(
                f"{name}: {unasked} prompts are over prompt.max_tokens and count as wrong."
            )
    return notes


# The report's forms


def _write_report(
    out: Path,
    rows: Sequence[ScoreRow],
    candidate: str,
    teacher: str,
    scored: Mapping[str, Scored],
    notes: Sequence[str],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "candidate": candidate,
        "teacher": teacher,
        "machine": machine_name(),
        "ran_on": {name: result.ran_on for name, result in scored.items()},
        "load_s": {name: result.load_s for name, result in scored.items()},
        "headline": headline(rows, candidate, teacher),
        "notes": list(notes),
        "scoreboard": [row.model_dump() for row in rows],
    }
    _write(out / REPORT_FILE, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    _write(
        out / TABLE_FILE, "\n\n".join([render_markdown(rows), report["headline"], *notes]) + "\n"
    )
    plot_scoreboard(rows, teacher, out / PLOT_FILE)


def _write_answers(path: Path, examples: Sequence[Example], answers: Mapping[str, Answers]) -> None:
    columns = zip(*answers.values(), strict=True)
    lines = [
        json.dumps(
            {"example_id": example.example_id, **dict(zip(answers, letters, strict=True))},
            ensure_ascii=False,
        )
        for example, letters in zip(examples, columns, strict=True)
    ]
    _write(path, "".join(f"{line}\n" for line in lines))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
