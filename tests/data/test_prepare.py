"""Preparation: what is read, refused, split and dropped, and what of it is written."""

import csv
import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hub_stand_in import HubStandIn

from distillery.data.examples import read_examples
from distillery.data.prepare import PreparedCounts, check_rows, prepare
from distillery.data.source import source_identity
from distillery.errors import DataError, RecipeError
from distillery.recipe import Columns, DatasetRecipe
from distillery.records import Example

MOODS = ["pleased", "displeased", "neither"]
NOUNS = [
    "router",
    "bill",
    "van",
    "engineer",
    "email",
    "cable",
    "invoice",
    "queue",
    "voucher",
    "socket",
    "modem",
    "parcel",
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def row(key: Any, question: Any, answer: Any = "A", choices: Any = None) -> dict[str, Any]:
    choices = choices or {"label": ["A", "B", "C"], "text": MOODS}
    return {
        "id": key,
        "question": question,
        "question_concept": "mood",
        "choices": choices,
        "answerKey": answer,
    }


def message(seed: int, words: int = 12) -> str:
    return " ".join(random.Random(seed).choices(NOUNS, k=words))


def many(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [row(f"m{n}", message(n), "ABC"[n % 3]) for n in range(start, start + count)]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(values) + "\n" for values in rows))
    return path


def recipe(train: Path, test: Path | None = None, **more: Any) -> DatasetRecipe:
    files = {"train": (str(train),)} | ({"test": (str(test),)} if test else {})
    splits = {name: name for name in files}
    return DatasetRecipe.model_validate(
        {"source": "files", "files": files, "splits": splits} | more
    )


def run(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    test: list[dict[str, Any]] | None = None,
    **more: Any,
) -> "Result":
    train = jsonl(tmp_path / "train.jsonl", rows)
    held = jsonl(tmp_path / "test.jsonl", test) if test is not None else None
    return Result(prepare(recipe(train, held, **more), tmp_path / "out"), tmp_path / "out")


class Result:
    def __init__(self, counts: PreparedCounts, out: Path) -> None:
        self.counts = counts
        self.bytes = {
            role: (out / split.file).read_bytes() for role, split in counts.splits.items()
        }
        self.rows = {role: read_examples(out / split.file) for role, split in counts.splits.items()}
        self.ids = {
            role: {example.example_id for example in rows} for role, rows in self.rows.items()
        }


def refusal(config: DatasetRecipe, out: Path) -> str:
    with pytest.raises(DataError) as caught:
        prepare(config, out)
    text = str(caught.value)
    assert "\n" not in text
    assert not list(out.glob("*")) if out.exists() else True
    return text


# Formats


def test_jsonl_csv_and_parquet_give_the_same_bytes(tmp_path: Path) -> None:
    rows = many(30)
    texts = [values | {"choices": json.dumps(values["choices"])} for values in rows]
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(texts)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    expected = run(tmp_path, rows)
    for name in ("train.csv", "train.parquet"):
        counts = prepare(recipe(tmp_path / name), tmp_path / name[6:])
        assert (tmp_path / name[6:] / "train.jsonl").read_bytes() == expected.bytes["train"]
        assert counts == expected.counts
    assert expected.counts.splits["train"].rows == 30
    assert (
        expected.counts.splits["train"].sha256
        == hashlib.sha256(expected.bytes["train"]).hexdigest()
    )


def test_csv_values_stay_text_and_rows_over_two_lines_keep_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    head = "\ufeffid,question,choices,answerKey\r\n"
    path.write_text(
        head + '007,NA,"[""null"", ""1.0""]",A\r\n\r\n2,"two\r\nlines","[""a"", ""b""]",B\r\n'
    )
    prepare(recipe(path), tmp_path / "out")
    found = {
        example.example_id: example for example in read_examples(tmp_path / "out" / "train.jsonl")
    }
    assert found["007"] == Example(
        example_id="007", question="NA", choices=("null", "1.0"), answer_key="A"
    )
    assert found["2"].question.split() == ["two", "lines"]
    path.write_text(path.read_text() + '3,three,"[""a"", ""b""]",C\r\n')
    assert refusal(recipe(path), tmp_path / "no").startswith(
        f"{path}:6: answerKey: 'C' is no option; "
    )


def test_dates_numbers_and_line_separators_in_jsonl_stay_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "odd [1]*.jsonl"
    rows = [row("2024-01-01", "2024-05-06"), row(7, "a\u2028b")]
    path.write_text(
        "\ufeff" + "\n\n".join(json.dumps(values, ensure_ascii=False) for values in rows),
        encoding="utf-8",
    )
    prepare(recipe(path), tmp_path / "out")
    found = {
        example.example_id: example.question
        for example in read_examples(tmp_path / "out" / "train.jsonl")
    }
    assert found == {"2024-01-01": "2024-05-06", "7": "a\u2028b"}


@pytest.mark.parametrize(
    ("choices", "answer", "expected"),
    [
        ({"label": ["1", "2", "3"], "text": ["x", "y", "z"]}, "3", "C"),
        ({"label": [1, 2], "text": ["x", "y"]}, 2, "B"),
        ({"label": ["B", "A"], "text": ["x", "y"]}, "B", "A"),
        (["x", "y"], "B", "B"),
        ('["x", "y"]', "A", "A"),
        ('{"label": ["yes", "no"], "text": ["x", "y"]}', "no", "B"),
        ([f"option {n}" for n in range(26)], "Z", "Z"),
        (["x", "y"], "", None),
        (["x", "y"], None, None),
        (["x", "y", "x"], "C", "C"),
    ],
)
def test_labels_become_letters_by_position(
    tmp_path: Path, choices: Any, answer: Any, expected: str | None
) -> None:
    (example,) = run(tmp_path, [row("a", " Which? ", answer, choices)]).rows["train"]
    assert example.answer_key == expected
    assert example.question == "Which?"
    assert example.concept == "mood"


def test_columns_under_other_names(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "r.jsonl",
        [{"text": "Why?", "options": ["x", "y"], "gold": "B", "answerKey": "nonsense"}],
    )
    columns = Columns(id=None, question="text", concept=None, choices="options", answer="gold")
    prepare(recipe(path, columns=columns), tmp_path / "out")
    (example,) = read_examples(tmp_path / "out" / "train.jsonl")
    assert example.model_dump(exclude={"example_id"}) == {
        "question": "Why?",
        "concept": "",
        "choices": ("x", "y"),
        "answer_key": "B",
    }


# Refusals


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"question": ""}, "question: empty; "),
        ({"question": " \t"}, "question: empty; "),
        ({"question": None}, "question: missing; "),
        ({"question": ["x"]}, "question: list where text belongs; "),
        ({"question": "half \ud83d"}, "question: half of a surrogate pair"),
        ({"id": " "}, "id: empty; "),
        ({"id": None}, "id: missing; "),
        ({"id": True}, "id: bool where text belongs; "),
        ({"question_concept": {}}, "question_concept: dict where text belongs; "),
        ({"choices": ["x"]}, "choices: 1 options; there must be 2 to 26"),
        ({"choices": [f"o{n}" for n in range(27)]}, "choices: 27 options; there must be 2 to 26"),
        ({"choices": ["x", " "]}, "choices: option 2: empty; "),
        ({"choices": ["x", None]}, "choices: option 2: missing; "),
        ({"choices": ["x", 1.5]}, "choices: option 2: float where text belongs; "),
        ({"choices": "x or y"}, "choices: no JSON (Expecting value"),
        ({"choices": {"label": ["A", "B"]}}, "choices: neither "),
        (
            {"choices": {"label": ["A"], "text": ["x", "y"]}},
            "choices: the labels are not as many as the 2 texts; ",
        ),
        (
            {"choices": {"label": ["A", "A"], "text": ["x", "y"]}},
            "choices: two options of one label among 'A', 'A'; ",
        ),
        ({"answerKey": "D"}, "answerKey: 'D' is no option; the options are 'A' ('pleased'), 'B' ("),
        ({"answerKey": "a"}, "answerKey: 'a' is no option; the options are 'A' ('pleased'), "),
        ({"answerKey": ["A"]}, "answerKey: list where text belongs; "),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(
    tmp_path: Path, bad: dict[str, Any], expected: str
) -> None:
    path = jsonl(
        tmp_path / "train.jsonl", [row("a", "One?"), row("b", "Two?") | bad, row("c", "Three?")]
    )
    assert refusal(recipe(path), tmp_path / "out").startswith(f"{path}:2: {expected}")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "none.jsonl",
            None,
            ": can't be read (No such file or directory); correct dataset.files.train",
        ),
        ("empty.jsonl", b"", ": empty, without a single row; correct dataset.files.train"),
        ("blank.jsonl", b"\n \n", ": empty, without a single row; correct dataset.files.train"),
        ("head.csv", b"id,question,choices,answerKey\n", ": empty, without a single row; "),
        ("cut.jsonl", b'{"id": "a", "ques\n', ":1: no JSON object (Unterminated string"),
        ("list.jsonl", b"\n[1, 2]\n", ":2: no JSON object but list; "),
        ("latin.jsonl", b'{"id": "a"}\n{"id": "\xe9"}\n', ":2: not UTF-8; "),
        ("deep.jsonl", b'{"id": ' + b"[" * 100_000, ":1: no JSON object (maximum recursion depth "),
        ("latin.csv", b"id,question,choices,answerKey\n1,caf\xe9,x,A\n", ":2: not UTF-8; "),
        ("unread.csv", b"id,question,choices,note\n1,why,x,caf\xe9\n", ":2: not UTF-8; "),
        (
            "ragged.csv",
            b'id,question,choices,answerKey\n1,"a\nb",c,A\n2,Yes, or no?,c,A\n',
            ":4: 5 values under 4 col",
        ),
        (
            "open.csv",
            b'id,question,choices,answerKey\n1,"a,c,A\n',
            ":2: no valid CSV (unexpected end of data); ",
        ),
        (
            "twice.csv",
            b"id,question,id\n1,a,2\n",
            ":1: two columns of one name among 'id', 'question', 'id'; ",
        ),
        (
            "rows.parquet",
            b"no parquet at all",
            ": can't be read as parquet (Parquet magic bytes not found",
        ),
        ("rows.xlsx", b"PK", ": dataset.files.train takes .jsonl, .csv, .parquet, not '.xlsx'"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert refusal(recipe(tmp_path / name), tmp_path / "out").startswith(
        f"{tmp_path / name}{expected}"
    )


def test_a_refused_file_prints_nothing_besides_the_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"no parquet at all")
    refusal(recipe(tmp_path / "rows.parquet"), tmp_path / "out")
    run(tmp_path, many(5))
    assert capfd.readouterr() == ("", "")


def test_a_missing_column_is_named_with_its_setting_and_those_that_are_there(
    tmp_path: Path,
) -> None:
    path = jsonl(tmp_path / "train.jsonl", [{"id": "a", "text": "Why?", "choices": ["x", "y"]}])
    assert refusal(recipe(path), tmp_path / "out") == (
        f"{path}: no column 'question', only 'id', 'text', 'choices'; "
        f"set dataset.columns.question to the one that is meant"
    )


def test_train_needs_no_answers_but_test_does(tmp_path: Path) -> None:
    bare = [{"id": "a", "question": "Why?", "choices": ["x", "y"]}]
    assert run(tmp_path, bare).rows["train"][0].answer_key is None
    path = jsonl(tmp_path / "test.jsonl", bare)
    config = recipe(jsonl(tmp_path / "train.jsonl", many(3)), path)
    assert refusal(config, tmp_path / "no").startswith(
        f"{path}: no column 'answerKey', only 'id', 'question', "
    )
    jsonl(path, [row("y", "Yes?"), row("z", "Why?", "")])
    assert refusal(config, tmp_path / "no").startswith(
        f"{path}:2: answerKey: empty, but rows of test need an answer; "
    )


def test_rows_without_an_answer_stay_in_train_whatever_is_carved(tmp_path: Path) -> None:
    unanswered = [row(f"u{n}", message(n), "") for n in range(40, 60)]
    # The first of the rows that are carved, too.
    copy = row("copy", message(0), "")
    rows = [*many(40), *unanswered, copy]
    found = run(tmp_path, rows, carve={"gold": 0.5, "test": 0.5})
    assert found.ids["train"] == {f"u{n}" for n in range(40, 60)}
    assert len(found.ids["gold"]) + len(found.ids["test"]) == 40
    assert found.counts.duplicates_dropped == 1


def test_an_unknown_split_lists_those_that_exist(tmp_path: Path) -> None:
    config = recipe(jsonl(tmp_path / "a.jsonl", many(3)), jsonl(tmp_path / "b.jsonl", many(3, 10)))
    config = config.model_copy(update={"splits": {"train": "train", "test": "dev"}})
    expected = "dataset.splits.test: the source has no split 'dev', only train, test; "
    assert refusal(config, tmp_path / "out").startswith(expected)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            {"carve": {"test": 0.1}},
            "dataset.carve.test: test rows come from the split 'test' already ",
        ),
        ({"sample": {"gold": 3}}, "dataset.sample.gold: no such split; "),
        ({"carve": {"gold": 0.6, "validation": 0.5}}, "dataset.carve: the shares add up to 1.1; "),
    ],
)
def test_settings_at_odds_are_refused(tmp_path: Path, more: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(expected)):
        run(tmp_path, many(5), many(5, 10), **more)


def test_a_share_that_leaves_a_split_empty_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "train.jsonl", many(3))
    assert "no row is left for test" in refusal(
        recipe(path, carve={"test": 0.0001}), tmp_path / "out"
    )


# Positions


CARVE = {"gold": 0.2, "validation": 0.1, "test": 0.3}


def test_carving_takes_shares_and_loses_no_row(tmp_path: Path) -> None:
    result = run(tmp_path, many(1000), carve=CARVE, near_duplicate=1)
    assert result.counts.near_duplicates_dropped == 0
    assert (
        sum(len(ids) for ids in result.ids.values())
        == len(set().union(*result.ids.values()))
        == 1000
    )
    for role, share in (CARVE | {"train": 0.4}).items():
        assert abs(len(result.ids[role]) / 1000 - share) < 0.05


def test_carving_and_sampling_follow_the_stated_hash(tmp_path: Path) -> None:
    def position(example: Example) -> float:
        content = json.dumps([example.question, sorted(example.choices)], separators=(",", ":"))
        digest = hashlib.sha256(content.encode()).hexdigest()
        return int(hashlib.sha256(f"7:{digest}".encode()).hexdigest(), 16) / 2**256

    result = run(tmp_path, many(400), carve=CARVE, sample={"train": 50, "gold": 10}, seed=7)
    bounds = {"gold": (0, 0.2), "validation": (0.2, 0.3), "test": (0.3, 0.6), "train": (0.6, 1)}
    for role, rows in result.rows.items():
        positions = [position(example) for example in rows]
        assert positions == sorted(positions)
        assert bounds[role][0] <= positions[0] <= positions[-1] < bounds[role][1]
    everything = [
        position(Example(example_id="", question=r["question"], choices=tuple(MOODS)))
        for r in many(400)
    ]
    assert [position(e) for e in result.rows["gold"]] == sorted(everything)[:10]
    assert [position(e) for e in result.rows["train"]] == sorted(p for p in everything if p >= 0.6)[
        :50
    ]


def rounds(tmp_path: Path, rows: list[dict[str, Any]], count: int = 3, **more: Any) -> list[Result]:
    """The data in each round of a rotation."""
    return [
        run(
            tmp_path,
            rows,
            carve={"gold": 0.1, "validation": 0.1, "test": 0.15},
            rotation={"rounds": count, "round": number},
            **more,
        )
        for number in range(count)
    ]


def test_each_round_has_test_rows_that_no_round_trains_on(tmp_path: Path) -> None:
    found = rounds(tmp_path, many(600))
    without = run(tmp_path, many(600), carve={"gold": 0.1, "validation": 0.1, "test": 0.15})
    assert found[0].ids["test"] == without.ids["test"]
    for role in ("gold", "validation", "train"):
        assert found[0].bytes[role] == found[1].bytes[role] == found[2].bytes[role]
    tests = [result.ids["test"] for result in found]
    assert all(60 < len(ids) < 130 for ids in tests)
    assert len(set().union(*tests)) == sum(map(len, tests))
    assert not set().union(*tests) & (found[0].ids["train"] | found[0].ids["gold"])
    more = rounds(tmp_path, many(600), count=5)
    assert [result.ids["test"] for result in more[:3]] == tests
    assert more[0].ids["train"] < found[0].ids["train"]


def test_what_resembles_a_test_row_of_a_later_round_trains_no_student(tmp_path: Path) -> None:
    rows = [
        row(f"{kind}{n}", f"{message(n, 30)}{end}")
        for n in range(100)
        for kind, end in (("a", ""), ("b", " so"))
    ]
    found = rounds(tmp_path, rows)
    later = {key[1:] for result in found for key in result.ids["test"]}
    assert not later & {key[1:] for key in found[0].ids["train"] | found[0].ids["gold"]}


def test_rounds_that_leave_nothing_for_train_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"test once for each of dataset\.rotation\.rounds,"):
        rounds(tmp_path, many(5), count=6)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rotation": {"rounds": 3, "round": 3}, "carve": {"test": 0.1}}, "the last is 2; "),
        ({"rotation": {"rounds": 3}}, r"rotation needs a test split in dataset\.carve"),
    ],
)
def test_a_rotation_without_rows_is_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DatasetRecipe.model_validate(more)


def test_a_recipe_without_a_rotation_has_the_cache_key_of_earlier_versions() -> None:
    assert "rotation" not in DatasetRecipe().content_id
    rotated = DatasetRecipe.model_validate(
        {"splits": {"train": "pool"}, "carve": {"test": 0.1}, "rotation": {"rounds": 2}}
    )
    assert '"rotation":{"rounds":2,"round":0}' in rotated.content_id


def test_adding_rows_moves_none(tmp_path: Path) -> None:
    before = run(tmp_path, many(300), carve=CARVE)
    after = run(tmp_path, many(200, 1000) + many(300) + many(200, 2000), carve=CARVE)
    for role, ids in before.ids.items():
        assert ids <= after.ids[role]


def test_a_corrected_answer_or_another_spelling_moves_no_row(tmp_path: Path) -> None:
    before = run(tmp_path, many(300), carve=CARVE)
    changed = [
        r | {"answerKey": "B", "question": f"  {r['question'].upper()} ".replace(" ", "  ")}
        for r in many(300)
    ]
    assert run(tmp_path, changed, carve=CARVE).ids == before.ids


def test_the_order_of_the_rows_changes_no_byte(tmp_path: Path) -> None:
    rows = many(100) + [row(f"copy{n}", message(n)) for n in range(20)]
    rows += [row(f"near{n}", f"{message(n, 40)} {NOUNS[n]}") for n in range(10)]
    rows += [row(f"alike{n}", message(n, 40)) for n in range(10)]
    result = run(tmp_path, rows, carve={"test": 0.2})
    shuffled = run(tmp_path, random.Random(3).sample(rows, len(rows)), carve={"test": 0.2})
    assert result.bytes == shuffled.bytes
    assert result.counts == shuffled.counts
    assert result.counts.duplicates_dropped > 0
    assert result.counts.near_duplicates_dropped > 0


def test_another_seed_gives_another_test_split(tmp_path: Path) -> None:
    first = run(tmp_path, many(200), carve={"test": 0.3}, seed=0).ids["test"]
    second = run(tmp_path, many(200), carve={"test": 0.3}, seed=1).ids["test"]
    assert len(first & second) < 0.6 * len(first)


def test_a_changed_file_of_the_same_size_and_time_is_noticed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "train.jsonl", [row("a", "One?")])
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    prepare(recipe(path), tmp_path / "out")
    jsonl(path, [row("a", "Two?")])
    os.utime(path, ns=times)
    prepare(recipe(path), tmp_path / "out")
    assert read_examples(tmp_path / "out" / "train.jsonl")[0].question == "Two?"
    assert not list((tmp_path / "home").rglob("*"))


# Copies and leaks


def test_copies_within_train_are_dropped_and_counted(tmp_path: Path) -> None:
    copies = [
        row("b", "The VAN   came, twice!", ""),
        row("c", "The van came, twice!", "C", ["neither", "pleased", "displeased"]),
    ]
    result = run(tmp_path, [*copies, row("d", "The van came, twice!", "A", ["x", "y"]), *copies])
    assert (result.counts.duplicates_dropped, result.counts.near_duplicates_dropped) == (3, 0)
    assert result.ids["train"] == {"c", "d"}


def test_near_copies_within_train_are_dropped_and_counted(tmp_path: Path) -> None:
    text = message(1, 30)
    rows = [
        row("a", text),
        row("b", f"{text} again"),
        row("c", text + "!"),
        row("d", message(2, 30)),
    ]
    result = run(tmp_path, rows)
    assert (result.counts.duplicates_dropped, result.counts.near_duplicates_dropped) == (0, 2)
    assert "d" in result.ids["train"]
    assert run(tmp_path, rows, near_duplicate=1).counts.near_duplicates_dropped == 1


def test_short_or_wordless_questions_and_other_options_are_no_near_copies(tmp_path: Path) -> None:
    text = message(1, 30)
    rows = [
        row("a", "Well done"),
        row("b", "Well then"),
        row("c", "??"),
        row("d", "!!"),
        row("e", text),
    ]
    rows += [row("f", text + "!", "A", ["x", "y", "z"])]
    assert run(tmp_path, rows).counts.near_duplicates_dropped == 0


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_near_copies_are_those_that_comparing_every_pair_finds(
    tmp_path: Path, threshold: float
) -> None:
    generator = random.Random(5)
    rows = []
    for n in range(300):
        words = message(n // 6, generator.randint(3, 14)).split()
        words[generator.randrange(len(words))] = generator.choice(NOUNS)
        rows.append(row(f"m{n}", " ".join(words), "A", MOODS[: 2 + (n % 7 > 0)]))

    def triples(text: str) -> set[str]:
        words = text.split()
        return {" ".join(words[i : i + 3]) for i in range(len(words) - 2)}

    def similar(first: Example, second: Example) -> bool:
        pairs = (
            (triples(first.question), triples(second.question)),
            (set(first.choices), set(second.choices)),
        )
        return all(len(a & b) / len(a | b) >= threshold for a, b in pairs)

    kept: list[Example] = []
    for example in _in_order(rows):
        if not any(similar(example, other) for other in kept):
            kept.append(example)
    assert run(tmp_path, rows, near_duplicate=threshold).rows["train"] == kept
    assert 10 < len(kept) < 300


def _in_order(rows: list[dict[str, Any]]) -> list[Example]:
    """Return distinct rows by the position that splits.py states, for seed 0."""
    by_position: dict[str, Example] = {}
    for values in sorted(rows, key=lambda values: str(values["id"])):
        content = json.dumps([values["question"], sorted(values["choices"])], separators=(",", ":"))
        position = hashlib.sha256(
            f"0:{hashlib.sha256(content.encode()).hexdigest()}".encode()
        ).hexdigest()
        example = Example(
            example_id=values["id"],
            question=values["question"],
            concept="mood",
            choices=tuple(values["choices"]),
            answer_key="A",
        )
        by_position.setdefault(position, example)
    return [by_position[position] for position in sorted(by_position)]


def test_a_row_of_train_that_stands_in_test_stops_the_run_with_both_places(tmp_path: Path) -> None:
    train = jsonl(
        tmp_path / "train.jsonl", [row("a", "One?"), row("b", "TWO?", "B"), row("c", "Three?")]
    )
    test = jsonl(tmp_path / "test.jsonl", [row("x", "two?"), row("c", "Three?"), row("y", "Four?")])
    text = refusal(recipe(train, test), tmp_path / "out")
    assert re.match(
        rf"{re.escape(str(train))}:[23]: a row of train may not stand in validation or test too; "
        "found 2: ",
        text,
    )
    assert f"{train}:2 = {test}:1" in text
    assert f"{train}:3 = {test}:2" in text


def test_a_gold_row_that_stands_in_test_stops_the_run(tmp_path: Path) -> None:
    paths = {
        name: (str(jsonl(tmp_path / f"{name}.jsonl", many(3, n))),)
        for name, n in [("train", 9), ("same", 0)]
    }
    splits = {"train": "train", "gold": "same", "test": "same"}
    config = DatasetRecipe.model_validate({"source": "files", "files": paths, "splits": splits})
    assert "a row of gold may not stand in validation or test too; found 3: " in refusal(
        config, tmp_path / "out"
    )


def three_files(tmp_path: Path, **rows: list[dict[str, Any]]) -> DatasetRecipe:
    paths = {name: (str(jsonl(tmp_path / f"{name}.jsonl", rows[name])),) for name in rows}
    return DatasetRecipe.model_validate(
        {"source": "files", "files": paths, "splits": {name: name for name in rows}}
    )


def test_a_validation_row_that_stands_in_test_stops_the_run_with_both_places(
    tmp_path: Path,
) -> None:
    other_spelling = [row("v", "Is  it GOOD?", "B"), *many(2, 50)]
    config = three_files(
        tmp_path, train=many(9), validation=other_spelling, test=[row("t", "Is it good?")]
    )
    text = refusal(config, tmp_path / "out")
    place = re.escape(str(tmp_path))
    assert re.fullmatch(
        rf"{place}/validation.jsonl:1: a row of validation may not stand in test too; found 1: "
        rf"{place}/validation.jsonl:1 = {place}/test.jsonl:1; remove them from one of the two, or "
        r"carve validation and test out of the train rows \(dataset.carve\)",
        text,
    )


def test_one_error_names_the_rows_of_all_roles_that_stand_in_test(tmp_path: Path) -> None:
    config = three_files(
        tmp_path,
        train=[*many(5), row("a", "One?")],
        gold=[row("b", "Two?")],
        validation=[row("c", "Three?"), *many(2, 50)],
        test=[row("x", "one?"), row("y", "two?"), row("z", "three?")],
    )
    text = refusal(config, tmp_path / "out")
    for role, line, copied in (("train", 6, 1), ("gold", 1, 2), ("validation", 1, 3)):
        assert f"a row of {role} may not stand in " in text
        assert f"{tmp_path}/{role}.jsonl:{line} = {tmp_path}/test.jsonl:{copied}" in text


def test_a_carved_test_row_that_stands_in_a_validation_file_stops_the_run(tmp_path: Path) -> None:
    config = three_files(tmp_path, train=many(40), validation=many(40))
    config = config.model_copy(update={"carve": {"test": 0.999}})
    assert "a row of validation may not stand in test too; found 40: " in refusal(
        config, tmp_path / "out"
    )


def test_copies_among_carved_rows_share_a_role(tmp_path: Path) -> None:
    rows = many(60) + [row(f"copy{n}", f" {message(n).upper()}", "ABC"[n % 3]) for n in range(60)]
    result = run(tmp_path, rows, carve={"validation": 0.3, "test": 0.3})
    numbers = {role: {re.sub(r"\D+", "", key) for key in ids} for role, ids in result.ids.items()}
    assert not numbers["validation"] & numbers["test"]
    assert len(result.ids["test"]) == 2 * len(numbers["test"]) > 0


def test_a_validation_row_similar_to_a_test_row_is_dropped_and_those_alike_within_it_stay(
    tmp_path: Path,
) -> None:
    text, other = message(1, 30), message(2, 30)
    validation = [row("a", f"{text} again"), row("b", other), row("c", f"{other} again")]
    config = three_files(
        tmp_path,
        train=[row("d", f"{other} so"), *many(5, 100)],
        validation=validation,
        test=[row("x", text)],
    )
    result = Result(prepare(config, tmp_path / "out"), tmp_path / "out")
    assert result.ids["validation"] == {"b", "c"}
    assert result.ids["test"] == {"x"}
    assert result.ids["train"] == {f"m{n}" for n in range(100, 105)}
    assert result.counts.near_duplicates_dropped == 2


def test_many_leaks_are_listed_in_part_and_counted_whole(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", many(50))
    text = refusal(recipe(path, path), tmp_path / "out")
    assert "; found 50: " in text
    assert text.count(f" = {path}:") == 20
    assert " and 30 more; " in text


def test_a_row_of_train_similar_to_a_test_row_is_dropped_and_counted(tmp_path: Path) -> None:
    text = message(1, 30)
    result = run(tmp_path, [row("a", f"{text} again"), *many(5, 100)], [row("x", text)])
    assert result.counts.near_duplicates_dropped == 1
    assert result.ids == {"train": {f"m{n}" for n in range(100, 105)}, "test": {"x"}}


def test_neighbours_across_carved_splits_leave_train_and_no_test_row_goes(tmp_path: Path) -> None:
    rows = [
        row(f"{kind}{n}", f"{message(n, 30)}{end}")
        for n in range(100)
        for kind, end in (("a", ""), ("b", " so"))
    ]
    test = run(tmp_path, rows, carve={"test": 0.3}, near_duplicate=1).ids["test"]
    result = run(tmp_path, rows, carve={"test": 0.3})
    assert result.ids["test"] == test
    assert not {key[1:] for key in result.ids["train"]} & {key[1:] for key in test}
    assert len(result.ids["train"]) == 100 - len({key[1:] for key in test})
    assert result.counts.near_duplicates_dropped == 200 - len(test) - len(result.ids["train"])


# Ids


def test_an_id_of_two_rows_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "train.jsonl", [row("a", "One?"), row("b", "Two?"), row("a", "Three?")])
    text = refusal(recipe(path), tmp_path / "out")
    assert text.startswith(f"{path}:3: id: 'a' of train is that of {path}:1 too; make ids unique, ")


def test_a_test_row_that_stands_there_twice_with_its_id_is_refused(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", many(3))
    test = jsonl(tmp_path / "test.jsonl", [row("a", "One?"), row("a", "ONE?")])
    text = refusal(recipe(train, test), tmp_path / "out")
    assert re.match(rf"{test}:[12]: id: 'a' of test is that of {test}:[12] too; ", text)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row("a", "One?"), *[{"question": "Two?", "choices": MOODS}] * 2], ":2: id: missing; "),
        ([{"question": "One?", "choices": MOODS}, row("b", "")], ":1: id: missing; "),
        ([row("a", ""), {"question": "Two?", "choices": MOODS}], ":1: question: empty; "),
        ([row("a", ""), {"id": "b"}, None], ":3: no JSON object but NoneType; "),
        ([{"id": "a", "question": ""}, {"id": "b"}], ": no column 'choices', only 'id', 'quest"),
    ],
)
def test_of_several_faults_of_a_file_one_is_told(
    rows: list[dict[str, Any]], said: str, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "train.jsonl", rows)
    assert refusal(recipe(path), tmp_path / "out").startswith(f"{path}{said}")


def test_an_id_in_two_files_is_refused_and_null_mends_it(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", [row("1", "One?")])
    test = jsonl(tmp_path / "test.jsonl", [row("1", "Two?")])
    assert f"is that of {test}:1 too" in refusal(recipe(train, test), tmp_path / "no")
    config = recipe(train, test, columns={"id": None})
    assert set(prepare(config, tmp_path / "out").splits) == {"train", "test"}


def test_without_ids_rows_are_named_by_content_and_copies_in_test_stay_apart(
    tmp_path: Path,
) -> None:
    bare = [{key: value for key, value in values.items() if key != "id"} for values in many(4)]
    result = run(tmp_path, bare[:3], [bare[3], bare[3]])
    again = run(tmp_path, bare[2::-1], [bare[3], bare[3]])
    assert result.ids == again.ids
    first, second = (example.example_id for example in result.rows["test"])
    assert second == f"{first}-2"
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in result.ids["train"])


# Reading back


def test_read_examples_names_the_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    good = Example(example_id="a", question="Why?", choices=("x", "y")).model_dump_json()
    path.write_text(f"{good}\n")
    assert read_examples(path) == [Example(example_id="a", question="Why?", choices=("x", "y"))]
    path.write_text(f'{good}\n{{"example_id": 3}}\n')
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}:2: example_id: "):
        read_examples(path)
    with pytest.raises(DataError, match="can't be read"):
        read_examples(tmp_path / "none.jsonl")


# Checking without writing


def test_check_rows_counts_what_prepare_writes_and_writes_nothing(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", many(300))
    config = recipe(train, carve={"test": 0.3}, sample={"train": 50})
    before = sorted(tmp_path.rglob("*"))
    counts = check_rows(config)
    assert sorted(tmp_path.rglob("*")) == before
    written = prepare(config, tmp_path / "out").splits
    assert counts == {role: split.rows for role, split in written.items()}
    assert counts["train"] == 50
    jsonl(train, [row("a", "One?"), row("b", "")])
    with pytest.raises(DataError, match=rf"^{re.escape(str(train))}:2: question: empty; "):
        check_rows(config)


# Network


def test_local_files_touch_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError(f"network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    pq.write_table(pa.Table.from_pylist(many(3)), tmp_path / "test.parquet")
    train = jsonl(tmp_path / "train.jsonl", many(5, 50))
    assert (
        prepare(recipe(train, tmp_path / "test.parquet"), tmp_path / "out").splits["test"].rows == 3
    )


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    """A hub on this machine."""
    with HubStandIn({"train": many(20), "validation": many(20, 100)}) as stand_in:
        yield stand_in


SCRIPT = """
import sys, json
from pathlib import Path
from distillery.data.prepare import prepare
from distillery.errors import DataError
from distillery.recipe import DatasetRecipe
for text in sys.argv[2:]:
    try:
        counts = prepare(DatasetRecipe(**json.loads(text)), Path(sys.argv[1]))
        print(json.dumps({role: split.rows for role, split in counts.splits.items()}))
    except DataError as error:
        print(error)
"""


def from_hub(tmp_path: Path, url: str, *changes: dict[str, Any], **environment: str) -> list[str]:
    """Return the line printed for each recipe by a process of its own: the hub's address is read on
    import."""
    base: dict[str, object] = {
        "source": "hub",
        "name": "tau/commonsense_qa",
        "revision": "v1",
        "splits": {"train": "train", "validation": "validation"},
    }
    recipes = [json.dumps(base | change) for change in changes]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "out"), *recipes],
        env=os.environ
        | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_a_hub_data_set_by_name_and_revision(tmp_path: Path, hub: HubStandIn) -> None:
    splits = {"train": "train", "test": "test"}
    lines = from_hub(
        tmp_path, hub.url, {}, {"splits": splits}, {"revision": "v2"}, {"name": "tau/nothing"}
    )
    assert lines[0] == '{"train": 20, "validation": 20}'
    assert f"/datasets/tau/commonsense_qa/resolve/{hub.commit}/README.md" in hub.asked
    assert "/datasets/tau/commonsense_qa/resolve/v1/README.md" not in hub.asked
    assert lines[1].startswith(
        "dataset.splits.test: the source has no split 'test', only train, validation; "
    )
    assert lines[2].startswith(
        "dataset.name: tau/commonsense_qa at v2 is not on the hub, or needs a login; "
    )
    assert lines[3].startswith(
        "dataset.name: tau/nothing at v1 is not on the hub, or needs a login; "
    )
    assert {example.example_id for example in read_examples(tmp_path / "out" / "train.jsonl")} == {
        f"m{n}" for n in range(20)
    }

    offline = from_hub(tmp_path, hub.url, {}, {"revision": "v3"}, HF_HUB_OFFLINE="1")
    assert offline[0] == lines[0], "what was loaded once is there without a connection"
    assert offline[1].startswith(
        "dataset.name: tau/commonsense_qa at v3 could not be loaded from the hub ("
    )
    assert offline[1].endswith("or set dataset.source to files and dataset.files to local copies")


def test_a_branch_stands_for_its_commit(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)

    def identity(revision: str | None) -> str:
        return source_identity(
            DatasetRecipe(source="hub", name="tau/commonsense_qa", revision=revision)
        )

    assert identity("v1") == f"tau/commonsense_qa@{'1' * 40}"
    hub.commit = "3" * 40
    assert identity("v1") == f"tau/commonsense_qa@{'3' * 40}"
    count = len(hub.asked)
    assert identity("2" * 40) == f"tau/commonsense_qa@{'2' * 40}"
    assert len(hub.asked) == count
    assert not caplog.records
    with pytest.raises(DataError, match="the hub has no tau/commonsense_qa with revision v9"):
        identity("v9")
    # Where the hub has no answer.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert identity("v1") == "tau/commonsense_qa@v1"
    assert "using the copy of revision v1 on this machine" in caplog.text
    with pytest.raises(DataError, match="the hub doesn't answer for tau/commonsense_qa"):
        identity(None)


@pytest.mark.slow
def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        (line,) = from_hub(tmp_path, f"http://127.0.0.1:{taken.getsockname()[1]}", {})
    assert line.startswith(
        "dataset.name: tau/commonsense_qa at v1 could not be loaded from the hub ("
    )
    assert "Couldn't reach 'tau/commonsense_qa'" in line


# Real rows


@pytest.mark.slow
def test_real_rows_of_commonsense_qa(tmp_path: Path) -> None:
    folder = os.environ.get("COMMONSENSE_QA_DIR")
    assert folder, (
        "set COMMONSENSE_QA_DIR to a folder with train.jsonl in the schema of tau/commonsense_qa"
    )
    path = Path(folder) / "train.jsonl"
    source = {
        values["id"]: values
        for values in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    }
    counts = prepare(recipe(path, carve={"validation": 0.1, "test": 0.2}), tmp_path / "out")
    rows = {
        role: read_examples(tmp_path / "out" / split.file) for role, split in counts.splits.items()
    }
    dropped = counts.duplicates_dropped + counts.near_duplicates_dropped
    assert sum(len(examples) for examples in rows.values()) + dropped == len(source) >= 1000
    assert dropped < 0.02 * len(source)
    assert abs(len(rows["test"]) / len(source) - 0.2) < 0.04
    for example in (example for examples in rows.values() for example in examples):
        values = source[example.example_id]
        assert example.question == values["question"].strip()
        assert example.choices == tuple(text.strip() for text in values["choices"]["text"])
        assert example.answer_key == values["answerKey"]
        assert example.concept == values["question_concept"].strip()
