"""The command line: what is done before and after a run. Runs are started by `python -m
flows.distill`.

Help texts and docstrings of commands are what `--help` and the reference show. Heavy libraries are
imported inside the commands, so that `--help` answers at once.
"""

import json
import logging
import os
import re
import sys
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from distillery.commands import labels, models, store
from distillery.commands.models import RegistryOption, open_registry_of_kind
from distillery.errors import DistilleryError
from distillery.recipe import TaskKind, parse_recipe

app = typer.Typer(
    help="Write a recipe, check, quote, report, serve and ask, and manage models, labels and the "
    "artifact store.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(store.app, name="store")
app.add_typer(models.app, name="models")
app.add_typer(labels.app, name="labels")

RecipeArgument = Annotated[
    str, typer.Argument(help="A preset (demo or lab) or a YAML file.", metavar="RECIPE")
]


@app.command()
def new(
    data: Annotated[
        list[Path],
        typer.Argument(
            help="CSV, JSONL or Parquet files of texts and labels or answers, which may be empty; "
            "with options, where each row has its own.",
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
        TaskKind | None,
        typer.Option(
            help="What an answer is: one of the row's options, a class, fields or text; by default "
            "a class, or an option where rows have options, or fields where the answers are JSON "
            "objects."
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
    without_bad_rows: Annotated[
        bool,
        typer.Option(
            "--without-bad-rows",
            help="Make the recipe for copies without bad rows: NAME-good.csv beside NAME.csv. The "
            "bad rows go to NAME-bad.jsonl, each with its reason.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Look at the rows in DATA and write a recipe for them.

    Says what is in the rows, which of them to mend and what was chosen. Bad rows don't keep the
    recipe from being written, but a run stops at them. The files in DATA stay as they are.
    """
    from distillery.new_recipe import new_recipe

    for line in new_recipe(
        data, out, name, text, label, teacher, force, task, test, without_bad_rows
    ):
        print(line)


@app.command()
def check(recipe: RecipeArgument) -> None:
    """Check that a run of RECIPE on this machine has all it needs.

    Reads the rows, asks the teacher one question and looks at base models, disk, memory, stores and
    registry. Exits with 1 if something is missing.
    """
    from distillery import readiness
    from distillery.recipe import load_recipe

    # Creating the registry takes seconds; say so.
    show_progress("distillery.registry.local")
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
    drain_seconds: Annotated[
        float,
        typer.Option(
            help="Seconds in which requests that are there are answered when the server is stopped "
            "by a signal.",
            min=0,
        ),
    ] = 30.0,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens that a request's messages and its answer may have together; by default "
            "what the model takes.",
            min=2,
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            help="Texts that are generated at once; others wait. Each takes memory for its tokens.",
            min=1,
        ),
    ] = 16,
    processes: Annotated[
        int,
        typer.Option(
            help="Processes that answer, each with the model and a queue of its own; give each a "
            "part of the cores by --threads.",
            min=1,
        ),
    ] = 1,
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
        limits=for_queue(
            queue, answer_s=answer_seconds, drain_s=drain_seconds, batch=batch, context=context
        ),
        shared_prefix=None if shared_prefix is None else shared_prefix == "on",
        processes=processes,
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
    show_progress("distillery.models")
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


def show_progress(package: str) -> None:
    """Print on stderr what a package logs of its progress."""
    told = logging.getLogger(package)
    told.addHandler(logging.StreamHandler())
    told.setLevel(logging.INFO)


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
