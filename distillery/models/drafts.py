"""Guess how an answer goes on, from the answers that a student was trained on.

A pass over eight tokens takes a processor less than twice as long as one over a single token, since
either reads all weights once. So the tokens that are likely to follow are computed along with the
last one, and a student that then takes them needs no passes for them (speculative decoding:
Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023). Here no second
model guesses, but the answers in training: a student writes much as they are written (as with
their n-grams: He et al., REST: Retrieval-Based Speculative Decoding, 2024). A wrong guess costs
time and never a token. What no answer in training tells, as a name, may be copied from the prompt
(Saxena, Prompt Lookup Decoding, 2023).

The file drafts.json of a model's folder holds Drafts. No run of tokens that only one of the answers
has is in it.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from distillery.errors import ModelError
from distillery.records import Record

FILE = "drafts.json"

ORDER = 3
"""Tokens before a guess that count. With four or six, guesses were no better on two data sets."""

LEAST_SHARE = 0.2
"""How likely the last of the guessed tokens must be, all before it included, by the answers in
training: about the share of a pass that one token more of it takes."""

COPY_SHARE = 0.7
"""How likely it is taken to be that an answer goes on as its prompt does behind the same tokens."""

MOST_TOKENS = 200_000
"""Tokens of answers that are learnt from, the first ones: some thousand answers tell enough, and
take 200 MB of memory meanwhile."""

BEGIN, END = -1, -2
"""What stands before an answer's first token and behind its last one."""


NO_PROMPT: Mapping[str, int] = {}


class Drafts(Record):
    """`likeliest`: by a context, the ids of up to ORDER tokens with blanks between them, the token
    that follows it most often, and its share of what follows, from 0 to 1."""

    likeliest: dict[str, tuple[int, float]]

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
    return " ".join(map(str, context))


def following(prompt: Sequence[int]) -> dict[str, int]:
    """Return the token that follows each run of up to ORDER tokens of a prompt, the last time that
    the run is in it."""
    found: dict[str, int] = {}
    for place in range(1, len(prompt)):
        for size in range(1, min(ORDER, place) + 1):
            found[key_of(prompt[place - size : place])] = prompt[place]
    return found


def learn_drafts(answers: Iterable[Sequence[int]]) -> Drafts:
    """Return what the token ids of answers teach of how an answer goes on.

    A share is that of the next token among all that followed the context and one more, so that
    what was seen seldom counts for less."""
    followed: dict[str, Counter[int]] = {}
    learnt = 0
    # An answer that several rows have is one answer: it may be about somebody.
    for answer in dict.fromkeys(map(tuple, answers)):
        learnt += len(answer)
        if learnt > MOST_TOKENS:
            break
        tokens = [*[BEGIN] * ORDER, *answer, END]
        for place in range(ORDER, len(tokens)):
            for size in range(1, ORDER + 1):
                context = key_of(tokens[place - size : place])
                followed.setdefault(context, Counter())[tokens[place]] += 1
    likeliest: dict[str, tuple[int, float]] = {}
    for context, counts in sorted(followed.items()):
        # The smallest of equals, so that equal answers give equal files.
        token, count = min(counts.items(), key=lambda each: (-each[1], each[0]))
        share = count / (counts.total() + 1)
        if token != END and count > 1 and share >= LEAST_SHARE:
            likeliest[context] = token, round(share, 3)
    return Drafts(likeliest=likeliest)


def read_drafts(folder: Path, vocabulary: int) -> Drafts | None:
    """Return the drafts in a model's folder; None where there are none.

    Raises ModelError for a file that can't be read, or with tokens beyond the `vocabulary`."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        drafts = Drafts.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ModelError(f"{path}: no drafts of answers; export the model again") from error
    if any(not 0 <= token < vocabulary for token, _ in drafts.likeliest.values()):
        raise ModelError(f"{path}: has tokens that the model does not know; export it again")
    return drafts
