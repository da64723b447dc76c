"""`distillery new`: the recipe that it writes is one that a run takes, and it says what to mend."""

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import yaml
from texts import texts, write_csv, write_texts

from distillery.data.guess import JOIN_PAGE
from distillery.errors import DataError, RecipeError
from distillery.new_recipe import GOOD_ANSWERED, new_recipe
from distillery.readiness import check_data
from distillery.recipe import Columns, Recipe, load_recipe, parse_recipe
from distillery.recipe.draft import MANY_ROWS, choose_shares, draft

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command starts in, without an endpoint in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("NAME", "ENDPOINT", "KEY"):
        monkeypatch.delenv(f"TEACHER_MODEL_{name}", raising=False)
    return tmp_path


def run(*files: str, **options: Any) -> str:
    return "\n".join(new_recipe([Path(file) for file in files], **options))


def checked(file: str) -> Recipe:
    """The recipe, whose rows `distillery check` finds to be all right."""
    recipe = load_recipe(file)
    assert "FAIL" not in {finding.level for finding in check_data(recipe)}
    return recipe


def write_jsonl(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_the_next_commands_can_be_copied_where_no_environment_is_active(tmp_path: Path) -> None:
    write_texts(Path("notes.csv"), answered=200)
    assert run("notes.csv").endswith(
        "\n  distillery check notes.yaml\n  python -m flows.distill notes.yaml"
    )
    command = tmp_path / ".venv" / "bin" / "distillery"
    command.parent.mkdir(parents=True)
    command.touch()
    assert run("notes.csv", force=True).endswith(
        "\n  .venv/bin/distillery check notes.yaml\n  .venv/bin/python -m flows.distill notes.yaml"
    )


@pytest.mark.parametrize("teacher", ["local", "endpoint"])
def test_a_csv_with_rows_without_a_label(teacher: Any) -> None:
    write_texts(Path("notes.csv"), answered=200, unanswered=400)
    said = run("notes.csv", teacher=teacher)
    recipe = checked("notes.yaml")
    assert recipe.name == recipe.registry.model_name == "notes"
    assert recipe.teacher.kind == teacher
    assert recipe.student.gold
    assert recipe.dataset.files == {"train": ("notes.csv",)}
    assert recipe.dataset.carve == {"gold": 0.45, "validation": 0.15, "test": 0.4}
    assert not recipe.teacher.filters.agreement_with_gold
    assert "200 rows with a label, 400 without" in said
    assert "train      400 rows" in said
    assert ("400 calls" in said) == (teacher == "endpoint")
    assert "python -m flows.distill notes.yaml" in said


def test_jsonl_with_title_body_and_ids_that_repeat() -> None:
    rows = []
    for number, row in enumerate(texts(120, 200)):
        rows.append({"id": number % 9, "subject": f"Case {number}", "body": row["text"]})
        rows[-1]["what: it is"] = row["label"]
    run(write_jsonl("cases 1.jsonl", rows), label="what: it is", name="cases", out=Path("mine.yml"))
    recipe = checked("mine.yml")
    columns = recipe.dataset.columns
    assert (columns.id, columns.question, columns.answer) == (None, None, "what: it is")
    assert recipe.dataset.fields == ("subject", "body")
    assert recipe.dataset.files["train"] == ("cases 1.jsonl",)


def test_parquet_with_numbers_for_labels_and_a_file_without() -> None:
    rows = texts(100)
    labels = [number % 3 for number in range(100)]
    table = pa.table({"text": [row["text"] for row in rows], "label": labels})
    pq.write_table(table, "a.parquet")
    write_csv(Path("b.csv"), [{"text": row["text"]} for row in texts(0, 300)[100:]])
    said = run("a.parquet", "b.csv", out=Path("both.yaml"))
    assert "classes  3: 0 34, 1 33, 2 33" in said
    assert checked("both.yaml").dataset.files["train"] == ("a.parquet", "b.csv")


def test_without_unlabelled_rows_the_teacher_labels_a_part_of_the_others() -> None:
    write_texts(Path("all.csv"), answered=300)
    said = run("all.csv")
    recipe = checked("all.yaml")
    assert recipe.teacher.filters.agreement_with_gold
    assert sum(recipe.dataset.carve.values()) < 0.95
    assert "Add rows without a label" in said


def test_bad_rows_are_named_in_part_and_the_recipe_is_written() -> None:
    rows = texts(200, 50)
    for row in rows[:30]:
        row["text"] = " "
    write_csv(Path("bad.csv"), rows)
    said = run("bad.csv", teacher="endpoint")
    assert "Mend first, or leave out by --without-bad-rows, since a run stops at bad rows:" in said
    assert "bad rows:\n  bad.csv:2: text: empty; fill" in said
    assert "bad.csv:21: text: empty" in said
    assert "bad.csv:22: " not in said
    assert "  and 10 more" in said
    assert "gold       about 76 rows: the models learn" in said
    assert "distillery quote, once the bad rows are mended" in said
    assert load_recipe("bad.yaml").task.kind == "classify"
    write_csv(Path("bad.csv"), rows[30:])
    checked("bad.yaml")


def test_the_recipe_is_for_copies_without_bad_rows_where_that_is_asked_for() -> None:
    rows = texts(200, 50)
    for row in rows[:30]:
        row["text"] = " "
    write_csv(Path("bad.csv"), rows)
    write_csv(Path("whole.csv"), texts(0, 300)[250:])
    judging = held_out(120)
    judging[3]["label"] = ""
    write_csv(Path("test.csv"), judging)
    before = Path("bad.csv").read_bytes()
    said = run("bad.csv", "whole.csv", test=[Path("test.csv")], without_bad_rows=True)
    assert "Left out, since a run stops at bad rows:\n  bad.csv:2: text: empty; fill" in said
    assert "  and 11 more" in said
    assert "  bad-good.csv has the other rows of bad.csv, bad-bad.jsonl these with" in said
    assert "  test-good.csv has the other rows of test.csv, test-bad.jsonl these with" in said
    assert "test       119 rows: they judge" in said
    recipe = checked("bad.yaml")
    assert recipe.dataset.files == {
        "train": ("bad-good.csv", "whole.csv"),
        "test": ("test-good.csv",),
    }
    first = Path("bad.yaml").read_text().splitlines()[0]
    assert first.endswith("distillery new bad.csv whole.csv --test=test.csv --without-bad-rows")
    assert len(Path("bad-bad.jsonl").read_text().splitlines()) == 30
    assert Path("bad.csv").read_bytes() == before
    with pytest.raises(DataError, match=r"bad-good\.csv: exists; rename it, or say --force"):
        run("bad.csv", name="again", without_bad_rows=True)
    write_csv(Path("bad.csv"), rows[30:])
    said = run("bad.csv", without_bad_rows=True, force=True)
    assert "Left out" not in said
    assert checked("bad.yaml").dataset.files == {"train": ("bad.csv",)}


def test_the_recipe_follows_from_the_rows_that_are_left() -> None:
    rows = [{"id": number, **row} for number, row in enumerate(bookings(200, answered=200))]
    rows.append({"id": 3, "message": " ", "fields": {"price": 2}})
    run(write_jsonl("orders.jsonl", rows), without_bad_rows=True)
    recipe = checked("orders.yaml")
    assert recipe.dataset.columns.id == "id"
    assert isinstance(recipe.task.answer_schema, dict)
    assert "price" not in recipe.task.answer_schema["properties"]


def test_a_file_is_not_of_test_rows_and_of_others() -> None:
    write_csv(Path("notes.csv"), texts(200))
    with pytest.raises(DataError, match=r"--test .*notes\.csv: is among the files of DATA too"):
        run("notes.csv", test=[Path.cwd() / ".." / Path.cwd().name / "notes.csv"])


def test_too_few_rows_rare_and_uneven_classes_are_told() -> None:
    rows = texts(45)
    for number in range(45):
        rows[number]["label"] = "river" if number < 36 else ["bread", "cloud"][number < 43]
    write_csv(Path("few.csv"), rows)
    said = run("few.csv")
    assert "45 rows with a label: too few to train and judge a student; label 50 at least" in said
    assert "classes with fewer than 5 rows: bread; label more" in said
    assert "the commonest has 5 times" in said


def test_few_rows_with_a_label_are_told_with_what_they_can_tell() -> None:
    write_texts(Path("few.csv"), answered=90, unanswered=300)
    said = run("few.csv")
    told = [line.strip() for line in said.splitlines() if " are few: " in line]
    assert told == [
        "validation rows: 16 are few: they tell how good a model is to ±24 points only (30: ±18); "
        "use more validation rows",
        "test rows: 42 are few: they tell how good a model is to ±15 points only (100: ±10); "
        "use more test rows",
    ]
    # The check says the same.
    findings = map(str, check_data(load_recipe("few.yaml")))
    assert [line for line in findings if line.startswith("warn")] == [f"warn {of}" for of in told]
    write_texts(Path("some.csv"), answered=GOOD_ANSWERED, unanswered=300)
    assert " are few: " not in run("some.csv")


def held_out(count: int) -> list[dict[str, Any]]:
    return [{**row, "text": f"Later: {row['text']}"} for row in texts(count)]


def test_a_file_of_test_rows_leaves_all_others_to_train() -> None:
    write_csv(Path("notes.csv"), texts(150, 300))
    write_csv(Path("held-out.csv"), held_out(60))
    said = run("notes.csv", test=[Path("held-out.csv")])
    assert "Read 510 rows of notes.csv, held-out.csv" in said
    assert "60 rows for the test alone" in said
    assert "test       60 rows: they judge the student" in said
    assert "test rows: 60 are few: they tell how good a model is to ±13 points" in said
    assert "validation rows: 17 are few" in said
    recipe = checked("notes.yaml")
    assert recipe.dataset.files == {"train": ("notes.csv",), "test": ("held-out.csv",)}
    assert recipe.dataset.carve == {"gold": 0.85, "validation": 0.15}
    first = Path("notes.yaml").read_text().splitlines()[0]
    assert first == "# Made by: distillery new notes.csv --test=held-out.csv"


def test_what_is_wrong_in_a_file_of_test_rows_is_told() -> None:
    write_csv(Path("notes.csv"), texts(200, 300))
    rows = held_out(60)
    rows[3]["label"], rows[5]["label"] = "", "River"
    write_csv(Path("held-out.csv"), rows)
    said = run("notes.csv", test=[Path("held-out.csv")])
    assert "  held-out.csv:5: label: empty, but rows of test need an answer; fill it in" in said
    assert "  held-out.csv:7: label 'River': no row of notes.csv has it" in said
    write_csv(Path("held-out.csv"), texts(20))
    said = run("notes.csv", test=[Path("held-out.csv")], force=True)
    assert "a run would stop: " in said
    assert "may not stand in validation or test too" in said
    assert "notes.csv:2 = held-out.csv:2" in said
    write_csv(Path("held-out.csv"), texts(0, 20))
    with pytest.raises(DataError, match=r"held-out\.csv:2: label: empty, but rows of test need"):
        run("notes.csv", test=[Path("held-out.csv")], force=True)
    write_csv(Path("held-out.csv"), [{"text": "a", "answer": "river"}])
    with pytest.raises(DataError, match=r"held-out\.csv: no column 'label', only 'text', 'answer'"):
        run("notes.csv", test=[Path("held-out.csv")], force=True)


def test_ids_that_test_rows_share_with_others_name_no_row() -> None:
    write_csv(Path("notes.csv"), [{"id": n, **row} for n, row in enumerate(texts(200, 100))])
    write_csv(Path("held-out.csv"), [{"id": n, **row} for n, row in enumerate(held_out(60))])
    run("notes.csv", test=[Path("held-out.csv")])
    assert checked("notes.yaml").dataset.columns.id is None


def test_a_copy_of_the_sample_is_named_only_where_it_overwrites_nothing() -> None:
    write_texts(Path("notes.csv"), answered=200, unanswered=300)
    named = "  teacher    endpoint: named in .env"
    assert f"{named} (copy sample.env)" in run("notes.csv", teacher="endpoint")
    Path(".env").touch()
    assert f"{named}\n" in run("notes.csv", teacher="endpoint", force=True)


def test_long_texts_raise_the_limit_of_the_prompt_that_the_student_has() -> None:
    rows = texts(120, 20)
    rows[7]["text"] = "word and word " * 150
    write_csv(Path("long.csv"), rows)
    assert "long texts" not in run("long.csv")
    limit = checked("long.yaml").prompt.max_tokens
    assert 1024 < limit < 2048
    assert limit % 64 == 0
    run("long.csv", teacher="endpoint", force=True)
    recipe = checked("long.yaml")
    assert recipe.student_prompt.max_tokens == limit
    assert recipe.student_prompt.answer == "class"
    rows[7]["text"] *= 10
    write_csv(Path("long.csv"), rows)
    assert "long texts: 1 row with more than about 2,048 tokens" in run("long.csv", force=True)


def test_a_file_is_not_overwritten_and_a_name_can_be_one() -> None:
    write_texts(Path("notes.csv"), answered=60, unanswered=60)
    run("notes.csv")
    before = Path("notes.yaml").read_text()
    Path("notes.yaml").write_text("mine")
    with pytest.raises(RecipeError, match=r"notes.yaml: exists; .* --force to overwrite"):
        run("notes.csv", teacher="endpoint")
    assert Path("notes.yaml").read_text() == "mine"
    run("notes.csv", force=True)
    assert Path("notes.yaml").read_text() == before
    with pytest.raises(RecipeError, match="--name ä: write letters, digits"):
        run("notes.csv", name="ä")


@pytest.mark.parametrize(
    ("answered", "unanswered", "test", "validation"),
    [
        (100, 1000, 40, 15),
        (200, 1000, 80, 30),
        (1000, 5000, 200, 100),
        (2000, 5000, 400, 200),
        (9000, 100_000, 500, 200),
        (6000, 0, 500, 200),
    ],
)
def test_the_shares_follow_from_the_counts(
    answered: int, unanswered: int, test: int, validation: int
) -> None:
    carve, left = choose_shares(answered, unanswered)
    assert carve["test"] * answered == pytest.approx(test, abs=0.0006 * answered)
    assert carve["validation"] * answered == pytest.approx(validation, abs=0.0006 * answered)
    assert 0.998 <= sum(carve.values()) + left <= 1.0001
    assert sum(carve.values()) <= 1
    gold = carve["gold"] * answered
    labelled = left * answered + unanswered
    assert labelled >= 0.199 * (gold + labelled)


def test_shares_never_add_up_to_more_than_all() -> None:
    for answered in range(1, 3000, 7):
        for unanswered in (0, 10, 100_000):
            carve, _ = choose_shares(answered, unanswered)
            assert sum(carve.values()) <= 1
            assert min(carve.values()) > 0


def bookings(count: int, answered: int) -> list[dict[str, Any]]:
    """Rows whose fields are objects in the first `answered` ones."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        row: dict[str, Any] = {"message": f"Table number {number} of the garden for {number}."}
        if number < answered:
            row["fields"] = {"people": number, "with": ["dog", "child"][: number % 3]}
            if number % 2:
                row["fields"] |= {"where": {"place": "garden"}, "tip": number / 2 or 1}
        rows.append(row)
    return rows


@pytest.mark.parametrize("teacher", ["local", "endpoint"])
def test_objects_are_fields_whose_schema_is_guessed(teacher: Any) -> None:
    rows = bookings(400, 200)
    said = run(write_jsonl("bookings.jsonl", rows), teacher=teacher)
    recipe = checked("bookings.yaml")
    assert recipe.task.kind == "extract"
    if teacher == "local":
        assert recipe.prompt.system == "Find the fields of the text."
    else:
        assert "{schema}" in recipe.prompt.system
    assert recipe.task.answer_schema == {
        "type": "object",
        "properties": {
            "people": {"type": "integer"},
            "with": {"type": "array", "items": {"type": "string"}},
            "where": {
                "type": "object",
                "properties": {"place": {"type": "string"}},
                "additionalProperties": False,
            },
            "tip": {"type": "number"},
        },
        "additionalProperties": False,
    }
    assert (recipe.dataset.columns.question, recipe.dataset.columns.answer) == ("message", "fields")
    assert "answer   'fields' (JSON objects)" in said
    assert "200 rows with an answer, 200 without" in said
    assert "fields   4: people 200, with 200, where 100, tip 100" in said


def test_a_csv_of_json_texts_and_a_bad_one() -> None:
    lines = ["text,slots"]
    for number in range(120):
        lines.append(f'Table {number} in the garden,"{{""people"": {number}}}"')
    lines.append("Table one in the garden,four people")
    Path("slots.csv").write_text("\n".join(lines) + "\n")
    said = run("slots.csv")
    assert load_recipe("slots.yaml").task.kind == "extract"
    reason = "no JSON (Expecting value: line 1 column 1 (char 0))"
    assert f"slots.csv:122: slots: {reason}; correct the row" in said


def test_text_as_an_answer_is_named_by_the_task() -> None:
    rows = [{"question": f"What is {n} and {n}?", "answer": f"It is {n + n}."} for n in range(200)]
    said = run(write_jsonl("sums.jsonl", rows), task="generate", teacher="endpoint")
    recipe = checked("sums.yaml")
    assert recipe.task.kind == "generate"
    assert recipe.prompt.system == "Answer the text."
    assert "answer   'answer' (by name)" in said
    assert not recipe.teacher.filters.agreement_with_gold
    assert "they check the teacher" not in said


def test_without_a_column_of_answers_it_is_one_line() -> None:
    write_jsonl("words.jsonl", [{"text": f"word {n} again", "more": f"no {n}"} for n in range(9)])
    with pytest.raises(DataError, match=r"no column looks like JSON objects among 'text', 'more'"):
        run("words.jsonl", task="extract")
    with pytest.raises(DataError, match=r"no column looks like answers among 'text', 'more'"):
        run("words.jsonl", task="generate")


def test_fields_in_columns_of_their_own_and_dictionaries_of_python_are_told_with_a_remedy() -> None:
    rows: list[dict[str, Any]] = []
    for number in range(120):
        fields = {
            "place": ["bar", "hall"][number % 2],
            "day": ["Monday", "Friday"][number // 2 % 2],
        }
        rows.append({"message": f"Number {number} in the evening", **fields})
    empty = {"message": "And a last one", "place": "", "day": ""}
    write_csv(Path("columns.csv"), [*rows, empty])
    script = r".* by a script as in docs/how-to/text\.md"
    with pytest.raises(
        DataError, match=rf"'place', 'day'; .* put them into a column of JSON{script}"
    ):
        run("columns.csv")
    column = rf"a column for each field, put them into one, such as \{{{script}"
    with pytest.raises(DataError, match=column):
        run("columns.csv", task="extract")
    assert "join_columns.py" in (PROJECT / JOIN_PAGE).read_text()
    with pytest.raises(DataError, match="no answer of the column 'place' can be read: columns"):
        run("columns.csv", task="extract", label="place")
    printed = [{"message": row.pop("message"), "fields": str(row)} for row in rows]
    write_csv(Path("printed.csv"), [*printed, {"message": "And a last one", "fields": ""}])
    with pytest.raises(DataError, match=r"in braces that are no JSON .* write the column by json"):
        run("printed.csv")


@pytest.mark.parametrize("kind", ["classify", "extract"])
def test_some_of_many_rows_without_a_label_may_be_chosen(
    kind: Literal["classify", "extract"],
) -> None:
    write = partial(
        draft,
        name="mine",
        files=["mine.csv"],
        texts=["text"],
        label="label",
        ids_are_unique=True,
        shares=choose_shares(200, MANY_ROWS),
        teacher="endpoint",
        max_tokens=None,
        command="distillery new mine.csv",
        kind=kind,
        schema={"type": "object", "properties": {"place": {"type": "string"}}},
    )
    assert "select" not in write(unanswered=MANY_ROWS - 1)
    text = write(unanswered=MANY_ROWS)
    assert parse_recipe(yaml.safe_load(text), "mine").teacher.select is None
    chosen = parse_recipe(yaml.safe_load(text.replace("# select:", "select:")), "mine")
    assert chosen.teacher.select
    assert chosen.teacher.select.rows == 1000


def test_a_column_in_braces_beside_a_label_does_no_harm() -> None:
    rows = [{**row, "raw": str({"by": row["text"][:5]})} for row in texts(150)]
    write_csv(Path("both.csv"), rows)
    assert "label    'label' (by name)" in run("both.csv")
    for row in rows:
        del row["label"]
    write_csv(Path("none.csv"), rows)
    with pytest.raises(DataError, match=r"'raw' has values in braces .* another column by --label"):
        run("none.csv")


@pytest.mark.parametrize("teacher", ["local", "endpoint"])
@pytest.mark.parametrize("unanswered", [0, 100])
def test_rows_with_options_get_a_recipe_for_them(teacher: Any, unanswered: int) -> None:
    options = {"label": ["A", "B", "C"], "text": ["an oven", "a bridge", "rain"]}
    rows: list[dict[str, Any]]
    rows = [
        {
            "id": f"q{n}",
            "question": f"{row['text']} ({n})",
            "question_concept": "",
            "choices": options,
        }
        for n, row in enumerate(texts(0, 300))
    ]
    for n, row in enumerate(rows[: 300 - unanswered]):
        row["answerKey"] = "ABC"[n % 3]
    rows[7]["choices"] = {"label": ["A", "B"], "text": ["an oven", "a bridge"]}
    said = run(write_jsonl("questions.jsonl", rows), teacher=teacher)
    assert "options  'choices', 2 to 3 in a row" in said
    assert f"{300 - unanswered} rows with an answer, {unanswered} without" in said
    recipe = checked("questions.yaml")
    assert recipe.task.kind == "choice"
    assert recipe.dataset.columns == Columns()
    assert recipe.student_prompt.answer == "text"
    assert recipe.prompt.answer == ("text" if teacher == "local" else "letter")
    filters = recipe.teacher.filters
    assert filters.agreement_with_gold == (not unanswered)
    few = not unanswered and teacher == "local"
    assert filters.minimum_accepted == (0 if few else 0.5)
    renamed = [
        {"query": row["question"], "options": row["choices"], "correct": row.get("answerKey")}
        for row in rows
    ]
    run(write_jsonl("renamed.jsonl", renamed), teacher=teacher)
    columns = checked("renamed.yaml").dataset.columns
    assert (columns.question, columns.choices, columns.answer) == ("query", "options", "correct")
