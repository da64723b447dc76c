"""Run one Olive workflow in this process: with our own passes, a new cache, and an error where no
model came out.

In: a model's folder and the passes' settings. Out: folders with the model and its adapter.
"""

import io
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from distillery.errors import DistilleryError, ExportError, named_line
from distillery.hub_kernels import import_bitsandbytes
from distillery.progress import ShowProgress, show_nothing
from distillery.storage.working import working_folder

ENGINE = "olive.engine.engine"
PASS_BEGINS = re.compile(r"Running pass (\w+):")
"""What Olive's engine logs when it begins a pass: its name, and then its type."""

SLICE = 2**20
"""How many weights KQuant searches at a time."""


def run_workflow(
    input_model: dict[str, Any],
    passes: dict[str, dict[str, Any]],
    out: Path,
    *,
    own_passes: Mapping[str, str] | None = None,
    adapter_only: bool = False,
    progress: ShowProgress = show_nothing,
) -> None:
    """Run `passes` in order over `input_model` (the settings of an Olive HfModel).

    `own_passes`: pass classes that are not Olive's, by their type's name, as import paths. Writes
    the last pass's model to out/model and its adapter to out/adapter; with `adapter_only`, the
    adapter alone. `progress` is shown the passes that are done. Raises ExportError where Olive ends
    without a model, which Olive itself reports as success; a DistilleryError of a pass is raised as
    it is."""
    progress(0, len(passes), "loading Olive")
    os.environ.setdefault("OLIVE_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Olive imports peft where it merges an adapter.
    import_bitsandbytes()
    from olive.exception import EXCEPTIONS_TO_RAISE
    from olive.telemetry.telemetry import Telemetry
    from olive.workflows import run

    # OLIVE_DISABLE_TELEMETRY still lets one heartbeat out; none is sent from what Olive takes for a
    # CI machine.
    Telemetry._is_ci_environment = staticmethod(lambda: True)  # type: ignore[method-assign]

    names, said = ", ".join(passes), io.StringIO()
    load_kwargs = input_model.get("load_kwargs") or {}
    with working_folder("olive") as work:
        config = workflow_config(input_model, passes, work)
        package_config = config_of_passes(own_passes or {})
        temporary = tempfile.tempdir
        try:
            with (
                frugal_k_quant(),
                explicit_loading(bool(load_kwargs.get("trust_remote_code"))),
                listening_to_olive(list(passes), progress) as logged,
                redirect_stdout(said),
            ):
                result = run(config, package_config=package_config, tempdir=str(work))
        except EXCEPTIONS_TO_RAISE as error:
            # Olive does not log the errors that it takes for its user's fault, but raises them.
            raise workflow_error([error], said.getvalue(), names) from error
        finally:
            # Olive moves the whole process's temporary folder into `work`, which is removed here.
            tempfile.tempdir = temporary
        if result is None or not result.has_output_model():
            raise workflow_error(logged, said.getvalue(), names)
        copy_output(result.get_best_candidate().model_config, out, adapter_only)


def workflow_config(
    input_model: dict[str, Any], passes: dict[str, dict[str, Any]], work: Path
) -> dict[str, Any]:
    """Return the settings of an Olive workflow on this machine's CPU, with its files in `work`."""
    accelerator = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    return {
        "input_model": {"type": "HfModel", **input_model},
        "systems": {"here": {"type": "LocalSystem", "accelerators": [accelerator]}},
        "host": "here",
        "target": "here",
        "passes": passes,
        "evaluate_input_model": False,
        "no_artifacts": True,
        "cache_dir": str(work / "cache"),
        "output_dir": str(work / "output"),
        "log_severity_level": 3,
    }


def config_of_passes(own_passes: Mapping[str, str]) -> dict[str, Any]:
    """Return Olive's list of its passes with `own_passes` added, for every provider, accelerator
    and precision."""
    from olive.package_config import OlivePackageConfig

    default = Path(OlivePackageConfig.get_default_config_path())
    config: dict[str, Any] = json.loads(default.read_text())
    for name, path in own_passes.items():
        config["passes"][name] = {
            "module_path": path,
            "supported_providers": ["*"],
            "supported_accelerators": ["*"],
            "supported_precisions": ["*"],
        }
    return config


@contextmanager
def explicit_loading(remote_code: bool) -> Iterator[None]:
    """Let Olive say at each load whether a model's own code may run, and take safetensors alone. It
    leaves out a refusal, and the answer for tokenizers, so that Transformers would ask whoever sits
    at the terminal."""
    from olive.common.hf import utils

    load = utils.from_pretrained

    def load_explicitly(kind: Any, name: str, folder: str, **settings: Any) -> Any:
        settings["trust_remote_code"] = remote_code
        if "Model" in kind.__name__:
            settings["use_safetensors"] = True
        return load(kind, name, folder, **settings)

    utils.from_pretrained = load_explicitly  # type: ignore[assignment]
    try:
        yield
    finally:
        utils.from_pretrained = load


@contextmanager
def frugal_k_quant() -> Iterator[None]:
    """Let Olive's KQuant search the scales of a matrix in slices, which takes memory for a slice
    instead of six times the matrix, and those of a head that equals the embeddings once: it unties
    them, and would search both. What it finds stays the same, since rows are searched by
    themselves."""
    import torch
    from olive.passes.pytorch import kquant

    search = kquant.kquant_find_qparams
    # The first one, and what was found for it: Olive begins with the embeddings. The others are not
    # held, so that their memory is given back.
    first: list[tuple[torch.Tensor, dict[str, Any], Any]] = []

    def search_slices(weight: torch.Tensor, **settings: Any) -> Any:
        for matrix, theirs, found in first:
            if theirs == settings and torch.equal(matrix, weight):
                return found
        rows = max(1, SLICE // weight.shape[1])
        parts: Sequence[torch.Tensor] = weight.split(rows)  # type: ignore[no-untyped-call]
        slices = [search(part, **settings) for part in parts]
        found = tuple(torch.cat(each) for each in zip(*slices, strict=True))
        if not first and weight.device.type == "cpu":
            # On a GPU this is a copy, which would stay there.
            first.append((weight, settings, found))
        return found

    kquant.kquant_find_qparams = search_slices  # type: ignore[assignment]
    try:
        yield
    finally:
        kquant.kquant_find_qparams = search


@contextmanager
def listening_to_olive(
    passes: Sequence[str], progress: ShowProgress
) -> Iterator[list[BaseException]]:
    """Collect the errors that Olive logs and continues after, in place of their tracebacks, and
    show `progress` which of `passes` begins."""
    logged: list[BaseException] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            begins = PASS_BEGINS.match(record.getMessage())
            if begins and begins[1] in passes:
                done, of, name = passes.index(begins[1]), len(passes), begins[1].replace("_", " ")
                progress(done, of, f"pass {done + 1} of {of}, {name}")
            elif record.levelno >= logging.ERROR and record.exc_info and record.exc_info[1]:
                logged.append(record.exc_info[1])

    logger, engine = logging.getLogger("olive"), logging.getLogger(ENGINE)
    before, logger.handlers = logger.handlers, [Listener()]
    # The workflow's own log level, which is ERROR, holds for the other modules.
    engine.setLevel(logging.INFO)
    try:
        yield logged
    finally:
        logger.handlers = before
        engine.setLevel(logging.NOTSET)


def workflow_error(logged: Sequence[BaseException], said: str, names: str) -> Exception:
    """Return what to raise for a workflow of the passes `names` that ended without a model.

    That is the first error that Olive has logged, in one line; else the end of what it `said`."""
    if not logged:
        return ExportError(
            f"Olive ended without a model after {names}; the last output was: "
            f"{' '.join(said.split())[-300:]}"
        )
    cause = logged[0]
    if isinstance(cause, DistilleryError):
        return cause
    error = ExportError(f"Olive failed at {names} ({named_line(cause)})")
    error.__cause__ = cause
    return error


def copy_output(model: dict[str, Any], out: Path, adapter_only: bool) -> None:
    """Copy the files of an Olive model's settings to out/model and out/adapter."""
    if model.get("adapter_path"):
        copy_folder(Path(model["adapter_path"]), out / "adapter")
    if adapter_only:
        return
    if model.get("model_path"):
        copy_folder(Path(model["model_path"]), out / "model")
    attributes = model.get("model_attributes") or {}
    for name in attributes.get("additional_files") or []:
        source, target = Path(name), out / "model" / Path(name).name
        if target.parent.is_dir() and source.is_file() and not target.exists():
            shutil.copyfile(source, target)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder, or the folder of a file, into `target`."""
    folder = source.parent if source.is_file() else source
    shutil.copytree(folder, target, dirs_exist_ok=True)
