"""The command line, mostly as a process of its own: what it prints where, and how it exits."""

import getpass
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from texts import write_texts

from distillery import cli
from distillery.registry.history import Actor
from distillery.registry.local import LocalRegistry
from distillery.storage.artifacts import ArtifactStore

TinyModel = Callable[[str], Path]
KEY = "a-key-of-the-test"


pytestmark = pytest.mark.usefixtures("one_registry")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distillery.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def run_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, for the further calls of commands that have run in their own."""
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["distillery", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    status = int(ended.value.code or 0)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), errors.getvalue())


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of stderr; nothing else was printed."""
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


@pytest.fixture
def recipe_file(tiny_model: TinyModel, tmp_path: Path) -> Path:
    base = {"model": str(tiny_model("llama"))}
    file = tmp_path / "mine.yaml"
    file.write_text(
        yaml.safe_dump(
            {"teacher": {"kind": "local", "preparation": {"base": base}}, "student": {"base": base}}
        )
    )
    return file


def test_the_entry_point_is_main() -> None:
    (script,) = entry_points(group="console_scripts", name="distillery")
    assert script.load() is cli.main


def checked(recipe: Path) -> subprocess.CompletedProcess[str]:
    """What `check` says of a recipe: lines of an item each, and nothing else."""
    done = run("check", str(recipe))
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line for line in lines if not re.match(r"(ok  |warn|FAIL) \S.*: \S", line)] == []
    return done


def test_check_says_that_it_makes_the_registry(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DISTILLERY_REGISTRY", f"sqlite:///{tmp_path}/new.db")
    done = run("check", str(recipe_file))
    assert done.stderr == f"making the registry {tmp_path}/new.db, once; it takes seconds\n"
    assert "ok   registry: " in done.stdout


def test_check_exits_1_where_something_is_missing(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TEACHER_MODEL_KEY", KEY)
    for name in ("TEACHER_MODEL_NAME", "TEACHER_MODEL_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "endpoint.yaml"
    file.write_text(f"{recipe_file.read_text()}\n".replace("kind: local", "kind: endpoint"))
    done = checked(file)
    assert done.returncode == 1
    assert (
        "FAIL teacher credentials: TEACHER_MODEL_NAME, TEACHER_MODEL_ENDPOINT: not set"
        in done.stdout
    )
    assert "ok   registry: " in done.stdout
    assert KEY not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("check", "none.yaml"), "none.yaml: can't be read"),
        (("new", "none.csv"), "none.csv: can't be read (No such file or directory); correct DATA"),
        (("new", "."), ".: a folder; name the files in it"),
        (("check", "mine.csv"), "mine.csv: rows, and no recipe; `distillery new mine.csv` writes"),
        (("base", "/no/such/folder"), "/no/such/folder: no such folder"),
        (("base", "package:no_such_package"), "package no_such_package is not installed"),
        (("base", ""), "student.base.model: "),
        (("store", "show", "abc"), "0 artifacts begin with abc; see distillery store list"),
        (("store", "export", "abc", "x"), "0 artifacts begin with abc; see distillery store list"),
        (("serve", "/no/such/folder"), "/no/such/folder"),
        (
            ("serve", "/no/such/folder", "--host", "0.0.0.0"),
            "set DISTILLERY_SERVER_KEY, or use 127.0.0.1",
        ),
    ],
)
def test_what_can_be_mended_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    assert said in error_of(run(*arguments))


def test_new_writes_a_recipe_that_check_takes(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "notes.csv", answered=60, unanswered=60)
    file = tmp_path / "mine.yaml"
    done = run("new", data, "--out", str(file), "--text", "text", "--name", "notes")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"distillery check {file}\n" in done.stdout
    found = checked(file)
    assert "ok   data: every file is read; rows: " in found.stdout
    assert (found.returncode, "FAIL" in found.stdout) == (0, False)
    for item in ("teacher", "data", "base model", "disk", "memory", "training", "registry"):
        assert sum(line[5:].startswith(item) for line in found.stdout.splitlines()) == 1
    assert "mine.yaml: exists; " in error_of(run("new", data, "--out", str(file)))


def test_a_wrong_call_explains_itself() -> None:
    assert run("serve", ".", "--port", "99999").returncode == 2
    assert run("store", "gc", "--older-than", "0d").returncode == 2
    assert {"check", "serve", "base", "models", "store"} <= set(run("--help").stdout.split())
    assert {"list", "show", "export", "gc"} <= set(run("store", "--help").stdout.split())


def test_base_prints_the_folder(tiny_model: TinyModel) -> None:
    done = run("base", str(tiny_model("llama")))
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(tiny_model("llama")), "")


def test_the_store_is_listed_shown_and_collected(tmp_path: Path) -> None:
    store, digests = ArtifactStore(), []
    for content in ("one", "two"):
        (tmp_path / content).mkdir()
        (tmp_path / content / "file.txt").write_text(content * 500_000)
        digests.append(store.put(tmp_path / content).sha256)
    kept, gone = digests
    artifact = {"uri": f"elsewhere/{kept}", "sha256": kept, "bytes": 1}
    for name in ("demo-1", "demo-2"):
        store.write_record(
            f"runs/{name}.json",
            json.dumps({"recipe": "demo", "registered": None, "model": artifact}),
        )
    for digest, days in ((kept, 40), (gone, 41)):
        os.utime(Path(store.url) / digest / "artifact.json", (time.time() - days * 86400,) * 2)

    assert run("store", "list").stdout.splitlines() == [
        f"{kept[:12]}         1.5 MB    40d  model of demo-2 and 1 more",
        f"{gone[:12]}         1.5 MB    41d  nothing names it",
    ]
    listed = json.loads(run_here("store", "list", "--json").stdout)
    assert [(one["digest"], one["bytes"], one["named_by"]) for one in listed] == [
        (kept, 1_500_000, ["model of demo-2", "model of demo-1"]),
        (gone, 1_500_000, []),
    ]
    shown = run("store", "show", kept[:6]).stdout.splitlines()
    assert shown[0] == f"{store.url}/{kept}"
    assert shown[1].startswith("1500000 bytes, last used 20")
    assert shown[2:4] == ["named by model of demo-2", "named by model of demo-1"]
    assert re.fullmatch(r"[0-9a-f]{12} +1500000  file\.txt", shown[4])

    copy = tmp_path / "copy"
    exported = run("store", "export", gone[:6], str(copy))
    assert exported.stdout == f"1 files, 1500000 bytes in {copy}\n"
    assert (copy / "file.txt").read_text() == "two" * 500_000
    said = "is there already; name a folder that is not"
    assert said in error_of(run_here("store", "export", gone, str(copy)))
    os.utime(Path(store.url) / gone / "artifact.json", (time.time() - 41 * 86400,) * 2)

    line = f"artifact             1.5 MB    41d  {gone}"
    assert run("store", "gc", "--dry-run").stdout.splitlines() == [
        line,
        "1 would be removed, 1.5 MB",
    ]
    assert run_here("store", "gc").stdout.splitlines() == [line, "1 removed, 1.5 MB"]
    assert run_here("store", "gc").stdout.splitlines() == ["0 removed, 0.0 MB"]
    assert [path.name for path in Path(store.url).iterdir() if len(path.name) == 64] == [kept]


def roles() -> dict[str, str]:
    """Return the roles of the versions as `models list` shows them."""
    lines = run("models", "list", "mine").stdout.splitlines()
    return {line.split("  ")[1]: line.split("  ")[2].strip() for line in lines}


@pytest.mark.slow
def test_models_are_listed_promoted_rolled_back_and_downloaded(tmp_path: Path) -> None:
    for content in ("one", "two"):
        (tmp_path / content).mkdir()
        (tmp_path / content / "weights.data").write_text(content)
        LocalRegistry().register(tmp_path / content, "mine", {}, {}, actor=Actor("run-7"))
    done = run("models", "promote", "mine", "1").stdout
    assert done == "mine version 1 is the champion and pinned\n"
    assert roles() == {"version 2": "challenger", "version 1": "champion, pinned"}
    target = tmp_path / "down"
    assert run("models", "download", "mine", str(target)).stdout == f"mine version 1 in {target}\n"
    assert (target / "weights.data").read_text() == "one"
    assert "mine: no version 3 in" in error_of(run("models", "promote", "mine", "3"))

    assert run("models", "unpin", "mine").stdout == "mine: no champion is pinned\n"
    LocalRegistry().promote(LocalRegistry().get("mine", "2"), "1", Actor("run-7"))
    done = run("models", "rollback", "mine", "--reason", "complaints").stdout
    assert done == "mine version 1 is the champion and pinned\n"
    assert roles() == {"version 2": "archived", "version 1": "champion, pinned"}

    lines = run("models", "history", "mine").stdout.splitlines()
    told = [line.partition("Z  ")[2] for line in lines]
    user = getpass.getuser()
    assert told[0] == "version 1 registered  by run-7"
    assert told[-1] == (
        f"version 1 rolled back in place of version 2, pinned  by {user}: complaints"
    )
    listed = json.loads(run("models", "history", "mine", "--json").stdout)
    assert [event["action"] for event in listed] == [
        *("registered", "registered", "promoted", "unpinned", "promoted", "rolled back"),
    ]
    assert listed[-1]["before"] == "2"


def test_ask_takes_options_of_several_words_and_lines_of_input(
    tiny_onnx: Callable[..., Path],
) -> None:
    folder = str(tiny_onnx("llama"))
    done = run("ask", folder, "Where is bread?", "--options", "oven", "a river", "cloud")
    assert done.returncode == 0
    assert sorted(line[:10] for line in done.stdout.splitlines()) == [
        *("A  oven   ", "B  a river", "C  cloud  "),
    ]
    assert re.fullmatch(r"\n +tokens +seconds +tokens/s\nprompt +[\d., ]+\n", done.stderr)
    done = run("ask", folder, "--max-length", "40", "--", "Where is bread?")
    assert (done.returncode, done.stderr.count("answer")) == (0, 1)
    assert "--temperature: need --do-sample" in run("ask", folder, "--temperature", "2").stderr
    assert "has no adapter_weights" in error_of(run("ask", folder, "Where?", "--adapter", "off"))
    done = subprocess.run(
        [sys.executable, "-m", "distillery.cli", "ask", folder, "--options", "oven", "river"],
        input="Where is bread?\nWhere is rest?\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 4)


@pytest.mark.parametrize(
    ("given", "question", "options"),
    [
        (["-5 + 3 = ?"], "-5 + 3 = ?", []),
        (["-5+3"], "-5+3", []),
        (["-5 + 3 = ?", "--options", "-2", "--2", "folder"], "-5 + 3 = ?", ["-2", "--2", "folder"]),
        (["--options", "a", "-1", "--system", "- short", "Q"], "Q", ["a", "-1"]),
        (["--options", "a", "b", "--", "--options"], "--options", ["a", "b"]),
        (["Q", "--options=a", "--options", "b"], "Q", ["a", "b"]),
        (["Q", "--options", "b", "--do-sample"], "Q", ["b"]),
    ],
)
def test_questions_and_options_may_begin_with_a_minus(
    given: list[str], question: str, options: list[str]
) -> None:
    command: Any = typer.main.get_command(cli.app)
    asked = command.commands["ask"].make_context("ask", ["folder", *given]).params
    assert (asked["question"], asked["options"]) == (question, options)


def test_options_without_a_text_and_mistyped_ones_are_refused() -> None:
    assert "--options: give at least one text" in run("ask", "folder", "Q", "--options").stderr
    assert "No such option" in run("ask", "folder", "Q", "--sistem=x").stderr


def get(url: str, key: str = "") -> bytes:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30) as response:
        content: bytes = response.read()
    return content


def test_serve_answers_until_it_is_ended(tiny_onnx: Callable[..., Path]) -> None:
    command = [
        sys.executable,
        "-m",
        "distillery.cli",
        "serve",
        str(tiny_onnx("llama")),
        "--name",
        "mine",
        "--port",
        "0",
    ]
    with subprocess.Popen(
        command,
        env=os.environ | {"DISTILLERY_SERVER_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            url = json.loads(server.stdout.readline())["url"]
            assert json.loads(get(f"{url}/models", KEY))["data"][0]["id"] == "mine"
            with pytest.raises(urllib.error.HTTPError, match="401"):
                get(f"{url}/models")
        finally:
            server.send_signal(signal.SIGTERM)
        server.wait(20)
        assert b"Traceback" not in server.stderr.read()
