"""Trainings of all kinds by one rank and by two: `python -m two_ranks BASE OUT` under torchrun."""

import json
import random
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from one_folder import OneFolder
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from distillery.models.load import load_model
from distillery.recipe import TrainingRecipe
from distillery.training.checkpoint import Checkpoints, CheckpointTimer, TrainingState
from distillery.training.job import TrainingJob, distil
from distillery.training.loop import Progress, TrainingProgress, set_up, train
from distillery.training.ranks import ALONE, Ranks
from distillery.training.rows import TrainingRow, write_rows
from distillery.training.split_model import own_share
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

    @property
    def may_be_split(self) -> bool:
        """Whether ranks may share out the model: not one with weights in 4 bits."""
        return self.settings.get("method") != "qlora"


def rows_of(kind: str, count: int = 18) -> list[TrainingRow]:
    """Return rows of random tokens whose answer can be read off the last one. The third one has no
    soft labels."""
    chance = random.Random(kind)
    rows = []
    for number in range(count):
        answer = number % 3
        own = [chance.randrange(20, 400) for _ in range(chance.randrange(3, 12))]
        values: dict[str, Any] = {"prompt": (5, 6, 7, *own, 410 + answer), "answer": answer}
        if kind in ("letters", "plain", "closed"):
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


def after(count: int, rows: list[TrainingRow]) -> list[TrainingRow]:
    """Return the rows after so many tokens that all of them begin with."""
    shared = tuple(range(100, 100 + count))
    return [row.model_copy(update={"prompt": shared + row.prompt}) for row in rows]


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
        "long beginnings": Case(after(40, letters), soft, validation=6),
        "long beginnings, texts": Case(after(40, texts), validation=6),
        "long beginnings of some": Case([*after(40, letters[:13]), *letters[13:]], validation=6),
        "long beginnings, lora": Case(after(40, letters), {"method": "lora"}, validation=6),
        "long beginnings, classes": Case(after(40, closed), {"method": "dora"}, validation=6),
        "uneven": Case(
            [*rows_of("letters", 2), *rows_of("plain", 15)],
            {"rationale_weight": 0.5, "accumulation": 3},
            validation=3,
        ),
        "few trained": Case(letters, {"first_layer": "half", "freeze_embeddings": True}),
        "checkpointing": Case(letters, {"gradient_checkpointing": True}),
        "checkpointing, lora": Case(letters, {"gradient_checkpointing": True, "method": "lora"}),
        "bfloat16": Case(letters, {"precision": "bfloat16"}, validation=6),
        "bfloat16, lora": Case(letters, {"precision": "bfloat16", "method": "lora"}, validation=6),
        "bfloat16, long beginnings": Case(
            after(40, closed), {"precision": "bfloat16"}, validation=6
        ),
        "bfloat16, checkpointing": Case(
            letters,
            {"precision": "bfloat16", "gradient_checkpointing": True, "first_layer": 1},
            validation=6,
        ),
        "patience": Case(letters, falling, validation=6),
        "proven": Case(letters, {"patience": "proven", "learning_rate": 1e-3}, validation=18),
    }


def trained(
    base: Path,
    case: Case,
    ranks: Ranks = ALONE,
    checkpoints: Checkpoints | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return the trained weights, the figures, and the norm of the gradients at each step, which
    the weights do not tell: AdamW makes the same of gradients half as large."""
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
    norms = []

    def clip(weights: Iterable[torch.nn.Parameter], most: float) -> None:
        norm = clip_grad_norm_(weights, most)
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))

    with patch("torch.nn.utils.clip_grad_norm_", clip):
        model, result = train(
            model,
            case.rows,
            validation,
            recipe,
            pad_id=0,
            end_id=END,
            hidden=hidden,
            checkpoints=checkpoints,
            progress=progress,
            ranks=ranks,
        )
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return {"weights": weights, "result": result.model_dump_json(), "norms": norms}


RESUMED = ("proven", "lora", "classes")
"""The cases whose trainings are stopped and go on."""

STOPPED_AT = 6


def resumed(base: Path, case: Case, folder: Path, before: Ranks, after: Ranks) -> dict[str, Any]:
    """Return what `trained` does of a training that ends at STOPPED_AT, and goes on from the
    checkpoint of the step before. A rank that is not among those before or after waits."""

    class Stopped(Exception):
        pass

    def stop(report: TrainingProgress) -> None:
        if report.step == STOPPED_AT:
            raise Stopped

    kept = OneFolder(folder)
    if before.split or before.is_first:
        with suppress(Stopped), patch.object(CheckpointTimer, "save_if_due", save):
            trained(base, case, before, kept, stop)
    dist.barrier()
    if not after.split and not after.is_first:
        return {}
    found = trained(base, case, after, kept)
    assert json.loads(found["result"])["resumed_at"] == STOPPED_AT - 1
    return found


def save(timer: CheckpointTimer, state: TrainingState) -> None:
    """Save a checkpoint at each step."""
    state.save(timer.checkpoints, timer.ranks)


def held_bytes(base: Path, case: Case, ranks: Ranks) -> int:
    """Return how many bytes of the model a rank holds between two steps."""
    recipe = TrainingRecipe.model_validate({**SHAPE, **case.settings})
    training = set_up(load_model(base)[0], case.rows, [], recipe, None, 0, END, ranks)
    training.take_step([case.rows[:4], case.rows[4:8]])
    storages = {}
    for weight in training.model.parameters():
        storage = own_share(weight).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def job(base: Path, out: Path, method: str, split: bool) -> TrainingJob:
    """Return a training of a classifier, which writes to `out` with this method's name."""
    out.mkdir(exist_ok=True)
    write_rows(rows_of("closed"), out / "rows")
    recipe = TrainingRecipe.model_validate({"epochs": 1, **SHAPE, "method": method})
    return TrainingJob(
        model=base,
        adapter=None,
        remote_code=False,
        rows=out / "rows",
        validation=out / "rows",
        hidden=None,
        recipe=recipe,
        result=out / f"{method}.json",
        out=out / method,
        keep_end=False,
        split=split,
    )


def main(base: Path, out: Path) -> None:
    # If one rank waits for what another one never does, both end soon.
    dist.init_process_group("gloo", timeout=timedelta(minutes=3))
    whole = Ranks(dist.get_rank(), dist.get_world_size())
    split = replace(whole, split=True)
    alone = replace(whole, count=1)
    found: dict[str, Any] = {}
    for name, case in cases().items():
        found[name] = trained(base, case, whole)
        if case.may_be_split:
            found[f"{name}, split"] = trained(base, case, split)
        if name in RESUMED:
            for before, after in ((split, split), (split, alone), (alone, split)):
                folder = out / f"{name}-{before.split}-{after.split}"
                went_on = resumed(base, case, folder, before, after)
                found[f"{name}, {before.split} to {after.split}"] = went_on
    for name in ("hard", "lora"):
        found[f"bytes of {name}"] = [
            held_bytes(base, cases()[name], each) for each in (whole, split)
        ]
    for method in ("full", "lora"):
        distil(job(base, out / "jobs", method, split=True), None, None, whole)
    torch.save(found, out / f"found-{whole.rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
