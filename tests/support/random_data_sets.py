"""Small random data sets with all options of preparation: copies, near copies and faults."""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

from row_files import write

from distillery.recipe import DatasetRecipe, TaskRecipe

WORDS = ("router", "bill", "van", "engineer", "email", "cable", "invoice", "queue", "voucher")
LABELS = ("refund", "delivery", "invoice")
SCHEMA = {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]}


class RandomDataSet(NamedTuple):
    """The slices of a recipe, whose files are written, and the rows of a hub data set by split."""

    dataset: DatasetRecipe
    task: TaskRecipe
    hub: dict[str, list[dict[str, Any]]]


class Chooser(random.Random):
    """Draws the parts of a data set."""

    def happens(self, chance: float) -> bool:
        return self.random() < chance

    def text(self) -> str:
        """A text of few; sometimes in another spelling, or with another word."""
        words = random.Random(self.randrange(40)).choices(WORDS, k=self.choice((1, 2, 5, 8, 12)))
        if self.happens(0.3):
            words[self.randrange(len(words))] = self.choice(WORDS)
        text = self.choice((" ", " ", "  ")).join(words)
        return text.upper() if self.happens(0.1) else text

    def options(self) -> list[str]:
        return self.sample(["yes", "no", "maybe"], self.choice((2, 3, 3)))

    def row(self, kind: str, number: int, faults: float) -> dict[str, Any]:
        """A row, seldom with a fault."""
        values: dict[str, Any] = {"id": f"r{number}", "text": self.text()}
        if self.happens(0.5):
            values["note"] = self.choice(("", "urgent", "by mail"))
        if kind == "choice":
            values |= {"choices": self.options(), "answer": self.choice("AAB")}
        elif kind == "classify":
            values["answer"] = self.choice(LABELS)
        elif kind == "extract":
            values["answer"] = json.dumps({"item": self.choice(WORDS[:3])})
        else:
            values["answer"] = self.choice(WORDS[:3])
        if self.happens(faults):
            values[self.choice(("id", "text", "answer"))] = self.choice(("", None, "r1", " "))
        return values

    def rows(self, kind: str, most: int, start: int, unanswered: float) -> list[dict[str, Any]]:
        faults = self.choice((0.0, 0.0, 0.0, 0.02))
        count = self.randint(1, most)
        rows = [self.row(kind, start + number, faults) for number in range(count)]
        for row in rows:
            if self.happens(unanswered):
                row["answer"] = self.choice(("", None))
        if not self.happens(0.05):
            for row in rows:
                row.setdefault("note", "")
        if self.happens(0.4):
            for row in rows:
                del row["id"]
        elif self.happens(0.05):
            del self.choice(rows)["id"]
        elif self.happens(0.1):
            rows[-1]["id"] = rows[0]["id"]
        elif self.happens(0.1):
            rows.append(dict(rows[0]))
        if self.happens(0.03):
            for row in rows:
                del row["text"]
        return rows

    def file(self, rows: list[dict[str, Any]], stem: str) -> str:
        """Write rows in some format, and return the file's name."""
        suffix = self.choice((".jsonl", ".csv", ".parquet"))
        columns = list(dict.fromkeys(name for row in rows for name in row))
        if suffix != ".jsonl":
            rows = [{name: row.get(name) for name in columns} for row in rows]
        if suffix == ".csv":
            rows = [
                {
                    name: json.dumps(value) if isinstance(value, list) else value
                    for name, value in row.items()
                }
                for row in rows
            ]
        name = write(rows, f"{stem}{suffix}")
        if suffix == ".jsonl" and self.happens(0.02):
            with Path(name).open("a") as file:
                file.write("no row\n")
        return name


def random_data_set(seed: int) -> RandomDataSet:
    """Write the files of a data set into the current folder."""
    chooser = Chooser(seed)
    kind = chooser.choice(("choice", "classify", "classify", "extract", "generate"))
    named = {role for role in ("gold", "validation", "test") if chooser.happens(0.3)}
    carve = {
        role: chooser.choice((0.1, 0.2, 0.25))
        for role in ("gold", "validation", "test")
        if role not in named and chooser.happens(0.5)
    }
    if not named & {"test"} and chooser.happens(0.9):
        carve.setdefault("test", 0.2)
    unanswered = chooser.choice((0.0, 0.0, 0.3))
    if kind == "choice" and carve and chooser.happens(0.9):
        unanswered = 0.0
    splits: dict[str, list[dict[str, Any]]] = {"pool": chooser.rows(kind, 120, 0, unanswered)}
    roles = {"train": "pool"}
    for number, role in enumerate(sorted(named), 1):
        roles[role] = role
        rows = chooser.rows(kind, 12, 1000 * number, 0.0)
        if chooser.happens(0.8):
            # Else some of them are leaks.
            for index, row in enumerate(rows):
                if row.get("text"):
                    row["text"] = f"{role} {index} {row['text']}"
        splits[role] = rows
    source = chooser.choice(("files", "files", "hub"))
    dataset: dict[str, Any] = {
        "source": source,
        "splits": dict(chooser.sample(sorted(roles.items()), len(roles))),
        "carve": carve,
        "columns": {
            "id": chooser.choice(("id", "id", None)),
            "question": "text",
            "answer": "answer",
            "concept": None,
            "choices": "choices" if kind == "choice" else None,
        },
        "fields": ("note",) if chooser.happens(0.3) else (),
        "seed": chooser.randrange(3),
        "near_duplicate": chooser.choice((1.0, 0.8, 0.5, 0.25)),
        "sample": {
            role: chooser.randint(1, 20) for role in (*roles, *carve) if chooser.happens(0.2)
        },
    }
    if "test" in carve and chooser.happens(0.3):
        dataset["rotation"] = {"rounds": 2, "round": chooser.randrange(2)}
    if source == "hub":
        dataset["name"] = "some/rows"
    else:
        files = {}
        for split, rows in splits.items():
            cut = chooser.randint(1, len(rows))
            parts = [part for part in (rows[:cut], rows[cut:]) if part]
            files[split] = [chooser.file(part, f"{split}{n}") for n, part in enumerate(parts)]
        dataset["files"] = files
    if chooser.happens(0.3):
        right = [
            {**row, "answer": "A" if kind == "choice" else chooser.row(kind, 0, 0)["answer"]}
            for row in chooser.sample(splits["pool"], min(4, len(splits["pool"])))
        ]
        dataset["corrections"] = [chooser.file(right, "corrections")]
    task: dict[str, Any] = {"kind": kind}
    if kind == "classify" and chooser.happens(0.5):
        task["labels"] = LABELS
    if kind == "classify" and chooser.happens(0.5):
        others = [{"text": f"chat {chooser.text()}", "note": "x"} for _ in range(30)]
        if chooser.happens(0.5):
            others += [
                {"text": row.get("text") or "chat"} | {"note": ""} for row in splits["pool"][:2]
            ]
        task["other"] = {"files": [chooser.file(others, "other")]}
    if kind == "extract":
        task["schema"] = SCHEMA
    return RandomDataSet(
        DatasetRecipe.model_validate(dataset), TaskRecipe.model_validate(task), splits
    )
