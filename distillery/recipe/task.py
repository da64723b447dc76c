"""The task slice: what an answer to a row is."""

from typing import Literal, Self

from pydantic import Field, model_validator

from distillery.recipe.base import Slice


class TaskRecipe(Slice):
    """What an answer to a row is."""

    kind: Literal["choice", "classify"] = "choice"
    """choice: each row has options of its own, and the answer is one's letter. classify: each row
    is a text, and the answer is one of the classes, which are the same for all rows."""

    labels: tuple[str, ...] | str | None = Field(None, min_length=1)
    """With kind: classify, the classes: a list, or a text file that names one a line. Rows with
    another label are refused. null: the labels found in the rows, in alphabetical order."""

    @model_validator(mode="after")
    def check_labels(self) -> Self:
        if self.kind == "choice" and self.labels is not None:
            raise ValueError(
                "labels: the options of kind: choice stand in the rows; set task.kind: classify"
            )
        if isinstance(self.labels, tuple) and len(self.labels) < 2:
            raise ValueError("labels: at least two classes are needed")
        return self
