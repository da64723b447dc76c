"""A search over a student's settings: which to try next, by Optuna, and which of those tried no other beats."""

from collections.abc import Sequence
from typing import Any

from distillery.errors import RecipeError
from distillery.recipe import LayerChoice, Recipe, SearchRecipe, parse_recipe
from distillery.records import Measured, Trial

_BETWEEN = ("learning_rate", "soft_weight", "hidden_weight")


class Search:
    """Trials one after another, in which accuracy is to be high, and size and latency low.

    The sampler is Optuna's tree-structured Parzen estimator (Bergstra et al., Algorithms for Hyper-Parameter
    Optimization, 2011; for several objectives, Ozaki et al., 2022). Equal seeds and results give equal trials: a search
    that was cut off, or is to have more trials, goes on from the trainings that are cached."""

    def __init__(self, recipe: Recipe, space: SearchRecipe) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Searches are small: fewer trials at random than Optuna's ten, before results decide.
        sampler = optuna.samplers.TPESampler(seed=space.seed, n_startup_trials=4)
        self._study = optuna.create_study(
            directions=["maximize", "minimize", "minimize"], sampler=sampler
        )
        self._recipe, self._space = recipe, space
        self._asked: list[Any] = []
        self._told: list[tuple[Measured | None, str]] = []
        self._check()

    def _check(self) -> None:
        """Raises RecipeError for what would only come out after the labels are paid for, or not at all."""
        recipe, space = self._recipe, self._space
        if "validation" not in {*recipe.dataset.splits, *recipe.dataset.carve}:
            raise RecipeError(
                "a search needs a validation split in dataset.splits or dataset.carve"
            )
        if space.rank and not recipe.student.training.adapts:
            raise RecipeError(
                "rank: full training has none; leave it out, or set student.training.method: lora"
            )
        for end in (0, -1):
            tried = {name: bounds[end] for name in _BETWEEN if (bounds := getattr(space, name))}
            ranks = {"lora": {"rank": sorted(space.rank)[end]}} if space.rank else {}
            layers = {"layers": {"keep": sorted(space.keep)[end]}} if space.keep else {}
            _with(recipe, {"training": tried | ranks, **layers})

    def ask(self) -> Recipe:
        """The recipe of the next trial. Raises RecipeError where the space goes beyond what a recipe allows."""
        trial, space = self._study.ask(), self._space
        self._asked.append(trial)
        training: dict[str, Any] = {}
        student: dict[str, Any] = {"training": training}
        if space.rank:
            rank = trial.suggest_categorical("rank", space.rank)
            training["lora"] = {"rank": rank, "alpha": 2 * rank}
        if space.keep:
            by = (
                self._recipe.student.layers.by
                if isinstance(self._recipe.student.layers, LayerChoice)
                else None
            )
            keep = trial.suggest_categorical("keep", space.keep)
            student["layers"] = {"keep": keep, "by": by or "early_and_last"}
        if space.learning_rate:
            training["learning_rate"] = trial.suggest_float(
                "learning_rate", *space.learning_rate, log=True
            )
        for name in _BETWEEN[1:]:
            if bounds := getattr(space, name):
                training[name] = trial.suggest_float(name, *bounds)
        return _with(self._recipe, student)

    def tell(self, measured: Measured) -> None:
        """What came of the recipe that was asked for last."""
        self._study.tell(
            self._asked[-1], [measured.accuracy, float(measured.bytes), measured.p50_ms]
        )
        self._told.append((measured, ""))

    def tell_failure(self, reason: str) -> None:
        """That no student came of the recipe that was asked for last: what is asked for next is the search's own."""
        from optuna.trial import TrialState

        self._study.tell(self._asked[-1], state=TrialState.FAIL)
        self._told.append((None, reason))

    @property
    def trials(self) -> tuple[Trial, ...]:
        best = unbeaten([measured for measured, _ in self._told])
        return tuple(
            Trial(
                number=number,
                settings=asked.params,
                measured=measured,
                best=number in best,
                reason=reason,
            )
            for number, (asked, (measured, reason)) in enumerate(
                zip(self._asked, self._told, strict=False)
            )
        )


def _with(recipe: Recipe, student: dict[str, Any]) -> Recipe:
    values = recipe.model_dump(mode="json")
    training = values["student"]["training"] | student["training"]
    training["lora"] = values["student"]["training"]["lora"] | student["training"].get("lora", {})
    values["student"] |= student | {"training": training}
    try:
        return parse_recipe(values, "search")
    except RecipeError as error:
        raise RecipeError(f"{error}; correct the search's space") from error


def unbeaten(measured: Sequence[Measured | None]) -> set[int]:
    """The indices of the Pareto front: where no other is as good in all three and better in one. None is no student."""

    def costs(one: Measured) -> tuple[float, float, float]:
        return -one.accuracy, one.bytes, one.p50_ms

    def beats(one: Measured, other: Measured) -> bool:
        pairs = list(zip(costs(one), costs(other), strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    students = [(i, one) for i, one in enumerate(measured) if one]
    return {i for i, one in students if not any(beats(other, one) for _, other in students)}


def render_trials(trials: Sequence[Trial]) -> str:
    """The trials as a Markdown table, the best in accuracy first and those without a student, with the reason, last; a
    star marks the Pareto front."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.settings))
    lines = [
        ["", "trial", *names, "accuracy", "MB", "p50 ms"],
        [":--", *["--:"] * (len(names) + 4)],
    ]
    for trial in sorted(trials, key=lambda trial: _place(trial.measured)):
        settings = [
            f"{trial.settings[name]:.4g}" if name in trial.settings else "" for name in names
        ]
        figures = ["failed", "", ""]
        if measured := trial.measured:
            figures = [
                f"{measured.accuracy:.3f}",
                f"{measured.bytes / 1e6:.1f}",
                f"{measured.p50_ms:.1f}",
            ]
        lines.append(["*" if trial.best else "", str(trial.number), *settings, *figures])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    reasons = [
        f"Trial {trial.number} failed: {trial.reason}" for trial in trials if trial.measured is None
    ]
    return "\n\n".join([table, *reasons])


def _place(measured: Measured | None) -> tuple[float, int]:
    return (-measured.accuracy, measured.bytes) if measured else (1.0, 0)
