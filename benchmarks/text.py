"""What the defaults make of answers that are written: `make bench-text`.

    snips   fields out of text: SNIPS, 39 kinds of fields; 700 answered rows, 500 without answers
    e2e     text from facts: E2E NLG, 60 sets of facts with 523 sentences, 160 without any
    speed   tokens a second of E2E's student in the form that ships, with its guesses of how answers
            go on (distillery/models/drafts.py) and without them, beside the same student in
            llama.cpp, a token a pass, in its fastest form of 4 or 8 bits: test rows one after
            another, on one thread and on two. E2E's sentences are much alike, which suits guesses.
            Then ours writes 1, 4, 8 and 16 answers at once on one thread

`--full` adds two parts, which take an hour and go on where they were ended:

    levels  students of a teacher of E2E: of its texts alone (the sequence level; Kim and Rush,
            Sequence-Level Knowledge Distillation, 2016) and of its probabilities of each token too
            (text_levels.py)
    trl     TRL's SFTTrainer on the same rows and steps as the students of texts (text_trl.py)

A recipe says what an answer is, where the rows are, and that a local teacher answers; all else is a
default. TASKS_DATA is the folder of the public sets (text_rows.py). `--only` names parts, and
`--keep` takes the figures, and for levels and trl the trained models, of earlier runs that are
still there.

A line a part: the figures of teacher, student and the form that ships, of the baselines and, for
E2E, of the base model, which is told in its prompt what to write. The last line is JSON:

snips_f1         micro-F1 of fields of what ships; snips_exact: the share of exact objects
snips_f1_kept    what ships as a share of its teacher's F1
snips_valid      share of its answers that meet the schema
e2e_bleu         BLEU of what ships, from 0 to 1; e2e_rouge_l: ROUGE-L
e2e_bleu_kept    what ships as a share of its teacher's BLEU
ratio_llama_cpp  tokens a second on two threads, ours over llama.cpp's; None without .venv-peers;
                 ratio_llama_cpp_1: on one; ratio_plain and ratio_plain_1: without guesses
levels_gain      BLEU of the students of probabilities less that of the students of texts alone;
                 levels_low and levels_high: its 95 % interval
trl_ratio        rows a second of processor time, ours over TRL's; trl_gain: BLEU, ours less TRL's,
                 trl_low and trl_high: its 95 % interval
passed           parts whose gate passed
minutes          all together
"""

import json
import shutil
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.task_rows import PROJECT, data_folder, recipe_of
from benchmarks.task_runs import folder_of, run_in_a_process
from benchmarks.text_levels import run_levels, written_by
from benchmarks.text_rows import Row, e2e, snips, write_files
from benchmarks.text_trl import run_trl

WORK = PROJECT / ".distillery" / "bench-text"

PARTS = ("snips", "e2e", "speed")
FULL = (*PARTS, "levels", "trl")

SPEED_ROWS, AT_ONCE_ROWS = 40, 48
AT_ONCE = (1, 4, 8, 16)
"""How many answers are written at once; all of them divide AT_ONCE_ROWS."""

INSTRUCTION = "Write one English sentence that says all of the facts that the user gives."
"""What the base model is told, which has learnt nothing of the task."""

Figures = dict[str, Any]


def run_snips(keep: bool) -> Figures:
    """Run the recipe of SNIPS, and return the figures of its predictors."""
    splits, schema = snips()
    paths = write_files(WORK / "data" / "snips", splits)
    task = {"kind": "extract", "schema": schema}
    return run_recipe(recipe_of("snips", paths, task), keep)


def run_e2e(keep: bool) -> Figures:
    """Run the recipe of E2E, and return the figures of its predictors and of the base model."""
    paths = write_files(WORK / "data" / "e2e", e2e())
    task = {"kind": "generate", "metric": "bleu"}
    found = run_recipe(recipe_of("e2e", paths, task), keep)
    kept = WORK / "e2e-base.json"
    if not (keep and kept.exists()):
        kept.write_text(json.dumps(base_figures(e2e()["test"])))
    return found | {"base": json.loads(kept.read_text())}


def run_recipe(recipe: Row, keep: bool) -> Figures:
    """Run a recipe in a process of its own, and return the figures of its predictors by name, and
    what the gate said."""
    kept = WORK / f"{recipe['name']}.json"
    run: Figures
    if keep and kept.exists():
        run = json.loads(kept.read_text())
    else:
        run = run_in_a_process(recipe["name"], recipe, WORK)
    if "failed" in run:
        return run
    report = json.loads((folder_of(run["report"]) / "report.json").read_text())
    found: Figures = {key: run[key] for key in ("rows", "passed", "reason", "form", "minutes")}
    found |= {key: run[key] for key in ("checkpoint", "model")}
    for name, figures in report["figures"].items():
        if written := figures.get("written"):
            by_metric = {each: one["value"] for each, one in written["metrics"].items()}
            found[name] = {**by_metric, "valid": written["valid"]["value"]}
    found["shipped"] = found[report["candidate"]]
    return found


def kept_run(name: str) -> Figures:
    """Return what an earlier run of a recipe has left; nothing where there is none."""
    kept = WORK / f"{name}.json"
    found: Figures = json.loads(kept.read_text()) if kept.exists() else {}
    return found


def base_figures(rows: Sequence[Row]) -> Figures:
    """Return what the base model writes to the rows' texts, measured."""
    from distillery.evaluation.metrics import metric_of
    from distillery.models.base import base_folder
    from distillery.recipe import BaseModelRecipe

    written = written_by(base_folder(BaseModelRecipe()), None, rows, INSTRUCTION)
    answers = [each.text for each in written]
    gold = [row["answers"] for row in rows]
    return {name: metric_of(name, answers, gold) for name in ("bleu", "rouge_l", "chrf")}


def run_speed(e2e_run: Figures) -> Figures:
    """Return for one thread and for two the tokens a second of ours and of llama.cpp, medians of
    three, with the settings of each and the tokens of a text, and the ratios."""
    from benchmarks.inference import Bench
    from benchmarks.inference_files import PLACE, gguf_file, missing_peers, student_gguf
    from distillery.data.examples import read_format
    from distillery.models.base import base_folder
    from distillery.models.drafts import FILE as DRAFTS_FILE
    from distillery.models.inspect import model_and_adapter
    from distillery.models.load import load_model
    from distillery.prompts import TransformersTokenizer, render_ids
    from distillery.recipe import BaseModelRecipe, load_recipe
    from distillery.records import Example

    missing = missing_peers()
    if "llama_cpp" in missing:
        return {"left out": missing["llama_cpp"]}
    if not {"model", "checkpoint"} <= e2e_run.keys():
        return {"left out": "there is no student of E2E; run `--only e2e --only speed`"}
    PLACE.mkdir(parents=True, exist_ok=True)
    shipped, plain = folder_of(e2e_run["model"]), WORK / "student-without-guesses"
    shutil.rmtree(plain, ignore_errors=True)
    shutil.copytree(shipped, plain, ignore=shutil.ignore_patterns(DRAFTS_FILE))
    files: Row = {"prompt": None, "ours": str(shipped), "plain": str(plain)}
    base = base_folder(BaseModelRecipe())
    student, loaded = load_model(*model_and_adapter(folder_of(e2e_run["checkpoint"]), base))
    for weights in ("Q4_0", "Q4_1", "Q8_0"):
        files[weights] = str(WORK / f"student.{weights}.gguf")
        student_gguf(student, gguf_file(), weights, Path(files[weights]))
    tokenizer, answer_format = TransformersTokenizer(loaded), read_format(shipped)
    prompt = load_recipe(str(WORK / "e2e.yaml")).student_prompt
    named = json.loads((shipped / "genai_config.json").read_text())["model"]["eos_token_id"]
    rows: list[Any] = []
    for row in e2e()["test"][:AT_ONCE_ROWS]:
        example = Example(example_id="", question=row["text"], format=answer_format)
        ids = render_ids(example, prompt, tokenizer)
        rows.append({"prompt": ids, "ends": named if isinstance(named, list) else [named]})
    contest = {"generate": rows[:SPEED_ROWS]}
    bench = Bench(["ours", "plain", "llama_cpp"], files, contest, {})
    found: Figures = {"form": e2e_run["form"]}
    for threads in (1, 2):
        chosen = {
            "ours": {"file": "ours"},
            "plain": {"file": "plain"},
            "llama_cpp": bench.fastest("llama_cpp", "generate", threads),
        }
        runs = bench.compete("generate", threads, chosen)
        for name, done in runs.items():
            speed = round(median(run["speed"] for run in done), 1)
            tokens = round(sum(map(len, done[0]["answers"])) / SPEED_ROWS, 1)
            found[f"{name}_{threads}"] = {"speed": speed, "tokens": tokens, **chosen[name]}
        theirs = found[f"llama_cpp_{threads}"]["speed"]
        for name in ("ours", "plain"):
            ratio = found[f"{name}_{threads}"]["speed"] / theirs
            found[f"{name}_ratio_{threads}"] = round(ratio, 2)
    prompts = [row["prompt"] for row in rows]
    for name in ("ours", "plain"):
        rates = [rate_at_once(Path(files[name]), prompts, count) for count in AT_ONCE]
        found[f"{name}_at_once"] = rates
    return found


def rate_at_once(folder: Path, prompts: Sequence[Sequence[int]], count: int) -> float:
    """Return tokens a second of a student that writes `count` answers at once on one thread, the
    better of two rounds."""
    from distillery.data.examples import read_format
    from distillery.inference.text_student import TextStudent

    student, answer_format = TextStudent(folder, 1, count), read_format(folder)
    assert answer_format
    student.write_all(prompts[:count], answer_format)
    rates = []
    for _ in range(2):
        started = time.perf_counter()
        # The end of the turn is a token too.
        tokens = sum(each.tokens + 1 for each in student.write_all(prompts, answer_format))
        rates.append(tokens / (time.perf_counter() - started))
    return round(max(rates), 1)


def summary(found: dict[str, Figures], minutes: float) -> dict[str, Any]:
    """Return the last line."""
    last: dict[str, Any] = {}
    for part, metric, name in (("snips", "field_f1", "f1"), ("e2e", "bleu", "bleu")):
        run = found.get(part, {})
        if "shipped" not in run:
            last |= {f"{part}_{name}": None, f"{part}_{name}_kept": None}
            continue
        shipped = run["shipped"]
        last[f"{part}_{name}"] = round(shipped[metric], 4)
        last[f"{part}_{name}_kept"] = round(shipped[metric] / run["teacher"][metric], 4)
        if part == "snips":
            last["snips_exact"] = round(shipped["exact_match"], 4)
            last["snips_valid"] = round(shipped["valid"], 4)
        else:
            last["e2e_rouge_l"] = round(shipped["rouge_l"], 4)
    speed = found.get("speed", {})
    for key, name in (("ratio_llama_cpp", "ours"), ("ratio_plain", "plain")):
        last[key] = speed.get(f"{name}_ratio_2")
        last[f"{key}_1"] = speed.get(f"{name}_ratio_1")
    if "levels" in found:
        last |= {f"levels_{key}": found["levels"][key] for key in ("gain", "low", "high")}
    if "trl" in found:
        last |= {f"trl_{key}": found["trl"][key] for key in ("ratio", "gain", "low", "high")}
    last["passed"] = sum(bool(run.get("passed")) for run in found.values())
    return last | {"minutes": round(minutes, 1)}


def main() -> None:
    parser = ArgumentParser("python -m benchmarks.text", description="Runs both sets of rows.")
    parser.add_argument("--only", choices=FULL, action="append", help="may be repeated")
    parser.add_argument("--full", action="store_true", help="all parts")
    parser.add_argument("--keep", action="store_true", help="take what earlier runs have left")
    given = parser.parse_args()
    data_folder()
    WORK.mkdir(parents=True, exist_ok=True)
    if not given.keep:
        shutil.rmtree(WORK / "levels", ignore_errors=True)
    started = time.perf_counter()
    found: dict[str, Figures] = {}
    for part in given.only or (FULL if given.full else PARTS):
        if part == "snips":
            found[part] = run_snips(given.keep)
        elif part == "e2e":
            found[part] = run_e2e(given.keep)
        elif part == "levels":
            found[part] = run_levels(WORK / "levels")
        elif part == "trl":
            found[part] = run_trl(WORK / "levels")
        else:
            found[part] = run_speed(found.get("e2e") or kept_run("e2e"))
        print(json.dumps({"part": part, **found[part]}), flush=True)
    print(json.dumps(summary(found, (time.perf_counter() - started) / 60)))


if __name__ == "__main__":
    main()
