"""Answers that a student writes: the same tokens by Transformers, one by one and together, and by
ONNX Runtime; where they end; and how they are held to a schema."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import ARCHITECTURES

from distillery.answers import NotAnAnswer, canonical
from distillery.data.examples import read_format, write_examples, write_format
from distillery.data.rows import RowReader
from distillery.errors import DataError, ModelError, SchemaNotHeld
from distillery.evaluation.predictors import PromptLogits
from distillery.evaluation.scoring import ModelToScore, score_model
from distillery.evaluation.writing import TransformersWriter
from distillery.export.build import export
from distillery.inference.batch import read_rows, score_file
from distillery.inference.generation import Answering, Written, generated, written
from distillery.inference.guide import KEPT_SCHEMAS, Guides
from distillery.inference.logits import token_sampler
from distillery.inference.onnx_student import OnnxStudent
from distillery.inference.text_student import load_for_rows
from distillery.labels.known import gold_labels
from distillery.models.device import choose_device
from distillery.models.drafts import learn_drafts, read_drafts
from distillery.models.inspect import model_and_adapter
from distillery.models.load import end_ids, load_model, load_tokenizer, pad_id
from distillery.recipe import Columns, ExportForm, PromptRecipe, TrainingRecipe
from distillery.records import AnswerFormat, Example
from distillery.training.fine_tune import fine_tune
from distillery.training.rows import training_rows

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["oven", "bridge"]},
        "count": {"type": "integer"},
        "where": {"type": "string", "maxLength": 12},
    },
    "required": ["kind", "where"],
    "additionalProperties": False,
}
TEXT = AnswerFormat(max_tokens=40, metric="rouge_l")
FIELDS = AnswerFormat(max_tokens=60, json_schema=SCHEMA, metric="field_f1")
PROMPT = PromptRecipe(system="Say it.", user="{text}", answer="written")


def examples(answer_format: AnswerFormat) -> list[Example]:
    rows = []
    for number in range(9):
        kind = ("oven", "bridge")[number % 2]
        answer = f"the {kind} no. {number}"
        if answer_format.json_schema:
            answer = canonical(json.dumps({"where": f"no. {number}", "kind": kind}), SCHEMA)
        question = f"{kind} number {number}, " + "and so on " * (number % 4)
        fields = {"answer_key": answer, "format": answer_format}
        rows.append(Example(example_id=str(number), question=question, choices=(), **fields))
    return rows


def writer(model: Any, tokenizer: Any) -> TransformersWriter:
    device = choose_device("float32")
    model.eval()
    ends = end_ids(model, tokenizer)
    next_logits = PromptLogits(model, device)
    return TransformersWriter(model, tokenizer, device, pad_id(tokenizer), ends, next_logits)


def tokens_of(student: OnnxStudent, prompt: Sequence[int], form: AnswerFormat) -> list[int]:
    guide = student.guides.start(form.json_schema) if form.json_schema else None
    return [token for token, _ in student.steps(prompt, form.max_tokens + 1, guide=guide)]


@pytest.mark.parametrize("form", [TEXT, FIELDS], ids=["text", "schema"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_ways_of_writing_an_answer_agree(
    tiny_model: Callable[[str], Path], tmp_path: Path, arch: str, form: AnswerFormat
) -> None:
    """A student that has learnt a little: some answers end, and others are cut off."""
    base, tokenizer = tiny_model(arch), load_tokenizer(tiny_model(arch))
    rows = examples(form)
    rendered, _ = training_rows(rows, gold_labels(rows), PROMPT, tokenizer)
    recipe = TrainingRecipe(
        method="lora", epochs=4, batch_size=4, learning_rate=1e-2, precision="float32"
    )
    out = tmp_path / "trained"
    fine_tune(base, None, rendered, [], recipe, out, answer_format=form)
    model, adapter = model_and_adapter(out, base)
    export(model, adapter, ExportForm(precision="fp32"), tmp_path / "onnx")
    assert read_format(tmp_path / "onnx") == form
    drafts = learn_drafts((row.prompt, row.target) for row in rendered)
    assert read_drafts(tmp_path / "onnx") == drafts
    student = OnnxStudent(tmp_path / "onnx", threads=1)
    prompts = [row.prompt for row in rendered]
    assert [tuple(student.render(row, PROMPT).prompt) for row in rows] == prompts

    ours = writer(load_model(model, adapter)[0], tokenizer)
    assert ours.end_ids == student.end_ids
    single = []
    for prompt in prompts:
        (answering,) = ours.answerings([prompt], form)
        ids = list(prompt)

        def append(token: int, ids: list[int] = ids) -> Any:
            ids.append(token)
            return ours.logits_after(ids)

        list(generated(ours.logits_after(ids), append, answering))
        single.append(answering.tokens)
    assert single == [tokens_of(student, prompt, form) for prompt in prompts]
    told: list[int] = []
    together = ours.write_all(prompts, form, told.append)
    assert sum(told) == len(prompts)
    assert together == [ours.write(prompt, form) for prompt in prompts]
    assert student.answers(rows, PROMPT) == together
    assert load_for_rows(tmp_path / "onnx", 1).answers(rows, PROMPT) == together
    if form.json_schema:
        for answer in together:
            if answer.finished:
                assert answer.answer(form) == answer.text
    else:
        assert any(answer.finished for answer in together)


def test_a_row_that_can_t_be_asked_is_told(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    export(tiny_model("llama"), None, ExportForm(precision="fp32"), tmp_path)
    student = OnnxStudent(tmp_path, threads=1)
    rows = examples(TEXT)[:2]
    rows[1] = rows[1].model_copy(update={"question": "and so on " * 400})
    first, second = student.answers(rows, PROMPT.model_copy(update={"max_tokens": 5000}))
    assert isinstance(first, Written)
    assert isinstance(second, DataError)
    assert "the model's context" in str(second)


def test_a_file_of_rows_is_answered_with_texts(
    tiny_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    """A random model, held to a schema whose answers are short or too long for the limit."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_onnx("llama"), folder)
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["oven", "a bridge"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "bread", "said": 7}\n{"text": ""}\n{"text": "river"}\n')
    prompt = PROMPT.model_copy(update={"user": "{text} as {schema}"})
    columns = Columns(question="text", choices=None, answer="said")
    for limit in (60, 5):
        form = AnswerFormat(max_tokens=limit, json_schema=schema, metric="field_f1")
        write_format(folder, form)
        student = load_for_rows(folder, 1)
        reader = RowReader(columns, format=student.format)
        counts = score_file(student, read_rows(rows, reader), prompt, tmp_path / str(limit))
        assert (counts.rows, counts.failed) == ((2, 1) if limit == 60 else (0, 3))
    answers = (tmp_path / "60" / "predictions.jsonl").read_text().splitlines()
    for line, number in zip(answers, (1, 3), strict=True):
        found = json.loads(line)
        assert found.keys() == {"line", "example_id", "answer"}
        assert found["line"] == number
        assert found["answer"] == canonical(found["answer"], schema)
    failed = [json.loads(line) for line in (tmp_path / "5" / "failed.jsonl").open()]
    assert [row["line"] for row in failed] == [1, 2, 3]
    assert failed[0]["reason"].startswith("cut off after 5 tokens: '{\"ki")


def test_evaluation_scores_written_answers(
    tiny_model: Callable[[str], Path], tiny_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    """The same student in both runtimes: the same answers, and the reason where there is none."""
    form = FIELDS.model_copy(update={"max_tokens": 40})
    rows = [row.model_copy(update={"format": form}) for row in examples(FIELDS)] * 5
    rows[1] = rows[1].model_copy(update={"question": "and so on " * 400})
    write_examples(rows, tmp_path / "test.jsonl")
    prompt = PROMPT.model_copy(update={"max_tokens": 200})
    scored = {}
    for kind, folder in (("transformers", tiny_model("llama")), ("onnx", tiny_onnx("llama"))):
        model = ModelToScore.model_validate({"name": kind, "kind": kind, "folder": str(folder)})
        scored[kind] = score_model(model, tmp_path / "test.jsonl", prompt, threads=1, reorder=True)
    ours, onnx = scored["transformers"], scored["onnx"]
    assert ours.answers == onnx.answers
    assert ours.no_answer == onnx.no_answer
    assert (len(ours.latencies_ms), len(onnx.latencies_ms)) == (30, 30), "the others at once"
    assert ours.probabilities == onnx.probabilities == (None,) * len(rows)
    assert onnx.no_answer[1] == "the prompt is too long to be asked"
    for answer, reason in zip(onnx.answers, onnx.no_answer, strict=True):
        assert (answer is None) == (reason is not None)
    for each in scored.values():
        assert each.tokens_per_second is not None
        assert each.tokens_per_second > 0
        assert each.first_token_ms is not None or not any(each.answers)
        assert each.reordered is None


class Fixed:
    """Logits that make the greedy answer a given one."""

    def __init__(self, tokens: Sequence[int], size: int) -> None:
        self.tokens, self.size, self.passes = list(tokens), size, 0

    def next(self, _token: int = -1) -> Any:
        logits = np.zeros(self.size, np.float32)
        logits[self.tokens[self.passes]] = 1.0
        self.passes += 1
        return logits


@pytest.mark.parametrize(
    ("most", "said", "finished"),
    [(3, [5, 6, 7], False), (4, [5, 6, 7], True), (9, [5, 6, 7], True)],
)
def test_an_answer_ends_with_its_end_token_or_its_limit(
    most: int, said: list[int], finished: bool
) -> None:
    fixed = Fixed([5, 6, 7, 2, 8], 10)
    answering = Answering(most, {2, 3})
    steps = list(generated(fixed.next(), fixed.next, answering))
    assert [token for token, _ in steps] == answering.tokens
    form = TEXT.model_copy(update={"max_tokens": most})
    text = written(answering.tokens, {2, 3}, form, lambda tokens: f" {list(tokens)} ")
    assert text == Written(text=str(said), tokens=3, finished=finished)
    assert fixed.passes == min(most, 4), "no pass after the last token"


def test_an_object_that_closes_behind_the_limit_is_cut_off() -> None:
    tokens = [*range(10, 15), 2]
    for limit, finished in ((4, False), (5, True)):
        form = FIELDS.model_copy(update={"max_tokens": limit})
        found = written(tokens, {2}, form, str)
        assert (found.tokens, found.finished) == (limit, finished)


def test_what_is_no_answer_says_why() -> None:
    whole = Written(text='{"where": "x", "kind": "oven"}', tokens=9, finished=True)
    assert whole.answer(FIELDS) == '{"kind": "oven", "where": "x"}'
    changes: list[tuple[dict[str, Any], str]] = [
        ({"finished": False}, r"cut off after 9 tokens: '{\"where\""),
        ({"text": ""}, "empty answer: ''"),
        ({"text": "oven"}, "no JSON: 'oven'"),
        ({"text": '{"kind": "oven"}'}, "'where' is a required property: "),
        ({"text": "x" * 500}, f"no JSON: '{'x' * 80}...'$"),
    ]
    for changed, reason in changes:
        with pytest.raises(NotAnAnswer, match=reason):
            whole.model_copy(update=changed).answer(FIELDS)


@pytest.fixture(scope="module")
def guides(tiny_model: Callable[[str], Path]) -> Guides:
    text = (tiny_model("llama") / "tokenizer.json").read_text(encoding="utf-8")
    return Guides(text, {2})


def test_any_logits_held_to_a_schema_give_an_answer(guides: Guides) -> None:
    """Whatever the model would say. A head may have more rows than there are tokens."""
    random = np.random.default_rng(0)
    for _ in range(20):
        answering = Answering(400, {2}, guide=guides.start(SCHEMA, strict=True))
        while not answering.over:
            logits = random.normal(size=520).astype(np.float32)
            logits[512:] = 50
            answering.take(logits)
        assert answering.tokens[-1] == 2 not in answering.tokens[:-1]
        assert max(answering.tokens) < 512


def test_a_schema_that_can_t_be_held_is_told(guides: Guides) -> None:
    deep: dict[str, Any] = {}
    for _ in range(500):
        deep = {"type": "object", "properties": {"a": deep}}
    for schema, reason in [
        (deep, "nested too deep"),
        ({"$ref": "http://elsewhere/schema"}, "elsewhere"),
        ({"type": "strin"}, "Invalid type"),
        ({"properties": {"a": False}, "required": ["a"], "type": "object"}, "Unsatisfiable"),
        # Without a limit, minutes and gigabytes.
        ({"multipleOf": 9_999_991}, "multipleOf"),
        ({"allOf": [{"multipleOf": 9973}, {"multipleOf": 0.97}], "$defs": {"a": 0}}, "multipleOf"),
        ({"anyOf": [{"multipleOf": -1e9}, {"multipleOf": 0}]}, "multipleOf"),
    ]:
        with pytest.raises(SchemaNotHeld, match=reason):
            guides.start(schema)
    unknown = {"type": "array", "uniqueItems": True}
    guides.start(unknown)
    with pytest.raises(SchemaNotHeld, match="uniqueItems"):
        guides.start(unknown, strict=True)


@pytest.mark.parametrize("scheme", ["first", "never"])
def test_a_blank_that_the_tokenizer_puts_before_a_text_may_follow(scheme: Any) -> None:
    """As in Llama 2 and Phi-3: the student has learnt texts with the blank."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    text = '{"kind": "oven", "where": "a"}'
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator([text] * 20, trainer)
    guide = Guides(tokenizer.to_str(), {1}).start(SCHEMA, strict=True)
    tokens = tokenizer.encode(text).ids
    for token in tokens:
        assert np.isfinite(guide.masked(np.zeros(60, np.float32))[token])
        guide.take(token)
    assert guide.complete
    assert tokenizer.decode(tokens).strip() == text


def test_a_tokenizer_that_answers_can_t_be_held_in_is_told() -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer: Any = Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(SchemaNotHeld, match="tokenizer: can't determine decoder type"):
        Guides(tokenizer.to_str(), {0})


def test_the_bytes_of_a_byte_level_token(guides: Guides, tiny_model: Callable[[str], Path]) -> None:
    text = "An oven, né\n日\x00 \x7f"
    tokens = load_tokenizer(tiny_model("llama")).encode(text)
    found = [guides.token_bytes(token) or b"" for token in tokens]
    assert b"\xc3" in found, "a character is two tokens"
    assert b"".join(found) == text.encode()
    assert guides.token_bytes(1) == b"<|im_start|>"
    assert guides.token_bytes(511) is None, "the head has more rows than there are tokens"


def test_the_bytes_of_a_token_of_sentencepiece() -> None:
    """As in Llama 2: a blank is a mark, and what is in no token is bytes by number."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", "t", "h", "e", "th", "the", "▁the"]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer: Any = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokens = tokenizer.encode("the thé\n").ids
    pieces = [b" the", b" ", b"th", b"\xc3", b"\xa9", b"\n"]
    assert list(map(Guides(tokenizer.to_str(), {1}).token_bytes, tokens)) == pieces


@pytest.mark.parametrize("held", [False, True])
def test_the_logits_of_what_may_follow(guides: Guides, held: bool) -> None:
    """Each token with them, also the end, for which nothing is computed."""
    logits = np.random.default_rng(1).normal(size=512).astype(np.float32)
    answering = Answering(400, {2}, guide=guides.start({"type": "object", "maxProperties": 0}))
    steps = list(generated(logits, lambda _: logits, answering, held))
    assert [token for token, _ in steps] == answering.tokens
    for token, found in steps:
        may_follow = np.flatnonzero(np.isfinite(found))
        assert (found[may_follow] == logits[may_follow]).all() or token == 2
        assert token in may_follow
        if held:
            assert token == found.argmax()
        else:
            assert len(may_follow) == 512
    if held:
        assert np.flatnonzero(np.isfinite(steps[-1][1])).tolist() == [2]


def test_an_answer_that_can_t_be_followed_is_no_whole_one(guides: Guides) -> None:
    """llguidance gives up, and would let the answer end there."""
    guide = guides.start({"type": "string", "pattern": "^((a|aa|aaa){1,200}){1,200}b$"})
    logits = np.zeros(512, np.float32)

    def say(tokens: int) -> None:
        for _ in range(tokens):
            guide.take(int(guide.masked(logits).argmax()))

    with pytest.raises(SchemaNotHeld, match=r"^lexer error: too many expressions constructed$"):
        say(100)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_token_is_taken_from_what_is_no_number(temperature: float, value: float) -> None:
    draw = token_sampler(temperature, top_p=1.0, seed=1)
    assert draw(np.array([-np.inf, 1, -np.inf], np.float32)) == 1
    with pytest.raises(ModelError, match="largest logit is"):
        draw(np.full(3, value, np.float32))


def test_the_canonical_form_is_what_may_follow(
    guides: Guides, tiny_model: Callable[[str], Path]
) -> None:
    """Else a student would be kept from saying what it has learnt."""
    tokenizer = load_tokenizer(tiny_model("llama"))
    for value in (
        {"kind": "oven", "where": 'é, \n"日'},
        {"where": "", "count": -3, "kind": "bridge"},
    ):
        guide = guides.start(SCHEMA, strict=True)
        for token in tokenizer.encode(canonical(json.dumps(value), SCHEMA)):
            assert not guide.complete
            assert np.isfinite(guide.masked(np.zeros(512, np.float32))[token])
            guide.take(token)
        assert guide.complete


def test_a_schema_is_compiled_once(guides: Guides) -> None:
    """Half a second for a large one; and each answer has a guide of its own."""
    fields = {f"field_{number}": {"enum": [f"value {i}" for i in range(9)]} for number in range(90)}
    large = {**SCHEMA, "properties": {**SCHEMA["properties"], **fields}}
    before = guides.matcher_at_start.cache_info().misses
    for schema in (large, json.loads(json.dumps(large)), large):
        guide = guides.start(schema)
        logits = guide.masked(np.zeros(512, np.float32))
        token = int(logits.argmax())
        guide.take(token)
        behind = guide.masked(np.zeros(512, np.float32))
        assert not np.array_equal(logits, behind)
        again = guides.start(schema).masked(np.zeros(512, np.float32))
        assert np.array_equal(again, logits), "it is at the beginning"
    assert guides.matcher_at_start.cache_info().misses == before + 1


def test_the_schemas_that_are_kept_are_bounded(
    guides: Guides, tiny_model: Callable[[str], Path]
) -> None:
    """Those that differ in the order of their fields are two."""
    for number in range(3 * KEPT_SCHEMAS):
        guides.start({"type": "object", "properties": {f"n{number}": {}}})
    assert guides.matcher_at_start.cache_info().currsize == KEPT_SCHEMAS
    fields = {"b": {"type": "null"}, "a": {"type": "null"}}
    tokens = load_tokenizer(tiny_model("llama")).encode('{"b": null, "a": null}')
    for properties, may_follow in ((fields, True), (dict(reversed(fields.items())), False)):
        guide = guides.start({"type": "object", "properties": properties})
        followed = []
        for token in tokens:
            followed.append(bool(np.isfinite(guide.masked(np.zeros(512, np.float32))[token])))
            if not followed[-1]:
                break
            guide.take(token)
        assert all(followed) is may_follow
