"""When a student abstains: the file abstain.json of its folder, a records.Abstention.

It stands among the model's files, so that it is registered, verified and downloaded with them.
Students that always answer have none.
"""

from pathlib import Path

from pydantic import ValidationError

from distillery.errors import ModelError
from distillery.records import Abstention

FILE = "abstain.json"


def write_abstention(abstention: Abstention, folder: Path) -> None:
    """Write the file into the model's `folder`."""
    text = abstention.model_dump_json(indent=1) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8", newline="\n")


def read_abstention(folder: Path) -> Abstention | None:
    """Return when the student in `folder` abstains; None for one that always answers.

    Raises ModelError for a file that can't be read as such."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return Abstention.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ModelError(
            f"{path}: no threshold can be read ({type(error).__name__}); fetch the model again"
        ) from error
