"""The teacher slice: who labels the rows, how it is asked, and which answers become labels."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from distillery.recipe.base import Slice, leave_out
from distillery.recipe.base_model import BaseModelRecipe
from distillery.recipe.export import ExportForm
from distillery.recipe.prompt import PromptRecipe
from distillery.recipe.student import Layers
from distillery.recipe.training import TrainingRecipe

SHORTEST_RATIONALE = 48
"""Tokens of an answer of two short sentences and the line with the letter."""

OF_ANSWERS: dict[str, Any] = dict.fromkeys(
    ("soft_labels", "temperature", "max_tokens", "stop", "answers", "filters"), True
)
"""The settings that a teacher's labels depend on."""

OF_CHEAP_ANSWERS = {"below", "soft_labels", "temperature", "max_tokens", "answers"}
"""The settings of a cheap teacher that the labels depend on."""

SCHEDULED_CANARIES = 20
"""Canary rows of a scheduled run whose recipe does not say how many."""

BATCH_SHARE = 0.5
"""The share of their prices that OpenAI and Azure ask in batches: 50 % less
(platform.openai.com/docs/guides/batch; learn.microsoft.com/azure/ai-foundry/openai/how-to/batch).
"""


class TeacherPreparation(Slice):
    """A local teacher: fine-tuned on the gold rows, exported, and served while it labels."""

    added_later: ClassVar[frozenset[str]] = frozenset({"layers"})

    base: BaseModelRecipe = BaseModelRecipe()
    """The base model that becomes the teacher."""

    layers: Layers | None = None
    """Decoder layers to keep, as in student.layers. null keeps all."""

    training: TrainingRecipe = TrainingRecipe()
    """How the teacher is trained on the gold rows."""

    export: ExportForm = ExportForm()
    """The form in which the teacher is served."""


class BatchPriceRecipe(Slice):
    """What the teacher costs in batches, per million tokens."""

    input: float = Field(ge=0)
    """Price of a million prompt tokens."""

    cached_input: float | None = Field(None, ge=0)
    """Price of a million prompt tokens that the endpoint reports as cached. null: as `input`."""

    output: float = Field(ge=0)
    """Price of a million tokens of answers."""


class PriceRecipe(Slice):
    """What the teacher costs, per million tokens."""

    input: float = Field(ge=0)
    """Price of a million prompt tokens."""

    cached_input: float | None = Field(None, ge=0)
    """Price of a million prompt tokens that the endpoint reports as cached. null: as `input`."""

    output: float = Field(ge=0)
    """Price of a million tokens of answers."""

    currency: str = "USD"
    """Currency of the prices and of budget.cost."""

    batch: Annotated[float, Field(ge=0, le=1)] | BatchPriceRecipe = Field(
        BATCH_SHARE, exclude_if=lambda batch: batch == BATCH_SHARE
    )
    """What batches cost: a share of these prices, or prices of their own (input, cached_input,
    output). OpenAI and Azure state 50 % less."""

    @property
    def in_batch(self) -> Self:
        """These prices as they are in a batch."""
        if isinstance(self.batch, BatchPriceRecipe):
            return self.model_copy(update={**self.batch.model_dump(), "batch": 1.0})
        cached = None if self.cached_input is None else self.cached_input * self.batch
        return self.model_copy(
            update={
                "input": self.input * self.batch,
                "cached_input": cached,
                "output": self.output * self.batch,
                "batch": 1.0,
            }
        )


class BudgetRecipe(Slice):
    """Caps on what is spent on a recipe's teacher, counted in the ledger.

    A run stops before the call that would exceed a cap. All answers are kept, and the next run goes
    on from there. Processes that spend at the same time keep the caps together, on all machines
    that share the label database; a run that is restarted in a new process goes on counting.
    """

    added_later: ClassVar[frozenset[str]] = frozenset({"period"})

    cost: float | None = Field(None, gt=0)
    """Cap on the cost, in prices.currency. Needs teacher.prices. null: no cap."""

    tokens: int | None = Field(None, gt=0)
    """Cap on the tokens of prompts and answers together. null: no cap."""

    calls: int | None = Field(None, gt=0)
    """Cap on the calls; every attempt counts. null: no cap."""

    period: Literal["run", "day", "week", "month"] = Field(
        "run", exclude_if=lambda period: period == "run"
    )
    """What the caps are for: each run, or all runs of recipes of this name since the day, the week
    (on Monday) or the month began in UTC."""

    @property
    def caps(self) -> dict[str, float]:
        """The caps that are set, by name: cost, tokens and calls."""
        named = {"cost": self.cost, "tokens": self.tokens, "calls": self.calls}
        return {name: float(cap) for name, cap in named.items() if cap is not None}


class BatchRecipe(Slice):
    """How rows are asked in batches: files of requests that the endpoint answers within a day, at a
    lower price (OpenAI's Batch API, which Azure has too).

    A run sends what the label store does not know, waits, and takes the answers in. It may end as
    waiting, and goes on from there when it is run again.
    """

    window: str = Field("24h", pattern=r"^[1-9]\d*[hd]$")
    """The time within which the endpoint is to answer; OpenAI and Azure know 24h alone."""

    model: str | None = Field(None, min_length=1)
    """The model or deployment that answers batches, where it is another than the one that is asked
    directly, as Azure's deployments of type Global Batch are. null: the endpoint's model."""

    lines: int = Field(50_000, ge=1, le=100_000)
    """The most requests in a file. OpenAI takes 50,000, Azure 100,000."""

    megabytes: int = Field(200, ge=1, le=200)
    """The largest file, in millions of bytes. OpenAI and Azure take 200."""

    direct_below: int = Field(100, ge=0)
    """The most requests that are asked directly instead, since a batch takes hours."""

    tries: int = Field(2, ge=1, le=10)
    """Batches in which a request is sent before it is asked directly."""

    poll_s: float = Field(60.0, gt=0)
    """Seconds between two looks at a batch."""

    wait_s: float = Field(3600.0, ge=0)
    """Seconds that a run waits for its batches before it ends as waiting."""

    again_s: float = Field(1800.0, gt=0)
    """Seconds after which a run of a deployment that ended as waiting is started again."""


class AnswerRecipe(Slice):
    """How the teacher answers, and how often it is asked for a row.

    A row is asked `votes` times in each of `orders` orders. If there are several answers, the label
    is the majority's, and its share of the answers is the confidence. With task.kind: extract it is
    the object that most of them are, the first of equally frequent ones. With generate, each of
    them that is another text is learnt.
    """

    form: Literal["letter", "json", "rationale"] = "letter"
    """letter: as the prompt says. json: held to {"answer": LETTER}, or with task.kind: extract to
    task.schema, by a JSON schema if the endpoint takes one. rationale: a short reason first, then
    the letter (Hsieh et al., Distilling Step-by-Step, 2023); needs teacher.max_tokens of a few
    hundred."""

    instruction: str = (
        "First give your reason in one or two sentences. "
        "Then write the answer alone on a last line: Answer: LETTER"
    )
    """With form: rationale, the text below the prompt that asks for the reason."""

    votes: int = Field(1, ge=1, le=64)
    """Answers drawn for each row (Wang et al., Self-Consistency, 2023). Above 1 it needs a
    temperature above 0; with soft_labels, the shares of the votes are the probabilities. Of the
    test rows, one text is enough with task.kind: generate."""

    orders: int = Field(1, ge=1, le=26)
    """Orders of the options in which each row is asked, each rotated by one option, since models
    prefer positions (Zheng et al., Large Language Models Are Not Robust Multiple Choice Selectors,
    2024)."""


class FilterRecipe(Slice):
    """Which labels are good enough to train on. The others are rejected, with the reason."""

    confidence: float = Field(0.0, ge=0, le=1)
    """Reject labels with a lower confidence: the letter's probability, or the share of several
    answers that agree. 0 rejects none."""

    agreement_with_gold: bool = False
    """Reject labels that differ from the row's own answer, if it has one."""

    balance: float | None = Field(None, ge=1)
    """Keep at most this many times the rarest letter's labels of any letter, the surest first.
    null: keep all."""

    minimum_accepted: float = Field(0.5, ge=0, le=1)
    """Share of rows that must get a label. The run stops if it is lower after 100 rows or at the
    end. 0 accepts any."""


class CanaryRecipe(Slice):
    """Training rows that a run asks again, to detect whether the teacher has changed."""

    rows: int | None = Field(None, ge=0)
    """Number of canary rows; 0 asks none. Needs teacher.kind: endpoint. null: 20 in a run that a
    schedule of its deployment starts, if no budget is set, and none in other runs. With task.kind:
    generate and answers.votes above 1 none are asked, since texts that are drawn differ."""

    threshold: float = Field(0.1, ge=0, le=1)
    """Share of changed answers above which the change is reported."""

    stop: bool = False
    """End the run if the threshold is exceeded."""


class SelectRecipe(Slice):
    """Which train rows the teacher is asked about, if not all: those that teach the student most.

    Rows whose answers are stored stay, since they are paid for, and so do those that the last
    student learnt from; `rows` is what is added to them. Rows that are not chosen are
    neither asked nor learnt. See docs/how-to/labels.md."""

    rows: int = Field(ge=1)
    """The most rows that are chosen beside those that stay."""

    by: Literal["uncertainty", "diversity", "both"] = "both"
    """uncertainty: the rows of which the last student, the champion in the registry, is least sure;
    where there is none, a classifier of words that learns from the gold rows. diversity: rows whose
    words differ from each other's, also where answers are written. both: rows that differ in what
    the student would learn from them (Ash et al., Deep Batch Active Learning by Diverse, Uncertain
    Gradient Lower Bounds, ICLR 2020)."""


def refuse_foreign(recipe: Slice, names: frozenset[str], reason: str) -> None:
    """Raise ValueError for one of the settings `names` that is given and not at its default."""
    for name in sorted(names & recipe.model_fields_set):
        if getattr(recipe, name) != type(recipe).model_fields[name].default:
            raise ValueError(f"{name}: {reason}; remove this setting")


class TeacherRecipe(Slice):
    """Who labels the rows, and how."""

    section: ClassVar[str] = "teacher"
    """Where these settings stand in a recipe, for messages."""

    wording: ClassVar[str] = "prompt.system"
    """Which setting tells the model what to answer, for messages."""

    variables: ClassVar[str] = "TEACHER_MODEL"
    """What the names of the environment variables begin with that tell of the endpoint."""

    budget_section: ClassVar[str] = "teacher"
    """Where the budget for its calls stands, for messages."""

    needs_labels: ClassVar[bool] = True
    """Whether a labelling ends in an error if no row gets a label, whatever the reason."""

    added_later: ClassVar[frozenset[str]] = frozenset(
        {
            *("terms", "largest_shift", "insist", "max_age", "stop", "shared_pace", "batch"),
            *("cascade", "select", "processes"),
        }
    )

    kind: Literal["endpoint", "local", "gold", "file"] = "endpoint"
    """endpoint: the chat-completions endpoint that TEACHER_MODEL_ENDPOINT, TEACHER_MODEL_NAME and
    TEACHER_MODEL_KEY name. local: a model that the run prepares and serves itself. gold: the rows'
    own answers. file: labels that exist already, in `files`."""

    identity: str | None = None
    """The teacher's name in the label store. null: the endpoint's model name. It is never a URL, so
    an endpoint that moves is not asked again."""

    files: tuple[str, ...] = ()
    """With kind: file, JSONL, CSV or Parquet files with the columns example_id and answer, and
    optionally distribution and rationale. Written answers have neither; a Parquet file may have
    their tokens, candidates and logs, as the answer_tokens.parquet of a run's labels."""

    sdk: Literal["auto", "azure-ai-inference", "openai"] = "auto"
    """The client for the endpoint. auto: chosen by the endpoint's URL."""

    soft_labels: bool = False
    """Keep the teacher's probabilities beside its answer, from log-probabilities: those of the
    options, which come from votes if answers.votes is above 1, or those of each token of a written
    answer."""

    temperature: float | None = Field(0.0, ge=0, le=2)
    """Sampling temperature. null: sends none, for models that take none."""

    max_tokens: int = Field(16, ge=1)
    """Tokens that an answer may have. Reasoning models need thousands."""

    stop: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field(
        (), max_length=4, exclude_if=lambda texts: not texts
    )
    """With task.kind: generate, texts at which the endpoint ends an answer, such as ["\\n\\n"];
    they are no part of it. Models that reason may refuse them."""

    answers: AnswerRecipe = AnswerRecipe()
    """How the teacher answers."""

    filters: FilterRecipe = FilterRecipe()
    """Which of its labels are rejected."""

    concurrency: int = Field(8, ge=1, le=1024)
    """The most calls at a time; fewer while the endpoint is overloaded."""

    processes: int = Field(1, ge=1, le=256, exclude_if=lambda count: count == 1)
    """The most processes that label at once, where there are many rows: processes of this machine,
    or with the parameter labels_deployment runs of that deployment. They share `concurrency`, the
    limits per minute and the budget. Needs kind: endpoint."""

    requests_per_minute: int | None = Field(None, gt=0)
    """The endpoint's limit on requests, if its headers do not tell it. null: no limit of our
    own."""

    tokens_per_minute: int | None = Field(None, gt=0)
    """The endpoint's limit on tokens, if its headers do not tell it. null: no limit of our own."""

    shared_pace: bool = Field(False, exclude_if=lambda shared: not shared)
    """Divide the endpoint's limits per minute, those above or those in its headers, evenly among
    the runs that ask the same model there at the time, by the label database. It counts the runs
    that have this setting. false: each run takes the limits for its own."""

    shared_limit: str | None = None
    """A Prefect concurrency limit: the most calls at a time of all runs that name it. null:
    none."""

    timeout_s: float = Field(60.0, gt=0)
    """Seconds that one attempt of a call may take."""

    attempts: int = Field(5, ge=1)
    """Attempts of one call after 408, 409, 429, 5xx or a dropped connection."""

    outage_s: float = Field(300.0, ge=0)
    """Seconds that the run waits for an endpoint that answers with nothing but failures."""

    prices: PriceRecipe | None = None
    """The teacher's prices. null: costs are not reported."""

    budget: BudgetRecipe = BudgetRecipe()
    """Caps on what is spent."""

    batch: BatchRecipe | None = Field(None, exclude_if=lambda batch: batch is None)
    """Ask in batches, at the price of prices.batch. Needs kind: endpoint, and an endpoint that the
    openai SDK asks. null: every row is asked directly."""

    tokenizer: str | None = None
    """The teacher's tokenizer, as a model folder or hub id, with which `distillery quote` counts
    tokens. null: tokens are estimated."""

    max_age: float | None = Field(None, gt=0, le=36_500)
    """Days after which a stored answer no longer counts: the next run asks again, and the new
    answer replaces it. Needs kind: endpoint. null: answers count for ever."""

    canaries: CanaryRecipe = CanaryRecipe()
    """Rows that detect whether the teacher has changed."""

    preparation: TeacherPreparation = TeacherPreparation()
    """With kind: local, how the teacher is made."""

    largest_shift: float = Field(0.5, ge=0, le=1)
    """The most that the labels' shares of the answers may differ from those of the gold rows (total
    variation distance, 0 to 1), with task.kind: classify. The run stops before a student is trained
    if they differ more, or if nearly all labels are of one class. 1: any shares will do."""

    insist: bool = False
    """With kind: local and task.kind: classify, label with a teacher that is proven worse on the
    validation rows than TF-IDF or a linear probe of its base model, which learn from the same gold
    rows. false: such a run stops before labelling."""

    terms: str | None = Field(None, min_length=1)
    """The teacher's terms of use, as a text or a URL, for the model card of the student. null: the
    card says that they are not stated."""

    cascade: "CascadeRecipe | None" = Field(None, exclude_if=lambda cheap: cheap is None)
    """A cheap teacher that is asked first: this teacher is asked only about rows of which the cheap
    one is not sure. Needs kind: endpoint. null: this teacher is asked about all rows."""

    select: SelectRecipe | None = Field(None, exclude_if=lambda select: select is None)
    """Which train rows the teacher is asked about. null: all."""

    @property
    def content_id(self) -> str:
        """The part of this slice in cache keys: what the answers depend on besides the prompt.
        `select` is not in it, since the chosen rows are in a key of their own."""
        return self.model_dump_json(include=OF_ANSWERS | {"cascade": OF_CHEAP_ANSWERS})

    @property
    def cheap(self) -> "CascadeRecipe | None":
        """The cheap teacher's settings, with the budget and the canaries of both; None where there
        is none."""
        if self.cascade is None:
            return None
        of_both = {"budget": self.budget, "max_age": self.max_age, "canaries": self.canaries}
        return self.cascade.model_copy(update=of_both)

    @property
    def in_batch(self) -> Self:
        """These settings with the prices of a batch."""
        if self.prices is None:
            return self
        return self.model_copy(update={"prices": self.prices.in_batch})

    @property
    def who(self) -> str:
        """What messages call the model: teacher or judge."""
        return self.section.rpartition(".")[2]

    def stored_as(self, model: str) -> str:
        """Return the name under which the label store keeps the answers of an endpoint's model."""
        return self.identity or model

    def for_own_model(self, prompt: PromptRecipe) -> Self:
        """Return these settings for a model that the run has trained on `prompt`. A letter or class
        is one token, and the end of the turn after it would take a decoding step of its own. A text
        of which the likeliest is the answer is not decoded."""
        if self.answers.form != "letter" or prompt.answer in ("text", "written"):
            return self
        return self.model_copy(update={"max_tokens": 1})

    def with_canaries(self, scheduled: bool) -> Self:
        """Return these settings with the number of canary rows that a run asks. By default a
        scheduled run asks an endpoint SCHEDULED_CANARIES, unless a budget is set, which was made
        without them."""
        if self.canaries.rows is not None:
            return self
        rows = 0
        if scheduled and self.kind == "endpoint" and not self.budget.caps:
            rows = SCHEDULED_CANARIES
        return self.model_copy(update={"canaries": self.canaries.model_copy(update={"rows": rows})})

    @property
    def asks_log_probabilities(self) -> bool:
        """Whether soft labels come from log-probabilities: several votes give their own shares."""
        return self.soft_labels and self.answers.votes == 1

    @model_validator(mode="after")
    def check_kind(self) -> Self:
        if self.kind == "file" and not self.files:
            raise ValueError("kind is file: set teacher.files, such as [labels.jsonl]")
        if self.kind != "file" and self.files:
            raise ValueError(f"files are given, but kind is {self.kind}: set teacher.kind: file")
        if self.canaries.rows and self.kind != "endpoint":
            raise ValueError(
                f"canaries: a teacher of kind {self.kind} cannot change; remove this setting"
            )
        if self.max_age is not None and self.kind != "endpoint":
            raise ValueError(
                f"max_age: a teacher of kind {self.kind} cannot change; remove this setting"
            )
        if self.processes > 1 and self.kind != "endpoint":
            raise ValueError(
                f"processes: a teacher of kind {self.kind} is no endpoint that several processes "
                "could ask; remove this setting"
            )
        if self.batch is not None and self.kind != "endpoint":
            raise ValueError(
                f"batch: a teacher of kind {self.kind} takes no batches; remove this setting"
            )
        if self.batch is not None and self.sdk == "azure-ai-inference":
            raise ValueError(
                "batch: the SDK azure-ai-inference knows no batches; set teacher.sdk: openai and "
                "an endpoint at /openai/v1, or remove this setting"
            )
        if self.soft_labels and self.kind == "gold":
            raise ValueError("soft_labels: gold answers have no probabilities; set it to false")
        return self

    @model_validator(mode="after")
    def check_answers(self) -> Self:
        if self.answers.votes > 1 and self.temperature == 0:
            raise ValueError("answers.votes is above 1, which needs a temperature above 0")
        asks_reasons = self.kind == "endpoint" and self.answers.form == "rationale"
        if asks_reasons and self.max_tokens < SHORTEST_RATIONALE:
            raise ValueError(
                "answers.form: rationale needs max_tokens of a few hundred; "
                f"{self.max_tokens} would cut the answer off"
            )
        single_bare_answer = not self.soft_labels and self.answers.votes * self.answers.orders == 1
        if self.filters.confidence and self.kind != "file" and single_bare_answer:
            raise ValueError(
                "filters.confidence: a single answer without probabilities has no confidence; "
                "set soft_labels, answers.votes or answers.orders"
            )
        return self

    @model_validator(mode="after")
    def check_budget(self) -> Self:
        if self.budget.cost is not None and self.prices is None:
            raise ValueError(
                "budget.cost needs prices: {input: ..., output: ...} per million tokens"
            )
        # A cascade asks them of both teachers.
        asked = [self.answers, *([self.cascade.answers] if self.cascade else [])]
        answers_a_row = sum(answers.votes * answers.orders for answers in asked)
        canary_calls = (self.canaries.rows or 0) * answers_a_row
        if self.budget.calls is not None and self.budget.calls <= canary_calls:
            raise ValueError(
                f"budget.calls: the canaries take {canary_calls} of {self.budget.calls} calls, "
                "which leaves none for the rows; raise it"
            )
        return self

    @model_validator(mode="after")
    def check_cascade(self) -> Self:
        if self.select and self.kind in ("gold", "file"):
            raise ValueError(
                f"select: labels of kind {self.kind} cost nothing; remove this setting, or take "
                "fewer rows by dataset.sample"
            )
        if self.cascade is None:
            return self
        if self.kind != "endpoint":
            raise ValueError(
                f"cascade: a teacher of kind {self.kind} costs nothing; remove this setting"
            )
        if self.batch is not None:
            raise ValueError(
                "batch: with a cascade, who is asked depends on the cheap teacher's answers; "
                "remove batch or cascade"
            )
        if self.answers.form == "rationale" and self.cascade.answers.form != "rationale":
            raise ValueError(
                "answers.form: rationale, but the cheap teacher's labels would have no reasons; "
                "set cascade.answers.form: rationale, too"
            )
        if self.soft_labels and not self.cascade.soft_labels:
            raise ValueError(
                "cascade.soft_labels is false, so that its labels have no probabilities; set it to "
                "true, or soft_labels to false"
            )
        if self.budget.cost is not None and self.cascade.prices is None:
            raise ValueError("budget.cost covers the cheap teacher too: set cascade.prices")
        if self.prices and self.cascade.prices:
            currencies = (self.prices.currency, self.cascade.prices.currency)
            if len(set(currencies)) > 1:
                raise ValueError(
                    f"cascade.prices.currency is {currencies[1]}, and prices.currency "
                    f"{currencies[0]}; give both in one"
                )
        return self


NOT_OF_CHEAP = frozenset(
    {
        *("kind", "files", "filters", "stop", "budget", "max_age", "canaries", "preparation"),
        *("largest_shift", "insist", "terms", "tokenizer", "cascade", "select", "batch"),
        "processes",
    }
)
"""Settings of a teacher that a cheap one shares with it or that have no meaning for it."""


class CascadeRecipe(TeacherRecipe):
    """A cheap teacher that is asked about every row before the teacher itself is (Chen, Zaharia,
    Zou, FrugalGPT, 2023). A row's label is the cheap one's where it is sure enough; all other rows
    are asked of the teacher, whose answer is the label.

    CHEAP_MODEL_ENDPOINT, CHEAP_MODEL_NAME and CHEAP_MODEL_KEY name the endpoint, which is asked as
    a teacher with kind: endpoint is. The answers are kept in the label store under its own name.
    teacher.budget covers both.
    """

    section: ClassVar[str] = "teacher.cascade"
    variables: ClassVar[str] = "CHEAP_MODEL"
    needs_labels: ClassVar[bool] = False

    kind: Literal["endpoint"] = "endpoint"
    cascade: None = None
    select: None = None

    below: float = Field(0.9, gt=0, le=1)
    """The teacher is asked about rows of which the cheap one's confidence is below this: the
    probability of its answer, or the share of its answers that agree. It is asked, too, where the
    cheap one gives no answer."""

    soft_labels: bool = True
    """Ask for log-probabilities, from which the confidence comes. false: it comes from several
    answers, so that answers.votes or answers.orders must be above 1."""

    model_config = ConfigDict(json_schema_extra=leave_out(NOT_OF_CHEAP))

    @property
    def who(self) -> str:
        """What messages call the model."""
        return "cheap teacher"

    @model_validator(mode="after")
    def check_settings_of_a_cheap_teacher(self) -> Self:
        refuse_foreign(self, NOT_OF_CHEAP, "belongs to the teacher itself")
        if not self.soft_labels and self.answers.votes * self.answers.orders == 1:
            raise ValueError(
                "soft_labels is false: a single answer without probabilities has no confidence; "
                "set soft_labels: true, answers.votes or answers.orders"
            )
        return self


TeacherRecipe.model_rebuild()
CascadeRecipe.model_rebuild()
