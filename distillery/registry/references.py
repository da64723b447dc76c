"""What the registries still need of the artifact store: asked before `distillery store gc`."""

from collections.abc import Iterable

from distillery.errors import StoreError
from distillery.recipe import RegistryKind, RegistryRecipe
from distillery.registry.open import open_registry
from distillery.settings import LocalSettings
from distillery.storage.housekeeping import ModelVersion, Registered, artifact_references


def find_registered(models: Iterable[tuple[RegistryKind, str]], store_is_local: bool) -> Registered:
    """Return all versions of `models` (registry and name) and the artifacts that they name.

    Raises RegistryUnavailable where a registry does not answer, and StoreError where a shared
    store would be judged by this machine's own registry."""
    models = sorted(models)
    asks_local = any(kind == "local" for kind, _ in models)
    if asks_local and not store_is_local and not LocalSettings().registry:
        raise StoreError(
            "DISTILLERY_REGISTRY: not set, so that this machine's own registry would be asked "
            "which models of a shared store are registered; set it to the registry of the runs"
        )
    versions: set[ModelVersion] = set()
    artifacts: set[str] = set()
    for kind, name in models:
        registry = open_registry(RegistryRecipe(kind=kind, model_name=name))
        for model in registry.list(name):
            versions.add(ModelVersion(kind, name, model.version))
            # Other machines take a registered folder from the store.
            artifacts.add(model.artifact.sha256)
            provenance = registry.provenance(model)["provenance"]
            artifacts.update(dict(artifact_references(provenance)))
    return Registered(frozenset(versions), frozenset(artifacts))
