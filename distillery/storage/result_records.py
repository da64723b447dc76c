"""Which of Prefect's result records are read: those that hold plain data of this project's classes.

Prefect decodes a record as the record itself says: by pickle, by any module, or by JSON in which a
mapping may name any importable object, which is then called. Whoever may write to the store could
so run code in every process that reads it. Here a record is parsed as plain JSON first. It is
handed on only if it names Prefect's plain JSON serializer and no class but those of `CLASSES` and
`ERRORS`, and it is handed on written anew, so that what was checked is what is decoded.
"""

import json
import logging
from functools import cache
from typing import Any

from distillery import errors, records

_log = logging.getLogger(__name__)

SERIALIZER = {
    "type": "json",
    "jsonlib": "json",
    "object_encoder": "prefect.serializers.prefect_json_object_encoder",
    "object_decoder": "prefect.serializers.prefect_json_object_decoder",
    "dumps_kwargs": {},
    "loads_kwargs": {},
}
"""Prefect's plain JSON serializer; a record may leave out all but its type."""

METADATA = ("storage_key", "expiration", "prefect_version", "storage_block_id")
"""What else a record says of itself: texts, or null."""


def classes_of(module: Any, base: type[Any]) -> frozenset[str]:
    """Return the dotted names of the classes of `module` that derive from `base`."""
    found = set()
    for item in vars(module).values():
        own = isinstance(item, type) and item.__module__ == module.__name__
        if own and issubclass(item, base):
            found.add(f"{module.__name__}.{item.__qualname__}")
    return frozenset(found)


CLASSES = classes_of(records, records.Record) | {"distillery.registry.reproduction.Reproduction"}
"""The classes that a result may be of: what stages and flows return."""

ERRORS = classes_of(errors, errors.DistilleryError)
"""The errors that a result may be."""


class ForeignRecord(ValueError):
    """A record that is not decoded."""


def plain_record(content: bytes) -> bytes:
    """Return a record with the same result that Prefect decodes without running any code but that
    of CLASSES and ERRORS. Raises ForeignRecord, with the reason, where there is none."""
    try:
        record = json.loads(content)
        metadata, result = record["metadata"], record["result"]
        check_serializer(metadata["serializer"])
        if not isinstance(result, str):
            raise ForeignRecord("its result is no text")
        value = json.loads(result, object_hook=check_mapping)
        kept = {name: metadata.get(name) for name in METADATA if metadata.get(name) is not None}
        if not all(isinstance(text, str) for text in kept.values()):
            raise ForeignRecord("its metadata are no texts")
        kept["serializer"] = {"type": SERIALIZER["type"]}
        return json.dumps({"metadata": kept, "result": json.dumps(value)}).encode()
    except ForeignRecord:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ForeignRecord(f"it is no record in JSON: {type(error).__name__}") from None


def check_serializer(serializer: Any) -> None:
    """Raise ForeignRecord unless a record's serializer is Prefect's plain JSON serializer."""
    kind = serializer.get("type")
    if kind != SERIALIZER["type"]:
        raise ForeignRecord(f"its serializer is {kind!r:.60}")
    for name, value in serializer.items():
        if name not in SERIALIZER or value != SERIALIZER[name]:
            raise ForeignRecord(f"its serializer has {name!r:.60} of its own")


def check_mapping(mapping: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping of a result. Raises ForeignRecord if Prefect would make something of it that
    is none of CLASSES and ERRORS."""
    for key, names, content in (
        ("__class__", CLASSES, "data"),
        ("__exc_type__", ERRORS, "message"),
    ):
        if key in mapping:
            if mapping[key] not in names:
                raise ForeignRecord(f"it names {mapping[key]!r:.60}, no class of this version")
            if mapping.keys() != {key, content}:
                raise ForeignRecord(f"it has more or less than {key} and {content}")
    return mapping


@cache
def warn_of(name: str, reason: str) -> None:
    """Log once a process that the record `name` is passed over."""
    _log.warning(
        "%s: this record is not read (%s), and its work is done again; if no other version of "
        "Distillery wrote it, see who may write to DISTILLERY_STORE",
        name,
        reason,
    )
