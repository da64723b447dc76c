"""Training on several devices: two ranks on the CPU against one process, ends of their processes,
and what is told of them."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch
from azurite_server import free_port
from one_folder import OneFolder
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from two_ranks import RESUMED, SHAPE, cases, job, rows_of, trained

from distillery.errors import StoreUnavailable, TrainingError, TrainingUnavailable
from distillery.models import inspect
from distillery.models.device import MACHINES, are_several, check_gpu
from distillery.models.inspect import weights_digest
from distillery.recipe import TrainingRecipe
from distillery.training import devices
from distillery.training.checkpoint import STATE_FILE
from distillery.training.devices import command_of, environment_of, failure_of
from distillery.training.fine_tune import fine_tune
from distillery.training.job import TrainingJob, distil
from distillery.training.loop import Progress, TrainingProgress, TrainingResult
from distillery.training.ranks import Ranks
from distillery.training.rows import TrainingRow

# Processes start in seconds on an idle machine, and in a minute where others use all of its cores.
pytestmark = pytest.mark.timeout(1200)

SUPPORT = Path(__file__).resolve().parents[1] / "support"
PROJECT = SUPPORT.parents[1]

TinyModel = Callable[[str], Path]


def numbers(batches: list[list[int]], ranks: int, split: bool = False) -> list[list[list[int]]]:
    """Return what each of `ranks` computes of batches of rows that are given by a number, negative
    where a row counts as nothing. `split`: whether they share out the model."""
    step = [[TrainingRow(prompt=(number,), answer=0) for number in batch] for batch in batches]
    count = sum(map(len, batches))
    found = []
    for rank in range(ranks):
        own = []
        for rows, share in Ranks(rank, ranks, split).share(step):
            assert share in (len(rows) / count, 0)
            own.append([row.prompt[0] * (1 if share else -1) for row in rows])
        found.append(own)
    return found


@pytest.mark.slow
def test_a_device_keeps_nothing_of_a_model_that_is_split(tiny_model: TinyModel) -> None:
    """In a process of its own, which is the only rank."""
    code = """
import sys, weakref
import torch.distributed as dist
from distillery.models.load import load_model
from distillery.recipe import TrainingRecipe
from distillery.training.loop import set_up
from distillery.training.ranks import Ranks
from two_ranks import rows_of
from pathlib import Path
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model, _ = load_model(Path(sys.argv[1]))
whole = [weakref.ref(weight) for weight in model.parameters()]
recipe = TrainingRecipe(method="full")
training = set_up(model, rows_of("letters"), [], recipe, None, 0, 2, Ranks(split=True))
print(len(whole), sum(weight() is not None for weight in whole))
dist.destroy_process_group()
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(tiny_model("llama"))]
    own_modules = {"PYTHONPATH": f"{PROJECT}:{SUPPORT}"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own_modules)
    assert done.returncode == 0, done.stderr
    weights, kept = map(int, done.stdout.split())
    assert weights > 0
    assert kept == 0, "FSDP leaves their memory on the device"


def test_ranks_share_out_batches_or_their_rows() -> None:
    assert numbers([[1, 2], [3, 4], [5]], 1) == [[[1, 2], [3, 4], [5]]]
    assert numbers([[1, 2], [3, 4], [5]], 2) == [[[1, 2], [5]], [[3, 4]]]
    assert numbers([[1, 2, 3], [4]], 3) == [[[1], [4]], [[2]], [[3]]]
    assert numbers([[1]], 2) == [[[1]], []]


def test_ranks_that_share_out_the_model_compute_as_many_batches() -> None:
    assert numbers([[1, 2], [3, 4], [5]], 2, split=True) == [[[1, 2], [5]], [[3, 4], [-1]]]
    assert numbers([[1, 2, 3], [4]], 3, split=True) == [[[1], [4]], [[2], [-1]], [[3], [-1]]]
    assert numbers([[1]], 2, split=True) == [[[1]], [[-1]]]
    assert numbers([[1, 2], [3, 4]], 2, split=True) == [[[1, 2]], [[3, 4]]]


@pytest.fixture(scope="module")
def of_two_ranks(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two ranks have found."""
    out = tmp_path_factory.mktemp("found")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", "-m", "two_ranks", str(tiny_model("llama"))]
    own_modules = {"PYTHONPATH": str(SUPPORT)}
    done = subprocess.run(
        [*command, str(out)], capture_output=True, text=True, env=os.environ | own_modules
    )
    assert done.returncode == 0, done.stderr
    return out


def tolerance_of(name: str) -> tuple[float, float]:
    """Return how far weights and figures of a case may be from those of one process. Rounding is
    more in bfloat16, and AdamW makes much of it by a high learning rate and in tiny gradients."""
    if name.startswith("bfloat16"):
        return 2e-3, 0.02
    grows = name in ("patience", "long beginnings, texts")
    return (1e-4, 1e-4) if grows else (1e-5, 1e-5)


WENT_ON = ("True to True", "True to False", "False to True")


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns(tiny_model: TinyModel, of_two_ranks: Path) -> None:
    """Whether both hold the whole model or half of it, and whatever a checkpoint is made with."""
    first, second = torch.load(of_two_ranks / "found-0"), torch.load(of_two_ranks / "found-1")
    for name, case in cases().items():
        one = trained(tiny_model("llama"), case)
        both = first[name]["weights"].items()
        assert all(torch.equal(weight, second[name]["weights"][key]) for key, weight in both), name
        compared = [name]
        if case.may_be_split:
            compared.append(f"{name}, split")
        if name in RESUMED:
            compared += [f"{name}, {ranks}" for ranks in WENT_ON]
        for each in compared:
            same_training(first[each], one, each, *tolerance_of(name))
    for name in RESUMED:
        straight, went_on = first[f"{name}, split"], first[f"{name}, True to True"]
        for weight, value in straight["weights"].items():
            assert torch.equal(went_on["weights"][weight], value), name
    stopped = json.loads(first["patience"]["result"])
    assert stopped["kept_step"] < stopped["steps"] < 60, "else patience ends nothing here"


def same_training(
    found: dict[str, Any], expected: dict[str, Any], name: str, of_weights: float, of_figures: float
) -> None:
    """Compare the weights and figures of two trainings."""
    for weight, value in expected["weights"].items():
        near = torch.allclose(found["weights"][weight], value, atol=of_weights, rtol=of_weights)
        assert near, f"{name}: {weight}"
    of_one, of_two = (json.loads(each["result"]) for each in (expected, found))
    for result in (of_one, of_two):
        del result["rows_per_second"], result["decisions"], result["resumed_at"]
    flat, of_two = flattened(of_one), flattened(of_two)
    assert of_two == pytest.approx(flat, abs=of_figures), name
    # A training that goes on has those of its last steps.
    norms = expected["norms"][-len(found["norms"]) :]
    assert found["norms"] == pytest.approx(norms, rel=10 * of_figures), name


@pytest.mark.slow
def test_of_a_split_model_each_rank_holds_half(of_two_ranks: Path) -> None:
    for number in range(2):
        found = torch.load(of_two_ranks / f"found-{number}")
        whole, split = found["bytes of hard"]
        assert split == whole / 2
        whole, split = found["bytes of lora"]
        adapter = 4 * json.loads(found["lora"]["result"])["trained_parameters"]
        assert split == (whole - adapter) / 2 + adapter


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_split_model_is_written_whole(
    method: str, tiny_model: TinyModel, of_two_ranks: Path, tmp_path: Path
) -> None:
    distil(job(tiny_model("llama"), tmp_path, method, split=False), None, None)
    expected, found = tmp_path / method, of_two_ranks / "jobs" / method
    assert {file.name for file in found.iterdir()} == {file.name for file in expected.iterdir()}
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    weights, of_split = load_file(expected / file), load_file(found / file)
    assert set(weights) == set(of_split)
    for name, weight in weights.items():
        assert torch.allclose(of_split[name], weight, atol=1e-5, rtol=1e-5), name
    if method == "full":
        config = "config.json"
        assert (found / config).read_bytes() == (expected / config).read_bytes()
    results = [
        TrainingResult.model_validate_json((folder / f"{method}.json").read_text())
        for folder in (tmp_path, of_two_ranks / "jobs")
    ]
    assert results[0].parameters == results[1].parameters
    assert results[0].trained_parameters == results[1].trained_parameters


def test_ranks_with_different_base_models_do_not_train(tmp_path: Path) -> None:
    """Two machines: the same path, of which each has a folder of its own."""
    job = TrainingJob(
        model=Path("base"),
        adapter=None,
        remote_code=False,
        rows=Path("rows"),
        validation=Path("rows"),
        hidden=None,
        recipe=TrainingRecipe(),
        result=Path("result"),
        out=Path("out"),
        keep_end=False,
        split=False,
    )
    (tmp_path / "job.json").write_text(job.model_dump_json())
    started = []
    for rank in range(2):
        machine = tmp_path / f"machine-{rank}"
        (machine / "base").mkdir(parents=True)
        (machine / "base" / "model.safetensors").write_bytes(bytes([rank]) * 100)
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        command = [sys.executable, "-m", "distillery.training.devices", str(tmp_path)]
        own_modules = {"PYTHONPATH": str(PROJECT), "GLOO_SOCKET_IFNAME": "lo"}
        process = subprocess.Popen(
            [*command, str(os.getpid())], cwd=machine, env=os.environ | ranks | own_modules
        )
        started.append(process)
    assert [process.wait(240) for process in started] == [1, 1]
    assert len(list(tmp_path.glob("error-*.json"))) == 2
    found = failure_of(1, tmp_path)
    assert type(found) is TrainingError
    assert str(found).startswith("base.model: rank 1 has other weights than rank 0; put the same")


def test_a_digest_tells_weights_apart(tmp_path: Path) -> None:
    for name in ("one", "same", "other"):
        (tmp_path / name).mkdir()
        weights = random.Random(0).randbytes(100_000)
        if name == "other":
            weights = weights[:-1] + b"\0"
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "README.md").write_text(name)
    one, same, other = (weights_digest([tmp_path / name]) for name in ("one", "same", "other"))
    assert one == same != other
    (tmp_path / "same" / "model.safetensors").rename(tmp_path / "same" / "moved.safetensors")
    assert weights_digest([tmp_path / "same"]) != one


def test_a_digest_reads_little_of_large_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four files of 100 blocks each, every fortieth block is read."""
    monkeypatch.setattr(inspect, "MOST_BLOCKS", 10)
    found = []
    for changed in (None, 40, 41):
        for number in range(4):
            content = bytearray(100 * inspect.BLOCK)
            if changed is not None and number == 3:
                content[changed * inspect.BLOCK] = 1
            (tmp_path / f"{number}.safetensors").write_bytes(content)
        found.append(weights_digest([tmp_path]))
    assert found[0] == found[2] != found[1]


def flattened(result: dict[str, Any]) -> dict[str, Any]:
    """Return the figures with those of the curve's points beside the others."""
    points = {
        f"{point['step']} {name}": value
        for point in result.pop("curve")
        for name, value in point.items()
    }
    return {name: value for name, value in (result | points).items() if value is not None}


ROWS = rows_of("letters")


def on_two(
    base: Path, out: Path, checkpoints: OneFolder | None, progress: Progress | None = None
) -> TrainingResult:
    """Train through Olive on as many devices as the settings say, with dropout."""
    lora = {"method": "lora", "lora": {"rank": 4, "dropout": 0.2}}
    recipe = TrainingRecipe.model_validate(
        {**SHAPE, **lora, "epochs": 1, "minimum_steps": 180, "soft_weight": 0.5, "patience": 60}
    )
    return fine_tune(
        base, None, ROWS, ROWS[:5], recipe, out, progress=progress, checkpoints=checkpoints
    )


def launchers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [each for each in children if "torch.distributed.run" in each.cmdline()]


class Killer:
    """Kills the process of `rank`, or the launcher for "", once a checkpoint of the training is
    kept."""

    def __init__(self, rank: str, kept: OneFolder) -> None:
        self.rank, self.kept = rank, kept
        self.began = step_of(kept)
        self.processes: list[psutil.Process] = []

    def __call__(self, report: TrainingProgress) -> None:
        if step_of(self.kept) == self.began or self.processes:
            return
        (launcher,) = launchers()
        ranks = {each.environ()["RANK"]: each for each in launcher.children()}
        assert {"127.0.0.1"} == open_to([launcher, *ranks.values()])
        self.processes = [launcher, *ranks.values()]
        ranks.get(self.rank, launcher).kill()


def open_to(processes: list[psutil.Process]) -> set[str]:
    """Return the addresses at which processes listen."""
    found = [each for process in processes for each in process.net_connections("inet")]
    return {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN}


def step_of(kept: OneFolder) -> int:
    """Return the step of the checkpoint that is kept, 0 for none."""
    file = kept.path / STATE_FILE
    return int(torch.load(file)["step"]) if file.exists() else 0


WEIGHTS = Path("adapter", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def straight(
    tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainingResult, bytes]:
    """The figures and weights of a training that nothing disturbs, on two machines: two launchers
    on this one, of which the second knows no file of the job."""
    out = tmp_path_factory.mktemp("straight")
    address = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
    address |= {"PET_NNODES": "2", "GLOO_SOCKET_IFNAME": "lo", "DISTILLERY_HOME": str(out / "home")}
    # Nobody keeps these checkpoints, and none is waited for.
    address |= {"DISTILLERY_CHECKPOINT_SECONDS": "0.1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    other = subprocess.Popen(
        [*launcher, "-m", "distillery.training.devices"],
        env=os.environ | address | {"PET_NODE_RANK": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (address | {"PET_NODE_RANK": "0"}).items():
            patch.setenv(name, value)
        result = on_two(tiny_model("llama"), out, None)
    _, said = other.communicate(timeout=60)
    assert other.returncode == 0, said
    assert result.steps == 180
    assert [text[:23] for text in result.decisions] == ["training for 60.0 epoch"]
    return result, (out / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_training_whose_processes_die_goes_on_to_the_same_weights(
    straight: tuple[TrainingResult, bytes],
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="distillery")
    monkeypatch.setenv("DISTILLERY_DEVICES", "2")
    monkeypatch.setenv("DISTILLERY_CHECKPOINT_SECONDS", "0.1")
    base, kept, steps = tiny_model("llama"), OneFolder(tmp_path / "kept"), [0]
    for rank in ("1", "0", ""):
        killer = Killer(rank, kept)
        with pytest.raises(TrainingUnavailable, match="the next run goes on from its last") as died:
            on_two(base, tmp_path / "killed", kept, killer)
        assert "its process was killed, as happens when memory runs out" in str(died.value)
        assert psutil.wait_procs(killer.processes, timeout=10)[1] == [], "the others end too"
        steps.append(step_of(kept))
    assert steps == sorted(set(steps)), "each run went on from the one before"
    resumed = on_two(base, tmp_path / "resumed", kept)
    assert resumed.resumed_at == steps[-1]
    assert f"training goes on from its checkpoint at step {steps[-1]}" in caplog.messages
    assert resumed.curve == straight[0].curve
    assert (tmp_path / "resumed" / WEIGHTS).read_bytes() == straight[1]
    monkeypatch.setenv("DISTILLERY_DEVICES", "1")
    last = step_of(kept)
    alone = on_two(base, tmp_path / "alone", kept)
    assert alone.resumed_at == last, "a checkpoint of two devices serves one"


@pytest.mark.slow
def test_a_split_training_whose_process_dies_goes_on_to_the_weights_of_one_process(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_CHECKPOINT_SECONDS", "0.1")
    base, kept = tiny_model("llama"), OneFolder(tmp_path / "kept")
    recipe = TrainingRecipe.model_validate({**SHAPE, "epochs": 30, "patience": 30})

    def at(out: str, progress: Progress | None = None) -> tuple[TrainingResult, dict[str, Any]]:
        result = fine_tune(
            base, None, ROWS, ROWS[:5], recipe, tmp_path / out, checkpoints=kept, progress=progress
        )
        return result, load_file(tmp_path / out / "model" / "model.safetensors")

    monkeypatch.setenv("DISTILLERY_DEVICES", "2")
    monkeypatch.setenv("DISTILLERY_FSDP", "true")
    with pytest.raises(TrainingUnavailable, match="the next run goes on from its last"):
        at("killed", Killer("1", kept))
    died_at = step_of(kept)
    resumed, weights = at("resumed")
    assert resumed.resumed_at == died_at
    monkeypatch.setenv("DISTILLERY_DEVICES", "1")
    monkeypatch.setenv("DISTILLERY_FSDP", "false")
    last = step_of(kept)
    assert last > died_at
    alone, of_one = at("went on alone")
    assert alone.resumed_at == last, "a checkpoint of a split model serves one device"
    shutil.rmtree(kept.path)
    straight, expected = at("straight")
    assert straight.resumed_at == 0
    for name, weight in expected.items():
        assert torch.allclose(weights[name], weight, atol=1e-5, rtol=1e-5), name
        assert torch.allclose(of_one[name], weight, atol=1e-5, rtol=1e-5), name


@pytest.mark.slow
def test_what_ends_a_training_on_two_devices_is_one_line_and_leaves_nothing(
    tiny_model: TinyModel,
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("DISTILLERY_DEVICES", "2")
    monkeypatch.setenv("DISTILLERY_CHECKPOINT_SECONDS", "0.1")
    recipe = TrainingRecipe(method="full", learning_rate=1e30, epochs=9, precision="float32")
    with pytest.raises(TrainingError, match=r"^the loss is nan at step \d+; lower training\.lea"):
        fine_tune(tiny_model("llama"), None, ROWS, [], recipe, tmp_path / "nan")

    class Down(OneFolder):
        def save(self, folder: Path) -> None:
            raise StoreUnavailable("abfs://store: does not answer")

    def lost(report: TrainingProgress) -> None:
        if report.step > 30:
            raise StoreUnavailable("the lease is lost")

    with pytest.raises(StoreUnavailable, match="the lease is lost"):
        on_two(tiny_model("llama"), tmp_path / "lost", Down(tmp_path / "kept"), lost)
    assert re.search(r"no checkpoint at step \d+: abfs://store: does not answer", caplog.text)
    assert launchers() == []
    assert os.listdir(home / "work") == []


def said_by_torchrun(cause: str, other: str) -> str:
    """Return what torchrun 2.13 writes to stderr when two ranks end with the exit codes `cause` and
    `other`."""
    with patch("socket.getfqdn", return_value="host"):
        failures = {
            rank: ProcessFailure(rank, 12 + rank, int(code), "<N/A>")
            for rank, code in enumerate((cause, other))
        }
        failures[1].timestamp += 1
        error = ChildFailedError("distillery.training.devices", failures)
    return f"""\
W1128 19:36:59.523000 10 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 13 \
closing signal SIGTERM
E1128 19:36:59.539000 10 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: \
{cause}) local_rank: 0 (pid: 12) of binary: python
Traceback (most recent call last):
  File "torch/distributed/launcher/api.py", line 383, in launch_agent
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: {error}
"""


@pytest.mark.parametrize(
    ("said", "stderr", "kind", "text"),
    [
        (
            [["RuntimeError", "Connection closed"], ["TrainingError", "the loss is nan"]],
            "",
            TrainingError,
            r"^the loss is nan$",
        ),
        (
            [["RuntimeError", "Connection closed"]],
            said_by_torchrun("-9", "-15"),
            TrainingUnavailable,
            r"^training on several devices: its process was killed, .*; the next run goes on",
        ),
        (
            [["RuntimeError", "Connection closed"]],
            said_by_torchrun("1", "-9"),
            TrainingUnavailable,
            r"its process was killed",
        ),
        (
            [["OutOfMemoryError", "CUDA out of memory"], ["RuntimeError", "Connection closed"]],
            said_by_torchrun("1", "-15"),
            TrainingError,
            r"^training.batch_size: a GPU's memory is full \(CUDA out of memory\); lower it and",
        ),
        (
            [["KeyError", "'a'"]],
            said_by_torchrun("1", "-15"),
            RuntimeError,
            r"^KeyError: 'a'$",
        ),
        (
            [],
            "****\nModuleNotFoundError: none named Z\n****\n" + said_by_torchrun("1", "-15"),
            TrainingUnavailable,
            r"exit code 1 \(ModuleNotFoundError: none named Z\); the next run",
        ),
        ([], said_by_torchrun("-15", "-15"), TrainingUnavailable, r"by signal SIGTERM"),
        ([], "no port\n====\n", TrainingUnavailable, r"exit code 1 \(no port\); the next run"),
    ],
)
def test_the_cause_is_told_and_not_what_followed_from_it(
    tmp_path: Path, said: list[list[str]], stderr: str, kind: type[Exception], text: str
) -> None:
    (tmp_path / "stderr.txt").write_text(stderr)
    for number, each in enumerate(said):
        file = tmp_path / f"error-{9 - number}.json"
        file.write_text(json.dumps(each))
        os.utime(file, ns=(number, number))
    found = failure_of(1, tmp_path)
    assert type(found) is kind
    with pytest.raises(kind, match=text):
        raise found


@pytest.mark.parametrize("failing", ["meet", "folder_of_first"])
def test_a_rank_that_meets_no_other_says_why(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(folder: str) -> None:
        raise TrainingUnavailable(f"{failing}: nobody\nthere")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(devices, "exit_with_parent", lambda parent: None)
    monkeypatch.setattr(devices.AskingProcess, "on_stdout", lambda: None)
    monkeypatch.setattr(devices, "meet", lambda folder: Ranks(1, 2))
    monkeypatch.setattr(devices, failing, fails)
    assert devices.main([str(tmp_path), "1"]) == 1
    found = json.loads((tmp_path / "error-1.json").read_text())
    assert found == ["TrainingUnavailable", f"{failing}: nobody there"]
    with pytest.raises(TrainingUnavailable, match="nobody"):
        devices.main([])


def test_processes_that_do_not_reach_each_other_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any, **named: Any) -> None:
        raise torch.distributed.DistStoreError("timed out")

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", fails)
    with pytest.raises(TrainingUnavailable, match=r"do not reach each other \(timed out\); the"):
        devices.meet(str(tmp_path))


def test_a_rank_whose_launcher_died_before_it_watches_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any) -> None:
        raise AssertionError("it goes on")

    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(devices, "exit_with_parent", fails)
    assert devices.main([str(tmp_path), "1"]) == 1
    with pytest.raises(AssertionError, match="it goes on"):
        devices.main([])


def test_more_devices_than_gpus_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_DEVICES", "4")
    check_gpu(allow_cpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_gpu(allow_cpu=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(TrainingUnavailable, match="DISTILLERY_DEVICES: 4, and PyTorch finds 2 GPU"):
        check_gpu(allow_cpu=True)


def test_a_full_gpu_may_share_out_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stderr.txt").write_text("")
    (tmp_path / "error-0.json").write_text(json.dumps(["OutOfMemoryError", "CUDA out of memory"]))
    assert str(failure_of(1, tmp_path)).endswith(
        ", or, but for qlora, DISTILLERY_FSDP=true where the worker starts"
    )
    monkeypatch.setenv("DISTILLERY_FSDP", "true")
    assert str(failure_of(1, tmp_path)).endswith("or set training.gradient_checkpointing: true")


def test_a_model_that_is_split_needs_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_FSDP", "true")
    monkeypatch.delenv(MACHINES, raising=False)
    with pytest.raises(TrainingUnavailable, match=r"^DISTILLERY_FSDP: .* DISTILLERY_DEVICES is 1"):
        check_gpu(allow_cpu=True)
    monkeypatch.setenv("DISTILLERY_DEVICES", "2")
    check_gpu(allow_cpu=True)
    monkeypatch.setenv("DISTILLERY_DEVICES", "1")
    monkeypatch.setenv(MACHINES, "2")
    check_gpu(allow_cpu=True)


@pytest.mark.security
def test_ranks_get_no_secret_and_those_of_one_machine_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(MACHINES, raising=False)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_RAS_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TEACHER_MODEL_KEY", "planted")
    monkeypatch.setenv("DISTILLERY_STORE", "https://user:planted@host/store")
    environment = environment_of(tmp_path, 2)
    assert "planted" not in str(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"
    assert environment["NCCL_RAS_ENABLE"] == "0"
    assert environment["OMP_NUM_THREADS"] == str(max(1, torch.get_num_threads() // 2))
    assert f"--rdzv-endpoint {tmp_path}" in " ".join(command_of(tmp_path, 2))
    monkeypatch.setenv(MACHINES, "1")
    assert not are_several()
    assert f"--rdzv-endpoint {tmp_path}" in " ".join(command_of(tmp_path, 2))
    assert environment_of(tmp_path, 2)["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv(MACHINES, "2")
    assert are_several(), "one device on each of two machines"
    assert "--rdzv-endpoint" not in command_of(tmp_path, 1)
    of_several = environment_of(tmp_path, 1)
    assert not {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_RAS_ENABLE"} & set(of_several)
