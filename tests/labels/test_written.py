"""Written answers as labels: which are accepted, and what is told of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_endpoint import Call, ChatEndpoint, Reply, refused, said
from label_runs import endpoint_of, read_lines

from distillery.errors import DataError, TeacherError
from distillery.labels.canaries import ask_canaries
from distillery.labels.files import LabelCounts, read_labels
from distillery.labels.known import gold_labels, read_label_files, write_known_labels
from distillery.labels.labelling import label
from distillery.labels.questions import questions
from distillery.labels.quote import quote, quote_recipe
from distillery.labels.report import read_report
from distillery.labels.store import LabelStore
from distillery.recipe import PromptRecipe, Recipe, TeacherRecipe
from distillery.records import AnswerFormat, Example
from distillery.teacher.options import response_format

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
}

FIELDS = AnswerFormat(max_tokens=40, json_schema=SCHEMA, metric="field_f1")

TEXT = AnswerFormat(max_tokens=40, metric="rouge_l")

PROMPT = PromptRecipe(system="Fields of {schema}", user="{title}: {text}", answer="written")

TEACHER = TeacherRecipe(
    max_tokens=40, answers={"form": "json"}, filters={"minimum_accepted": 0}, outage_s=30
)

ANSWERS = {
    "plain": said(' {"days":2,"city":"Oslo"}\n'),
    "fenced": said('Here it is:\n```json\n{"city": "Oslo"}\n```\nDone.'),
    "thought": said('<think>{"city": "Bergen"}?</think>\n{"city": "Oslo"}'),
    "two": said('```json\n{"city": "Oslo"}\n```\nor\n```json\n{"city": "Bergen"}\n```'),
    "empty": said(" "),
    "words": said("The city is Oslo."),
    "array": said('["Oslo"]'),
    "unmet": said('{"days": "two"}'),
    "unmet too": said('{"days": "three"}'),
    "cut off": said('{"city": "Oslo"}', finish_reason="length"),
    "filtered": said("", finish_reason="content_filter"),
}

REASONS = {
    "two": "no JSON",
    "empty": "empty answer",
    "words": "no JSON",
    "array": "JSON, but no object",
    "unmet": "does not meet the schema: days: 'two' is not of type 'integer'",
    "unmet too": "does not meet the schema: days: 'three' is not of type 'integer'",
    "cut off": "no answer within teacher.max_tokens (40)",
    "filtered": "refused by the endpoint's content filter",
}


def row(text: str, answer_format: AnswerFormat = FIELDS, **values: Any) -> Example:
    return Example(
        example_id=text, question=text, fields={"title": "T"}, format=answer_format, **values
    )


def answer(call: Call) -> Reply:
    return ANSWERS[call.question.removeprefix("T: ")]


async def labelled(
    server: ChatEndpoint, rows: list[Example], folder: Path, teacher: TeacherRecipe = TEACHER
) -> LabelCounts:
    with LabelStore(f"sqlite:///{folder / 'labels.db'}") as store:
        return await label(rows, PROMPT, teacher, endpoint_of(server), store, folder / "out")


def labels_in(folder: Path) -> dict[str, str]:
    lines = read_lines(folder / "out" / "labels.jsonl")
    return {line["example_id"]: line["answer"] for line in lines}


async def test_an_object_that_meets_the_schema_is_a_label(tmp_path: Path) -> None:
    rows = [row(name) for name in ANSWERS]
    with ChatEndpoint(answer) as server:
        counts = await labelled(server, rows, tmp_path)
        bodies = {call.question: call.body for call in server.calls}
    body = bodies["T: plain"]
    assert labels_in(tmp_path) == {
        "plain": '{"city": "Oslo", "days": 2}',
        "fenced": '{"city": "Oslo"}',
        "thought": '{"city": "Oslo"}',
    }
    rejected = read_lines(tmp_path / "out" / "rejected.jsonl")
    assert {line["example_id"]: line["reason"] for line in rejected} == REASONS
    assert (counts.accepted, counts.rejected) == (3, 8)
    assert body["response_format"] == response_format(SCHEMA)
    assert body["response_format"]["json_schema"]["strict"] is False
    assert body["messages"] == [
        {"role": "system", "content": f"Fields of {json.dumps(SCHEMA)}"},
        {"role": "user", "content": "T: plain"},
    ]
    report = read_report(tmp_path / "out")
    assert report.letters == {}
    assert report.rejected["does not meet the schema"] == 2
    assert report.line().startswith("3 accepted (of 16 to 27 characters, 20 on average); rejected:")


async def test_stored_answers_are_read_again_and_never_asked_again(tmp_path: Path) -> None:
    rows = [row(name) for name in ANSWERS]
    with ChatEndpoint(answer) as server:
        await labelled(server, rows, tmp_path)
        first = labels_in(tmp_path)
        asked = len(server.calls)
        counts = await labelled(server, rows, tmp_path)
        assert (counts.asked, len(server.calls)) == (0, asked)
        assert labels_in(tmp_path) == first


async def test_another_schema_reads_all_answers_again(tmp_path: Path) -> None:
    prompt = PROMPT.model_copy(update={"system": ""})
    told = TEACHER.model_copy(update={"answers": TeacherRecipe().answers})
    wider = AnswerFormat(max_tokens=40, json_schema={"type": "object"}, metric="field_f1")
    needs_text = {"type": "object", "properties": {"days": {"type": "string"}}}
    other = AnswerFormat(max_tokens=40, json_schema=needs_text, metric="field_f1")
    found = {}
    with (
        ChatEndpoint(answer) as server,
        LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store,
    ):
        formats = {"first": FIELDS, "wider": wider, "other": other, "again": FIELDS}
        for name, form in formats.items():
            rows = [row("plain", form), row("unmet", form)]
            out = tmp_path / name / "out"
            await label(rows, prompt, told, endpoint_of(server), store, out)
            found[name] = labels_in(tmp_path / name)
        assert len(server.calls) == 2, "without the schema in the request, it is the same one"
    assert set(found["first"]) == {"plain"}
    assert found["wider"] == {
        "plain": '{"city": "Oslo", "days": 2}',
        "unmet": '{"days": "two"}',
    }
    assert found["other"] == {"unmet": '{"days": "two"}'}, "the label for the first is none here"
    rejected = read_lines(tmp_path / "other" / "out" / "rejected.jsonl")
    reason = "does not meet the schema: days: 2 is not of type 'string'"
    assert [(line["example_id"], line["reason"]) for line in rejected] == [("plain", reason)]
    assert found["again"] == found["first"]


def test_an_answer_that_was_held_to_another_schema_is_another_request() -> None:
    prompt = PROMPT.model_copy(update={"system": ""})
    wider = AnswerFormat(max_tokens=40, json_schema={"type": "object"}, metric="field_f1")
    free = TEACHER.model_copy(update={"answers": TeacherRecipe().answers})
    count = {}
    for name, teacher in {"held": TEACHER, "free": free}.items():
        rows = [row("plain"), row("plain", wider)]
        keys = {questions(each, prompt, teacher, "gpt-test")[0].key for each in rows}
        count[name] = len(keys)
    assert count == {"held": 2, "free": 1}


async def test_a_text_is_a_label_as_it_stands(tmp_path: Path) -> None:
    texts = {"one": said(" Two words.\n\n```x```"), "none": said(""), "cut": ANSWERS["cut off"]}
    teacher = TEACHER.model_copy(update={"answers": TeacherRecipe().answers})
    rows = [row(name, TEXT, answer_key="Other words.") for name in texts]
    with ChatEndpoint(lambda call: texts[call.question.removeprefix("T: ")]) as server:
        await labelled(server, rows, tmp_path, teacher)
        assert "response_format" not in server.calls[0].body
    assert labels_in(tmp_path) == {"one": "Two words.\n\n```x```"}
    assert read_report(tmp_path / "out").gold_rows == 0, "two texts may say the same"


async def test_a_canary_that_says_something_else_has_changed(tmp_path: Path) -> None:
    rows = [row("plain"), row("fenced")]
    watched = TeacherRecipe.model_validate({**TEACHER.model_dump(), "canaries": {"rows": 2}})
    with ChatEndpoint(answer) as server:
        await labelled(server, rows, tmp_path)

    def changed(call: Call) -> Reply:
        return said('{"city": "Bergen"}') if "plain" in call.question else answer(call)

    with (
        ChatEndpoint(changed) as server,
        LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store,
    ):
        drift = await ask_canaries(rows, PROMPT, watched, endpoint_of(server), store)
    assert (drift.compared, drift.changed) == (2, ("plain",))


def test_gold_answers_count_each_reference(tmp_path: Path) -> None:
    rows = [
        row("a", answer_key='{"city": "Oslo"}', references=('{"city": "oslo"}',)),
        row("b", answer_key='{"days": 1}'),
        row("c"),
    ]
    labels = gold_labels(rows)
    assert {name: one.answer for name, one in labels.items()} == {
        "a": '{"city": "Oslo"}',
        "b": '{"days": 1}',
    }
    labels["a"] = labels["a"].model_copy(update={"answer": '{"city": "oslo"}'})
    strict = TeacherRecipe(kind="gold", filters={"agreement_with_gold": True})
    counts = write_known_labels(rows, labels, PROMPT, strict, tmp_path / "out")
    assert (counts.accepted, counts.rejected) == (2, 1)
    report = read_report(tmp_path / "out")
    assert (report.right, report.gold_rows) == (2, 2)


def test_labels_from_files_are_read_like_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    lines: list[dict[str, Any]] = [
        {"example_id": "a", "answer": {"days": 2, "city": "Oslo"}},
        {"example_id": "b", "answer": '{"days":1}'},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    labels, tokens = read_label_files([str(path)], [row("a"), row("b")])
    assert tokens == {}
    assert labels["a"].answer == '{"city": "Oslo", "days": 2}'
    assert labels["b"].answer == '{"days": 1}'
    path.write_text('{"example_id": "a", "answer": "Oslo"}\n')
    with pytest.raises(DataError, match=r"labels.jsonl:1: answer: no JSON \(.*\); correct the row"):
        read_label_files([str(path)], [row("a")])


@pytest.mark.parametrize("as_text", [False, True])
def test_labels_from_files_keep_their_references(tmp_path: Path, as_text: bool) -> None:
    found = {
        "a": [{"days": 1}, '{"days":2}', '{"city": "Oslo"}', {"days": 1}, "", None],
        "b": [],
        "c": None,
    }
    path = tmp_path / "labels.jsonl"
    with path.open("w") as file:
        for name, references in found.items():
            value = json.dumps(references) if as_text and references else references
            line = {"example_id": name, "answer": {"city": "Oslo"}, "references": value}
            file.write(json.dumps(line) + "\n")
    labels, _ = read_label_files([str(path)], [row("a"), row("b"), row("c")])
    assert labels["a"].answers == ('{"city": "Oslo"}', '{"days": 1}', '{"days": 2}')
    assert labels["b"].answers == labels["c"].answers == ('{"city": "Oslo"}',)


@pytest.mark.security
@pytest.mark.parametrize("odd", ["Oslo", "[" * 60_000, '{"days": 1}', 5, ["Oslo"], [5], {}])
def test_references_that_are_none_are_one_line(tmp_path: Path, odd: Any) -> None:
    path = tmp_path / "labels.jsonl"
    line = {"example_id": "a", "answer": {"city": "Oslo"}, "references": odd}
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"labels.jsonl:1: references: .*correct the row") as caught:
        read_label_files([str(path)], [row("a")])
    assert "\n" not in str(caught.value)


def test_a_quote_takes_the_gold_answers_length_or_the_longest(tmp_path: Path) -> None:
    rows = [row("a"), row("b", answer_key="x" * 36)]
    teacher = TEACHER.model_copy(update={"max_tokens": 512})
    with LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store:
        found = quote(rows, PROMPT, teacher, "gpt-test", store)
    assert found.calls == 2
    assert found.usage.completion_tokens == 40 + 10


def test_a_quote_takes_other_answers_to_be_as_long_as_the_gold_ones(tmp_path: Path) -> None:
    rows = [row("a"), row("b"), row("c", answer_key="x" * 36)]
    gold = [row("d", answer_key="x" * 20), row("e", answer_key="x" * 44), row("f")]
    teacher = TEACHER.model_copy(update={"max_tokens": 512})
    short = TEACHER.model_copy(update={"max_tokens": 7})
    with LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store:
        found = quote(rows, PROMPT, teacher, "gpt-test", store, gold=gold)
        none = quote(rows, PROMPT, teacher, "gpt-test", store, gold=gold[2:])
        cut = quote(rows, PROMPT, short, "gpt-test", store, gold=gold)
    assert found.usage.completion_tokens == 9 + 9 + 10
    assert "(from the gold answers' lengths, at most 512 each)" in found.line()
    assert none.usage.completion_tokens == 40 + 40 + 10
    assert "(from lengths, at most 512 each)" in none.line()
    assert cut.usage.completion_tokens == 3 * 7


@pytest.mark.parametrize("kind", ["local", "endpoint"])
def test_the_quote_of_a_recipe_goes_by_its_gold_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("DISTILLERY_HOME", str(tmp_path))
    monkeypatch.setenv("TEACHER_MODEL_NAME", "gpt-test")
    monkeypatch.setenv("CHEAP_MODEL_NAME", "cheap")
    lines = []
    for number in range(60):
        line: dict[str, Any] = {"text": f"Message {number} of {number * number}, and so on."}
        if number % 2:
            line["answer"] = {"city": "Oslo", "days": 100 + number}
        lines.append(json.dumps(line) + "\n")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(lines))
    asked: dict[str, Any] = {
        "task": {"kind": "extract", "schema": SCHEMA, "max_tokens": 200},
        "dataset": {
            "source": "files",
            "files": {"train": [str(file)]},
            "carve": {"gold": 0.6, "test": 0.4},
        },
        "teacher": {"kind": kind},
    }
    tokens = len('{"city": "Oslo", "days": 101}') // 4 + 2
    found = quote_recipe(Recipe.model_validate(asked))["train"]
    assert (found.calls, found.usage.completion_tokens) == (30, 30 * tokens)
    if kind == "endpoint":
        asked["teacher"]["cascade"] = {"below": 0.8, "answers": {"votes": 3}}
        asked["teacher"]["cascade"] |= {"temperature": 1.0, "soft_labels": False}
        quotes = quote_recipe(Recipe.model_validate(asked))
        assert quotes["cheap teacher"].usage.completion_tokens == 3 * 30 * tokens
        assert quotes["train"].usage.completion_tokens == 30 * tokens


def test_strict_is_said_only_of_a_schema_that_is() -> None:
    fields = {"city": {"type": "string"}}
    loose: dict[str, Any] = {"type": "object", "properties": fields}
    strict = {**loose, "required": ["city"], "additionalProperties": False}
    nested = {**strict, "properties": {"city": {"type": "array", "items": loose}}}
    wanted = {"loose": False, "strict": True, "nested": False}
    found = {}
    for name, schema in {"loose": loose, "strict": strict, "nested": nested}.items():
        found[name] = response_format(schema)["json_schema"]["strict"]
    assert found == wanted


def letter_row(number: int) -> Example:
    return Example(example_id=f"letter {number}", question=f"Which? {number}", choices=("x", "y"))


async def test_a_quote_goes_by_answers_of_its_own_kind(tmp_path: Path) -> None:
    """A teacher that has answered letters writes far longer texts, and one that has written texts
    answers short letters."""
    letters, letter_prompt = [letter_row(number) for number in range(20)], PromptRecipe()
    texts = [row(f"text {number}", TEXT, answer_key="x" * 76) for number in range(20)]
    teacher = TeacherRecipe(max_tokens=512, filters={"minimum_accepted": 0}, outage_s=30)
    prompt = PROMPT.model_copy(update={"system": ""})

    def answered(call: Call) -> Reply:
        if "Which?" in call.question:
            return said("A")
        reply = said("word " * 30)
        reply.body["usage"]["completion_tokens"] = 30
        return reply

    with (
        ChatEndpoint(answered) as server,
        LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store,
    ):
        asked = endpoint_of(server)

        def quoted(rows: list[Example], prompt: PromptRecipe) -> tuple[int, str]:
            found = quote(rows, prompt, teacher, "gpt-test", store)
            return found.usage.completion_tokens, found.basis

        before = quoted(texts, prompt)
        assert before == (20 * 20, "from lengths, at most 512 each"), "the gold answers' lengths"
        await label(letters[:10], letter_prompt, teacher, asked, store, tmp_path / "letters")
        assert quoted(texts, prompt) == before
        assert quoted(letters, letter_prompt) == (10, "from its last 10 answers")
        await label(texts[:5], prompt, teacher, asked, store, tmp_path / "texts")
        assert quoted(texts, prompt) == (15 * 30, "from its last 5 answers")
        assert quoted(letters, letter_prompt) == (10, "from its last 10 answers")
        other = prompt.model_copy(update={"system": "Shorter."})
        assert quoted(texts, other) == before, "another task's answers tell nothing of it"


DRAWN = {
    "all": ["One.", "Two.", "One.", "Three."],
    "some": ["", "Two.", "", ""],
    "none": ["", "", "", ""],
}


class Drawing:
    """Answers each question with its texts of DRAWN, one after another."""

    def __init__(self, texts: dict[str, list[str]]) -> None:
        self.left = {name: list(drawn) for name, drawn in texts.items()}

    def __call__(self, call: Call) -> Reply:
        return said(self.left[call.question.removeprefix("T: ")].pop(0))


async def test_each_text_that_is_drawn_is_a_label(tmp_path: Path) -> None:
    teacher = TeacherRecipe.model_validate(
        {
            **TEACHER.model_dump(),
            "answers": {"votes": 4},
            "temperature": 1.0,
            "concurrency": 1,
            "budget": {"calls": 12},
        }
    )
    prompt, rows = PROMPT.model_copy(update={"system": ""}), [row(name, TEXT) for name in DRAWN]
    with (
        ChatEndpoint(Drawing(DRAWN)) as server,
        LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store,
    ):
        assert quote(rows, prompt, teacher, "gpt-test", store).calls == 12
        for out in ("out", "again"):
            counts = await label(rows, prompt, teacher, endpoint_of(server), store, tmp_path / out)
            assert len(server.calls) == 12, "asked once"
    assert (counts.accepted, counts.rejected) == (2, 1)
    labels = read_labels(tmp_path / "out")
    assert labels["all"].answers == ("One.", "Two.", "Three.")
    assert labels["some"].answers == ("Two.",)
    assert labels["all"].usage.completion_tokens == 4
    trained = read_lines(tmp_path / "out" / "train_data.jsonl")
    assert [line["Answer"] for line in trained] == ["One.", "Two.", "Three.", "Two."]
    report = read_report(tmp_path / "out")
    assert (report.references, report.accepted) == (2, 2)
    assert report.line().startswith("2 accepted (4 texts of 4 to 6 characters")
    assert "references" not in read_lines(tmp_path / "out" / "labels.jsonl")[1]


async def test_the_object_that_most_answers_are_is_the_label(tmp_path: Path) -> None:
    drawn = {
        "most": ['{"days":2}', '{"city": "Oslo"}', '{"city":"Oslo"}', '{"days": "x"}'],
        "tie": ['{"days": 1}', '{"days": 2}', '{"days": 2}', '{"days":1}'],
        "apart": ['{"days": 1}', '{"days": 2}', '{"days": 3}', '{"days": 4}'],
        "few": ['{"days": 1}', '{"days": 1}', "x", "y"],
    }
    teacher = TeacherRecipe.model_validate(
        {**TEACHER.model_dump(), "answers": {"votes": 4}, "temperature": 1.0, "concurrency": 1}
    )
    rows, watched = (
        [row(name) for name in drawn],
        TeacherRecipe.model_validate({**teacher.model_dump(), "canaries": {"rows": 4}}),
    )
    with ChatEndpoint(Drawing(drawn)) as server:
        await labelled(server, rows, tmp_path, teacher)
    found = {
        name: (one.answer, one.confidence, one.references)
        for name, one in read_labels(tmp_path / "out").items()
    }
    assert found == {
        "most": ('{"city": "Oslo"}', pytest.approx(2 / 3), ()),
        "tie": ('{"days": 1}', 0.5, ()),
        "apart": ('{"days": 1}', 0.25, ()),
    }
    drawn["most"] = ['{"city": "Oslo"}'] * 4
    drawn["tie"].reverse()
    drawn["apart"] = ['{"days": 7}'] * 4
    with (
        ChatEndpoint(Drawing(drawn)) as server,
        LabelStore(f"sqlite:///{tmp_path / 'labels.db'}") as store,
    ):
        drift = await ask_canaries(rows, PROMPT, watched, endpoint_of(server), store)
    assert (drift.compared, drift.changed) == (4, ("apart",))


async def test_an_endpoint_ends_a_text_where_it_is_told(tmp_path: Path) -> None:
    prompt = PROMPT.model_copy(update={"system": ""})
    told = TEACHER.model_copy(update={"answers": TeacherRecipe().answers, "stop": ("\n\n", "END")})
    free = told.model_copy(update={"stop": ()})
    rows = [row("one", TEXT)]
    keys = [questions(rows[0], prompt, teacher, "gpt-test")[0].key for teacher in (told, free)]
    assert len(set(keys)) == 2
    assert "stop" not in free.content_id, "what was cached before is found again"
    assert told.content_id != free.content_id
    with ChatEndpoint(lambda _: said("Two words.")) as server:
        await labelled(server, rows, tmp_path, told)
        assert server.calls[0].body["stop"] == ["\n\n", "END"]
        await labelled(server, [row("two", TEXT)], tmp_path, free)
        assert "stop" not in server.calls[1].body
    trouble = "Unsupported parameter: 'stop'"
    with (
        ChatEndpoint(lambda _: refused(400, trouble)) as server,
        pytest.raises(TeacherError, match=trouble),
    ):
        await labelled(server, [row("three", TEXT)], tmp_path, told)
