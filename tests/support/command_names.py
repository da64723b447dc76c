"""The commands of the command line, found by walking it."""

from collections.abc import Iterator
from typing import Any

import typer

from distillery import cli


def command_names() -> list[str]:
    """Return the names of all commands, such as "models list"."""
    return list(names_in(typer.main.get_command(cli.app)))


def names_in(group: Any, before: str = "") -> Iterator[str]:
    """Yield the names of the commands in a group, whose own is `before`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from names_in(command, f"{before}{name} ")
        else:
            yield f"{before}{name}"
