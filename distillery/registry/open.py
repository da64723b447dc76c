"""The model registry: named, numbered models that carry their history, in Azure ML or here (MLflow on SQLite).

What is registered is the model's folder with a manifest.json inside it: its provenance (data, prompts, teacher, labels,
code, evaluation, as the caller gives them) and the sha256 and size of every file. The manifest's own sha256 is a tag of
the version, so that a folder which was altered anywhere after it was registered is refused when it is downloaded.

Azure ML's own upload drops files that a .gitignore in the folder names, takes an earlier upload on trust and waits 90 s
for storage that is down. So the folder is written to the workspace's blob store by azure-storage-blob, below its digest
as path, and the version that MLClient registers (a CUSTOM_MODEL) points there.
"""

from distillery.recipe import RegistryRecipe
from distillery.registry.azureml import AzureRegistry
from distillery.registry.base import Registry
from distillery.registry.local import LocalRegistry


def open_registry(recipe: RegistryRecipe) -> Registry:
    """The registry that the recipe names, where the environment says it is. Raises CredentialsError."""
    return AzureRegistry() if recipe.kind == "azureml" else LocalRegistry()
