"""Guess how an answer goes on, from the answers that a student was trained on.

A pass over eight tokens takes a processor less than twice as long as one over a single token, since
either reads all weights once. So the tokens that are likely to follow are computed along with the
last one, and a student that then takes them needs no passes for them (speculative decoding:
Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023). Here no second
model guesses, but n-grams of the answers in training, since a student writes much as they are
written (as in He et al., REST: Retrieval-Based Speculative Decoding, 2024). Where they tell
nothing, the prompt is copied on (Saxena, Prompt Lookup Decoding, 2023): there the answer finds its
names. A wrong guess costs time and never a token.

The file drafts.json of a model's folder holds Drafts. Nothing is in it that the answers to a single
row say, so that it tells of no row.
"""

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from distillery.errors import ModelError
from distillery.models.onnx_folder import CONFIG
from distillery.records import Record

FILE = "drafts.json"

ORDER = 3
"""Tokens before a guess that count. With four or six, guesses were no better on two data sets."""

LEAST_SHARE = 0.2
"""A guess ends before the token at which the product of the shares falls below this: about what one
token more costs, as a part of a pass."""

COPY_SHARE = 0.7
"""The share of a token that is copied from the prompt."""

MOST_TOKENS = 200_000
"""Tokens of answers that are learnt from, the first ones: some thousand answers tell enough, and
take 200 MB of memory meanwhile."""

BEGIN, END = -1, -2
"""What stands before an answer's first token and behind its last one."""


NO_PROMPT: Mapping[str, int] = {}

Share = Annotated[float, Field(ge=0, le=1)]


class Drafts(Record):
    """`likeliest`: by a context, the ids of up to ORDER tokens with blanks between them, the token
    that follows it most often, and its share of what follows, from 0 to 1."""

    likeliest: dict[str, tuple[int, Share]]

    def guess(
        self, answer: Sequence[int], most: int, prompt: Mapping[str, int] = NO_PROMPT
    ) -> list[int]:
        """Return up to `most` tokens that are likely to follow the tokens of an answer so far.
        `prompt`: the `following` tokens of its prompt."""
        context = [*[BEGIN] * ORDER, *answer[-ORDER:]]
        found: list[int] = []
        sure = 1.0
        while len(found) < most:
            runs = [key_of(context[-size:]) for size in range(ORDER, 0, -1)]
            guesses = [self.likeliest[run] for run in runs if run in self.likeliest]
            guesses += [(prompt[run], COPY_SHARE) for run in runs if run in prompt]
            if not guesses:
                break
            token, share = guesses[0]
            sure *= share
            if sure < LEAST_SHARE:
                break
            found.append(token)
            context.append(token)
        return found

    def write(self, folder: Path) -> None:
        """Write the file into `folder`."""
        text = json.dumps(self.model_dump(mode="json"), separators=(",", ":")) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8", newline="\n")


def key_of(context: Sequence[int]) -> str:
    """Return a run of tokens as the file names it."""
    return " ".join(map(str, context))


def following(prompt: Sequence[int]) -> dict[str, int]:
    """Return the token that follows each run of up to ORDER tokens of a prompt, the last time that
    the run is in it."""
    found: dict[str, int] = {}
    for end in range(1, len(prompt)):
        for size in range(1, min(ORDER, end) + 1):
            found[key_of(prompt[end - size : end])] = prompt[end]
    return found


def learn_drafts(answers: Iterable[tuple[Hashable, Sequence[int]]]) -> Drafts:
    """Return what answers, each with its row and as token ids, teach of how an answer goes on.

    A share is count / (total + 1), over all answers: what is said seldom counts for less. An answer
    that several rows have is that of the first one, since all of them may be about one person."""
    row_of: dict[tuple[int, ...], Hashable] = {}
    for row, answer in answers:
        row_of.setdefault(tuple(answer), row)
    counts: dict[str, Counter[int]] = {}
    first_row: dict[tuple[str, int], Hashable] = {}
    told_by_several = set[tuple[str, int]]()
    learnt = 0
    for answer, row in row_of.items():
        learnt += len(answer)
        if learnt > MOST_TOKENS:
            break
        tokens = [*[BEGIN] * ORDER, *answer, END]
        for end in range(ORDER, len(tokens)):
            for size in range(1, ORDER + 1):
                run, token = key_of(tokens[end - size : end]), tokens[end]
                counts.setdefault(run, Counter())[token] += 1
                if first_row.setdefault((run, token), row) != row:
                    told_by_several.add((run, token))
    likeliest: dict[str, tuple[int, float]] = {}
    for run, counted in sorted(counts.items()):
        # The smallest of equals, so that equal answers give equal files.
        token, count = min(counted.items(), key=lambda each: (-each[1], each[0]))
        share = count / (counted.total() + 1)
        if token != END and share >= LEAST_SHARE and (run, token) in told_by_several:
            likeliest[run] = token, round(share, 3)
    return Drafts(likeliest=likeliest)


def read_drafts(folder: Path) -> Drafts | None:
    """Return the drafts in the folder of an exported model; None where there are none.

    Raises ModelError for a file that can't be read, or with tokens that the model does not have."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        drafts = Drafts.model_validate_json(path.read_bytes())
        vocabulary = json.loads((folder / CONFIG).read_bytes())["model"]["vocab_size"]
        known = all(0 <= token < vocabulary for token, _ in drafts.likeliest.values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: no drafts of answers; export the model again") from error
    if not known:
        raise ModelError(f"{path}: has tokens that the model does not have; export it again")
    return drafts
