"""The device that a model computes on, and the precision that it multiplies in."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


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


def choose_device(precision: str = "auto") -> Device:
    """Return CUDA where there is a GPU, else the CPU; with `precision` "auto", bfloat16 where the
    hardware multiplies in it."""
    import torch

    torch.set_flush_denormal(True)
    if torch.cuda.is_available():
        name, fast = "cuda", torch.cuda.is_bf16_supported()
    else:
        name = "cpu"
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision == "auto":
        precision = "bfloat16" if fast else "float32"
    return Device(name, precision)


@contextmanager
def linear_layers_cast(model: Any, device: Device, *, frozen_only: bool = False) -> Iterator[None]:
    """Give the linear layers of `model` bfloat16 weights meanwhile, where `device` multiplies in
    bfloat16: autocast would cast them for each batch. With `frozen_only`, those alone that are not
    trained, since an optimiser changes the weights in float32."""
    import torch

    held = []
    for module in model.modules():
        if device.precision != "bfloat16" or not isinstance(module, torch.nn.Linear):
            continue
        if frozen_only and module.weight.requires_grad:
            continue
        held.append((module, module.weight))
        # A parameter of its own: a tied embedding, which autocast leaves in float32, stays so.
        cast = module.weight.detach().to(torch.bfloat16)
        module.weight = torch.nn.Parameter(cast, requires_grad=False)
    try:
        yield
    finally:
        for module, weight in held:
            module.weight = weight
