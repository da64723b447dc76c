"""What is beyond one process: `make bench-scale`. Each section is a module that also runs alone.
The last line is JSON with the figures of all."""

import json

from benchmarks.scale_batches import batches, rounded

SECTIONS = (batches,)


def main() -> None:
    figures = {}
    for section in SECTIONS:
        figures |= rounded(section())
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
