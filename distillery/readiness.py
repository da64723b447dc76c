"""What a run needs of machine and account, checked before it spends anything. `distillery check` prints all of it."""

import asyncio
import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from distillery.data.prepare import source_identity
from distillery.errors import (
    CredentialsError,
    DataError,
    DistilleryError,
    RecipeError,
    StoreError,
    TeacherError,
)
from distillery.export.build import misfit
from distillery.models.base import check_loadable, local_copy
from distillery.recipe import BaseModelRecipe, Recipe
from distillery.records import Record
from distillery.registry.open import open_registry
from distillery.settings import AzureMLSettings, LocalSettings
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from distillery.teacher.asking import probe
from distillery.teacher.endpoint import resolve_endpoint
from distillery.teacher.identity import teacher_identity

LIMIT_S = 60.0

_WAIT_S = 5.0
"""For a store or a database that is away: whoever checks wants to know it now."""

PROBE_S = 25.0
"""For each of the probe's two tries, so that both fit into the limit."""

GB = 1e9

LEAST_DISK = 5 * GB

DISK_FACTOR = 6
"""A run writes the base model, the teacher's and the student's weights and their exports, some of them twice."""

MEMORY_FACTOR = {"full": 4, "lora": 2, "dora": 2}
"""In multiples of the float32 weights. full: weights, gradients and AdamW's two moments; lora and dora: two copies of
the weights, while one is cast or exported."""

GGUF_FACTOR = 6
"""float32 bytes for each byte of a GGUF file of 4 to 5 bits a weight."""

LARGE = 4 * GB
"""Bytes of float32 weights (a billion parameters) above which a CPU trains for days."""


class Finding(Record):
    """What a check found. `item` is what was looked at; `text` says what to do where the level is FAIL."""

    level: Literal["ok", "warn", "FAIL"]
    item: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:4} {self.item}: {self.text}"


Check = Callable[[Recipe], list[Finding]]


def check_settings(recipe: Recipe) -> None:
    """Raises at once what would otherwise stop a run after its paid or slow stages. Asks no service."""
    if recipe.teacher.kind == "endpoint":
        resolve_endpoint(recipe.teacher)
    if recipe.registry.kind == "azureml":
        AzureMLSettings().require()
    for base in _bases(recipe):
        if complaint := _misfit(base, recipe):
            raise RecipeError(complaint)


def check(recipe: Recipe, limit_s: float = LIMIT_S) -> list[Finding]:
    """Looks at all that a run of `recipe` on this machine needs, each for `limit_s` seconds at most. Raises nothing,
    downloads nothing, and spends one question to the teacher's endpoint."""
    checks: dict[str, Check] = {
        "teacher": _teacher,
        "data": _data,
        **{f"base model {base.model}": partial(_base_model, base) for base in _bases(recipe)},
        "disk": _disk,
        "memory": _memory,
        "training": _training,
        "artifact store": _artifact_store,
        "label store": _label_store,
        "registry": _registry,
    }
    return [
        finding for item, look in checks.items() for finding in _within(limit_s, item, look, recipe)
    ]


def _within(limit_s: float, item: str, look: Check, recipe: Recipe) -> list[Finding]:
    found: list[Finding] = []

    def run() -> None:
        try:
            found.extend(look(recipe))
        except DistilleryError as error:
            found.append(Finding(level="FAIL", item=item, text=str(error)))
        except Exception as error:
            # Its text is left out: what a library says may hold a secret.
            found.append(
                Finding(
                    level="FAIL", item=item, text=f"could not be checked ({type(error).__name__})"
                )
            )

    # A thread that hangs is left behind; as a daemon it keeps no process alive.
    thread = threading.Thread(target=run, daemon=True, name=f"check {item}")
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        return [
            Finding(
                level="FAIL",
                item=item,
                text=f"no answer within {limit_s:g} s; see that it is up and reachable",
            )
        ]
    return found


def _ok(item: str, text: str) -> list[Finding]:
    return [Finding(level="ok", item=item, text=text)]


def _warn(item: str, text: str) -> list[Finding]:
    return [Finding(level="warn", item=item, text=text)]


def _teacher(recipe: Recipe) -> list[Finding]:
    teacher = recipe.teacher
    if teacher.kind == "local":
        return _ok(
            "teacher",
            f"the run prepares it from {teacher.preparation.base.model} and serves it itself",
        )
    if teacher.kind in ("gold", "file"):
        return _ok("teacher", f"none is asked: {teacher_identity(recipe.teacher, None)}")
    try:
        endpoint = resolve_endpoint(teacher)
    except CredentialsError as error:
        missing = Finding(level="FAIL", item="teacher credentials", text=str(error))
        return [missing, *_warn("teacher endpoint", "not asked, for want of credentials")]
    findings = _ok("teacher credentials", f"set for {endpoint.url}, through {endpoint.sdk}")
    try:
        return findings + _endpoint(recipe)
    except DistilleryError as error:
        return [*findings, Finding(level="FAIL", item="teacher endpoint", text=str(error))]


def _endpoint(recipe: Recipe) -> list[Finding]:
    asked = recipe.teacher.model_copy(update={"timeout_s": min(recipe.teacher.timeout_s, PROBE_S)})
    endpoint = resolve_endpoint(asked)
    result = asyncio.run(probe(asked, endpoint))
    if not result.answers:
        raise TeacherError(f"{endpoint.model} answers without text; raise teacher.max_tokens")
    findings = _ok("teacher endpoint", f"{endpoint.model} answers in {result.latency_ms:.0f} ms")
    if not recipe.teacher.asks_log_probabilities:
        return findings
    if result.log_probabilities:
        return findings + _ok("log-probabilities", "given, as teacher.soft_labels needs them")
    text = f"{endpoint.url} gives none; set teacher.soft_labels: false, or take a teacher that gives them"
    return [*findings, Finding(level="FAIL", item="log-probabilities", text=text)]


def _data(recipe: Recipe) -> list[Finding]:
    dataset = recipe.dataset
    if dataset.source != "hub":
        source_identity(dataset)
        return _ok(
            "data",
            "the shipped sample"
            if dataset.source == "sample"
            else "every file of dataset.files is there",
        )
    try:
        # Without a revision the hub is really asked.
        newest = source_identity(dataset.model_copy(update={"revision": None}))
    except DataError as error:
        if not dataset.revision:
            raise
        return _warn(
            "data", f"{error}; a copy of revision {dataset.revision} on this machine would do"
        )
    return _ok("data", f"the hub has {newest}")


def _bases(recipe: Recipe) -> tuple[BaseModelRecipe, ...]:
    """The base models that the run loads, each once."""
    teacher = [recipe.teacher.preparation.base] if recipe.teacher.kind == "local" else []
    student = [recipe.student.base] if recipe.student.start == "base" else []
    return tuple(dict.fromkeys(teacher + student))


def _misfit(base: BaseModelRecipe, recipe: Recipe) -> str | None:
    """Why `base`, where it is on this machine, can't be built in a form that the recipe has for what is made of it. A
    ladder goes without the rungs that don't fit, as long as one does."""
    try:
        place = local_copy(base)
        config = json.loads((place / "config.json").read_text(encoding="utf-8")) if place else {}
    except (DistilleryError, OSError, ValueError):
        # Not here, or not right: the matter of the stage that loads it.
        return None
    found, preparation = [], recipe.teacher.preparation
    if recipe.teacher.kind == "local" and base == preparation.base:
        found.append(misfit(preparation.export, config, "teacher.preparation.export"))
    if base == recipe.student_base:
        rungs = [misfit(form, config) for form in recipe.export.ladder or (recipe.export.form,)]
        found.append(rungs[0] if all(rungs) else None)
    return next(filter(None, found), None)


def _base_model(base: BaseModelRecipe, recipe: Recipe) -> list[Finding]:
    item = f"base model {base.model}"
    place = local_copy(base)
    if place is None and base.model.startswith("azureml://"):
        return _warn(
            item, "not on this machine; the run downloads it with the Azure login (`az login`)"
        )
    if place is None:
        return _warn(
            item,
            f"not on this machine; the run downloads {_hub_bytes(base) / GB:.1f} GB from the hub",
        )
    if place.is_file():
        return _ok(item, f"{place.name}, converted at its first use")
    check_loadable(place, base)
    if complaint := _misfit(base, recipe):
        return [Finding(level="FAIL", item=item, text=complaint)]
    return _ok(item, f"{_float32_bytes(place) / 4e6:.1f} M parameters in {place}")


def _hub_bytes(base: BaseModelRecipe) -> int:
    """Bytes of safetensors that the hub holds for `base`. Raises RecipeError where it doesn't answer or has none."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(
            base.model, revision=base.revision, files_metadata=True, timeout=10
        )
    except Exception as error:
        raise RecipeError(
            f"not on this machine, and the hub doesn't answer for it ({type(error).__name__}); correct the "
            "model's name, set HF_TOKEN where it needs a login, or give a local folder"
        ) from error
    return sum(
        file.size or 0 for file in info.siblings or () if file.rfilename.endswith(".safetensors")
    )


def _float32_bytes(place: Path) -> int:
    from distillery.models.inspect import parameter_count

    return place.stat().st_size * GGUF_FACTOR if place.is_file() else parameter_count(place) * 4


def _weights(recipe: Recipe) -> int | None:
    """Bytes of the largest base model in float32; None where one of them isn't on this machine, or can't be."""
    sizes = []
    for base in _bases(recipe):
        try:
            place = local_copy(base)
        except DistilleryError:
            # Said by the base model's own line.
            return None
        if place is None:
            return None
        sizes.append(_float32_bytes(place))
    return max(sizes)


def _disk(recipe: Recipe) -> list[Finding]:
    import shutil

    home = LocalSettings().folder
    with working_folder("check") as folder:
        (folder / "written").write_bytes(b"1")
        free = shutil.disk_usage(folder).free
    weights = _weights(recipe)
    need = max(LEAST_DISK, DISK_FACTOR * (weights or 0))
    if free < need:
        raise StoreError(
            f"{free / GB:.1f} GB free at {home}, and a run takes about {need / GB:.0f} GB; free some space, or set "
            "DISTILLERY_HOME elsewhere"
        )
    if weights is None:
        return _warn(
            "disk",
            f"{free / GB:.1f} GB free; a run takes about {DISK_FACTOR} times the base model's size",
        )
    return _ok("disk", f"{free / GB:.1f} GB free, and a run takes about {need / GB:.0f} GB")


def _memory(recipe: Recipe) -> list[Finding]:
    import psutil

    free = psutil.virtual_memory().available
    weights = _weights(recipe)
    if weights is None:
        return _warn(
            "memory",
            f"{free / GB:.1f} GB free; what a run takes is known once the base model is here",
        )
    need = _training_bytes(recipe, weights)
    if free < need:
        raise StoreError(
            f"{free / GB:.1f} GB free, and a run takes about {need / GB:.1f} GB; end other programs, or choose a "
            "smaller base model or training.method: lora"
        )
    return _ok("memory", f"{free / GB:.1f} GB free, and a run takes about {need / GB:.1f} GB")


def _training_bytes(recipe: Recipe, weights: int) -> float:
    trainings = [recipe.student.training, *(step.training for step in recipe.student.healing)]
    trainings += [recipe.teacher.preparation.training] if recipe.teacher.kind == "local" else []
    return GB + max(MEMORY_FACTOR[training.method] for training in trainings) * weights


def _training(recipe: Recipe) -> list[Finding]:
    import torch

    from distillery.models.placement import placement

    place = placement(recipe.student.training.precision)
    weights = _weights(recipe)
    if place.device == "cuda":
        free, name = torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
        said = f"on {name} in {place.precision}, {free / GB:.1f} GB of its memory free"
        short = weights is not None and free < _training_bytes(recipe, weights)
        return (
            _warn("training", f"{said}, which may be too little")
            if short
            else _ok("training", said)
        )
    if weights is None or weights > LARGE:
        return _warn(
            "training",
            f"no GPU: on the CPU in {place.precision}, which takes days where the base model has billions of "
            "parameters; use a machine with CUDA, or send training there by training_deployment",
        )
    return _ok("training", f"on the CPU in {place.precision}")


def _artifact_store(_recipe: Recipe) -> list[Finding]:
    ArtifactStore(wait_s=_WAIT_S).write_record("check", "")
    return _ok("artifact store", "answers")


def _label_store(_recipe: Recipe) -> list[Finding]:
    from distillery.labels.store import LabelStore

    with LabelStore(wait_s=_WAIT_S) as answers:
        answers.get_many([])
    return _ok("label store", "answers")


def _registry(recipe: Recipe) -> list[Finding]:
    registry = open_registry(recipe.registry)
    count = len(registry.list(recipe.registry.model_name))
    return _ok(
        "registry", f"{registry.place} answers; versions of {recipe.registry.model_name}: {count}"
    )
