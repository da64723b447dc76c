"""The files that an evaluation leaves.

answers.jsonl: one test row a line, with its example_id, the gold letter and each predictor's letter
or null; the candidate is the last column. Where answers are written, they are texts, and a line
tells the metric and has further gold answers as references. Equal answers give equal bytes. A
registered model has an answers.jsonl with the candidate's column alone (see write_own_answers).
rows.jsonl: one test row a line, to look at:
  example_id, question, choices, gold
  classify        true where the choices are the classes, and the answers too; else left out
  content         digest that rows of equal content share; see data/rows.py
  answers         letter or null by predictor
  probabilities   of each choice in order, or null, by predictor; only those that give them
  metric, references, scores, no_answer   where answers are written: the primary metric, further
                  gold answers, and by predictor the metric of the row by itself, and why there is
                  no answer
doubtful.jsonl and doubtful.csv: the rows whose labels may be wrong; see doubtful.py.
report.json: the scoreboard, each predictor's records.Figures, and what was measured where.
scoreboard.md and scoreboard.png: the same for people. These three hold measured speeds, which
differ from run to run.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distillery.data.rows import content_of_row
from distillery.errors import DataError
from distillery.evaluation.figures_table import render_figures_markdown
from distillery.evaluation.gold import gold_of
from distillery.evaluation.scoreboard import GOLD, headline, plot_scoreboard, render_markdown
from distillery.evaluation.scoring import Answers, Probabilities, Scored
from distillery.machine import machine_name
from distillery.markdown import escape
from distillery.records import Example, Figures, ScoreRow, digest_of

ANSWERS_FILE = "answers.jsonl"
REGISTERED_ANSWERS = f"evaluation/{ANSWERS_FILE}"
"""A student's own answers, in its registered folder."""
ROWS_FILE = "rows.jsonl"
REPORT_FILE = "report.json"
TABLE_FILE = "scoreboard.md"
PLOT_FILE = "scoreboard.png"


def write_report(
    out: Path,
    rows: Sequence[ScoreRow],
    candidate: str,
    teacher: str,
    scored: Mapping[str, Scored],
    notes: Sequence[str],
    figures: Mapping[str, Figures],
) -> None:
    """Write the scoreboard into the folder `out` in its three forms, with the `figures` of each
    predictor."""
    out.mkdir(parents=True, exist_ok=True)
    summary = headline(rows, candidate, teacher)
    report: dict[str, Any] = {
        "candidate": candidate,
        "teacher": teacher,
        "machine": machine_name(),
        "ran_on": {name: result.ran_on for name, result in scored.items()},
        "load_s": {name: result.load_s for name, result in scored.items()},
        "headline": summary,
        "notes": list(notes),
        "scoreboard": [row.model_dump(exclude={"figures"}) for row in rows],
        "figures": {name: found.model_dump() for name, found in figures.items()},
    }
    write_text(out / REPORT_FILE, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    further = render_figures_markdown(figures, candidate)
    paragraphs = [render_markdown(rows), escape(summary), further, *map(escape, notes)]
    write_text(out / TABLE_FILE, "\n\n".join(paragraphs) + "\n")
    plot_scoreboard(rows, teacher, out / PLOT_FILE)


def write_answers(out: Path, examples: Sequence[Example], answers: Mapping[str, Answers]) -> None:
    """Write each predictor's answers, by its name, into the folder `out`."""
    lines = []
    for number, example in enumerate(examples):
        line: dict[str, Any] = {"example_id": example.example_id, **gold_columns(example)}
        for name, letters in answers.items():
            line[name] = letters[number]
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(out / ANSWERS_FILE, "".join(lines))


def write_rows(
    out: Path,
    examples: Sequence[Example],
    answers: Mapping[str, Answers],
    probabilities: Mapping[str, Sequence[Probabilities]],
    scored: Mapping[str, Scored],
) -> None:
    """Write the rows with each predictor's answers and probabilities, by its name, into the folder
    `out`; where answers are written, with their scores and why models in `scored` give none.
    Probabilities and scores are rounded to six digits."""
    lines = []
    scores: dict[str, list[float]] = {}
    if examples[0].format is not None:
        gold = gold_of(examples)
        scores = {name: gold.row_values(own) for name, own in answers.items() if name != GOLD}
    for number, example in enumerate(examples):
        given = {name: letters[number] for name, letters in answers.items() if name != GOLD}
        shares: dict[str, list[float] | None] = {}
        for name, each in probabilities.items():
            row = each[number]
            shares[name] = None if row is None else [round(share, 6) for share in row]
        line: dict[str, Any] = {
            "example_id": example.example_id,
            "content": content_of_row(example),
            "question": example.question,
            "choices": example.options,
            "gold": answers[GOLD][number],
            "answers": given,
            "probabilities": shares,
        }
        if example.classes:
            line["classify"] = True
        if scores:
            line |= {"references": (), **gold_columns(example)}
            line["scores"] = {name: round(each[number], 6) for name, each in scores.items()}
            reasons = {
                name: each.no_answer[number] for name, each in scored.items() if each.no_answer
            }
            line["no_answer"] = {name: reason for name, reason in reasons.items() if reason}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(out / ROWS_FILE, "".join(lines))


def gold_columns(example: Example) -> dict[str, Any]:
    """Return what a written answer is compared with beside the gold answer, for `gold.gold_in`."""
    if example.format is None:
        return {}
    columns: dict[str, Any] = {"metric": example.format.metric}
    if example.references:
        columns["references"] = example.references
    return columns


class RowContent(NamedTuple):
    """What tells a test row from others, whatever its id.

    `asked`: digest of exactly what a model is asked: question, concept, and options in their order.
    `content`: digest of question and options whatever the options' order (data/rows.py).
    """

    asked: str
    content: str


def row_contents(examples: Iterable[Example]) -> dict[str, RowContent]:
    """Return the contents of rows by example_id."""
    contents = {}
    for example in examples:
        asked = digest_of([example.question, example.concept, example.choices])
        content = content_of_row(example)
        contents[example.example_id] = RowContent(asked, content)
    return contents


def rows_digest(examples: Iterable[Example]) -> str:
    """Return the digest of test rows with their gold answers, whatever their ids and order."""
    rows = []
    for example, content in zip(examples, row_contents(examples).values(), strict=True):
        rows.append([content.asked, example.answer_key, *example.references])
    return digest_of(sorted(rows))


def write_own_answers(
    answers: Path, candidate: str, examples: Iterable[Example], out: Path
) -> None:
    """Write the candidate's column of `answers`, an answers.jsonl, to the file `out`.

    A line has example_id, asked and content (see RowContent), gold with what belongs to it, and the
    candidate's answer or null under its name, which comes last. It holds nothing of other models
    and nothing measured.
    """
    contents = row_contents(examples)
    lines = []
    for example_id, row in read_answers(answers).items():
        line = {"example_id": example_id, **contents[example_id]._asdict()}
        for name in ("metric", "references", GOLD, candidate):
            if name in row:
                line[name] = row[name]
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(out, "".join(lines))


def answer_rows(
    examples: Sequence[Example], name: str, letters: Answers
) -> dict[str, dict[str, Any]]:
    """Return a predictor's answers by example_id, as `write_own_answers` writes them."""
    contents = row_contents(examples)
    rows: dict[str, dict[str, Any]] = {}
    for example, letter in zip(examples, letters, strict=True):
        line = {"example_id": example.example_id, **contents[example.example_id]._asdict()}
        line |= gold_columns(example)
        rows[example.example_id] = {**line, GOLD: example.answer_key, name: letter}
    return rows


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with the same bytes on every system."""
    path.write_text(text, encoding="utf-8", newline="\n")


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of an answers.jsonl by example_id.

    Raises DataError where the file can't be read as such."""
    try:
        return parse_answers(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(
            f"{path}: can't be read as answers ({type(error).__name__}); evaluate again"
        ) from error


def parse_answers(content: bytes, name: str) -> dict[str, dict[str, Any]]:
    """Return the lines of an answers.jsonl by example_id. `name` names it in messages.

    Raises DataError where the content can't be read as such."""
    try:
        answers = {}
        for line in content.decode("utf-8").split("\n"):
            if line:
                row = json.loads(line)
                answers[row["example_id"]] = row
        return answers
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{name}: can't be read as answers ({type(error).__name__}); evaluate again"
        ) from error


def candidate_of(path: Path) -> str | None:
    """Return the candidate's name in an answers.jsonl, which tells its precision: that of a
    champion may be another. None for a file without rows.

    Raises DataError where the file can't be read."""
    for row in read_answers(path).values():
        return list(row)[-1]
    return None
