"""recipe/evaluation"""

from pydantic import Field

from distillery.recipe.base import Slice


class EvaluationRecipe(Slice):
    """`minimum_kept`: the gate refuses a candidate below this share of the teacher's accuracy on the test rows.
    `maximum_loss`: and one that is worse than the champion by more than this (points of accuracy, paired)."""

    minimum_kept: float = Field(0.0, ge=0, le=1)
    maximum_loss: float = Field(0.02, ge=0, le=1)
