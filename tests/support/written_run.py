"""An evaluation of written answers by models whose answers are given: no model is loaded."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from distillery.data.examples import write_examples
from distillery.evaluation.evaluate import evaluate
from distillery.evaluation.scoring import ModelToScore, Scored
from distillery.recipe import PromptRecipe
from distillery.records import AnswerFormat, Example, ScoreRow

CITIES = ("Bonn", "Ulm", "New York", "York", "Mainz")
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
FIELDS = AnswerFormat(max_tokens=64, json_schema=SCHEMA, metric="field_f1")
TEXT = AnswerFormat(max_tokens=64, metric="rouge_l")
STUDENT = "student int8"
PROMPT = PromptRecipe(system="", user="{question}\n{choices}")
"""No model is asked, so that no row is rendered."""


def booking(number: int) -> Example:
    """Return a row with one field, or with two."""
    chance = random.Random(number)
    city, people = chance.choice(CITIES), chance.randint(2, 9)
    found: dict[str, object] = {"city": city}
    text = f"A table in {city}, please"
    if number % 3:
        found["people"] = people
        text += f", for {people} people"
    return Example(
        example_id=f"r{number}",
        question=f"{text}. Ticket {number}.",
        answer_key=json.dumps(found),
        format=FIELDS,
    )


def description(number: int) -> Example:
    """Return a row with two gold answers."""
    chance = random.Random(number)
    city, people = chance.choice(CITIES), chance.randint(2, 9)
    return Example(
        example_id=f"r{number}",
        question=f"city: {city}; seats: {people}; ticket: {number}",
        answer_key=f"There are {people} seats in {city}.",
        references=(f"{city} has {people} seats for you, {number} in all.",),
        format=TEXT,
    )


def evaluated(
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    test: Sequence[Example],
    learnt: Sequence[Example],
    answers: Mapping[str, Sequence[str | None]],
) -> tuple[ScoreRow, ...]:
    """Evaluate models that give `answers`, by their names, on the rows of `test`; the files are in
    `out`."""

    def score_model(model: ModelToScore, *_: object, reorder: bool, **_more: object) -> Scored:
        assert reorder == (model.name == STUDENT)
        given = tuple(answers[model.name])
        return Scored(
            answers=given,
            probabilities=(None,) * len(given),
            latencies_ms=(20.0,) * len(given),
            rows_per_second=50.0,
            peak_mib=100.0,
            load_s=0.5,
            ran_on="here",
            no_answer=tuple(None if answer else "no JSON" for answer in given),
            tokens_per_second=123.0,
        )

    monkeypatch.setattr("distillery.evaluation.evaluate.score_model", score_model)
    rows = out.parent / f"{out.name}-rows"
    rows.mkdir(parents=True)
    write_examples(test, rows / "test.jsonl")
    models = [ModelToScore(name=name, kind="onnx", folder=str(rows)) for name in answers]
    return evaluate(
        models,
        "teacher",
        rows / "test.jsonl",
        learnt,
        PROMPT,
        STUDENT,
        out,
        float_model="student",
    )
