"""What labelling will cost and how long it will take, before the first call."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from distillery.data.examples import each_example
from distillery.data.prepare import prepare
from distillery.errors import RecipeError
from distillery.labels.questions import Question, questions
from distillery.labels.store import Experience, LabelStore
from distillery.prompts import Message, TransformersTokenizer
from distillery.recipe import PromptRecipe, Recipe, TeacherRecipe
from distillery.records import Example, Usage
from distillery.storage.working import working_folder
from distillery.teacher.budget import cost_of
from distillery.teacher.identity import teacher_identity

TOKENS_PER_CHARACTER = 0.25
"""Of English text, and of most tokenizers (OpenAI's help centre, What are tokens and how to count them); where nothing
better is known."""

TOKENS_PER_MESSAGE = 4

LATENCY_S = 1.0

_ROWS = 1000

Tokens = Callable[[list[Message]], int]
"""The tokens of a prompt's messages, as the teacher's own tokenizer counts them."""


def counted_by(tokenizer: str) -> Tokens:
    """The count by a tokenizer that Transformers loads from a folder or from the hub. Raises RecipeError without it."""
    from transformers import AutoTokenizer

    try:
        own = TransformersTokenizer(AutoTokenizer.from_pretrained(tokenizer))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"teacher.tokenizer {tokenizer}: no tokenizer that Transformers loads"
        ) from error
    return lambda messages: len(own.encode_chat(messages))


@dataclass(frozen=True)
class Quote:
    """`rows` in all, of which `known` need no call; `calls` for the others. `usage` is estimated but for the prompt's
    tokens where `counted`; `basis` says from what. `cost` in the price table's currency, None without one."""

    rows: int
    known: int
    calls: int
    usage: Usage
    counted: bool
    basis: str
    cost: float | None
    currency: str
    seconds: float

    def line(self) -> str:
        """The quote in one line."""
        if not self.calls:
            return f"{self.rows} rows to label, all known: nothing to ask and nothing to pay"
        cost = "no price table" if self.cost is None else f"about {self.cost:.2f} {self.currency}"
        tokens = (
            f"{self.usage.prompt_tokens:,} tokens in ({'counted' if self.counted else 'estimated'})"
        )
        return (
            f"{self.rows} rows to label, {self.known} known: {self.calls} calls, {tokens}, about "
            f"{self.usage.completion_tokens:,} out ({self.basis}); {cost}, about {duration(self.seconds)}"
        )


def quote(
    examples: Iterable[Example],
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    identity: str,
    store: LabelStore,
    tokens: Tokens | None = None,
) -> Quote:
    """What `labels.label` would ask for `examples`. Counts each row's tokens by `tokens`, or estimates them from the
    teacher's answers so far, or from the prompt's length. Holds some thousand rows in memory at a time: equal requests
    are counted once where they are as close, and are few, since equal rows of a data set are dropped."""
    reasons, asked_for = recipe.answers.form == "rationale", recipe.answers.instruction
    # An answer with its reason is a hundred times as long as a letter.
    experience = store.experience(
        identity, **{"ends_with" if reasons else "ends_without": asked_for}
    )
    rows = known = calls = prompt_tokens = 0
    wanted = iter(examples)
    while chunk := list(islice(wanted, _ROWS)):
        seen: set[str] = set()
        asked = [questions(row, prompt, recipe, identity) for row in chunk]
        answered = store.answered(question.key for several in asked for question in several)
        for several in asked:
            rows += 1
            open_ones = [one for one in several if one.key not in answered and one.key not in seen]
            known += not open_ones
            for question in open_ones:
                seen.add(question.key)
                calls += 1
                prompt_tokens += (
                    tokens(question.messages) if tokens else _estimate(question, experience)
                )
    each = experience.completion_tokens if experience else float(recipe.max_tokens)
    usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=round(calls * each))
    cost = cost_of(usage, recipe.prices)
    return Quote(
        rows=rows,
        known=known,
        calls=calls,
        usage=usage,
        counted=tokens is not None,
        basis=f"from its last {experience.answers:,} answers"
        if experience
        else "from lengths and teacher.max_tokens",
        cost=cost,
        currency=recipe.prices.currency if recipe.prices else "",
        seconds=_seconds(calls, usage, recipe, experience),
    )


def _estimate(question: Question, experience: Experience | None) -> int:
    if experience:
        return round(len(question.messages[-1]["content"]) * experience.tokens_per_character)
    lengths = [len(message["content"]) for message in question.messages]
    return round(sum(lengths) * TOKENS_PER_CHARACTER) + TOKENS_PER_MESSAGE * len(lengths)


def _seconds(
    calls: int, usage: Usage, recipe: TeacherRecipe, experience: Experience | None
) -> float:
    """By the calls at a time and by the recipe's limits a minute, whichever is slower."""
    latency = experience.latency_ms / 1000 if experience else LATENCY_S
    times = [calls * latency / recipe.concurrency]
    if recipe.requests_per_minute:
        times.append(60.0 * calls / recipe.requests_per_minute)
    if recipe.tokens_per_minute:
        times.append(
            60.0 * (usage.prompt_tokens + usage.completion_tokens) / recipe.tokens_per_minute
        )
    return max(times)


def duration(seconds: float) -> str:
    """12 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def quote_recipe(recipe: Recipe) -> dict[str, Quote]:
    """The quotes for the splits that a run of `recipe` has labelled: train and, by an endpoint, test. Of a local
    teacher that is yet to be trained no answer is known."""
    teacher = recipe.teacher
    if teacher.kind in ("gold", "file"):
        raise RecipeError(f"teacher.kind is {teacher.kind}: nobody is asked, and nothing is paid")
    identity = (
        teacher_identity(recipe.teacher, None)
        if teacher.kind == "endpoint"
        else "a teacher that is yet to be trained"
    )
    tokens = counted_by(teacher.tokenizer) if teacher.tokenizer else None
    with working_folder("quote") as folder, LabelStore() as store:
        prepare(recipe.dataset, folder)
        splits = ("train", "test") if teacher.kind == "endpoint" else ("train",)
        return {
            split: quote(
                each_example(folder / f"{split}.jsonl"),
                recipe.prompt,
                teacher,
                identity,
                store,
                tokens,
            )
            for split in splits
        }
