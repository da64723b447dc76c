"""What distillation gains: `make bench-distil`, or `python -m benchmarks.distil [--full] [--layers
N] [--afresh]`.

The demo's teacher, fine-tuned on the gold rows, is cut to the demo's layers, and the student is
trained on a part of the pool in four ways: on the pool's gold answers, on the teacher's letters
(hard), on its probabilities (soft), and on these and its last hidden states (hidden). Three seeds
each decide which rows and in which order. At the smaller pool the third way is gone from other cuts
too: an even spacing, the layers of the greatest block influence, and the demo's in two steps with
half of the training between them. All are asked the same test rows, in PyTorch, beside the base
model and the teacher. Then students as the demo has them, from the whole pool in the fourth way and
the gold rows with their own answers, one a seed, are exported as the demo exports its own, and
asked test rows one at a time beside the teacher in the same form and in its float forms, medians of
three in turn: a prompt's shared beginning is computed once in every runtime. --full is a grid of
four pools, three depths and five seeds.

Every result is kept in .distillery/bench/distil-DIGEST, told by recipe, rows and code, as soon as
it is there, so that a run that was ended goes on; after a change of the recipe's export alone, the
trained students serve again. --afresh begins anew. The last line is JSON, means over the seeds; the
speeds are those of the first one's student:

kept                of the teacher's accuracy, by the demo's exported students
fewer_parameters    share of the teacher's that the student does without
share_of_bf16_bytes the exported folder's bytes, of the teacher's in bfloat16
speedup_same        rows a second, exported student over the teacher in the same form
speedup_deployed    rows a second, exported student over the teacher's fastest float form
base, teacher       their accuracies
WAY_ROWS            mean accuracy of the students of a way from so many rows
"""

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from distillery.data.rows import RowReader, to_example
from distillery.evaluation.scoring import ModelToScore, score_model
from distillery.export.build import export
from distillery.labels.known import gold_labels
from distillery.machine import machine_name
from distillery.models.base import base_folder
from distillery.models.device import choose_device
from distillery.models.inspect import parameter_count
from distillery.models.load import end_of_turn_id, load_model, load_tokenizer, pad_id
from distillery.recipe import Columns, ExportForm, LayerChoice, TrainingRecipe, load_recipe
from distillery.records import Example, digest_of
from distillery.storage.digests import digest_of_files, list_files
from distillery.training import loop
from distillery.training.hidden_states import hidden_states
from distillery.training.pruning import keep_layers, resolved_layers
from distillery.training.rows import TrainingRow, training_rows
from distillery.training.validation import accuracy_of, option_probabilities

PROJECT = Path(__file__).resolve().parents[1]
SAMPLE = PROJECT / "distillery" / "data" / "sample"
PLACE = PROJECT / ".distillery" / "bench"
DEMO = load_recipe("demo")
WAYS: dict[str, dict[str, float]] = {
    "gold": {"soft_weight": 0.0, "hidden_weight": 0.0},
    "hard": {"soft_weight": 0.0, "hidden_weight": 0.0},
    "soft": {"soft_weight": 1.0, "hidden_weight": 0.0},
    "hidden": {"soft_weight": 1.0, "hidden_weight": DEMO.student.training.hidden_weight},
}
WAYS_BATCH = 8
"""Half the demo's: few rows make few steps."""
CUTS = ("even", "block_influence", "in two steps")
SPEED_ROWS, ROUNDS = 80, 3
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for the 95 % interval of a mean of so many."""


def read(split: str) -> list[Example]:
    lines = (SAMPLE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        to_example(json.loads(line), RowReader(Columns()), f"{split}, line {n}")
        for n, line in enumerate(lines, 1)
    ]


def merged(trained: Any, base: Path) -> Any:
    """`base` with the adapter merged in, as in a run: the base that it was trained on has become
    bfloat16."""
    with tempfile.TemporaryDirectory() as adapter:
        trained.save_pretrained(adapter)
        return load_model(base, Path(adapter))[0]


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
            print(
                f"{name}: {self._known[name]} ({time.perf_counter() - started:.0f} s)", flush=True
            )
        return self._known[name]


class Bench:
    def __init__(self, home: Path, steps: int | None) -> None:
        self.home, self.kept, self.steps = home, Kept(home / "results.jsonl"), steps
        self.base = base_folder(DEMO.teacher.preparation.base)
        self.tokenizer = load_tokenizer(self.base)
        self.pad_id, self.end_id = pad_id(self.tokenizer), end_of_turn_id(self.tokenizer)
        self.device = choose_device()
        self.test = self.rendered(read("test"))
        self.pool = self.rendered(read("pool"))
        self.teacher = self.prepared_teacher()
        self.soft, self.states = self.teachers_word(self.pool)

    def rendered(self, examples: Sequence[Example]) -> list[TrainingRow]:
        return training_rows(examples, gold_labels(examples), DEMO.prompt, self.tokenizer)[0]

    def train(
        self, model: Any, rows: Sequence[TrainingRow], recipe: TrainingRecipe, hidden: Any = None
    ) -> Any:
        return loop.train(
            model, rows, [], recipe, pad_id=self.pad_id, end_id=self.end_id, hidden=hidden
        )[0]

    def accuracy(self, model: Any) -> float:
        return accuracy_of(model.float(), self.test, pad_id=self.pad_id, device=self.device)

    def prepared_teacher(self) -> Path:
        recipe = DEMO.teacher.preparation.training.model_copy(update={"max_steps": self.steps})
        folder = self.home / "teacher"
        if not (folder / "tokenizer.json").exists():
            model = self.train(load_model(self.base)[0], self.rendered(read("gold")), recipe)
            merged(model, self.base).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return folder

    def teachers_word(self, rows: Sequence[TrainingRow]) -> tuple[list[list[float]], torch.Tensor]:
        """Its probabilities over the rows' options, and its last hidden states there."""
        model = load_model(self.teacher)[0]
        return (
            option_probabilities(model, rows, pad_id=self.pad_id, device=self.device),
            hidden_states(model, rows, pad_id=self.pad_id, device=self.device),
        )

    def cut(self, model: Any, depth: int, by: Any, rows: Sequence[TrainingRow]) -> Any:
        choice = LayerChoice(keep=depth, by=by)
        keep_layers(model, resolved_layers(model, choice, rows, self.pad_id))
        return model

    def student(self, way: str, pool: int, depth: int, seed: int, cut: str) -> Any:
        picked = random.Random(seed).sample(range(len(self.pool)), pool)
        rows = [self._row(way, index) for index in picked]
        changed = {**WAYS[way], "batch_size": WAYS_BATCH, "seed": seed, "max_steps": self.steps}
        recipe = DEMO.student.training.model_copy(update=changed)
        hidden = self.states[picked] if recipe.hidden_weight else None
        model = load_model(self.teacher)[0]
        by = "early_and_last" if cut == "in two steps" else cut
        if cut == "in two steps":
            recipe = recipe.model_copy(update={"epochs": recipe.epochs / 2})
            layers = len(model.get_decoder().layers)
            model = self.train(
                self.cut(model, (layers + depth) // 2, by, rows), rows, recipe, hidden
            )
        return self.train(self.cut(model, depth, by, rows), rows, recipe, hidden)

    def _row(self, way: str, index: int) -> TrainingRow:
        row, soft = self.pool[index], self.soft[index]
        if way == "gold":
            return row
        return row.model_copy(update={"answer": soft.index(max(soft)), "soft": tuple(soft)})

    def result(
        self, way: str, pool: int, depth: int, seed: int, cut: str = "early_and_last"
    ) -> float:
        named = f"{way}, pool {pool}, {depth} layers, seed {seed}"
        named = named if cut == "early_and_last" else f"{named}, {cut}"
        return float(
            self.kept.of(named, lambda: self.accuracy(self.student(way, pool, depth, seed, cut)))
        )

    def demos_student(self, depth: int, seed: int) -> Path:
        """The folder of a student like the demo's; its layers are the early ones and the last."""
        folder = self.home / f"student-{depth}-{seed}"
        if not (folder / "tokenizer.json").exists():
            gold = self.rendered(read("gold"))
            rows = [*(self._row("hidden", index) for index in range(len(self.pool))), *gold]
            changed = {"seed": seed, "max_steps": self.steps}
            hidden = torch.cat([self.states, self.teachers_word(gold)[1]])
            model = self.cut(load_model(self.teacher)[0], depth, "early_and_last", rows)
            model = self.train(
                model, rows, DEMO.student.training.model_copy(update=changed), hidden
            )
            model.float().save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return folder

    def exported(self, folder: Path, form: ExportForm = DEMO.export.form) -> Path:
        out = folder.with_name(f"{folder.name}-{form.title.replace('/', '-').replace(' ', '-')}")
        if not (out / "genai_config.json").exists():
            export(folder, None, form, out)
        return out

    def prepared(self, rows: int | None = None) -> Path:
        """A file of the test rows, or the first of them, as score_model takes it."""
        file = self.home / f"test-{rows}.jsonl"
        file.write_text(
            "".join(f"{example.model_dump_json()}\n" for example in read("test")[:rows]),
            encoding="utf-8",
        )
        return file

    def exported_student(self, depth: int, seed: int) -> dict[str, float]:
        def work() -> dict[str, float]:
            folder = self.demos_student(depth, seed)
            out = self.exported(folder)
            found = score_model(as_onnx(out), self.prepared(), DEMO.prompt)
            gold = [example.answer_key for example in read("test")]
            right = sum(a == b for a, b in zip(found.answers, gold, strict=True))
            size = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
            return {
                "accuracy": right / len(gold),
                "bytes": size,
                "parameters": parameter_count(folder),
            }

        named = f"student as the demo's, {depth} layers, seed {seed}, {DEMO.export.form.title}"
        return dict(self.kept.of(named, work))

    def speeds(self, student_folder: Path) -> dict[str, float]:
        """Rows a second of the exported student and of the teacher's forms, medians of three in
        turn."""

        def work() -> dict[str, float]:
            rows = self.prepared(SPEED_ROWS)
            torch_teacher = ModelToScore(
                name="teacher", kind="transformers", folder=str(self.teacher)
            )
            fp32 = ExportForm(precision="fp32")
            forms: dict[str, tuple[ModelToScore, Any]] = {
                "exported student": (as_onnx(self.exported(student_folder)), "auto"),
                "exported teacher": (as_onnx(self.exported(self.teacher)), "auto"),
                "fp32 teacher, ONNX Runtime": (as_onnx(self.exported(self.teacher, fp32)), "auto"),
                "fp32 teacher, Transformers": (torch_teacher, "float32"),
                "bf16 teacher, Transformers": (torch_teacher, "bfloat16"),
            }
            runs: dict[str, list[float]] = {name: [] for name in forms}
            for number in range(ROUNDS):
                for name in list(forms)[:: -1 if number % 2 else 1]:
                    model, precision = forms[name]
                    runs[name].append(
                        score_model(model, rows, DEMO.prompt, precision=precision).rows_per_second
                    )
            return {name: statistics.median(found) for name, found in runs.items()}

        return dict(
            self.kept.of(f"rows a second, {student_folder.name}, {DEMO.export.form.title}", work)
        )


def as_onnx(folder: Path) -> ModelToScore:
    return ModelToScore(name=folder.name, kind="onnx", folder=str(folder))


def shown(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} +/- {half:.3f}"


def run(
    bench: Bench, pools: Sequence[int], depths: Sequence[int], seeds: Sequence[int]
) -> dict[str, float]:
    kept = bench.kept
    base = kept.of("base model", lambda: bench.accuracy(load_model(bench.base)[0]))
    teacher = kept.of("teacher", lambda: bench.accuracy(load_model(bench.teacher)[0]))
    print(f"on {machine_name()}: base model {base:.3f}, teacher {teacher:.3f}", flush=True)
    # Seed by seed, so that a run that was ended has whole comparisons.
    for seed, depth, pool, way in product(seeds, depths, pools, WAYS):
        bench.result(way, pool, depth, seed)
    for depth, pool in product(depths, pools):
        means = {
            way: shown([bench.result(way, pool, depth, seed) for seed in seeds]) for way in WAYS
        }
        print(
            f"{depth} layers, {pool} rows: "
            + ", ".join(f"{way} {mean}" for way, mean in means.items())
        )
    depth, small = depths[0], min(pools)
    for seed, cut in product(seeds, CUTS):
        bench.result("soft", small, depth, seed, cut)
    means = {
        cut: shown([bench.result("soft", small, depth, seed, cut) for seed in seeds])
        for cut in CUTS
    }
    print(
        f"{depth} layers, {small} rows, soft, other cuts: "
        + ", ".join(f"{cut} {mean}" for cut, mean in means.items())
    )
    made = [bench.exported_student(depth, seed) for seed in seeds]
    parameters = parameter_count(bench.teacher)
    speeds = bench.speeds(bench.demos_student(depth, seeds[0]))
    floats = [speed for name, speed in speeds.items() if name.startswith(("fp32", "bf16"))]
    return {
        "kept": statistics.mean(one["accuracy"] for one in made) / teacher,
        "fewer_parameters": 1 - made[0]["parameters"] / parameters,
        "share_of_bf16_bytes": statistics.mean(one["bytes"] for one in made) / (2 * parameters),
        "speedup_same": speeds["exported student"] / speeds["exported teacher"],
        "speedup_deployed": speeds["exported student"] / max(floats),
        "base": base,
        "teacher": teacher,
    } | {
        f"{way}_{rows}": statistics.mean(bench.result(way, rows, depth, seed) for seed in seeds)
        for rows, way in product(pools, WAYS)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the larger grid, for hours")
    parser.add_argument("--afresh", action="store_true", help="leave earlier results aside")
    parser.add_argument("--layers", type=int, help="that students keep, where not the demo's")
    parser.add_argument(
        "--steps", type=int, help="of each training at most, to see the benchmark work"
    )
    given = parser.parse_args()
    base = digest_of_files(list_files(base_folder(DEMO.teacher.preparation.base)))
    files = [
        *sorted((PROJECT / "distillery").glob("*.py")),
        *sorted(SAMPLE.glob("*.jsonl")),
        Path(__file__),
    ]
    code = [file.read_text(encoding="utf-8") for file in files]
    recipe = DEMO.model_dump(
        mode="json", exclude={"export": True, "teacher": {"preparation": {"export"}}}
    )
    place = PLACE / f"distil-{digest_of([recipe, base, code, given.steps])[:12]}"
    if given.afresh:
        shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    bench = Bench(place, given.steps)
    assert isinstance(DEMO.student.layers, tuple)
    depth = given.layers or len(DEMO.student.layers)
    depths = tuple(dict.fromkeys((depth, 10, 18))) if given.full else (depth,)
    grid = (
        ((100, 200, 500, 1000), depths, range(5)) if given.full else ((100, 200), depths, range(3))
    )
    print(json.dumps({name: round(value, 3) for name, value in run(bench, *grid).items()}))


if __name__ == "__main__":
    main()
