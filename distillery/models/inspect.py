"""What the files of a model say, without loading it: its parts, parameters, tensors and layers."""

import json
from math import prod
from pathlib import Path


def model_and_adapter(checkpoint: Path, base: Path) -> tuple[Path, Path | None]:
    """Return the folders of a checkpoint's model and adapter.

    The model is `base` where the checkpoint holds none; the adapter is None where there is none."""
    model, adapter = checkpoint / "model", checkpoint / "adapter"
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
