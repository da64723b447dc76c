"""The label store: its files, its schema through the versions, and the keys of paid answers."""

import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from postgres_server import Postgres
from sqlalchemy import create_engine, select

from distillery.data.answer_tokens import AnswerToken, packed
from distillery.errors import DataError, StoreError, StoreUnavailable
from distillery.labels.batch_book import BATCHES, LINES
from distillery.labels.exports import export_answers, export_rows, import_answers, parquet_schema
from distillery.labels.journal import values_of
from distillery.labels.pairs import both_orders
from distillery.labels.questions import questions
from distillery.labels.store import Experience, LabelStore, StoredAnswer
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example
from distillery.storage.database import (
    IDENTITY,
    METADATA,
    SCHEMA,
    VERSION_TABLE,
    Database,
    checked_url,
)
from distillery.storage.leases import LEASES, Leases
from distillery.teacher.allowances import ALLOWANCES
from distillery.teacher.ledger import (
    CALLS,
    SPENDING,
    Call,
    Payer,
    spent,
    sum_key,
    write_calls,
)


@pytest.fixture
def store(url: str) -> Iterator[LabelStore]:
    with LabelStore(url) as store:
        yield store


def stored(number: int, **values: Any) -> StoredAnswer:
    answer = StoredAnswer(
        f"{number:064x}",
        "gpt-4o",
        "A",
        {"A": 0.1 + 0.2, "B": 0.7},
        "Answer: A",
        40,
        1,
        12.5,
        2,
        "v1",
        cached_tokens=8,
        cost=0.00125,
        example_id=f"row-{number}",
        prompt=f"What comes after {number}?",
    )
    return answer._replace(**values)


ANSWERS = [
    stored(1),
    stored(2, distribution=None, cost=None, cached_tokens=0),
    stored(3, answer=None, distribution=None, reason="empty answer", raw="", cost=0.5),
    stored(4, raw="“ü” 猫\n", prompt="é\t%", example_id="", model_version=""),
    stored(5, teacher="sha256:1", cost=None),
]

TOKENS = packed([AnswerToken(b"A\xc3", ((b"A\xc3", -0.25), (b"", -2.5))), AnswerToken(b"", ())])


def filled(store: LabelStore, answers: list[StoredAnswer] = ANSWERS) -> LabelStore:
    for answer in answers:
        store.add(answer)
    store.flush()
    return store


def all_in(store: LabelStore) -> dict[str, StoredAnswer]:
    return store.get_many(f"{number:064x}" for number in range(1000))


def times_in(path: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(path) as database:
        found = database.execute(
            "SELECT request_key, created_at FROM teacher_answers ORDER BY 1"
        ).fetchall()
    database.close()
    return found


def test_what_is_exported_is_loaded_as_it_was(store: LabelStore, tmp_path: Path) -> None:
    file = tmp_path / "answers.parquet"
    assert export_answers(filled(store), file) == 5
    with LabelStore(f"sqlite:///{tmp_path / 'other.db'}") as other:
        assert import_answers(other, file) == 5
        assert all_in(other) == {answer.request_key: answer for answer in ANSWERS}
        assert import_answers(other, file) == 0
    assert times_in(tmp_path / "other.db") == times_in(tmp_path / "labels.db")
    assert len(times_in(tmp_path / "other.db")) == 5
    assert pq.read_table(file).column("created_at").type == pa.timestamp("us", tz="UTC")


def test_tokens_are_kept_exported_and_loaded(store: LabelStore, tmp_path: Path) -> None:
    answers = [stored(1), stored(2, distribution=None, tokens=TOKENS)]
    kept = {answer.request_key: answer for answer in answers}
    file = tmp_path / "answers.parquet"
    assert all_in(filled(store, answers)) == kept
    assert export_answers(store, file) == 2
    assert export_rows(store, tmp_path / "rows.jsonl", "messages") == 2
    with LabelStore(f"sqlite:///{tmp_path / 'other.db'}") as other:
        assert import_answers(other, file) == 2
        assert all_in(other) == kept


def test_an_export_of_a_version_without_tokens_is_loaded(store: LabelStore, tmp_path: Path) -> None:
    file = tmp_path / "answers.parquet"
    export_answers(filled(store), file)
    pq.write_table(pq.read_table(file).drop_columns(["tokens"]), file)
    with LabelStore(f"sqlite:///{tmp_path / 'other.db'}") as other:
        assert import_answers(other, file) == 5
        assert all_in(other) == all_in(store)


@pytest.mark.security
def test_an_export_with_tokens_that_are_none_is_one_line(store: LabelStore, tmp_path: Path) -> None:
    file = tmp_path / "answers.parquet"
    export_answers(filled(store, [stored(1), stored(2, tokens=TOKENS[:-3])]), file)
    with LabelStore(f"sqlite:///{tmp_path / 'other.db'}") as other:
        with pytest.raises(DataError, match=r"answers\.parquet: tokens: .*; export the") as caught:
            import_answers(other, file)
        assert "\n" not in str(caught.value)
        assert all_in(other) == {}


def test_a_loaded_answer_changes_none_that_is_there(store: LabelStore, tmp_path: Path) -> None:
    export_answers(filled(store), tmp_path / "answers.parquet")
    with LabelStore(f"sqlite:///{tmp_path / 'other.db'}") as other:
        mine = stored(1, answer="B", raw="mine")
        filled(other, [mine])
        assert import_answers(other, tmp_path / "answers.parquet") == 4
        assert all_in(other)[mine.request_key] == mine


def test_one_teachers_answers_are_exported_alone(store: LabelStore, tmp_path: Path) -> None:
    assert export_answers(filled(store), tmp_path / "answers.parquet", teacher="sha256:1") == 1
    (row,) = pq.read_table(tmp_path / "answers.parquet").to_pylist()
    assert (row["teacher"], row["distribution"]) == (
        "sha256:1",
        '{"A": 0.30000000000000004, "B": 0.7}',
    )
    assert export_answers(store, tmp_path / "none.parquet", teacher="nobody") == 0


def test_labels_are_exported_as_training_rows(store: LabelStore, tmp_path: Path) -> None:
    filled(store, [*ANSWERS, stored(6, prompt="", raw="A, of a version that kept no prompts")])
    asked, answered = "What comes after 5?", {"role": "assistant", "content": "A"}
    file = tmp_path / "rows.jsonl"
    assert export_rows(store, file, "question-answer") == 4, "one was rejected"
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert lines[-1] == {"Question": asked, "Answer": "A"}
    assert lines[-2] == {"Question": "é\t%", "Answer": "A"}
    assert export_rows(store, file, "messages", teacher="sha256:1") == 1
    assert json.loads(file.read_text("utf-8")) == {
        "messages": [{"role": "user", "content": asked}, answered]
    }
    with pytest.raises(DataError, match="can't be written"):
        export_rows(store, tmp_path / "none" / "rows.jsonl", "messages")


def test_no_answers_are_exported_and_loaded_too(store: LabelStore, tmp_path: Path) -> None:
    assert export_answers(store, tmp_path / "answers.parquet") == 0
    assert import_answers(store, tmp_path / "answers.parquet") == 0


def test_more_answers_than_a_page(
    store: LabelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillery.labels.exports.EXPORT_ROWS", 7)
    filled(store, [stored(number) for number in range(50)])
    assert export_answers(store, tmp_path / "answers.parquet") == 50
    with LabelStore(f"sqlite:///{tmp_path / 'other.db'}") as other:
        assert import_answers(other, tmp_path / "answers.parquet") == 50
        assert all_in(other) == all_in(store)


def test_an_export_that_fails_leaves_the_old_file(
    store: LabelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "answers.parquet"
    file.write_text("old")
    schema = parquet_schema()
    raw_as_number = schema.set(schema.get_field_index("raw"), pa.field("raw", pa.int64()))
    monkeypatch.setattr("distillery.labels.exports.parquet_schema", lambda: raw_as_number)
    with pytest.raises(pa.ArrowException):
        export_answers(filled(store), file)
    assert file.read_text() == "old"
    assert not [other for other in tmp_path.iterdir() if "partial" in other.name]


def test_a_folder_that_is_not_there_is_named(store: LabelStore, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/answers\.parquet") as caught:
        export_answers(filled(store), tmp_path / "nowhere" / "answers.parquet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", ["text", "nothing", "columns", "types", "truncated", "missing"])
def test_a_file_that_is_no_export_is_refused(store: LabelStore, tmp_path: Path, wrong: str) -> None:
    file = tmp_path / "answers.parquet"
    export_answers(filled(store), file)
    table = pq.read_table(file)
    if wrong == "text":
        file.write_text("request_key,answer\n1,A\n" * 100)
    elif wrong == "nothing":
        file.write_bytes(b"")
    elif wrong == "columns":
        pq.write_table(table.drop_columns(["cost"]), file)
    elif wrong == "types":
        column = table.schema.get_field_index("prompt_tokens")
        pq.write_table(table.set_column(column, "prompt_tokens", pa.array(["40"] * 5)), file)
    elif wrong == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    else:
        file.unlink()
    with LabelStore(f"sqlite:///{tmp_path / 'other.db'}") as other:
        with pytest.raises(DataError, match=r"answers\.parquet: ") as caught:
            import_answers(other, file)
        assert "\n" not in str(caught.value)
        assert all_in(other) == {}


def test_answers_are_deleted_by_row(store: LabelStore) -> None:
    filled(store)
    assert store.delete(rows=["row-1", "row-5", "row-99"]) == 2
    assert {answer.example_id for answer in all_in(store).values()} == {"row-2", "row-3", ""}


def test_as_many_rows_as_a_list_holds_are_deleted(store: LabelStore) -> None:
    filled(store, [stored(number) for number in range(50)])
    rows = [f"row-{number}" for number in range(40_000)]
    assert store.delete(rows=rows, dry_run=True) == 50
    assert store.delete(rows=rows) == 50


def test_an_answer_that_is_named_twice_counts_once(store: LabelStore) -> None:
    first, _ = both_orders("row-0")
    filled(store, [stored(0, example_id=first), stored(1)])
    others = [f"other-{number}" for number in range(1500)]
    rows = [first, "row-1", *others, "row-1", "row-0"]
    assert store.delete(rows=rows, dry_run=True) == 2
    assert store.delete(rows=rows) == 2


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("50%_off", {1}),
        ("%", {1, 2}),
        ("_", {1, 3}),
        ("Ada", {4, 5}),
        ("ada love", {5}),
        ("O'Brien", {6}),
        ("nobody", set()),
        ("müller", {8}),
        ("иван", {8}),
        ("\\", {7}),
    ],
)
def test_answers_are_deleted_by_text_in_prompt_or_answer(
    store: LabelStore, text: str, gone: set[int]
) -> None:
    filled(
        store,
        [
            stored(1, prompt="is it 50%_off?"),
            stored(2, prompt="is it 50%?"),
            stored(3, prompt="is it x_off?"),
            stored(4, prompt="who is Ada?"),
            stored(5, raw="B) Ada Lovelace"),
            stored(6, prompt="who is O'Brien?"),
            stored(7, prompt="C:\\"),
            stored(8, prompt="who are ИВАН and MÜLLER?"),
        ],
    )
    assert store.delete(containing=[text], dry_run=True) == len(gone)
    assert len(all_in(store)) == 8, "a dry run deletes nothing"
    assert store.delete(containing=[text]) == len(gone)
    assert {int(key, 16) for key in all_in(store)} == set(range(1, 9)) - gone


def test_what_is_deleted_is_not_in_the_files_any_more(tmp_path: Path) -> None:
    with LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store:
        filled(
            store,
            [stored(number, prompt=f"who is Ada Lovelace? {number}") for number in range(200)],
        )

        def files() -> list[Path]:
            found = [file for file in tmp_path.rglob("*") if file.is_file()]
            return [file for file in found if b"Lovelace" in file.read_bytes()]

        assert files()
        assert store.delete(containing=["Lovelace"]) == 200
        assert files() == []


def test_answers_that_are_no_label_are_deleted(store: LabelStore) -> None:
    filled(store)
    assert store.delete(rejected=True) == 1
    assert f"{3:064x}" not in all_in(store)
    assert store.delete(rejected=True) == 0


def test_several_wishes_at_once_delete_what_any_names(store: LabelStore) -> None:
    wishes: dict[str, Any] = {
        "rows": ["row-1", "row-3"],
        "containing": ["猫", "after 5"],
        "rejected": True,
    }
    assert filled(store).delete(**wishes, dry_run=True) == 4
    assert store.delete(**wishes) == 4
    assert [answer.example_id for answer in all_in(store).values()] == ["row-2"]


@pytest.mark.parametrize(
    "wish", [{}, {"rows": []}, {"containing": []}, {"containing": [""]}, {"rows": [""]}]
)
def test_no_wish_deletes_nothing(store: LabelStore, wish: dict[str, Any]) -> None:
    filled(store, [stored(1), stored(2)])
    assert store.delete(**wish) == 0
    assert len(all_in(store)) == 2


def test_the_summary_of_each_teacher(store: LabelStore) -> None:
    assert store.summary() == []
    filled(store)
    assert store.summary() == [("gpt-4o", 4, 1), ("sha256:1", 1, 0)]


def test_what_a_teachers_answers_tell_of_the_next(store: LabelStore) -> None:
    assert store.experience("gpt-4o") is None
    filled(
        store,
        [
            stored(1, prompt="x" * 100, prompt_tokens=30, completion_tokens=1, latency_ms=100),
            stored(2, prompt="x" * 300, prompt_tokens=70, completion_tokens=3, latency_ms=300),
            stored(3, prompt="", prompt_tokens=1000),
            stored(4, prompt="x", prompt_tokens=0, completion_tokens=0),
            stored(5, teacher="another", prompt="x", prompt_tokens=1000),
        ],
    )
    assert store.experience("gpt-4o") == Experience(2, 0.25, 2.0, 200.0)
    assert store.experience("nobody") is None


def test_rejected_answers_tell_of_letters_too(store: LabelStore) -> None:
    """A teacher that reasons is paid for what was cut off."""
    letters = [stored(number, completion_tokens=50) for number in (1, 2)]
    cut = {"answer": None, "distribution": None, "completion_tokens": 4000}
    rejected = [stored(number, **cut) for number in (3, 4)]
    filled(store, [*letters, *rejected])

    def told(*keys: StoredAnswer) -> tuple[int, int]:
        found = store.experience("gpt-4o", longest=1, keys=[answer.request_key for answer in keys])
        assert found is not None
        return found.answers, round(found.completion_tokens)

    assert told() == (4, 2025)
    filled(store, [stored(5, answer="a text of its own", completion_tokens=9)])
    assert told() == (2, 50), "the rejected ones may be texts"
    assert told(letters[0], rejected[0]) == (3, 1367)


def test_the_last_thousand_answers_tell(store: LabelStore) -> None:
    filled(store, [stored(number, prompt="x" * 10, prompt_tokens=100) for number in range(600)])
    filled(
        store, [stored(number, prompt="x" * 10, prompt_tokens=10) for number in range(600, 1600)]
    )
    experience = store.experience("gpt-4o")
    assert experience is not None
    assert (experience.answers, experience.tokens_per_character) == (1000, 1.0)


@pytest.mark.timeout(20)
def test_an_answer_that_no_database_holds_is_an_error_and_no_endless_wait(url: str) -> None:
    store = LabelStore(url)
    store.add(stored(1, prompt_tokens=2**70))
    with pytest.raises(StoreError) as caught:
        store.flush()
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreError):
        store.close()


OLD_SCHEMA = """
CREATE TABLE teacher_answers (
    request_key VARCHAR(64) NOT NULL,
    teacher TEXT NOT NULL,
    answer VARCHAR(1) NOT NULL,
    distribution JSON,
    raw TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    latency_ms FLOAT NOT NULL,
    attempts INTEGER NOT NULL,
    model_version TEXT NOT NULL,
    created_at DATETIME NOT NULL,
    PRIMARY KEY (request_key)
);
CREATE TABLE leases (
    name VARCHAR(200) NOT NULL,
    holder VARCHAR(64) NOT NULL,
    run TEXT NOT NULL,
    expires_at FLOAT NOT NULL,
    PRIMARY KEY (name)
);
"""
"""What there was before the schema had versions."""


def make_old(path: Path, rows: int = 3) -> None:
    with sqlite3.connect(path) as database:
        database.executescript(OLD_SCHEMA)
        for number in range(rows):
            values = (
                f"{number:064x}",
                "gpt-4o",
                "B",
                '{"A": 0.25, "B": 0.75}',
                "B",
                40,
                1,
                12.5,
                1,
                "v1",
            )
            database.execute(
                f"INSERT INTO teacher_answers VALUES ({'?, ' * 10}'2025-11-03 10:00:00.000000')",
                values,
            )
        database.execute("INSERT INTO leases VALUES ('work', 'a', 'run-1', 2e10)")
    database.close()


def test_a_database_of_before_the_versions_is_upgraded_in_place(url: str, tmp_path: Path) -> None:
    make_old(tmp_path / "labels.db")
    with LabelStore(url) as store:
        found = all_in(store)
        assert found == {
            key: StoredAnswer(key, "gpt-4o", "B", {"A": 0.25, "B": 0.75}, "B", 40, 1, 12.5, 1, "v1")
            for key in (f"{number:064x}" for number in range(3))
        }
        filled(store, [stored(3, answer=None, reason="empty answer")])
        assert store.summary() == [("gpt-4o", 4, 1)]
        assert store.experience("gpt-4o") is not None
    assert times_in(tmp_path / "labels.db")[0][1] == "2025-11-03 10:00:00.000000"
    assert not Leases(url).acquire("work", "b", timeout=0), "the old lease holds"
    with LabelStore(url) as again:
        assert len(all_in(again)) == 4


def upgrade(url: str, revision: str) -> None:
    """Migrate a database to an earlier version's schema."""
    engine = create_engine(checked_url(url, False))
    with engine.begin() as connection:
        config = Config(attributes={"connection": connection, "version_table": VERSION_TABLE})
        config.set_main_option("script_location", str(files("distillery.storage") / "migrations"))
        command.upgrade(config, revision)
    engine.dispose()


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def test_what_was_spent_before_there_were_sums_counts(
    kind: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a session whose day is another one than that in UTC."""
    monkeypatch.setenv("PGTZ", "Pacific/Kiritimati")
    with ExitStack() as services:
        if kind == "postgresql":
            url = services.enter_context(Postgres()).url()
        upgrade(url, "0008")
        engine = create_engine(checked_url(url, False))
        with engine.begin() as connection:
            for number, (teacher, currency, hour) in enumerate(
                [("a", "EUR", 23), ("a", "EUR", 1), ("a", None, 1), ("judge:a", "EUR", 1)]
            ):
                call = Call(
                    run="run-1",
                    recipe="messages",
                    teacher=teacher,
                    purpose="label",
                    outcome="answer",
                    prompt_tokens=10**number,
                    completion_tokens=5,
                    cost=0.5 if currency else None,
                    prices={"input": 1.0, "currency": currency} if currency else None,
                    called_at=datetime(2026, 11, 28 if hour == 1 else 27, hour, tzinfo=UTC),
                )
                connection.execute(CALLS.insert(), [values_of(call)])
        engine.dispose()
        payer, saturday = Payer("run-1", "messages"), datetime(2026, 11, 28, tzinfo=UTC)
        with LabelStore(url) as store:
            run = store.database.run(lambda c: spent(c, payer, "teacher", "EUR", None))
            day = store.database.run(lambda c: spent(c, payer, "teacher", "EUR", saturday))
            judge = store.database.run(
                lambda c: spent(c, payer, "evaluation.judge", "EUR", saturday)
            )
    assert run == {"cost": 1.0, "tokens": 126.0, "calls": 3.0}
    assert day == {"cost": 0.5, "tokens": 120.0, "calls": 2.0}
    assert judge == {"cost": 0.5, "tokens": 1005.0, "calls": 1.0}


def test_a_database_of_before_the_tokens_is_upgraded_in_place(url: str, tmp_path: Path) -> None:
    make_old(tmp_path / "labels.db")
    upgrade(url, "0003")
    with LabelStore(url) as store:
        assert len(all_in(store)) == 3
        assert {answer.tokens for answer in all_in(store).values()} == {None}
        kept = stored(3, tokens=TOKENS)
        assert all_in(filled(store, [kept]))[kept.request_key] == kept


def test_a_migrated_schema_is_the_one_that_the_code_has(url: str, tmp_path: Path) -> None:
    # Tables are known once their modules are imported.
    for table in (LEASES, CALLS, SPENDING, ALLOWANCES, BATCHES, LINES, IDENTITY):
        assert table.name in METADATA.tables
    make_old(tmp_path / "old.db")
    for database in (url, f"sqlite:///{tmp_path / 'old.db'}"):
        LabelStore(database).close()
        engine = create_engine(database)
        with engine.connect() as connection:
            context = MigrationContext.configure(
                connection, opts={"version_table": VERSION_TABLE, "compare_type": True}
            )
            assert compare_metadata(context, METADATA) == []
            assert context.get_current_revision() == SCHEMA
        engine.dispose()


def test_the_schema_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(files("distillery.storage") / "migrations"))
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_heads() == [SCHEMA]
    assert [script.revision for script in scripts.walk_revisions()][-1] == "0001"


def test_a_database_of_a_newer_version_is_left_alone(url: str, tmp_path: Path) -> None:
    with LabelStore(url) as store:
        filled(store)
    with sqlite3.connect(tmp_path / "labels.db") as database:
        database.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    database.close()
    with pytest.raises(
        StoreError, match="its schema 9999 is of a newer version of Distillery; install that"
    ) as caught:
        LabelStore(url)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, StoreUnavailable)
    assert len(times_in(tmp_path / "labels.db")) == 5


def test_who_only_looks_changes_nothing(url: str, tmp_path: Path) -> None:
    with closing(Database(url, migrates=False)) as database:
        assert database.identity == ""
    assert not (tmp_path / "labels.db").exists()
    make_old(tmp_path / "labels.db")
    upgrade(url, "0009")
    with pytest.raises(StoreError, match="its schema 0009 is of an older version") as caught:
        Database(url, migrates=False)
    assert "\n" not in str(caught.value)
    with sqlite3.connect(tmp_path / "labels.db") as connection:
        (version,) = connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()
    connection.close()
    assert version == "0009"
    with closing(Database(url)) as database, closing(Database(url, migrates=False)) as looking:
        assert looking.identity == database.identity != ""


def test_a_database_without_an_id_gets_one(url: str, tmp_path: Path) -> None:
    """As one that was copied without that table's row."""
    with closing(Database(url)) as database:
        first = database.identity
    with sqlite3.connect(tmp_path / "labels.db") as connection:
        connection.execute("DELETE FROM database_identity")
    connection.close()
    with closing(Database(url, migrates=False)) as looking:
        assert looking.identity == ""
    with closing(Database(url)) as database, closing(Database(url)) as again:
        assert len(database.identity) == 32
        assert database.identity == again.identity != first


def test_an_upgrade_that_fails_changes_nothing(url: str, tmp_path: Path) -> None:
    """A foreign table stands in the way once the table of versions has been made."""
    make_old(tmp_path / "labels.db")
    with sqlite3.connect(tmp_path / "labels.db") as database:
        database.execute("CREATE TABLE _alembic_tmp_teacher_answers (mine TEXT)")
    database.close()
    with pytest.raises(StoreError) as caught:
        LabelStore(url)
    assert "\n" not in str(caught.value)
    with sqlite3.connect(tmp_path / "labels.db") as database:
        tables = {
            name
            for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        columns = [row[1] for row in database.execute("PRAGMA table_info(teacher_answers)")]
        database.execute("DROP TABLE _alembic_tmp_teacher_answers")
    database.close()
    assert tables == {"teacher_answers", "leases", "_alembic_tmp_teacher_answers"}
    assert len(columns) == 11
    with LabelStore(url) as store:
        assert len(all_in(store)) == 3


OPENER = """
import sys
from distillery.errors import StoreError
from distillery.labels.store import LabelStore
print("ready", flush=True)
for line in sys.stdin:
    try:
        LabelStore(line.strip()).close()
        print("opened", flush=True)
    except StoreError as error:
        print(error, flush=True)
"""


@pytest.mark.parametrize("old", [False, True], ids=["fresh", "old"])
def test_processes_that_open_a_database_at_once(tmp_path: Path, old: bool) -> None:
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", OPENER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for opener in openers:
        assert opener.stdout
        assert opener.stdout.readline() == "ready\n"
    said = []
    for number in range(10):
        if old:
            make_old(tmp_path / f"{number}.db", rows=100)
        for opener in openers:
            assert opener.stdin
            opener.stdin.write(f"sqlite:///{tmp_path / f'{number}.db'}\n")
            opener.stdin.flush()
        said += [opener.stdout.readline() for opener in openers if opener.stdout]
        with LabelStore(f"sqlite:///{tmp_path / f'{number}.db'}") as store:
            assert len(all_in(store)) == (100 if old else 0)
    for opener in openers:
        opener.communicate()
        assert opener.returncode == 0
    assert said == ["opened\n"] * 20


def test_threads_that_open_a_fresh_database_at_once(tmp_path: Path) -> None:
    failures: list[StoreError] = []

    def make(url: str, ready: threading.Barrier) -> None:
        ready.wait()
        try:
            LabelStore(url).close()
        except StoreError as error:
            failures.append(error)

    for number in range(10):
        ready = threading.Barrier(4)
        arguments = (f"sqlite:///{tmp_path / f'{number}.db'}", ready)
        threads = [threading.Thread(target=make, args=arguments) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


ROW = Example(example_id="1", question="What heals scurvy?", choices=("bank", "vitamin C", "a dog"))
GOLDEN: dict[str, tuple[TeacherRecipe, str, Example, int, str]] = {
    "letter": (
        TeacherRecipe(),
        "gpt-4o",
        ROW,
        0,
        "7d232d0972b523230acf546e7685194700af1790778231ff1a4ece5963aca929",
    ),
    "json": (
        TeacherRecipe(answers={"form": "json"}),
        "gpt-4o",
        ROW,
        0,
        "0712bdd288ebf99444df82d11abeabf27ebd24ac1e77db89ee9a20d8d099f398",
    ),
    "rationale": (
        TeacherRecipe(max_tokens=300, answers={"form": "rationale"}),
        "gpt-4o",
        ROW,
        0,
        "6c4e23de8df0440e7377bfaeed52bd70fb6dd30fcd1e084625b28253cfc3cc87",
    ),
    "a later vote": (
        TeacherRecipe(temperature=1.0, answers={"votes": 3}),
        "gpt-4o",
        ROW,
        2,
        "dfd69d0a895fc49b44d7a00dbd501a1088ec485108faed66554a84fbed9e58c8",
    ),
    "another order": (
        TeacherRecipe(answers={"orders": 3}),
        "gpt-4o",
        ROW,
        1,
        "796eb8521308fb082dc713b784a49d25c937e032e1ede54c489343b9817a42c7",
    ),
    "soft labels": (
        TeacherRecipe(soft_labels=True),
        "gpt-4o",
        ROW,
        0,
        "4030a9822d8145f851d460240919f926bc475c1b002e2e1b436d74d899a8ecec",
    ),
    "no temperature": (
        TeacherRecipe(temperature=None),
        "gpt-4o",
        ROW,
        0,
        "31e6d48abfbeda98deaeb2e51a0f52222875e406fa4ba9434909c45040f9673b",
    ),
    "other scripts": (
        TeacherRecipe(),
        "gpt-4o",
        ROW.model_copy(update={"question": "“é” 猫 \U0001f600?"}),
        0,
        "e12ba8fd3a366bad14ea4e32b3d9e0e41fa1a27f6a986bbd02d347292b9ac6a2",
    ),
    "more tokens": (
        TeacherRecipe(max_tokens=64),
        "gpt-4o",
        ROW,
        0,
        "7093d6ed6230188fc9b9824bf5562545ca42693eb3b4d85d4d76db70930d6a18",
    ),
    "another teacher": (
        TeacherRecipe(),
        "sha256:4f2d",
        ROW,
        0,
        "907fded24f9b823d4d3447d63cb2c53399dcfd2b2f49b617dc06f035d40ff1d1",
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_the_keys_of_paid_answers_never_change(case: str) -> None:
    """What was paid for is kept under these: a change here asks and pays for all of it again."""
    recipe, identity, row, number, key = GOLDEN[case]
    assert questions(row, PromptRecipe(), recipe, identity)[number].key == key


NOON = datetime(2026, 11, 3, 12, tzinfo=UTC)


def calls_of_two_days(count: int) -> list[Call]:
    """Return calls of teachers and a judge, with and without prices, before and after midnight."""
    payers = [("run-1", "one"), ("run-1", "two"), ("run-2", "one")]
    calls = []
    for number in range(count):
        run, recipe = payers[number % 3]
        call = Call(
            run=run,
            recipe=recipe,
            teacher=("judge:gpt", "gpt", "a-model")[number % 7 % 3],
            purpose="label",
            outcome="answer",
            prices={"currency": "EUR"} if number % 5 else None,
            called_at=NOON + timedelta(hours=number),
        )
        calls.append(call)
    return calls


def test_a_call_is_added_to_the_sum_of_its_key(store: LabelStore) -> None:
    calls = calls_of_two_days(40)
    for call in calls:
        store.record(call)
    store.flush()
    columns = [SPENDING.c[name] for name in ("run", "recipe", "section", "day", "currency")]
    found = store.database.run(lambda c: c.execute(select(*columns)).all())
    assert {tuple(row) for row in found} == {sum_key(call) for call in calls}


class Written:
    """Stands for a connection, and keeps the values that are written."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def execute(self, _: Any, rows: list[dict[str, Any]]) -> None:
        self.rows += rows


def test_two_processes_take_the_sums_of_their_calls_in_one_order() -> None:
    calls, one, other = calls_of_two_days(40), Written(), Written()
    write_calls(one, calls)
    write_calls(other, calls[::-1])
    assert [row["call_id"] for row in one.rows] != [call.call_id for call in calls]
    orders = [[sum_key(Call(**row)) for row in written.rows] for written in (one, other)]
    assert orders[0] == orders[1]


def test_two_processes_take_answers_in_one_order(
    store: LabelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[str]] = []

    def noted(connection: Any, statement: Any, values: list[dict[str, Any]]) -> None:
        taken.append([row.get("request_key") or row["key"] for row in values])
        connection.execute(statement, values)

    monkeypatch.setattr("distillery.labels.store.execute", noted)
    answers = [stored(number) for number in (5, 3, 9, 1)]
    for answer in answers:
        store.add(answer)
    store.flush()
    store.accept([answer._replace(answer="B") for answer in answers])
    assert taken == [sorted(answer.request_key for answer in answers)] * 2


@pytest.mark.slow
def test_runs_that_write_around_midnight_do_not_wait_for_each_other() -> None:
    """PostgreSQL ends one of two transactions that do, with an error."""
    calls = calls_of_two_days(300)

    def write(database: Database, given: list[Call], failures: list[StoreError]) -> None:
        for number in range(10):
            fresh = [
                replace(call, call_id=f"{id(given)}-{number}-{call.call_id}") for call in given
            ]
            try:
                database.run_once(partial(write_calls, calls=fresh))
            except StoreError as error:
                failures.append(error)

    with Postgres() as server:
        failures: list[StoreError] = []
        url = server.url()
        with closing(Database(url)) as one, closing(Database(url)) as other:
            threads = [
                threading.Thread(target=write, args=(database, given, failures))
                for database, given in ((one, calls), (other, calls[::-1]))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert failures == []
