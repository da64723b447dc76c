"""`distillery models`: registered models."""

import getpass
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distillery.recipe import RegistryKind, RegistryRecipe

if TYPE_CHECKING:
    from distillery.registry.base import Registry
    from distillery.registry.history import Actor

app = typer.Typer(
    help="List, compare, promote, roll back and download registered models, and give them to "
    "Foundry Local.",
    no_args_is_help=True,
)

NameArgument = Annotated[str, typer.Argument(help="The model's name.", metavar="NAME")]
RegistryOption = Annotated[
    RegistryKind,
    typer.Option("--registry", help="The registry to use: registry.kind of the recipe."),
]
ReasonOption = Annotated[str, typer.Option(help="Why, for the history.")]


@app.command("list")
def list_models(
    name: Annotated[str | None, typer.Argument(help="List this model's versions only.")] = None,
    registry: RegistryOption = "local",
) -> None:
    """List the registered models: name, version, role, and the digest of the files.

    The role is champion, challenger, archived (a former champion) or rejected. A champion is
    "pinned" after `models promote` or `models rollback`, until `models unpin`. Models of Azure ML
    that were registered without Distillery are "unverified".
    """
    from distillery.registry.history import pin_of

    opened = open_registry_of_kind(registry)
    listed, others = opened.list(name), opened.others(name)
    if not listed and not others:
        print("no model is registered" + (f" as {name}" if name else ""))
    for model in listed:
        role = model.role
        if role == "champion":
            pin = pin_of(opened.history(model.name))
            if pin is not None and pin.version == model.version:
                role = "champion, pinned"
        print(f"{model.name}  version {model.version}  {role:16}  {model.artifact.sha256[:12]}")
    for other in others:
        print(f"{other.name}  version {other.version}  {'unverified':16}  {other.uri}")


@app.command("promote")
def promote_model(
    name: NameArgument,
    version: Annotated[
        str,
        typer.Argument(
            help="The version, as `distillery models list` shows it.", metavar="VERSION"
        ),
    ],
    reason: ReasonOption = "",
    registry: RegistryOption = "local",
) -> None:
    """Make VERSION of the model NAME the champion, and pin it.

    Batch inference uses the champion, and new students are compared with it. While it is pinned, a
    run promotes only a version that is registered after the pin and passes the gate against it.
    """
    champion = open_registry_of_kind(registry).pin(name, version, user(), reason)
    print(f"{champion.name} version {champion.version} is the champion and pinned")


@app.command("rollback")
def rollback_model(
    name: NameArgument,
    version: Annotated[
        str | None,
        typer.Argument(
            help="The version to go back to; by default the champion before this one.",
            metavar="[VERSION]",
        ),
    ] = None,
    reason: ReasonOption = "",
    registry: RegistryOption = "local",
) -> None:
    """Go back to an earlier champion of the model NAME, and pin it.

    Runs promote none of the versions that are registered now, also if they find them again.
    """
    champion = open_registry_of_kind(registry).pin(name, version, user(), reason, "rolled back")
    print(f"{champion.name} version {champion.version} is the champion and pinned")


@app.command("unpin")
def unpin_model(
    name: NameArgument, reason: ReasonOption = "", registry: RegistryOption = "local"
) -> None:
    """Let runs promote any version of the model NAME again that passes the gate."""
    open_registry_of_kind(registry).unpin(name, user(), reason)
    print(f"{name}: no champion is pinned")


@app.command("history")
def show_history(
    name: NameArgument,
    registry: RegistryOption = "local",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON array, for programs.")
    ] = False,
) -> None:
    """Tell what became of the versions of the model NAME: when, by whom and why, oldest first.

    Times are UTC. What earlier releases of Distillery did is not in it.
    """
    events = open_registry_of_kind(registry).history(name)
    if as_json:
        print(json.dumps([event.model_dump(mode="json") for event in events]))
        return
    if not events:
        print(f"{name}: no history")
    for event in events:
        print(event.line)


@app.command("download")
def download_model(
    name: NameArgument,
    folder: Annotated[
        Path, typer.Argument(help="The folder to create; it must not exist.", metavar="FOLDER")
    ],
    version: Annotated[
        str | None, typer.Option(help="The version; by default the champion, else the newest.")
    ] = None,
    registry: RegistryOption = "local",
) -> None:
    """Download the model NAME to FOLDER and verify each file.

    `distillery ask FOLDER` asks it, and `distillery serve FOLDER` serves it. A model of Azure ML
    that was registered without Distillery has no digests to verify.
    """
    from distillery.registry.base import OtherModel

    opened = open_registry_of_kind(registry)
    model = opened.get_any(name, version)
    if not isinstance(model, OtherModel):
        print(f"{model.name} version {model.version} in {opened.download(model, folder)}")
        return
    opened.download_other(model, folder)
    print(f"{model.name} version {model.version} in {folder}, unverified: it has no manifest")
    for config in sorted(folder.rglob("genai_config.json")):
        print(f"ask it by: distillery ask {config.parent}")


@app.command("foundry")
def register_in_foundry_local(
    folder: Annotated[
        Path,
        typer.Argument(help="A downloaded or exported model's folder.", metavar="FOLDER"),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            help="The name there, or NAME:VERSION; by default the model's, or the folder's, and "
            "version 1.",
        ),
    ] = None,
    app: Annotated[
        str, typer.Option(help="The app_name of the program that will use the model.")
    ] = "distillery",
) -> None:
    """Make the model in FOLDER usable in Microsoft's Foundry Local.

    Writes inference_model.json into the folder and registers it in the local catalog, without
    copying it. Foundry Local needs an environment of its own, which `make foundry` sets up.
    """
    from distillery.serving.foundry import register_in_foundry

    model_id = register_in_foundry(folder, app, name)
    print(f"{model_id} in Foundry Local's catalog of {app}: {folder}")


@app.command("compare")
def compare_models(
    first: Annotated[str, typer.Argument(help="A model; see above.", metavar="A")],
    second: Annotated[str, typer.Argument(help="Another one.", metavar="B")],
    rows: Annotated[
        Path | None,
        typer.Option(
            help="Ask both models the rows of this JSONL, CSV or Parquet file, here; needed for "
            "folders that hold no answers.",
            metavar="FILE",
        ),
    ] = None,
    flips: Annotated[
        int, typer.Option(help="How many rows to show that one of them alone answers right.", min=0)
    ] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw the comparison into this .svg, .png or .pdf file.", metavar="FILE"),
    ] = None,
    registry: RegistryOption = "local",
) -> None:
    """Compare the models A and B on the same rows: accuracy, size, speed and what each cost.

    A model is a folder, or NAME or NAME:VERSION of a registry; local:NAME and azureml:NAME compare
    across registries. Without --rows, the answers to the test rows that are stored with both are
    compared, and no model runs. What a run found in the label database is not in the teacher's
    calls.
    """
    from distillery.registry import comparison
    from distillery.registry.comparison_table import render_comparison

    if picture is not None:
        from distillery.report.comparison import check_picture, draw_comparison

        # Before rows are asked, which may take minutes.
        check_picture(picture)
    found = comparison.compare_models(
        comparison.find_subject(first, registry), comparison.find_subject(second, registry), rows
    )
    print(found.model_dump_json(indent=1) if as_json else render_comparison(found, flips))
    if picture is not None:
        draw_comparison(found, picture)


@app.command("sign")
def sign_model(
    name: NameArgument,
    version: Annotated[
        str | None,
        typer.Argument(
            help="The version; by default the champion, else the newest.", metavar="VERSION"
        ),
    ] = None,
    registry: RegistryOption = "local",
) -> None:
    """Sign a registered version with the key in DISTILLERY_SIGNING_KEY.

    If that key is set while a run registers a model, the model is signed already.
    """
    opened = open_registry_of_kind(registry)
    model = opened.sign(opened.get(name, version))
    print(f"{model.name} version {model.version} is signed")


def open_registry_of_kind(kind: RegistryKind) -> "Registry":
    from distillery.registry.open import open_registry

    return open_registry(RegistryRecipe(kind=kind))


def user() -> "Actor":
    """Return who runs this command, for the history."""
    from distillery.registry.history import Actor

    try:
        return Actor(getpass.getuser())
    except (KeyError, OSError):
        # A container's user may have no name.
        return Actor("unknown user")
