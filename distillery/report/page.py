"""Write the page of a run: one HTML file that opens offline and asks for nothing.

Every text is escaped by Jinja, and the page's own policy lets no other script run than the one that
is written into it, nor any request be made.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from distillery.evaluation import scoreboard, verdicts
from distillery.evaluation.advice import advice_of
from distillery.evaluation.figures_table import (
    COVERAGE_COLUMNS,
    FIELD_COLUMNS,
    MOST_CONFUSED,
    coverage_cells,
    field_cells,
    written_table,
)
from distillery.evaluation.linear_probe import PROBE
from distillery.evaluation.preferences import Preference, read_preferences
from distillery.evaluation.report import write_text
from distillery.export import ladder_table
from distillery.labels.report import LabelReport
from distillery.recipe import METRIC_NAMES
from distillery.records import (
    LETTERS,
    CallTotal,
    Confusion,
    Estimate,
    Figures,
    Ladder,
    OrderRobustness,
    Outcome,
    Preferences,
    ScoreRow,
)
from distillery.report.charts import (
    PERCENTILES,
    plot_accuracy,
    plot_coverage,
    plot_curve,
    plot_forms,
    plot_latency,
    plot_reliability,
)
from distillery.report.differences import Piece, pieces
from distillery.report.evaluated import (
    AnsweredRow,
    ChampionAnswers,
    Evaluated,
    read_evaluation,
)
from distillery.report.facts import labelling_facts

PAGE_FILE = "report.html"

SHOWN_ROWS = 2000
"""Rows in the page. Of more rows, those that somebody answers otherwise than gold come first."""

SHOWN_DOUBTFUL = 100
"""Doubtful labels in the page. All are in the evaluation's doubtful.csv."""

NONE = "none"
"""Stands for a row without an answer in the page's filters."""

HERE = Path(__file__).parent


@dataclass(frozen=True)
class StageLine:
    """A stage of the run: its figures in words, the seconds that its work took, and the run that
    did it."""

    name: str
    figures: str
    seconds: float
    produced_by: str


@dataclass(frozen=True)
class Table:
    """A table of texts. The first cell of a row names the row."""

    caption: str
    titles: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """A chart, or None where there is nothing to draw, and the table with its figures."""

    title: str
    svg: str | None
    table: Table | None


@dataclass(frozen=True)
class BrowsedRow:
    """A row of the error browser. `champion`: its letter, or None if it was not asked.
    `confidence`: the student's. Where answers are written, they are texts, `confidence` is the
    score of the student's, `reasons` tell by who was asked why there is none, and `preference` is a
    judge's, or None where it compared other rows."""

    row: AnsweredRow
    teacher: str
    student: str
    champion: str | None
    confidence: float | None
    reasons: Mapping[str, str] = field(default_factory=dict)
    preference: Preference | None = None

    @property
    def is_wrong(self) -> bool:
        return self.student not in self.row.gold_answers

    @property
    def cells(self) -> dict[str, list[Piece]]:
        """The written answers by who gives them, each in pieces that gold has or lacks; none for a
        row without an answer."""
        answers = {"teacher": self.teacher, "student": self.student, "champion": self.champion}
        found = {}
        for name, answer in answers.items():
            known = answer not in (None, NONE)
            found[name] = pieces(str(answer), self.row.gold_answers) if known else []
        return found

    @property
    def differs(self) -> bool:
        """Whether student and teacher differ."""
        return self.student != self.teacher

    @property
    def has_changed(self) -> bool:
        """Whether the champion answers otherwise."""
        return self.champion not in (None, self.student)


def write_page(
    out: Path,
    outcome: Outcome,
    evaluation: Path,
    labels: LabelReport,
    verdict: str,
    stages: Sequence[StageLine],
    champion_answers: Path | None = None,
    preferences: Path | None = None,
) -> None:
    """Write report.html into the folder `out`.

    `evaluation` is the folder of the outcome's evaluation. `verdict` is the gate's decision in one
    line. `champion_answers`: the answers.jsonl of the champion that the gate compared with.
    `preferences`: the folder of a judge's. Raises DataError for a file that can't be read."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    evaluated = read_evaluation(evaluation)
    champion = ChampionAnswers(champion_answers) if champion_answers else None
    board, candidate = outcome.report.scoreboard, outcome.report.candidate
    preferred = read_preferences(preferences) if preferences else {}
    browsed = browsed_rows(evaluated, candidate, champion, preferred)
    letters = answered_letters(evaluated)
    script = (HERE / "filters.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html").render(
        outcome=outcome,
        verdict=verdict,
        advice=advice_of(outcome),
        headline=scoreboard.headline(board, candidate, evaluated.teacher),
        key_figures=key_figures(board, candidate, evaluated.teacher),
        rules=Table(
            "What the gate asked, and what it found",
            verdicts.TITLES,
            list(map(verdicts.table_cells, outcome.decision.verdicts)),
        ),
        scoreboard=scoreboard_table(board),
        primary=METRIC_NAMES[board[0].metric],
        written=evaluated.metric is not None,
        fields=field_table(evaluated, candidate),
        trade_offs=trade_offs(board),
        forms=forms(outcome.model.ladder),
        choice=choice_of_form(outcome.model.ladder),
        evaluated=evaluated,
        reliability=reliability(evaluated, candidate),
        coverage=coverage(evaluated, candidate),
        given=evaluated.figures[candidate].given if candidate in evaluated.figures else None,
        estimate=estimate,
        measures=measures(evaluated),
        classes=class_table(evaluated, candidate),
        confusion=confusion_of(evaluated, candidate),
        curve=training_curve(outcome),
        latency=latency(board, evaluated.figures),
        teacher=Table(
            f"Labels of {outcome.labels.teacher}",
            ("of the labels", "figure"),
            labelling_facts(outcome.labels, labels, outcome.selection),
        ),
        paid=paid_table(outcome.paid) if outcome.paid else None,
        judge=judge_table(outcome.preferences) if outcome.preferences else None,
        doubtful=doubtful_table(evaluated, candidate),
        browsed=browsed[:SHOWN_ROWS],
        rows=len(browsed),
        champion=champion is not None,
        letters=letters,
        texts={**dict(letters), NONE: "no answer"},
        no_answer=NONE,
        stages=stages,
        script=script,
        script_digest=b64encode(sha256(script.encode()).digest()).decode(),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
    )
    write_text(out / PAGE_FILE, text)


def key_figures(
    board: Sequence[ScoreRow], candidate: str, teacher: str
) -> list[tuple[str, str, str]]:
    """Return the candidate's primary figure, size and speed, and macro-F1 first where the classes
    are uneven: name, figure, and what it compares with."""
    ours = scoreboard.row_named(board, candidate)
    theirs = scoreboard.row_named(board, teacher)
    interval = f"95 % interval {ours.interval.low:.3f} to {ours.interval.high:.3f}"
    name = METRIC_NAMES[ours.metric]
    figures = [(name, f"{ours.accuracy:.3f}", interval)]
    if ours.figures and ours.figures.macro_f1 and ours.figures.uneven_classes:
        macro_f1 = ours.figures.macro_f1
        interval = f"95 % interval {macro_f1.low:.3f} to {macro_f1.high:.3f}"
        figures.insert(0, ("macro-F1", f"{macro_f1.value:.3f}", interval))
    if theirs.accuracy:
        share = scoreboard.percent(ours.accuracy / theirs.accuracy)
        figures.append((f"of the teacher's {name}", share, f"teacher {theirs.accuracy:.3f}"))
    if ours.bytes:
        than = f"teacher {theirs.bytes / 1e6:.0f} MB" if theirs.bytes else ""
        figures.append(("size", f"{ours.bytes / 1e6:.0f} MB", than))
    if ours.rows_per_second:
        than = f"teacher {theirs.rows_per_second:.1f}" if theirs.rows_per_second else ""
        if scoreboard.is_slowed(ours) or (than and scoreboard.is_slowed(theirs)):
            than = "; ".join(filter(None, (than, scoreboard.ON_BUSY_MACHINE)))
        figures.append(("rows a second", f"{ours.rows_per_second:.1f}", than))
    return figures


def scoreboard_table(board: Sequence[ScoreRow]) -> Table:
    """Return the scoreboard, whose columns are those of the terminal."""
    titles = scoreboard.one_line_titles(board)
    return Table("The scoreboard", titles, list(map(scoreboard.table_cells, board)))


def trade_offs(board: Sequence[ScoreRow]) -> list[Chart]:
    """Return the primary figure against size and against speed. Their table is the scoreboard."""
    charts = []
    name = METRIC_NAMES[board[0].metric]
    name = name[0].upper() + name[1:]
    for label, title in (("MB", f"{name} and size"), ("rows a second", f"{name} and speed")):
        figure_of = megabytes if label == "MB" else rows_per_second
        charts.append(Chart(title, plot_accuracy(board, figure_of, label, title), None))
    return charts


def forms(ladder: Ladder | None) -> Chart | None:
    """Return the size, speed and accuracy of the ladder's forms; None for a student that was
    exported without a ladder."""
    if ladder is None:
        return None
    title = "The student's forms"
    rows = ladder_table.table(ladder)
    cells = [list(row.values()) for row in rows]
    return Chart(
        title, plot_forms(ladder.rungs, ladder.metric, title), Table(title, list(rows[0]), cells)
    )


def choice_of_form(ladder: Ladder | None) -> str:
    """Return why the student has its form, and where the forms were timed; "" without a ladder, and
    for one of an earlier version."""
    if ladder is None or not ladder.reason:
        return ""
    return f"{ladder_table.choice_in_words(ladder)}. The forms were timed on {ladder.machine}."


def megabytes(row: ScoreRow) -> float | None:
    """Return the size of a predictor's folder in MB."""
    return row.bytes / 1e6 if row.bytes else None


def rows_per_second(row: ScoreRow) -> float | None:
    """Return how many rows a predictor answers in a second."""
    return row.rows_per_second


def reliability(evaluated: Evaluated, candidate: str) -> Chart | None:
    """Return the confidence of the student and the teacher against their accuracy."""
    bins, rows = {}, []
    for name in (candidate, evaluated.teacher):
        figures = evaluated.figures.get(name)
        if figures is None or figures.calibration is None:
            continue
        bins[name] = figures.calibration.bins
        for group in figures.calibration.bins:
            rows.append(
                [
                    name,
                    f"{group.low:.2f} to {group.high:.2f}",
                    f"{group.rows:,}",
                    f"{group.confidence:.3f}",
                    f"{group.accuracy:.3f}",
                ]
            )
    if not bins:
        return None
    title = "Confidence and accuracy"
    titles = ("predictor", "bin", "rows", "mean confidence", "accuracy")
    return Chart(title, plot_reliability(bins, title), Table(title, titles, rows))


def coverage(evaluated: Evaluated, candidate: str) -> Chart | None:
    """Return the accuracy of the student's most confident answers against their share of the
    rows; None for an evaluation of an earlier version."""
    figures = evaluated.figures.get(candidate)
    if figures is None or not figures.coverage:
        return None
    given = figures.given.coverage.value if figures.given else None
    title = "Accuracy of the most confident answers"
    table = Table(title, COVERAGE_COLUMNS, coverage_cells(figures))
    return Chart(title, plot_coverage(figures.coverage, given, title), table)


def measures(evaluated: Evaluated) -> Table:
    """Return each predictor's figures beyond the scoreboard."""
    rows = []
    if evaluated.metric:
        return Table("Figures with their 95 % intervals", *written_table(evaluated.figures))
    for name, figures in evaluated.figures.items():
        calibration, error = figures.calibration, None
        if calibration:
            error = Estimate(value=calibration.error, low=calibration.low, high=calibration.high)
        cells = [
            estimate(figures.macro_f1),
            estimate(error),
            estimate(figures.kl_from_teacher),
            estimate(figures.order_robustness),
        ]
        if any(cells):
            rows.append([name, *cells])
    titles = (
        "predictor",
        "macro-F1",
        "calibration error",
        "divergence from the teacher, nats",
        "answered alike in another order",
    )
    return Table("Figures with their 95 % intervals", titles, rows)


def field_table(evaluated: Evaluated, candidate: str) -> Table:
    """Return the student's figures of each field of its JSON objects."""
    figures = evaluated.figures.get(candidate)
    rows = field_cells(figures) if figures else []
    return Table("The student's figures of each field", FIELD_COLUMNS, rows)


def class_table(evaluated: Evaluated, candidate: str) -> Table:
    """Return the student's figures of each class."""
    rows = []
    figures = evaluated.figures.get(candidate)
    for each in figures.classes if figures else ():
        recall = Estimate(value=each.recall, low=each.recall_low, high=each.recall_high)
        rows.append(
            [each.label, f"{each.rows:,}", share(each.precision), estimate(recall), share(each.f1)]
        )
    titles = ("class", "rows", "precision", "recall [95 %]", "F1")
    return Table("The student's figures of each class", titles, rows)


def confusion_of(evaluated: Evaluated, candidate: str) -> Confusion | None:
    """Return the student's answers by gold answer; None for more classes than a table can show."""
    figures = evaluated.figures.get(candidate)
    if figures is None or figures.confusion is None:
        return None
    if len(figures.confusion.labels) > MOST_CONFUSED:
        return None
    return figures.confusion


def doubtful_table(evaluated: Evaluated, candidate: str) -> Table:
    """Return the rows whose labels may be wrong, with what contradicts them."""
    rows = []
    for row in (evaluated.doubtful or ())[:SHOWN_DOUBTFUL]:
        example = row.example
        opinions = []
        for name in (candidate, evaluated.teacher, PROBE):
            opinion = row.opinions.get(name)
            cell = ""
            if opinion is not None:
                cell = row.text_of(opinion.answer)
                if opinion.confidence is not None:
                    cell += f" ({opinion.confidence:.2f})"
            opinions.append(cell)
        text = example.question
        if len(text) > 300:
            text = f"{text[:300]}…"
        label = row.text_of(str(example.answer_key))
        suggested = row.text_of(row.suggested)
        rows.append([text, example.example_id, row.split, label, suggested, *opinions])
    titles = ("row", "id", "split", "label", "suggested", "student", "teacher", PROBE)
    return Table("Labels that are contradicted with confidence", titles, rows)


def training_curve(outcome: Outcome) -> Chart | None:
    """Return the loss of the student's training; None for a student without a curve."""
    curve, title = outcome.student.curve, "The student's training"
    if not curve:
        return None
    rows = []
    for point in curve:
        rows.append(
            [
                f"{point.step:,}",
                f"{point.loss:.4f}",
                share(point.validation_loss),
                share(point.validation_accuracy),
                share(point.validation_tokens),
            ]
        )
    titles = ["step", "training loss", "validation loss", "validation accuracy"]
    titles.append("share of tokens right")
    if all(point.validation_tokens is None for point in curve):
        titles, rows = titles[:-1], [row[:-1] for row in rows]
    return Chart(title, plot_curve(curve, title), Table(title, titles, rows))


def latency(board: Sequence[ScoreRow], figures: Mapping[str, Figures]) -> Chart | None:
    """Return the models' latencies; None where none was measured."""
    latencies: dict[str, tuple[float | None, ...]] = {}
    rows = []
    for row in board:
        if row.p50_ms is None:
            continue
        known = figures.get(row.name)
        p99 = known.p99_ms if known else None
        first_token = known.first_token_ms if known else None
        load = known.load_s if known else None
        latencies[row.name] = (row.p50_ms, row.p95_ms, p99)
        values = [*latencies[row.name], first_token]
        cells = ["" if value is None else f"{value:.1f}" for value in values]
        rows.append([row.name, *cells, "" if load is None else f"{load:.2f}"])
    if not latencies:
        return None
    title = "Latency of single rows"
    titles = (
        "predictor",
        *(f"{name}, ms" for name in PERCENTILES),
        "first token, ms",
        "load, s",
    )
    return Chart(title, plot_latency(latencies, title), Table(title, titles, rows))


def judge_table(found: Preferences) -> Table:
    """Return what a judge said of the student's texts beside the teacher's, and what it cost."""
    figures = found.figures
    rows = [
        ["judge", figures.judge],
        ["rows", f"{figures.rows:,}"],
        ["wins of the student", f"{figures.wins:,}"],
        ["ties", f"{figures.ties:,}"],
        ["losses of the student", f"{figures.losses:,}"],
        ["win rate, a tie counting as half a row", estimate(figures.win_rate)],
    ]
    if figures.disagreement is not None:
        asked = f"of {figures.compared:,} rows that it was asked about, its two orders disagree on"
        rows.append([asked, f"{figures.disagree:,} ({figures.disagreement:.1%})"])
    for reason, count in figures.left_out.items():
        rows.append([f"left out: {reason}", f"{count:,}"])
    rows.append(["answers", f"{found.asked:,}"])
    rows.append(["tokens in", f"{found.usage.prompt_tokens:,}"])
    rows.append(["tokens out", f"{found.usage.completion_tokens:,}"])
    if found.cost is not None:
        rows.append(["cost", f"{found.cost:.2f} {found.currency}"])
    return Table("The student's texts beside the teacher's", ("by the judge", "figure"), rows)


def paid_table(paid: Sequence[CallTotal]) -> Table:
    """Return all calls of the run by what they were for and what became of them."""
    rows = []
    for each in paid:
        usage = each.usage
        fresh = usage.prompt_tokens - usage.cached_tokens
        counts = (each.calls, each.estimated, fresh, usage.cached_tokens, usage.completion_tokens)
        cost = "" if each.cost is None else f"{each.cost:.4f} {each.currency}"
        name = f"{each.purpose}: {each.outcome}"
        rows.append([name, each.teacher, *(f"{count:,}" for count in counts), cost])
    titles = (
        *("for: outcome", "asked", "calls", "of these estimated", "tokens in, fresh", "cached"),
        *("tokens out", "cost"),
    )
    return Table("All calls of this run", titles, rows)


def browsed_rows(
    evaluated: Evaluated,
    candidate: str,
    champion: ChampionAnswers | None,
    preferred: Mapping[str, Preference],
) -> list[BrowsedRow]:
    """Return the test rows in their order; of more than SHOWN_ROWS, those first that student,
    teacher or champion answers otherwise than gold."""
    browsed = []
    for row in evaluated.rows:
        theirs = None
        if champion and champion.knows(row):
            theirs = champion.answer(row) or NONE
        browsed.append(
            BrowsedRow(
                row=row,
                teacher=row.answers.get(evaluated.teacher) or NONE,
                student=row.answers.get(candidate) or NONE,
                champion=theirs,
                confidence=row.confidence(candidate),
                reasons={
                    "student": row.no_answer.get(candidate, ""),
                    "teacher": row.no_answer.get(evaluated.teacher, ""),
                },
                preference=preferred.get(row.example_id),
            )
        )
    if len(browsed) > SHOWN_ROWS:
        browsed.sort(key=is_answered_alike)
    return browsed


def is_answered_alike(browsed: BrowsedRow) -> bool:
    """Return whether all answers to a row are right."""
    answers = {browsed.teacher, browsed.student, browsed.champion}
    return answers <= {*browsed.row.gold_answers, None}


def answered_letters(evaluated: Evaluated) -> list[tuple[str, str]]:
    """Return each letter of the test rows and what it is called: the option's text where all rows
    have the same options."""
    if evaluated.metric:
        return []
    if evaluated.shared_choices:
        return list(zip(evaluated.rows[0].keys, evaluated.shared_choices, strict=True))
    most = max((len(row.choices) for row in evaluated.rows), default=0)
    return [(letter, letter) for letter in LETTERS[:most]]


def share(value: float | None) -> str:
    """Return a figure with three digits; '' where there is none."""
    return "" if value is None else f"{value:.3f}"


def estimate(figure: Estimate | OrderRobustness | None) -> str:
    """Return a figure with its interval; '' where there is none."""
    if figure is None:
        return ""
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
