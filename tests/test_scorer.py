"""The int8 form of exported models: weights as they are in the graph, numbers near its own and a row's own."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distillery import inference, int8_graph
from distillery.errors import ModelError
from distillery.inference import OnnxStudent, log_softmax, score_file
from distillery.int8_graph import dequantised, write_int8_graph
from distillery.recipe import PromptRecipe
from distillery.records import Example
from distillery.scorer import Scorer, _batches

Build = Callable[..., Path]
BEGIN = "Answer the following multiple-choice question by selecting the correct option. "
QUESTIONS = (
    "Where does the baker rest?",
    "A river?",
    "Would a person like the quiet room, wouldn't they? " * 3,
    "Bread",
)


def _prompts(student: OnnxStudent) -> list[list[int]]:
    return [student.tokenizer.encode_chat([{"role": "user", "content": BEGIN + text}]) for text in QUESTIONS]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("zero_points", [False, True])
def test_weights_are_those_that_the_runtime_multiplies_with(bits: int, block: int, zero_points: bool) -> None:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    inputs, outputs = 72, 5
    blocks = -(-inputs // block)
    random = np.random.default_rng(0)
    arrays = [
        random.integers(0, 256, (outputs, blocks, block * bits // 8), dtype=np.uint8),
        random.random(outputs * blocks, dtype=np.float32),
    ]
    if zero_points:
        arrays.append(random.integers(0, 256, outputs * -(-blocks * bits // 8), dtype=np.uint8))
    names = ["weights", "scales", "zeros"][: len(arrays)]
    options = {"K": inputs, "N": outputs, "bits": bits, "block_size": block}
    node = helper.make_node("MatMulNBits", ["x", *names], ["y"], domain="com.microsoft", **options)
    shapes = {"x": [inputs, inputs], "y": [inputs, outputs]}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    tensors = [numpy_helper.from_array(array, name) for name, array in zip(names, arrays, strict=True)]
    graph = helper.make_graph([node], "one", [x], [y], tensors)
    operators = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=operators, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (multiplied,) = session.run(None, {"x": np.eye(inputs, dtype=np.float32)})
    np.testing.assert_allclose(dequantised(node, arrays), multiplied.T, rtol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_probabilities_are_near_those_of_the_graph_itself(arch: str, tiny_onnx: Build) -> None:
    student = OnnxStudent(tiny_onnx(arch, "int4"), threads=1)
    letters = student.letter_ids(5)
    for ids in _prompts(student):
        itself = np.exp(log_softmax(student.next_token_logprobs(ids)[letters]))
        probabilities = student.option_probabilities(ids, letters)
        assert probabilities == pytest.approx(itself.tolist(), abs=0.05)
        assert probabilities != itself.tolist()
        assert max(probabilities) - min(probabilities) > 0.1


@pytest.mark.parametrize("arch", ["llama", "phi3"])
@pytest.mark.parametrize("threads", [1, 2])
def test_numbers_are_those_of_a_row_alone(arch: str, threads: int, tiny_onnx: Build) -> None:
    folder = tiny_onnx(arch, "int4")
    student = OnnxStudent(folder, threads=threads)
    rows = [(ids, student.letter_ids(count)) for count in (2, 5) for ids in _prompts(student)]
    rows += [(rows[0][0][:2], [5, 6]), (rows[0][0][:1], [5, 6])]
    alone = [OnnxStudent(folder, threads=1).option_probabilities(*row) for row in rows]
    assert student.each_option_probabilities(rows) == alone
    assert student.each_option_probabilities(rows[:4]) == alone[:4]
    assert [student.option_probabilities(*row) for row in reversed(rows)] == alone[::-1]
    assert student.each_option_probabilities(rows[3:6]) == alone[3:6]
    assert student.each_option_probabilities([]) == []


def test_what_prompts_begin_with_is_computed_once(tiny_onnx: Build) -> None:
    student = OnnxStudent(tiny_onnx("llama", "int4"), threads=1)
    prompts = _prompts(student)
    scorer = student._scorer
    assert scorer is not None
    computed: list[int] = []
    run = scorer._run
    scorer._run = lambda some, start, *rest, **more: (  # type: ignore[method-assign]
        computed.append(sum(map(len, some)) - start * len(some)),
        run(some, start, *rest, **more),
    )[1]
    common = next(i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    assert common > 10
    scorer.logits(prompts)
    assert sum(computed) == sum(map(len, prompts)) - 3 * common
    computed.clear()
    scorer.logits(prompts[:1])
    assert computed == [len(prompts[0]) - common]
    computed.clear()
    scorer.logits([prompts[0], [*prompts[0], 7], [*prompts[0], 7, 8]])
    assert sum(computed) == 2 + 3 + 4
    computed.clear()
    scorer.logits(prompts[:1], reuse=False)
    assert computed == [len(prompts[0])]


def test_only_the_last_tokens_go_through_the_last_layer(tiny_onnx: Build, tmp_path: Path) -> None:
    import onnx

    graph = write_int8_graph(tiny_onnx("llama", "int4") / "model.onnx", tmp_path)
    assert graph is not None
    nodes = onnx.load(str(graph), load_external_data=False).graph.node
    last = max(i for i, node in enumerate(nodes) if node.op_type == "Scan")
    assert [node.op_type for node in nodes[last + 1 : last + 5]] == ["GatherND", "Unsqueeze"] * 2
    assert sum(node.op_type == "MatMulNBits" for node in nodes) == 1


def test_batches_have_rows_of_like_length_and_enough_for_all_threads() -> None:
    assert _batches([100, 300, 90, 400, 110], 1) == [[3], [1], [4, 0], [2]]
    assert _batches([10] * 8, 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert _batches([10, 10], 16) == [[0], [1]]


def test_what_has_no_int8_form_is_asked_as_it_is(
    tiny_onnx: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp32 = OnnxStudent(tiny_onnx("llama"), threads=1)
    ids, letters = _prompts(fp32)[0], fp32.letter_ids(3)
    assert fp32._scorer is None
    assert fp32.each_option_probabilities([(ids, letters)] * 2) == [fp32.option_probabilities(ids, letters)] * 2
    monkeypatch.setattr(int8_graph, "_MOST_WEIGHTS", 1000)
    assert write_int8_graph(tiny_onnx("llama", "int4") / "model.onnx", tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_token_that_the_model_does_not_have_is_one_line(tiny_onnx: Build) -> None:
    student = OnnxStudent(tiny_onnx("llama", "int4"), threads=1)
    with pytest.raises(ModelError) as failure:
        student.option_probabilities([1, 2, 100_000], [5, 6])
    assert "\n" not in str(failure.value)
    with pytest.raises(ModelError, match="a prompt of 0 tokens; it takes 1 to 1024"):
        student.each_option_probabilities([([1, 2], [5, 6]), ([], [5, 6])])


def test_a_file_is_scored_some_rows_at_a_time(
    tiny_onnx: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = OnnxStudent(tiny_onnx("llama", "int4"), threads=2)
    texts = ("oven", "river", "cloud")
    rows = [Example(example_id=str(n), question=QUESTIONS[n % 4], choices=texts[: 2 + n % 2]) for n in range(7)]
    rows[3] = rows[3].model_copy(update={"question": "long " * 300})
    asked: list[int] = []
    logits = Scorer.logits
    monkeypatch.setattr(Scorer, "logits", lambda *a, **b: (asked.append(len(a[1])), logits(*a, **b))[1])
    monkeypatch.setattr(inference, "_ROWS_AT_ONCE", 4)
    counts = score_file(student, rows, PromptRecipe(), tmp_path)
    assert (counts.rows, counts.failed) == (6, 1)
    assert asked == [3, 3]
    answers = [student.answer(row, PromptRecipe()) for row in rows if row.example_id != "3"]
    written = [inference.Prediction.model_validate_json(line) for line in (tmp_path / "predictions.jsonl").open()]
    assert [one.example_id for one in written] == ["0", "1", "2", "4", "5", "6"]
    assert [(one.answer, one.probabilities) for one in written] == [(one.letter, one.probabilities) for one in answers]


def test_tensors_of_a_file_beside_the_model_are_found(tiny_onnx: Build, tmp_path: Path) -> None:
    """ModelBuilder writes model.onnx.data; Olive, after its surgeries, one file."""
    import onnx

    apart = tiny_onnx("llama", "int4")
    assert (apart / "model.onnx.data").is_file()
    whole = tmp_path / "whole"
    shutil.copytree(apart, whole)
    (whole / "model.onnx.data").unlink()
    onnx.save(onnx.load(str(apart / "model.onnx")), str(whole / "model.onnx"))
    found: list[Any] = []
    for folder in (apart, whole):
        student = OnnxStudent(folder, threads=1)
        found.append(student.option_probabilities(_prompts(student)[0], student.letter_ids(3)))
    assert found[0] == found[1]
