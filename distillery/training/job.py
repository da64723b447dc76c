"""One training as a job in files: it reads rows and a model, and writes the trained one.

training/olive_passes.py does it in its own process, training/devices.py in one for each device.
"""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from distillery.models.device import choose_device
from distillery.models.inspect import weights_digest
from distillery.models.load import end_of_turn_id, load_model, pad_id
from distillery.recipe import TrainingRecipe
from distillery.settings import LocalSettings
from distillery.training.checkpoint import Checkpoints
from distillery.training.class_head import ClassHead, add_rows_to_adapter, remove_class_head
from distillery.training.hidden_states import read_hidden_states
from distillery.training.loop import Progress, train
from distillery.training.ranks import ALONE, Ranks
from distillery.training.rows import RowFile


class TrainingJob(BaseModel):
    """A training in files.

    `model`: the folder to start from, with `adapter` merged in. `rows` and `validation`: JSONL of
    TrainingRow. `hidden`: the teacher's hidden states. `result`: where the figures go, as JSON.
    `out`: where the model or, for LoRA, the adapter goes. `keep_end`: see `train`. `split`: whether
    several ranks share out the model."""

    model_config = ConfigDict(frozen=True)

    model: Path
    adapter: Path | None
    remote_code: bool
    rows: Path
    validation: Path
    hidden: Path | None
    recipe: TrainingRecipe
    result: Path
    out: Path
    keep_end: bool
    split: bool


def distil(
    job: TrainingJob,
    progress: Progress | None,
    checkpoints: Checkpoints | None,
    ranks: Ranks = ALONE,
) -> None:
    """Train as `job` says. With several `ranks` each calls this, and the first one alone writes.

    Raises what `train` raises, and TrainingError where the ranks start from different weights."""
    if ranks.count > 1:
        ranks = replace(ranks, split=job.split)
        folders = [job.model, job.adapter] if job.adapter else [job.model]
        ranks.require_same_base(weights_digest(folders))
    recipe = job.recipe
    precision = "float32"
    if recipe.adapts and not job.adapter:
        precision = choose_device(recipe.precision).frozen_precision
    model, tokenizer = load_model(job.model, job.adapter, job.remote_code, precision)
    with closing(RowFile(job.rows)) as rows, closing(RowFile(job.validation)) as validation:
        trained, result = train(
            model,
            rows,
            validation,
            recipe,
            pad_id=pad_id(tokenizer),
            end_id=end_of_turn_id(tokenizer),
            progress=progress,
            hidden=read_hidden_states(job.hidden) if job.hidden else None,
            checkpoints=checkpoints,
            checkpoint_every_s=LocalSettings().checkpoint_seconds,
            keep_end=job.keep_end,
            ranks=ranks,
        )
    if not ranks.is_first:
        return
    job.result.write_text(result.model_dump_json())
    head = trained.get_output_embeddings()
    if isinstance(head, ClassHead):
        remove_class_head(trained, head)
    trained.save_pretrained(job.out)
    if not recipe.adapts:
        tokenizer.save_pretrained(job.out)
    elif isinstance(head, ClassHead):
        add_rows_to_adapter(trained.get_base_model(), head, job.out)
