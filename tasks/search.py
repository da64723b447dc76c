from pathlib import Path

from distillery.evaluation.scoring import ModelToScore, answered_rows, right_answers, score_model
from distillery.recipe import PromptRecipe
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
    _examples, gold = answered_rows(rows, "validation")
    folder = str(store.fetch(model.artifact))
    scored = score_model(
        ModelToScore(name="student", kind="onnx", folder=folder),
        rows,
        prompt,
        progress=lambda done, of, _text: show_rows(done, of),
    )
    found = Measured(
        correct=sum(right_answers(scored.answers, gold)),
        rows=len(gold),
        p50_ms=float(np.median(scored.latencies_ms)) if scored.latencies_ms else 0.0,
        bytes=model.artifact.bytes,
    )
    conclude(f"accuracy {found.accuracy:.3f}, {found.p50_ms:.1f} ms per row, on {machine}")
    return found
