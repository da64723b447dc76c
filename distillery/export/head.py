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

from distillery.models.onnx_graph import Graph, save_in_place

_log = logging.getLogger(__name__)


def keep_rows(folder: Path, rows: Sequence[int]) -> bool:
    """Cut the head of the model in `folder` to `rows`, indices in the vocabulary; the logit of
    `rows[i]` is then the i-th. Those that stay are the same numbers but for rounding.

    Return False, and leave the folder as it is, for a head of a form that is not known here."""
    import onnx

    path = folder / "model.onnx"
    model = onnx.load(path)
    graph = Graph(model)
    head = graph.head()
    if head is None or not cut(graph, head, rows):
        _log.info("%s: its head is not of a form that can be cut to the classes", folder)
        return False
    graph.drop_unused()
    save_in_place(model, path)
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["vocab_size"] = len(rows)
    text = json.dumps(config, indent=4) + "\n"
    (folder / "genai_config.json").write_text(text, encoding="utf-8", newline="\n")
    return True


def cut(graph: Graph, head: Any, rows: Sequence[int]) -> bool:
    """Give `head` copies of its weights that have `rows` alone. Return whether that was
    possible; otherwise nothing is changed."""
    chosen = list(rows)
    weights = [graph.value(name) for name in head.input[1:]]
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
        graph.graph.initializer.append(made)
        head.input[index] = name
    logits = next(each for each in graph.graph.output if each.name == "logits")
    logits.type.tensor_type.shape.dim[-1].dim_value = len(chosen)
    return True
