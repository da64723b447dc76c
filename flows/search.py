"""Find the settings that make the best student, on the validation rows: a small search over rank,
learning rate, loss weights and depth. Nothing is registered; put what you choose into your recipe.

`python -m flows.search RECIPE SPACE` runs it here. Both are YAML files; RECIPE may be a preset. On
a server it is the deployment search/demo, whose trainings go to the GPU pool, each as its own flow
run.
"""

import sys
from argparse import ArgumentParser

from prefect import flow, get_run_logger, tags
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import Pause

from distillery.errors import DistilleryError, ExportError, TrainingError, TrainingUnavailable
from distillery.machine import machine_name
from distillery.models.base import base_folder
from distillery.readiness import check_methods, check_settings
from distillery.recipe import Recipe, SearchRecipe, load_recipe, load_space
from distillery.records import Trial
from distillery.training.search import Search, render_trials
from flows.distill import WAITING, labelled_rows, prepared, student_base, trained_student
from flows.train_student import check_deployment
from tasks.hub import check_bases, source_of
from tasks.onnx import exported
from tasks.results import results_in_store
from tasks.search import measure
from tasks.stage import RESULT, begin, refreshing
from tasks.terminal import PlannedStage, shown_in_terminal

NO_STUDENT = (TrainingError, ExportError)
"""What a trial's own settings can cause, such as a loss that diverges: the search goes on.
TrainingUnavailable, of which that can't be said, ends it."""


@flow(name="search", description=__doc__, **RESULT)
def search(
    recipe: Recipe, space: SearchRecipe, training_deployment: str | None = None
) -> tuple[Trial, ...]:
    """Train, export and measure a student for each trial.

    Args:
        recipe: What to start from.
        space: What to try, and how often.
        training_deployment: Where training runs, such as train-student/gpu; by default this
            process.
    """
    begin()
    check_settings(recipe)
    if training_deployment is None:
        check_methods(recipe)
    check_bases(recipe)
    found = Search(recipe, space)
    # Before labels are paid for: what would fail in every trial ends the search now.
    check_deployment(training_deployment)
    base = student_base(recipe)
    base_folder(base)
    data = prepared(recipe, source_of(recipe), ())
    taught = labelled_rows(recipe, data, training_deployment, ())
    validation = taught.data.rows("validation")
    for number in range(space.trials):
        tried = found.ask()
        try:
            student = trained_student(
                tried, taught, base, training_deployment, f"trial {number}", False
            )
            model = exported(student, base, tried, taught.data, taught.labels, refreshing(()))
            found.tell(measure(model, validation, tried.student_prompt, machine_name()))
        except TrainingUnavailable:
            raise
        except NO_STUDENT as error:
            get_run_logger().warning("trial %d failed: %s", number, error)
            found.tell_failure(str(error))
    create_markdown_artifact(
        key="search", markdown=render_trials(found.trials), description="Trials and Pareto front"
    )
    return found.trials


def main(arguments: list[str]) -> int:
    """Search here; return 0 when the search ended, 1 after one line on what the user can mend, and
    WAITING if batches are under way."""
    parser = ArgumentParser(
        "python -m flows.search", description="Tries settings of a student on this machine."
    )
    parser.add_argument("recipe", help="demo, lab or a YAML file")
    parser.add_argument("space", help="a YAML file, such as 'rank: [8, 16]'")
    given = parser.parse_args(arguments)
    try:
        recipe, space = load_recipe(given.recipe), load_space(given.space)
        with (
            shown_in_terminal([PlannedStage("prepare dataset", "prepare dataset")]),
            results_in_store(),
            tags("distillery", recipe.name),
        ):
            trials = search(recipe, space)
    except Pause as waiting:
        print(f"waiting: {waiting}", file=sys.stderr)
        return WAITING
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(render_trials(trials))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
