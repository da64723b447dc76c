"""The task slice: what an answer to a row is."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AliasChoices, Field, StringConstraints, model_validator

from distillery.answers import check_schema
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


class OtherRecipe(Slice):
    """A class of texts that belong to none of the other classes, so that the student says so
    instead of choosing one of them."""

    label: Annotated[str, StringConstraints(strip_whitespace=True)] = Field("other", min_length=1)
    """The class's name. It is added to the classes, and must not be one of task.labels."""

    files: tuple[str, ...] = Field(min_length=1)
    """CSV, JSONL or Parquet files of such texts, in the column dataset.columns.question; ids and
    labels in them are passed over. They are dealt to gold, validation and test in the proportion of
    dataset.carve, where a role that is not carved counts 0.7 (gold), 0.1 (validation) or 0.2
    (test). There are gold rows even where the dataset has none. A hash of dataset.seed and the text
    decides, so that texts added later move none. Texts that stand in the data with a label are left
    out."""

    @property
    def content_id(self) -> str:
        """The part of this slice in cache keys: files count by their content, as part of the
        source's identity."""
        return self.label


TaskKind = Literal["choice", "classify", "extract", "generate"]
"""What an answer may be; see TaskRecipe.kind."""

Metric = Literal["exact_match", "field_f1", "rouge_l", "chrf", "bleu"]
"""A figure that says how good written answers are, from 0 to 1; see evaluation/metrics.py."""

METRIC_NAMES: dict[Metric | None, str] = {
    None: "accuracy",
    "exact_match": "exact match",
    "field_f1": "field F1",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "bleu": "BLEU",
}
"""What a task's primary figure is called; None is that of answers that are chosen."""


class TaskRecipe(Slice):
    """What an answer to a row is."""

    added_later: ClassVar[frozenset[str]] = frozenset(
        {"abstain", "other", "answer_schema", "metric", "max_tokens"}
    )

    in_order: ClassVar[frozenset[str]] = frozenset({"answer_schema"})

    kind: TaskKind = "choice"
    """choice: each row has options of its own, and the answer is one's letter. classify: each row
    is a text, and the answer is one of the classes, which are the same for all rows. extract: the
    answer is a JSON object of fields found in the row's text, as `schema` says. generate: the
    answer is text."""

    labels: tuple[str, ...] | str | None = Field(None, min_length=1)
    """With kind: classify, the classes: a list, or a text file that names one a line, whose name
    must end in .txt where a worker reads it. Rows with another label are refused. null: the labels
    found in the rows, in alphabetical order."""

    other: OtherRecipe | None = None
    """With kind: classify, a class for texts that belong to none of the others. null: none."""

    abstain: AbstainRecipe | None = None
    """When the student abstains instead of giving an answer that it is unsure of. null: never."""

    answer_schema: dict[str, Any] | str | None = Field(
        None, validation_alias=AliasChoices("schema", "answer_schema")
    )
    """With kind: extract, the JSON Schema of the answers, which are objects: the schema itself, or
    a .json file that holds it."""

    metric: Metric | None = None
    """With kind: extract or generate, the figure that gate, ladder and headline go by. null:
    field_f1 for extract, rouge_l for generate."""

    max_tokens: int = Field(256, ge=1)
    """With kind: extract or generate, the most tokens of the student's tokenizer that an answer may
    have. Rows with a longer answer are set aside in training."""

    @property
    def writes(self) -> bool:
        """Whether an answer is written, instead of chosen among a row's options or the classes."""
        return self.kind in ("extract", "generate")

    @model_validator(mode="after")
    def check_labels(self) -> Self:
        if self.kind == "choice" and self.labels is not None:
            raise ValueError(
                "labels: the options of kind: choice stand in the rows; set task.kind: classify"
            )
        if self.writes and self.labels is not None:
            raise ValueError(f"labels: answers of kind: {self.kind} are written; remove it")
        if isinstance(self.labels, tuple) and len(self.labels) < 2:
            raise ValueError("labels: at least two classes are needed")
        if isinstance(self.labels, tuple) and self.abstain and self.abstain.answer in self.labels:
            raise ValueError(
                f"abstain.answer: {self.abstain.answer!r} is one of the labels; choose another text"
            )
        return self

    @model_validator(mode="after")
    def check_other(self) -> Self:
        if self.other is None:
            return self
        label = self.other.label
        if self.writes:
            raise ValueError(f"other: answers of kind: {self.kind} are written; remove it")
        if self.kind == "choice":
            raise ValueError(
                "other: rows of kind: choice have options of their own; set task.kind: classify"
            )
        if isinstance(self.labels, tuple) and label in [name.strip() for name in self.labels]:
            raise ValueError(
                f"other.label: {label!r} is one of the labels; remove it there, or choose another "
                "name"
            )
        if self.abstain and self.abstain.answer == label:
            raise ValueError(
                f"abstain.answer: {label!r} is the class of task.other; choose another text"
            )
        return self

    @model_validator(mode="after")
    def check_written(self) -> Self:
        if self.kind == "extract" and self.answer_schema is None:
            raise ValueError(
                "schema: kind: extract needs the JSON Schema of the answers, such as "
                "{type: object, properties: {city: {type: string}}}"
            )
        if self.kind != "extract" and self.answer_schema is not None:
            raise ValueError(f"schema: belongs to kind: extract; remove it from {self.kind}")
        if isinstance(self.answer_schema, dict):
            try:
                check_schema(self.answer_schema)
            except ValueError as error:
                raise ValueError(f"schema: {error}") from error
        if self.kind != "extract" and self.metric == "field_f1":
            raise ValueError("metric: field_f1 belongs to kind: extract")
        if self.writes and self.abstain:
            raise ValueError(f"abstain: answers of kind: {self.kind} have no confidence; remove it")
        if not self.writes:
            for name in ("metric", "max_tokens"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name}: belongs to kind: extract and generate; remove it from {self.kind}"
                    )
        return self
