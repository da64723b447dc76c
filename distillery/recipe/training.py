"""How weights are trained: the student's, those of its healing steps and a local teacher's."""

from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from distillery.recipe.base import Slice


class LoraRecipe(Slice):
    """The adapter of LoRA (Hu et al., LoRA, 2021), QLoRA and DoRA."""

    rank: int = Field(16, ge=1)
    """Rank of the low-rank update of each weight matrix."""

    alpha: int = Field(32, ge=1)
    """Scale: the update is multiplied by alpha / rank."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapter's inputs that are dropped at random in training."""

    target_modules: tuple[str, ...] | None = None
    """Names of the decoder's linear layers that get an adapter. null: all of them. Embeddings and
    head never get one."""


class TrainingRecipe(Slice):
    """How weights are trained: by AdamW, with the loss on the answer alone.

    The loss is (1 - soft_weight) x cross-entropy with the label + soft_weight x T^2 x divergence
    of teacher and student at temperature T + hidden_weight x (1 - cosine of their last hidden
    states) + rationale_weight x cross-entropy of the teacher's reasons. training/losses.py has the
    formulas.

    The learning rate is the lower of two curves that both start at the first step: a linear warm-up
    and a cosine decay to zero. So a long warm-up does not reach learning_rate.
    """

    added_later: ClassVar[frozenset[str]] = frozenset(
        {
            "first_layer",
            "minimum_steps",
            "class_weights",
            "second_opinion",
            "gradient_checkpointing",
        }
    )

    outside_keys: ClassVar[frozenset[str]] = frozenset({"allow_cpu"})

    method: Literal["lora", "qlora", "dora", "full"] = "lora"
    """lora, qlora, dora: train an adapter. qlora: with the base model held in 4 bits meanwhile, for
    a model that a GPU would not hold otherwise (Dettmers et al., QLoRA, 2023); needs the extra
    qlora. dora: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024. full: train all
    weights."""

    lora: LoraRecipe = LoraRecipe()
    """The adapter, with method: lora, qlora or dora."""

    freeze_embeddings: bool = False
    """With method: full, leave the embeddings, and a head tied to them, as they are."""

    first_layer: Annotated[int, Field(ge=0)] | Literal["half"] = 0
    """The first decoder layer that is trained, counted from 0 in the model after `layers` has cut
    it, or half: the upper half of its layers. The layers below it and the embeddings stay as they
    are, which makes each step faster. 0: all layers are trained."""

    epochs: float = Field(2.0, gt=0)
    """Passes through the training rows; fractions are allowed."""

    minimum_steps: int = Field(0, ge=0)
    """Optimiser steps that training has at least: where the epochs are fewer, because there are few
    rows, it goes on for more epochs. 0: the epochs alone count."""

    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps; replaces epochs and minimum_steps."""

    batch_size: int = Field(8, ge=1)
    """Rows in a batch."""

    accumulation: int = Field(1, ge=1)
    """Batches whose gradients are summed for one optimiser step."""

    patience: Annotated[int, Field(ge=1)] | Literal["proven"] | None = None
    """Epochs in a row without a lower validation loss after which training ends; the best epoch is
    kept. Needs validation rows. proven: an epoch is kept unless it is proven worse than
    the best one before it, by the validation rows that only one of them has right or, where answers
    are written, by the rows of whose tokens one of them has more right; training ends
    after three in a row that are. Without validation rows, the last one is kept. null: train to
    the end and keep the last weights."""

    learning_rate: float = Field(3e-4, gt=0)
    """The highest learning rate."""

    warmup: float = Field(0.06, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""

    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay; 0 applies none."""

    max_grad_norm: float = Field(1.0, gt=0)
    """Norm to which gradients are clipped. A large value, such as 1e9, clips nothing."""

    soft_weight: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = 0.0
    """Share of the loss against the teacher's probabilities; the rest is against its labels. 0:
    labels alone. auto, with task.kind: classify: by how well the probabilities of the validation
    rows are calibrated (evaluation/soft_weight.py), 1 where no row tells; with any other kind, 1.
    Above 0 it needs teacher.soft_labels: true. Where answers are written, it counts at the tokens
    whose probabilities the teacher gave; at the others and in gold rows the label alone does."""

    temperature: float = Field(1.0, gt=0, le=100)
    """Temperature T at which the probabilities of teacher and student are compared, with
    soft_weight above 0. Values above 1 give unlikely options more weight. Where answers are
    written, all tokens that the teacher did not name count as one option."""

    divergence: Literal["forward", "reverse"] = "forward"
    """With soft_weight above 0. forward: KL(teacher || student). reverse: KL(student ||
    teacher)."""

    hidden_weight: float = Field(0.0, ge=0)
    """Weight of matching a local teacher's last hidden states; 0 does not. Needs student.start:
    teacher. Where answers are written, these are the states at all of their tokens."""

    rationale_weight: float = Field(0.0, ge=0)
    """Weight of giving the teacher's reason as a second task; 0 does not. Needs
    teacher.answers.form: rationale, or teacher.kind: file with a column rationale."""

    rationale_instruction: str = "Explain in one or two sentences which option is right."
    """With rationale_weight above 0, the text below the prompt that asks for the reason."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the label's probability that is spread evenly: over the vocabulary if the answer is
    a letter, over the row's options if it is a text."""

    class_weights: Literal["none", "balanced"] = "none"
    """With task.kind: classify, how much a label of each class counts. balanced: the rarer the
    class among the training rows, the more, so that all classes count alike in sum. The teacher's
    probabilities, which soft_weight weighs, are not reweighted."""

    second_opinion: Literal["none", "words"] = "none"
    """With task.kind: classify and a teacher's probabilities, who else is asked about each label
    before it is learnt. words: TF-IDF with logistic regression, which has learnt from the other
    labels; its probabilities and the teacher's are multiplied (training/second_opinion.py)."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the computation. auto: bfloat16 if the hardware is faster in it, else
    float32. Weights are kept in float32 either way, save those below an adapter."""

    gradient_checkpointing: bool = False
    """Keep only what enters each decoder layer of a forward pass, and compute the rest of the layer
    again in the backward pass (Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016).
    It takes less memory and more time, and the numbers are the same up to rounding."""

    allow_cpu: bool = False
    """Train on the CPU where a worker of the GPU pool has no CUDA, instead of ending the run. Only
    workers with DISTILLERY_NEEDS_GPU end it."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the order of rows, of dropout and of the adapter's first weights."""

    @field_validator("soft_weight", mode="before")
    @classmethod
    def check_soft_weight(cls, value: Any) -> Any:
        # Pydantic's own message would have a line for each of the two types.
        if value == "auto":
            return value
        # YAML reads 1e-1 as a text.
        with suppress(TypeError, ValueError):
            if 0 <= float(value) <= 1:
                return float(value)
        raise ValueError("should be auto, or at least 0 and less than or equal to 1")

    @property
    def soft_share(self) -> float:
        """soft_weight as a number; 1 for auto, where no row has told otherwise."""
        return 1.0 if self.soft_weight == "auto" else self.soft_weight

    @property
    def patience_needs_validation(self) -> bool:
        """Whether patience can do nothing without validation rows."""
        return self.patience not in (None, "proven")

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained, and the base is left as it is."""
        return self.method != "full"
