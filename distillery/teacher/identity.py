"""Who the teacher is, as the label store and the cache keys know it. A judge and the cheap teacher
of a cascade are ones of kind endpoint."""

from distillery.errors import DataError, RecipeError
from distillery.recipe import CascadeRecipe, JudgeRecipe, TeacherRecipe
from distillery.records import OnnxModel, digest_of
from distillery.settings import CheapSettings, JudgeSettings, TeacherSettings, where_to_set
from distillery.storage.allowed import local_path
from distillery.storage.digests import sha256_of


def teacher_identity(teacher: TeacherRecipe, model: OnnxModel | None) -> str:
    """Return the name under which the teacher's answers are kept, never a URL or an SDK: for a
    local `model` its digest, for label files theirs, for gold labels "gold", and for an endpoint
    teacher.identity or the model's name. Raises RecipeError if an endpoint has no name, DataError
    if a file cannot be read."""
    if model is not None:
        return f"local:{model.content_id}"
    if teacher.kind == "gold":
        return "gold"
    if teacher.kind == "file":
        return f"file:{digest_of([digest_of_file(path) for path in teacher.files])}"
    name = endpoint_settings(teacher).model
    if not (teacher.identity or name):
        variable = f"{teacher.variables}_NAME"
        raise RecipeError(
            f"{variable}: not set or empty, and neither is {teacher.section}.identity set; "
            f"{where_to_set([variable])}, or set {teacher.section}.identity in the recipe"
        )
    return teacher.stored_as(name)


def identity_of_cheap(teacher: TeacherRecipe) -> str | None:
    """Return the identity of a teacher's cheap one; None where there is none."""
    return teacher_identity(teacher.cascade, None) if teacher.cascade else None


def refuse_one_identity(identity: str, cheap: str) -> None:
    """Raise RecipeError if a teacher and its cheap one have the same identity: the answers of one
    would count as the other's."""
    if identity == cheap:
        raise RecipeError(
            f"teacher.cascade: both teachers are {identity}, so that the answers of one would "
            "count as the other's; give one of them another identity, or remove the cascade"
        )


def endpoint_settings(teacher: TeacherRecipe) -> TeacherSettings:
    """Return what the environment tells of a teacher's endpoint, a cheap one's or a judge's."""
    if isinstance(teacher, CascadeRecipe):
        return CheapSettings()
    return JudgeSettings() if isinstance(teacher, JudgeRecipe) else TeacherSettings()


def digest_of_file(path: str) -> str:
    """Return the SHA-256 (hex) of a file of teacher.files."""
    try:
        return sha256_of(local_path(path, "teacher.files"))
    except OSError as error:
        raise DataError(
            f"{path}: can't be read ({error.strerror}); correct teacher.files"
        ) from None
