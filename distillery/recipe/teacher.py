"""recipe/teacher"""

from typing import Literal, Self

from pydantic import Field, model_validator

from distillery.recipe.base import Slice
from distillery.recipe.base_model import BaseModelRecipe
from distillery.recipe.export import ExportForm
from distillery.recipe.training import TrainingRecipe

_SHORTEST_RATIONALE = 48
"""Tokens of an answer: two short sentences and the letter's line."""


class TeacherPreparation(Slice):
    """A local teacher: a base model fine-tuned on the gold split, exported, and served over HTTP while it labels."""

    base: BaseModelRecipe = BaseModelRecipe()
    training: TrainingRecipe = TrainingRecipe()
    export: ExportForm = ExportForm()


class PriceRecipe(Slice):
    """What the teacher costs, in `currency` per million tokens; `cached_input` is as `input` where it is not given."""

    input: float = Field(ge=0)
    cached_input: float | None = Field(None, ge=0)
    output: float = Field(ge=0)
    currency: str = "USD"


class BudgetRecipe(Slice):
    """Caps on what one run spends on its teacher: it stops before the call that would pass one. All answers are kept,
    and the next run goes on from there. `calls` counts each try; `cost` needs teacher.prices. A run whose process is
    started anew, as Kubernetes may, counts from nothing."""

    cost: float | None = Field(None, gt=0)
    tokens: int | None = Field(None, gt=0, description="Prompt and answer together")
    calls: int | None = Field(None, gt=0)


class AnswerRecipe(Slice):
    """How the teacher is asked for an answer. `letter`: as the prompt says. `json`: held to {"answer": LETTER} by a
    JSON schema, where the endpoint takes one. `rationale`: a short reason first (Hsieh et al., Distilling
    Step-by-Step, 2023); needs teacher.max_tokens of some hundred.

    `votes` answers are drawn for a row (Wang et al., Self-Consistency, 2023), which needs a temperature above 0; with
    soft_labels their shares are the distribution. `orders` asks with the options in so many orders, each the one before
    turned by one place, since models lean to places (Zheng et al., Large Language Models Are Not Robust Multiple Choice
    Selectors, 2024). Of several answers the majority's is the label, and its share the confidence.
    """

    form: Literal["letter", "json", "rationale"] = "letter"
    instruction: str = Field(
        "First give your reason in one or two sentences. Then write the answer alone on a last line: Answer: LETTER",
        description="What a rationale is asked for with, below the prompt",
    )
    votes: int = Field(1, ge=1, le=64)
    orders: int = Field(1, ge=1, le=26)


class FilterRecipe(Slice):
    """Which labels are good enough to train on; the others are rejected with the reason."""

    confidence: float = Field(0.0, ge=0, le=1, description="Labels below this are rejected")
    agreement_with_gold: bool = Field(
        False, description="Reject labels that the row's gold answer contradicts"
    )
    balance: float | None = Field(
        None,
        ge=1,
        description="At most so many times the rarest letter's rows for any letter; the surest are kept",
    )
    minimum_accepted: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of rows with a label below which the run stops, after 100 rows or at the end",
    )


class CanaryRecipe(Slice):
    """A fixed set of training rows that every run asks afresh, to see whether the teacher still answers as it did."""

    rows: int = Field(0, ge=0, description="0 asks none")
    threshold: float = Field(
        0.1, ge=0, le=1, description="Share of changed answers above which it is reported"
    )
    stop: bool = Field(False, description="And ends the run")


class TeacherRecipe(Slice):
    """Who answers. `endpoint`: TEACHER_MODEL_ENDPOINT, TEACHER_MODEL_NAME and TEACHER_MODEL_KEY say where.
    `local`: the run prepares and serves its own teacher. `gold`: the rows' own answers. `file`: labels that are there
    already, in `files` of JSONL, CSV or Parquet, with the columns example_id, answer and, if known, distribution and
    rationale.

    `identity` names the teacher in the label store; by default the model's name, or the local model's digest. It is
    never the URL or the SDK, so that a moved endpoint repeats nothing.
    """

    kind: Literal["endpoint", "local", "gold", "file"] = "endpoint"
    identity: str | None = None
    files: tuple[str, ...] = ()
    sdk: Literal["auto", "azure-ai-inference", "openai"] = Field(
        "auto", description="auto: by the endpoint's URL"
    )
    soft_labels: bool = Field(
        False, description="Ask for log-probabilities and keep the distribution over the options"
    )
    temperature: float | None = Field(0.0, ge=0, le=2)
    max_tokens: int = Field(16, ge=1, description="Of the answer; reasoning teachers need more")
    answers: AnswerRecipe = AnswerRecipe()
    filters: FilterRecipe = FilterRecipe()
    concurrency: int = Field(
        8, ge=1, le=1024, description="Calls at a time, at most; fewer while it is overloaded"
    )
    requests_per_minute: int | None = Field(
        None, gt=0, description="Where the endpoint's headers tell no limit"
    )
    tokens_per_minute: int | None = Field(
        None, gt=0, description="Where the endpoint's headers tell no limit"
    )
    shared_limit: str | None = Field(
        None, description="A Prefect concurrency limit that runs take their calls from"
    )
    timeout_s: float = Field(60.0, gt=0)
    attempts: int = Field(
        5, ge=1, description="Tries of one call on 408, 409, 429, 5xx and dropped connections"
    )
    outage_s: float = Field(
        300.0, ge=0, description="How long an endpoint that gives only failures is waited for"
    )
    prices: PriceRecipe | None = None
    budget: BudgetRecipe = BudgetRecipe()
    tokenizer: str | None = Field(
        None, description="The teacher's, as a model folder or hub id, to count tokens with"
    )
    canaries: CanaryRecipe = CanaryRecipe()
    preparation: TeacherPreparation = TeacherPreparation()

    @property
    def content_id(self) -> str:
        """What the answers depend on, besides teacher and prompt: the part of this slice that is in cache keys."""
        return self.model_dump_json(
            include={"soft_labels", "temperature", "max_tokens", "answers", "filters"}
        )

    @property
    def asks_log_probabilities(self) -> bool:
        """Soft labels come from log-probabilities, or from votes where there are several."""
        return self.soft_labels and self.answers.votes == 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.answers.votes > 1 and self.temperature == 0:
            raise ValueError("answers.votes is above 1, which needs a temperature above 0")
        if self.budget.cost is not None and self.prices is None:
            raise ValueError(
                "budget.cost needs prices: {input: ..., output: ...} per million tokens"
            )
        if self.kind == "file" and not self.files:
            raise ValueError("kind is file: set files, such as [labels.jsonl]")
        if self.kind != "file" and self.files:
            raise ValueError(f"files are given, but kind is {self.kind}: set teacher.kind: file")
        if self.canaries.rows and self.kind != "endpoint":
            raise ValueError(
                f"canaries: a teacher of kind {self.kind} does not change by itself; leave them out"
            )
        if self.soft_labels and self.kind == "gold":
            raise ValueError("soft_labels: gold answers have no probabilities; set it to false")
        if (
            self.kind == "endpoint"
            and self.answers.form == "rationale"
            and self.max_tokens < _SHORTEST_RATIONALE
        ):
            raise ValueError(
                f"answers.form: rationale needs max_tokens of some hundred; {self.max_tokens} cut it off"
            )
        unsure = not self.soft_labels and self.answers.votes == self.answers.orders == 1
        if self.filters.confidence and self.kind != "file" and unsure:
            raise ValueError(
                "filters.confidence: one bare answer has none; set soft_labels, answers.votes or orders"
            )
        canary_calls = self.canaries.rows * self.answers.votes * self.answers.orders
        if self.budget.calls is not None and self.budget.calls <= canary_calls:
            raise ValueError(
                f"budget.calls: {self.budget.calls} leave nothing beside the {canary_calls} of canaries"
            )
        return self
