"""A teacher's probabilities for its tokens become those of the student's, by the bytes of both."""

import math
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from tiny_model import CHATML, tiny_tokenizer

from distillery.data.answer_tokens import AnswerToken
from distillery.errors import TrainingError
from distillery.training.rows import TrainingRow
from distillery.training.token_labels import StudentTokens, TokenLabels

END = 2
"""The token that ends the turn, in the tiny tokenizers."""

OTHER_TEXTS = ("The bread of the river cloud was warm.", "a river of bread, and wider clouds") * 9


def byte_of_each_letter() -> dict[str, int]:
    """Return which byte each letter of a byte-level vocabulary stands for, as GPT-2 has it."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in shown}
    hidden = [byte for byte in range(256) if byte not in shown]
    return letters | {chr(256 + number): byte for number, byte in enumerate(hidden)}


LETTERS = byte_of_each_letter()


def text_of(tokenizer: Any, token: int) -> bytes:
    return bytes(LETTERS[letter] for letter in tokenizer.convert_ids_to_tokens(token))


def said(tokenizer: Any, text: str, end: bool = True) -> list[AnswerToken]:
    """Return the tokens of `text`, each its only candidate but one that no student knows."""
    texts = [text_of(tokenizer, token) for token in tokenizer.encode(text)]
    texts += [b""] if end else []
    return [AnswerToken(each, ((each, -0.25), (b"<<nowhere>>", -2.0))) for each in texts]


def candidates_of(labels: TokenLabels | None) -> list[dict[int, float]]:
    """Return the candidates of each position, with the logarithms of their probabilities."""
    assert labels is not None
    found = []
    for ids, logs in zip(*labels.arrays(), strict=True):
        found.append({int(i): float(log) for i, log in zip(ids, logs, strict=True) if log > -9e9})
    return found


def spans(texts: list[bytes]) -> list[tuple[int, int]]:
    ends = list(accumulate(map(len, texts)))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def test_with_the_same_tokenizer_every_token_has_its_candidates() -> None:
    tokenizer = tiny_tokenizer("llama")
    student = StudentTokens(tokenizer, END)
    answer = tokenizer.encode("the bread, naïve 雲")
    tokens, expected = [], []
    for number, token in enumerate([*answer, END]):
        others = [(number * 31 + step) % 400 + 5 for step in range(3)]
        pairs = {**dict.fromkeys(others, -3.0), END: -4.0, token: -0.5}
        texts = [text_of(tokenizer, each) if each != END else b"" for each in pairs]
        spelled = texts[list(pairs).index(token)]
        tokens.append(AnswerToken(spelled, tuple(zip(texts, pairs.values(), strict=True))))
        expected.append(pairs)
    labels = student.labels(answer, tokens)
    assert candidates_of(labels) == expected
    assert labels is not None
    assert labels.labelled == len(answer) + 1
    likeliest = labels.arrays()[0][:, 0]
    assert likeliest.tolist() == [*answer, END]


def test_with_another_tokenizer_those_have_some_that_begin_and_end_together() -> None:
    tokenizer = tiny_tokenizer("llama")
    teacher = tiny_tokenizer("llama", OTHER_TEXTS, 330)
    text = "You bake bread by the river: wide clouds, a warm room"
    answer, tokens = tokenizer.encode(text), said(teacher, text)
    found = candidates_of(StudentTokens(tokenizer, END).labels(answer, tokens))
    own = spans([text_of(tokenizer, token) for token in answer])
    theirs = spans([token.text for token in tokens[:-1]])
    expected = []
    for token, span in zip(answer, own, strict=True):
        expected.append({token: -0.25} if span in theirs else {})
    assert found == [*expected, {END: -0.25}]
    assert 5 < sum(map(bool, expected)) < len(answer) - 5, "else this test would see little"


def test_a_character_that_one_of_both_splits_has_no_soft_label() -> None:
    tokenizer = tiny_tokenizer("llama")
    student = StudentTokens(tokenizer, END)
    answer = tokenizer.encode("aéa")
    assert [text_of(tokenizer, token) for token in answer] == [b"a", b"\xc3", b"\xa9", b"a"]
    whole = [AnswerToken(text, ((text, -1.0),)) for text in (b"a", "é".encode(), b"a", b"")]
    assert list(map(bool, candidates_of(student.labels(answer, whole)))) == [1, 0, 0, 1, 1]
    parts = [AnswerToken(text, ((text, -1.0),)) for text in (b"a", b"\xc3", b"\xa9", b"a")]
    found = candidates_of(student.labels(answer, parts))
    assert found == [*({token: -1.0} for token in answer), {}], "an end that was not told has none"


def test_another_text_has_no_soft_labels() -> None:
    tokenizer = tiny_tokenizer("llama")
    student = StudentTokens(tokenizer, END)
    answer = tokenizer.encode("the bread")
    assert student.labels(answer, said(tokenizer, "the breads")) is None
    assert student.labels(answer, said(tokenizer, " the bread")) is None
    assert student.labels(answer, []) is None
    unknown = [AnswerToken(b"the bread", ((b"<<nowhere>>", -0.1),))]
    assert student.labels(answer, unknown) is None


def test_candidates_of_the_same_bytes_are_one() -> None:
    tokenizer = tiny_tokenizer("llama")
    (bread,) = tokenizer.encode("B")
    twice = [AnswerToken(b"B", ((b"B", math.log(0.5)), (b"A", -3.0), (b"B", math.log(0.25))))]
    (found, _) = candidates_of(StudentTokens(tokenizer, END).labels([bread], twice))
    assert found[bread] == pytest.approx(math.log(0.75))
    assert len(found) == 2


def test_a_control_token_is_no_text() -> None:
    tokenizer = tiny_tokenizer("llama")
    tokens = [AnswerToken(b"B", ((b"B", -0.5), (b"<|im_end|>", -1.0)))]
    found = candidates_of(StudentTokens(tokenizer, END).labels(tokenizer.encode("B"), tokens))
    assert list(found[0]) == tokenizer.encode("B")


def llama_2_tokenizer() -> Any:
    """Return a tokenizer that puts a blank before each text and has byte tokens, as Llama 2's and
    Phi-3's, also for bytes that other tokens stand for."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    units = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "a", "b", "c", "d", "e", "r", "br", "ea", "▁br", "bre", "ad", "▁a", "▁b", "\n"]
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *units, *words])}
    merges = [("b", "r"), ("e", "a"), ("▁", "br"), ("a", "d"), ("▁", "a"), ("▁", "b")]
    tokenizer: Any = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")  # type: ignore[no-untyped-call]
    fast.chat_template = CHATML
    return fast


def test_a_blank_that_the_students_tokenizer_puts_before_a_text_is_no_difference() -> None:
    tokenizer = llama_2_tokenizer()
    student = StudentTokens(tokenizer, END)
    answer = tokenizer.encode("bread é", add_special_tokens=False)
    pieces = ["▁br", "ea", "d", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.convert_ids_to_tokens(answer) == pieces
    tokens = [
        AnswerToken(b"br", ((b"br", -0.5), (b"b", -1.0), (b" br", -2.0), (b"", -4.0))),
        AnswerToken(b"ea", ((b"ea", -0.5), (b"ad", -1.5))),
        AnswerToken(b"d", ((b"d", -0.5),)),
        AnswerToken(b" ", ((b" ", -0.5), (b" a", -1.0), (b"a", -1.0))),
        AnswerToken("é".encode(), (("é".encode(), -0.5), (b"b", -1.0))),
        AnswerToken(b"", ((b"", -0.125),)),
    ]
    by_name = tokenizer.get_vocab()
    expected: list[dict[str, float]] = [
        {"▁br": -0.5, "▁b": -1.0, "</s>": -4.0},
        {"ea": -0.5, "ad": -1.5},
        {"d": -0.5},
        {"▁": -0.5, "▁a": -1.0, "a": -1.0},
        {},
        {},
        {"</s>": -0.125},
    ]
    found = candidates_of(student.labels(answer, tokens))
    assert found == [{by_name[name]: log for name, log in each.items()} for each in expected]


def test_of_tokens_of_the_same_bytes_the_tokenizers_own_counts() -> None:
    tokenizer = llama_2_tokenizer()
    student, by_name = StudentTokens(tokenizer, END), tokenizer.get_vocab()
    assert by_name["<0x61>"] < by_name["a"]
    assert student.texts[by_name["<0x61>"]] == student.texts[by_name["a"]] == b"a"
    assert student.ids[b"a"] == by_name["a"]
    assert student.ids[b"f"] == by_name["<0x66>"]


def test_a_tokenizer_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"training\.soft_weight: .*unknown kind; set it to 0"):
        StudentTokens(object(), END)


def test_soft_labels_stand_in_a_rows_file_and_their_absence_leaves_it_as_it_was() -> None:
    labels = TokenLabels(
        candidates=2,
        ids=np.array([[5, 6], [7, 0]], "<i4").tobytes(),
        logs=np.array([[-0.5, -1.0], [-0.25, -np.inf]], "<f4").tobytes(),
    )
    assert labels.labelled == 2
    row = TrainingRow(prompt=(1,), target=(4,), answer=0, soft_tokens=labels)
    assert TrainingRow.model_validate_json(row.model_dump_json()) == row
    plain = TrainingRow(prompt=(1,), target=(4,), answer=0)
    assert "soft_tokens" not in plain.model_dump_json()
    assert "soft_tokens" not in plain.model_dump()
