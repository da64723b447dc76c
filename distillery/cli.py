"""The command line: `distillery check`, `serve` and `base`. Flows are run by `python -m flows.distill`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import SecretStr

from distillery.errors import DistilleryError
from distillery.recipe import parse_recipe

app = typer.Typer(
    help="What surrounds a run of Distillery.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def check(recipe: Annotated[str, typer.Argument(help="demo, lab or a YAML file", metavar="RECIPE")]) -> None:
    """Say what a run of RECIPE on this machine lacks; exits 1 where something does."""
    from distillery import readiness
    from distillery.recipe import load_recipe

    findings = readiness.check(load_recipe(recipe))
    for finding in findings:
        print(finding)
    if any(finding.level == "FAIL" for finding in findings):
        raise typer.Exit(1)


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="An exported or downloaded model", metavar="FOLDER")],
    name: Annotated[str, typer.Option(help="The model's name in requests")] = "student",
    host: Annotated[str, typer.Option(help="Other machines reach any but 127.0.0.1")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one", min=0, max=65535)] = 8080,
    threads: Annotated[int | None, typer.Option(help="Cores for one operation", min=1)] = None,
) -> None:
    """Serve FOLDER as /v1/chat/completions; the key that it asks for, if any, is in DISTILLERY_SERVER_KEY."""
    from distillery import serving
    from distillery.settings import load_environment

    load_environment()
    key = os.environ.get(serving.KEY_VARIABLE, "")
    serving.serve(folder, name, host, port, SecretStr(key) if key else None, threads=threads)


@app.command()
def base(name: Annotated[str, typer.Argument(help="As student.base.model in a recipe", metavar="NAME")]) -> None:
    """Download or convert the base model NAME, and print its folder."""
    from distillery.base_model import base_folder

    recipe = parse_recipe({"student": {"base": {"model": name}}}, "distillery base")
    print(base_folder(recipe.student.base))


def main() -> None:
    """The entry point: an error that the user can mend is one line on stderr and exit 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
