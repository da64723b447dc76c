"""recipe/student"""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from distillery.recipe.base import Slice
from distillery.recipe.base_model import BaseModelRecipe
from distillery.recipe.prompt import PromptRecipe
from distillery.recipe.training import TrainingRecipe


class LayerChoice(Slice):
    """How many decoder layers to keep, and which: the early ones and the last, an even spacing with the first and the
    last, or those of the greatest block influence on the training prompts (Men et al., ShortGPT, 2024)."""

    keep: int = Field(ge=1)
    by: Literal["early_and_last", "even", "block_influence"] = "early_and_last"


def _in_order(layers: tuple[int, ...]) -> tuple[int, ...]:
    if any(one >= next_one for one, next_one in pairwise(layers)):
        raise ValueError("give each layer once, from the lowest to the highest")
    return layers


Layers = (
    Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_in_order)
    ]
    | LayerChoice
)
"""The layers themselves, in order, or how they are chosen."""


class HealingRecipe(Slice):
    """A step before the student's own training: it keeps `layers` of the model as the step before left it (None: all),
    and trains it on the same rows, so that a deep cut is made in parts that each heal."""

    layers: Layers | None = None
    training: TrainingRecipe = TrainingRecipe(method="full")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.training.adapts:
            raise ValueError(
                "training.method of a healing step is full: an adapter does not outlive the next cut"
            )
        return self


class StudentRecipe(Slice):
    """What is trained. `start`: the base model, or the local teacher's own checkpoint. `layers`: which of its decoder
    layers to keep, in order, or how they are chosen; None keeps all. `healing`: steps of cutting and training before
    that. `gold`: whether the gold rows, with their own answers, are trained on beside those that the teacher labelled.
    `prompt`: the student's own, where it is asked otherwise than the teacher."""

    start: Literal["base", "teacher"] = "base"
    base: BaseModelRecipe = BaseModelRecipe()
    layers: Layers | None = None
    healing: tuple[HealingRecipe, ...] = ()
    gold: bool = False
    prompt: PromptRecipe | None = None
    training: TrainingRecipe = TrainingRecipe()
