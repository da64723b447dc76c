"""Guesses of how answers go on that a test makes, and the passes that they save."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distillery.inference.text_batch import TextBatch
from distillery.models.drafts import NO_PROMPT, Drafts


class Guessing:
    """Guesses in place of those of a file: of the answers that are known, `right` tokens and then
    wrong ones."""

    def __init__(self, answers: Sequence[Sequence[int]], right: int) -> None:
        self.answers, self.right = [list(each) for each in answers], right

    def guess(
        self, answer: list[int], most: int, _prompt: Mapping[str, int] = NO_PROMPT
    ) -> list[int]:
        done = len(answer)
        following = next((each[done:] for each in self.answers if each[:done] == answer), [])
        wrong = [(token + 1) % 500 for token in following[self.right :]]
        return [*following[: self.right], *wrong, *[7] * most][:most]


def with_drafts(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder that has drafts; they guess nothing."""
    copy = tmp_path / "with-drafts"
    shutil.copytree(folder, copy)
    Drafts(likeliest={}).write(copy)
    return copy


def watched(batch: TextBatch) -> list[tuple[int, int]]:
    """The texts, and the tokens of each, in the passes from now on that go on with texts."""
    widths: list[tuple[int, int]] = []
    run = TextBatch.run

    def count(row: int, tokens: Any, lengths: Any, read: Any) -> Any:
        if len(read) > 1:
            widths.append((len(tokens), len(tokens[0])))
        return run(batch, row, tokens, lengths, read)

    batch.run = count  # type: ignore[method-assign, assignment]
    return widths
