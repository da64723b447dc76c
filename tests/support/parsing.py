"""Python's sources parsed, whatever else this process does."""

import ast
import gc
from functools import cache


@cache
def parsed(source: str) -> ast.Module:
    """Return the tree of `source`, made without a garbage collection in the middle: if an object
    that it ends parses too, CPython 3.11 takes its depth for ours (SystemError: "AST constructor
    recursion depth mismatch")."""
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        gc.enable()
