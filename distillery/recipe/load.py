"""Load a recipe by a preset's name or from a YAML file; say in one line what is wrong with it."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distillery.errors import RecipeError
from distillery.recipe.export import ExportBounds
from distillery.recipe.preset import PRESETS
from distillery.recipe.recipe import Recipe
from distillery.recipe.search import SearchRecipe
from distillery.recipe.student import LayerChoice
from distillery.recipe.yaml_file import LARGEST_FILE, parse_yaml

MESSAGES = {
    "extra_forbidden": "unknown key; remove it or correct its spelling",
    "tuple_type": "a list belongs here, such as [ITEM]",
    "model_type": "settings belong here, such as {KEY: VALUE}; or leave the key out",
    "union_tag_not_found": "name its kind, such as {kind: better, than: majority class}",
    "dict_type": "settings belong here, such as {KEY: VALUE}; or leave the key out",
}
"""Messages in the words of YAML, by Pydantic's error type; Pydantic's own name Python's types."""

MOST_EXPLAINED = 20
"""Wrong keys that an error explains."""

TYPES = (LayerChoice.__name__, ExportBounds.__name__)
"""Types that Pydantic names in a key's path, where the key takes one of two."""

LONGEST_KEY = 200
"""Characters of a key that it shows."""


def load_recipe(name_or_path: str) -> Recipe:
    """Return the recipe of a preset's name or of a YAML file.

    Raises RecipeError, in one line: each wrong key and what is wrong with it, joined by '; '.
    """
    if name_or_path in PRESETS:
        return parse_recipe({"preset": name_or_path}, f"preset {name_or_path}")
    if name_or_path.lower().endswith((".csv", ".jsonl", ".parquet")):
        raise RecipeError(
            f"{name_or_path}: rows, and no recipe; `distillery new {name_or_path}` writes one"
        )
    values = read_yaml(name_or_path, f"give a file or one of: {', '.join(PRESETS)}")
    if not isinstance(values, dict):
        raise RecipeError(f"{name_or_path}: a recipe is a mapping of keys, such as 'name: my-task'")
    return parse_recipe(values, name_or_path)


def load_space(path: str) -> SearchRecipe:
    """Return the search space of a YAML file. Raises RecipeError, in one line, for any other
    file."""
    values = read_yaml(path, "give a YAML file such as 'rank: [8, 16]'")
    try:
        return SearchRecipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{path}: {explain_validation_error(error)}") from error


def read_yaml(path: str, advice: str) -> Any:
    """Return what a YAML file holds. Raises RecipeError, in one line: with the line of the file
    where its text is wrong, and with `advice` if it can't be read."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise RecipeError(f"{path}: can't be read ({error.strerror}); {advice}") from error
    return parse_yaml(content, path)


def parse_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Return the recipe of a mapping. Raises RecipeError, which starts with `source`."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{source}: {explain_validation_error(error)}") from error


def explain_validation_error(error: ValidationError) -> str:
    """Return one line: the wrong keys and what is wrong with them, joined by '; '. Of many keys it
    has the first ones."""
    lines = []
    for detail in error.errors(include_input=False)[:MOST_EXPLAINED]:
        parts = []
        for part in detail["loc"]:
            # Where a key takes one of two types, Pydantic names the type that was tried, too.
            if "[" not in str(part) and part not in TYPES:
                parts.append(str(part))
        key = ".".join(parts)[:LONGEST_KEY]
        message = MESSAGES.get(detail["type"], detail["msg"].removeprefix("Value error, "))
        lines.append(f"{key}: {message}" if key else message)
    if error.error_count() > MOST_EXPLAINED:
        lines.append(f"and {error.error_count() - MOST_EXPLAINED} more")
    return " ".join("; ".join(lines).split())
