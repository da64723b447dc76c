"""Written answers: what is one, and how it is written."""

import json
from typing import Any

import pytest

from distillery.answers import NotAnAnswer, canonical, check_schema, grammar_of

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
    ],
)
def test_what_is_no_answer_says_why(text: str, reason: str) -> None:
    with pytest.raises(NotAnAnswer) as error:
        canonical(text, SCHEMA)
    assert str(error.value) == reason


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
        '{"a": 3, "b": [0, 2.5, 1e+300]}'
    )
