"""Many rows in one pass: the numbers of rows one by one, whatever stands beside them, and models
that can't take rows together answer as before."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from distillery.errors import ModelError, OutOfResources
from distillery.export.build import export
from distillery.inference.batch import ROWS, FailedRow, Prediction, score_file
from distillery.inference.batch_graph import UnknownGraph, check_operators, with_lengths
from distillery.inference.batch_student import (
    PASS_CACHE,
    PASS_TOKENS,
    BatchStudent,
    in_passes,
    load_scorer,
)
from distillery.inference.decoder import ADAPTER_FILE
from distillery.inference.onnx_student import OnnxStudent
from distillery.models.class_tokens import ClassTokens
from distillery.models.onnx_graph import Graph
from distillery.recipe import ExportForm, PromptRecipe
from distillery.records import Example
from distillery.training.rows import TrainingRow

Build = Callable[..., Path]
PROMPT = PromptRecipe()
TEXTS = (((7,), (7, 8, 9), (7, 8, 9, 10, 11), (300,)), ((40, 41), (42,)), ((5,), (6,), (9,)))
"""Options' texts of one token and of several, some of which begin others."""


def rows_of(kind: str) -> list[TrainingRow]:
    """Nine rows of 10 to 130 tokens; the first five begin with the same 90."""
    numbers = np.random.default_rng(0)
    beginning = numbers.integers(5, 500, 90).tolist()
    rows = []
    for index, length in enumerate((11, 23, 2, 40, 17, 10, 11, 130, 64)):
        own = numbers.integers(5, 500, length).tolist()
        prompt = tuple(beginning + own if index < 5 else own)
        if kind == "text":
            rows.append(TrainingRow(prompt=prompt, texts=TEXTS[index % 3], answer=0))
        elif kind == "letter":
            rows.append(TrainingRow(prompt=prompt, letters=(70, 71, 72), answer=0))
        else:
            span = min(length, len(prompt))
            rows.append(
                TrainingRow(
                    prompt=prompt, letters=(301, 300), closed=True, span=span, last=1 / 3, answer=0
                )
            )
    return rows


def batch_student(folder: Path) -> BatchStudent:
    student = load_scorer(folder, threads=1)
    assert isinstance(student, BatchStudent)
    return student


def pooled(folder: Path, out: Path) -> Path:
    """The model with two classes that are read from the mean of the states."""
    shutil.copytree(folder, out)
    ClassTokens(classes=("a", "b"), tokens=(301, 300), pooled=True, last=1 / 3).write(out)
    return out


def largest_difference(found: list[list[float]], expected: list[list[float]]) -> float:
    return max(
        float(np.abs(np.subtract(one, other)).max())
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kind", ["letter", "text"])
@pytest.mark.parametrize("algorithm", ["rtn", "dynamic"])
def test_rows_together_have_the_very_numbers_of_rows_one_by_one_in_8_bits(
    algorithm: Literal["rtn", "dynamic"], kind: str, tiny_model: Build, tmp_path: Path
) -> None:
    form = ExportForm(precision="int8", algorithm=algorithm)
    export(tiny_model("llama"), None, form, tmp_path / "model")
    rows, student = rows_of(kind), batch_student(tmp_path / "model")
    together = student.probabilities(rows)
    alone = [student.probabilities([row])[0] for row in rows]
    assert largest_difference(together, alone) < 1e-9
    one_by_one = OnnxStudent(tmp_path / "model", threads=1).probabilities(rows)
    assert largest_difference(together, one_by_one) < (1e-9 if kind == "letter" else 0.05)


def test_a_folder_of_links_takes_rows_together(tiny_model: Build, tmp_path: Path) -> None:
    """So the hub's cache keeps a model: ONNX Runtime maps no weights behind such links."""
    folder, links = tmp_path / "model", tmp_path / "links"
    export(tiny_model("llama"), None, ExportForm(precision="int8", algorithm="dynamic"), folder)
    links.mkdir()
    for path in folder.iterdir():
        (links / path.name).symlink_to(path)
    rows = rows_of("letter")
    found, expected = (batch_student(each).probabilities(rows) for each in (links, folder))
    assert found == expected


@pytest.mark.parametrize("kind", ["letter", "text", "class"])
@pytest.mark.parametrize(
    ("arch", "precision"),
    [
        ("llama", "fp32"),
        ("llama", "int4"),
        ("phi3", "fp32"),
        ("phi3", "int4"),
        ("qwen2", "fp32"),
        ("qwen3", "fp32"),
    ],
)
def test_rows_together_have_the_numbers_of_rows_one_by_one(
    arch: str, precision: str, kind: str, tiny_onnx: Build, tmp_path: Path
) -> None:
    folder = pooled(tiny_onnx(arch, precision), tmp_path / "model")
    rows, student = rows_of(kind), batch_student(folder)
    together = student.probabilities(rows)
    alone = [student.probabilities([row])[0] for row in rows]
    fresh = [batch_student(folder).probabilities([row])[0] for row in rows[:4]]
    assert largest_difference(together, alone) < 1e-5
    assert largest_difference(alone[:4], fresh) < 1e-5
    if kind == "class":
        # These classes tell OnnxStudent no beginning that the head leaves out.
        rows = [row.model_copy(update={"span": len(row.prompt)}) for row in rows]
        together = student.probabilities(rows)
    one_by_one = OnnxStudent(folder, threads=1).probabilities(rows)
    # In int4 a rounding of activations to 8 bits may fall to the other side.
    assert largest_difference(together, one_by_one) < (1e-5 if precision == "fp32" else 0.05)
    assert max(max(row) - min(row) for row in together) > 0.1


def test_a_pruned_head_gives_the_same_numbers(
    tiny_model: Build, tiny_onnx: Build, tmp_path: Path
) -> None:
    from onnxruntime_genai.models.builder import create_model

    source, out = str(tiny_model("llama")), str(tmp_path / "pruned")
    # Its decorator, torch.no_grad, hides its signature.
    create_model(  # type: ignore[call-arg, type-var]
        "pruned", source, out, "fp32", "cpu", str(tmp_path), hf_remote=False, prune_lm_head=True
    )
    for kind in ("letter", "text"):
        rows = rows_of(kind)
        expected = batch_student(tiny_onnx("llama")).probabilities(rows)
        assert batch_student(Path(out)).probabilities(rows) == expected


def test_what_rows_share_is_computed_once(tiny_onnx: Build) -> None:
    student = batch_student(tiny_onnx("llama"))
    passes: list[int] = []
    run = student.run

    def counting(sequences: Any, *others: Any, **named: Any) -> Any:
        passes.append(sum(map(len, sequences)))
        return run(sequences, *others, **named)

    student.run = counting  # type: ignore[method-assign]
    alike = rows_of("letter")[:5]
    own = sum(len(row.prompt) - 90 for row in alike)
    student.probabilities(alike)
    assert passes == [90, own]
    student.probabilities(alike[1:])
    assert passes[2:] == [own - 11]
    student.probabilities(alike[:1])
    student.probabilities([alike[0].model_copy(update={"prompt": (*alike[0].prompt, 7, 8)})])
    # 100 of 101 tokens in the cache: an even number.
    assert passes[3:] == [11, 3]
    passes.clear()
    text = rows_of("text")[8]
    student.probabilities([text])
    assert passes == [len(text.prompt)]
    student.probabilities([rows_of("text")[6]])
    assert passes[1:] == [11, 6]


def test_a_pass_is_bounded_by_its_tokens() -> None:
    lengths = [300, 1, 100, 100, 100, 60]
    passes = list(in_passes(lengths, [0] * 6, 1024))
    assert sorted(index for picked in passes for index in picked) == list(range(6))
    assert [sum(lengths[index] for index in picked) for picked in passes] == [161, 200, 300]
    assert PASS_TOKENS == 256


def test_a_pass_is_bounded_by_the_tokens_of_its_caches_and_by_the_context() -> None:
    def sizes(lengths: list[int], cached: list[int], context_length: int) -> list[list[int]]:
        passes = list(in_passes(lengths, cached, context_length))
        assert sorted(index for picked in passes for index in picked) == list(range(len(lengths)))
        return passes

    # 8 x (2,044 + 4) tokens.
    assert list(map(len, sizes([4] * 20, [2044] * 20, 8192))) == [8, 8, 4]
    assert list(map(len, sizes([4] * 20, [2045] * 20, 8192))) == [7, 7, 6]
    # A single token is padded to two.
    assert list(map(len, sizes([1] * 20, [2046] * 20, 8192))) == [8, 8, 4]
    assert PASS_CACHE == 16_384
    assert sizes([3, 3], [20_000, 20_000], 32_768) == [[0], [1]]
    assert sizes([20, 4, 4], [10, 1000, 10], 1024) == [[2, 1, 0]]
    assert sizes([21, 4, 4], [1003, 1020, 10], 1023) == [[2], [1], [0]]
    assert sizes([25, 4, 4], [10, 1000, 10], 1024) == [[2, 1], [0]]
    assert sizes([1, 1], [1023, 1023], 1024) == [[0], [1]]


def test_rows_at_the_end_of_the_context_are_answered(tiny_onnx: Build) -> None:
    folder = tiny_onnx("llama")
    numbers = np.random.default_rng(1)
    tokens = tuple(numbers.integers(5, 500, 1024).tolist())
    letters = [TrainingRow(prompt=tokens, letters=(70, 71), answer=0)] * 2
    texts = [
        TrainingRow(prompt=tokens[:1020], texts=((7,), (7, 8, 9, 10, 11)), answer=0),
        # One token after the prompt, the context's last.
        TrainingRow(prompt=tokens[:1023], texts=((7, 8), (9, 8), (7,)), answer=0),
        TrainingRow(prompt=tokens[:40], texts=(tuple(tokens[:30]), (9, 8, 7)), answer=0),
    ]
    one_by_one = OnnxStudent(folder, threads=1)
    student = batch_student(folder)
    for rows in (letters, letters[:1], texts):
        found = student.probabilities(rows)
        assert largest_difference(found, one_by_one.probabilities(rows)) < 1e-5


@pytest.mark.parametrize(
    ("length", "texts"), [(0, ()), (1025, ()), (1020, ((7,), (7, 8, 9, 10, 11, 12)))]
)
def test_rows_beyond_the_context_are_refused(
    length: int, texts: tuple[tuple[int, ...], ...], tiny_onnx: Build
) -> None:
    student = batch_student(tiny_onnx("llama"))
    letters = () if texts else (70, 71)
    row = TrainingRow(prompt=(7,) * length, letters=letters, texts=texts, answer=0)
    with pytest.raises(ModelError, match=f"a prompt of {length} tokens"):
        student.probabilities([row])


def test_a_pass_that_fails_is_told_in_one_line(tiny_onnx: Build) -> None:
    student = batch_student(tiny_onnx("llama"))
    row = rows_of("letter")[8]
    outside = row.model_copy(update={"prompt": (*row.prompt[:-1], 10_000)})
    with pytest.raises(ModelError, match="ONNX Runtime fails") as failure:
        student.probabilities([outside])
    assert str(student.folder) in str(failure.value)
    assert "\n" not in str(failure.value)
    assert student.probabilities([row]) == batch_student(student.folder).probabilities([row])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "Error in execution: Non-zero status code returned while running MatMulNBits node. "
            "Name:'/model/layers.0/mlp/down_proj/MatMulNBits' Status Message: "
            "/onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:359 void* "
            "onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*) Failed "
            "to allocate memory for requested buffer of size 9"
        ),
        RuntimeError("Non-zero status code: std::bad_alloc"),
    ],
)
def test_a_pass_that_lacks_memory_says_nothing_of_the_row(
    error: Exception, tiny_onnx: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = batch_student(tiny_onnx("llama"))

    class Session:
        def run_with_ort_values(self, *_given: Any) -> None:
            raise error

    monkeypatch.setattr(student, "_session", Session())
    with pytest.raises(OutOfResources, match=r"ONNX Runtime runs out of memory \(.+\); free mem"):
        student.probabilities(rows_of("letter")[:1])


def test_the_session_does_not_keep_the_graph_that_it_was_made_from(tiny_onnx: Build) -> None:
    session = batch_student(tiny_onnx("llama"))._session
    assert not [name for name, value in vars(session).items() if isinstance(value, bytes)]


def test_classes_read_from_a_span_that_begins_within_what_rows_share(
    tiny_onnx: Build, tmp_path: Path
) -> None:
    folder = pooled(tiny_onnx("llama"), tmp_path / "model")
    rows = [
        row.model_copy(update={"span": len(row.prompt) - before})
        for row, before in zip(rows_of("class")[:5], (10, 60, 60, 60, 60), strict=True)
    ]
    for asked in (rows, rows[1:]):
        student = batch_student(folder)
        together = student.probabilities(asked)
        alone = [batch_student(folder).probabilities([row])[0] for row in asked]
        assert largest_difference(together, alone) < 1e-5


def test_rows_of_a_file_are_answered_together_and_those_that_fail_set_aside(
    tiny_onnx: Build, tmp_path: Path
) -> None:
    folder = tiny_onnx("llama")
    rows = [
        Example(
            example_id=f"r{number}",
            question="Where? " + "the baker " * (400 if number == 3 else number),
            choices=("oven", "river", "cloud")[: 2 + number % 2],
        )
        for number in range(ROWS + 4)
    ]
    given: list[Example | FailedRow]
    given = [*rows[:5], FailedRow(line=None, example_id="x", reason="bad"), *rows[5:]]
    read: list[int] = []

    def reading() -> Iterator[Example | FailedRow]:
        for number, row in enumerate(given):
            read.append(number)
            yield row

    ahead: list[int] = []
    counts = score_file(
        load_scorer(folder, threads=1),
        reading(),
        PROMPT,
        tmp_path,
        lambda done: ahead.append(len(read) - done),
    )
    assert (counts.rows, counts.failed) == (len(rows) - 1, 2)
    assert max(ahead) == ROWS - 1
    failed = [json.loads(line) for line in (tmp_path / "failed.jsonl").read_text().splitlines()]
    assert [row["example_id"] for row in failed] == ["r3", "x"]
    assert failed[0]["reason"] == "the prompt is longer than 512 tokens (prompt.max_tokens)"
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    found = [Prediction.model_validate_json(line) for line in lines]
    asked = [row for row in rows if row.example_id != "r3"]
    assert [one.example_id for one in found] == [row.example_id for row in asked]
    student = OnnxStudent(folder, threads=1)
    for one, row in zip(found, asked, strict=True):
        expected = student.answer(row, PROMPT)
        assert one.answer == expected.letter
        assert one.probabilities == pytest.approx(expected.probabilities, abs=1e-5)


def test_models_whose_rows_cannot_be_asked_together_are_asked_one_by_one(
    tiny_onnx: Build, tmp_path: Path
) -> None:
    assert type(load_scorer(tiny_onnx("phi4mini"), threads=1)) is OnnxStudent
    windowed = shutil.copytree(tiny_onnx("llama"), tmp_path / "windowed")
    model = onnx.load(windowed / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "local_window_size":
                attribute.i = 16
    onnx.save(model, windowed / "model.onnx")
    assert type(load_scorer(windowed, threads=1)) is OnnxStudent
    own_options = shutil.copytree(tiny_onnx("llama"), tmp_path / "own-options")
    config = json.loads((own_options / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"] |= {"intra_op_num_threads": 1}
    (own_options / "genai_config.json").write_text(json.dumps(config))
    assert type(load_scorer(own_options)) is OnnxStudent
    apart = shutil.copytree(tiny_onnx("llama"), tmp_path / "apart")
    (apart / ADAPTER_FILE).write_bytes(b"nothing")
    with pytest.raises(ModelError, match="ONNX Runtime GenAI"):
        load_scorer(apart, threads=1)


def test_a_graph_that_may_look_beyond_a_token_is_not_rewritten(tiny_onnx: Build) -> None:
    def refused(node: Any) -> str:
        graph = onnx.GraphProto()
        graph.node.append(node)
        with pytest.raises(UnknownGraph) as failure:
            check_operators(graph)
        return str(failure.value)

    assert "DynamicQuantizeLinear" in refused(helper.make_node("DynamicQuantizeLinear", "x", "y"))
    assert "several tokens" in refused(helper.make_node("ReduceMax", ["x"], ["y"]))
    assert "several tokens" in refused(helper.make_node("ReduceMax", ["x"], ["y"], axes=[1]))
    last = onnx.GraphProto()
    last.node.append(helper.make_node("ReduceMax", ["x", "axes"], ["y"]))
    last.initializer.append(helper.make_tensor("axes", TensorProto.INT64, [1], [-1]))
    check_operators(last)
    model = onnx.load(tiny_onnx("llama") / "model.onnx", load_external_data=False)
    stray = next(each for each in model.graph.initializer if each.external_data)
    next(each for each in stray.external_data if each.key == "location").value = "../weights"
    with pytest.raises(UnknownGraph, match="outside"):
        with_lengths(model)


def test_a_graph_that_is_made_up_is_not_rewritten(tiny_onnx: Build) -> None:
    path = tiny_onnx("llama") / "model.onnx"
    circle = onnx.load(path, load_external_data=False)
    for node in circle.graph.node:
        if "logits" in node.output:
            node.CopyFrom(helper.make_node("Identity", ["logits"], ["logits"]))
    with pytest.raises(UnknownGraph, match="head"):
        with_lengths(circle)
    more = onnx.load(path, load_external_data=False)
    more.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    for node in list(more.graph.node):
        if "logits" in node.output:
            node.output[0] = "before"
            more.graph.node.append(helper.make_node("Mul", ["before", "more"], ["logits"]))
    with pytest.raises(UnknownGraph, match="the input more"):
        with_lengths(more)
    weights = helper.make_graph(
        [helper.make_node("Reshape", ["a", "a"], ["b"]), helper.make_node("Reshape", ["b"], ["a"])],
        "circle",
        [],
        [],
    )
    assert Graph(helper.make_model(weights)).value("a") is None
    chain = [helper.make_node("Transpose", [f"{i}"], [f"{i + 1}"]) for i in range(2000)]
    assert Graph(helper.make_model(helper.make_graph(chain, "chain", [], []))).value("2000") is None


def test_a_cache_without_numbers_in_its_shape_is_left_to_the_other_student(
    tiny_onnx: Build, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_onnx("llama"), tmp_path / "symbolic")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for value in [*model.graph.input, *model.graph.output]:
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_param = "size"
    onnx.save(model, folder / "model.onnx")
    assert type(load_scorer(folder, threads=1)) is OnnxStudent


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("genai_config.json", b"{nope"),
        ("model.onnx", b"nothing"),
        ("model.onnx.data", b"nothing"),
        ("tokenizer.json", None),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_named_in_one_line(
    file: str, content: bytes | None, tiny_onnx: Build, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_onnx("llama"), tmp_path / "model")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(ModelError) as failure:
        load_scorer(folder)
    assert str(folder) in str(failure.value)
    assert "\n" not in str(failure.value)
    assert "export" in str(failure.value)


def test_a_pass_has_an_even_number_of_tokens_and_of_logits(tiny_onnx: Build) -> None:
    # Kernels for 4 bits compute an odd token by other sums.
    student = batch_student(tiny_onnx("llama", "int4"))
    shapes: list[tuple[int, int]] = []

    class Counting:
        def run_with_ort_values(self, wanted: list[str], values: dict[str, Any]) -> Any:
            shapes.append((values["input_ids"].shape()[1], values["read"].shape()[0]))
            return session.run_with_ort_values(wanted, values)

    session, student._session = student._session, Counting()
    for row in [*rows_of("text")[5:], *rows_of("letter")]:
        student.probabilities([row])
    assert all(tokens % 2 == 0 and logits % 2 == 0 for tokens, logits in shapes)
    assert len(shapes) > 12
