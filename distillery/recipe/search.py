"""The space of a search: which settings of a student `flows.search` tries."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from distillery.recipe.base import Slice


class SearchRecipe(Slice):
    """What a search tries. Settings that are not given stay as the recipe has them."""

    rank: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """LoRA ranks to try, such as [8, 16, 32]; alpha is twice the rank."""

    keep: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Numbers of decoder layers to try, such as [8, 12]."""

    learning_rate: tuple[float, float] | None = None
    """Lowest and highest learning rate, such as [1.0e-5, 1.0e-3]; tried on a logarithmic scale."""

    soft_weight: tuple[float, float] | None = None
    """Lowest and highest student.training.soft_weight."""

    hidden_weight: tuple[float, float] | None = None
    """Lowest and highest student.training.hidden_weight."""

    trials: int = Field(12, ge=1)
    """Students to train."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the sampler. Equal seeds and results give equal trials."""

    @model_validator(mode="after")
    def check_space(self) -> Self:
        bounds = {
            "learning_rate": self.learning_rate,
            "soft_weight": self.soft_weight,
            "hidden_weight": self.hidden_weight,
        }
        if not (self.rank or self.keep or any(bounds.values())):
            raise ValueError(
                "nothing to try: give rank, keep, learning_rate, soft_weight or hidden_weight"
            )
        for name, given in bounds.items():
            if given and given[0] >= given[1]:
                raise ValueError(f"{name}: give the lower bound first, then a higher one")
        if self.learning_rate and self.learning_rate[0] <= 0:
            raise ValueError("learning_rate: both bounds must be above 0")
        return self
