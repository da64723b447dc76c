"""What a run needs of machine and account, checked before it spends anything. `distillery check` prints all of it."""

from distillery.errors import RecipeError
from distillery.recipe import Recipe
from distillery.records import OnnxModel
from distillery.settings import AzureMLSettings, TeacherSettings
from distillery.teacher import resolve_endpoint


def check_settings(recipe: Recipe) -> None:
    """Raises at once what would otherwise stop a run after its paid or slow stages. Asks no service."""
    if recipe.teacher.kind == "endpoint":
        resolve_endpoint(recipe.teacher)
    if recipe.registry.kind == "azureml":
        AzureMLSettings().require()


def teacher_identity(recipe: Recipe, model: OnnxModel | None) -> str:
    """Who answers, as the label store knows it: the recipe's name for the teacher, a local model's digest, or the
    endpoint's model name; never a URL or an SDK."""
    if model is not None:
        return f"local:{model.content_id}"
    identity = recipe.teacher.identity or TeacherSettings().model
    if not identity:
        raise RecipeError("teacher.identity: not set, and neither is TEACHER_MODEL_NAME; set one of them")
    return identity
