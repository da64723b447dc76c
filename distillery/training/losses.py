"""What training minimises: each loss with its formula and its source.

Logits are [batch, positions, vocabulary], scores of options [batch, options]. A loss is a mean over
the batch unless it says otherwise. Prompts carry no loss: only what the assistant says does.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from distillery.recipe import TrainingRecipe
from distillery.training.rows import TrainingRow

if TYPE_CHECKING:
    import torch

LEAST_PROBABILITY = 1e-8
"""What a teacher's probability counts as at least, so that its logarithm is finite."""


def answer_loss(
    logits: "torch.Tensor", rows: Sequence[TrainingRow], recipe: TrainingRecipe, end_id: int
) -> "torch.Tensor":
    """Return the loss on an answer by letter: the letter's loss plus the cross-entropy of the end
    of the turn after it.

    logits: [batch, 2, vocabulary] at the last prompt token and at the letter. With weight w, the
    letter's loss is (1 - w) CE(p, label) + w (T^2 D(q_T, p_T) - log Z). The divergence D over the
    options is that of `choice_loss`; Z is the probability, at temperature 1, that the student says
    an option at all. For the forward divergence at T = 1 the second term is KL(q || p) with p over
    the whole vocabulary. Rows without soft labels count with w = 0. Label smoothing spreads over
    the whole vocabulary."""
    import torch
    import torch.nn.functional as F

    logits = logits.float()
    device = logits.device
    first, second = logits[:, 0], logits[:, 1]
    targets = torch.tensor([row.letters[row.answer] for row in rows], device=device)
    hard = F.cross_entropy(first, targets, reduction="none", label_smoothing=recipe.label_smoothing)
    turn = F.cross_entropy(second, torch.full_like(targets, end_id), reduction="none")
    if recipe.soft_share == 0:
        return (hard + turn).mean()
    columns, is_option = padded_tensor([row.letters for row in rows], device)
    scores = first.gather(1, columns).masked_fill(~is_option, -torch.inf)
    log_z = scores.logsumexp(-1) - first.logsumexp(-1)
    soft = choice_loss(scores, rows, recipe.temperature, recipe.divergence) - log_z
    return (mix_hard_and_soft(hard, soft, rows, recipe.soft_share) + turn).mean()


def text_loss(
    scores: "torch.Tensor",
    likelihoods: "torch.Tensor",
    rows: Sequence[TrainingRow],
    recipe: TrainingRecipe,
) -> "torch.Tensor":
    """Return the loss on an answer by the option's text: `option_loss` + NLL.

    scores: [batch, options], the mean log-probability of each option's tokens (-inf where a row has
    fewer options), and p is their softmax: the length-normalised likelihood by which GPT-3 is asked
    multiple-choice questions (Brown et al., Language Models are Few-Shot Learners, 2020, section
    2.4), here trained to rank. likelihoods: [batch], the mean log-probability of the label's text
    with the end of the turn; its negative, NLL, keeps the text itself likely, so that the student
    also says it."""
    return (option_loss(scores, rows, recipe) - likelihoods).mean()


def option_loss(
    scores: "torch.Tensor",
    rows: Sequence[TrainingRow],
    recipe: TrainingRecipe,
    class_weights: Sequence[float] | None = None,
) -> "torch.Tensor":
    """Return the loss on the choice among a row's options, or among the classes, for each row,
    [batch]: (1 - w) v CE(p, label) + w T^2 D(q_T, p_T) with p = softmax(scores), and v the label's
    weight in `class_weights`, 1 without them.

    scores: [batch, options], -inf where a row has fewer options. Label smoothing spreads over the
    row's options."""
    import torch
    import torch.nn.functional as F

    targets = torch.tensor([row.answer for row in rows], device=scores.device)
    logs = torch.log_softmax(scores, -1)
    loss = F.nll_loss(logs, targets, reduction="none")
    if recipe.label_smoothing:
        is_option = torch.isfinite(scores)
        even = -logs.masked_fill(~is_option, 0).sum(-1) / is_option.sum(-1)
        loss = (1 - recipe.label_smoothing) * loss + recipe.label_smoothing * even
    if class_weights:
        loss = loss * torch.tensor(class_weights, device=loss.device, dtype=loss.dtype)[targets]
    if recipe.soft_share:
        soft = choice_loss(scores, rows, recipe.temperature, recipe.divergence)
        loss = mix_hard_and_soft(loss, soft, rows, recipe.soft_share)
    return loss


def balanced_weights(rows: Sequence[TrainingRow], classes: int) -> list[float]:
    """Return a weight for each of the classes: rows / (classes with a row * rows of the class), so
    that the weights of all rows have a mean of 1; 0 for a class without a row. As scikit-learn's
    class_weight="balanced", after King, Zeng, Logistic Regression in Rare Events Data, Political
    Analysis 9, 2001."""
    counts = Counter(row.answer for row in rows)
    weights = []
    for number in range(classes):
        count = counts[number]
        weights.append(len(rows) / (len(counts) * count) if count else 0.0)
    return weights


def choice_loss(
    scores: "torch.Tensor",
    rows: Sequence[TrainingRow],
    temperature: float,
    kind: Literal["forward", "reverse"],
) -> "torch.Tensor":
    """Return T^2 D(q_T, p_T) for each row, [batch]; meaningless for rows without soft labels.

    scores: [batch, options], -inf where a row has fewer options. p_T = softmax(scores / T) is the
    student's distribution over the row's options; q_T is the teacher's, raised to 1 / T and
    normalised. Forward: D = KL(q_T || p_T) (Hinton et al., Distilling the Knowledge in a Neural
    Network, 2015; the factor T^2 keeps the size of the gradients). Reverse: D = KL(p_T || q_T),
    which a student too small to follow the teacher everywhere spends on what the teacher finds
    likely (Gu et al., MiniLLM, 2024)."""
    import torch

    width = scores.shape[-1]
    given = []
    for row in rows:
        soft = list(row.soft or ())
        given.append(soft + [0.0] * (width - len(soft)))
    probabilities = torch.tensor(given, device=scores.device, dtype=scores.dtype)
    return divergence(scores, probabilities, temperature, kind)


def divergence(
    scores: "torch.Tensor",
    taught: "torch.Tensor",
    temperature: float,
    kind: Literal["forward", "reverse"],
) -> "torch.Tensor":
    """Return T^2 D(q_T, p_T), as in `choice_loss`, over the last dimension: [...].

    scores: [..., outcomes], the student's, -inf where there are fewer outcomes. taught: the
    teacher's probabilities, of the same shape."""
    import torch

    is_outcome = torch.isfinite(scores)
    logs = taught.clamp_min(LEAST_PROBABILITY).log() / temperature
    teacher = torch.log_softmax(logs.masked_fill(~is_outcome, -torch.inf), -1)
    student = torch.log_softmax(scores / temperature, -1)
    target, other = teacher, student
    if kind == "reverse":
        target, other = student, teacher
    # Where there is no outcome, both logarithms are infinite and their difference is NaN.
    gap = (target - other).masked_fill(~is_outcome, 0.0)
    return (target.exp() * gap).sum(-1) * temperature**2


def mix_hard_and_soft(
    hard: "torch.Tensor", soft: "torch.Tensor", rows: Sequence[TrainingRow], weight: float
) -> "torch.Tensor":
    """Return (1 - w) hard + w soft for each row, [batch]: w is `weight` for rows with soft labels
    and 0 for the others."""
    import torch

    weights = torch.tensor([weight if row.soft else 0.0 for row in rows], device=hard.device)
    return (1 - weights) * hard + weights * soft


def padded_tensor(
    lists: Sequence[Sequence[int]], device: "torch.device"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return the lists as a tensor, [batch, longest], 0 after their ends, and a mask of the same
    shape that is true for their elements."""
    import torch

    longest = max(map(len, lists))
    values = torch.tensor([[*part, *[0] * (longest - len(part))] for part in lists], device=device)
    lengths = torch.tensor([len(part) for part in lists], device=device)
    return values, torch.arange(longest, device=device) < lengths[:, None]


def hidden_loss(student: "torch.Tensor", teacher: "torch.Tensor") -> "torch.Tensor":
    """Return 1 - cosine of the two models' hidden states, [batch, hidden]: the cosine term of Sanh
    et al., DistilBERT, 2019.

    The states are those that the head reads at the last prompt token. A student that keeps its
    teacher's head so learns all that the answer is made of; the probabilities of a few options say
    little."""
    import torch.nn.functional as F

    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def written_hidden_loss(
    student: "torch.Tensor", teacher: "torch.Tensor", counts: Sequence[int]
) -> "torch.Tensor":
    """Return 1 - cosine of the two models' hidden states for written answers, a mean over each
    row's states and then over the rows: those that the head reads before each token of an answer
    and before the end of the turn.

    student, teacher: [states, hidden], of one row after the other, each of which has as many as
    `counts` says."""
    import torch
    import torch.nn.functional as F

    gaps = 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    shares = [1 / count / len(counts) for count in counts for _ in range(count)]
    return (gaps * torch.tensor(shares, device=gaps.device)).sum()


def written_losses(
    logits: "torch.Tensor",
    texts: Sequence[Sequence[int]],
    end_id: int,
    label_smoothing: float = 0.0,
) -> "torch.Tensor":
    """Return the cross-entropy of what is written after each row's prompt, a mean over its tokens
    and the end of the turn, [batch]: a written answer, or the teacher's reason, the second task of
    Hsieh et al., Distilling Step-by-Step, 2023, whose loss is L_label + lambda L_rationale.

    logits: as `written_targets` takes them. Label smoothing spreads over the whole vocabulary."""
    import torch.nn.functional as F

    targets = written_targets(logits, texts, end_id)
    token_losses = F.cross_entropy(
        logits.float().transpose(1, 2), targets, reduction="none", label_smoothing=label_smoothing
    )
    return token_losses.sum(-1) / (targets >= 0).sum(-1)


def written_targets(
    logits: "torch.Tensor", texts: Sequence[Sequence[int]], end_id: int
) -> "torch.Tensor":
    """Return the token that each of the logits should predict, [batch, longest + 1]: those of the
    rows' texts and the end of the turn, and -100 before a text.

    logits: [batch, longest + 1, vocabulary] of left-padded rows, which end with their texts: at the
    token before each of the last `longest` ones, and at the last."""
    import torch

    targets = torch.full(logits.shape[:2], -100, device=logits.device)
    for index, text in enumerate(texts):
        written = [*text, end_id]
        targets[index, -len(written) :] = torch.tensor(written, device=logits.device)
    return targets
