"""One student, asked in training's way, by Transformers as it is scored, by ONNX Runtime and over
HTTP: equal token ids, answers, and probabilities of options or classes within 1e-3 in fp32."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from tiny_model import ARCHITECTURES

from distillery.data.examples import write_classes
from distillery.evaluation.scoring import ModelToScore, ScoringJob
from distillery.evaluation.scoring_process import score
from distillery.export.build import export
from distillery.inference.onnx_student import OnnxStudent
from distillery.labels.known import gold_labels
from distillery.models.device import choose_device
from distillery.models.inspect import model_and_adapter
from distillery.models.load import load_model, load_tokenizer, pad_id
from distillery.prompts import TransformersTokenizer, render_ids, render_messages
from distillery.recipe import ExportForm, PromptRecipe, TrainingRecipe
from distillery.records import Example
from distillery.serving.process import served
from distillery.training.fine_tune import fine_tune
from distillery.training.inputs import tokens_of_classes
from distillery.training.rows import training_rows
from distillery.training.validation import option_probabilities

WORDS = ("bread", "river", "cloud")
EXAMPLES = [
    Example(
        example_id=str(i),
        question=f"{WORDS[i % 3]} no. {i}",
        choices=("oven", "a bridge", "rain"),
        answer_key="ABC"[i % 3],
    )
    for i in range(9)
]
FORMS = {
    "letter": PromptRecipe(system="Pick.", user="{question}\n{choices}"),
    "text": PromptRecipe(system="Pick.", user="{question}", answer="text"),
    "class": PromptRecipe(system="", user="{text}", answer="class", pooling="last"),
    "class, mean and last": PromptRecipe(system="", user="{text}", answer="class"),
}
CLASSES = ("a bakery", "a bank, or a bridge", "weather", "none of these")


def examples_of(form: str) -> list[Example]:
    if not form.startswith("class"):
        return EXAMPLES
    rows = []
    for number, example in enumerate(EXAMPLES):
        values = {"choices": (), "classes": CLASSES, "answer_key": CLASSES[number % 3]}
        rows.append(example.model_copy(update=values))
    return rows


EACH_ARCHITECTURE = [
    pytest.param(arch, marks=() if arch in ("llama", "phi4mini") else pytest.mark.slow)
    for arch in ARCHITECTURES
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", EACH_ARCHITECTURE)
def test_all_ways_of_asking_a_student_agree(
    tiny_model: Callable[[str], Path], tmp_path: Path, arch: str, form: str
) -> None:
    prompt, base, tokenizer = FORMS[form], tiny_model(arch), load_tokenizer(tiny_model(arch))
    examples = examples_of(form)
    classes = None
    if prompt.answer == "class":
        classes = tokens_of_classes(examples[0], prompt, tokenizer)
    labels = gold_labels(examples)
    rows, _ = training_rows(examples, labels, prompt, tokenizer, classes=classes)
    recipe = TrainingRecipe(
        method="lora", epochs=4, batch_size=4, learning_rate=1e-2, precision="float32"
    )
    fine_tune(base, None, rows, [], recipe, tmp_path / "trained", classes=classes)
    model, adapter = model_and_adapter(tmp_path / "trained", base)

    merged, _ = load_model(model, adapter)
    device, pad = choose_device("float32"), pad_id(tokenizer)
    expected = option_probabilities(merged, rows, pad_id=pad, device=device)

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{example.model_dump_json()}\n" for example in examples))
    if classes:
        write_classes(tmp_path, CLASSES)
    student = ModelToScore(
        name="student", kind="transformers", folder=str(model), adapter=str(adapter)
    )
    scored = score(ScoringJob(model=student, examples=str(file), prompt=prompt, threads=1))
    export(model, adapter, ExportForm(precision="fp32"), tmp_path / "onnx")
    onnx = OnnxStudent(tmp_path / "onnx", threads=1)
    with served(tmp_path / "onnx", "student", threads=1) as server:
        headers = {"Authorization": f"Bearer {server.key.get_secret_value()}"}
        for number, (example, row) in enumerate(zip(examples, rows, strict=True)):
            ids = render_ids(example, prompt, onnx.tokenizer)
            assert (
                ids
                == list(row.prompt)
                == render_ids(example, prompt, TransformersTokenizer(tokenizer))
            )
            options = example.options if form == "text" else example.keys
            body = {
                "messages": render_messages(example, prompt),
                "logprobs": True,
                "top_logprobs": 4,
                "structured_outputs": {"choice": list(options)},
            }
            reply = httpx.post(
                f"{server.url}/chat/completions", json=body, headers=headers, trust_env=False
            ).json()
            assert "choices" in reply, reply
            over_http = {
                entry["token"]: 2.718281828459045 ** entry["logprob"]
                for entry in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            }
            answer = onnx.answer(example, prompt)
            by_all = [
                scored.probabilities[number],
                list(answer.probabilities.values()),
                [over_http[option] for option in options],
            ]
            for probabilities in by_all:
                assert probabilities == pytest.approx(expected[number], abs=1e-3), json.dumps(
                    by_all
                )
            letter = example.keys[expected[number].index(max(expected[number]))]
            said = reply["choices"][0]["message"]["content"]
            assert (
                letter
                == answer.letter
                == scored.answers[number]
                == example.keys[list(options).index(said)]
            )
