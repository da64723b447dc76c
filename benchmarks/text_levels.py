"""Students of a teacher's texts alone, and of its probabilities of each token too: a part of the
benchmark of written answers (text.py).

The teacher is the base model, trained on E2E's answered rows as a local teacher that writes is by
default, for two epochs. It answers the facts of the pool, once for all students. A student is the
first 19 layers of the base model and its last one, of 30, trained by LoRA on these answers alone;
both levels get the same rows, steps and seeds. All of it stays in a folder: what is there is not
made again, so that a run goes on where the last one was ended.

The interval `low` to `high` of a difference is the paired bootstrap's over the test rows, each with
the answers of all seeds; `seeds_low` to `seeds_high` is Student's over the seeds' differences.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.text_rows import Row, e2e
from distillery.recipe import BaseModelRecipe, Metric, PromptRecipe, TrainingRecipe
from distillery.records import AnswerFormat, Example, TeacherLabel
from distillery.training.rows import TrainingRow

SEEDS = (0, 1, 2)
LAYERS = [*range(19), 29]
LEVELS = {"texts": 0.0, "probabilities": 1.0}
"""training.soft_weight by level."""
CANDIDATES = 20
"""The likeliest tokens whose probabilities are kept, as a local teacher keeps them."""

# In one precision, whatever the clock tells of the processor: the seeds must be all that differs.
COMMON = TrainingRecipe(method="lora", batch_size=8, precision="float32")
TEACHER = COMMON.model_copy(update={"epochs": 2, "learning_rate": 5e-4})
STUDENT = COMMON.model_copy(update={"epochs": 3, "learning_rate": 1e-3})

PROMPT = PromptRecipe(system="", user="{text}", answer="written")
FORMAT = AnswerFormat(max_tokens=96, metric="bleu")
METRICS: tuple[Metric, ...] = ("bleu", "rouge_l")


def run_levels(place: Path) -> dict[str, Any]:
    """Train the students, and return the figures of each level's by seed, with what the
    probabilities gain in BLEU: the mean `gain`, and its bounds."""
    teacher = measured(place / "teacher.json", base_model(), teacher_of(place))
    found: dict[str, Any] = {"teacher": {metric: teacher[metric] for metric in METRICS}}
    answers: dict[str, list[list[str | None]]] = {level: [] for level in LEVELS}
    for level in LEVELS:
        found[level] = {metric: [] for metric in METRICS}
    for seed in SEEDS:
        for level in LEVELS:
            student = student_of(place, level, seed)
            answers[level].append(student["answers"])
            for metric in METRICS:
                found[level][metric].append(student[metric])
            shown = {key: student[key] for key in (*METRICS, "rows_s", "cpu_s")}
            print(json.dumps({"level": level, "seed": seed, **shown}), flush=True)
    gained = {}
    for metric in METRICS:
        gained[metric] = difference(answers["probabilities"], answers["texts"], metric)
    return {**found, "rouge_l_gain": gained["rouge_l"], **gained["bleu"]}


def student_of(place: Path, level: str, seed: int) -> dict[str, Any]:
    """Return what a student writes to the test rows, its figures, and its training's speed."""
    recipe = STUDENT.model_copy(update={"soft_weight": LEVELS[level], "seed": seed})
    base, rows = student_base(place), taught_rows(place)
    adapter = once(place / f"{level}-{seed}", partial(train_adapter, base, rows, recipe))
    return measured(place / f"{level}-{seed}.json", base, adapter)


def measured(file: Path, base: Path, adapter: Path) -> dict[str, Any]:
    """Return the figures of a trained adapter, which are kept in a file, with its answers to the
    test rows and with what its folder tells of its training's speed."""

    def ask(out: Path) -> None:
        answers = answers_of(base, adapter, e2e()["test"])
        speed = json.loads((adapter / "speed.json").read_text())
        out.write_text(json.dumps({"answers": answers, **figures_of(answers), **speed}))

    found: dict[str, Any] = json.loads(once(file, ask).read_text())
    return found


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """Return a file or a folder that `make` writes where it is not there yet. It appears once it is
    whole."""
    if not path.exists():
        beside = path.with_name(f"unfinished-{path.name}")
        shutil.rmtree(beside, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(beside)
        beside.rename(path)
    return path


def base_model() -> Path:
    """Return the folder of the base model."""
    from distillery.models.base import base_folder

    return base_folder(BaseModelRecipe())


def student_base(place: Path) -> Path:
    """Return the folder of the model that the students start from."""

    def cut(out: Path) -> None:
        from distillery.models.load import load_model
        from distillery.training.pruning import keep_layers

        model, tokenizer = load_model(base_model())
        keep_layers(model, LAYERS)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)

    return once(place / "base", cut)


def teacher_of(place: Path) -> Path:
    """Return the folder of the teacher's adapter. It learns each of a row's sentences."""

    def train(out: Path) -> None:
        examples: list[Example] = []
        labels = {}
        for row in e2e()["gold"]:
            for sentence in row["answers"]:
                example = example_of(len(examples), row)
                examples.append(example)
                labels[example.example_id] = label_of(example, sentence)
        train_adapter(base_model(), rendered(examples, labels), TEACHER, out)

    return once(place / "teacher", train)


def taught_rows(place: Path) -> list[TrainingRow]:
    """Return the rows that the students learn: the teacher's answers, with the probabilities of its
    likeliest tokens."""

    def ask(out: Path) -> None:
        from distillery.models.load import load_model
        from distillery.training.rows import write_rows

        teacher = teacher_of(place)
        facts = e2e()["pool"]
        examples = [example_of(number, row) for number, row in enumerate(facts)]
        labels = {}
        answers = answers_of(base_model(), teacher, facts)
        for example, answer in zip(examples, answers, strict=True):
            if answer:
                labels[example.example_id] = label_of(example, answer)
        model, _ = load_model(base_model(), teacher)
        write_rows([with_probabilities(row, model) for row in rendered(examples, labels)], out)

    from distillery.training.rows import RowFile

    return list(RowFile(once(place / "rows.jsonl", ask)))


def with_probabilities(row: TrainingRow, teacher: Any) -> TrainingRow:
    """Return a row with the teacher's probabilities for the tokens of its answer and the end of the
    turn."""
    import torch

    from distillery.training.token_labels import token_labels_of

    with torch.inference_mode():
        ids = torch.tensor([[*row.prompt, *row.target]])
        logits = teacher(input_ids=ids, logits_to_keep=len(row.target) + 1).logits[0]
        logs, tokens = logits.float().log_softmax(-1).topk(CANDIDATES)
    found = []
    for candidates, logarithms in zip(tokens.tolist(), logs.tolist(), strict=True):
        found.append(dict(zip(candidates, logarithms, strict=True)))
    return row.model_copy(update={"soft_tokens": token_labels_of(found)})


def example_of(number: int, row: Row) -> Example:
    return Example(example_id=str(number), question=row["text"], format=FORMAT)


def label_of(example: Example, answer: str) -> TeacherLabel:
    return TeacherLabel(example_id=example.example_id, answer=answer)


def rendered(examples: Sequence[Example], labels: dict[str, TeacherLabel]) -> list[TrainingRow]:
    """Return labelled rows as token ids."""
    from distillery.models.load import load_tokenizer
    from distillery.training.rows import training_rows

    rows, _ = training_rows(examples, labels, PROMPT, load_tokenizer(base_model()))
    return rows


def train_adapter(
    base: Path, rows: Sequence[TrainingRow], recipe: TrainingRecipe, out: Path
) -> None:
    """Train a model by LoRA; write its adapter to `out`, with speed.json: rows a second, and the
    seconds of processor time."""
    from distillery.models.load import end_of_turn_id, load_model, pad_id
    from distillery.training.loop import train

    model, tokenizer = load_model(base)
    started = time.process_time()
    model, result = train(
        model, rows, [], recipe, pad_id=pad_id(tokenizer), end_id=end_of_turn_id(tokenizer)
    )
    speed = {"rows_s": result.rows_per_second, "cpu_s": time.process_time() - started}
    model.save_pretrained(out)
    (out / "speed.json").write_text(json.dumps(speed))


def answers_of(base: Path, adapter: Path | None, rows: Sequence[Row]) -> list[str | None]:
    """Return what a model writes to the rows' texts, in float32; None where it does not end."""
    return [each.text if each.finished else None for each in written_by(base, adapter, rows)]


def written_by(
    base: Path, adapter: Path | None, rows: Sequence[Row], instruction: str = ""
) -> list[Any]:
    """Return what a model, with an adapter or without, writes to the rows' texts, in float32, each
    as a Written. `instruction`: the system message, if it is told what to write."""
    import torch

    from distillery.evaluation.predictors import load_predictor
    from distillery.evaluation.scoring import ModelToScore, ScoringJob

    job = ScoringJob(
        model=ModelToScore(
            name="model",
            kind="transformers",
            folder=str(base),
            adapter=str(adapter) if adapter else None,
        ),
        examples="",
        prompt=PROMPT.model_copy(update={"system": instruction}),
        threads=torch.get_num_threads(),
    )
    predictor = load_predictor(job, FORMAT)
    assert predictor.ask_batches
    prompts = []
    for number, row in enumerate(rows):
        prompt = predictor.render(example_of(number, row))
        assert prompt
        prompts.append(prompt)
    return list(predictor.ask_batches(prompts, lambda _done: None))


def figures_of(answers: Sequence[str | None]) -> dict[str, float]:
    """Return the figures of answers to the test rows."""
    from distillery.evaluation.metrics import metric_of

    gold = [row["answers"] for row in e2e()["test"]]
    return {metric: round(metric_of(metric, answers, gold), 4) for metric in METRICS}


def difference(
    first: Sequence[Sequence[str | None]], second: Sequence[Sequence[str | None]], metric: Metric
) -> dict[str, Any]:
    """Return how much better the first students write than the second, each over the test rows and
    all seeds together, with the 95 % intervals that the module tells of, and `by_seed`."""
    from scipy import stats

    from distillery.evaluation.bootstrap import PairedSums, RowSums
    from distillery.evaluation.gold import Gold

    gold = Gold([tuple(row["answers"]) for row in e2e()["test"]], metric)

    def together(students: Sequence[RowSums]) -> RowSums:
        rows = sum(student.rows for student in students)
        best, none = students[0].best * len(students), students[0].none * len(students)
        return RowSums(metric, rows, best, none)

    ours = [gold.sums(answers, metric) for answers in first]
    theirs = [gold.sums(answers, metric) for answers in second]
    paired = PairedSums(together(ours), together(theirs))
    interval = paired.difference_interval(0.95)
    found = {"gain": paired.difference, "low": interval.low, "high": interval.high}
    by_seed = [one.value - other.value for one, other in zip(ours, theirs, strict=True)]
    if len(by_seed) > 1:
        spread = stats.ttest_1samp(by_seed, 0).confidence_interval(0.95)
        found |= {"seeds_low": float(spread.low), "seeds_high": float(spread.high)}
    rounded = {name: round(each, 4) for name, each in found.items()}
    return {**rounded, "by_seed": [round(each, 4) for each in by_seed]}
