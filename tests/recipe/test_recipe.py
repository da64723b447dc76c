"""Recipes: presets, keys laid over them, and wrong ones, refused in a line that names the key."""

import json
from pathlib import Path
from typing import Any

import pytest

from distillery.errors import RecipeError
from distillery.recipe import (
    PRESETS,
    AnswerRecipe,
    Choose,
    DatasetRecipe,
    ExportBounds,
    ExportForm,
    ExportRecipe,
    LayerChoice,
    NotWorseRule,
    PromptRecipe,
    Recipe,
    SearchRecipe,
    Slice,
    TaskRecipe,
    TeacherRecipe,
    TrainingRecipe,
    load_recipe,
    parse_recipe,
)

ABSTAIN = {"accuracy": 0.95}
OTHER = {"files": ["small-talk.csv"]}


def refusal(values: dict[str, Any]) -> str:
    """Return the one line with which a recipe is refused."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values, "mine.yaml")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("mine.yaml: ")
    return text.removeprefix("mine.yaml: ")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_loads_and_stands_on_its_own(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.preset is None


def test_an_own_teacher_is_asked_for_the_letter_alone() -> None:
    assert TeacherRecipe(kind="local").for_own_model(PromptRecipe()).max_tokens == 1
    in_json = TeacherRecipe(kind="local", answers=AnswerRecipe(form="json"))
    assert in_json.for_own_model(PromptRecipe()) == in_json


def test_the_presets_ask_for_what_they_say() -> None:
    demo, lab = load_recipe("demo"), load_recipe("lab")
    assert (demo.teacher.kind, demo.student.start, demo.registry.kind) == (
        "local",
        "teacher",
        "local",
    )
    assert (lab.dataset.name, lab.teacher.kind, lab.registry.kind) == (
        "tau/commonsense_qa",
        "endpoint",
        "azureml",
    )
    assert lab.student.training.method == "lora"


def test_given_keys_override_the_preset_and_the_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "preset: demo\nname: mine\nteacher: {preparation: {training: {epochs: 1}}}\n"
        "student: {layers: [0, 1]}"
    )
    recipe, demo = load_recipe(str(file)), load_recipe("demo")
    assert recipe.name == "mine"
    assert recipe.student.layers == (0, 1)
    assert recipe.teacher.preparation.training == demo.teacher.preparation.training.model_copy(
        update={"epochs": 1.0}
    )
    assert recipe.student.training == demo.student.training
    assert recipe.dataset == demo.dataset


def test_what_the_demo_draws_of_its_sample_is_not_drawn_of_other_data() -> None:
    assert parse_recipe({"preset": "demo"}, "x").dataset.sample == {"train": 700}
    files = {split: [f"{split}.jsonl"] for split in ("gold", "pool", "validation", "test")}
    own = {"source": "files", "files": files}
    assert parse_recipe({"preset": "demo", "dataset": own}, "x").dataset.sample == {}
    drawn = {**own, "sample": {"test": 50}}
    assert parse_recipe({"preset": "demo", "dataset": drawn}, "x").dataset.sample == {"test": 50}


def test_null_removes_a_presets_key_from_a_mapping() -> None:
    own_test = {
        "splits": {"test": "test"},
        "carve": {"test": None},
        "sample": {"test": None, "train": 50},
    }
    recipe = Recipe.model_validate({"preset": "lab", "dataset": own_test})
    assert recipe.dataset.splits == {"train": "train", "validation": "validation", "test": "test"}
    assert recipe.dataset.carve == {}
    assert recipe.dataset.sample == {"train": 50, "validation": 200}


def test_null_of_a_plain_field_is_that_fields_value() -> None:
    recipe = Recipe.model_validate(
        {"preset": "demo", "student": {"layers": None}, "teacher": {"temperature": None}}
    )
    assert recipe.student.layers is None
    assert recipe.teacher.temperature is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"teecher": {}}, "teecher: unknown key; remove it or correct its spelling"),
        (
            {"preset": "demo", "student": {"training": {"epoch": 1}}},
            "student.training.epoch: unknown key",
        ),
        ({"preset": "lap"}, "preset: "),
        ({"student": {"training": {"epochs": "many"}}}, "student.training.epochs: "),
        ({"preset": "demo", "dataset": 5}, "dataset: "),
        ({"export": {"precision": "int3"}}, "export.precision: "),
        ({"registry": {"model_name": "my model"}}, "registry.model_name: "),
        ({"dataset": {"carve": {"test": 1.5}}}, "dataset.carve.test: "),
        (
            {"preset": "lab", "dataset": {"splits": {"train": None}}},
            "dataset.splits names no train split; add one",
        ),
        ({"dataset": {"source": "hub"}}, "set dataset.name"),
        ({"dataset": {"source": "files"}}, "set dataset.files"),
        (
            {"prompt": {"user": "{question}"}},
            "prompt: user needs the placeholders {question} and {choices}",
        ),
        (
            {"prompt": {"choice": "{letter}"}},
            "prompt: choice needs the placeholders {letter} and {text}",
        ),
        (
            {"student": {"start": "teacher"}},
            "student.start: teacher needs teacher.kind: local",
        ),
        (
            {"student": {"training": {"soft_weight": 0.5}}},
            "student.training.soft_weight above 0 needs teacher.soft_labels: true",
        ),
        (
            {
                "student": {"training": {"first_layer": 1}},
                "export": {"adapter_apart": True, "algorithm": "rtn"},
            },
            "export.adapter_apart needs an adapter in all layers; remove training.first_layer",
        ),
        (
            {
                "task": {"kind": "classify"},
                "dataset": {"carve": {"test": 0.2}},
                "export": {"adapter_apart": True, "algorithm": "rtn"},
            },
            "export.adapter_apart: a classifier's head has rows for its classes, which are merged",
        ),
        (
            {"teacher": {"kind": "gold", "soft_labels": True}},
            "soft_labels: gold answers have no probabilities",
        ),
        (
            {"preset": "demo", "teacher": {"canaries": {"rows": 5}}},
            "teacher: canaries: a teacher of kind local cannot change",
        ),
        (
            {"preset": "demo", "teacher": {"max_age": 30}},
            "teacher: max_age: a teacher of kind local cannot change; remove this setting",
        ),
        (
            {"export": {"ladder": [{"algorithm": "rtn"}, {"algorithm": "rtn"}]}},
            "export: ladder: two rungs are int4 rtn/32",
        ),
        ({"export": {"ladder": [{"precision": "int3"}]}}, "export.ladder.0.precision: "),
        *(
            (
                {"export": {"choose": wrong}},
                "export.choose: give smallest, fastest or bounds, such as {latency_ms: 20}",
            )
            for wrong in ("quickest", 20, ["fastest"], None)
        ),
        *(
            ({"export": {"choose": without}}, "export.choose: give latency_ms, bytes or both")
            for without in ({}, {"latency_ms": None})
        ),
        (
            {"export": {"choose": {"latency_ms": 0}}},
            "export.choose.latency_ms: Input should be greater than 0",
        ),
        ({"export": {"choose": {"bytes": -1}}}, "export.choose.bytes: Input should be greater"),
        ({"export": {"choose": {"rows": 1}}}, "export.choose.rows: unknown key; remove it or"),
        (
            {"export": {"ladder": [{}, {"precision": "int8", "adapter_apart": True}]}},
            "export.ladder.1.adapter_apart needs training.method: lora or qlora, and excludes",
        ),
        (
            {"export": {"ladder": [{}]}, "dataset": {"splits": {"train": "train", "test": "test"}}},
            "export.ladder needs a validation split in dataset.splits or dataset.carve",
        ),
        (
            {"export": {"algorithm": "gptq"}},
            "export.algorithm: gptq works only in a ladder, such as export.ladder: ",
        ),
        (
            {"teacher": {"preparation": {"export": {"algorithm": "gptq"}}}},
            "teacher.preparation.export.algorithm: gptq works only in a ladder",
        ),
        (
            {"teacher": {"preparation": {"export": {"ladder": [{}]}}}},
            "teacher.preparation.export.ladder: unknown key",
        ),
        (
            {
                "teacher": {"kind": "local"},
                "dataset": {"splits": {"train": "train", "test": "test"}},
            },
            "teacher.kind: local needs a gold split in dataset.splits or dataset.carve",
        ),
        (
            {"dataset": {"files": {"train": ["a.jsonl"]}}},
            "but source is sample: set dataset.source: files",
        ),
        (
            {"preset": "lab", "dataset": {"files": {"train": ["a.jsonl"]}}},
            "but source is hub: set dataset.source",
        ),
        ({"dataset": {"name": "tau/commonsense_qa"}}, "set dataset.source: hub"),
        ({"teacher": {"files": ["labels.jsonl"]}}, "but kind is endpoint: set teacher.kind: file"),
        (
            {"dataset": {"splits": {"train": "train"}}},
            "the evaluation needs a test split in dataset.splits or dataset.carve",
        ),
        (
            {
                "student": {"training": {"patience": 1}},
                "dataset": {"splits": {"train": "a", "test": "b"}},
            },
            "training.patience needs a validation split in dataset.splits or dataset.carve",
        ),
        (
            {"teacher": {"answers": {"form": "rationale"}}},
            "needs max_tokens of a few hundred; 16 would cut the answer off",
        ),
        (
            {"teacher": {"filters": {"confidence": 0.5}}},
            "filters.confidence: a single answer without probabilities has no confidence",
        ),
        (
            {
                "teacher": {
                    "budget": {"calls": 20},
                    "canaries": {"rows": 10},
                    "answers": {"orders": 2},
                }
            },
            "budget.calls: the canaries take 20 of 20 calls, which leaves none for the rows",
        ),
        (
            {
                "teacher": {
                    "budget": {"calls": 50},
                    "canaries": {"rows": 10},
                    "cascade": {"answers": {"votes": 4}, "temperature": 1, "soft_labels": False},
                }
            },
            "budget.calls: the canaries take 50 of 50 calls, which leaves none for the rows",
        ),
        (
            {"student": {"layers": [0, 2, 2]}},
            "student.layers: give each layer once, from the lowest to the highest",
        ),
        *(
            (
                {"teacher": {"preparation": {"training": {weight: 0.5}}}},
                f"teacher.preparation.training.{weight}: this model learns from gold labels and "
                "has no teacher; remove this setting",
            )
            for weight in ("soft_weight", "hidden_weight", "rationale_weight")
        ),
        (
            {"evaluation": {"rules": [{"than": "majority class"}]}},
            "evaluation.rules.0: name its kind, such as {kind: better, than: majority class}",
        ),
        (
            {"evaluation": {"rules": [{"kind": "better", "than": "chance"}]}},
            "evaluation.rules.0.better.than: Input should be 'majority class', 'TF-IDF + logistic",
        ),
        (
            {"evaluation": {"rules": [{"kind": "keeps", "share": 0.9, "confidence": 0.5}]}},
            "evaluation.rules.0.keeps.confidence: ",
        ),
        (
            {"evaluation": {"rules": [{"kind": "limit", "figure": "bytes"}]}},
            "evaluation.rules.0.limit: a limit needs minimum, maximum or both",
        ),
        (
            {
                "evaluation": {
                    "rules": [{"kind": "limit", "figure": "bytes", "minimum": 2, "maximum": 1}]
                }
            },
            "minimum is above maximum, so that no figure can pass",
        ),
        (
            {
                "evaluation": {
                    "rules": [{"kind": "rows", "minimum": 9}, {"kind": "rows", "minimum": 9}]
                }
            },
            "evaluation: rules: two are named 'at least 9 test rows'; remove one or give it a name",
        ),
        ({"student": {"training": {"epochs": float("inf")}}}, "student.training.epochs: "),
        ({"student": {"training": {"temperature": 1e30}}}, "student.training.temperature: "),
        ({"student": {"training": {"seed": 2**64}}}, "student.training.seed: "),
        ({"student": {"layers": 14}}, "student.layers: a list belongs here, such as [ITEM]"),
        (
            {"dataset": {"source": "files", "files": {"train": "a.jsonl"}}},
            "dataset.files.train: a list belongs here",
        ),
        (
            {"dataset": None},
            "dataset: settings belong here, such as {KEY: VALUE}; or leave the key out",
        ),
        (
            {
                "teacher": {"answers": {"form": "rationale"}, "max_tokens": 200},
                "student": {
                    "healing": [
                        {
                            "training": {
                                "method": "full",
                                "rationale_weight": 1,
                                "rationale_instruction": "Why?",
                            }
                        }
                    ],
                    "training": {"rationale_weight": 1},
                },
            },
            "training and healing ask for reasons with different rationale_instruction",
        ),
        (
            {"student": {"layers": {"by": "probe"}}},
            "student.layers.by: probe needs task.kind: classify, with answer: class in the prompt",
        ),
        (
            {"preset": "demo", "teacher": {"preparation": {"layers": {"by": "probe"}}}},
            "teacher.preparation.layers.by: probe needs task.kind: classify",
        ),
        (
            {"student": {"layers": {"by": "first"}}},
            "keep: give the number of layers to keep, or their share",
        ),
        (
            {"student": {"training": {"second_opinion": "words"}}},
            "student.training.second_opinion needs task.kind: classify, with answer: class in the",
        ),
        (
            {"teacher": {"preparation": {"training": {"second_opinion": "words"}}}},
            "teacher.preparation.training.second_opinion needs task.kind: classify",
        ),
        (
            {"student": {"training": {"class_weights": "balanced"}}},
            "student.training.class_weights needs task.kind: classify, with answer: class in the",
        ),
        ({"task": {"abstain": {}}}, "task.abstain: abstain needs accuracy, such as 0.95, or thr"),
        (
            {"task": {"kind": "classify", "labels": ["sure", "unsure"], "abstain": ABSTAIN}},
            "task: abstain.answer: 'unsure' is one of the labels; choose another text",
        ),
        (
            {"preset": "lab", "dataset": {"splits": {"validation": None}}}
            | {"task": {"abstain": ABSTAIN}},
            "task.abstain.accuracy needs a validation split in dataset.splits or dataset.carve",
        ),
        (
            {"task": {"other": OTHER}},
            "task: other: rows of kind: choice have options of their own; set task.kind: classify",
        ),
        (
            {"task": {"kind": "classify", "other": {"files": []}}},
            "task.other.files: ",
        ),
        (
            {"task": {"kind": "classify", "other": OTHER | {"label": " "}}},
            "task.other.label: ",
        ),
        (
            {"task": {"kind": "classify", "labels": ["a", " other "], "other": OTHER}},
            "task: other.label: 'other' is one of the labels; remove it there, or choose another",
        ),
        (
            {
                "task": {
                    "kind": "classify",
                    "other": OTHER,
                    "abstain": {"threshold": 0.7, "answer": "other"},
                }
            },
            "task: abstain.answer: 'other' is the class of task.other; choose another text",
        ),
        (
            {"task": {"kind": "classify", "other": OTHER}, "student": {"gold": False}}
            | {"dataset": {"carve": {"test": 0.3}}},
            "task.other needs student.gold: true, since its texts are gold rows",
        ),
        (
            {"task": {"kind": "classify", "other": OTHER}, "teacher": {"kind": "local"}}
            | {"dataset": {"carve": {"test": 0.3}}},
            "teacher.kind: local needs a gold split in dataset.splits or dataset.carve",
        ),
    ],
)
def test_what_is_wrong_is_refused_in_one_line_that_names_the_key(
    values: dict[str, Any], said: str
) -> None:
    assert said in refusal(values)


BY_TEXT = {"user": "{question}", "answer": "text"}
CARVED = {"carve": {"gold": 0.3, "test": 0.3}}


@pytest.mark.parametrize(
    "values",
    [
        {"teacher": {"kind": "endpoint"}},
        {"teacher": {"kind": "gold"}},
        {"teacher": {"kind": "local"}, "task": {"kind": "classify"}},
    ],
)
def test_only_a_local_teacher_answers_by_text(values: dict[str, Any]) -> None:
    text = refusal({"prompt": BY_TEXT, "dataset": CARVED, **values})
    assert text.startswith("prompt.answer: text: only a local teacher tells how likely")
    assert "or set answer: text in student.prompt alone" in text


@pytest.mark.parametrize(
    ("setting", "settings"),
    [
        ("form: json", {"answers": {"form": "json"}}),
        ("form: rationale", {"answers": {"form": "rationale"}}),
        ("votes above 1", {"answers": {"votes": 3}, "temperature": 1}),
        ("orders above 1", {"answers": {"orders": 2}}),
    ],
)
def test_a_teacher_that_answers_by_text_is_asked_once(
    setting: str, settings: dict[str, Any]
) -> None:
    teacher = {"kind": "local", **settings}
    text = refusal({"prompt": BY_TEXT, "dataset": CARVED, "teacher": teacher})
    assert text.startswith(f"teacher.answers.{setting}: has no meaning with prompt.answer: text")


def test_a_student_that_starts_from_a_teacher_that_answers_by_text_does_too() -> None:
    teacher: dict[str, Any] = {"kind": "local", "soft_labels": True}
    values = {"prompt": BY_TEXT, "teacher": teacher, "student": {"start": "teacher"}}
    recipe = parse_recipe({"preset": "demo", **values}, "mine.yaml")
    assert recipe.student_prompt.answer == "text"
    assert recipe.teacher.for_own_model(recipe.prompt) == recipe.teacher
    teacher["answers"] = {"orders": 2}
    shown = {**BY_TEXT, "user": "{question}\n{choices}"}
    assert parse_recipe({"preset": "demo", **values, "prompt": shown}, "mine.yaml")


def test_every_wrong_key_is_named_at_once() -> None:
    text = refusal({"nane": "x", "evaluation": {"minimum_kept": 2}})
    assert "nane: unknown key" in text
    assert "evaluation.minimum_kept: " in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"- demo", "a recipe is a mapping of keys"),
        (b"", "a recipe is a mapping of keys"),
        (b"name: [a", "not valid YAML"),
        (b"name: \xff\xfe", "not valid YAML"),
    ],
)
def test_a_file_that_holds_no_recipe(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(str(file))
    assert str(caught.value).startswith(f"{file}:")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError, match=r"can't be read .* give a file or one of: demo, lab"):
            load_recipe(str(path))


@pytest.mark.parametrize(
    "values",
    [
        {"preset": "demo"},
        {"preset": "lab", "dataset": {"splits": {"test": "test"}, "carve": {"test": None}}},
        {"preset": "demo", "student": {"layers": None, "training": {"soft_weight": 0}}},
        {"evaluation": {"rules": [], "maximum_loss": 0.1}},
    ],
)
def test_a_recipe_survives_the_way_through_json(values: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(values)
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe
    assert Recipe.model_validate(recipe.model_dump(exclude_defaults=True)) == recipe


@pytest.mark.parametrize("model", [Recipe, SearchRecipe])
def test_the_schema_of_the_form_describes_each_key_and_submits_no_default(
    model: type[Slice],
) -> None:
    schema = model.model_json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert set(schema["properties"]) == set(model.model_fields)
    slices = {model.__name__: schema, **schema.get("$defs", {})}
    for name, definition in slices.items():
        assert definition["additionalProperties"] is False
        assert definition["description"], name
        for key, field in definition["properties"].items():
            assert field["description"], f"{name}.{key}"
            assert "default" not in field, f"{name}.{key}"


def test_a_form_is_in_cache_keys_by_its_own_settings() -> None:
    """One more that is not added later, and every export of earlier runs would be made again."""
    form = ExportRecipe(
        precision="int8", largest_loss=0.1, ladder=(ExportForm(algorithm="rtn"),)
    ).form
    assert form.model_dump() == {
        "precision": "int8",
        "algorithm": "k_quant_mixed",
        "block_size": 32,
        "share_embeddings": True,
        "adapter_apart": False,
        "all_logits": False,
    }
    assert ExportForm.added_later == {"all_logits"}
    assert ExportRecipe.added_later == {"all_logits", "training_rows", "choose"}
    assert type(form) is ExportForm


@pytest.mark.parametrize("teacher", ["local", "endpoint"])
def test_classifiers_choose_a_form_by_validation_rows_where_there_are_some(teacher: str) -> None:
    def parsed(validation: float | None = 0.1, **more: Any) -> Recipe:
        values = {
            "task": {"kind": "classify"},
            "teacher": {"kind": teacher},
            "dataset": {
                "source": "files",
                "files": {"train": ["a.csv"]},
                "carve": {"gold": 0.3, "test": 0.2, "validation": validation},
            },
        }
        return parse_recipe({**values, **more}, "mine.yaml")

    with_rows, without = parsed(), parsed(None)
    assert with_rows.export.ladder
    assert not without.export.ladder
    # A form that the recipe names is the one that ships; other settings are the ladder's.
    assert not parsed(export={"precision": "int4"}).export.ladder
    assert parsed(export={"precision": "int4"}).export.form.title == "int4 k_quant_mixed/32"
    assert parsed(export={"algorithm": "rtn"}).export.form.title == "int8 rtn/32"
    loose = parsed(export={"largest_loss": 0.05}).export
    assert (loose.ladder, loose.largest_loss) == (with_rows.export.ladder, 0.05)
    # Rows that prove a threshold have chosen nothing of the student's.
    proving = parsed(task={"kind": "classify", "abstain": {"accuracy": 0.9}})
    assert not proving.export.ladder
    # What is read back whole is the same recipe.
    for recipe in (with_rows, without, proving):
        assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_a_ladder_is_chosen_from_by_a_word_or_by_bounds() -> None:
    def chosen(choose: Any) -> Choose:
        recipe = parse_recipe({"export": {"choose": choose}}, "mine.yaml")
        assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
        return recipe.export.choose

    assert ExportRecipe().choose == "fastest"
    assert chosen("smallest") == "smallest"
    bounds = chosen({"latency_ms": 20, "bytes": 100_000_000})
    assert isinstance(bounds, ExportBounds)
    assert bounds.title == "{latency_ms: 20, bytes: 100000000}"
    assert chosen({"bytes": 7}) == ExportBounds(bytes=7)


def test_a_local_teachers_defaults_give_way_to_what_the_student_is() -> None:
    def training(**more: Any) -> TrainingRecipe:
        values: dict[str, Any] = {"task": {"kind": "classify"}, "teacher": {"kind": "local"}}
        values["dataset"] = {"source": "files", "files": {"train": ["a.csv"]}}
        values["dataset"]["carve"] = {"gold": 0.5, "test": 0.3}
        return parse_recipe({**values, **more}, "mine.yaml").student.training

    assert training().second_opinion == "words"
    spoken = {"start": "base", "prompt": {"answer": "text"}}
    assert training(student=spoken).second_opinion == "none"
    hard = training(teacher={"kind": "local", "soft_labels": False})
    assert (hard.soft_weight, hard.second_opinion) == (0, "none")


def rows_with_options(**more: Any) -> Recipe:
    values: dict[str, Any] = {"task": {"kind": "choice"}, "dataset": own_rows()}
    return parse_recipe({**values, **more}, "mine.yaml")


LOCAL = {"kind": "local"}


def test_rows_with_options_are_answered_by_text_by_default() -> None:
    local = rows_with_options(teacher=LOCAL)
    by_text = PromptRecipe(system="Answer in a word or two.", user="{question}", answer="text")
    assert local.prompt == local.student_prompt == by_text
    assert local.teacher.soft_labels
    trained = local.teacher.preparation.training
    assert (trained.epochs, trained.minimum_steps) == (3, 60)
    assert local.student.training == trained.model_copy(update={"soft_weight": 1.0})
    assert local.student.gold
    assert [form.title for form in local.export.ladder] == ["int8 dynamic/32", "fp32"]
    hard = rows_with_options(teacher={**LOCAL, "soft_labels": False})
    assert hard.student.training.soft_weight == 0

    endpoint = rows_with_options()
    assert endpoint.prompt == PromptRecipe()
    assert endpoint.student_prompt == by_text
    assert endpoint.student.training == trained


LETTERS = {"user": "{question}\n{choices}"}


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (LETTERS, "letter"),
        ({"answer": "letter"}, "letter"),
        ({"system": "One of {letters}."}, "letter"),
        ({"choice": "{letter}: {text}"}, "letter"),
        ({"system": "Judge."}, "text"),
        ({"max_tokens": 64}, "text"),
        ({**LETTERS, "answer": "text"}, "text"),
    ],
)
def test_a_prompt_for_letters_keeps_them(prompt: dict[str, Any], answer: str) -> None:
    found = rows_with_options(teacher=LOCAL, prompt=prompt)
    assert (found.prompt.answer, found.student.prompt) == (answer, None)
    assert found.prompt.model_dump().items() >= prompt.items()


def test_what_a_recipe_of_rows_with_options_says_takes_the_place_of_its_defaults() -> None:
    orders = rows_with_options(teacher={**LOCAL, "answers": {"orders": 3}})
    assert orders.prompt == PromptRecipe()
    judging = rows_with_options(prompt={**LETTERS, "system": "Judge."})
    assert judging.student_prompt == judging.prompt
    lettered = rows_with_options(student={"prompt": {"answer": "letter"}})
    assert lettered.student_prompt == PromptRecipe()
    assert rows_with_options(prompt={"max_tokens": 640}).student_prompt.max_tokens == 640
    with pytest.raises(RecipeError, match=r"student\.start: teacher needs teacher\.kind: local"):
        rows_with_options(student={"start": "teacher"})
    unvalidated = {**own_rows(), "carve": {"test": 0.3}}
    dynamic = ExportRecipe(precision="int8", algorithm="dynamic")
    assert rows_with_options(dataset=unvalidated).export == dynamic
    assert not rows_with_options(dataset=unvalidated).student.gold
    assert rows_with_options(export={"precision": "fp32"}).export.ladder == ()


def test_rows_with_options_may_be_the_sample_or_have_its_splits() -> None:
    sample = rows_with_options(dataset={}, teacher=LOCAL)
    assert sample.dataset == DatasetRecipe()
    assert sample.student.gold
    files = {name: [f"{name}.jsonl"] for name in DatasetRecipe().splits.values()}
    named = rows_with_options(dataset={"source": "files", "files": files})
    assert named.dataset.splits == DatasetRecipe().splits
    files["train"] = files.pop("pool")
    own = rows_with_options(dataset={"source": "files", "files": files})
    assert own.dataset.splits == {role: role for role in files}


@pytest.mark.parametrize("preset", [None, "demo", "lab"])
def test_rows_with_options_have_no_defaults_beside_a_preset(preset: str | None) -> None:
    """A recipe in a manifest says that it has none."""
    said = rows_with_options(preset=preset, teacher=LOCAL)
    silent = parse_recipe({"preset": preset, "dataset": own_rows(), "teacher": LOCAL}, "mine.yaml")
    assert said == silent
    assert Recipe.model_validate(said.model_dump(mode="json")) == said
    whole = rows_with_options(teacher=LOCAL)
    assert Recipe.model_validate(whole.model_dump(mode="json")) == whole


def test_abstaining_is_in_no_cache_key_unless_it_is_set() -> None:
    later = {"abstain", "other", "answer_schema", "metric", "max_tokens"}
    assert TaskRecipe.added_later == later
    threshold = parse_recipe({"task": {"abstain": {"threshold": 0.7}}}, "mine.yaml").task
    assert threshold.abstain is not None
    assert threshold.abstain.answer == "unsure"


def test_a_ladder_says_whether_it_needs_prompts_and_each_form_has_a_title() -> None:
    forms = (
        ExportForm(algorithm="gptq", share_embeddings=False),
        ExportForm(precision="fp16", algorithm="gptq"),
    )
    assert ExportRecipe(ladder=forms).calibrated
    assert not ExportRecipe(ladder=forms[1:]).calibrated
    assert [form.title for form in forms] == ["int4 gptq/32, own head", "fp16"]
    apart = ExportForm(precision="fp32", adapter_apart=True, share_embeddings=False)
    assert apart.title == "fp32, apart"
    assert ExportForm(all_logits=True).title == "int4 k_quant_mixed/32, all logits"


def test_qlora_is_a_method_wherever_lora_is() -> None:
    training = {"training": {"method": "qlora"}}
    recipe = Recipe.model_validate(
        {
            "teacher": {"kind": "local", "preparation": training},
            "student": training,
            "export": {"adapter_apart": True, "algorithm": "rtn"},
        }
    )
    assert recipe.student.training.adapts
    with pytest.raises(ValueError, match=r"needs training\.method: full"):
        Recipe.model_validate({"student": {"healing": [training]}})


def rules_of(**values: Any) -> list[str]:
    return [rule.title for rule in Recipe.model_validate(values).gate_rules]


def test_a_recipe_that_says_nothing_has_the_default_rules() -> None:
    common = [
        "keeps 80 % of the teacher's accuracy",
        "at most 2 points worse than the champion",
        "at most 2 points worse than the best",
    ]
    assert rules_of() == ["better than majority class", "better than base model", *common]
    local = {"teacher": {"kind": "local"}, "student": {"start": "teacher"}}
    assert rules_of(**local) == ["better than majority class", *common]
    assert rules_of(evaluation={"rules": []}) == []


def test_the_presets_say_their_rules() -> None:
    assert rules_of(preset="demo") == [
        "better than majority class",
        "better than base model",
        "keeps 95 % of the teacher's accuracy",
        "at most 5 points worse than the champion",
        "at most 5 points worse than the best",
    ]
    assert load_recipe("lab").evaluation.rules is not None


def test_the_older_settings_take_the_place_of_the_rules_of_their_kind() -> None:
    kept = {"minimum_kept": 0.9}
    better = ["better than majority class", "better than base model"]
    assert rules_of(evaluation=kept) == [
        *better,
        "at most 2 points worse than the champion",
        "at most 2 points worse than the best",
        "keeps 90 % of the teacher's accuracy",
    ]
    assert "keeps 90 % of the teacher's accuracy" in rules_of(preset="demo", evaluation=kept)
    assert "keeps 95 % of the teacher's accuracy" not in rules_of(preset="demo", evaluation=kept)
    open_gate = {"minimum_kept": 0, "maximum_loss": 1}
    assert rules_of(evaluation=open_gate) == better
    assert rules_of(evaluation={"rules": [], **kept, "maximum_loss": 0.03}) == [
        "keeps 90 % of the teacher's accuracy",
        "at most 3 points worse than the champion",
    ]
    by_estimate = Recipe.model_validate({"evaluation": {"maximum_loss": 0.03}}).gate_rules[-1]
    assert isinstance(by_estimate, NotWorseRule)
    assert by_estimate.confidence is None


def test_a_rule_is_named_by_its_content_if_it_has_no_name() -> None:
    titles = {
        "accuracy at least 0.8": {"kind": "limit", "figure": "accuracy", "minimum": 0.8},
        "bytes at least 1 and at most 55,000,000": {
            "kind": "limit",
            "figure": "bytes",
            "minimum": 1,
            "maximum": 55_000_000,
        },
        "fast": {"kind": "limit", "figure": "p95_ms", "maximum": 50, "name": "fast"},
        "at least 1,200 test rows": {"kind": "rows", "minimum": 1200},
    }
    assert rules_of(evaluation={"rules": list(titles.values())}) == list(titles)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"figure": "recall"}, "a limit on recall needs class"),
        ({"figure": "macro_f1", "class": "yes"}, "class belongs to the figure recall; remove it"),
        ({"figure": "p99_ms", "confidence": 0.95}, "p99_ms has no interval, only accuracy, "),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(settings: dict[str, Any], reason: str) -> None:
    rule = {"kind": "limit", "minimum": 0.5} | settings
    with pytest.raises(ValueError, match=reason):
        Recipe.model_validate({"evaluation": {"rules": [rule]}})


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("demo").name = "other"  # type: ignore[misc]


def test_a_question_needs_options_and_an_answer_fits_its_task() -> None:
    with pytest.raises(RecipeError, match=r"dataset\.columns\.choices: name the column"):
        parse_recipe({"dataset": {"columns": {"choices": None}}}, "mine.yaml")
    with pytest.raises(RecipeError, match=r"class belongs to task\.kind: classify"):
        parse_recipe({"prompt": {"answer": "class", "user": "{text}"}}, "mine.yaml")


def classifier(**more: Any) -> Recipe:
    return parse_recipe({"task": {"kind": "classify"}, "dataset": own_rows(), **more}, "mine.yaml")


def own_rows() -> dict[str, Any]:
    return {
        "source": "files",
        "files": {"train": ["rows.csv"]},
        "carve": {"gold": 0.5, "validation": 0.1, "test": 0.4},
    }


def test_a_classifiers_endpoint_answers_in_json_unless_the_recipe_names_a_form() -> None:
    plain = classifier().teacher
    assert (plain.answers.form, plain.max_tokens) == ("json", 64)
    votes = classifier(teacher={"answers": {"votes": 3}, "temperature": 0.7}).teacher
    assert (votes.answers.form, votes.answers.votes) == ("json", 3)
    named = classifier(teacher={"answers": {"form": "letter"}}).teacher
    assert (named.answers.form, named.max_tokens) == ("letter", 16)
    with pytest.raises(RecipeError, match="rationale needs max_tokens of a few hundred"):
        classifier(teacher={"answers": {"form": "rationale"}})
    assert classifier(teacher={"kind": "local"}).teacher.answers.form == "letter"


def test_validation_rows_end_a_classifiers_training_unless_they_prove_its_threshold() -> None:
    local = classifier(teacher={"kind": "local"})
    assert local.student.training.patience == "proven"
    assert local.teacher.preparation.training.patience == "proven"
    assert classifier().student.training.patience == "proven"
    without = {**own_rows(), "carve": {"gold": 0.5, "test": 0.4}}
    assert classifier(dataset=without).student.training.patience is None
    abstaining = {"kind": "classify", "abstain": {"accuracy": 0.9}}
    assert classifier(task=abstaining).student.training.patience is None


def test_a_classifiers_files_serve_for_the_roles_that_they_are_named_for() -> None:
    files = {role: [f"{role}.csv"] for role in ("train", "gold", "validation", "test", "spare")}
    own = classifier(dataset={"source": "files", "files": files})
    assert own.dataset.splits == {role: role for role in files if role != "spare"}
    # As if dataset.splits or dataset.carve named the rows.
    assert own.student.gold
    assert own.export.ladder
    assert Recipe.model_validate(own.model_dump(mode="json")) == own
    mixed = {**own_rows(), "files": {"train": ["rows.csv"], "test": ["held-out.csv"]}}
    mixed["carve"] = {"gold": 0.8, "validation": 0.2}
    assert classifier(dataset=mixed).dataset.splits == {"train": "train", "test": "test"}
    # Splits that the recipe names are all.
    mixed["splits"] = {"validation": "test"}
    mixed["carve"] = {"test": 0.2}
    assert classifier(dataset=mixed).dataset.splits == {"train": "train", "validation": "test"}


@pytest.mark.parametrize(
    ("teacher", "in_scheduled", "in_others"),
    [
        ({}, 20, 0),
        ({"canaries": {"rows": 5}}, 5, 5),
        ({"canaries": {"rows": 0}}, 0, 0),
        ({"kind": "gold"}, 0, 0),
        ({"budget": {"calls": 100}}, 0, 0),
        ({"budget": {"tokens": 9_000_000}}, 0, 0),
        ({"budget": {"calls": 100}, "canaries": {"rows": 20}}, 20, 20),
    ],
)
def test_a_scheduled_run_has_canaries_by_default(
    teacher: dict[str, Any], in_scheduled: int, in_others: int
) -> None:
    recipe = TeacherRecipe.model_validate(teacher)
    assert recipe.with_canaries(scheduled=True).canaries.rows == in_scheduled
    assert recipe.with_canaries(scheduled=False).canaries.rows == in_others


def test_a_choice_of_layers_replaces_the_default_as_a_whole() -> None:
    chosen = classifier(student={"layers": {"keep": 12}}).student.layers
    assert chosen == LayerChoice(keep=12, by="early_and_last")
    text = {"system": "", "user": "{question}", "answer": "text"}
    by_text = classifier(student={"prompt": text}).student.layers
    assert by_text == LayerChoice(keep=0.5, by="first")
    assert isinstance(classifier().student.layers, LayerChoice)


@pytest.mark.parametrize("named", [{}, {"name": "run"}])
def test_a_budget_of_a_period_needs_a_name(named: dict[str, Any]) -> None:
    """Recipes without a name would share it."""
    week = {"teacher": {"budget": {"calls": 5, "period": "week"}}}
    told = refusal(week | named)
    assert "teacher.budget.period: week counts the runs of recipes of the same name" in told
    parse_recipe(week | {"name": "messages"}, "mine.yaml")
    parse_recipe({"teacher": {"budget": {"calls": 5}}} | named, "mine.yaml")
