"""Answer a file of rows with a registered student: the flow that a CPU pool runs.

`python -m flows.batch_inference support-mood rows.jsonl answers` writes answers/predictions.jsonl and failed.jsonl.
"""

import shutil
import sys
from pathlib import Path
from typing import Literal

from prefect import flow

from distillery.errors import DataError, DistilleryError
from distillery.recipe import Columns, PromptRecipe, RegistryRecipe
from distillery.records import InputFile, Predictions
from distillery.registry import open_registry
from distillery.store import ArtifactStore, sha256_of, working_folder
from tasks.inference import fetch_input, score
from tasks.results import results_in_store
from tasks.stage import RESULT, tidy_logs


@flow(name="batch-inference", description="Scores a file of rows with a registered student.", **RESULT)
def batch_inference(
    model_name: str,
    input_uri: str,
    output: str = "",
    version: str | None = None,
    registry: Literal["local", "azureml"] = "local",
    columns: Columns = Columns(),  # noqa: B008 - frozen, and Prefect shows it as the form's default
) -> Predictions:
    """Writes an answer with probabilities for each row; rows that can't be asked go to a file of their own.

    Args:
        model_name: The registered model.
        input_uri: A JSONL, CSV or Parquet file: a path or an fsspec URL.
        output: A folder for predictions.jsonl and failed.jsonl; they are in the artifact store in any case.
        version: The model's version; the champion where not given.
        registry: Where the model is registered.
        columns: Which column of the file holds what.
    """
    tidy_logs()
    place = open_registry(RegistryRecipe(kind=registry, model_name=model_name))
    model = place.get(model_name, version)
    # The prompt comes with the model: it is asked as it was trained.
    prompt = PromptRecipe.model_validate(place.provenance(model)["provenance"]["prompt"])
    with working_folder("input") as folder:
        digest = sha256_of(fetch_input(input_uri, folder))
    predictions = score(model, prompt, InputFile(uri=input_uri, sha256=digest), columns)
    if output:
        try:
            shutil.copytree(ArtifactStore().fetch(predictions.artifact), output, dirs_exist_ok=True)
        except (OSError, shutil.Error) as error:
            raise DataError(f"output {output}: can't be written; the answers are in the artifact store") from error
    return predictions


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print("usage: python -m flows.batch_inference MODEL INPUT OUTPUT_FOLDER", file=sys.stderr)
        return 2
    try:
        rows = arguments[1] if "://" in arguments[1] else str(Path(arguments[1]).absolute())
        with results_in_store():
            done = batch_inference(arguments[0], rows, str(Path(arguments[2]).absolute()))
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{done.rows} rows answered in {arguments[2]}/predictions.jsonl, {done.failed} set aside in failed.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
