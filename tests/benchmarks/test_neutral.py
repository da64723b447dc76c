"""The comparison with lm-evaluation-harness, for which a script stands in: what the harness is
given, and what is made of its answers."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import neutral
from benchmarks.neutral import Found, delivered_form, main, write_task
from distillery.errors import DataError, ModelError, RecipeError
from distillery.evaluation.report import write_answers
from distillery.models.load import load_tokenizer
from distillery.prompts import TransformersTokenizer, letter_ids, render_ids
from distillery.recipe import ExportForm, PromptRecipe, RegistryRecipe
from distillery.records import (
    EvaluationReport,
    Example,
    Ladder,
    PreparedDataset,
    Rung,
    Split,
    StudentCheckpoint,
)
from distillery.registry.open import open_registry
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import sha256_of

TinyModel = Callable[[str], Path]
ROWS = [
    Example(example_id="two", question="odd?", choices=("yes", "no"), answer_key="B"),
    Example(example_id="three", question="{{x}}", choices=("1", "2", "3"), answer_key="C"),
    Example(example_id="long", question="which?", choices=("yes", "no"), answer_key="A"),
    Example(example_id="last", question="even?\n", choices=("yes", "no"), answer_key="A"),
]
HARNESS = """#!{python}
import json, pathlib, sys, yaml

settings = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
if settings["model_args"]["pretrained"] == "nothing":
    sys.exit("Traceback\\nValueError: no such model")
task = yaml.safe_load(open(settings["tasks"][0]))
out = pathlib.Path(settings["output_path"]) / "model"
out.mkdir()
with open(out / "samples_distillery_test_rows_2026.jsonl", "w") as samples:
    for line in open(task["dataset_kwargs"]["data_files"]["test"]):
        row = json.loads(line)
        # It answers each row by the last letter, and the second best is the one before.
        scores = [[str(number - 9.5), "False"] for number in range(len(row["letters"]))]
        samples.write(json.dumps({{"doc": row, "filtered_resps": scores}}) + "\\n")
results = {{"results": {{task["task"]: {{"acc,none": 0.75}}}}}}
(out / "results_2026.json").write_text(json.dumps(results))
"""


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script in place of the harness's Python, and a folder of this test's own for its work."""
    script = tmp_path / "harness"
    script.write_text(HARNESS.format(python=sys.executable))
    script.chmod(0o700)
    monkeypatch.setattr(neutral, "HARNESS", script)
    monkeypatch.setattr(neutral, "WORK", tmp_path / "neutral")


def test_the_task_holds_the_prompts_as_the_student_is_asked_them(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    hugging_face = load_tokenizer(tiny_model("llama"))
    tokenizer = TransformersTokenizer(hugging_face)
    file = write_task(ROWS, PromptRecipe(), tokenizer, tmp_path / "task")
    task = yaml.safe_load(file.read_text())
    rows = [json.loads(line) for line in (tmp_path / "task" / "rows.jsonl").open()]
    assert task["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / "task" / "rows.jsonl")}}
    for key in ("doc_to_text", "doc_to_choice", "doc_to_target"):
        assert task[key] in rows[0]
    assert [row["gold"] for row in rows] == [1, 2, 0, 0]
    assert rows[1]["letters"] == ["A", "B", "C"]
    for example, row in zip(ROWS, rows, strict=True):
        prompt = render_ids(example, PromptRecipe(), tokenizer)
        assert prompt
        for letter, token in zip(row["letters"], letter_ids(tokenizer, 3), strict=False):
            # As the harness makes tokens of a text.
            text = row["prompt"] + task["target_delimiter"] + letter
            assert hugging_face.encode(text, add_special_tokens=False) == [*prompt, token]


def test_a_tokenizer_that_joins_prompt_and_letter_is_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    hugging_face = load_tokenizer(tiny_model("llama"))
    hugging_face.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    hugging_face.add_tokens(["odd?A"])
    with pytest.raises(DataError, match="row two: the tokenizer joins the letter A"):
        write_task(
            ROWS,
            PromptRecipe(user="{choices} {question}"),
            TransformersTokenizer(hugging_face),
            tmp_path / "task",
        )


def register(model: Path, checkpoint: Path, folder: Path, **facts: Any) -> None:
    """Register a model whose run asked ROWS but for `long`. `facts` replace parts of its
    provenance."""
    store = ArtifactStore()
    (folder / "data").mkdir(parents=True)
    test = folder / "data" / "test.jsonl"
    test.write_text("".join(f"{row.model_dump_json()}\n" for row in ROWS))
    splits = {"test": Split(file="test.jsonl", rows=len(ROWS), sha256=sha256_of(test))}
    data = PreparedDataset(artifact=store.put(folder / "data"), splits=splits)
    shutil.copytree(checkpoint, folder / "checkpoint" / "model")
    student = StudentCheckpoint(
        artifact=store.put(folder / "checkpoint"),
        method="full",
        base=str(checkpoint),
        parameters=1,
        steps=1,
    )
    shutil.copytree(model, folder / "content")
    answers = {
        "gold": [row.answer_key for row in ROWS],
        "student": ["A", "A", None, "A"],
        "student int4": ["A", "A", None, "B"],
    }
    (folder / "evaluation").mkdir()
    write_answers(folder / "evaluation", ROWS, answers)
    report = EvaluationReport(
        artifact=store.put(folder / "evaluation"),
        scoreboard=(),
        candidate="student int4",
        answers_sha256="0" * 64,
    )
    provenance = {
        "evaluation": report.model_dump(mode="json"),
        "data": data.model_dump(mode="json"),
        "student": student.model_dump(mode="json"),
        "prompt": {},
        "recipe": {"export": {"all_logits": True}},
    }
    registry = open_registry(RegistryRecipe(model_name="tiny"))
    registry.register(folder / "content", "tiny", {}, provenance | facts)


@pytest.mark.usefixtures("harness")
def test_a_registered_model_is_judged_row_by_row(
    tiny_model: TinyModel,
    tiny_onnx: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    register(tiny_onnx("llama"), tiny_model("llama"), tmp_path / "run")
    assert main(["tiny"]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {
        "rows": 3,
        "left_out": 1,
        "student_ours": 0.3333,
        "student_theirs": 0.75,
        "student_otherwise": 3,
        "exported_ours": 0.0,
        "exported_theirs": 0.75,
        "exported_otherwise": 2,
        "same_weights": True,
    }
    assert "student      0.3333 0.7500                  3 of 3" in shown
    assert "student, row three: gold C, ours A, theirs C by 2.0000" in shown
    asked = {}
    for reader in ("student", "onnx"):
        run = yaml.safe_load((tmp_path / "neutral" / "tiny-1" / reader / "run.yaml").read_text())
        asked[run["model"]] = run["model_args"]
    assert asked["hf"]["dtype"] == "float32"
    assert asked["hf"]["pretrained"].endswith("/model")
    registered = str(tmp_path / "neutral" / "tiny-1" / "registered")
    assert asked["onnxruntime-genai"] == {"pretrained": registered}


@pytest.mark.usefixtures("harness")
def test_what_the_harness_can_not_judge_is_one_line(
    tiny_model: TinyModel,
    tiny_onnx: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, checkpoint = tiny_onnx("llama"), tiny_model("llama")
    register(model, checkpoint, tmp_path / "text", prompt={"answer": "text"})
    assert main(["tiny"]) == 1
    assert "error: tiny version 1: its prompt.answer is text" in capsys.readouterr().err
    with pytest.raises(ModelError, match=r"reader hf \(ValueError: no such model\)"):
        neutral.ask_harness("hf", {"pretrained": "nothing"}, Path(), tmp_path / "out")
    monkeypatch.setattr(neutral, "HARNESS", tmp_path / "nothing")
    assert main(["tiny"]) == 1
    assert "nothing: not there; run `make neutral`" in capsys.readouterr().err


def test_the_form_is_the_one_that_the_ladder_picked(tmp_path: Path) -> None:
    recipe = {"precision": "fp32", "ladder": [{"algorithm": "rtn"}, {"algorithm": "gptq"}]}
    assert delivered_form(tmp_path, {"precision": "fp32"}) == ExportForm(precision="fp32")
    rungs = tuple(
        Rung(form=ExportForm(algorithm=algorithm), picked=algorithm == "gptq")
        for algorithm in ("rtn", "gptq")
    )
    ladder = Ladder(rows=1, accuracy=1, largest_loss=0, rungs=rungs)
    (tmp_path / "ladder.json").write_text(ladder.model_dump_json())
    assert delivered_form(tmp_path, recipe).algorithm == "gptq"
    (tmp_path / "ladder.json").unlink()
    with pytest.raises(RecipeError, match="would leave the adapter aside"):
        delivered_form(tmp_path, {"adapter_apart": True})


def test_of_equal_letters_the_first_counts() -> None:
    found = Found(1.0, {"row": {"A": -2.0, "B": -1.0, "C": -1.0}})
    assert found.letter("row") == "B"
