"""The head of a classifier: tokens for the classes, the probe, training, what is saved of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_folder import OneFolder
from tiny_model import build_tiny_model

from distillery.data.examples import read_examples
from distillery.data.prepare import prepare
from distillery.errors import ModelError, RecipeError
from distillery.export.build import export
from distillery.inference.onnx_student import OnnxStudent
from distillery.labels.known import gold_labels, write_known_labels
from distillery.models.class_tokens import (
    FILE,
    ClassTokens,
    choose_class_tokens,
    read_class_tokens,
)
from distillery.models.device import choose_device
from distillery.models.inspect import model_and_adapter
from distillery.models.load import end_of_turn_id, load_model, load_tokenizer, pad_id
from distillery.recipe import (
    ExportForm,
    HealingRecipe,
    LayerChoice,
    PromptRecipe,
    TrainingRecipe,
    parse_recipe,
)
from distillery.records import Example, TeacherLabel
from distillery.training.batching import pooled_states
from distillery.training.class_head import ClassHead
from distillery.training.fine_tune import fine_tune
from distillery.training.inputs import read_training_inputs
from distillery.training.loop import TrainingProgress, set_up, train
from distillery.training.probing import fit_probe
from distillery.training.rows import TrainingRow, training_rows
from distillery.training.validation import option_probabilities

PROMPT = PromptRecipe(system="", user="{text}", answer="class")
CLASSES = ("bakery", "bank", "weather", "never seen")
WORDS = ("bread", "river", "cloud")
DEVICE = choose_device("float32")


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model, with and without a head of its own."""
    return build_tiny_model("llama", tmp_path_factory.mktemp("base"), request.param == "tied")


def examples(count: int = 24) -> list[Example]:
    """Rows whose class can be read off the text; the last class has none."""
    rows = []
    for number in range(count):
        rows.append(
            Example(
                example_id=str(number),
                question=f"{WORDS[number % 3]} number {number}",
                answer_key=CLASSES[number % 3],
                classes=CLASSES,
            )
        )
    return rows


def rendered(
    base: Path, count: int = 24, soft: tuple[float, ...] = ()
) -> tuple[list[TrainingRow], ClassTokens]:
    """Rows to train on. `soft`: the teacher's probabilities of the classes, from the row's own."""
    rows, labels = examples(count), {}
    for number, row in enumerate(rows):
        shares = None
        if soft:
            shares = {CLASSES[(number + k) % 3]: soft[k] for k in range(3)} | {CLASSES[3]: soft[3]}
        labels[row.example_id] = TeacherLabel(
            example_id=row.example_id, answer=str(row.answer_key), distribution=shares
        )
    tokenizer = load_tokenizer(base)
    classes = choose_class_tokens(tokenizer, CLASSES)
    found, _ = training_rows(rows, labels, PROMPT, tokenizer, classes=classes)
    said = {token for row in found for token in row.prompt}
    assert not said & set(classes.tokens), "else tied embeddings would change what is read"
    return found, classes


def probabilities(model: Any, rows: list[TrainingRow]) -> torch.Tensor:
    return torch.tensor(option_probabilities(model, rows, pad_id=0, device=DEVICE))


def of_checkpoint(folder: Path, base: Path, rows: list[TrainingRow]) -> torch.Tensor:
    network, _ = load_model(*model_and_adapter(folder, base))
    return probabilities(network, rows)


def right(found: torch.Tensor, rows: list[TrainingRow]) -> float:
    answers = torch.tensor([row.answer for row in rows])
    return float((found.argmax(-1) == answers).float().mean())


def settings(method: str = "full", **more: Any) -> TrainingRecipe:
    values = {"epochs": 4, "batch_size": 4, "learning_rate": 3e-3, "precision": "float32"}
    return TrainingRecipe.model_validate({"method": method, **values, **more})


# Tokens


def test_each_class_has_a_token_of_its_own_that_is_a_text(base: Path) -> None:
    tokenizer, names = load_tokenizer(base), [f"class {number}" for number in range(100)]
    chosen = choose_class_tokens(tokenizer, names)
    assert chosen.classes == tuple(names)
    assert len(set(chosen.tokens)) == 100
    assert not set(chosen.tokens) & set(tokenizer.all_special_ids)
    for token in chosen.tokens:
        assert tokenizer.encode(tokenizer.decode([token]), add_special_tokens=False) == [token]
    assert choose_class_tokens(tokenizer, names) == chosen
    assert choose_class_tokens(tokenizer, names[:50]).tokens == chosen.tokens[:50]


def test_a_vocabulary_that_is_too_small_is_refused(base: Path) -> None:
    names = [f"class {number}" for number in range(600)]
    with pytest.raises(RecipeError, match=r"^base model: its vocabulary has tokens for \d+ clas"):
        choose_class_tokens(load_tokenizer(base), names)


def test_tokens_go_with_the_names_whatever_their_order(tmp_path: Path) -> None:
    tokens = ClassTokens(classes=("é", "b", "c"), tokens=(7, 8, 9))
    tokens.write(tmp_path)
    assert read_class_tokens(tmp_path) == tokens
    assert tokens.for_classes(("c", "é", "b")) == (9, 7, 8)
    with pytest.raises(ModelError, match="trained for 3 classes; it does not know 'd'"):
        tokens.for_classes(("c", "é", "d"))
    with pytest.raises(ModelError, match="trained for 3 classes; it has other classes"):
        tokens.for_classes(("c", "é"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"classes": ["a", "b"]}',
        '{"classes": ["a", "b"], "tokens": [7]}',
        '{"classes": ["a", "b"], "tokens": [7, 7]}',
        '{"classes": ["a", "a", "b"], "tokens": [7, 8]}',
        '{"classes": ["a", "a"], "tokens": [7, 8]}',
        '{"classes": [], "tokens": []}',
        '{"classes": ["a", "b"], "tokens": [7, -1]}',
    ],
)
def test_a_damaged_file_of_tokens_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ModelError, match=r"class_tokens\.json: no class tokens; train the model"):
        read_class_tokens(tmp_path)


# The probe


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("classes", [2, 5])
def test_a_probe_tells_separable_states_apart(classes: int, intercept: bool) -> None:
    generator = np.random.default_rng(0)
    answers = [number % classes for number in range(60)]
    states = 30 * np.eye(classes, 16)[answers] + generator.normal(size=(60, 16))
    found = fit_probe(states, answers, classes, intercept)
    assert found.weights.shape == (classes, 16)
    assert found.intercepts.any() == intercept
    assert (found.scores(states).argmax(-1) == answers).all()


def test_a_probe_knows_nothing_of_a_class_without_rows() -> None:
    states = np.random.default_rng(0).normal(size=(40, 16))
    answers = [0 if state[3] > 0 else 2 for state in states]
    found = fit_probe(states, answers, 4, intercept=False).weights
    assert not found[[1, 3]].any()
    assert found[0, 3] > 0 > found[2, 3]
    assert not fit_probe(states, [2] * 40, 4).weights.any(), (
        "one class alone can't be told from others"
    )


def test_a_probe_of_few_rows_is_one_too() -> None:
    states = np.eye(3, 8)
    assert fit_probe(states, [2, 0, 1], 3).scores(states).argmax(-1).tolist() == [2, 0, 1]


def test_the_rows_start_as_the_probe(base: Path) -> None:
    rows, _ = rendered(base)
    network, tokenizer = load_model(base)
    before = network.get_output_embeddings().weight.detach().clone()
    training = set_up(network, rows, [], settings(), None, pad_id(tokenizer), 2)
    head = training.model.get_output_embeddings()
    assert isinstance(head, ClassHead)
    assert right(probabilities(training.model, rows), rows) == 1, "before any step"
    assert torch.equal(head.head.weight, before)


# Training


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_what_is_saved_answers_as_the_trained_model(
    base: Path, method: str, tmp_path: Path
) -> None:
    rows, classes = rendered(base)
    network, tokenizer = load_model(base)
    trained, figures = train(
        network,
        rows,
        rows[:6],
        settings(method),
        pad_id=pad_id(tokenizer),
        end_id=end_of_turn_id(tokenizer),
    )
    if method != "full":
        trained.merge_adapter()
    expected = probabilities(trained, rows)
    assert right(expected, rows) == 1
    assert figures.validation_accuracy == 1

    result = fine_tune(
        base, None, rows, rows[:6], settings(method), tmp_path, whole=True, classes=classes
    )
    assert result.curve == figures.curve
    found = of_checkpoint(tmp_path, base, rows)
    assert torch.allclose(found, expected, atol=1e-6)
    model, adapter = model_and_adapter(tmp_path, base)
    assert read_class_tokens(adapter or model) == classes
    saved, _ = load_model(model, adapter)
    tied = saved.get_input_embeddings().weight is saved.get_output_embeddings().weight
    assert tied == json.loads((base / "config.json").read_text())["tie_word_embeddings"]


def test_the_student_learns_the_class_of_texts_of_none(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the files of a recipe to the head of the student, without one other gold row."""
    base = tiny_model("llama")
    monkeypatch.chdir(tmp_path)
    rows, texts = ["text,label"], ["text"]
    for number in range(45):
        word = WORDS[number % 3]
        rows.append(f"{word} {number} {word} {number * 7},{CLASSES[number % 3]}")
        texts.append(f"quiet {number} quiet {number * 7}")
    Path("rows.csv").write_text("\n".join(rows) + "\n")
    Path("texts.csv").write_text("\n".join(texts) + "\n")
    recipe = parse_recipe(
        {
            "dataset": {
                "source": "files",
                "files": {"train": ["rows.csv"]},
                "carve": {"test": 0.3},
            },
            "task": {"kind": "classify", "other": {"label": "none", "files": ["texts.csv"]}},
            "teacher": {"kind": "gold"},
        },
        "recipe.yaml",
    )
    data = Path("data")
    prepare(recipe.dataset, data, recipe.task)
    names = ("bakery", "bank", "none", "weather")
    assert json.loads((data / "classes.json").read_text()) == list(names)
    train_rows = read_examples(data / "train.jsonl")
    prompt = recipe.student_prompt
    Path("labels").mkdir()
    write_known_labels(train_rows, gold_labels(train_rows), prompt, recipe.teacher, Path("labels"))
    inputs = read_training_inputs(
        load_tokenizer(base), prompt, data / "train.jsonl", Path("labels"), data / "gold.jsonl"
    )
    assert {names[row.answer] for row in inputs.rows[len(train_rows) :]} == {"none"}
    student = Path("student")
    fine_tune(base, None, inputs.rows, [], settings(), student, classes=inputs.classes)
    learnt = read_class_tokens(student / "model")
    assert learnt is not None
    assert learnt.classes == names
    test = read_examples(data / "test.jsonl")
    asked, _ = training_rows(
        test, gold_labels(test), prompt, load_tokenizer(base), classes=inputs.classes
    )
    out_of_scope = [row for row in asked if names[row.answer] == "none"]
    assert 0 < len(out_of_scope) < len(asked)
    answers = of_checkpoint(student, base, asked)
    assert right(answers, asked) == 1


def test_what_the_rows_decide_is_kept_with_the_reason(base: Path, tmp_path: Path) -> None:
    rows, classes = rendered(base)
    recipe = settings(epochs=1, minimum_steps=9)
    result = fine_tune(
        base,
        None,
        rows,
        [],
        recipe,
        tmp_path,
        layers=LayerChoice(by="probe", largest_loss=0.99),
        classes=classes,
    )
    depth, steps = result.decisions
    assert depth.startswith("1 of 2 layers are kept: a linear probe gives ")
    assert steps.endswith("training.minimum_steps is 9")
    assert json.loads((tmp_path / "layers.json").read_text()) == [[0]]
    assert "decisions" not in json.loads((tmp_path / "training.json").read_text())


def test_training_learns_the_teachers_probabilities(base: Path, tmp_path: Path) -> None:
    soft = (0.5, 0.3, 0.15, 0.05)
    rows, classes = rendered(base, soft=soft)
    recipe = settings(epochs=20, soft_weight=1.0, learning_rate=1e-2)
    fine_tune(base, None, rows, [], recipe, tmp_path, classes=classes)
    found = of_checkpoint(tmp_path, base, rows)
    for row_found, row in zip(found, rows, strict=True):
        assert row_found.tolist() == pytest.approx(row.soft, abs=0.08)


class Killed(BaseException):
    """Ends a training as a signal would."""


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_that_was_ended_goes_on_to_the_very_same_classifier(
    base: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_CHECKPOINT_SECONDS", "1e-6")
    rows, classes = rendered(base)
    kept = OneFolder(tmp_path / "kept")

    def end(report: TrainingProgress) -> None:
        if report.step >= 12:
            raise Killed

    def run(name: str, **more: Any) -> Any:
        recipe = settings(method)
        return fine_tune(
            base, None, rows, rows[:6], recipe, tmp_path / name, classes=classes, **more
        )

    with pytest.raises(Killed):
        run("ended", progress=end, checkpoints=kept)
    resumed, straight = run("resumed", checkpoints=kept), run("straight")
    assert 0 < resumed.resumed_at < straight.steps
    assert resumed.curve == straight.curve
    files = sorted((tmp_path / "straight").rglob("*.*"))
    assert any(file.suffix == ".safetensors" for file in files)
    for file in files:
        other = tmp_path / "resumed" / file.relative_to(tmp_path / "straight")
        assert other.read_bytes() == file.read_bytes(), file.name


def test_a_student_that_learns_its_teachers_states_keeps_the_rows_of_its_head(
    base: Path, tmp_path: Path
) -> None:
    rows, classes = rendered(base)
    fine_tune(base, None, rows, [], settings(), tmp_path / "teacher", classes=classes)
    teacher = tmp_path / "teacher" / "model"
    taught, _ = load_model(teacher)
    before = taught.get_output_embeddings().weight[list(classes.tokens)].detach().clone()
    rest: dict[str, Any] = {"max_steps": 1, "learning_rate": 1e-12, "epochs": 1}
    fine_tune(
        teacher,
        None,
        rows,
        [],
        settings(hidden_weight=1.0, **rest),
        tmp_path / "student",
        classes=classes,
    )
    student, _ = load_model(tmp_path / "student" / "model")
    after = student.get_output_embeddings().weight[list(classes.tokens)]
    assert torch.allclose(after, before, atol=1e-6)
    fine_tune(teacher, None, rows, [], settings(**rest), tmp_path / "probed", classes=classes)
    probed, _ = load_model(tmp_path / "probed" / "model")
    other = probed.get_output_embeddings().weight[list(classes.tokens)]
    assert not torch.allclose(other, before, atol=1e-2), "else this test would see nothing"


def test_an_adapter_on_a_taught_model_takes_its_rows_along(base: Path, tmp_path: Path) -> None:
    """A LoRA teacher, and a student that starts from it: the adapter is merged first."""
    rows, classes = rendered(base)
    fine_tune(base, None, rows, [], settings("lora"), tmp_path / "teacher", classes=classes)
    model, adapter = model_and_adapter(tmp_path / "teacher", base)
    recipe = settings(hidden_weight=1.0, max_steps=1, learning_rate=1e-12)
    fine_tune(
        model, adapter, rows, [], recipe, tmp_path / "student", layers=(0, 1), classes=classes
    )
    expected = of_checkpoint(tmp_path / "teacher", base, rows)
    assert torch.allclose(of_checkpoint(tmp_path / "student", base, rows), expected, atol=1e-5)


def test_a_healed_classifier_learns_in_each_step(base: Path, tmp_path: Path) -> None:
    rows, classes = rendered(base)
    healing = HealingRecipe(layers=(0,), training=settings(epochs=1))
    fine_tune(base, None, rows, [], settings(), tmp_path, healing=[healing], classes=classes)
    assert right(of_checkpoint(tmp_path, base, rows), rows) == 1


def test_an_exported_adapter_has_the_rows_of_the_head(base: Path, tmp_path: Path) -> None:
    rows, classes = rendered(base)
    fine_tune(base, None, rows, [], settings("lora"), tmp_path / "trained", classes=classes)
    expected = of_checkpoint(tmp_path / "trained", base, rows)
    form = ExportForm(precision="fp32")
    export(*model_and_adapter(tmp_path / "trained", base), form, tmp_path / "onnx")
    student = OnnxStudent(tmp_path / "onnx", threads=1)
    assert student.classes == classes
    for example, row, known in zip(examples(), rows, expected, strict=True):
        answer = student.answer(example, PROMPT)
        assert list(answer.probabilities) == list(CLASSES)
        assert list(answer.probabilities.values()) == pytest.approx(known.tolist(), abs=1e-3)
        assert answer.letter == CLASSES[row.answer]


def test_a_model_of_other_classes_is_refused(
    tiny_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(tiny_onnx("llama"), folder)
    with pytest.raises(ModelError, match=r"^student: answers no classes: it has no class_tokens"):
        OnnxStudent(folder, threads=1).answer(examples(1)[0], PROMPT)
    ClassTokens(classes=("bakery", "bank"), tokens=(300, 301)).write(folder)
    with pytest.raises(ModelError, match="trained for 2 classes; it does not know 'weather'"):
        OnnxStudent(folder, threads=1).answer(examples(1)[0], PROMPT)
    (folder / FILE).write_text("{}")
    with pytest.raises(ModelError, match=r"class_tokens\.json: no class tokens"):
        OnnxStudent(folder, threads=1)


def test_the_span_is_what_follows_the_beginning_that_all_prompts_share() -> None:
    last = ClassTokens(classes=("a", "b"), tokens=(7, 8))
    mean = last.model_copy(update={"pooled": True, "beginning": (1, 2, 3)})
    assert last.span([1, 2, 3, 4, 5]) == 1
    assert mean.span([1, 2, 3, 4, 5]) == 2
    assert mean.span([1, 2, 9, 4, 5]) == 3
    assert mean.span([9]) == 1
    # A prompt that ends with the beginning still has a token to read.
    assert mean.span([1, 2, 3]) == 1


@pytest.mark.parametrize("last", [0.0, 0.25])
def test_the_mean_state_is_that_of_the_tokens_after_the_beginning(base: Path, last: float) -> None:
    model, tokenizer = load_model(base)
    prompts = [(5, 6, 7, 20, 21, 22), (5, 6, 7, 30, 31), (5, 6, 7, *range(40, 50))]
    rows = [
        TrainingRow(prompt=ids, letters=(1, 2), closed=True, span=len(ids) - 3, last=last, answer=0)
        for ids in prompts
    ]
    with torch.inference_mode():
        found = pooled_states(model.eval(), rows, pad_id(tokenizer))
        for row, state in zip(rows, found, strict=True):
            alone = model.get_decoder()(torch.tensor([row.prompt])).last_hidden_state[0]
            expected = (1 - last) * alone[3:].mean(0) + last * alone[-1]
            assert torch.allclose(state, expected, atol=1e-5)
