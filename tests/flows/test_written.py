"""The whole way of written answers on a tiny random model: fields out of text with a teacher of the
run's own, batch inference and the server, and free text from gold answers and the server."""

import csv
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from chat_endpoint import ChatEndpoint, shorter
from tiny_recipe import FILLER

from distillery.answers import canonical
from distillery.data.answer_tokens import FILE as TOKENS_FILE
from distillery.data.answer_tokens import read_answer_tokens
from distillery.serving.process import served

PROJECT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

JUDGE_KEY = "key-of-a-judge-7f3a"

PLACES = {"bread": "oven", "river": "bridge", "cloud": "rain"}

SCHEMA = {
    "type": "object",
    "properties": {
        "place": {"enum": list(PLACES.values())},
        "warm": {"type": "boolean"},
    },
    "required": ["place"],
    "additionalProperties": False,
}


class Home:
    """A folder in which runs follow each other, with the registry and the store that they fill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if "PREFECT_" not in name},
            "DISTILLERY_HOME": str(folder / "home"),
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }

    def run(self, module: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=PROJECT,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def distil(self, values: dict[str, Any]) -> str:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return self.run("flows.distill", str(path))

    def answers(self, name: str, rows: Path) -> list[dict[str, Any]]:
        out = self.folder / "answers"
        self.run("flows.batch_inference", name, str(rows), str(out))
        lines = (out / "predictions.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def downloaded(self, name: str) -> Path:
        """The student as the run has fetched it from the registry."""
        (folder,) = (self.folder / "home" / "downloads" / name).iterdir()
        return folder


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def text_of(number: int, word: str) -> str:
    order = random.Random(number)
    words = order.choices(FILLER, k=6)
    words.insert(order.randrange(7), word)
    return " ".join(words)


def asked(folder: Path, text: str) -> str:
    """Serve a folder and return what the student answers to a text."""
    with served(folder, "student", threads=1) as server:
        answer = httpx.post(
            f"{server.url}/chat/completions",
            headers={"authorization": f"Bearer {server.key.get_secret_value()}"},
            json={"model": "student", "messages": [{"role": "user", "content": text}]},
            timeout=60,
        )
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"])


def test_fields_out_of_text(home: Home, tiny_model: Callable[[str], Path]) -> None:
    rows, texts = home.folder / "rows.jsonl", []
    with rows.open("w") as file:
        for number in range(180):
            word = list(PLACES)[number % 3]
            row: dict[str, Any] = {"text": text_of(number, word)}
            texts.append(row["text"])
            if number % 4:
                row["answer"] = {"warm": word == "bread", "place": PLACES[word]}
            file.write(json.dumps(row) + "\n")
    training = {"method": "full", "epochs": 10, "learning_rate": 0.003}
    printed = home.distil(
        {
            "name": "fields",
            "task": {"kind": "extract", "schema": SCHEMA, "max_tokens": 64},
            "dataset": {
                "source": "files",
                "files": {"train": [str(rows)]},
                "carve": {"gold": 0.5, "validation": 0.1, "test": 0.3},
                "near_duplicate": 1.0,
            },
            "teacher": {
                "kind": "local",
                "soft_labels": True,
                "preparation": {"base": {"model": str(tiny_model("llama"))}, "training": training},
            },
            "student": {"training": {**training, "epochs": 1}},
            "export": {"ladder": [{"precision": "int8", "algorithm": "rtn"}], "largest_loss": 1},
            "evaluation": {"rules": []},
            "registry": {"kind": "local", "model_name": "fields"},
        }
    )
    assert "fields version 1 (local)" in printed
    tokens = [read_answer_tokens(file) for file in home.folder.rglob(TOKENS_FILE)]
    assert any(len(found) > 9 for found in tokens), "the labels have their tokens' probabilities"
    new = home.folder / "new.jsonl"
    new.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:9]))
    found = home.answers("fields", new)
    assert len(found) == 9
    for line in found:
        assert canonical(line["answer"], SCHEMA) == line["answer"]
    assert canonical(asked(home.downloaded("fields"), texts[0]), SCHEMA)


def test_free_text(home: Home, tiny_model: Callable[[str], Path]) -> None:
    rows = home.folder / "rows.csv"
    with rows.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["facts", "sentence"])
        for number in range(90):
            word = list(PLACES)[number % 3]
            for form in ("The {} is near.", "Near is the {}."):
                writer.writerow([text_of(number, word), form.format(PLACES[word])])
    with ChatEndpoint(shorter) as judge:
        home.environment |= {
            "JUDGE_MODEL_NAME": "brief",
            "JUDGE_MODEL_ENDPOINT": judge.url,
            "JUDGE_MODEL_KEY": JUDGE_KEY,
        }
        printed = home.distil(
            {
                "name": "text",
                "task": {"kind": "generate", "max_tokens": 48},
                "dataset": {
                    "source": "files",
                    "files": {"train": [str(rows)]},
                    "columns": {"question": "facts", "answer": "sentence"},
                    "carve": {"test": 0.3},
                    "near_duplicate": 1.0,
                },
                "teacher": {"kind": "gold"},
                "student": {
                    "base": {"model": str(tiny_model("llama"))},
                    "training": {"method": "full", "epochs": 10, "learning_rate": 0.003},
                },
                "evaluation": {
                    "rules": [{"kind": "limit", "figure": "win_rate", "minimum": 0}],
                    "judge": {
                        "instructions": "The better sentence says all of the facts.",
                        "prices": {"input": 1, "output": 2, "currency": "EUR"},
                    },
                },
                "registry": {"kind": "local", "model_name": "text"},
            }
        )
        assert "text version 1 (local)" in printed
        assert re.search(r"judge: \d+ wins, \d+ ties, \d+ losses of the student", printed)
        paid = re.search(r"judge: brief: (\d+) calls, .* EUR, in this run", printed)
        assert paid
        assert int(paid[1]) == len(judge.calls) > 0
        assert {call.key for call in judge.calls} == {JUDGE_KEY}
        assert "gate: passed: student" in printed
        assert "win_rate at least 0" in printed
    page = Path(re.findall(r"report: (.*)", printed)[-1]).read_text()
    assert '<h2 id="judge">' in page
    assert 'data-label="judge prefers">' in page
    assert JUDGE_KEY not in printed + page
    assert "win rate 0." in (home.downloaded("text") / "README.md").read_text()
    assert asked(home.downloaded("text"), text_of(0, "bread"))
