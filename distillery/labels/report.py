"""What is worth knowing of a set of labels: how many, of which letters, how often right and how well calibrated where
gold answers are known, and which rows are worth a look."""

import heapq
import json
from collections import Counter
from pathlib import Path

from distillery.evaluation.statistics import wilson
from distillery.records import Example, Interval, Record, TeacherLabel

REPORT_FILE, LOOK_FILE, RELIABILITY_FILE = "report.json", "look.jsonl", "reliability.png"

_BINS = 10

_LOOK_ROWS = 50


class Bin(Record):
    """Labels whose confidence lies between `low` and `high`: its mean, and the share of them that gold confirms."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


class LabelReport(Record):
    """`letters`: labels by letter; `soft` of them have probabilities. `gold_rows`: labels of rows with a gold answer,
    `right` of which it confirms; labels that teacher.filters then left out are among them. `calibration_error`: the
    mean distance of confidence and accuracy over ten bins, by rows (the expected calibration error of Guo et al., On
    Calibration of Modern Neural Networks, 2017); None where no label has a confidence."""

    accepted: int
    rejected: dict[str, int]
    letters: dict[str, int]
    soft: int = 0
    gold_rows: int
    right: int
    interval: Interval | None = None
    calibration: tuple[Bin, ...] = ()
    calibration_error: float | None = None

    @property
    def accuracy(self) -> float | None:
        """Of the labels against gold (0 to 1); None where no gold answer is known."""
        return self.right / self.gold_rows if self.gold_rows else None

    def line(self) -> str:
        """The report in one line."""
        parts = [f"{reason} ({count})" for reason, count in self.rejected.items()]
        rejected = f"; rejected: {', '.join(parts)}" if parts else ""
        right = (
            ""
            if self.accuracy is None
            else f"; {self.accuracy:.1%} right of {self.gold_rows} with a gold answer"
        )
        error = (
            ""
            if self.calibration_error is None
            else f", calibration error {self.calibration_error:.3f}"
        )
        letters = ", ".join(f"{letter} {count}" for letter, count in self.letters.items())
        soft = f", {self.soft} with probabilities" if 0 < self.soft < self.accepted else ""
        return f"{self.accepted} accepted ({letters}){soft}{rejected}{right}{error}"


class Tally:
    """Takes a run's labels one by one; its memory does not grow with them."""

    def __init__(self) -> None:
        self.accepted = self.soft = 0
        self.rejected: Counter[str] = Counter()
        self._letters: Counter[str] = Counter()
        self._gold_rows = self._right = 0
        # Of each bin: rows, sum of confidences, rows that are right.
        self._bins = [[0, 0.0, 0] for _ in range(_BINS)]
        self._wrong: list[tuple[float, str, dict[str, str | float | None]]] = []
        self._unsure: list[tuple[float, str, dict[str, str | float | None]]] = []

    @property
    def rows(self) -> int:
        return self.accepted + self.rejected.total()

    def accept(self, row: Example, label: TeacherLabel) -> None:
        self.accepted += 1
        self.soft += label.distribution is not None
        self._letters[label.answer] += 1
        confidence = 1.0 if label.confidence is None else label.confidence
        if row.answer_key:
            right = label.answer == row.answer_key
            self._gold_rows += 1
            self._right += right
            if label.confidence is not None:
                found = self._bins[min(int(confidence * _BINS), _BINS - 1)]
                found[0] += 1
                found[1] += confidence
                found[2] += right
            if not right:
                self._keep(self._wrong, confidence, row, label, "sure, and gold says otherwise")
        if label.confidence is not None and confidence < 1:
            self._keep(self._unsure, -confidence, row, label, "unsure")

    def reject(self, reason: str) -> None:
        self.rejected[reason] += 1

    def drop(self, label: TeacherLabel, reason: str) -> None:
        """Takes back an accepted label; what it told of the teacher stands."""
        self.accepted -= 1
        self.soft -= label.distribution is not None
        self._letters[label.answer] -= 1
        self.reject(reason)

    def _keep(
        self,
        heap: list[tuple[float, str, dict[str, str | float | None]]],
        weight: float,
        row: Example,
        label: TeacherLabel,
        why: str,
    ) -> None:
        values = {
            "example_id": row.example_id,
            "why": why,
            "question": row.question,
            "teacher": label.answer,
        }
        entry = (
            weight,
            row.example_id,
            values | {"gold": row.answer_key, "confidence": label.confidence},
        )
        (heapq.heappushpop if len(heap) == _LOOK_ROWS else heapq.heappush)(heap, entry)

    def report(self) -> LabelReport:
        bins = tuple(
            Bin(
                low=at / _BINS,
                high=(at + 1) / _BINS,
                rows=rows,
                confidence=total / rows,
                accuracy=right / rows,
            )
            for at, (rows, total, right) in enumerate(self._bins)
            if rows
        )
        judged = sum(one.rows for one in bins)
        error = (
            sum(one.rows * abs(one.confidence - one.accuracy) for one in bins) / judged
            if judged
            else None
        )
        return LabelReport(
            accepted=self.accepted,
            rejected=dict(self.rejected.most_common()),
            letters=dict(sorted((+self._letters).items())),
            soft=self.soft,
            gold_rows=self._gold_rows,
            right=self._right,
            interval=wilson(self._right, self._gold_rows) if self._gold_rows else None,
            calibration=bins,
            calibration_error=error,
        )

    def write(self, out: Path) -> None:
        """report.json, look.jsonl (the surest wrong labels, then the least sure) and, where there is what to plot,
        reliability.png. Equal labels give equal bytes."""
        report = self.report()
        (out / REPORT_FILE).write_text(report.model_dump_json(indent=1))
        with (out / LOOK_FILE).open("w", encoding="utf-8", newline="\n") as file:
            for heap in (self._wrong, self._unsure):
                for _, _, values in sorted(heap, key=lambda entry: entry[:2], reverse=True):
                    file.write(json.dumps(values, ensure_ascii=False) + "\n")
        if report.calibration:
            _plot(report.calibration, out / RELIABILITY_FILE)


def read_report(folder: Path) -> LabelReport:
    return LabelReport.model_validate_json((folder / REPORT_FILE).read_text())


def _plot(bins: tuple[Bin, ...], path: Path) -> None:
    """A reliability diagram: confidence against accuracy, each point as large as its share of the rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    largest = max(one.rows for one in bins)
    sizes = [20 + 180 * one.rows / largest for one in bins]
    axes.scatter(
        [one.confidence for one in bins], [one.accuracy for one in bins], s=sizes, zorder=3
    )
    for one in bins:
        axes.annotate(
            str(one.rows),
            (one.confidence, one.accuracy),
            xytext=(8, -4),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set(
        xlabel="confidence of the label",
        ylabel="share that gold confirms",
        xlim=(0, 1.05),
        ylim=(0, 1.05),
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
