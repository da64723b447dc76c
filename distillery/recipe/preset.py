"""recipe/preset"""

from importlib.resources import files
from typing import Any

import yaml
from pydantic import BaseModel

PRESETS = ("demo", "lab")


def preset_values(name: str) -> dict[str, Any]:
    text = (files("distillery.recipe") / "presets").joinpath(f"{name}.yaml").read_text()
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def merged(base: dict[str, Any], over: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """`over` upon `base`, slice by slice of `model`; a slice's mapping takes single keys, of which null removes one."""
    result = dict(base)
    for key, value in over.items():
        kind = model.model_fields[key].annotation if key in model.model_fields else None
        if not isinstance(value, dict) or not isinstance(base.get(key, {}), dict):
            result[key] = value
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            result[key] = merged(base.get(key, {}), value, kind)
        else:
            both = base.get(key, {}) | value
            result[key] = {name: item for name, item in both.items() if item is not None}
    return result
