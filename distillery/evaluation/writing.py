"""A Transformers model writes answers: several at once, by the loop and the rule of
inference/generation.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from distillery.inference.generation import (
    Answering,
    Written,
    generated,
    most_tokens,
    written,
)
from distillery.inference.guide import Guide, Guides
from distillery.inference.logits import Logits
from distillery.models.device import Device
from distillery.records import AnswerFormat
from distillery.training.batching import shared_inputs, turning_point

WRITTEN_TOGETHER = 16
"""Answers that are written at once."""


@dataclass(frozen=True)
class TransformersWriter:
    """Writes the likeliest answers with a model on its device, in evaluation mode. One of `end_ids`
    ends an answer. `next_logits` gives those after a prompt, [vocabulary]."""

    model: Any
    tokenizer: Any
    device: Device
    pad_id: int
    end_ids: frozenset[int]
    next_logits: Callable[[Sequence[int]], Any]

    @cached_property
    def guides(self) -> Guides:
        """What holds this model's answers to a JSON schema."""
        return Guides(self.tokenizer.backend_tokenizer.to_str(), self.end_ids)

    def write(self, prompt: Sequence[int], answer_format: AnswerFormat) -> Written:
        """Return the answer to one prompt. What it shares with the one before it is not computed
        again."""
        ids = list(prompt)

        def append(token: int) -> Logits:
            ids.append(token)
            return self.logits_after(ids)

        (answering,) = self.answerings([ids], answer_format)
        for _ in generated(self.logits_after(ids), append, answering):
            pass
        return self.said(answering, answer_format)

    def logits_after(self, ids: Sequence[int]) -> Logits:
        logits: Logits = self.next_logits(ids).cpu().numpy()
        return logits

    def write_all(
        self,
        prompts: Sequence[Sequence[int]],
        answer_format: AnswerFormat,
        rows_done: Callable[[int], None],
    ) -> list[Written]:
        """Return the answers to many prompts, which are written in batches of similar length.
        `rows_done` is told after each batch how many rows it had."""
        found: dict[int, Written] = {}
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), WRITTEN_TOGETHER):
            picked = order[start : start + WRITTEN_TOGETHER]
            some = [prompts[index] for index in picked]
            turn = turning_point(self.model)
            if turn and len(some[-1]) + most_tokens(answer_format) > turn:
                # Beyond, a batch has other rotary factors than some of its rows alone.
                answers = [self.write(prompt, answer_format) for prompt in some]
            else:
                answers = self.write_together(some, answer_format)
            found |= dict(zip(picked, answers, strict=True))
            rows_done(len(picked))
        return [found[index] for index in range(len(prompts))]

    def write_together(
        self, prompts: Sequence[Sequence[int]], answer_format: AnswerFormat
    ) -> list[Written]:
        """Return the answers to the prompts of one batch."""
        import torch
        from transformers import DynamicCache

        answerings = self.answerings(prompts, answer_format)
        with torch.inference_mode(), self.device.autocast():
            inputs = shared_inputs(self.model, prompts, self.pad_id, 1)
            cache = inputs["past_key_values"]
            if cache is None:
                cache = DynamicCache()
            inputs |= {"past_key_values": cache, "use_cache": True}
            going = answerings
            while True:
                logits = self.model(**inputs, logits_to_keep=1).logits[:, -1].float().cpu().numpy()
                taken = [each.take(row)[0] for each, row in zip(going, logits, strict=True)]
                kept = [index for index, each in enumerate(going) if not each.over]
                if not kept:
                    break
                rows = torch.tensor(kept, device=self.model.device)
                if len(kept) < len(going):
                    going = [going[index] for index in kept]
                    cache.batch_select_indices(rows)
                mask = inputs["attention_mask"][rows]
                inputs |= {
                    "input_ids": torch.tensor(taken, device=self.model.device)[rows, None],
                    "attention_mask": torch.cat((mask, mask.new_ones(len(kept), 1)), -1),
                    "position_ids": inputs["position_ids"][rows, -1:] + 1,
                }
        return [self.said(each, answer_format) for each in answerings]

    def answerings(
        self, prompts: Sequence[Sequence[int]], answer_format: AnswerFormat
    ) -> list[Answering]:
        """Return an answer at its beginning for each prompt, which the context has room for."""
        context = self.model.config.max_position_embeddings
        found = []
        for prompt in prompts:
            guide: Guide | None = None
            if answer_format.json_schema is not None:
                guide = self.guides.start(answer_format.json_schema)
            most = min(most_tokens(answer_format), context - len(prompt))
            found.append(Answering(most, self.end_ids, guide=guide))
        return found

    def said(self, answering: Answering, answer_format: AnswerFormat) -> Written:
        return written(answering.tokens, answering.end_ids, answer_format, self.decode)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the tokens as text, without special tokens."""
        text = self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)
