"""A judge of texts: it compares the student's answers with the teacher's on test rows."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from prefect import task
from prefect.cache_policies import NO_CACHE

from distillery.data.examples import read_examples
from distillery.evaluation.preferences import compare_pairs, with_preferences
from distillery.evaluation.report import ANSWERS_FILE, read_answers
from distillery.evaluation.scoreboard import TEACHER
from distillery.labels.canaries import drift_of, earlier_questions
from distillery.labels.pairs import pairs_of
from distillery.labels.store import LabelStore
from distillery.recipe import JudgeRecipe, PromptRecipe
from distillery.records import EvaluationReport, Preferences, Rows, TeacherDrift
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from distillery.teacher.endpoint import resolve_endpoint
from distillery.teacher.identity import teacher_identity
from tasks.labels import heed_drift, payer_of_run, slots_of
from tasks.progress import conclude, show_rows
from tasks.stage import RESULT, Stage, is_scheduled, origin, stage


@stage("ask judge", version=1)
def ask_judge(
    report: EvaluationReport, test: Rows, prompt: PromptRecipe, judge: JudgeRecipe, identity: str
) -> Preferences:
    """Ask the judge `identity` which of two answers is better, what the label store does not know
    yet. `prompt` is what the teacher was asked with."""
    started = time.perf_counter()
    store = ArtifactStore()
    given = read_answers(store.fetch(report.artifact) / ANSWERS_FILE)
    pairs = pairs_of(
        read_examples(store.fetch(test.artifact) / test.file),
        {example_id: row[report.candidate] for example_id, row in given.items()},
        {example_id: row[TEACHER] for example_id, row in given.items()},
        judge.rows,
    )
    with working_folder("judge") as folder, LabelStore(max_age=judge.max_age) as answers:
        work = compare_pairs(
            pairs,
            prompt,
            judge,
            resolve_endpoint(judge),
            answers,
            folder,
            show_rows,
            slots=slots_of(judge),
            payer=payer_of_run(),
        )
        figures, counts = asyncio.run(work)
        artifact = store.put(folder)
    conclude(f"{figures.line()}; {counts.asked} answers")
    return Preferences(
        artifact=artifact,
        figures=figures,
        asked=counts.asked,
        usage=counts.usage,
        cost=counts.cost,
        currency=counts.currency,
        paid=counts.paid,
        **origin(started),
    )


class Compared(NamedTuple):
    """An evaluation's report with a judge's figures, if one was asked, and its records."""

    report: EvaluationReport
    preferences: Preferences | None = None
    drift: TeacherDrift | None = None


def preferred(
    report: EvaluationReport,
    test: Rows,
    prompt: PromptRecipe,
    judge: JudgeRecipe | None,
    again: Callable[[Stage, Any], Any],
) -> Compared:
    """Have the recipe's judge, if there is one, compare the answers of an evaluation."""
    if judge is None:
        return Compared(report)
    identity = teacher_identity(judge, None)
    watched, drift = judge.with_canaries(is_scheduled()), None
    if watched.canaries.rows:
        drift = judge_canaries(watched, identity)
    # As of a teacher's labels: which answers are too old depends on the day.
    asked = ask_judge.with_options(refresh_cache=True) if judge.max_age else ask_judge
    preferences = again("ask judge", asked)(report, test, prompt, judge, identity)
    return Compared(with_preferences(report, preferences.figures), preferences, drift)


@task(name="judge canaries", task_run_name="judge canaries", cache_policy=NO_CACHE, **RESULT)
def judge_canaries(judge: JudgeRecipe, identity: str) -> TeacherDrift:
    """Ask the judge some of its earlier questions again and report how many are answered
    differently than before."""
    endpoint, slots = resolve_endpoint(judge), slots_of(judge)
    with LabelStore() as answers:
        asked = earlier_questions(judge, identity, answers)
        work = drift_of(asked, judge, endpoint, answers, slots=slots, payer=payer_of_run())
        drift = asyncio.run(work)
    heed_drift(drift, judge, identity)
    return drift
