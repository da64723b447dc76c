"""The base class of every slice of a recipe."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict


def remove_defaults(schema: dict[str, Any]) -> None:
    """Remove the defaults from a slice's schema.

    UI forms submit the defaults of the schema, and these would override the preset.
    """
    for field in schema["properties"].values():
        field.pop("default", None)


def leave_out(names: Iterable[str]) -> Callable[[dict[str, Any]], None]:
    """Return what removes the fields `names`, which mean nothing in a slice, from its schema, and
    the defaults of the others."""

    def remove(schema: dict[str, Any]) -> None:
        for name in names:
            del schema["properties"][name]
        remove_defaults(schema)

    return remove


def check_revision(revision: str) -> str:
    """Return `revision`. Raises ValueError for one that leads out of the hub's cache, in which it
    names a file."""
    parts = revision.split("/")
    if ".." in parts or "" in parts or "\\" in revision or not revision.isprintable():
        raise ValueError("give a commit, tag or branch, such as main")
    return revision


Revision = Annotated[str, AfterValidator(check_revision)]
"""A commit, tag or branch on the Hugging Face hub."""


class Slice(BaseModel):
    """A frozen part of a recipe. It refuses unknown keys, infinity and NaN.

    The docstring below a field is the field's description in schema, form and reference.
    """

    added_later: ClassVar[frozenset[str]] = frozenset()
    """Fields that a later version added. At their default they are left out of cache keys, so that
    what was cached before they existed is found again."""

    outside_keys: ClassVar[frozenset[str]] = frozenset()
    """Fields that say where a stage may run and not what it makes. They are in no cache key."""

    in_order: ClassVar[frozenset[str]] = frozenset()
    """Mappings in which the order of the keys counts. A cache key passes over the order of
    others."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        json_schema_extra=remove_defaults,
    )
