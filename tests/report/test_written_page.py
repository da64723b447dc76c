"""The page of a run whose answers are written: text against text, with what differs."""

import json
import random
import re
import time
from pathlib import Path

import pytest
from finished_run import ARTIFACT, HOSTILE, finished_run, page_of
from written_run import STUDENT, booking, description, evaluated

from distillery.evaluation.preferences import Preference, preference_figures
from distillery.records import (
    EvaluationReport,
    Example,
    OnnxModel,
    Outcome,
    Preferences,
    ScoreRow,
    TeacherDrift,
    Usage,
)
from distillery.report.differences import Piece, pieces


def run_of(board: tuple[ScoreRow, ...]) -> Outcome:
    """Return the records of a run with an evaluation's scoreboard; the gate gave no verdict."""
    report = EvaluationReport(
        artifact=ARTIFACT, scoreboard=board, candidate=STUDENT, answers_sha256="0" * 64
    )
    model = OnnxModel(artifact=ARTIFACT, precision="int8", algorithm="rtn", parameters=1)
    decision = finished_run().decision.model_copy(update={"verdicts": ()})
    return finished_run(report=report, model=model, decision=decision)


def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Example]) -> str:
    """Return the page of a run whose student is wrong in row 0 and gives row 1 no answer."""
    gold = [row.answer_key for row in rows]
    wrong = '{"city": "Rome"}' if rows[0].format and rows[0].format.json_schema else HOSTILE
    answers = {"teacher": gold, "student": gold, STUDENT: [wrong, None, *gold[2:]]}
    board = evaluated(tmp_path / "evaluation", monkeypatch, rows, rows[5:], answers)
    champion = tmp_path / "champion.jsonl"
    lines = [{"example_id": "r0", "gold": gold[0], "v1": gold[0]}]
    champion.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return page_of(tmp_path, run_of(board), tmp_path / "evaluation", champion).read_text()


def test_fields_are_told_and_what_has_no_meaning_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page(tmp_path, monkeypatch, [booking(number) for number in range(12)])
    sections = re.findall(r'<h2 id="(\w+)">([^<]*)', text)
    assert sections[1:4] == [
        ("scoreboard", "Field F1, size and speed"),
        ("reliability", "Figures"),
        ("errors", "Rows"),
    ]
    assert "doubtful" not in dict(sections)
    visible = text[text.index("<main>") : text.index('"training">', text.index("<main>"))]
    visible = visible.replace("data-confidence", "")
    for absent in ("onfidence", "alibration", "macro-F1", "ccuracy", "onfusion", "Abstain"):
        assert absent not in visible, absent
    assert "of the teacher&#39;s field F1" in text
    assert "The student&#39;s figures of each field" in text
    assert "no answer: no JSON" in text
    (row,) = re.findall(r"<tr[^>]*>(?:(?!</tr>).)*r0</div>.*?</tr>", text, re.DOTALL)
    assert "data-wrong" in row
    assert "<ins>Rome</ins>" in row
    assert re.search("<del>(Bonn|Ulm|Mainz|New York|York)</del>", row)
    assert 'data-confidence="0.0000"' in row
    assert row.count("not asked") == 0
    assert text.count(">not asked<") == 11


def test_the_most_similar_reference_is_compared_and_texts_are_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page(tmp_path, monkeypatch, [description(number) for number in range(12)])
    assert "<summary>1 more</summary>" in text
    assert HOSTILE not in text
    assert text.count("<script>") == 1
    assert "ROUGE-L, size and speed" in text
    assert "figures of each field" not in text


def test_a_judge_has_a_section_and_a_word_on_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [description(number) for number in range(12)]
    gold = [row.answer_key for row in rows]
    answers = {"teacher": gold, "student": gold, STUDENT: [HOSTILE, None, *gold[2:]]}
    board = evaluated(tmp_path / "evaluation", monkeypatch, rows, rows[5:], answers)
    found = [
        Preference(example_id="r0", outcome="tie", orders=("win", "loss")),
        Preference(example_id="r1", outcome="loss", reason="no answer of the student"),
        Preference(example_id="r2", outcome="win", orders=("win", "win")),
        Preference(example_id="r3", outcome=None, orders=(None, "win"), reason=HOSTILE),
    ]
    folder = tmp_path / "preferences"
    folder.mkdir()
    lines = [f"{each.model_dump_json()}\n" for each in found]
    (folder / "preferences.jsonl").write_text("".join(lines))
    preferences = Preferences(
        artifact=ARTIFACT,
        figures=preference_figures("wise", found),
        asked=6,
        usage=Usage(prompt_tokens=1200, completion_tokens=6),
        cost=0.03,
        currency="EUR",
        produced_by="venues-1",
    )
    drift = TeacherDrift(asked=4, compared=4, changed=("r1",), before=("m1",), after=("m2",))
    outcome = run_of(board).model_copy(update={"preferences": preferences, "judge_drift": drift})
    text = page_of(tmp_path, outcome, tmp_path / "evaluation", preferences=folder).read_text()
    assert '<h2 id="judge">Judge</h2>' in text
    for name, figure in (
        ("judge", "wise"),
        ("wins of the student", "1"),
        ("win rate, a tie counting as half a row", r"0\.500 \[0\.\d+, 0\.\d+\]"),
        (r"of 2 rows that it was asked about, its two orders disagree on", r"1 \(50\.0%\)"),
        ("answers", "6"),
        ("cost", r"0\.03 EUR"),
    ):
        assert re.search(rf'<th scope="row">{name}</th><td>{figure}</td>', text), name
    assert "1 of 4 canary rows are answered otherwise (25%); m1 answered then, m2 now" in text
    assert "are those of venues-1." in text
    said = dict(re.findall(r'(r\d+)</div>.*?data-label="judge prefers">([^<]*)<', text, re.DOTALL))
    assert said["r0"] == "neither: the orders disagree"
    assert said["r1"] == "teacher: no answer of the student"
    assert said["r2"] == "student"
    assert said["r3"].startswith("left out: &lt;script")
    assert said["r4"] == "not asked"
    rows_of_table = text[text.index('<tbody role="rowgroup">') :]
    assert (rows_of_table.count(" data-lost"), rows_of_table.count(" data-won")) == (1, 1)
    assert HOSTILE not in text


def test_what_differs_is_told_word_by_word() -> None:
    assert pieces("three red cars", ["a blue bird", "two red cars, parked"]) == [
        Piece("missing", "two"),
        Piece("added", "three"),
        Piece("same", " red cars"),
        Piece("missing", ", parked"),
    ]
    assert pieces("same", ["other", "same"]) == [Piece("same", "same")]


def test_long_texts_are_compared_at_once() -> None:
    chance = random.Random(0)
    known = [f"w{number}" for number in range(300)]
    answer, gold = (" ".join(chance.choices(known, k=3000)) for _ in range(2))
    started = time.process_time()
    found = pieces(answer, [gold])
    assert time.process_time() - started < 2, "a page has thousands of them"
    assert "".join(piece.text for piece in found if piece.kind != "missing") == answer
    assert "".join(piece.text for piece in found if piece.kind != "added") == gold
