"""The report on a set of labels: how many there are, of which letters, how often gold confirms
them, how well their confidence is calibrated, and which rows are worth a look. Of written answers
there are lengths instead of letters, and gold confirms those of a schema alone: two texts may say
the same.

- report.json: a LabelReport
- look.jsonl: the most confident labels that gold contradicts, then the least confident labels;
  example_id, why, question, teacher (letter), gold (letter or null), confidence (0 to 1 or null)
- reliability.png: confidence against accuracy, if both are known of any label
"""

import heapq
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from distillery.answers import UNMET
from distillery.records import Bin, Example, Interval, Record, TeacherLabel

REPORT_FILE, LOOK_FILE, RELIABILITY_FILE = "report.json", "look.jsonl", "reliability.png"

BINS = 10

LOOK_ROWS = 50
"""Rows of either kind in look.jsonl."""

LookRow = tuple[float, str, dict[str, str | float | None]]
"""The weight of a row (the highest are kept), its id, and its line in look.jsonl."""


class Lengths(Record):
    """The lengths of written answers, in characters."""

    shortest: int
    mean: float
    longest: int


class LabelReport(Record):
    """Counts of labels, and how far they can be trusted.

    letters: labels by letter. lengths: of written answers. references: further texts of the labels,
    which are learnt too. soft: labels with probabilities, of their letters or their tokens.
    gold_rows: labels of rows with a gold answer, which confirms `right` of them; labels that
    teacher.filters reject are among these. interval: the 95 % interval of right / gold_rows.
    calibration_error: the mean distance between confidence and accuracy over ten bins, weighted by
    rows (the expected calibration error of Guo et al., On Calibration of Modern Neural Networks,
    2017); None if no label has a confidence.
    """

    accepted: int
    rejected: dict[str, int]
    letters: dict[str, int]
    lengths: Lengths | None = Field(None, exclude_if=lambda lengths: lengths is None)
    references: int = Field(0, exclude_if=lambda references: not references)
    soft: int = 0
    gold_rows: int
    right: int
    interval: Interval | None = None
    calibration: tuple[Bin, ...] = ()
    calibration_error: float | None = None

    @property
    def accuracy(self) -> float | None:
        """Return the share of labels that gold confirms (0 to 1); None if no gold is known."""
        return self.right / self.gold_rows if self.gold_rows else None

    def line(self) -> str:
        """Return the report in one line."""
        letters = ", ".join(f"{letter} {count}" for letter, count in self.letters.items())
        if self.lengths:
            shortest, longest = self.lengths.shortest, self.lengths.longest
            letters = f"of {shortest} to {longest} characters, {self.lengths.mean:.0f} on average"
        if self.references:
            letters = f"{self.accepted + self.references} texts {letters}"
        line = f"{self.accepted} accepted ({letters})"
        if 0 < self.soft < self.accepted:
            line += f", {self.soft} with probabilities"
        if self.rejected:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in self.rejected.items())
            line += f"; rejected: {reasons}"
        if self.accuracy is not None:
            line += f"; {self.accuracy:.1%} right of {self.gold_rows} with a gold answer"
        if self.calibration_error is not None:
            line += f", calibration error {self.calibration_error:.3f}"
        return line


class Tally:
    """Counts a run's labels one by one; its memory does not grow with them. `rows`: the rows so
    far, accepted and rejected."""

    def __init__(self) -> None:
        self.rows = self.accepted = self.soft = 0
        self.rejected: Counter[str] = Counter()
        self._letters: Counter[str] = Counter()
        self._lengths: Counter[int] = Counter()
        self._references = self._gold_rows = self._right = 0
        # For each bin of confidence: rows, the sum of their confidences, rows that are right.
        self._bins = [[0, 0.0, 0] for _ in range(BINS)]
        self._wrong: list[LookRow] = []
        self._unsure: list[LookRow] = []

    def accept(self, row: Example, label: TeacherLabel, soft: bool) -> None:
        """Count a label, and what it tells about the teacher. `soft`: whether it has
        probabilities."""
        self.rows += 1
        self.accepted += 1
        self.soft += soft
        if row.format:
            self._lengths.update(map(len, label.answers))
            self._references += len(label.references)
        else:
            self._letters[label.answer] += 1
        confidence = 1.0 if label.confidence is None else label.confidence
        if row.answer_key and not row.writes_text:
            right = label.answer in row.right_answers
            self._gold_rows += 1
            self._right += right
            if label.confidence is not None:
                counts = self._bins[min(int(confidence * BINS), BINS - 1)]
                counts[0] += 1
                counts[1] += confidence
                counts[2] += right
            if not right:
                keep_highest(self._wrong, confidence, row, label, "sure, and gold says otherwise")
        if confidence < 1:
            keep_highest(self._unsure, -confidence, row, label, "unsure")

    def reject(self, reason: str) -> None:
        """Count a row without a label. What of an answer does not meet its schema is not told
        apart."""
        self.rows += 1
        self.rejected[UNMET if reason.startswith(UNMET) else reason] += 1

    def drop(self, label: TeacherLabel, reason: str, soft: bool) -> None:
        """Count an accepted label as rejected; what it told about the teacher stands. `soft` as in
        `accept`."""
        self.rows -= 1
        self.accepted -= 1
        self.soft -= soft
        if self._lengths:
            self._lengths.subtract(map(len, label.answers))
            self._references -= len(label.references)
        else:
            self._letters[label.answer] -= 1
        self.reject(reason)

    def report(self) -> LabelReport:
        """Return the report on what was counted."""
        bins = []
        for number, (rows, confidence, right) in enumerate(self._bins):
            if rows:
                group = Bin(
                    low=number / BINS,
                    high=(number + 1) / BINS,
                    rows=int(rows),
                    confidence=confidence / rows,
                    accuracy=right / rows,
                )
                bins.append(group)
        interval = None
        if self._gold_rows:
            interval = wilson_interval(self._right, self._gold_rows)
        calibration_error = None
        if bins:
            calibration_error = expected_calibration_error(bins)
        return LabelReport(
            accepted=self.accepted,
            rejected=dict(self.rejected.most_common()),
            letters=dict(sorted((+self._letters).items())),
            lengths=lengths_of(+self._lengths),
            references=self._references,
            soft=self.soft,
            gold_rows=self._gold_rows,
            right=self._right,
            interval=interval,
            calibration=tuple(bins),
            calibration_error=calibration_error,
        )

    def write(self, out: Path) -> None:
        """Write report.json, look.jsonl and, if there are bins to plot, reliability.png to `out`.
        Equal labels give equal bytes."""
        report = self.report()
        (out / REPORT_FILE).write_text(report.model_dump_json(indent=1), "utf-8", newline="\n")
        with (out / LOOK_FILE).open("w", encoding="utf-8", newline="\n") as file:
            for kept in (self._wrong, self._unsure):
                for _, _, line in sorted(kept, key=lambda entry: entry[:2], reverse=True):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if report.calibration:
            plot_reliability(report.calibration, out / RELIABILITY_FILE)


def lengths_of(counts: Counter[int]) -> Lengths | None:
    """Return the lengths that are counted by length; None where there are none."""
    if not counts:
        return None
    mean = sum(length * count for length, count in counts.items()) / counts.total()
    return Lengths(shortest=min(counts), mean=mean, longest=max(counts))


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Return the mean distance between confidence and accuracy over the rows of one or more bins
    (Guo et al., On Calibration of Modern Neural Networks, ICML 2017)."""
    distance = sum(group.rows * abs(group.confidence - group.accuracy) for group in bins)
    return distance / sum(group.rows for group in bins)


def keep_highest(
    kept: list[LookRow], weight: float, row: Example, label: TeacherLabel, why: str
) -> None:
    """Add a row to the heap `kept`, which holds the LOOK_ROWS of the highest weight."""
    line = {
        "example_id": row.example_id,
        "why": why,
        "question": row.question,
        "teacher": label.answer,
        "gold": row.answer_key,
        "confidence": label.confidence,
    }
    entry = (weight, row.example_id, line)
    if len(kept) < LOOK_ROWS:
        heapq.heappush(kept, entry)
    else:
        heapq.heappushpop(kept, entry)


def wilson_interval(right: int, rows: int) -> Interval:
    """Return the 95 % score interval of a share of `rows` (1 or more), in [0, 1] (Wilson, Probable
    inference, the law of succession, and statistical inference, JASA 22, 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(right, rows).proportion_ci(method="wilson")
    return Interval(low=float(interval.low), high=float(interval.high))


def read_report(folder: Path) -> LabelReport:
    """Read the report in the folder of a labelling."""
    return LabelReport.model_validate_json((folder / REPORT_FILE).read_text("utf-8"))


def plot_reliability(bins: tuple[Bin, ...], path: Path) -> None:
    """Draw a reliability diagram: the larger a bin's share of the rows, the larger its point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    confidences, accuracies, sizes = [], [], []
    largest = max(group.rows for group in bins)
    for group in bins:
        confidences.append(group.confidence)
        accuracies.append(group.accuracy)
        sizes.append(20 + 180 * group.rows / largest)
    axes.scatter(confidences, accuracies, s=sizes, zorder=3)
    for group in bins:
        point = (group.confidence, group.accuracy)
        axes.annotate(
            str(group.rows), point, xytext=(8, -4), textcoords="offset points", fontsize=8
        )
    axes.set(
        xlabel="confidence of the label",
        ylabel="share that gold confirms",
        xlim=(0, 1.05),
        ylim=(0, 1.05),
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
