"""Load the model of a scoring job, and ask it for the probabilities of a row's options, or for a
written answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distillery.errors import ModelError, PromptTooLong
from distillery.evaluation.scoring import ScoringJob
from distillery.evaluation.writing import TransformersWriter
from distillery.inference.batch import ROWS
from distillery.inference.generation import Written
from distillery.inference.rows import RowRenderer
from distillery.inference.student import Writer
from distillery.inference.text_student import TextStudent, load_for_rows, load_writer
from distillery.prompts import TransformersTokenizer
from distillery.recipe import PromptRecipe
from distillery.records import AnswerFormat, Example
from distillery.training.batching import common_prefix, longest_shared
from distillery.training.rows import TrainingRow

Found = list[float] | Written
"""What a model makes of a row: the probabilities over its options, or what it writes."""

AskBatches = Callable[[Sequence[TrainingRow], Callable[[int], None]], Sequence[Found]]


@dataclass(frozen=True)
class Predictor:
    """A loaded model. `render` gives a row's prompt and options, or None where the prompt is over
    the budget or the model's context; `ask` what the model makes of it; `ask_batches` that of many
    rows at once, and tells after each batch how many rows it had; it is None where batches would
    not give what single rows give, or are no faster. `first_token` computes a prompt and returns
    the most probable token after it. `forget` gives up what is cached of earlier prompts, which can
    change the last bits of long ones."""

    ran_on: str
    render: Callable[[Example], TrainingRow | None]
    ask: Callable[[TrainingRow], Found]
    ask_batches: AskBatches | None = None
    first_token: Callable[[Sequence[int]], int] | None = None
    forget: Callable[[], None] = lambda: None


def load_predictor(job: ScoringJob, answer_format: AnswerFormat | None = None) -> Predictor:
    """Load the job's model. `answer_format`: that of its rows' written answers.

    Raises ModelError where its folder can't be loaded."""
    if not Path(job.model.folder).is_dir():
        raise ModelError(f"{job.model.folder}: no such folder")
    if job.model.kind == "onnx":
        return load_onnx(job, answer_format)
    return load_transformers(job, answer_format)


def load_onnx(job: ScoringJob, answer_format: AnswerFormat | None) -> Predictor:
    """Load an ONNX folder as batch inference does."""
    if answer_format:
        writer = load_writer(Path(job.model.folder), job.threads)
        several = None
        if isinstance(writer, TextStudent):
            several = partial(write_rows, writer, answer_format)
        return Predictor(
            ran_on="ONNX Runtime",
            render=row_renderer(writer, job.prompt),
            ask=lambda row: writer.write(row.prompt, answer_format),
            ask_batches=several,
            first_token=partial(first_token_anew, writer),
            forget=writer.forget,
        )
    student = load_for_rows(Path(job.model.folder), job.threads)

    def ask_batches(
        rows: Sequence[TrainingRow], batch_done: Callable[[int], None]
    ) -> list[list[float]]:
        found: list[list[float]] = []
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS]
            found += student.probabilities(some)
            batch_done(len(some))
        return found

    return Predictor(
        ran_on="ONNX Runtime",
        render=row_renderer(student, job.prompt),
        ask=lambda row: student.probabilities([row])[0],
        ask_batches=ask_batches,
        first_token=lambda prompt: int(student.next_logits(prompt).argmax()),
        forget=student.forget,
    )


def first_token_anew(writer: Writer, prompt: Sequence[int]) -> int:
    """Return the most probable token after a prompt of which nothing has been computed."""
    writer.forget()
    return int(writer.next_logits(prompt).argmax())


def write_rows(
    writer: TextStudent,
    answer_format: AnswerFormat,
    rows: Sequence[TrainingRow],
    rows_done: Callable[[int], None],
) -> list[Written]:
    """Return what is written to each row, several at once."""
    return writer.write_all([row.prompt for row in rows], answer_format, rows_done)


def load_transformers(job: ScoringJob, answer_format: AnswerFormat | None) -> Predictor:
    """Load a folder that Transformers runs, in the job's precision. A model that is too large for
    the GPU, as after a training in 4 bits or on several GPUs, computes on the processor in float32.
    """
    import torch

    from distillery.models.device import Device, cast_linear_layers, choose_device, fits
    from distillery.models.load import end_ids, load_model, pad_id
    from distillery.training.validation import option_probabilities

    torch.set_num_threads(job.threads)
    precision = job.precision
    if precision == "auto" and not torch.cuda.is_available():
        # With single rows bfloat16 is the slower of the two on a processor, which repacks the
        # weights for each row; in batches it would give other probabilities than single rows do.
        precision = "float32"
    device = choose_device(precision)
    adapter = None
    if job.model.adapter:
        adapter = Path(job.model.adapter)
    load = partial(load_model, Path(job.model.folder), adapter, job.model.remote_code)
    model, tokenizer = load(device.frozen_precision)
    if not fits(model, device):
        # It was rounded for the GPU.
        del model
        device = Device("cpu", "float32")
        model, tokenizer = load(device.frozen_precision)
    model.to(device.name)
    padding = pad_id(tokenizer)
    if device.precision == "bfloat16":
        cast_linear_layers(model)
    next_logits = PromptLogits(model.eval(), device)
    renderer = RowRenderer(
        adapter or Path(job.model.folder),
        TransformersTokenizer(tokenizer),
        model.config.max_position_embeddings,
    )

    def first_token(prompt: Sequence[int]) -> int:
        return int(next_logits(prompt).argmax())

    if answer_format:
        ends = end_ids(model, tokenizer)
        writer = TransformersWriter(model, tokenizer, device, padding, ends, next_logits)
        return Predictor(
            ran_on=f"{device.name} {device.precision}",
            render=row_renderer(renderer, job.prompt),
            ask=lambda row: writer.write(row.prompt, answer_format),
            # Also in bfloat16: one by one, answers would take minutes where these take seconds.
            ask_batches=lambda rows, rows_done: writer.write_all(
                [row.prompt for row in rows], answer_format, rows_done
            ),
            first_token=first_token,
            forget=next_logits.forget,
        )

    def ask(row: TrainingRow) -> list[float]:
        if row.texts or row.closed:
            return ask_batches([row])[0]
        probabilities: list[float] = next_logits(row.prompt)[list(row.letters)].softmax(-1).tolist()
        return probabilities

    def ask_batches(
        rows: Sequence[TrainingRow], batch_done: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        return option_probabilities(
            model, rows, pad_id=padding, device=device, batch_done=batch_done
        )

    return Predictor(
        ran_on=f"{device.name} {device.precision}",
        render=row_renderer(renderer, job.prompt),
        ask=ask,
        # Float32 differs by rounding alone (1e-5); bfloat16 by enough to change an answer.
        ask_batches=ask_batches if device.precision == "float32" else None,
        first_token=first_token,
        forget=next_logits.forget,
    )


def row_renderer(
    renderer: RowRenderer, prompt: PromptRecipe
) -> Callable[[Example], TrainingRow | None]:
    """Return a function that renders a row, or returns None where its prompt is too long."""

    def render(example: Example) -> TrainingRow | None:
        try:
            return renderer.render(example, prompt)
        except PromptTooLong:
            return None

    return render


class PromptLogits:
    """Gives the logits after a prompt, [vocabulary], in float32.

    What a prompt shares with the one before it is not computed again, as by a `Student`, so that
    all models of a scoreboard are timed alike."""

    def __init__(self, model: Any, device: Any) -> None:
        self._model, self._device = model, device
        self.forget()

    def forget(self) -> None:
        """Give up what is cached of the last prompt."""
        from transformers import DynamicCache

        self._before: list[int] = []
        self._cached = DynamicCache()

    def __call__(self, prompt: Sequence[int]) -> Any:
        import torch

        ids, before = list(prompt), self._before
        kept = 0
        if before and max(len(ids), len(before)) <= longest_shared(self._model):
            kept = common_prefix([before, ids], 1)
        if kept < len(before):
            self._cached.crop(kept - len(before))
        self._before = ids
        with torch.inference_mode(), self._device.autocast():
            tokens = torch.tensor([ids[kept:]], device=self._device.name)
            output = self._model(
                input_ids=tokens, past_key_values=self._cached, use_cache=True, logits_to_keep=1
            )
        return output.logits[0, -1].float()
