"""`check` on a machine that has everything, and on machines that lack something: always one finding
for each item."""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import closing
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import huggingface_hub
import pytest
from azure_hosts import FOUNDRY, azure_hosts
from chat_endpoint import Call, ChatEndpoint, Reply, good, refused, said
from texts import write_texts
from tiny_recipe import write_rows

from distillery.errors import (
    CredentialsError,
    DataError,
    DistilleryError,
    RecipeError,
    TrainingUnavailable,
)
from distillery.models import azure_registry
from distillery.models.azure_registry import AzureModel, parse_azureml
from distillery.models.base import local_copy
from distillery.readiness import (
    GB,
    LIMIT_S,
    PROBE_S,
    Finding,
    check,
    check_base_models,
    check_data,
    check_endpoint,
    check_gpu_memory,
    check_memory,
    check_settings,
    gpu_needs,
    training_bytes,
)
from distillery.recipe import (
    BaseModelRecipe,
    ExportForm,
    ExportRecipe,
    Recipe,
    SearchRecipe,
    TeacherRecipe,
    TrainingRecipe,
    parse_recipe,
)
from distillery.registry.local import LocalRegistry
from distillery.storage.database import Database
from distillery.teacher.endpoint import LOGIN_S
from distillery.teacher.failures import BACKOFF
from distillery.teacher.ledger import totals
from flows.distill import distill
from flows.search import search

TinyModel = Callable[[str], Path]
KEY = "a-key-of-the-test"
ITEMS = {"data", "disk", "memory", "training", "artifact store", "label store", "registry"}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, one_registry: None) -> None:
    """A machine without GPU and without accounts."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("distillery.readiness.LEAST_DISK", 1e6)
    for name in ("SUBSCRIPTION_ID", "RESOURCE_GROUP", "WS_NAME", "WORKSPACE_NAME"):
        monkeypatch.delenv(f"AZUREML_{name}", raising=False)
    for name in ("NAME", "ENDPOINT", "KEY"):
        monkeypatch.delenv(f"TEACHER_MODEL_{name}", raising=False)
        monkeypatch.delenv(f"JUDGE_MODEL_{name}", raising=False)
        monkeypatch.delenv(f"CHEAP_MODEL_{name}", raising=False)


@pytest.fixture
def point_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def at(url: str) -> None:
        monkeypatch.setenv("TEACHER_MODEL_NAME", "m")
        monkeypatch.setenv("TEACHER_MODEL_ENDPOINT", url)
        monkeypatch.setenv("TEACHER_MODEL_KEY", KEY)

    return at


def recipe(base: Path | str, **slices: Any) -> Recipe:
    return Recipe.model_validate(
        {"student": {"base": {"model": str(base)}}, "name": "tiny"} | slices
    )


def local(base: Path | str, **slices: Any) -> Recipe:
    teacher = {"kind": "local", "preparation": {"base": {"model": str(base)}}}
    return recipe(base, teacher=teacher, **slices)


def findings(of: Recipe) -> dict[str, Finding]:
    """Return the findings by item: each item once, each finding in one line."""
    found = check(of)
    assert len({finding.item for finding in found}) == len(found)
    assert all("\n" not in str(finding) for finding in found)
    assert {finding.item for finding in found} >= ITEMS
    return {finding.item: finding for finding in found}


def failed(of: Recipe) -> set[str]:
    return {item for item, finding in findings(of).items() if finding.level == "FAIL"}


def test_a_machine_that_has_all(tiny_model: TinyModel) -> None:
    base = tiny_model("llama")
    found = findings(local(base))
    assert {finding.level for finding in found.values()} == {"ok"}
    assert "0.1 M parameters" in found[f"base model {base}"].text
    assert str(found["data"]) == (
        "ok   data: the shipped sample; rows: 300 gold, 1,001 train, 100 validation, 480 test"
    )


def test_an_export_that_does_not_fit_the_base(tiny_model: TinyModel) -> None:
    base = tiny_model("llama")
    wide = local(base).model_copy(update={"export": ExportRecipe(block_size=128)})
    assert "in blocks of 128 does not fit" in findings(wide)[f"base model {base}"].text
    assert failed(wide) == {f"base model {base}"}
    with pytest.raises(RecipeError, match="in blocks of 128 does not fit"):
        check_settings(wide)
    rungs = (
        ExportForm(block_size=128),
        ExportForm(block_size=128, algorithm="rtn"),
        ExportForm(block_size=32),
    )
    assert failed(local(base).model_copy(update={"export": ExportRecipe(ladder=rungs)})) == set()
    assert (
        failed(local(base).model_copy(update={"export": ExportRecipe(ladder=rungs[:2])})) != set()
    )
    served = {
        "kind": "local",
        "preparation": {"base": {"model": str(base)}, "export": {"block_size": 128}},
    }
    said = findings(recipe(base, teacher=served))[f"base model {base}"].text
    assert said.startswith("teacher.preparation.export: k_quant_mixed in blocks of 128")


def test_an_endpoint_that_does_all(tiny_model: TinyModel, point_to: Callable[[str], None]) -> None:
    with ChatEndpoint(good) as server:
        point_to(server.url)
        found = findings(recipe(tiny_model("llama"), teacher={"soft_labels": True}))
    assert {finding.level for finding in found.values()} == {"ok"}
    assert {"teacher credentials", "teacher endpoint", "log-probabilities"} <= set(found)
    assert [call.key for call in server.calls] == [KEY]
    assert KEY not in "".join(map(str, found.values()))
    with closing(Database()) as database:
        (probes,) = totals(database, ("purpose", "outcome"))
    assert (probes.purpose, probes.outcome, probes.calls) == ("probe", "answer", 1)


def without_log_probabilities(call: Call) -> Reply:
    return refused(400, "logprobs is not supported") if "logprobs" in call.body else good(call)


@pytest.mark.parametrize(
    ("script", "item", "text"),
    [
        (
            lambda _call: refused(401, f"bad key {KEY}"),
            "teacher endpoint",
            "TEACHER_MODEL_KEY: refused",
        ),
        (
            lambda _call: refused(404, "no such model"),
            "teacher endpoint",
            "TEACHER_MODEL_NAME m: not found",
        ),
        (lambda _call: said(""), "teacher endpoint", "raise teacher.max_tokens"),
        (without_log_probabilities, "log-probabilities", "set teacher.soft_labels: false"),
    ],
)
def test_an_endpoint_that_lacks_something(
    script: Callable[[Call], Reply],
    item: str,
    text: str,
    tiny_model: TinyModel,
    point_to: Callable[[str], None],
) -> None:
    with ChatEndpoint(script) as server:
        point_to(server.url)
        found = findings(recipe(tiny_model("llama"), teacher={"soft_labels": True}))
    assert found[item].level == "FAIL"
    assert text in found[item].text
    assert {name for name, finding in found.items() if finding.level != "ok"} == {item}
    assert KEY not in "".join(map(str, found.values()))


def answering(*paths: str) -> Callable[[Call], Reply]:
    """A resource that answers below these paths, and 404 elsewhere."""
    return lambda call: good(call) if call.path.startswith(paths) else refused(404, "not found")


@pytest.mark.parametrize(
    ("paths", "endpoint", "address", "text"),
    [
        (("/models",), "ok", "ok", "the given one answers; {v1} does not: TEACHER_MODEL_NAME m: "),
        (("/openai/v1",), "FAIL", "FAIL", "{v1} answers, and the given one does not; set "),
        (("/models", "/openai/v1"), "ok", "warn", "both answer, and the given one is of a retired"),
        ((), "FAIL", "FAIL", "neither the given one nor {v1} answers: TEACHER_MODEL_NAME m: "),
    ],
    ids=["old", "new", "both", "none"],
)
def test_an_address_of_the_labs_form_is_tried_beside_its_successor(
    paths: tuple[str, ...],
    endpoint: str,
    address: str,
    text: str,
    tmp_path: Path,
    point_to: Callable[[str], None],
) -> None:
    with (
        azure_hosts(tmp_path) as certificate,
        ChatEndpoint(answering(*paths), certificate) as server,
    ):
        resource = f"https://{FOUNDRY}:{server.port}"
        point_to(f"{resource}/models")
        found = {finding.item: finding for finding in check_endpoint(TeacherRecipe())}
    assert found["teacher endpoint"].level == endpoint
    assert found["teacher address"].level == address
    assert found["teacher address"].text.startswith(text.format(v1=f"{resource}/openai/v1"))
    assert len(server.calls) == 2
    assert KEY not in "".join(map(str, found.values()))


def test_log_probabilities_are_no_matter_where_none_are_asked_for(
    tiny_model: TinyModel, point_to: Callable[[str], None]
) -> None:
    with ChatEndpoint(without_log_probabilities) as server:
        point_to(server.url)
        found = findings(recipe(tiny_model("llama")))
    assert found["teacher endpoint"].level == "ok"
    assert "log-probabilities" not in found


def test_an_endpoint_that_is_down(tiny_model: TinyModel, point_to: Callable[[str], None]) -> None:
    with ChatEndpoint(good) as server:
        point_to(server.url)
    found = findings(recipe(tiny_model("llama")))
    assert found["teacher endpoint"].level == "FAIL"
    assert "can't be reached after 2 tries" in found["teacher endpoint"].text


def test_no_credentials(tiny_model: TinyModel) -> None:
    found = findings(recipe(tiny_model("llama")))
    assert (
        "TEACHER_MODEL_NAME, TEACHER_MODEL_ENDPOINT, TEACHER_MODEL_KEY: not set"
        in found["teacher credentials"].text
    )
    assert found["teacher endpoint"].level == "warn"


def test_a_judge_is_checked_as_a_teacher_is(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = parse_recipe(
        {
            "task": {"kind": "generate"},
            "dataset": {
                "source": "files",
                "files": {"train": ["x.csv"]},
                "carve": {"test": 0.2, "validation": 0.2},
            },
            "teacher": {"kind": "gold"},
            "student": {"base": {"model": str(tiny_model("llama"))}},
            "evaluation": {"judge": {"instructions": "The texts sell tea."}},
        },
        "mine.yaml",
    )
    # Each flow in a context of its own, because it changes the tags of all that follows.
    with pytest.raises(CredentialsError, match="JUDGE_MODEL_NAME, JUDGE_MODEL_ENDPOINT"):
        copy_context().run(distill.fn, judged)
    with pytest.raises(DataError, match=r"x\.csv"):
        copy_context().run(search.fn, judged, SearchRecipe(rank=(8,)))
    assert "JUDGE_MODEL_KEY: not set" in findings(judged)["judge credentials"].text
    with ChatEndpoint(lambda _: refused(401, "no")) as server:
        monkeypatch.setenv("JUDGE_MODEL_NAME", "wise")
        monkeypatch.setenv("JUDGE_MODEL_ENDPOINT", server.url)
        monkeypatch.setenv("JUDGE_MODEL_KEY", KEY)
        with pytest.raises(DataError, match=r"x\.csv"):
            copy_context().run(distill.fn, judged)
        found = findings(judged)
        assert found["judge endpoint"].text.startswith("JUDGE_MODEL_KEY: refused by")
        server.script = lambda _: said("")
        text = findings(judged)["judge endpoint"].text
        assert text == "wise answers without text; raise evaluation.judge.max_tokens"
        server.script = good
        assert findings(judged)["judge endpoint"].level == "ok"


def test_a_cheap_teacher_is_checked_before_a_run(
    tiny_model: TinyModel, point_to: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(tiny_model("llama"), teacher={"kind": "endpoint", "cascade": {}})
    with ChatEndpoint() as server:
        point_to(server.url)
        with pytest.raises(CredentialsError, match="CHEAP_MODEL_NAME, CHEAP_MODEL_ENDPOINT"):
            check_settings(asked)
        assert failed(asked) == {"cheap teacher credentials"}
        monkeypatch.setenv("CHEAP_MODEL_NAME", "small")
        monkeypatch.setenv("CHEAP_MODEL_ENDPOINT", server.url)
        monkeypatch.setenv("CHEAP_MODEL_KEY", KEY)
        check_settings(asked)
        found = findings(asked)
        assert found["cheap teacher endpoint"].text.startswith("small answers in")
        needs = "given, as teacher.cascade.soft_labels needs them"
        assert found["log-probabilities"].text == needs


def test_no_check_takes_longer_than_its_limit(
    tiny_model: TinyModel, point_to: Callable[[str], None]
) -> None:
    with ChatEndpoint(lambda call: Reply(good(call).body, delay=30)) as server:
        point_to(server.url)
        started = time.monotonic()
        found = check(recipe(tiny_model("llama")), limit_s=0.5)
        assert time.monotonic() - started < 9 * 0.5 + 2
    assert str(found[0]) == (
        "FAIL teacher: no answer within 0.5 s; see that it is up and reachable, or check again "
        "when this machine is less busy"
    )
    assert {finding.item for finding in found} > ITEMS


def test_the_teachers_login_and_both_attempts_fit_into_the_limit() -> None:
    state: Any = SimpleNamespace(attempt_number=1)
    assert LOGIN_S + 2 * PROBE_S + max(BACKOFF(state) for _ in range(100)) < LIMIT_S


def test_a_check_that_breaks_is_said_without_what_a_library_says(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_args: object) -> None:
        raise ValueError(f"url with {KEY}")

    monkeypatch.setattr(LocalRegistry, "list", breaks)
    found = findings(local(tiny_model("llama")))
    assert str(found["registry"]) == "FAIL registry: could not be checked (ValueError)"


def test_files_that_are_not_there(tiny_model: TinyModel, tmp_path: Path) -> None:
    files = {"train": [str(tmp_path / "none.jsonl")]}
    dataset = {
        "source": "files",
        "files": files,
        "splits": {"gold": "train", "train": "train", "test": "train"},
    }
    found = findings(local(tiny_model("llama"), dataset=dataset))
    assert found["data"].level == "FAIL"
    assert (
        "none.jsonl: can't be read (No such file or directory); correct dataset.files.train"
        in found["data"].text
    )


def test_rows_are_read_and_a_bad_first_row_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    files = write_rows(tmp_path)
    dataset = {"source": "files", "files": files, "splits": {split: split for split in files}}
    asked = local(tiny_model("llama"), dataset=dataset)
    found = findings(asked)
    assert found["data"].text == (
        "every file is read; rows: 40 gold, 60 train, 20 validation, 40 test"
    )
    assert str(found["test rows"]) == (
        "warn test rows: 40 are few: they tell how good a model is to ±15 points only (100: ±10); "
        "use more test rows"
    )
    assert found["validation rows"].text.startswith("20 are few: ")
    train = Path(files["train"][0])
    first, rest = train.read_text().split("\n", 1)
    values = json.loads(first)
    del values["question"]
    train.write_text(f"{json.dumps(values)}\n{rest}")
    broken = findings(asked)["data"]
    assert broken.level == "FAIL"
    assert broken.text.startswith(f"{train}:1: question: missing; fill it in")


def test_the_rows_of_a_classifier_are_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "texts.csv", answered=40, unanswered=10)
    carve = {"gold": 0.5, "test": 0.5}
    dataset = {"source": "files", "files": {"train": [file]}, "carve": carve}
    found = findings(local(tiny_model("llama"), dataset=dataset, task={"kind": "classify"}))["data"]
    assert found.level == "ok"
    assert found.text.startswith("every file is read; rows: ")
    assert " 10 train, " in found.text


def test_rows_that_take_long_to_read_are_no_failure(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forever = threading.Event()
    monkeypatch.setattr("distillery.readiness.check_rows", lambda *_: forever.wait())
    found = {finding.item: finding for finding in check(local(tiny_model("llama")), limit_s=0.5)}
    forever.set()
    assert str(found["data"]) == (
        "warn data: not read within 0.5 s; the run reads its rows when it starts"
    )


@pytest.mark.parametrize(
    ("base", "text"),
    [
        ("/no/such/folder", "no such folder"),
        ("package:no_such_package", "is not installed"),
        ("azureml://models/1", "not azureml://registries"),
    ],
)
def test_a_base_model_that_is_not_there(base: str, text: str) -> None:
    found = findings(local(base))
    assert found[f"base model {base}"].level == "FAIL"
    assert text in found[f"base model {base}"].text
    assert (found["disk"].level, found["memory"].level) == ("warn", "warn")


def test_a_base_model_that_needs_code_of_its_own(tiny_model: TinyModel, tmp_path: Path) -> None:
    for file in tiny_model("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"model_type": "mine", "auto_map": {}})
    )
    found = findings(local(tmp_path))
    assert "needs Python code of its own" in found[f"base model {tmp_path}"].text


AZURE = "azureml://registries/azureml/models/Tiny/versions/1"


@pytest.fixture
def in_azure(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a tiny model into Azure's registry: it gives config and tokenizer, changed by `edit`,
    and says that the weights have `size` bytes."""
    model = parse_azureml(AZURE)

    def put(size: int = 8 * 10**9, edit: Callable[[Path], object] = lambda _folder: None) -> None:
        def fetch_small_files(_model: AzureModel) -> int:
            model.unfinished.mkdir(parents=True, exist_ok=True)
            for file in tiny_model("llama").iterdir():
                if file.suffix != ".safetensors":
                    (model.unfinished / file.name).write_bytes(file.read_bytes())
            edit(model.unfinished)
            return size

        monkeypatch.setattr(azure_registry, "fetch_small_files", fetch_small_files)

    monkeypatch.setattr("shutil.disk_usage", lambda _folder: SimpleNamespace(free=9 * 10**9))
    return put


def test_a_base_model_in_azures_registry_is_known_before_its_weights_are_here(
    in_azure: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    in_azure()
    found = findings(recipe(AZURE))
    assert str(found[f"base model {AZURE}"]) == (
        f"warn base model {AZURE}: not on this machine; the run downloads 8.0 GB from the registry "
        "azureml: 0.1 M parameters"
    )
    assert (found["disk"].level, found["memory"].level) == ("ok", "ok")
    check_base_models(recipe(AZURE))
    assert "the run downloads 8.0 GB from the registry azureml" in caplog.text


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["OptForCausalLM"]}))


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def own_code(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "mine"}))


FAULTS = [
    ({"size": 10 * 10**9}, r"downloads 10\.0 GB .*, and 9\.0 GB are free at .*; free some space"),
    ({"edit": no_template}, "it has no chat template; choose an instruction-tuned model"),
    ({"edit": no_tokenizer}, "it has no tokenizer; choose one that has"),
    ({"edit": broken_tokenizer}, "has no tokenizer that Transformers loads"),
    ({"edit": unknown_architecture}, "ModelBuilder builds no OptForCausalLM; choose a base model"),
    ({"edit": own_code}, "needs Python code of its own to load"),
]


@pytest.mark.parametrize(("given", "text"), FAULTS)
def test_what_stops_a_base_model_stops_the_run_before_it_pays(
    given: dict[str, Any], text: str, in_azure: Callable[..., None]
) -> None:
    in_azure(**given)
    found = findings(recipe(AZURE))[f"base model {AZURE}"]
    assert found.level == "FAIL"
    assert re.search(text, found.text)
    with pytest.raises(DistilleryError, match=text):
        check_base_models(recipe(AZURE))


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (no_template, "it has no chat template"),
        (no_tokenizer, "it has no tokenizer"),
        (unknown_architecture, "ModelBuilder builds no OptForCausalLM"),
    ],
)
def test_what_is_wrong_with_a_local_base_model_stops_the_run_too(
    edit: Callable[[Path], None], text: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    for file in tiny_model("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    check_settings(local(tmp_path))
    edit(tmp_path)
    with pytest.raises(RecipeError, match=text):
        check_settings(local(tmp_path))
    assert failed(local(tmp_path)) == {f"base model {tmp_path}"}


def test_a_base_model_that_is_here_asks_nobody(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillery.readiness.preview", pytest.fail)
    check_base_models(local(tiny_model("llama")))


def test_a_base_model_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: TinyModel
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    files = [
        {"rfilename": "model.safetensors", "size": 3_000_000_000},
        {"rfilename": "a.bin", "size": 10**12},
    ]
    snapshot = cache / "models--a--b" / "snapshots" / ("c" * 40)
    real = huggingface_hub.snapshot_download

    def snapshot_download(name: str, **options: Any) -> str:
        """Download what is not a weight."""
        if options.get("local_files_only"):
            return str(real(name, cache_dir=str(cache), **options))
        assert options["ignore_patterns"] == "*.safetensors"
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("c" * 40)
        for file in tiny_model("llama").iterdir():
            if file.suffix != ".safetensors":
                (snapshot / file.name).write_bytes(file.read_bytes())
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with ChatEndpoint(lambda _call: Reply({"id": "a/b", "siblings": files})) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        found = findings(local("a/b"))
        assert found["base model a/b"].level == "warn"
        assert "downloads 3.0 GB from the hub: 0.1 M param" in found["base model a/b"].text
        assert found["memory"].level == "ok"
        # The hub's client may ask for things of its own before.
        assert any(call.path.endswith("/api/models/a/b?blobs=true") for call in hub.calls)
    # A snapshot without its weights is not a base model that is here.
    assert local_copy(BaseModelRecipe(model="a/b")) is None
    found = findings(local("a/b"))
    assert found["base model a/b"].level == "FAIL"
    assert "can't get a/b from the Hugging Face hub" in found["base model a/b"].text
    (snapshot / "model.safetensors").write_bytes(
        (tiny_model("llama") / "model.safetensors").read_bytes()
    )
    assert local_copy(BaseModelRecipe(model="a/b")) == snapshot
    index = {"weight_map": {"w": "model.safetensors", "v": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert local_copy(BaseModelRecipe(model="a/b")) is None


def test_a_base_model_in_the_hubs_cache(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cached = tmp_path / "models--a--b"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("c" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("c" * 40)).symlink_to(tiny_model("llama"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert local_copy(BaseModelRecipe(model="a/b")) == cached / "snapshots" / ("c" * 40)
    assert not failed(local("a/b"))


@pytest.mark.parametrize("missing", ["chat_template.jinja", "tokenizer*"])
def test_a_base_model_in_the_hubs_cache_without_all_small_files_is_completed(
    missing: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob(missing):
        file.unlink()

    def snapshot_download(_name: str, **options: Any) -> str:
        if not options.get("local_files_only"):
            shutil.copytree(tiny_model("llama"), tmp_path, dirs_exist_ok=True)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("distillery.models.base.hub_bytes", lambda _base: 10**15)
    base = BaseModelRecipe(model="a/b")
    assert local_copy(base) is None
    check_settings(local("a/b"))
    check_base_models(local("a/b"))
    assert local_copy(base) == tmp_path


def test_a_data_set_on_the_hub(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"gold": "train", "train": "train", "test": "train"}
    dataset = {"source": "hub", "name": "a/d", "splits": splits}
    asked = local(tiny_model("llama"), dataset=dataset)
    pinned = local(tiny_model("llama"), dataset=dataset | {"revision": "v1"})
    with ChatEndpoint(lambda _call: Reply({"id": "a/d", "sha": "e" * 40})) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        assert findings(asked)["data"].text == (
            f"the hub has a/d@{'e' * 40}; its rows are read when the run starts"
        )
    assert findings(asked)["data"].level == "FAIL"
    assert findings(pinned)["data"].level == "warn"


def test_too_little_disk_and_memory(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillery.readiness.DISK_FACTOR", 1e12)
    monkeypatch.setattr("distillery.readiness.MEMORY_FACTOR", {"lora": 1e12, "full": 1e12})
    assert failed(local(tiny_model("llama"))) == {"disk", "memory"}


def test_memory_is_known_for_every_method_and_steps_of_healing_count(tiny_model: TinyModel) -> None:
    base = {"model": str(tiny_model("llama"))}

    def needed(**student: Any) -> float:
        asked = Recipe.model_validate({"student": {"base": base} | student})
        return training_bytes(asked, 10**9)

    methods = get_args(TrainingRecipe.model_fields["method"].annotation)
    figures = {method: needed(training={"method": method}) for method in methods}
    assert figures["qlora"] == figures["dora"] == figures["lora"] < figures["full"]
    healed = needed(training={"method": "lora"}, healing=[{"layers": [0]}])
    assert healed == figures["full"]


def test_a_home_that_cannot_be_written(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISTILLERY_HOME", str(tmp_path / "file" / "home"))
    found = findings(local(tiny_model("llama")))
    assert "DISTILLERY_HOME" in found["disk"].text
    assert found["disk"].level == "FAIL"
    assert found["label store"].level == "FAIL"
    assert found["registry"].level == "FAIL"


def test_a_large_model_without_a_gpu(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillery.readiness.LARGE", 1)
    found = findings(local(tiny_model("llama")))
    assert found["training"].level == "warn"
    assert "no GPU: on the CPU in" in found["training"].text


def test_a_gpu_is_named(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda gpu: f"GPU {gpu} of the test")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda gpu: (8 * 10**9, 10 * 10**9))
    asked = local(tiny_model("llama"))
    assert str(findings(asked)["training"]) == (
        "ok   training: on GPU 0 of the test in bfloat16, 8.0 GB of its memory free; the run takes "
        "an estimated 1.0 GB, and 0.0 GB for every 1,000 tokens of a batch: 1.0 GB at most"
    )
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda gpu: (10**9, 10 * 10**9))
    assert findings(asked)["training"].level == "warn"


def test_of_several_gpus_the_smallest_counts(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [9 * 10**9, 10**9, 8 * 10**9, 0]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda gpu: f"GPU {gpu} of the test")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda gpu: (free[gpu], 10 * 10**9))
    asked = local(tiny_model("llama"))
    assert findings(asked)["training"].level == "ok"
    monkeypatch.setenv("DISTILLERY_DEVICES", "3")
    found = findings(asked)["training"]
    assert found.level == "warn"
    assert found.text.startswith(
        "on 3 GPUs in bfloat16, of which GPU 1 has the least memory free: GPU 1 of the test, 1.0 "
        "GB of its memory free; the run takes"
    )


def test_gpus_share_out_the_model_where_the_machine_says_so(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda gpu: f"GPU {gpu} of the test")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda gpu: (8 * 10**9, 10 * 10**9))
    asked = local(tiny_model("llama"))
    monkeypatch.setenv("DISTILLERY_FSDP", "true")
    alone = findings(asked)["training"]
    assert alone.level == "FAIL"
    assert alone.text.startswith("DISTILLERY_FSDP: a model is split between several devices")
    monkeypatch.setenv("DISTILLERY_DEVICES", "2")
    found = findings(asked)["training"].text
    assert found.startswith("on 2 GPUs that share out the model in bfloat16, of which GPU 0 has")


def test_a_process_that_keeps_a_share_of_the_model_takes_less_main_memory(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillery.readiness.largest_base_bytes", lambda recipe: 10**9)
    monkeypatch.setenv("DISTILLERY_DEVICES", "4")
    student = {"base": {"model": str(tiny_model("llama"))}, "training": {"method": "full"}}
    recipe = Recipe.model_validate({"student": student})
    needs = []
    for fsdp in ("false", "true"):
        monkeypatch.setenv("DISTILLERY_FSDP", fsdp)
        (found,) = check_memory(recipe)
        needs.append(re.findall("takes about ([0-9.]+) GB", found.text)[0])
    assert needs == ["20.0", "12.0"]


def test_fewer_gpus_than_devices(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = local(tiny_model("llama"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("DISTILLERY_DEVICES", "4")
    found = findings(asked)["training"]
    assert found.level == "FAIL"
    assert "DISTILLERY_DEVICES: 4, and PyTorch finds 2 GPUs here; lower it" in found.text


def test_gpus_that_share_out_the_model_need_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PHI_4_MINI))
    student = {"base": {"model": str(tmp_path)}, "training": {"method": "full"}}
    recipe = Recipe.model_validate({"student": student})

    def training(free_gb: float) -> Finding:
        return check_gpu_memory(recipe, "bfloat16", int(free_gb * GB), "on A")

    advice = "or several GPUs that share out the model (DISTILLERY_DEVICES, DISTILLERY_FSDP)"
    assert training(40).text.endswith(advice)
    monkeypatch.setenv("DISTILLERY_FSDP", "true")
    for devices, fixed in (("2", "39.0"), ("4", "23.7")):
        monkeypatch.setenv("DISTILLERY_DEVICES", devices)
        assert f"takes an estimated {fixed} GB, and" in training(40).text
    monkeypatch.setenv("DISTILLERY_DEVICES", "2")
    advice = "use larger GPUs, or more of them (DISTILLERY_DEVICES)"
    assert training(30).text.endswith(f"too little even for short rows: {advice}")


PHI_4_MINI = {
    "model_type": "phi3",
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


def test_the_gpu_that_phi_4_mini_takes_is_estimated_from_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PHI_4_MINI))

    def training(free_gb: float, **settings: Any) -> Finding:
        student = {"base": {"model": str(tmp_path)}, "training": settings}
        recipe = Recipe.model_validate({"student": student})
        return check_gpu_memory(recipe, "bfloat16", int(free_gb * GB), "on A")

    assert str(training(80)) == (
        "ok   training: on A, 80.0 GB of its memory free; the run takes an estimated 8.7 GB, and "
        "4.6 GB for every 1,000 tokens of a batch: 27.3 GB at most"
    )
    tight = training(24)
    assert tight.level == "warn"
    assert "too little if rows are long: set training.gradient_checkpointing: true" in tight.text
    assert training(24, gradient_checkpointing=True).level == "ok"
    assert training(24, batch_size=4).level == "ok"
    whole = training(24, method="full", gradient_checkpointing=True)
    advice = "for short rows: use a larger GPU, student.training.method: qlora, or several GPUs"
    assert advice in whole.text
    assert "use a larger GPU or several GPUs that share out" in training(3).text, "nor does qlora"
    packed = training(24, method="qlora", gradient_checkpointing=True)
    assert "the run takes an estimated 4.2 GB, and 0.3 GB for every 1,000 tokens" in packed.text
    assert training(3, method="qlora").text.endswith("for short rows: use a larger GPU")
    assert training(85, method="full", gradient_checkpointing=True).level == "ok"


def test_the_memory_for_a_mixture_of_experts_is_not_estimated(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PHI_4_MINI | {"num_local_experts": 8}))
    asked = Recipe.model_validate({"student": {"base": {"model": str(tmp_path)}}})
    assert gpu_needs(asked, "bfloat16") is None


def test_a_teacher_whose_states_are_learnt_is_held_in_floats(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PHI_4_MINI))
    base, packed = {"model": str(tmp_path)}, {"method": "qlora"}
    for weight, estimate in ((0.0, "4.2 GB"), (1.0, "8.7 GB")):
        asked = Recipe.model_validate(
            {
                "teacher": {"kind": "local", "preparation": {"base": base, "training": packed}},
                "student": {"start": "teacher", "training": packed | {"hidden_weight": weight}},
            }
        )
        found = check_gpu_memory(asked, "bfloat16", int(24 * GB), "on A")
        assert f"the run takes an estimated {estimate}" in found.text


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_a_run_that_would_train_in_4_bits_here_needs_bitsandbytes(
    of: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: dict[str, Any] = {
        "base": {"model": str(tiny_model("llama"))},
        "training": {"method": "qlora"},
    }
    values: dict[str, Any] = {"student": packed, "teacher": {"kind": "gold"}}
    if of == "teacher":
        values = {"teacher": {"kind": "local", "preparation": packed}}
    asked = recipe(packed["base"]["model"], **values)
    assert findings(asked)["training"].level == "ok"
    monkeypatch.setattr("distillery.models.four_bits.find_spec", lambda name: None)
    found = findings(asked)["training"]
    said = "training.method: qlora needs bitsandbytes where the training runs; install distillery"
    assert (found.level, found.text.startswith(said)) == ("FAIL", True)
    # Before anything is read or paid for; where a deployment trains, it may be there.
    files = {"source": "files", "files": {"train": ["x.csv"]}, "carve": {"test": 0.5}}
    asked = recipe(packed["base"]["model"], dataset=files, **values)
    with pytest.raises(TrainingUnavailable, match=said):
        copy_context().run(distill.fn, asked)
    with pytest.raises(DataError, match=r"x\.csv"):
        copy_context().run(distill.fn, asked, training_deployment="train-student/gpu")
    with pytest.raises(TrainingUnavailable, match=said):
        copy_context().run(search.fn, asked, SearchRecipe(rank=(8,)))


def test_azure_without_its_names(tiny_model: TinyModel) -> None:
    found = findings(local(tiny_model("llama"), registry={"kind": "azureml"}))
    assert found["registry"].level == "FAIL"
    assert (
        "AZUREML_SUBSCRIPTION_ID, AZUREML_RESOURCE_GROUP, AZUREML_WS_NAME" in found["registry"].text
    )


def test_stores_that_do_not_open(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_LABELS", "sqlite:////proc/none/labels.db")
    monkeypatch.setenv("DISTILLERY_REGISTRY", "sqlite:////proc/none/registry.db")
    assert failed(local(tiny_model("llama"))) == {"label store", "registry"}


def test_rows_of_classes_are_checked_as_their_task_says(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    lines = [f"message {n} of {n * n},{'refund' if n % 2 else 'other'}" for n in range(40)]
    path.write_text("\n".join(["text,label", *lines, "one more,"]) + "\n")
    dataset = {
        "source": "files",
        "files": {"train": [str(path)]},
        "carve": {"gold": 0.3, "validation": 0.2, "test": 0.2},
    }
    found = findings(local(tiny_model("llama"), dataset=dataset, task={"kind": "classify"}))
    assert found["data"].level == "ok"
    assert "every file is read; rows: " in found["data"].text
    labels = {"kind": "classify", "labels": ["refund", "parcel"]}
    found = findings(local(tiny_model("llama"), dataset=dataset, task=labels))
    assert found["data"].level == "FAIL"
    assert "'other' is none of the 2 classes in task.labels" in found["data"].text


def test_the_files_of_other_texts_are_read(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, texts = tmp_path / "rows.csv", tmp_path / "texts.csv"
    lines = [f"message {n} of {n * n},{'refund' if n % 2 else 'parcel'}" for n in range(40)]
    rows.write_text("\n".join(["text,label", *lines, "one more,"]) + "\n")
    texts.write_text("text\n" + "".join(f"chat {n} on {n * n}\n" for n in range(20)))
    task = {"kind": "classify", "other": {"files": [str(texts)]}}
    carve = {"gold": 0.5, "validation": 0.2, "test": 0.2}
    files = {"source": "files", "files": {"train": [str(rows)]}, "carve": carve}
    hub = {"source": "hub", "name": "a/b", "carve": carve}
    monkeypatch.setattr("distillery.data.source.hub_commit", lambda *_: "c" * 40)

    def found(dataset: dict[str, Any]) -> dict[str, Finding]:
        return findings(local(tiny_model("llama"), dataset=dataset, task=task))

    numbers = re.findall(r"(\d+) (?:gold|train|validation|test)", found(files)["data"].text)
    assert sum(map(int, numbers)) == 61
    assert str(found(hub)["task.other"]) == "ok   task.other: every file is read; rows: 20"
    with texts.open("a") as file:
        file.write(" \n")
    bad = f"FAIL data: {texts}:22: text: empty; fill it in or remove the row"
    assert [str(found(source)["data"]) for source in (files, hub)] == [bad, bad]


def test_formats_that_nothing_checks_are_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"text {n}", "answer": {"on": "2026-02-01"}}) for n in range(9)]
    path.write_text("\n".join(lines) + "\n")
    dataset = {"source": "files", "files": {"train": [str(path)]}, "carve": {"test": 0.4}}
    for name, told in {"uri": ["task.schema"], "date": []}.items():
        fields = {"on": {"type": "string", "format": "date"}, "at": {"items": {"format": name}}}
        task = {"kind": "extract", "schema": {"type": "object", "properties": fields}}
        found = list(check_data(Recipe.model_validate({"dataset": dataset, "task": task})))
        assert [finding.item for finding in found] == [*told, "data", "test rows"]
        assert found[-2].level == "ok"
        if name == "uri":
            assert str(found[0]).startswith("warn task.schema: format: uri: not checked, as only")
