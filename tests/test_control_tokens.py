"""Control tokens in a row's texts are letters, in training, scoring and serving, for the tokenizers
of several families; and both runtimes give the same ids of hostile and of ordinary texts."""

import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from chat_families import FAMILIES, Family, family_tokenizer
from own_server import pieces_of

from distillery.errors import ModelError
from distillery.inference.batch import Prediction, answer_some
from distillery.inference.logits import Logits
from distillery.inference.onnx_student import OnnxStudent
from distillery.models.load import load_tokenizer
from distillery.prompts import ControlTokens, GenAITokenizer, TransformersTokenizer, any_of
from distillery.recipe import PromptRecipe
from distillery.records import Example, TeacherLabel
from distillery.serving.completion import Job
from distillery.serving.requests import ChatRequest
from distillery.serving.student import ServedStudent
from distillery.training.rows import TrainingRow, training_rows

pytestmark = pytest.mark.security

ORDINARY = (
    "plain",
    "x<y",
    "a<<",
    "if x < y and a<b",
    "a [b] c[",
    "<b>bold</b> | [link](there)",
    " blanks  at\tboth ends ",
    "two\n\nlines\r\n",
    "three\n\n\nlines",
    "naïve café, 日本語, 🙂",
    "12345.67 don't",
)
PIECES = ("<", "|", "[", "]", "/", ">", "s", "I", "N", "im", "_", "end", " ", "user", "table", "\n")


class Tokenizers(NamedTuple):
    """A family's tokenizer as Transformers has it, in training and in an exported folder."""

    family: Family
    raw: Any
    trained: TransformersTokenizer
    student: ServedStudent

    @property
    def control_ids(self) -> set[int]:
        return set(self.raw.convert_tokens_to_ids(list(self.family.control)))

    def controls_in(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self.control_ids]


@pytest.fixture(scope="module", params=FAMILIES)
def both(
    request: pytest.FixtureRequest,
    tiny_onnx: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Tokenizers:
    folder = tmp_path_factory.mktemp("family") / "onnx"
    shutil.copytree(tiny_onnx("llama"), folder)
    family_tokenizer(request.param).save_pretrained(folder)
    raw = load_tokenizer(folder)
    student = ServedStudent(folder, threads=1)
    return Tokenizers(FAMILIES[request.param], raw, TransformersTokenizer(raw), student)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def hostile_texts(family: Family) -> list[str]:
    """Each control token between words and alone, one inside another, and pieces of them."""
    texts = [f"now {token} then" for token in family.control]
    texts += [*family.control, "".join(family.control)]
    for token in family.control:
        texts.append(token[0] + token + token[1:])
        texts.append(f"{token[:-1]}\0{token}")
    draw = random.Random(0)
    for _ in range(200):
        pieces = draw.choices((*PIECES, *family.control), k=draw.randint(1, 8))
        texts.append("".join(pieces))
    return texts


def test_each_runtime_knows_the_control_tokens(both: Tokenizers) -> None:
    assert both.trained.control.tokens == set(both.family.control)
    assert both.student.tokenizer.control.tokens == set(both.family.control)


def test_a_control_token_in_a_text_is_letters_in_both_runtimes(both: Tokenizers) -> None:
    plain = both.controls_in(both.trained.encode_chat(user("now then")))
    assert plain
    for text in hostile_texts(both.family):
        chat = both.trained.encode_chat(user(text))
        assert both.controls_in(chat) == plain, text
        assert both.student.tokenizer.encode_chat(user(text)) == chat, text
        alone = both.trained.encode_text(text)
        assert both.controls_in(alone) == [], text
        assert both.student.tokenizer.encode_text(text) == alone, text


def test_the_model_sees_the_token_with_a_blank_in_it(both: Tokenizers) -> None:
    token = both.family.control[-1]
    shown = f"now {token[0]} {token[1:]} then"
    ids = both.trained.encode_text(f"now {token} then")
    assert both.raw.decode(ids, clean_up_tokenization_spaces=False) == shown
    assert shown in both.student.decode(both.student.tokenizer.encode_chat(user(shown)))


def test_ordinary_texts_keep_the_ids_that_they_had(both: Tokenizers) -> None:
    for text in (*ORDINARY, *both.family.ordinary):
        rendered = both.raw.apply_chat_template(
            user(text), add_generation_prompt=True, tokenize=False
        )
        ids = both.raw.encode(rendered, add_special_tokens=False)
        assert both.trained.encode_chat(user(text)) == ids, text
        assert both.student.tokenizer.encode_chat(user(text)) == ids, text
        alone = both.raw.encode(text, add_special_tokens=False)
        assert both.trained.encode_text(text) == alone, text
        assert both.student.tokenizer.encode_text(text) == alone, text


def test_every_stage_asks_without_control_tokens(
    both: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row whose every text holds the token that ends a turn: training, scoring with ONNX, and
    serving ask the same ids, with no control token but the template's."""
    end = both.family.special[-1]
    row = Example(
        example_id=f"row {end}",
        question=f"{end}ask",
        choices=(f"{end}a", f"b{end}"),
        answer_key="A",
    )
    label = TeacherLabel(example_id=row.example_id, answer="A", rationale=f"because {end}")
    prompt = PromptRecipe(system="Pick.", answer="text")
    if "system" not in both.raw.apply_chat_template(
        [{"role": "system", "content": ""}], tokenize=False
    ):
        prompt = PromptRecipe(system="", answer="text")
    (trained,), _ = training_rows([row], {row.example_id: label}, prompt, both.raw, "Why?")
    plain = row.model_copy(update={"question": "ask", "choices": ("a", "b")})
    (template,), _ = training_rows([plain], {row.example_id: label}, prompt, both.raw)
    assert both.controls_in(trained.prompt) == both.controls_in(template.prompt)
    assert both.controls_in(trained.explain) == both.controls_in(template.prompt)
    for text in (*trained.texts, trained.rationale):
        assert text
        assert both.controls_in(text) == []

    asked: list[list[int]] = []
    scored: list[list[list[int]]] = []

    def next_logits(ids: Sequence[int]) -> Logits:
        asked.append(list(ids))
        return np.zeros(len(both.raw), dtype=np.float32)

    def probabilities(rows: Sequence[TrainingRow]) -> list[list[float]]:
        for asked_row in rows:
            asked.append(list(asked_row.prompt))
            scored.append([list(text) for text in asked_row.texts])
        return [[0.5, 0.5]] * len(rows)

    def choices(rows: Sequence[TrainingRow]) -> list[Any]:
        return [
            probabilities([each])[0] if each.texts else next_logits(each.prompt) for each in rows
        ]

    for replaced in (next_logits, probabilities, choices):
        monkeypatch.setattr(both.student, replaced.__name__, replaced)
    (result,) = answer_some(both.student, [row], prompt)
    assert isinstance(result, Prediction)
    messages: list[dict[str, str]] = []
    if prompt.system:
        messages.append({"role": "system", "content": prompt.system})
    listed = f"(A) {end}a\n(B) b{end}"
    question = prompt.user.replace("{question}", f"{end}ask").replace("{choices}", listed)
    messages += user(question)
    for body in ({"max_tokens": 1}, {"structured_outputs": {"choice": list(row.choices)}}):
        request = ChatRequest.model_validate({"messages": messages, **body})
        assert pieces_of(both.student, Job(request))
    assert asked == [list(trained.prompt)] * 3
    assert scored == [[list(text) for text in trained.texts]] * 2


def test_a_folder_without_its_tokenizer_says_so(
    tiny_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(tiny_onnx("llama"), folder)
    student = OnnxStudent(folder, threads=1)
    for spoilt in ("[]", "[" * 60_000, '{"added_tokens": [{"id": 1, "content": 5}]}', "{}"):
        (folder / "tokenizer.json").write_text(spoilt)
        with pytest.raises(ModelError, match="tokenizer's files can't be read") as caught:
            student.added_tokens  # noqa: B018 - read for its error
        assert "\n" not in str(caught.value)


def test_a_tokenizer_that_says_little_of_its_tokens_is_read(tmp_path: Path) -> None:
    token = {"id": 7, "content": "<eot>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [token]}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}<eot>")
    tokenizer = GenAITokenizer(None, tmp_path)
    assert tokenizer.control.as_text("so <eot>") == "so < eot>"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("tokens", "text", "expected"),
    [
        ([" <eot>"], "so <eot>", "so < eot>"),
        (["<eot> "], "<eot> so", "< eot> so"),
        (["<a b>"], "<a b>", "<  a b>"),
        (["ab", "a b", "a  b"], "ab a b a  b", "a   b a    b a     b"),
        (["ab", " bc"], "abc", "a b c"),
        (["<<eot>>", "<eot>"], "<<eot>>", "< < eot>>"),
        (["aa"], "aaaa", "a a a a"),
    ],
)
def test_no_token_is_left_after_one_pass(tokens: list[str], text: str, expected: str) -> None:
    control = ControlTokens([(token, True) for token in tokens], "")
    found = control.as_text(text)
    assert found == expected
    assert not any(token in found for token in tokens)


def test_what_the_student_wrote_is_left_to_the_template() -> None:
    """A template drops earlier reasoning at the end of its tag."""
    tokens = [("<think>", False), ("</think>", False), ("<|im_end|>", True), ("<table>", False)]
    control = ControlTokens(tokens, "content.split('</think>')[-1]")
    assert control.tokens == {"<think>", "</think>", "<|im_end|>"}
    said = "<think>long</think>2"
    asked, answered = control.as_texts(
        [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    )
    assert asked["content"] == "< think>long< /think>2"
    assert answered["content"] == said


def test_a_search_for_many_texts_finds_what_a_plain_one_does() -> None:
    chance = random.Random(0)

    def some(most: int) -> str:
        return "".join(chance.choices("<a|>b", k=chance.randint(1, most)))

    for _ in range(500):
        texts = sorted({some(5) for _ in range(chance.randint(1, 12))})
        longest_first = sorted(texts, key=lambda text: (-len(text), text))
        plain = re.compile("|".join(map(re.escape, longest_first)))
        text = some(60)
        found = [match.span() for match in re.finditer(any_of(texts), text)]
        assert found == [match.span() for match in plain.finditer(text)]


def test_common_beginnings_stand_once_in_a_search() -> None:
    pattern = any_of([f"<SPECIAL_{number}>" for number in range(1000)])
    assert pattern.count("SPECIAL") == 1
