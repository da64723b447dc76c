"""Presets: the recipes that are shipped, and how a user's keys are laid over one of them."""

from importlib.resources import files
from typing import Any

import yaml
from pydantic import BaseModel

PRESETS = ("demo", "lab")

VALIDATION_SHARE = 0.1
"""The share of the answered rows that validate where a classifier's recipe carves test rows."""


def preset_values(name: str) -> dict[str, Any]:
    """Return the mapping in presets/NAME.yaml."""
    text = (files("distillery.recipe") / "presets").joinpath(f"{name}.yaml").read_text()
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def classify_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return what a recipe `values` with task.kind: classify starts from: presets/classify.yaml,
    with the part for its kind of teacher."""
    shipped = preset_values("classify")
    teacher = values.get("teacher")
    kind = teacher.get("kind", "endpoint") if isinstance(teacher, dict) else "endpoint"
    parts = {name: shipped.pop(name) for name in ("own teacher", "other teacher", "validated")}
    part = parts["own teacher" if kind == "local" else "other teacher"]
    both: dict[str, Any] = {**shipped, **part}
    task = values.get("task")
    if kind == "endpoint" and not names(teacher, "answers", "form"):
        # Held to the classes by a JSON schema, if the endpoint takes one. A class's name may be
        # several words.
        both["teacher"] = {"answers": {"form": "json"}, "max_tokens": 64}
    if names(values.get("student"), "prompt", "answer"):
        # A student that answers by text has no head of its own to probe for.
        both["student"]["layers"] = {"keep": 0.5, "by": "first"}
    if names_rows(values, "gold") or (isinstance(task, dict) and task.get("other")):
        both["student"]["gold"] = True
    validated = names_rows(values, "validation")
    if not validated and lets_validation_be_carved(values):
        both["dataset"]["carve"] = {"validation": VALIDATION_SHARE}
        validated = True
    if validated:
        add_validated(both, values, parts["validated"])
    return both


def lets_validation_be_carved(values: dict[str, Any]) -> bool:
    """Return whether a recipe `values` without validation rows gets some: where it carves test
    rows, leaves a share for them and does not say `validation: null`. One that is read back whole
    names training.patience, and lacks them on purpose."""
    dataset = values.get("dataset")
    if not (isinstance(dataset, dict) and names(dataset, "carve", "test")):
        return False
    shares = dataset["carve"].values()
    taken = sum(share for share in shares if isinstance(share, int | float))
    return (
        "validation" not in dataset["carve"]
        and not names(values.get("student"), "training", "patience")
        and taken + VALIDATION_SHARE <= 1
    )


def add_validated(both: dict[str, Any], values: dict[str, Any], validated: dict[str, Any]) -> None:
    """Add to `both` what the recipe `values` starts from where it has validation rows."""
    both["student"]["training"]["patience"] = validated["student patience"]
    preparation = both.get("teacher", {}).get("preparation")
    if preparation:
        preparation["training"]["patience"] = validated["teacher patience"]
    if "export" not in values:
        both["export"] = validated["export"]


def names(values: Any, key: str, inner: str) -> bool:
    """Return whether the mapping `values` has a mapping `key` that has `inner`."""
    below = values.get(key) if isinstance(values, dict) else None
    return isinstance(below, dict) and inner in below


def names_rows(values: dict[str, Any], role: str) -> bool:
    """Return whether the dataset of a recipe `values` has rows of a role."""
    dataset = values.get("dataset")
    if not isinstance(dataset, dict):
        return False
    for key in ("splits", "carve"):
        roles = dataset.get(key)
        if isinstance(roles, dict) and roles.get(role):
            return True
    return False


def merge(base: dict[str, Any], over: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Return `base` with the keys of `over` replaced, slice by slice of `model`.

    A field that is a mapping, such as dataset.carve, is merged key by key; null removes a key. A
    choice of layers is replaced as a whole: its settings have no meaning without each other.
    """
    result = dict(base)
    for key, value in over.items():
        kind = model.model_fields[key].annotation if key in model.model_fields else None
        below = base.get(key, {})
        if key == "layers" or not isinstance(value, dict) or not isinstance(below, dict):
            result[key] = value
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            result[key] = merge(below, value, kind)
        else:
            both = {**below, **value}
            result[key] = {name: item for name, item in both.items() if item is not None}
    return result
