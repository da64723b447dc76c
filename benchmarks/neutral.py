"""What a neutral judge finds: `make neutral MODEL=NAME [VERSION=N]`, or `python -m
benchmarks.neutral NAME [VERSION]`.

EleutherAI's lm-evaluation-harness 0.4.13 asks a registered student the test rows of its run, as
multiple choice over the letters, or over the tokens of the classes: the float student by its `hf`
reader in float32 on the CPU, and the exported one by its `onnxruntime-genai` reader. It runs in an
environment of its own, .venv-neutral, and knows nothing of Distillery: its task holds the prompts
as texts, the letters or tokens and the gold answers. Its answers are compared row by row with those
that the run itself recorded.

The reader needs the logits of all tokens. A model that was exported without export.all_logits is
exported again with it, from the same weights; whether they are the same bit by bit is told.

What the harness was given and what it found stays in .distillery/bench/neutral/NAME-VERSION. The
last line is JSON; NAME_ is student_ for the float student and exported_ for the exported one:

rows              rows that were asked
left_out          rows whose prompts the run itself did not ask, because they are too long
NAME_ours         accuracy (0 to 1) on these rows by the run's own answers
NAME_theirs       accuracy as the harness reports it
NAME_otherwise    rows that the two answer with different letters
same_weights      whether the model that was asked has the weights of the registered one
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distillery.data.examples import read_examples
from distillery.errors import DataError, DistilleryError, ModelError, RecipeError
from distillery.evaluation.report import ANSWERS_FILE, read_answers
from distillery.evaluation.scoreboard import FLOAT, plain_table
from distillery.evaluation.scoring import ModelToScore
from distillery.export.ladder import LADDER_FILE, build_rung, write_prompts
from distillery.models.class_tokens import read_class_tokens
from distillery.models.load import load_tokenizer
from distillery.progress import show_nothing
from distillery.prompts import TransformersTokenizer, letter_ids, render_messages
from distillery.recipe import (
    BaseModelRecipe,
    ExportForm,
    ExportRecipe,
    PromptRecipe,
    RegistryKind,
    RegistryRecipe,
)
from distillery.records import (
    EvaluationReport,
    Example,
    Ladder,
    PreparedDataset,
    StudentCheckpoint,
)
from distillery.registry.open import open_registry
from distillery.storage.artifacts import ArtifactStore
from tasks.scored_models import float_student

PROJECT = Path(__file__).resolve().parents[1]
HARNESS = PROJECT / ".venv-neutral" / "bin" / "python"
WORK = PROJECT / ".distillery" / "bench" / "neutral"
TASK = "distillery_test_rows"
EXPORT_MINUTES = 60
LISTED_ROWS = 20

Answers = Mapping[str, Mapping[str, str | None]]
"""The lines of an answers.jsonl by example_id, each the letter of each predictor."""


class Found(NamedTuple):
    """What the harness found of one model: its accuracy (0 to 1), and for each example_id the
    log-likelihood of each letter."""

    accuracy: float
    loglikelihoods: dict[str, dict[str, float]]

    def letter(self, example_id: str) -> str:
        """Return the most probable letter of a row, the first of equals."""
        scores = self.loglikelihoods[example_id]
        return max(scores, key=scores.__getitem__)


def judge(name: str, version: str | None, kind: RegistryKind) -> dict[str, Any]:
    """Ask a registered model and its float student, print how the answers compare, and return the
    figures."""
    if not HARNESS.is_file():
        raise ModelError(f"{HARNESS}: not there; run `make neutral`, which sets it up")
    registry = open_registry(RegistryRecipe(kind=kind, model_name=name))
    model = registry.get(name, version)
    facts = registry.provenance(model)["provenance"]
    prompt = PromptRecipe.model_validate(facts["prompt"])
    if prompt.answer == "text" or (prompt.answer == "class" and prompt.pooling != "last"):
        raise RecipeError(
            f"{model.name} version {model.version}: its prompt.answer is {prompt.answer}, whose "
            "scores the harness weighs otherwise; name a model that answers by letters or classes"
        )
    work = WORK / f"{model.name}-{model.version}"
    shutil.rmtree(work, ignore_errors=True)
    registered = registry.download(model, work / "registered")
    form = delivered_form(registered, facts["recipe"]["export"])

    store = ArtifactStore()
    # The registered folder has the exported student's answers alone.
    report = EvaluationReport.model_validate(facts["evaluation"])
    answers = read_answers(store.fetch(report.artifact) / ANSWERS_FILE)
    candidate = report.candidate
    data = PreparedDataset.model_validate(facts["data"])
    student = student_of(StudentCheckpoint.model_validate(facts["student"]), store)
    raw = load_tokenizer(Path(student.folder), student.remote_code)
    tokenizer = TransformersTokenizer(raw)
    classes = read_class_tokens(Path(student.adapter or student.folder))
    texts = {}
    if classes:
        for label, token in zip(classes.classes, classes.tokens, strict=True):
            texts[label] = raw.decode([token])
    all_rows = read_examples(rows_file(store, data, "test"))
    examples = asked_rows(all_rows, answers, (FLOAT, candidate))
    task = write_task(examples, prompt, tokenizer, work / "task", texts)
    exported = registered
    if not form.all_logits:
        exported = work / "exported"
        train = rows_file(store, data, "train")
        export_with_all_logits(student, form, prompt, train, exported)

    found = {FLOAT: ask_harness("hf", float_arguments(student), task, work / "student")}
    onnx_arguments = {"pretrained": str(exported)}
    found[candidate] = ask_harness("onnxruntime-genai", onnx_arguments, task, work / "onnx")
    print(comparison_table(examples, answers, found))
    for name in found:
        print_otherwise(name, examples, answers, found[name])
    return {
        "rows": len(examples),
        "left_out": len(all_rows) - len(examples),
        **figures("student", FLOAT, examples, answers, found[FLOAT]),
        **figures("exported", candidate, examples, answers, found[candidate]),
        "same_weights": weights(exported) == weights(registered),
    }


def student_of(checkpoint: StudentCheckpoint, store: ArtifactStore) -> ModelToScore:
    """Return the float student of a registered model."""
    base = BaseModelRecipe(
        model=checkpoint.base,
        revision=checkpoint.base_revision,
        trust_remote_code=checkpoint.remote_code,
    )
    return float_student(checkpoint, base, store)


def rows_file(store: ArtifactStore, data: PreparedDataset, role: str) -> Path:
    """Return the file of a role's Examples."""
    rows = data.rows(role)
    return store.fetch(rows.artifact) / rows.file


def asked_rows(
    examples: Sequence[Example], answers: Answers, predictors: Sequence[str]
) -> list[Example]:
    """Return the rows that the run asked all of the predictors.

    Raises DataError for a row that the run's answers do not have, and where no row is left."""
    asked = []
    for example in examples:
        if example.example_id not in answers:
            raise DataError(
                f"row {example.example_id} of the run's test rows is not among its answers; "
                "register the model again"
            )
        recorded = answers[example.example_id]
        if all(recorded.get(name) is not None for name in predictors):
            asked.append(example)
    if not asked:
        raise DataError(f"no test row was asked of both {' and '.join(predictors)}; run it again")
    return asked


def write_task(
    examples: Sequence[Example],
    prompt: PromptRecipe,
    tokenizer: TransformersTokenizer,
    out: Path,
    class_texts: Mapping[str, str] | None = None,
) -> Path:
    """Write the rows and the harness's task into the folder `out`; return the task's file.
    `class_texts`: the text of each class's token.

    Columns of rows.jsonl: example_id; prompt, the text up to the assistant's first token; letters,
    or classes; said, what the model says for each; gold, the index of the gold one. Raises
    DataError where the tokenizer joins a prompt's end and what is said, so that the harness would
    not score the tokens that the student was trained on."""
    out.mkdir(parents=True)
    lines = []
    for example in examples:
        messages = render_messages(example, prompt)
        text, ids = tokenizer.chat_text(messages), tokenizer.encode_chat(messages)
        said, tokens = list(example.keys), []
        if example.classes:
            said = [(class_texts or {})[label] for label in example.classes]
            for word in said:
                tokens += tokenizer.encode_text(word)
        else:
            tokens = letter_ids(tokenizer, len(example.choices))
        for letter, token in zip(said, tokens, strict=True):
            if tokenizer.encode_rendered(text + letter) != [*ids, token]:
                raise DataError(
                    f"row {example.example_id}: the tokenizer joins the letter {letter} to the "
                    "prompt's end; the harness cannot ask this model"
                )
        row = {
            "example_id": example.example_id,
            "prompt": text,
            "letters": list(example.keys),
            "said": said,
            "gold": example.keys.index(str(example.answer_key)),
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    (out / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(out / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "said",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (out / "task.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return out / "task.yaml"


def delivered_form(registered: Path, recipe: Mapping[str, Any]) -> ExportForm:
    """Return the form of a registered model: the one that its ladder picked, or else that of the
    recipe's export slice.

    Raises RecipeError for a form whose adapter is apart."""
    form = ExportRecipe.model_validate(recipe).form
    if (registered / LADDER_FILE).is_file():
        ladder = Ladder.model_validate_json((registered / LADDER_FILE).read_text(encoding="utf-8"))
        form = next(rung.form for rung in ladder.rungs if rung.picked)
    if form.adapter_apart:
        raise RecipeError(
            f"{form.title}: the harness would leave the adapter aside; name a model that was "
            "exported without export.adapter_apart"
        )
    return form


def export_with_all_logits(
    student: ModelToScore, form: ExportForm, prompt: PromptRecipe, train: Path, out: Path
) -> None:
    """Export the float student in the same form, but with the logits of all tokens.

    Files in: the Examples of `train`, on whose prompts gptq is calibrated, as it was before."""
    print("exporting the float student again, with the logits of all tokens", flush=True)
    calibration = None
    if form.quantised and form.algorithm == "gptq":
        calibration = out.with_suffix(".jsonl")
        write_prompts(student, prompt, train, calibration)
    with_logits = form.model_copy(update={"all_logits": True})
    build_rung(student, with_logits, calibration, out, EXPORT_MINUTES, show_nothing)


def weights(folder: Path) -> dict[str, str]:
    """Return the sha256 of each weight of an ONNX model by its name; constants of the graph, which
    have no dimension or one, are left out."""
    import onnx

    digests = {}
    for tensor in onnx.load(folder / "model.onnx").graph.initializer:
        if len(tensor.dims) > 1:
            values = onnx.numpy_helper.to_array(tensor)
            digests[tensor.name] = hashlib.sha256(values.tobytes()).hexdigest()
    return digests


def float_arguments(student: ModelToScore) -> dict[str, Any]:
    """Return how the harness's `hf` reader, which works in another folder, loads the float student.
    The prompts have their special tokens already."""
    arguments: dict[str, Any] = {
        "pretrained": str(Path(student.folder).absolute()),
        "dtype": "float32",
        "add_bos_token": False,
        "trust_remote_code": student.remote_code,
    }
    if student.adapter:
        arguments["peft"] = str(Path(student.adapter).absolute())
    return arguments


def ask_harness(reader: str, arguments: Mapping[str, Any], task: Path, out: Path) -> Found:
    """Run the harness with one of its readers, and return what it found. `arguments` are the
    reader's.

    Raises ModelError where it fails; its output is in `out`/log.txt."""
    print(f"lm-evaluation-harness asks by its reader {reader}", flush=True)
    out.mkdir(parents=True)
    settings = {
        "model": reader,
        "model_args": dict(arguments),
        "tasks": [str(task)],
        "device": "cpu",
        "batch_size": 1,
        "log_samples": True,
        "output_path": str(out),
    }
    (out / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [str(HARNESS), "-m", "lm_eval", "run", "--config", str(out / "run.yaml")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "datasets")}
    with (out / "log.txt").open("w") as log:
        done = subprocess.run(
            command, cwd=out, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode:
        last = (out / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise ModelError(
            f"lm-evaluation-harness failed by its reader {reader} ({' '.join(last)[:200]}); "
            f"{out / 'log.txt'} has all that it said"
        )
    return read_found(out)


def read_found(folder: Path) -> Found:
    """Return what the harness has written below `folder`."""
    results = next(folder.rglob("results_*.json"))
    accuracy = json.loads(results.read_text(encoding="utf-8"))["results"][TASK]["acc,none"]
    samples = next(folder.rglob(f"samples_{TASK}_*.jsonl"))
    found = {}
    for line in samples.read_text(encoding="utf-8").split("\n"):
        if line:
            sample = json.loads(line)
            scores = [float(score) for score, _is_greedy in sample["filtered_resps"]]
            row = sample["doc"]
            found[row["example_id"]] = dict(zip(row["letters"], scores, strict=True))
    return Found(accuracy, found)


def answered_otherwise(
    predictor: str, examples: Sequence[Example], answers: Answers, found: Found
) -> list[Example]:
    """Return the rows that the harness answers with another letter than the run did."""
    otherwise = []
    for example in examples:
        if answers[example.example_id][predictor] != found.letter(example.example_id):
            otherwise.append(example)
    return otherwise


def own_accuracy(predictor: str, examples: Sequence[Example], answers: Answers) -> float:
    """Return the accuracy (0 to 1) of a predictor's recorded answers."""
    right = 0
    for example in examples:
        right += answers[example.example_id][predictor] == example.answer_key
    return right / len(examples)


def figures(
    key: str, predictor: str, examples: Sequence[Example], answers: Answers, found: Found
) -> dict[str, Any]:
    """Return a predictor's part of the last line; its names begin with `key`."""
    return {
        f"{key}_ours": round(own_accuracy(predictor, examples, answers), 4),
        f"{key}_theirs": round(found.accuracy, 4),
        f"{key}_otherwise": len(answered_otherwise(predictor, examples, answers, found)),
    }


def comparison_table(
    examples: Sequence[Example], answers: Answers, found: Mapping[str, Found]
) -> str:
    """Return a line for each predictor."""
    rows = []
    for name, theirs in found.items():
        otherwise = answered_otherwise(name, examples, answers, theirs)
        ours = own_accuracy(name, examples, answers)
        rows.append(
            (name, f"{ours:.4f}", f"{theirs.accuracy:.4f}", f"{len(otherwise)} of {len(examples)}")
        )
    return plain_table(("predictor", "ours", "theirs", "rows answered otherwise"), rows)


def print_otherwise(
    predictor: str, examples: Sequence[Example], answers: Answers, found: Found
) -> None:
    """Print the first rows that are answered otherwise, each with how much less probable the
    harness finds our letter, as a difference of log-likelihoods (nats)."""
    for example in answered_otherwise(predictor, examples, answers, found)[:LISTED_ROWS]:
        ours, theirs = answers[example.example_id][predictor], found.letter(example.example_id)
        scores = found.loglikelihoods[example.example_id]
        print(
            f"{predictor}, row {example.example_id[:12]}: gold {example.answer_key}, ours {ours}, "
            f"theirs {theirs} by {scores[theirs] - scores[str(ours)]:.4f}"
        )


def main(arguments: list[str]) -> int:
    """Judge a model; return 0, or 1 after one line on what the user can mend."""
    parser = argparse.ArgumentParser("python -m benchmarks.neutral")
    parser.add_argument("name", help="the registered model")
    parser.add_argument("version", nargs="?", help="by default the champion, else the newest")
    parser.add_argument("--registry", choices=("local", "azureml"), default="local")
    given = parser.parse_args(arguments)
    try:
        found = judge(given.name, given.version, given.registry)
    except DistilleryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
