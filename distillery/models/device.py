"""The device that a model computes on, and the precision that it multiplies in."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distillery.errors import TrainingUnavailable
from distillery.machine import machine_name
from distillery.settings import LocalSettings

_log = logging.getLogger(__name__)

ROOM_BYTES = 10**9
"""What passes take beside the weights, at least."""

MACHINES = "PET_NNODES"
"""torchrun's own variable for the number of machines; with it go PET_NODE_RANK, PET_MASTER_ADDR and
PET_MASTER_PORT."""


@dataclass(frozen=True)
class Device:
    """`name`: "cuda" or "cpu". `precision`: "float32", or "bfloat16" for autocast over float32
    weights."""

    name: str
    precision: str

    def autocast(self) -> Any:
        """Return a context in which PyTorch multiplies in bfloat16 where `precision` says so."""
        import torch

        return torch.autocast(self.name, torch.bfloat16, enabled=self.precision == "bfloat16")

    @property
    def frozen_precision(self) -> str:
        """The precision to load weights in that are not trained: on a GPU that of the products, so
        that neither its memory nor the machine's holds a float32 copy; on a CPU float32."""
        return self.precision if self.name == "cuda" else "float32"


def choose_device(precision: str = "auto") -> Device:
    """Return CUDA where there is a GPU, else the CPU; with `precision` "auto", bfloat16 where the
    hardware is the faster in it."""
    import torch

    torch.set_flush_denormal(True)
    name = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if name == "cuda" else processor_prefers_bfloat16()
        precision = "bfloat16" if fast else "float32"
    return Device(name, precision)


def fits(model: Any, device: Device) -> bool:
    """Return whether a device's memory, were all of it free, holds a model's weights and ROOM_BYTES
    beside them. Log where a GPU's does not; the processor's is not asked."""
    import torch

    if device.name != "cuda":
        return True
    weights: int = sum(weight.nbytes for weight in model.parameters())
    total: int = torch.cuda.mem_get_info()[1]
    if weights + ROOM_BYTES <= total:
        return True
    _log.warning(
        "the model takes %.1f GB and the GPU has %.1f: the processor computes, which is slow",
        (weights + ROOM_BYTES) / 1e9,
        total / 1e9,
    )
    return False


def processor_prefers_bfloat16() -> bool:
    """Return whether the processor multiplies faster in bfloat16 than in float32.

    It is told by the processor's kind, not by the clock: a training that goes on in another process
    must come to the same. Intel's AVX512_BF16 without AMX takes twice float32's time (a layer of
    SmolLM2-135M on two cores of a Xeon: 165 against 320 GFLOPS)."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and "Intel" not in machine_name()


def check_gpu(allow_cpu: bool) -> None:
    """Raise TrainingUnavailable where this machine is said to need a GPU (DISTILLERY_NEEDS_GPU) and
    PyTorch has no CUDA here, unless `allow_cpu`, or where it has fewer GPUs than
    DISTILLERY_DEVICES."""
    import torch

    check_count()
    if allow_cpu or torch.cuda.is_available() or not LocalSettings().needs_gpu:
        return
    reason = "its PyTorch is built without CUDA: install one that has it"
    if torch.version.cuda:
        reason = "PyTorch finds no GPU: see what nvidia-smi says"
    raise TrainingUnavailable(
        f"this worker should train on a GPU (DISTILLERY_NEEDS_GPU), and {reason}; or set "
        "training.allow_cpu: true in the recipe"
    )


def check_count() -> None:
    """Raise TrainingUnavailable where this machine has GPUs, but fewer than DISTILLERY_DEVICES, and
    where a model should be split (DISTILLERY_FSDP) and there is one device alone."""
    import torch

    settings = LocalSettings()
    devices = settings.devices
    if settings.fsdp and not are_several():
        raise TrainingUnavailable(
            "DISTILLERY_FSDP: a model is split between several devices, and DISTILLERY_DEVICES is "
            "1; set it to how many GPUs a training should have, or remove DISTILLERY_FSDP"
        )
    if devices == 1 or not torch.cuda.is_available():
        return
    found = torch.cuda.device_count()
    if found < devices:
        raise TrainingUnavailable(
            f"DISTILLERY_DEVICES: {devices}, and PyTorch finds {found} GPUs here; lower it, or "
            "give the run as many"
        )


def are_several() -> bool:
    """Return whether this machine's settings ask for a training on more than one device."""
    return LocalSettings().devices > 1 or has_several_machines()


def has_several_machines() -> bool:
    """Return whether a training waits for the processes of other machines."""
    return os.environ.get(MACHINES, "1") != "1"


def release_gpu() -> None:
    """Give back the GPU's memory of models that are no longer used, which PyTorch keeps for itself:
    the next stage may be in another process. Does nothing where this process uses no GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        # Models and their hooks refer to each other.
        gc.collect()
        torch.cuda.empty_cache()


def cast_linear_layers(model: Any, *, frozen_only: bool = False) -> list[tuple[Any, Any]]:
    """Give the linear layers of `model` bfloat16 weights, which autocast would make for each batch
    anew. Return the layers with the weights that they had. With `frozen_only`, layers that are
    trained keep theirs, since an optimiser changes the weights in float32."""
    import torch

    changed = []
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        weight = module.weight
        # Weights in 4 bits stay as they are, and those that are split are cast when gathered.
        stays = type(weight) is not torch.nn.Parameter
        if stays or (frozen_only and weight.requires_grad):
            continue
        changed.append((module, weight))
        # A parameter of its own: a tied embedding, which autocast leaves in float32, stays so.
        cast = weight.detach().to(torch.bfloat16)
        module.weight = torch.nn.Parameter(cast, requires_grad=False)
    return changed


@contextmanager
def linear_layers_cast(model: Any, device: Device, *, frozen_only: bool = False) -> Iterator[None]:
    """Cast the linear layers within, as `cast_linear_layers` does, where `device` multiplies in
    bfloat16."""
    changed = []
    if device.precision == "bfloat16":
        changed = cast_linear_layers(model, frozen_only=frozen_only)
    try:
        yield
    finally:
        for module, weight in changed:
            module.weight = weight
