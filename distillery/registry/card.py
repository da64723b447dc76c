"""The model card in Hugging Face's format: README.md in a registered folder.

The front matter (licence, base model, data set, accuracy as a model-index) follows
https://huggingface.co/docs/hub/model-cards. A card says what the student is and how it was made,
but nothing that differs between equal runs, such as times and costs: these are in manifest.json.
The speeds of a ladder's forms are the exception, since they may have decided what the student is.
"""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from distillery.export.ladder_table import choice_in_words, rows_in_words, table
from distillery.markdown import escape, markdown_table
from distillery.recipe import METRIC_NAMES, Recipe
from distillery.records import (
    EvaluationReport,
    Ladder,
    OnnxModel,
    PreparedDataset,
    StudentCheckpoint,
    TeacherLabels,
)

CARD = "README.md"

HUB_METRICS = {"field_f1": "f1", "rouge_l": "rouge"}
"""Metrics that the Hugging Face hub knows by other names."""


def write_card(folder: Path, name: str, provenance: Mapping[str, Any]) -> None:
    """Write the card of the model `name` into the folder that is to be registered."""
    text = model_card(name, provenance)
    (folder / CARD).write_text(text, encoding="utf-8", newline="\n")


def model_card(name: str, provenance: Mapping[str, Any]) -> str:
    """Return the card of a student.

    Of `provenance`, as the manifest holds it, the keys recipe, data, labels, student, model and
    evaluation are read.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    recipe = Recipe.model_validate(provenance["recipe"])
    labels = TeacherLabels.model_validate(provenance["labels"])
    student = StudentCheckpoint.model_validate(provenance["student"])
    model = OnnxModel.model_validate(provenance["model"])
    report = EvaluationReport.model_validate(provenance["evaluation"])
    row = report.row(report.candidate)
    dataset = dataset_title(recipe, PreparedDataset.model_validate(provenance["data"]))
    base = base_title(student.base)
    task, metric = "Multiple choice", row.metric or "accuracy"
    metric_name = METRIC_NAMES[row.metric]
    metric_name = metric_name[0].upper() + metric_name[1:]
    answers = "multiple-choice rows"
    if row.metric:
        task, answers = "Text generation", "rows by a text,"
    score = EvalResult(
        task_type=task.lower().replace(" ", "-"),
        task_name=task,
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_split="test",
        metric_type=HUB_METRICS.get(metric, metric),
        metric_name=metric_name,
        metric_value=round(row.accuracy, 4),
    )
    data = ModelCardData(
        model_name=name,
        license=student.base_license,
        base_model=base,
        datasets=[dataset],
        metrics=[HUB_METRICS.get(metric, metric)],
        eval_results=[score],
        library_name="onnxruntime-genai",
        pipeline_tag="text-generation",
        tags=["distillery", "knowledge-distillation", "onnx"],
    )
    interval = f"[{row.interval.low:.3f}, {row.interval.high:.3f}]"
    facts = {
        "Base model": base,
        "Licence of the base model": student.base_license or "not stated",
        "Parameters": f"{model.parameters:,}",
        "Form": f"{model.precision} {model.algorithm}, for ONNX Runtime GenAI",
        "Teacher": labels.teacher,
        "The teacher's terms of use": recipe.teacher.terms or "not stated",
        "Data set": dataset,
        "Rows that the teacher labelled": f"{labels.accepted:,}",
        "Training": student.method,
        f"{metric_name} on {row.rows:,} test rows": f"{row.accuracy:.3f} {interval}",
    }
    if row.figures and row.figures.preferences:
        found = row.figures.preferences
        facts["Texts beside the teacher's"] = f"{found.line()}; judge: {found.judge}"
    if model.abstention:
        facts["Abstains"] = f"below a probability of {model.abstention.threshold:.3f}"
    lines = [
        f"# {escape(name)}",
        "",
        "A student that Distillery distilled from a larger model.",
        "",
    ]
    lines += ["| | |", "|---|---|"]
    for title, value in facts.items():
        lines.append(f"| {title} | {escape(value)} |")
    lines += [
        "",
        f"The interval has 95 % confidence. It answers {answers} that are put to it with "
        "the prompt in `manifest.json`,",
        "where the whole record of its making is, with the SHA-256 of each file.",
        "",
    ]
    if model.ladder:
        lines += form_lines(model.ladder)
    lines += [
        "```bash",
        "distillery serve FOLDER    # /v1/chat/completions on this CPU",
        "```",
    ]
    text = "\n".join(lines)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def form_lines(ladder: Ladder) -> list[str]:
    """Return the lines on the forms that a student was tried in: size, speed and accuracy."""
    asked = rows_in_words(ladder.rows, ladder.training_rows)
    rows = table(ladder)
    lines = ["## Forms", "", f"The forms of the student that were tried, on {asked}.", ""]
    lines += [markdown_table(list(rows[0]), [list(row.values()) for row in rows]), ""]
    # Ladders of earlier versions have neither reason nor speeds.
    if ladder.reason:
        lines.append(f"{escape(choice_in_words(ladder))}. Timed on {escape(ladder.machine)}.")
        lines.append("")
    return lines


def dataset_title(recipe: Recipe, data: PreparedDataset) -> str:
    """Return a data set's hub id, "sample", or for files the digest of the train rows: a file that
    is renamed makes no other student."""
    if recipe.dataset.source == "files":
        return f"files-{data.splits['train'].sha256[:12]}"
    return recipe.dataset.name or recipe.dataset.source


def base_title(base: str) -> str:
    """Return a base model's name as a card may show it: a hub id as it is, a package's name, or
    the last part of a path or URL, which may tell of the machine."""
    if base.startswith("azureml://"):
        return base.split("/")[-3]
    if base.startswith("package:"):
        return base.removeprefix("package:")
    path = PurePath(base)
    if path.suffix == ".gguf":
        return path.stem
    if base.startswith((".", "/", "~")) or len(path.parts) != 2:
        return path.name
    return base
