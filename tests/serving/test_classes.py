"""A classifier over real HTTP: its answers are the names of its classes."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from distillery.errors import ModelError
from distillery.inference.onnx_student import OnnxStudent
from distillery.models.class_tokens import FILE, ClassTokens
from distillery.serving.process import served
from distillery.serving.server import serve

CLASSES = ClassTokens(classes=("wärme", "a river, or a bank", "none"), tokens=(301, 300, 305))
MESSAGES: Any = [{"role": "user", "content": "Where is bread warm?"}]


@pytest.fixture(scope="module")
def folder(tiny_onnx: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("classifier") / "student"
    shutil.copytree(tiny_onnx("llama"), target)
    CLASSES.write(target)
    return target


@pytest.fixture(scope="module")
def ask(folder: Path) -> Iterator[Callable[..., Any]]:
    with (
        served(folder, "tiny", threads=1) as server,
        openai.OpenAI(
            base_url=server.url, api_key=server.key.get_secret_value(), max_retries=0
        ) as client,
    ):
        yield lambda **body: client.chat.completions.create(
            **{"model": "tiny", "messages": MESSAGES, **body}
        )


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, float]:
    """The probability of each class, as the model gives it without a server."""
    student = OnnxStudent(folder, threads=1)
    prompt = student.tokenizer.encode_chat(MESSAGES)
    found = student.option_probabilities(prompt, CLASSES.tokens)
    return dict(zip(CLASSES.classes, found, strict=True))


def best_of(probabilities: dict[str, float]) -> str:
    return max(probabilities, key=probabilities.__getitem__)


def listed(entry: Any) -> dict[str, float]:
    return {other.token: math.exp(other.logprob) for other in entry.top_logprobs}


def test_the_answer_is_a_class_with_log_probabilities(
    ask: Callable[..., Any], expected: dict[str, float]
) -> None:
    answer = ask(logprobs=True, top_logprobs=20)
    (choice,) = answer.choices
    (entry,) = choice.logprobs.content
    assert choice.message.content == entry.token == best_of(expected)
    assert bytes(entry.bytes).decode() == entry.token
    assert choice.finish_reason == "stop"
    assert listed(entry) == pytest.approx(expected, abs=1e-6)
    assert sum(listed(entry).values()) == pytest.approx(1)
    assert list(listed(entry).values()) == sorted(expected.values(), reverse=True)
    assert answer.usage.completion_tokens == 1
    plain = ask(max_tokens=1, temperature=1.0, stop=["a"])
    assert plain.choices[0].message.content == best_of(expected)
    assert plain.choices[0].logprobs is None


def test_a_stream_has_the_same_answer(ask: Callable[..., Any], expected: dict[str, float]) -> None:
    chunks = list(ask(logprobs=True, top_logprobs=3, stream=True))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == best_of(expected)
    (entry,) = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
    assert listed(entry) == pytest.approx(expected, abs=1e-6)
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]


def test_a_choice_is_among_the_classes(ask: Callable[..., Any], expected: dict[str, float]) -> None:
    names = [name for name in reversed(CLASSES.classes) if name != best_of(expected)]
    outputs = {"structured_outputs": {"choice": names}}
    (choice,) = ask(logprobs=True, top_logprobs=2, extra_body=outputs).choices
    total = sum(expected[name] for name in names)
    some = {name: expected[name] / total for name in names}
    assert choice.message.content == best_of(some)
    assert listed(choice.logprobs.content[0]) == pytest.approx(some, abs=1e-6)
    wrong = {"structured_outputs": {"choice": ["none", "A"]}}
    with pytest.raises(openai.BadRequestError, match="one of its 3 classes, and 'A' is none"):
        ask(extra_body=wrong)


def test_a_folder_with_damaged_class_tokens_is_not_served(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / FILE).write_text('{"classes": ["a"]')
    with pytest.raises(ModelError, match=r"class_tokens\.json: no class tokens"):
        serve(tmp_path / "damaged", "tiny", "127.0.0.1", 0, None, threads=1)
