"""Read and tidy an exported ONNX model: its head, its constants, and what nothing reads."""

from pathlib import Path
from typing import Any

ELEMENTWISE = frozenset({"Cast", "Div", "Identity", "Mul", "Tanh"})
"""What may stand between a head and the logits, and leaves their order as it is."""

LONGEST_CHAIN = 16
"""How many nodes may stand between a constant and its value. Real graphs have one or two; a made-up
one could go on without end."""


class Graph:
    """An ONNX model of one graph, with its constants and the node that makes each value by name."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        # Olive makes the weights of an adapter apart inputs, with empty defaults.
        inputs = {each.name for each in self.graph.input}
        self.constants = {}
        for each in self.graph.initializer:
            if each.name not in inputs:
                self.constants[each.name] = each
        self.makers = {name: node for node in self.graph.node for name in node.output}

    def head(self) -> Any | None:
        """Return the node that multiplies the last states by the head's weights; None where it is
        not found, or where the graph goes round in a circle."""
        seen = set()
        name = "logits"
        while name not in seen:
            seen.add(name)
            node = self.makers.get(name)
            if node is None or node.op_type not in ELEMENTWISE:
                return node
            name = node.input[0]
        return None

    def value(self, name: str, seen: set[str] | None = None) -> Any:
        """Return a constant as an array, also where the graph reshapes or transposes it, up to
        LONGEST_CHAIN times; None for what is computed. `seen` are the values that it is made
        into."""
        from onnx import helper, numpy_helper

        if name in self.constants:
            return numpy_helper.to_array(self.constants[name])
        seen = seen or set()
        node = self.makers.get(name)
        if node is None or node.op_type not in ("Reshape", "Transpose"):
            return None
        if name in seen or len(seen) == LONGEST_CHAIN:
            return None
        seen.add(name)
        given: list[Any] = [self.value(each, seen) for each in node.input]
        if any(each is None for each in given):
            return None
        if node.op_type == "Reshape":
            return given[0].reshape(given[1])
        orders = [helper.get_attribute_value(each) for each in node.attribute]
        return given[0].transpose(*orders)

    def drop_unused(self) -> None:
        """Remove the nodes and constants that nothing reads any more."""
        outputs = {each.name for each in self.graph.output}
        while True:
            read = outputs | {name for node in self.graph.node for name in node.input}
            unused = [node for node in self.graph.node if not read & set(node.output)]
            if not unused:
                break
            for node in unused:
                self.graph.node.remove(node)
        for constant in list(self.graph.initializer):
            if constant.name not in read:
                self.graph.initializer.remove(constant)


def save_in_place(model: Any, path: Path) -> None:
    """Write a model over the file `path` that it was loaded from; weights that were in a file of
    their own are so again."""
    import onnx

    data = path.with_name(f"{path.name}.data")
    apart = data.exists()
    data.unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=apart, location=data.name)
