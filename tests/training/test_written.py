"""Students that write their answers: which rows they learn from, what is learnt, and when an answer
is right."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_folder import OneFolder

from distillery.data.answer_tokens import AnswerToken, write_answer_tokens
from distillery.data.examples import read_format, write_examples
from distillery.errors import TrainingError
from distillery.labels.known import gold_labels, write_known_labels
from distillery.models.device import choose_device
from distillery.models.drafts import FILE, Drafts, learn_drafts
from distillery.models.load import end_of_turn_id, load_model, load_tokenizer, pad_id
from distillery.recipe import PromptRecipe, TeacherRecipe, TrainingRecipe
from distillery.records import AnswerFormat, Example, TeacherLabel
from distillery.training.batching import by_length, forward_written
from distillery.training.decisions import kept_decisions
from distillery.training.fine_tune import fine_tune
from distillery.training.hidden_states import read_hidden_states, write_hidden_states
from distillery.training.inputs import read_training_inputs
from distillery.training.loop import TrainingProgress, TrainingResult, set_up, train
from distillery.training.rows import TrainingRow, training_rows
from distillery.training.token_labels import TokenLabels
from distillery.training.token_loss import taught_losses
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


def kept_states(folder: Path, rows: list[TrainingRow], path: Path) -> torch.Tensor:
    """Return a model's states for rows, by way of their file."""
    model, _ = load_model(folder)
    device = choose_device("float32")
    write_hidden_states(model, rows, path, pad_id=0, device=device)
    return read_hidden_states(path)


def test_the_states_before_each_token_of_an_answer_are_kept(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    model, _ = load_model(folder)
    rows = rendered(folder)
    found = kept_states(folder, rows, tmp_path / "states.npy")
    assert found.dtype == torch.float16
    start = 0
    for row in rows:
        ids = torch.tensor([row.prompt + row.target])
        own = model(ids, output_hidden_states=True).hidden_states[-1][0, len(row.prompt) - 1 :]
        states = found[start : start + len(own)].float()
        assert torch.allclose(states.norm(dim=-1), torch.ones(len(own)), atol=1e-3)
        cosines = torch.nn.functional.cosine_similarity(states, own, dim=-1)
        assert cosines.min() > 1 - 1e-6
        start += len(own)
    assert start == len(found)


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn_from_the_states(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    rows = rendered(folder)
    taught = kept_states(folder, rows, tmp_path / "states.npy")
    model, _ = load_model(folder)
    losses = []
    for weight in (0.0, 5.0):
        recipe = TrainingRecipe(method="full", precision="float32", hidden_weight=weight)
        training = set_up(model, rows, [], recipe, taught, 0, 2)
        losses.append(float(training.objective(rows)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_loss_on_hidden_states_is_a_mean_over_tokens_and_rows(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    rows = rendered(folder)[:4]
    assert len({len(row.target) for row in rows}) > 1
    model, _ = load_model(folder)
    taught = torch.randn(sum(len(row.target) + 1 for row in rows), 64).half()
    recipe = TrainingRecipe(method="full", precision="float32", hidden_weight=2.0)
    objective = set_up(model, rows, [], recipe, taught, 0, 2).objective
    without = replace(objective, teacher_states=None)
    # Rows of a batch are in another order than those of the training.
    batch = [rows[2], rows[0], rows[1], rows[3]]
    expected, start = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.prompt + row.target])
        own = model(ids, output_hidden_states=True).hidden_states[-1][0, len(row.prompt) - 1 :]
        theirs = taught[start : start + len(own)].float()
        for a, b in zip(own, theirs, strict=True):
            cosine = float(a @ b) / float(a.norm() * b.norm())
            expected += (1 - cosine) / len(own) / len(rows)
        start += len(own)
    found = float(objective(batch)) - float(without(batch))
    assert found == pytest.approx(2.0 * expected, rel=1e-4)


def test_a_student_learns_its_teachers_states_for_written_answers(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    rows = rendered(folder)
    taught = kept_states(folder, rows, tmp_path / "teacher.npy").float()
    gaps = {}
    for weight in (0.0, 5.0):
        recipe = TrainingRecipe(
            method="full", epochs=25, learning_rate=1e-3, hidden_weight=weight, precision="float32"
        )
        out = tmp_path / str(weight)
        fine_tune(folder, None, rows, [], recipe, out, layers=(1,))
        assert not (out / "hidden.npy").exists()
        own = kept_states(out / "model", rows, tmp_path / f"{weight}.npy").float()
        gaps[weight] = float((1 - torch.cosine_similarity(own, taught, dim=-1)).mean())
    assert gaps[5.0] < 0.75 * gaps[0.0]


def soft_rows(folder: Path) -> list[TrainingRow]:
    """Return rows whose teacher names each token of the answers and another one; the last row is
    gold."""
    tokenizer = load_tokenizer(folder)
    end = end_of_turn_id(tokenizer)
    rows = []
    for number, row in enumerate(rendered(folder)):
        tokens = [*row.target, end]
        ids = np.array([[token, 20 + number] for token in tokens], "<i4")
        logs = np.log(np.array([[0.6, 0.3]] * len(tokens), "<f4"))
        soft = TokenLabels(candidates=2, ids=ids.tobytes(), logs=logs.tobytes())
        rows.append(row.model_copy(update={"soft_tokens": soft}))
    return [*rows[:-1], rendered(folder)[-1]]


def test_soft_labels_move_the_student_towards_the_teacher(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    rows, gaps = soft_rows(folder), {}
    whole = TrainingRecipe(soft_weight=1.0)
    for weight in (None, 0.0, 0.5, 1.0):
        model, _ = load_model(folder)
        if weight is not None:
            recipe = TrainingRecipe(
                method="full",
                epochs=30,
                batch_size=4,
                learning_rate=3e-3,
                precision="float32",
                soft_weight=weight,
            )
            train(model, rows, [], recipe, pad_id=0, end_id=2)
        prompts, texts = [row.prompt for row in rows], [row.target for row in rows]
        model.eval()
        logits = forward_written(model, prompts, texts, 0)
        gaps[weight] = float(taught_losses(logits, rows, 2, whole)[:-1].mean().detach())
    assert gaps[1.0] < 0.2 < gaps[0.0] < gaps[None]
    assert gaps[1.0] < gaps[0.5] < gaps[0.0]


def test_training_on_soft_labels_and_states_goes_on_to_the_very_same_weights(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    rows, kept = soft_rows(folder), OneFolder(tmp_path / "kept")
    states = kept_states(folder, rows, tmp_path / "states.npy")
    recipe = TrainingRecipe(
        method="full", epochs=4, batch_size=4, soft_weight=0.5, hidden_weight=1.0
    )
    ended: list[int] = []

    def end(report: TrainingProgress) -> None:
        ended.append(report.step)
        if report.step >= 6:
            raise KeyboardInterrupt

    def weights(**more: Any) -> tuple[TrainingResult, dict[str, torch.Tensor]]:
        model, _ = load_model(folder)
        _, result = train(model, rows, rows[:4], recipe, pad_id=0, end_id=2, hidden=states, **more)
        return result, model.state_dict()

    with pytest.raises(KeyboardInterrupt):
        weights(progress=end, checkpoints=kept, checkpoint_every_s=0)
    (resumed, found), (straight, expected) = weights(checkpoints=kept), weights()
    assert 0 < resumed.resumed_at < straight.steps
    assert resumed.curve == straight.curve
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    # With other soft labels, a checkpoint is one of other rows.
    rows[0] = rows[0].model_copy(update={"soft_tokens": None})
    assert weights(checkpoints=kept)[0].resumed_at == 0


def labelled_files(folder: Path, rows: list[Example]) -> None:
    """Write rows, their own answers as labels, and rows of their own as gold ones."""
    write_examples(rows, folder / "train.jsonl")
    gold = [row.model_copy(update={"example_id": f"gold {row.example_id}"}) for row in rows[:2]]
    write_examples(gold, folder / "gold.jsonl")
    teacher = TeacherRecipe(kind="gold")
    write_known_labels(rows, gold_labels(rows), PROMPT, teacher, folder / "labels")


def test_what_the_teacher_says_of_tokens_comes_with_the_rows(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    rows, tokenizer = examples(), load_tokenizer(tiny_model("llama"))
    labelled_files(tmp_path, rows)
    said = {}
    for row in rows[1:6]:
        answer = str(row.answer_key).encode()
        said[row.example_id] = [
            AnswerToken(answer[:1], ((answer[:1], -0.5), (b"x", -1.5))),
            AnswerToken(answer[1:], ((answer[1:], -0.5),)),
            AnswerToken(b"", ((b"", -0.25),)),
        ]
    write_answer_tokens(said, tmp_path / "labels" / "answer_tokens.parquet")

    def inputs(soft: bool) -> tuple[list[TrainingRow], list[str]]:
        with kept_decisions() as decisions:
            found = read_training_inputs(
                tokenizer,
                PROMPT,
                tmp_path / "train.jsonl",
                tmp_path / "labels",
                gold=tmp_path / "gold.jsonl",
                soft=soft,
            )
        return found.rows, decisions

    found, decisions = inputs(soft=True)
    assert [bool(row.soft_tokens) for row in found] == [False, *[True] * 5, *[False] * 5]
    for taught in found[1:6]:
        assert taught.soft_tokens
        ids, logs = taught.soft_tokens.arrays()
        assert len(ids) == len(taught.target) + 1
        assert (ids[-1, 0], logs[-1, 0]) == (end_of_turn_id(tokenizer), -0.25)
    labelled = sum(row.soft_tokens.labelled for row in found[1:6] if row.soft_tokens)
    tokens = sum(len(row.target) + 1 for row in found[: len(rows)])
    assert decisions == [
        f"{labelled} of {tokens} tokens of the labels' answers have the teacher's probabilities "
        "(training.soft_weight)"
    ]
    plain, decisions = inputs(soft=False)
    assert not decisions
    assert not any(row.soft_tokens for row in plain)
    (tmp_path / "labels" / "answer_tokens.parquet").unlink()
    with pytest.raises(TrainingError, match=r"training.soft_weight is above 0, but no token"):
        inputs(soft=True)


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
    learnt = learn_drafts((row.prompt, row.target) for row in inputs.rows)
    assert Drafts.model_validate_json((folder / FILE).read_bytes()) == learnt


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
