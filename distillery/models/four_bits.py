"""A model whose frozen weights are held in 4 bits, for QLoRA: Dettmers et al., QLoRA: Efficient
Finetuning of Quantized LLMs, 2023.

Of each 64 weights it keeps their largest absolute value, in 8 bits, and for each weight one of 16
levels that suit a normal distribution (NF4): 0.516 bytes a weight. bitsandbytes, of the extra
`qlora`, packs the weights, and computes with a layer's weights as floats that it makes anew for
each pass.
"""

import logging
from importlib.util import find_spec
from typing import Any

from distillery.errors import TrainingUnavailable
from distillery.hub_kernels import import_bitsandbytes
from distillery.models.device import Device
from distillery.settings import LocalSettings

_log = logging.getLogger(__name__)


def check_four_bits() -> None:
    """Raise TrainingUnavailable where bitsandbytes is not installed, or a model should be split
    (DISTILLERY_FSDP)."""
    if LocalSettings().fsdp:
        raise TrainingUnavailable(
            "DISTILLERY_FSDP: weights in 4 bits (training.method: qlora) are not split between "
            "devices; set training.method: lora, or remove DISTILLERY_FSDP"
        )
    if find_spec("bitsandbytes") is None:
        raise TrainingUnavailable(
            "training.method: qlora needs bitsandbytes where the training runs; install "
            "distillery[qlora] there, or set training.method: lora"
        )


def quantise_linear_layers(model: Any, device: Device) -> None:
    """Replace the linear layers of `model`, save its head, by layers with weights in 4 bits, on
    `device`. They are moved there one by one, so that a GPU never holds all of them as floats.

    A layer computes in `device.precision`. Raises what `check_four_bits` does."""
    import torch

    check_four_bits()
    import_bitsandbytes()
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    names = []
    for name, module in model.named_modules():
        # A subclass may compute something else.
        if type(module) is torch.nn.Linear and module is not head:
            names.append(name)
    count = size = 0
    for name in names:
        layer = model.get_submodule(name)
        # Double quantisation: the blocks' scales are packed, too.
        form: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
        packed = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=getattr(torch, device.precision),
            device="meta",
            **form,
        )
        # Without this, CPUs with AVX512_BF16 would repack the weights in validation, and training
        # would go on without gradients.
        packed.support_avx512bf16_for_cpu = False
        packed.weight = Params4bit(
            layer.weight.detach(), requires_grad=False, module=packed, **form
        )
        packed.bias = layer.bias
        packed.to(device.name)
        model.set_submodule(name, packed)
        count += unpacked_count(packed.weight)
        size += packed_bytes(packed.weight)
    # peft recognises a model in 4 bits by this.
    model.is_loaded_in_4bit = True
    _log.info(
        "%.0f M parameters of the frozen base are held in 4 bits: %.0f MB", count / 1e6, size / 1e6
    )


def unpacked_count(weight: Any) -> int:
    """Return how many parameters a tensor of weights holds, of which 4 bits pack two in a byte."""
    state = getattr(weight, "quant_state", None)
    return int((weight if state is None else state).shape.numel())


def packed_bytes(weight: Any) -> int:
    """Return the bytes of weights in 4 bits, with the scales of their blocks."""
    state = weight.quant_state
    return int(weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes)
