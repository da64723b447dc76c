"""Asking a student in the terminal: with the prompt that it was trained with, and as text."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distillery.data.examples import write_format
from distillery.errors import DataError, DistilleryError, ModelError, RegistryError
from distillery.inference.abstention import write_abstention
from distillery.inference.decoder import ADAPTER_FILE
from distillery.inference.generation import Written
from distillery.inference.onnx_student import OnnxStudent
from distillery.models.class_tokens import ClassTokens
from distillery.recipe import PromptRecipe
from distillery.records import Abstention, AnswerFormat, Example
from distillery.registry.manifest import copy_with_manifest
from distillery.serving.ask import Asker, SearchOptions, Speed, ask

Build = Callable[..., Path]
QUESTION = "Where is bread warm?"
TEXTS = ("oven", "a river")
CLASSES = ClassTokens(classes=("wärme", "none"), tokens=(301, 305))


def registered(folder: Path, out: Path, prompt: PromptRecipe, fields: list[str]) -> Path:
    """A copy of a model's folder with the manifest that a download has."""
    made = {"prompt": prompt.model_dump(mode="json"), "recipe": {"dataset": {"fields": fields}}}
    copy_with_manifest(folder, out, "mine", made)
    return out


def said(asker: Asker, question: str = QUESTION) -> tuple[str, Speed]:
    pieces: list[str] = []
    speed = asker.answer(question, pieces.append)
    return "".join(pieces), speed


def test_options_are_asked_with_the_prompt_of_the_manifest(
    tiny_onnx: Build, tmp_path: Path
) -> None:
    prompt = PromptRecipe(system="Short.", user="{question}\n{choices}", choice="{letter}: {text}")
    folder = registered(tiny_onnx("llama"), tmp_path / "mine", prompt, [])
    row = Example(example_id="q", question=QUESTION, choices=TEXTS)
    expected = OnnxStudent(folder).answer(row, prompt).probabilities
    table, speed = said(Asker(folder, options=TEXTS))
    lines = [
        f"{key}  {text:7}  {100 * expected[key]:>5.1f} %"
        for key, text in zip("AB", TEXTS, strict=True)
    ]
    assert sorted(table.split("\n")) == lines
    assert table.startswith(max(expected, key=expected.__getitem__))
    assert speed.prompt_tokens > 20
    # Without a manifest, it is the lab's prompt.
    other = OnnxStudent(folder).answer(row, PromptRecipe()).probabilities
    assert f"{100 * other['A']:.1f} %" in said(Asker(tiny_onnx("llama"), options=TEXTS))[0]
    assert f"{100 * other['A']:.1f} %" not in table


def test_a_classifier_gives_the_probabilities_of_its_classes(
    tiny_onnx: Build, tmp_path: Path
) -> None:
    folder = tmp_path / "classifier"
    shutil.copytree(tiny_onnx("llama"), folder)
    CLASSES.write(folder)
    write_abstention(Abstention(threshold=1.1, answer="unsure"), folder)
    prompt = PromptRecipe(system="{labels}", user="{text}", answer="class")
    asked = registered(folder, tmp_path / "mine", prompt, ["other"])
    row = Example(example_id="q", question=QUESTION, classes=CLASSES.classes)
    expected = OnnxStudent(asked).answer(row, prompt).probabilities
    lines = said(Asker(asked))[0].split("\n")
    assert sorted(lines[:2]) == sorted(
        f"{name:5}  {100 * expected[name]:>5.1f} %" for name in expected
    )
    assert lines[2] == "abstains with 'unsure': below the probability 1.100"
    with pytest.raises(DataError, match=r"--options: the student in .* one of its 2 classes"):
        Asker(asked, options=TEXTS)
    with pytest.raises(DataError, match=r"prompt of this classifier; .* --recipe"):
        Asker(folder)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "task: {kind: classify, labels: [wärme, none]}\n"
        "dataset: {source: files, files: {train: [rows.csv]}, "
        "carve: {gold: 0.3, validation: 0.1, test: 0.3}}\n"
        "student: {prompt: {system: '{labels}', user: '{text}'}}\n"
    )
    assert said(Asker(folder, recipe=str(recipe)))[0].split("\n")[:2] == lines[:2]


def test_text_is_that_of_the_student_up_to_max_length(tiny_onnx: Build) -> None:
    folder = tiny_onnx("llama")
    student = OnnxStudent(folder)
    messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": QUESTION}]
    prompt = student.tokenizer.encode_chat(messages)
    tokens, _ = student.generate(prompt, 12)
    length = len(prompt) + 12
    greedy = SearchOptions(max_length=length)
    text, speed = said(Asker(folder, system="Short.", search=greedy))
    assert text == student.text_of(tokens)
    assert (speed.prompt_tokens, speed.answer_tokens) == (len(prompt), 12)
    for search, same in (
        (SearchOptions(max_length=length, do_sample=True, top_k=1), True),
        (SearchOptions(max_length=length, do_sample=True, temperature=5, random_seed=1), False),
    ):
        assert (said(Asker(folder, system="Short.", search=search))[0] == text) is same
    with pytest.raises(DataError, match=f"with the answer it may have {len(prompt)}; shorten"):
        said(Asker(folder, system="Short.", search=SearchOptions(max_length=len(prompt))))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapter": False}, f"has no {ADAPTER_FILE}"),
        ({"options": ["one"]}, "--options: 1; give 2 to 26"),
        ({"options": TEXTS, "system": "x"}, "--system and the search options are for generated"),
        ({"options": TEXTS, "search": SearchOptions(max_length=9)}, "and the search options are"),
        ({"options": TEXTS, "recipe": "none.yaml"}, "none.yaml: can't be read"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    settings: dict[str, object], said: str, tiny_onnx: Build
) -> None:
    with pytest.raises(DistilleryError, match=re.escape(said)):
        Asker(tiny_onnx("llama"), **settings)  # type: ignore[arg-type]


def test_a_model_that_needs_more_than_a_question_or_was_altered(
    tiny_onnx: Build, tmp_path: Path
) -> None:
    prompt = PromptRecipe(user="{title}\n{question}\n{choices}")
    folder = registered(tiny_onnx("llama"), tmp_path / "mine", prompt, ["title"])
    with pytest.raises(DataError, match="its prompt also shows the column title"):
        Asker(folder, options=TEXTS)
    (folder / "extra.txt").write_text("")
    with pytest.raises(RegistryError, match="added or altered"):
        Asker(folder, options=TEXTS)
    with pytest.raises(ModelError, match=r"genai_config\.json: can't be read"):
        Asker(tmp_path)


def test_each_line_of_the_input_is_a_question(
    tiny_onnx: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["Where is bread?", "  ", "tired " * 2000, "Who is tired?"])

    def next_line(mark: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", next_line)
    asker = Asker(tiny_onnx("llama"), options=TEXTS)
    ask(asker, None)
    printed = capsys.readouterr()
    expected = [said(asker, question)[0] for question in ("Where is bread?", "Who is tired?")]
    assert printed.out == "".join(f"{table}\n" for table in expected)
    assert printed.err.count("error: question: the prompt is longer than 512 tokens") == 1
    assert printed.err.count("tokens/s") == 2


def test_the_speed_of_an_answer_is_that_of_the_tokens_after_the_first() -> None:
    assert Speed(20, 0.5, 11, 2.0).table().split("\n") == [
        "          tokens   seconds  tokens/s",
        "prompt        20     0.500      40.0",
        "answer        11     2.000       5.0",
    ]
    assert "answer" not in Speed(20, 0.5).table()


def test_a_student_that_writes_is_asked_with_its_prompt_and_held_to_its_schema(
    tiny_onnx: Build, tmp_path: Path
) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["oven", "a bridge"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    form = AnswerFormat(max_tokens=40, json_schema=schema, metric="field_f1")
    folder = tmp_path / "fields"
    shutil.copytree(tiny_onnx("llama"), folder)
    write_format(folder, form)
    prompt = PromptRecipe(system="As {schema}.", user="{text}!", answer="written")
    asked = registered(folder, tmp_path / "mine", prompt, [])
    row = Example(example_id="q", question=QUESTION, choices=(), format=form)
    student = OnnxStudent(asked)
    (expected,) = student.answers([row], prompt)
    assert isinstance(expected, Written)
    text, speed = said(Asker(asked))
    assert text == expected.text == expected.answer(form)
    assert speed.prompt_tokens == len(student.render(row, prompt).prompt)
    # With a system message of its own, a question is sent as it is.
    assert not said(Asker(asked, system="Short."))[0].startswith("{")
    # Nothing tells the prompt.
    bare = OnnxStudent(folder).tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    assert said(Asker(folder))[1].prompt_tokens == len(bare)
