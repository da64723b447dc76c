"""TRL's SFTTrainer beside ours on the answers of E2E's teacher: a part of the benchmark of written
answers (text.py).

Both train the same model by the same LoRA on the same token ids, as many steps in batches of 8,
with the loss on the answer and the end of the turn. Ours is trained as the students of texts alone
are (text_levels.py), in the precision that is the faster one on this processor; TRL's fastest
setting, its precision too, is found by trials (train.py). `cpu_s` is
the processor time of all steps, and `rows_s` rows a second by the clock, which other work on the
machine slows down. What each has learnt is measured on the test rows, in float32.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.text_levels import (
    METRICS,
    STUDENT,
    difference,
    measured,
    once,
    student_base,
    taught_rows,
    train_adapter,
)

SEEDS = (0,)


def run_trl(place: Path) -> dict[str, Any]:
    """Return the figures of both by seed; `ratio`: ours over TRL's rows a second of processor time;
    `gain`: the BLEU of ours less TRL's, with its bounds."""
    from benchmarks.train import fastest, install_trl, write_contest

    install_trl()
    base, rows = student_base(place), taught_rows(place)
    write_contest(place / "trl", base, STUDENT, rows)
    steps = math.ceil(STUDENT.epochs * math.ceil(len(rows) / STUDENT.batch_size))

    def choose(out: Path) -> None:
        out.write_text(json.dumps(fastest("trl", place / "trl" / "trials", place / "trl")))

    chosen = json.loads(once(place / "trl" / "chosen.json", choose).read_text())
    students: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for seed in SEEDS:
        recipe = STUDENT.model_copy(update={"precision": "auto", "seed": seed})
        ours = once(place / f"ours-{seed}", partial(train_adapter, base, rows, recipe))
        students["ours"].append(measured(place / f"ours-{seed}.json", base, ours))
        train = partial(train_by_trl, chosen | {"seed": seed}, steps, place / "trl")
        adapter = once(place / f"trl-{seed}", train)
        students["trl"].append(measured(place / f"trl-{seed}.json", base, adapter))
        shown = {key: students["trl"][-1][key] for key in (*METRICS, "rows_s", "cpu_s")}
        print(json.dumps({"trl": seed, **shown}), flush=True)
    found: dict[str, Any] = {"rows": len(rows), "steps": steps, "setting": chosen}
    seconds = {}
    for name, each in students.items():
        for figure in (*METRICS, "rows_s", "cpu_s"):
            found[f"{name}_{figure}"] = [one[figure] for one in each]
        seconds[name] = sum(one["cpu_s"] for one in each)
    found["ratio"] = round(seconds["trl"] / seconds["ours"], 2)
    answers = {name: [one["answers"] for one in each] for name, each in students.items()}
    return found | difference(answers["ours"], answers["trl"], "bleu")


def train_by_trl(settings: dict[str, Any], steps: int, place: Path, out: Path) -> None:
    """Train by TRL; write the adapter to `out`, with its speed."""
    from benchmarks.train import run

    figures = run("trl", settings, steps, out, place)
    speed = {name: figures[name] for name in ("rows_s", "cpu_s")}
    (out / "speed.json").write_text(json.dumps(speed))
