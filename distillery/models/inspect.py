"""models/inspect"""

import json
from pathlib import Path


def parts(checkpoint: Path, base: Path) -> tuple[Path, Path | None]:
    """(model folder, adapter folder or None) of a checkpoint's folder; `base` is the model where it holds none."""
    model, adapter = checkpoint / "model", checkpoint / "adapter"
    return (model if model.is_dir() else base), (adapter if adapter.is_dir() else None)


def parameter_count(folder: Path) -> int:
    """The parameters in a folder's safetensors; tied weights are stored, and counted, once."""
    from math import prod

    from safetensors import safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            count += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count


def tensor_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names += tensors.keys()
    return names


def layer_count(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    return int(config["num_hidden_layers"])
