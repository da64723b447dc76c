"""The judge of a recipe: what it may be told, and what depends on it."""

from typing import Any

import pytest

from distillery.errors import CredentialsError, RecipeError
from distillery.recipe import JudgeRecipe, Recipe, parse_recipe
from distillery.teacher.endpoint import resolve_endpoint
from distillery.teacher.identity import teacher_identity
from tasks.stage import content_of

GENERATE: dict[str, Any] = {
    "task": {"kind": "generate"},
    "dataset": {"source": "files", "files": {"train": ["rows.csv"]}, "carve": {"test": 0.2}},
    "prompt": {"system": "Write a sentence."},
    "teacher": {"kind": "gold"},
}


def recipe(**values: Any) -> Recipe:
    return parse_recipe({**GENERATE, **values}, "mine.yaml")


def error_of(**values: Any) -> str:
    with pytest.raises(RecipeError) as error:
        recipe(**values)
    text = str(error.value)
    assert "\n" not in text
    return text.removeprefix("mine.yaml: ")


def test_a_judge_is_asked_only_where_the_recipe_says_so() -> None:
    assert recipe().evaluation.judge is None
    judge = recipe(evaluation={"judge": {}}).evaluation.judge
    assert judge is not None
    assert (judge.rows, judge.kind, judge.filters.minimum_accepted) == (200, "endpoint", 0)
    assert judge.prompt.system.endswith("one of the {count} choices: {letters}.")
    told = JudgeRecipe(answers={"form": "rationale"}, max_tokens=300).prompt.system
    assert told == judge.instructions, "it writes more than a letter"


@pytest.mark.parametrize(
    ("judge", "told"),
    [
        ({"kind": "local"}, "evaluation.judge.kind: "),
        ({"files": ["labels.jsonl"]}, "evaluation.judge: "),
        ({"soft_labels": True}, "soft_labels: belongs to a teacher that labels; remove this"),
        ({"filters": {"confidence": 0.5}}, "evaluation.judge: "),
        ({"terms": "none"}, "terms: belongs to a teacher that labels; remove this setting"),
        ({"tokenizer": "/etc"}, "tokenizer: belongs to a teacher that labels; remove this"),
        ({"largest_shift": 1}, "largest_shift: belongs to a teacher that labels; remove this"),
        ({"stop": ["x"]}, "stop: belongs to a teacher that labels; remove this setting"),
        ({"insist": True}, "insist: belongs to a teacher that labels; remove this setting"),
        (
            {"preparation": {"base": {"model": "/etc"}}},
            "preparation: belongs to a teacher that labels; remove this setting",
        ),
        ({"answers": {"orders": 3}}, "a judge is asked once in each of both orders"),
        ({"budget": {"cost": 1}}, "budget.cost needs prices"),
        ({"rows": 0}, "evaluation.judge.rows: "),
    ],
)
def test_what_has_no_meaning_for_a_judge_is_refused(judge: dict[str, Any], told: str) -> None:
    assert told in error_of(evaluation={"judge": judge})


def test_a_judge_compares_texts_alone() -> None:
    error = error_of(task={"kind": "classify"}, evaluation={"judge": {}})
    assert "evaluation.judge: compares texts, and task.kind is classify; remove it" in error


@pytest.mark.parametrize("kind", ["gold", "local", "endpoint"])
def test_a_judge_is_told_the_task_by_the_prompt_or_by_its_instructions(kind: str) -> None:
    values: dict[str, Any] = {"prompt": {}, "teacher": {"kind": kind}}
    if kind == "local":
        values["dataset"] = GENERATE["dataset"] | {"carve": {"test": 0.2, "gold": 0.4}}
    assert error_of(**values, evaluation={"judge": {"rows": 7}}) == (
        "evaluation.judge.instructions: prompt.system is empty, so that it does not tell the judge "
        "the task; set instructions to what the texts are for"
    )
    assert "prompt.system is empty" in error_of(
        **values | {"prompt": {"system": " "}}, evaluation={"judge": {}}
    )
    told = recipe(**values, evaluation={"judge": {"instructions": "The texts sell tea."}})
    assert told.evaluation.judge
    told = recipe(**values | {"prompt": {"system": "Write."}}, evaluation={"judge": {}})
    assert told.evaluation.judge
    assert recipe(**values).evaluation.judge is None


def test_a_rule_on_the_win_rate_needs_a_judge() -> None:
    rules = [{"kind": "limit", "figure": "win_rate", "minimum": 0.4}]
    assert "win_rate: no judge is asked; add evaluation.judge" in error_of(
        evaluation={"rules": rules}
    )
    made = recipe(evaluation={"rules": rules, "judge": {}})
    assert made.gate_rules[0].title == "win_rate at least 0.4"
    error = error_of(task={"kind": "classify"}, evaluation={"rules": rules})
    assert "win_rate: is not on the scoreboard of task.kind: classify" in error


def test_cache_keys_know_what_the_judge_is_asked_and_not_how() -> None:
    plain = JudgeRecipe()
    for same in (
        JudgeRecipe(concurrency=1),
        JudgeRecipe(prices={"input": 1, "output": 1}, budget={"cost": 3}),
        JudgeRecipe(canaries={"rows": 5}),
    ):
        assert content_of(same) == content_of(plain)
    for other in (
        JudgeRecipe(instructions="Be kind."),
        JudgeRecipe(rows=10),
        JudgeRecipe(answers={"form": "json"}),
        JudgeRecipe(max_tokens=2000),
    ):
        assert content_of(other) != content_of(plain)


def test_recipes_without_a_judge_have_the_keys_that_they_had() -> None:
    assert "judge" not in content_of(recipe())["evaluation"]
    assert "judge" in content_of(recipe(evaluation={"judge": {}}))["evaluation"]


def test_a_judge_that_takes_no_temperature_is_sent_none() -> None:
    judge = recipe(evaluation={"judge": {"temperature": None}}).evaluation.judge
    assert judge is not None
    assert judge.temperature is None


def test_a_recipe_with_a_judge_comes_back_as_it_was() -> None:
    made = recipe(evaluation={"judge": {"rows": 7}})
    assert Recipe.model_validate(made.model_dump(mode="json")) == made


def test_a_form_for_a_judge_has_no_settings_of_labelling() -> None:
    told = JudgeRecipe.model_json_schema()["properties"]
    assert {"instructions", "rows", "budget", "canaries"} <= told.keys()
    assert not {"preparation", "files", "filters", "soft_labels", "kind"} & told.keys()
    assert not any("default" in key for key in told.values())


def test_a_judge_has_an_endpoint_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_MODEL_NAME", "large")
    monkeypatch.setenv("TEACHER_MODEL_ENDPOINT", "https://teacher.example/v1")
    monkeypatch.setenv("TEACHER_MODEL_KEY", "the-teachers-key")
    with pytest.raises(CredentialsError) as error:
        resolve_endpoint(JudgeRecipe())
    names = "JUDGE_MODEL_NAME, JUDGE_MODEL_ENDPOINT, JUDGE_MODEL_KEY: not set or empty"
    assert str(error.value).startswith(names)
    with pytest.raises(
        RecipeError,
        match=r"JUDGE_MODEL_NAME: not set or empty, and neither is evaluation\.judge\.identity.* "
        r"JUDGE_MODEL_NAME=gpt-4\.1-mini, or set evaluation\.judge\.identity in the recipe$",
    ):
        teacher_identity(JudgeRecipe(), None)
    monkeypatch.setenv("JUDGE_MODEL_NAME", "wise")
    monkeypatch.setenv("JUDGE_MODEL_ENDPOINT", "https://judge.example/v1")
    with pytest.raises(
        CredentialsError,
        match=r"JUDGE_MODEL_KEY: not set or empty, and judge\.example .* "
        r"JUDGE_MODEL_KEY=sk-\.\.\.; a server that needs no key takes any word$",
    ):
        resolve_endpoint(JudgeRecipe())
    monkeypatch.setenv("JUDGE_MODEL_KEY", "the-judges-key")
    endpoint = resolve_endpoint(JudgeRecipe())
    assert (endpoint.url, endpoint.model) == ("https://judge.example/v1", "wise")
    assert endpoint.key
    assert endpoint.key.get_secret_value() == "the-judges-key"
    assert endpoint.identity == teacher_identity(JudgeRecipe(), None) == "judge:wise"
    assert resolve_endpoint(JudgeRecipe(identity="2026")).identity == "judge:2026"
