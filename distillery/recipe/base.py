"""The base class of every slice of a recipe."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


def remove_defaults(schema: dict[str, Any]) -> None:
    """Remove the defaults from a slice's schema.

    UI forms submit the defaults of the schema, and these would override the preset.
    """
    for field in schema["properties"].values():
        field.pop("default", None)


class Slice(BaseModel):
    """A frozen part of a recipe. It refuses unknown keys, infinity and NaN.

    The docstring below a field is the field's description in schema, form and reference.
    """

    added_later: ClassVar[frozenset[str]] = frozenset()
    """Fields that a later version added. At their default they are left out of cache keys, so that
    what was cached before they existed is found again."""

    outside_keys: ClassVar[frozenset[str]] = frozenset()
    """Fields that say where a stage may run and not what it makes. They are in no cache key."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        json_schema_extra=remove_defaults,
    )
