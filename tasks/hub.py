"""What a run asks the Hugging Face hub once: which commits the names in its recipe stand for, and
what it will download."""

from prefect.runtime import flow_run

from distillery.data.source import source_identity
from distillery.models.base import asks_hub, pin_revision
from distillery.readiness import check_base_models, missing_base_models
from distillery.recipe import BaseModelRecipe, DatasetRecipe, OtherRecipe, Recipe
from tasks.stage import uncached

_PINNED: dict[tuple[str, BaseModelRecipe], BaseModelRecipe] = {}
"""The base models that each flow run of this process has resolved."""


@uncached("ask hub for data")
def hub_source(dataset: DatasetRecipe, other: OtherRecipe | None) -> str:
    return source_identity(dataset, other)


@uncached("ask hub for model")
def hub_base(base: BaseModelRecipe) -> BaseModelRecipe:
    return pin_revision(base)


@uncached("check base models")
def asked_base_models(recipe: Recipe) -> None:
    check_base_models(recipe)


def check_bases(recipe: Recipe) -> None:
    """Check the base models that are not on this machine, before a teacher is asked."""
    if missing_base_models(recipe):
        asked_base_models(recipe)


def source_of(recipe: Recipe) -> str:
    """Return the identity of the recipe's rows. A hub that does not answer is asked again, as a
    stage is tried again."""
    if recipe.dataset.source == "hub":
        source: str = hub_source(recipe.dataset, recipe.task.other)
        return source
    return source_identity(recipe.dataset, recipe.task.other)


def pinned(base: BaseModelRecipe) -> BaseModelRecipe:
    """Return a base model with the commit that it has on the hub, the same for a whole run; other
    base models as they are."""
    if not asks_hub(base):
        return base
    key = (str(flow_run.id), base)
    if key not in _PINNED:
        _PINNED[key] = hub_base(base)
    return _PINNED[key]
