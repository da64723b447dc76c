"""Rewrite an exported model's graph so that it takes several sequences, each of its own length.

ModelBuilder's graphs take sequences of one length, [batch, length], which are as long as a mask
says, and their head reads all tokens or, where it is pruned, the last one of each sequence. The
graph of `with_lengths` has other inputs in place of the mask:
  - last, [sequences]: the index of each sequence's last token, its cached tokens included
  - new, [sequences]: how many tokens each sequence has in this pass
  - most, [1]: an upper bound of the tokens of a sequence, with those cached and the padding
  - read, [read tokens]: the tokens whose logits are given, by their places in [batch, length]'s
    second dimension

In the graph of `without_padding`, which is made from that one, all layers but the attention see the
sequences one behind the other, [1, tokens], which wastes nothing on short ones and gives each token
the numbers that it has in a pass of its own, since no other node looks beyond a token. Around each
GroupQueryAttention the tokens are laid out as [sequences, longest], and each sequence starts from a
cache that it may share with others. It has these inputs too, beside input_ids, [1, tokens], and the
caches past_key_values.*, [caches, heads, cached tokens, size]:
  - to_sequences, [sequences, longest]: where each sequence's tokens stand among the tokens; what
    follows a sequence's end is ignored
  - from_sequences, [tokens]: where each token stands in the flattened [sequences, longest]
  - cache_of, [sequences]: the index of the cache that a sequence starts from
  - cached, [1]: how many of a cache's tokens are read at most
"""

from typing import Any

import numpy as np

from distillery.models.onnx_folder import is_within, locations
from distillery.models.onnx_graph import ELEMENTWISE, Graph

TOKEN_BY_TOKEN = ELEMENTWISE | {
    *("Abs", "Add", "Clip", "Constant", "DequantizeLinear", "FastGelu", "Gather", "Gelu"),
    *("GatherBlockQuantized", "LayerNormalization", "MatMul", "MatMulInteger", "MatMulNBits"),
    *("MatMulIntegerToFloat", "Max", "Min", "Neg", "QuantizeLinear", "QuickGelu", "Reshape"),
    *("Round", "Sigmoid", "SimplifiedLayerNormalization", "SkipLayerNormalization"),
    *("SkipSimplifiedLayerNormalization", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze"),
}
"""The operators that give a token the same numbers whatever stands beside it. Not among them:
DynamicQuantizeLinear, whose scale is that of all tokens, and If, which chooses the rotary factors
of LongRoPE by the longest sequence."""

INPUTS = frozenset({"input_ids", "last", "new", "most", "read"})
"""The inputs of the graph of `with_lengths`, beside the caches."""

LAYOUT = frozenset({"to_sequences", "from_sequences", "cache_of", "cached"})
"""The further inputs of the graph of `without_padding`."""

ATTENTION_INPUTS = 17
LENGTHS, MOST, NEW = 5, 6, 16
"""The inputs of GroupQueryAttention, in onnxruntime 1.32: how many there are, and the places of the
sequences' last tokens, of the bound of their lengths and of the new tokens."""


class UnknownGraph(Exception):
    """A graph that can't be rewritten, and why."""


def with_lengths(model: Any) -> None:
    """Rewrite an ONNX model that was loaded without its external data.

    Raises UnknownGraph, and leaves the model in any state, for a graph that is not known here."""
    graph = model.graph
    check(model)
    before = Graph(model)
    head = before.head()
    if head is None or head.op_type not in ("MatMul", "MatMulNBits"):
        raise UnknownGraph("its head is of another form")
    states = states_before_pruning(head.input[0], before.makers)
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            inputs = [*node.input, *[""] * (ATTENTION_INPUTS - len(node.input))]
            inputs[LENGTHS], inputs[MOST], inputs[NEW] = "last", "most", "new"
            del node.input[:]
            node.input.extend(inputs)
        elif node is head:
            nodes.append(make("Gather", [states, "read"], "read_states", axis=1))
            head.input[0] = "read_states"
        nodes.append(node)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    # With them go the nodes that told the attention its lengths by a mask.
    before.drop_unused()
    read = {name for node in graph.node for name in node.input}
    for value in [each for each in graph.input if each.name not in read]:
        graph.input.remove(value)
    add_inputs(graph, "INT32", last=["sequences"], most=[1], new=["sequences"])
    add_inputs(graph, "INT64", read=["read_tokens"])
    for value in graph.output:
        if value.name == "logits":
            value.type.tensor_type.shape.dim[1].dim_param = "read_tokens"
    check_inputs(graph, INPUTS)
    check_operators(graph)


def without_padding(model: Any) -> None:
    """Rewrite a model of `with_lengths`."""
    graph = model.graph
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            nodes += around_attention(node)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    add_layout(graph)
    check_inputs(graph, INPUTS | LAYOUT)
    check_operators(graph)


def check(model: Any) -> None:
    """Raise UnknownGraph for weights outside of the folder, or an attention that has a window or
    reads what is not rewritten here."""
    if any(not is_within(location) for location in locations(model)):
        raise UnknownGraph("its weights are outside of its folder")
    attentions = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    if not attentions:
        raise UnknownGraph("it has no GroupQueryAttention")
    for node in attentions:
        window = [each.i for each in node.attribute if each.name == "local_window_size"]
        if window not in ([], [-1]):
            raise UnknownGraph("its attention has a window")
        if any(node.input[9:]) or not all(node.input[3:5]):
            raise UnknownGraph("its attention has other inputs")


def check_inputs(graph: Any, known: frozenset[str]) -> None:
    """Raise UnknownGraph for inputs that are neither `known` nor caches, or a cache that is not
    given back."""
    outputs = {value.name for value in graph.output}
    for value in graph.input:
        if value.name.startswith("past_key_values."):
            if value.name.replace("past_key_values.", "present.") not in outputs:
                raise UnknownGraph(f"it does not give {value.name} back")
        elif value.name not in known:
            raise UnknownGraph(f"it has the input {value.name}")


def check_operators(graph: Any) -> None:
    """Raise UnknownGraph where a node other than the attention may look beyond a token."""
    from onnx import numpy_helper

    constants = {each.name: each for each in graph.initializer}
    for node in graph.node:
        attributes = {each.name: each for each in node.attribute}
        if node.op_type.startswith("Reduce"):
            axes = None
            if "axes" in attributes:
                axes = list(attributes["axes"].ints)
            elif len(node.input) > 1 and node.input[1] in constants:
                axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
            if axes != [-1]:
                raise UnknownGraph(f"{node.op_type} may reduce several tokens to one")
        elif node.op_type == "Slice" and "constant/cache_axis" in node.input:
            continue
        elif node.op_type not in TOKEN_BY_TOKEN | {"GroupQueryAttention"}:
            raise UnknownGraph(f"it has the operator {node.op_type}")


def states_before_pruning(states: str, makers: dict[str, Any]) -> str:
    """Return the name of all tokens' states; `states` may be those of the last token alone."""
    node = makers.get(states)
    if node is None or node.op_type != "Unsqueeze":
        return states
    pruned = makers.get(node.input[0])
    if pruned is None or pruned.op_type != "Gather":
        raise UnknownGraph("its head is pruned in another way")
    return str(pruned.input[0])


def around_attention(node: Any) -> list[Any]:
    """Return the attention `node` with the nodes that lay its tokens out and take them back."""
    before: list[Any] = []
    inputs = list(node.input)
    for place in (0, 1, 2):
        name = inputs[place]
        if name:
            inputs[place] = f"{name}/sequences"
            before += [
                make("Gather", [name, "to_sequences"], f"{name}/laid_out", axis=1),
                make("Squeeze", [f"{name}/laid_out", "constant/first_axis"], inputs[place]),
            ]
    for place in (3, 4):
        name = inputs[place]
        inputs[place] = f"{name}/sequences"
        read = [name, "constant/zero", "cached", "constant/cache_axis"]
        before += [
            make("Slice", read, f"{name}/read"),
            make("Gather", [f"{name}/read", "cache_of"], inputs[place], axis=0),
        ]
    del node.input[:]
    node.input.extend(inputs)
    found = node.output[0]
    node.output[0] = f"{found}/sequences"
    return [
        *before,
        node,
        make("Reshape", [node.output[0], "constant/flat"], f"{found}/flat"),
        make("Gather", [f"{found}/flat", "from_sequences"], found, axis=1),
    ]


def make(kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    """Return a node of ONNX's own operators that is named as its output."""
    from onnx import helper

    return helper.make_node(kind, inputs, [output], name=output, **attributes)


def add_inputs(graph: Any, kind: str, **shapes: list[str | int | None]) -> None:
    """Add inputs of a kind of number by their names and shapes."""
    from onnx import TensorProto, helper

    for name, shape in shapes.items():
        value = helper.make_tensor_value_info(name, TensorProto.DataType.Value(kind), shape)
        graph.input.append(value)


def add_layout(graph: Any) -> None:
    """Add the inputs and constants that the nodes around the attention read; free the shapes that
    change."""
    from onnx import numpy_helper

    constants = {"zero": [0], "first_axis": [0], "cache_axis": [2], "flat": [1, -1, 0]}
    for name, value in constants.items():
        array = np.array(value, dtype=np.int64)
        graph.initializer.append(numpy_helper.from_array(array, f"constant/{name}"))
    add_inputs(
        graph,
        "INT64",
        to_sequences=["sequences", "longest"],
        from_sequences=["tokens"],
        cache_of=["sequences"],
        cached=[1],
    )
    for value in graph.input:
        if value.name.startswith("past_key_values."):
            value.type.tensor_type.shape.dim[0].dim_param = "caches"
    for value in graph.output:
        sizes = value.type.tensor_type.shape.dim
        if value.name != "logits":
            sizes[0].dim_param, sizes[2].dim_param = "sequences", "most_tokens"
