"""recipe/load"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from distillery.errors import RecipeError
from distillery.recipe.preset import PRESETS
from distillery.recipe.recipe import Recipe
from distillery.recipe.student import LayerChoice


def load_recipe(name_or_path: str) -> Recipe:
    """A preset by name, or a YAML file. Raises RecipeError with one line per wrong key, joined by '; '."""
    if name_or_path in PRESETS:
        return parse_recipe({"preset": name_or_path}, f"preset {name_or_path}")
    path = Path(name_or_path)
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(
            f"{path}: can't be read ({error.strerror}); give a file or one of: {', '.join(PRESETS)}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, such as 'name: my-task'")
    return parse_recipe(values, str(path))


def parse_recipe(values: dict[str, Any], place: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{place}: {explained(error)}") from error


_MENDS = {
    "extra_forbidden": "unknown key; remove it or correct its spelling",
    "tuple_type": "a list belongs here, such as [ITEM]",
    "model_type": "settings belong here, such as {KEY: VALUE}; or leave the key out",
    "dict_type": "settings belong here, such as {KEY: VALUE}; or leave the key out",
}
"""In YAML's words what Pydantic says in Python's."""


def explained(error: ValidationError) -> str:
    """One line: each wrong key and what is wrong with it."""
    return "; ".join(_explain(detail) for detail in error.errors())


def _explain(detail: Any) -> str:
    # Of a key that takes this or that, Pydantic names the branch too.
    key = ".".join(
        str(part) for part in detail["loc"] if "[" not in str(part) and part != LayerChoice.__name__
    )
    message = _MENDS.get(detail["type"]) or detail["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
