"""Answer a file of rows with a registered student: the flow that a CPU pool runs.

`python -m flows.batch_inference support-mood rows.jsonl answers` writes the answers to
answers/predictions.jsonl and the rows that can't be asked to answers/failed.jsonl.
"""

import shutil
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import get_args

from prefect import flow

from distillery.errors import DataError, DistilleryError
from distillery.recipe import Columns, RegistryKind, RegistryRecipe
from distillery.records import InputFile, Predictions
from distillery.registry.manifest import columns_in, prompt_in
from distillery.registry.open import open_registry
from distillery.storage.allowed import output_folder
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import sha256_of
from distillery.storage.working import working_folder
from tasks.inference import fetch_input, score
from tasks.results import results_in_store
from tasks.stage import RESULT, begin
from tasks.terminal import PlannedStage, shown_in_terminal


@flow(
    name="batch-inference", description="Scores a file of rows with a registered student.", **RESULT
)
def batch_inference(
    model_name: str,
    input_uri: str,
    output: str = "",
    version: str | None = None,
    registry: RegistryKind = "local",
    columns: Columns | None = None,
) -> Predictions:
    """Write an answer with probabilities for each row, and the rows that can't be asked to another
    file.

    Args:
        model_name: The registered model.
        input_uri: A JSONL, CSV or Parquet file: a path or an fsspec URL. A worker opens what its
            DISTILLERY_DATA_FOLDERS and DISTILLERY_DATA_PROTOCOLS allow.
        output: A folder for predictions.jsonl and failed.jsonl, which the artifact store keeps too.
            A worker writes into a new or empty folder below its DISTILLERY_DATA_FOLDERS.
        version: The model's version; by default the champion.
        registry: Where the model is registered.
        columns: Which column of the file holds what; by default as in the model's own recipe.
    """
    begin()
    # Before any row is answered.
    target = output_folder(output, "output") if output else None
    source = open_registry(RegistryRecipe(kind=registry, model_name=model_name))
    model = source.get(model_name, version)
    # The prompt comes with the model: it is asked as it was trained.
    made = source.provenance(model)["provenance"]
    title = f"{model.name} version {model.version}"
    own_columns, fields = columns_in(made, title)
    columns = columns or own_columns
    if columns is None or not made.get("prompt"):
        raise DataError(
            f"{title}: its manifest.json tells no prompt or no columns; run its recipe again"
        )
    prompt = prompt_in(made, title, classify=True)
    with working_folder("input") as folder:
        digest = sha256_of(fetch_input(input_uri, folder))
    rows = InputFile(uri=input_uri, sha256=digest)
    predictions = score(model, prompt, rows, columns, fields or None)
    if target:
        try:
            shutil.copytree(ArtifactStore().fetch(predictions.artifact), target, dirs_exist_ok=True)
        except (OSError, shutil.Error) as error:
            raise DataError(
                f"output {output}: can't be written; the answers are in the artifact store"
            ) from error
    return predictions


def main(arguments: list[str]) -> int:
    """Answer a file here; return 0 when it is answered, 1 after one line on what the user can
    mend."""
    parser = ArgumentParser(
        "python -m flows.batch_inference", description="Answers a file with a registered student."
    )
    parser.add_argument("model", help="the registered model's name")
    parser.add_argument("input", help="a JSONL, CSV or Parquet file: a path or an fsspec URL")
    parser.add_argument("output", help="a folder for predictions.jsonl and failed.jsonl")
    parser.add_argument("--version", help="by default the champion")
    parser.add_argument("--registry", choices=get_args(RegistryKind), default="local")
    given = parser.parse_args(arguments)
    rows = given.input if "://" in given.input else str(Path(given.input).absolute())
    out = Path(given.output).absolute()
    try:
        with shown_in_terminal([PlannedStage("score", "score")]), results_in_store():
            done = batch_inference(given.model, rows, str(out), given.version, given.registry)
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{done.rows} rows answered in {given.output}/predictions.jsonl, "
        f"{done.failed} set aside in failed.jsonl"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
