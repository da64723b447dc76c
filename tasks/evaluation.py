import time

from distillery.data.examples import read_examples
from distillery.evaluation import evaluate as domain
from distillery.evaluation.baselines import with_letters
from distillery.evaluation.linear_probe import TextStates
from distillery.evaluation.report import ANSWERS_FILE
from distillery.evaluation.scoreboard import BASE, FLOAT, headline
from distillery.evaluation.scoring import Scored, score_model
from distillery.labels.files import read_labels
from distillery.models.base import base_folder, remote_code_allowed
from distillery.recipe import BaseModelRecipe, Columns, PromptRecipe
from distillery.records import (
    BaseModelAnswers,
    EvaluationReport,
    Example,
    OnnxModel,
    Rows,
    StudentCheckpoint,
    TeacherLabels,
    digest_of,
)
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import sha256_of
from distillery.storage.working import working_folder
from tasks.progress import conclude, show_bytes, show_rows
from tasks.scored_models import AskedModel, float_student, onnx_model, untrained
from tasks.slices import known_slices
from tasks.stage import origin, stage

SCORED_FILE = "scored.json"


@stage("ask base model", version=1)
def ask_base_model(
    test: Rows, prompt: PromptRecipe, base: BaseModelRecipe, machine: str
) -> BaseModelAnswers:
    """Ask a base model the test rows, before any training.

    It is a stage of its own because the answers of an untrained model take long, and are the same
    for all students of the base. `machine` is that on which it is timed."""
    started = time.perf_counter()
    store = ArtifactStore()
    file = store.fetch(test.artifact) / test.file
    known = known_slices(AskedModel(prompt=prompt, base=base), test)
    scored = score_model(untrained(base), file, prompt, progress=show_rows, known=known)
    with working_folder("base-model") as folder:
        (folder / SCORED_FILE).write_text(scored.model_dump_json(), encoding="utf-8")
        artifact = store.put(folder)
    conclude(f"{len(scored.answers)} rows, {scored.rows_per_second:.1f} rows/s")
    return BaseModelAnswers(
        artifact=artifact,
        answers_sha256=digest_of(list(scored.answers)),
        machine=machine,
        **origin(started),
    )


@stage("evaluate", version=10, added_later={"base_answers"})
def evaluate(
    test: Rows,
    train: Rows,
    labels: TeacherLabels,
    gold: Rows | None,
    learns_from_gold: bool,
    prompt: PromptRecipe,
    base: BaseModelRecipe,
    student: StudentCheckpoint,
    candidate: OnnxModel,
    teacher: OnnxModel | TeacherLabels,
    machine: str,
    teacher_prompt: PromptRecipe,
    validation: Rows | None,
    columns: Columns,
    fields: tuple[str, ...],
    base_answers: BaseModelAnswers | None = None,
) -> EvaluationReport:
    """Score baselines, teacher, base model, float and exported student on the same test rows.

    TF-IDF and the baselines of written answers learn from the labels of `train`, and from `gold`
    too if the student has. Of several texts to a row, all of which the student learns, they learn
    the first alone. `prompt` is the student's. `columns` and `fields` are those of the data set,
    for the file of doubtful labels. `base_answers` are the base model's, which is on the scoreboard
    if they are given. Slices of the test rows that other processes have asked (score_parts.py) are
    not asked again."""
    started = time.perf_counter()
    store = ArtifactStore()
    name = f"student {candidate.precision}"
    models = [float_student(student, base, store), onnx_model(name, candidate, store)]
    asked = asked_models(prompt, base, student, candidate, teacher, teacher_prompt)
    known = {each: known_slices(model, test) for each, model in asked.items()}
    asked_before = {}
    if base_answers:
        models.insert(0, untrained(base))
        scored = (store.fetch(base_answers.artifact) / SCORED_FILE).read_text(encoding="utf-8")
        asked_before[BASE] = Scored.model_validate_json(scored)
    if isinstance(teacher, OnnxModel):
        models.insert(
            0, onnx_model("teacher", teacher, store).model_copy(update={"prompt": teacher_prompt})
        )
        answers: str | dict[str, str] = "teacher"
        probabilities = {}
    else:
        own = read_labels(store.fetch(teacher.artifact))
        answers = {key: label.answer for key, label in own.items()}
        probabilities = {
            key: label.distribution for key, label in own.items() if label.distribution
        }
    letters = {
        key: label.answer for key, label in read_labels(store.fetch(labels.artifact)).items()
    }
    learnt = with_letters(_examples(train, store), letters)
    gold_rows = _examples(gold, store) if gold else []
    if learns_from_gold:
        learnt += gold_rows
    states = None
    if prompt.answer == "class" and len({row.answer_key for row in gold_rows}) > 1:
        states = TextStates(base_folder(base, show_bytes), remote_code_allowed(base))
    with working_folder("evaluation") as folder:
        rows = domain.evaluate(
            models,
            answers,
            store.fetch(test.artifact) / test.file,
            learnt,
            prompt,
            name,
            folder,
            gold=gold_rows,
            validation=_examples(validation, store) if validation else [],
            teacher_probabilities=probabilities,
            float_model=FLOAT,
            states=states,
            columns=columns,
            fields=fields,
            threshold=candidate.abstention.threshold if candidate.abstention else None,
            asked_before=asked_before,
            known=known,
            progress=show_rows,
        )
        answers_sha256 = sha256_of(folder / ANSWERS_FILE)
        artifact = store.put(folder)
    conclude(headline(rows, name))
    return EvaluationReport(
        artifact=artifact,
        scoreboard=rows,
        candidate=name,
        answers_sha256=answers_sha256,
        machine=machine,
        **origin(started),
    )


def asked_models(
    prompt: PromptRecipe,
    base: BaseModelRecipe,
    student: StudentCheckpoint,
    candidate: OnnxModel,
    teacher: OnnxModel | TeacherLabels,
    teacher_prompt: PromptRecipe,
) -> dict[str, AskedModel]:
    """Return the models that `evaluate`, of which these are arguments, asks, by their names."""
    asked = {
        FLOAT: AskedModel(prompt=prompt, base=base, checkpoint=student),
        f"student {candidate.precision}": AskedModel(prompt=prompt, exported=candidate),
    }
    if isinstance(teacher, OnnxModel):
        asked["teacher"] = AskedModel(prompt=teacher_prompt, exported=teacher)
    return asked


def _examples(rows: Rows, store: ArtifactStore) -> list[Example]:
    return read_examples(store.fetch(rows.artifact) / rows.file)
