"""A training's checkpoints in a folder, as a store would keep them."""

import shutil
from pathlib import Path


class OneFolder:
    """Checkpoints in a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, folder: Path) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(folder, self.path)

    def load(self, into: Path) -> bool:
        if self.path.exists():
            shutil.copytree(self.path, into, dirs_exist_ok=True)
        return self.path.exists()

    def of(self, step: str) -> "OneFolder":
        return OneFolder(self.path.with_name(step))
