"""The tokens of written answers: read from replies as endpoints send them, and cut to labels."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from chat_endpoint import spelled_entry
from hypothesis import given, settings
from hypothesis import strategies as st

from distillery.data.answer_tokens import AnswerToken, spelled
from distillery.teacher.reading import after_thinking, written_answer
from distillery.teacher.reply import Completion, read_completion
from distillery.teacher.written_tokens import merged, tokens_of_label

BUDGET = settings(max_examples=200, deadline=None, database=None, derandomize=True)
"""Inputs that are tried each time, always the same ones."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
}
KEY = "key-7f3a-very-secret"

Top = dict[bytes, float]


def read(
    text: str, entries: Any, letters: Sequence[str] = (), stops: Sequence[str] = ()
) -> Completion:
    message = {"message": {"content": text}, "finish_reason": "stop"}
    payload = {"choices": [{**message, "logprobs": {"content": entries}}]}
    return read_completion(payload, letters, False, lambda said: said.replace(KEY, "***"), stops)


def tokens_in(text: str, *written: tuple[bytes, Top]) -> tuple[AnswerToken, ...] | None:
    """The tokens of a reply whose entries say `written`."""
    return read(text, [spelled_entry(*token) for token in written]).tokens


def shares(token: AnswerToken) -> dict[bytes, Any]:
    """The probability of each candidate."""
    return {text: pytest.approx(math.exp(log)) for text, log in token.candidates}


def certain(*texts: bytes) -> list[tuple[bytes, Top]]:
    return [(text, {text: 1.0}) for text in texts]


def plain(*texts: bytes) -> tuple[AnswerToken, ...]:
    return tuple(AnswerToken(text, ((text, 0.0),)) for text in texts)


def label_of(text: str, *written: tuple[bytes, Top]) -> tuple[AnswerToken, ...] | None:
    """The tokens of the label of an object that a reply says."""
    found = tokens_in(text, *written)
    assert found is not None
    assert spelled(found).decode() == after_thinking(text)
    return tokens_of_label(found, written_answer(text, SCHEMA), SCHEMA)


def test_tokens_and_their_alternatives() -> None:
    found = tokens_in(
        "An oven", (b"An", {b"An": 0.75, b"The": 0.25}), (b" oven", {b" oven": 0.5, b" iron": 0.25})
    )
    assert found
    assert [token.text for token in found] == [b"An", b" oven"]
    assert shares(found[0]) == {b"An": 0.75, b"The": 0.25}
    assert shares(found[1]) == {b" oven": 0.5, b" iron": 0.25}


def test_a_character_that_two_tokens_share() -> None:
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert tokens_in("né", *certain(b"n", first, second)) == plain(b"n", first, second)


def test_bytes_that_are_missing_or_wrong_are_those_of_the_text() -> None:
    odd: list[Any] = [None, "né", [256], [-1], ["n"], [1.5], {}]
    for numbers in odd:
        entry = {"token": "né", "logprob": -0.5, "bytes": numbers}
        found = read("né", [{**entry, "top_logprobs": [entry]}]).tokens
        assert found == (AnswerToken("né".encode(), (("né".encode(), -0.5),)),)
    entry = {"token": "né", "logprob": -0.5}
    assert read("né", [{**entry, "top_logprobs": [entry]}]).tokens


def test_half_a_character_without_bytes_leaves_a_hard_label() -> None:
    halves = [{"token": "\ufffd", "logprob": -0.5, "bytes": None} for _ in range(2)]
    assert read("é", [{**half, "top_logprobs": [half]} for half in halves]).tokens is None
    whole = {"token": "a", "logprob": -0.5, "bytes": None}
    (token,) = read("a", [{**whole, "top_logprobs": [whole, halves[0]]}]).tokens or ()
    assert token == AnswerToken(b"a", ((b"a", -0.5),)), "nobody can tell which byte it is"


def test_a_token_that_completes_a_character_alone() -> None:
    """As vLLM has it: the tokens before it have no text."""
    entries = [
        {"token": "", "logprob": -0.1, "bytes": [], "top_logprobs": [{"token": "", "bytes": []}]},
        spelled_entry("é".encode(), {"é".encode(): 0.5}),
    ]
    (token,) = read("é", entries).tokens or ()
    assert (token.text, shares(token)) == ("é".encode(), {"é".encode(): 0.5})


def test_the_end_of_the_turn_has_no_bytes() -> None:
    for name, numbers in (("<|im_end|>", None), ("</s>", list(b"</s>")), ("<x>", [])):
        end = {"token": name, "logprob": math.log(0.5), "bytes": numbers}
        word = spelled_entry(b"Yes", {b"Yes": 0.25, b"No": 0.25})
        word["top_logprobs"].append(end)
        last = {**end, "top_logprobs": [end, {"token": ".", "logprob": math.log(0.25)}]}
        found = read("Yes", [word, last]).tokens
        assert found
        assert [token.text for token in found] == [b"Yes", b""]
        assert shares(found[0]) == {b"Yes": 0.25, b"No": 0.25, b"": 0.5}
        assert shares(found[1]) == {b"": 0.5, b".": 0.25}


@pytest.mark.parametrize(
    ("text", "listed", "stops", "kept"),
    [
        ("Good pub", [b"Good", b" pub", b"###"], ["###"], [b"Good", b" pub"]),
        ("Good pub", [b"Good", b" pub", b"\n##", b"#\nQ"], ["END", "###"], [b"Good", b" pub"]),
        ("a", [b"a", b"ba"], ["ba"], [b"a"]),
        ("Yes", [b"<think>### </think>", b"Yes", b"###"], ["###"], [b"Yes"]),
        ("Yes", [b"Yes", b" no"], ["###"], None),
        ("Yes###", [b"Yes", b"###"], ["###"], [b"Yes", b"###"]),
    ],
)
def test_the_tokens_of_a_stop_text_are_left_out(
    text: str, listed: list[bytes], stops: list[str], kept: list[bytes] | None
) -> None:
    """As our own server lists them."""
    found = read(text, [spelled_entry(*token) for token in certain(*listed)], stops=stops).tokens
    assert found == (None if kept is None else plain(*kept))


def test_a_token_that_a_stop_text_shares_has_no_alternatives() -> None:
    entries = [spelled_entry(*token) for token in certain(b"Good", b" pub#", b"##")]
    found = read("Good pub", entries, stops=["###"]).tokens
    assert found == (*plain(b"Good"), AnswerToken(b" pub", ()))


def test_the_token_itself_is_a_candidate_though_others_are_likelier() -> None:
    entry = spelled_entry(b"a", {b"a": 0.125, b"b": 0.5, b"c": 0.25})
    entry["top_logprobs"] = entry["top_logprobs"][1:]
    (token,) = read("a", [entry]).tokens or ()
    assert shares(token) == {b"b": 0.5, b"c": 0.25, b"a": 0.125}


def test_probabilities_of_equal_bytes_are_added_and_are_not_above_1() -> None:
    half = math.log(0.5)
    found = merged([(b"a", half), (b"b", half), (b"a", half - 1), (b"c", half)])
    total = 1.5 + 0.5 / math.e
    expected = {b"a": (0.5 + 0.5 / math.e) / total, b"b": 0.5 / total, b"c": 0.5 / total}
    assert shares(AnswerToken(b"a", found)) == pytest.approx(expected)
    assert [text for text, _ in found] == [b"a", b"b", b"c"]
    assert merged([]) == ()


def test_odd_alternatives_are_left_out() -> None:
    names: list[Any] = ["", None, 7]
    logs: list[Any] = [None, "-1", [], math.nan, math.inf, -math.inf, -9999.0, 5]
    odd: list[Any] = [None, 5, "a", [], {}, {"token": None, "logprob": -1.0}]
    odd += [{"token": name, "logprob": -1.0} for name in names]
    odd += [{"token": "x", "logprob": log} for log in (*logs, 10**400, -(10**400))]
    odd += [{"token": "z\udc00", "logprob": -2}]
    entry = spelled_entry(b"a", {b"a": 0.5})
    entry["top_logprobs"] += odd
    (token,) = read("a", [entry]).tokens or ()
    assert shares(token) == {b"a": 0.5, b"z?": math.exp(-2)}


def test_what_does_not_spell_the_text_is_no_tokens_of_it() -> None:
    assert tokens_in("An oven", *certain(b"An", b" iron")) is None
    assert tokens_in("An oven", *certain(b"An")) is None
    assert tokens_in("An oven", *certain(b"An", b" oven", b" too")) is None
    assert tokens_in("", *certain(b" ")) is None
    assert tokens_in("a") is None
    unlisted = [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]
    assert read("a", unlisted).tokens is None


def test_an_answer_by_letter_has_no_tokens() -> None:
    entry = spelled_entry(b"A", {b"A": 0.5, b"B": 0.25})
    found = read("A", [entry], letters="AB")
    assert (found.tokens, found.answer_letter) == (None, "A")


def test_thinking_and_blanks_are_no_part_of_the_label() -> None:
    found = tokens_in(
        " <think>No?</think>\n\nYes. ",
        *certain(b" <think>", b"No?", b"</th", b"ink>\n"),
        (b"\nYes", {b"\nYes": 0.5, b"\nNo": 0.25, b"\n": 0.125, b"Yes": 0.125}),
        (b". ", {b". ": 0.5, b".": 0.25, b"! ": 0.125, b" ": 0.125}),
        (b"<|im_end|>", {b"<|im_end|>": 1.0}),
    )
    assert found
    assert [token.text for token in found] == [b"Yes", b"."]
    assert shares(found[0]) == {b"Yes": 0.625, b"No": 0.25}
    assert shares(found[1]) == {b".": 0.75, b"!": 0.125}
    assert tokens_of_label(found, "Yes.", None) == found


def test_a_blank_that_the_tokenizer_puts_before_a_text() -> None:
    """As in Llama 2, whose text has none."""
    found = tokens_in("The oven", (b" The", {b" The": 0.5, b" A": 0.25}), (b" oven", {b" oven": 1}))
    assert found
    assert [token.text for token in found] == [b"The", b" oven"]
    assert shares(found[0]) == {b"The": 0.5, b"A": 0.25}


def test_the_same_text_in_thinking_is_another_one() -> None:
    found = tokens_in(
        "<think>Yes</think>Yes",
        (b"<think>Yes", {b"<think>Yes": 1.0}),
        *certain(b"</think>"),
        (b"Yes", {b"Yes": 0.5}),
    )
    assert found
    assert [shares(token) for token in found] == [{b"Yes": 0.5}]


def test_a_fence_is_no_part_of_the_label() -> None:
    found = label_of(
        'So:\n```json\n{"days": 2}\n```',
        *certain(b"So:\n", b"```", b"json"),
        (b'\n{"', {b'\n{"': 0.5, b"\n{\n": 0.25}),
        *certain(b"days"),
        (b'":', {b'":': 0.5, b'": ': 0.5}),
        *certain(b" 2", b"}\n", b"```", b"<|im_end|>"),
    )
    assert found
    assert spelled(found) == b'{"days": 2}'
    assert [token.text for token in found] == [b'{"', b"days", b'":', b" 2", b"}"]
    assert shares(found[0]) == {b'{"': 0.5, b"{\n": 0.25}
    assert shares(found[2]) == {b'":': 0.5, b'": ': 0.5}


def test_a_token_that_a_fence_begins_with_says_nothing_of_the_label() -> None:
    found = label_of('```\n{"days": 2}\n```', *certain(b'```\n{"days": 2', b"}\n```"))
    assert found == (AnswerToken(b'{"days": 2', ()), AnswerToken(b"}", ()))


def test_blanks_go_where_the_label_has_them() -> None:
    """As OpenAI's structured outputs write an object, and as others do."""
    found = label_of(
        '{"city":"Oslo","days":2}',
        *certain(b'{"', b"city"),
        (b'":"', {b'":"': 0.5, b'":': 0.25, b'": "': 0.125}),
        *certain(b"Oslo"),
        (b'","', {b'","': 0.5, b'"}': 0.25, b", ": 0.125}),
        *certain(b"days", b'":'),
        (b"2", {b"2": 0.5, b"12": 0.25, b" 2": 0.125, b" ": 0.125}),
        (b"}", {b"}": 0.5, b",": 0.25, b"}\n": 0.125}),
        (b"<|im_end|>", {b"<|im_end|>": 0.5, b"\n": 0.5}),
    )
    assert found
    texts = [b'{"', b"city", b'": "', b"Oslo", b'", "', b"days", b'":', b" 2", b"}", b""]
    assert [token.text for token in found] == texts
    assert shares(found[2]) == {b'": "': 0.625, b'":': 0.25}
    assert shares(found[4]) == {b'", "': 0.5, b'"}': 0.25, b", ": 0.125}
    assert shares(found[7]) == {b" 2": 0.625, b" 12": 0.25}
    assert shares(found[8]) == {b"}": 0.625, b",": 0.25}
    assert shares(found[9]) == {b"": 0.5}

    spread = '{\n  "city" : "a \\" b,:",\n  "days": 2\n}'
    pieces = (b"{\n", b'  "', b'city" :', b' "a \\', b'" b,:"', b",\n  ", b'"days"', b": 2\n", b"}")
    found = label_of(spread, *certain(*pieces))
    assert found
    assert [token.text for token in found] == [
        *(b"{", b'"', b'city":', b' "a \\', b'" b,:"', b",", b' "days"', b": 2", b"}")
    ]


def test_an_object_in_another_order_is_a_hard_label() -> None:
    assert (
        label_of('{"days": 2, "city": "Oslo"}', *certain(b'{"days": 2', b', "city": "Oslo"}'))
        is None
    )
    assert label_of('{"city": "\\u004fslo"}', *certain(b'{"city": "\\u004fslo"}')) is None


def test_the_key_is_in_no_token() -> None:
    secret = KEY.encode()
    assert tokens_in(f"it is {KEY}", *certain(b"it is ", secret)) is None
    parted = certain(b"it is ", secret[:4], secret[4:])
    assert tokens_in(f"it is {KEY}", *parted) is None
    assert tokens_in("it", (b"it", {b"it": 0.5, secret: 0.25})) is None
    assert tokens_in("it", (b"it", {b"it": 0.5, secret[:4]: 0.25}))


pieces = st.lists(st.binary(min_size=1, max_size=4), max_size=8)


@BUDGET
@given(parts=pieces, around=st.sampled_from([("", ""), ("<think>a</think>", "\n"), (" ", " ")]))
def test_tokens_spell_what_they_are_tokens_of(parts: list[bytes], around: tuple[str, str]) -> None:
    text = b"".join(parts).decode("utf-8", "replace")
    parts = parts if text.encode() == b"".join(parts) else [text.encode()]
    whole = around[0] + text + around[1]
    tokens = [around[0].encode(), *parts, around[1].encode()]
    found = tokens_in(whole, *certain(*filter(None, tokens)))
    if found is not None:
        assert spelled(found).decode() == after_thinking(whole)
        assert all(token.text for token in found)
    else:
        assert not after_thinking(whole) or "\0" in whole


odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
fields = ("token", "logprob", "bytes", "top_logprobs")
entries = st.fixed_dictionaries({}, optional=dict.fromkeys(fields, odd))
listing = st.fixed_dictionaries(
    {"top_logprobs": st.lists(entries | odd, max_size=3)},
    optional={"token": st.sampled_from(["a", "b"]) | odd, "logprob": odd, "bytes": odd},
)


@BUDGET
@given(content=st.lists(listing | odd, max_size=4) | odd, text=st.sampled_from(["a", "ab", "aa"]))
def test_no_reply_makes_reading_fail(content: Any, text: str) -> None:
    found = read(text, content).tokens
    if found is not None:
        assert spelled(found) == text.encode()
        for token in found:
            assert math.fsum(math.exp(log) for _, log in token.candidates) <= 1 + 1e-9


def test_json_of_any_cut_comes_back_as_its_label() -> None:
    value = {"city": 'O"s, l:o {é}\\', "days": 12}
    label = json.dumps(value, ensure_ascii=False)
    for form in ({"separators": (",", ":")}, {"indent": 2}, {}):
        text = json.dumps(value, ensure_ascii=False, **form)
        data = text.encode()
        for size in (1, 2, 3, 7):
            parts = [data[at : at + size] for at in range(0, len(data), size)]
            found = label_of(text, *certain(*parts))
            assert found
            assert spelled(found).decode() == label
