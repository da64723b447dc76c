"""Asking ONNX models: numbers equal to PyTorch's, whatever was asked before, and files answered row
by row."""

import csv
import json
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from distillery.data.rows import RowReader
from distillery.errors import DataError, ModelError
from distillery.evaluation.scoring import ModelToScore, ScoringJob
from distillery.evaluation.scoring_process import score
from distillery.inference.abstention import write_abstention
from distillery.inference.batch import (
    FailedRow,
    InputRow,
    Prediction,
    count_rows,
    read_rows,
    score_file,
)
from distillery.inference.logits import Logits, log_softmax
from distillery.inference.onnx_student import OnnxStudent
from distillery.models.class_tokens import ClassTokens
from distillery.prompts import render_ids, render_messages, text_ids
from distillery.recipe import Columns, PromptRecipe
from distillery.records import Abstention, Example
from distillery.serving.ask import Asker, SearchOptions

Build = Callable[..., Path]
PROMPT = PromptRecipe()
BAKER = Example(
    example_id="1", question="Where is the bread warm?", choices=("oven", "river", "cloud")
)


def _ids(student: OnnxStudent, text: str = "Where does the baker keep the bread?") -> list[int]:
    return student.tokenizer.encode_chat([{"role": "user", "content": text}])


def _torch_logprobs(folder: Path, ids: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1).numpy()


def _with_end(folder: Path, end: int, out: Path) -> OnnxStudent:
    """The model with another end token."""
    shutil.copytree(folder, out)
    config = json.loads((out / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = [end]
    (out / "genai_config.json").write_text(json.dumps(config))
    return OnnxStudent(out, threads=1)


def count_passes(student: OnnxStudent) -> list[int]:
    """Return a list that grows by the number of tokens of each pass through the model."""
    passes: list[int] = []
    append = student.decoder.append

    def counting(tokens: list[int]) -> Logits:
        passes.append(len(tokens))
        return append(tokens)

    student.decoder.append = counting  # type: ignore[method-assign]
    return passes


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_option_probabilities_are_those_of_torch(
    arch: str, tiny_model: Build, tiny_onnx: Build
) -> None:
    student = OnnxStudent(tiny_onnx(arch), threads=1)
    ids, letters = _ids(student), student.letter_ids(5)
    expected = _torch_logprobs(tiny_model(arch), ids)
    options = np.exp(expected[letters]) / np.exp(expected[letters]).sum()
    probabilities = student.option_probabilities(ids, letters)
    assert probabilities == pytest.approx(options.tolist(), abs=1e-3)
    assert sum(probabilities) == pytest.approx(1, abs=1e-12)
    assert max(probabilities) - min(probabilities) > 0.1
    np.testing.assert_allclose(student.next_token_logprobs(ids), expected, atol=1e-3)


@pytest.mark.parametrize("arch", ["llama", "phi3", "qwen3"])
def test_text_probabilities_are_those_of_torch_whatever_was_asked_before(
    arch: str, tiny_model: Build, tiny_onnx: Build
) -> None:
    from distillery.models.device import choose_device
    from distillery.models.load import load_model, pad_id
    from distillery.training.rows import TrainingRow
    from distillery.training.validation import option_probabilities

    model, tokenizer = load_model(tiny_model(arch))
    student = OnnxStudent(tiny_onnx(arch), threads=1)
    ids = tuple(_ids(student))
    texts = ((7,), (8, 9, 10), (8, 4))
    row = TrainingRow(prompt=ids, texts=texts, answer=0)
    (expected,) = option_probabilities(
        model, [row], pad_id=pad_id(tokenizer), device=choose_device("float32")
    )
    for _ in range(2):
        assert student.text_probabilities(ids, texts) == pytest.approx(expected, abs=1e-3)
        student.next_token_logprobs(ids[:-1])
    student.decoder.can_rewind = False
    assert student.text_probabilities(ids, texts) == pytest.approx(expected, abs=1e-3)


def test_a_row_is_answered_by_the_likeliest_text(tiny_onnx: Build) -> None:
    student = OnnxStudent(tiny_onnx("llama"), threads=1)
    prompt = PromptRecipe(user="{question}", answer="text")
    answer = student.answer(BAKER, prompt)
    ids = student.tokenizer.encode_chat(render_messages(BAKER, prompt))
    texts = [student.tokenizer.encode_text(text) for text in BAKER.choices]
    expected = student.text_probabilities(ids, texts)
    assert list(answer.probabilities.values()) == expected
    assert answer.letter == "ABC"[expected.index(max(expected))]


def test_a_pruned_head_gives_the_same_numbers(
    tiny_model: Build, tiny_onnx: Build, tmp_path: Path
) -> None:
    from onnxruntime_genai.models.builder import create_model

    source = str(tiny_model("llama"))
    out, scratch = str(tmp_path / "pruned"), str(tmp_path / "scratch")
    # Its decorator, torch.no_grad, hides its signature.
    create_model(  # type: ignore[call-arg, type-var]
        "pruned", source, out, "fp32", "cpu", scratch, hf_remote=False, prune_lm_head=True
    )
    student, pruned = OnnxStudent(tiny_onnx("llama"), threads=1), OnnxStudent(Path(out), threads=1)
    ids = _ids(student)
    np.testing.assert_allclose(
        pruned.next_token_logprobs(ids), student.next_token_logprobs(ids), atol=1e-4
    )
    assert pruned.generate(ids, 8)[0] == student.generate(ids, 8)[0]


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_what_was_asked_before_changes_no_number(
    arch: str, precision: str, tiny_onnx: Build
) -> None:
    folder = tiny_onnx(arch, precision)
    student = OnnxStudent(folder, threads=1)
    first = _ids(student)
    answer = student.generate(first, 30)[0]
    prompts = [
        first,
        first,
        _ids(student, "Where does the baker sleep?"),
        first[:-1],
        first[:1],
        first[:2],
        _ids(student, "the river " * 100),
    ]
    for ids in prompts:
        np.testing.assert_array_equal(
            student.next_token_logprobs(ids),
            OnnxStudent(folder, threads=1).next_token_logprobs(ids),
        )
    assert student.generate(first, 30)[0] == answer
    # A prompt that goes on with an answer that was decoded token by token.
    np.testing.assert_array_equal(
        student.next_token_logprobs(first + answer),
        OnnxStudent(folder, threads=1).next_token_logprobs(first + answer),
    )


def test_shared_beginnings_are_computed_once(tiny_onnx: Build) -> None:
    student = OnnxStudent(tiny_onnx("llama"), threads=1)
    passes = count_passes(student)
    ids = _ids(student)
    ids = ids[: len(ids) - len(ids) % 2]
    for tokens in (ids, [*ids[:-4], 7, 8, 9, 10], [*ids[:-3], 9, 8, 7]):
        student.next_token_logprobs(tokens)
    # The number of tokens that are shared is even.
    assert passes == [len(ids), 4, 4]


def test_greedy_text_is_that_of_torch_also_when_the_cache_has_grown(
    tiny_model: Build, tiny_onnx: Build
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    student = OnnxStudent(tiny_onnx("llama"), threads=1)
    ids = _ids(student)
    tokens, logprobs = student.generate(ids, 600)
    assert len(tokens) == 600
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    with torch.inference_mode():
        logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    assert tokens == logits.argmax(-1).tolist()
    expected = torch.log_softmax(logits.double(), -1).max(-1).values
    np.testing.assert_allclose(logprobs, expected.numpy(), atol=1e-3)


def test_generation_stops_at_an_end_token_and_where_the_context_is_full(
    tiny_onnx: Build, tmp_path: Path
) -> None:
    student = OnnxStudent(tiny_onnx("llama"), threads=1)
    ids = _ids(student)
    tokens = student.generate(ids, 20)[0]
    end = next(token for at, token in enumerate(tokens) if at >= 2 and token not in tokens[:at])
    stopped = _with_end(tiny_onnx("llama"), end, tmp_path / "model")
    assert stopped.generate(ids, 20)[0] == tokens[: tokens.index(end)]
    long = (ids * 100)[: student.context_length - 5]
    assert len(student.generate(long, 50)[0]) == 5
    with pytest.raises(ModelError, match="1025 tokens; it takes 1 to 1024"):
        student.next_token_logprobs([5] * 1025)


def test_one_token_takes_one_pass(tiny_onnx: Build) -> None:
    student = OnnxStudent(tiny_onnx("llama"), threads=1)
    passes = count_passes(student)
    student.generate(_ids(student), 1)
    assert len(passes) == 1


def test_sampling_follows_seed_temperature_and_top_p(tiny_onnx: Build) -> None:
    student = OnnxStudent(tiny_onnx("llama"), threads=1)
    ids = _ids(student)
    first, again, other = (
        student.generate(ids, 20, temperature=1.0, seed=seed)[0] for seed in (1, 1, 2)
    )
    assert first == again != other
    greedy = student.generate(ids, 20)[0]
    assert student.generate(ids, 20, temperature=1.0, top_p=1e-9, seed=1)[0] == greedy
    assert student.generate(ids, 20, temperature=1e-12, seed=1)[0] == greedy
    drawn = Counter(
        next(student.steps(ids, 1, temperature=2.0, seed=seed))[0] for seed in range(1500)
    )
    expected = np.exp(log_softmax(student.next_token_logprobs(ids) / 2))
    for token in np.argsort(-expected)[:3].tolist():
        # Three standard errors of a share of 1,500 draws.
        error = 3 * float(np.sqrt(expected[token] * (1 - expected[token]) / 1500))
        assert drawn[token] / 1500 == pytest.approx(float(expected[token]), abs=error)
    likeliest = set(np.argsort(-expected)[:3].tolist())
    few = {next(student.steps(ids, 1, temperature=9.0, seed=n, top_k=3))[0] for n in range(100)}
    assert few == likeliest


def test_the_most_probable_letter_is_the_answer(tiny_onnx: Build) -> None:
    student = OnnxStudent(tiny_onnx("llama"), threads=1)
    answer = student.answer(BAKER, PROMPT)
    assert list(answer.probabilities) == ["A", "B", "C"]
    assert answer.probabilities[answer.letter] == max(answer.probabilities.values())
    with pytest.raises(
        DataError, match=r"^1: the prompt is longer than 9 tokens \(prompt.max_tokens\)$"
    ):
        student.answer(BAKER, PromptRecipe(max_tokens=9))


def test_a_prompt_and_its_longest_option_fit_into_the_context(
    tiny_onnx: Build, tmp_path: Path
) -> None:
    student = OnnxStudent(tiny_onnx("llama"), threads=1)
    context = student.context_length
    by_text = PromptRecipe(system="", user="{question}", answer="text", max_tokens=2 * context)
    longest = max(map(len, text_ids(BAKER, student.tokenizer)))
    words = next(
        n for n in range(context) if _length(student, "a" * n, by_text) == context - longest
    )
    fits, over = (BAKER.model_copy(update={"question": "a" * n}) for n in (words, words + 1))
    assert student.answer(fits, by_text).letter in "ABC"
    said = rf"^1: the prompt is longer than {context - longest} tokens \(the model's context\)$"
    with pytest.raises(DataError, match=said):
        student.answer(over, by_text)
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{fits.model_dump_json()}\n{over.model_dump_json()}\n")
    job = ScoringJob(
        model=ModelToScore(name="student", kind="onnx", folder=str(student.folder)),
        examples=str(file),
        prompt=by_text,
        threads=1,
    )
    first, second = score(job).answers
    assert (first is not None, second) == (True, None)


def _length(student: OnnxStudent, question: str, prompt: PromptRecipe) -> int:
    return len(
        render_ids(BAKER.model_copy(update={"question": question}), prompt, student.tokenizer) or []
    )


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("genai_config.json", None),
        ("genai_config.json", b"{nope"),
        ("genai_config.json", b'{"model": {}}'),
        ("model.onnx", b"nothing"),
        ("model.onnx.data", b"nothing"),
        ("tokenizer.json", None),
        ("adapter_weights.onnx_adapter", b"nothing"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_named_in_one_line(
    file: str, content: bytes | None, tiny_onnx: Build, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_onnx("llama"), folder)
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(ModelError) as failure:
        OnnxStudent(folder)
    assert str(folder) in str(failure.value)
    assert "\n" not in str(failure.value)
    assert "export" in str(failure.value)


def _adapter(source: Path, folder: Path) -> Path:
    """A LoRA adapter for the tiny model, with weights that matter."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(source)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    wrapped: Any = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(folder / "adapter")
    wrapped.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "adapter"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "error"),
    [({"precision": "fp32"}, 1e-3), ({"precision": "int8", "algorithm": "dynamic"}, 0.6)],
)
def test_an_adapter_apart_is_active_unless_left_aside(
    tiny_model: Build, tmp_path: Path, form: dict[str, str], error: float
) -> None:
    from distillery.export.build import export
    from distillery.recipe import ExportForm

    source, out = tiny_model("llama"), tmp_path / "onnx"
    export(source, _adapter(source, tmp_path), ExportForm(adapter_apart=True, **form), out)
    student, base = OnnxStudent(out, threads=1), OnnxStudent(out, threads=1, adapter=False)
    ids = _ids(student)
    tuned, plain = _torch_logprobs(tmp_path / "merged", ids), _torch_logprobs(source, ids)
    assert np.abs(tuned - plain).max() > 0.5
    np.testing.assert_allclose(student.next_token_logprobs(ids), tuned, atol=error)
    np.testing.assert_allclose(base.next_token_logprobs(ids), plain, atol=error)
    assert np.abs(student.next_token_logprobs(ids) - tuned).mean() < error / 4
    kinds = [node.op_type for node in onnx.load(out / "model.onnx").graph.node]
    in_8_bits = 14 if "algorithm" in form else 0
    assert kinds.count("MatMulIntegerToFloat") == in_8_bits, "all products of both layers"
    assert kinds.count("MatMulNBits") == bool(in_8_bits), "the head alone"
    pieces: dict[bool, list[str]] = {True: [], False: []}
    for active, shown in pieces.items():
        asker = Asker(out, adapter=active, search=SearchOptions(max_length=60))
        asker.answer("Where is bread warm?", shown.append)
    assert "".join(pieces[True]) != "".join(pieces[False])


ROWS: list[dict[str, Any]] = [
    {
        "id": f"r{n}",
        "question": f"Where does baker {n} rest?",
        "question_concept": "baker",
        "choices": {"label": ["A", "B", "C"], "text": ["oven", "river, wide", "cloud"]},
        "answerKey": answer,
    }
    for n, answer in enumerate(["B", "", "A"])
]


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "choices": json.dumps(row["choices"])} for row in rows)


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "write", "first_line"),
    [
        ("rows.jsonl", _write_jsonl, 1),
        ("rows.csv", _write_csv, 2),
        ("rows.parquet", _write_parquet, 1),
    ],
)
def test_rows_of_every_format_are_the_same(
    name: str, write: Callable[[Path, list[dict[str, Any]]], None], first_line: int, tmp_path: Path
) -> None:
    write(tmp_path / name, ROWS)
    rows = list(read_rows(tmp_path / name, RowReader(Columns())))
    assert rows == [
        InputRow(
            line=first_line + n,
            example_id=f"r{n}",
            question=f"Where does baker {n} rest?",
            concept="baker",
            choices=("oven", "river, wide", "cloud"),
            answer_key=answer,
        )
        for n, answer in enumerate(["B", None, "A"])
    ]


def test_rows_need_no_answer_concept_or_id(tmp_path: Path) -> None:
    bare = [{"question": "Where?", "choices": ["here", "there"]}]
    _write_jsonl(tmp_path / "rows.jsonl", bare)
    _write_parquet(tmp_path / "rows.parquet", bare)
    for name in ("rows.jsonl", "rows.parquet"):
        (row,) = read_rows(tmp_path / name, RowReader(Columns()))
        assert isinstance(row, InputRow)
        assert (row.answer_key, row.concept, len(row.example_id)) == (None, "", 64)


def test_malformed_jsonl_rows_are_set_aside_with_their_line(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0]).encode()
    deep = b"[" * 100_000
    bad = [
        (b"{", "", "no JSON object (Expecting property name"),
        (b"[1]", "", "no JSON object but list; "),
        (b'{"id": "x1", "question": ""}', "x1", "question: empty; fill it in or remove the row"),
        (good.replace(b"baker", b"\xff"), "", "not UTF-8; "),
        (
            b'{"id": "x2", "question": ' + deep,
            "",
            "no JSON object (maximum recursion depth exceeded",
        ),
        (
            b'{"id": "x3", "question": "?", "choices": "' + deep + b'"}',
            "x3",
            "choices: no JSON (maximum recursion depth exceeded",
        ),
        (
            b'{"id": "half \\ud83d", "question": "?", "choices": ["x", "y"]}',
            "",
            "id: half of a surrog",
        ),
    ]
    lines = [b"\xef\xbb\xbf" + good, b"", *(line for line, _, _ in bad), b"\xef\xbb\xbf" + good]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    rows = list(read_rows(tmp_path / "rows.jsonl", RowReader(Columns())))
    assert [row.line for row in rows] == [1, *range(3, 11)]
    assert isinstance(rows[0], InputRow)
    assert isinstance(rows[8], InputRow)
    for row, (_, example_id, reason) in zip(rows[1:8], bad, strict=True):
        assert isinstance(row, FailedRow)
        assert row.example_id == example_id
        assert row.reason.startswith(reason)


def test_malformed_csv_rows_are_set_aside_with_their_line(tmp_path: Path) -> None:
    choices = '"[""here"", ""there""]"'
    lines = [
        "id,question,choices,note",
        f'a,"two\nlines",{choices},',
        "b,too few",
        f"c,na\udcffve,{choices},",
        f'd,"quote"x,{choices},',
        f"na\udcffve,e,{choices},",
        f"f,a bad byte where nobody reads it,{choices},na\udcffve",
    ]
    (tmp_path / "rows.csv").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    rows = list(read_rows(tmp_path / "rows.csv", RowReader(Columns())))
    assert [row.line for row in rows] == [2, 4, 5, 6, 7, 8]
    assert [row.line for row in rows if isinstance(row, InputRow)] == [2, 8]
    failed = [(row.example_id, row.reason) for row in rows if isinstance(row, FailedRow)]
    assert [(example_id, reason.split("; ")[0]) for example_id, reason in failed] == [
        ("", "2 values under 4 columns"),
        ("c", "not UTF-8"),
        ("", "no valid CSV (',' expected after '\"')"),
        ("", "not UTF-8"),
    ]


def test_a_parquet_row_that_is_not_utf8_is_set_aside(tmp_path: Path) -> None:
    raw = pyarrow.array([b"Where?", b"\xff", b"When?"])
    questions = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())
    choices = pyarrow.array([["here", "there"]] * 3)
    table = pyarrow.table({"question": questions, "choices": choices})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    first, second, third = read_rows(tmp_path / "rows.parquet", RowReader(Columns()))
    assert isinstance(first, InputRow)
    assert isinstance(second, FailedRow)
    assert isinstance(third, InputRow)
    assert (first.line, second.line, third.line) == (1, 2, 3)
    assert second.reason == "not UTF-8; save the file in that encoding"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.txt", b"", "input_uri takes .jsonl, .csv, .parquet, not '.txt'"),
        ("missing.jsonl", None, "can't be read (No such file or directory); correct input_uri"),
        ("rows.csv", b"id,frage,choices\n", "no column 'question', only 'id', 'frage', 'choices'"),
        ("rows.parquet", b"no parquet", "can't be read as parquet (Parquet magic bytes not found"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(
    name: str, content: bytes | None, says: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as failure:
        list(read_rows(tmp_path / name, RowReader(Columns())))
    assert str(failure.value).startswith(str(tmp_path / name))
    assert says in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_memory_stays_flat_however_long_the_file(suffix: str, tmp_path: Path) -> None:
    write = {"jsonl": _write_jsonl, "csv": _write_csv, "parquet": _write_parquet}[suffix]
    path = tmp_path / f"rows.{suffix}"
    write(path, [{**ROWS[0], "question": f"{n} " + "long " * 200} for n in range(6000)])
    rows = read_rows(path, RowReader(Columns()))
    next(rows)
    tracemalloc.start()
    try:
        count = 1 + sum(1 for _ in rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 6000
    # The file holds 6 MB.
    assert peak < 1.5e6


def test_a_file_is_scored_row_by_row(tiny_onnx: Build, tmp_path: Path) -> None:
    student = OnnxStudent(tiny_onnx("llama"), threads=1)
    long = {**ROWS[0], "id": "long", "question": "word " * 600}
    _write_jsonl(
        tmp_path / "rows.jsonl",
        [ROWS[0], long, {**ROWS[0], "id": "one", "choices": ["x"]}, ROWS[2]],
    )
    done: list[int] = []
    counts = score_file(
        student,
        read_rows(tmp_path / "rows.jsonl", RowReader(Columns())),
        PROMPT,
        tmp_path / "out",
        done.append,
    )
    assert (counts.rows, counts.failed) == (2, 2)
    assert done == [1, 2, 3, count_rows(tmp_path / "rows.jsonl")]
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    predictions = [Prediction.model_validate_json(line) for line in lines]
    assert [(found.line, found.example_id) for found in predictions] == [(1, "r0"), (4, "r2")]
    rows = [
        row
        for row in read_rows(tmp_path / "rows.jsonl", RowReader(Columns()))
        if isinstance(row, InputRow)
    ]
    expected = OnnxStudent(tiny_onnx("llama"), threads=1).answer(rows[0], PROMPT)
    assert (predictions[0].answer, predictions[0].probabilities) == (
        expected.letter,
        expected.probabilities,
    )
    failed = [
        FailedRow.model_validate_json(line) for line in (tmp_path / "out" / "failed.jsonl").open()
    ]
    assert [(row.line, row.example_id) for row in failed] == [(2, "long"), (3, "one")]
    assert failed[0].reason == "the prompt is longer than 512 tokens (prompt.max_tokens)"
    assert failed[1].reason == "choices: 1 options; there must be 2 to 26"


def test_examples_from_no_file_are_scored_too(tiny_onnx: Build, tmp_path: Path) -> None:
    student = OnnxStudent(tiny_onnx("llama"), threads=1)
    short = PromptRecipe(max_tokens=8)
    assert score_file(student, [BAKER], short, tmp_path).failed == 1
    (line,) = (tmp_path / "failed.jsonl").read_text().splitlines()
    assert json.loads(line)["line"] is None
    assert (tmp_path / "predictions.jsonl").read_text() == ""


def test_texts_are_classified_whatever_their_label(tiny_onnx: Build, tmp_path: Path) -> None:
    shutil.copytree(tiny_onnx("llama"), tmp_path / "student")
    classes = ("bakery", "bank", "weather")
    ClassTokens(classes=classes, tokens=(301, 300, 305)).write(tmp_path / "student")
    student = OnnxStudent(tmp_path / "student", threads=1)
    rows: list[dict[str, Any]] = [
        {"id": "a", "text": "bread", "label": "bakery"},
        {"id": "b", "text": " ", "label": "bank"},
        {"id": "c", "text": "river", "label": "unheard of"},
        {"id": "d", "text": "cloud", "label": ["weather"]},
        {"id": "e", "text": "cloud"},
    ]
    _write_jsonl(tmp_path / "rows.jsonl", rows)
    reader = RowReader(Columns(question="text", choices=None, answer="label"), (), True, classes)
    prompt = PromptRecipe(system="", user="{text}", answer="class")
    read = read_rows(tmp_path / "rows.jsonl", reader)
    counts = score_file(student, read, prompt, tmp_path / "out")
    assert (counts.rows, counts.failed) == (4, 1)
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    found = [Prediction.model_validate_json(line) for line in lines]
    assert [one.example_id for one in found] == ["a", "c", "d", "e"]
    for one in found:
        assert tuple(one.probabilities) == classes
        assert sum(one.probabilities.values()) == pytest.approx(1)
        assert one.answer == max(classes, key=one.probabilities.__getitem__)
    assert found[2].probabilities == found[3].probabilities
    failed = json.loads((tmp_path / "out" / "failed.jsonl").read_text())
    assert (failed["line"], failed["example_id"], failed["reason"]) == (
        2,
        "b",
        "text: empty; fill it in or remove the row",
    )


def unsure(folder: Path, threshold: float, out: Path) -> OnnxStudent:
    """The model with a threshold below which it abstains."""
    shutil.copytree(folder, out)
    write_abstention(Abstention(threshold=threshold, answer="unsure"), out)
    return OnnxStudent(out, threads=1)


def test_an_answer_below_the_threshold_is_marked_and_still_shown(
    tiny_onnx: Build, tmp_path: Path
) -> None:
    plain = OnnxStudent(tiny_onnx("llama"), threads=1)
    best = max(plain.answer(BAKER, PROMPT).probabilities.values())
    lines = []
    for number, threshold in enumerate((best, best + 1e-6)):
        student = unsure(plain.folder, threshold, tmp_path / f"model-{number}")
        score_file(student, [BAKER], PROMPT, tmp_path / "out")
        lines.append(json.loads((tmp_path / "out" / "predictions.jsonl").read_text()))
    score_file(plain, [BAKER], PROMPT, tmp_path / "out")
    expected = json.loads((tmp_path / "out" / "predictions.jsonl").read_text())
    assert expected.keys() == {"example_id", "answer", "probabilities"}
    assert lines == [{**expected, "abstained": False}, {**expected, "abstained": True}]


def test_a_threshold_that_cannot_be_read_is_not_overlooked(
    tiny_onnx: Build, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_onnx("llama"), tmp_path / "model")
    (folder / "abstain.json").write_text("{}")
    with pytest.raises(ModelError, match=r"abstain.json: no threshold can be read"):
        OnnxStudent(folder, threads=1)
