"""What to do after a run: how to use a student that passed, or what would help most where a
classifier is not worth shipping, from the run's own figures.

All accuracies are of the same test rows. The advice names the two figures that it follows from, so
that a reader can judge it; it changes nothing.
"""

import shlex
from collections.abc import Sequence

from distillery.evaluation.baselines import TFIDF, TFIDF_ON_GOLD
from distillery.evaluation.linear_probe import PROBE
from distillery.evaluation.scoreboard import FLOAT, TEACHER, row_named
from distillery.machine import folder_of_commands
from distillery.records import CurvePoint, Outcome, RuleVerdict, ScoreRow

GAP = 0.03
"""Difference of two accuracies (0 to 1) from which it counts: three points."""

HIGH = 0.9
"""Accuracy from which TF-IDF may do by itself."""

OVERFIT, LEAST_RISE = 1.1, 0.05
"""How many times its lowest value the last validation loss must be to count as rising, and by how
much it must be above it: where nearly all answers are right, both are near zero."""


def next_step(outcome: Outcome) -> str:
    """Return the commands that fetch, ask and serve the student that a run has registered, in one
    line; of one that the gate has refused and the registry keeps, those to look at it all the same;
    "" where there is neither."""
    model, refused = outcome.registered, outcome.rejected
    command = f"{folder_of_commands()}distillery"
    if refused and refused.role == "rejected":
        model = refused
    elif model is None or not outcome.decision.passed:
        return ""
    fetch = f"{command} models download {shlex.quote(model.name)} student"
    if outcome.promotion is None or outcome.promotion.champion != model.version:
        fetch += f" --version {shlex.quote(model.version)}"
    if model.registry != "local":
        fetch += f" --registry {model.registry}"
    ask = f'{command} ask student "your text"'
    if not outcome.data.classes and outcome.report.scoreboard[0].metric is None:
        ask = f'{command} ask student "your question" --options one another'
    if model is refused:
        return f"to look at the refused student all the same: `{fetch}`, then `{ask}`"
    return f"next: `{fetch}`, then ask it by `{ask}` or serve it by `{command} serve student`"


def advice_of(outcome: Outcome) -> str:
    """Return what would help a classifier most, in one paragraph; "" for a student that passed and
    is better than TF-IDF, and for rows with options of their own."""
    if not outcome.data.classes:
        return ""
    board, candidate = outcome.report.scoreboard, outcome.report.candidate
    failed = []
    for verdict in outcome.decision.verdicts:
        if not verdict.passes and verdict.rule.kind in ("better", "keeps", "not_worse"):
            failed.append(verdict)
    cheap = best_of(board, (TFIDF, TFIDF_ON_GOLD))
    if not failed and (cheap is None or row_named(board, candidate).correct > cheap.correct):
        return ""
    found = advise_on_words(board, candidate)
    if not found and not all(verdict.verdict == "undecided" for verdict in failed):
        # More labels would help TF-IDF as well where it is the rival that is as good.
        found += advise_on_rows(board)
    teacher_curve = outcome.teacher.checkpoint.curve if outcome.teacher else ()
    found = [
        *advise_on_models(board, candidate, is_local=outcome.teacher is not None),
        *advise_on_training("teacher", teacher_curve),
        *advise_on_training("student", outcome.student.curve),
        *advise_on_tests(failed),
        *found,
    ]
    if not found:
        return ""
    return " ".join(["What would help most, by this run's own figures:", *found])


def advise_on_models(board: Sequence[ScoreRow], candidate: str, is_local: bool) -> list[str]:
    """Return where accuracy is lost on the way from the teacher to the exported student, or that
    the teacher has none to give; what loses more comes first. `is_local`: the run has trained the
    teacher itself."""
    advice: list[tuple[int, str]] = []
    ours, exact = row_named(board, candidate), best_of(board, (FLOAT,))
    teacher, rival = best_of(board, (TEACHER,)), best_of(board, (TFIDF_ON_GOLD, PROBE))
    if exact and is_ahead(exact, ours):
        text = (
            f"A gentler form of export: {named(ours)}, but {named(exact)} before the export. Set "
            "export.precision: int8, or let export.ladder choose."
        )
        advice.append((exact.correct - ours.correct, text))
    better = "a larger base model, or an endpoint" if is_local else "a better model or prompt"
    if teacher and rival and teacher.correct <= rival.correct:
        text = (
            f"A better teacher: {named(teacher)}, and {named(rival)}, which learns from the gold "
            f"rows alone. More gold rows, {better}."
        )
        advice.append((rival.correct - teacher.correct, text))
    elif teacher and exact and is_ahead(teacher, exact):
        text = (
            f"A student that learns more of what its teacher knows: {named(exact)}, "
            f"{named(teacher)}. More unlabelled rows, more layers (student.layers) or more epochs."
        )
        advice.append((teacher.correct - exact.correct, text))
    elif teacher and exact and teacher.accuracy < HIGH:
        text = (
            f"A better teacher: {named(exact)}, which is about all that its teacher knows: "
            f"{named(teacher)}. More gold rows, {better}."
        )
        advice.append((0, text))
    return [text for _, text in sorted(advice, key=lambda each: -each[0])]


def advise_on_training(whose: str, curve: Sequence[CurvePoint]) -> list[str]:
    """Return whether a model learns its rows by heart: its validation loss rises again."""
    losses = [point.validation_loss for point in curve if point.validation_loss is not None]
    if not losses or losses[-1] <= max(OVERFIT * min(losses), min(losses) + LEAST_RISE):
        return []
    rows = "gold rows" if whose == "teacher" else "unlabelled rows"
    return [
        f"The {whose} learns its rows by heart: its validation loss rises from {min(losses):.3f} "
        f"to {losses[-1]:.3f}. More {rows} help, and training.patience a little."
    ]


def advise_on_rows(board: Sequence[ScoreRow]) -> list[str]:
    """Return whether the teacher's labels tell TF-IDF more than the gold rows alone do."""
    all_rows, gold_rows = best_of(board, (TFIDF,)), best_of(board, (TFIDF_ON_GOLD,))
    if not all_rows or not gold_rows:
        return []
    if is_ahead(all_rows, gold_rows):
        return [
            f"More unlabelled rows: {named(all_rows)} with the teacher's labels, "
            f"{named(gold_rows)}."
        ]
    return [
        f"Gold rows rather than unlabelled ones, whose labels add little: {named(all_rows)} with "
        f"them, {named(gold_rows)}."
    ]


def advise_on_tests(failed: Sequence[RuleVerdict]) -> list[str]:
    """Return about how many test rows decide the rules that are undecided."""
    needed = [verdict.rows_needed or 0 for verdict in failed if verdict.verdict == "undecided"]
    if not needed:
        return []
    if not max(needed):
        return [
            "No number of test rows will tell whether there is a difference: there is hardly any."
        ]
    return [
        f"More test rows: about {max(needed):,} decide the gate's rules, if the differences stay "
        "as they are. (A rule in evaluation.rules with undecided: passed lets a student pass until "
        "then.)"
    ]


def advise_on_words(board: Sequence[ScoreRow], candidate: str) -> list[str]:
    """Return whether TF-IDF is good enough to be used in the student's place."""
    ours, cheap = row_named(board, candidate), best_of(board, (TFIDF, TFIDF_ON_GOLD))
    if cheap is None or cheap.accuracy < HIGH or ours.correct > cheap.correct:
        return []
    labels = ""
    if cheap.name == TFIDF:
        labels = " It needs the teacher's labels, which `distillery labels export` writes."
    return [
        f"Perhaps no language model at all: {named(cheap)}, {named(ours)}. These classes can be "
        f"told by their words.{labels}"
    ]


def best_of(board: Sequence[ScoreRow], names: Sequence[str]) -> ScoreRow | None:
    """Return the most accurate of the predictors on the scoreboard, the first of equals."""
    rows = [row for row in board if row.name in names]
    return max(rows, key=lambda row: row.correct, default=None)


def is_ahead(row: ScoreRow, other: ScoreRow) -> bool:
    """Return whether a predictor is ahead by GAP or more, but for rounding."""
    return row.accuracy - other.accuracy >= GAP - 1e-9


def named(row: ScoreRow) -> str:
    """Return a predictor with its accuracy."""
    return f"{row.name} has {row.accuracy:.3f}"
