"""A model's folder is data: what it may hold and set, where it is registered, downloaded and
loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillery.errors import ModelError, RegistryError
from distillery.inference.decoder import Decoder, read_config
from distillery.models.onnx_folder import check_model_folder, check_settings, leave_code_out
from distillery.records import RegisteredModel
from distillery.registry.base import OtherModel
from distillery.registry.local import LocalRegistry
from distillery.registry.manifest import copy_with_manifest, manifest_tags, verify_before_loading
from distillery.storage.digests import sha256_of

pytestmark = pytest.mark.security

LIBRARY = {"custom_ops_library": "evil.so"}


def settings(**decoder: Any) -> dict[str, Any]:
    """Return a genai_config.json as ModelBuilder writes it, with some keys of the decoder."""
    return {
        "model": {
            "bos_token_id": 1,
            "context_length": 8192,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": 64,
                "hidden_size": 576,
                "inputs": {"input_ids": "input_ids", "past_key_names": "past_key_values.%d.key"},
                "outputs": {"logits": "logits"},
                "num_attention_heads": 9,
                "num_hidden_layers": 30,
                "num_key_value_heads": 3,
                **decoder,
            },
            "eos_token_id": [2, 7],
            "pad_token_id": None,
            "type": "llama",
            "vocab_size": 49152,
        },
        "search": {"do_sample": False, "early_stopping": True, "max_length": 8192, "top_p": 1.0},
    }


def session(**options: Any) -> dict[str, Any]:
    return settings(session_options={"log_id": "x", "provider_options": [], **options})


def write(folder: Path, values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "genai_config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_what_model_builder_writes_is_accepted(tmp_path: Path) -> None:
    window = {"window_size": 128, "slide_key_value_cache": False, "slide_inputs": False}
    cuda = {"cuda": {"enable_cuda_graph": "0", "enable_skip_layer_norm_strict_mode": "1"}}
    for values in (
        settings(),
        settings(sliding_window={**window, "layers": [0, 2]}),
        settings(layer_types=["conv", "full_attention"], conv_cache_size=3),
        session(provider_options=[cuda, {"dml": {}}], intra_op_num_threads=2),
        {"model": {**settings()["model"], "image_token_id": 10}, "search": {}},
        # What stands for a model in tests of registries.
        {},
    ):
        check_model_folder(write(tmp_path, values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (session(custom_ops_library="/tmp/evil.so"), "session_options.custom_ops_library is no"),
        (session(**{"session.model_external_initializers_file_folder_path": "/"}), "is no setting"),
        (session(**{"ep.context_file_path": "/etc/x"}), "session_options.ep.context_file_path is"),
        (session(enable_profiling="/tmp/written"), "session_options.enable_profiling is no"),
        (session(provider_options=[{"qnn": {"backend_path": "evil.so"}}]), "options.qnn is no"),
        (session(provider_options=[{"cuda": {"library_path": "e"}}]), "cuda.library_path is no"),
        (session(provider_options={"vitisai": {}}), "provider_options.vitisai is no setting"),
        (settings(filename="../../model.onnx"), "decoder.filename can't be '../../model.onnx'"),
        (settings(filename="/etc/model.onnx"), "decoder.filename can't be '/etc/model.onnx'"),
        (settings(filename="https://host/model.onnx"), "decoder.filename can't be 'https:"),
        (settings(filename="..\\model.onnx"), "decoder.filename can't be"),
        (settings(filename="C:model.onnx"), "decoder.filename can't be 'C:model.onnx'"),
        (settings(filename=["model.onnx"]), "decoder.filename can't be"),
        (settings(pipeline=[{"one": {"filename": "a"}}]), "model.decoder.pipeline is no setting"),
        (settings(adapter_filename="../a"), "model.decoder.adapter_filename is no setting"),
        (settings(inputs={"input_ids": {"a": 1}}), "decoder.inputs can't be"),
        ({"model": {"vision": {"filename": "v.onnx"}}}, "model.vision is no setting"),
        ({"model": {"speech": {"config_filename": "/s"}}}, "model.speech is no setting"),
        ({"model": {"decoder": 3}}, "model.decoder is no object"),
        ({"engine": {}}, "engine is no setting"),
        ([1], "it is no object"),
    ],
)
def test_a_setting_that_reaches_out_of_the_folder_is_refused_before_it_is_loaded(
    values: Any, said: str, tmp_path: Path, tiny_onnx: Callable[..., Path]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_onnx("llama"), folder)
    write(folder, values)
    with pytest.raises(ModelError) as caught:
        Decoder(folder, threads=1)
    assert said in str(caught.value)
    assert "remove it, or export the model again" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"model": {"decoder": {"filename": "a.onnx", "filename": "../b.onnx"}}}',
        '{"model": ' + '{"a":' * 30_000,
        "\ufeff{}",
        "{} {}",
    ],
    ids=["twice", "deep", "mark", "rest"],
)
def test_settings_that_two_readers_may_take_otherwise_are_refused(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "genai_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"no valid configuration \(\w+Error\)"):
        check_settings(tmp_path / "genai_config.json")


@pytest.mark.parametrize(
    "name",
    [
        *("evil.so", "evil.dll", "evil.so.1", "model.pkl", "pytorch_model.bin", "in/state.PT"),
        *("license.so", "._evil.so", "run.ps1"),
    ],
)
def test_a_file_that_is_none_of_a_models_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path, settings())
    for known in ("model.onnx.data", "LICENSE", ".gitattributes", "merges.txt", "tokenizer.json"):
        (tmp_path / known).write_bytes(b"")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    read_config(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=f"{name}: no file of a model"):
        read_config(tmp_path)
    with pytest.raises(ModelError, match=f"{name}: no file of a model"):
        check_model_folder(tmp_path)


SYSTEM = (".DS_Store", "Thumbs.db", "desktop.ini", "._model.onnx", "in/._x")
NOTES = ("README", "COPYING", "in/VERSION")
OTHERS = ("nohup.out", "events.log", "rows.parquet", "features.npz")


def test_what_desktops_and_people_leave_in_a_folder_keeps_no_model_from_loading(
    tmp_path: Path,
) -> None:
    write(tmp_path, settings())
    (tmp_path / "in").mkdir()
    for name in (*SYSTEM, *NOTES):
        (tmp_path / name).write_bytes(b"Mine, see\n")
    read_config(tmp_path)
    check_model_folder(tmp_path)
    for name in OTHERS:
        (tmp_path / name).write_bytes(b"PK\3\4")
        read_config(tmp_path)
        with pytest.raises(ModelError, match=f"{name}: no file of a model"):
            check_model_folder(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    "start", [b"\x7fELF\2", b"MZ\x90", b"\xcf\xfa\xed\xfe", b"#!/bin/sh", b"\x80\4\x95", b"PK\3\4"]
)
def test_a_program_without_a_suffix_is_refused(start: bytes, tmp_path: Path) -> None:
    write(tmp_path, settings())
    (tmp_path / "README").write_bytes(start)
    for check in (read_config, check_model_folder):
        with pytest.raises(ModelError, match="README: no file of a model"):
            check(tmp_path)


def test_what_a_desktop_adds_to_a_downloaded_model_is_no_change_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "down"
    copy_with_manifest(write(tmp_path / "model", settings()), folder, "student", {})
    (folder / ".DS_Store").write_bytes(b"")
    verify_before_loading(folder)
    (folder / "merges.txt").write_bytes(b"")
    with pytest.raises(RegistryError, match=r"merges\.txt: missing, added or altered"):
        verify_before_loading(folder)


def external(folder: Path, location: str) -> None:
    """Write an ONNX file whose weight is in another file: in a branch of the graph, where a reader
    of the graph's own weights does not see it."""
    from onnx import TensorProto, helper

    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    weight.data_location = TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", location
    shape = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    branch = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])], "b", [], [shape], [weight]
    )
    node = helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [1])
    result = helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])
    model = helper.make_model(helper.make_graph([node], "g", [condition], [result]))
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def test_external_data_stays_in_the_folder(tmp_path: Path) -> None:
    external(tmp_path, "model.onnx.data")
    check_model_folder(tmp_path)
    (tmp_path / "other.onnx").write_text("no ONNX file, which nothing loads")
    check_model_folder(tmp_path)
    for location in ("../secret", "/etc/passwd", "a/../../b", "..\\x", "C:\\x", ""):
        external(tmp_path, location)
        with pytest.raises(ModelError, match=r"model\.onnx: its weights are in .* outside of"):
            check_model_folder(tmp_path)


def test_onnx_runtime_itself_takes_no_external_data_from_elsewhere(tmp_path: Path) -> None:
    import onnxruntime

    (tmp_path / "secret").write_bytes(bytes(16))
    external(tmp_path / "model", "../secret")
    runtime: Any = onnxruntime
    with pytest.raises(Exception, match=r"outside the directory|External data path"):
        runtime.InferenceSession(
            tmp_path / "model" / "model.onnx", providers=["CPUExecutionProvider"]
        )


def test_code_of_another_model_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenization_own.py", "tokenizer/own.py", "tokenizer/tokenizer.json"):
        (tmp_path / name).write_text("")
    leave_code_out(tmp_path)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["tokenizer.json"]


class OthersModels(LocalRegistry):
    """A registry with models that others registered; `folder` is the files of each."""

    folder = Path()

    def fetch_other_files(self, model: OtherModel, folder: Path) -> None:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)


def test_a_model_of_others_is_checked_when_it_is_downloaded(tmp_path: Path, home: Path) -> None:
    registry, theirs = OthersModels(), OtherModel(name="theirs", version="3", uri="")
    registry.folder = write(tmp_path / "files", settings())
    (registry.folder / "configuration_own.py").write_text("import os")
    target = registry.download_other(theirs, tmp_path / "down")
    assert [path.name for path in target.iterdir()] == ["genai_config.json"]
    for name, values in (("evil.so", settings()), ("notes.md", session(**LIBRARY))):
        (registry.folder / name).write_text("")
        write(registry.folder, values)
        with pytest.raises(RegistryError, match=r"theirs version 3(: |/)"):
            registry.download_other(theirs, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
        (registry.folder / name).unlink()


def registered_by_an_intruder(folder: Path, home: Path) -> RegisteredModel:
    """Return a version whose files and tags someone wrote who may write to registry and store, but
    runs nothing."""
    registry, scratch = LocalRegistry(), home / "scratch"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distillery.registry.manifest.check_content", lambda *_: None)
        manifest = copy_with_manifest(folder, scratch, "student", {})
    digest = sha256_of(scratch / "manifest.json")
    uri = registry.store_folder(scratch, "student", digest)
    return registry.add_version("student", uri, manifest_tags(manifest, digest))


@pytest.mark.usefixtures("own_registry")
def test_a_planted_model_is_neither_registered_nor_downloaded(tmp_path: Path, home: Path) -> None:
    library, file, weights = tmp_path / "library", tmp_path / "file", tmp_path / "weights"
    write(library, session(**LIBRARY))
    write(file, settings())
    (file / "evil.so").write_bytes(b"")
    write(weights, settings())
    external(weights, "../../secret")
    for number, folder in enumerate((library, file, weights), 1):
        with pytest.raises(RegistryError) as caught:
            LocalRegistry().register(folder, "student", {}, {})
        assert str(folder) in str(caught.value), "not a temporary copy of it"

        model = registered_by_an_intruder(folder, home)
        with pytest.raises(RegistryError, match=f"student version {number}") as caught:
            LocalRegistry().download(model, tmp_path / "down")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "down").exists()
    assert len(LocalRegistry().list()) == 3, "the intruder's alone"
