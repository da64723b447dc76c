from pathlib import Path

from distillery.evaluation.gold import gold_of
from distillery.evaluation.scoring import ModelToScore, answered_rows, score_model
from distillery.recipe import METRIC_NAMES, PromptRecipe
from distillery.records import Measured, OnnxModel, Rows
from distillery.storage.artifacts import ArtifactStore
from tasks.progress import conclude, show_rows
from tasks.stage import stage


@stage("measure", version=3)
def measure(model: OnnxModel, validation: Rows, prompt: PromptRecipe, machine: str) -> Measured:
    """Ask an exported student the validation rows; the first ones are timed, one at a time."""
    import numpy as np

    store = ArtifactStore()
    rows = Path(store.fetch(validation.artifact) / validation.file)
    gold = gold_of(answered_rows(rows, "validation")[0])
    folder = str(store.fetch(model.artifact))
    scored = score_model(
        ModelToScore(name="student", kind="onnx", folder=folder),
        rows,
        prompt,
        progress=lambda done, of, _text: show_rows(done, of),
    )
    found = Measured(
        correct=sum(gold.rights(scored.answers)),
        rows=len(gold.answers),
        p50_ms=float(np.median(scored.latencies_ms)) if scored.latencies_ms else 0.0,
        bytes=model.artifact.bytes,
        metric=gold.metric,
        figure=gold.estimate(scored.answers, gold.metric).value if gold.metric else None,
    )
    figure = f"{METRIC_NAMES[gold.metric]} {found.accuracy:.3f}"
    conclude(f"{figure}, {found.p50_ms:.1f} ms per row, on {machine}")
    return found
