"""Recipes whose answers are written: task.kind extract and generate."""

import json
from pathlib import Path
from typing import Any

import pytest

from distillery.errors import RecipeError
from distillery.recipe import Recipe, load_recipe, parse_recipe

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}

EXTRACT = {"kind": "extract", "schema": SCHEMA}

DATASET: dict[str, Any] = {
    "source": "files",
    "files": {"train": ["rows.jsonl"]},
    "carve": {"test": 0.2},
}


def recipe(task: dict[str, Any], **values: Any) -> Recipe:
    dataset = {**DATASET, **values.pop("dataset", {})}
    return parse_recipe({"task": task, "dataset": dataset, **values}, "mine.yaml")


def error_of(task: dict[str, Any], **values: Any) -> str:
    with pytest.raises(RecipeError) as error:
        recipe(task, **values)
    text = str(error.value)
    assert "\n" not in text
    return text.removeprefix("mine.yaml: ")


def test_an_endpoint_is_told_the_schema_and_held_to_it() -> None:
    made = recipe(EXTRACT)
    assert "{schema}" in made.prompt.system
    assert (made.prompt.answer, made.teacher.answers.form) == ("written", "json")
    assert made.student_prompt.answer == "written"
    assert (made.student_prompt.system, made.student_prompt.user) == ("", "{text}")
    assert made.dataset.columns.question == "text"
    assert made.dataset.columns.answer == "answer"
    assert not made.student.gold


def test_files_serve_for_the_roles_that_they_are_named_for() -> None:
    files = {role: [f"{role}.jsonl"] for role in ("train", "gold", "validation", "test")}
    made = parse_recipe(
        {"task": EXTRACT, "dataset": {"source": "files", "files": files}}, "mine.yaml"
    )
    assert made.dataset.splits == {role: role for role in files}
    assert made.student.gold
    assert made.export.ladder


def test_free_text_has_no_schema() -> None:
    made = recipe({"kind": "generate"})
    assert "{schema}" not in made.prompt.system
    assert made.teacher.answers.form == "letter"
    assert made.teacher.max_tokens > 256


@pytest.mark.parametrize("task", [EXTRACT, {"kind": "generate"}])
def test_soft_labels_are_those_of_tokens(task: dict[str, Any]) -> None:
    made = recipe(task, teacher={"soft_labels": True})
    assert made.teacher.asks_log_probabilities
    carved = {"carve": {"gold": 0.4, "test": 0.2}}
    assert recipe(task, teacher={"kind": "local", "soft_labels": True}, dataset=carved)
    error = error_of(task, teacher={"soft_labels": True, **VOTES})
    assert error.startswith(
        "teacher.soft_labels with teacher.answers.votes above 1: has no meaning"
    )
    error = error_of(task, teacher={"kind": "gold", "soft_labels": True}, dataset=carved)
    assert error.startswith("teacher: soft_labels: gold answers have no probabilities")


def test_a_student_is_asked_with_the_further_columns_of_its_teacher() -> None:
    prompt = {"system": "Answer.", "user": "{title}: {text}"}
    made = recipe({"kind": "generate"}, prompt=prompt, dataset={"fields": ["title"]})
    assert (made.student_prompt.system, made.student_prompt.user) == ("", "{title}: {text}")


@pytest.mark.parametrize("task", [EXTRACT, {"kind": "generate"}, {"kind": "classify"}])
def test_a_prompt_that_shows_nothing_of_a_row_is_refused(task: dict[str, Any]) -> None:
    error = error_of(task, prompt={"user": "Of {txet}:"}, dataset={"fields": ["title"]})
    assert "prompt.user: shows nothing of a row" in error
    assert "write {text} or {question} or {title} into it" in error
    assert recipe(task, prompt={"user": "Of {title}:"}, dataset={"fields": ["title"]})


def test_an_own_teacher_and_its_student_are_asked_alike() -> None:
    gold = {"carve": {"gold": 0.4, "test": 0.2}}
    made = recipe(EXTRACT, teacher={"kind": "local"}, dataset=gold)
    assert made.student.start == "teacher"
    assert made.student.prompt is None
    assert made.student.gold
    assert made.teacher.for_own_model(made.prompt).max_tokens == made.teacher.max_tokens
    assert made.teacher.max_tokens == made.task.max_tokens + 1, "the end of an answer is a token"
    short = recipe({**EXTRACT, "max_tokens": 40}, teacher={"kind": "local"}, dataset=gold)
    assert short.teacher.max_tokens == 41
    chosen = {"kind": "local", "max_tokens": 99}
    assert recipe(EXTRACT, teacher=chosen, dataset=gold).teacher.max_tokens == 99


def test_validation_rows_choose_the_form() -> None:
    carve = {"carve": {"validation": 0.1, "test": 0.2}}
    assert recipe(EXTRACT, dataset=carve).export.ladder
    assert not recipe(EXTRACT, dataset=carve, export={"precision": "int8"}).export.ladder
    assert not recipe(EXTRACT).export.ladder


def test_a_recipe_is_the_same_after_json(tmp_path: Path) -> None:
    made = recipe(EXTRACT)
    path = tmp_path / "again.yaml"
    path.write_text(made.model_dump_json())
    assert load_recipe(str(path)) == made
    assert json.loads(made.model_dump_json())["task"]["answer_schema"] == SCHEMA


@pytest.mark.parametrize(
    ("task", "trouble"),
    [
        ({"kind": "extract"}, "schema: kind: extract needs the JSON Schema"),
        ({"kind": "extract", "schema": {"type": "array"}}, "schema: the answers are objects"),
        ({"kind": "generate", "schema": SCHEMA}, "schema: belongs to kind: extract"),
        ({"kind": "classify", "schema": SCHEMA}, "schema: belongs to kind: extract"),
        ({"kind": "generate", "metric": "field_f1"}, "metric: field_f1 belongs to kind: extract"),
        ({"kind": "classify", "metric": "bleu"}, "metric: belongs to kind: extract and generate"),
        ({"kind": "classify", "max_tokens": 9}, "max_tokens: belongs to kind: extract"),
        ({**EXTRACT, "labels": ["a", "b"]}, "labels: answers of kind: extract are written"),
        ({**EXTRACT, "other": {"files": ["a.csv"]}}, "other: answers of kind: extract are written"),
        ({**EXTRACT, "abstain": {"threshold": 0.5}}, "abstain: answers of kind: extract have no"),
    ],
)
def test_a_task_without_sense_is_refused(task: dict[str, Any], trouble: str) -> None:
    assert error_of(task).startswith(f"task: {trouble}")


@pytest.mark.parametrize(
    ("values", "setting"),
    [
        ({"teacher": {"answers": {"form": "json"}}}, "teacher.answers.form: json"),
        (
            {"teacher": {"answers": {"form": "rationale"}, "max_tokens": 300}},
            "teacher.answers.form: rationale",
        ),
        ({"teacher": {"answers": {"orders": 2}}}, "teacher.answers.orders above 1"),
        ({"teacher": {"filters": {"balance": 2}}}, "teacher.filters.balance"),
        (
            {"teacher": {"filters": {"agreement_with_gold": True}}},
            "teacher.filters.agreement_with_gold",
        ),
        ({"dataset": {"columns": {"choices": "options"}}}, "dataset.columns.choices"),
    ],
)
def test_settings_of_choices_are_refused(values: dict[str, Any], setting: str) -> None:
    assert error_of({"kind": "generate"}, **values).startswith(f"{setting}: has no meaning with")


@pytest.mark.parametrize(
    "student",
    [
        {"training": {"soft_weight": 0.5}},
        {"training": {"class_weights": "balanced"}},
        {"training": {"second_opinion": "words"}},
        {"layers": {"by": "probe"}},
        {"training": {"hidden_weight": 1.0}},
        {"start": "teacher", "training": {"rationale_weight": 1.0}},
    ],
)
def test_training_of_choices_is_refused(student: dict[str, Any]) -> None:
    carve = {"carve": {"gold": 0.4, "test": 0.2}}
    teacher = {"kind": "local"} if student.get("start") else {}
    error = error_of({"kind": "generate"}, student=student, teacher=teacher, dataset=carve)
    assert error.startswith("student.")


@pytest.mark.parametrize("weight", [0.5, "auto"])
@pytest.mark.parametrize("task", [EXTRACT, {"kind": "generate"}])
def test_a_teachers_probabilities_and_states_may_be_learnt(
    task: dict[str, Any], weight: float | str
) -> None:
    training = {"method": "full", "soft_weight": weight, "hidden_weight": 1.0}
    made = recipe(
        task,
        dataset={"carve": {"gold": 0.4, "test": 0.2}},
        teacher={"kind": "local", "soft_labels": True},
        student={"training": training, "healing": [{"training": training}]},
    )
    assert made.student.training.soft_share == (0.5 if weight == 0.5 else 1.0)
    assert made.student.healing[0].training.hidden_weight == 1.0
    soft = {"training": {"soft_weight": weight}}
    told = recipe(task, teacher={"soft_labels": True}, student=soft)
    assert told.teacher.kind == "endpoint"


@pytest.mark.parametrize(
    ("task", "rule"),
    [
        ({"kind": "generate"}, {"kind": "better", "than": "majority class"}),
        ({"kind": "generate"}, {"kind": "better", "than": "field dictionary"}),
        ({"kind": "generate"}, {"kind": "limit", "figure": "field_f1", "minimum": 0.5}),
        (EXTRACT, {"kind": "limit", "figure": "bleu", "minimum": 0.5}),
        (EXTRACT, {"kind": "limit", "figure": "macro_f1", "minimum": 0.5}),
        ({"kind": "classify"}, {"kind": "better", "than": "nearest answer"}),
        ({"kind": "classify"}, {"kind": "limit", "figure": "valid", "minimum": 0.5}),
    ],
)
def test_rules_that_the_scoreboard_can_t_tell_are_refused(
    task: dict[str, Any], rule: dict[str, Any]
) -> None:
    error = error_of(task, evaluation={"rules": [rule]})
    assert "is not on the scoreboard of task.kind" in error


def test_the_rules_by_default_are_on_the_scoreboard() -> None:
    rules = [rule.title for rule in recipe(EXTRACT).gate_rules]
    assert rules[:2] == ["better than nearest answer", "better than field dictionary"]
    text = [rule.title for rule in recipe({"kind": "generate"}).gate_rules]
    assert text == [rule for rule in rules if rule != "better than field dictionary"]
    limits = [
        {"kind": "limit", "figure": name, "minimum": 0.5}
        for name in ("accuracy", "exact_match", "field_f1", "valid", "agreement")
    ]
    assert len(recipe(EXTRACT, evaluation={"rules": limits}).gate_rules) == 5


def test_the_base_model_writes_only_where_a_rule_compares_with_it() -> None:
    assert not recipe(EXTRACT).asks_base_model
    rules = [{"kind": "better", "than": "base model"}]
    assert recipe(EXTRACT, evaluation={"rules": rules}).asks_base_model
    assert load_recipe("demo").asks_base_model
    assert not recipe({"kind": "classify"}).asks_base_model


def test_an_answer_that_is_no_written_one_is_refused() -> None:
    letter = {"answer": "letter", "user": "{question} {choices}"}
    assert "written to extract and generate" in error_of({"kind": "generate"}, prompt=letter)
    written = {"answer": "written"}
    assert "written to extract and generate" in error_of({"kind": "classify"}, prompt=written)


VOTES: dict[str, Any] = {"answers": {"votes": 3}, "temperature": 1.0}


def test_several_answers_are_drawn_of_texts_and_of_objects() -> None:
    texts, objects = recipe({"kind": "generate"}, teacher=VOTES), recipe(EXTRACT, teacher=VOTES)
    assert texts.draws_texts
    assert not objects.draws_texts
    assert texts.teacher_of_test_rows.answers.votes == 1, "the first text is what is compared"
    assert objects.teacher_of_test_rows.answers.votes == 3, "the majority's object"
    assert objects.teacher_of_test_rows.filters.minimum_accepted == 0
    agreed = {**VOTES, "filters": {"confidence": 0.6}}
    assert recipe(EXTRACT, teacher=agreed).teacher.filters.confidence == 0.6
    assert error_of({"kind": "generate"}, teacher=agreed).startswith("teacher.filters.confidence")
    watched = {**VOTES, "canaries": {"rows": 5}}
    assert error_of({"kind": "generate"}, teacher=watched).startswith("teacher.canaries.rows")
    assert recipe(EXTRACT, teacher=watched).teacher.canaries.rows == 5


def test_texts_that_end_an_answer_belong_to_free_text() -> None:
    assert recipe({"kind": "generate"}, teacher={"stop": ["\n"]}).teacher.stop == ("\n",)
    for task in (EXTRACT, {"kind": "classify"}):
        error = error_of(task, teacher={"stop": ["\n"]})
        assert error.startswith("teacher.stop: belongs to task.kind: generate")
    for stop in ([""], ["a", "b", "c", "d", "e"]):
        assert "stop" in error_of({"kind": "generate"}, teacher={"stop": stop})


def test_texts_that_resemble_each_other_are_no_copies_by_default() -> None:
    for task in (EXTRACT, {"kind": "generate"}):
        assert recipe(task).dataset.near_duplicate == 1
        assert recipe(task, dataset={"near_duplicate": 0.7}).dataset.near_duplicate == 0.7
    assert recipe({"kind": "classify"}).dataset.near_duplicate == 0.8


def test_the_default_form_of_written_answers_goes_with_an_adapter_apart() -> None:
    found = recipe({"kind": "generate"}, teacher={}, export={"adapter_apart": True})
    assert found.export.title == "int8 dynamic/32, apart"
