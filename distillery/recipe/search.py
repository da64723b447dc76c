"""recipe/search"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from distillery.recipe.base import Slice


class SearchRecipe(Slice):
    """What a search tries: `rank` (with alpha twice that) and `keep`, how many layers, of a list; the others between
    two bounds, learning rates by their logarithm. What is not given stays as the recipe has it."""

    rank: tuple[Annotated[int, Field(ge=1)], ...] = ()
    keep: tuple[Annotated[int, Field(ge=1)], ...] = ()
    learning_rate: tuple[float, float] | None = Field(None, description="Such as [1e-5, 1e-3]")
    soft_weight: tuple[float, float] | None = None
    hidden_weight: tuple[float, float] | None = None
    trials: int = Field(12, ge=1)
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _something(self) -> Self:
        bounds = {
            name: getattr(self, name) for name in ("learning_rate", "soft_weight", "hidden_weight")
        }
        if not (self.rank or self.keep or any(bounds.values())):
            raise ValueError(
                "nothing to try: give rank, keep, learning_rate, soft_weight or hidden_weight"
            )
        for name, given in bounds.items():
            if given and not given[0] < given[1]:
                raise ValueError(f"{name}: give the lower bound first, and a higher one")
        if self.learning_rate and self.learning_rate[0] <= 0:
            raise ValueError("learning_rate: bounds above 0")
        return self
