"""What distillation gains: `make bench-distil`, or `python -m benchmarks.distil [--full] [--afresh]`.

The demo's teacher, fine-tuned on the gold rows, is cut to the demo's layers, and the student is trained on a part of
the pool in four ways: on the pool's gold answers, on the teacher's letters (hard), on its probabilities (soft), and on
these and its last hidden states (hidden). Three seeds each decide which rows and in which order. All are asked the same
test rows, in PyTorch, beside the base model and the teacher. The students of the fourth way at the larger pool are
exported as the demo exports its own, and asked the test rows one at a time: a prompt's shared beginning is computed
once in every runtime. --full is a grid of four pools, three depths and five seeds.

Every result is kept in .distillery/bench/distil.jsonl as soon as it is there, so that a run that was ended goes on;
--afresh begins anew. The last line is JSON, means over the seeds:

kept                of the teacher's accuracy, by the int4 student
fewer_parameters    share of the teacher's that the student does without
share_of_bf16_bytes the int4 folder's bytes, of the teacher's in bfloat16
speedup_same        rows a second, int4 student over the teacher in the same form of int4
speedup_deployed    rows a second, int4 student over the teacher's fastest float form
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from distillery import student
from distillery.base_model import base_folder
from distillery.dataset import to_example
from distillery.evaluation import ModelToScore, machine, score_model
from distillery.labels import gold_labels
from distillery.losses import TrainingRow
from distillery.onnx import export
from distillery.pruning import chosen_layers, keep_layers
from distillery.recipe import Columns, ExportForm, LayerChoice, TrainingRecipe, load_recipe
from distillery.records import Example
from distillery.store import digest_of_files, list_files

PROJECT = Path(__file__).resolve().parents[1]
SAMPLE = PROJECT / "distillery" / "sample_data"
PLACE = PROJECT / ".distillery" / "bench"
DEMO = load_recipe("demo")
WAYS: dict[str, dict[str, float]] = {
    "gold": {"soft_weight": 0.0, "hidden_weight": 0.0},
    "hard": {"soft_weight": 0.0, "hidden_weight": 0.0},
    "soft": {"soft_weight": 1.0, "hidden_weight": 0.0},
    "hidden": {"soft_weight": 1.0, "hidden_weight": DEMO.student.training.hidden_weight},
}
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for the 95 % interval of a mean of so many."""


def read(split: str) -> list[Example]:
    lines = (SAMPLE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [to_example(json.loads(line), Columns(), f"{split}, line {n}") for n, line in enumerate(lines, 1)]


class Kept:
    """Results by name, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._known: dict[str, Any] = dict(json.loads(line) for line in lines)

    def of(self, name: str, work: Callable[[], Any]) -> Any:
        if name not in self._known:
            started = time.perf_counter()
            self._known[name] = work()
            with self._path.open("a") as file:
                file.write(json.dumps([name, self._known[name]]) + "\n")
            print(f"{name}: {self._known[name]} ({time.perf_counter() - started:.0f} s)", flush=True)
        return self._known[name]


class Bench:
    def __init__(self, kept: Kept, epochs: float, steps: int | None) -> None:
        self.kept, self.epochs, self.steps = kept, epochs, steps
        self.base = base_folder(DEMO.teacher.preparation.base)
        self.tokenizer = student.load_tokenizer(self.base)
        self.pad_id, self.end_id = student.pad_id(self.tokenizer), student.end_of_turn_id(self.tokenizer)
        self.place = student.placement()
        self.test = self.rendered(read("test"))
        self.pool = self.rendered(read("pool"))
        self.teacher = self.prepared_teacher()
        self.soft, self.states = self.teachers_word()

    def rendered(self, examples: Sequence[Example]) -> list[TrainingRow]:
        return student.training_rows(examples, gold_labels(examples), DEMO.prompt, self.tokenizer)[0]

    def train(self, model: Any, rows: Sequence[TrainingRow], recipe: TrainingRecipe, hidden: Any = None) -> Any:
        return student.train(model, rows, [], recipe, pad_id=self.pad_id, end_id=self.end_id, hidden=hidden)[0]

    def accuracy(self, model: Any) -> float:
        return student.accuracy_of(model.float(), self.test, pad_id=self.pad_id, place=self.place)

    def prepared_teacher(self) -> Path:
        recipe = DEMO.teacher.preparation.training.model_copy(update={"max_steps": self.steps})
        folder = PLACE / f"teacher-{digest_of_files(list_files(self.base))[:8]}-{recipe.epochs}-{recipe.max_steps}"
        if not (folder / "tokenizer.json").exists():
            model = self.train(student.load_model(self.base)[0], self.rendered(read("gold")), recipe)
            model.merge_and_unload().float().save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return folder

    def teachers_word(self) -> tuple[list[list[float]], torch.Tensor]:
        """Its probabilities over the options of the pool's rows, and its last hidden states there."""
        model, options = student.load_model(self.teacher)[0], {"pad_id": self.pad_id, "place": self.place}
        return (
            student.option_probabilities(model, self.pool, **options),
            student.hidden_states(model, self.pool, **options),
        )

    def start(self, depth: int) -> Any:
        model = student.load_model(self.teacher)[0]
        layers = len(model.get_decoder().layers)
        keep_layers(model, chosen_layers(LayerChoice(keep=depth, by="early_and_last"), layers))
        return model

    def student(self, way: str, pool: int, depth: int, seed: int) -> Any:
        picked = random.Random(seed).sample(range(len(self.pool)), pool)
        rows = [self._row(way, index) for index in picked]
        changed = {**WAYS[way], "seed": seed, "epochs": self.epochs, "max_steps": self.steps}
        recipe = DEMO.student.training.model_copy(update=changed)
        hidden = self.states[picked] if recipe.hidden_weight else None
        return self.train(self.start(depth), rows, recipe, hidden)

    def _row(self, way: str, index: int) -> TrainingRow:
        row, soft = self.pool[index], self.soft[index]
        if way == "gold":
            return row
        return row.model_copy(update={"answer": soft.index(max(soft)), "soft": tuple(soft)})

    def result(self, way: str, pool: int, depth: int, seed: int) -> float:
        def work() -> float:
            model = self.student(way, pool, depth, seed)
            if way == "hidden":
                model.save_pretrained(self.folder(pool, depth, seed))
                self.tokenizer.save_pretrained(self.folder(pool, depth, seed))
            return self.accuracy(model)

        return float(self.kept.of(f"{way}, pool {pool}, {depth} layers, seed {seed}", work))

    def folder(self, pool: int, depth: int, seed: int) -> Path:
        return PLACE / f"student-{pool}-{depth}-{seed}-{self.steps}"

    def exported(self, pool: int, depth: int, seed: int) -> dict[str, float]:
        def work() -> dict[str, float]:
            folder = self.folder(pool, depth, seed)
            return self.scored(folder, DEMO.export.form) | {"parameters": student.parameter_count(folder)}

        return dict(self.kept.of(f"int4 student, pool {pool}, {depth} layers, seed {seed}", work))

    def scored(self, folder: Path, form: ExportForm) -> dict[str, float]:
        out = folder.with_name(f"{folder.name}-onnx-{form.precision}")
        if not (out / "genai_config.json").exists():
            export(folder, None, form, out)
        scored = self._scored(ModelToScore(name=form.title, kind="onnx", folder=str(out)))
        return scored | {"bytes": sum(file.stat().st_size for file in out.iterdir() if file.is_file())}

    def _scored(self, model: ModelToScore) -> dict[str, float]:
        found = score_model(model, SAMPLE / "test.jsonl", DEMO.prompt)
        gold = [example.answer_key for example in read("test")]
        right = sum(a == b for a, b in zip(found.answers, gold, strict=True))
        return {"accuracy": right / len(gold), "rows_per_second": found.rows_per_second}

    def floats(self) -> dict[str, float]:
        """The teacher's rows a second in each float form."""
        transformers = ModelToScore(name="teacher", kind="transformers", folder=str(self.teacher))
        fp32 = self.scored(self.teacher, ExportForm(precision="fp32"))
        return {
            "Transformers fp32": self._scored(transformers)["rows_per_second"],
            "ONNX fp32": fp32["rows_per_second"],
        }


def shown(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} +/- {half:.3f}"


def run(bench: Bench, pools: Sequence[int], depths: Sequence[int], seeds: Sequence[int]) -> dict[str, float]:
    kept = bench.kept
    base = kept.of("base model", lambda: bench.accuracy(student.load_model(bench.base)[0]))
    teacher = kept.of("teacher", lambda: bench.accuracy(student.load_model(bench.teacher)[0]))
    print(f"on {machine()}: base model {base:.3f}, teacher {teacher:.3f}", flush=True)
    # Seed by seed, so that a run that was ended has whole comparisons.
    for seed, depth, pool, way in product(seeds, depths, pools, WAYS):
        bench.result(way, pool, depth, seed)
    for depth, pool in product(depths, pools):
        means = {way: shown([bench.result(way, pool, depth, seed) for seed in seeds]) for way in WAYS}
        print(f"{depth} layers, {pool} rows: " + ", ".join(f"{way} {mean}" for way, mean in means.items()))
    depth, pool = depths[0], max(pools)
    int4 = kept.of("int4 teacher", lambda: bench.scored(bench.teacher, DEMO.export.form))
    floats = kept.of("float teacher", bench.floats)
    made = [bench.exported(pool, depth, seed) for seed in seeds]
    parameters = student.parameter_count(bench.teacher)
    speed = statistics.mean(one["rows_per_second"] for one in made)
    return {
        "kept": statistics.mean(one["accuracy"] for one in made) / teacher,
        "fewer_parameters": 1 - made[0]["parameters"] / parameters,
        "share_of_bf16_bytes": statistics.mean(one["bytes"] for one in made) / (2 * parameters),
        "speedup_same": speed / int4["rows_per_second"],
        "speedup_deployed": speed / max(floats.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the larger grid, for hours")
    parser.add_argument("--afresh", action="store_true", help="leave earlier results aside")
    parser.add_argument("--steps", type=int, help="of each training at most, to see the benchmark work")
    given = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    path = PLACE / f"distil{f'-{given.steps}-steps' if given.steps else ''}.jsonl"
    if given.afresh:
        path.unlink(missing_ok=True)
    bench = Bench(Kept(path), DEMO.student.training.epochs, given.steps)
    depth = len(DEMO.student.layers) if isinstance(DEMO.student.layers, tuple) else 14
    grid = ((100, 200, 500, 1000), (depth, 10, 18), range(5)) if given.full else ((200, 700), (depth,), range(3))
    print(json.dumps({name: round(value, 3) for name, value in run(bench, *grid).items()}))


if __name__ == "__main__":
    main()
