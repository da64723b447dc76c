"""What a worker's run may open of what its parameters name, and a run on the command line too."""

import os
from pathlib import Path

import pytest

from distillery.data.classes import named_classes
from distillery.errors import DataError, DistilleryError
from distillery.recipe import TaskRecipe
from distillery.settings import RUN_OF_A_WORKER, LocalSettings
from distillery.storage.allowed import (
    address,
    is_allowed_data_set,
    local_path,
)
from distillery.storage.output import Output

pytestmark = pytest.mark.security

SECRET = "the-secret-line"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file outside of all that is allowed."""
    file = tmp_path / "elsewhere" / "secret.csv"
    file.parent.mkdir()
    file.write_text(f"{SECRET}\n")
    return file


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a worker's run starts in, with rows.csv."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "rows.csv").write_text("text,label\na,b\n")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def worker(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`data`, and this process executes a run of a deployment."""
    monkeypatch.setenv(RUN_OF_A_WORKER, "6d2f6a0e-0000-4000-8000-000000000000")
    return data


def refused(path: str) -> str:
    with pytest.raises(DataError) as caught:
        local_path(path, "dataset.files.train")
    line = str(caught.value)
    assert line.startswith("dataset.files.train: ")
    assert "\n" not in line
    assert SECRET not in line
    return line


def test_the_command_line_opens_what_its_user_may(data: Path, secret: Path) -> None:
    for path in (str(secret), "../elsewhere/secret.csv", "rows.csv"):
        assert local_path(path, "x") == Path(path)
    assert local_path("~", "x") == Path.home()
    assert address("http://internal/a.csv", "x") == "http://internal/a.csv"
    assert Output(str(secret.parent), "output").shown == str(secret.parent)


@pytest.mark.parametrize("path", ["a\0b.csv", "~nobody-is-called-so/a.csv", "a" * 5000, "\ud800"])
def test_what_is_no_path_is_one_line(path: str, data: Path) -> None:
    refused(path)


@pytest.mark.parametrize("path", ["a\0b.csv", "~nobody-is-called-so/a.csv", "a" * 5000, "\ud800"])
def test_what_is_no_path_is_one_line_on_a_worker(path: str, worker: Path) -> None:
    refused(path)


@pytest.mark.parametrize(
    "path",
    [
        "{secret}",
        "../elsewhere/secret.csv",
        "sub/../../elsewhere/secret.csv",
        "link.csv",
        "folder/secret.csv",
        "*/../../elsewhere/secret.csv",
        "/etc/passwd",
        "/etc/no-such-file",
        "~/secret.csv",
        "~root/secret.csv",
        ".env",
        ".git/config",
        "sub/.hidden.csv",
        "{home}/labels.db",
        "{home}/work/a.csv",
        "//etc/passwd",
        "..",
        "/",
    ],
)
def test_a_worker_opens_nothing_outside(
    path: str, worker: Path, secret: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(secret.parent))
    (worker / "link.csv").symlink_to(secret)
    (worker / "folder").symlink_to(secret.parent)
    (worker / ".env").write_text(SECRET)
    there = refused(path.format(secret=secret, home=home))
    assert "this worker may not open it" in there
    assert "DISTILLERY_DATA_FOLDERS" in there


def test_the_home_is_closed_where_it_is_in_an_allowed_folder(
    worker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_HOME", str(worker / "home"))
    refused("home/labels.db")
    assert local_path("home/store/a.csv", "x") == worker / "home" / "store" / "a.csv"
    refused("home/store/../labels.db")


def test_an_error_does_not_tell_whether_a_file_is_there(worker: Path, secret: Path) -> None:
    there, not_there = refused(str(secret)), refused(str(secret.with_name("none.csv")))
    assert there.replace("secret.csv", "none.csv") == not_there


def test_a_worker_opens_its_folders(
    worker: Path, secret: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distillery.data.source import SAMPLE_SPLITS, source_files
    from distillery.recipe import DatasetRecipe

    assert local_path("rows.csv", "x") == worker / "rows.csv"
    assert local_path(str(home / "store" / "0" / "a.csv"), "x").name == "a.csv"
    sample = source_files(DatasetRecipe())
    assert {local_path(sample[split][0], "x").stem for split in SAMPLE_SPLITS} == set(sample)
    monkeypatch.setenv("DISTILLERY_DATA_FOLDERS", f"{secret.parent}{os.pathsep}/nowhere")
    assert local_path(str(secret), "x") == secret
    refused("rows.csv")
    monkeypatch.setenv("DISTILLERY_DATA_PROTOCOLS", "https")
    refused(str(secret))
    assert local_path(sample["test"][0], "x").exists()


def test_a_run_that_starts_in_the_root_has_no_folder_of_its_own(
    worker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    refused("etc/passwd")


def test_folders_are_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_DATA_FOLDERS", f"/rows{os.pathsep}rows")
    with pytest.raises(DistilleryError, match=r"DISTILLERY_DATA_FOLDERS: .*give absolute folders"):
        LocalSettings()


@pytest.mark.parametrize("mode", ["worker", "data"])
@pytest.mark.parametrize(
    "uri",
    [
        "reference://a.csv::{secret}",
        "zip://a.csv::http://internal/a.zip",
        "simplecache::http://internal/a.csv",
        "filecache::abfs://other@account/a.csv",
        "rows.csv::x",
        "file://elsewhere.example/a.csv",
        "https://[internal/a.csv",
    ],
)
def test_chained_and_broken_urls_are_refused_everywhere(
    uri: str, mode: str, secret: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(mode)
    with pytest.raises(DataError, match=r"^input_uri: [^\n]*$"):
        address(uri.format(secret=secret), "input_uri")


@pytest.mark.parametrize(
    "uri",
    [
        *("http://internal/secret.json#.csv", "HTTP://internal/a.csv", "https://internal/a.csv"),
        *("abfs://other@account/a.csv", "ABFS://other@account/a.csv", "az://c/a.csv"),
        *("hf://datasets/a/b/a.csv", "github://a:b@main/a.csv", "reference://a.csv"),
        *("memory://a.csv", "s3://a/a.csv", "ftp://a/a.csv", "ssh://a/a.csv", "data://a.csv"),
        *("file://{secret}", "FILE://{secret}", "local://{secret}", "file://localhost{secret}"),
        *("file:///{quoted}", "{secret}", "dir://a/a.csv", "git://x:a.csv"),
    ],
)
def test_a_worker_opens_no_address_by_default(uri: str, worker: Path, secret: Path) -> None:
    quoted = str(secret).replace("e", "%65")
    with pytest.raises(DataError, match="this worker may not open it") as caught:
        address(uri.format(secret=secret, quoted=quoted), "input_uri")
    assert SECRET not in str(caught.value)


def test_a_name_with_a_colon_is_that_of_a_file(worker: Path, secret: Path) -> None:
    """fsspec would take the first two for its own."""
    for name in ("data:text/csv,a", f"file:{secret}", "C:\\rows.csv"):
        assert address(name, "input_uri") == worker / name


def test_a_file_url_is_a_path(worker: Path) -> None:
    (worker / "two words.csv").write_text("")
    for uri in ("two words.csv", f"file://{worker}/two%20words.csv"):
        assert address(uri, "input_uri") == worker / "two words.csv"


ALLOWED = (
    "file, https://data.example/rows/ ,abfs://rows@acc.dfs.core.windows.net/in,hf://datasets/org"
)


@pytest.mark.parametrize(
    ("uri", "may"),
    [
        ("https://data.example/rows/a.csv", True),
        ("HTTPS://data.example/rows/b/a.csv?sig=1", True),
        ("abfs://rows@acc.dfs.core.windows.net/in/a.csv", True),
        ("hf://datasets/org/name/a.csv", True),
        ("http://data.example/rows/a.csv", False),
        ("https://data.example/rows2/a.csv", False),
        ("https://data.example/a.csv", False),
        ("https://data.example:8443/rows/a.csv", False),
        ("https://data.example@internal/rows/a.csv", False),
        ("https://internal/rows/a.csv#https://data.example/rows/", False),
        ("https://data.example/rows/../a.csv", False),
        ("https://data.example/rows/%2e%2e/a.csv", False),
        ("https://data.example/rows/%252e%252e/a.csv", False),
        ("https://data.example/rows/..%2fa.csv", False),
        ("https://data.example/rows/..\\a.csv", False),
        ("https://data.example\\@internal/rows/a.csv", False),
        ("abfs://rows@other.dfs.core.windows.net/in/a.csv", False),
        ("abfs://else@acc.dfs.core.windows.net/in/a.csv", False),
        ("abfs://rows@acc.dfs.core.windows.net/inner/a.csv", False),
        ("abfs://rows@acc.dfs.core.windows.net/in/../a.csv", False),
        ("hf://datasets/organisation/name/a.csv", False),
        ("hf://spaces/org/name/a.csv", False),
    ],
)
def test_a_worker_opens_what_begins_as_allowed(
    uri: str, may: bool, worker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_DATA_PROTOCOLS", ALLOWED)
    if may:
        assert str(address(uri, "input_uri")).lower() == uri.lower()
    else:
        with pytest.raises(DataError, match="this worker may not open it") as caught:
            address(uri, "input_uri")
        assert "sig=" not in str(caught.value)


def test_a_protocol_allows_all_of_it(worker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_DATA_PROTOCOLS", "file,HTTPS")
    assert address("https://any.example/a.csv", "x") == "https://any.example/a.csv"
    with pytest.raises(DataError):
        address("http://any.example/a.csv", "x")


def test_a_remote_store_is_allowed_and_nothing_beside_it(
    worker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = "abfs://store@acc.dfs.core.windows.net/distillery"
    monkeypatch.setenv("DISTILLERY_STORE", store)
    assert address(f"{store}/0/files/a.csv", "x") == f"{store}/0/files/a.csv"
    with pytest.raises(DataError):
        address("abfs://store@acc.dfs.core.windows.net/other/a.csv", "x")


def test_data_sets_of_the_hub_are_all_allowed_unless_some_are_named(
    worker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_allowed_data_set("tau/commonsense_qa")
    monkeypatch.setenv("DISTILLERY_DATA_PROTOCOLS", "file,hf://datasets/org/")
    assert is_allowed_data_set("org/name")
    assert not is_allowed_data_set("tau/commonsense_qa")
    assert not is_allowed_data_set("organisation/name")
    monkeypatch.delenv(RUN_OF_A_WORKER)
    assert is_allowed_data_set("tau/commonsense_qa")


@pytest.mark.parametrize(
    "path",
    [
        *("{home}", "{home}/out", "{home}/store", "{store}/records", "{secret}", "../elsewhere"),
        *(".env", ".", "full", "link", "code", "code/out", "abfs://c@a/out", "linked", "~/out"),
    ],
)
def test_a_worker_writes_answers_into_no_folder_but_theirs(
    path: str, worker: Path, secret: Path, home: Path
) -> None:
    (worker / "full").mkdir()
    (worker / "full" / "own.txt").write_text("")
    (worker / "link").symlink_to(secret.parent)
    (worker / "code").mkdir()
    (worker / "code" / "__init__.py").write_text("")
    (worker / "linked").mkdir()
    (worker / "linked" / "failed.jsonl").symlink_to(secret)
    named = path.format(home=home, store=home / "store", secret=secret)
    with pytest.raises(DataError, match=r"^output: [^\n]*$"):
        Output(named, "output")


def test_a_worker_writes_answers_into_a_new_folder_and_again(worker: Path) -> None:
    output = Output("answers", "output")
    assert output.shown == str(worker / "answers")
    output.try_writing()
    (worker / "answers").mkdir()
    for left in ("predictions.jsonl", ".writing-failed.jsonl"):
        (worker / "answers" / left).write_text("")
    Output("answers", "output").try_writing()


def test_answers_do_not_go_into_the_store_from_the_command_line(data: Path, home: Path) -> None:
    with pytest.raises(DataError, match="in the store"):
        Output(str(home / "store" / "out"), "output")


@pytest.mark.parametrize("folder_allowed", ["home", "above"])
def test_nothing_of_the_home_is_read_where_the_home_is_allowed(
    folder_allowed: str, worker: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "run").mkdir(parents=True)
    (home / "run" / "password").write_text(SECRET)
    allowed = home if folder_allowed == "home" else home.parent
    monkeypatch.setenv("DISTILLERY_DATA_FOLDERS", str(allowed))
    refused(str(home / "run" / "password"))
    # A folder inside the home that is allowed by name.
    monkeypatch.setenv("DISTILLERY_DATA_FOLDERS", str(home / "run"))
    assert local_path(str(home / "run" / "password"), "x").read_text() == SECRET


@pytest.mark.parametrize("name", ["signing.pem", "server.KEY", "login.p12"])
def test_no_key_is_read(name: str, worker: Path) -> None:
    (worker / name).write_text(SECRET)
    refused(name)


def test_a_list_of_classes_is_a_text_file(worker: Path) -> None:
    (worker / "classes").write_text(f"{SECRET}\nother\n")
    (worker / "classes.txt").write_text("good\nbad\n")
    with pytest.raises(DataError, match="takes a file that ends in") as caught:
        named_classes(TaskRecipe(kind="classify", labels="classes"))
    assert SECRET not in str(caught.value)
    named = named_classes(TaskRecipe(kind="classify", labels="classes.txt"))
    assert named == ("good", "bad")


def test_a_link_to_a_hidden_folder_beside_it_is_followed(worker: Path) -> None:
    """As in a volume that Kubernetes makes of a ConfigMap."""
    (worker / "..2026").mkdir()
    (worker / "..2026" / "train.csv").write_text("text\n")
    (worker / "train.csv").symlink_to(worker / "..2026" / "train.csv")
    assert local_path("train.csv", "x") == worker / "..2026" / "train.csv"
    refused("..2026/train.csv")
    refused(str(worker / "x" / ".." / "..2026" / "train.csv"))
