"""What a student of 135 M parameters reaches on CommonsenseQA: `python -m benchmarks.commonsense_qa
[--rows N]`.

The rows are those of train.jsonl in COMMONSENSE_QA_DIR, in the schema of tau/commonsense_qa. 400,
told by a hash of their question, are never trained on; half of the others are the gold rows and
half the pool. SmolLM2-135M is asked by the letter and by the likelihood of the options' texts,
before training and after three epochs of LoRA over the gold rows and the pool with their own
answers. Then the way of distillation is gone in the form that did better there: a teacher is
trained on the gold rows alone and labels the pool with its probabilities, and students learn from
those and from the gold rows' own answers: one that starts from the base model, and one that is cut
to two thirds of the teacher's layers. All are asked the same held-out rows.

The last line is JSON: accuracies, 0 to 1, of each by name; `chance` is 0.2; `minutes` in all.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.distil import merged
from distillery.data.rows import RowReader, to_example
from distillery.evaluation.statistics import paired_interval, wilson_interval
from distillery.labels.known import gold_labels
from distillery.models.base import base_folder
from distillery.models.device import choose_device
from distillery.models.load import end_of_turn_id, load_model, load_tokenizer, pad_id
from distillery.recipe import BaseModelRecipe, Columns, LayerChoice, PromptRecipe, TrainingRecipe
from distillery.records import Example
from distillery.training.loop import train
from distillery.training.pruning import chosen_layers, keep_layers
from distillery.training.rows import TrainingRow, training_rows
from distillery.training.validation import option_probabilities

HELD_OUT = 400
FORMS = {
    "letter": PromptRecipe(
        system="Answer with one letter.", user="Question: {question}\nAnswer Choices:\n{choices}"
    ),
    "text": PromptRecipe(system="Answer in a word or two.", user="{question}", answer="text"),
}
LORA = TrainingRecipe(method="lora", epochs=3, learning_rate=3e-4)
FULL = TrainingRecipe(method="full", epochs=3, learning_rate=1e-4, freeze_embeddings=True)


def read(folder: Path, rows: int) -> tuple[list[Example], list[Example], list[Example]]:
    """(held out, gold, pool): by a hash of the question, so that more rows move none."""
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [
        to_example(json.loads(line), RowReader(Columns()), f"line {number}")
        for number, line in enumerate(lines, 1)
    ]
    examples.sort(key=lambda example: hashlib.sha256(example.question.encode()).hexdigest())
    learnt = examples[HELD_OUT : HELD_OUT + rows]
    return examples[:HELD_OUT], learnt[::2], learnt[1::2]


class Bench:
    def __init__(self, base: Path, held_out: Sequence[Example]) -> None:
        self.base, self.held_out = base, held_out
        self.tokenizer = load_tokenizer(base)
        self.pad_id, self.end_id = pad_id(self.tokenizer), end_of_turn_id(self.tokenizer)
        self.right: dict[str, list[bool]] = {}

    def rendered(self, examples: Sequence[Example], form: str) -> list[TrainingRow]:
        return training_rows(examples, gold_labels(examples), FORMS[form], self.tokenizer)[0]

    def model(self) -> Any:
        return load_model(self.base)[0]

    def trained(self, model: Any, rows: Sequence[TrainingRow], recipe: TrainingRecipe) -> Any:
        model, result = train(model, rows, [], recipe, pad_id=self.pad_id, end_id=self.end_id)
        print(
            f"  {len(rows)} rows, {result.steps} steps, {result.rows_per_second:.1f} rows/s "
            f"on {result.device}",
            flush=True,
        )
        return merged(model, self.base) if recipe.adapts else model

    def ask(self, name: str, model: Any, form: str) -> None:
        rows = self.rendered(self.held_out, form)
        found = self.probabilities(model, rows)
        self.right[name] = [
            p.index(max(p)) == row.answer for p, row in zip(found, rows, strict=True)
        ]
        right, count = sum(self.right[name]), len(rows)
        interval = wilson_interval(right, count)
        print(
            f"{name:28} {right / count:.3f} [{interval.low:.3f}, {interval.high:.3f}] of {count}",
            flush=True,
        )

    def probabilities(self, model: Any, rows: Sequence[TrainingRow]) -> list[list[float]]:
        return option_probabilities(
            model.float(), rows, pad_id=self.pad_id, device=choose_device(), batch_size=16
        )


def run(folder: Path, count: int) -> dict[str, float]:
    started = time.perf_counter()
    held_out, gold, pool = read(folder, count)
    bench = Bench(base_folder(BaseModelRecipe()), held_out)
    print(
        f"{len(held_out)} rows held out, {len(gold)} gold rows, {len(pool)} in the pool", flush=True
    )
    for form in FORMS:
        bench.ask(f"untrained_{form}", bench.model(), form)
    for form in FORMS:
        bench.ask(
            f"all_gold_{form}",
            bench.trained(bench.model(), bench.rendered([*gold, *pool], form), LORA),
            form,
        )
    form = max(FORMS, key=lambda form: sum(bench.right[f"all_gold_{form}"]))
    print(f"the teacher and its students answer by {form}", flush=True)
    teacher = bench.trained(bench.model(), bench.rendered(gold, form), LORA)
    bench.ask("teacher", teacher, form)
    rows = bench.rendered(pool, form)
    learnt = bench.rendered(gold, form) + [
        row.model_copy(update={"soft": tuple(p), "answer": p.index(max(p))})
        for row, p in zip(rows, bench.probabilities(teacher, rows), strict=True)
    ]
    soft = LORA.model_copy(update={"soft_weight": 1.0})
    bench.ask("by_teacher_from_base", bench.trained(bench.model(), learnt, soft), form)
    layers = len(teacher.get_decoder().layers)
    keep_layers(teacher, chosen_layers(LayerChoice(keep=2 * layers // 3), layers))
    healed = FULL.model_copy(update={"soft_weight": 1.0})
    bench.ask("by_teacher_cut", bench.trained(teacher, learnt, healed), form)
    gain = paired_interval(bench.right["all_gold_text"], bench.right["all_gold_letter"])
    print(
        "text less letter, trained: 95 % interval "
        f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] points"
    )
    accuracies = {name: sum(right) / len(right) for name, right in bench.right.items()}
    return {
        "rows": len(gold) + len(pool),
        "held_out": len(held_out),
        "chance": 0.2,
        **accuracies,
    } | {"minutes": round((time.perf_counter() - started) / 60, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=1600, help="to learn from, gold and pool together"
    )
    folder = Path(os.environ.get("COMMONSENSE_QA_DIR", ""))
    if not (folder / "train.jsonl").is_file():
        raise SystemExit(
            "error: COMMONSENSE_QA_DIR: name a folder with CommonsenseQA's train.jsonl"
        )
    print(json.dumps(run(folder, parser.parse_args().rows)))


if __name__ == "__main__":
    main()
