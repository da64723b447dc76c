"""What came of the teacher's answers, what they cost and what was saved, in words."""

from collections import Counter
from collections.abc import Iterator

from distillery.labels.report import LabelReport
from distillery.records import CascadeFigures, Selection, TeacherLabels


def labelling_facts(
    labels: TeacherLabels, report: LabelReport, selection: Selection | None = None
) -> list[tuple[str, str]]:
    """Return name and figure of what is known of a labelling. `selection`: the rows that were
    labelled; None for all."""
    facts = [("accepted", f"{report.accepted:,}")]
    facts += [(f"rejected: {reason}", f"{count:,}") for reason, count in report.rejected.items()]
    for letter, count in report.letters.items():
        facts.append((f"answer {letter}", f"{count / report.accepted:.1%}"))
    if report.lengths:
        lengths = report.lengths
        figures = f"{lengths.shortest:,} to {lengths.longest:,}, {lengths.mean:,.0f} on average"
        facts.append(("characters of an answer", figures))
    if report.interval and report.accuracy is not None:
        interval = f"[{report.interval.low:.3f}, {report.interval.high:.3f}]"
        name = f"right, of {report.gold_rows:,} with a gold answer"
        facts.append((name, f"{report.accuracy:.3f} {interval}"))
    if report.calibration_error is not None:
        facts.append(("expected calibration error", f"{report.calibration_error:.3f}"))
    calls: Counter[str] = Counter()
    for each in labels.paid:
        calls[each.outcome] += each.calls
    facts.append(("calls", f"{labels.calls:,}"))
    facts += [(f"calls: {outcome}", f"{count:,}") for outcome, count in calls.most_common()]
    if estimated := sum(each.estimated for each in labels.paid):
        facts.append(("calls whose tokens are estimated", f"{estimated:,}"))
    facts.append(("tokens in", f"{labels.usage.prompt_tokens:,}"))
    if labels.usage.cached_tokens:
        facts.append(("of these cached", f"{labels.usage.cached_tokens:,}"))
    facts.append(("tokens out", f"{labels.usage.completion_tokens:,}"))
    if labels.cost is not None:
        facts.append(("cost", f"{labels.cost:.2f} {labels.currency}"))
    facts += savings(labels, selection)
    if labels.calls_per_second:
        rates = ", ".join(f"{rate:.0f}" for rate in labels.calls_per_second)
        facts.append(("calls a second, over the run", rates))
    return facts


def savings(labels: TeacherLabels, selection: Selection | None) -> Iterator[tuple[str, str]]:
    """Yield name and figure of what made a labelling cheaper, with what it saved."""
    each = labels.cost / labels.calls if labels.cost is not None and labels.calls else None
    if labels.cached_saved is not None:
        yield "saved by cached tokens", f"{labels.cached_saved:.2f} {labels.currency}"
    if labels.equal:
        saved = f", about {labels.equal * each:.2f} {labels.currency}" if each is not None else ""
        yield "saved by asking equal rows once", f"{labels.equal:,} calls{saved}"
    if labels.cascade:
        yield from cascade_facts(labels.cascade, labels.currency)
    if selection:
        yield "rows chosen", selection.line()
        left_out = selection.of - selection.chosen.rows
        # What this run paid for a row that it added.
        added = selection.chosen.rows - selection.kept
        if labels.cost and added:
            saved = f"about {left_out * labels.cost / added:.2f} {labels.currency}"
            yield "saved by choosing rows", f"{saved}: {left_out:,} rows were not asked"


def cascade_facts(found: CascadeFigures, currency: str) -> Iterator[tuple[str, str]]:
    """Yield name and figure of what two teachers did, one after the other."""
    yield f"labels of {found.cheap}, {found.below:g} or surer", f"{found.cheap_rows:,}"
    yield "rows left to the teacher", f"{found.dear_rows:,}"
    if found.compared:
        share = found.agreed / found.compared
        yield f"of {found.compared:,} rows that both answered, they agree on", f"{share:.1%}"
    for who, calls, cost in (
        (found.cheap, found.cheap_asked, found.cheap_cost),
        ("the teacher", found.dear_asked, found.dear_cost),
    ):
        paid = "" if cost is None else f", {cost:.2f} {currency}"
        yield f"calls of {who}", f"{calls:,}{paid}"
    if found.saved is not None:
        yield "saved against the teacher alone", f"about {found.saved:.2f} {currency}"
