"""Training: LoRA targets, determinism, early stopping, healing, checkpoints and a kill, and each
method through Olive."""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from still_clock import StillClock
from tiny_model import ARCHITECTURES

from distillery.errors import DataError, StoreUnavailable, TrainingError
from distillery.export.build import export
from distillery.inference.decoder import ADAPTER_FILE
from distillery.labels.known import gold_labels
from distillery.models.device import choose_device
from distillery.models.inspect import model_and_adapter
from distillery.models.load import end_of_turn_id, load_model, load_tokenizer, pad_id
from distillery.prompts import TransformersTokenizer, letter_ids, render_ids
from distillery.recipe import (
    ExportForm,
    HealingRecipe,
    LayerChoice,
    LoraRecipe,
    PromptRecipe,
    TrainingRecipe,
)
from distillery.records import Example, TeacherLabel
from distillery.training.adapters import add_lora, linear_modules
from distillery.training.checkpoint import (
    STATE_FILE,
    Checkpoints,
    CheckpointTimer,
    TrainingState,
)
from distillery.training.decisions import kept_decisions
from distillery.training.fine_tune import fine_tune
from distillery.training.hidden_states import hidden_states
from distillery.training.loop import Progress, TrainingProgress, TrainingResult, train
from distillery.training.losses import hidden_loss
from distillery.training.ranks import Ranks
from distillery.training.rows import TrainingRow, training_rows
from distillery.training.validation import option_probabilities, proven_worse, validate

PROMPT = PromptRecipe(system="Pick.", user="{question}\n{choices}", choice="{letter}) {text}")
TinyModel = Callable[[str], Path]


def examples(count: int = 12) -> list[Example]:
    """Rows whose answer can be read off the question."""
    words = ("bread", "river", "cloud")
    return [
        Example(
            example_id=str(i),
            question=f"{words[i % 3]} number {i}",
            choices=("oven", "bridge", "rain"),
            answer_key="ABC"[i % 3],
        )
        for i in range(count)
    ]


def soft_labels(rows: list[Example]) -> dict[str, TeacherLabel]:
    spread = {"A": (0.7, 0.2, 0.1), "B": (0.1, 0.8, 0.1), "C": (0.25, 0.25, 0.5)}
    return {
        row.example_id: TeacherLabel(
            example_id=row.example_id,
            answer=str(row.answer_key),
            distribution=dict(zip("ABC", spread[str(row.answer_key)], strict=True)),
        )
        for row in rows
    }


def rendered(folder: Path, count: int = 12) -> list[TrainingRow]:
    rows, _ = training_rows(
        examples(count), soft_labels(examples(count)), PROMPT, load_tokenizer(folder)
    )
    return rows


def test_a_cut_student_learns_its_teachers_hidden_states(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder, device = tiny_model("llama"), choose_device("float32")
    rows = rendered(folder)

    def states(of: Path) -> torch.Tensor:
        model, tokenizer = load_model(of)
        return hidden_states(model, rows, pad_id=pad_id(tokenizer), device=device, batch_size=5)

    taught = states(folder)
    for index in (0, 7):
        model, _ = load_model(folder)
        alone = model(torch.tensor([rows[index].prompt]), output_hidden_states=True).hidden_states[
            -1
        ][0, -1]
        assert torch.allclose(taught[index], alone, atol=1e-5)
    figures = {}
    for weight in (0.0, 5.0):
        recipe = TrainingRecipe(
            method="full", epochs=10, learning_rate=1e-3, hidden_weight=weight, precision="float32"
        )
        out = tmp_path / str(weight)
        fine_tune(folder, None, rows, [], recipe, out, layers=(1,))
        assert not (out / "hidden.npy").exists()
        figures[weight] = float(hidden_loss(states(out / "model"), taught))
    assert figures[5.0] < 0.75 * figures[0.0]


@pytest.mark.parametrize("by", [hidden_states, option_probabilities])
def test_the_head_reads_contiguous_states(tiny_model: TinyModel, by: Any) -> None:
    """Of others PyTorch's CPU kernels copy the whole head once for each row."""
    folder, seen = tiny_model("llama"), []
    model, tokenizer = load_model(folder)
    model.get_output_embeddings().register_forward_hook(
        lambda _head, inputs, _: seen.append(inputs[0].is_contiguous())
    )
    by(model, rendered(folder), pad_id=pad_id(tokenizer), device=choose_device("float32"))
    assert seen
    assert all(seen)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_embeddings_stay_as_they_are(tiny_model: TinyModel, frozen: bool) -> None:
    model, tokenizer = load_model(tiny_model("llama"))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    recipe = TrainingRecipe(
        method="full", max_steps=2, freeze_embeddings=frozen, precision="float32"
    )
    _, result = train(
        model,
        rendered(tiny_model("llama")),
        [],
        recipe,
        pad_id=pad_id(tokenizer),
        end_id=end_of_turn_id(tokenizer),
    )
    same = {name for name, weight in model.named_parameters() if torch.equal(weight, before[name])}
    assert same == ({"model.embed_tokens.weight"} if frozen else set())
    assert result.parameters - result.trained_parameters == sum(
        before[name].numel() for name in same
    )


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_layers_below_the_first_that_is_trained_stay_as_they_are(
    tiny_model: TinyModel, method: Any
) -> None:
    rows, (model, tokenizer) = rendered(tiny_model("llama")), load_model(tiny_model("llama"))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    recipe = TrainingRecipe(method=method, first_layer=1, max_steps=3, learning_rate=0.01)
    model, result = train(
        model, rows, [], recipe, pad_id=pad_id(tokenizer), end_id=end_of_turn_id(tokenizer)
    )
    if recipe.adapts:
        model = model.merge_and_unload()
    changed = set()
    for name, weight in model.state_dict().items():
        if not torch.allclose(weight.float(), before[name], atol=1e-2 if recipe.adapts else 0):
            changed.add(name)
    assert changed
    assert not [name for name in changed if ".layers.0." in name or "embed" in name]
    assert all(".layers.1." in name or "norm" in name for name in changed)
    whole = TrainingRecipe(method=method, max_steps=1)
    model, tokenizer = load_model(tiny_model("llama"))
    _, trained_whole = train(
        model, rows, [], whole, pad_id=pad_id(tokenizer), end_id=end_of_turn_id(tokenizer)
    )
    assert result.trained_parameters < trained_whole.trained_parameters


def test_a_first_layer_that_the_model_has_not_is_one_line(tiny_model: TinyModel) -> None:
    model, _ = load_model(tiny_model("llama"))
    said = r"^training\.first_layer: 2, but this model has layers 0 to 1; choose one of these$"
    with pytest.raises(TrainingError, match=said):
        train(
            model,
            rendered(tiny_model("llama")),
            [],
            TrainingRecipe(first_layer=2),
            pad_id=0,
            end_id=0,
        )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_left_padding_changes_no_probability(tiny_model: TinyModel, arch: str) -> None:
    model, tokenizer = load_model(tiny_model(arch))
    rows = rendered(tiny_model(arch), 4)
    rows[1] = rows[1].model_copy(update={"prompt": rows[1].prompt[:-4]})
    device, pad = choose_device("float32"), pad_id(tokenizer)
    together = option_probabilities(model, rows, pad_id=pad, device=device, batch_size=4)
    alone = option_probabilities(model, rows, pad_id=pad, device=device, batch_size=1)
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "expected"), [("llama", "q_proj"), ("phi3", "qkv_proj"), ("qwen3", "q_proj")]
)
def test_lora_adapts_what_the_architecture_calls_its_layers(
    tiny_model: TinyModel, arch: str, expected: str
) -> None:
    model, _ = load_model(tiny_model(arch))
    assert expected in linear_modules(model)
    assert "lm_head" not in linear_modules(model)
    adapted = add_lora(model, LoraRecipe(rank=2))
    assert any(f"{expected}.lora_A" in name for name, _ in adapted.named_parameters())


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (("q_proj", "v_proj"), ("o_proj",)),
        (("lm_head", "embed_tokens", "norm", "mlp"), ("mlp.down_proj",)),
    ],
)
def test_target_modules_that_are_no_linear_layers_of_the_model_are_named(
    tiny_model: TinyModel, wrong: tuple[str, ...], right: tuple[str, ...]
) -> None:
    model, _ = load_model(tiny_model("phi3"))
    with pytest.raises(
        TrainingError, match=rf"target_modules: {', '.join(wrong)}: no linear layer .*qkv_proj"
    ):
        add_lora(model, LoraRecipe(target_modules=wrong + right))
    add_lora(model, LoraRecipe(target_modules=right))


def test_a_validation_loss_that_is_no_number_ends_training(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, (network, _) = rendered(tiny_model("llama")), load_model(tiny_model("llama"))
    monkeypatch.setattr(
        "distillery.training.validation.option_probabilities",
        lambda _model, rows, **_: [[math.nan] * 3 for _ in rows],
    )
    recipe = TrainingRecipe(method="full", max_steps=1)
    with pytest.raises(
        TrainingError,
        match=r"the validation loss is nan at step 1; lower training\.learning_rate",
    ):
        train(network, rows, rows, recipe, pad_id=0, end_id=2)


def test_a_merged_model_can_be_trained_on(tiny_model: TinyModel, tmp_path: Path) -> None:
    add_lora(load_model(tiny_model("llama"))[0], LoraRecipe()).save_pretrained(tmp_path)
    merged, _ = load_model(tiny_model("llama"), tmp_path)
    rows = rendered(tiny_model("llama"))
    _, result = train(
        merged, rows, [], TrainingRecipe(method="full", max_steps=2), pad_id=0, end_id=2
    )
    assert result.steps == 2


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_training_learns_counts_its_steps_and_repeats_itself(
    tiny_model: TinyModel, method: str
) -> None:
    rows = rendered(tiny_model("llama"))
    recipe = TrainingRecipe(
        method=method, epochs=8, batch_size=4, learning_rate=1e-2, soft_weight=0.5, seed=3
    )
    outcomes = []
    for _ in range(2):
        model, tokenizer = load_model(tiny_model("llama"))
        trained, result = train(model, rows, rows, recipe, pad_id=pad_id(tokenizer), end_id=2)
        outcomes.append((result, [p.detach().clone() for p in trained.parameters()]))
    (first, weights), (second, again) = outcomes
    assert first.steps == 24
    assert first.curve[-1].loss < first.curve[0].loss
    assert first.validation_accuracy is not None
    assert first.validation_accuracy > 0.6, "chance is 0.33"
    assert first.curve == second.curve
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


def test_few_rows_are_passed_through_more_often(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="distillery")
    rows = rendered(tiny_model("llama"))
    few = TrainingRecipe(method="full", epochs=2, batch_size=4, minimum_steps=9)
    assert trained(tiny_model("llama"), few, rows)[0].steps == 9
    said = "training for 3.0 epochs: 2 would be 6 steps, and training.minimum_steps is 9"
    assert [r.message for r in caplog.records if r.name.startswith("distillery")] == [said]
    enough = few.model_copy(update={"minimum_steps": 6})
    assert trained(tiny_model("llama"), enough, rows)[0].steps == 6
    by_number = few.model_copy(update={"max_steps": 3})
    assert trained(tiny_model("llama"), by_number, rows)[0].steps == 3


def trained(
    folder: Path, recipe: TrainingRecipe, rows: list[TrainingRow]
) -> tuple[TrainingResult, Any]:
    model, tokenizer = load_model(folder)
    model, result = train(model, rows, rows[:6], recipe, pad_id=pad_id(tokenizer), end_id=2)
    return result, model


def test_a_step_of_several_batches_is_one_of_their_sum(tiny_model: TinyModel) -> None:
    rows = rendered(tiny_model("llama"), 10)
    shape = {"method": "full", "max_steps": 1, "precision": "float32", "learning_rate": 1e-3}
    whole, one = trained(tiny_model("llama"), TrainingRecipe(batch_size=10, **shape), rows)
    parts, several = trained(
        tiny_model("llama"), TrainingRecipe(batch_size=4, accumulation=3, **shape), rows
    )
    assert parts.curve[0].loss == pytest.approx(whole.curve[0].loss, rel=1e-5)
    pairs = list(zip(one.parameters(), several.parameters(), strict=True))
    apart = sum(int(((a - b).abs() > 1e-4).sum()) for a, b in pairs)
    # Adam's first step is as long for a gradient of almost 0, whose sign is a matter of rounding.
    assert apart < 1e-3 * sum(a.numel() for a, _ in pairs)
    counted, _ = trained(
        tiny_model("llama"), TrainingRecipe(batch_size=2, accumulation=2, epochs=2), rows
    )
    assert counted.steps == 6, "five batches are three steps an epoch"


def test_patience_ends_training_and_keeps_the_best_epoch(tiny_model: TinyModel) -> None:
    rows = rendered(tiny_model("llama"))
    shape = {
        "method": "full",
        "epochs": 40,
        "batch_size": 4,
        "learning_rate": 0.05,
        "precision": "float32",
    }
    result, model = trained(tiny_model("llama"), TrainingRecipe(patience=2, **shape), rows)
    losses = {
        point.step: point.validation_loss
        for point in result.curve
        if point.validation_loss is not None
    }
    assert min(losses, key=lambda step: losses[step]) == result.kept_step
    assert result.steps == result.kept_step + 2 * 3 < 120, (
        "it ends two epochs of three steps after the best"
    )
    right, loss = validate(model, rows[:6], pad_id=0, device=choose_device("float32"))
    assert fmean(right) == result.validation_accuracy
    assert loss == pytest.approx(losses[result.kept_step])
    with pytest.raises(TrainingError, match="patience needs validation rows"):
        train(model, rows, [], TrainingRecipe(patience=1), pad_id=0, end_id=2)


def test_an_epoch_is_given_up_only_by_proof(tiny_model: TinyModel) -> None:
    """Validation rows that have another row's answer are lost the better training goes."""
    rows = rendered(tiny_model("llama"), count=36)
    spoiled = [
        row.model_copy(update={"answer": (row.answer + 1) % len(row.letters)}) for row in rows
    ]
    shape: dict[str, Any] = {
        "method": "full",
        "epochs": 40,
        "batch_size": 4,
        "learning_rate": 0.01,
        "precision": "float32",
        "patience": "proven",
    }
    model, _ = load_model(tiny_model("llama"))
    with kept_decisions() as decisions:
        model, result = train(model, rows, spoiled, TrainingRecipe(**shape), pad_id=0, end_id=2)
    accuracies = {
        point.step: point.validation_accuracy
        for point in result.curve
        if point.validation_accuracy is not None
    }
    assert result.kept_step < result.steps < 360, accuracies
    assert list(accuracies).index(result.steps) == list(accuracies).index(result.kept_step) + 3
    right, _ = validate(model, spoiled, pad_id=0, device=choose_device("float32"))
    assert fmean(right) == result.validation_accuracy == accuracies[result.kept_step]
    assert f"kept the weights of step {result.kept_step} of {result.steps}: " in decisions[-1]

    model, _ = load_model(tiny_model("llama"))
    _, result = train(model, rows, rows[:4], TrainingRecipe(**shape), pad_id=0, end_id=2)
    assert result.kept_step == result.steps == 360, "four rows prove nothing"
    _, result = train(model, rows, [], TrainingRecipe(**shape), pad_id=0, end_id=2)
    assert result.kept_step == result.steps == 360


def test_a_slow_decline_is_seen_and_one_of_many_epochs_needs_more_proof() -> None:
    state = TrainingState("", {}, None, None)  # type: ignore[arg-type]
    for step, right in enumerate(range(32, 12, -1), 1):
        state.step = step
        state.keep_unless_worse([True] * right + [False] * (40 - right))
    # Nine lost rows of nine are proof, since 2^-9 is less than 0.025 / 9; eight of eight are not.
    assert state.best_step == 9
    assert state.waited == 11


def test_weights_with_more_right_than_all_before_are_kept() -> None:
    """Also where the sign test speaks against them, as a few rows may gain much."""
    state = TrainingState("", {}, None, None)  # type: ignore[arg-type]
    for step, shares in enumerate(([0.5] * 20, [0.45] * 15 + [1.0] * 5), 1):
        state.step = step
        state.keep_unless_worse(shares)
    assert state.best_step == 2


@pytest.mark.parametrize(
    ("lost", "won", "proven"), [(5, 0, False), (6, 0, True), (6, 1, False), (16, 5, True)]
)
def test_a_model_is_worse_by_an_exact_test(lost: int, won: int, proven: bool) -> None:
    """One-sided binomial: 1/32 for five losses of five, 1/64 for six; 0.0133 for 16 of 21."""
    before = [True] * lost + [False] * won + [True, False] * 50
    now = [False] * lost + [True] * won + [True, False] * 50
    assert proven_worse(now, before) is proven
    assert not proven_worse(before, now)


def reasons(rows: list[Example]) -> dict[str, TeacherLabel]:
    labels = soft_labels(rows)
    return {
        key: label.model_copy(update={"rationale": f"It says {key}."} if int(key) % 2 else {})
        for key, label in labels.items()
    }


def test_reasons_are_learnt_as_a_task_beside(tiny_model: TinyModel) -> None:
    tokenizer = load_tokenizer(tiny_model("llama"))
    ask = "Why?"
    rows, _ = training_rows(examples(), reasons(examples()), PROMPT, tokenizer, ask)
    assert [bool(row.rationale) for row in rows] == [False, True] * 6
    asked = tokenizer.decode(rows[1].explain)
    assert "\n\nWhy?" in asked
    assert asked.replace("\n\nWhy?", "") == tokenizer.decode(rows[1].prompt)
    assert tokenizer.decode(rows[1].rationale) == "It says 1."
    plain, _ = training_rows(examples(), reasons(examples()), PROMPT, tokenizer)
    assert not any(row.rationale for row in plain)

    def surprise(weight: float) -> float:
        recipe = TrainingRecipe(
            method="full", epochs=6, batch_size=4, learning_rate=1e-2, rationale_weight=weight
        )
        _, model = trained(tiny_model("llama"), recipe, rows)
        ids = torch.tensor([rows[1].explain + rows[1].rationale])
        return float(
            model(
                ids,
                labels=torch.where(torch.arange(ids.shape[1]) < len(rows[1].explain), -100, ids),
            ).loss
        )

    assert surprise(1.0) < surprise(0.0) - 0.5


TEXT_PROMPT = PromptRecipe(system="Pick.", user="{question}", answer="text")


def test_answers_by_text_are_learnt_ranked_and_said(tiny_model: TinyModel) -> None:
    tokenizer = load_tokenizer(tiny_model("llama"))
    rows, _ = training_rows(examples(), soft_labels(examples()), TEXT_PROMPT, tokenizer)
    assert not rows[0].letters
    assert [tokenizer.decode(text) for text in rows[0].texts] == ["oven", "bridge", "rain"]
    recipe = TrainingRecipe(
        method="full", epochs=20, batch_size=4, learning_rate=1e-2, soft_weight=0.5
    )
    result, model = trained(tiny_model("llama"), recipe, rows)
    assert result.validation_accuracy == 1.0
    said = model.generate(torch.tensor([rows[1].prompt]), max_new_tokens=8, do_sample=False)[0][
        len(rows[1].prompt) :
    ]
    assert tokenizer.decode(said) == "bridge<|im_end|>"


def test_an_option_without_a_token_is_one_line(tiny_model: TinyModel) -> None:
    example = examples(1)[0].model_copy(update={"choices": ("oven", "", "rain")})
    with pytest.raises(
        DataError, match=r"^0: option B has no token of the student's; give it a text$"
    ):
        training_rows(
            [example], gold_labels([example]), TEXT_PROMPT, load_tokenizer(tiny_model("llama"))
        )


@dataclass
class OneFile:
    """Checkpoints as one file. `saves` counts how often it was written."""

    path: Path
    saves: int = 0

    def save(self, folder: Path) -> None:
        self.saves += 1
        beside = self.path.with_suffix(".new")
        shutil.copyfile(folder / STATE_FILE, beside)
        os.replace(beside, self.path)

    def load(self, into: Path) -> bool:
        if self.path.exists():
            shutil.copyfile(self.path, into / STATE_FILE)
        return self.path.exists()

    def of(self, step: str) -> "OneFile":
        return OneFile(self.path.with_name(f"{self.path.name}-{step}"))


HEALING = HealingRecipe(
    layers=LayerChoice(keep=2, by="block_influence"),
    training=TrainingRecipe(method="full", epochs=20, batch_size=4, hidden_weight=0.5, patience=30),
)


def long_training(
    base: Path,
    method: str,
    out: Path,
    checkpoints: OneFile | None,
    progress: Progress | None = None,
) -> TrainingResult:
    shape = (
        {"hidden_weight": 0.5} if method == "full" else {"lora": LoraRecipe(rank=4, dropout=0.2)}
    )
    recipe = TrainingRecipe(
        method=method, epochs=60, batch_size=4, soft_weight=0.5, warmup=0.3, seed=3, **shape
    )
    rows = rendered(base)
    return fine_tune(
        base,
        None,
        rows,
        rows[:5],
        recipe,
        out,
        layers=(0,) if method == "full" else None,
        healing=(HEALING,) if method == "full" else (),
        progress=progress,
        checkpoints=checkpoints,
    )


HERE = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")])
CHILD = """
import os, sys
from pathlib import Path
sys.path += os.environ["TEST_PATH"].split(os.pathsep)
from test_training import OneFile, long_training

method, base, out, kept = sys.argv[1], *map(Path, sys.argv[2:])
tell = lambda report: os.write(1, f"{report.step}\\n".encode())
long_training(base, method, out, OneFile(kept), tell)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_training_that_was_killed_goes_on_to_the_very_same_student(
    tiny_model: TinyModel, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLERY_CHECKPOINT_SECONDS", "0.2")
    base, checkpoints = tiny_model("llama"), OneFile(tmp_path / "kept")
    command = [
        sys.executable,
        "-c",
        CHILD,
        method,
        str(base),
        str(tmp_path / "killed"),
        str(checkpoints.path),
    ]
    with subprocess.Popen(
        command, env=os.environ | {"TEST_PATH": HERE}, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        last = checkpoints.of("step-2") if method == "full" else checkpoints
        for _ in child.stdout:
            if last.path.exists():
                child.kill()
                break
    assert child.returncode == -9
    resumed = long_training(base, method, tmp_path / "resumed", checkpoints)
    straight = long_training(base, method, tmp_path / "straight", None)
    assert straight.steps == 180
    assert 0 < resumed.resumed_at < 180
    assert resumed.curve == straight.curve
    assert contents(tmp_path / "resumed") == contents(tmp_path / "straight")
    if method == "full":
        healed = json.loads((tmp_path / "resumed" / "healing-1.json").read_text())
        assert (healed["steps"], healed["kept_step"] <= 60) == (60, True)
        assert json.loads((tmp_path / "resumed" / "layers.json").read_text()) == [[0, 1]]


def contents(folder: Path) -> dict[str, bytes]:
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert any(name.endswith(".safetensors") for name in files)
    return files


def short_training(
    base: Path,
    seed: int = 0,
    *,
    checkpoints: Checkpoints | None = None,
    every_s: float = 0.0,
    epochs: int = 2,
) -> tuple[TrainingResult, list[torch.Tensor]]:
    model, tokenizer = load_model(base)
    recipe = TrainingRecipe(
        method="full", epochs=epochs, batch_size=4, precision="float32", seed=seed
    )
    trained, result = train(
        model,
        rendered(base),
        [],
        recipe,
        pad_id=pad_id(tokenizer),
        end_id=2,
        checkpoints=checkpoints,
        checkpoint_every_s=every_s,
    )
    return result, [p.detach().clone() for p in trained.parameters()]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda file: None, "is of other rows, settings, weights or hardware"),
        (
            lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
            "can't be read (RuntimeError)",
        ),
        (lambda file: file.write_bytes(b"no checkpoint"), "can't be read (UnpicklingError)"),
        (lambda file: torch.save({"step": 1}, file), "can't be read (KeyError)"),
        (lambda file: torch.save([Path()], file), "can't be read (UnpicklingError)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_or_is_damaged_is_left_aside(
    harm: Callable[[Path], object],
    said: str,
    tiny_model: TinyModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base, checkpoints = tiny_model("llama"), OneFile(tmp_path / "kept")
    short_training(base, seed=1, checkpoints=checkpoints)
    harm(checkpoints.path)
    result, weights = short_training(base, seed=2, checkpoints=checkpoints)
    assert [record.getMessage() for record in caplog.records if said in record.getMessage()] == [
        f"training starts afresh: its checkpoint {said}"
    ]
    straight, expected = short_training(base, seed=2)
    assert (result.resumed_at, result.curve) == (0, straight.curve)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_a_checkpoint_of_an_earlier_version_serves(tiny_model: TinyModel, tmp_path: Path) -> None:
    base, checkpoints = tiny_model("llama"), OneFile(tmp_path / "kept")
    short_training(base, seed=1, checkpoints=checkpoints)
    values = torch.load(checkpoints.path, weights_only=True)
    del values["proof"]
    torch.save(values, checkpoints.path)
    result, _ = short_training(base, seed=1, checkpoints=checkpoints)
    assert result.resumed_at == values["step"] > 0


@dataclass
class SlowFile(OneFile):
    """Each save takes a second of `clock`."""

    clock: StillClock = field(default_factory=StillClock)

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.clock.now += 1.0


def test_checkpoints_take_two_percent_of_the_time_at_most(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, rare = SlowFile(tmp_path / "slow"), OneFile(tmp_path / "rare")
    clock = slow.clock
    monkeypatch.setattr("distillery.training.checkpoint.time", clock)
    short_training(tiny_model("llama"), checkpoints=slow, epochs=4)
    short_training(tiny_model("llama"), checkpoints=rare, every_s=3600)
    assert (slow.saves, rare.saves) == (1, 0)

    def save(checkpoints: Checkpoints, ranks: Ranks) -> None:
        saved.append(clock.now)
        clock.now += 1.0

    saved: list[float] = []
    clock.now = 0.0
    timer = CheckpointTimer(slow, every_s=0.0)
    while clock.now < 160:
        timer.save_if_due(SimpleNamespace(save=save))  # type: ignore[arg-type]
        clock.now += 0.5
    assert saved == [0.0, 51.0, 102.0, 153.0]


class Down(OneFile):
    def save(self, folder: Path) -> None:
        raise StoreUnavailable("abfs://store: the store does not answer")


def test_training_outlives_a_store_that_is_down_or_a_full_disk(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_model("llama")
    _, expected = short_training(base)
    _, weights = short_training(base, checkpoints=Down(tmp_path / "kept"), every_s=0.0)
    assert "no checkpoint at step 1: abfs://store: the store does not answer" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        _, weights = short_training(base, checkpoints=OneFile(tmp_path / "kept"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the disk is full" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


class Cancelled(BaseException):
    """As Prefect's signals are."""


@pytest.mark.parametrize("reason", [StoreUnavailable("the lease is lost"), Cancelled()])
def test_progress_says_how_far_it_is_and_can_end_it(
    reason: BaseException, tiny_model: TinyModel, tmp_path: Path, home: Path
) -> None:
    reports: list[TrainingProgress] = []

    def progress(report: TrainingProgress) -> None:
        reports.append(report)
        if report.step >= 24:
            raise reason

    with pytest.raises(type(reason)):
        long_training(tiny_model("llama"), "lora", tmp_path / "out", None, progress)
    assert [report.step for report in reports] == list(range(3, 25, 3))
    assert {report.steps for report in reports} == {180}
    assert all(report.rows_per_second > 0 and report.seconds_left > 0 for report in reports)
    assert os.listdir(home / "work") == []


def test_progress_tells_healing_from_the_last_training(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    reports: list[TrainingProgress] = []
    result = long_training(tiny_model("llama"), "full", tmp_path / "out", None, reports.append)
    assert [report.healing for report in reports] == [1] * (len(reports) - 60) + [None] * 60
    assert [report.step for report in reports if report.healing is None] == list(range(3, 181, 3))
    assert [report.point for report in reports if report.healing is None] == list(result.curve)
    assert reports[-1].point.validation_loss is not None
    assert reports[-1].point.validation_accuracy is not None


def test_progress_comes_every_ten_steps(tiny_model: TinyModel) -> None:
    model, _ = load_model(tiny_model("llama"))
    rows, recipe = rendered(tiny_model("llama"), 23), TrainingRecipe(epochs=2, batch_size=1)
    steps: list[int] = []
    train(
        model,
        rows,
        [],
        recipe,
        pad_id=0,
        end_id=2,
        progress=lambda report: steps.append(report.step),
    )
    assert steps == [10, 20, 23, 33, 43, 46]


def test_no_rows_is_one_clear_line(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, _ = load_model(tiny_model("llama"))
    with pytest.raises(TrainingError, match="no row to train on"):
        train(model, [], [], TrainingRecipe(), pad_id=0, end_id=0)
    with pytest.raises(TrainingError, match="no row to train on"):
        fine_tune(tiny_model("llama"), None, [], [], HEALING.training, tmp_path, healing=[HEALING])


def test_a_loss_that_is_no_number_stops_training(tiny_model: TinyModel) -> None:
    model, _ = load_model(tiny_model("llama"))
    recipe = TrainingRecipe(method="full", learning_rate=1e30, epochs=9, precision="float32")
    with pytest.raises(TrainingError, match=r"lower training\.learning_rate"):
        train(model, rendered(tiny_model("llama")), [], recipe, pad_id=0, end_id=2)


def test_prompts_over_the_budget_are_set_aside_and_listed(tiny_model: TinyModel) -> None:
    long = Example(example_id="long", question="word " * 400, choices=("a", "b"), answer_key="A")
    rows, too_long = training_rows(
        [*examples(2), long],
        gold_labels([*examples(2), long]),
        PROMPT,
        load_tokenizer(tiny_model("llama")),
    )
    assert (len(rows), too_long) == (2, ["long"])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_train_export_and_score_through_olive(
    tiny_model: TinyModel, tmp_path: Path, arch: str, method: str
) -> None:
    rows = rendered(tiny_model(arch))
    recipe = TrainingRecipe(
        method=method, epochs=2, batch_size=4, learning_rate=1e-2, soft_weight=1.0
    )
    layers = (0,) if method == "full" else None
    result = fine_tune(
        tiny_model(arch), None, rows, rows[:3], recipe, tmp_path / "trained", layers=layers
    )
    model, adapter = model_and_adapter(tmp_path / "trained", tiny_model(arch))
    assert (adapter is not None) == (method != "full")
    assert not list((tmp_path / "trained").glob("*.jsonl")), (
        "training rows are no part of a checkpoint"
    )
    export(model, adapter, ExportForm(precision="fp32"), tmp_path / "fp32")
    export(
        model, adapter, ExportForm(precision="int4", algorithm="k_quant_high"), tmp_path / "int4"
    )
    assert result.steps == 6

    from distillery.inference.onnx_student import OnnxStudent

    network, tokenizer = load_model(model, adapter)
    exact = option_probabilities(
        network, rows, pad_id=pad_id(tokenizer), device=choose_device("float32")
    )
    onnx = OnnxStudent(tmp_path / "fp32", threads=1)
    ids = letter_ids(onnx.tokenizer, 3)
    for example, row, expected in zip(examples(), rows, exact, strict=True):
        prompt = render_ids(example, PROMPT, onnx.tokenizer)
        assert (
            prompt
            == list(row.prompt)
            == render_ids(example, PROMPT, TransformersTokenizer(tokenizer))
        )
        assert onnx.option_probabilities(prompt, ids) == pytest.approx(expected, abs=1e-3)
    assert prompt is not None
    assert sum(
        OnnxStudent(tmp_path / "int4", threads=1).option_probabilities(prompt, ids)
    ) == pytest.approx(1)


def test_an_adapter_for_a_taught_model_comes_with_that_model(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    base, device = tiny_model("llama"), choose_device("float32")
    rows = rendered(base)
    full = TrainingRecipe(method="full", epochs=4, batch_size=4, learning_rate=1e-2)
    fine_tune(base, None, rows, [], full, tmp_path / "teacher")
    taught, _ = model_and_adapter(tmp_path / "teacher", base)
    recipe = TrainingRecipe(method="lora", epochs=1, batch_size=4, learning_rate=1e-3)
    fine_tune(taught, None, rows, [], recipe, tmp_path / "student", whole=True)
    model, adapter = model_and_adapter(tmp_path / "student", base)
    assert adapter is not None

    def answers(folder: Path, adapter: Path | None) -> torch.Tensor:
        network, tokenizer = load_model(folder, adapter)
        pad = pad_id(tokenizer)
        return torch.tensor(option_probabilities(network, rows, pad_id=pad, device=device))

    expected = answers(taught, adapter)
    assert torch.equal(answers(model, adapter), expected)
    assert not torch.allclose(answers(base, adapter), expected, atol=0.01), (
        "else this test would see nothing"
    )


def test_the_labs_form_keeps_the_adapter_apart(tiny_model: TinyModel, tmp_path: Path) -> None:
    rows = rendered(tiny_model("llama"))
    recipe = TrainingRecipe(method="lora", epochs=4, batch_size=4, learning_rate=2e-2)
    fine_tune(tiny_model("llama"), None, rows, [], recipe, tmp_path / "trained")
    model, adapter = model_and_adapter(tmp_path / "trained", tiny_model("llama"))
    export(model, adapter, ExportForm(precision="fp32", adapter_apart=True), tmp_path / "apart")
    assert (tmp_path / "apart" / ADAPTER_FILE).stat().st_size > 0

    from distillery.inference.onnx_student import OnnxStudent

    ids = list(rows[0].letters)
    with_adapter = OnnxStudent(tmp_path / "apart").option_probabilities(list(rows[0].prompt), ids)
    without = OnnxStudent(tmp_path / "apart", adapter=False).option_probabilities(
        list(rows[0].prompt), ids
    )
    merged, tokenizer = load_model(model, adapter)
    plain, _ = load_model(model)
    device, pad = choose_device("float32"), pad_id(tokenizer)
    assert with_adapter == pytest.approx(
        option_probabilities(merged, rows[:1], pad_id=pad, device=device)[0], abs=1e-3
    )
    assert without == pytest.approx(
        option_probabilities(plain, rows[:1], pad_id=pad, device=device)[0], abs=1e-3
    )


@pytest.mark.parametrize("arch", ["llama", "phi4mini"])
@pytest.mark.parametrize("algorithm", ["rtn", "k_quant_mixed"])
def test_int4_with_the_adapter_apart_quantises_all_but_the_adapter(
    tiny_model: TinyModel, tmp_path: Path, arch: str, algorithm: Any
) -> None:
    import onnx

    from distillery.inference.onnx_student import OnnxStudent

    rows = rendered(tiny_model(arch))
    # The same weights on every processor: how much four bits lose of them is looked at below.
    recipe = TrainingRecipe(
        method="lora", epochs=4, batch_size=4, learning_rate=2e-2, precision="bfloat16"
    )
    fine_tune(tiny_model(arch), None, rows, [], recipe, tmp_path / "trained")
    model, adapter = model_and_adapter(tmp_path / "trained", tiny_model(arch))

    def answers(form: ExportForm, out: Path) -> torch.Tensor:
        export(model, adapter, form, out)
        asked = OnnxStudent(out)
        return torch.tensor(
            [asked.option_probabilities(list(row.prompt), list(row.letters)) for row in rows]
        )

    plain = answers(ExportForm(precision="fp32", adapter_apart=True), tmp_path / "fp32")
    quantised = answers(ExportForm(algorithm=algorithm, adapter_apart=True), tmp_path / "int4")
    assert (plain - quantised).abs().mean() < 0.08
    nodes = onnx.load(str(tmp_path / "int4" / "model.onnx"), load_external_data=False).graph.node
    assert {node.op_type for node in nodes if "/lora_" in node.name} == {"MatMul"}
    assert [
        node.name for node in nodes if node.op_type == "MatMul" and "/lora_" not in node.name
    ] == []
    assert [node.op_type for node in nodes if "input_ids" in node.input] == ["GatherBlockQuantized"]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_an_adapter_is_merged_in_float32_whatever_the_base_is_stored_in(
    tiny_model: TinyModel, tmp_path: Path, stored: torch.dtype
) -> None:
    from distillery.inference.onnx_student import OnnxStudent

    base = tmp_path / "base"
    network, tokenizer = load_model(tiny_model("llama"))
    network.to(stored).save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = rendered(base)
    recipe = TrainingRecipe(
        method="lora", epochs=4, batch_size=4, learning_rate=2e-2, precision="float32"
    )
    fine_tune(base, None, rows, [], recipe, tmp_path / "trained")
    model, adapter = model_and_adapter(tmp_path / "trained", base)
    merged, _ = load_model(model, adapter)
    export(model, adapter, ExportForm(precision="fp32"), tmp_path / "onnx")
    for row in rows:
        found = OnnxStudent(tmp_path / "onnx").next_token_logprobs(list(row.prompt))
        with torch.inference_mode():
            expected = torch.log_softmax(merged(torch.tensor([row.prompt])).logits[0, -1], -1)
        assert torch.allclose(torch.tensor(found).float(), expected, atol=1e-3)


def test_what_a_pass_refuses_comes_through_olive_as_one_line(
    tiny_model: TinyModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [TrainingRow(prompt=(5, 6, 7), letters=(8, 9), answer=0)]
    with pytest.raises(TrainingError, match="layers: 7 is no layer"):
        fine_tune(
            tiny_model("llama"), None, rows, [], TrainingRecipe(), tmp_path / "out", layers=(7,)
        )
    assert "Traceback" not in "".join(capfd.readouterr())
