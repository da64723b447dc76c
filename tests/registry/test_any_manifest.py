"""A manifest.json or an entry of the history that somebody has changed: one line, and what was
written is what is read."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spoilt import one_line, spoilt

from distillery.errors import DataError, RegistryError
from distillery.recipe import PromptRecipe
from distillery.registry.history import PREFIX, events_in
from distillery.registry.manifest import (
    MANIFEST,
    Manifest,
    columns_in,
    manifest_of,
    manifest_text,
    prompt_in,
    verify_before_loading,
)
from distillery.storage.digests import FileEntry
from flows.batch_inference import batch_inference

pytestmark = pytest.mark.security

BUDGET = settings(max_examples=100, deadline=None, database=None, derandomize=True)
"""Inputs that are tried each time, always the same ones."""

PROMPT = PromptRecipe().model_dump(mode="json")

WHOLE = manifest_text(
    Manifest(
        model="mine",
        provenance={"prompt": PROMPT, "recipe": {"dataset": {}}, "seed": 1},
        files=(FileEntry(path="model.onnx", sha256="0" * 64, bytes=3),),
    )
)

KEYS = ("model", "provenance", "prompt", "files", "path", "sha256")

CONTENTS = spoilt(
    WHOLE,
    KEYS,
    "provenance",
    lambda manifest: [manifest, manifest["provenance"], manifest["files"][0]],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@BUDGET
@given(content=CONTENTS)
def test_a_changed_manifest_is_one_line(content: bytes, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(content)
    try:
        found = manifest_of(folder)
        assert found is not None
        columns_in(found.provenance, "mine")
        prompt_in(found.provenance, "mine", classify=True)
    except (RegistryError, DataError) as error:
        one_line(str(error))
    try:
        verify_before_loading(folder)
    except RegistryError as error:
        one_line(str(error))


RECIPES: list[Any] = [
    None,
    [],
    {},
    {"dataset": []},
    {"dataset": None},
    {"dataset": {"columns": 5}},
    {"dataset": {"columns": {}, "fields": 5}},
    {"dataset": {"columns": {}, "fields": [{}]}},
]


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"prompt": {"system": 5}, "recipe": {"dataset": {"columns": {}}}},
        {"prompt": [5], "recipe": {"dataset": {"columns": {}}}},
        *({"prompt": PROMPT, "recipe": recipe} for recipe in RECIPES),
    ],
)
def test_a_model_whose_manifest_does_not_tell_how_it_is_asked_answers_no_file(
    made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Mock()
    registry.get.return_value = SimpleNamespace(name="mine", version="1")
    registry.provenance.return_value = {"provenance": made}
    monkeypatch.setattr("flows.batch_inference.open_registry", lambda _: registry)
    monkeypatch.setattr("flows.batch_inference.begin", lambda: None)
    with pytest.raises(DataError, match=r"mine version 1: .* again$") as caught:
        batch_inference.fn("mine", "rows.jsonl")
    one_line(str(caught.value))


@BUDGET
@given(text=CONTENTS.map(lambda content: content.decode("utf-8", "replace")))
def test_a_changed_entry_of_the_history_is_one_line(text: str) -> None:
    with pytest.raises(RegistryError) as caught:
        events_in({f"{PREFIX}1": text}, "registry")
    one_line(str(caught.value))


@BUDGET
@given(
    provenance=st.dictionaries(
        st.text(max_size=9),
        st.integers(-(2**53), 2**53) | st.text(max_size=9) | st.lists(st.booleans(), max_size=3),
        max_size=4,
    )
)
def test_a_manifest_is_read_as_it_was_written(provenance: dict[str, Any], folder: Path) -> None:
    manifest = Manifest(model="mine", provenance=provenance, files=())
    (folder / MANIFEST).write_bytes(manifest_text(manifest))
    assert manifest_of(folder) == manifest
