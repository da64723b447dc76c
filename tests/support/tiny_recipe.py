"""A recipe shaped like the demo's, over rows of one easy rule and a tiny random model: the whole
way in seconds."""

import json
import random
from pathlib import Path
from typing import Any

RULE = {"bread": "A", "river": "B", "cloud": "C"}
WORDS = (
    "the a quiet room after work tired person would like rest keep warm one of where does choice "
    "option"
)
FILLER = WORDS.split(" ")
ROWS = {"gold": 40, "train": 60, "validation": 20, "test": 40}


def row(split: str, number: int) -> dict[str, Any]:
    """A row in the schema of tau/commonsense_qa; which of three words stands in the question
    decides its answer."""
    order = random.Random(f"{split}/{number}")
    key = list(RULE)[number % 3]
    words = order.choices(FILLER, k=9)
    words.insert(order.randrange(10), key)
    choices = {"label": ["A", "B", "C"], "text": ["oven", "bridge", "rain"]}
    return {
        "id": f"{split}-{number}",
        "question": " ".join(words),
        "question_concept": key,
        "choices": choices,
        "answerKey": RULE[key],
    }


def write_rows(folder: Path, **extra: int) -> dict[str, list[str]]:
    """Each split's file, with `extra` rows more in some; what dataset.files takes."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        lines = [json.dumps(row(split, number)) for number in range(count + extra.get(split, 0))]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return {split: [str(folder / f"{split}.jsonl")] for split in ROWS}


def recipe(files: dict[str, list[str]], base: Path, **evaluation: float) -> dict[str, Any]:
    """The gate lets everything pass, unless `evaluation` says otherwise."""
    return {
        "name": "tiny",
        "dataset": {"source": "files", "files": files, "splits": {split: split for split in ROWS}},
        "prompt": {
            "system": "Pick.",
            "user": "{question}\n{choices}",
            "choice": "{letter}) {text}",
        },
        "teacher": {
            "kind": "local",
            "soft_labels": True,
            "preparation": {
                "base": {"model": str(base)},
                "training": {"method": "lora", "epochs": 8, "learning_rate": 0.005},
                "export": {"precision": "int8", "algorithm": "rtn"},
            },
        },
        "student": {
            "start": "teacher",
            "layers": [1],
            "gold": True,
            "training": {
                "method": "full",
                "epochs": 2,
                "learning_rate": 0.001,
                "soft_weight": 1.0,
                "hidden_weight": 1.0,
            },
        },
        "evaluation": {"rules": [], **evaluation},
        "registry": {"kind": "local", "model_name": "tiny-student"},
    }


def endpoint_recipe(
    files: dict[str, list[str]], base: Path, name: str, **training: Any
) -> dict[str, Any]:
    """The same rows, answered by the endpoint that the environment names, whose model is `name`; a
    student of the whole base model. Another name has all rows labelled anew."""
    values = recipe(files, base)
    values["name"] = name
    values["teacher"] = {"kind": "endpoint", "sdk": "openai", "identity": name, "soft_labels": True}
    own = values["student"]["training"] | {"hidden_weight": 0} | training
    values["student"] = {"base": {"model": str(base)}, "training": own}
    values["registry"]["model_name"] = name
    return values
