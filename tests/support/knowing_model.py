"""A tiny model that knows the answers to some rows, and is a poor student until it is tuned."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_model import tiny_tokenizer, tiny_weights

from distillery.prompts import TransformersTokenizer, render_messages
from distillery.recipe import PromptRecipe
from distillery.records import Example

PHI4_TEMPLATE = Path(__file__).parent / "phi4_mini_chat_template.jinja"
TOKENS = 2048
TAKEN_OFF = 4.0
"""How much the logit of A is too high."""

BATCH, LEARNING_RATE = 22, 2e-3
LARGEST_EPOCHS = 60
ALL_RIGHT = 4
"""Epochs in a row with all answers right after which the training ends."""

UNSURE = 0.04
"""The probability that each wrong letter has. It keeps the logits close to each other, so that an
offset of TAKEN_OFF decides."""


def build_knowing_model(known: Sequence[Example], others: Sequence[Example], folder: Path) -> Path:
    """Write a model of Phi-4-mini's architecture, with its chat template, into `folder`.

    It has learnt the answers to the rows `known` by heart, with TAKEN_OFF subtracted from the logit
    of A. Since nothing is subtracted when it is asked, it answers A to every row. A few steps of
    LoRA on rows with other answers correct that, and then it answers the known rows as it learnt
    them. The tokenizer has the words of both `known` and `others`."""
    prompt = PromptRecipe()
    texts = []
    for row in [*known, *others]:
        texts.append("\n".join(message["content"] for message in render_messages(row, prompt)))
    tokenizer = tiny_tokenizer("phi4mini", texts, TOKENS)
    tokenizer.chat_template = PHI4_TEMPLATE.read_text()
    model = tiny_weights("phi4mini", vocab_size=TOKENS, initializer_range=0.05)
    chat = TransformersTokenizer(tokenizer)
    letters = [chat.encode_text(letter)[0] for letter in known[0].keys]
    questions = []
    for row in known:
        ids = chat.encode_chat(render_messages(row, prompt))
        questions.append((ids, row.keys.index(row.answer_key or "")))
    learn_by_heart(model, questions, letters)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def learn_by_heart(model: Any, questions: list[tuple[list[int], int]], letters: list[int]) -> None:
    """Train until all answers are right. A question is its token ids and its answer's number.

    Raises RuntimeError if they do not become so."""
    import torch

    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    order, all_right = random.Random(0), 0
    for _ in range(LARGEST_EPOCHS):
        order.shuffle(questions)
        right = 0
        for start in range(0, len(questions), BATCH):
            batch = questions[start : start + BATCH]
            answers = torch.tensor([answer for _, answer in batch])
            logits = next_token_logits(model, [ids for ids, _ in batch])
            logits[:, letters[0]] -= TAKEN_OFF
            right += int((logits[:, letters].argmax(1) == answers).sum())
            target = torch.zeros_like(logits)
            target[:, letters] = UNSURE
            target[range(len(batch)), [letters[answer] for _, answer in batch]] += (
                1 - len(letters) * UNSURE
            )
            optimiser.zero_grad()
            loss: Any = torch.nn.functional.cross_entropy(logits, target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        all_right = all_right + 1 if right == len(questions) else 0
        if all_right == ALL_RIGHT:
            return
    raise RuntimeError(f"{right} of {len(questions)} answers are learnt by heart")


def next_token_logits(model: Any, prompts: list[list[int]]) -> Any:
    """Return the logits, one line a prompt, of the token that follows it."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, prompt in enumerate(prompts):
        ids[number, longest - len(prompt) :] = torch.tensor(prompt)
        mask[number, longest - len(prompt) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1
    ).logits[:, -1]
