import time

from prefect import get_run_logger

from distillery import onnx as domain
from distillery.base_model import base_folder, remote_code_allowed
from distillery.recipe import BaseModelRecipe, ExportRecipe
from distillery.records import OnnxModel, StudentCheckpoint
from distillery.store import ArtifactStore, working_folder
from distillery.student import parts
from tasks.stage import origin, stage


@stage("export", version=1)
def export(checkpoint: StudentCheckpoint, base: BaseModelRecipe, recipe: ExportRecipe) -> OnnxModel:
    """Merges, quantises and builds a checkpoint for ONNX Runtime GenAI."""
    started = time.perf_counter()
    store = ArtifactStore()
    model, adapter = parts(store.fetch(checkpoint.artifact), base_folder(base))
    with working_folder("onnx") as folder:
        domain.export(model, adapter, recipe, folder, remote_code_allowed(base))
        artifact = store.put(folder)
    get_run_logger().info("%s model of %.1f MB", recipe.precision, artifact.bytes / 1e6)
    return OnnxModel(
        artifact=artifact,
        precision=recipe.precision,
        algorithm=recipe.algorithm if recipe.precision in ("int4", "int8") else "none",
        parameters=checkpoint.parameters,
        adapter_apart=recipe.adapter_apart,
        **origin(started),
    )
