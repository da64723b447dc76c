"""Written answers: which texts are answers, and the one way in which JSON answers are written.

Teachers' answers, gold answers and students' answers go through `canonical`, so that equal objects
are equal texts: what is trained, compared and given.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import jsonschema
import referencing
import referencing.exceptions
import referencing.jsonschema

EXACT = 2.0**53
"""From here on, a number with a point may be no whole number that was meant."""

LARGEST_MULTIPLE = 10_000
"""A grammar's numbers are told apart by their remainders: of 1,000,000, that takes 10 s and half a
GiB."""

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


def grammar_of(schema: Mapping[str, Any], strict: bool = False, begin: str = "") -> str:
    """Return llguidance's grammar of the texts of `canonical` that meet a schema, `begin` before
    each. With `strict`, a keyword that it does not know, such as uniqueItems, is an error of the
    grammar; else it is passed over.

    Raises ValueError for a schema that is nested too deep or has too large a multipleOf."""
    from llguidance import LLMatcher

    try:
        multiple = math.prod(set(multiples_in(schema)))
    except RecursionError as error:
        raise ValueError("the schema is nested too deep") from error
    if multiple > LARGEST_MULTIPLE:
        raise ValueError(
            f"multipleOf: those of a schema may have a product of {LARGEST_MULTIPLE:,}, without "
            "their decimal points"
        )
    options: Any = {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
        "lenient": not strict,
    }
    try:
        text = json.dumps({**schema, "x-guidance": options})
        if begin:
            return f"start: {json.dumps(begin)} answer\nanswer: %json {text}"
        return LLMatcher.grammar_from_json_schema(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("the schema is nested too deep") from error


def multiples_in(schema: Any) -> Iterator[int]:
    """Yield each multipleOf of a schema, without its decimal point: 25 of 0.25."""
    if isinstance(schema, Mapping):
        found = schema.get("multipleOf")
        if isinstance(found, int | float) and found and math.isfinite(found):
            number = Decimal(repr(abs(found))).normalize()
            yield int(max(number, number.scaleb(-int(number.as_tuple().exponent))))
    inner = schema.values() if isinstance(schema, Mapping) else schema
    if isinstance(inner, Iterable) and not isinstance(inner, str):
        for value in inner:
            yield from multiples_in(value)


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
    """Return a validator that asks no other file or server for a part of the schema. It looks at
    formats such as date, since the grammar of the schema has them."""
    kind = jsonschema.validators.validator_for(schema)
    return kind(schema, registry=referencing.Registry(), format_checker=kind.FORMAT_CHECKER)


def canonical(text: str, schema: Mapping[str, Any] | None) -> str:
    """Return an answer as it is trained and compared: without blanks at its ends and, with a
    schema, the JSON text of its object, whose fields are in the schema's order, those that the
    schema does not list at the end by name, with a blank after each colon and comma. It is one of
    the texts of `grammar_of`, so that a student may write what it has learnt.

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
        value = Ordering(schema).ordered(value, schema)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError as error:
        # Python reads NaN, 1e999 and half of a surrogate pair, none of which a file can hold.
        raise NotAnAnswer("a number or character that JSON can't express") from error
    # A grammar's texts have this character as an escape only.
    return text.replace("\x7f", "\\u007f")


class Ordering:
    """Orders the fields of JSON values as the grammar of a schema does."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.schema, self._validator = schema, validator_for(schema)
        resource = referencing.Resource.from_contents(
            schema, default_specification=referencing.jsonschema.DRAFT202012
        )
        self._resolver = referencing.Registry().resolver_with_root(resource)

    def ordered(self, value: Any, schema: Any) -> Any:
        """Return a value that meets `schema`, which is a part of the whole one, with the fields of
        each object in its order: as it and the parts that it refers to list them, then others that
        it requires, then further ones by name. Whole numbers have no point."""
        if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
            return int(value)
        if not isinstance(value, dict | list):
            return value
        keywords = list(self.keywords(schema, value))
        for keyword, content in keywords:
            for known in content if keyword == "enum" else [content] * (keyword == "const"):
                if json.dumps(known, sort_keys=True) == json.dumps(value, sort_keys=True):
                    return known
        if isinstance(value, list):
            first: list[Any] = next((own for name, own in keywords if name == "prefixItems"), [])
            other = next((own for name, own in keywords if name == "items"), None)
            items = zip(value, [*first, *[other] * len(value)], strict=False)
            return [self.ordered(item, own) for item, own in items]
        fields: dict[str, Any] = {}
        for keyword, content in keywords:
            if keyword == "properties":
                fields |= {name: content[name] for name in content if name not in fields}
        for keyword, content in keywords:
            if keyword == "required":
                fields |= {name: None for name in content if name not in fields}
        names = [name for name in fields if name in value]
        names += sorted(value.keys() - fields.keys())
        return {name: self.ordered(value[name], fields.get(name)) for name in names}

    def keywords(self, schema: Any, value: Any) -> Iterator[tuple[str, Any]]:
        """Yield the keywords of a schema in its order, with those of what it refers to, of all of
        its allOf, and of anyOf and oneOf those of the first part that the value meets."""
        for keyword, content in schema.items() if isinstance(schema, Mapping) else ():
            if keyword == "$ref":
                yield from self.keywords(self._resolver.lookup(content).contents, value)
            elif keyword == "allOf":
                for part in content:
                    yield from self.keywords(part, value)
            elif keyword in ("anyOf", "oneOf"):
                met = (
                    part for part in content if self._validator.evolve(schema=part).is_valid(value)
                )
                yield from self.keywords(next(met, None), value)
            else:
                yield keyword, content
