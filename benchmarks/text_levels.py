"""Students of a teacher's texts alone, and of its probabilities of each token too: a part of the
benchmark of written answers (text.py).

All learn from the rows that the teacher answered, without the gold ones; half of the teacher's
layers are theirs, so that there is something to lose. Each level has students of three seeds. The
interval of the difference is the paired bootstrap's over the test rows, each with the answers of
all three seeds.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.task_runs import folder_of, run_in_a_process
from benchmarks.text_rows import Row

SEEDS = (0, 1, 2)
LAYERS = [*range(14), 29]
"""Of 30."""
LEVELS = {"texts": 0.0, "probabilities": 1.0}
"""training.soft_weight by level."""


def run_levels(recipe_named: Callable[[str], Row], work: Path, keep: bool) -> dict[str, Any]:
    """Train the students by whole runs, and return the BLEU of each level's by seed, the mean
    difference `gain` and its bounds `low` and `high`; or why a run failed."""
    bleu: dict[str, list[float]] = {level: [] for level in LEVELS}
    rows: dict[str, list[list[Row]]] = {level: [] for level in LEVELS}
    for seed in SEEDS:
        for level, weight in LEVELS.items():
            recipe = recipe_named(f"e2e-{level}-{seed}")
            recipe["teacher"]["soft_labels"] = True
            training = {"soft_weight": weight, "seed": seed}
            recipe["student"] = {"gold": False, "layers": LAYERS, "training": training}
            # The float students are compared; a ladder of forms would take as long again.
            recipe["export"] = {"precision": "int8", "algorithm": "dynamic"}
            kept = work / f"{recipe['name']}.json"
            run: dict[str, Any]
            if keep and kept.exists():
                run = json.loads(kept.read_text())
            else:
                run = run_in_a_process(recipe["name"], recipe, work)
            if "failed" in run:
                return run
            folder = folder_of(run["report"])
            report = json.loads((folder / "report.json").read_text())
            bleu[level].append(report["figures"]["student"]["written"]["metrics"]["bleu"]["value"])
            lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
            rows[level].append([json.loads(line) for line in lines])
            print(json.dumps({"level": level, "seed": seed, "bleu": bleu[level][-1]}), flush=True)
    return {"bleu": bleu, **difference(rows["probabilities"], rows["texts"])}


def difference(first: list[list[Row]], second: list[list[Row]]) -> dict[str, float]:
    """Return the BLEU of the first students less that of the second, each over all their answers
    together, with its 95 % interval. Each student has the lines of an answers.jsonl."""
    from distillery.evaluation.bootstrap import PairedSums, RowSums
    from distillery.evaluation.gold import gold_in

    def sums(students: list[list[Row]]) -> RowSums:
        found = []
        for lines in students:
            found.append(gold_in(lines).sums([line["student"] for line in lines], "bleu"))
        together = sum(one.rows for one in found)
        return RowSums("bleu", together, found[0].best * len(found), found[0].none * len(found))

    paired = PairedSums(sums(first), sums(second))
    interval = paired.difference_interval(0.95)
    return {
        "gain": round(paired.difference, 4),
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
    }
