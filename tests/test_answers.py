"""Written answers: what is one, and how it is written."""

import datetime
import json
import math
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from distillery.answers import (
    FORMATS,
    NotAnAnswer,
    canonical,
    check_schema,
    grammar_of,
    unchecked_formats,
)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "on": {"type": "string", "format": "date"},
        "days": {
            "type": "array",
            "items": {"type": "object", "properties": {"from": {}, "to": {}}},
        },
    },
    "required": ["city"],
}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"city":"Oslo"}', '{"city": "Oslo"}'),
        (
            ' {"extra": 1, "days": [{"to": 2, "from": 1}], "city": "Å"}\n',
            '{"city": "Å", "days": [{"from": 1, "to": 2}], "extra": 1}',
        ),
        ('{"city": "a\\u00e9\\n"}', '{"city": "aé\\n"}'),
        ('{"city": "Oslo", "n": 230.0}', '{"city": "Oslo", "n": 230}'),
        (
            '{"city": "Oslo", "n": [-0.0, 1e3, 1e22, 0.5]}',
            '{"city": "Oslo", "n": [0, 1000, 10000000000000000000000, 0.5]}',
        ),
    ],
)
def test_equal_objects_are_equal_texts(text: str, answer: str) -> None:
    assert canonical(text, SCHEMA) == answer
    assert canonical(answer, SCHEMA) == answer


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("  ", "empty answer"),
        ("Oslo", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('["Oslo"]', "JSON, but no object"),
        ("{}", "does not meet the schema: 'city' is a required property"),
        ('{"city": 1}', "does not meet the schema: city: 1 is not of type 'string'"),
        ('{"city": "Oslo", "n": NaN}', "a number or character that JSON can't express"),
        ('{"city": "Oslo", "n": 1e999}', "a number or character that JSON can't express"),
        (
            '{"city": "Oslo", "on": "May 3"}',
            "does not meet the schema: on: 'May 3' is not a 'date'",
        ),
        ('{"city": "\\ud800"}', "a number or character that JSON can't express"),
        ('{"city": "Oslo", "city": "Bergen"}', "JSON with a field twice in one object"),
        ('{"city": "Oslo", "n": ' + "[" * 900 + "]" * 900 + "}", "JSON that is nested too deep"),
    ],
)
def test_what_is_no_answer_says_why(text: str, reason: str) -> None:
    with pytest.raises(NotAnAnswer) as error:
        canonical(text, SCHEMA)
    assert str(error.value) == reason


PAIR = {
    "type": "object",
    "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}},
    "additionalProperties": False,
}
"""A schema whose fields are not in the order of their names."""


def with_x(part: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a schema of objects with a field x, and PAIR to refer to."""
    return {"type": "object", "properties": {"x": part}, "$defs": {"pair": PAIR}, **more}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (with_x({"$ref": "#/$defs/pair"}), {"x": {"a": 1, "b": 2}}),
        (with_x({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pair"}]}), {"x": {"a": 1, "b": 2}}),
        (with_x({"type": "array", "items": {"$ref": "#/$defs/pair"}}), {"x": [{"a": 1, "b": 2}]}),
        (with_x({"type": "array", "prefixItems": [PAIR]}), {"x": [{"a": 1, "b": 2}]}),
        (
            with_x(
                {"type": "array", "items": [PAIR]},
                **{"$schema": "http://json-schema.org/draft-07/schema#"},
            ),
            {"x": [{"a": 1, "b": 2}]},
        ),
        (with_x({}, additionalProperties=PAIR), {"k": {"a": 1, "b": 2}, "x": 0}),
        (with_x({}, patternProperties={"^k": PAIR}), {"k": {"a": 1, "b": 2}, "x": 0}),
        (with_x({}, allOf=[{"properties": PAIR["properties"]}]), {"a": 1, "b": 2, "x": 0}),
        (
            {
                "type": "object",
                "allOf": [{"properties": PAIR["properties"]}],
                "properties": {"0": {}},
            },
            {"0": 0, "a": 1, "b": 2},
        ),
        (with_x({}, required=["z", "c"]), {"c": 1, "x": 2, "z": 3}),
        (with_x({"type": "integer"}), {"x": 1.0}),
        (with_x({"type": "string"}), {"x": '\x7f\x00\u2028ä"\\'}),
    ],
)
def test_a_student_that_is_held_to_the_schema_can_write_the_answer(
    schema: dict[str, Any], value: dict[str, Any]
) -> None:
    check_schema(schema)
    text = canonical(json.dumps(value), schema)
    assert json.loads(text) == value
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, grammar_of(schema))
    tokens = tokenizer.tokenize_str(text)
    assert matcher.try_consume_tokens(tokens) == len(tokens), text
    assert matcher.is_accepting()


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e999", "NaN"])
def test_a_number_that_no_float_holds_is_told(number: str) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "number", "multipleOf": 0.1}}}
    with pytest.raises(NotAnAnswer, match="a number or character"):
        canonical(f'{{"n": {number}}}', schema)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"properties": {"x": {"type": "string", "pattern": "^(a|aa)+$"}}}, '{"x": "%s!"}'),
        ({"patternProperties": {"^(a|aa)+$": {"type": "null"}}}, '{"%s!": 1}'),
    ],
)
def test_a_pattern_that_would_take_years_is_given_up(part: dict[str, Any], text: str) -> None:
    schema = {"type": "object", **part}
    check_schema(schema)
    with pytest.raises(NotAnAnswer, match="takes too long"):
        canonical(text % ("a" * 60), schema)


def test_a_format_is_looked_at() -> None:
    schema = with_x({"type": "string", "format": "date"})
    assert canonical('{"x": "2026-02-28"}', schema)
    with pytest.raises(NotAnAnswer, match="x: '2026-02-31' is not a 'date'"):
        canonical('{"x": "2026-02-31"}', schema)


BAD = {
    "date": "2026-02-31",
    "date-time": "2026-02-28 at 9",
    "time": "25:00:00Z",
    "email": "nobody",
    "ipv4": "1.2.3.400",
    "ipv6": "1::2::3",
    "uuid": "123",
}


def test_which_formats_are_looked_at_does_not_depend_on_what_is_installed() -> None:
    assert BAD.keys() == set(FORMATS)
    for name, text in BAD.items():
        with pytest.raises(NotAnAnswer, match=f"is not a '{name}'"):
            canonical(json.dumps({"x": text}), with_x({"type": "string", "format": name}))
    others = ("json-pointer", "uri", "hostname", "regex", "duration")
    for name in others:
        schema = with_x({"type": "string", "format": name})
        assert canonical('{"x": "no/ ["}', schema)
    parts = [{"type": "string", "format": name} for name in (*FORMATS, *others)]
    assert list(unchecked_formats(with_x({"prefixItems": parts}))) == list(others)


@pytest.mark.parametrize(
    "part", [{"const": datetime.date(2026, 2, 1)}, {"const": math.nan}, {"properties": {True: {}}}]
)
def test_what_yaml_reads_as_no_json_is_refused(part: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="put it into quotes"):
        check_schema(with_x(part))


def test_a_text_is_an_answer_unless_it_is_empty() -> None:
    assert canonical(" {a} \n", None) == "{a}"
    with pytest.raises(NotAnAnswer, match=r"^empty answer$"):
        canonical("\n", None)


@pytest.mark.parametrize(
    ("schema", "trouble"),
    [
        ({"type": "array"}, "write type: object"),
        ({"properties": {}}, "write type: object"),
        ({"type": "object", "properties": {"a": {"type": "text"}}}, "no JSON Schema: properties/a"),
        ({"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1/x"}}}, "leads out"),
        ({"type": "object", "properties": {"a": {"$ref": "file:///etc/passwd"}}}, "leads out"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}}, "names no part"),
        ({"type": "object", "$ref": "#"}, "leads to itself"),
        (
            {"type": "object", "properties": {"a": {"type": "string", "pattern": "a(?=b)"}}},
            "no answer can be held to it: .* look-around",
        ),
        (
            {"type": "object", "properties": {"a": {"multipleOf": 12_345}}},
            "multipleOf: those of a schema",
        ),
        (
            {"type": "object", "properties": {"a": False}, "required": ["a"]},
            "no answer can be held to it: Unsatisfiable",
        ),
    ],
)
def test_what_is_no_schema_of_objects_is_refused(schema: dict[str, Any], trouble: str) -> None:
    with pytest.raises(ValueError, match=trouble):
        check_schema(schema)


def test_a_schema_may_refer_to_its_own_parts() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/b"}, "below": {"items": {"$ref": "#"}}},
        "$defs": {"b": {"type": "string"}},
    }
    check_schema(schema)
    with pytest.raises(NotAnAnswer, match="a: 2 is not of type 'string'"):
        canonical('{"a": 2}', schema)


def test_what_can_t_be_held_while_an_answer_is_written_is_looked_at_afterwards() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    check_schema(schema)
    with pytest.raises(NotAnAnswer, match="non-unique"):
        canonical('{"a": [1, 1]}', schema)


WAY: dict[str, Any] = {"properties": {"to": {"type": "string"}, "by": {"type": "string"}}}


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        # As Pydantic writes a class in a class, a list of them, and one that may be left out.
        ({"properties": {"a": {"$ref": "#/$defs/way"}}}, '{"a": {"to": "x", "by": "y"}}'),
        (
            {"properties": {"a": {"items": {"$ref": "#/$defs/way"}}}},
            '{"a": [{"to": "x", "by": "y"}]}',
        ),
        (
            {"properties": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/way"}]}}},
            '{"a": {"to": "x", "by": "y"}}',
        ),
        ({"properties": {"a": {"prefixItems": [WAY]}}}, '{"a": [{"to": "x", "by": "y"}]}'),
        ({"properties": {"c": {}}, "allOf": [WAY]}, '{"c": 1, "to": "x", "by": "y", "a": 2}'),
        ({"allOf": [WAY], "properties": {"c": {}}}, '{"to": "x", "by": "y", "c": 1, "a": 2}'),
        ({"required": ["z"], "properties": {"b": {}}}, '{"b": 1, "z": 2, "a": 3}'),
        ({"properties": {"a": {"enum": [{"to": 1, "by": 2}]}}}, '{"a": {"to": 1, "by": 2}}'),
        ({"properties": {"a": {"const": [{"to": 1, "by": 2}]}}}, '{"a": [{"to": 1, "by": 2}]}'),
        ({"properties": {"a": {"type": "string"}}}, '{"a": "\\u0001\\u007f\\n\\"\\\\/ é日😀"}'),
    ],
)
def test_an_answer_is_written_as_its_grammar_writes_it(schema: dict[str, Any], answer: str) -> None:
    """Else a student would be kept from saying what it has learnt."""
    from llguidance import LLMatcher, LLTokenizer

    schema = {"type": "object", "$defs": {"way": WAY}, **schema}
    check_schema(schema)
    value = json.loads(answer)
    assert canonical(json.dumps(value, sort_keys=True), schema) == answer
    tokenizer = LLTokenizer("byte")
    tokens = tokenizer.tokenize_str(answer)
    matcher = LLMatcher(tokenizer, grammar_of(schema, strict=True))
    assert matcher.try_consume_tokens(tokens) == len(tokens)
    assert matcher.is_accepting()


def test_a_whole_number_has_no_point() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert canonical('{"a": 3.0, "b": [-0.0, 2.5, 1e300]}', schema) == (
        f'{{"a": 3, "b": [0, 2.5, {int(1e300)}]}}'
    )


FIXED = settings(derandomize=True, deadline=None, max_examples=120)

NUMBERS = st.one_of(
    st.integers(-(10**15), 10**15),
    # llguidance 1.9 reads a bound of 17 digits as the float beside it.
    st.floats(-1e15, 1e15).map(lambda number: round(float(f"{number:.15g}"), 20)),
    st.integers(-(10**6), 10**6).map(lambda number: number / 10**11),
    st.decimals(-1000, 1000, places=4).map(float),
)


@FIXED
@given(
    number=NUMBERS,
    other=NUMBERS,
    bounds=st.sets(st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])),
    kind=st.sampled_from(["number", "integer", None]),
    form=st.sampled_from(["{}", "[{}]", '{{"k": {}}}']),
)
def test_any_number_within_its_bounds_can_be_written(
    number: float, other: float, bounds: set[str], kind: str | None, form: str
) -> None:
    """As the text that a student learns, by the grammar that holds it."""
    below, above = min(number, other), max(number, other)
    part: dict[str, Any] = {"type": kind} if kind else {}
    for bound in bounds:
        part[bound] = above if bound.endswith("aximum") else below
    places = {
        "{}": part,
        "[{}]": {"type": "array", "items": part},
        '{{"k": {}}}': {"type": "object", "properties": {"k": part}},
    }
    schema = with_x(places[form])
    text = f'{{"x": {form.format(json.dumps(number))}}}'
    try:
        check_schema(schema)
        answer = canonical(text, schema)
    except (ValueError, NotAnAnswer):
        reject()
    assert json.loads(answer) == json.loads(text)
    assert canonical(answer, schema) == answer
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, grammar_of(schema))
    tokens = tokenizer.tokenize_str(answer)
    assert matcher.try_consume_tokens(tokens) == len(tokens), (answer, schema)
    assert matcher.is_accepting()
