"""Every command of the command line, once as it is meant and once with input that can be mended:
what it says, and that no traceback comes. They run in this process, on what an earlier version left
behind (golden/make_earlier.py). test_cli.py looks at some of them closely."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from command_names import command_names
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from texts import write_texts

from distillery import cli


@dataclass(frozen=True)
class Case:
    """`works`: arguments that do what the command is for, after the command `before`, if there is
    one; `says`: what it prints then. `fails`: arguments that can be mended, or a setting, and
    `told`: what the line says. {folder}, {base} and {model} stand for folders."""

    works: str
    says: str
    fails: str
    told: str
    before: str = ""


NO_LABELS = "DISTILLERY_LABELS=mysql://x"
NO_STORE = "DISTILLERY_STORE=nowhere://x"

CASES = {
    "new": Case(
        "{folder}/notes.csv --out {folder}/new.yaml", "distillery check ", "none.csv", "none.csv: "
    ),
    "check": Case("{folder}/mine.yaml", "ok   data: ", "none.yaml", "none.yaml: can't be read"),
    "quote": Case("{folder}/mine.yaml", "train: ", "none.yaml", "none.yaml: can't be read"),
    "ask": Case("{model} Where? --options oven river", "oven", "{folder}/none Where?", "/none"),
    "base": Case("{base}", "{base}", "/no/such/folder", "/no/such/folder: no such folder"),
    "trace": Case("mine --json", '"version": "1"', "yours", "yours"),
    "models list": Case("", "mine  version 1  champion", "--registry azureml", "AZUREML_"),
    "models promote": Case(
        "mine 2", "mine version 2 is the champion and pinned", "mine 9", "mine: no version 9"
    ),
    "models rollback": Case(
        "mine",
        "mine version 1 is the champion",
        "mine",
        "names no champion",
        "models promote mine 2",
    ),
    "models unpin": Case(
        "mine", "no champion is pinned", "mine", "no champion is pinned", "models promote mine 1"
    ),
    "models history": Case("mine", "version 1 registered", "mine --registry azureml", "AZUREML_"),
    "models download": Case("mine {folder}/down", "mine version 1 in ", "mine {base}", "{base}"),
    "models compare": Case("mine:1 mine:2 --json", '"rows"', "mine:1 mine:9", "no version 9"),
    "models sign": Case("mine 1", "mine version 1 is signed", "mine 9", "mine: no version 9"),
    "labels list": Case("", "12 answers        1 rejected", NO_LABELS, "DISTILLERY_LABELS: mysql"),
    "labels costs": Case(
        "--by outcome",
        "11         0            440              0            11        no prices  answer",
        NO_LABELS,
        "DISTILLERY_LABELS: mysql",
    ),
    "labels export": Case(
        "{folder}/out.parquet", "12 answers written", "{folder}/none/out.parquet", "none/out"
    ),
    "labels import": Case(
        "{folder}/known.parquet",
        "0 new answers",
        "none.parquet",
        "none.parquet",
        "labels export {folder}/known.parquet",
    ),
    "labels recover": Case(
        "", "0 answers taken in from 0 journals", NO_LABELS, "DISTILLERY_LABELS: mysql"
    ),
    "labels delete": Case(
        "--row row-1", "1 answers deleted", NO_LABELS, "DISTILLERY_LABELS: mysql"
    ),
    "labels batches": Case("--json", "[]", "--forget 1f", "batch 1f: holds no request"),
    "store list": Case("--json", '"digest"', NO_STORE, "nowhere"),
    "store show": Case("b17d", "genai_config.json", "ffff", "0 artifacts begin with ffff"),
    "store export": Case(
        "b17d {folder}/exported", " files, ", "b17d {base}", "{base}: is there already"
    ),
    "store gc": Case("--dry-run", "would be removed", NO_STORE, "nowhere"),
    # These work in test_cli.py, report/test_kept.py and serving/test_foundry.py.
    "serve": Case("--help", "--port", "{folder}/none", "/none"),
    "report": Case("--help", "[RUN]", "mine-run-1", "has no page, because an earlier version"),
    "models foundry": Case("--help", "--name", "{model}", "Foundry Local needs an environment"),
}


def test_every_command_has_a_case() -> None:
    assert set(command_names()) == CASES.keys()


@pytest.fixture
def folders(
    earlier_home: Path,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, str]:
    """What {folder}, {base} and {model} of a case stand for."""
    monkeypatch.chdir(tmp_path)
    for name in ("AZUREML_SUBSCRIPTION_ID", "AZUREML_RESOURCE_GROUP", "AZUREML_WORKSPACE_NAME"):
        monkeypatch.delenv(name, raising=False)
    key = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    monkeypatch.setenv("DISTILLERY_SIGNING_KEY", key.decode())
    data = write_texts(tmp_path / "notes.csv", answered=60, unanswered=60)
    base = str(tiny_model("llama"))
    recipe = {
        "name": "notes",
        "task": {"kind": "classify"},
        "dataset": {
            "source": "files",
            "files": {"train": [data]},
            "columns": {"question": "text", "answer": "label"},
            "carve": {"gold": 0.5, "validation": 0.1, "test": 0.4},
        },
        "teacher": {"kind": "endpoint", "identity": "gpt-test"},
        "student": {"base": {"model": base}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    model = next((earlier_home / "models" / "mine").glob("1f20*"))
    return {"folder": str(tmp_path), "base": base, "model": str(model)}


def run(monkeypatch: pytest.MonkeyPatch, command: str, arguments: str) -> int:
    """Run a command in this process, and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["distillery", *command.split(), *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("command", CASES)
def test_a_command_does_what_it_is_for(
    command: str,
    folders: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = CASES[command]
    if case.before:
        assert run(monkeypatch, "", case.before.format(**folders)) == 0
    capsys.readouterr()
    status = run(monkeypatch, command, case.works.format(**folders))
    printed = capsys.readouterr()
    assert case.says.format(**folders) in printed.out, printed.err
    # `check` finds that the teacher's endpoint is not known.
    assert status == (1 if command == "check" else 0)


@pytest.mark.parametrize("command", CASES)
def test_what_can_be_mended_is_one_line(
    command: str,
    folders: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = CASES[command]
    arguments = case.fails.format(**folders)
    if arguments.startswith("DISTILLERY_"):
        monkeypatch.setenv(*arguments.split("="))
        arguments = ""
    if command == "labels delete":
        arguments = "--rejected"
    assert run(monkeypatch, command, arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", printed.err), printed.err
    assert case.told.format(**folders) in printed.err
