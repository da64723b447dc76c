"""Measure how code reads: `python -m benchmarks.code_shape FOLDER...`.

For each folder, all Python files below it are counted together:

modules             files
largest             lines of the largest module
functions           functions and methods, inner ones too
median              lines of a function, its decorators left out
over_50             share of functions over 50 lines
private             share of functions whose name begins with an underscore, save __dunder__
comprehensions, ternaries, walruses
                    a hundred lines that are not blank
long_lines          lines over 100 characters

Shares are 0 to 1. The last line is JSON: these figures by folder.
"""

import ast
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

LONG_FUNCTION = 50
LONG_LINE = 100
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def shape(folder: Path) -> dict[str, float]:
    """Return the figures of the folder's Python files; ValueError where there are none."""
    files = sorted(folder.rglob("*.py"))
    if not files:
        raise ValueError(f"{folder}: no Python file is in this folder")
    sources = [file.read_text(encoding="utf-8") for file in files]
    lines = [source.splitlines() for source in sources]
    written = sum(1 for module in lines for line in module if line.strip())
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]
    private = [node for node in functions if is_private(node.name)]
    return {
        "modules": len(files),
        "largest": max(map(len, lines)),
        "functions": len(functions),
        "median": median(lengths or [0]),
        "over_50": share(sum(length > LONG_FUNCTION for length in lengths), len(functions)),
        "private": share(len(private), len(functions)),
        "comprehensions": per_hundred(nodes, COMPREHENSIONS, written),
        "ternaries": per_hundred(nodes, ast.IfExp, written),
        "walruses": per_hundred(nodes, ast.NamedExpr, written),
        "long_lines": sum(len(line) > LONG_LINE for module in lines for line in module),
    }


def is_private(name: str) -> bool:
    """Return whether a function is private: one leading underscore, not __dunder__."""
    return name.startswith("_") and not name.startswith("__")


def share(part: int, whole: int) -> float:
    """Return part of whole, 0 to 1."""
    return round(part / max(whole, 1), 3)


def per_hundred(nodes: list[ast.AST], kind: Any, lines: int) -> float:
    """Return how many nodes of a kind there are in a hundred lines."""
    return round(100 * sum(isinstance(node, kind) for node in nodes) / max(lines, 1), 2)


def main(folders: list[str]) -> int:
    """Print a line for each folder, then the JSON line."""
    if not folders:
        print("error: name at least one folder", file=sys.stderr)
        return 2
    shapes: dict[str, dict[str, float]] = {}
    for folder in folders:
        try:
            shapes[folder] = shape(Path(folder))
        except (ValueError, SyntaxError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        figures = ", ".join(f"{name} {value:g}" for name, value in shapes[folder].items())
        print(f"{folder}: {figures}")
    print(json.dumps(shapes))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
