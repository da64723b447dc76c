"""The command line: `distillery check`, `quote`, `serve`, `base`, `models`, `labels` and `store`. Flows are run by
`python -m flows.distill`."""

import json
import os
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import SecretStr

from distillery.errors import DistilleryError, StoreError
from distillery.recipe import RegistryKind, RegistryRecipe, parse_recipe

if TYPE_CHECKING:
    from distillery.registry.base import Registry

app = typer.Typer(
    help="What surrounds a run of Distillery.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
store = typer.Typer(help="The artifact store that DISTILLERY_STORE names.", no_args_is_help=True)
app.add_typer(store, name="store")
models = typer.Typer(help="The registered models.", no_args_is_help=True)
app.add_typer(models, name="models")
labels = typer.Typer(
    help="The teacher's answers, in the database that DISTILLERY_LABELS names.",
    no_args_is_help=True,
)
app.add_typer(labels, name="labels")


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="demo, lab or a YAML file", metavar="RECIPE")],
) -> None:
    """Say what a run of RECIPE on this machine lacks; exits 1 where something does."""
    from distillery import readiness
    from distillery.recipe import load_recipe

    findings = readiness.check(load_recipe(recipe))
    for finding in findings:
        print(finding)
    if any(finding.level == "FAIL" for finding in findings):
        raise typer.Exit(1)


@app.command()
def quote(
    recipe: Annotated[str, typer.Argument(help="demo, lab or a YAML file", metavar="RECIPE")],
) -> None:
    """Say what labelling for RECIPE will cost and how long it will take; asks the teacher nothing."""
    from distillery.labels.quote import quote_recipe
    from distillery.recipe import load_recipe

    for split, quoted in quote_recipe(load_recipe(recipe)).items():
        print(f"{split}: {quoted.line()}")


@app.command()
def serve(
    folder: Annotated[
        Path, typer.Argument(help="An exported or downloaded model", metavar="FOLDER")
    ],
    name: Annotated[str, typer.Option(help="The model's name in requests")] = "student",
    host: Annotated[str, typer.Option(help="Other machines reach any but 127.0.0.1")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one", min=0, max=65535)] = 8080,
    threads: Annotated[int | None, typer.Option(help="Cores for one operation", min=1)] = None,
) -> None:
    """Serve FOLDER as /v1/chat/completions; the key that it asks for, if any, is in DISTILLERY_SERVER_KEY."""
    from distillery.serving import server
    from distillery.serving.server import KEY_VARIABLE
    from distillery.settings import load_environment

    load_environment()
    key = os.environ.get(KEY_VARIABLE, "")
    server.serve(folder, name, host, port, SecretStr(key) if key else None, threads=threads)


@app.command()
def base(
    name: Annotated[str, typer.Argument(help="As student.base.model in a recipe", metavar="NAME")],
) -> None:
    """Download or convert the base model NAME, and print its folder."""
    from distillery.models.base import base_folder

    recipe = parse_recipe({"student": {"base": {"model": name}}}, "distillery base")
    print(base_folder(recipe.student.base))


Place = Annotated[RegistryKind, typer.Option("--registry", help="As registry.kind in a recipe")]


@models.command("list")
def list_models(
    name: Annotated[
        str | None, typer.Argument(help="One model's versions; all models where not given")
    ] = None,
    registry: Place = "local",
) -> None:
    """What is registered: name, version, whether it is the champion, and its files' digest."""
    for model in _registry(registry).list(name):
        print(
            f"{model.name}  version {model.version}  {model.role:9}  {model.artifact.sha256[:12]}"
        )


@models.command("promote")
def promote_model(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    version: Annotated[str, typer.Argument(metavar="VERSION")],
    registry: Place = "local",
) -> None:
    """Make a version the champion, such as an earlier one: what batch inference takes and candidates must match."""
    place = _registry(registry)
    champion = place.promote(place.get(name, version))
    print(f"{champion.name} version {champion.version} is the champion")


@models.command("download")
def download_model(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    folder: Annotated[
        Path, typer.Argument(help="A folder that does not exist yet", metavar="FOLDER")
    ],
    version: Annotated[str | None, typer.Option(help="The champion where not given")] = None,
    registry: Place = "local",
) -> None:
    """Download a model, each file verified, to be served by `distillery serve FOLDER`."""
    place = _registry(registry)
    model = place.get(name, version)
    print(f"{model.name} version {model.version} in {place.download(model, folder)}")


def _registry(kind: RegistryKind) -> "Registry":
    from distillery.registry.open import open_registry

    return open_registry(RegistryRecipe(kind=kind))


@labels.command("list")
def list_teachers() -> None:
    """Each teacher, its answers, those that are no label, and what they cost by the price tables of their runs."""
    from distillery.labels.store import LabelStore

    with LabelStore() as answers:
        for teacher, count, rejected, cost in answers.summary():
            print(f"{count:>9} answers  {rejected:>7} rejected  {cost:>10.2f}  {teacher}")


@labels.command("export")
def export_labels(
    file: Annotated[Path, typer.Argument(help="A Parquet file to write", metavar="FILE")],
    teacher: Annotated[
        str | None, typer.Option(help="Of this teacher alone, as distillery labels list has it")
    ] = None,
) -> None:
    """Write the answers to FILE."""
    from distillery.labels.store import LabelStore

    with LabelStore() as answers:
        print(f"{answers.export(file, teacher)} answers written to {file}")


@labels.command("import")
def import_labels(
    file: Annotated[Path, typer.Argument(help="As export wrote it", metavar="FILE")],
) -> None:
    """Add the answers of FILE; what is known already stays."""
    from distillery.labels.store import LabelStore

    with LabelStore() as answers:
        print(f"{answers.load(file)} new answers")


@labels.command("delete")
def delete_labels(
    row: Annotated[
        list[str], typer.Option(help="A row's id; may be given more than once", metavar="ID")
    ] = [],  # noqa: B006
    containing: Annotated[
        list[str], typer.Option(help="In prompt or answer; may be given more than once")
    ] = [],  # noqa: B006
    rejected: Annotated[bool, typer.Option("--rejected", help="All that are no label")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count them")] = False,
) -> None:
    """Delete answers, by row or by text. Artifacts made from them stay until no registered model and no kept run names
    them (distillery store gc)."""
    from distillery.labels.store import LabelStore

    if not (row or rejected or any(containing)):
        raise typer.BadParameter("say which: --row, --containing or --rejected")
    with LabelStore() as answers:
        count = answers.delete(row, containing, rejected, dry_run)
    print(f"{count} answers {'would be ' if dry_run else ''}deleted")


@store.command("list")
def list_artifacts(
    as_json: Annotated[bool, typer.Option("--json", help="One array, for programs")] = False,
) -> None:
    """The artifacts, the last used first: digest, size, age and what names them."""
    from distillery.storage.artifacts import ArtifactStore
    from distillery.storage.housekeeping import Inventory

    artifacts = Inventory(ArtifactStore()).artifacts()
    if as_json:
        fields = ("digest", "bytes", "used", "named_by")
        print(
            json.dumps(
                [{f: getattr(artifact, f) for f in fields} for artifact in artifacts],
                indent=1,
                default=str,
            )
        )
        return
    for artifact in artifacts:
        more = f" and {len(artifact.named_by) - 1} more" if len(artifact.named_by) > 1 else ""
        name = f"{artifact.named_by[0]}{more}" if artifact.named_by else "nothing names it"
        print(
            f"{artifact.digest[:12]}  {_megabytes(artifact.bytes)}  {_age(artifact.used):>5}  {name}"
        )


@store.command()
def show(
    digest: Annotated[str, typer.Argument(help="Its first characters will do", metavar="DIGEST")],
) -> None:
    """What is in an artifact, and who names it."""
    from distillery.storage.artifacts import ArtifactStore
    from distillery.storage.housekeeping import Inventory

    source = ArtifactStore()
    found = [
        artifact for artifact in Inventory(source).artifacts() if artifact.digest.startswith(digest)
    ]
    if len(found) != 1:
        raise StoreError(
            f"{source.url}: {len(found)} artifacts begin with {digest}; see distillery store list"
        )
    (artifact,) = found
    print(f"{source.url}/{artifact.digest}")
    print(f"{artifact.bytes} bytes, last used {artifact.used:%Y-%m-%d %H:%M} UTC")
    for name in artifact.named_by or ["nothing"]:
        print(f"named by {name}")
    for entry in source.files(artifact.digest):
        print(f"{entry.sha256[:12]}  {entry.bytes:>12}  {entry.path}")


@store.command()
def gc(
    older_than: Annotated[
        str, typer.Option(help="Longer than your longest run", metavar="DAYSd")
    ] = "30d",
    keep_runs: Annotated[
        int, typer.Option(help="The newest runs of each recipe that keep what they made", min=0)
    ] = 3,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed")
    ] = False,
) -> None:
    """Remove what no kept run and no registered model names, and nobody has used for a while."""
    from distillery.storage.artifacts import ArtifactStore
    from distillery.storage.housekeeping import Inventory

    if not re.fullmatch(r"[1-9]\d{0,4}d", older_than):
        raise typer.BadParameter(
            f"{older_than}: a number of days, at least 1, such as 30d", param_hint="--older-than"
        )
    inventory = Inventory(ArtifactStore())
    count = size = 0
    for waste in inventory.waste(timedelta(days=int(older_than[:-1])), keep_runs):
        if dry_run or inventory.remove(waste):
            count, size = count + 1, size + waste.bytes
            print(
                f"{waste.kind:12}  {_megabytes(waste.bytes)}  {_age(waste.used):>5}  {waste.name}"
            )
    print(f"{count} {'would be removed' if dry_run else 'removed'}, {size / 1e6:.1f} MB")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:10.1f} MB"


def _age(moment: datetime) -> str:
    seconds = (datetime.now(UTC) - moment).total_seconds()
    return f"{seconds / 86400:.0f}d" if seconds >= 86400 else f"{seconds / 3600:.0f}h"


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
