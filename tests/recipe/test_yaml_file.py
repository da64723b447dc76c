"""YAML files that make PyYAML raise something else than its own errors, or take what nobody means:
one line, with the line of the file."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from distillery.errors import RecipeError
from distillery.recipe import PRESETS, Recipe, load_recipe, load_space, parse_recipe

pytestmark = pytest.mark.security

BUDGET = settings(max_examples=200, deadline=None, database=None, derandomize=True)
"""Inputs that are tried each time, always the same ones."""


def refusal(path: Path, content: bytes) -> str:
    """Return the one line with which a file is refused, without its name."""
    path.write_bytes(content)
    lines = []
    for load in (load_recipe, load_space):
        with pytest.raises(RecipeError) as caught:
            load(str(path))
        lines.append(one_line(str(caught.value)).removeprefix(str(path)))
    assert lines[0] == lines[1]
    return lines[0]


def one_line(text: str) -> str:
    assert "\n" not in text
    assert len(text) < 6_000
    text.encode()
    return text


def laughs(first: str, each: str) -> bytes:
    """Return YAML in which ten aliases each name the line before, eleven times."""
    lines = [f"a: &a {first}"]
    for number in range(98, 109):
        aliases = ",".join([f"*{chr(number - 1)}"] * 10)
        lines.append(f"{chr(number)}: &{chr(number)} {each.replace('LIST', aliases)}")
    return "\n".join(lines).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"\nname: 2025-02-30",
            ":2: not valid YAML: '2025-02-30' is no timestamp; correct it, or ",
        ),
        (b"x: 2025-01-01T25:00:00Z", ":1: not valid YAML: '2025-01-01T25:00:00Z' is no timestamp"),
        (b"x:\n  y: !!int abc", ":2: not valid YAML: 'abc' is no int"),
        (b"x: !!bool maybe", ":1: not valid YAML: 'maybe' is no bool"),
        (b"x: !!timestamp soon", ":1: not valid YAML: 'soon' is no timestamp"),
        (b"x: !!int ''", ":1: not valid YAML: '' is no int"),
        (b"x: " + b"9" * 5_000, ":1: not valid YAML: a number of more than 100 characters"),
        (b"x: 0x" + b"f" * 5_000, ":1: not valid YAML: a number of more than 100 characters"),
        (b"x: 1" + b":1" * 5_000, ":1: not valid YAML: a number of more than 100 characters"),
        (b"x: " + b"[" * 3_000, ":1: not valid YAML: more than 50 levels of lists and mappings"),
        (b"x:\n" + b"- " * 3_000, ":2: not valid YAML: more than 50 levels of lists and mappings"),
        (b"x: " + b"{" * 3_000, ":1: not valid YAML: more than 50 levels of lists and mappings"),
        (laughs("[x, x]", "[LIST]"), ":6: not valid YAML: more than 100,000 values"),
        (laughs("{x: 1, y: 2}", "{<<: [LIST]}"), ":6: not valid YAML: more than 100,000 values"),
        (b"x: &x [*x]", ":1: not valid YAML: a value that contains itself"),
        (b"a: 1\nb: 2\na: 3", ":3: not valid YAML: the key 'a' is given twice, first in line 1"),
        (b"a: {b: 1,\n 'b': 2}", ":2: not valid YAML: the key 'b' is given twice, first in line 1"),
        (
            b"a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a\n",
            ":4: not valid YAML: the key '<<' is given twice, first in line 3",
        ),
        (
            b"b:\n  <<: {x: 1, x: 2}\n",
            ":2: not valid YAML: the key 'x' is given twice, first in line 2",
        ),
        (b"a: 1\n2: 3", ":2: not valid YAML: the key '2' is no text; put it in quotes"),
        (b"yes: 1", ":1: not valid YAML: the key 'yes' is no text"),
        (b"2025-01-01: 1", ":1: not valid YAML: the key '2025-01-01' is no text"),
        (b"? [a]\n: 1", ":1: not valid YAML: the key a list or mapping is no text"),
        (b"a:\n\tb: 1", ":2: not valid YAML: while scanning for the next token found character"),
        (b"name: x\nb: \xff", ":2: not valid YAML: not UTF-8; save the file in that encoding"),
        (b"name: x\nb: a\0b", ":2: not valid YAML: the character #x0000; remove it"),
        (b'x: "\\ud800"', ":1: not valid YAML: half of a surrogate pair"),
        (b"a: 1\n---\nb: 2", ":2: not valid YAML: expected a single document"),
        (
            b"x: !!python/object:os.system 1",
            ":1: not valid YAML: could not determine a constructor",
        ),
        (b"x: !" + b"a" * 9_000, ":1: not valid YAML: could not determine a constructor"),
        (b"#" * 2_000_000, ": more than 1,000,000 bytes, which no recipe has"),
    ],
)
def test_what_pyyaml_stumbles_over_is_one_line_with_its_line(
    tmp_path: Path, content: bytes, said: str
) -> None:
    assert refusal(tmp_path / "mine.yaml", content).startswith(said)


def test_a_file_without_end_is_one_line() -> None:
    with pytest.raises(RecipeError, match=r"^/dev/zero: more than 1,000,000 bytes"):
        load_recipe("/dev/zero")


def test_anchors_merge_keys_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "\ufeffpreset: demo\nname: mine\n"
        "student:\n  training: &training {epochs: 2, seed: 3}\n"
        "teacher:\n  preparation:\n    training:\n      <<: *training\n      seed: 4\n",
        encoding="utf-8",
    )
    recipe = load_recipe(str(path))
    assert (recipe.student.training.epochs, recipe.student.training.seed) == (2, 3)
    own = recipe.teacher.preparation.training
    assert (own.epochs, own.seed) == (2, 4)


def test_a_mapping_that_is_merged_before_it_is_used_is_no_key_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("a: &a {x: 1}\nb: {<<: &c {<<: *a, x: 2}}\nc: *c\n")
    with pytest.raises(RecipeError, match=r"mine.yaml: a: unknown key; .*; c: unknown key"):
        load_recipe(str(path))


def test_of_very_many_wrong_keys_the_first_are_named() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({f"key\n{number}": 1 for number in range(50)} | {"k" * 9_000: 1}, "mine.yaml")
    assert "key 19: unknown key; remove it or correct its spelling; and 31 more" in one_line(
        str(caught.value)
    )


# What hypothesis finds

odd_signs = st.sampled_from("\ud800\udfff\0\n\x85\u2028\ufeff")
texts = st.text(st.characters() | odd_signs, max_size=20)
keys = st.sampled_from(sorted(Recipe.model_fields)) | texts
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=8,
)


def setting_paths(model: type[BaseModel], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return where each setting of a recipe stands, as keys from its top."""
    paths = []
    for name, field in model.model_fields.items():
        paths.append((*above, name))
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                paths += setting_paths(kind, (*above, name))
    return paths


def recipe_of(preset: str, settings_: list[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """Return a preset with settings laid over it."""
    recipe: dict[str, Any] = {"preset": preset}
    for path, value in settings_:
        below: Any = recipe
        for key in path[:-1]:
            if not isinstance(below.get(key), dict):
                below[key] = {}
            below = below[key]
        below[path[-1]] = value
    return recipe


plain_values = (
    st.sampled_from(
        ["demo", "file", "endpoint", "local", "choice", "classify", "auto", "rationale"]
    )
    | st.integers(-1, 5)
    | st.floats(0, 1)
    | values
)
recipes = st.builds(
    recipe_of,
    st.sampled_from(PRESETS),
    st.lists(st.tuples(st.sampled_from(setting_paths(Recipe)), plain_values), max_size=3),
) | st.dictionaries(keys, values, max_size=4)


def try_recipe(load: Any, *given: Any) -> None:
    """Load a recipe. Raises nothing but RecipeError, in one line; a valid one survives its way
    through YAML and JSON."""
    try:
        recipe = load(*given)
    except RecipeError as error:
        one_line(str(error))
        return
    if isinstance(recipe, Recipe):
        text = recipe.model_dump_json()
        assert parse_recipe(json.loads(text), "json") == recipe
        assert parse_recipe(yaml.safe_load(yaml.safe_dump(json.loads(text))), "yaml") == recipe


@BUDGET
@given(given_values=recipes)
def test_any_values_are_a_recipe_or_one_line(given_values: dict[str, Any]) -> None:
    try_recipe(parse_recipe, given_values, "mine.yaml")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("recipes") / "mine.yaml")


signs = st.lists(
    st.sampled_from(
        [
            *"[]{}:,-?&*!|>'\"%@`#a1.~=<\n\t ",
            "  ",
            "- ",
            ": ",
            "&a ",
            "*a",
            "<<: ",
            "!!int ",
            "name",
        ]
    ),
    max_size=30,
).map("".join)


@BUDGET
@given(
    content=st.binary(max_size=60)
    | signs.map(str.encode)
    | texts.map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_any_bytes_are_a_recipe_or_one_line(content: bytes, path: str) -> None:
    for whole in (content, b"preset: demo\nname: " + content, b"student:\n  training: " + content):
        Path(path).write_bytes(whole)
        try_recipe(load_recipe, path)
        try_recipe(load_space, path)


@BUDGET
@given(given_values=recipes)
def test_any_recipe_in_yaml_is_a_recipe_or_one_line(
    given_values: dict[str, Any], path: str
) -> None:
    Path(path).write_bytes(yaml.safe_dump(given_values).encode("utf-8", "surrogatepass"))
    try_recipe(load_recipe, path)


@pytest.mark.parametrize("name", PRESETS)
def test_a_valid_recipe_survives_its_way_through_yaml(name: str, path: str) -> None:
    recipe = load_recipe(name)
    Path(path).write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    assert load_recipe(path) == recipe
