"""Make what an earlier version of Distillery leaves behind: a home with a label database, an
artifact store with a run's record, and a registry with a tiny model that answers; and the same
labels as a dump of PostgreSQL. tests/test_upgrade.py reads it with today's code.

It is run in the tree of the earlier version, whose modules it uses:

    git worktree add --detach ../earlier COMMIT
    cd ../earlier
    PYTHONPATH=.:tests/support ../.venv/bin/python ../distillery/tests/golden/make_earlier.py OUT

OUT gets home.tar.xz and labels.sql. What is committed was made by 3acc740 of 2026-11-26, whose
database has the schema 0002.
"""

import asyncio
import os
import shutil
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from chat_endpoint import Call, ChatEndpoint, Reply, good, said
from finished_run import finished_run
from label_runs import labelled
from postgres_server import Postgres
from registered_student import ROWS, example, provenance
from tiny_model import build_tiny_model

from distillery.evaluation.report import write_answers
from distillery.registry.card import write_card
from distillery.registry.history import Actor
from distillery.registry.local import LocalRegistry
from distillery.storage.artifacts import RUNS, ArtifactStore

SINCE_15 = ("\\restrict", "\\unrestrict")


def teacher(call: Call) -> Reply:
    """Answer as usual, but name no option for the question about 5."""
    return said("I can't tell.") if "after 5?" in call.question else good(call)


def make_labels(url: str, out: Path) -> None:
    """Have twelve rows labelled, with probabilities; one answer is no label."""
    with ChatEndpoint(teacher) as server:
        asyncio.run(labelled(server, url, out, 12, soft_labels=True))


def exported(folder: Path) -> Path:
    """Return the folder of a tiny random model for ONNX Runtime GenAI."""
    from onnxruntime_genai.models.builder import create_model

    build_tiny_model("llama", folder / "tiny")
    model = folder / "onnx"
    cache = str(folder / "cache")
    create_model(  # type: ignore[call-arg, type-var]
        "llama", str(folder / "tiny"), str(model), "int4", "cpu", cache, hf_remote=False
    )
    return model


def register(folder: Path) -> None:
    """Register two versions, of which the first is the champion, with a run's record."""
    made = provenance(folder / "made")
    content = exported(folder)
    (content / "evaluation").mkdir()
    tested = [example(each) for each in ROWS["test"]]
    write_answers(content / "evaluation", tested, {"gold": ["A", "A"], "student int4": ["A", "B"]})
    registry = LocalRegistry()
    write_card(content, "mine", made)
    first = registry.register(content, "mine", {"produced_by": "mine-run-1"}, made)
    registry.promote(first, None, Actor("mine-run-1"))
    (content / "notes.txt").write_text("the second version")
    registry.register(content, "mine", {"produced_by": "mine-run-2"}, made)
    artifact = ArtifactStore().put(content)
    outcome = finished_run(registered=first, run="mine-run-1")
    model = outcome.model.model_copy(update={"artifact": artifact})
    text = outcome.model_copy(update={"model": model}).model_dump_json(indent=1)
    ArtifactStore().write_record(f"{RUNS}/mine-run-1.json", text)


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        os.environ["DISTILLERY_HOME"] = str(home)
        make_labels(f"sqlite:///{home / 'labels.db'}", Path(folder) / "labels")
        register(Path(folder))
        shutil.rmtree(home / "work", ignore_errors=True)
        with tarfile.open(out / "home.tar.xz", "w:xz") as packed:
            packed.add(home, "home")
        with Postgres() as server:
            make_labels(server.url(), Path(folder) / "on-postgresql")
            # Older programs do not know the lines that begin with a backslash.
            lines = [line for line in server.dump().splitlines() if not line.startswith(SINCE_15)]
            (out / "labels.sql").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
