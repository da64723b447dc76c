"""The registry slice: where a student that the gate accepts is registered."""

from typing import ClassVar, Literal

from pydantic import Field

from distillery.recipe.base import Slice

RegistryKind = Literal["local", "azureml"]


class RegistryRecipe(Slice):
    """The registry, and the model's name in it."""

    added_later: ClassVar[frozenset[str]] = frozenset({"keep_refused"})

    kind: RegistryKind = "local"
    """local: MLflow at DISTILLERY_REGISTRY, by default a SQLite file on this machine. azureml: the
    Azure ML workspace that AZUREML_* name."""

    model_name: str = Field("distillery-student", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$")
    """The name under which students are registered as versions. The champion is one of them."""

    keep_refused: bool = False
    """true: a student that the gate refuses is registered too, as a version of the role rejected.
    It never becomes the champion, and no student is compared with it."""
