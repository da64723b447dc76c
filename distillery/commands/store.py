"""`distillery store`: the artifact store."""

import json
import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distillery.errors import StoreError

if TYPE_CHECKING:
    from distillery.storage.artifacts import ArtifactStore
    from distillery.storage.housekeeping import StoredArtifact

app = typer.Typer(
    help="List, export and remove artifacts in the store that DISTILLERY_STORE names.",
    no_args_is_help=True,
)


@app.command("list")
def list_artifacts(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON array, for programs.")
    ] = False,
) -> None:
    """List the artifacts, the last used first: digest, size, age and who names them."""
    from distillery.storage.artifacts import ArtifactStore
    from distillery.storage.housekeeping import Inventory

    artifacts = Inventory(ArtifactStore()).artifacts()
    if as_json:
        listed = []
        for artifact in artifacts:
            listed.append(
                {
                    "digest": artifact.digest,
                    "bytes": artifact.bytes,
                    "used": artifact.used,
                    "named_by": artifact.named_by,
                }
            )
        print(json.dumps(listed, indent=1, default=str))
        return
    for artifact in artifacts:
        name = "nothing names it"
        if artifact.named_by:
            name = artifact.named_by[0]
        if len(artifact.named_by) > 1:
            name = f"{name} and {len(artifact.named_by) - 1} more"
        size, age = megabytes(artifact.bytes), age_of(artifact.used)
        print(f"{artifact.digest[:12]}  {size}  {age:>5}  {name}")


@app.command()
def show(
    digest: Annotated[str, typer.Argument(help="The digest's first characters.", metavar="DIGEST")],
) -> None:
    """Show an artifact: its files, and the runs and models that name it."""
    from distillery.storage.artifacts import ArtifactStore

    source = ArtifactStore()
    artifact = the_artifact(source, digest)
    print(f"{source.url}/{artifact.digest}")
    print(f"{artifact.bytes} bytes, last used {artifact.used:%Y-%m-%d %H:%M} UTC")
    for name in artifact.named_by or ["nothing"]:
        print(f"named by {name}")
    for entry in source.files(artifact.digest):
        print(f"{entry.sha256[:12]}  {entry.bytes:>12}  {entry.path}")


@app.command("export")
def export_artifact(
    digest: Annotated[str, typer.Argument(help="The digest's first characters.", metavar="DIGEST")],
    folder: Annotated[
        Path, typer.Argument(help="The folder to write; it must not exist.", metavar="FOLDER")
    ],
) -> None:
    """Copy an artifact's files out of the store to FOLDER, every file verified."""
    from distillery.records import Artifact
    from distillery.storage.artifacts import ArtifactStore

    source = ArtifactStore()
    artifact = the_artifact(source, digest)
    if folder.exists():
        raise StoreError(f"{folder}: is there already; name a folder that is not")
    content = source.fetch(
        Artifact(
            uri=f"{source.url}/{artifact.digest}", sha256=artifact.digest, bytes=artifact.bytes
        )
    )
    unfinished = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(content, unfinished)
        unfinished.rename(folder)
    except OSError as error:
        raise StoreError(f"{folder}: can't be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{len(source.files(artifact.digest))} files, {artifact.bytes} bytes in {folder}")


@app.command()
def gc(
    older_than: Annotated[
        str,
        typer.Option(
            help="Remove what has not been used for so many days; give more than your longest run "
            "takes.",
            metavar="DAYSd",
        ),
    ] = "30d",
    keep_runs: Annotated[
        int, typer.Option(help="Keep what the newest runs of each recipe made.", min=0)
    ] = 3,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be removed, but remove nothing.")
    ] = False,
) -> None:
    """Remove what no kept run and no registered model names and nobody has used for a while."""
    from distillery.registry.references import find_registered
    from distillery.storage.artifacts import ArtifactStore
    from distillery.storage.housekeeping import Inventory

    if not re.fullmatch(r"[1-9]\d{0,4}d", older_than):
        raise typer.BadParameter(
            f"{older_than}: a number of days, at least 1, such as 30d", param_hint="--older-than"
        )
    source = ArtifactStore()
    inventory = Inventory(source)
    registered = find_registered(inventory.registered_models(), source.storage.is_local)
    count = size = 0
    for waste in inventory.waste(registered, timedelta(days=int(older_than[:-1])), keep_runs):
        if dry_run or inventory.remove(waste):
            count += 1
            size += waste.bytes
            age = age_of(waste.used)
            print(f"{waste.kind:12}  {megabytes(waste.bytes)}  {age:>5}  {waste.name}")
    verb = "would be removed" if dry_run else "removed"
    print(f"{count} {verb}, {size / 1e6:.1f} MB")


def the_artifact(source: "ArtifactStore", digest: str) -> "StoredArtifact":
    """Return the artifact whose digest begins so. Raises StoreError if none or several do."""
    from distillery.storage.housekeeping import Inventory

    found = [
        artifact for artifact in Inventory(source).artifacts() if artifact.digest.startswith(digest)
    ]
    if len(found) != 1:
        raise StoreError(
            f"{source.url}: {len(found)} artifacts begin with {digest}; see distillery store list"
        )
    return found[0]


def megabytes(size: int) -> str:
    return f"{size / 1e6:10.1f} MB"


def age_of(moment: datetime) -> str:
    """Return the time since `moment` in days, or in hours if it is less than a day."""
    seconds = (datetime.now(UTC) - moment).total_seconds()
    if seconds >= 86400:
        return f"{seconds / 86400:.0f}d"
    return f"{seconds / 3600:.0f}h"
