"""The export slice: the precision and the quantisation of the model that is delivered."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from distillery.recipe.base import Slice


class ExportForm(Slice):
    """How a checkpoint becomes a folder that ONNX Runtime GenAI loads."""

    added_later: ClassVar[frozenset[str]] = frozenset({"all_logits"})

    precision: Literal["int4", "int8", "fp16", "fp32"] = "int4"
    """Number format of the weights. int4 and int8 are quantised; fp16 and fp32 are floats."""

    algorithm: Literal["rtn", "k_quant", "k_quant_mixed", "k_quant_high", "gptq", "dynamic"] = (
        "k_quant_mixed"
    )
    """How int4 and int8 are quantised. rtn: round to nearest. k_quant: scales searched as in
    llama.cpp. k_quant_mixed: k_quant, with the attention inputs and down projections of the layers
    that ModelBuilder selects in 8 bits. k_quant_high: the same in all layers. gptq (Frantar et al.,
    GPTQ, 2023): rounding errors are compensated in the weights still to be rounded, calibrated on
    the training prompts; embeddings and head by k_quant; only in a ladder. dynamic: only with int8;
    the activations are rounded to 8 bits too, each token's with a scale of their own, which is the
    fastest form for prompts; block_size is that of embeddings and head."""

    block_size: Literal[16, 32, 64, 128] = 32
    """Weights that share a scale. Larger blocks give a smaller and faster, but less exact model."""

    share_embeddings: bool = True
    """Where the model ties embeddings and head: one quantised matrix for both."""

    adapter_apart: bool = False
    """Keep a LoRA adapter beside the model, in float, as adapter_weights.onnx_adapter, instead of
    merging it. int4 then has the embeddings in 8 bits. Needs training.method: lora; of int8 it goes
    with dynamic alone, and not with k_quant_high or gptq."""

    all_logits: bool = False
    """Let the model give the logits of all tokens of a prompt, which other programs may need, such
    as lm-evaluation-harness. By default it gives those after the last token only, which is all that
    Distillery needs and takes less time and memory."""

    @model_validator(mode="after")
    def check_dynamic(self) -> Self:
        if self.algorithm == "dynamic" and self.precision == "int4":
            raise ValueError("algorithm: dynamic needs precision: int8")
        return self

    @property
    def quantised(self) -> bool:
        return self.precision in ("int4", "int8")

    @property
    def dynamic(self) -> bool:
        """Whether the activations are rounded to 8 bits too."""
        return self.precision == "int8" and self.algorithm == "dynamic"

    @property
    def title(self) -> str:
        """A short name for people that tells this form from others."""
        name: str = self.precision
        if self.quantised:
            name = f"{name} {self.algorithm}/{self.block_size}"
        if self.adapter_apart:
            name += ", apart"
        elif self.quantised and not self.share_embeddings:
            name += ", own head"
        if self.all_logits:
            name += ", all logits"
        return name


class ExportBounds(Slice):
    """What a form of the ladder may take at most: latency_ms, bytes or both."""

    latency_ms: float | None = Field(None, gt=0)
    """Median milliseconds to answer a validation row, one row after another, on the machine that
    runs the export."""

    bytes: int | None = Field(None, gt=0)
    """Size of the form's folder."""

    @property
    def title(self) -> str:
        """The bounds as a recipe writes them."""
        bounds = []
        if self.latency_ms is not None:
            bounds.append(f"latency_ms: {self.latency_ms:g}")
        if self.bytes is not None:
            bounds.append(f"bytes: {self.bytes}")
        return f"{{{', '.join(bounds)}}}"

    @model_validator(mode="after")
    def check_there_is_a_bound(self) -> Self:
        if self.latency_ms is None and self.bytes is None:
            raise ValueError("give latency_ms, bytes or both")
        return self


def kind_of_choice(value: Any) -> str | None:
    """Return which part of `Choose` a value belongs to; None for a value of no part."""
    if isinstance(value, ExportBounds | dict):
        return ExportBounds.__name__
    if value in ("smallest", "fastest"):
        return "[word]"
    return None


Choose = Annotated[
    Annotated[Literal["smallest", "fastest"], Tag("[word]")]
    | Annotated[ExportBounds, Tag(ExportBounds.__name__)],
    Discriminator(
        kind_of_choice,
        custom_error_type="choose",
        custom_error_message="give smallest, fastest or bounds, such as {latency_ms: 20}",
    ),
]
"""What a ladder prefers of the forms that keep to the loss."""


class ExportRecipe(ExportForm):
    """One form, or a `ladder` of forms.

    Each form of a ladder is built and answers the validation rows. Of those that lose no more than
    `largest_loss`, `choose` picks the one that is delivered; if there is none, the run ends there.
    A form in floats is built only if no quantised form before it keeps to the loss, whatever
    `choose` says: floats are larger, and seldom faster.
    """

    added_later: ClassVar[frozenset[str]] = ExportForm.added_later | {"training_rows", "choose"}

    ladder: tuple[ExportForm, ...] = ()
    """Forms to try, such as [{algorithm: rtn}, {precision: int8}]. They replace the one form."""

    choose: Choose = "fastest"
    """Which of the ladder's forms that keep to `largest_loss` is delivered. fastest: the one that
    answers the most rows a second, one row after another, on the machine that runs the export; of
    forms within 5 % of it, the smallest. smallest: the one with the smallest folder. Bounds leave
    the other figure as good as it gets: {latency_ms: 20} takes the smallest form within 20 ms a
    row, {bytes: 100000000} the fastest within 100 MB, and both together the fastest within both.
    The default is fastest: every answer costs its time, while size is paid once, and all quantised
    forms are several times smaller than floats."""

    largest_loss: float = Field(0.02, ge=0, le=1)
    """Accuracy on the validation rows that a form of the ladder may lose against the float student.
    0.02: two points."""

    training_rows: int = Field(0, ge=0)
    """Training rows that the forms of the ladder answer too, at most this many; there the teacher's
    label counts as the right answer. Few validation rows can't show the loss of a
    point."""

    rung_minutes: float = Field(60, gt=0)
    """Minutes that one form of the ladder may take to build. A form that takes longer is left out,
    with the reason."""

    @property
    def form(self) -> ExportForm:
        """The one form, without the ladder's settings."""
        return ExportForm(**self.model_dump(include=set(ExportForm.model_fields)))

    @property
    def calibrated(self) -> bool:
        """Whether a form of the ladder is calibrated on the training rows' prompts."""
        return any(form.quantised and form.algorithm == "gptq" for form in self.ladder)

    @model_validator(mode="after")
    def check_forms_differ(self) -> Self:
        titles = [form.title for form in self.ladder]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"ladder: two rungs are {title}; remove one")
        return self
