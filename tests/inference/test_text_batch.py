"""Texts that are written at once have the tokens that each has alone."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guessing import Guessing, watched, with_drafts

from distillery.errors import AnswerStopped, ModelError
from distillery.export.build import export
from distillery.inference import text_batch
from distillery.inference.batch_graph import UnknownGraph
from distillery.inference.guide import Guides
from distillery.inference.logits import Logits
from distillery.inference.onnx_student import OnnxStudent
from distillery.inference.text_batch import TextBatch, passes
from distillery.recipe import ExportForm

Build = Callable[..., Path]
Steps = Iterator[tuple[int, Logits]]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"enum": [1, 22, 333]}, "kind": {"enum": ["oven", "a bridge"]}},
    "required": ["n", "kind"],
    "additionalProperties": False,
}


def prompts(count: int, longest: int = 90) -> list[list[int]]:
    """Prompts of many lengths, from one token on; some begin alike."""
    numbers = np.random.default_rng(0)
    found: list[list[int]] = []
    for number in range(count):
        length = 1 + number * (longest - 1) // max(1, count - 1)
        prompt = numbers.integers(5, 500, length).tolist()
        if number % 3 == 2:
            prompt = found[-1][: length // 2] + prompt[length // 2 :]
        found.append(prompt)
    return found


def together(
    batch: TextBatch, waiting: list[Callable[[], Steps]]
) -> list[list[tuple[int, Logits]]]:
    """Take a token of each answer in turns; where one has ended, the next one begins."""
    found: list[list[tuple[int, Logits]]] = [[] for _ in waiting]
    active: dict[int, Steps] = {}
    begun = 0
    while active or begun < len(waiting):
        if begun < len(waiting) and len(active) < batch.count:
            active[begun] = waiting[begun]()
            begun += 1
        for number, steps in list(active.items()):
            step = next(steps, None)
            if step is None:
                del active[number]
            else:
                found[number].append(step)
    return found


def tokens_of(found: list[list[tuple[int, Logits]]]) -> list[list[int]]:
    return [[token for token, _ in steps] for steps in found]


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_each_answer_has_the_tokens_that_it_has_alone(
    arch: str, count: int, tiny_onnx: Build
) -> None:
    """Ragged prompts and answers, which come and go, beyond the first size of the rows."""
    alone, batch = OnnxStudent(tiny_onnx(arch), 1), TextBatch(tiny_onnx(arch), 1, count)
    asked = [(prompt, 2 + 7 * (number % 5)) for number, prompt in enumerate(prompts(13))]
    asked[4] = (asked[4][0], 270)
    expected = [list(alone.steps(prompt, most)) for prompt, most in asked]

    def begin(prompt: list[int], most: int) -> Callable[[], Steps]:
        return lambda: batch.steps(prompt, most)

    found = together(batch, [begin(*each) for each in asked])
    assert tokens_of(found) == tokens_of(expected)
    for steps, others in zip(found, expected, strict=True):
        for (_, logits), (_, other) in zip(steps, others, strict=True):
            assert np.allclose(logits, other, atol=1e-3)
    assert batch.active == []


def test_schemas_and_seeds_are_each_answer_s_own(tiny_onnx: Build) -> None:
    folder = tiny_onnx("llama")
    alone, batch = OnnxStudent(folder, 1), TextBatch(folder, 1, 4)
    guides = Guides((folder / "tokenizer.json").read_text(), alone.end_ids)

    def settings(number: int) -> dict[str, Any]:
        guide = guides.start(SCHEMA) if number % 2 else None
        return {"temperature": number % 3, "top_p": 0.9, "seed": number, "guide": guide}

    asked = prompts(9)
    expected = [
        list(alone.steps(prompt, 40, **settings(number))) for number, prompt in enumerate(asked)
    ]

    def begin(number: int) -> Callable[[], Steps]:
        return lambda: batch.steps(asked[number], 40, **settings(number))

    found = tokens_of(together(batch, [begin(number) for number in range(len(asked))]))
    assert found == tokens_of(expected)
    for number in range(1, len(asked), 2):
        assert json.loads(alone.text_of(found[number])).keys() == {"n", "kind"}


def test_an_answer_that_is_not_asked_for_loses_nothing(tiny_onnx: Build) -> None:
    """Its turn does not come for a while, and then it goes on."""
    batch = TextBatch(tiny_onnx("llama"), 1, 3)
    asked = prompts(3, 40)[1:]
    expected = [list(batch.steps(prompt, 12)) for prompt in asked]
    slow, fast = (batch.steps(prompt, 12) for prompt in asked)
    found = [next(slow), next(slow)]
    others = [next(fast) for _ in range(9)]
    found += list(slow)
    others += list(fast)
    assert tokens_of([found, others]) == tokens_of(expected)


def test_an_answer_that_ends_early_gives_its_row_to_the_last(tiny_onnx: Build) -> None:
    batch = TextBatch(tiny_onnx("llama"), 1, 3)
    asked = prompts(4, 60)
    expected = [list(batch.steps(prompt, 9)) for prompt in asked]
    first, second, third = (batch.steps(prompt, 9) for prompt in asked[:3])
    kept = [[next(second)], [next(third)]]
    assert next(first)
    first.close()
    fourth = batch.steps(asked[3], 9)
    kept.append([next(fourth)])
    for steps, of in zip((second, third, fourth), kept, strict=True):
        of += steps
    assert tokens_of(kept) == tokens_of(expected[1:])


def test_prompts_that_begin_alike_are_computed_once(tiny_onnx: Build) -> None:
    batch = TextBatch(tiny_onnx("llama"), 1, 3)
    begun = prompts(2, 60)[1]
    expected = list(batch.steps([*begun, 7, 8], 5))
    computed: list[int] = []
    run = batch.run

    def count(row: int, tokens: Any, lengths: Any, read: Any) -> Any:
        computed.append(sum(map(len, tokens)))
        return run(row, tokens, lengths, read)

    batch.run = count  # type: ignore[method-assign, assignment]
    under_way = batch.steps([*begun, 9], 5)
    assert next(under_way)
    assert computed == [3], "an even number of its 61 tokens is shared"
    assert tokens_of([list(batch.steps([*begun, 7, 8], 5))]) == tokens_of([expected])
    assert computed[1] == 2
    batch.forget()
    computed.clear()
    assert next(batch.steps([*begun, 7, 8], 5))
    assert computed == [len(begun) + 2]


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_no_answer_depends_on_those_beside_it(precision: str, tiny_onnx: Build) -> None:
    """Bit for bit, so that equal seeds give equal answers, however busy the server is."""
    batch = TextBatch(tiny_onnx("llama", precision), 1, 5)
    asked = prompts(5, 40)
    alone = [list(batch.steps(prompt, 10)) for prompt in asked]
    beside = together(batch, [lambda p=prompt: batch.steps(p, 10) for prompt in asked])  # type: ignore[misc]
    for steps, others in zip(alone, beside, strict=True):
        for (token, logits), (other, beside_others) in zip(steps, others, strict=True):
            assert token == other
            assert np.array_equal(logits, beside_others)


def test_passes_are_filled_up_where_kernels_take_other_sums_for_an_odd_number(
    tiny_onnx: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TextBatch(tiny_onnx("llama"), 1, 3)
    asked = [*prompts(6, 40)[1:], prompts(6, 40)[5]]
    expected = [list(plain.steps(prompt, 10)) for prompt in asked]
    assert plain.multiple == 1
    monkeypatch.setattr(TextBatch, "counts_beside", lambda _: True)
    batch = TextBatch(tiny_onnx("llama"), 1, 3)
    rows: list[int] = []
    run = batch.run

    def count(row: int, tokens: Any, lengths: Any, read: Any) -> Any:
        if len(tokens[0]) == 1:
            rows.append(len(tokens))
        return run(row, tokens, lengths, read)

    batch.run = count  # type: ignore[method-assign, assignment]
    found = together(batch, [lambda p=prompt: batch.steps(p, 10) for prompt in asked])  # type: ignore[misc]
    assert tokens_of(found) == tokens_of(expected)
    assert set(rows) == {2, 4}


def test_what_fills_a_pass_up_leaves_the_prompt_of_its_row(
    tiny_onnx: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextBatch, "counts_beside", lambda _: True)
    batch = TextBatch(tiny_onnx("llama"), 1, 3)
    asked = prompts(4, 60)[1:]
    expected = list(batch.steps(asked[1], 9))
    together(batch, [lambda p=prompt: batch.steps(p, 3) for prompt in asked[:2]])  # type: ignore[misc]
    assert list(batch.steps(asked[2], 9))
    assert batch.prompts[1] == tuple(asked[1])
    found = list(batch.steps(asked[1], 9))
    for (token, logits), (other, others) in zip(found, expected, strict=True):
        assert token == other
        assert np.allclose(logits, others, atol=1e-4)


@pytest.mark.parametrize("apart", [0.0, 1e-3])
def test_whether_a_token_counts_those_beside_it_is_tried(
    apart: float, tiny_onnx: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TextBatch.run

    def odd_is_other(batch: TextBatch, row: int, tokens: Any, lengths: Any) -> Any:
        return run(batch, row, tokens, lengths) + apart * (len(tokens) % 2)

    monkeypatch.setattr(TextBatch, "run", odd_is_other)
    assert TextBatch(tiny_onnx("llama"), 1, 3).multiple == (2 if apart else 1)


def test_a_prompt_that_is_stopped_leaves_the_others(tiny_onnx: Build) -> None:
    batch, stop = TextBatch(tiny_onnx("llama"), 1, 3), threading.Event()
    batch.heed(stop)
    asked = prompts(3, 40)
    expected = [token for token, _ in batch.steps(asked[1], 6)]
    under_way = batch.steps(asked[1], 6)
    found = [next(under_way)[0]]
    stop.set()
    with pytest.raises(AnswerStopped):
        next(batch.steps(asked[2], 6))
    stop.clear()
    assert found + [token for token, _ in under_way] == expected


def test_long_rows_are_given_up_when_nobody_needs_them(
    tiny_onnx: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = TextBatch(tiny_onnx("llama"), 1, 2)
    short, long = prompts(2, 900)
    expected = [token for token, _ in batch.steps(short, 4)]
    assert batch.capacity == 256
    assert next(batch.steps(long, 50))
    assert batch.capacity == 1024
    monkeypatch.setattr(text_batch, "LARGEST_WASTE", 2)
    assert [token for token, _ in batch.steps(short, 4)] == expected
    assert batch.capacity == 256


def test_an_answer_ends_where_the_context_does(tiny_onnx: Build) -> None:
    alone, batch = OnnxStudent(tiny_onnx("llama"), 1), TextBatch(tiny_onnx("llama"), 1, 2)
    prompt = prompts(2, 1020)[1]
    expected = [token for token, _ in alone.steps(prompt, 50)]
    assert [token for token, _ in batch.steps(prompt, 50)] == expected
    assert len(expected) == 4
    assert len(list(batch.steps([*prompt, 5, 6, 7, 8], 50))) == 1
    with pytest.raises(ModelError, match="takes 1 to 1024"):
        next(batch.steps([*prompt, 5, 6, 7, 8, 9], 50))


def bits(found: list[list[tuple[int, Logits]]]) -> list[list[tuple[int, bytes]]]:
    return [[(token, logits.tobytes()) for token, logits in steps] for steps in found]


@pytest.mark.parametrize("precision", ["fp32", "int4", "int8"])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_no_answer_depends_on_what_was_guessed(
    count: int, precision: str, tiny_onnx: Build, tiny_model: Build, tmp_path: Path
) -> None:
    """Bit for bit, whether the guesses are right, wrong, or both, and however many answers are
    under way; drawn tokens and answers that are held to a schema too."""
    folder = tmp_path / "int8"
    if precision == "int8":
        form = ExportForm(precision="int8", algorithm="dynamic")
        export(tiny_model("llama"), None, form, folder)
    else:
        folder = tiny_onnx("llama", precision)
    batch = TextBatch(with_drafts(folder, tmp_path), 1, count)
    guides = Guides((folder / "tokenizer.json").read_text(), batch.end_ids)
    asked = [(prompt, 2 + 7 * (number % 5)) for number, prompt in enumerate(prompts(11))]
    asked[4] = (asked[4][0], 270)

    def begin(number: int) -> Steps:
        guide = guides.start(SCHEMA) if number % 3 == 1 else None
        prompt, most = asked[number]
        return batch.steps(prompt, most, temperature=number % 2, seed=number, guide=guide)

    beginnings: list[Callable[[], Steps]] = [partial(begin, n) for n in range(len(asked))]
    expected = bits([list(each()) for each in beginnings])
    answers = [[token for token, _ in steps] for steps in expected]
    passes = []
    for right in (0, 2, 9):
        batch.drafts = Guessing(answers, right)  # type: ignore[assignment]
        widths = watched(batch)
        assert bits(together(batch, beginnings)) == expected
        assert batch.active == []
        passes.append(len(widths))
        for rows, width in widths:
            assert width % 2 == 0
            assert width <= max(2, min(8, 16 // rows))
    assert passes[0] > passes[1] >= passes[2]


def test_an_answer_that_is_ahead_keeps_its_lead_while_others_are_computed(
    tiny_onnx: Build, tmp_path: Path
) -> None:
    """One is not asked while the pass of the other one goes over its row."""
    batch = TextBatch(with_drafts(tiny_onnx("llama"), tmp_path), 1, 3)
    asked = prompts(3, 40)[1:]
    expected = bits([list(batch.steps(prompt, 20)) for prompt in asked])
    answers = [[token for token, _ in steps] for steps in expected]
    batch.drafts = Guessing(answers[:1], 9)  # type: ignore[assignment]
    guessed, other = (batch.steps(prompt, 20) for prompt in asked)
    found: list[list[tuple[int, Logits]]] = [[next(guessed), next(guessed)], []]
    assert batch.is_ahead
    found[1] += [next(other) for _ in range(6)]
    assert not batch.is_ahead
    found[0] += list(guessed)
    found[1] += list(other)
    assert bits(found) == expected


def test_drafts_stay_within_the_context(tiny_onnx: Build, tmp_path: Path) -> None:
    batch = TextBatch(with_drafts(tiny_onnx("llama"), tmp_path), 1, 2)
    plain = TextBatch(tiny_onnx("llama"), 1, 2)
    prompt = prompts(2, 1010)[1]
    for most, length in ((50, 1010), (50, 1022), (50, 1023), (50, 1024)):
        begun = [*prompt, *[9] * (length - len(prompt))]
        whole = [token for token, _ in plain.steps(begun, most)]
        batch.drafts = Guessing([whole], 9)  # type: ignore[assignment]
        found = [token for token, _ in batch.steps(begun, most)]
        # A pass of theirs has two tokens.
        assert found == whole[: max(1, 1023 - length)]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 5, [(0, 5)]),
        (0, 513, [(0, 513)]),
        (0, 514, [(0, 512), (512, 514)]),
        (6, 1100, [(6, 518), (518, 1030), (1030, 1100)]),
    ],
)
def test_no_pass_has_a_single_token_of_a_long_prompt(
    start: int, end: int, expected: list[tuple[int, int]]
) -> None:
    assert list(passes(start, end)) == expected


def test_graphs_that_take_no_rows_together_are_refused(tiny_onnx: Build, tmp_path: Path) -> None:
    with pytest.raises(UnknownGraph):
        TextBatch(tiny_onnx("phi4mini"), 1, 3)
    own_options = shutil.copytree(tiny_onnx("llama"), tmp_path / "model")
    config = json.loads((own_options / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
    (own_options / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownGraph, match="session_options"):
        TextBatch(own_options, 1, 3)
