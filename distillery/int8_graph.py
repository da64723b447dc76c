"""An exported int4 or int8 graph made over for reading prompts fast: `write_int8_graph`.

ModelBuilder's MatMulNBits suits a model that writes, token after token. Over a prompt it scales its sums anew every 16
to 128 weights and takes three times as long as one product of int8 matrices. So each weight matrix W [inputs, outputs]
becomes int8 with a scale for each column, and what it is multiplied with, x [tokens, inputs], uint8 with a scale for
each token, found anew in each pass:

    q = round(127 x / max|x|) + 128        Q = round(127 W / max|W|), max over a column
    x W = (max|x| / 127) (q - 128) Q (max|W| / 127)

The sums are of whole numbers: a token's values are the same bit for bit however many tokens are computed beside it.

Several prompts are computed in one pass, [rows, tokens] of ids, padded behind: it is a product over many tokens at a
time that the processor is fast at. They share the past keys and values, of one row, and the attention mask, [1, past +
tokens], all ones: a causal model doesn't look ahead at the padding. So attention goes row by row (Scan), each with the
same past; the present keys and values have a dimension for the rows before all others. From the last attention on,
each row's last token alone is computed, whose place is an input, `last`, [rows, 1]. The head stays as it is.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

GRAPH, WEIGHTS = "int8.onnx", "int8.weights"
_KNOWN_INPUTS = ("input_ids", "attention_mask", "past_key_values.")
_MOST_WEIGHTS = 1_000_000_000


def write_int8_graph(model: Path, folder: Path) -> Path | None:
    """Writes the ONNX file `model` in the form above into `folder`; None for a graph that it does not fit: one without
    MatMulNBits, with inputs or a structure that are not known, or with more than a billion weights, which would take
    too much memory beside the quantised ones."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    proto = onnx.load(str(model), load_external_data=False)
    graph = proto.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    found = [node for node in graph.node if _is_replaced(node, initializers)]
    known = all(value.name.startswith(_KNOWN_INPUTS) for value in graph.input)
    if not found or not known or sum(_attribute(node, "K") * _attribute(node, "N") for node in found) > _MOST_WEIGHTS:
        return None
    if not (_keep_last_tokens(graph) and _attend_row_by_row(graph)):
        return None
    with (folder / WEIGHTS).open("wb") as file:
        _replace(graph, _Weights(model.parent, initializers, file))
    for tensor in graph.initializer:
        if uses_external_data(tensor) and tensor.name in initializers:
            load_external_data_for_tensor(tensor, str(model.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
    (folder / GRAPH).write_bytes(proto.SerializeToString())
    return folder / GRAPH


def dequantised(node: Any, arrays: list[NDArray[Any]]) -> NDArray[np.float32]:
    """The weights of a MatMulNBits node, [outputs, inputs], from its `arrays`: packed values, scales, and where it has
    them zero points (com.microsoft.MatMulNBits in ONNX Runtime's ContribOperators.md)."""
    inputs, outputs, bits = (_attribute(node, name) for name in ("K", "N", "bits"))
    blocks = -(-inputs // _attribute(node, "block_size"))
    values = _unpacked(arrays[0].reshape(outputs, blocks, -1), bits)
    scales = arrays[1].reshape(outputs, blocks, 1)
    if len(arrays) > 2:
        zeros = _unpacked(arrays[2].reshape(outputs, -1), bits)[:, :blocks, None]
        weights = (values.astype(np.float32) - zeros) * scales
    else:
        weights = (values.astype(np.float32) - np.float32(2 ** (bits - 1))) * scales
    result: NDArray[np.float32] = weights.reshape(outputs, -1)[:, :inputs]
    return result


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """4-bit values lie two in a byte, the first in its lower half; [..., bytes] -> [..., values]."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


class _Weights:
    """Reads a graph's tensors and writes the int8 ones to a file, one at a time."""

    def __init__(self, folder: Path, initializers: dict[str, Any], file: BinaryIO) -> None:
        self.initializers = initializers
        self._folder, self._file = folder, file

    def of(self, node: Any) -> NDArray[np.float32]:
        from onnx import numpy_helper

        tensors = [self.initializers[name] for name in node.input[1:4] if name]
        return dequantised(node, [numpy_helper.to_array(tensor, str(self._folder)) for tensor in tensors])

    def add(self, name: str, values: NDArray[np.int8]) -> Any:
        """A tensor of the graph whose values are in the file."""
        from onnx import TensorProto

        tensor = TensorProto(name=name, data_type=TensorProto.INT8, dims=values.shape)
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": WEIGHTS, "offset": self._file.tell(), "length": values.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._file.write(np.ascontiguousarray(values).data)
        return tensor


def _is_replaced(node: Any, initializers: dict[str, Any]) -> bool:
    from onnx import TensorProto

    if node.op_type != "MatMulNBits" or "logits" in node.output or any(node.input[4:]):
        return False
    constant = all(name in initializers for name in node.input[1:4] if name)
    return (
        constant and _attribute(node, "bits") in (4, 8) and initializers[node.input[2]].data_type == TensorProto.FLOAT
    )


def _replace(graph: Any, weights: _Weights) -> None:
    from onnx import helper, numpy_helper

    nodes, quantised = [], set[str]()
    constants = {"one": np.float32(1), "zero": np.uint8(128), "last": np.array([-1]), "least": np.float32(1e-30)}
    constants |= {"most": np.float32(127), "step": np.float32(1 / 127)}
    added = [numpy_helper.from_array(np.asarray(value), f"int8.{name}") for name, value in constants.items()]
    unused = set[str]()
    for node in graph.node:
        if not _is_replaced(node, weights.initializers):
            nodes.append(node)
            continue
        source, target = node.input[0], node.output[0]
        if source not in quantised:
            nodes += _quantise(source)
            quantised.add(source)
        matrix = weights.of(node)
        scales = np.abs(matrix).max(axis=1) / 127
        scales[scales == 0] = 1
        added.append(weights.add(f"{target}.int8", np.round(matrix / scales[:, None]).astype(np.int8).T))
        added.append(numpy_helper.from_array(scales, f"{target}.scales"))
        operands = [f"{source}.uint8", f"{target}.int8", "int8.one", f"{target}.scales", "int8.zero"]
        nodes.append(helper.make_node("MatMulIntegerToFloat", operands, [f"{target}.unscaled"], domain="com.microsoft"))
        nodes.append(helper.make_node("Mul", [f"{target}.unscaled", f"{source}.scale"], [target]))
        unused.update(node.input[1:])
    unused -= {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in unused]
    _set(graph.initializer, kept + added)
    _set(graph.node, nodes)


def _quantise(source: str) -> Iterator[Any]:
    """`source`.uint8 and, for each token, `source`.scale. QuantizeLinear rounds and clips; its own scale is 1."""
    from onnx import helper

    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Abs", [source], "abs", {}),
        ("ReduceMax", [f"{source}.abs", "int8.last"], "max", {"keepdims": 1}),
        ("Max", [f"{source}.max", "int8.least"], "most", {}),
        ("Div", ["int8.most", f"{source}.most"], "inverse", {}),
        ("Mul", [source, f"{source}.inverse"], "scaled", {}),
        ("QuantizeLinear", [f"{source}.scaled", "int8.one", "int8.zero"], "uint8", {}),
        ("Mul", [f"{source}.most", "int8.step"], "scale", {}),
    ]
    for operator, inputs, output, options in steps:
        yield helper.make_node(operator, inputs, [f"{source}.{output}"], **options)


def _keep_last_tokens(graph: Any) -> bool:
    """Cuts off all tokens but each row's last behind the last attention; False where more goes on from there than the
    attention and the residual."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = list(graph.node)
    at = max((i for i, node in enumerate(nodes) if node.op_type == "GroupQueryAttention"), default=0)
    attention = nodes[at].output[0]
    after = _reached({attention}, nodes[at + 1 :])
    behind = [node for node in nodes[at + 1 :] if node.output[0] in after]
    from_prompt = _reached({value.name for value in graph.input}, nodes)
    cut = {name for node in behind for name in node.input if name in from_prompt and name not in after} | {attention}
    if len(cut) != 2 or not cut <= {name for node in nodes[: at + 1] for name in node.output}:
        return False
    for node in behind:
        for place, name in enumerate(node.input):
            if name in cut:
                node.input[place] = f"{name}.last"
    cutting = []
    for name in sorted(cut):
        cutting.append(helper.make_node("GatherND", [name, "last"], [f"{name}.flat"], batch_dims=1))
        cutting.append(helper.make_node("Unsqueeze", [f"{name}.flat", "last.axis"], [f"{name}.last"]))
    nodes[at + 1 : at + 1] = cutting
    _set(graph.node, nodes)
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "last.axis"))
    graph.input.append(helper.make_tensor_value_info("last", TensorProto.INT64, ["batch_size", 1]))
    return True


def _attend_row_by_row(graph: Any) -> bool:
    """Puts each GroupQueryAttention, which takes a past for a single row alone, into a Scan over the rows; False where
    one has more inputs than are known."""
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, shape: list[int | str | None] | None = None) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes = []
    for node in graph.node:
        if node.op_type != "GroupQueryAttention":
            nodes.append(node)
            continue
        # Beyond these: positions and a bias, which would be those of each row.
        if any(node.input[9:11]):
            return False
        rows, results = [name for name in node.input[:3] if name], list(node.output[:3])
        body = [helper.make_node("Unsqueeze", [f"{name}.row", "row.axis"], [f"{name}.alone"]) for name in rows]
        for place, name in enumerate(node.input[:3]):
            node.input[place] = f"{name}.alone" if name else ""
        node.output[0] = f"{results[0]}.alone"
        node.output[1:3] = [f"{name}.row" for name in results[1:]]
        body += [node, helper.make_node("Squeeze", [node.output[0], "row.axis"], [f"{results[0]}.row"])]
        inside = [value(f"{name}.row", [None, None]) for name in rows]
        graph_of_row = helper.make_graph(body, "row", inside, [value(f"{name}.row") for name in results])
        nodes.append(helper.make_node("Scan", rows, results, num_scan_inputs=len(rows), body=graph_of_row))
    _set(graph.node, nodes)
    graph.initializer.append(numpy_helper.from_array(np.array([0]), "row.axis"))
    presents = [value(output.name, [None] * 5) for output in graph.output if output.name != "logits"]
    _set(graph.output, [output for output in graph.output if output.name == "logits"] + presents)
    return True


def _reached(names: set[str], nodes: list[Any]) -> set[str]:
    """`names` and all values that are computed from them."""
    reached = set(names)
    for node in nodes:
        if any(name in reached for name in node.input):
            reached.update(name for name in node.output if name)
    return reached


def _attribute(node: Any, name: str) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), 0)


def _set(field: Any, values: list[Any]) -> None:
    """Assigns a repeated field of a protobuf message."""
    del field[:]
    field.extend(values)
