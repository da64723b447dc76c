"""The whole way, from rows of a data set to a registered, downloaded, verified int4 student:

    dataset -> teacher labels -> student -> ONNX int4 -> evaluation -> gate -> registry -> download

`python -m flows.distill demo` runs it here, with no server and no account; `python -m flows.distill my-recipe.yaml`
runs yours. On a server it is the deployments distill/demo and distill/lab.
"""

import sys
from datetime import datetime

from prefect import flow
from prefect.runtime import flow_run

from distillery.base_model import pinned
from distillery.dataset import source_identity
from distillery.errors import DistilleryError
from distillery.evaluation import machine
from distillery.readiness import check_settings, teacher_identity
from distillery.recipe import Recipe, load_recipe
from distillery.records import Outcome
from flows.prepare_teacher import prepare_teacher
from flows.train_student import trained
from tasks.dataset import prepare_dataset
from tasks.evaluation import evaluate
from tasks.labels import label
from tasks.onnx import export
from tasks.registry import download, judge, promote, register
from tasks.stage import RESULT, produced_by, tidy_logs
from tasks.summary import publish, render


def _run_name() -> str:
    recipe = flow_run.parameters["recipe"]
    name = recipe.get("name") or recipe.get("preset") if isinstance(recipe, dict) else recipe.name
    return f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


@flow(name="distill", flow_run_name=_run_name, description=__doc__, **RESULT)
def distill(recipe: Recipe, training_deployment: str | None = None) -> Outcome:
    """Distils a student as the recipe says and registers it if it passes the gate.

    Args:
        recipe: What to make. `preset` fills in whatever is not given.
        training_deployment: Where training runs, such as train-student/gpu; in this process where not given.
    """
    tidy_logs()
    check_settings(recipe)
    student_recipe, preparation = recipe.student, recipe.teacher.preparation
    base = pinned(preparation.base if student_recipe.start == "teacher" else student_recipe.base)
    data = prepare_dataset(recipe.dataset, source_identity(recipe.dataset))
    train_rows, test_rows = data.rows("train"), data.rows("test")

    local = None
    if recipe.teacher.kind == "local":
        named = prepare_teacher.with_options(flow_run_name=f"{produced_by()}, preparation")
        taught = preparation.model_copy(update={"base": pinned(preparation.base)})
        local = named(taught, recipe.prompt, data, training_deployment)
    served = local.model if local else None
    identity = teacher_identity(recipe, served)
    labels = label(train_rows, recipe.prompt, recipe.teacher, identity, served)

    student = trained(
        training_deployment,
        "student",
        base=base,
        start=local.checkpoint if local and student_recipe.start == "teacher" else None,
        layers=student_recipe.layers,
        training=student_recipe.training,
        prompt=recipe.prompt,
        rows=train_rows,
        labels=labels,
        validation=data.rows_if_any("validation"),
    )
    model = export(student, base, recipe.export)

    teacher = served or label(test_rows, recipe.prompt, recipe.teacher, identity)
    tfidf_rows = data.rows_if_any("gold") or train_rows
    report = evaluate(test_rows, tfidf_rows, recipe.prompt, base, student, model, teacher, machine())
    decision = judge(report, recipe.evaluation, recipe.registry)

    registered = delivered = None
    if decision.passed:
        provenance = {"data": data, "prompt": recipe.prompt, "teacher": labels.teacher, "labels": labels}
        provenance |= {"student": student, "evaluation": report, "recipe": recipe}
        registered = register(model, report, recipe.registry, provenance)
        promote(registered)
        delivered = download(registered, model)
    return publish(
        Outcome(
            recipe=recipe.name,
            data=data,
            teacher=local,
            labels=labels,
            student=student,
            model=model,
            report=report,
            decision=decision,
            registered=registered,
            delivered=delivered,
        )
    )


def main(arguments: list[str]) -> int:
    """`python -m flows.distill RECIPE`: 0 when the run ended, 1 with one line where the user has something to mend."""
    if len(arguments) != 1:
        print("usage: python -m flows.distill demo | lab | RECIPE.yaml", file=sys.stderr)
        return 2
    try:
        print(render(distill(load_recipe(arguments[0]))))
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
