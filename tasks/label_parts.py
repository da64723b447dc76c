"""Labelling in several processes: before the first stage `label`, children ask the teacher about
the rows, each about a part, and leave the answers in the label store. The stages find them there
and ask what is left, so that nothing depends on what becomes of a child."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from distillery.data.examples import each_example
from distillery.errors import DataError
from distillery.labels.parts import count_of_parts, rows_of_part, share_of
from distillery.labels.quote import quote
from distillery.labels.store import LabelStore
from distillery.recipe import PromptRecipe, Recipe, TeacherRecipe
from distillery.records import PreparedDataset, Rows
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from distillery.teacher.endpoint import resolve_endpoint
from distillery.teacher.identity import identity_of_cheap, teacher_identity
from distillery.teacher.ledger import Payer, spent
from tasks.children import LocalProcesses, work_by
from tasks.labels import at_once_by_one, labelling_of, payer_of_run, purpose_of, rows_to_ask
from tasks.locks import Lease, parents_lease
from tasks.parent import check_parent
from tasks.parts_work import PartsJob, PartsWork, runs_of
from tasks.progress import conclude, progress_of, show_rows
from tasks.stage import uncached


class LabelJob(PartsJob):
    """What a child does: have `teacher` asked about a part of `rows`, on behalf of the flow run
    `run` of the recipe named `recipe`. `identities` are those of the teacher and of its cheap one,
    if it has one, and `database` that of the label database, as the run knows them: a child that
    knows others asks nothing. `lease` is the run's, on asking about these rows."""

    rows: Rows
    prompt: PromptRecipe
    teacher: TeacherRecipe
    run: str
    recipe: str
    identities: tuple[str, ...]
    database: str
    lease: Lease

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Job`: asking computes nothing, so that no cores are told."""
        return {name: value for name, value in self if name != "threads"}


def parts_first(
    recipe: Recipe,
    train: Rows,
    data: PreparedDataset,
    identity: str,
    test: bool,
    deployment: str | None = None,
) -> None:
    """Have the rows that this run labels asked by runs of `deployment`, or by teacher.processes
    processes of this machine, where they are many: the `train` rows and those of other splits.
    `test`: whether the test rows are among them."""
    several = deployment is not None or recipe.teacher.processes > 1
    if several and recipe.teacher.kind == "endpoint":
        for rows, teacher in rows_to_ask(recipe, train, data, identity, test):
            if not ask_in_processes(rows, recipe.prompt, teacher, identity, deployment):
                # The others would meet the same error, after the same wait.
                return


@uncached("ask in processes")
def ask_in_processes(
    rows: Rows,
    prompt: PromptRecipe,
    teacher: TeacherRecipe,
    identity: str,
    deployment: str | None = None,
) -> bool:
    """Have processes of this machine, or runs of `deployment`, ask a teacher what the label store
    does not know, and wait for them. Return False where all of them have ended with an error. Of
    two runs that come to the same rows at once, one waits for the other."""
    payer, file = payer_of_run(), ArtifactStore().fetch(rows.artifact) / rows.file
    cheap = identity_of_cheap(teacher)
    identities = tuple(name for name in (identity, cheap) if name)
    with (
        at_once_by_one(rows, prompt, teacher, identity, children_of=payer.run) as lease,
        progress_of("ask in processes") as progress,
        LabelStore(max_age=teacher.max_age) as answers,
        working_folder("children") as folder,
    ):
        # Which rows are left to the teacher itself is known once the cheap one has answered.
        first, name = teacher.cheap or teacher, cheap or identity
        calls = quote(each_example(file), prompt, first, name, answers, payer=payer).calls
        runs, most = runs_of(deployment, teacher.processes, "labels_deployment")
        parts = count_of_parts(calls, teacher, most)
        if parts == 1:
            conclude(f"{calls} calls to make: one process makes them")
            return True
        made = partial(calls_of, answers, payer, teacher)
        before = made()
        job = LabelJob(
            rows=rows,
            prompt=prompt,
            teacher=teacher,
            run=payer.run,
            recipe=payer.recipe,
            identities=identities,
            database=answers.database.identity,
            lease=lease,
            parts=parts,
        )
        work = PartsWork(job, calls, "calls", lambda: made() - before)
        children = runs or LocalProcesses(parts, "flows.label_parts", folder)
        work_by(children, work, progress)
        conclude(f"{made() - before:,.0f} calls made, in {parts} parts")
        return not work.all_failed


def calls_of(answers: LabelStore, payer: Payer, teacher: TeacherRecipe) -> float:
    """Return how many calls the ledger has of a run's teachers."""
    section = teacher.budget_section
    return answers.database.run(lambda c: spent(c, payer, section, "", None))["calls"]


def ask_part(job: LabelJob) -> int:
    """Ask the teacher about a part of the rows, at this part's share of its pace, and return how
    many rows have a label. The labels themselves are thrown away: the answers are in the label
    store. Raises what the stage `label` raises, and DataError where this machine would ask another
    teacher than the run, or keep the answers where the run does not find them."""
    rows, prompt, part, parts = job.rows, job.prompt, job.number, job.parts
    file = ArtifactStore().fetch(rows.artifact) / rows.file
    refuse_others(job)
    teacher = share_of(job.teacher, part, parts)

    def tell(done: int, of: int) -> None:
        check_parent()
        check_lease()
        show_rows(done, of)

    with (
        progress_of("ask a part"),
        working_folder("labels") as folder,
        LabelStore(max_age=teacher.max_age) as answers,
        the_runs_lease(job, answers) as check_lease,
    ):
        work = labelling_of(
            lambda: rows_of_part(each_example(file), prompt, teacher, part, parts),
            rows.rows // parts,
            prompt,
            teacher,
            resolve_endpoint(teacher),
            answers,
            folder,
            payer=Payer(run=job.run, recipe=job.recipe),
            purpose=purpose_of(rows),
            progress=tell,
        )
        counts = asyncio.run(work)
        conclude(f"{counts.accepted} rows labelled, {counts.rejected} rejected")
    return counts.accepted


def the_runs_lease(
    job: LabelJob, answers: LabelStore
) -> AbstractContextManager[Callable[[], None]]:
    """Share the run's lease, as `parents_lease` does. Raises DataError for another database, where
    there is none."""
    if answers.database.identity != job.database:
        raise DataError(
            "DISTILLERY_LABELS: another database than that of the run, which would pay for all "
            "answers again; set it to the same one"
        )
    return parents_lease(job.lease)


def refuse_others(job: LabelJob) -> None:
    """Raise DataError where this machine's settings make other teachers than those of the run."""
    teachers = [each for each in (job.teacher, job.teacher.cheap) if each]
    for teacher, expected in zip(teachers, job.identities, strict=True):
        own = teacher_identity(teacher, None)
        if own != expected:
            raise DataError(
                f"{teacher.variables}_NAME: makes the {teacher.who} {own} here, and the run's is "
                f"{expected}; set it as the run has it"
            )
