"""Cut an exported model's head to a few rows: what a classifier asks of its vocabulary.

With the whole head, a model that gives the logits of all of a text's tokens spends on the head as
much as on several layers: 49,152 rows for each token, where a classifier reads one a class.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)

ELEMENTWISE = frozenset({"Cast", "Div", "Identity", "Mul", "Tanh"})
"""What may stand between a head and the logits, and leaves their order as it is."""


def keep_rows(folder: Path, rows: Sequence[int]) -> bool:
    """Cut the head of the model in `folder` to `rows`, indices in the vocabulary; the logit of
    `rows[i]` is then the i-th. Those that stay are the same numbers but for rounding.

    Return False, and leave the folder as it is, for a head of a form that is not known here."""
    import onnx

    path = folder / "model.onnx"
    model = onnx.load(path)
    graph = Graph(model)
    head = graph.head()
    if head is None or not graph.cut(head, rows):
        _log.info("%s: its head is not of a form that can be cut to the classes", folder)
        return False
    graph.drop_unused()
    data = folder / f"{path.name}.data"
    apart = data.exists()
    data.unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=apart, location=data.name)
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["vocab_size"] = len(rows)
    text = json.dumps(config, indent=4) + "\n"
    (folder / "genai_config.json").write_text(text, encoding="utf-8", newline="\n")
    return True


class Graph:
    """An ONNX model of one graph, with its constants and the node that makes each value by name."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.constants = {each.name: each for each in self.graph.initializer}
        self.makers = {name: node for node in self.graph.node for name in node.output}

    def head(self) -> Any | None:
        """Return the node that multiplies the last states by the head's weights; None where it is
        not found."""
        node = self.makers.get("logits")
        while node is not None and node.op_type in ELEMENTWISE:
            node = self.makers.get(node.input[0])
        return node

    def cut(self, head: Any, rows: Sequence[int]) -> bool:
        """Give `head` copies of its weights that have `rows` alone. Return whether that was
        possible; otherwise nothing is changed."""
        chosen = list(rows)
        weights = [self.value(name) for name in head.input[1:]]
        if any(weight is None for weight in weights):
            return False
        if head.op_type == "MatMulNBits":
            # [rows, blocks, bytes a block], and for each block of each row a scale and a zero
            # point, which are kept flat in some models.
            size = next(each for each in head.attribute if each.name == "N")
            whole = [weight.reshape(size.i, *(weight.shape[1:] or [-1])) for weight in weights]
            kept = [weight[chosen] for weight in whole]
            size.i = len(chosen)
        elif head.op_type == "MatMul":
            kept = [weights[0][:, chosen]]
        else:
            return False
        from onnx import numpy_helper

        for index, weight in enumerate(kept, 1):
            name = f"{head.input[index]}.classes"
            made = numpy_helper.from_array(np.ascontiguousarray(weight), name)
            self.graph.initializer.append(made)
            head.input[index] = name
        logits = next(each for each in self.graph.output if each.name == "logits")
        logits.type.tensor_type.shape.dim[-1].dim_value = len(chosen)
        return True

    def value(self, name: str) -> Any:
        """Return a constant as an array, also where the graph reshapes or transposes it; None for
        what is computed."""
        from onnx import helper, numpy_helper

        if name in self.constants:
            return numpy_helper.to_array(self.constants[name])
        node = self.makers.get(name)
        if node is None or node.op_type not in ("Reshape", "Transpose"):
            return None
        given: list[Any] = [self.value(each) for each in node.input]
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
