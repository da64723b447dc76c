"""Register a model in Foundry Local: python foundry_registration.py FOLDER NAME:VERSION APP.

serving/foundry.py runs this file with the Python of an environment that has foundry-local-sdk and
lacks Distillery, so it imports nothing of Distillery's.
"""

import sys

from foundry_local_sdk import (
    CatalogType,
    Configuration,
    FoundryLocalException,
    FoundryLocalManager,
    ModelInfoBuilder,
)


def register(folder: str, model_id: str, app: str) -> None:
    """Register the folder as `model_id` in the local catalog of programs with the app_name `app`,
    in place of an earlier registration, and load it once.

    Raises FoundryLocalException where it can't be loaded; then it is not registered."""
    settings = Configuration(app, disable_nonessential_telemetry=True)
    with FoundryLocalManager(settings) as manager:
        catalog = manager.get_catalog(CatalogType.LOCAL)
        if catalog.get_model_variant(model_id):
            catalog.unregister_model(model_id)
        with ModelInfoBuilder() as metadata:
            metadata.set_string_property("task", "chat-completion")
            model = catalog.register_model(folder, model_id, metadata)
        try:
            model.load()
            model.unload()
        except FoundryLocalException:
            catalog.unregister_model(model_id)
            raise


if __name__ == "__main__":
    try:
        register(*sys.argv[1:])
    except FoundryLocalException as error:
        sys.exit(" ".join(str(error).split()))
