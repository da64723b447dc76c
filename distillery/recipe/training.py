"""recipe/training"""

from typing import Literal

from pydantic import Field

from distillery.recipe.base import Slice


class LoraRecipe(Slice):
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | None = Field(
        None,
        description="Linear layers of the decoder; None: every one. Embeddings and head are left as they are",
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
        False,
        description="Of full training: leave the embeddings, and a head tied to them, as they are",
    )
    epochs: float = Field(2.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)
    accumulation: int = Field(1, ge=1, description="Batches whose gradients one step sums")
    patience: int | None = Field(
        None,
        ge=1,
        description="Epochs without a lower validation loss that end training; the best epoch is kept",
    )
    learning_rate: float = Field(3e-4, gt=0)
    warmup: float = Field(0.06, ge=0, lt=1, description="Share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="A large one, such as 1e9, clips nothing")
    soft_weight: float = Field(
        0.0, ge=0, le=1, description="Share of the soft-label loss; 0 trains on hard labels"
    )
    temperature: float = Field(1.0, gt=0, le=100)
    divergence: Literal["forward", "reverse"] = Field(
        "forward", description="KL(teacher || student), or KL(student || teacher)"
    )
    hidden_weight: float = Field(
        0.0, ge=0, description="Of matching a local teacher's last hidden state"
    )
    rationale_weight: float = Field(
        0.0,
        ge=0,
        description="Of saying the teacher's reason as a second task; needs teacher.answers.form: rationale",
    )
    rationale_instruction: str = Field(
        "Explain in one or two sentences which option is right.",
        description="What asks for it, below the prompt",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Over the vocabulary where the answer is a letter, else over the row's options",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where the hardware has it"
    )
    seed: int = Field(0, ge=0, lt=2**32)

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained, the base as it is."""
        return self.method != "full"
