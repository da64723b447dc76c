"""Of every text in a recipe it is decided whether it leads to a file or an address, and what holds
it then: whoever may start runs may write each of them."""

import typing
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ValidationError

from distillery.recipe import (
    BaseModelRecipe,
    CascadeRecipe,
    DatasetRecipe,
    JudgeRecipe,
    Recipe,
    SearchRecipe,
)
from distillery.recipe.judge import OF_LABELLING
from distillery.recipe.teacher import NOT_OF_CHEAP

pytestmark = pytest.mark.security

LEADS_TO = {
    # Local files: distillery.storage.allowed.local_path
    "dataset.files": "local_path, for the pattern and for each match",
    "dataset.corrections": "local_path",
    "task.labels": "local_path",
    "task.answer_schema": "local_path; its references stay within it: answers.check_schema",
    "task.other.files": "local_path",
    "teacher.files": "local_path",
    # A local folder, or a name on the hub
    "teacher.tokenizer": "named_tokenizer: local_path",
    "student.base.model": "local_source: local_path; a package without importing it",
    "teacher.preparation.base.model": "as student.base.model",
    "dataset.name": "check_name: a hub id that is no local folder; check_card, check_builder",
    # A file's name in the hub's cache
    "dataset.revision": "check_revision",
    "student.base.revision": "check_revision",
    "teacher.preparation.base.revision": "check_revision",
    # Names of folders and files of our own
    "name": "its pattern",
    "registry.model_name": "its pattern",
}

NAMES = {
    "dataset.splits": "a split, looked up among those of the source",
    "dataset.columns.id": "a column",
    "dataset.columns.question": "a column",
    "dataset.columns.concept": "a column",
    "dataset.columns.choices": "a column",
    "dataset.columns.answer": "a column",
    "dataset.fields": "columns",
    "teacher.identity": "a key in the label database",
    "teacher.shared_limit": "a concurrency limit of Prefect",
    "teacher.batch.model": "sent to the endpoint",
    "teacher.batch.window": "a number of hours or days, its pattern",
    "teacher.cascade.identity": "a key in the label database",
    "teacher.cascade.shared_limit": "a concurrency limit of Prefect",
    "evaluation.judge.identity": "a key in the label database",
    "evaluation.judge.shared_limit": "a concurrency limit of Prefect",
    "evaluation.rules.than": "a predictor's name or a version, its pattern",
    "evaluation.rules.of_class": "a class",
    "student.training.lora.target_modules": "modules of the model",
    "student.healing.training.lora.target_modules": "modules of the model",
    "teacher.preparation.training.lora.target_modules": "modules of the model",
}

TEXTS = {
    *("task.other.label", "task.abstain.answer", "evaluation.rules.name"),
    *("prompt.system", "prompt.user", "prompt.choice"),
    *("student.prompt.system", "student.prompt.user", "student.prompt.choice"),
    *("teacher.answers.instruction", "teacher.prices.currency", "teacher.terms", "teacher.stop"),
    *("teacher.cascade.answers.instruction", "teacher.cascade.prices.currency"),
    *("evaluation.judge.answers.instruction", "evaluation.judge.prices.currency"),
    "evaluation.judge.instructions",
    "student.training.rationale_instruction",
    "student.healing.training.rationale_instruction",
    "teacher.preparation.training.rationale_instruction",
}
"""What people and models read."""


def texts(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """The dotted names of all fields that take a text of any content."""
    for name, field in model.model_fields.items():
        # tests/recipe/test_judge.py and tests/labels/test_cascade.py: these are refused.
        if model is JudgeRecipe and name in OF_LABELLING:
            continue
        if model is CascadeRecipe and name in NOT_OF_CHEAP:
            continue
        yield from texts_in(field.annotation, f"{above}.{name}".removeprefix("."))


def texts_in(kind: Any, path: str) -> Iterator[str]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield from texts(kind, path)
    elif kind is str:
        yield path
    elif typing.get_origin(kind) is not Literal:
        for part in typing.get_args(kind):
            yield from texts_in(part, path)


def test_every_text_of_a_recipe_is_decided_upon() -> None:
    assert set(texts(Recipe)) == LEADS_TO.keys() | NAMES.keys() | TEXTS
    assert not list(texts(SearchRecipe))


@pytest.mark.parametrize(
    "revision", ["../../../etc/passwd", "/etc/passwd", "a/../../b", "a\\b", "a\0b", "a//b", ""]
)
def test_a_revision_does_not_lead_out_of_the_hubs_cache(revision: str) -> None:
    with pytest.raises(ValidationError, match="give a commit, tag or branch"):
        BaseModelRecipe(model="a/b", revision=revision)
    with pytest.raises(ValidationError, match="give a commit, tag or branch"):
        DatasetRecipe(source="hub", name="a/b", revision=revision)


@pytest.mark.parametrize("revision", ["1" * 40, "main", "refs/pr/1", "v1.0+cu", "feature/x"])
def test_a_revision_of_any_name_is_one(revision: str) -> None:
    assert BaseModelRecipe(model="a/b", revision=revision).revision == revision
