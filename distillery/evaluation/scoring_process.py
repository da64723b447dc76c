"""The process that scores one model: `python -m distillery.evaluation.scoring_process JOB RESULT PARENT`, started by
`evaluation.score_model`.

JOB holds a ScoringJob; into RESULT goes a Scored, or {"error": "one line"} and exit code 1; PARENT is the process id
that it ends with. A process of its own, so that its peak memory is the model's, and so that a runtime which crashes
takes nothing else with it.
"""

import math
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from distillery.data.examples import read_examples
from distillery.errors import ModelError
from distillery.evaluation.scoring import Scored, ScoringJob
from distillery.processes import process_main
from distillery.prompts import (
    Tokenizer,
    TransformersTokenizer,
    letter_ids,
    longest_prompt,
    render_ids,
    text_ids,
)
from distillery.recipe import PromptRecipe
from distillery.records import Example
from distillery.training.batching import common_prefix, longest_shared
from distillery.training.rows import TrainingRow

WARM_UP_ROWS = 3

Ask = Callable[[Example], list[float] | None]
"""The probabilities over a row's options; None where its prompt is over the budget or the model's context."""


def score(job: ScoringJob) -> Scored:
    """Asks every row, one at a time: a latency spans rendering, tokenising and one prefill."""
    examples = read_examples(Path(job.examples))
    started = time.perf_counter()
    ask, ran_on = _load(job)
    load_s = time.perf_counter() - started
    for example in examples[:WARM_UP_ROWS]:
        ask(example)
    answers: list[str | None] = []
    probabilities: list[tuple[float, ...] | None] = []
    latencies: list[float] = []
    for example in examples:
        started = time.perf_counter()
        asked = ask(example)
        elapsed = time.perf_counter() - started
        if asked is None:
            answers.append(None)
            probabilities.append(None)
            continue
        if not all(map(math.isfinite, asked)):
            raise ModelError(
                f"its probabilities for row {example.example_id} are no finite numbers"
            )
        answers.append(example.letters[asked.index(max(asked))])
        probabilities.append(tuple(asked))
        latencies.append(1000 * elapsed)
    return Scored(
        answers=tuple(answers),
        probabilities=tuple(probabilities),
        latencies_ms=tuple(latencies),
        rows_per_second=1000 * len(latencies) / sum(latencies) if latencies else 0.0,
        peak_mib=peak_mib(),
        load_s=load_s,
        ran_on=ran_on,
    )


def peak_mib() -> float:
    """Return the most resident memory that this process has held so far, in MiB (without a GPU's).

    On Linux it is VmHWM: getrusage's ru_maxrss outlives exec there, so that a small child of a
    large parent would report the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def _load(job: ScoringJob) -> tuple[Ask, str]:
    if not Path(job.model.folder).is_dir():
        raise ModelError(f"{job.model.folder}: no such folder")
    return _onnx(job) if job.model.kind == "onnx" else _transformers(job)


def _onnx(job: ScoringJob) -> tuple[Ask, str]:
    from distillery.inference.onnx_student import OnnxStudent

    student = OnnxStudent(Path(job.model.folder), threads=job.threads)

    def probabilities(prompt: list[int], options: list[list[int]]) -> list[float]:
        if job.prompt.answer == "text":
            return student.text_probabilities(prompt, options)
        return student.option_probabilities(prompt, [letter for (letter,) in options])

    return _asker(
        student.tokenizer, job.prompt, student.context_length, probabilities
    ), "ONNX Runtime"


def _transformers(job: ScoringJob) -> tuple[Ask, str]:
    import torch

    from distillery.models.load import load_model, pad_id
    from distillery.models.device import choose_device
    from distillery.training.validation import option_probabilities

    torch.set_num_threads(job.threads)
    # For one row at a time, bfloat16 is the slower of the two on a processor: it repacks the weights for each row.
    on_processor = job.precision == "auto" and not torch.cuda.is_available()
    device = choose_device("float32" if on_processor else job.precision)
    adapter = Path(job.model.adapter) if job.model.adapter else None
    model, tokenizer = load_model(Path(job.model.folder), adapter, job.model.remote_code)
    model.to(device.name)
    padding = pad_id(tokenizer)
    if device.precision == "bfloat16":
        _cast_linear_layers(model)

    after = _prompt_after_prompt(model.eval(), device)

    def probabilities(prompt: list[int], options: list[list[int]]) -> list[float]:
        if job.prompt.answer == "letter":
            scores = after(prompt)[[letter for (letter,) in options]]
            return [float(p) for p in torch.softmax(scores, -1)]
        row = TrainingRow(prompt=tuple(prompt), texts=tuple(map(tuple, options)), answer=0)
        return option_probabilities(model, [row], pad_id=padding, device=device)[0]

    ask = _asker(
        TransformersTokenizer(tokenizer),
        job.prompt,
        model.config.max_position_embeddings,
        probabilities,
    )
    return ask, f"{device.name} {device.precision}"


def _prompt_after_prompt(model: Any, device: Any) -> Callable[[list[int]], Any]:
    """The logits after a prompt, [vocabulary], where what it shares with the prompt before is not computed again, as
    in `OnnxStudent`: all models of a scoreboard are asked alike."""
    import torch
    from transformers import DynamicCache

    cache, before = DynamicCache(), list[int]()

    def logits(ids: list[int]) -> Any:
        kept = common_prefix([before, ids], 1) if before else 0
        if max(len(ids), len(before)) > longest_shared(model):
            kept = 0
        if kept < len(before):
            cache.crop(kept - len(before))
        before[:] = ids
        with torch.inference_mode(), device.autocast():
            tokens = torch.tensor([ids[kept:]], device=device.name)
            output = model(
                input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        return output.logits[0, -1].float()

    return logits


def _cast_linear_layers(model: Any) -> None:
    """Casts what autocast would cast, once: the numbers stay the same, and a row no longer waits for its weights."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            # A parameter of its own: a tied embedding, which autocast leaves in float32, stays as it is.
            module.weight = torch.nn.Parameter(
                module.weight.to(torch.bfloat16), requires_grad=False
            )


def _asker(
    tokenizer: Tokenizer,
    prompt: PromptRecipe,
    context: int,
    probabilities: Callable[[list[int], list[list[int]]], list[float]],
) -> Ask:
    letters = cache(lambda count: [[token] for token in letter_ids(tokenizer, count)])

    def ask(example: Example) -> list[float] | None:
        ids = render_ids(example, prompt, tokenizer)
        if ids is None:
            return None
        texts = text_ids(example, tokenizer) if prompt.answer == "text" else []
        if len(ids) > longest_prompt(prompt, context, texts):
            return None
        return probabilities(ids, texts or letters(len(example.choices)))

    return ask


if __name__ == "__main__":
    sys.exit(process_main(sys.argv[1:], ScoringJob, score))
