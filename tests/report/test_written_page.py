"""The page of a run whose answers are written: text against text, with what differs."""

import json
import random
import re
import time
from pathlib import Path

import pytest
from finished_run import ARTIFACT, HOSTILE, finished_run, page_of
from written_run import STUDENT, booking, description, evaluated

from distillery.records import EvaluationReport, Example, OnnxModel, Outcome, ScoreRow
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
