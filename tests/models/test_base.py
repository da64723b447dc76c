"""Base models: where they are found, what is refused and why, and their identity in cache keys."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFWriter

from distillery.errors import RecipeError, TrainingError
from distillery.models.base import (
    base_folder,
    base_identity,
    gguf_parsed_once,
    license_in_gguf,
    license_of,
    local_copy,
    remote_code_allowed,
)
from distillery.models.inspect import model_and_adapter
from distillery.models.own_code import code_digest
from distillery.readiness import check_settings
from distillery.recipe import BaseModelRecipe, parse_recipe

TinyModel = Callable[[str], Path]


@pytest.mark.security
@pytest.mark.parametrize("name", ["a\\b.py", "c:a.py", "\udcff.py"])
def test_code_with_a_name_that_is_none_elsewhere_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(TrainingError, match=r"name may have no backslash .*; rename it") as caught:
        code_digest(tmp_path)
    assert "\n" not in str(caught.value)


def test_base_models_that_can_not_be_used_are_one_line(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    with pytest.raises(RecipeError, match="no such folder"):
        base_folder(BaseModelRecipe(model="./nowhere"))
    with pytest.raises(RecipeError, match=r"no such file"):
        base_folder(BaseModelRecipe(model="nothing.gguf"))
    with pytest.raises(RecipeError, match="is not installed"):
        base_folder(BaseModelRecipe(model="package:no_such_package"))
    with pytest.raises(RecipeError, match="the package json holds 0 GGUF files, not one; give"):
        base_folder(BaseModelRecipe(model="package:json"))
    with pytest.raises(RecipeError, match="azureml://registries/REGISTRY"):
        base_folder(BaseModelRecipe(model="azureml://models/Phi"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(TrainingError, match=r"no \.safetensors"):
        base_folder(BaseModelRecipe(model=str(tmp_path)))
    assert base_folder(BaseModelRecipe(model=str(tiny_model("llama")))) == tiny_model("llama")


COMMIT, NEXT = "a" * 40, "b" * 40


def refusal(base: BaseModelRecipe) -> str:
    """Return why a base model is refused, in one line."""
    with pytest.raises(TrainingError) as caught:
        base_folder(base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_model_with_code(folder: Path, **settings: object) -> None:
    auto_map = {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", None]}
    values = {"model_type": "own", "auto_map": auto_map} | settings
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "own.py").write_text("class Config: ...\n")
    (folder / "model.safetensors").write_bytes(b"")


@pytest.mark.security
def test_remote_code_needs_recipe_and_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model_with_code(tmp_path)
    name = str(tmp_path)
    trusted = BaseModelRecipe(model=name, trust_remote_code=True)
    assert "needs Python code of its own" in refusal(BaseModelRecipe(model=name))
    wanted = f"DISTILLERY_REMOTE_CODE as {name}@{code_digest(tmp_path)}"
    assert refusal(trusted).endswith(wanted)
    monkeypatch.setenv("DISTILLERY_REMOTE_CODE", f"other, {name}")
    assert refusal(trusted).endswith(f"then write {name}@{code_digest(tmp_path)}")
    monkeypatch.setenv("DISTILLERY_REMOTE_CODE", f"other, {name}@{code_digest(tmp_path)}")
    assert "needs Python code" in refusal(BaseModelRecipe(model=name))
    assert base_folder(trusted) == tmp_path
    (tmp_path / "model.safetensors").write_bytes(b"other weights are no other code")
    assert base_folder(trusted) == tmp_path
    (tmp_path / "own.py").write_text("class Config: 'changed'\n")
    assert "and name that, or have the recipe's base.revision" in refusal(trusted)
    assert f"{name}@{code_digest(tmp_path)}" in refusal(trusted)


@pytest.mark.security
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_refused_though_the_model_is_named(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model_with_code(tmp_path)
    settings = {
        "model_type": "own",
        "auto_map": {"AutoTokenizer": ["some-one/else--own.Own", None]},
    }
    (tmp_path / file).write_text(json.dumps(settings))
    named = f"{tmp_path}@{code_digest(tmp_path)}"
    monkeypatch.setenv("DISTILLERY_REMOTE_CODE", named)
    said = refusal(BaseModelRecipe(model=str(tmp_path), trust_remote_code=True))
    assert f"{file} takes its Python code from another repository, some-one/else, of" in said


@pytest.mark.security
def test_a_hub_models_own_code_is_downloaded_only_where_it_may_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, bool]] = []
    snapshots = tmp_path / "snapshots"
    for commit in (COMMIT, NEXT):
        (snapshots / commit).mkdir(parents=True)
        write_model_with_code(snapshots / commit)

    def snapshot_download(
        name: str, revision: str | None, allow_patterns: list[str], **_options: object
    ) -> str:
        asked.append((name, "*.py" in allow_patterns))
        # The branch that is called like a commit is at the other one.
        held = NEXT if revision == "c" * 40 else revision or COMMIT
        return str(snapshots / held)

    class Hub:
        def model_info(self, name: str, **_options: object) -> Any:
            return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    base = BaseModelRecipe(model="org/model", trust_remote_code=True)
    for listed, trusted, said in (
        ("", True, f"DISTILLERY_REMOTE_CODE as org/model@{COMMIT}"),
        (f"org/model@{COMMIT}", False, "needs Python code of its own"),
        ("org/model", True, f"read it, then write org/model@{COMMIT}"),
        ("org/model@main", True, f"DISTILLERY_REMOTE_CODE as org/model@{COMMIT}"),
        (f"org/model@{NEXT}", True, f"read the code of org/model@{COMMIT} and name that"),
    ):
        monkeypatch.setenv("DISTILLERY_REMOTE_CODE", listed)
        assert said in refusal(base.model_copy(update={"trust_remote_code": trusted}))
    assert not any(with_code for _, with_code in asked)

    monkeypatch.setenv("DISTILLERY_REMOTE_CODE", f"org/model@{COMMIT}, org/model@{'c' * 40}")
    assert base_folder(base) == snapshots / COMMIT, "the newest commit is the named one"
    assert asked[-1] == ("org/model", True)
    assert not remote_code_allowed(base), "what a branch names is not enough"
    assert "reads" not in refusal(base.model_copy(update={"revision": NEXT}))
    disguised = base.model_copy(update={"revision": "c" * 40})
    assert f"the hub gives the commit {NEXT} for {'c' * 40}" in refusal(disguised)


@pytest.mark.security
def test_a_run_is_told_of_a_name_without_commit_before_it_asks_anyone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = {"model": "org/model", "trust_remote_code": True}
    student = {"start": "base", "base": base}
    recipe = parse_recipe({"teacher": {"kind": "gold"}, "student": student}, "test")
    monkeypatch.setenv("DISTILLERY_REMOTE_CODE", "org/model")
    with pytest.raises(TrainingError, match=r"org/model@COMMIT, which `distillery check` tells$"):
        check_settings(recipe)
    monkeypatch.setenv("DISTILLERY_REMOTE_CODE", f"org/model@{COMMIT}")
    check_settings(recipe)


@pytest.mark.security
def test_a_checkpoint_brings_no_code_that_its_base_model_lacks(tmp_path: Path) -> None:
    base, model = tmp_path / "base", tmp_path / "checkpoint" / "model"
    for folder in (base, model):
        folder.mkdir(parents=True)
        write_model_with_code(folder)
    assert model_and_adapter(tmp_path / "checkpoint", base) == (model, None)
    (model / "own.py").write_text("import os\n")
    with pytest.raises(TrainingError, match=r"own\.py: Python code that the base model does not"):
        model_and_adapter(tmp_path / "checkpoint", base)


@pytest.mark.security
def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    base = BaseModelRecipe(model=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "unused.safetensors").write_bytes(b"")
    assert "no .safetensors in it that Transformers finds" in refusal(base)
    for name in ("pytorch_model.bin", "../model.safetensors"):
        index = {"weight_map": {"w": name}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert f"names {name!r}, which is no .safetensors in its folder" in refusal(base)


def test_a_changed_local_base_model_has_another_identity(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = base_identity(BaseModelRecipe(model=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert base_identity(BaseModelRecipe(model=str(tmp_path))) != before
    assert base_identity(BaseModelRecipe(model="org/model", revision="abc")) == "org/model@abc"


def test_a_checkpoint_without_a_model_stands_on_the_base(tmp_path: Path) -> None:
    base, checkpoint = tmp_path / "base", tmp_path / "checkpoint"
    assert model_and_adapter(checkpoint, base) == (base, None)
    (checkpoint / "adapter").mkdir(parents=True)
    assert model_and_adapter(checkpoint, base) == (base, checkpoint / "adapter")
    (checkpoint / "model").mkdir()
    assert model_and_adapter(checkpoint, base) == (checkpoint / "model", checkpoint / "adapter")


def test_a_base_model_in_a_registry_is_found_where_it_was_downloaded(home: Path) -> None:
    base = BaseModelRecipe(model="azureml://registries/azureml/models/Phi/versions/3")
    assert local_copy(base) is None
    assert base_identity(base) == f"{base.model}@newest"
    folder = home / "models" / "azureml-Phi-3"
    (folder / "artifacts").mkdir(parents=True)
    with pytest.raises(TrainingError, match=r"no config\.json in the downloaded model"):
        local_copy(base)
    (folder / "artifacts" / "config.json").write_text("{}")
    assert local_copy(base) == folder / "artifacts"


def test_the_licence_is_that_which_the_model_names(tmp_path: Path) -> None:
    base, card = BaseModelRecipe(model=str(tmp_path)), tmp_path / "README.md"
    assert license_of(base, tmp_path) is None
    for front_matter, licence in {
        "---\nlicense: mit\n---\n": "mit",
        "---\nlicense: other\nlicense_name: own-terms\n---\n": "own-terms",
        "---\nlicense: [mit\n---\n": None,
        "---\nlanguage: en\n---\n": None,
        "no front matter\n": None,
    }.items():
        card.write_text(front_matter)
        assert license_of(base, tmp_path) == licence


def test_the_licence_in_a_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_license("apache-2.0")
    writer.add_tensor("weights", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = BaseModelRecipe(model=str(file))
    assert license_of(base, tmp_path) == "apache-2.0", "of a conversion that kept none"
    with gguf_parsed_once():
        assert license_in_gguf(file) == "apache-2.0"
        assert gguf.GGUFReader(str(file)) is gguf.GGUFReader(str(file))
    assert gguf.GGUFReader(str(file)) is not gguf.GGUFReader(str(file))
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert license_of(base, tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: null\n---\n")
    assert license_of(base, tmp_path) is None, "kept that it names none"


@pytest.mark.parametrize(
    ("file", "values", "line"),
    [
        ("adapter_config.json", {"base_model_name_or_path": "/elsewhere"}, "an adapter is in it"),
        (
            "config.json",
            {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}},
            "its weights are rounded .*name the model that it was made from",
        ),
    ],
)
def test_a_base_model_is_whole_and_in_floats(
    file: str, values: dict[str, Any], line: str, tmp_path: Path
) -> None:
    """Transformers would load another model in place of the first, and ask the hub for code that
    computes with the second."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(TrainingError, match=line):
        base_folder(BaseModelRecipe(model=str(tmp_path)))
