"""Written answers: which texts are answers, and the one way in which JSON answers are written.

Teachers' answers, gold answers and students' answers go through `canonical`, so that equal objects
are equal texts: what is trained, compared and given.
"""

import json
from collections.abc import Mapping
from typing import Any

import jsonschema


class NotAnAnswer(ValueError):
    """A text that is no answer; its message is the reason, in a few words."""


def canonical(text: str, schema: Mapping[str, Any] | None) -> str:
    """Return an answer as it is trained and compared: without blanks at its ends and, with a
    schema, the JSON text of its object, whose fields are in the schema's order, those that the
    schema does not list at the end by name, with a blank after each colon and comma.

    Raises NotAnAnswer for an empty text, and with a schema for what is no JSON object that meets
    it."""
    text = text.strip()
    if not text:
        raise NotAnAnswer("empty answer")
    if schema is None:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotAnAnswer("no JSON") from error
    if not isinstance(value, dict):
        raise NotAnAnswer("JSON, but no object")
    found = jsonschema.exceptions.best_match(
        jsonschema.validators.validator_for(schema)(schema).iter_errors(value)
    )
    if found is not None:
        where = "/".join(map(str, found.absolute_path))
        reason = " ".join(found.message.split())[:120]
        raise NotAnAnswer(f"does not meet the schema: {f'{where}: ' if where else ''}{reason}")
    return json.dumps(ordered(value, schema), ensure_ascii=False)


def ordered(value: Any, schema: Any) -> Any:
    """Return a JSON value with the fields of each object in the order of its schema's properties,
    and further ones by name."""
    properties = schema.get("properties", {}) if isinstance(schema, Mapping) else {}
    if isinstance(value, dict):
        names = [name for name in properties if name in value]
        names += sorted(value.keys() - properties.keys())
        return {name: ordered(value[name], properties.get(name)) for name in names}
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, Mapping) else None
        return [ordered(item, items) for item in value]
    return value
