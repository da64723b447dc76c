"""What a student's training minimises, each loss with its formula and its source.

Logits come as [batch, positions, vocabulary], scores of options as [batch, options]; a loss is a mean over the batch
where it does not say otherwise. Prompts carry no loss: only what the assistant says does.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from distillery.recipe import TrainingRecipe
from distillery.records import Record

if TYPE_CHECKING:
    import torch

Direction = Literal["forward", "reverse"]

_LEAST = 1e-8


class TrainingRow(Record):
    """A rendered row. `prompt`: token ids up to the assistant's first token. Either `letters`, the options' letters, a
    token each, or `texts`, the options' token ids, says what may follow. `answer`: index of the label among them.
    `soft`: the teacher's probabilities over them, in the same order. `explain` and `rationale`: the prompt that asks
    for a reason, and the teacher's reason, where the label has one."""

    prompt: tuple[int, ...]
    letters: tuple[int, ...] = ()
    texts: tuple[tuple[int, ...], ...] = ()
    answer: int
    soft: tuple[float, ...] | None = None
    explain: tuple[int, ...] = ()
    rationale: tuple[int, ...] = ()

    @property
    def options(self) -> tuple[tuple[int, ...], ...]:
        """Each option's tokens."""
        return self.texts or tuple((letter,) for letter in self.letters)


def answer_loss(
    logits: "torch.Tensor", rows: Sequence[TrainingRow], recipe: TrainingRecipe, end_id: int
) -> "torch.Tensor":
    """The loss on an answer by letter: the letter's, and the cross-entropy of the end of the turn after it.

    logits: [batch, 2, vocabulary] at the last prompt token and at the letter. With weight w the letter's is
    (1 - w) CE(p, label) + w (T^2 D(q_T, p_T) - log Z): see `choice_loss` for the divergence over the options; Z is the
    probability that the student, at temperature 1, says an option at all. For the forward divergence at T = 1 this is
    KL(q || p) with p over the whole vocabulary. Rows without soft labels count with w = 0. Label smoothing spreads over
    the whole vocabulary."""
    import torch
    import torch.nn.functional as F

    logits = logits.float()
    device = logits.device
    first, second = logits[:, 0], logits[:, 1]
    targets = torch.tensor([row.letters[row.answer] for row in rows], device=device)
    hard = F.cross_entropy(first, targets, reduction="none", label_smoothing=recipe.label_smoothing)
    turn = F.cross_entropy(second, torch.full_like(targets, end_id), reduction="none")
    if recipe.soft_weight == 0:
        return (hard + turn).mean()
    columns, there = _padded([row.letters for row in rows], device)
    scores = first.gather(1, columns).masked_fill(~there, -torch.inf)
    said = scores.logsumexp(-1) - first.logsumexp(-1)
    soft = choice_loss(scores, rows, recipe) - said
    return (_mixed(hard, soft, rows, recipe.soft_weight) + turn).mean()


def text_loss(
    scores: "torch.Tensor",
    likelihoods: "torch.Tensor",
    rows: Sequence[TrainingRow],
    recipe: TrainingRecipe,
) -> "torch.Tensor":
    """The loss on an answer by the option's text: (1 - w) CE(p, label) + w T^2 D(q_T, p_T) + NLL.

    scores: [batch, options], the mean log-probability of each option's tokens (-inf where a row has fewer options), and
    p their softmax: the length-normalised likelihood by which GPT-3 is asked multiple-choice questions (Brown et al.,
    Language Models are Few-Shot Learners, 2020, section 2.4), here trained to rank. `likelihoods`: [batch], the mean
    log-probability of the label's text with the end of the turn; its negative, NLL, keeps the text itself likely, so
    that the student also says it. Label smoothing spreads over the row's options."""
    import torch
    import torch.nn.functional as F

    targets = torch.tensor([row.answer for row in rows], device=scores.device)
    logs = torch.log_softmax(scores, -1)
    hard = F.nll_loss(logs, targets, reduction="none")
    if recipe.label_smoothing:
        there = torch.isfinite(scores)
        even = -logs.masked_fill(~there, 0).sum(-1) / there.sum(-1)
        hard = (1 - recipe.label_smoothing) * hard + recipe.label_smoothing * even
    if recipe.soft_weight:
        hard = _mixed(hard, choice_loss(scores, rows, recipe), rows, recipe.soft_weight)
    return (hard - likelihoods).mean()


def choice_loss(
    scores: "torch.Tensor", rows: Sequence[TrainingRow], recipe: TrainingRecipe
) -> "torch.Tensor":
    """T^2 D(q_T, p_T) for each row, [batch]; of no meaning for rows without soft labels.

    scores: [batch, options], -inf where a row has fewer. p_T = softmax(scores / T) is the student's distribution over
    the row's options, q_T the teacher's, raised to 1 / T and normed. Forward: D = KL(q_T || p_T) (Hinton et al.,
    Distilling the Knowledge in a Neural Network, 2015; the factor T^2 keeps the gradients' size). Reverse:
    D = KL(p_T || q_T), which a student too small to follow the teacher everywhere spends on what the teacher finds
    likely (Gu et al., MiniLLM, 2024)."""
    import torch

    there = torch.isfinite(scores)
    width = scores.shape[-1]
    given = [list(row.soft or ()) + [0.0] * (width - len(row.soft or ())) for row in rows]
    taught = torch.tensor(given, device=scores.device, dtype=scores.dtype).clamp_min(_LEAST).log()
    teacher = torch.log_softmax((taught / recipe.temperature).masked_fill(~there, -torch.inf), -1)
    student = torch.log_softmax(scores / recipe.temperature, -1)
    of, against = (teacher, student) if recipe.divergence == "forward" else (student, teacher)
    # Where there is no option both logarithms are infinite, and their difference is no number.
    gap = (of - against).masked_fill(~there, 0.0)
    return (of.exp() * gap).sum(-1) * recipe.temperature**2


def _mixed(
    hard: "torch.Tensor", soft: "torch.Tensor", rows: Sequence[TrainingRow], weight: float
) -> "torch.Tensor":
    import torch

    weights = torch.tensor([weight if row.soft else 0.0 for row in rows], device=hard.device)
    return (1 - weights) * hard + weights * soft


def _padded(
    lists: Sequence[Sequence[int]], device: "torch.device"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """[batch, longest] of the lists, 0 after their ends, and which places are theirs."""
    import torch

    longest = max(map(len, lists))
    values = torch.tensor([[*part, *[0] * (longest - len(part))] for part in lists], device=device)
    lengths = torch.tensor([len(part) for part in lists], device=device)
    return values, torch.arange(longest, device=device) < lengths[:, None]


def hidden_loss(student: "torch.Tensor", teacher: "torch.Tensor") -> "torch.Tensor":
    """1 - cosine of the two models' hidden states, [batch, hidden]: the cosine term of Sanh et al., DistilBERT, 2019.

    The states are those that the head reads at the last prompt token, so that a student that keeps its teacher's head
    learns all that the answer is made of, where a few options' probabilities tell little."""
    import torch.nn.functional as F

    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def rationale_loss(
    logits: "torch.Tensor", rows: Sequence[TrainingRow], end_id: int
) -> "torch.Tensor":
    """The cross-entropy of the teacher's reasons, mean over a reason's tokens and its end of turn, then over the rows:
    the second task of Hsieh et al., Distilling Step-by-Step, 2023, whose loss is L_label + lambda L_rationale.

    logits: [batch, longest + 1, vocabulary] of left-padded rows: at the token before each of the last `longest` ones,
    and at the last."""
    import torch
    import torch.nn.functional as F

    kept = logits.shape[1]
    targets = torch.full(logits.shape[:2], -100, device=logits.device)
    for index, row in enumerate(rows):
        reason = [*row.rationale, end_id]
        targets[index, kept - len(reason) :] = torch.tensor(reason, device=logits.device)
    each = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    return (each.sum(-1) / (targets >= 0).sum(-1)).mean()
