"""Files that a recipe or a data set of the hub names, and that a worker must not open for them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_stand_in import NAME, HubStandIn

from distillery.data.classes import named_classes
from distillery.data.hub import CARDS, check_builder, check_card, check_name, load_from_hub
from distillery.data.readers import read_files
from distillery.data.source import matching_files, open_source, source_identity
from distillery.errors import DataError, DistilleryError, RecipeError
from distillery.labels.quote import named_tokenizer
from distillery.models.base import asks_hub, base_identity, local_source
from distillery.recipe import (
    BaseModelRecipe,
    DatasetRecipe,
    OtherRecipe,
    TaskRecipe,
    TeacherRecipe,
)
from distillery.settings import RUN_OF_A_WORKER
from distillery.teacher.identity import teacher_identity

pytestmark = pytest.mark.security

SECRET = "the-secret-line"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "elsewhere" / "secret.csv"
    file.parent.mkdir()
    file.write_text(f"text,label\n{SECRET},a\n")
    (file.parent / "config.json").write_text("{}")
    (file.parent / "model.gguf").write_text(SECRET)
    return file


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv(RUN_OF_A_WORKER, "6d2f6a0e-0000-4000-8000-000000000000")
    return folder


def files(*paths: str) -> DatasetRecipe:
    return DatasetRecipe(source="files", files={"pool": paths})


@pytest.mark.parametrize(
    "what",
    [
        *("files", "folder", "pattern", "corrections", "other", "labels", "teacher", "tokenizer"),
        *("base", "gguf", "rows"),
    ],
)
def test_no_setting_of_a_recipe_opens_a_file_elsewhere(
    what: str, worker: Path, secret: Path
) -> None:
    file, folder = str(secret), str(secret.parent)
    other = OtherRecipe(files=(file,))
    attempts: dict[str, Callable[[], object]] = {
        "files": lambda: source_identity(files(file)),
        "folder": lambda: open_source(files(folder)),
        "pattern": lambda: open_source(files(f"{folder}/*.csv")),
        "corrections": lambda: source_identity(DatasetRecipe(corrections=(file,))),
        "other": lambda: source_identity(DatasetRecipe(), other),
        "labels": lambda: named_classes(TaskRecipe(kind="classify", labels=file)),
        "teacher": lambda: teacher_identity(TeacherRecipe(kind="file", files=(file,)), None),
        "tokenizer": lambda: named_tokenizer(TeacherRecipe(tokenizer=folder)),
        "base": lambda: base_identity(BaseModelRecipe(model=folder)),
        "gguf": lambda: local_source(f"{folder}/model.gguf"),
        "rows": lambda: list(read_files("teacher.files", [file])),
    }
    with pytest.raises(DistilleryError, match="this worker may not open it") as caught:
        attempts[what]()
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["*.csv", "**/*.csv", "*/../../elsewhere/*.csv", "l*/*.csv"])
def test_a_pattern_does_not_lead_out_by_what_it_matches(
    pattern: str, worker: Path, secret: Path
) -> None:
    (worker / "link.csv").symlink_to(secret)
    (worker / "links").symlink_to(secret.parent)
    with pytest.raises(DataError) as caught:
        matching_files(pattern, "dataset.files.train")
    assert "this worker may not open it" in str(caught.value)


def test_a_worker_reads_rows_below_its_folder(worker: Path, secret: Path) -> None:
    (worker / "rows").mkdir()
    (worker / "rows" / "a.csv").write_text("text\na\n")
    (worker / "rows" / "b.csv").symlink_to(worker / "rows" / "a.csv")
    found = matching_files("rows/*.csv", "x")
    assert [Path(name).name for name in found] == ["a.csv", "b.csv"]
    assert [next(table.rows)[1] for table in read_files("x", found)] == [{"text": "a"}] * 2


@pytest.mark.parametrize("name", ["~nobody/model", "a\0b", "x" * 5000, "./none", "/none.gguf"])
def test_a_base_model_that_is_no_path_is_one_line(name: str, worker: Path) -> None:
    assert not asks_hub(BaseModelRecipe(model=name, revision="1" * 40))
    if name.startswith((".", "/", "~")):
        with pytest.raises(RecipeError, match=r"^base\.model: [^\n]*$"):
            local_source(name)
    else:
        assert local_source(name) is None


@pytest.mark.parametrize(
    "name",
    [
        *("here", "csv", "json", "text", "imagefolder", "parquet", "/etc", "./here", "../data"),
        *("a/b/c", "hf://datasets/a/b", "buckets/a/b", "https://a.example/b", "~", "a\\b", "a b"),
        *("a/..", "..", "zip://a.csv::b", "here/rows", "a/b\0"),
    ],
)
def test_a_name_on_the_hub_is_no_local_folder_and_no_reader(name: str, worker: Path) -> None:
    (worker / "here").mkdir()
    (worker / "here" / "rows").mkdir()
    with pytest.raises(DataError, match=r"^dataset\.name: [^\n]*$"):
        load_from_hub(name, None, "1" * 40)
    with pytest.raises(DataError, match=r"^dataset\.name: "):
        source_identity(DatasetRecipe(source="hub", name=name, revision="1" * 40))


@pytest.mark.parametrize("name", ["tau/commonsense_qa", "squad", "a-b/c.d_e"])
def test_a_name_on_the_hub_is_one(name: str, worker: Path) -> None:
    check_name(name)


def test_a_worker_loads_only_the_data_sets_that_are_named(
    worker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_DATA_PROTOCOLS", "file,hf://datasets/org")
    check_name("org/rows")
    with pytest.raises(DataError, match="this worker may not load it"):
        check_name("tau/commonsense_qa")


@pytest.fixture(scope="module")
def server() -> Iterator[HubStandIn]:
    with HubStandIn({"train": [{"id": "a"}]}) as server:
        yield server


@pytest.fixture
def hub(server: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubStandIn:
    """A hub whose data set has no card yet, and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for file in CARDS:
        server.files.pop(file, None)
    return server


@pytest.mark.parametrize(
    "named",
    [
        "data_files: /etc/passwd",
        "data_files: '{secret}'",
        "data_files: [data/*.parquet, http://internal/a.csv]",
        "data_files: [{split: train, path: ['../../../*.csv']}]",
        "data_files: {train: 'zip://*.csv::/a.zip'}",
        "data_files: C:\\a.csv",
        "data_dir: /etc",
        "data_dir: ../../elsewhere",
    ],
)
def test_a_card_that_names_other_files_is_refused_before_they_are_looked_for(
    named: str, hub: HubStandIn, secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = f"- config_name: default\n  {named.replace('{secret}', str(secret))}\n"
    hub.files["README.md"] = f"---\nlicense: mit\nconfigs:\n{entry}---\n# Rows\n".encode()
    with pytest.raises(DataError, match="its card names files outside the data set") as caught:
        check_card(NAME, hub.commit)
    assert SECRET not in str(caught.value)
    hub.files[".huggingface.yaml"] = f"configs:\n{entry}".encode()
    del hub.files["README.md"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "again"))
    with pytest.raises(DataError, match="its card names files outside the data set"):
        check_card(NAME, hub.commit)


def test_a_card_that_names_its_own_files_is_read(hub: HubStandIn) -> None:
    own = "configs:\n- config_name: default\n  sep: '::'\n  data_files: data/train-*\n"
    hub.files["README.md"] = f"---\n{own}---\nSee https://example.org\n".encode()
    check_card(NAME, hub.commit)
    hub.files[".huggingface.yaml"] = b"configs: [["
    check_card(NAME, hub.commit)


def builder(reader: str, *paths: str) -> object:
    made = type("Builder", (), {"config": SimpleNamespace(data_files={"train": list(paths)})})
    made.__module__ = f"datasets.packaged_modules.{reader}.{reader}"
    return made()


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd.csv", "http://internal/a.csv", "zip://a.csv::hf://datasets/a/b@1/a.zip"),
        *("hf://datasets/c/d@1/a.csv", "hf://datasets/a/b@1/../../c/d@1/a.csv"),
        "hf://datasets/a/b@1/a.zip::/etc/a",
    ],
)
def test_what_is_found_outside_the_data_set_is_not_read(path: str) -> None:
    with pytest.raises(DataError, match="its card names files outside the data set"):
        check_builder("a/b", builder("csv", "hf://datasets/a/b@1/rows.csv", path))


def test_readers_that_lead_elsewhere_are_not_used() -> None:
    check_builder("a/b", builder("csv", "hf://datasets/a/b@1/rows.csv"))
    check_builder("a/b", builder("parquet", "hf://datasets/a/b@refs%2Fconvert%2Fparquet/0.parquet"))
    for reader in ("pandas", "iceberg", "webdataset"):
        with pytest.raises(DataError, match=f"its files are read as {reader}"):
            check_builder("a/b", builder(reader))
