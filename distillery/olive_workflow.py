"""Runs one Olive workflow in this process: our passes, a fresh cache, and an error where no model came out."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from distillery.errors import DistilleryError, ExportError
from distillery.store import working_folder

OUR_PASSES = {
    "KeepLayers": "distillery.olive_passes.KeepLayers",
    "Distillation": "distillery.olive_passes.Distillation",
}
_ANY = {"supported_providers": ["*"], "supported_accelerators": ["*"], "supported_precisions": ["*"]}


def run_workflow(
    input_model: dict[str, Any], passes: dict[str, dict[str, Any]], out: Path, *, adapter_only: bool = False
) -> None:
    """Runs `passes` in order over `input_model` (an Olive HfModel config).

    What the last one made goes to out/model and its adapter to out/adapter; with `adapter_only`, the adapter alone.
    Raises ExportError where Olive ended without a model, which it reports as success; our own errors pass through."""
    os.environ.setdefault("OLIVE_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from olive.workflows import run

    with working_folder("olive") as work:
        config = {
            "input_model": {"type": "HfModel", **input_model},
            "systems": {
                "here": {
                    "type": "LocalSystem",
                    "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
                }
            },
            "host": "here",
            "target": "here",
            "passes": passes,
            "evaluate_input_model": False,
            "no_artifacts": True,
            "cache_dir": str(work / "cache"),
            "output_dir": str(work / "output"),
            "log_severity_level": 3,
        }
        try:
            result = run(config, package_config=_package_config(), tempdir=str(work))
        except DistilleryError:
            raise
        except OSError as error:
            if error.errno == 28:
                raise ExportError(
                    f"{work.parent}: the disk is full; free some space or move DISTILLERY_HOME"
                ) from error
            raise
        finally:
            logging.getLogger("olive").setLevel(logging.WARNING)
        if result is None or not result.has_output_model():
            raise ExportError(f"Olive ended without a model after {', '.join(passes)}; its log above says why")
        _copy_output(result.get_best_candidate().model_config, out, adapter_only)


def _copy_output(model: dict[str, Any], out: Path, adapter_only: bool) -> None:
    names = {"adapter_path": "adapter"} if adapter_only else {"model_path": "model", "adapter_path": "adapter"}
    for key, name in names.items():
        if source := model.get(key):
            folder = Path(source).parent if Path(source).is_file() else Path(source)
            shutil.copytree(folder, out / name, dirs_exist_ok=True)
    for file in map(Path, (model.get("model_attributes") or {}).get("additional_files") or []):
        if (out / "model").is_dir() and file.is_file() and not (out / "model" / file.name).exists():
            shutil.copyfile(file, out / "model" / file.name)


def _package_config() -> dict[str, Any]:
    from olive.package_config import OlivePackageConfig

    config: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text())
    config["passes"] |= {name: {"module_path": path, **_ANY} for name, path in OUR_PASSES.items()}
    return config
