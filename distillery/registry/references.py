"""What the registries still need of the artifact store: asked before `distillery store gc`."""

import logging
from collections.abc import Collection

from distillery.errors import ModelGone, StoreError
from distillery.recipe import RegistryKind, RegistryRecipe
from distillery.registry.open import open_registry
from distillery.settings import AzureMLSettings, LocalSettings
from distillery.storage.housekeeping import ModelVersion, Registered, artifact_references

_log = logging.getLogger(__name__)


def find_registered(
    named: Collection[tuple[RegistryKind, str]], store_is_local: bool
) -> Registered:
    """Return all versions in the registries and the artifacts that they name.

    `named` are the models (registry and name) that the records of runs name. All other models count
    too, in these registries and in those that this machine is set up for: a run that ended between
    its registration and its record has registered a model that no record names.

    Raises RegistryUnavailable where a registry does not answer, ModelGone for a named model whose
    files are gone, and StoreError where a shared store would be judged by this machine's own
    registry."""
    kinds: set[RegistryKind] = {kind for kind, _ in named}
    own_registry_counts = store_is_local or bool(LocalSettings().registry)
    if "local" in kinds and not own_registry_counts:
        raise StoreError(
            "DISTILLERY_REGISTRY: not set, so that this machine's own registry would be asked "
            "which models of a shared store are registered; set it to the registry of the runs"
        )
    if own_registry_counts:
        kinds.add("local")
    if AzureMLSettings().is_complete:
        kinds.add("azureml")
    versions: set[ModelVersion] = set()
    artifacts: set[str] = set()
    for kind in sorted(kinds):
        registry = open_registry(RegistryRecipe(kind=kind))
        for model in registry.list():
            versions.add(ModelVersion(kind, model.name, model.version))
            # Other machines take a registered folder from the store.
            artifacts.add(model.artifact.sha256)
            try:
                provenance = registry.provenance(model)["provenance"]
            except ModelGone as error:
                if (kind, model.name) in named:
                    raise
                _log.warning("%s; taken for a model of another store", error)
                continue
            artifacts.update(dict(artifact_references(provenance)))
    return Registered(frozenset(versions), frozenset(artifacts))
