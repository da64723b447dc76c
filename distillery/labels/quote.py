"""What labelling and a judge will cost and how long they will take, before the first call."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress, islice
from pathlib import Path

from distillery.data.examples import each_example
from distillery.data.prepare import prepare
from distillery.errors import CredentialsError, RecipeError
from distillery.labels.acceptance import label_of_row, read_again
from distillery.labels.pairs import Pair, rows_for_judge
from distillery.labels.questions import Question, hashed_rows, questions
from distillery.labels.store import EXPERIENCE_ROWS, Experience, LabelStore
from distillery.prompts import Message, TransformersTokenizer
from distillery.recipe import CascadeRecipe, JudgeRecipe, PromptRecipe, Recipe, TeacherRecipe
from distillery.records import Example, Usage
from distillery.storage.allowed import local_path
from distillery.storage.working import working_folder
from distillery.teacher.budget import cost_of, standing
from distillery.teacher.endpoint import resolve_endpoint
from distillery.teacher.identity import teacher_identity
from distillery.teacher.ledger import Payer

TOKENS_PER_CHARACTER = 0.25
"""In English text and for most tokenizers (OpenAI's help centre, What are tokens and how to count
them); used while the teacher's own answers don't tell."""

TOKENS_PER_MESSAGE = 4
"""Tokens of a chat template around each message, used likewise."""

JSON_TOKENS = 6
"""Tokens of {"answer": ""} around an answer in JSON, used likewise."""

LATENCY_S = 1.0
"""Seconds of a call, used likewise."""

CHUNK_ROWS = 1000
"""Rows that are in memory at a time."""

TokenCounter = Callable[[list[Message]], int]
"""Returns the tokens of a prompt's messages as the teacher's own tokenizer counts them."""


def token_counter(tokenizer: str) -> TokenCounter:
    """Return a counter that uses a tokenizer from a folder or from the hub.

    Raises RecipeError if Transformers can't load it.
    """
    from transformers import AutoTokenizer

    try:
        loaded = TransformersTokenizer(
            AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        )
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"teacher.tokenizer {tokenizer}: Transformers can't load a tokenizer from it; "
            "correct the name, or remove the setting to have tokens estimated"
        ) from error
    return lambda messages: len(loaded.encode_chat(messages))


def named_tokenizer(teacher: TeacherRecipe) -> str | None:
    """Return teacher.tokenizer: a name on the hub, or the path of a folder on this machine.

    Raises DataError for a folder that this run may not open."""
    name = teacher.tokenizer
    if name is None or not (name.startswith((".", "/", "~")) or os.path.exists(name)):
        return name
    return str(local_path(name, "teacher.tokenizer"))


@dataclass(frozen=True)
class Quote:
    """What labelling `rows` will take.

    `known` rows need no call; the others need `calls`. `usage` is estimated, from what `basis`
    says; the prompts' tokens are exact if `counted`. `cost` is in `currency`, and None without a
    price table. `batch_cost` is the cost in batches; None where none are sent. `what`: what the
    rows are, for people. `budget`: what is spent and left of it, "" where there is none. `is_own`:
    whether the run's own teacher answers, which takes time on this machine alone; how much depends
    on base model, texts and machine, and is not estimated.
    """

    rows: int
    known: int
    calls: int
    usage: Usage
    counted: bool
    basis: str
    cost: float | None
    currency: str
    seconds: float
    what: str = "rows to label"
    budget: str = ""
    batch_cost: float | None = None
    is_own: bool = False

    def line(self) -> str:
        """Return the quote in one line."""
        if not self.calls:
            return f"{self.rows} {self.what}, all known: nothing to ask and nothing to pay"
        cost = "no price table"
        if self.cost is not None:
            cost = f"about {self.cost:.2f} {self.currency}"
        elif self.is_own:
            cost = "nothing to pay"
        if self.batch_cost is not None:
            cost += f", or {self.batch_cost:.2f} in batches"
        time = "only time on this machine" if self.is_own else f"about {duration(self.seconds)}"
        whom = " to the run's own teacher" if self.is_own else ""
        certainty = "counted" if self.counted else "estimated"
        budget = f"; {self.budget}" if self.budget else ""
        return (
            f"{self.rows} {self.what}, {self.known} known: {self.calls} calls{whom}, "
            f"{self.usage.prompt_tokens:,} tokens in ({certainty}), "
            f"about {self.usage.completion_tokens:,} out ({self.basis}); "
            f"{cost}, {time}{budget}"
        )


def quote(
    examples: Iterable[Example],
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    identity: str,
    store: LabelStore,
    tokens: TokenCounter | None = None,
    payer: Payer | None = None,
    gold: Iterable[Example] = (),
) -> Quote:
    """Return what `label` would ask for `examples`.

    The tokens of each prompt are counted by `tokens`; without it they are estimated, from the
    teacher's answers so far or from the prompt's length. Equal requests within CHUNK_ROWS are
    counted once; others are few, because data preparation drops equal rows. `payer` is on whose
    behalf `label` will ask, by default a run that has asked nothing yet. `gold`: rows whose written
    answers tell how long others may be.
    """
    typical = typical_answer(gold)
    rows = known = calls = characters = prompt_tokens = answer_tokens = longest = 0
    answered: list[str] = []
    for asked, new in each_rows_questions(examples, prompt, recipe, identity, store):
        rows += 1
        known += not new
        calls += len(new)
        longest = max([longest, *map(len, asked[0].names)])
        if len(answered) < EXPERIENCE_ROWS:
            answered += [question.key for question in asked if question not in new]
        for question in new:
            characters += len(question.messages[-1]["content"])
            answer_tokens += estimated_answer(question, recipe, typical)
            if tokens:
                prompt_tokens += tokens(question.messages)
            else:
                prompt_tokens += estimated_tokens(question)
    if longest:
        experience = experience_of(store, identity, recipe, longest, answered)
    else:
        # Only answers to the same task are as long as the next ones.
        experience = store.experience(identity, keys=answered)
    lengths = "the gold answers' lengths" if typical else "lengths"
    basis = f"from {lengths}, at most {recipe.max_tokens:,} each"
    if experience:
        answer_tokens = round(calls * experience.completion_tokens)
        basis = f"from its last {experience.answers:,} answers"
        if not tokens:
            prompt_tokens = round(characters * experience.tokens_per_character)
    usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=answer_tokens)
    return Quote(
        rows=rows,
        known=known,
        calls=calls,
        usage=usage,
        counted=tokens is not None,
        basis=basis,
        cost=cost_of(usage, recipe.prices),
        currency=recipe.prices.currency if recipe.prices else "",
        seconds=estimated_seconds(calls, usage, recipe, experience),
        what="comparisons" if isinstance(recipe, JudgeRecipe) else "rows to label",
        budget=standing(
            recipe.budget, recipe.prices, recipe.budget_section, payer or Payer(), store.database
        ),
        batch_cost=None if takes_no_batches(recipe) else cost_of(usage, recipe.in_batch.prices),
        is_own=recipe.kind == "local",
    )


def takes_no_batches(recipe: TeacherRecipe) -> bool:
    """Return whether it is never asked in batches: a local teacher, a judge, or an SDK without
    them."""
    if isinstance(recipe, JudgeRecipe) or recipe.kind != "endpoint":
        return True
    sdk: str = recipe.sdk
    if sdk == "auto":
        with suppress(CredentialsError):
            sdk = resolve_endpoint(recipe).sdk
    return sdk == "azure-ai-inference"


def each_rows_questions(
    examples: Iterable[Example],
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    identity: str,
    store: LabelStore,
) -> Iterator[tuple[list[Question], list[Question]]]:
    """Yield for each row its questions, and those without a stored answer, equal ones in a chunk
    only once."""
    remaining = iter(examples)
    while True:
        chunk = list(islice(remaining, CHUNK_ROWS))
        if not chunk:
            return
        asked = [questions(row, prompt, recipe, identity) for row in chunk]
        seen = store.answered(question.key for row_questions in asked for question in row_questions)
        for row_questions in asked:
            new = []
            for question in row_questions:
                if question.key not in seen:
                    seen.add(question.key)
                    new.append(question)
            yield row_questions, new


def left_to_teacher(
    examples: Iterable[Example],
    prompt: PromptRecipe,
    cheap: CascadeRecipe,
    identity: str,
    store: LabelStore,
) -> Iterator[Example]:
    """Yield the rows that the teacher is asked about after the `cheap` one, `identity`: those of
    which its stored answers are not sure enough, and those without any."""
    remaining = iter(examples)
    while chunk := list(islice(remaining, CHUNK_ROWS)):
        asked = [questions(row, prompt, cheap, identity) for row in chunk]
        known = store.get_many(each.key for row_questions in asked for each in row_questions)
        for row, row_questions in zip(chunk, asked, strict=True):
            stored = []
            for question in row_questions:
                found = known.get(question.key)
                stored.append(read_again(question, found, cheap) if found else None)
            label = label_of_row(row_questions, stored, cheap.soft_labels)
            if label is None or label.confidence is None or label.confidence < cheap.below:
                yield row


def are_answered(
    rows: Sequence[Example],
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    identity: str,
    store: LabelStore,
) -> list[bool]:
    """Return for each row whether all of its answers are stored."""
    asked = [questions(row, prompt, recipe, identity) for row in rows]
    stored = store.answered(question.key for row_questions in asked for question in row_questions)
    return [all(each.key in stored for each in row_questions) for row_questions in asked]


def free_rows(
    examples: Iterable[Example],
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    identity: str,
    cheap_identity: str | None,
    store: LabelStore,
) -> Iterator[Example]:
    """Yield the rows whose labels cost nothing, since all answers that they need are stored: those
    of the teacher, or of a cheap one that is asked first, where that is sure enough."""
    remaining = iter(examples)
    while chunk := list(islice(remaining, CHUNK_ROWS)):
        answered = are_answered(chunk, prompt, recipe, identity, store)
        if recipe.cheap and cheap_identity:
            has_cheap = are_answered(chunk, prompt, recipe.cheap, cheap_identity, store)
            hard = left_to_teacher(chunk, prompt, recipe.cheap, cheap_identity, store)
            names = {row.example_id for row in hard}
            for position, row in enumerate(chunk):
                is_left = row.example_id in names
                answered[position] = has_cheap[position] and (not is_left or answered[position])
        yield from compress(chunk, answered)


def experience_of(
    store: LabelStore, identity: str, recipe: TeacherRecipe, longest: int, answered: Sequence[str]
) -> Experience | None:
    """Return what the teacher's answers of the wanted form so far tell about the next ones, whose
    letters or classes have at most `longest` characters: a text that the teacher has written may be
    a hundred times as long. `answered` are the keys of this run's stored answers: what was
    rejected among them, such as reasoning that was cut off, is of the wanted form, too.

    So may a rationale be; its prompts end with answers.instruction.
    """
    experience = partial(store.experience, identity, longest=longest, keys=answered)
    if recipe.answers.form == "rationale":
        return experience(ends_with=recipe.answers.instruction)
    return experience(ends_without=recipe.answers.instruction)


def estimated_tokens(question: Question) -> int:
    """Return about how many tokens a prompt has, from its length."""
    lengths = [len(message["content"]) for message in question.messages]
    return round(sum(lengths) * TOKENS_PER_CHARACTER) + TOKENS_PER_MESSAGE * len(lengths)


def typical_answer(gold: Iterable[Example]) -> int | None:
    """Return about how many tokens the written answers of `gold` have on average, with the token
    that ends one; None where no row has such an answer."""
    tokens = [text_tokens(row.answer_key) for row in gold if row.format and row.answer_key]
    return round(sum(tokens) / len(tokens)) if tokens else None


def text_tokens(answer: str) -> int:
    """Return about how many tokens an answer has, with the token that ends it."""
    return math.ceil(len(answer) * TOKENS_PER_CHARACTER) + 1


def estimated_answer(question: Question, recipe: TeacherRecipe, typical: int | None = None) -> int:
    """Return about how many tokens an answer has: its letter, or the longest class or option, and
    the token that ends it. teacher.max_tokens is room for teachers that reason, of which most use
    little; an answer with its reason is taken to use all of it. A written one is taken to be as
    long as the row's gold answer or, where there is none, as `typical`; where that is None, to use
    as much as the student may."""
    if recipe.answers.form == "rationale":
        return recipe.max_tokens
    row = question.row
    if row.format:
        tokens = typical or row.format.max_tokens
        if row.answer_key:
            tokens = text_tokens(row.answer_key)
        return min(tokens, recipe.max_tokens)
    tokens = text_tokens(max(question.names, key=len))
    if recipe.answers.form == "json":
        tokens += JSON_TOKENS
    return min(tokens, recipe.max_tokens)


def estimated_seconds(
    calls: int, usage: Usage, recipe: TeacherRecipe, experience: Experience | None
) -> float:
    """Return about how long the calls take: by their number at a time or by the recipe's limits a
    minute, whichever takes longer."""
    # Answers from batches have no latency.
    latency = LATENCY_S
    if experience and experience.latency_ms:
        latency = experience.latency_ms / 1000
    times = [calls * latency / recipe.concurrency]
    if recipe.requests_per_minute:
        times.append(60.0 * calls / recipe.requests_per_minute)
    if recipe.tokens_per_minute:
        tokens = usage.prompt_tokens + usage.completion_tokens
        times.append(60.0 * tokens / recipe.tokens_per_minute)
    return max(times)


def duration(seconds: float) -> str:
    """Return a duration for people: 12 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def quote_recipe(recipe: Recipe, chosen: Path | None = None) -> dict[str, Quote]:
    """Return the quotes for the splits that a run of `recipe` has labelled: train and, if the
    teacher is an endpoint, test; for its cheap teacher and its judge, if it has these; and for the
    canaries that the recipe asks of its teachers.

    A local teacher that is still to be trained has no answers in the store. `chosen`: the file of
    the rows that teacher.select has chosen; as long as they are not known, as many others stand for
    them. With a cheap teacher, `train` is what the teacher is asked at most. Raises RecipeError if
    the labels come from files or from gold and no judge is asked.
    """
    teacher, judge = recipe.teacher, recipe.evaluation.judge
    nobody_labels = teacher.kind in ("gold", "file")
    if nobody_labels and judge is None:
        raise RecipeError(
            f"teacher.kind is {teacher.kind}: no teacher is asked, so there is nothing to pay"
        )
    splits, identity = ["train"], "a teacher that is yet to be trained"
    if nobody_labels:
        splits = []
    if teacher.kind == "endpoint":
        splits, identity = ["train", "test"], teacher_identity(recipe.teacher, None)
    tokenizer = named_tokenizer(teacher)
    tokens = token_counter(tokenizer) if tokenizer else None
    quotes, payer = {}, Payer(recipe=recipe.name)
    with working_folder("quote") as folder, LabelStore(max_age=teacher.max_age) as store:
        prepare(recipe.dataset, folder, recipe.task)
        if "train" in splits:
            few = teacher.select.rows if teacher.select and chosen is None else None
            each_row = partial(train_rows, chosen or folder / "train.jsonl", few)
            train = each_row()
            if teacher.canaries.rows:
                quotes["canaries"] = quote_canaries(
                    each_row(), recipe.prompt, teacher, identity, store
                )
            if cheap := teacher.cheap:
                asked_first = cheap, teacher_identity(cheap, None), store
                if cheap.canaries.rows:
                    quotes["cheap teacher's canaries"] = quote_canaries(
                        each_row(), recipe.prompt, *asked_first
                    )
                quotes["cheap teacher"] = quote(
                    each_row(), recipe.prompt, *asked_first, payer=payer, gold=gold_rows(folder)
                )
                train = left_to_teacher(train, recipe.prompt, *asked_first)
            quotes["train"] = quote(
                train, recipe.prompt, teacher, identity, store, tokens, payer, gold_rows(folder)
            )
        if "test" in splits:
            test = each_example(folder / "test.jsonl")
            asked = recipe.teacher_of_test_rows
            quotes["test"] = quote(test, recipe.prompt, asked, identity, store, tokens, payer)
        if judge:
            judged = each_example(folder / "test.jsonl")
            quotes["judge"] = quote_judge(judged, recipe.prompt, judge, store, payer)
    return quotes


def gold_rows(folder: Path) -> Iterable[Example]:
    """Return the gold rows in a folder of prepared rows, none where it has no such file."""
    file = folder / "gold.jsonl"
    return each_example(file) if file.is_file() else ()


def train_rows(file: Path, few: int | None) -> Iterable[Example]:
    """Return the train rows in `file`, of which all are never in memory, or as many as `few` of
    them."""
    rows = each_example(file)
    return rows if few is None else hashed_rows(rows, few)


def canary_rows(
    examples: Iterable[Example],
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    identity: str,
    store: LabelStore,
) -> list[Example]:
    """Return the rows that a teacher is asked again. That of a cascade has answered few of the
    rows: its canaries are among those."""
    if recipe.cascade:
        examples = free_rows(examples, prompt, recipe, identity, None, store)
    return hashed_rows(examples, recipe.canaries.rows or 0)


def quote_canaries(
    examples: Iterable[Example],
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    identity: str,
    store: LabelStore,
) -> Quote:
    """Return what the canaries among `examples` take, as their stored answers took it. Rows without
    stored answers are not asked."""
    rows = canary_rows(examples, prompt, recipe, identity, store)
    asked = [questions(row, prompt, recipe, identity) for row in rows]
    stored = store.get_many(question.key for row_questions in asked for question in row_questions)
    again = [
        [stored[question.key] for question in row_questions]
        for row_questions in asked
        if all(question.key in stored for question in row_questions)
    ]
    answers = list(chain.from_iterable(again))
    usage = Usage(
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        completion_tokens=sum(answer.completion_tokens for answer in answers),
    )
    return Quote(
        rows=len(again),
        known=0,
        calls=len(answers),
        usage=usage,
        counted=True,
        basis="as before",
        cost=cost_of(usage, recipe.prices),
        currency=recipe.prices.currency if recipe.prices else "",
        seconds=estimated_seconds(len(answers), usage, recipe, None),
        what="canaries",
    )


def quote_judge(
    test: Iterable[Example],
    prompt: PromptRecipe,
    judge: JudgeRecipe,
    store: LabelStore,
    payer: Payer | None = None,
) -> Quote:
    """Return what a judge is asked at most, on behalf of `payer`. The gold answers stand for those
    of student and teacher, which nobody knows yet."""
    pairs = []
    for row in hashed_rows(test, judge.rows):
        gold = str(row.answer_key)
        pairs.append(Pair(row, f"{gold}.", gold))
    rows = rows_for_judge(pairs, prompt)
    return quote(rows, judge.prompt, judge, teacher_identity(judge, None), store, payer=payer)
