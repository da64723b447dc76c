"""Run a model's graph in ONNX Runtime itself, beside ONNX Runtime GenAI, which gives one sequence.

The graph is read without its weights, which ONNX Runtime maps from the folder.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distillery.inference.batch_graph import UnknownGraph, with_lengths, without_padding
from distillery.inference.decoder import ADAPTER_FILE, model_errors, read_config
from distillery.models.onnx_file import load_without_weights

MODEL = "model.onnx"

LOG_SETTINGS = {"log_id", "log_severity_level", "log_verbosity_level"}
"""What session_options may set without a change of how the model is computed."""


class Graphs(NamedTuple):
    """A model's graph for `rows` of one length and for `many` sequences without padding, both by
    batch_graph.py, and a graph without weights that stands in for it where the tokenizer is loaded.
    """

    rows: bytes
    many: bytes
    stand_in: bytes


def read_graphs(folder: Path) -> Graphs:
    """Return the folder's graphs. Raises UnknownGraph for an adapter apart, for settings of the
    folder's own, and for a graph that can't be read or rewritten."""
    import onnx

    check_settings(folder)
    path = folder / MODEL
    try:
        if path.is_symlink():
            # ONNX Runtime maps no weights from a file outside of the folder.
            model = onnx.load(path, load_external_data=False)
        else:
            model = load_without_weights(path)
        stand_in = without_weights(model)
        with_lengths(model)
        rows = model.SerializeToString()
        without_padding(model)
        return Graphs(rows, model.SerializeToString(), stand_in)
    except UnknownGraph:
        raise
    except Exception as error:
        # The folder may be anyone's: what its graph may be is not known here.
        kind = type(error).__name__
        raise UnknownGraph(f"its graph can't be read or rewritten ({kind})") from error


def check_settings(folder: Path) -> None:
    """Raise UnknownGraph for an adapter apart, or settings of the folder's own."""
    decoder, _ = read_config(folder)
    options = dict(decoder.get("session_options") or {})
    provider_options = options.pop("provider_options", None)
    if (folder / ADAPTER_FILE).is_file():
        raise UnknownGraph("its adapter is apart")
    if provider_options or decoder.get("filename") != MODEL:
        raise UnknownGraph("its settings name a processor or a file of their own")
    if options.keys() - LOG_SETTINGS:
        raise UnknownGraph("it has session_options of its own")


def without_weights(model: Any) -> bytes:
    """Return a model with the inputs and outputs of `model` that computes nothing."""
    from onnx import helper

    outputs = []
    for value in model.graph.output:
        kind = value.type.tensor_type.elem_type
        outputs.append(helper.make_tensor_value_info(value.name, kind, None))
    nodes = []
    for value in outputs:
        nothing = helper.make_tensor(value.name, value.type.tensor_type.elem_type, [0], [])
        nodes.append(helper.make_node("Constant", [], [value.name], value=nothing))
    graph = helper.make_graph(nodes, "stand-in", list(model.graph.input), outputs)
    made = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return bytes(made.SerializeToString())


def load_tokenizer(folder: Path, stand_in: bytes) -> Any:
    """Return the folder's tokenizer of ONNX Runtime GenAI, which takes a model to load one."""
    import onnxruntime_genai

    og: Any = onnxruntime_genai
    with model_errors(folder):
        config = og.Config(str(folder))
        config.add_model_data(MODEL, stand_in)
        return og.Tokenizer(og.Model(config))


def open_session(folder: Path, graph: bytes, threads: int | None) -> Any:
    """Return a session of ONNX Runtime for a graph whose weights are in `folder`, or in itself.

    Raises ModelError where ONNX Runtime can't open one."""
    import onnxruntime

    ort: Any = onnxruntime
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    with runtime_errors(folder):
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    # It keeps the graph, with weights that are in it, to open the session again, which nothing
    # here asks for.
    session._model_bytes = None
    return session


def runtime_errors(folder: Path) -> AbstractContextManager[None]:
    """Turn what ONNX Runtime raises into a ModelError of one line. Its exceptions have only
    Exception in common."""
    return model_errors(folder, "ONNX Runtime", Exception)


class CacheShape(NamedTuple):
    """The heads of a cache, the size of each, and the kind of its numbers."""

    heads: int
    size: int
    kind: type[np.generic]

    def empty(self, sequences: int, tokens: int) -> NDArray[Any]:
        """Return a cache of zeros, [sequences, heads, tokens, size]. Only the parts of it that are
        written to take memory."""
        return np.zeros((sequences, self.heads, tokens, self.size), dtype=self.kind)


def cache_shapes(session: Any) -> dict[str, CacheShape]:
    """Return the shapes of a session's inputs past_key_values.*.

    Raises UnknownGraph where the heads or their size are no numbers."""
    shapes = {}
    for value in session.get_inputs():
        if not value.name.startswith("past_key_values."):
            continue
        sizes = list(value.shape)
        if len(sizes) != 4 or not all(isinstance(each, int) and each > 0 for each in sizes[1::2]):
            raise UnknownGraph("its caches have shapes without numbers")
        kind = np.float16 if value.type == "tensor(float16)" else np.float32
        shapes[value.name] = CacheShape(sizes[1], sizes[3], kind)
    return shapes


def runtime_value(array: NDArray[Any]) -> Any:
    """Return an array as a value of ONNX Runtime."""
    import onnxruntime

    ort: Any = onnxruntime
    return ort.OrtValue.ortvalue_from_numpy(array)
