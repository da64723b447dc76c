"""The contests of how fast a CPU answers: the contestants' answers on a tiny model, and what is
made of their figures. Nothing is timed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from benchmarks import inference, inference_files
from benchmarks.inference import (
    CONTESTS,
    FORMS,
    PEER_NAMES,
    agreement,
    figures,
    prompts_of,
    ratios,
    settings_of,
)
from benchmarks.inference_contestants import (
    TOKENS,
    Ours,
    Row,
    Transformers,
    common_start,
    text_probabilities,
)
from benchmarks.inference_files import NARROWER, apart_rows, missing_peers, narrow, prompted
from distillery.models.load import load_tokenizer
from distillery.prompts import TransformersTokenizer, letter_ids, text_ids
from distillery.recipe import ExportForm, PromptRecipe
from distillery.records import Example

PROMPT = PromptRecipe(user="{choices}\n\n{question}")
EXAMPLES = [
    Example(example_id="1", question="bread?", choices=("oven", "warm river"), answer_key="B"),
    Example(example_id="2", question="a quiet room", choices=("baker", "oven"), answer_key="A"),
    Example(example_id="3", question="Where?", choices=("cloud", "o"), answer_key="A"),
]
RATIOS = (
    "choice_ratio_llama_cpp",
    "choice_ratio_hf",
    "choice_ratio_openvino",
    "file_ratio_hf",
    "file_ratio_openvino",
    "text_ratio_hf",
    "generate_ratio_llama_cpp",
)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Give PyTorch back the threads that it has."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows_of(folder: Path) -> list[Row]:
    tokenizer = TransformersTokenizer(load_tokenizer(folder))
    rows = []
    for example in EXAMPLES:
        row = prompted(example, PROMPT, tokenizer)
        row["letters"] = letter_ids(tokenizer, 2)
        row["texts"] = text_ids(example, tokenizer)
        row["example"] = example.model_dump(mode="json")
        rows.append(row)
    return rows


@pytest.mark.usefixtures("two_threads")
def test_ours_and_transformers_answer_alike(
    tiny_model: Callable[[str], Path], tiny_onnx: Callable[[str], Path]
) -> None:
    folder = tiny_model("llama")
    files = {"base": str(folder), "fp32": str(tiny_onnx("llama")), "prompt": PROMPT.model_dump()}
    rows = rows_of(folder)
    assert len({len(row["prompt"]) for row in rows}) > 1
    assert common_start([row["prompt"] for row in rows]) > 0
    ours = Ours({"precision": "fp32"}, 1, files)
    hf = Transformers({"dtype": "float32", "attention": "sdpa", "batch": 2}, 1, files)
    expected = np.array(ours.choice(rows))
    assert expected.std(0).min() > 1e-4
    np.testing.assert_allclose(ours.file(rows), expected, atol=1e-5)
    np.testing.assert_allclose(hf.file(rows), expected, atol=1e-5)
    np.testing.assert_allclose(hf.text(rows), ours.text(rows), atol=1e-5)
    said = ours.generate(rows)
    assert hf.generate(rows) == said
    assert [len(tokens) for tokens in said] == [TOKENS] * 3

    apart = apart_rows([{**row, "prompt": row["prompt"][1:]} for row in rows])
    for number, row in enumerate(apart):
        row["prompt"][0] = number
    assert common_start([row["prompt"] for row in apart]) == 0
    np.testing.assert_allclose(hf.choice(apart), ours.choice(apart), atol=1e-5)


def test_a_texts_score_is_the_mean_of_its_tokens() -> None:
    # After the prompt, token 0 has 1/2 and tokens 1 and 2 have 1/4; after token 1, token 2 has 1/2.
    first = np.log(np.array([2, 1, 1], np.float32))
    after = np.log(np.array([[[9, 9, 9]], [[1, 1, 2]]], np.float32))
    found = text_probabilities(first, after, [[0], [1, 2]])
    scores = np.array([1 / 2, (1 / 4 * 1 / 2) ** 0.5])
    np.testing.assert_allclose(found, scores / scores.sum(), atol=1e-6)


def test_prompts_apart_share_nothing() -> None:
    rows: list[Row] = [{"prompt": [1, 2, 3]}, {"prompt": [1, 2, 4]}]
    found = prompts_of({"choice": rows, "apart": apart_rows(rows)})
    assert found == {
        "choice": {"rows": 2, "tokens": 3, "begin_alike": 2},
        "apart": {"rows": 2, "tokens": 4, "begin_alike": 0},
    }


def test_the_forms_are_of_the_recipe_and_of_different_names() -> None:
    titles = {ExportForm(**settings).title for settings in FORMS}
    assert len(titles) == len(FORMS)
    algorithms = get_args(ExportForm.model_fields["algorithm"].annotation)
    assert ("dynamic" in algorithms) == any(one["algorithm"] == "dynamic" for one in FORMS)


def test_batches_are_allowed_in_a_file_alone() -> None:
    for name, contest in ((name, contest) for name in PEER_NAMES for contest in CONTESTS):
        batches = {settings.get("batch", 1) for settings in settings_of(name, contest)}
        assert (max(batches) > 1) == (contest == "file"), (name, contest)
    assert settings_of("ours", "file") == FORMS
    assert {"weights": "Q8_0", "batch": 1} in settings_of("llama_cpp", "file")


def one(speed: float, answers: Any, **others: float) -> dict[str, Any]:
    return {"load_s": 1.0, "rss_mb": 1.0, "cores_busy": 1.0, **others} | {
        "speed": speed,
        "answers": answers,
    }


def test_figures_are_medians_and_agreement() -> None:
    answers = [[0.75, 0.25], [0.5, 0.5]]
    runs = [one(3.0, answers), one(90.0, [], rss_mb=50.0), one(4.004, [], rss_mb=40.0)]
    found = figures(runs, [[0.25, 0.75], [0.5, 0.5]], [{"gold": 0}, {"gold": 1}])
    assert found == {
        "speed": 4.0,
        "load_s": 1.0,
        "rss_mb": 40.0,
        "cores_busy": 1.0,
        "accuracy": 0.5,
        "same_answer": 0.5,
        "from_fp32": 0.25,
    }


def test_tokens_agree_up_to_the_first_other_one() -> None:
    said = [[7] * TOKENS, [7] * 16 + [8] + [7] * (TOKENS - 17)]
    assert agreement(said, [[7] * TOKENS] * 2, []) == {"same_answer": 0.625}


def test_ratios_have_all_names_and_null_for_what_was_not_asked() -> None:
    found = ratios(
        {
            "choice": {1: {"ours": {"speed": 3.0}, "hf": {"speed": 2.0}}},
            "text": {2: {"ours": {"speed": 1.0}, "openvino": {"speed": 4.0}}},
        }
    )
    assert {name: ratio for name, ratio in found.items() if ratio} == {
        "choice_ratio_hf": 1.5,
        "text_ratio_openvino_2": 0.25,
    }
    for name in RATIOS:
        assert name in found
        assert f"{name}_2" in found


def test_a_missing_peer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_files, "PEERS", tmp_path)
    told = missing_peers()
    assert set(told) == {"llama_cpp", "openvino"}
    assert "run `make bench-inference`" in told["openvino"]

    (tmp_path / "openvino.py").write_text("")
    (tmp_path / "llama_cpp.py").write_text("raise OSError('built for another processor')")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncd {tmp_path}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    told = missing_peers()
    assert list(told) == ["llama_cpp"]
    assert "built for another processor" in told["llama_cpp"]


def test_a_contestant_that_is_missing_does_not_compete(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(
        self: Any, name: str, settings: Any, threads: int, contest: str, rows: list[Row]
    ) -> dict[str, Any]:
        asked.append((name, len(rows)))
        speed = 2.0 if settings.get("weights") == "Q4_1" else 1.0
        return one(speed, [[1.0]] * len(rows))

    monkeypatch.setattr(inference.Bench, "run", run)
    bench = inference.Bench(["ours", "llama_cpp"], {}, {"choice": [{"prompt": [1]}] * 60}, {})
    bench.rows["apart"] = bench.rows["choice"]
    chosen = bench.choose("choice", 1)
    assert chosen == {"ours": FORMS[0], "llama_cpp": {"weights": "Q4_1"}}
    assert {count for _, count in asked} == {CONTESTS["choice"].trial_rows}
    trials = len(asked)
    # They serve for `apart` too.
    assert bench.choose("apart", 1) == chosen
    runs = bench.compete("apart", 1, chosen)
    assert {name: len(done) for name, done in runs.items()} == {"ours": 3, "llama_cpp": 3}
    names = [name for name, _ in asked[trials:]]
    assert names == ["ours", "llama_cpp", "llama_cpp", "ours", "ours", "llama_cpp"]


ASK_CPUID = """
#include <cpuid.h>
#include <pthread.h>
#include <stdio.h>

static void *tell(void *nothing) {
    unsigned eax, ebx, ecx, edx;
    __cpuid_count(7, 0, eax, ebx, ecx, edx);
    printf("%u %u %u ", ebx, ecx, edx);
    __cpuid_count(7, 1, eax, ebx, ecx, edx);
    printf("%u\\n", eax);
    return nothing;
}

int main(void) {
    tell(NULL);
    pthread_t thread;
    pthread_create(&thread, NULL, tell, NULL);
    pthread_join(thread, NULL);
}
"""
"""A program that prints EBX, ECX and EDX of CPUID's leaf 7 and EAX of its subleaf 1, as its first
thread sees them and then as a second one does."""

AVX512 = (0xDC230000, 0x00005842, 0x0000010C, 0)
AFTER_VNNI = (0, 0, 0x03C00000, 0x00A00030)
"""AMX, AVX-VNNI, and AVX-512 for bfloat16 and float16."""
HIDDEN = {
    "avx2": [a | b for a, b in zip(AVX512, AFTER_VNNI, strict=True)],
    "avx512_vnni": list(AFTER_VNNI),
}


@pytest.fixture
def files_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (inference, inference_files):
        monkeypatch.setattr(module, "PLACE", tmp_path)
    return tmp_path


def can_hide() -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "cpuid_fault" in flags.read_text() and bool(shutil.which("cc"))


@pytest.mark.parametrize("processor", NARROWER)
def test_a_narrower_processor_lacks_the_newer_sets(processor: str, files_in_tmp: Path) -> None:
    if not can_hide():
        told = f"error: --processor {processor} does not work on this machine: "
        with pytest.raises(SystemExit, match=told):
            narrow(processor)
        return
    program = files_in_tmp / "ask"
    source = program.with_suffix(".c")
    source.write_text(ASK_CPUID)
    subprocess.run(["cc", str(source), "-pthread", "-o", str(program)], check=True)

    def asked(environment: dict[str, str]) -> list[list[int]]:
        told = subprocess.check_output([program], env=os.environ | environment, text=True)
        return [list(map(int, line.split())) for line in told.splitlines()]

    own = asked({})
    expected = [bits & ~hidden for bits, hidden in zip(own[0], HIDDEN[processor], strict=True)]
    narrowed = narrow(processor)
    assert asked(narrowed) == [expected] * 2
    assert asked({}) == own

    # A fault that has nothing to do with it ends the process, as ever.
    crash = [sys.executable, "-c", "import ctypes; ctypes.string_at(0)"]
    assert subprocess.run(crash, env=os.environ | narrowed).returncode == -11


@pytest.mark.usefixtures("files_in_tmp")
def test_a_machine_that_can_hide_nothing_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = "^error: --processor avx2 does not work on this machine: "
    if can_hide():
        with pytest.raises(SystemExit, match="machine: NARROW_PROCESSOR must be avx2 or avx512_vn"):
            narrow("avx1024")
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=refused + r"narrow_processor\.c does not compile"):
        narrow("avx2")
    if can_hide():
        compiler.write_text(f"#!/bin/sh\n: > {tmp_path}/narrow_processor.so\n")
        with pytest.raises(SystemExit, match=refused + "ERROR: ld.so: object .* cannot be preloa"):
            narrow("avx2")
    compiler.unlink()
    with pytest.raises(SystemExit, match=refused + "there is no C compiler"):
        narrow("avx2")


def test_contestants_run_in_the_environment(
    files_in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "PEERS", files_in_tmp)
    python = files_in_tmp / "python"
    python.write_text("""#!/bin/sh\necho '{"answers": "'$NARROW_PROCESSOR'"}'\n""")
    python.chmod(0o755)
    bench = inference.Bench([], {}, {}, {"NARROW_PROCESSOR": "avx2"})
    assert bench.run("openvino", {}, 1, "choice", []) == {"answers": "avx2"}
