"""Training as a stage."""

from typing import Any

import pytest

from distillery.errors import TrainingUnavailable
from distillery.recipe import TrainingRecipe
from tasks.student import train


def test_training_ends_before_it_loads_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a worker that should have a GPU and has none."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("DISTILLERY_NEEDS_GPU", "true")
    released: list[None] = []
    monkeypatch.setattr("tasks.stage.release_gpu", lambda: released.append(None))
    nothing: Any = None
    with pytest.raises(TrainingUnavailable, match="DISTILLERY_NEEDS_GPU"):
        train.fn(nothing, TrainingRecipe(), nothing, nothing, nothing)
    assert released == [None], "a stage gives back its memory, also where it fails"
