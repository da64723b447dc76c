"""The page of a run: what it says, and that nothing in a row becomes part of the page."""

import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
from finished_run import (
    ARTIFACT,
    HOSTILE,
    OPTIONS,
    STUDENT,
    champion_answers,
    evaluation,
    finished_run,
    older_evaluation,
    page_of,
)
from made_rungs import earlier_ladder, timed_ladder

from distillery.errors import DataError
from distillery.evaluation.doubtful import DOUBTFUL_ROWS_FILE
from distillery.evaluation.report import REPORT_FILE, ROWS_FILE
from distillery.records import GateDecision, Ladder, Outcome
from distillery.report import page
from distillery.report.evaluated import read_evaluation


class Parsed(HTMLParser):
    """The page's elements and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def rows(self) -> list[dict[str, str | None]]:
        """The attributes of the rows of the error browser."""
        return [values for tag, values in self.elements if tag == "tr" and "data-gold" in values]


def test_the_verdict_comes_first_and_every_rule_has_its_own(tmp_path: Path) -> None:
    text = page_of(tmp_path, finished_run(), evaluation(tmp_path / "evaluation")).read_text()
    sections = re.findall(r'<h2 id="(\w+)">', text)
    expected = ["verdict", "scoreboard", "reliability", "confusion", "errors", "doubtful"]
    assert sections == [*expected, "training", "teacher", "stages"]
    words = " ".join(Parsed(text).texts)
    for said in (
        "Refused",
        "gate: refused: too few rows; nothing is registered",
        "better than majority class",
        "+50.0 points [+20.0, +70.0]",
        "> 0 at 95 %",
        "undecided",
        "90.9 %",
        "0.830 [0.600, 0.970]",
        "0.900 [0.600, 0.980]",
        "1.25 EUR",
        "12,345",
        "Measured one row at a time.",
    ):
        assert said in words


def test_a_speed_of_a_busy_machine_is_marked() -> None:
    board = finished_run().report.scoreboard
    speeds = []
    for slowed in ("", "teacher", STUDENT):
        rows = []
        for row in board:
            share = 0.5 if row.name == slowed else 0.0
            rows.append(row.model_copy(update={"waited": share}))
        speeds.append(page.key_figures(rows, STUDENT, "teacher")[-1])
    idle, *busy = speeds
    assert idle == ("rows a second", "59.0", "teacher 22.0")
    assert busy == [("rows a second", "59.0", "teacher 22.0; measured on a busy machine")] * 2
    alone = board[-1].model_copy(update={"waited": 0.5, "rows_per_second": 3.0})
    *_, (_, _, than) = page.key_figures([alone], STUDENT, STUDENT)
    assert than == "teacher 3.0; measured on a busy machine"


def test_each_chart_has_a_text_and_a_table_with_its_figures(tmp_path: Path) -> None:
    text = page_of(tmp_path, finished_run(), evaluation(tmp_path / "evaluation")).read_text()
    charts = [values for tag, values in Parsed(text).elements if tag == "svg"]
    assert [chart["aria-label"] for chart in charts] == [
        "Accuracy and size",
        "Accuracy and speed",
        "Latency of single rows",
        "Confidence and accuracy",
        "The student's training",
    ]
    # The scoreboard is the table of the first two.
    assert re.findall(r"<summary>(.*): the figures", text) == [
        "Latency of single rows",
        "Scoreboard",
        "Confidence and accuracy",
        "The student&#39;s training",
    ]
    # A colour that is not the page's own would stay as it is in the dark.
    assert not re.search(r"(fill|stroke): #", text.partition("<main>")[2])
    identities = re.findall(r' id="([^"]+)"', text)
    assert len(identities) == len(set(identities))


def test_the_forms_of_a_ladder_are_shown_with_size_speed_and_accuracy(tmp_path: Path) -> None:
    run, folder = finished_run(), evaluation(tmp_path / "evaluation")

    def with_ladder(ladder: Ladder) -> Parsed:
        model = run.model.model_copy(update={"ladder": ladder})
        changed = run.model_copy(update={"model": model})
        return Parsed(page_of(tmp_path, changed, folder).read_text())

    title = "The student's forms"
    parsed = with_ladder(timed_ladder())
    assert title in [values["aria-label"] for tag, values in parsed.elements if tag == "svg"]
    words = " ".join(" ".join(parsed.texts).split())
    assert "int8 rtn/32 120.0 MB 80.0 12.5 0.850 +0.0 [-3.2, +3.2] 0.0123 0.456 0 picked" in words
    assert "int8 rtn/32: accuracy 0.850, picked" in words, (
        "the chart tells accuracy and what was picked"
    )
    assert "int4 gptq/32 left out: no time" in words
    why = "int8 rtn/32 is the fastest of 2 forms that keep to the loss"
    said = f"export.choose is fastest: {why}. The forms were timed on A processor, 2 cores."
    assert said in words

    parsed = with_ladder(earlier_ladder())
    assert title not in [values["aria-label"] for tag, values in parsed.elements if tag == "svg"]
    words = " ".join(" ".join(parsed.texts).split())
    assert "int8 rtn/32 120.0 MB 0.850 +0.0 [-3.2, +3.2]" in words
    assert "None" not in words
    assert "timed on" not in words


def test_what_abstaining_costs_has_a_section_if_it_was_measured(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "evaluation")
    report = json.loads((folder / REPORT_FILE).read_text())
    point = {"threshold": 0.75, "rows": 6, "coverage": 0.5, "accuracy": 0.95}
    own = report["figures"][STUDENT]
    own["coverage"] = [point, {**point, "threshold": 0.4, "rows": 11, "coverage": 0.92}]
    (folder / REPORT_FILE).write_text(json.dumps(report))
    parsed = Parsed(page_of(tmp_path, finished_run(), folder).read_text())
    words = " ".join(parsed.texts)
    assert "This student answers every row." in words
    assert "0.750 0.950" in words
    charts = [values["aria-label"] for tag, values in parsed.elements if tag == "svg"]
    assert "Accuracy of the most confident answers" in charts

    share = {"value": 0.5, "low": 0.25, "high": 0.75}
    own["given"] = {"threshold": 0.75, "coverage": share, "accuracy": None}
    (folder / REPORT_FILE).write_text(json.dumps(report))
    text = page_of(tmp_path, finished_run(), folder).read_text()
    said = "abstains below a confidence of 0.750. It answers a share of 0.500 [0.250, 0.750] of the"
    assert f"{said} test rows.</p>" in text


def test_what_stands_in_a_row_is_text(tmp_path: Path) -> None:
    run = finished_run(recipe=HOSTILE, run=HOSTILE)
    text = page_of(tmp_path, run, evaluation(tmp_path / "evaluation")).read_text()
    parsed = Parsed(text)
    tags = [tag for tag, _ in parsed.elements]
    assert (tags.count("script"), tags.count("img")) == (1, 0)
    assert HOSTILE in "".join(parsed.texts)


def test_only_the_pages_own_script_may_run_and_nothing_is_requested(tmp_path: Path) -> None:
    text = page_of(tmp_path, finished_run(), evaluation(tmp_path / "evaluation")).read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = b64encode(sha256(script.encode()).digest()).decode()
    assert (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'" in text
    )
    for _, values in Parsed(text).elements:
        for name in ("src", "href", "xlink:href", "action"):
            assert (values.get(name) or "#").startswith(("#", "data:"))


def test_rows_are_marked_wrong_different_and_changed(tmp_path: Path) -> None:
    champion = GateDecision(
        passed=True, reason="passed: x", champion="desk version 1", champion_answers=ARTIFACT
    )
    written = page_of(
        tmp_path,
        finished_run(decision=champion),
        evaluation(tmp_path / "evaluation"),
        champion_answers(tmp_path),
    )
    rows = Parsed(written.read_text()).rows()

    def marked(name: str) -> list[int]:
        return [number for number, row in enumerate(rows) if name in row]

    assert marked("data-wrong") == [2, 3]
    assert marked("data-differs") == [2, 3, 4]
    # Row 6 is none of the champion's, and so has not changed.
    assert marked("data-changed") == [2, 3, 5]
    assert rows[3]["data-student"] == "none"
    assert rows[3]["data-confidence"] == ""
    assert rows[0]["data-confidence"] == "0.5000"
    assert rows[6]["data-champion"] == ""


def test_a_champions_row_is_found_by_its_content_where_that_is_known(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    lines = []
    for number in range(12):
        line = {"example_id": f"other-{number}", "content": f"content-{number}", STUDENT: "B"}
        lines.append(json.dumps(line) + "\n")
    answers.write_text("".join(lines))
    written = page_of(tmp_path, finished_run(), evaluation(tmp_path / "evaluation"), answers)
    rows = Parsed(written.read_text()).rows()
    assert {row["data-champion"] for row in rows} == {"B"}
    # With another gold letter, its letters stand for other options.
    answers.write_text(
        "".join(line.replace('"content"', '"gold": "A", "content"') for line in lines)
    )
    rows = Parsed(
        page_of(tmp_path, finished_run(), evaluation(tmp_path / "evaluation"), answers).read_text()
    ).rows()
    assert [row["data-champion"] for row in rows] == ["B", "", ""] * 4


@pytest.mark.parametrize("spoil", ["rows", "figures", "both"])
def test_an_evaluation_of_an_earlier_version_is_said_and_left_out(
    tmp_path: Path, spoil: str
) -> None:
    folder = tmp_path / "evaluation"
    if spoil == "both":
        older_evaluation(folder)
    elif spoil == "rows":
        evaluation(folder)
        (folder / ROWS_FILE).unlink()
    else:
        rows = (evaluation(tmp_path / "whole") / ROWS_FILE).read_text()
        older_evaluation(folder)
        (folder / ROWS_FILE).write_text(rows)
    text = page_of(tmp_path, finished_run(), folder).read_text()
    assert "This evaluation is from an earlier version" in text
    assert 'id="errors"' not in text
    assert 'id="scoreboard"' in text


def test_records_of_earlier_runs_have_no_verdicts_and_no_curve(tmp_path: Path) -> None:
    run = finished_run(decision=GateDecision(passed=True, reason="passed: x"))
    run = run.model_copy(update={"student": run.student.model_copy(update={"curve": ()})})
    kept = json.loads(run.model_dump_json())
    del kept["page"], kept["decision"]["champion_answers"]
    text = page_of(
        tmp_path, Outcome.model_validate(kept), older_evaluation(tmp_path / "evaluation")
    ).read_text()
    assert "The gate applied no rules" in text
    assert "The training left no curve" in text


def test_options_that_differ_from_row_to_row_are_listed(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "evaluation")
    lines = (folder / ROWS_FILE).read_text().splitlines()
    row = json.loads(lines[0]) | {"choices": ["oven", "bridge", "rain", "cloud"]}
    (folder / ROWS_FILE).write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    text = page_of(tmp_path, finished_run(), folder).read_text()
    assert "<li>bridge</li>" in text
    assert '<option value="D">D</option>' in text
    assert f'<option value="A">{OPTIONS[0]}</option>' not in text


def test_doubtful_labels_stand_with_what_contradicts_them(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "evaluation")
    text = page_of(tmp_path, finished_run(), folder).read_text()
    section = text.partition('<h2 id="doubtful">')[2].partition("</section>")[0]
    assert re.findall(r"<td>(.*?)</td>", section) == [
        "row-1",
        "test",
        "displeased",
        "pleased",
        "pleased (0.97)",
        "neither",
        "",
    ]
    assert "has all 1, to be corrected" in section
    (folder / DOUBTFUL_ROWS_FILE).write_text("")
    text = page_of(tmp_path, finished_run(), folder).read_text()
    assert "No label is contradicted with confidence." in text
    (folder / DOUBTFUL_ROWS_FILE).unlink()
    assert "Labels to check" not in page_of(tmp_path, finished_run(), folder).read_text()


def test_of_too_many_rows_the_errors_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "SHOWN_ROWS", 5)
    text = page_of(tmp_path, finished_run(), evaluation(tmp_path / "evaluation")).read_text()
    assert "The page holds 5 of 12 test rows" in text
    shown = re.findall(r'<div class="id">([^<]+)</div>', text)
    assert shown == ["row-2", "row-3", "row-4", "row-0", "row-1"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("report.json", "{"),
        ("report.json", '{"figures": {"student": {"macro_f1": {"value": "x"}}}}'),
        (ROWS_FILE, '{"example_id": "1"}\n'),
    ],
)
def test_a_file_that_cant_be_read_is_named(tmp_path: Path, file: str, content: str) -> None:
    folder = evaluation(tmp_path / "evaluation")
    (folder / file).write_text(content)
    with pytest.raises(DataError, match=rf"{file}: can't be read .*; evaluate again"):
        read_evaluation(folder)
