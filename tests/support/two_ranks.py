"""Trainings of all kinds by one rank and by two: `python -m two_ranks BASE OUT` under torchrun."""

import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distillery.models.load import load_model
from distillery.recipe import TrainingRecipe
from distillery.training.loop import train
from distillery.training.ranks import ALONE, Ranks
from distillery.training.rows import TrainingRow
from distillery.training.token_labels import TokenLabels

END = 2
SHARES = ((0.7, 0.2, 0.1), (0.1, 0.8, 0.1), (0.25, 0.25, 0.5))
SHAPE = {"method": "full", "batch_size": 4, "accumulation": 2, "precision": "float32"}


@dataclass(frozen=True)
class Case:
    """A training: what of its recipe is not SHAPE's, its rows and whether states are learnt."""

    rows: list[TrainingRow]
    settings: dict[str, Any] = field(default_factory=dict)
    validation: int = 0
    hidden: bool = False


def rows_of(kind: str, count: int = 18) -> list[TrainingRow]:
    """Return rows of random tokens whose answer can be read off the last one. The third one has no
    soft labels."""
    chance = random.Random(kind)
    rows = []
    for number in range(count):
        answer = number % 3
        own = [chance.randrange(20, 400) for _ in range(chance.randrange(3, 12))]
        values: dict[str, Any] = {"prompt": (5, 6, 7, *own, 410 + answer), "answer": answer}
        if kind in ("letters", "closed"):
            values["letters"] = (11, 12, 13)
            values["soft"] = SHARES[answer] if number != 2 else None
        if kind == "letters" and number % 2:
            values |= {"explain": (5, 6, *own), "rationale": (30 + answer, 31, 32)}
        if kind == "closed":
            values |= {"closed": True, "span": len(own) + 1, "last": 0.3}
        if kind == "texts":
            values["texts"] = ((40, 41), (42,), (43, 44, 45))
            values["soft"] = SHARES[answer] if number != 2 else None
        if kind == "written":
            target = (50 + answer, 60, *range(70, 70 + answer))
            values |= {"target": target, "answer": 0}
            if number != 2:
                values["soft_tokens"] = token_labels((*target, END), 80 + number)
        rows.append(TrainingRow(**values))
    return rows


def token_labels(tokens: tuple[int, ...], other: int) -> TokenLabels:
    ids = np.array([[token, other] for token in tokens], "<i4")
    logs = np.log(np.array([[0.6, 0.3]] * len(tokens), "<f4"))
    return TokenLabels(candidates=2, ids=ids.tobytes(), logs=logs.tobytes())


def cases() -> dict[str, Case]:
    letters, texts = rows_of("letters"), rows_of("texts")
    closed, written = rows_of("closed"), rows_of("written")
    soft = {"soft_weight": 0.5, "temperature": 2.0}
    falling = {"patience": 1, "learning_rate": 0.05, "epochs": 20}
    return {
        "hard": Case(letters, validation=5),
        "soft": Case(letters, soft | {"rationale_weight": 0.5}, validation=1),
        "reverse": Case(letters, soft | {"divergence": "reverse", "label_smoothing": 0.1}),
        "hidden": Case(letters, {"hidden_weight": 1.0, "accumulation": 3}, hidden=True),
        "batches shared out by rows": Case(letters, soft | {"accumulation": 1}, validation=6),
        "texts": Case(texts, soft, validation=6),
        "classes": Case(closed, soft | {"class_weights": "balanced"}, validation=6),
        "token labels": Case(written, soft | {"hidden_weight": 1.0}, validation=6, hidden=True),
        "lora": Case(letters, soft | {"method": "lora"}, validation=6),
        "qlora": Case(letters, soft | {"method": "qlora"}, validation=6),
        "dora": Case(written, soft | {"method": "dora"}, validation=6),
        "upper half": Case(closed, {"first_layer": "half", "method": "lora"}, validation=6),
        "patience": Case(letters, falling, validation=6),
        "proven": Case(letters, {"patience": "proven", "learning_rate": 1e-3}, validation=18),
    }


def trained(base: Path, case: Case, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Return the trained weights and the figures."""
    model, _ = load_model(base)
    recipe = TrainingRecipe.model_validate({"epochs": 3, **SHAPE, **case.settings})
    hidden = None
    if case.hidden:
        states = sum(len(row.target) + 1 for row in case.rows)
        hidden = torch.randn(states, 64, generator=torch.Generator().manual_seed(0))
    # Rows that only one of the ranks learns would be seen here.
    validation = case.rows[: case.validation]
    if recipe.patience:
        validation = [row.model_copy(update={"answer": (row.answer + 1) % 3}) for row in validation]
    model, result = train(
        model,
        case.rows,
        validation,
        recipe,
        pad_id=0,
        end_id=END,
        hidden=hidden,
        ranks=ranks,
    )
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return {"weights": weights, "result": result.model_dump_json()}


def main(base: str, out: str) -> None:
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    found: dict[str, dict[str, Any]] = {}
    for name, case in cases().items():
        found[name] = trained(Path(base), case, ranks)
        found[f"{name}, split"] = trained(Path(base), case, replace(ranks, split=True))
    torch.save(found, f"{out}-{ranks.rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
