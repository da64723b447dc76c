"""What came of the teacher's answers and what they cost, in words."""

from collections import Counter

from distillery.labels.report import LabelReport
from distillery.records import TeacherLabels


def labelling_facts(labels: TeacherLabels, report: LabelReport) -> list[tuple[str, str]]:
    """Return name and figure of what is known of a labelling."""
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
    facts.append(("calls", f"{calls.total() if labels.paid else labels.asked:,}"))
    facts += [(f"calls: {outcome}", f"{count:,}") for outcome, count in calls.most_common()]
    if estimated := sum(each.estimated for each in labels.paid):
        facts.append(("calls whose tokens are estimated", f"{estimated:,}"))
    facts.append(("tokens in", f"{labels.usage.prompt_tokens:,}"))
    if labels.usage.cached_tokens:
        facts.append(("of these cached", f"{labels.usage.cached_tokens:,}"))
    facts.append(("tokens out", f"{labels.usage.completion_tokens:,}"))
    if labels.cost is not None:
        facts.append(("cost", f"{labels.cost:.2f} {labels.currency}"))
    if labels.calls_per_second:
        rates = ", ".join(f"{rate:.0f}" for rate in labels.calls_per_second)
        facts.append(("calls a second, over the run", rates))
    return facts
