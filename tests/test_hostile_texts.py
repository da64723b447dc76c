"""Hostile texts wherever they stand in Markdown or HTML: a parser finds no link, image, HTML or
other markup of theirs there, and the text as it was written."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from finished_run import evaluation, finished_run, page_of
from markdown_it import MarkdownIt
from markdown_it.token import Token
from registered_student import provenance
from student_answers import further_figures, score_row

from distillery.evaluation.figures_table import render_figures_markdown
from distillery.evaluation.report import ANSWERS_FILE, TABLE_FILE, write_answers, write_report
from distillery.evaluation.verdicts import render_verdicts_markdown
from distillery.labels.files import REJECTED_FILE
from distillery.labels.report import LOOK_FILE, REPORT_FILE, LabelReport
from distillery.markdown import code, escape, escape_cells, link, markdown_table
from distillery.recipe import LimitRule
from distillery.records import Example, RuleVerdict, StageRecord, TeacherDrift, Trial
from distillery.registry.card import model_card
from distillery.report.charts import plot_latency
from distillery.storage.artifacts import ArtifactStore
from distillery.training.search import render_trials
from tasks import progress, summary
from tasks.labels import drift_in_markdown

pytestmark = pytest.mark.security

OWNED = "http://evil.example/x.png"
HOSTILE = (
    f"![a]({OWNED})",
    f"[click]({OWNED})",
    f"[![a]({OWNED})]({OWNED})",
    f"[a]: {OWNED} 'title'",
    f"[a][b]\n\n[b]: {OWNED}",
    f"<{OWNED}>",
    f'<img src="{OWNED}">',
    "<script>alert(1)</script>",
    "a | b | c\n| --- | --- |\n",
    "`code` and ``more``",
    "*a* **b** _c_ __d__ ~~e~~",
    "a\\|b\\",
    "# heading",
    "> quote",
    "- item\n- item",
    "1. one\n2) two",
    "===",
    "---",
    "```\nfence\n```",
    "    indented",
    "&lt;b&gt; &#60; &copy;",
    f"{{{{ x }}}} $x$ ]({OWNED}) [",
    "\u2028line\u2028# separator",
    "https://evil.example/x?y=1_2",
    "HTTP://evil.example and ftp://evil.example, http://https://evil.example",
    "www.evil.example www.www.evil.example",
    "a@evil.example, <a.b_c@evil.example> mailto:_@evil.example a@www.evil.example",
    "`https://evil.example`, \\www.evil.example\\, _@_",
    "model@0123abc, snake_case_name and R&D, [0.1, 0.2], 2 * 3 ~ 6",
)
ALL = "; ".join(HOSTILE)

BARE_ADDRESS = re.compile(
    r"(?:https?://|ftp://|www\.)[-.\w]|[-.\w+]@[-\w]+\.", re.IGNORECASE | re.ASCII
)
"""What GitHub's Markdown makes a link of, and what remark-gfm does, by a wide rule: both find it in
a text after the backslashes are gone."""


def parsed(text: str) -> list[Token]:
    """Return every token of a text, those inside lines too."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = []
    for token in parser.parse(text):
        tokens += [token, *(token.children or [])]
    return tokens


def kinds(text: str) -> set[str]:
    return {token.type for token in parsed(text)}


def shown(text: str) -> str:
    """Return what a reader sees, each block in one line."""
    found = [each.content for each in parsed(text) if each.type in ("text", "code_inline")]
    return " ".join("".join(found).split())


def refuse_bare_addresses(text: str) -> None:
    """Fail for an address in a text, which is no code and not in a link of our own."""
    text_run, depth = "", 0
    for token in parsed(text):
        depth += token.nesting if token.type.startswith("link_") else 0
        if token.type in ("text", "text_special") and not depth:
            text_run += token.content
        else:
            text_run = ""
        assert not BARE_ADDRESS.search(text_run), text_run


def one_line(text: str) -> str:
    return " ".join(text.split())


def refuse_markup(text: str, links: int = 0) -> None:
    """Fail for markup that only a row's text can have brought in. `links`: how many there may be,
    of our own."""
    refuse_bare_addresses(text)
    tokens = parsed(text)
    found = [token.type for token in tokens]
    assert found.count("link_open") == links
    for token in tokens:
        if token.type == "link_open":
            assert "evil.example" not in str(token.attrs["href"])
    brought_in = {
        "image",
        "html_inline",
        "html_block",
        "em_open",
        "s_open",
        "blockquote_open",
        "hr",
    }
    assert not brought_in & set(found), text


@pytest.mark.parametrize("text", [*HOSTILE, ALL])
def test_an_escaped_text_is_nothing_but_the_text(text: str) -> None:
    for around in ("", "before "):
        found = escape(around + text)
        assert "\n" not in found
        paragraph = {"paragraph_open", "inline", "paragraph_close"}
        assert paragraph < kinds(found) <= paragraph | {"text", "text_special", "code_inline"}
        refuse_bare_addresses(found)
        assert shown(found) == one_line(around + text)


@pytest.mark.parametrize("text", [*HOSTILE, ALL])
def test_a_table_keeps_its_cells_and_each_cell_its_text(text: str) -> None:
    table = markdown_table(["a", text], [[text, "1"], ["2", text]])
    refuse_markup(table)
    cells = [token.content for token in parsed(table) if token.type == "inline"]
    assert len(cells) == 6
    assert kinds(table) <= {
        *("table_open", "thead_open", "tr_open", "th_open", "inline", "text", "th_close"),
        "code_inline",
        *("tr_close", "thead_close", "tbody_open", "td_open", "td_close", "tbody_close"),
        "table_close",
    }
    (row,) = escape_cells([{"text": text, "number": 0.5, "none": None}])
    assert shown(row["text"]) == one_line(text)
    assert (row["number"], row["none"]) == (0.5, None)


@pytest.mark.parametrize("text", HOSTILE)
def test_links_and_code_of_our_own_hold_it_too(text: str) -> None:
    found = link(text, "/v2/runs/1")
    refuse_markup(found, links=1)
    assert shown(found) == one_line(text)
    (token,) = [each for each in parsed(f"see {code(text)}.") if each.type == "code_inline"]
    assert token.content.strip() == one_line(text).replace("`", "'")


def test_the_evaluation_s_tables(tmp_path: Path) -> None:
    figures = further_figures()
    assert figures.confusion is not None
    classes = tuple(each.model_copy(update={"label": ALL}) for each in figures.classes)
    labels = tuple(f"{number} {ALL}" for number in range(len(figures.confusion.labels)))
    confusion = figures.confusion.model_copy(update={"labels": labels})
    hostile = figures.model_copy(update={"classes": classes, "confusion": confusion})
    refuse_markup(render_figures_markdown({ALL: hostile}, ALL))
    rule = LimitRule(
        kind="limit", figure="peak_mib", maximum=1, name=one_line(ALL).replace("|", "/")
    )
    refuse_markup(render_verdicts_markdown([RuleVerdict(rule=rule, verdict="refused", figure=2)]))
    rows = (score_row("teacher", 80, 100), score_row(ALL, 75, 100, figures=hostile))
    write_report(tmp_path / "report", rows, ALL, "teacher", {}, [ALL], {ALL: hostile})
    refuse_markup((tmp_path / "report" / TABLE_FILE).read_text())


def test_the_model_card(tmp_path: Path) -> None:
    made = provenance(tmp_path / "made", teacher={"kind": "endpoint", "terms": ALL})
    made["labels"]["teacher"] = ALL
    made["student"]["base"] = ALL
    card = model_card(f"mine {ALL}", made)
    _, _, body = card.partition("\n---\n")
    refuse_markup(body)
    assert one_line(ALL) in shown(body)


def test_a_search_s_trials_and_a_teacher_s_drift() -> None:
    refuse_markup(
        render_trials(
            [Trial(number=0, settings={"rank": 8}, measured=None, best=False, reason=ALL)]
        )
    )
    drift = TeacherDrift(asked=2, compared=2, changed=(ALL, *HOSTILE), before=(ALL,), after=(ALL,))
    refuse_markup(drift_in_markdown(drift))
    assert [token.type for token in parsed(drift_in_markdown(drift))].count("list_item_open") == (
        1 + len(HOSTILE)
    )


def test_every_artifact_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, ids, questions and reasons are hostile; each text that Prefect renders is parsed."""
    rendered: dict[str, str] = {}
    cells: list[Any] = []

    def markdown(key: str, markdown: str, description: str) -> str:
        rendered[key], rendered[f"{key}, description"] = markdown, description
        return "an-id"

    def table(rows: list[dict[str, Any]], key: str, description: str) -> None:
        rendered[f"{key}, description"] = description
        cells.extend(value for row in rows for value in row.values() if isinstance(value, str))

    monkeypatch.setattr(summary, "create_markdown_artifact", markdown)
    monkeypatch.setattr(summary, "create_table_artifact", table)
    monkeypatch.setattr(summary, "_picture", lambda name, file: name)
    store, outcome = ArtifactStore(), finished_run()
    labels, report = tmp_path / "labels", evaluation(tmp_path / "report")
    labels.mkdir()
    line = Example(example_id=ALL, question=ALL, choices=("a", "b")).model_dump_json() + "\n"
    for name in (REJECTED_FILE, LOOK_FILE):
        (labels / name).write_text(line)
    told = LabelReport(accepted=1, rejected={ALL: 1}, letters={ALL: 1}, gold_rows=0, right=0)
    (labels / REPORT_FILE).write_text(told.model_dump_json())
    (report / TABLE_FILE).write_text("")
    candidate = outcome.report.candidate
    tested = [Example(example_id=ALL, question="?", choices=("a", "b"))]
    write_answers(report, tested, {"gold": ["A"], "teacher": [ALL], candidate: ["B"]})
    assert (report / ANSWERS_FILE).exists()

    def hostile(record: StageRecord, **changed: Any) -> Any:
        return record.model_copy(update={"produced_by": ALL, **changed})

    changed = {
        "run": ALL,
        "labels": hostile(outcome.labels, artifact=store.put(labels), teacher=ALL),
        "report": hostile(outcome.report, artifact=store.put(report)),
        "student": hostile(outcome.student, method=ALL, decisions=(ALL,)),
        "decision": outcome.decision.model_copy(update={"reason": f"refused: {ALL}"}),
    }
    summary.create_artifacts(outcome.model_copy(update=changed), store)
    assert {"distillation", "labelling-report", "rejected-labels, description"} <= rendered.keys()
    for key, text in rendered.items():
        own = 2 * text.count("/v2/artifacts/artifact/")
        refuse_markup(text, links=own)
        assert key.startswith("record-") or OWNED not in text or one_line(ALL)[:20] in shown(text)
    assert len([cell for cell in cells if "evil" in cell]) >= 4
    for cell in cells:
        refuse_markup(cell)


def test_a_progress_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def create(percent: float, key: str, description: str) -> str:
        told.append(description)
        return "an-id"

    monkeypatch.setattr(progress, "create_progress_artifact", create)
    progress._publish_artifact(None, "label", 50.0, f"label {ALL}")
    (text,) = told
    refuse_markup(text)
    assert shown(text) == one_line(f"label {ALL}")


class Elements(HTMLParser):
    """The elements of a page, each with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_of_a_run_has_no_element_of_theirs(tmp_path: Path) -> None:
    """Names of classes, of the teacher and in a legend, and the reason of a decision."""
    outcome = finished_run()
    changed = {
        "labels": outcome.labels.model_copy(update={"teacher": ALL, "produced_by": ALL}),
        "decision": outcome.decision.model_copy(update={"reason": f"refused: {ALL}"}),
        "run": ALL,
    }
    folder = evaluation(tmp_path / "evaluation")
    for file in folder.iterdir():
        text = file.read_text()
        file.write_text(text.replace('"displeased"', json.dumps(ALL)))
    page = page_of(tmp_path, outcome.model_copy(update=changed), folder).read_text()
    short = "<script></script><img>"
    chart = plot_latency({short: (1.0, 2.0, 3.0)}, short)
    for text, scripts in ((page, 1), (chart, 0)):
        reader = Elements()
        reader.feed(text)
        assert [tag for tag, _ in reader.found].count("script") == scripts
        assert "img" not in [tag for tag, _ in reader.found]
        for _, attributes in reader.found:
            assert "evil.example" not in str(attributes.get("href")) + str(attributes.get("src"))
    assert "evil.example" in page
