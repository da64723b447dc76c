"""What an earlier version left behind goes on working: its answers are not asked for again, its
models are downloaded and served, its artifacts are found, and its databases are migrated.
golden/make_earlier.py made it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_endpoint import ChatEndpoint
from label_runs import labelled, read_lines
from postgres_server import Postgres

from distillery.labels.store import LabelStore, StoredAnswer
from distillery.records import Artifact, OnnxModel, Outcome
from distillery.registry.history import Actor
from distillery.registry.local import LocalRegistry
from distillery.registry.manifest import provenance_of
from distillery.registry.trace import trace, trace_row
from distillery.serving.process import served
from distillery.storage.artifacts import RUNS, ArtifactStore
from distillery.storage.database import SCHEMA, Database, schema_version
from distillery.storage.housekeeping import Inventory
from distillery.teacher.ledger import CALLS, totals

LABELS = Path(__file__).parent / "golden" / "earlier" / "labels.sql"


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """A server with the label database of the earlier version."""
    with Postgres() as server:
        server.restore(LABELS.read_text("utf-8"))
        yield server


async def check_labels(url: str, folder: Path) -> None:
    """Label the rows of before and one more, for which alone the teacher is asked."""
    with ChatEndpoint() as server:
        counts = await labelled(server, url, folder / "before", 12, soft_labels=True)
        assert server.calls == [], "all answers are paid for"
        assert (counts.accepted, counts.rejected) == (11, 1)
        await labelled(server, url, folder / "after", 13, soft_labels=True)
        (call,) = server.calls
        assert "What comes after 12?" in call.question
    (rejected,) = read_lines(folder / "before" / "rejected.jsonl")
    assert (rejected["example_id"], rejected["raw"]) == ("row-5", "I can't tell.")
    for label in read_lines(folder / "before" / "labels.jsonl"):
        assert sum(label["distribution"].values()) == pytest.approx(1)
    database = Database(url)
    assert database.run(schema_version) == SCHEMA
    # The ledger begins with the answers of before, whose runs nobody knows.
    book = {each.outcome: each for each in totals(database, ("outcome",), CALLS.c.run == "")}
    assert {outcome: each.calls for outcome, each in book.items()} == {"answer": 11, "rejected": 1}
    assert book["answer"].usage.prompt_tokens == 11 * 40
    assert sum(each.calls for each in totals(database, ("purpose",))) == 13
    database.close()


def check_class_is_kept(url: str) -> None:
    """Keep an answer that is a class, for which the earlier schema has no room on PostgreSQL."""
    key = "f" * 64
    answer = StoredAnswer(key, "gpt-test", "order status", None, "order status", 40, 2, 9.5, 1, "v")
    with LabelStore(url) as store:
        assert store.summary()[0][:3] == ("gpt-test", 13, 1)
        store.add(answer)
    with LabelStore(url) as store:
        assert store.get_many([key]) == {key: answer}


async def test_stored_answers_on_sqlite(earlier_home: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{earlier_home / 'labels.db'}"
    await check_labels(url, tmp_path)
    check_class_is_kept(url)


@pytest.mark.slow
async def test_stored_answers_on_postgresql(postgres: Postgres, tmp_path: Path) -> None:
    assert postgres.ask("SELECT version_num FROM distillery_version") == "0002"
    await check_labels(postgres.url(), tmp_path)
    check_class_is_kept(postgres.url())


def test_artifacts_and_the_record_of_a_run(earlier_home: Path) -> None:
    store = ArtifactStore()
    artifacts = Inventory(store).artifacts()
    assert len(artifacts) == 4
    for artifact in artifacts:
        uri = f"{store.url}/{artifact.digest}"
        found = Artifact(uri=uri, sha256=artifact.digest, bytes=artifact.bytes)
        folder = store.fetch(found)
        assert store.put(folder) == found, "today's digest of the same files is the same"
    outcome = Outcome.model_validate_json(store.read_record(f"{RUNS}/mine-run-1.json"))
    named = {artifact.digest: artifact.named_by for artifact in artifacts}
    assert named[outcome.model.artifact.sha256] == ("model of mine-run-1",)
    assert outcome.registered is not None
    assert outcome.registered.version == "1"


@pytest.mark.slow
def test_a_registered_model_is_downloaded_served_and_replaced(
    earlier_home: Path, tmp_path: Path
) -> None:
    registry = LocalRegistry()
    assert {model.version: model.role for model in registry.list("mine")} == {
        "1": "champion",
        "2": "challenger",
    }
    champion = registry.get("mine")
    assert registry.is_whole(champion)
    folder = registry.download(champion, tmp_path / "down")
    made = provenance_of(folder)
    assert made is not None
    assert OnnxModel.model_validate(made["model"]).precision == "int4"
    assert trace(registry, champion).version == "1"
    assert [use.version for use in trace_row(registry, "r1", "mine")] == ["2", "1"]
    check_answers(folder)

    (folder / "notes.txt").write_text("the third version")
    third = registry.register(folder, "mine", {}, made, actor=Actor("mine-run-3"))
    assert third.version == "3"
    assert registry.promote(third, "1", Actor("mine-run-3")).result == "promoted"
    registry.pin("mine", "1", Actor("a user"), "complaints")
    assert registry.get("mine").version == "1"
    told = [event.action for event in registry.history("mine")]
    assert told[0] == "registered"
    assert told.count("promoted") >= 2


def check_answers(folder: Path) -> None:
    """Serve the model in a process of its own, and ask it."""
    import openai

    with (
        served(folder, "mine", threads=1) as server,
        openai.OpenAI(base_url=server.url, api_key=server.key.get_secret_value()) as client,
    ):
        answer = client.chat.completions.create(
            model="mine",
            messages=[{"role": "user", "content": "Where is bread warm?\n(A) oven\n(B) river"}],
            max_tokens=2,
        )
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
