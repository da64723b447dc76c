"""Write the first recipe for rows of one's own, with comments, from what is known of them.

What presets/choose.yaml, classify.yaml and write.yaml give anyway is left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import yaml

from distillery.recipe.task import TaskKind

Carved = dict[Literal["gold", "validation", "test"], float]

MANY_ROWS = 2000
"""Rows without a label from which on it is told that some of them may be chosen."""

FEWEST_LABELLED = 0.2
"""Share of the training rows that the teacher labels at least."""

USUAL = {
    "choice": ("question", "answerKey"),
    "classify": ("text", "label"),
    "extract": ("text", "answer"),
    "generate": ("text", "answer"),
}
"""By kind of task, the columns of the text and of the label or answer that need not be named."""

OF_TASK = {"extract": "Find the fields of the text.", "generate": "Answer the text."}
"""The system message by kind of task."""

LENGTH = [
    "# max_tokens: the most tokens of a prompt: the longest text and some room. Longer ones are",
    "# set aside.",
]


class Shares(NamedTuple):
    """What becomes of the rows with a label: `carve` are the shares (0 to 1) for dataset.carve. The
    rest, `left`, is labelled by the teacher like the rows without a label."""

    carve: Carved
    left: float


def choose_shares(answered: int, unanswered: int, with_test: bool = False) -> Shares:
    """Return the shares of `answered` rows, beside which there are `unanswered` ones.

    test: a fifth, of 200 to 500 rows, but at most 40 %; none `with_test` rows in a file of their
    own. validation: a tenth, of 50 to 200 rows, but at most 15 %. gold: the rest, save the rows
    that the teacher needs to have FEWEST_LABELLED of the training rows to label.
    """
    test = min(max(answered / 5, 200), 500, 0.4 * answered) / answered
    if with_test:
        test = 0.0
    validation = min(max(answered / 10, 50), 200, 0.15 * answered) / answered
    training = (1 - test - validation) * answered
    missing = max(0.0, FEWEST_LABELLED * (training + unanswered) - unanswered)
    left = round(missing / answered, 3)
    test, validation = round(test, 3), round(validation, 3)
    gold = round(1 - test - validation - left, 3)
    carve: Carved = {"gold": gold, "validation": validation}
    if test:
        carve["test"] = test
    return Shares(carve, left)


def draft(
    name: str,
    files: Sequence[str],
    texts: Sequence[str],
    label: str,
    ids_are_unique: bool,
    shares: Shares,
    teacher: Literal["local", "endpoint"],
    max_tokens: int | None,
    command: str,
    kind: TaskKind = "classify",
    schema: Mapping[str, Any] | None = None,
    test_files: Sequence[str] = (),
    unanswered: int = 0,
    options: str | None = None,
) -> str:
    """Return the YAML of a recipe.

    Args:
        name: Name of the recipe and of the registered model.
        files: Paths of the rows' files.
        texts: Columns of the text; several are shown one a line.
        label: Column of the label or answer.
        ids_are_unique: Whether ids come from the column id, if there is one.
        shares: What becomes of the rows with a label or answer.
        teacher: teacher.kind.
        max_tokens: prompt.max_tokens of the student; None for the default.
        command: How the recipe was made, for its first line.
        kind: task.kind.
        schema: task.schema, with kind: extract.
        test_files: Paths of the files of test rows, if they have files of their own.
        unanswered: How many rows have no label or answer.
        options: Column of the options, with kind: choice.
    """
    known = "a label" if kind == "classify" else "an answer"
    in_files = {"train": list(files)}
    if test_files:
        in_files["test"] = list(test_files)
    lines = [
        f"# Made by: {command}",
        "# Settings that are left out have defaults; the documentation of recipes lists them all.",
        f"name: {in_yaml(name)}",
        "",
        *task_lines(kind, schema),
        "",
        "dataset:",
        "  source: files",
        "  # Relative paths start at the folder that the run starts in.",
        f"  files: {in_yaml(in_files)}",
        *column_lines(texts, label, ids_are_unique, kind, options),
        f"  # Shares of the rows with {known}. gold: the "
        + ("teacher and the student learn" if teacher == "local" else "student learns")
        + " from them.",
        "  # validation: they "
        + ("check the teacher and " if kind == "classify" else "")
        + f"choose settings. test{' (files)' if test_files else ''}: they judge the student.",
        "  # Validation and test rows train nothing.",
        *left_lines(shares, known),
        f"  carve: {in_yaml(shares.carve)}",
        "",
        *prompt_lines(teacher, kind, max_tokens),
        *teacher_lines(teacher, shares, kind, unanswered),
        *student_lines(teacher, max_tokens),
        "# Each student that passes the gate becomes a version of this model.",
        f"registry: {in_yaml({'model_name': name})}",
    ]
    return "\n".join(lines) + "\n"


def task_lines(kind: str, schema: Mapping[str, Any] | None) -> list[str]:
    """Return the lines of the task."""
    if kind == "classify":
        return [
            "# A row is a text that belongs to one of the classes, which are the labels in the "
            "rows.",
            "# labels: [CLASS, ...] would name the classes, so that rows with any other are "
            "refused.",
            "task: {kind: classify}",
        ]
    if kind == "choice":
        return [
            "# Each row has options of its own, of which one is right.",
            "task: {kind: choice}",
        ]
    if schema is None:
        return [
            "# The answer to a row is text. metric: what the student is judged by, rouge_l, chrf,",
            "# bleu or exact_match.",
            "task: {kind: generate, metric: rouge_l}",
        ]
    lines = [
        "# The answer to a row is a JSON object of fields found in its text. The schema is guessed",
        "# from the rows: say required: [FIELD, ...] of those that no answer may lack.",
        "task:",
        "  kind: extract",
        "  schema:",
        "    type: object",
        "    properties:",
    ]
    for name, field in schema["properties"].items():
        lines.append(f"      {in_yaml(name)}: {in_yaml(field)}")
    return [*lines, "    additionalProperties: false"]


def prompt_lines(teacher: str, kind: str, max_tokens: int | None) -> list[str]:
    """Return the lines of the prompt: what an endpoint or a local teacher is told, and the length
    that a local teacher's prompts have."""
    lines = []
    settings: dict[str, str | int] = {}
    if teacher == "local" and kind in OF_TASK:
        lines += [
            "# system: what the models are told. Without it, the chat template of a base model may",
            "# tell of its maker, whose names a small model then copies into its answers.",
        ]
        settings["system"] = OF_TASK[kind]
    elif kind == "generate":
        lines += ["# What the endpoint is told; the student learns it from the answers."]
        settings["system"] = OF_TASK[kind]
    if teacher == "local" and max_tokens:
        lines += LENGTH
        settings["max_tokens"] = max_tokens
    if not settings:
        return []
    return [*lines, f"prompt: {in_yaml(settings)}", ""]


def column_lines(
    texts: Sequence[str], label: str, ids_are_unique: bool, kind: str, options: str | None
) -> list[str]:
    """Return the lines of the columns whose names are not the preset's."""
    usual_text, usual = USUAL[kind]
    columns: dict[str, str | None] = {}
    lines = []
    if len(texts) > 1:
        columns["question"] = None
        lines += [
            "  # The columns of the text, which are shown one a line.",
            f"  fields: {in_yaml(list(texts))}",
        ]
    elif texts[0] != usual_text:
        columns["question"] = texts[0]
    if options and options != "choices":
        columns["choices"] = options
    if label != usual:
        columns["answer"] = label
    if not ids_are_unique:
        columns["id"] = None
    if columns:
        told = {
            "question": "the text's column",
            "choices": "the options' column",
            "answer": "the right option's" if kind == "choice" else f"the {usual}'s",
            "id": "null names rows by content",
        }
        comment = ". ".join(f"{name}: {told[name]}" for name in columns)
        lines += [f"  # {comment}.", f"  columns: {in_yaml(columns)}"]
    return lines


def left_lines(shares: Shares, known: str) -> list[str]:
    """Return the comment on rows with a label that the teacher labels again; `known` is a label or
    an answer."""
    if not shares.left:
        return [f"  # The teacher labels the rows without {known}."]
    return [
        f"  # The rest, {shares.left:.1%}, is labelled by the teacher like rows without {known},",
        "  # of which there are few. Add such rows, which cost nobody's time, and raise gold.",
    ]


def teacher_lines(teacher: str, shares: Shares, kind: str, unanswered: int) -> list[str]:
    """Return the lines of the teacher."""
    if teacher == "local":
        lines = [
            "teacher:",
            "  # The run trains the teacher on the gold rows. endpoint: a large model elsewhere.",
            "  kind: local",
        ]
    else:
        lines = [
            "teacher:",
            "  # The chat-completions endpoint in .env (copy sample.env). local: a model that the",
            "  # run trains on the gold rows.",
            "  kind: endpoint",
            "  # Prices of a million tokens, for `distillery quote` and for caps in budget.",
            "  # prices: {input: 0.15, output: 0.60, currency: USD}",
        ]
        if unanswered >= MANY_ROWS:
            # How sure a student is of texts that it writes is not known.
            by = ", by: diversity" if kind in OF_TASK else ""
            lines += [
                f"  # Of its {unanswered:,} rows, this would label those that teach most:",
                f"  # select: {{rows: {MANY_ROWS // 2}{by}}}",
            ]
    # Two texts may say the same.
    if shares.left and kind != "generate":
        filters: dict[str, bool | float] = {"agreement_with_gold": True}
        if kind == "choice" and teacher == "local":
            # A small model knows little of what questions are about.
            filters["minimum_accepted"] = 0
        lines += [
            "  # Labels that differ from the label that the row has already are not used"
            + (", and may be most." if kind == "choice" else "."),
            f"  filters: {in_yaml(filters)}",
        ]
    return [*lines, ""]


def student_lines(teacher: str, max_tokens: int | None) -> list[str]:
    """Return the lines of the student of an endpoint, which has a prompt of its own."""
    if teacher == "local" or not max_tokens:
        return []
    lines = [*LENGTH, f"prompt: {{max_tokens: {max_tokens}}}"]
    return ["student:", *(f"  {line}" for line in lines), ""]


def in_yaml(value: str | Sequence[str] | Mapping[Any, Any]) -> str:
    """Return a value as YAML in one line."""
    text = yaml.safe_dump(
        value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=float("inf")
    )
    return text.removesuffix("\n").removesuffix("\n...")
