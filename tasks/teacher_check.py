import time
from collections.abc import Sequence

from prefect import get_run_logger

from distillery.data.examples import read_examples
from distillery.errors import TeacherError
from distillery.evaluation.baselines import TFIDF_ON_GOLD, score_baselines
from distillery.evaluation.linear_probe import PROBE, TextStates, classify_states
from distillery.evaluation.report import write_answers
from distillery.evaluation.scoreboard import GOLD, TEACHER
from distillery.evaluation.scoring import (
    Answers,
    Probabilities,
    answered_rows,
    right_answers,
    score_model,
)
from distillery.evaluation.soft_weight import calibrated_share
from distillery.evaluation.statistics import paired_interval
from distillery.labels.files import read_labels
from distillery.models.base import base_folder, remote_code_allowed
from distillery.progress import shown_by
from distillery.recipe import BaseModelRecipe, PromptRecipe
from distillery.records import (
    Example,
    OnnxModel,
    Rival,
    Rows,
    TeacherCheck,
    TeacherLabel,
    TeacherLabels,
)
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from tasks.progress import conclude, show_bytes, show_parts, show_rows
from tasks.scored_models import onnx_model
from tasks.stage import origin, stage


@stage("check teacher", version=3)
def check_teacher(
    teacher: OnnxModel | TeacherLabels,
    gold: Rows,
    validation: Rows,
    prompt: PromptRecipe,
    base: BaseModelRecipe,
) -> TeacherCheck:
    """Compare a teacher on the validation rows with what a minute's work learns from the gold rows:
    TF-IDF, and a linear probe of `base`."""
    started = time.perf_counter()
    store = ArtifactStore()
    file = store.fetch(validation.artifact) / validation.file
    examples, right = answered_rows(file, "validation")
    gold_rows = read_examples(store.fetch(gold.artifact) / gold.file)
    answers: dict[str, Answers] = {GOLD: right}
    baselines, _ = score_baselines(examples, (), gold_rows)
    if TFIDF_ON_GOLD in baselines:
        answers[TFIDF_ON_GOLD] = baselines[TFIDF_ON_GOLD]
    if prompt.answer == "class" and len({row.answer_key for row in gold_rows}) > 1:
        show_parts(0, 1, "loading the base model for a linear probe")
        states = TextStates(base_folder(base, show_bytes), remote_code_allowed(base))
        with shown_by(show_rows):
            answers[PROBE] = classify_states(states, gold_rows, examples, prompt)
        states.unload()
    if isinstance(teacher, OnnxModel):
        scored = score_model(
            onnx_model("teacher", teacher, store), file, prompt, progress=show_rows
        )
        answers[TEACHER] = scored.answers
        shares = scored.probabilities
    else:
        labels = read_labels(store.fetch(teacher.artifact))
        found = [labels.get(example.example_id) for example in examples]
        answers[TEACHER] = [label.answer if label else None for label in found]
        shares = tuple(shares_of(label, examples[0].keys) for label in found)
    with working_folder("teacher-check") as folder:
        write_answers(folder, examples, answers)
        artifact = store.put(folder)
    rivals = tuple(
        rival(name, given, answers[TEACHER], right)
        for name, given in answers.items()
        if name not in (GOLD, TEACHER)
    )
    check = TeacherCheck(
        artifact=artifact,
        rows=len(examples),
        correct=sum(right_answers(answers[TEACHER], right)),
        rivals=rivals,
        soft_weight=soft_weight_of(shares, examples),
        **origin(started),
    )
    conclude(check.line())
    return check


def shares_of(label: TeacherLabel | None, keys: Sequence[str]) -> Probabilities:
    """Return the probabilities of a label by `keys`; None where there are none."""
    if label is None or label.distribution is None:
        return None
    return tuple(label.distribution[key] for key in keys)


def soft_weight_of(
    probabilities: Sequence[Probabilities], examples: Sequence[Example]
) -> float | None:
    """Return what the teacher's probabilities are worth, by the rows that have some; None where
    none has. All rows have the same classes."""
    given, right = [], []
    for shares, example in zip(probabilities, examples, strict=True):
        if shares is not None:
            given.append(shares)
            right.append(example.keys.index(str(example.answer_key)))
    return calibrated_share(given, right) if given else None


def rival(name: str, given: Answers, teacher: Answers, gold: Sequence[str]) -> Rival:
    """Return a predictor beside the teacher, on the same rows."""
    own = right_answers(given, gold)
    return Rival(
        name=name,
        correct=sum(own),
        teacher_ahead=paired_interval(right_answers(teacher, gold), own),
    )


def heed(check: TeacherCheck, own_model: bool, insist: bool) -> None:
    """Tell of a teacher that is worse than a rival, as a warning where that is proven. Raise
    TeacherError where it is proven of a model that the run has trained itself, unless the recipe
    insists."""
    worse = [rival for rival in check.rivals if rival.correct > check.correct]
    if not worse:
        return
    best = max(worse, key=lambda rival: rival.correct)
    told = (
        f"the teacher is right on {check.correct} of {check.rows} validation rows, and {best.name} "
        f"on {best.correct}"
    )
    if best.teacher_ahead.high >= 0:
        get_run_logger().info("%s, which may be chance", told)
        return
    if own_model and not insist:
        raise TeacherError(
            f"{told}: its labels would teach the student less than the gold rows do; add gold "
            "rows, take a larger base model or an endpoint, or set teacher.insist: true"
        )
    get_run_logger().warning("%s; more gold rows or a better teacher would help most", told)
