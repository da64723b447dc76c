"""Print what the project and some of its extras require, one requirement a line:

    python deployments/requirements.py azure postgres > requirements.txt
    pip install --require-hashes --constraint constraints-hashes.txt --requirement requirements.txt

pip compares no hash of a local folder, so that `pip install .` can't be asked for hashes: its
requirements are installed so, and then the project itself by `pip install --no-deps .`. PyTorch is
left out; which build of it fits is the machine's matter.
"""

import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def requirements(extras: list[str], project: Path = PROJECT) -> list[str]:
    """Return the requirements of a pyproject.toml and of the `extras` in it, without PyTorch."""
    values = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    found = list(values["dependencies"])
    for extra in extras:
        found += values["optional-dependencies"][extra]
    return [each for each in found if not each.startswith("torch>")]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
