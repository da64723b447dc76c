"""The evaluation slice: what the gate asks of a student before it is registered."""

from pydantic import Field

from distillery.recipe.base import Slice


class EvaluationRecipe(Slice):
    """The gate's two limits. Both go by the accuracy on the test rows."""

    minimum_kept: float = Field(0.0, ge=0, le=1)
    """Share of the teacher's accuracy that the student must reach. 0.95: 95 %. 0 asks for
    nothing."""

    maximum_loss: float = Field(0.02, ge=0, le=1)
    """Accuracy that the student may lose against the champion, on the test rows that both
    answered. 0.02: two points. 1 lets every student pass, even one that shares no test row with
    the champion."""
