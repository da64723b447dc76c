"""The command line: what is done before and after a run. Runs are started by `python -m
flows.distill`.

Help texts and docstrings of commands are what `--help` and the reference show. Heavy libraries are
imported inside the commands, so that `--help` answers at once.
"""

import getpass
import json
import logging
import os
import re
import shutil
import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from distillery.errors import DistilleryError, StoreError
from distillery.recipe import RegistryKind, RegistryRecipe, parse_recipe

if TYPE_CHECKING:
    from distillery.registry.base import Registry
    from distillery.registry.history import Actor
    from distillery.storage.artifacts import ArtifactStore
    from distillery.storage.housekeeping import StoredArtifact

app = typer.Typer(
    help="Write a recipe, check, quote, report, serve and ask, and manage models, labels and the "
    "artifact store.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
store = typer.Typer(
    help="List, export and remove artifacts in the store that DISTILLERY_STORE names.",
    no_args_is_help=True,
)
app.add_typer(store, name="store")
models = typer.Typer(
    help="List, compare, promote, roll back and download registered models, and give them to "
    "Foundry Local.",
    no_args_is_help=True,
)
app.add_typer(models, name="models")
labels = typer.Typer(
    help="List, export, import and delete the teacher's answers, and show what they cost. They are "
    "kept in the database that DISTILLERY_LABELS names.",
    no_args_is_help=True,
)
app.add_typer(labels, name="labels")

RecipeArgument = Annotated[
    str, typer.Argument(help="A preset (demo or lab) or a YAML file.", metavar="RECIPE")
]
NameArgument = Annotated[str, typer.Argument(help="The model's name.", metavar="NAME")]
RegistryOption = Annotated[
    RegistryKind,
    typer.Option("--registry", help="The registry to use: registry.kind of the recipe."),
]
ReasonOption = Annotated[str, typer.Option(help="Why, for the history.")]


@app.command()
def new(
    data: Annotated[
        list[Path],
        typer.Argument(
            help="CSV, JSONL or Parquet files of texts and labels or answers, which may be empty.",
            metavar="DATA",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; by default NAME.yaml.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The name of recipe and model; by default that of the first file."),
    ] = None,
    text: Annotated[
        list[str],
        typer.Option(help="The column of the text; repeat it for several.", metavar="COLUMN"),
    ] = [],  # noqa: B006
    label: Annotated[
        str | None, typer.Option(help="The column of the label or answer.", metavar="COLUMN")
    ] = None,
    teacher: Annotated[
        Literal["local", "endpoint"],
        typer.Option(help="Who labels: a model that the run trains, or the endpoint in .env."),
    ] = "local",
    task: Annotated[
        Literal["classify", "extract", "generate"] | None,
        typer.Option(
            help="What an answer is: a class, fields or text; by default a class, or fields where "
            "the answers are JSON objects."
        ),
    ] = None,
    test: Annotated[
        list[Path],
        typer.Option(
            help="A file of rows for the test alone; repeat it for several. By default some rows "
            "of DATA are held out.",
            metavar="FILE",
        ),
    ] = [],  # noqa: B006
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Look at the rows in DATA and write a recipe for them.

    Says what is in the rows, which of them to mend and what was chosen. Bad rows don't keep the
    recipe from being written.
    """
    from distillery.new_recipe import new_recipe

    for line in new_recipe(data, out, name, text, label, teacher, force, task, test):
        print(line)


@app.command()
def check(recipe: RecipeArgument) -> None:
    """Check that a run of RECIPE on this machine has all it needs.

    Reads the rows, asks the teacher one question and looks at base models, disk, memory, stores and
    registry. Exits with 1 if something is missing.
    """
    from distillery import readiness
    from distillery.recipe import load_recipe

    findings = readiness.check(load_recipe(recipe))
    for finding in findings:
        print(finding)
    if any(finding.level == "FAIL" for finding in findings):
        raise typer.Exit(1)


@app.command()
def quote(recipe: RecipeArgument) -> None:
    """Estimate what labelling for RECIPE, and its judge, cost and how long they take.

    Nobody is asked.
    """
    from distillery.labels.quote import quote_recipe
    from distillery.recipe import load_recipe

    for split, quoted in quote_recipe(load_recipe(recipe)).items():
        print(f"{split}: {quoted.line()}")


@app.command()
def serve(
    folder: Annotated[
        Path,
        typer.Argument(help="The folder of an exported or downloaded model.", metavar="FOLDER"),
    ],
    name: Annotated[str, typer.Option(help="The model's name in requests.")] = "student",
    host: Annotated[
        str,
        typer.Option(
            help="The address to listen on. Other machines can reach all but loopback addresses, "
            "so those need a key."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="The port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 8080,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of one operation; by default as many as cores.", min=1),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name that clients reach the server by, beside localhost, this machine's own "
            "name and addresses. May be given several times. Other names are refused, since a web "
            "page can give any name to this server.",
            metavar="NAME",
        ),
    ] = None,
    shared_prefix: Annotated[
        Literal["on", "off"] | None,
        typer.Option(
            help="Whether a prompt goes on from what it shares with the one before, which is "
            "faster; but the time that an answer takes then tells a client how its prompt begins "
            "beside another client's. By default on for a loopback address, off for others.",
        ),
    ] = None,
    queue: Annotated[
        int,
        typer.Option(
            help="Requests that wait for their answers; more are told when to come again.", min=1
        ),
    ] = 1024,
    answer_seconds: Annotated[
        float,
        typer.Option(help="Seconds until an answer, its wait included, is given up.", min=1),
    ] = 600.0,
) -> None:
    """Serve the model in FOLDER as an OpenAI-compatible endpoint, /v1/chat/completions.

    Clients must send the key in DISTILLERY_SERVER_KEY, if it is set.
    """
    from distillery.serving import server
    from distillery.serving.limits import for_queue

    server.serve(
        folder,
        name,
        host,
        port,
        server.key_from_environment(),
        threads=threads,
        hosts=allow_host or (),
        limits=for_queue(queue, answer_seconds),
        shared_prefix=None if shared_prefix is None else shared_prefix == "on",
    )


class AskCommand(TyperCommand):
    """Takes `--options A B C`, since click knows no option with any number of values, and a
    question or an option's text that begins with a minus."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        takes_value: dict[str, bool] = {}
        for parameter in self.get_params(ctx):
            if parameter.param_type_name == "option":
                for name in parameter.opts:
                    takes_value[name] = not getattr(parameter, "is_flag", False)
        given: list[str] = []
        questions: list[str] = []
        lists: list[list[str]] = []
        in_list = False
        rest = iter(args)
        for argument in rest:
            name = argument.partition("=")[0]
            if argument == "--":
                questions += rest
            elif argument == "--options":
                lists.append([])
                in_list = True
            elif name in takes_value:
                in_list = False
                given.append(argument)
                if takes_value[name] and name == argument:
                    given += islice(rest, 1)
            elif in_list:
                lists[-1].append(argument)
            elif argument.startswith("-") and not re.fullmatch(r"--?[a-z][\w-]*(=.*)?", argument):
                # No option is written so: a question. A mistyped option is left to click.
                questions.append(argument)
            else:
                given.append(argument)
        if not all(lists):
            raise typer.BadParameter("--options: give at least one text after it", ctx=ctx)
        for text in chain.from_iterable(lists):
            given += ["--options", text]
        return super().parse_args(ctx, [*given, "--", *questions] if questions else given)


@app.command(cls=AskCommand)
def ask(
    folder: Annotated[
        Path,
        typer.Argument(help="The folder of an exported or downloaded model.", metavar="FOLDER"),
    ],
    question: Annotated[
        str | None,
        typer.Argument(
            help="The question; without it, each line that is typed or piped in is one, until "
            "Ctrl+D.",
            metavar="[QUESTION]",
        ),
    ] = None,
    options: Annotated[
        list[str],
        typer.Option(help="Choose from these texts; give them last.", metavar="TEXT TEXT..."),
    ] = [],  # noqa: B006
    adapter: Annotated[
        Literal["on", "off"],
        typer.Option(help="off leaves the adapter beside the model aside: the base model answers."),
    ] = "on",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="The recipe with the prompt of a model that was exported, but not registered.",
            metavar="RECIPE",
        ),
    ] = None,
    system: Annotated[str, typer.Option(help="A system message, for generated text.")] = "",
    max_length: Annotated[
        int | None,
        typer.Option(help="The most tokens of prompt and answer together.", min=1),
    ] = None,
    do_sample: Annotated[
        bool, typer.Option("--do-sample", help="Draw the tokens, instead of the likeliest ones.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="With --do-sample; by default 1.", min=0.01, max=5)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="With --do-sample, the probability to draw from.", min=0.01, max=1),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="With --do-sample, how many tokens to draw from.", min=1)
    ] = None,
    random_seed: Annotated[
        int | None, typer.Option(help="With --do-sample, for the same answer again.", min=0)
    ] = None,
) -> None:
    """Ask the model in FOLDER a question.

    With --options, it prints the probability of each of these texts, asked with the prompt that the
    model was trained with; for a classifier, that of each class. A student that writes its answers
    is asked with its prompt too, and held to its schema. Otherwise the question is sent as it is.
    Text is printed as it is generated. Tokens a second come last, on standard error. Each question
    stands alone.
    """
    drawn = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "random_seed": random_seed,
    }
    given = {name: value for name, value in drawn.items() if value is not None}
    if given and not do_sample:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise typer.BadParameter(f"{names}: need --do-sample; add it, or leave them out")

    from distillery.serving import ask as terminal

    search = terminal.SearchOptions.model_validate(
        {"max_length": max_length, "do_sample": do_sample, **given}
    )
    asker = terminal.Asker(
        folder,
        options=options,
        system=system,
        search=search,
        adapter=adapter == "on",
        recipe=recipe,
    )
    terminal.ask(asker, question)


@app.command()
def base(
    name: Annotated[
        str,
        typer.Argument(
            help="A base model as student.base.model in a recipe: a hub id, a folder, a GGUF file, "
            "package:NAME or azureml://registries/REGISTRY/models/NAME/versions/VERSION.",
            metavar="NAME",
        ),
    ],
) -> None:
    """Download the base model NAME, or convert it from GGUF, and print its folder."""
    from distillery.models.base import base_folder

    # How far a download is.
    told = logging.getLogger("distillery.models")
    told.addHandler(logging.StreamHandler())
    told.setLevel(logging.INFO)
    recipe = parse_recipe({"student": {"base": {"model": name}}}, "distillery base")
    print(base_folder(recipe.student.base))


@app.command()
def trace(
    name: Annotated[
        str | None,
        typer.Argument(help="The model's name. With --row, all models by default.", metavar="NAME"),
    ] = None,
    version: Annotated[
        str | None,
        typer.Argument(
            help="The version; by default the champion, else the newest.", metavar="VERSION"
        ),
    ] = None,
    row: Annotated[
        str | None,
        typer.Option(help="List what the versions did with the row of this id.", metavar="ID"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    registry: RegistryOption = "local",
) -> None:
    """Show where a registered version comes from: rows, labels, cost, runs and files.

    With --row, go from a row to the versions that it trained. `python -m flows.reproduce` makes a
    version again.
    """
    from distillery.registry import trace as lineage

    opened = open_registry_of_kind(registry)
    if row is not None and version is None:
        uses = lineage.trace_row(opened, row, name)
        listed = json.dumps([use.model_dump() for use in uses], indent=1)
        print(listed if as_json else lineage.render_row(row, uses))
        return
    if row is not None or name is None:
        raise typer.BadParameter("give NAME [VERSION], or --row ID [NAME]")
    found = lineage.trace(opened, opened.get(name, version))
    print(found.model_dump_json(indent=1) if as_json else lineage.render_trace(found))


@app.command()
def report(
    run: Annotated[
        str | None,
        typer.Argument(help="The run's name; by default that of the last run.", metavar="[RUN]"),
    ] = None,
) -> None:
    """Print where the page of a run is: a file for any browser.

    It is fetched from the store that DISTILLERY_STORE names.
    """
    from distillery.report.kept import page_of_run
    from distillery.storage.artifacts import ArtifactStore

    print(page_of_run(ArtifactStore(), run))


@models.command("list")
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


@models.command("promote")
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


@models.command("rollback")
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


@models.command("unpin")
def unpin_model(
    name: NameArgument, reason: ReasonOption = "", registry: RegistryOption = "local"
) -> None:
    """Let runs promote any version of the model NAME again that passes the gate."""
    open_registry_of_kind(registry).unpin(name, user(), reason)
    print(f"{name}: no champion is pinned")


@models.command("history")
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


@models.command("download")
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


@models.command("foundry")
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


@models.command("compare")
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


@models.command("sign")
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


@labels.command("list")
def list_teachers() -> None:
    """List the teachers: answers, answers rejected as labels, and the teacher's name.

    What they have cost is told by `distillery labels costs`.
    """
    from distillery.labels.store import LabelStore

    with LabelStore(recovers=False) as answers:
        for teacher, count, rejected in answers.summary():
            print(f"{count:>9} answers  {rejected:>7} rejected  {teacher}")


@labels.command("costs")
def show_costs(
    by: Annotated[
        Literal["teacher", "run", "week", "purpose", "outcome", "recipe"],
        typer.Option(help="What a line stands for; a week begins on Monday, in UTC."),
    ] = "teacher",
    since: Annotated[
        datetime | None,
        typer.Option(help="Count the calls from this day on, in UTC.", formats=["%Y-%m-%d"]),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON array, for programs.")
    ] = False,
) -> None:
    """Show what teachers and judges have cost: calls, tokens and money, from the ledger.

    The ledger has every call that may be billed, also those that failed. Where the endpoint gave no
    count of a call's tokens they are estimated, and the call is counted as estimated too. What was
    asked before there was a ledger is in it as far as answers are stored, without runs and recipes.
    A run stands here by the id of its flow run; `prefect flow-run inspect ID` tells its name.
    """
    from contextlib import closing

    from distillery.storage.database import Database
    from distillery.teacher.ledger import CALLS, costs_table, totals, weekly_totals

    first = since.replace(tzinfo=UTC) if since else None
    with closing(Database()) as database:
        if by == "week":
            found = weekly_totals(database, first)
        else:
            conditions = [] if first is None else [CALLS.c.called_at >= first]
            found = totals(database, (by,), *conditions)
    if as_json:
        fields = {by, "calls", "estimated", "usage", "cost", "currency"}
        print(json.dumps([each.model_dump(include=fields) for each in found], indent=1))
    else:
        print(costs_table(by, found))


@labels.command("export")
def export_labels(
    file: Annotated[Path, typer.Argument(help="The file to write.", metavar="FILE")],
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Export this teacher's answers only; a name of `distillery labels list`."
        ),
    ] = None,
    form: Annotated[
        Literal["parquet", "messages", "question-answer"],
        typer.Option(
            "--format",
            help="parquet: all that is kept of the answers, for `import`. messages and "
            "question-answer: the labels as training rows, in JSON lines, for other programs.",
        ),
    ] = "parquet",
) -> None:
    """Write the answers to a file."""
    from distillery.labels.store import LabelStore

    with LabelStore(recovers=False) as answers:
        if form == "parquet":
            count = answers.export(file, teacher)
        else:
            count = answers.export_rows(file, form, teacher)
    print(f"{count} answers written to {file}")


@labels.command("import")
def import_labels(
    file: Annotated[
        Path, typer.Argument(help="A Parquet file of `distillery labels export`.", metavar="FILE")
    ],
) -> None:
    """Add the answers in FILE to the database. Answers that are known already stay as they are."""
    from distillery.labels.store import LabelStore

    with LabelStore() as answers:
        print(f"{answers.load(file)} new answers")


@labels.command("delete")
def delete_labels(
    row: Annotated[
        list[str],
        typer.Option(help="Delete the answers to the row with this id; repeatable.", metavar="ID"),
    ] = [],  # noqa: B006
    containing: Annotated[
        list[str],
        typer.Option(help="Delete answers with this text in prompt or answer; repeatable."),
    ] = [],  # noqa: B006
    rejected: Annotated[
        bool, typer.Option("--rejected", help="Delete the answers that were rejected as labels.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count the answers, but delete none.")
    ] = False,
) -> None:
    """Delete answers by row, by text or because they were rejected.

    Artifacts made from them stay in the store until no registered model and no kept run needs them;
    then `distillery store gc` removes them. Journals that dead runs left on this machine are taken
    in before; files that may still hold answers are named.
    """
    from distillery.labels.journal import left_beside
    from distillery.labels.store import LabelStore

    if not (row or rejected or any(containing)):
        raise typer.BadParameter("say which answers: --row, --containing or --rejected")
    with LabelStore() as answers:
        count = answers.delete(row, containing, rejected, dry_run)
    print(f"{count} answers {'would be ' if dry_run else ''}deleted")
    for path in left_beside(answers.database):
        print(f"{path}: may hold answers too, of a run under way or that could not be taken in")


@labels.command("recover")
def recover_answers(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is there, but take nothing in.")
    ] = False,
) -> None:
    """Take in what runs on this machine that were killed, or whose database stayed away, have left.

    A run does the same when it starts. Prints one line per journal: answers, calls, calls that were
    lost, and lines that can't be taken in; these are kept in a file beside. A journal that can't be
    taken in stays, and one of another label database is named. The exit status is 1 if a journal
    of this database can't be taken in.
    """
    from distillery.labels.journal import examine, of_other_databases
    from distillery.labels.store import LabelStore

    with LabelStore(recovers=not dry_run) as answers:
        found = examine(answers.database) if dry_run else answers.recovered
        others = of_other_databases(answers.database)
    for journal in found:
        print(journal.line())
    for path in others:
        print(f"{path}: of another label database than DISTILLERY_LABELS names")
    readable = [journal for journal in found if not journal.trouble]
    taken_in = sum(journal.answers for journal in readable)
    would = "would be " if dry_run else ""
    print(f"{taken_in} answers {would}taken in from {len(readable)} journals")
    if len(readable) < len(found):
        raise StoreError(f"{len(found) - len(readable)} journals can't be taken in; see above")


@labels.command("batches")
def list_batches(
    forget: Annotated[
        str | None,
        typer.Option(
            help="Give a batch up: its requests are asked again, and its cost counts as the most "
            "that it can be.",
            metavar="ID",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON array, for programs.")
    ] = False,
) -> None:
    """List the batches that teachers were sent, the newest first: when, state, requests left of
    those sent, the most that these cost, and the batch's ids here and at the service.

    State: intended and uploaded are on their way; submitted, with the service's word, is under way;
    ended holds answers that a run is to take in; collected holds none.
    """
    from distillery.labels.batch_book import BatchBook
    from distillery.labels.batch_run import give_up_batch

    with BatchBook() as book:
        if forget is not None:
            print(f"{give_up_batch(book, forget)} requests will be asked again")
            return
        found = book.all_batches()
    if as_json:
        listed = [{**asdict(batch), "left": left} for batch, left in found]
        print(json.dumps(listed, indent=1, default=str))
        return
    for batch, left in found:
        state = f"{batch.state} ({batch.status})" if batch.status else batch.state
        cost = "" if batch.cost is None else f"{batch.cost * left / max(batch.lines, 1):.2f}"
        print(
            f"{batch.created_at:%Y-%m-%d %H:%M}  {state:<24} {left:>7} of {batch.lines:>6} left  "
            f"{cost:>8}  {batch.teacher}  {batch.batch_id}  {batch.service_id}".rstrip()
        )


@store.command("list")
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


@store.command()
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


@store.command("export")
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


@store.command()
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


def main() -> None:
    """Run the command line. An error that users can mend is one line on stderr and exit code 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
