"""What the files of a model say, without loading it: its parts, parameters, tensors and layers."""

import hashlib
import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from distillery.models.own_code import refuse_added_code

BLOCK, MOST_BLOCKS = 4096, 1024
"""Bytes of a block of weights that `weights_digest` reads, and how many blocks of a model."""


def model_and_adapter(checkpoint: Path, base: Path) -> tuple[Path, Path | None]:
    """Return the folders of a checkpoint's model and adapter.

    The model is `base` where the checkpoint holds none; the adapter is None where there is none.
    Raises TrainingError for a model with Python code that `base` does not hold."""
    model, adapter = checkpoint / "model", checkpoint / "adapter"
    if model.is_dir():
        refuse_added_code(model, base)
    return (model if model.is_dir() else base), (adapter if adapter.is_dir() else None)


def parameter_count(folder: Path) -> int:
    """Return how many parameters a folder's safetensors hold; tied weights are stored once."""
    from safetensors import safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                count += prod(tensors.get_slice(name).get_shape())
    return count


def weights_digest(folders: Iterable[Path]) -> bytes:
    """Return a digest, of 32 bytes, by which two machines see whether they hold the same weights:
    of the safetensors in `folders`, with names and sizes, in blocks spread evenly over them, of
    less than 4 MiB whole. It reads some 4 MiB of the largest model."""
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    sizes = [file.stat().st_size for file in files]
    step = max(BLOCK, sum(sizes) // MOST_BLOCKS)
    digest = hashlib.sha256()
    for file, size in zip(files, sizes, strict=True):
        digest.update(f"{file.name}/{size}/".encode())
        with file.open("rb") as weights:
            for position in range(0, size, step):
                weights.seek(position)
                digest.update(weights.read(BLOCK))
    return digest.digest()


def parameters_of_config(folder: Path) -> int | None:
    """Return how many parameters a model with a folder's config.json has, without its weights; tied
    weights count once. None where Transformers has no such model.

    The model is built on PyTorch's meta device, whose tensors have shapes and no values."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError):
        return None
    return int(model.num_parameters())


def tensor_names(folder: Path) -> list[str]:
    """Return the names of all tensors in a folder's safetensors."""
    from safetensors import safe_open

    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names += tensors.keys()
    return names


def layer_count(folder: Path) -> int:
    """Return how many decoder layers config.json gives the model."""
    config = json.loads((folder / "config.json").read_text())
    return int(config["num_hidden_layers"])
