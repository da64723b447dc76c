"""What the folder of an exported model may hold and set: it is data, and nothing in it names a
library, a file elsewhere or code that runs.

Checked where a model is registered, downloaded and loaded; of names, only what can run is refused
where it is loaded, since people leave notes beside their models. genai_config.json is the file
that ONNX Runtime GenAI reads first: it can name a library of custom operators, which is native
code.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from distillery.errors import ModelError

CONFIG = "genai_config.json"

SUFFIXES = frozenset(
    {
        *(".onnx", ".data", ".onnx_data", ".onnx_adapter", ".safetensors", ".model", ".tiktoken"),
        *(".json", ".jsonl", ".jinja", ".txt", ".csv", ".yaml", ".yml", ".md", ".png", ".sig"),
        # What the hub's client leaves beside the files that it downloads.
        *(".metadata", ".lock", ".tag"),
    }
)
"""The files of a model, in lower case."""

NAMES = ("license", "notice")
"""What the names of further texts begin with, such as license.apache, in lower case."""

RUNNABLE = frozenset(
    {
        *(".so", ".dll", ".dylib", ".pyd", ".exe", ".com", ".sh", ".bat", ".cmd", ".ps1", ".pyc"),
        *(".pkl", ".pickle", ".joblib", ".dill", ".pt", ".pth", ".ckpt", ".bin"),
    }
)
"""Programs, libraries, and what may be a pickle, in lower case."""

PROGRAMS = (
    *(b"\x7fELF", b"MZ", b"#!", b"\xca\xfe\xba\xbe", b"\xfe\xed\xfa", b"\xce\xfa\xed\xfe"),
    *(b"\xcf\xfa\xed\xfe", b"\x80", b"PK\x03\x04"),
)
"""The first bytes of programs and libraries of Linux, Windows and macOS, of scripts, of pickles,
and of archives, which PyTorch writes."""

CODE = ".py"
"""Python code that an earlier version of Distillery, or Olive, copied from the base model. Nothing
runs it: what loads the folder says trust_remote_code=False or reads no code at all."""

PASSED_OVER = frozenset({".git", ".cache"})
"""Folders of git and of the hub's client, from which no setting can name a file."""


def is_number(value: Any) -> bool:
    """Return whether a value is a number, a truth value or null."""
    return value is None or isinstance(value, int | float)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_plain(value: Any) -> bool:
    """Return whether a value is a number, a text, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return all(is_number(each) or is_text(each) for each in values)


def is_tensors(value: Any) -> bool:
    """Return whether a value is an object with the names of tensors."""
    return isinstance(value, dict) and all(map(is_text, value.values()))


def is_file(value: Any) -> bool:
    """Return whether a value is the name of a file in the folder itself."""
    return isinstance(value, str) and is_within(value) and "/" not in value


def is_within(name: str) -> bool:
    """Return whether `name` names a file below a folder, on whatever system it is read."""
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute() or path.drive or path.root or ".." in path.parts or not path.name:
            return False
    return "\0" not in name


PROVIDER = {
    "device_id": is_plain,
    "enable_cuda_graph": is_plain,
    "enable_skip_layer_norm_strict_mode": is_plain,
    "enableGraphCapture": is_plain,
    "validationMode": is_plain,
    "multiRotaryCacheConcatOffset": is_plain,
}
"""The options of an execution provider that ModelBuilder writes (onnxruntime-genai 0.14.1). Others
name libraries and the paths of files."""

PROVIDERS = ("cpu", "cuda", "CUDA", "dml", "DML", "rocm", "webgpu", "WebGPU", "NvTensorRtRtx")

SESSION = {
    "log_id": is_text,
    "log_severity_level": is_number,
    "log_verbosity_level": is_number,
    "intra_op_num_threads": is_number,
    "inter_op_num_threads": is_number,
    "enable_cpu_mem_arena": is_number,
    "enable_mem_pattern": is_number,
    "graph_optimization_level": is_text,
    "provider_options": [dict.fromkeys(PROVIDERS, PROVIDER)],
}

DECODER = {
    "session_options": SESSION,
    "filename": is_file,
    "head_size": is_number,
    "hidden_size": is_number,
    "num_attention_heads": is_number,
    "num_hidden_layers": is_number,
    "num_key_value_heads": is_number,
    "inputs": is_tensors,
    "outputs": is_tensors,
    "sliding_window": {
        "window_size": is_number,
        "pad_value": is_number,
        "alignment": is_text,
        "slide_key_value_cache": is_number,
        "slide_inputs": is_number,
        "layers": is_plain,
    },
    "layer_types": is_plain,
    "conv_cache_size": is_number,
}

TOKEN_IDS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("image_token_id", "audio_token_id", "boa_token_id", "video_token_id"),
    "vision_start_token_id",
)

SEARCH = (
    *("min_length", "max_length", "num_beams", "num_return_sequences", "top_k", "top_p"),
    *("temperature", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("diversity_penalty", "random_seed", "chunk_size", "do_sample", "past_present_share_buffer"),
    *("early_stopping", "blank_penalty"),
)

SETTINGS = {
    "model": {
        "type": is_text,
        "vocab_size": is_number,
        "context_length": is_number,
        **dict.fromkeys(TOKEN_IDS, is_plain),
        "decoder": DECODER,
    },
    "search": dict.fromkeys(SEARCH, is_number),
}
"""The keys of genai_config.json with a check of each value: what ModelBuilder writes for a language
model, and what ONNX Runtime GenAI reads besides that can neither name a file nor load a library. A
list has objects of one kind."""

_log = logging.getLogger(__name__)


def is_system_file(name: str) -> bool:
    """Return whether a desktop leaves files of this name in folders that it shows."""
    return name.lower() in (".ds_store", "thumbs.db", "desktop.ini") or name.startswith("._")


def check_model_folder(folder: Path) -> None:
    """Raise ModelError for a folder whose files, settings or external data are not those of a
    model. The graphs are read, which takes a second for a gigabyte."""
    check_file_names(folder)
    for path in sorted(folder.rglob(CONFIG)):
        check_settings(path)
    for path in sorted(folder.rglob("*.onnx")):
        check_external_data(path)


def check_before_loading(folder: Path) -> None:
    """Raise ModelError for a folder with a file that can run, or whose settings are not those of a
    model. The graph is not read: ONNX Runtime itself takes no external data from outside of the
    folder."""
    check_settings(folder / CONFIG)
    for path in files_in(folder):
        if can_run(path):
            raise file_error(folder, path)


def leave_code_out(folder: Path) -> None:
    """Remove the Python code below a folder, which nothing runs."""
    for path in sorted(folder.rglob(f"*{CODE}")):
        _log.warning("%s: left out, since a model's folder holds no code", path.name)
        path.unlink()


def check_file_names(folder: Path) -> None:
    """Raise ModelError for a file that is none of a model's, such as a library or a pickle."""
    for path in files_in(folder):
        suffix = path.suffix.lower()
        known = suffix in SUFFIXES or suffix == CODE or path.name.lower().startswith(NAMES)
        if can_run(path) or not (known or not suffix or is_system_file(path.name)):
            raise file_error(folder, path)


def files_in(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, but for those of git and of the hub's client."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_dir() and not PASSED_OVER.intersection(name.parts[:-1]):
            yield path


def can_run(path: Path) -> bool:
    """Return whether a file is a program, a library or a pickle: by its suffix or, where it has
    none, by its first bytes."""
    name = path.name.lower()
    # A library may have its version behind the suffix.
    if {Path(name).suffix, Path(name.rstrip(".0123456789")).suffix} & RUNNABLE:
        return True
    if path.suffix:
        return False
    try:
        with path.open("rb") as file:
            return file.read(4).startswith(PROGRAMS)
    except OSError as error:
        raise ModelError(f"{path}: can't be read ({error.strerror}); remove it") from error


def file_error(folder: Path, path: Path) -> ModelError:
    """Return the error for a file that a model's folder must not hold."""
    name = path.relative_to(folder).as_posix()
    return ModelError(
        f"{folder}: {name}: no file of a model, which holds ONNX files, tokenizers, settings and "
        "texts alone; remove it"
    )


def check_settings(path: Path) -> None:
    """Raise ModelError for a genai_config.json that can't be read or has a key that is not in
    SETTINGS."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=each_key_once)
    except OSError as error:
        raise ModelError(
            f"{path}: can't be read ({error.strerror}); name a folder that export made"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path}: no valid configuration ({type(error).__name__}); export the model again"
        ) from error
    complaint = next(complaints(settings, SETTINGS, ""), None)
    if complaint:
        raise ModelError(f"{path}: {complaint}; remove it, or export the model again")


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises ValueError for a key that stands there twice: this reader
    would take the last, and ONNX Runtime GenAI both."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def complaints(value: Any, allowed: Any, key: str) -> Iterator[str]:
    """Yield what is wrong with the value at `key`, a dotted path. `allowed` is a part of
    SETTINGS."""
    if isinstance(allowed, list):
        for each in value if isinstance(value, list) else [value]:
            yield from complaints(each, allowed[0], key)
    elif isinstance(allowed, dict):
        if not isinstance(value, dict):
            yield f"{key or 'it'} is no object"
            return
        for name, inner in value.items():
            path = f"{key}.{name}".lstrip(".")
            if name in allowed:
                yield from complaints(inner, allowed[name], path)
            else:
                yield f"{path:.200} is no setting that a model's folder may make"
    elif not allowed(value):
        yield f"{key} can't be {str(value)!r:.200}"


def check_external_data(path: Path) -> None:
    """Raise ModelError for an ONNX file with weights in a file outside of its folder. What is no
    ONNX file is passed over: ONNX Runtime does not load it."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        return
    for location in locations(model):
        if not is_within(location):
            raise ModelError(
                f"{path}: its weights are in {location!r:.200}, outside of the folder; export the "
                "model again"
            )


def locations(message: Any) -> Iterator[str]:
    """Yield the files in which tensors of an ONNX message, or of what is in it, are kept."""
    if message.DESCRIPTOR.name == "TensorProto":
        for entry in message.external_data:
            if entry.key == "location":
                yield entry.value
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for each in [value] if hasattr(value, "DESCRIPTOR") else value:
                yield from locations(each)
