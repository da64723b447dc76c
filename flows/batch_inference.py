"""Answer rows with a registered student: the flow that a CPU pool runs.

`python -m flows.batch_inference support-mood rows.jsonl answers` writes the answers to
answers/predictions.jsonl and the rows that can't be asked to answers/failed.jsonl. Rows that are
more than a shard are answered shard by shard, here, in processes, or on a work pool: the files are
the same.
"""

import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any, get_args

from prefect import flow
from pydantic import PositiveInt

from distillery.errors import DataError, DistilleryError
from distillery.inference.batch import count_rows
from distillery.inference.shards import Answers, Form, write_output
from distillery.models.class_tokens import FILE as CLASS_TOKENS_FILE
from distillery.recipe import Columns, PromptRecipe, RegistryKind, RegistryRecipe
from distillery.records import (
    FORMAT_FILE,
    Predictions,
    RegisteredModel,
    ShardedRows,
)
from distillery.registry.manifest import columns_in, prompt_in
from distillery.registry.open import open_registry
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.output import Output, without_secrets
from distillery.storage.shards import SHARD_ROWS, read_list
from distillery.storage.working import working_folder
from tasks.children import Children, DeploymentRuns, LocalProcesses
from tasks.inference import fetched, input_files, is_pattern, score
from tasks.progress import conclude, shown_as_stage
from tasks.results import results_in_store
from tasks.shard_work import ShardsJob, ShardWork, answer_by, answer_here
from tasks.shards import answer_shard, answering, cut_rows, gather
from tasks.stage import RESULT, begin, cached_records, is_cached
from tasks.terminal import shown_in_terminal


@flow(name="batch-inference", description="Scores rows with a registered student.", **RESULT)
def batch_inference(
    model_name: str,
    input_uri: str,
    output: str = "",
    version: str | None = None,
    registry: RegistryKind = "local",
    columns: Columns | None = None,
    form: Form = "jsonl",
    processes: PositiveInt = 1,
    shards_deployment: str | None = None,
    child_runs: PositiveInt | None = None,
    shard_rows: PositiveInt = SHARD_ROWS,
) -> Predictions:
    """Write an answer with probabilities for each row, and the rows that can't be asked apart.

    Args:
        model_name: The registered model.
        input_uri: A JSONL, CSV or Parquet file: a path or an fsspec URL; or several of them, as a
            local folder, a pattern, or a URL with *. A worker opens what its
            DISTILLERY_DATA_FOLDERS and DISTILLERY_DATA_PROTOCOLS allow.
        output: A folder for the answers, which the artifact store keeps too: a path or an fsspec
            URL. A worker writes into a new or empty folder below its DISTILLERY_DATA_FOLDERS, or
            below an address in its DISTILLERY_DATA_PROTOCOLS.
        version: The model's version; by default the champion.
        registry: Where the model is registered.
        columns: Which column of the file holds what; by default as in the model's own recipe.
        form: What is written to the output, jsonl for predictions.jsonl and failed.jsonl, parquet
            for answers-NNNNN.parquet with a manifest.json.
        processes: How many processes of this machine answer, where there is more than a shard.
        shards_deployment: The deployment whose work pool answers the shards, such as
            answer-shards/cpu, in place of processes of this machine.
        child_runs: How many runs of it are at work or wait at once; by default one for each of its
            pool's workers.
        shard_rows: Rows of a shard, which is answered and cached as a whole; fewer where one row
            takes long.
    """
    begin()
    target = Output(output, "output") if output else None
    source = open_registry(RegistryRecipe(kind=registry, model_name=model_name))
    model = source.get(model_name, version)
    # The prompt comes with the model: it is asked as it was trained.
    manifest = source.provenance(model)
    made = manifest["provenance"]
    title = f"{model.name} version {model.version}"
    own_columns, fields = columns_in(made, title)
    columns = columns or own_columns
    if columns is None or not made.get("prompt"):
        raise DataError(
            f"{title}: its manifest.json tells no prompt or no columns; run its recipe again"
        )
    prompt = prompt_in(made, title, classify=True)
    if target:
        target.try_writing()
    started = time.perf_counter()
    how = (columns, fields, answers_of(manifest), shard_rows)
    if is_pattern(input_uri):
        files = input_files(input_uri)
        names = tuple(each.name for each in files)
        rows = cut_rows(tuple(each.file for each in files), names, *how)
    else:
        with fetched(input_uri) as (file, copy):
            asked: dict[str, Any] = {"model": model, "prompt": prompt, "rows": file}
            asked |= {"columns": columns, "fields": fields or None}
            if form == "jsonl" and (
                count_rows(copy, shard_rows + 1) <= shard_rows or is_cached(score, **asked)
            ):
                predictions: Predictions = score(**asked)
                hand_out(predictions, form, target)
                return predictions
            rows = cut_rows((file,), (), *how)
    predictions = answer_rows(
        model, prompt, rows, processes, shards_deployment, child_runs, started
    )
    hand_out(predictions, form, target)
    return predictions


def answers_of(manifest: dict[str, Any]) -> Answers:
    """Return what a model answers with, as its files say."""
    files = {entry["path"] for entry in manifest["files"]}
    if FORMAT_FILE in files:
        return "texts"
    return "classes" if CLASS_TOKENS_FILE in files else "options"


def answer_rows(
    model: RegisteredModel,
    prompt: PromptRecipe,
    rows: ShardedRows,
    processes: int,
    deployment: str | None,
    child_runs: int | None,
    started: float,
) -> Predictions:
    """Answer all shards, those that have no answers yet, and store the answers as one folder."""
    shards = read_list(rows.artifact, ArtifactStore())
    job = ShardsJob(model=model, prompt=prompt, rows=rows)
    work = ShardWork(job, shards, cached_records(answer_shard))
    with (
        shown_as_stage("answer rows") as progress,
        working_folder("children") as folder,
    ):
        work.look(range(len(shards)))
        kept = len(work.answers)

        def show(done: int) -> None:
            progress.show(done, rows.rows, "rows", f"{kept} shards from the cache" if kept else "")

        show(work.rows_done)
        children: Children | None = None
        if len(work.answers) < len(shards):
            if deployment is not None:
                children = DeploymentRuns(deployment, child_runs)
            elif processes > 1:
                children = LocalProcesses(processes, "flows.answer_shards", folder)
        with answering(told=lambda done: show(work.rows_done + done)):
            if children is None:
                answer_here(work, show)
            else:
                answer_by(children, work, progress)
        answers = [work.answers[number] for number in range(len(shards))]
        predictions = gather(shards, answers, model, started)
        conclude(
            f"{predictions.rows} rows answered, {predictions.failed} set aside, in "
            f"{predictions.seconds:.1f} s; {kept} of {len(shards)} shards from the cache"
        )
    return predictions


def hand_out(predictions: Predictions, form: Form, target: Output | None) -> None:
    """Write the answers to the folder that the user named, if any."""
    if target:
        write_output(ArtifactStore().fetch(predictions.artifact), form, target)


def main(arguments: list[str]) -> int:
    """Answer rows here; return 0 when they are answered, 1 after one line on what the user can
    mend."""
    parser = ArgumentParser(
        "python -m flows.batch_inference", description="Answers rows with a registered student."
    )
    parser.add_argument("model", help="the registered model's name")
    parser.add_argument(
        "input",
        help="a JSONL, CSV or Parquet file: a path or an fsspec URL; or several of them: a folder, "
        "a pattern in quotes, or a URL with *",
    )
    parser.add_argument("output", help="a folder for the answers: a path or an fsspec URL")
    parser.add_argument("--version", help="by default the champion")
    parser.add_argument("--registry", choices=get_args(RegistryKind), default="local")
    parser.add_argument(
        "--form",
        choices=get_args(Form),
        default="jsonl",
        help="predictions.jsonl and failed.jsonl, or Parquet files with a manifest.json",
    )
    parser.add_argument(
        "--processes", type=count, default=1, help="processes that answer at once; by default 1"
    )
    parser.add_argument(
        "--shards-deployment",
        help="a deployment whose work pool answers, such as answer-shards/cpu",
    )
    parser.add_argument(
        "--shard-rows",
        type=count,
        default=SHARD_ROWS,
        help=f"rows that are answered and cached as a whole; by default {SHARD_ROWS}",
    )
    given = parser.parse_args(arguments)
    rows, out = map(absolute, (given.input, given.output))
    try:
        with shown_in_terminal([]), results_in_store():
            done = batch_inference(
                given.model,
                rows,
                out,
                given.version,
                given.registry,
                form=given.form,
                processes=given.processes,
                shards_deployment=given.shards_deployment,
                shard_rows=given.shard_rows,
            )
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shown = without_secrets(given.output) if "://" in given.output else given.output
    if given.form == "parquet":
        print(f"{done.rows} rows answered in {shown}, {done.failed} set aside there")
    else:
        print(
            f"{done.rows} rows answered in {shown}/predictions.jsonl, "
            f"{done.failed} set aside in failed.jsonl"
        )
    return 0


def absolute(address: str) -> str:
    """Return a URL as it is, and a path as an absolute one."""
    return address if "://" in address else str(Path(address).absolute())


def count(text: str) -> int:
    """Return a whole number from 1 on. Raises ValueError."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
