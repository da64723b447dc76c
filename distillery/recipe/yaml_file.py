"""Read a YAML file of plain values; say in one line, with the line of the file, what is wrong."""

from typing import Any

import yaml

from distillery.errors import RecipeError, one_line

LARGEST_FILE = 1_000_000
"""Bytes of a file, at most: far more than a recipe with a thousand classes."""

MOST_VALUES = 100_000
"""Keys and values, at most, counted as often as aliases (*NAME) repeat them."""

DEEPEST = 50
"""Levels of lists and mappings, at most."""

LONGEST_NUMBER = 100
"""Characters of a number, at most."""

NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

STRING = "tag:yaml.org,2002:str"


class PlainLoader(yaml.SafeLoader):
    """A loader that refuses what yaml.SafeLoader takes but nobody means: keys that are given twice
    or that are no text, texts that UTF-8 can't express, and files whose few bytes become millions
    of values. Every error is a yaml.YAMLError, with the line."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node. Refuses one that is nested too deeply, and too many of them."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if self._depth == DEEPEST:
            raise fault(event.start_mark, f"more than {DEEPEST} levels of lists and mappings")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None or node in self._sizes:
            return node
        if isinstance(event, yaml.AliasEvent):
            raise fault(event.start_mark, "a value that contains itself")
        if isinstance(node, yaml.MappingNode):
            refuse_wrong_keys(node)
        self._sizes[node] = 1 + sum(self._sizes[inner] for inner in inner_nodes(node))
        if max(self._sizes[node], len(self._sizes)) > MOST_VALUES:
            raise fault(
                event.start_mark, f"more than {MOST_VALUES:,} values, those of aliases included"
            )
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return a node's value. Refuses values that are not what they are written as."""
        kind = node.tag.rpartition(":")[2]
        if node.tag in NUMBERS and len(node.value) > LONGEST_NUMBER:
            raise fault(node.start_mark, f"a number of more than {LONGEST_NUMBER} characters")
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
            # PyYAML lets through what Python's own types raise, such as for 2025-02-30.
            text = str(node.value)[:LONGEST_NUMBER]
            raise fault(
                node.start_mark, f"{text!r} is no {kind}; correct it, or quote it"
            ) from error
        if isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
            raise fault(node.start_mark, "half of a surrogate pair, which is no character")
        return value


def inner_nodes(node: yaml.Node) -> list[yaml.Node]:
    """Return the nodes in a node, keys and values."""
    if isinstance(node, yaml.MappingNode):
        return [inner for pair in node.value for inner in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def refuse_wrong_keys(node: yaml.MappingNode) -> None:
    """Raise yaml.YAMLError for a key that is no text, and for one that is given twice."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            name = "<<"
        elif isinstance(key, yaml.ScalarNode) and key.tag == STRING:
            name = key.value
        else:
            shown = f"{key.value!r}" if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise fault(key.start_mark, f"the key {shown[:100]} is no text; put it in quotes")
        if name in lines:
            raise fault(
                key.start_mark,
                f"the key {name[:100]!r} is given twice, first in line {lines[name]}; remove one",
            )
        lines[name] = line


def fault(mark: Any, problem: str) -> yaml.YAMLError:
    """Return the error of a problem at a place in the text."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def parse_yaml(content: bytes, path: str) -> Any:
    """Return what the content of the file `path` holds: texts, numbers, truth values, dates, lists,
    mappings. Raises RecipeError, in one line, with the line of the file."""
    if len(content) > LARGEST_FILE:
        raise RecipeError(
            f"{path}: more than {LARGEST_FILE:,} bytes, which no recipe has; give another file"
        )
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"{path}:{line}: not valid YAML: not UTF-8; save the file in that encoding"
        ) from error
    try:
        return PlainLoader(text).get_single_data()
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise RecipeError(
            f"{path}:{line}: not valid YAML: the character #x{error.character:04x}; remove it"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark or error.context_mark
        # PyYAML repeats tags and names whole.
        problem = one_line(f"{error.context or ''} {error.problem}")
        raise RecipeError(f"{path}:{mark.line + 1}: not valid YAML: {problem}") from error
