"""How fast a CPU trains: `make bench-train`, or `python -m benchmarks.train [STEPS]`.

LoRA on the demo's base model, its rank, learning rate and batch of 8, over the sample's pool rows
with their gold answers as the demo renders them; the loss is on the answer and the end of the turn.
Each contestant gets the same token ids, in a process of its own:

ours          distillery.training.loop.train
ours_shared   the same with what all prompts begin with computed once per batch, the default; the
              others have nothing like it, so this is no part of the ratios
trl           TRL's SFTTrainer, given the tokenised rows with their labels
olive         `olive finetune`: it joins the rows' texts to blocks, 512 tokens per step, about as
              many as the others' rows have, and learns the prompts too; its dropout is 0.05,
              which no option changes

Each of the peers' settings is tried for a few steps and the fastest is kept. Then 12 steps each,
medians of three, in turn and the order turned round every other time; and 120 steps each, 3 epochs,
for the accuracy on the sample's test rows: means of three seeds, but for Olive's, which learns
another thing, one. The clock runs from the first step's start to the last one's end. The last line
is JSON:

ours_rows_s         rows a second; for Olive the tokens a second over the mean row's
trl_rows_s
olive_rows_s
ratio_trl           ours / TRL
ratio_olive         ours / Olive
ours_rss_mb         the process's peak memory (MiB), its Python and libraries included
trl_rss_mb
olive_rss_mb
ours_accuracy       on the test rows, after 120 steps; base_accuracy: before any
trl_accuracy
olive_accuracy
ours_shared_rows_s, ours_shared_rss_mb
"""

import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from distillery.evaluation.scoring_process import peak_mib

PROJECT = Path(__file__).resolve().parents[1]
PLACE = PROJECT / ".distillery" / "bench" / "train"
TRL = "trl==1.16.0"
TRL_FOLDER = PROJECT / ".distillery" / "bench" / "trl"
ROWS, BATCH, TRIAL_STEPS, STEPS, LONG_STEPS, ROUNDS = 320, 8, 3, 12, 120, 3
SEEDS = {"ours": 3, "trl": 3, "olive": 1}

Settings = dict[str, Any]
Figures = dict[str, float]

SETTINGS: dict[str, list[Settings]] = {
    "ours": [{}],
    "ours_shared": [{}],
    "trl": [
        {"dtype": dtype, "attention": attention, "bf16": autocast}
        for dtype, autocast in (("bfloat16", False), ("float32", True), ("float32", False))
        for attention in ("sdpa", "eager")
    ],
    "olive": [
        {"dtype": dtype, "block": block, "batch": 512 // block}
        for dtype in ("bfloat16", "float32")
        for block in (64, 128, 512)
    ],
}


def ours(
    settings: Settings, steps: int, rows: dict[str, Any], out: Path, shared: bool = False
) -> Figures:
    from distillery.models.load import end_of_turn_id, load_model, pad_id
    from distillery.recipe import TrainingRecipe
    from distillery.training import batching
    from distillery.training.loop import train
    from distillery.training.rows import RowFile

    if not shared:
        batching.LEAST_SAVED = 10**9
    recipe = TrainingRecipe.model_validate(rows["training"])
    recipe = recipe.model_copy(
        update={"max_steps": steps, "seed": settings.get("seed", recipe.seed)}
    )
    model, tokenizer = load_model(Path(rows["base"]))
    model, result = train(
        model,
        RowFile(Path(rows["rows"])),
        [],
        recipe,
        pad_id=pad_id(tokenizer),
        end_id=end_of_turn_id(tokenizer),
    )
    model.save_pretrained(out)
    return {"rows_s": result.rows_per_second, "rss_mb": peak_mib()}


def ours_shared(settings: Settings, steps: int, rows: dict[str, Any], out: Path) -> Figures:
    return ours(settings, steps, rows, out, shared=True)


def trl(settings: Settings, steps: int, rows: dict[str, Any], out: Path) -> Figures:
    import peft
    import torch
    import transformers
    from datasets.arrow_dataset import Dataset
    from trl import SFTConfig, SFTTrainer

    torch.set_flush_denormal(True)
    # The trainer seeds the order of rows alone: its LoRA matrices are there before.
    transformers.set_seed(settings.get("seed", 0))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        rows["base"],
        dtype=settings["dtype"],
        attn_implementation=settings["attention"],
        trust_remote_code=False,
    )
    config = SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        seed=settings.get("seed", 0),
        learning_rate=rows["learning_rate"],
        weight_decay=rows["weight_decay"],
        warmup_steps=max(1, round(rows["warmup"] * steps)),
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused",
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=settings["bf16"],
        train_sampling_strategy="group_by_length",
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(json.loads(Path(rows["tokens"]).read_text())),
        processing_class=transformers.AutoTokenizer.from_pretrained(
            rows["base"], trust_remote_code=False
        ),
        peft_config=peft.LoraConfig(**rows["lora"], task_type="CAUSAL_LM"),
    )
    clock = _clock()
    trainer.add_callback(clock)
    trainer.train()
    trainer.save_model(str(out))
    speed = {"rows_s": steps * BATCH / clock.seconds, "cpu_s": clock.cpu_seconds}
    return {**speed, "rss_mb": peak_mib()}


def olive(settings: Settings, steps: int, rows: dict[str, Any], out: Path) -> Figures:
    import torch
    import transformers
    from olive.cli.launcher import main as olive_command

    torch.set_flush_denormal(True)
    # Its cache is in the working folder, and what stands there is not trained again.
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    # The command has no place for a callback of ours: every Trainer made in this process gets one.
    clock = _clock()
    transformers.trainer.DEFAULT_CALLBACKS.append(clock)
    options = {
        "model_name_or_path": rows["base"],
        "method": "lora",
        "lora_r": rows["lora"]["r"],
        "lora_alpha": rows["lora"]["lora_alpha"],
        "target_modules": ",".join(rows["lora"]["target_modules"]),
        "torch_dtype": settings["dtype"],
        "data_name": "json",
        "data_files": rows["texts"],
        "train_split": "train",
        "text_field": "text",
        "max_seq_len": settings["block"],
        "max_samples": ROWS,
        "output_path": out,
        # What follows are transformers' own training arguments.
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "learning_rate": rows["learning_rate"],
        "weight_decay": rows["weight_decay"],
        "warmup_steps": max(1, round(rows["warmup"] * steps)),
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch_fused",
        "use_cpu": "True",
        "gradient_checkpointing": "False",
        "dataloader_pin_memory": "False",
        "logging_steps": 10**6,
    }
    olive_command(
        [
            "finetune",
            *(word for name, value in options.items() for word in (f"--{name}", str(value))),
        ]
    )
    tokens = steps * settings["batch"] * settings["block"]
    return {"rows_s": tokens / rows["mean_tokens"] / clock.seconds, "rss_mb": peak_mib()}


CONTESTANTS = {"ours": ours, "ours_shared": ours_shared, "trl": trl, "olive": olive}


def _clock() -> Any:
    import transformers

    class Clock(transformers.TrainerCallback):
        started = seconds = cpu_started = cpu_seconds = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started, self.cpu_started = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.started
            self.cpu_seconds = time.process_time() - self.cpu_started

    return Clock()


def prepare() -> dict[str, Any]:
    """Write the demo's rows for each contestant, and return the settings that they share."""
    from benchmarks.distil import read
    from distillery.labels.known import gold_labels
    from distillery.models.base import base_folder
    from distillery.models.load import load_tokenizer
    from distillery.recipe import load_recipe
    from distillery.training.rows import training_rows

    demo = load_recipe("demo")
    preparation = demo.teacher.preparation
    examples = read("pool")[:ROWS]
    base = base_folder(preparation.base)
    rows, _ = training_rows(examples, gold_labels(examples), demo.prompt, load_tokenizer(base))
    assert len(rows) == ROWS
    return write_contest(PLACE, base, preparation.training, rows)


def write_contest(place: Path, base: Path, training: Any, rows: Any) -> dict[str, Any]:
    """Write files of the same TrainingRows for each contestant, and the settings that they share as
    settings.json; return these. `training`: a TrainingRecipe."""
    from distillery.models.load import end_of_turn_id, load_model
    from distillery.training.adapters import linear_modules
    from distillery.training.rows import write_rows

    model, tokenizer = load_model(base)
    end = end_of_turn_id(tokenizer)
    tokens, learnt = [], []
    for row in rows:
        answer = [*(row.target or [row.letters[row.answer]]), end]
        tokens.append([*row.prompt, *answer])
        learnt.append([-100] * len(row.prompt) + answer)
    place.mkdir(parents=True, exist_ok=True)
    write_rows(rows, place / "rows.jsonl")
    pairs = [{"input_ids": ids, "labels": found} for ids, found in zip(tokens, learnt, strict=True)]
    (place / "tokens.json").write_text(json.dumps(pairs))
    texts = "".join(json.dumps({"text": tokenizer.decode(ids)}) + "\n" for ids in tokens)
    (place / "texts.jsonl").write_text(texts)
    settings = {
        "base": str(base),
        "rows": str(place / "rows.jsonl"),
        "tokens": str(place / "tokens.json"),
        "texts": str(place / "texts.jsonl"),
        "mean_tokens": statistics.mean(map(len, tokens)),
        "training": training.model_dump(mode="json"),
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "warmup": training.warmup,
        "lora": {
            "r": training.lora.rank,
            "lora_alpha": training.lora.alpha,
            "lora_dropout": training.lora.dropout,
            "target_modules": linear_modules(model),
        },
    }
    (place / "settings.json").write_text(json.dumps(settings))
    return settings


def install_trl() -> None:
    """TRL over this environment's torch, transformers and peft, so that all train with the same."""
    if not TRL_FOLDER.exists():
        beside = TRL_FOLDER.with_name(f"trl.{os.getpid()}")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(beside),
            TRL,
        ]
        subprocess.run(pip, check=True)
        beside.rename(TRL_FOLDER)


def run(name: str, settings: Settings, steps: int, out: Path, place: Path = PLACE) -> Figures:
    """Train in a process of its own, on the files in `place`, into `out`; return what it took."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.train",
        name,
        json.dumps(settings),
        str(steps),
        str(out),
        str(place),
    ]
    environment = os.environ | {
        "PYTHONPATH": str(TRL_FOLDER),
        "HF_HUB_OFFLINE": "1",
        "OLIVE_DISABLE_TELEMETRY": "1",
    }
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
    found: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{name} {json.dumps(settings)}, {steps} steps: {found}", flush=True)
    return found


def fastest(name: str, scratch: Path, place: Path = PLACE) -> Settings:
    """Of a contestant's settings, by one trial of each."""
    if len(SETTINGS[name]) == 1:
        return SETTINGS[name][0]
    trials = [
        (run(name, one, TRIAL_STEPS, scratch / f"trial-{name}-{i}", place), i)
        for i, one in enumerate(SETTINGS[name])
    ]
    return SETTINGS[name][max(trials, key=lambda trial: trial[0]["rows_s"])[1]]


def accuracy(rows: dict[str, Any], adapter: Path | None) -> float:
    from benchmarks.distil import read
    from distillery.labels.known import gold_labels
    from distillery.models.device import choose_device
    from distillery.models.load import load_model, pad_id
    from distillery.recipe import load_recipe
    from distillery.training.rows import training_rows
    from distillery.training.validation import accuracy_of

    if adapter is not None:
        adapter = next(adapter.rglob("adapter_config.json")).parent
    model, tokenizer = load_model(Path(rows["base"]), adapter)
    test = read("test")
    rendered = training_rows(test, gold_labels(test), load_recipe("demo").prompt, tokenizer)[0]
    return accuracy_of(model, rendered, pad_id=pad_id(tokenizer), device=choose_device())


def main(steps: int) -> None:
    from distillery.machine import machine_name

    install_trl()
    rows = prepare()
    print(
        f"{machine_name()}; {ROWS} rows of {rows['mean_tokens']:.1f} tokens in the mean, "
        f"batches of {BATCH}; {TRL}"
    )
    print(
        json.dumps({key: rows[key] for key in ("lora", "learning_rate", "weight_decay", "warmup")})
    )
    print("\n\n".join(inspect.getsource(script) for script in CONTESTANTS.values()), flush=True)
    runs: dict[str, list[Figures]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=PLACE) as folder:
        scratch = Path(folder)
        chosen = {name: fastest(name, scratch) for name in CONTESTANTS}
        for number in range(ROUNDS):
            for name in list(CONTESTANTS)[:: -1 if number % 2 else 1]:
                runs[name].append(run(name, chosen[name], steps, scratch / f"{name}-{number}"))
        reached: dict[str, list[float]] = defaultdict(list)
        for name, seeds in SEEDS.items():
            for seed in range(seeds):
                out = scratch / f"{name}-seed-{seed}"
                run(name, chosen[name] | ({"seed": seed} if seeds > 1 else {}), LONG_STEPS, out)
                reached[name].append(accuracy(rows, out))
            print(
                f"{name}, {LONG_STEPS} steps, by seed: "
                f"{[round(value, 3) for value in reached[name]]}",
                flush=True,
            )
    figures = summary(runs) | {
        f"{name}_accuracy": statistics.mean(values) for name, values in reached.items()
    }
    figures["base_accuracy"] = accuracy(rows, None)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def summary(runs: dict[str, list[Figures]]) -> Figures:
    def median(name: str, key: str) -> float:
        return statistics.median(one[key] for one in runs[name])

    speed = {name: median(name, "rows_s") for name in CONTESTANTS}
    figures = {f"{name}_rows_s": speed[name] for name in ("ours", "trl", "olive")}
    figures |= {f"ratio_{name}": speed["ours"] / speed[name] for name in ("trl", "olive")}
    figures |= {f"{name}_rss_mb": median(name, "rss_mb") for name in CONTESTANTS}
    return figures | {"ours_shared_rows_s": speed["ours_shared"]}


if __name__ == "__main__":
    if len(sys.argv) > 2:
        name, settings, steps, out, place = sys.argv[1:]
        rows = json.loads((Path(place) / "settings.json").read_text())
        print(
            json.dumps(CONTESTANTS[name](json.loads(settings), int(steps), rows, Path(out))),
            flush=True,
        )
    else:
        main(int(sys.argv[1]) if len(sys.argv) == 2 else STEPS)
