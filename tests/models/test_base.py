"""Base models: where they are found, what is refused and why, and their identity in cache keys."""

import json
from collections.abc import Callable
from pathlib import Path

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
)
from distillery.models.inspect import model_and_adapter
from distillery.recipe import BaseModelRecipe

TinyModel = Callable[[str], Path]


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


def test_remote_code_needs_recipe_and_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}})
    )
    (tmp_path / "model.safetensors").write_bytes(b"")
    name = str(tmp_path)
    with pytest.raises(TrainingError, match="needs Python code of its own"):
        base_folder(BaseModelRecipe(model=name))
    with pytest.raises(TrainingError, match="DISTILLERY_REMOTE_CODE"):
        base_folder(BaseModelRecipe(model=name, trust_remote_code=True))
    monkeypatch.setenv("DISTILLERY_REMOTE_CODE", f"other, {name}")
    with pytest.raises(TrainingError, match="needs Python code"):
        base_folder(BaseModelRecipe(model=name))
    assert base_folder(BaseModelRecipe(model=name, trust_remote_code=True)) == tmp_path


def test_a_hub_models_own_code_is_downloaded_only_where_it_may_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes(b"")

    def snapshot_download(name: str, allow_patterns: list[str], **_options: object) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for listed, trusted in (("", True), ("org/model", False), ("org/model", True)):
        monkeypatch.setenv("DISTILLERY_REMOTE_CODE", listed)
        base = BaseModelRecipe(model="org/model", trust_remote_code=trusted)
        with pytest.raises(TrainingError, match=r"no readable config\.json"):
            base_folder(base)
        assert local_copy(base) == tmp_path
    assert ["*.py" in patterns for patterns in asked] == [False] * 4 + [True] * 2


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
