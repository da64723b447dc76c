"""The whole way, from rows of a data set to a registered, downloaded, verified int4 student:

    dataset -> teacher labels -> student -> ONNX int4 -> evaluation -> gate -> registry -> download

`python -m flows.distill demo` runs it here, with no server and no account, and
`python -m flows.distill my-recipe.yaml` runs yours. On a server the same flow is the deployments
distill/demo and distill/lab.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple, get_args

from prefect import flow, get_run_logger, tags
from prefect.exceptions import Pause
from prefect.runtime import flow_run

from distillery.data.answer_format import with_schema
from distillery.data.classes import with_labels
from distillery.data.few_rows import few_rows
from distillery.errors import DistilleryError, GateRefused
from distillery.machine import machine_name
from distillery.readiness import check_methods, check_settings
from distillery.recipe import BaseModelRecipe, Recipe, TrainingRecipe, load_recipe
from distillery.records import (
    BaseModelAnswers,
    EvaluationReport,
    GateDecision,
    OnnxModel,
    Outcome,
    PreparedDataset,
    PreparedTeacher,
    Promotion,
    RegisteredModel,
    Selection,
    StudentCheckpoint,
    TeacherCheck,
    TeacherLabels,
)
from distillery.registry.signing import check_keys
from distillery.storage.artifacts import ArtifactStore, run_record
from distillery.teacher.endpoint import resolve_endpoint
from distillery.teacher.identity import teacher_identity
from flows.prepare_teacher import prepare_teacher
from flows.train_student import trained
from tasks.abstention import check_provable, with_threshold
from tasks.batches import batches_first
from tasks.dataset import prepare_dataset
from tasks.evaluation import ask_base_model, asked_models, evaluate
from tasks.hub import check_bases, pinned, source_of
from tasks.judge import preferred
from tasks.judged import judged_before
from tasks.label_parts import parts_first
from tasks.labels import canaries, check_askable, check_shares, labelled, measured_against
from tasks.onnx import exported
from tasks.registry import apply_gate, download, promote, register
from tasks.results import results_in_store
from tasks.score_parts import in_parts
from tasks.scored_models import AskedModel
from tasks.selection import selected
from tasks.stage import RESULT, Stage, begin, is_scheduled, own_tags, produced_by, refreshing
from tasks.summary import publish, render, verdict
from tasks.teacher_check import check_teacher, heed
from tasks.terminal import PlannedStage, shown_in_terminal

REFUSED = 3
"""The exit status of a run that ended well, but for the gate's refusal; argparse's is 2."""

WAITING = 4
"""The exit status of a run whose batches are under way."""

DECIDED_AGAIN = 3
"""How often the gate decides again because another run has promoted its own meanwhile."""


def _run_name() -> str:
    """Name a run by recipe, data and time: what people look for in a list of runs."""
    recipe = flow_run.parameters["recipe"]
    if not isinstance(recipe, Recipe):
        recipe = Recipe.model_validate(recipe)
    # Two runs may start in one second.
    suffix = str(flow_run.id)[:4]
    return f"{recipe.name}-{recipe.dataset.title}-{datetime.now():%Y%m%d-%H%M%S}-{suffix}"


@flow(name="distill", flow_run_name=_run_name, description=__doc__, **RESULT)
def distill(
    recipe: Recipe,
    training_deployment: str | None = None,
    refresh: tuple[Stage, ...] = (),
    labels_deployment: str | None = None,
    evaluation_deployment: str | None = None,
) -> Outcome:
    """Distil a student as the recipe says, and register it if it passes the gate.

    Args:
        recipe: What to make. `preset` fills in what is not given.
        training_deployment: Where training runs, such as train-student/gpu; by default this
            process.
        refresh: Stages to do again although nothing that they depend on has changed. The teacher's
            answers are kept: no answer is paid for twice.
        labels_deployment: Which runs ask an endpoint about many rows, such as label-parts/cpu; by
            default as teacher.processes says.
        evaluation_deployment: Which runs ask models about many test rows, such as score-rows/cpu;
            by default as evaluation.processes says.

    Raises GateRefused after all is recorded if the gate refuses the student and
    evaluation.on_refusal is fail.
    """
    begin()
    again = refreshing(refresh)
    check_settings(recipe)
    if training_deployment is None:
        check_methods(recipe)
    if recipe.evaluation.judge:
        resolve_endpoint(recipe.evaluation.judge)
    check_keys()
    check_bases(recipe)
    source = source_of(recipe)
    data = prepared(recipe, source, refresh)
    for rows, text in few_rows({role: split.rows for role, split in data.splits.items()}).items():
        get_run_logger().warning("%s: %s", rows, text)
    judged = judged_before(data, recipe)
    made = made_student(
        recipe,
        data,
        training_deployment,
        refresh,
        labels_deployment=labels_deployment,
        evaluation_deployment=evaluation_deployment,
    )
    model, test_rows = made.model, data.rows("test")
    compared = preferred(made.report, test_rows, recipe.prompt, recipe.evaluation.judge, again)
    report = compared.report
    decide = partial(apply_gate, report, model, test_rows, recipe.gate_rules, recipe.registry)
    decision = decide()

    registered = promotion = rejected = delivered = None
    origins = provenance(recipe, source, made._replace(report=report), decision)
    if compared.preferences:
        origins["preferences"] = compared.preferences
    if decision.passed:
        registered = again("register", register)(model, report, test_rows, recipe.registry, origins)
        decision, promotion = promoted(registered, decision, decide)
        delivered = again("download", download)(registered, model)
    elif recipe.registry.keep_refused:
        rejected = again("register", register)(
            model, report, test_rows, recipe.registry, origins, decision.reason
        )
    outcome = publish(
        Outcome(
            recipe=recipe.name,
            data=data,
            teacher=made.taught.local,
            labels=made.taught.labels,
            student=made.student,
            model=model,
            report=report,
            decision=decision,
            registered=registered,
            delivered=delivered,
            judged=judged,
            promotion=promotion,
            rejected=rejected,
            preferences=compared.preferences,
            selection=made.taught.selection,
            judge_drift=compared.drift,
            base_answers=made.base_answers,
        )
    )
    if recipe.evaluation.on_refusal == "fail" and not decision.passed:
        raise GateRefused(f"{verdict(outcome)} (evaluation.on_refusal: fail)", outcome.run)
    return outcome


class Taught(NamedTuple):
    """The prepared rows, the local teacher if there is one, the teacher's identity and its
    labels. `check`: the teacher beside its rivals, where rows can tell. `leaning`: what to tell of
    labels that lean to one class. `selection`: the train rows that are labelled; None where all
    are."""

    data: PreparedDataset
    local: PreparedTeacher | None
    identity: str
    labels: TeacherLabels
    check: TeacherCheck | None = None
    leaning: str | None = None
    selection: Selection | None = None


class Made(NamedTuple):
    """What a run makes before the gate. `teacher`: a local one's model, or else its labels of the
    test rows. `base_answers`: None where the base model is not asked."""

    taught: Taught
    teacher: OnnxModel | TeacherLabels
    student: StudentCheckpoint
    model: OnnxModel
    report: EvaluationReport
    base_answers: BaseModelAnswers | None


def made_student(
    recipe: Recipe,
    data: PreparedDataset,
    training_deployment: str | None,
    refresh: tuple[Stage, ...],
    selection: Selection | None = None,
    labels_deployment: str | None = None,
    evaluation_deployment: str | None = None,
) -> Made:
    """Run the stages from the data set to the evaluation. `selection`: the train rows that are
    labelled, where they are chosen already."""
    again = refreshing(refresh)
    if recipe.task.abstain:
        check_provable(recipe.task.abstain, data)
    taught = labelled_rows(
        recipe,
        data,
        training_deployment,
        refresh,
        selection,
        test=True,
        labels_deployment=labels_deployment,
    )
    local, labels, test_rows = taught.local, taught.labels, data.rows("test")
    # The test rows are labelled now, so that a budget that is too small ends the run before
    # training.
    teacher = local.model if local else measured_against(test_rows, recipe, taught.identity)
    base = student_base(recipe)
    student = trained_student(
        recipe, taught, base, training_deployment, "student", "train student" in refresh
    )
    model = exported(student, base, recipe, data, labels, again)
    if recipe.task.abstain:
        model = with_threshold(model, recipe.task.abstain, recipe.student_prompt, data, again)

    asked, machine = recipe.student_prompt, machine_name()
    processes = recipe.evaluation.processes
    base_answers = None
    if recipe.asks_base_model:
        ask = again("ask base model", ask_base_model)
        base_answers = in_parts(
            ask, [AskedModel(prompt=asked, base=base)], processes, evaluation_deployment
        )(test=test_rows, prompt=asked, base=base, machine=machine)
    scored = asked_models(asked, base, student, model, teacher, recipe.prompt)
    report = in_parts(
        again("evaluate", evaluate), [*scored.values()], processes, evaluation_deployment
    )(
        test=test_rows,
        train=data.rows("train"),
        labels=labels,
        gold=data.rows_if_any("gold"),
        learns_from_gold=recipe.student.learns_from_gold,
        prompt=asked,
        base=base,
        student=student,
        candidate=model,
        teacher=teacher,
        machine=machine,
        teacher_prompt=recipe.prompt,
        validation=data.rows_if_any("validation"),
        columns=recipe.dataset.columns,
        fields=recipe.dataset.fields,
        base_answers=base_answers,
    )
    # Beside what the training itself has decided.
    told = [taught.leaning] if taught.leaning else []
    if recipe.student.training.soft_weight == "auto" and taught.check:
        told += taught.check.decisions
    student = student.model_copy(update={"decisions": (*told, *student.decisions)})
    return Made(taught, teacher, student, model, report, base_answers)


def provenance(recipe: Recipe, source: str, made: Made, decision: GateDecision) -> dict[str, Any]:
    """Return what the manifest of the registered folder tells of how the student came to be."""
    taught = made.taught
    origins: dict[str, Any] = {
        "recipe": recipe,
        # Apart, because no answer depends on them: the recipe's own key leaves them out.
        "terms": recipe.teacher.terms,
        "source": source,
        "data": taught.data,
        "prompt": recipe.student_prompt,
        "teacher": taught.labels.teacher,
        "local_teacher": taught.local,
        "labels": taught.labels,
        "test_labels": made.teacher if isinstance(made.teacher, TeacherLabels) else None,
        "student": made.student,
        "model": made.model,
        "evaluation": made.report,
        "decision": decision,
    }
    if taught.selection:
        origins["selection"] = taught.selection
    if made.base_answers:
        origins["base_answers"] = made.base_answers
    return origins


def prepared(recipe: Recipe, source: str, refresh: tuple[Stage, ...]) -> PreparedDataset:
    """Prepare the data set; `source` is its source's identity."""
    # When the student abstains does not concern the rows.
    task = with_labels(with_schema(recipe.task.model_copy(update={"abstain": None})))
    data: PreparedDataset = refreshing(refresh)("prepare dataset", prepare_dataset)(
        recipe.dataset, source, None if task.kind == "choice" else task
    )
    return data


def labelled_rows(
    recipe: Recipe,
    data: PreparedDataset,
    training_deployment: str | None,
    refresh: tuple[Stage, ...],
    selection: Selection | None = None,
    test: bool = False,
    labels_deployment: str | None = None,
) -> Taught:
    """Run the stages from the data set to the labels; `selection` is as in `made_student`. `test`:
    whether the teacher will label the test rows too."""
    again, preparation = refreshing(refresh), recipe.teacher.preparation
    train_rows, local, served = data.rows("train"), None, None
    check_askable(recipe, train_rows)
    if recipe.teacher.kind == "local":
        name = f"{produced_by()}, preparation"
        # A text would be a template, in which braces mean something.
        named = prepare_teacher.with_options(flow_run_name=lambda: name)
        preparation = preparation.model_copy(update={"base": pinned(preparation.base)})
        with own_tags():
            local = named(preparation, recipe.prompt, data, training_deployment, refresh)
        served = local.model
    identity = teacher_identity(recipe.teacher, served)
    selection = selection or selected(recipe, data, identity, again)
    if selection:
        train_rows = selection.rows
    # Before anything is paid for: a teacher that has changed may end the run.
    watched = recipe.teacher.with_canaries(is_scheduled() and not recipe.draws_texts)
    if watched.canaries.rows:
        canaries(train_rows, recipe.prompt, watched, identity)
        if watched.cheap:
            cheap = teacher_identity(watched.cheap, None)
            canaries(train_rows, recipe.prompt, watched.cheap, cheap)
    batches_first(recipe, train_rows, data, identity, test)
    check = None
    if recipe.task.kind == "classify":
        check = compare_teacher(recipe, data, local, identity, again)
    parts_first(recipe, train_rows, data, identity, test, labels_deployment)
    labels = labelled(train_rows, recipe, identity, served, again)
    leaning = None
    if recipe.task.kind == "classify":
        gold = data.rows_if_any("gold")
        leaning = check_shares(
            labels,
            gold,
            recipe.teacher.largest_shift,
            recipe.task.other,
            chosen=selection is not None,
        )
    return Taught(data, local, identity, labels, check, leaning, selection)


def compare_teacher(
    recipe: Recipe,
    data: PreparedDataset,
    local: PreparedTeacher | None,
    identity: str,
    again: Callable[[Stage, Any], Any],
) -> TeacherCheck | None:
    """Compare the teacher with cheap rivals on the validation rows, before it labels. A teacher
    whose answers to these rows nobody can ask for is taken as it is."""
    # Of texts of task.other alone, no rival learns to classify.
    has_rows = recipe.dataset.roles >= {"gold", "validation"}
    if not has_rows or recipe.teacher.kind in ("gold", "file"):
        return None
    gold, validation = data.rows("gold"), data.rows("validation")
    teacher = local.model if local else measured_against(validation, recipe, identity)
    base = recipe.teacher.preparation.base if local else recipe.student_base
    check: TeacherCheck = again("check teacher", check_teacher)(
        teacher, gold, validation, recipe.student_prompt, pinned(base)
    )
    heed(check, local is not None, recipe.teacher.insist)
    return check


def student_base(recipe: Recipe) -> BaseModelRecipe:
    """Return the student's base model; for a hub model, with its revision resolved."""
    return pinned(recipe.student_base)


def trained_student(
    recipe: Recipe,
    taught: Taught,
    base: BaseModelRecipe,
    training_deployment: str | None,
    what: str,
    refresh: bool,
) -> StudentCheckpoint:
    """Train the student that the recipe describes; `what` is its part of the run's name."""
    student, data, local = recipe.student, taught.data, taught.local
    return trained(
        training_deployment,
        what,
        refresh=refresh,
        base=base,
        start=local.checkpoint if local and student.start == "teacher" else None,
        layers=student.layers,
        healing=tuple(
            step.model_copy(update={"training": weighed(step.training, taught.check)})
            for step in student.healing
        ),
        gold=data.rows("gold") if student.gold else None,
        training=weighed(student.training, taught.check),
        prompt=recipe.student_prompt,
        rows=data.rows("train"),
        labels=taught.labels,
        validation=data.rows_if_any("validation"),
    )


def weighed(training: TrainingRecipe, check: TeacherCheck | None) -> TrainingRecipe:
    """Return a student's training with the number that soft_weight: auto stands for."""
    if training.soft_weight != "auto" or check is None or check.soft_weight is None:
        return training
    return training.model_copy(update={"soft_weight": round(check.soft_weight, 3)})


def promoted(
    registered: RegisteredModel, decision: GateDecision, decide: Callable[[], GateDecision]
) -> tuple[GateDecision, Promotion]:
    """Promote a registered student. If another run has promoted its own meanwhile, have the gate
    decide again, against that champion, and promote it only if it passes."""
    promotion = promote(registered, decision)
    for _ in range(DECIDED_AGAIN):
        if promotion.result != "outpaced":
            break
        decision = decide()
        if not decision.passed:
            break
        promotion = promote(registered, decision)
    return decision, promotion


def planned(recipe: Recipe) -> list[PlannedStage]:
    """List the stages that a run of the recipe comes to, for the terminal's display."""
    prepare, *others = planned_student(recipe)
    stages = [prepare, PlannedStage("judged before", "judged before"), *others]
    if recipe.evaluation.judge:
        stages.append(PlannedStage("ask judge", "ask judge"))
    for name in ("gate", "register", "promote", "download", "report"):
        stages.append(PlannedStage(name, name))
    return stages


def planned_student(recipe: Recipe) -> list[PlannedStage]:
    """List the stages up to the evaluation."""
    stages = [PlannedStage("prepare dataset", "prepare dataset")]
    if recipe.teacher.kind == "local":
        stages.append(PlannedStage("gold labels", "gold labels"))
        stages.append(PlannedStage("train teacher", "train"))
        stages.append(PlannedStage("export teacher", "export"))
    if recipe.teacher.select:
        stages.append(PlannedStage("last student", "last student"))
        stages.append(PlannedStage("select rows", "select rows"))
    if recipe.task.kind == "classify" and recipe.dataset.roles >= {"gold", "validation"}:
        stages.append(PlannedStage("check teacher", "check teacher"))
    label = {"gold": "gold labels", "file": "labels from files"}.get(recipe.teacher.kind, "label")
    stages.append(PlannedStage("label", label))
    if recipe.teacher.kind != "local":
        test_label = "label" if recipe.teacher.kind == "endpoint" else "gold labels"
        stages.append(PlannedStage("label test rows", test_label))
    stages.append(PlannedStage("train student", "train"))
    export = "export ladder" if recipe.export.ladder else "export"
    stages.append(PlannedStage("export student", export))
    if recipe.task.abstain:
        stages.append(PlannedStage("set threshold", "set threshold"))
    if recipe.asks_base_model:
        stages.append(PlannedStage("ask base model", "ask base model"))
    stages.append(PlannedStage("evaluate", "evaluate"))
    return stages


def main(arguments: list[str]) -> int:
    """Run a recipe here; return 0 when the run ended, 1 after one line on what the user can mend,
    REFUSED if the gate refused the student and evaluation.on_refusal is fail, and WAITING if
    batches are under way."""
    parser = ArgumentParser("python -m flows.distill", description="Runs a recipe on this machine.")
    parser.add_argument("recipe", help="demo, lab or a YAML file")
    parser.add_argument(
        "--refresh",
        metavar="STAGE",
        action="append",
        default=[],
        choices=get_args(Stage),
        help=f"do a stage again, one of {', '.join(get_args(Stage))}; may be given more than once",
    )
    given = parser.parse_args(arguments)
    try:
        recipe = load_recipe(given.recipe)
        with (
            shown_in_terminal(planned(recipe)),
            results_in_store(),
            tags(recipe.name, recipe.dataset.title),
        ):
            outcome = distill(recipe, refresh=tuple(given.refresh))
    except GateRefused as refusal:
        record = ArtifactStore().read_record(run_record(refusal.run))
        # Ahead of the error in a file that both go to, too.
        print(render(Outcome.model_validate_json(record)), flush=True)
        print(f"error: {refusal}", file=sys.stderr)
        return REFUSED
    except Pause as waiting:
        print(f"waiting: {waiting}", file=sys.stderr)
        return WAITING
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(render(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
