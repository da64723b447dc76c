"""Open the registry that a recipe names."""

from distillery.recipe import RegistryRecipe
from distillery.registry.azureml import AzureRegistry
from distillery.registry.base import Registry
from distillery.registry.local import LocalRegistry


def open_registry(recipe: RegistryRecipe) -> Registry:
    """Return the registry of this kind, where the environment says it is.

    Raises CredentialsError if the variables of Azure ML are not set.
    """
    if recipe.kind == "azureml":
        return AzureRegistry()
    return LocalRegistry()
