"""A search: what it tries, that it repeats itself, and which trials are on the Pareto front."""

from pathlib import Path
from typing import Any

import pytest

from distillery.errors import RecipeError
from distillery.recipe import LayerChoice, Recipe, SearchRecipe, load_space
from distillery.records import Measured, Trial
from distillery.training.search import Search, render_trials

SPACE = SearchRecipe(
    rank=(4, 8),
    keep=(1, 2, 3),
    learning_rate=(1e-5, 1e-3),
    soft_weight=(0.2, 0.8),
    trials=8,
    seed=3,
)


def measured(correct: int, size: int = 100, p50: float = 5.0) -> Measured:
    return Measured(correct=correct, rows=100, bytes=size, p50_ms=p50)


def recipe() -> Recipe:
    return Recipe.model_validate({"preset": "demo", "student": {"training": {"method": "lora"}}})


def tried(count: int) -> list[Recipe]:
    search, recipes = Search(recipe(), SPACE), []
    for number in range(count):
        recipes.append(search.ask())
        search.tell(measured(50 + number, size=100 + number % 3))
    return recipes


def test_a_trial_changes_what_the_space_names_and_nothing_else() -> None:
    for trial_recipe in tried(4):
        training = trial_recipe.student.training
        assert training.lora.rank in SPACE.rank
        assert training.lora.alpha == 2 * training.lora.rank
        assert isinstance(trial_recipe.student.layers, LayerChoice)
        assert trial_recipe.student.layers.keep in SPACE.keep
        assert 1e-5 <= training.learning_rate <= 1e-3
        assert 0.2 <= training.soft_share <= 0.8
        same = {"learning_rate", "soft_weight", "lora"}
        assert training.model_dump(exclude=same) == recipe().student.training.model_dump(
            exclude=same
        )
        assert trial_recipe.model_dump(exclude={"student"}) == recipe().model_dump(
            exclude={"student"}
        )


def test_equal_seeds_and_results_give_equal_trials() -> None:
    assert tried(8) == tried(8)
    assert len({trial_recipe.model_dump_json() for trial_recipe in tried(8)}) > 4


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (
            {"soft_weight": (1.5, 2.0)},
            "search: student.training.soft_weight: .*less than or equal to 1; correct",
        ),
        (
            {"soft_weight": (0.5, 2.0)},
            "search: student.training.soft_weight: .*less than or equal to 1; correct",
        ),
        ({"rank": (4, 8)}, "rank: full training has none; leave it out"),
    ],
)
def test_a_space_beyond_what_a_recipe_allows_is_one_line_before_anything_is_done(
    space: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=f"^{said}"):
        Search(Recipe.model_validate({"preset": "demo"}), SearchRecipe(**space))


@pytest.mark.parametrize(
    ("results", "front"),
    [
        ([measured(90)], {0}),
        ([measured(90), measured(80)], {0}),
        ([measured(90), measured(80, size=50)], {0, 1}),
        ([measured(90), measured(80, p50=4.0), measured(79, p50=4.0)], {0, 1}),
        ([measured(90), measured(90)], {0, 1}),
        ([measured(90), measured(90), measured(90, p50=4.0), measured(90, p50=4.0)], {2, 3}),
        ([measured(90, 100, 5), measured(91, 99, 4), measured(70, 98, 6)], {1, 2}),
        ([None, measured(90), None, measured(95, size=200)], {1, 3}),
        ([None], set()),
    ],
)
def test_the_front_is_what_no_other_beats(results: list[Measured | None], front: set[int]) -> None:
    search = Search(recipe(), SPACE)
    for result in results:
        search.ask()
        if result is None:
            search.tell_failure("no student")
        else:
            search.tell(result)
    search.ask()
    trials = search.trials
    assert [trial.measured for trial in trials] == results
    assert {trial.number for trial in trials if trial.best} == front


def test_the_table_has_the_best_first_and_a_star_for_the_front() -> None:
    trials = [
        Trial(number=0, settings={"rank": 8}, measured=measured(80, 2_000_000), best=False),
        Trial(
            number=1, settings={"rank": 4, "keep": 2}, measured=measured(90, 1_500_000), best=True
        ),
    ]
    assert render_trials(trials).splitlines() == [
        "|  | trial | rank | keep | accuracy | MB | p50 ms |",
        "| :-- | --: | --: | --: | --: | --: | --: |",
        "| * | 1 | 4 | 2 | 0.900 | 1.5 | 5.0 |",
        "|  | 0 | 8 |  | 0.800 | 2.0 | 5.0 |",
    ]


def test_a_trial_without_a_student_is_shown_and_the_search_goes_on() -> None:
    search, recipes = Search(recipe(), SPACE), []
    for number in range(6):
        recipes.append(search.ask())
        if number in (0, 4):
            search.tell_failure("the loss is nan at step 3")
        else:
            search.tell(measured(50 + number, size=100 + number))
    assert len({trial_recipe.model_dump_json() for trial_recipe in recipes}) > 3
    trials = search.trials
    assert [trial.measured is None for trial in trials] == [True, False, False, False, True, False]
    assert [trial.number for trial in trials if trial.best] == [1, 2, 3, 5]
    lines = render_trials(trials).splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:8]] == ["5", "3", "2", "1", "0", "4"]
    assert "| failed |  |  |" in lines[6]
    assert lines[-1] == "Trial 4 failed: the loss is nan at step 3"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "settings belong here, such as {KEY: VALUE}"),
        ("rank: [8", "not valid YAML"),
        ("{}", "nothing to try: give rank, keep"),
        ("depth: [8]", "depth: unknown key; remove it"),
        ("learning_rate: [1.0e-3, 1.0e-5]", "learning_rate: give the lower bound first"),
        ("learning_rate: [0, 1]", "learning_rate: both bounds must be above 0"),
        (None, r"can't be read \(No such file"),
    ],
)
def test_a_bad_space_is_one_line(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "space.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=rf"^{path}:(1:)? {said}"):
        load_space(str(path))
