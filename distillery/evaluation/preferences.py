"""What a judge says of the student's texts beside the teacher's: preferences.jsonl and its figures.

A judge prefers positions, so that it is shown each pair of answers in both orders. The student wins
or loses a row only if both orders say so, else the row is a tie (Zheng et al., Judging LLM-as-a-
Judge with MT-Bench and Chatbot Arena, NeurIPS 2023, section 3.4).
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from pydantic import ValidationError

from distillery.errors import DataError
from distillery.evaluation.report import write_text
from distillery.evaluation.statistics import win_rate_interval
from distillery.labels.files import LabelCounts, read_labels, read_rejected
from distillery.labels.labelling import Progress, Slots, label
from distillery.labels.pairs import Pair, both_orders, rows_for_judge
from distillery.labels.quote import quote
from distillery.labels.store import LabelStore
from distillery.recipe import JUDGE, JudgeRecipe, PromptRecipe
from distillery.records import Estimate, EvaluationReport, PreferenceFigures, Record
from distillery.teacher.endpoint import Endpoint
from distillery.teacher.ledger import Payer

_log = logging.getLogger(__name__)

PREFERENCES_FILE = "preferences.jsonl"

Result = Literal["win", "tie", "loss"]
"""Of the student."""

STUDENT_FIRST: dict[str, Result] = {"A": "win", "B": "loss", "C": "tie"}
TEACHER_FIRST: dict[str, Result] = {"A": "loss", "B": "win", "C": "tie"}
"""What the judge's letters say of the student in each order; see pairs.VERDICTS."""


class Preference(Record):
    """A line of preferences.jsonl. `outcome`: of the student's answer beside the teacher's; None
    where the judge gave no answer, for `reason`. `orders`: what the judge said with the student's
    answer first and with the teacher's first; empty where it was not asked, for `reason`."""

    example_id: str
    outcome: Result | None
    orders: tuple[Result | None, ...] = ()
    reason: str = ""

    @property
    def in_words(self) -> str:
        """What the judge prefers, for people."""
        preferred = {"win": "student", "loss": "teacher", "tie": "neither", None: "left out"}
        reason = self.reason
        if self.outcome and len(set(self.orders)) > 1:
            reason = "the orders disagree"
        return f"{preferred[self.outcome]}: {reason}" if reason else preferred[self.outcome]


async def compare_pairs(
    pairs: Sequence[Pair],
    prompt: PromptRecipe,
    judge: JudgeRecipe,
    endpoint: Endpoint,
    store: LabelStore,
    out: Path,
    progress: Progress | None = None,
    *,
    slots: Slots = nullcontext,
    payer: Payer | None = None,
) -> tuple[PreferenceFigures, LabelCounts]:
    """Have a judge compare pairs of answers, write preferences.jsonl into the folder `out`, and
    return the figures and what was paid.

    The judge is asked as a teacher is that labels the rows of `pairs.rows_for_judge`; all
    arguments from `judge` on are as in `labelling.label`, which says what is raised. `prompt` is
    what the teacher was asked with."""
    rows = list(rows_for_judge(pairs, prompt))
    counts = LabelCounts(accepted=0, rejected=0)
    letters: dict[str, str] = {}
    reasons: dict[str, str] = {}
    if rows:
        quoted = quote(rows, judge.prompt, judge, endpoint.identity, store, payer=payer)
        _log.info("%s", quoted.line())
        # The files of a labelling are read and left.
        with TemporaryDirectory(dir=out.parent) as folder:
            labels = Path(folder) / "labels"
            counts = await label(
                rows,
                judge.prompt,
                judge,
                endpoint,
                store,
                labels,
                progress,
                slots=slots,
                payer=payer,
                purpose="judge",
            )
            for example_id, found in read_labels(labels).items():
                letters[example_id] = found.answer
            reasons = read_rejected(labels)
    preferences = preferences_of(pairs, letters, reasons)
    lines = [f"{each.model_dump_json()}\n" for each in preferences]
    write_text(out / PREFERENCES_FILE, "".join(lines))
    return preference_figures(endpoint.identity.removeprefix(JUDGE), preferences), counts


def preferences_of(
    pairs: Sequence[Pair], letters: Mapping[str, str], reasons: Mapping[str, str]
) -> list[Preference]:
    """Return what a judge prefers of each pair. `letters` are its answers by the ids of
    `pairs.both_orders`, and `reasons` why it gave none."""
    found = []
    for pair in pairs:
        example_id = pair.row.example_id
        if pair.student is None:
            reason = "no answer of the student"
            found.append(Preference(example_id=example_id, outcome="loss", reason=reason))
            continue
        if not pair.is_asked:
            reason = "equal answers"
            found.append(Preference(example_id=example_id, outcome="tie", reason=reason))
            continue
        ids = both_orders(example_id)
        said = []
        for order, meaning in zip(ids, (STUDENT_FIRST, TEACHER_FIRST), strict=True):
            said.append(meaning[letters[order]] if order in letters else None)
        missing = [reasons.get(order, "") for order in ids if order not in letters]
        outcome: Result | None = None
        if not missing:
            outcome = said[0] if said[0] == said[1] else "tie"
        found.append(
            Preference(
                example_id=example_id,
                outcome=outcome,
                orders=tuple(said),
                reason=missing[0] if missing else "",
            )
        )
    return found


def preference_figures(judge: str, preferences: Sequence[Preference]) -> PreferenceFigures:
    """Return how often the judge prefers which answers."""
    outcomes = Counter(each.outcome for each in preferences)
    left_out = Counter(each.reason for each in preferences if each.outcome is None)
    compared = [each for each in preferences if each.orders and each.outcome]
    wins, ties, losses = (outcomes[each] for each in ("win", "tie", "loss"))
    rows, rate = wins + ties + losses, None
    if rows:
        interval = win_rate_interval(wins, ties, losses)
        rate = Estimate(value=(wins + ties / 2) / rows, low=interval.low, high=interval.high)
    return PreferenceFigures(
        judge=judge,
        wins=wins,
        ties=ties,
        losses=losses,
        win_rate=rate,
        compared=len(compared),
        disagree=sum(each.orders[0] != each.orders[1] for each in compared),
        left_out=dict(left_out.most_common()),
    )


def with_preferences(report: EvaluationReport, figures: PreferenceFigures) -> EvaluationReport:
    """Return a report whose candidate has a judge's figures."""
    rows = []
    for row in report.scoreboard:
        if row.name == report.candidate and row.figures:
            own = row.figures.model_copy(update={"preferences": figures})
            row = row.model_copy(update={"figures": own})
        rows.append(row)
    return report.model_copy(update={"scoreboard": tuple(rows)})


def read_preferences(folder: Path) -> dict[str, Preference]:
    """Return the lines of a folder's preferences.jsonl by example_id. Raises DataError."""
    path = folder / PREFERENCES_FILE
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        found = [Preference.model_validate_json(line) for line in lines if line]
    except (OSError, ValidationError) as error:
        raise DataError(
            f"{path}: can't be read ({type(error).__name__}); ask the judge again with "
            '--refresh "ask judge"'
        ) from error
    return {each.example_id: each for each in found}
