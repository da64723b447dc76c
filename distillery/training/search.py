"""A search over a student's settings: Optuna chooses what to try next and knows the Pareto front.

In: a recipe, the space of settings, and what was measured of each trial's student. Out: the recipe
of the next trial, and the trials, also as a Markdown table.
"""

from collections.abc import Sequence
from typing import Any

from distillery.errors import RecipeError
from distillery.markdown import escape
from distillery.recipe import METRIC_NAMES, LayerChoice, Recipe, SearchRecipe, parse_recipe
from distillery.records import Measured, Trial

RANGES = ("learning_rate", "soft_weight", "hidden_weight")
"""The settings that a space gives two bounds for."""


class Search:
    """Trials one after another. Accuracy is to be high, size and latency low.

    The sampler is Optuna's tree-structured Parzen estimator (Bergstra et al., Algorithms for
    Hyper-Parameter Optimization, 2011; for several objectives, Ozaki et al., 2022). Equal seeds and
    results give equal trials: a search that was cut off, or gets more trials, goes on from the
    trainings that are cached.

    Raises RecipeError for a recipe without a validation split, and for a space that the recipe
    can't be searched in."""

    def __init__(self, recipe: Recipe, space: SearchRecipe) -> None:
        import optuna

        check_space(recipe, space)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Searches are small: 4 random trials before results decide, where Optuna has 10.
        sampler = optuna.samplers.TPESampler(seed=space.seed, n_startup_trials=4)
        self._study = optuna.create_study(
            directions=["maximize", "minimize", "minimize"], sampler=sampler
        )
        self._recipe, self._space = recipe, space
        self._trial: Any = None
        self._results: list[Measured | str] = []

    def ask(self) -> Recipe:
        """Return the recipe of the next trial.

        Raises RecipeError where the space goes beyond what a recipe allows."""
        trial, space = self._study.ask(), self._space
        self._trial = trial
        training: dict[str, Any] = {}
        student: dict[str, Any] = {"training": training}
        if space.rank:
            rank = trial.suggest_categorical("rank", space.rank)
            training["lora"] = {"rank": rank, "alpha": 2 * rank}
        if space.keep:
            layers = self._recipe.student.layers
            by = layers.by if isinstance(layers, LayerChoice) else "early_and_last"
            if by == "probe":
                # A search tries depths: a probe would choose one below each.
                by = "first"
            student["layers"] = {"keep": trial.suggest_categorical("keep", space.keep), "by": by}
        for name in RANGES:
            bounds = getattr(space, name)
            if bounds:
                logarithmic = name == "learning_rate"
                training[name] = trial.suggest_float(name, *bounds, log=logarithmic)
        return with_settings(self._recipe, student)

    def tell(self, measured: Measured) -> None:
        """Take the figures of the recipe that was asked for last."""
        values = [measured.accuracy, float(measured.bytes), measured.p50_ms]
        self._study.tell(self._trial, values)
        self._results.append(measured)

    def tell_failure(self, reason: str) -> None:
        """Take note that the recipe that was asked for last gave no student; `reason` is one line.

        Optuna counts the trial as failed: it is not on the front, and the next trials are chosen
        without it."""
        from optuna.trial import TrialState

        self._study.tell(self._trial, state=TrialState.FAIL)
        self._results.append(reason)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The trials whose results are told. `best` marks the Pareto front: where no other is as
        good in all three figures and better in one. Equal trials are on it together."""
        front = {trial.number for trial in self._study.best_trials}
        trials = []
        # A trial that was asked for and not told yet, the last one, is left out.
        for trial, result in zip(self._study.trials, self._results, strict=False):
            measured: Measured | None = None
            reason = ""
            if isinstance(result, str):
                reason = result
            else:
                measured = result
            trials.append(
                Trial(
                    number=trial.number,
                    settings=trial.params,
                    measured=measured,
                    best=trial.number in front,
                    reason=reason,
                )
            )
        return tuple(trials)


def check_space(recipe: Recipe, space: SearchRecipe) -> None:
    """Raise RecipeError for what would otherwise come out only after the labels are paid for, or
    not at all."""
    if "validation" not in {*recipe.dataset.splits, *recipe.dataset.carve}:
        raise RecipeError("a search needs a validation split in dataset.splits or dataset.carve")
    if space.rank and not recipe.student.training.adapts:
        raise RecipeError(
            "rank: full training has none; leave it out, or set student.training.method: lora"
        )
    # The lower and the upper end of every setting must be allowed in a recipe.
    for end in (0, -1):
        training: dict[str, Any] = {}
        student: dict[str, Any] = {"training": training}
        for name in RANGES:
            bounds = getattr(space, name)
            if bounds:
                training[name] = bounds[end]
        if space.rank:
            training["lora"] = {"rank": sorted(space.rank)[end]}
        if space.keep:
            student["layers"] = {"keep": sorted(space.keep)[end]}
        with_settings(recipe, student)


def with_settings(recipe: Recipe, student: dict[str, Any]) -> Recipe:
    """Return `recipe` with the settings in `student` in place of its own: `layers` as a whole,
    `training` and `training.lora` key by key.

    Raises RecipeError where a recipe does not allow them."""
    values = recipe.model_dump(mode="json")
    training = values["student"]["training"]
    lora = training["lora"] | student["training"].get("lora", {})
    training |= student["training"] | {"lora": lora}
    if "layers" in student:
        values["student"]["layers"] = student["layers"]
    try:
        return parse_recipe(values, "search")
    except RecipeError as error:
        raise RecipeError(f"{error}; correct the search's space") from error


def render_trials(trials: Sequence[Trial]) -> str:
    """Return the trials as a Markdown table, the best primary figure first. A star marks the Pareto
    front; trials without a student come last, and below the table the reason for each."""
    names: list[str] = []
    for trial in trials:
        names += [name for name in trial.settings if name not in names]
    metrics = [trial.measured.metric for trial in trials if trial.measured]
    header = ["", "trial", *names, METRIC_NAMES[metrics[0] if metrics else None], "MB", "p50 ms"]
    lines = [header, [":--", *["--:"] * (len(header) - 1)]]
    reasons = []
    for trial in trials:
        if trial.measured is None:
            reasons.append(f"Trial {trial.number} failed: {escape(trial.reason)}")
    for trial in sorted(trials, key=rank_in_table):
        settings = [
            f"{trial.settings[name]:.4g}" if name in trial.settings else "" for name in names
        ]
        figures = ["failed", "", ""]
        if trial.measured:
            figures = [
                f"{trial.measured.accuracy:.3f}",
                f"{trial.measured.bytes / 1e6:.1f}",
                f"{trial.measured.p50_ms:.1f}",
            ]
        lines.append(["*" if trial.best else "", str(trial.number), *settings, *figures])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n\n".join([table, *reasons])


def rank_in_table(trial: Trial) -> tuple[float, int]:
    """Return a sort key: primary figure from high to low, size from low to high, failures last."""
    if trial.measured is None:
        return (1.0, 0)
    return (-trial.measured.accuracy, trial.measured.bytes)
