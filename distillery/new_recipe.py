"""What `distillery new` does: look at the rows, choose the settings, write the recipe and tell all
of it in plain words.
"""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import yaml

from distillery.data.few_rows import few_rows
from distillery.data.good_rows import GoodCopy, refuse_good_copies, resolved, write_good_copies
from distillery.data.guess import listed
from distillery.data.look import (
    MOST_COMPARED,
    FoundRow,
    Look,
    contradictions,
    count_copies,
    count_near_duplicates,
    count_rows,
    doubtful_labels,
    lengths,
    look,
    new_labels,
)
from distillery.data.prepare import check_rows
from distillery.errors import DataError, DistilleryError, RecipeError
from distillery.labels.questions import check_of_train_rows
from distillery.labels.quote import quote_recipe
from distillery.machine import folder_of_commands
from distillery.models.base import local_copy
from distillery.prompts import TransformersTokenizer, render_messages
from distillery.recipe import PromptRecipe, Recipe, TaskKind, parse_recipe
from distillery.recipe.draft import choose_shares, draft
from distillery.settings import TeacherSettings, copy_hint

MOST_LISTED = 20
"""Rows that are named one by one."""

FEWEST_ANSWERED = 50
"""Rows with a label below which no student can be judged."""

GOOD_ANSWERED = 300
"""Rows with a label from which on neither validation nor test rows are few (few_rows.py)."""

FEWEST_OF_A_CLASS = 5

MOST_CLASSES_LISTED = 20

UNEVEN = 5
"""How many times as many rows the commonest class has as the rarest, for classes to be uneven."""

MOST_TOKENS = 2048
"""Tokens of a prompt beyond which a small model is slow on a CPU."""

ROOM = 1.25
"""What longer texts may have that come later, as a factor."""

LONGEST_COUNTED = 200
"""Texts, the longest ones, whose tokens are counted."""

TOKENS_PER_BYTE = 0.5
"""More than most tokenizers need in most languages. prompt.max_tokens is only a limit."""

TEMPLATE_TOKENS = 64
"""Tokens of a chat template around a text, at most."""

USES = {
    "gold": "the models learn from their labels",
    "train": "the teacher labels them, the student learns from that",
    "validation": "they check the teacher and choose settings",
    "test": "they judge the student",
}
"""What the rows of each role are for."""

KNOWN = {
    "choice": "an answer",
    "classify": "a label",
    "extract": "an answer",
    "generate": "an answer",
}

NO_NAME = "a teacher that is yet to be named"


def new_recipe(
    data: Sequence[Path],
    out: Path | None = None,
    name: str | None = None,
    texts: Sequence[str] = (),
    label: str | None = None,
    teacher: Literal["local", "endpoint"] = "local",
    force: bool = False,
    task: TaskKind | None = None,
    test: Sequence[Path] = (),
    without_bad_rows: bool = False,
) -> Iterator[str]:
    """Write a recipe for the rows in `data`, and yield lines for people. `task` is the kind of
    task; None: classify, or choice where rows have options, or extract where the answers are JSON
    objects. `test` are files of test rows; without, some of the rows in `data` are held out for the
    test. `without_bad_rows`: the recipe names copies of the files without their bad rows
    (good_rows.py).

    Raises DataError for files that no recipe can be made for, and RecipeError for a name that can't
    be one and, as DataError for such a copy, for a file that is there already, unless `force`.
    """
    name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", data[0].stem).strip("._-") or "my-task"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", name):
        raise RecipeError(f"--name {name}: write letters, digits, '.', '_' and '-' only")
    out = out or Path(f"{name}.yaml")
    if out.exists() and not force:
        raise RecipeError(f"{out}: exists; give another name by --out, or --force to overwrite it")
    refuse_shared_files(data, test)
    found = look(data, texts, label, task, test)
    made_of = [*found.files, *(f"--test={file}" for file in found.test_files)]
    copies: dict[Path, GoodCopy] = {}
    used = found
    if without_bad_rows and found.bad:
        made_of.append("--without-bad-rows")
        copies = leave_out(found, [*data, *test], force)
        # What the recipe says of ids and of the schema must not follow from rows that are left out.
        good, good_test = (
            [copies[path].good if path in copies else path for path in paths]
            for paths in (data, test)
        )
        chosen = found.chosen
        used = look(good, chosen.texts, chosen.label, chosen.kind, good_test)
    write = partial(
        draft,
        name=name,
        files=used.files,
        texts=used.chosen.texts,
        label=used.chosen.label,
        options=used.chosen.options,
        ids_are_unique=used.with_ids or "id" not in used.columns,
        shares=choose_shares(len(used.answered), used.unanswered, bool(test)),
        teacher=teacher,
        command=f"distillery new {shlex.join(made_of)}",
        kind=used.kind,
        schema=used.schema,
        test_files=used.test_files,
        unanswered=used.unanswered,
    )
    text = write(max_tokens=None)
    recipe = parsed(text)
    tokens, too_long = needed_tokens(found, recipe)
    if tokens > recipe.student_prompt.max_tokens:
        text = write(max_tokens=tokens)
        recipe = parsed(text)
    out.write_text(text, encoding="utf-8")

    has_only_good_rows = not used.bad
    counts, trouble = expected_counts(found, recipe), ""
    if has_only_good_rows:
        try:
            counts = check_rows(recipe.dataset, recipe.task, check_of_train_rows(recipe))
        except DistilleryError as error:
            trouble = str(error)
    yield from tell_rows(found)
    yield from tell_bad_rows(found, copies)
    yield from tell_doubts(found, counts, too_long)
    if trouble:
        yield "Chosen:"
        yield f"  a run would stop: {trouble}"
    else:
        yield from tell_choices(found, recipe, counts, has_only_good_rows)
    folder = folder_of_commands()
    yield f"Written: {out}. Next:"
    yield f"  {folder}distillery check {shlex.quote(str(out))}"
    yield f"  {folder}python -m flows.distill {shlex.quote(str(out))}"


def refuse_shared_files(data: Sequence[Path], test: Sequence[Path]) -> None:
    """Raise DataError for a file of test rows that is among the others, too."""
    others = set(map(resolved, data))
    for path in test:
        if resolved(path) in others:
            raise DataError(
                f"--test {path}: is among the files of DATA too, and test rows must train nothing; "
                "name it once"
            )


def leave_out(found: Look, paths: Sequence[Path], force: bool) -> dict[Path, GoodCopy]:
    """Copy those of the files in `paths` that have bad rows without them, and return the copies.
    Raises DataError for a file that can't be written, or not without `force`, and for a bad row
    that can't be left out."""
    reasons: dict[Path, dict[int, str]] = {}
    for row in found.bad:
        reasons.setdefault(row.path, {})[row.line] = row.reason
    refuse_good_copies(reasons, paths, force)
    return write_good_copies(reasons)


def parsed(text: str) -> Recipe:
    """Return the recipe of a draft."""
    return parse_recipe(yaml.safe_load(text), "distillery new")


def needed_tokens(found: Look, recipe: Recipe) -> tuple[int, int]:
    """Return how many tokens the student's prompts should be allowed to have, and how many rows are
    longer than that.

    The tokens are those of the base model if its tokenizer is on this machine; otherwise, and for
    texts that are short whatever the tokenizer, they are estimated from the bytes.
    """
    rows = [*found.rows, *found.test]
    longest = sorted(rows, key=lambda row: len(row.example.question), reverse=True)
    longest = longest[:LONGEST_COUNTED]
    counts = [len(row.example.question.encode()) + TEMPLATE_TOKENS for row in longest]
    if max(counts) > recipe.student_prompt.max_tokens:
        folder = local_copy(recipe.student_base)
        if folder and folder.is_dir():
            counts = prompt_tokens(longest, recipe.student_prompt, folder)
        else:
            counts = [round(count * TOKENS_PER_BYTE) for count in counts]
    wanted = 64 * math.ceil(ROOM * max(counts) / 64)
    limit = max(recipe.student_prompt.max_tokens, min(wanted, MOST_TOKENS))
    return limit, sum(count > limit for count in counts)


def prompt_tokens(rows: Sequence[FoundRow], prompt: PromptRecipe, folder: Path) -> list[int]:
    """Return how many tokens of a base model the rows' prompts have."""
    from transformers import AutoTokenizer

    tokenizer = TransformersTokenizer(
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    )
    counts = []
    for row in rows:
        example = row.example
        if example.format is None and not example.choices:
            example = example.model_copy(update={"classes": ("class",)})
        counts.append(len(tokenizer.encode_chat(render_messages(example, prompt))))
    return counts


def tell_rows(found: Look) -> Iterator[str]:
    """Yield what was read: rows, columns, classes and lengths."""
    chosen = found.chosen
    count = len(found.rows) + len(found.test) + len(found.bad)
    files = ", ".join([*found.files, *found.test_files])
    yield f"Read {count_rows(count)} of {files}; columns: {listed(found.columns)}"
    yield f"  text     {listed(chosen.texts)} ({chosen.text_reason})"
    what = "label" if found.kind == "classify" else "answer"
    answered = count_rows(len(found.answered))
    yield f"  {what:8} {listed([chosen.label])} ({chosen.label_reason})"
    yield f"           {answered} with {KNOWN[found.kind]}, {found.unanswered:,} without"
    if found.test:
        yield f"           {count_rows(len(found.test))} for the test alone"
    if chosen.options:
        yield f"  options  {listed([chosen.options])}, {options_a_row(found)}"
    if found.kind == "classify":
        yield f"  classes  {len(found.classes)}: {in_brief(found.classes)}"
    if found.schema is not None:
        fields = counted_fields(found)
        yield f"  fields   {len(fields)}: {in_brief(fields)}"
    length = lengths(found.rows)
    yield (
        f"  length   {length.median:,} characters in the median, {length.longest:,} at most "
        f"({length.where})"
    )


def options_a_row(found: Look) -> str:
    """Return how many options the rows have."""
    counts = {len(row.example.choices) for row in (*found.rows, *found.test)}
    if len(counts) == 1:
        return f"{counts.pop()} in each row"
    return f"{min(counts)} to {max(counts)} in a row"


def in_brief(counts: Mapping[str, int]) -> str:
    """Return names with their counts, those in the middle of many left out."""
    told = [f"{name} {count:,}" for name, count in counts.items()]
    if len(told) > MOST_CLASSES_LISTED:
        half = MOST_CLASSES_LISTED // 2
        told = [*told[:half], "...", *told[-half:]]
    return ", ".join(told)


def counted_fields(found: Look) -> dict[str, int]:
    """Return how many answers have each field, the most frequent first."""
    counts = Counter(
        name for row in found.answered for name in json.loads(str(row.example.answer_key))
    )
    return dict(counts.most_common())


def tell_bad_rows(found: Look, copies: Mapping[Path, GoodCopy]) -> Iterator[str]:
    """Yield the rows at which a run would stop, or that were left out of the `copies`."""
    if not found.bad:
        return
    if copies:
        yield "Left out, since a run stops at bad rows:"
    else:
        yield "Mend first, or leave out by --without-bad-rows, since a run stops at bad rows:"
    yield from in_part(list(map(str, found.bad)))
    for path, copy in copies.items():
        yield f"  {copy.good} has the other rows of {path}, {copy.bad} these with their reasons"


def expected_counts(found: Look, recipe: Recipe) -> dict[str, int]:
    """Return about how many rows serve for what, by role; the rows to label are left out."""
    shares = recipe.dataset.carve.items()
    counts: dict[str, int] = {role: round(share * len(found.answered)) for role, share in shares}
    if found.test:
        counts["test"] = len(found.test)
    return counts


def tell_doubts(found: Look, counts: Mapping[str, int], too_long: int) -> Iterator[str]:
    """Yield what a run does not stop at, but the student may suffer from. `counts`: the rows by
    role."""
    doubts = [*tell_count(found, counts), *tell_classes(found), *tell_copies(found)]
    if too_long:
        at_least = "at least " if too_long == LONGEST_COUNTED else ""
        doubts.append(
            f"long texts: {at_least}{count_rows(too_long)} with more than about {MOST_TOKENS:,} "
            "tokens, which train nothing and count as wrong in the test; shorten them, or raise "
            "max_tokens"
        )
    if found.kind == "classify":
        doubts += in_part(doubtful_labels(found), indent="")
        doubts += in_part(new_labels(found), indent="")
    if not found.writes:
        doubts += in_part(contradictions(found.rows), indent="")
    if doubts:
        yield "Look at:"
    for doubt in doubts:
        yield f"  {doubt}"


def tell_count(found: Look, counts: Mapping[str, int]) -> Iterator[str]:
    """Yield whether labels or answers, or those of a role, are too few."""
    answered = len(found.answered)
    if answered < FEWEST_ANSWERED:
        yield (
            f"{count_rows(answered)} with {KNOWN[found.kind]}: too few to train and judge a "
            f"student; label {FEWEST_ANSWERED} at least, better {GOOD_ANSWERED}"
        )
    else:
        for rows, text in few_rows(counts).items():
            yield f"{rows}: {text}"


def tell_classes(found: Look) -> Iterator[str]:
    """Yield whether classes are rare or uneven."""
    if found.kind != "classify":
        return
    rare = [label for label, count in found.classes.items() if count < FEWEST_OF_A_CLASS]
    if rare:
        yield (
            f"classes with fewer than {FEWEST_OF_A_CLASS} rows: "
            f"{', '.join(rare[:MOST_LISTED])}{' ...' if len(rare) > MOST_LISTED else ''}; label "
            "more rows of them, or join them with others"
        )
    commonest = max(found.classes.values())
    others = [count for count in found.classes.values() if count >= FEWEST_OF_A_CLASS]
    rarest = min(others, default=commonest)
    if commonest > UNEVEN * rarest:
        yield (
            f"uneven classes: the commonest has {commonest / rarest:,.0f} times the rows of the "
            "rarest; go by macro-F1 in the report, to which each class counts alike"
        )


def tell_copies(found: Look) -> Iterator[str]:
    """Yield how many rows repeat others."""
    copies = count_copies(found.rows)
    if copies and found.writes:
        yield (
            f"copies: {count_rows(copies)} with the text of another one; of validation and test "
            "rows, the answers of copies count as equally right"
        )
    elif copies:
        yield f"copies: {count_rows(copies)} with the text of another one, of which one is used"
    if found.kind != "classify":
        return
    near = count_near_duplicates(found.rows)
    if near is None:
        yield f"near duplicates were not counted: more than {MOST_COMPARED:,} rows"
    elif near > copies:
        yield (
            f"near duplicates: {count_rows(near - copies)}, which are left out where they would "
            "train what the test asks (dataset.near_duplicate)"
        )


def tell_choices(
    found: Look, recipe: Recipe, counts: Mapping[str, int], has_only_good_rows: bool
) -> Iterator[str]:
    """Yield what was chosen: which rows serve for what, and what their labels cost. `counts`: the
    rows by role. `has_only_good_rows`: of the recipe's files; otherwise the counts are expected
    ones."""
    yield "Chosen:"
    for role, count in counts.items():
        use = USES[role]
        if role == "validation" and found.kind != "classify":
            use = "they choose settings"
        about = "" if has_only_good_rows else "about "
        yield f"  {role:10} {about}{count_rows(count)}: {use}"
    if recipe.teacher.filters.agreement_with_gold:
        yield (
            f"  Few or no rows are without {KNOWN[found.kind]}: the teacher labels a part of those "
            f"that have one. Add rows without {KNOWN[found.kind]}; the more, the better the "
            "student."
        )
    yield from tell_labelling(recipe, has_only_good_rows)


def tell_labelling(recipe: Recipe, has_only_good_rows: bool) -> Iterator[str]:
    """Yield who labels and what it costs; `has_only_good_rows` as in `tell_choices`."""
    if recipe.teacher.kind == "local":
        yield "  teacher    local: the run trains it on the gold rows; nothing is paid"
        return
    yield f"  teacher    endpoint: named in .env{copy_hint()}"
    if not has_only_good_rows:
        yield "             what labelling costs: distillery quote, once the bad rows are mended"
        return
    if not TeacherSettings().model:
        named = recipe.teacher.model_copy(update={"identity": NO_NAME})
        recipe = recipe.model_copy(update={"teacher": named})
    for split, quoted in quote_recipe(recipe).items():
        yield f"             {split}: {quoted.line()}"
    yield "             for the cost, fill in teacher.prices; then distillery quote"


def in_part(lines: Sequence[str], indent: str = "  ") -> Iterator[str]:
    """Yield the first lines, and how many are left."""
    for line in lines[:MOST_LISTED]:
        yield f"{indent}{line}"
    if len(lines) > MOST_LISTED:
        yield f"{indent}and {len(lines) - MOST_LISTED:,} more"
