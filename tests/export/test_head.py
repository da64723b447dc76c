"""The head of a classifier, cut to its classes: the same logits from a smaller model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from distillery.export.build import export
from distillery.export.head import keep_rows
from distillery.inference.decoder import Decoder
from distillery.recipe import ExportForm

ROWS = [511, 7, 300, 8]
IDS = list(range(3, 23))


@pytest.fixture
def whole(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> Callable[[dict[str, Any], str], Path]:
    def build(settings: dict[str, Any], arch: str) -> Path:
        form = ExportForm(all_logits=True, **settings)
        export(tiny_model(arch), None, form, tmp_path / "whole")
        return tmp_path / "whole"

    return build


@pytest.mark.parametrize("arch", ["llama", "phi4mini"])
@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "fp32"},
        {"precision": "fp16"},
        {"precision": "int8", "algorithm": "rtn"},
        {"precision": "int8", "algorithm": "dynamic"},
        {"algorithm": "rtn", "share_embeddings": True},
        {"algorithm": "k_quant_mixed"},
    ],
    ids=str,
)
def test_the_logits_that_stay_are_the_same(
    whole: Callable[[dict[str, Any], str], Path],
    tmp_path: Path,
    settings: dict[str, Any],
    arch: str,
) -> None:
    folder = whole(settings, arch)
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    assert keep_rows(cut, ROWS)
    expected = Decoder(folder, threads=1).prefill_mean(IDS, 15, 0.25)
    found = Decoder(cut, threads=1).prefill_mean(IDS, 15, 0.25)
    assert found == pytest.approx(expected[ROWS], abs=1e-5)
    assert np.ptp(expected[ROWS]) > 1e-3
    # A second cut is of the rows that the first one left.
    assert keep_rows(cut, [2, 0])
    assert Decoder(cut, threads=1).prefill_mean(IDS, 15, 0.25) == pytest.approx(
        found[[2, 0]], abs=1e-5
    )


def test_weights_in_a_file_of_their_own_stay_there_and_the_others_go(
    whole: Callable[[dict[str, Any], str], Path], tmp_path: Path
) -> None:
    folder = whole({"precision": "fp32"}, "phi4mini")
    model = onnx.load(folder / "model.onnx")
    for file in folder.glob("model.onnx*"):
        file.unlink()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    before = (folder / "model.onnx.data").stat().st_size
    expected = Decoder(folder, threads=1).prefill_mean(IDS, 15, 0.25)
    assert keep_rows(folder, ROWS)
    assert (folder / "model.onnx.data").stat().st_size < before
    found = Decoder(folder, threads=1).prefill_mean(IDS, 15, 0.25)
    assert found == pytest.approx(expected[ROWS], abs=1e-5)


def test_a_head_that_is_not_known_is_left_as_it_is(
    whole: Callable[[dict[str, Any], str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = whole({"precision": "fp32"}, "llama")
    model = onnx.load(folder / "model.onnx")
    (head,) = (node for node in model.graph.node if "logits" in node.output)
    head.op_type = "Gemm"
    onnx.save(model, folder / "model.onnx")
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    caplog.set_level("INFO", "distillery")
    assert not keep_rows(folder, ROWS)
    assert "not of a form that can be cut" in caplog.text
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    assert json.loads(before["genai_config.json"])["model"]["vocab_size"] == 512
