"""What is beyond one process or one machine's memory: `make bench-scale`, or
`python -m benchmarks.scale [--stub-rows N] [--memory-rows FEW MANY]`.

Each section is a module that also runs alone and says what its figures mean: scale_batches.py and
scale_memory.py. The last line is JSON with the figures of all.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.scale_batches import STUB_ROWS, batches, rounded
from benchmarks.scale_memory import FEW_ROWS, MANY_ROWS, memory_growth


def main(stub_rows: int, memory_rows: Sequence[int]) -> None:
    """Run all sections. `stub_rows`: of batches; `memory_rows`: few and many, of memory_growth."""
    figures: dict[str, Any] = {}
    for section in (partial(batches, stub_rows), partial(memory_growth, *memory_rows)):
        figures |= rounded(section())
    print(json.dumps(figures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.scale")
    parser.add_argument("--stub-rows", type=int, default=STUB_ROWS)
    parser.add_argument(
        "--memory-rows", type=int, nargs=2, metavar=("FEW", "MANY"), default=[FEW_ROWS, MANY_ROWS]
    )
    given = parser.parse_args()
    main(given.stub_rows, given.memory_rows)
