"""recipe/registry"""

from typing import Literal

from pydantic import Field

from distillery.recipe.base import Slice

RegistryKind = Literal["local", "azureml"]


class RegistryRecipe(Slice):
    kind: RegistryKind = "local"
    model_name: str = Field("distillery-student", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$")
