"""Runs one Olive workflow in this process: our passes, a fresh cache, and an error where no model came out."""

import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from distillery.errors import DistilleryError, ExportError
from distillery.storage.working import working_folder

OUR_PASSES = {
    "KeepLayers": "distillery.training.olive_passes.KeepLayers",
    "Distillation": "distillery.training.olive_passes.Distillation",
}
_ANY = {
    "supported_providers": ["*"],
    "supported_accelerators": ["*"],
    "supported_precisions": ["*"],
}


def run_workflow(
    input_model: dict[str, Any],
    passes: dict[str, dict[str, Any]],
    out: Path,
    *,
    adapter_only: bool = False,
) -> None:
    """Runs `passes` in order over `input_model` (an Olive HfModel config).

    What the last one made goes to out/model and its adapter to out/adapter; with `adapter_only`, the adapter alone.
    Raises ExportError where Olive ended without a model, which it reports as success; our passes' own errors come out
    as they are."""
    os.environ.setdefault("OLIVE_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from olive.exception import EXCEPTIONS_TO_RAISE
    from olive.telemetry.telemetry import Telemetry
    from olive.workflows import run

    # OLIVE_DISABLE_TELEMETRY still lets one heartbeat out; on what Olive takes for a CI machine none is sent.
    Telemetry._is_ci_environment = staticmethod(lambda: True)  # type: ignore[method-assign]

    with working_folder("olive") as work:
        config = {
            "input_model": {"type": "HfModel", **input_model},
            "systems": {
                "here": {
                    "type": "LocalSystem",
                    "accelerators": [
                        {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
                    ],
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
        log = io.StringIO()
        temporary = tempfile.tempdir
        try:
            with _caught_by_olive() as caught, redirect_stdout(log):
                result = run(config, package_config=_package_config(), tempdir=str(work))
        except EXCEPTIONS_TO_RAISE as error:
            # What Olive takes for its user's fault, it neither logs nor goes on from.
            raise _reason([error], log.getvalue(), ", ".join(passes)) from error
        finally:
            # Olive moves the temporary folder of the whole process into its own, which is about to go.
            tempfile.tempdir = temporary
        if result is None or not result.has_output_model():
            raise _reason(caught, log.getvalue(), ", ".join(passes))
        _copy_output(result.get_best_candidate().model_config, out, adapter_only)


@contextmanager
def _caught_by_olive() -> Iterator[list[BaseException]]:
    """The errors that Olive logs, with tracebacks of many lines, and goes on from."""
    caught: list[BaseException] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1]:
                caught.append(record.exc_info[1])

    logger = logging.getLogger("olive")
    before, logger.handlers = logger.handlers, [Collector()]
    try:
        yield caught
    finally:
        logger.handlers = before


def _reason(caught: list[BaseException], said: str, passes: str) -> Exception:
    if not caught:
        return ExportError(
            f"Olive ended without a model after {passes}; the last that it said: {' '.join(said.split())[-300:]}"
        )
    if isinstance(caught[0], DistilleryError):
        return caught[0]
    error = ExportError(
        f"Olive failed at {passes} ({type(caught[0]).__name__}: {' '.join(str(caught[0]).split())[:200]})"
    )
    error.__cause__ = caught[0]
    return error


def _copy_output(model: dict[str, Any], out: Path, adapter_only: bool) -> None:
    names = (
        {"adapter_path": "adapter"}
        if adapter_only
        else {"model_path": "model", "adapter_path": "adapter"}
    )
    for key, name in names.items():
        if source := model.get(key):
            folder = Path(source).parent if Path(source).is_file() else Path(source)
            shutil.copytree(folder, out / name, dirs_exist_ok=True)
    for file in map(Path, (model.get("model_attributes") or {}).get("additional_files") or []):
        if (out / "model").is_dir() and file.is_file() and not (out / "model" / file.name).exists():
            shutil.copyfile(file, out / "model" / file.name)


def _package_config() -> dict[str, Any]:
    from olive.package_config import OlivePackageConfig

    config: dict[str, Any] = json.loads(
        Path(OlivePackageConfig.get_default_config_path()).read_text()
    )
    config["passes"] |= {name: {"module_path": path, **_ANY} for name, path in OUR_PASSES.items()}
    return config
