"""Read an ONNX model without its weights, which stay in the file.

A model's file is one message of protocol buffers, of which the weights are all but some percent.
onnx.load would hold them twice for a moment, and ONNX Runtime, given the model, once more."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

LEAST_BYTES = 1024
"""Smaller weights are read: ONNX Runtime looks at the values of some of them."""

GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
"""The numbers of the fields in ModelProto, GraphProto and TensorProto (onnx.proto)."""


class Field(NamedTuple):
    """A field of a message, and where it is in the file: from `start`, its tag, to `end`; `value`:
    where its value begins."""

    number: int
    start: int
    value: int
    end: int


def load_without_weights(path: Path) -> Any:
    """Return the ModelProto of a file. Its weights, but for small ones, are external data in the
    file itself.

    Raises ValueError, or DecodeError of protocol buffers, for a file that is none."""
    import onnx

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        model = onnx.ModelProto()
        for field in fields(data, 0, len(data)):
            if field.number != GRAPH:
                model.MergeFromString(data[field.start : field.end])
                continue
            for part in fields(data, field.value, field.end):
                if part.number == INITIALIZER:
                    add_initializer(model.graph, data, part, path.name)
                else:
                    model.graph.MergeFromString(data[part.start : part.end])
        return model


def add_initializer(graph: Any, data: mmap.mmap, field: Field, name: str) -> None:
    """Add the tensor of `field` to a graph; what it holds stays in the file `name`."""
    import onnx

    tensor = graph.initializer.add()
    held: Field | None = None
    for part in fields(data, field.value, field.end):
        if part.number == RAW_DATA and part.end - part.value >= LEAST_BYTES:
            held = part
        else:
            tensor.MergeFromString(data[part.start : part.end])
    if held:
        where = {"location": name, "offset": held.value, "length": held.end - held.value}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        tensor.data_location = onnx.TensorProto.EXTERNAL


def fields(data: mmap.mmap, start: int, end: int) -> Iterator[Field]:
    """Yield the fields of the message that is in `data` from `start` to `end`.

    Raises ValueError where there is none."""
    while start < end:
        tag, value = number_at(data, start, end)
        kind = tag & 7
        if kind == 0:
            _, after = number_at(data, value, end)
        elif kind == 2:
            size, value = number_at(data, value, end)
            after = value + size
        elif kind in (1, 5):
            after = value + (8 if kind == 1 else 4)
        else:
            raise ValueError("no message of protocol buffers")
        if after > end:
            raise ValueError("a message of protocol buffers that is cut off")
        yield Field(tag >> 3, start, value, after)
        start = after


def number_at(data: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    """Return the number that begins at `start`, seven bits a byte, and where it ends.

    Raises ValueError where there is none before `end`."""
    number = 0
    for index in range(start, min(end, start + 10)):
        number |= (data[index] & 0x7F) << (7 * (index - start))
        if data[index] < 0x80:
            return number, index + 1
    raise ValueError("no message of protocol buffers")
