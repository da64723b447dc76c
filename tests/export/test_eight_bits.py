"""int8 dynamic: layers that multiply in 8 bits, whatever else is computed beside a token."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file
from tiny_model import ARCHITECTURES

from distillery.errors import ExportError
from distillery.export import eight_bits
from distillery.export.build import export
from distillery.export.eight_bits import hadamard_matrix, mix_rows, quantise_columns
from distillery.inference.decoder import Decoder
from distillery.inference.logits import softmax
from distillery.recipe import ExportForm

DYNAMIC = ExportForm(precision="int8", algorithm="dynamic")
PROMPTS = [[(7 * row + 3 * place) % 500 + 5 for place in range(24)] for row in range(6)]

TinyModel = Callable[[str], Path]


def apart(folder: Path, exact: Path) -> float:
    """Return how far two models' probabilities of the next token are apart, the mean over PROMPTS
    of half the sum of the differences."""
    models = [Decoder(each, threads=1) for each in (folder, exact)]
    found = []
    for ids in PROMPTS:
        one, other = (np.array(softmax(model.prefill(ids))) for model in models)
        found.append(np.abs(one - other).sum() / 2)
    return float(np.mean(found))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_is_about_as_near_to_the_float_model_as_int8_with_float_activations(
    tiny_model: TinyModel, tiny_onnx: Callable[..., Path], tmp_path: Path, arch: str
) -> None:
    export(tiny_model(arch), None, DYNAMIC, tmp_path / "dynamic")
    rtn = ExportForm(precision="int8", algorithm="rtn")
    export(tiny_model(arch), None, rtn, tmp_path / "rtn")
    exact = tiny_onnx(arch)
    assert apart(tmp_path / "dynamic", exact) < 3 * apart(tmp_path / "rtn", exact)
    sizes = {}
    for form in ("dynamic", "rtn"):
        sizes[form] = sum(path.stat().st_size for path in (tmp_path / form).glob("model.onnx*"))
    # A matrix that mixes 64 channels has 16 kB, and these models are tiny.
    assert sizes["dynamic"] < sizes["rtn"] + 40_000
    model = onnx.load(tmp_path / "dynamic" / "model.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMulIntegerToFloat") >= 8
    assert kinds.count("MatMulNBits") == 1, "the head alone"


def test_a_token_does_not_depend_on_what_is_computed_beside_it(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    export(tiny_model("llama"), None, DYNAMIC, tmp_path)
    whole, parts = Decoder(tmp_path, threads=1), Decoder(tmp_path, threads=1)
    parts.longest_pass = 7
    for ids in PROMPTS:
        assert parts.prefill(ids) == pytest.approx(whole.prefill(ids), abs=1e-5)


def test_a_channel_that_is_much_larger_than_the_others_does_not_drown_them(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, loud = tiny_model("llama"), tmp_path / "loud"
    loud.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (loud / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    for name in list(weights):
        # The same function: what the norm gives more, the matrix behind it takes less.
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            weights[name] = np.concatenate([weights[name][:1] * 30, weights[name][1:]])
        elif name.endswith(tuple(f"{each}_proj.weight" for each in ("q", "k", "v", "gate", "up"))):
            weights[name] = np.hstack([weights[name][:, :1] / 30, weights[name][:, 1:]])
    save_file(weights, loud / "model.safetensors", metadata={"format": "pt"})
    export(loud, None, ExportForm(precision="fp32"), tmp_path / "exact")
    export(loud, None, DYNAMIC, tmp_path / "mixed")
    monkeypatch.setattr(eight_bits, "LARGEST_BLOCK", 1)
    export(loud, None, DYNAMIC, tmp_path / "as it is")
    exact = tmp_path / "exact"
    assert apart(tmp_path / "mixed", exact) < 0.7 * apart(tmp_path / "as it is", exact)


def test_mixing_changes_no_product_and_rounding_keeps_to_seven_bits() -> None:
    random = np.random.default_rng(0)
    activations, weights = random.normal(size=(5, 48)), random.normal(size=(48, 9))
    weights[:, 3] = 0
    blocks = (activations.reshape(5, 3, 16) @ hadamard_matrix(16)).reshape(5, 48)
    assert blocks @ mix_rows(weights, 16) == pytest.approx(activations @ weights, abs=1e-5)
    numbers, scales = quantise_columns(weights)
    assert numbers.dtype == np.int8
    assert np.isfinite(scales).all(), "a column of zeros has a scale too"
    assert scales[3] == 1
    assert np.abs(numbers).max() == 64
    assert numbers * scales == pytest.approx(weights, abs=float(scales.max()) / 2 + 1e-6)


def test_a_model_without_layers_of_constant_weights_is_refused(tmp_path: Path) -> None:
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2])
        for name in ("input_ids", "logits")
    ]
    node = onnx.helper.make_node("Identity", ["input_ids"], ["logits"])
    graph = onnx.helper.make_graph([node], "no layers", values[:1], values[1:])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="dynamic does not fit this model; use algorithm: rtn"):
        eight_bits.multiply_in_8_bits(tmp_path)


def test_it_is_a_form_of_int8_alone() -> None:
    with pytest.raises(ValueError, match="algorithm: dynamic needs precision: int8"):
        ExportForm(algorithm="dynamic")
