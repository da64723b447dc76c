"""A comparison of two models for the terminal."""

from collections.abc import Callable, Iterator

from distillery.evaluation.scoreboard import plain_table, points
from distillery.recipe import METRIC_NAMES
from distillery.registry.comparison import Flip, ModelComparison, Side


def render_comparison(found: ModelComparison, shown: int) -> str:
    """Return a comparison for the terminal, with up to `shown` flips of either kind."""
    first, second = found.first, found.second
    rows = []
    for title, cell in CELLS.items():
        cells = [cell(first), cell(second)]
        if any(cells):
            rows.append([title.replace("accuracy", METRIC_NAMES[found.metric]), *cells])
    lines = [plain_table(["", first.title, second.title], rows), ""]
    p_value = "" if found.p_value is None else f" p = {found.p_value:.3f},"
    lines.append(
        f"difference {100 * found.difference:+.1f} points {points(found.interval)},{p_value} "
        f"on {found.rows:,} rows that both answered"
    )
    if "left out" in found.note or "ids alone" in found.note:
        lines.append(found.note)
    for ahead, behind, ours in ((first, second, True), (second, first, False)):
        flips = [each for each in found.flips if (each.first == each.gold) is ours]
        lines.append(f"\n{len(flips):,} rows right in {ahead.title} and wrong in {behind.title}")
        for each in flips[:shown]:
            lines += flip_lines(each)
    return "\n".join(lines)


def flip_lines(found: Flip) -> Iterator[str]:
    """Yield the lines of a flip for the terminal."""

    def named(key: str | None) -> str:
        if key is None:
            return "no answer"
        text = found.options.get(key, "")
        return f"{key} {text}".strip()

    question = " ".join(found.question.split())
    if len(question) > 90:
        question = f"{question[:89]}…"
    yield f"  {found.example_id}  {question}".rstrip()
    yield f"    gold {named(found.gold)}; {named(found.first)} against {named(found.second)}"


def win_rate(side: Side) -> str:
    """Return a judge's win rate of a model's texts against its teacher's; '' without a judge."""
    found = side.preferences
    if found is None or found.win_rate is None:
        return ""
    rate = found.win_rate
    return f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}], {found.judge}"


def figure(value: float | None, template: str, divisor: float = 1) -> str:
    return "" if value is None else template.format(value / divisor)


CELLS: dict[str, Callable[[Side], str]] = {
    "accuracy [95 %]": lambda side: (
        f"{side.accuracy:.3f} [{side.interval.low:.3f}, {side.interval.high:.3f}]"
    ),
    "win rate against its teacher [95 %]": win_rate,
    "parameters": lambda side: figure(side.parameters, "{:,.1f} M", 1e6),
    "folder": lambda side: figure(side.bytes, "{:,.0f} MB", 1e6),
    "rows a second": lambda side: figure(side.rows_per_second, "{:,.1f}"),
    "p50 ms": lambda side: figure(side.p50_ms, "{:,.1f}"),
    "peak MiB": lambda side: figure(side.peak_mib, "{:,.0f}"),
    "measured on": lambda side: side.machine,
    "base model": lambda side: side.base,
    "teacher": lambda side: side.teacher,
    "labelled rows": lambda side: figure(side.labelled, "{:,.0f}"),
    "teacher calls": lambda side: figure(side.calls, "{:,.0f}"),
    "tokens in": lambda side: figure(side.usage.prompt_tokens if side.usage else None, "{:,.0f}"),
    "tokens out": lambda side: figure(
        side.usage.completion_tokens if side.usage else None, "{:,.0f}"
    ),
    "paid": lambda side: "" if side.cost is None else f"{side.cost:.2f} {side.currency}".strip(),
    "training minutes": lambda side: figure(side.training_minutes, "{:,.1f}"),
}
"""The lines of the table: what each shows of a side."""
