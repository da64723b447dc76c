"""Training: the loss against a plain reference, layer cuts, LoRA targets, determinism, and both shapes by Olive."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distillery import student
from distillery.base_model import base_folder, base_identity
from distillery.errors import RecipeError, TrainingError
from distillery.onnx import ADAPTER_FILE, export
from distillery.prompts import TransformersTokenizer, letter_ids, render_ids
from distillery.recipe import BaseModelRecipe, ExportRecipe, LoraRecipe, PromptRecipe, TrainingRecipe
from distillery.records import Example, TeacherLabel

ARCHITECTURES = ["llama", "phi3"]
PROMPT = PromptRecipe(system="Pick.", user="{question}\n{choices}", choice="{letter}) {text}")
TinyModel = Callable[[str], Path]


def examples(count: int = 12) -> list[Example]:
    """Rows whose answer can be read off the question."""
    words = ("bread", "river", "cloud")
    return [
        Example(
            example_id=str(i),
            question=f"{words[i % 3]} number {i}",
            choices=("oven", "bridge", "rain"),
            answer_key="ABC"[i % 3],
        )
        for i in range(count)
    ]


def soft_labels(rows: list[Example]) -> dict[str, TeacherLabel]:
    spread = {"A": (0.7, 0.2, 0.1), "B": (0.1, 0.8, 0.1), "C": (0.25, 0.25, 0.5)}
    return {
        row.example_id: TeacherLabel(
            example_id=row.example_id,
            answer=str(row.answer_key),
            distribution=dict(zip("ABC", spread[str(row.answer_key)], strict=True)),
        )
        for row in rows
    }


def rendered(folder: Path, count: int = 12) -> list[student.TrainingRow]:
    rows, _ = student.training_rows(
        examples(count), soft_labels(examples(count)), PROMPT, student.load_tokenizer(folder)
    )
    return rows


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("soft_weight", [0.0, 0.3, 1.0])
def test_the_loss_equals_a_plain_reference_in_float64(soft_weight: float, temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 50)
    rows = [
        student.TrainingRow(prompt=(1, 2), letters=(5, 6, 7), answer=0, soft=(0.7, 0.2, 0.1)),
        student.TrainingRow(prompt=(1,), letters=(6, 5, 9), answer=2, soft=(0.1, 0.1, 0.8)),
        student.TrainingRow(prompt=(1,), letters=(5, 6), answer=1),
    ]
    recipe = TrainingRecipe(soft_weight=soft_weight, temperature=temperature)
    expected = 0.0
    for row, (letter, turn) in zip(rows, logits.double().tolist(), strict=True):
        whole = math.log(sum(math.exp(x) for x in letter))
        hard = whole - letter[row.letters[row.answer]]
        loss = hard
        if row.soft and soft_weight:
            q, p = list(row.soft), [math.exp(letter[i] - whole) for i in row.letters]
            if temperature != 1:
                raised = [x ** (1 / temperature) for x in q]
                q = [x / sum(raised) for x in raised]
                scaled = [math.exp(letter[i] / temperature) for i in row.letters]
                p = [x / sum(scaled) for x in scaled]
            soft = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True)) * temperature**2
            loss = (1 - soft_weight) * hard + soft_weight * soft
        expected += loss + math.log(sum(math.exp(x) for x in turn)) - turn[3]
    assert student.answer_loss(logits, rows, recipe, end_id=3).item() == pytest.approx(expected / 3, rel=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_left_padding_changes_no_probability(tiny_model: TinyModel, arch: str) -> None:
    model, tokenizer = student.load_model(tiny_model(arch))
    rows = rendered(tiny_model(arch), 4)
    rows[1] = rows[1].model_copy(update={"prompt": rows[1].prompt[:-4]})
    place, pad = student.placement("float32"), student.pad_id(tokenizer)
    together = student.option_probabilities(model, rows, pad_id=pad, place=place, batch_size=4)
    alone = student.option_probabilities(model, rows, pad_id=pad, place=place, batch_size=1)
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kept_layers_are_the_named_ones(tiny_model: TinyModel, arch: str, tmp_path: Path) -> None:
    model, _ = student.load_model(tiny_model(arch))
    second = model.get_decoder().layers[1].mlp.down_proj.weight.clone()
    student.keep_layers(model, [1])
    model.save_pretrained(tmp_path)
    kept, _ = _reload(tmp_path, tiny_model(arch))
    assert kept.config.num_hidden_layers == len(kept.get_decoder().layers) == 1
    assert torch.equal(kept.get_decoder().layers[0].mlp.down_proj.weight, second)
    with pytest.raises(TrainingError, match="layers: 7 is no layer"):
        student.keep_layers(kept, [0, 7])


def _reload(folder: Path, tokenizer: Path) -> tuple[object, object]:
    student.load_tokenizer(tokenizer).save_pretrained(folder)
    return student.load_model(folder)


@pytest.mark.parametrize(("arch", "expected"), [("llama", "q_proj"), ("phi3", "qkv_proj")])
def test_lora_adapts_what_the_architecture_calls_its_layers(tiny_model: TinyModel, arch: str, expected: str) -> None:
    model, _ = student.load_model(tiny_model(arch))
    assert expected in student.linear_modules(model)
    assert "lm_head" not in student.linear_modules(model)
    adapted = student.add_lora(model, LoraRecipe(rank=2))
    assert any(f"{expected}.lora_A" in name for name, _ in adapted.named_parameters())


def test_target_modules_that_the_model_lacks_are_named(tiny_model: TinyModel) -> None:
    model, _ = student.load_model(tiny_model("phi3"))
    with pytest.raises(TrainingError, match=r"this model has no q_proj, v_proj; it has .*qkv_proj"):
        student.add_lora(model, LoraRecipe(target_modules=("q_proj", "v_proj", "o_proj")))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_learns_counts_its_steps_and_repeats_itself(tiny_model: TinyModel, method: str) -> None:
    rows = rendered(tiny_model("llama"))
    recipe = TrainingRecipe(method=method, epochs=8, batch_size=4, learning_rate=1e-2, soft_weight=0.5, seed=3)
    outcomes = []
    for _ in range(2):
        model, tokenizer = student.load_model(tiny_model("llama"))
        trained, result = student.train(model, rows, rows, recipe, pad_id=student.pad_id(tokenizer), end_id=2)
        outcomes.append((result, [p.detach().clone() for p in trained.parameters()]))
    (first, weights), (second, again) = outcomes
    assert first.steps == 24
    assert first.curve[-1].loss < first.curve[0].loss
    assert first.validation_accuracy is not None
    assert first.validation_accuracy > 0.6, "chance is 0.33"
    assert first.curve == second.curve
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


def test_no_rows_is_one_clear_line(tiny_model: TinyModel) -> None:
    model, _ = student.load_model(tiny_model("llama"))
    with pytest.raises(TrainingError, match="no row to train on"):
        student.train(model, [], [], TrainingRecipe(), pad_id=0, end_id=0)


def test_a_loss_that_is_no_number_stops_training(tiny_model: TinyModel) -> None:
    model, _ = student.load_model(tiny_model("llama"))
    recipe = TrainingRecipe(method="full", learning_rate=1e30, epochs=9, precision="float32")
    with pytest.raises(TrainingError, match="lower student"):
        student.train(model, rendered(tiny_model("llama")), [], recipe, pad_id=0, end_id=2)


def test_prompts_over_the_budget_are_set_aside_and_listed(tiny_model: TinyModel) -> None:
    long = Example(example_id="long", question="word " * 400, choices=("a", "b"), answer_key="A")
    rows, too_long = student.training_rows(
        [*examples(2), long],
        student.gold_labels([*examples(2), long]),
        PROMPT,
        student.load_tokenizer(tiny_model("llama")),
    )
    assert (len(rows), too_long) == (2, ["long"])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_train_export_and_score_through_olive(tiny_model: TinyModel, tmp_path: Path, arch: str, method: str) -> None:
    rows = rendered(tiny_model(arch))
    recipe = TrainingRecipe(method=method, epochs=2, batch_size=4, learning_rate=1e-2, soft_weight=1.0)
    layers = [0] if method == "full" else None
    result = student.fine_tune(tiny_model(arch), None, rows, rows[:3], recipe, tmp_path / "trained", layers=layers)
    model, adapter = student.parts(tmp_path / "trained", tiny_model(arch))
    assert (adapter is not None) == (method == "lora")
    assert not list((tmp_path / "trained").glob("*.jsonl")), "training rows are no part of a checkpoint"
    export(model, adapter, ExportRecipe(precision="fp32"), tmp_path / "fp32")
    export(model, adapter, ExportRecipe(precision="int4", algorithm="k_quant_high"), tmp_path / "int4")
    assert result.steps == 6

    from distillery.inference import OnnxStudent

    network, tokenizer = student.load_model(model, adapter)
    exact = student.option_probabilities(
        network, rows, pad_id=student.pad_id(tokenizer), place=student.placement("float32")
    )
    onnx = OnnxStudent(tmp_path / "fp32", threads=1)
    ids = letter_ids(onnx.tokenizer, 3)
    for example, row, expected in zip(examples(), rows, exact, strict=True):
        prompt = render_ids(example, PROMPT, onnx.tokenizer)
        assert prompt == list(row.prompt) == render_ids(example, PROMPT, TransformersTokenizer(tokenizer))
        assert onnx.option_probabilities(prompt, ids) == pytest.approx(expected, abs=1e-3)
    assert sum(OnnxStudent(tmp_path / "int4", threads=1).option_probabilities(prompt, ids)) == pytest.approx(1)


def test_the_labs_form_keeps_the_adapter_apart(tiny_model: TinyModel, tmp_path: Path) -> None:
    rows = rendered(tiny_model("llama"))
    recipe = TrainingRecipe(method="lora", epochs=4, batch_size=4, learning_rate=2e-2)
    student.fine_tune(tiny_model("llama"), None, rows, [], recipe, tmp_path / "trained")
    model, adapter = student.parts(tmp_path / "trained", tiny_model("llama"))
    export(model, adapter, ExportRecipe(precision="fp32", adapter_apart=True), tmp_path / "apart")
    assert (tmp_path / "apart" / ADAPTER_FILE).stat().st_size > 0

    from distillery.inference import OnnxStudent

    ids = list(rows[0].letters)
    with_adapter = OnnxStudent(tmp_path / "apart").option_probabilities(list(rows[0].prompt), ids)
    without = OnnxStudent(tmp_path / "apart", adapter=False).option_probabilities(list(rows[0].prompt), ids)
    merged, tokenizer = student.load_model(model, adapter)
    plain, _ = student.load_model(model)
    place, pad = student.placement("float32"), student.pad_id(tokenizer)
    assert with_adapter == pytest.approx(
        student.option_probabilities(merged, rows[:1], pad_id=pad, place=place)[0], abs=1e-3
    )
    assert without == pytest.approx(student.option_probabilities(plain, rows[:1], pad_id=pad, place=place)[0], abs=1e-3)


def test_what_a_pass_refuses_comes_through_olive_as_one_line(
    tiny_model: TinyModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [student.TrainingRow(prompt=(5, 6, 7), letters=(8, 9), answer=0)]
    with pytest.raises(TrainingError, match="layers: 7 is no layer"):
        student.fine_tune(tiny_model("llama"), None, rows, [], TrainingRecipe(), tmp_path / "out", layers=[7])
    assert "Traceback" not in "".join(capfd.readouterr())


def test_base_models_that_can_not_be_used_are_one_line(tmp_path: Path, tiny_model: TinyModel) -> None:
    with pytest.raises(RecipeError, match="no such folder"):
        base_folder(BaseModelRecipe(model="./nowhere"))
    with pytest.raises(RecipeError, match=r"no such file"):
        base_folder(BaseModelRecipe(model="nothing.gguf"))
    with pytest.raises(RecipeError, match="is not installed"):
        base_folder(BaseModelRecipe(model="package:no_such_package"))
    with pytest.raises(RecipeError, match="azureml://registries/REGISTRY"):
        base_folder(BaseModelRecipe(model="azureml://models/Phi"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(TrainingError, match=r"no \.safetensors"):
        base_folder(BaseModelRecipe(model=str(tmp_path)))
    assert base_folder(BaseModelRecipe(model=str(tiny_model("llama")))) == tiny_model("llama")


def test_remote_code_needs_recipe_and_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    name = str(tmp_path)
    with pytest.raises(TrainingError, match="needs Python code of its own"):
        base_folder(BaseModelRecipe(model=name))
    with pytest.raises(TrainingError, match="DISTILLERY_REMOTE_CODE"):
        base_folder(BaseModelRecipe(model=name, trust_remote_code=True))
    monkeypatch.setenv("DISTILLERY_REMOTE_CODE", f"other, {name}")
    with pytest.raises(TrainingError, match="needs Python code"):
        base_folder(BaseModelRecipe(model=name))
    assert base_folder(BaseModelRecipe(model=name, trust_remote_code=True)) == tmp_path


def test_a_changed_local_base_model_has_another_identity(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = base_identity(BaseModelRecipe(model=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert base_identity(BaseModelRecipe(model=str(tmp_path))) != before
    assert base_identity(BaseModelRecipe(model="org/model", revision="abc")) == "org/model@abc"
