"""Two teachers, one after the other: a cheap one labels every row, and the teacher itself only
those of which the cheap one is not sure (Chen, Zaharia, Zou, FrugalGPT, 2023).

Each labels as if it were alone, so that its answers are stored under its own name, and files of its
own are written. Then the files of the run are written from both, row by row.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from distillery.errors import DataError
from distillery.labels.files import (
    LABELS_FILE,
    REJECTED_FILE,
    LabelCounts,
    label_files,
    open_lines,
)
from distillery.labels.labelling import Progress, Slots, label
from distillery.labels.quote import quote
from distillery.labels.store import LabelStore
from distillery.recipe import CascadeRecipe, FilterRecipe, PromptRecipe, TeacherRecipe
from distillery.records import CascadeFigures, Example, RejectedLabel, TeacherLabel, Usage
from distillery.teacher.budget import cost_of
from distillery.teacher.endpoint import Endpoint
from distillery.teacher.identity import refuse_one_identity
from distillery.teacher.ledger import Payer, Purpose

_log = logging.getLogger(__name__)

T = TypeVar("T", TeacherLabel, RejectedLabel)

Rows = Callable[[], Iterable[Example]]
"""Returns the rows anew, always in the same order."""


async def label_in_cascade(
    rows: Rows,
    prompt: PromptRecipe,
    recipe: TeacherRecipe,
    cheap: CascadeRecipe,
    endpoint: Endpoint,
    cheap_endpoint: Endpoint,
    store: LabelStore,
    out: Path,
    progress: Progress | None = None,
    *,
    count: int,
    slots: Slots = nullcontext,
    cheap_slots: Slots = nullcontext,
    payer: Payer | None = None,
    purpose: Purpose = "label",
) -> LabelCounts:
    """Label rows by the teacher `cheap` and, where it is not sure, by that of `recipe`, and write
    to `out` what `labelling.label` writes. Return the counts of both.

    `count`: how many rows there are. The ledger has the calls of both as those of `payer` for
    `purpose`, and the budget is that of both. Raises RecipeError where both have one identity, and
    what `labelling.label` raises."""
    refuse_one_identity(endpoint.identity, cheap_endpoint.identity)
    payer = payer or Payer()
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        first, second = Path(folder) / "cheap", Path(folder) / "dear"
        by_cheap = await label(
            rows(),
            prompt,
            cheap.model_copy(update={"filters": FilterRecipe(minimum_accepted=0)}),
            cheap_endpoint,
            store,
            first,
            progress,
            rows=count,
            slots=cheap_slots,
            payer=payer,
            purpose=purpose,
        )
        # Filters are for the labels of both together, and so is the share that must be accepted.
        least = FilterRecipe(minimum_accepted=0)
        alone = recipe.model_copy(update={"cascade": None, "filters": least})
        hard = sum(1 for _ in hard_rows(rows, first, cheap))
        by_dear = LabelCounts(accepted=0, rejected=0)
        if hard:
            left, name = hard_rows(rows, first, cheap), endpoint.identity
            told = quote(left, prompt, alone, name, store, payer=payer)
            _log.info("%d of %d rows are left to the teacher: %s", hard, count, told.line())
            by_dear = await label(
                hard_rows(rows, first, cheap),
                prompt,
                alone,
                endpoint,
                store,
                second,
                progress,
                rows=hard,
                slots=slots,
                payer=payer,
                purpose=purpose,
                judged=False,
            )
        with label_files(out, prompt, recipe) as files:
            merge = Merge(cheap.below, recipe.soft_labels)
            dear_results = results(hard_rows(rows, first, cheap), second)
            for row, found in zip(rows(), results(rows(), first), strict=True):
                chosen = merge.choose(found, dear_results)
                if isinstance(chosen, TeacherLabel):
                    files.accept(row, chosen)
                else:
                    files.reject(row, chosen.reason, chosen.raw)
            files.finish()
    costs = (by_cheap.cost, by_dear.cost if hard else cost_of(Usage(), recipe.prices))
    saved_by_cache = [each.cached_saved for each in (by_cheap, by_dear) if each.cached_saved]
    return LabelCounts(
        accepted=files.tally.accepted,
        rejected=files.tally.rejected.total(),
        asked=by_cheap.asked + by_dear.asked,
        usage=by_cheap.usage + by_dear.usage,
        cost=None if None in costs else sum(cost for cost in costs if cost),
        currency=by_cheap.currency or by_dear.currency,
        paid=by_cheap.paid + by_dear.paid,
        equal=by_cheap.equal + by_dear.equal,
        cached_saved=sum(saved_by_cache) if saved_by_cache else None,
        cascade=CascadeFigures(
            cheap=cheap_endpoint.identity,
            below=cheap.below,
            cheap_rows=count - hard,
            dear_rows=hard,
            compared=merge.compared,
            agreed=merge.agreed,
            cheap_asked=by_cheap.asked,
            dear_asked=by_dear.asked,
            cheap_cost=costs[0],
            dear_cost=costs[1],
            saved=merge.saved(count - hard, recipe, cheap),
        ),
    )


Result = TeacherLabel | RejectedLabel
"""What came of a row."""


def sure_label(found: Result, below: float) -> TeacherLabel | None:
    """Return the cheap teacher's label of a row; None where it is not sure enough, so that the
    teacher itself is to be asked."""
    if isinstance(found, RejectedLabel) or found.confidence is None:
        return None
    return found if found.confidence >= below else None


def hard_rows(rows: Rows, cheap_labels: Path, cheap: CascadeRecipe) -> Iterator[Example]:
    """Yield the rows that the teacher is asked about, given the folder of the cheap one's
    labels."""
    for row, found in zip(rows(), results(rows(), cheap_labels), strict=True):
        if sure_label(found, cheap.below) is None:
            yield row


def results(rows: Iterable[Example], folder: Path) -> Iterator[Result]:
    """Yield what came of each row, in order, from the folder of a labelling of these rows whose
    labels were not balanced. Raises DataError where the folder has nothing of a row."""
    labels = lines_of(folder / LABELS_FILE, TeacherLabel)
    rejected = lines_of(folder / REJECTED_FILE, RejectedLabel)
    label, rejection = next(labels, None), next(rejected, None)
    for row in rows:
        if label and label.example_id == row.example_id:
            yield label
            label = next(labels, None)
        elif rejection and rejection.example_id == row.example_id:
            yield rejection
            rejection = next(rejected, None)
        else:
            raise DataError(f"{row.example_id}: neither labelled nor rejected; label again")


def lines_of(path: Path, kind: type[T]) -> Iterator[T]:
    """Yield the records of class `kind` in the lines of a file."""
    with open_lines(path) as lines:
        yield from map(kind.model_validate_json, lines)


@dataclass
class Merge:
    """The choice between the results of both teachers, and what it counts. `below`: the bound on
    the cheap one's confidence. `soft`: whether labels keep their probabilities."""

    below: float
    soft: bool
    compared: int = 0
    agreed: int = 0
    dear_answers: int = 0
    cheap_usage: Usage = field(default_factory=Usage)
    dear_usage: Usage = field(default_factory=Usage)

    def choose(self, found: Result, dear: Iterator[Result]) -> Result:
        """Return the result for a row whose cheap one is `found`; where the teacher was asked, it
        is the next of `dear`."""
        if isinstance(found, TeacherLabel):
            self.cheap_usage = self.cheap_usage + found.usage
        sure = sure_label(found, self.below)
        if sure:
            return sure if self.soft else sure.model_copy(update={"distribution": None})
        chosen = next(dear)
        if isinstance(chosen, TeacherLabel):
            self.dear_answers += 1
            self.dear_usage = self.dear_usage + chosen.usage
            if isinstance(found, TeacherLabel):
                self.compared += 1
                self.agreed += found.answer == chosen.answer
                both = found.usage + chosen.usage
                chosen = chosen.model_copy(update={"usage": both})
        return chosen

    def saved(self, spared: int, recipe: TeacherRecipe, cheap: CascadeRecipe) -> float | None:
        """Return about what the teacher's answers to the `spared` rows would have cost, less what
        the cheap one's cost, by the tokens of the labels; None without prices.

        Where the teacher has answered nothing, its answers are taken to be as long as the cheap
        one's."""
        all_cheap = cost_of(self.cheap_usage, cheap.prices)
        if all_cheap is None or recipe.prices is None:
            return None
        if not self.dear_answers:
            return (cost_of(self.cheap_usage, recipe.prices) or 0.0) - all_cheap
        each = (cost_of(self.dear_usage, recipe.prices) or 0.0) / self.dear_answers
        return each * spared - all_cheap
