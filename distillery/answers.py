"""Written answers: which texts are answers, and the one way in which JSON answers are written.

Teachers' answers, gold answers and students' answers go through `canonical`, so that equal objects
are equal texts: what is trained, compared and given.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
import referencing
import referencing.exceptions

UNMET = "does not meet the schema"
"""How the reason begins for a JSON object that does not meet its schema."""


class NotAnAnswer(ValueError):
    """A text that is no answer; its message is the reason, in a few words."""


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raise ValueError, in one line, unless this is a JSON Schema of objects whose references stay
    within it, as no other file or server is asked for a part of it, and that answers can be held to
    while they are generated."""
    if schema.get("type") != "object":
        raise ValueError("the answers are objects: write type: object, and their fields below it")
    validator_of = jsonschema.validators.validator_for(schema)
    try:
        validator_of.check_schema(schema)
    except jsonschema.exceptions.SchemaError as error:
        where = "/".join(map(str, error.absolute_path))
        reason = " ".join(error.message.split())[:200]
        raise ValueError(f"no JSON Schema: {f'{where}: ' if where else ''}{reason}") from error
    for reference in references_in(schema):
        if not reference.startswith("#"):
            raise ValueError(f"$ref: {reference!r} leads out of the schema; write that part here")
    validator = validator_for(schema)
    try:
        for reference in ("#", *references_in(schema)):
            list(validator.evolve(schema={"$ref": reference}).iter_errors({}))
    except (referencing.exceptions.Unresolvable, RecursionError) as error:
        raise ValueError("a $ref names no part of the schema, or leads to itself") from error
    from llguidance import LLMatcher

    is_error, complaints = LLMatcher.validate_grammar_with_warnings(grammar_of(schema))
    if is_error:
        raise ValueError(f"no answer can be held to it: {' '.join(complaints[0].split())[:200]}")


def grammar_of(schema: Mapping[str, Any], strict: bool = False) -> str:
    """Return llguidance's grammar of the texts of `canonical` that meet a schema. With `strict`, a
    keyword that it does not know, such as uniqueItems, is an error of the grammar; else it is
    passed over.

    Raises ValueError for a schema that is nested too deep."""
    from llguidance import LLMatcher

    options: Any = {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
        "lenient": not strict,
    }
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
    except (ValueError, RecursionError) as error:
        raise ValueError("the schema is nested too deep") from error


def references_in(schema: Any) -> Iterator[str]:
    """Yield each $ref of a schema."""
    if isinstance(schema, Mapping):
        for name, value in schema.items():
            if name in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            yield from references_in(value)
    elif isinstance(schema, list | tuple):
        for value in schema:
            yield from references_in(value)


def validator_for(schema: Mapping[str, Any]) -> Any:
    """Return a validator that asks no other file or server for a part of the schema."""
    return jsonschema.validators.validator_for(schema)(schema, registry=referencing.Registry())


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
    found = jsonschema.exceptions.best_match(validator_for(schema).iter_errors(value))
    if found is not None:
        where = "/".join(map(str, found.absolute_path))
        reason = " ".join(found.message.split())[:120]
        raise NotAnAnswer(f"{UNMET}: {f'{where}: ' if where else ''}{reason}")
    try:
        text = json.dumps(ordered(value, schema), ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError as error:
        # Python reads NaN, 1e999 and half of a surrogate pair, none of which a file can hold.
        raise NotAnAnswer("a number or character that JSON can't express") from error
    return text


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
