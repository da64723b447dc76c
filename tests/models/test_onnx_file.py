"""Weights that stay in a model's file are the ones that ONNX's own reader finds there."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import load_external_data_for_model

from distillery.export.build import export
from distillery.models.onnx_file import LEAST_BYTES, load_without_weights
from distillery.recipe import ExportForm


def test_weights_stay_in_the_file_and_are_found_there(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    form = ExportForm(precision="int8", algorithm="dynamic")
    export(tiny_model("llama"), None, form, tmp_path)
    path = tmp_path / "model.onnx"
    found, expected = load_without_weights(path), onnx.load(path)
    assert found.ByteSize() < path.stat().st_size / 2
    for tensor in found.graph.initializer:
        assert len(tensor.raw_data) < LEAST_BYTES
    load_external_data_for_model(found, str(tmp_path))
    for ours, theirs in zip(found.graph.initializer, expected.graph.initializer, strict=True):
        assert (ours.name, ours.raw_data) == (theirs.name, theirs.raw_data)
    del found.graph.initializer[:], expected.graph.initializer[:]
    assert found == expected


@pytest.mark.parametrize(
    "content", [b"\x3a\xff\x01", b"\x80" * 20, b"\x0b", b"\x08", b"\x3a\x03\x0a\x01\xff"]
)
def test_a_file_that_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises((ValueError, DecodeError), match=r"protocol buffers|parsing"):
        load_without_weights(path)
