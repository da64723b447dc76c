"""The probabilities of classes, and labelling by an endpoint."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from chat_endpoint import Call, ChatEndpoint, Reply, completion, refused
from label_runs import endpoint_of, read_lines

from distillery.errors import DataError
from distillery.labels.files import LabelCounts
from distillery.labels.known import read_label_files
from distillery.labels.labelling import label
from distillery.labels.store import LabelStore
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example
from distillery.teacher.answers import distribution
from distillery.teacher.reply import class_at_answer, read_completion

CLASSES = ("order", "order status", "credit_limit", "credit_score", "Refund", "none of these")
Top = dict[str, float]


def tokens(*written: tuple[str, Top]) -> list[dict[str, Any]]:
    """Entries of logprobs.content: each token, and the probabilities of its alternatives."""
    entries = []
    for token, top in written:
        pairs = [{"token": other, "logprob": math.log(p)} for other, p in top.items()]
        entries.append({"token": token, "logprob": -0.1, "top_logprobs": pairs})
    return entries


def shares(*written: tuple[str, Top]) -> tuple[str | None, Top]:
    """Return the class, and the probabilities of the classes, which sum to 1 at most."""
    name, pairs = class_at_answer(tokens(*written), CLASSES)
    assert pairs is not None
    found = {other: math.exp(value) for other, value in pairs}
    assert len(found) == len(pairs)
    assert sum(found.values()) <= 1 + 1e-9
    if pairs:
        whole = distribution(pairs, CLASSES)
        assert whole is not None
        assert tuple(whole) == CLASSES
        assert sum(whole.values()) == pytest.approx(1)
        assert max(whole, key=whole.__getitem__) == name
    return name, found


def test_names_of_one_token() -> None:
    top = {"Refund": 0.6, "refund": 0.1, "none": 0.2, "hello": 0.05}
    name, found = shares(("Refund", top))
    assert name == "Refund"
    assert found == pytest.approx({"Refund": 0.7, "none of these": 0.2})


@pytest.mark.parametrize("classes", [("answer", "question"), ("A", "A+", "question")])
def test_the_key_of_a_json_answer_is_no_class(classes: tuple[str, ...]) -> None:
    written = tokens(
        ('{"', {'{"': 1.0}),
        ("answer", {"answer": 1.0}),
        ('":"', {'":"': 1.0}),
        ("question", {"question": 0.7, classes[0]: 0.3}),
        ('"}', {'"}': 1.0}),
    )
    name, pairs = class_at_answer(written, classes)
    assert name == "question"
    assert pairs is not None
    found = {other: math.exp(value) for other, value in pairs}
    assert found["question"] == pytest.approx(0.7)
    assert sum(found.values()) == pytest.approx(1)


def test_names_part_where_their_tokens_do() -> None:
    name, found = shares(
        ("credit", {"credit": 0.8, "Refund": 0.1, "cre": 0.04}),
        ("_limit", {"_limit": 0.75, "_score": 0.25}),
    )
    assert name == "credit_limit"
    expected = {"credit_limit": 0.6 + 0.02, "credit_score": 0.2 + 0.02, "Refund": 0.1}
    assert found == pytest.approx(expected)


def test_tokens_after_the_names_have_parted_are_left_alone() -> None:
    _, found = shares(
        ("cred", {"cred": 1.0}),
        ("it_s", {"it_s": 0.9, "it_l": 0.1}),
        ("core", {"core": 0.3, "ript": 0.7}),
        (".", {".": 1.0}),
    )
    assert found == pytest.approx({"credit_score": 0.9, "credit_limit": 0.1})


def test_a_class_that_begins_another() -> None:
    first = ("order", {"order": 0.9, "Refund": 0.1})
    longer = {"order status": 0.72, "order": 0.18, "Refund": 0.1}
    name, found = shares(first, (" status", {" status": 0.8, "\n": 0.2}))
    assert name == "order status"
    assert found == pytest.approx(longer)
    name, found = shares(first, ("\n", {" status": 0.2, "\n": 0.8}))
    shorter = {"order": 0.72, "order status": 0.18, "Refund": 0.1}
    assert name == "order"
    assert found == pytest.approx(shorter)
    name, found = shares(first)
    assert name == "order"
    assert found == pytest.approx({"order": 0.9, "Refund": 0.1})


def test_names_in_json() -> None:
    before = [('{"', {'{"': 1.0}), ("answer", {"answer": 1.0}), ('":"', {'":"': 0.9, '": "': 0.1})]
    name, found = shares(
        *before,
        ("order", {"order": 0.9, "Ref": 0.1}),
        ('"}', {'"}': 0.7, " status": 0.3}),
    )
    expected = {"order": 0.63, "order status": 0.27, "Refund": 0.1}
    assert name == "order"
    assert found == pytest.approx(expected)


def test_what_is_thought_counts_for_nothing() -> None:
    thought = [("<think>", {"<think>": 1.0}), ("order", {"order": 1.0}), ("</think>", {"a": 1.0})]
    name, found = shares(*thought, ("\n", {"\n": 1.0}), ("Refund", {"Refund": 0.6, "order": 0.4}))
    assert name == "Refund"
    assert found["Refund"] == pytest.approx(0.6)


def test_no_class_and_no_alternatives() -> None:
    assert class_at_answer(tokens(("hello", {"hello": 1.0})), CLASSES) == (None, ())
    assert class_at_answer([{"token": "Refund"}], CLASSES) == (None, None)
    huge = [{"token": "Refund", "logprob": sign * 10**400} for sign in (1, -1)]
    found = class_at_answer([{"token": "Refund", "top_logprobs": huge}], CLASSES)
    assert found == ("Refund", ()), "no number of an alternative can be read"
    assert class_at_answer(tokens(("Refund", {"other": 0.5})), CLASSES)[0] == "Refund"


def test_classes_of_one_character_are_read_like_letters() -> None:
    payload = completion("2", top={"2": 0.7, "1": 0.2, " 2": 0.1})
    found = read_completion(payload, ("1", "2", "3"), False, str)
    assert found.answer_letter == "2"
    assert found.top_logprobs is not None
    assert distribution(found.top_logprobs, ("1", "2", "3")) == pytest.approx(
        {"1": 0.2, "2": 0.8, "3": 0.0}
    )


# Labelling

NAMES = ("credit_limit", "credit_score", "refund")
PROMPT = PromptRecipe(system="One of:\n{labels}", user="{text}", answer="class")


def example(number: int) -> Example:
    return Example(
        example_id=f"row-{number}",
        question=f"message {number} about {NAMES[number % 3]}",
        classes=NAMES,
    )


def classifier(call: Call) -> Reply:
    """Names the class in the text, but no class for row 4; log-probabilities as names part."""
    name = call.question.split(" ")[-1]
    said = "I cannot tell" if "message 4 " in call.question else name
    if "response_format" in call.body:
        said = json.dumps({"answer": said})
    body = completion(said)
    if call.body.get("logprobs"):
        parts = name.partition("_")
        entries = tokens((parts[0], {parts[0]: 0.9, "refund" if parts[2] else "credit": 0.1}))
        if parts[2]:
            other = "_score" if parts[2] == "limit" else "_limit"
            entries += tokens((f"_{parts[2]}", {f"_{parts[2]}": 0.7, other: 0.3}))
        body["choices"][0]["logprobs"] = {"content": entries}
    return Reply(body)


async def labelled(server: ChatEndpoint, url: str, out: Path, **recipe: Any) -> LabelCounts:
    teacher = TeacherRecipe.model_validate({"outage_s": 30, "sdk": "openai", **recipe})
    rows = [example(number) for number in range(12)]
    with LabelStore(url) as store:
        return await label(rows, PROMPT, teacher, endpoint_of(server), store, out)


@pytest.mark.parametrize("form", ["letter", "json"])
async def test_an_endpoint_labels_with_classes(form: str, url: str, tmp_path: Path) -> None:
    recipe = {"soft_labels": True, "answers": {"form": form}}
    with ChatEndpoint(classifier) as server:
        counts = await labelled(server, url, tmp_path / "out", **recipe)
        assert (counts.accepted, counts.rejected, counts.asked) == (11, 1, 12)
        body = server.calls[0].body
        assert body["messages"][0]["content"] == "One of:\ncredit_limit\ncredit_score\nrefund"
        if form == "json":
            schema = body["response_format"]["json_schema"]["schema"]
            assert schema["properties"]["answer"]["enum"] == list(NAMES)
        else:
            assert "response_format" not in body
        again = await labelled(server, url, tmp_path / "again", **recipe)
        assert (again.accepted, again.asked) == (11, 0), "answers are found in the store"
    (rejected,) = read_lines(tmp_path / "out" / "rejected.jsonl")
    assert rejected["example_id"] == "row-4"
    assert rejected["reason"] == "none of the 3 classes, or more than one"
    labels = read_lines(tmp_path / "out" / "labels.jsonl")
    assert [one["answer"] for one in labels] == [NAMES[n % 3] for n in range(12) if n != 4]
    assert labels[0]["distribution"] == pytest.approx(
        {"credit_limit": 0.63, "credit_score": 0.27, "refund": 0.1}
    )
    assert labels[0]["confidence"] == pytest.approx(0.63)
    assert (tmp_path / "again" / "labels.jsonl").read_bytes() == (
        tmp_path / "out" / "labels.jsonl"
    ).read_bytes()


async def test_an_endpoint_without_schemas_and_log_probabilities(url: str, tmp_path: Path) -> None:
    def script(call: Call) -> Reply:
        if "response_format" in call.body:
            return refused(400, "response_format is not supported")
        return classifier(call)

    with ChatEndpoint(script) as server:
        counts = await labelled(server, url, tmp_path / "out", answers={"form": "json"})
    assert (counts.accepted, counts.rejected) == (11, 1)
    assert read_lines(tmp_path / "out" / "labels.jsonl")[0]["distribution"] is None


def test_labels_that_are_there_already_name_classes(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    shares = dict.fromkeys(NAMES, 0.1) | {"refund": 0.8}
    line = {"example_id": "row-0", "answer": " refund ", "distribution": shares}
    path.write_text(json.dumps(line) + "\n")
    found, _ = read_label_files([str(path)], [example(0)])
    assert (found["row-0"].answer, found["row-0"].confidence) == ("refund", 0.8)
    path.write_text(json.dumps(line | {"answer": "A"}) + "\n")
    with pytest.raises(DataError, match=r"labels\.jsonl:1: answer: 'A' is none of the 3 classes$"):
        read_label_files([str(path)], [example(0)])
