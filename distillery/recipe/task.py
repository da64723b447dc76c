"""The task slice: what an answer to a row is."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from distillery.recipe.base import Slice


class AbstainRecipe(Slice):
    """Below which confidence the student abstains: its confidence is the probability of its
    likeliest answer."""

    accuracy: float | None = Field(None, gt=0, lt=1)
    """The accuracy that the answers which the student gives must have. The threshold is the lowest
    one for which the validation rows prove it; the run stops if there is none. Needs validation
    rows."""

    confidence: float = Field(0.95, gt=0.5, lt=1)
    """With `accuracy`, the confidence of the proof."""

    threshold: float | None = Field(None, gt=0, le=1)
    """The threshold itself. With `accuracy`, the threshold is at least this."""

    answer: str = Field("unsure", min_length=1)
    """What a served student says instead of an answer. It must not be one of the classes."""

    @model_validator(mode="after")
    def check_given(self) -> Self:
        if self.accuracy is None and self.threshold is None:
            raise ValueError("abstain needs accuracy, such as 0.95, or threshold")
        return self


class TaskRecipe(Slice):
    """What an answer to a row is."""

    added_later: ClassVar[frozenset[str]] = frozenset({"abstain"})

    kind: Literal["choice", "classify"] = "choice"
    """choice: each row has options of its own, and the answer is one's letter. classify: each row
    is a text, and the answer is one of the classes, which are the same for all rows."""

    labels: tuple[str, ...] | str | None = Field(None, min_length=1)
    """With kind: classify, the classes: a list, or a text file that names one a line. Rows with
    another label are refused. null: the labels found in the rows, in alphabetical order."""

    abstain: AbstainRecipe | None = None
    """When the student abstains instead of giving an answer that it is unsure of. null: never."""

    @model_validator(mode="after")
    def check_labels(self) -> Self:
        if self.kind == "choice" and self.labels is not None:
            raise ValueError(
                "labels: the options of kind: choice stand in the rows; set task.kind: classify"
            )
        if isinstance(self.labels, tuple) and len(self.labels) < 2:
            raise ValueError("labels: at least two classes are needed")
        if isinstance(self.labels, tuple) and self.abstain and self.abstain.answer in self.labels:
            raise ValueError(
                f"abstain.answer: {self.abstain.answer!r} is one of the labels; choose another text"
            )
        return self
