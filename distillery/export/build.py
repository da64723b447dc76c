"""Build a checkpoint into a folder that ONNX Runtime GenAI loads; Olive merges the adapter,
quantises and builds.

Files in: a Transformers folder in safetensors, and an adapter's folder. Files out:
genai_config.json, model.onnx, the tokenizer's files, format.json and drafts.json for a model that
writes its answers and, with `export.adapter_apart`, adapter_weights.onnx_adapter.
"""

import json
import shutil
from pathlib import Path

from distillery.data.examples import read_format, write_format
from distillery.errors import ExportError, ModelError
from distillery.export.eight_bits import multiply_in_8_bits
from distillery.export.fit import misfit
from distillery.export.head import keep_rows
from distillery.export.passes import export_passes
from distillery.inference.decoder import ADAPTER_FILE
from distillery.inference.onnx_student import OnnxStudent
from distillery.models.class_tokens import read_class_tokens
from distillery.models.drafts import FILE as DRAFTS_FILE
from distillery.models.load import end_of_turn_id, load_tokenizer
from distillery.models.onnx_folder import CODE, CONFIG
from distillery.progress import ShowProgress, show_nothing
from distillery.recipe import ExportForm
from distillery.storage.working import working_folder

TRIAL = [{"role": "user", "content": "Which comes first?\n(A) one\n(B) two"}]


def export(
    model: Path,
    adapter: Path | None,
    form: ExportForm,
    out: Path,
    remote_code: bool = False,
    calibration: Path | None = None,
    progress: ShowProgress = show_nothing,
) -> None:
    """Build `model`, with a LoRA `adapter` or without, into `out`, and ask it one question.

    `calibration` is a file of prompts for gptq, each line a JSON list of token ids. `progress` is
    shown the passes that are done. Raises ExportError where the form does not fit, nothing was
    built, or what was built does not load or answer."""
    from distillery.olive_workflow import run_workflow

    classes, answer_format = read_class_tokens(adapter or model), read_format(adapter or model)
    if classes and classes.pooled:
        form = form.model_copy(update={"all_logits": True})
    if form.adapter_apart and form.precision == "int8" and not form.dynamic:
        raise ExportError(
            f"export.adapter_apart: not with precision int8 and algorithm {form.algorithm}; "
            "use algorithm: dynamic, or precision int4, fp16 or fp32"
        )
    if form.adapter_apart and adapter is None:
        raise ExportError(
            "export.adapter_apart is true, but full training leaves no adapter; "
            "use training.method: lora"
        )
    complaint = misfit(form, json.loads((model / "config.json").read_text()))
    if complaint:
        raise ExportError(complaint)
    input_model = {
        "model_path": str(model),
        "adapter_path": str(adapter) if adapter else None,
        # Merged in bfloat16, the adapter would be rounded, and the student not the one scored.
        "load_kwargs": {"trust_remote_code": remote_code, "torch_dtype": "float32"},
    }
    passes = export_passes(form, model, adapter is not None, remote_code, calibration)
    with working_folder("export") as built:
        run_workflow(input_model, passes, built, progress=progress)
        if not (built / "model").is_dir():
            raise ExportError("Olive produced no model folder")
        # Olive's own record of the build names this machine's folders. Neither that nor the code
        # that a base model may bring along is read by anything.
        needless = shutil.ignore_patterns("model_config.json", f"*{CODE}", "__pycache__")
        shutil.copytree(built / "model", out, dirs_exist_ok=True, ignore=needless)
    if form.dynamic:
        progress(len(passes), len(passes), "quantising activations")
        multiply_in_8_bits(out)
    if classes:
        if classes.pooled and keep_rows(out, classes.tokens):
            numbers = tuple(range(len(classes.tokens)))
            classes = classes.model_copy(update={"tokens": numbers})
        classes.write(out)
    if answer_format:
        write_format(out, answer_format)
        if (drafts := (adapter or model) / DRAFTS_FILE).is_file():
            shutil.copyfile(drafts, out / DRAFTS_FILE)
        end_with(out, end_of_turn_id(load_tokenizer(model, remote_code)))
    progress(len(passes), len(passes), "asking one question")
    check_built(out, form)


def end_with(folder: Path, token: int) -> None:
    """Let `token` end an answer too: base models whose settings name another one have learnt to end
    their answers with it."""
    path = folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    named = config["model"]["eos_token_id"]
    ends = named if isinstance(named, list) else [named]
    if token not in ends:
        config["model"]["eos_token_id"] = [*ends, token]
        text = json.dumps(config, indent=4) + "\n"
        path.write_text(text, encoding="utf-8", newline="\n")


def check_built(folder: Path, form: ExportForm) -> None:
    """Raise ExportError where a file is missing or the model does not answer."""
    names = ["genai_config.json", "model.onnx"]
    if form.adapter_apart:
        names.append(ADAPTER_FILE)
    for name in names:
        if not (folder / name).is_file():
            raise ExportError(f"Olive produced no {name}")
    try:
        ask_once(folder)
    except ModelError as error:
        raise ExportError(f"the exported model does not answer: {error}") from error


def ask_once(folder: Path) -> None:
    """Load a model's folder and ask one question. Raises ModelError where that fails or a score is
    not a finite number."""
    import numpy as np

    student = OnnxStudent(folder, threads=1)
    scores = student.next_token_logprobs(student.tokenizer.encode_chat(TRIAL))
    if not np.isfinite(scores).all():
        raise ModelError(f"{folder}: its scores are no finite numbers")
