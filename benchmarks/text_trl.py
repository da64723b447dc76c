"""TRL's SFTTrainer beside ours on E2E's answered rows: a part of the benchmark of written answers
(text.py).

LoRA on the base model by the defaults of a local teacher that writes; both get the same token ids,
in batches of 8, in a process of its own, and the loss is on the answer and the end of the turn.
TRL's fastest setting is found by trials (train.py). The clock runs over all steps. What each has
learnt is measured by BLEU on the test rows, in float32.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.text_rows import Row, e2e

STEPS = 120


def run_trl(place: Path) -> dict[str, Any]:
    """Return rows a second, peak memory and BLEU of both; `ratio`: ours over TRL's rows a second,
    `gain`: the BLEU of ours less TRL's, with the bounds of its 95 % interval, `low` and `high`."""
    from benchmarks.train import fastest, install_trl, run
    from distillery.evaluation.bootstrap import PairedSums
    from distillery.evaluation.gold import Gold

    install_trl()
    settings = prepare(place)
    test = e2e()["test"]
    gold = Gold([tuple(row["answers"]) for row in test], "bleu")
    found: dict[str, Any] = {"rows": settings["count"], "steps": STEPS}
    sums = {}
    for name in ("ours", "trl"):
        out = place / name
        chosen = fastest(name, place / "trials", place)
        found[name] = run(name, chosen, STEPS, out, place)
        adapter = next(out.rglob("adapter_config.json")).parent
        answers = written_answers(Path(settings["base"]), adapter, test)
        sums[name] = gold.sums(answers, "bleu")
        found[name]["bleu"] = round(sums[name].value, 4)
    paired = PairedSums(sums["ours"], sums["trl"])
    interval = paired.difference_interval(0.95)
    found["ratio"] = round(found["ours"]["rows_s"] / found["trl"]["rows_s"], 2)
    found |= {"gain": round(paired.difference, 4)}
    return found | {"low": round(interval.low, 4), "high": round(interval.high, 4)}


def prepare(place: Path) -> dict[str, Any]:
    """Write the files that the contestants read, and return the settings that they share."""
    from benchmarks.train import write_contest
    from distillery.labels.known import gold_labels
    from distillery.models.base import base_folder
    from distillery.recipe import BaseModelRecipe, PromptRecipe, TrainingRecipe
    from distillery.records import AnswerFormat, Example

    answer_format = AnswerFormat(max_tokens=96, metric="bleu")
    examples: list[Example] = []
    for row in e2e()["gold"]:
        for sentence in row["answers"]:
            examples.append(
                Example(
                    example_id=str(len(examples)),
                    question=row["text"],
                    answer_key=sentence,
                    format=answer_format,
                )
            )
    training = TrainingRecipe(method="lora", batch_size=8, learning_rate=5e-4)
    prompt = PromptRecipe(system="", user="{text}", answer="written")
    base = base_folder(BaseModelRecipe())
    return write_contest(place, base, training, examples, gold_labels(examples), prompt)


def written_answers(
    base: Path, adapter: Path | None, rows: Sequence[Row], instruction: str = ""
) -> list[str | None]:
    """Return what a model, with an adapter or without, writes to the rows' texts, in float32.
    `instruction`: the system message, if it is told what to write."""
    from distillery.evaluation.predictors import load_predictor
    from distillery.evaluation.scoring import ModelToScore, ScoringJob
    from distillery.inference.generation import Written
    from distillery.recipe import PromptRecipe
    from distillery.records import AnswerFormat, Example

    answer_format = AnswerFormat(max_tokens=96, metric="bleu")
    job = ScoringJob(
        model=ModelToScore(
            name="model",
            kind="transformers",
            folder=str(base),
            adapter=str(adapter) if adapter else None,
        ),
        examples="",
        prompt=PromptRecipe(system=instruction, user="{text}", answer="written"),
        threads=2,
    )
    predictor = load_predictor(job, answer_format)
    assert predictor.ask_batches
    rendered = []
    for number, row in enumerate(rows):
        example = Example(example_id=str(number), question=row["text"], format=answer_format)
        found = predictor.render(example)
        assert found
        rendered.append(found)
    answers: list[str | None] = []
    for each in predictor.ask_batches(rendered, lambda _done: None):
        assert isinstance(each, Written)
        answers.append(each.text)
    return answers
