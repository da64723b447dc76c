"""Soft labels over the tokens of written answers: of an endpoint, of files, and of a teacher of the
run's own."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from chat_endpoint import Call, ChatEndpoint, Reply, Script, Spelled, refused, said
from label_runs import endpoint_of, read_lines

from distillery.data.answer_tokens import (
    FILE,
    AnswerToken,
    packed,
    read_answer_tokens,
    spelled,
    unpacked,
    write_answer_tokens,
)
from distillery.data.examples import write_format
from distillery.errors import DataError, TeacherError
from distillery.export.build import export
from distillery.inference.guide import Guides
from distillery.labels.files import LabelCounts, label_files
from distillery.labels.known import gold_labels, read_label_files, write_known_labels
from distillery.labels.labelling import label
from distillery.labels.questions import questions
from distillery.labels.report import read_report
from distillery.labels.store import LabelStore
from distillery.models.inspect import model_and_adapter
from distillery.models.load import end_ids, load_model, load_tokenizer
from distillery.prompts import TransformersTokenizer, render_messages
from distillery.recipe import ExportForm, FilterRecipe, PromptRecipe, TeacherRecipe, TrainingRecipe
from distillery.records import AnswerFormat, Example, TeacherLabel
from distillery.serving.process import served
from distillery.teacher.endpoint import Endpoint
from distillery.training.fine_tune import fine_tune
from distillery.training.rows import training_rows

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
}
FIELDS = AnswerFormat(max_tokens=40, json_schema=SCHEMA, metric="field_f1")
TEXT = AnswerFormat(max_tokens=40, metric="rouge_l")
PROMPT = PromptRecipe(system="", user="{text}", answer="written")
SOFT = TeacherRecipe(
    max_tokens=41, soft_labels=True, filters={"minimum_accepted": 0}, outage_s=30, attempts=1
)
HARD = SOFT.model_copy(update={"soft_labels": False})


def row(text: str, answer_format: AnswerFormat = FIELDS, **values: Any) -> Example:
    return Example(example_id=text, question=text, format=answer_format, **values)


def parted(text: str, end: bool = True) -> Spelled:
    """A text in tokens of three bytes, each with two alternatives, and the end of the turn."""
    data = text.encode()
    tokens = [data[at : at + 3] for at in range(0, len(data), 3)]
    tokens += [b"<|im_end|>"] * end
    return [(token, {token: 0.75, b"x": 0.125, b"<|im_end|>x": 0.0625}) for token in tokens]


def spoken(text: str, **settings: Any) -> Reply:
    return said(text, tokens=parted(text), **settings)


ANSWERS = {
    "plain": spoken('{"city": "Zürich", "days": 2}'),
    "compact": spoken('{"city":"Oslo","days":2}'),
    "fenced": spoken('Here:\n```json\n{"city": "Oslo"}\n```'),
    "thought": spoken('<think>{"city": "Bergen"}?</think>\n{"city": "Oslo"}'),
    "reordered": spoken('{"days": 2, "city": "Oslo"}'),
    "unlike": said('{"city": "Oslo"}', tokens=parted('{"city": "Rome"}')),
    # Not the first answer to come: an endpoint whose first one has no probabilities gives none.
    "bare": replace(said('{"city": "Oslo"}'), delay=0.5),
    "no label": spoken("The city is Oslo."),
    "cut off": spoken('{"city": "Oslo"}', finish_reason="length"),
}
SPELLED = {"plain", "compact", "fenced", "thought"}


def answer(call: Call) -> Reply:
    return ANSWERS[call.question]


def store_in(folder: Path) -> LabelStore:
    return LabelStore(f"sqlite:///{folder / 'labels.db'}")


async def labelled(
    server: ChatEndpoint, rows: list[Example], folder: Path, teacher: TeacherRecipe = SOFT
) -> LabelCounts:
    with store_in(folder) as store:
        return await label(rows, PROMPT, teacher, endpoint_of(server), store, folder / "out")


def labels_in(out: Path) -> dict[str, str]:
    return {line["example_id"]: line["answer"] for line in read_lines(out / "labels.jsonl")}


async def test_labels_have_the_tokens_that_spell_them(tmp_path: Path) -> None:
    rows, out = [row(name) for name in ANSWERS], tmp_path / "out"
    with ChatEndpoint(answer) as server:
        await labelled(server, rows, tmp_path)
        body = server.calls[0].body
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20)
    labels, found = labels_in(out), read_answer_tokens(out / FILE)
    assert labels.keys() - found.keys() == {"reordered", "unlike", "bare"}, "hard labels"
    assert found.keys() == SPELLED
    for name, tokens in found.items():
        assert spelled(tokens).decode() == labels[name]
        assert [bool(token.text) for token in tokens[:-1]] == [True] * (len(tokens) - 1)
    ended = {name for name, tokens in found.items() if tokens[-1].text == b""}
    assert ended == SPELLED - {"fenced"}, "behind a fence it is no end of the label"
    first = found["plain"][0]
    assert (first.text, first.candidates[0][0]) == (b'{"c', b'{"c')
    assert math.exp(first.candidates[0][1]) == pytest.approx(0.75, rel=1e-4)
    report = read_report(out)
    assert (report.accepted, report.soft) == (7, 4)
    assert (
        "7 accepted (of 16 to 29 characters, 21 on average), 4 with probabilities" in report.line()
    )


async def test_tokens_are_paid_for_once(tmp_path: Path) -> None:
    rows, out = [row(name) for name in ANSWERS], tmp_path / "out"
    with ChatEndpoint(answer) as server:
        await labelled(server, rows, tmp_path)
        first = {path.name: path.read_bytes() for path in out.iterdir()}
        again = await labelled(server, rows, tmp_path)
        assert (again.asked, len(server.calls)) == (0, len(rows))
        assert {path.name: path.read_bytes() for path in out.iterdir()} == first
        await labelled(server, rows, tmp_path, HARD)
        assert len(server.calls) == 2 * len(rows), "without probabilities it is another request"
    assert not (out / FILE).exists(), "the tokens of other labels are gone"
    with store_in(tmp_path) as store:
        keys = {each.example_id: questions(each, PROMPT, SOFT, "gpt-test")[0].key for each in rows}
        stored = store.get_many(keys.values())
    assert spelled(unpacked(stored[keys["thought"]].tokens or b"")) == b'{"city": "Oslo"}'
    assert stored[keys["no label"]].tokens, "another schema or reader may make a label of it"
    for name in ("unlike", "bare", "cut off"):
        assert stored[keys[name]].tokens is None


async def test_another_schema_has_the_tokens_too(tmp_path: Path) -> None:
    """The answer was none for the first one."""
    text = AnswerFormat(max_tokens=40, metric="rouge_l")
    with ChatEndpoint(answer) as server:
        await labelled(server, [row("plain"), row("no label")], tmp_path)
        assert read_answer_tokens(tmp_path / "out" / FILE).keys() == {"plain"}
        await labelled(server, [row("no label", text)], tmp_path)
        assert len(server.calls) == 2
    (tokens,) = read_answer_tokens(tmp_path / "out" / FILE).values()
    assert spelled(tokens) == b"The city is Oslo."


def without_log_probabilities(_: Call) -> Reply:
    return refused(400, "logprobs are not supported")


@pytest.mark.parametrize(
    ("script", "name", "reason"),
    [
        (answer, "unlike", "none of 1 labels has probabilities: the tokens that came do not spell"),
        (answer, "bare", r"asks for log-probabilities, and http\S+ leaves them out"),
        (without_log_probabilities, "plain", r"asks for log-probabilities, and http\S+ refuses"),
    ],
)
async def test_labels_none_of_which_has_probabilities_end_the_run(
    tmp_path: Path, script: Script, name: str, reason: str
) -> None:
    wanted = SOFT.model_copy(update={"filters": TeacherRecipe().filters})
    with ChatEndpoint(script) as server, pytest.raises(TeacherError, match=reason):
        await labelled(server, [row(name)], tmp_path, wanted)
    assert not (tmp_path / "out").exists()


async def test_the_remedy_for_labels_without_probabilities_asks_for_nothing_again(
    tmp_path: Path,
) -> None:
    rows = [row("unlike")]
    wanted = SOFT.model_copy(update={"filters": TeacherRecipe().filters})
    with ChatEndpoint(answer) as server:
        with pytest.raises(TeacherError, match=r"set teacher\.filters\.minimum_accepted: 0 and "):
            await labelled(server, rows, tmp_path, wanted)
        taken = wanted.model_copy(update={"filters": FilterRecipe(minimum_accepted=0)})
        await labelled(server, rows, tmp_path, taken)
        assert len(server.calls) == 1
    assert labels_in(tmp_path / "out").keys() == {"unlike"}


async def test_stored_bytes_that_are_no_tokens_are_one_line(tmp_path: Path) -> None:
    rows = [row("plain")]
    with ChatEndpoint(answer) as server:
        await labelled(server, rows, tmp_path)
        with store_in(tmp_path) as store:
            key = questions(rows[0], PROMPT, SOFT, "gpt-test")[0].key
            (stored,) = store.get_many([key]).values()
            store.delete(rows=["plain"])
            store.add(stored._replace(tokens=b"x"))
        with pytest.raises(DataError, match=r"^plain: the stored tokens of its answer") as caught:
            await labelled(server, rows, tmp_path)
        assert "\n" not in str(caught.value)
        assert len(server.calls) == 1


def test_the_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    one = TeacherLabel(example_id="a", answer="x")
    tokens = [AnswerToken(b"x", ((b"x", -0.5),))]
    with label_files(out, PROMPT, HARD) as files:
        files.accept(row("a", TEXT), one, tokens)
        files.finish()
    failing = label_files(out, PROMPT, HARD)
    failing.__enter__().accept(row("a", TEXT), one, tokens * 2)
    failing.__exit__(DataError, DataError("a later row"), None)
    assert read_answer_tokens(out / FILE) == {"a": tuple(tokens)}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


def test_a_label_that_a_filter_rejects_has_no_tokens(tmp_path: Path) -> None:
    strict = HARD.model_copy(update={"filters": FilterRecipe(agreement_with_gold=True)})
    rows = [row(name, answer_key='{"days": 1}') for name in "ab"]
    labels = {
        name: TeacherLabel(example_id=name, answer=f'{{"days": {n}}}')
        for n, name in enumerate("ab")
    }
    tokens = {name: packed([AnswerToken(one.answer.encode(), ())]) for name, one in labels.items()}
    write_known_labels(rows, labels, PROMPT, strict, tmp_path / "out", tokens)
    assert read_answer_tokens(tmp_path / "out" / FILE).keys() == {"b"}
    assert read_report(tmp_path / "out").soft == 1


def test_labels_of_files_keep_their_tokens(tmp_path: Path) -> None:
    token = AnswerToken(b'{"city":"Oslo"', ((b'{"city":"Oslo"', -0.25), (b"{", -2.0)))
    end = AnswerToken(b"}", ((b"}", -0.5),))
    ours, theirs = tmp_path / FILE, tmp_path / "labels.jsonl"
    write_answer_tokens({"a": (token, end), "elsewhere": (token,)}, ours)
    theirs.write_text('{"example_id": "b", "answer": {"days": 1}}\n')
    labels, tokens = read_label_files([str(theirs), str(ours)], [row("a"), row("b")])
    assert {name: one.answer for name, one in labels.items()} == {
        "a": '{"city": "Oslo"}',
        "b": '{"days": 1}',
    }
    assert tokens.keys() == {"a"}
    counts = write_known_labels(
        [row("a"), row("b")], labels, PROMPT, HARD, tmp_path / "out", tokens
    )
    assert (counts.accepted, read_report(tmp_path / "out").soft) == (2, 1)
    found = read_answer_tokens(tmp_path / "out" / FILE)["a"]
    assert found == (
        AnswerToken(b'{"city": "Oslo"', ((b'{"city": "Oslo"', -0.25), (b"{", -2.0))),
        end,
    )


def test_tokens_of_an_earlier_label_go_with_it(tmp_path: Path) -> None:
    first, later = tmp_path / FILE, tmp_path / "corrected.jsonl"
    write_answer_tokens({name: (AnswerToken(b"x", ()),) for name in "ab"}, first)
    later.write_text('{"example_id": "a", "answer": "y"}\n{"example_id": "b", "answer": "x"}\n')
    rows = [row("a", TEXT), row("b", TEXT)]
    labels, tokens = read_label_files([str(first), str(later)], rows)
    assert (labels["a"].answer, list(tokens)) == ("y", ["b"])


ODD_TOKENS: list[tuple[dict[str, Any], str]] = [
    ({"tokens": [b"y"], "candidates": [[]], "logs": [[]]}, "do not spell the answer"),
    ({"tokens": [b"x"], "candidates": [[b"x"]], "logs": [[0.5]]}, r"can't be read \(ValueError\)"),
    ({"tokens": [b"x"], "candidates": [[b"x"]], "logs": [[math.nan]]}, "can't be read"),
    ({"tokens": [b"x"], "candidates": [[b"x", b"y"]], "logs": [[-1.0]]}, "can't be read"),
    ({"tokens": [b"x"], "candidates": [], "logs": []}, "can't be read"),
    ({"tokens": 5, "candidates": [[]], "logs": [[]]}, r"can't be read \(TypeError\)"),
    ({"tokens": [5], "candidates": [[]], "logs": [[]]}, "can't be read"),
    ({"tokens": ["x"], "candidates": [["x"]], "logs": [[-1]]}, "can't be read"),
    ({"tokens": [b"x"], "candidates": [[b"x"]], "logs": [["-1"]]}, "can't be read"),
]


@pytest.mark.security
@pytest.mark.parametrize(("values", "reason"), ODD_TOKENS)
def test_tokens_of_files_that_are_none_are_one_line(
    tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "labels.parquet"
    pq.write_table(pa.Table.from_pylist([{"example_id": "a", "answer": "x", **values}]), path)
    with pytest.raises(DataError, match=rf"labels\.parquet:1: tokens: {reason}") as caught:
        read_label_files([str(path)], [row("a", TEXT)])
    assert "\n" not in str(caught.value)


def test_files_without_tokens_and_soft_labels_say_what_is_missing(tmp_path: Path) -> None:
    wanted = TeacherRecipe(kind="file", files=("a",), soft_labels=True)
    labels = {"a": TeacherLabel(example_id="a", answer="x")}
    with pytest.raises(TeacherError, match="have no columns tokens, candidates and logs; add them"):
        write_known_labels([row("a", TEXT)], labels, PROMPT, wanted, tmp_path / "out")


# A teacher of the run's own


WORDS = ("oven", "river", "cloud")
SIGNS: dict[str, Any] = {
    "type": "object",
    "properties": {"place": {"enum": list(WORDS)}, "sign": {"enum": ["é", "à", "è"]}},
    "required": ["place", "sign"],
    "additionalProperties": False,
}
"""Of a random model, too, an answer that meets it ends; the signs begin with the same byte."""


def question(number: int, answer_format: AnswerFormat) -> Example:
    text = f"the {WORDS[number % 3]} of person {number}"
    return row(text, answer_format, answer_key=f"é, {WORDS[number % 3]}.")


@pytest.fixture(scope="module")
def teacher(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A model that has learnt a little, and its export in float32. An é is two of its tokens."""
    base, out = tiny_model("llama"), tmp_path_factory.mktemp("teacher")
    rows = [question(number, TEXT) for number in range(24)]
    rendered, _ = training_rows(rows, gold_labels(rows), PROMPT, load_tokenizer(base))
    recipe = TrainingRecipe(
        method="full", epochs=8, batch_size=4, learning_rate=3e-3, precision="float32"
    )
    fine_tune(base, None, rendered, [], recipe, out / "trained", answer_format=TEXT)
    model, adapter = model_and_adapter(out / "trained", base)
    export(model, adapter, ExportForm(precision="fp32"), out / "onnx")
    return model, out / "onnx"


@pytest.mark.parametrize("schema", [None, SIGNS], ids=["text", "schema"])
async def test_a_teacher_of_our_own_tells_its_float_probabilities(
    teacher: tuple[Path, Path], tmp_path: Path, schema: dict[str, Any] | None
) -> None:
    """Those of Transformers in float32 at each token, among the tokens that the schema leaves."""
    form = TEXT.model_copy(update={"json_schema": schema})
    model, folder = teacher[0], tmp_path / "model"
    shutil.copytree(teacher[1], folder)
    write_format(folder, form)
    rows = [question(number, form) for number in range(6)]
    with served(folder, "teacher", threads=1, for_labels=True) as server, store_in(tmp_path) as db:
        endpoint = Endpoint(server.url, "teacher", server.key, "teacher", "openai")
        counts = await label(rows, PROMPT, SOFT, endpoint, db, tmp_path / "out")
    assert (counts.accepted, read_report(tmp_path / "out").soft) == (6, 6)
    found = read_answer_tokens(tmp_path / "out" / FILE)
    assert any(b"\xc3" in [token.text for token in tokens] for tokens in found.values())
    for example in rows:
        steps, tokens = float_steps(model, example, form), found[example.example_id]
        assert [token.text for token in tokens] == [text for text, _ in steps]
        assert tokens[-1].text == b"", "the end of the turn"
        for token, (_, expected) in zip(tokens, steps, strict=True):
            for text, log in token.candidates:
                if text:
                    assert log == pytest.approx(expected[text], abs=2e-3)
                else:
                    # Of several ends, the unlikely ones are not listed.
                    assert math.exp(log) == pytest.approx(math.exp(expected[b""]), abs=1e-4)
            assert len(token.candidates) <= 20
            listed = {text for text, _ in token.candidates}
            for text, log in sorted(expected.items(), key=lambda pair: -pair[1])[:10]:
                assert text in listed or log == -math.inf


def float_steps(
    folder: Path, example: Example, form: AnswerFormat
) -> list[tuple[bytes, dict[bytes, float]]]:
    """The tokens of the greedy answer by Transformers in float32, each with the logarithms of the
    probabilities of all that may follow, in which control tokens are the end of the turn."""
    import torch

    model, tokenizer = load_model(folder)
    model.eval()
    ends = end_ids(model, tokenizer)
    texts = [bytes_of_name(name) for name in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    ids = TransformersTokenizer(tokenizer).encode_chat(render_messages(example, PROMPT))
    guide = None
    if form.json_schema is not None:
        guide = Guides(tokenizer.backend_tokenizer.to_str(), ends).start(form.json_schema)
    steps: list[tuple[bytes, dict[bytes, float]]] = []
    while not steps or steps[-1][0]:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].numpy()
        logits = guide.masked(logits) if guide else logits
        logs = torch.log_softmax(torch.from_numpy(logits), -1)
        expected = {text: float(logs[token]) for token, text in enumerate(texts)}
        expected[b""] = float(
            logs[[token for token, text in enumerate(texts) if not text]].logsumexp(0)
        )
        token = int(logits.argmax())
        steps.append((texts[token], expected))
        ids.append(token)
        if guide and token not in ends:
            guide.take(token)
            if guide.complete:
                steps.append((b"", {b"": 0.0}))
    return steps


def bytes_of_name(name: str) -> bytes:
    """The bytes of a token of a byte-level BPE, each of which stands as a character that can be
    seen (GPT-2's vocabulary); none for a control token."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {chr(byte): byte for byte in seen}
    unseen = [byte for byte in range(256) if byte not in seen]
    characters |= {chr(256 + number): byte for number, byte in enumerate(unseen)}
    if name.startswith("<|"):
        return b""
    return bytes(characters[character] for character in name)
