"""`distillery labels`: the label database."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from distillery.errors import StoreError

app = typer.Typer(
    help="List, export, import and delete the teacher's answers, and show what they cost. They are "
    "kept in the database that DISTILLERY_LABELS names.",
    no_args_is_help=True,
)


@app.command("list")
def list_teachers() -> None:
    """List the teachers: answers, answers rejected as labels, and the teacher's name.

    What they have cost is told by `distillery labels costs`.
    """
    from distillery.labels.store import LabelStore

    with LabelStore(recovers=False) as answers:
        for teacher, count, rejected in answers.summary():
            print(f"{count:>9} answers  {rejected:>7} rejected  {teacher}")


@app.command("costs")
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


@app.command("export")
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
    from distillery.labels.exports import export_answers, export_rows
    from distillery.labels.store import LabelStore

    with LabelStore(recovers=False) as answers:
        if form == "parquet":
            count = export_answers(answers, file, teacher)
        else:
            count = export_rows(answers, file, form, teacher)
    print(f"{count} answers written to {file}")


@app.command("import")
def import_labels(
    file: Annotated[
        Path, typer.Argument(help="A Parquet file of `distillery labels export`.", metavar="FILE")
    ],
) -> None:
    """Add the answers in FILE to the database. Answers that are known already stay as they are."""
    from distillery.labels.exports import import_answers
    from distillery.labels.store import LabelStore

    with LabelStore() as answers:
        print(f"{import_answers(answers, file)} new answers")


@app.command("delete")
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
    from distillery.labels.journal import left_beside, of_other_databases
    from distillery.labels.store import LabelStore

    if not (row or rejected or any(containing)):
        raise typer.BadParameter("say which answers: --row, --containing or --rejected")
    with LabelStore() as answers:
        count = answers.delete(row, containing, rejected, dry_run)
    print(f"{count} answers {'would be ' if dry_run else ''}deleted")
    for path in left_beside(answers.database):
        print(f"{path}: may hold answers too, of a run under way or that could not be taken in")
    for path in of_other_databases(answers.database):
        print(
            f"{path}: of another label database, or of this one under another address: may hold "
            "answers too, which `distillery labels recover` brings back there"
        )


@app.command("recover")
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
    from contextlib import closing

    from distillery.labels.journal import examine, of_other_databases
    from distillery.labels.store import LabelStore
    from distillery.storage.database import Database

    if dry_run:
        with closing(Database(migrates=False)) as database:
            found, others = examine(database), of_other_databases(database)
    else:
        with LabelStore() as answers:
            found, others = answers.recovered, of_other_databases(answers.database)
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


@app.command("batches")
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
    from distillery.labels.batch_forget import give_up_batch

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
