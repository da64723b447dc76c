"""teacher/identity"""

from pathlib import Path

from distillery.errors import DataError, RecipeError
from distillery.recipe import Recipe
from distillery.records import OnnxModel, digest_of
from distillery.settings import TeacherSettings
from distillery.storage.digests import sha256_of


def teacher_identity(recipe: Recipe, model: OnnxModel | None) -> str:
    """Who answers, as the label store knows it: the recipe's name for the teacher, a local model's digest, the digest
    of label files, or the endpoint's model name; never a URL or an SDK."""
    if model is not None:
        return f"local:{model.content_id}"
    if recipe.teacher.kind == "gold":
        return "gold"
    if recipe.teacher.kind == "file":
        return f"file:{digest_of([_digest_of_file(path) for path in recipe.teacher.files])}"
    identity = recipe.teacher.identity or TeacherSettings().model
    if not identity:
        raise RecipeError(
            "teacher.identity: not set, and neither is TEACHER_MODEL_NAME; set one of them"
        )
    return identity


def _digest_of_file(path: str) -> str:
    try:
        return sha256_of(Path(path).expanduser())
    except OSError as error:
        raise DataError(
            f"{path}: can't be read ({error.strerror}); correct teacher.files"
        ) from None
