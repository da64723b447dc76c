"""recipe/export"""

from typing import Literal, Self

from pydantic import Field, model_validator

from distillery.recipe.base import Slice


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
        how = (
            f"{self.precision} {self.algorithm}/{self.block_size}"
            if self.quantised
            else self.precision
        )
        if self.adapter_apart:
            return f"{how}, apart"
        return how if self.share_embeddings or not self.quantised else f"{how}, own head"


class ExportRecipe(ExportForm):
    """One form, or with a `ladder` the smallest of several, which then stand in place of the one form: each is built
    and asked the validation rows, and may lose `largest_loss` of accuracy (0.02: two points) against the float student,
    as judged by ladder.keeps_to. Where none keeps to it, the run ends there."""

    ladder: tuple[ExportForm, ...] = Field(
        (), description="Such as [{algorithm: rtn}, {precision: int8}]"
    )
    largest_loss: float = Field(0.02, ge=0, le=1, description="Share of the validation rows")
    rung_minutes: float = Field(
        60, gt=0, description="A rung that takes longer to build is left out, with the reason"
    )

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
