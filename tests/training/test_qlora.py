"""QLoRA: an adapter learns on a base in 4 bits, and is then an ordinary adapter of that base."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_folder import OneFolder
from row_forms import row_forms
from tiny_model import ARCHITECTURES

from distillery.errors import TrainingUnavailable
from distillery.export.build import export
from distillery.models.device import Device, linear_layers_cast
from distillery.models.four_bits import packed_bytes, quantise_linear_layers, unpacked_count
from distillery.models.inspect import model_and_adapter
from distillery.models.load import load_model
from distillery.olive_workflow import run_workflow
from distillery.recipe import ExportForm, LoraRecipe, TrainingRecipe
from distillery.training.adapters import add_lora
from distillery.training.fine_tune import fine_tune
from distillery.training.loop import TrainingProgress, TrainingResult, train, trainable_model
from distillery.training.rows import TrainingRow
from distillery.training.validation import option_probabilities, validate

TinyModel = Callable[[str], Path]

FORMS = row_forms((5, 6, 7))
CPU = Device("cpu", "float32")


def rows_of(form: str = "letters", count: int = 18) -> list[TrainingRow]:
    """Return rows whose answer can be read off the last token."""
    rows = []
    for number in range(count):
        values = dict(FORMS[form]) | {"answer": number % 3}
        values.pop("soft", None)
        if form == "written":
            values |= {"target": (50 + number % 3, 60), "answer": 0}
        rows.append(TrainingRow(prompt=(5, 6, 7, 20 + number, 410 + number % 3), **values))
    return rows


def recipe(**more: Any) -> TrainingRecipe:
    values = {"method": "qlora", "epochs": 8, "batch_size": 6, "learning_rate": 1e-2}
    return TrainingRecipe.model_validate({"precision": "float32", **values, **more})


def trained(
    folder: Path, settings: TrainingRecipe, form: str = "letters", **more: Any
) -> tuple[Any, TrainingResult]:
    """Train a model on rows of `form`, by which it is validated too."""
    model, _ = load_model(folder)
    rows = rows_of(form)
    return train(model, rows, rows, settings, pad_id=0, end_id=2, **more)


def packed_layers(model: Any) -> dict[str, Any]:
    """Return the layers in 4 bits by name."""
    layers = {}
    for name, layer in model.named_modules():
        if type(layer).__module__.startswith("bitsandbytes"):
            layers[name.removeprefix("base_model.model.").removesuffix(".base_layer")] = layer
    return layers


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_adapter_learns_on_a_base_in_4_bits_that_stays_as_it_is(
    tiny_model: TinyModel, arch: str, precision: str
) -> None:
    """With validation rows: for a pass without gradients, bitsandbytes repacks weights on some
    CPUs."""
    model, result = trained(tiny_model(arch), recipe(precision=precision))
    losses = [point.loss for point in result.curve]
    assert losses[-1] < 0.2 * losses[0]
    assert result.validation_accuracy == 1
    assert (result.device, result.precision) == ("cpu", precision)

    plain, _ = load_model(tiny_model(arch))
    before = plain.to(getattr(torch, precision))
    linear = {
        name
        for name, layer in before.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    quantise_linear_layers(before, Device("cpu", precision))
    expected, found = packed_layers(before), packed_layers(model)
    assert found.keys() == expected.keys() == linear
    for name, layer in found.items():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.weight.dtype) == ("nf4", True, torch.uint8)
        assert torch.equal(layer.weight, expected[name].weight)
        assert packed_bytes(layer.weight) < 0.6 * unpacked_count(layer.weight)
    head = model.get_output_embeddings().weight
    assert head.dtype == getattr(torch, precision)
    adapters = {weight.dtype for name, weight in model.named_parameters() if ".lora_" in name}
    assert adapters == {torch.float32}
    kinds = {type(layer).__name__ for layer in model.modules() if hasattr(layer, "lora_A")}
    assert kinds == {"Linear4bit"}, "peft's own, which knows how such weights are packed"

    _, of_lora = trained(tiny_model(arch), recipe(method="lora", epochs=1))
    assert result.parameters == of_lora.parameters == plain_count(tiny_model(arch))
    assert result.trained_parameters == of_lora.trained_parameters


def plain_count(folder: Path) -> int:
    """Return how many parameters the model of a folder has."""
    model, _ = load_model(folder)
    return int(model.num_parameters())


@pytest.mark.parametrize("form", ["classes", "texts", "written"])
def test_all_forms_of_answers_are_learnt(tiny_model: TinyModel, form: str) -> None:
    settings = recipe(epochs=16, rationale_weight=0.1, first_layer=1 if form == "texts" else 0)
    model, result = trained(tiny_model("llama"), settings, form)
    first, last = result.curve[0], result.curve[-1]
    assert first.validation_loss is not None
    assert last.validation_loss is not None
    assert last.validation_loss < 0.7 * first.validation_loss
    assert packed_layers(model)


def test_a_teachers_states_are_learnt(tiny_model: TinyModel, tmp_path: Path) -> None:
    rows, base = rows_of(), tiny_model("llama")
    teacher = recipe(method="lora")
    fine_tune(base, None, rows, [], teacher, tmp_path / "teacher")
    # The student starts from the teacher's adapter, which is merged before the base is packed.
    settings = recipe(epochs=4, hidden_weight=1.0)
    adapter = tmp_path / "teacher" / "adapter"
    result = fine_tune(base, adapter, rows, rows, settings, tmp_path / "out", whole=True)
    assert result.validation_accuracy == 1
    assert result.curve[-1].loss < result.curve[0].loss


def test_the_adapter_is_one_of_the_float_base(tiny_model: TinyModel, tmp_path: Path) -> None:
    """What is evaluated and exported is that base with the adapter merged in: near to what was
    trained, whose numbers are those of the base as 4 bits tell it."""
    base, rows = tiny_model("llama"), rows_of()
    model, _ = trained(base, recipe())
    as_trained = torch.tensor(option_probabilities(model, rows, pad_id=0, device=CPU))
    model.save_pretrained(tmp_path / "adapter")
    merged, _ = load_model(base, tmp_path / "adapter")
    assert not packed_layers(merged)
    found = torch.tensor(option_probabilities(merged, rows, pad_id=0, device=CPU))
    assert (found.argmax(-1) == as_trained.argmax(-1)).all()
    assert 0 < (found - as_trained).abs().max() < 0.2

    from bitsandbytes.functional import dequantize_4bit

    told, _ = load_model(base)
    for name, layer in packed_layers(model).items():
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        told.get_submodule(name).weight.data = weight
    told.save_pretrained(tmp_path / "told")
    load_model(base)[1].save_pretrained(tmp_path / "told")
    exact, _ = load_model(tmp_path / "told", tmp_path / "adapter")
    found = torch.tensor(option_probabilities(exact, rows, pad_id=0, device=CPU))
    assert torch.allclose(found, as_trained, atol=1e-4)


def test_a_student_is_exported_like_any_other(tiny_model: TinyModel, tmp_path: Path) -> None:
    from distillery.inference.onnx_student import OnnxStudent

    base, rows = tiny_model("llama"), rows_of()
    result = fine_tune(base, None, rows, rows, recipe(), tmp_path / "trained")
    model, adapter = model_and_adapter(tmp_path / "trained", base)
    assert model == base
    assert adapter is not None
    assert b"4bit" not in (adapter / "adapter_config.json").read_bytes()
    merged, _ = load_model(model, adapter)
    right, loss = validate(merged, rows, pad_id=0, device=CPU)
    assert all(right)
    assert result.curve[-1].validation_loss == pytest.approx(loss, abs=0.1)
    for apart in (False, True):
        out = tmp_path / f"apart-{apart}"
        export(model, adapter, ExportForm(precision="fp32", adapter_apart=apart), out)
        found = OnnxStudent(out, threads=1).option_probabilities(
            list(rows[0].prompt), list(rows[0].letters)
        )
        expected = option_probabilities(merged, rows[:1], pad_id=0, device=CPU)[0]
        assert found == pytest.approx(expected, abs=1e-3)


def test_a_training_goes_on_from_its_checkpoint_to_the_very_same_weights(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    kept, settings = OneFolder(tmp_path / "kept"), recipe(lora={"dropout": 0.2})

    def killed(report: TrainingProgress) -> None:
        if report.step > 12:
            raise KeyboardInterrupt

    every: dict[str, Any] = {"checkpoints": kept, "checkpoint_every_s": 0.0}
    with pytest.raises(KeyboardInterrupt):
        trained(tiny_model("llama"), settings, **every, progress=killed)
    resumed, result = trained(tiny_model("llama"), settings, **every)
    straight, expected = trained(tiny_model("llama"), settings)
    assert 0 < result.resumed_at < expected.steps
    assert result.curve == expected.curve
    for weight, same in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(weight, same)


def test_casting_layers_leaves_those_in_4_bits_alone(tiny_model: TinyModel) -> None:
    model = trainable_model(load_model(tiny_model("llama"))[0], recipe(), CPU)
    before = {name: layer.weight for name, layer in packed_layers(model).items()}
    with linear_layers_cast(model, Device("cpu", "bfloat16")):
        assert model.get_output_embeddings().weight.dtype == torch.bfloat16
        assert all(layer.weight is before[name] for name, layer in packed_layers(model).items())


def test_a_device_is_given_float_weights_of_one_layer_at_a_time(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_model(tiny_model("llama"))
    largest = max(
        layer.weight.numel()
        for layer in model.get_decoder().layers.modules()
        if isinstance(layer, torch.nn.Linear)
    )
    moved: list[int] = []
    move = torch.nn.Module.to

    def to(module: Any, *given: Any, **named: Any) -> Any:
        if given == ("cpu",):
            weights = [
                weight.numel()
                for name, weight in module.named_parameters()
                if weight.is_floating_point()
                and not any(part in name for part in (".lora_", "embed_tokens", "lm_head"))
            ]
            moved.append(sum(weights))
        return move(module, *given, **named)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    trainable_model(model, recipe(), CPU).to("cpu")
    assert len(moved) > 14
    assert max(moved) == largest


def test_where_bitsandbytes_is_missing_one_line_says_what_to_install(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillery.models.four_bits.find_spec", lambda name: None)
    with pytest.raises(
        TrainingUnavailable,
        match=r"^training\.method: qlora needs bitsandbytes .*;"
        r" install distillery\[qlora\] there, or set training\.method: lora$",
    ):
        trained(tiny_model("llama"), recipe())
    _, result = trained(tiny_model("llama"), recipe(method="lora", epochs=1))
    assert result.steps == 3


def test_a_base_in_4_bits_is_not_split(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_FSDP", "true")
    with pytest.raises(TrainingUnavailable, match=r"^DISTILLERY_FSDP: weights in 4 bits"):
        trained(tiny_model("llama"), recipe())


@pytest.mark.security
def test_bitsandbytes_is_imported_before_peft_wherever_that_is(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Called(Exception):
        pass

    def called() -> None:
        raise Called

    model, _ = load_model(tiny_model("llama"))
    for module in ("olive_workflow", "models.load", "training.adapters"):
        monkeypatch.setattr(f"distillery.{module}.import_bitsandbytes", called)
    with pytest.raises(Called):
        run_workflow({}, {}, tmp_path)
    with pytest.raises(Called):
        load_model(tiny_model("llama"), tmp_path)
    with pytest.raises(Called):
        add_lora(model, LoraRecipe())


@pytest.mark.security
def test_bitsandbytes_does_not_find_the_package_that_fetches(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("raise SystemExit('imported')")
    stub = "try:\n    import kernels\nexcept ImportError:\n    pass\n"
    (tmp_path / "bitsandbytes.py").write_text(stub)
    code = "from distillery.hub_kernels import import_bitsandbytes as own; own()"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    for command, found in ((code, ""), ("import bitsandbytes", "imported\n")):
        done = subprocess.run(
            [sys.executable, "-c", command],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.stderr == found


@pytest.mark.security
def test_an_adapter_runs_no_code_of_the_hub(tmp_path: Path) -> None:
    """Where peft is imported, bitsandbytes would fetch some by the package `kernels` on CPUs with
    AVX512_BF16."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__): raise SystemExit('fetched')")
    code = """
from tiny_model import tiny_weights
from distillery.recipe import LoraRecipe
from distillery.training.adapters import add_lora
add_lora(tiny_weights("llama"), LoraRecipe())
import sys
assert "bitsandbytes" in sys.modules
"""
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
