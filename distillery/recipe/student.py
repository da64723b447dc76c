"""The student slice: what the student starts from, which layers it keeps and how it is trained."""

from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from distillery.recipe.base import Slice
from distillery.recipe.base_model import BaseModelRecipe
from distillery.recipe.prompt import PromptRecipe
from distillery.recipe.training import TrainingRecipe


class LayerChoice(Slice):
    """How many decoder layers to keep, and by which rule they are chosen."""

    added_later: ClassVar[frozenset[str]] = frozenset({"largest_loss"})

    keep: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Number of decoder layers to keep, or their share of the model's: 0.4 keeps 12 of 30. With
    by: probe, the most that are kept; null: no limit."""

    by: Literal["early_and_last", "first", "even", "block_influence", "probe"] = "early_and_last"
    """early_and_last: the first ones and the very last. first: the first ones alone. even: evenly
    spaced, with the first and the last. block_influence: those that change the hidden states of the
    training prompts most (Men et al., ShortGPT, 2024). probe: the first ones, as few as give the
    classes of the training rows to a linear probe; needs task.kind: classify."""

    largest_loss: float = Field(0.01, ge=0, lt=1)
    """With by: probe, the share of the training rows that the probe of the layers kept may answer
    wrongly beyond that of the best depth. Training wins back a part of it."""

    @model_validator(mode="after")
    def check_number(self) -> Self:
        if self.keep is None and self.by != "probe":
            raise ValueError("keep: give the number of layers to keep, or their share")
        return self


def check_ascending(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Return `layers`. Raises ValueError unless each is higher than the one before."""
    if any(layer >= next_layer for layer, next_layer in pairwise(layers)):
        raise ValueError("give each layer once, from the lowest to the highest")
    return layers


LayerNumber = Annotated[int, Field(ge=0)]

Layers = (
    Annotated[tuple[LayerNumber, ...], Field(min_length=1), AfterValidator(check_ascending)]
    | LayerChoice
)
"""Decoder layers by number, from 0 and in ascending order, or the rule by which they are chosen."""


class HealingRecipe(Slice):
    """A step of cutting and training before the student's own, on the same rows.

    A deep cut does less harm if it is made in parts, with a training after each.
    """

    layers: Layers | None = None
    """Layers to keep of the model that the step before left: numbers from 0 in ascending order, or
    {keep: N, by: RULE}. null keeps all."""

    training: TrainingRecipe = TrainingRecipe(method="full")
    """How this step trains. Its method is full: an adapter does not survive the next cut."""

    @model_validator(mode="after")
    def check_method(self) -> Self:
        if self.training.adapts:
            raise ValueError(
                "a healing step needs training.method: full; "
                "an adapter does not survive the next cut"
            )
        return self


class StudentRecipe(Slice):
    """What the student is made from, and how it is trained."""

    start: Literal["base", "teacher"] = "base"
    """base: the weights of `base`. teacher: the checkpoint of the local teacher, which needs
    teacher.kind: local."""

    base: BaseModelRecipe = BaseModelRecipe()
    """The base model, with start: base."""

    layers: Layers | None = None
    """Decoder layers to keep: numbers from 0 in ascending order, such as [0, 1, 2, 29], or
    {keep: N, by: RULE}. null keeps all."""

    healing: tuple[HealingRecipe, ...] = ()
    """Steps of cutting and training before the student's own."""

    gold: bool = False
    """Train on the gold rows with their own answers, too, beside the rows that the teacher
    labelled."""

    prompt: PromptRecipe | None = None
    """A prompt for the student alone, with start: base. null: the same prompt as the teacher's."""

    training: TrainingRecipe = TrainingRecipe()
    """How the student is trained, after the healing steps."""

    @property
    def learns_from_gold(self) -> bool:
        """Whether the student has learnt from the gold rows, itself or as the teacher whose
        weights it starts from."""
        return self.gold or self.start == "teacher"

    @property
    def trainings(self) -> tuple[TrainingRecipe, ...]:
        """The trainings of the healing steps and the student's own, in order."""
        return (*(step.training for step in self.healing), self.training)
