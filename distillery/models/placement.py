"""models/placement"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Placement:
    """Where a model computes: `precision` is bfloat16 (autocast, float32 master weights) or float32."""

    device: str
    precision: str

    def autocast(self) -> Any:
        import torch

        return torch.autocast(
            self.device.split(":")[0], torch.bfloat16, enabled=self.precision == "bfloat16"
        )


def placement(precision: str = "auto") -> Placement:
    """CUDA where there is a device; bfloat16 where `precision` is auto and the hardware multiplies in it."""
    import torch

    torch.set_flush_denormal(True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device == "cuda" else _cpu_multiplies_bfloat16()
        precision = "bfloat16" if fast else "float32"
    return Placement(device, precision)


def _cpu_multiplies_bfloat16() -> bool:
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
