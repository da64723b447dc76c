"""Written answers: which texts are answers, and the one way in which JSON answers are written.

Teachers' answers, gold answers and students' answers go through `canonical`, so that equal objects
are equal texts: what is trained, compared and given.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from itertools import chain
from typing import Any

import jsonschema
import referencing
import referencing.exceptions
import referencing.jsonschema
import regex

from distillery.errors import one_line

LARGEST_MULTIPLE = 10_000
"""A grammar's numbers are told apart by their remainders: of 1,000,000, that takes 10 s and half a
GiB."""

UNMET = "does not meet the schema"
"""How the reason begins for a JSON object that does not meet its schema."""

LONGEST_SEARCH_S = 1.0
"""Seconds for a pattern of a schema in one text, at most: some patterns would take years."""

FORMATS = ("date", "date-time", "time", "email", "ipv4", "ipv6", "uuid")
"""The values of format that are looked at. jsonschema looks at some others where further packages
happen to be installed."""


class NotAnAnswer(ValueError):
    """A text that is no answer; its message is the reason, in a few words."""


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raise ValueError, in one line, unless this is a JSON Schema of objects whose references stay
    within it, as no other file or server is asked for a part of it, and that answers can be held to
    while they are generated."""
    if schema.get("type") != "object":
        raise ValueError("the answers are objects: write type: object, and their fields below it")
    if not is_json(schema):
        raise ValueError("it holds what JSON lacks, such as a date or on: put it into quotes")
    validator_of = jsonschema.validators.validator_for(schema)
    try:
        validator_of.check_schema(schema)
    except jsonschema.exceptions.SchemaError as error:
        where = "/".join(map(str, error.absolute_path))
        reason = one_line(error.message)
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
        raise ValueError(f"no answer can be held to it: {one_line(complaints[0])}")


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


def is_json(value: Any) -> bool:
    """Return whether a value is the same after it was written as JSON, in which names are texts,
    and dates and NaN can't be written."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, RecursionError):
        return False


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


def unchecked_formats(schema: Any) -> Iterator[str]:
    """Yield each format of a schema that nothing looks at."""
    if isinstance(schema, Mapping):
        name = schema.get("format")
        if isinstance(name, str) and name not in FORMATS:
            yield name
    inner = schema.values() if isinstance(schema, Mapping) else schema
    if isinstance(inner, Iterable) and not isinstance(inner, str):
        for value in inner:
            yield from unchecked_formats(value)


def validator_for(schema: Mapping[str, Any]) -> Any:
    """Return a validator that asks no other file or server for a part of the schema and checks
    FORMATS, as the grammar holds them too. It raises TimeoutError for a pattern that takes too
    long."""
    validator_of = jsonschema.validators.validator_for(schema)
    return with_limits(validator_of)(
        schema, registry=referencing.Registry(), format_checker=format_checker(validator_of)
    )


@cache
def format_checker(validator_of: Any) -> Any:
    """Return what looks at FORMATS, as a class of validators knows them."""
    checker = jsonschema.FormatChecker(formats=())
    known = validator_of.FORMAT_CHECKER.checkers
    checker.checkers = {name: known[name] for name in FORMATS if name in known}
    return checker


@cache
def with_limits(validator_of: Any) -> Any:
    """Return a class of validators that gives patterns up which take too long."""
    checks = {"pattern": check_pattern, "patternProperties": check_pattern_properties}
    return jsonschema.validators.extend(validator_of, checks)


def is_in(pattern: str, text: str) -> bool:
    """Return whether a pattern has a match in a text. Raises TimeoutError."""
    return regex.search(pattern, text, timeout=LONGEST_SEARCH_S) is not None


def check_pattern(validator: Any, pattern: str, value: Any, _schema: Any) -> Iterator[Exception]:
    """Yield an error if a text has no match of a pattern. Raises TimeoutError."""
    if validator.is_type(value, "string") and not is_in(pattern, value):
        yield jsonschema.exceptions.ValidationError(f"{value!r} does not match {pattern!r}")


def check_pattern_properties(
    validator: Any, patterns: Mapping[str, Any], value: Any, _schema: Any
) -> Iterator[Exception]:
    """Yield the errors of the fields whose names have a match of a pattern. Raises TimeoutError."""
    if validator.is_type(value, "object"):
        for pattern, part in patterns.items():
            for name, below in value.items():
                if is_in(pattern, name):
                    yield from validator.descend(below, part, path=name, schema_path=pattern)


def canonical(text: str, schema: Mapping[str, Any] | None) -> str:
    """Return an answer as it is trained and compared: without blanks at its ends and, with a
    schema, the JSON text of its object, whose fields are in the schema's order, those that the
    schema does not list at the end by name, with a blank after each colon and comma, whole numbers
    without a decimal point, and none with an exponent.

    Raises NotAnAnswer for an empty text, and with a schema for what is no JSON object that meets
    it."""
    text = text.strip()
    if not text:
        raise NotAnAnswer("empty answer")
    if schema is None:
        return text
    try:
        value = json.loads(text, object_pairs_hook=fields_of)
    except NotAnAnswer:
        raise
    except (ValueError, RecursionError) as error:
        raise NotAnAnswer("no JSON") from error
    if not isinstance(value, dict):
        raise NotAnAnswer("JSON, but no object")
    validator = validator_for(schema)
    try:
        # Python reads NaN, 1e999 and half of a surrogate pair, none of which a file can hold.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        found = jsonschema.exceptions.best_match(validator.iter_errors(value))
        if found is None:
            value = FieldOrder(validator, resolver_for(schema)).ordered(value, [schema])
        written = json_text(value)
    except RecursionError as error:
        raise NotAnAnswer("JSON that is nested too deep") from error
    except TimeoutError as error:
        raise NotAnAnswer("a pattern of the schema takes too long to look for") from error
    except (ValueError, OverflowError) as error:
        raise NotAnAnswer("a number or character that JSON can't express") from error
    if found is not None:
        where = "/".join(map(str, found.absolute_path))
        # Shorter, because it is kept with each such answer.
        reason = one_line(found.message, 120)
        raise NotAnAnswer(f"{UNMET}: {f'{where}: ' if where else ''}{reason}")
    return written


def json_text(value: Any) -> str:
    """Return a JSON value as the grammar of its schema writes it: with a blank after each colon and
    comma, and numbers without an exponent, which those with bounds have not."""
    if isinstance(value, dict):
        fields = (f"{json_text(name)}: {json_text(each)}" for name, each in value.items())
        return f"{{{', '.join(fields)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(json_text, value))}]"
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f")
    # The grammar takes this character for a control character, unlike json.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def fields_of(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of a JSON object. Raises NotAnAnswer for one that is there twice: which of
    its values is meant is not known."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise NotAnAnswer("JSON with a field twice in one object")
    return fields


def resolver_for(schema: Mapping[str, Any]) -> Any:
    """Return what looks up the references of a schema in itself."""
    resource = referencing.Resource.from_contents(
        schema, default_specification=referencing.jsonschema.DRAFT202012
    )
    return referencing.Registry().with_resource("", resource).resolver()


@dataclass(frozen=True)
class FieldOrder:
    """Puts the fields of objects into the order in which the grammar of their schema writes them: a
    student that is held to it can write them in no other. `validator` and `resolver` are those of
    the whole schema."""

    validator: Any
    resolver: Any

    def ordered(self, value: Any, schemas: Sequence[Any]) -> Any:
        """Return a JSON value that meets some parts of the schema, with the fields of each object
        in the order of their properties, then those that are only required, and others by name; a
        value of const or enum as it stands there."""
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if not isinstance(value, dict | list):
            return value
        said: dict[str, list[Any]] = {}
        for schema in schemas:
            for keyword, content in self.keywords(value, schema):
                said.setdefault(keyword, []).append(content)
        for known in [*said.get("const", ()), *chain.from_iterable(said.get("enum", ()))]:
            # As JSON: in Python, 1 equals true.
            if json.dumps(known, sort_keys=True) == json.dumps(value, sort_keys=True):
                return known
        if isinstance(value, list):
            return [self.ordered(item, item_schemas(said, i)) for i, item in enumerate(value)]
        named = [name for names in said.get("properties", ()) for name in names]
        named += [name for names in said.get("required", ()) for name in names]
        names = [name for name in dict.fromkeys(named) if name in value]
        names += sorted(value.keys() - set(names))
        return {name: self.ordered(value[name], field_schemas(said, name)) for name in names}

    def keywords(self, value: Any, schema: Any) -> Iterator[tuple[str, Any]]:
        """Yield the keywords that apply to a value with their content, in the order in which they
        stand in a schema and in what it refers to and is made of."""
        if not isinstance(schema, Mapping):
            return
        for keyword, content in schema.items():
            if keyword in ("$ref", "$dynamicRef"):
                yield from self.keywords(value, self.resolver.lookup(content).contents)
            elif keyword == "allOf":
                for part in content:
                    yield from self.keywords(value, part)
            elif keyword in ("anyOf", "oneOf"):
                for part in content:
                    if self.validator.evolve(schema=part).is_valid(value):
                        yield from self.keywords(value, part)
                        break
            elif keyword == "items" and isinstance(content, list):
                # Before draft 2020-12.
                yield "prefixItems", content
            else:
                yield keyword, content


def field_schemas(said: Mapping[str, Sequence[Any]], name: str) -> list[Any]:
    """Return the schemas of a field, given the contents of the keywords of its object."""
    found = [fields[name] for fields in said.get("properties", ()) if name in fields]
    for patterns in said.get("patternProperties", ()):
        found += [part for pattern, part in patterns.items() if is_in(pattern, name)]
    return found or list(said.get("additionalProperties", ()))


def item_schemas(said: Mapping[str, Sequence[Any]], position: int) -> list[Any]:
    """Return the schemas of an item, given the contents of the keywords of its list."""
    first = [parts[position] for parts in said.get("prefixItems", ()) if position < len(parts)]
    return first or list(said.get("items", ()))
