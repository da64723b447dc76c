"""Students that write their answers: which rows they learn from, what is learnt, and when an answer
is right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distillery.data.examples import read_format, write_examples
from distillery.labels.known import gold_labels
from distillery.models.device import choose_device
from distillery.models.load import end_of_turn_id, load_model, load_tokenizer, pad_id
from distillery.recipe import PromptRecipe, TrainingRecipe
from distillery.records import AnswerFormat, Example, TeacherLabel
from distillery.training.batching import by_length, forward_written
from distillery.training.decisions import kept_decisions
from distillery.training.fine_tune import fine_tune
from distillery.training.inputs import read_training_inputs
from distillery.training.loop import train
from distillery.training.rows import TrainingRow, training_rows
from distillery.training.validation import validate_written

TinyModel = Callable[[str], Path]
FORMAT = AnswerFormat(max_tokens=12, metric="rouge_l")
PROMPT = PromptRecipe(system="Say it.", user="{text}", answer="written", max_tokens=60)
ANSWERS = ("bread", "a river, wide", "no cloud")


def examples(count: int = 9) -> list[Example]:
    rows = []
    for number in range(count):
        question = f"{('oven', 'bridge', 'sky')[number % 3]} {number}"
        fields = {"answer_key": ANSWERS[number % 3], "format": FORMAT}
        rows.append(Example(example_id=str(number), question=question, choices=(), **fields))
    return rows


def rendered(folder: Path, rows: list[Example] | None = None) -> list[TrainingRow]:
    found, _ = training_rows(
        rows or examples(), gold_labels(rows or examples()), PROMPT, load_tokenizer(folder)
    )
    return found


def greedy(model: Any, row: TrainingRow, end_id: int, most: int) -> list[int]:
    """Return what Transformers itself writes, with the end of the turn."""
    model.eval()
    made = model.generate(
        torch.tensor([row.prompt]), do_sample=False, max_new_tokens=most, eos_token_id=end_id
    )
    return list(map(int, made[0, len(row.prompt) :]))


def test_rows_with_a_long_prompt_or_a_long_answer_are_set_aside(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    rows = examples()
    longer = {"answer_key": "river " * 13}
    rows[1] = rows[1].model_copy(update=longer)
    rows[2] = rows[2].model_copy(update={"question": "sky " * 60})
    for name in ("train", "validation"):
        write_examples(rows, tmp_path / f"{name}.jsonl")
    labels = {
        row.example_id: TeacherLabel(example_id=row.example_id, answer="bread") for row in rows
    }
    del labels["8"]
    tokenizer = load_tokenizer(tiny_model("llama"))
    labelled, too_long = training_rows(rows, labels, PROMPT, tokenizer)
    assert too_long == ["2"], "the teacher's answer counts, not the row's own"
    assert {tokenizer.decode(row.target) for row in labelled} == {"bread"}
    own, too_long = training_rows(rows, gold_labels(rows), PROMPT, tokenizer)
    assert too_long == ["1", "2"]
    assert [tokenizer.decode(row.target) for row in own[:2]] == ["bread", "bread"]
    assert all(not (row.letters or row.texts or row.soft or row.answer) for row in own)


SHARED = tuple(range(20, 60))


@pytest.mark.parametrize(
    ("prompts", "texts"),
    [
        # Long answers and short prompts: what the prompts share is computed once all the same.
        (
            [(*SHARED, 5), (*SHARED, 6, 300), (*SHARED, 6, 9)],
            [tuple(range(100, 150)), (7,), (8, 4)],
        ),
        # Equal prompts, and answers that begin alike: the last prompt token says their first one.
        ([SHARED, SHARED, SHARED], [(*range(100, 120), 7), tuple(range(100, 118)), (100, 101)]),
    ],
)
def test_a_batch_of_written_answers_has_the_numbers_of_its_rows(
    tiny_model: TinyModel, prompts: list[tuple[int, ...]], texts: list[tuple[int, ...]]
) -> None:
    model, _ = load_model(tiny_model("llama"))
    logits = forward_written(model, prompts, texts, 0)
    assert logits.shape[1] == max(map(len, texts)) + 1
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        alone = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 :]
        assert torch.allclose(logits[index, -len(alone) :], alone, atol=1e-4)


def test_an_answer_is_right_if_it_is_what_would_be_written(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    tokenizer = load_tokenizer(folder)
    end, padding, device = end_of_turn_id(tokenizer), pad_id(tokenizer), choose_device("float32")
    rows = rendered(folder)
    model, _ = load_model(folder)
    recipe = TrainingRecipe(
        method="full", epochs=20, batch_size=4, learning_rate=3e-3, precision="float32", patience=4
    )
    model, result = train(model, rows, rows[:6], recipe, pad_id=padding, end_id=end)
    assert result.curve[-1].loss < 0.1 < result.curve[0].loss
    assert result.validation_accuracy == 1.0
    spoiled = []
    for number, row in enumerate(rows):
        # Another end, another beginning, an answer that goes on, and one that ends before.
        changed = [
            (*row.target[:-1], 9),
            (9, *row.target[1:]),
            (*row.target, 9),
            row.target[:-1] or (9, 9),
            row.target,
        ][number % 5]
        spoiled.append(row.model_copy(update={"target": changed}))
    shares, loss = validate_written(model, spoiled, pad_id=padding, end_id=end, device=device)
    written = [greedy(model, row, end, 20) == [*row.target, end] for row in spoiled]
    right = [share == 1 for share in shares]
    assert right == written
    assert sum(right) == 1
    singles = [
        validate_written(model, [row], pad_id=padding, end_id=end, device=device)[1]
        for row in spoiled
    ]
    assert loss == pytest.approx(sum(singles) / len(singles), rel=1e-4)
    first = spoiled[1]
    model.eval()
    logs = torch.log_softmax(model(torch.tensor([first.prompt + first.target])).logits[0], -1)
    tokens = [*first.target, end]
    own = logs[-len(tokens) :][torch.arange(len(tokens)), tokens]
    assert singles[1] == pytest.approx(-float(own.mean()), rel=1e-4)


def test_hidden_states_are_compared_at_the_end_of_the_prompt(tiny_model: TinyModel) -> None:
    """A model that is its own teacher has nothing to learn from the states, whatever the lengths of
    the answers are."""
    from distillery.training.hidden_states import hidden_states
    from distillery.training.loop import set_up

    folder = tiny_model("llama")
    rows, device = rendered(folder), choose_device("float32")
    model, _ = load_model(folder)
    taught = hidden_states(model, rows, pad_id=0, device=device)
    losses = []
    for weight in (0.0, 5.0):
        recipe = TrainingRecipe(method="full", precision="float32", hidden_weight=weight)
        training = set_up(model, rows, [], recipe, taught, 0, 2)
        losses.append(float(training.objective(rows)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_length_of_an_answer_counts(tiny_model: TinyModel) -> None:
    rows = [
        TrainingRow(prompt=(1,) * prompt, target=(2,) * target, answer=0)
        for prompt, target in ((10, 90), (50, 1), (20, 10), (48, 2))
    ]
    assert list(by_length(rows, 2)) == [[2, 3], [1, 0]]
    assert list(by_length(rows, 4, turn=60)) == [[2, 3, 1], [0]]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_format_stands_beside_the_weights(
    tiny_model: TinyModel, tmp_path: Path, method: str
) -> None:
    from distillery.labels.known import write_known_labels
    from distillery.recipe import TeacherRecipe

    rows = examples()
    write_examples(rows, tmp_path / "train.jsonl")
    write_known_labels(
        rows, gold_labels(rows), PROMPT, TeacherRecipe(kind="gold"), tmp_path / "labels"
    )
    inputs = read_training_inputs(
        load_tokenizer(tiny_model("llama")),
        PROMPT,
        tmp_path / "train.jsonl",
        tmp_path / "labels",
        validation=tmp_path / "train.jsonl",
    )
    assert inputs.format == FORMAT
    recipe = TrainingRecipe.model_validate({"method": method, "max_steps": 1})
    fine_tune(
        tiny_model("llama"),
        None,
        inputs.rows,
        inputs.validation,
        recipe,
        tmp_path / "out",
        answer_format=inputs.format,
    )
    folder = tmp_path / "out" / ("adapter" if method == "lora" else "model")
    assert read_format(folder) == FORMAT


def test_each_text_of_a_label_is_learnt(tiny_model: TinyModel) -> None:
    rows, tokenizer = examples(2), load_tokenizer(tiny_model("llama"))
    longer = "river " * 13
    labels = {
        "0": TeacherLabel(example_id="0", answer="bread", references=("a river", longer)),
        "1": TeacherLabel(example_id="1", answer="no cloud"),
    }
    found, too_long = training_rows(rows, labels, PROMPT, tokenizer)
    assert [tokenizer.decode(row.target) for row in found] == ["bread", "a river", "no cloud"]
    assert found[0].prompt == found[1].prompt != found[2].prompt
    assert too_long == ["0"], "of its third text"


def test_tokens_prove_what_whole_answers_can_t(tiny_model: TinyModel) -> None:
    """Of long texts, no model has one right as a whole. These answers, with another end each, are
    lost the better training goes."""
    folder = tiny_model("llama")
    tokenizer = load_tokenizer(folder)
    end, padding = end_of_turn_id(tokenizer), pad_id(tokenizer)
    rows = rendered(folder, examples(36))
    others = [rows[(number + 1) % 36].target for number in range(36)]
    spoiled = [
        row.model_copy(update={"target": (*target, 9)})
        for row, target in zip(rows, others, strict=True)
    ]
    shape: dict[str, Any] = {"method": "full", "batch_size": 4, "precision": "float32"}
    shape |= {"epochs": 12, "learning_rate": 0.003}
    kept = {}
    for patience in ("proven", 2):
        recipe = TrainingRecipe(patience=patience, **shape)
        model, _ = load_model(folder)
        with kept_decisions() as decisions:
            _, result = train(model, rows, spoiled, recipe, pad_id=padding, end_id=end)
        points = {
            point.step: point for point in result.curve if point.validation_tokens is not None
        }
        assert all(point.validation_accuracy == 0 for point in points.values())
        best = points[result.kept_step]
        assert result.validation_tokens == best.validation_tokens
        assert result.kept_step < result.steps
        said = f"they have {best.validation_tokens:.3f} of the validation rows' tokens right, and"
        assert said in decisions[-1]
        kept[patience] = decisions[-1]
    assert kept["proven"].endswith("(training.patience, by the tokens)")
    assert kept[2].endswith("(training.patience, by the loss)")


def test_a_share_of_tokens_is_that_of_what_would_be_written(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    tokenizer = load_tokenizer(folder)
    end, padding, device = end_of_turn_id(tokenizer), pad_id(tokenizer), choose_device("float32")
    model, _ = load_model(folder)
    model.eval()
    row = rendered(folder)[0]
    written = greedy(model, row, end, 8)[:7]
    targets = [tuple(written), (*written[:-1], (written[-1] + 1) % 500)]
    rows = [row.model_copy(update={"target": target}) for target in targets]
    shares, _ = validate_written(model, rows, pad_id=padding, end_id=end, device=device)
    ends = int(greedy(model, row, end, 8)[7:] == [end])
    assert shares[0] == (7 + ends) / 8
    assert shares[1] in (6 / 8, 7 / 8), "whether the end would follow the other token"
