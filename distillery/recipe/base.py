"""recipe/base"""

from typing import Any

from pydantic import BaseModel, ConfigDict


def _without_defaults(schema: dict[str, Any]) -> None:
    """A form made from the schema sends every default that it is told, and what is given wins over the preset."""
    for field in schema["properties"].values():
        field.pop("default", None)


class Slice(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        json_schema_extra=_without_defaults,
    )
