"""The whole recipe: one slice for each stage, and the checks that go across slices.

A recipe says what is made, never where it runs nor with which key: those are flow parameters,
Prefect variables and the environment. Each stage takes its own slice, and only that slice is in the
stage's cache key.
"""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from distillery.recipe.base import Slice
from distillery.recipe.base_model import BaseModelRecipe
from distillery.recipe.dataset import DatasetRecipe
from distillery.recipe.evaluation import EvaluationRecipe
from distillery.recipe.export import ExportForm, ExportRecipe
from distillery.recipe.preset import (
    PRESETS,
    choice_values,
    classify_values,
    merge,
    preset_for,
    written_values,
)
from distillery.recipe.prompt import PromptRecipe
from distillery.recipe.registry import RegistryRecipe
from distillery.recipe.rules import BetterRule, GateRule
from distillery.recipe.student import LayerChoice, StudentRecipe
from distillery.recipe.task import TaskRecipe
from distillery.recipe.teacher import FilterRecipe, TeacherRecipe
from distillery.recipe.training import TrainingRecipe

FIELDS_ONLY = frozenset({"field_f1", "field dictionary"})

TEXT_ONLY = frozenset({"rouge_l", "chrf", "bleu", "win_rate"})

WRITTEN_ONLY = (
    FIELDS_ONLY | TEXT_ONLY | {"exact_match", "valid", "tokens_per_second", "nearest answer"}
)

CHOSEN_ONLY = frozenset(
    {
        *("majority class", "TF-IDF + logistic regression", "linear probe"),
        *("macro_f1", "recall", "calibration_error", "kl_from_teacher", "order_robustness"),
    }
)
"""Predictors and figures of the scoreboard that only some tasks have: fields, text, answers that
are written, and answers that are chosen."""


class Recipe(Slice):
    """A whole run.

    In dataset.files, splits, carve and sample, `KEY: null` removes the preset's KEY. For instance,
    a data set with a test split of its own has `splits: {test: test}` and `carve: {test: null}`
    beside `preset: lab`.
    """

    added_later: ClassVar[frozenset[str]] = frozenset({"task"})

    preset: Literal["demo", "lab"] | None = None
    """A shipped recipe that fills in what is not given here. It is null once the recipe is
    loaded."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The recipe's name, which its runs bear: letters, digits, '.', '_' and '-'."""

    dataset: DatasetRecipe = DatasetRecipe()
    """Where the rows come from."""

    task: TaskRecipe = TaskRecipe()
    """Whether rows have options of their own, or belong to classes."""

    prompt: PromptRecipe = PromptRecipe()
    """With which texts teacher and student are asked."""

    teacher: TeacherRecipe = TeacherRecipe()
    """Who labels the rows."""

    student: StudentRecipe = StudentRecipe()
    """What is trained on the labels."""

    export: ExportRecipe = ExportRecipe()
    """The form in which the student is delivered."""

    evaluation: EvaluationRecipe = EvaluationRecipe()
    """What the gate asks of the student."""

    registry: RegistryRecipe = RegistryRecipe()
    """Where the student is registered."""

    @model_validator(mode="before")
    @classmethod
    def start_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # A whole recipe, such as a manifest's, says that it has none.
        says_preset = "preset" in values
        if values.get("preset") in PRESETS:
            shipped = preset_for(values["preset"], values)
            values = {**merge(shipped, values, cls), "preset": None}
        task = values.get("task")
        kind = task.get("kind") if isinstance(task, dict) else None
        if kind == "classify":
            values = merge(classify_values(values), values, cls)
        if kind == "choice" and not says_preset:
            values = merge(choice_values(values), values, cls)
        if kind in ("extract", "generate"):
            values = merge(written_values(values), values, cls)
        return values

    @property
    def student_prompt(self) -> PromptRecipe:
        """The prompt that the student is asked with."""
        return self.student.prompt or self.prompt

    @property
    def student_base(self) -> BaseModelRecipe:
        """The base model of the student, or of the local teacher that it starts from."""
        if self.student.start == "teacher":
            return self.teacher.preparation.base
        return self.student.base

    @property
    def draws_texts(self) -> bool:
        """Whether several texts are drawn for a row, all of which are learnt."""
        return self.task.kind == "generate" and self.teacher.answers.votes > 1

    @property
    def teacher_of_test_rows(self) -> TeacherRecipe:
        """The teacher as it is measured on the test rows: nothing is filtered, no cheap teacher
        answers for it, and of texts, of which one cannot be the majority's, one is drawn."""
        changed: dict[str, Any] = {
            "filters": FilterRecipe(minimum_accepted=0),
            "cascade": None,
            "select": None,
        }
        if self.draws_texts:
            changed["answers"] = self.teacher.answers.model_copy(update={"votes": 1})
        return self.teacher.model_copy(update=changed)

    @property
    def gate_rules(self) -> tuple[GateRule, ...]:
        """The rules that the gate applies."""
        return self.evaluation.gate_rules(
            starts_from_base=self.student.start == "base", writes=self.task.writes
        )

    @property
    def asks_base_model(self) -> bool:
        """Whether the base model answers the test rows too. It can't name classes; and it writes at
        great length what it has not learnt, so that it writes only where a rule compares with
        it."""
        if self.student_prompt.answer == "class":
            return False
        compared = (rule.than for rule in self.gate_rules if isinstance(rule, BetterRule))
        return not self.task.writes or "base model" in compared

    @model_validator(mode="after")
    def check_budget_period(self) -> Self:
        if self.name != type(self).model_fields["name"].default:
            return self
        for teacher in filter(None, (self.teacher, self.evaluation.judge)):
            if teacher.budget.caps and teacher.budget.period != "run":
                raise ValueError(
                    f"{teacher.section}.budget.period: {teacher.budget.period} counts the runs of "
                    "recipes of the same name; give this recipe a name of its own: set name"
                )
        return self

    @model_validator(mode="after")
    def check_prompts(self) -> Self:
        kinds = {"letter": ("choice",), "text": ("choice", "classify"), "class": ("classify",)}
        for key, prompt in (("prompt", self.prompt), ("student.prompt", self.student.prompt)):
            if prompt and self.task.kind not in kinds.get(prompt.answer, ("extract", "generate")):
                raise ValueError(
                    f"{key}.answer: {prompt.answer}: class belongs to task.kind: classify, letter "
                    "to choice, and written to extract and generate"
                )
        if self.task.kind == "choice" and self.dataset.columns.choices is None:
            raise ValueError("dataset.columns.choices: name the column of the options")
        if self.student.start == "teacher" and self.student.prompt:
            raise ValueError(
                "student.prompt: a student that starts from its teacher is asked as the teacher "
                "is; remove this setting"
            )
        return self

    @model_validator(mode="after")
    def check_teacher_by_text(self) -> Self:
        """Refuse a teacher that can't be asked for the likelihood of texts, and settings that have
        no meaning for one that is."""
        if self.prompt.answer != "text":
            return self
        if self.teacher.kind != "local" or self.task.kind != "choice":
            raise ValueError(
                "prompt.answer: text: only a local teacher tells how likely the options' texts "
                "are; set teacher.kind: local with task.kind: choice, or set answer: text in "
                "student.prompt alone"
            )
        answers = self.teacher.answers
        refused = [
            (f"form: {answers.form}", answers.form != "letter"),
            ("votes above 1", answers.votes > 1),
            ("orders above 1", answers.orders > 1 and "{choices}" not in self.prompt.user),
        ]
        for setting, is_set in refused:
            if is_set:
                raise ValueError(
                    f"teacher.answers.{setting}: has no meaning with prompt.answer: text, where "
                    "the answer is the likeliest of the texts; remove this setting"
                )
        return self

    @model_validator(mode="after")
    def check_shown(self) -> Self:
        """Refuse prompts that show nothing of a row, as with a misspelt placeholder."""
        if self.task.kind == "choice":
            return self
        shown = [f"{{{name}}}" for name in ("text", "question", *self.dataset.fields)]
        for key, prompt in (("prompt", self.prompt), ("student.prompt", self.student.prompt)):
            if prompt and not any(placeholder in prompt.user for placeholder in shown):
                raise ValueError(
                    f"{key}.user: shows nothing of a row, so that all rows would be asked alike; "
                    f"write {' or '.join(shown)} into it"
                )
        return self

    @model_validator(mode="after")
    def check_stop(self) -> Self:
        if self.teacher.stop and self.task.kind != "generate":
            raise ValueError(
                "teacher.stop: belongs to task.kind: generate, whose answers are free text; remove "
                "this setting"
            )
        return self

    @model_validator(mode="after")
    def check_settings_of_choices(self) -> Self:
        """Refuse for written answers what has a meaning only where an answer is chosen."""
        if not self.task.writes:
            return self
        teacher, answers, filters = self.teacher, self.teacher.answers, self.teacher.filters
        generates = self.task.kind == "generate"
        refused = [
            ("dataset.columns.choices", self.dataset.columns.choices is not None),
            ("teacher.answers.form: rationale", answers.form == "rationale"),
            ("teacher.answers.form: json", answers.form == "json" and generates),
            ("teacher.answers.orders above 1", answers.orders > 1),
            # The shares of votes are no probabilities of tokens.
            (
                "teacher.soft_labels with teacher.answers.votes above 1",
                teacher.soft_labels and answers.votes > 1,
            ),
            (
                "teacher.filters.confidence",
                filters.confidence > 0 and (generates or answers.votes == 1),
            ),
            ("teacher.filters.balance", filters.balance is not None),
            ("teacher.filters.agreement_with_gold", filters.agreement_with_gold and generates),
            # Texts that are drawn differ, whether or not the teacher has changed.
            (
                "teacher.canaries.rows with teacher.answers.votes above 1",
                bool(teacher.canaries.rows) and self.draws_texts,
            ),
        ]
        trainings = [("student.training", self.student.training)]
        trainings.append(("teacher.preparation.training", teacher.preparation.training))
        for number, step in enumerate(self.student.healing):
            trainings.append((f"student.healing.{number}.training", step.training))
        for whose, training in trainings:
            refused.append((f"{whose}.rationale_weight", training.rationale_weight != 0))
        for setting, is_set in refused:
            if is_set:
                raise ValueError(
                    f"{setting}: has no meaning with task.kind: {self.task.kind}, whose answers "
                    "are written; remove this setting"
                )
        return self

    @model_validator(mode="after")
    def check_choice_of_calls(self) -> Self:
        """Refuse a cheap teacher of whose answers no confidence is known, and a selection by what a
        student is sure of where its answers are written."""
        cascade, select = self.teacher.cascade, self.teacher.select
        if cascade and self.task.kind == "generate":
            raise ValueError(
                "teacher.cascade: the confidence of texts is not known, and task.kind is generate; "
                "remove this setting"
            )
        if cascade and self.task.kind == "extract":
            if cascade.answers.votes == 1 or cascade.soft_labels:
                raise ValueError(
                    "teacher.cascade: with task.kind: extract, the confidence is the share of "
                    "answers that agree; set its answers.votes above 1 and soft_labels: false"
                )
            if cascade.answers.form == "rationale" or cascade.answers.orders > 1:
                raise ValueError(
                    "teacher.cascade.answers: form: rationale and orders have no meaning with "
                    "task.kind: extract; remove them"
                )
        if select and select.by != "diversity" and self.task.writes:
            raise ValueError(
                f"teacher.select.by: {select.by}: how sure a student is of written answers is not "
                "known; set by: diversity"
            )
        return self

    @model_validator(mode="after")
    def check_rules(self) -> Self:
        """Refuse a judge of anything but texts, or who is not told the task, and rules by
        predictors and figures that the scoreboard of such a task lacks."""
        judge = self.evaluation.judge
        if judge and self.task.kind != "generate":
            raise ValueError(
                f"evaluation.judge: compares texts, and task.kind is {self.task.kind}; remove it"
            )
        if judge and not self.prompt.system.strip() and not judge.has_own_instructions:
            raise ValueError(
                "evaluation.judge.instructions: prompt.system is empty, so that it does not tell "
                "the judge the task; set instructions to what the texts are for"
            )
        lacking = CHOSEN_ONLY if self.task.writes else WRITTEN_ONLY
        lacking |= {"extract": TEXT_ONLY, "generate": FIELDS_ONLY}.get(self.task.kind, frozenset())
        for rule in self.evaluation.rules or ():
            asked = rule.than if rule.kind == "better" else getattr(rule, "figure", "")
            if asked in lacking:
                raise ValueError(
                    f"evaluation.rules: {asked}: is not on the scoreboard of task.kind: "
                    f"{self.task.kind}; remove this rule"
                )
            if asked == "win_rate" and judge is None:
                raise ValueError(
                    "evaluation.rules: win_rate: no judge is asked; add evaluation.judge, or "
                    "remove this rule"
                )
        return self

    @model_validator(mode="after")
    def check_splits(self) -> Self:
        trainings = (self.teacher.preparation.training, *self.student.trainings)
        patient = any(training.patience_needs_validation for training in trainings)
        abstain = self.task.abstain
        proven = abstain is not None and abstain.accuracy is not None
        needs = (
            ("test", "the evaluation", True),
            ("gold", "teacher.kind: local", self.teacher.kind == "local"),
            ("gold", "student.gold", self.student.gold and not self.task.other),
            ("validation", "training.patience", patient),
            ("validation", "export.ladder", bool(self.export.ladder)),
            ("validation", "task.abstain.accuracy", proven),
        )
        for role, setting, applies in needs:
            if applies and role not in self.dataset.roles:
                raise ValueError(
                    f"{setting} needs a {role} split in dataset.splits or dataset.carve"
                )
        if self.task.other and not self.student.gold:
            raise ValueError("task.other needs student.gold: true, since its texts are gold rows")
        return self

    @model_validator(mode="after")
    def check_student(self) -> Self:
        starts_from_teacher = self.student.start == "teacher"
        if starts_from_teacher and self.teacher.kind != "local":
            raise ValueError("student.start: teacher needs teacher.kind: local")
        instructions = set()
        for training in self.student.trainings:
            if training.hidden_weight > 0 and not starts_from_teacher:
                raise ValueError(
                    "student.training.hidden_weight above 0 needs student.start: teacher"
                )
            if training.soft_share > 0 and not self.teacher.soft_labels:
                raise ValueError(
                    "student.training.soft_weight above 0 needs teacher.soft_labels: true"
                )
            if training.rationale_weight > 0:
                instructions.add(training.rationale_instruction)
        if len(instructions) > 1:
            raise ValueError(
                "student: training and healing ask for reasons with different "
                "rationale_instruction; give all of them the same"
            )
        gives_reasons = self.teacher.answers.form == "rationale" or self.teacher.kind == "file"
        if instructions and not gives_reasons:
            raise ValueError(
                "student.training.rationale_weight above 0 needs teacher.answers.form: rationale"
            )
        return self

    @model_validator(mode="after")
    def check_settings_of_classifiers(self) -> Self:
        student, preparation = self.student, self.teacher.preparation
        parts = [
            ("student", self.student_prompt, student.layers, student.training),
            ("teacher.preparation", self.prompt, preparation.layers, preparation.training),
        ]
        for number, step in enumerate(student.healing):
            whose = f"student.healing.{number}"
            parts.append((whose, self.student_prompt, step.layers, step.training))
        for whose, prompt, layers, training in parts:
            if prompt.answer == "class":
                continue
            settings = []
            for name in ("class_weights", "second_opinion"):
                if getattr(training, name) != "none":
                    settings.append(f"training.{name}")
            if isinstance(layers, LayerChoice) and layers.by == "probe":
                settings.append("layers.by: probe")
            if settings:
                raise ValueError(
                    f"{whose}.{settings[0]} needs task.kind: classify, with answer: class in the "
                    "prompt"
                )
        return self

    @model_validator(mode="after")
    def check_second_opinion(self) -> Self:
        others = [("student.healing", step.training) for step in self.student.healing]
        others.append(("teacher.preparation", self.teacher.preparation.training))
        for whose, training in others:
            if training.second_opinion != "none":
                raise ValueError(
                    f"{whose}.training.second_opinion: set it in student.training, whose labels "
                    "all steps learn"
                )
        return self

    @model_validator(mode="after")
    def check_teacher_preparation(self) -> Self:
        training = self.teacher.preparation.training
        for weight in ("soft_weight", "hidden_weight", "rationale_weight"):
            if getattr(training, weight) != 0:
                raise ValueError(
                    f"teacher.preparation.training.{weight}: this model learns from gold labels "
                    "and has no teacher; remove this setting"
                )
        return self

    @model_validator(mode="after")
    def check_export_forms(self) -> Self:
        preparation = self.teacher.preparation
        check_form("teacher.preparation.export", preparation.export, preparation.training)
        apart = any(form.adapter_apart for form in (self.export, *self.export.ladder))
        if apart and self.student_prompt.answer == "class":
            raise ValueError(
                "export.adapter_apart: a classifier's head has rows for its classes, which are "
                "merged with the adapter; remove this setting"
            )
        if not self.export.ladder:
            check_form("export", self.export, self.student.training)
        for number, form in enumerate(self.export.ladder):
            check_form(f"export.ladder.{number}", form, self.student.training, on_ladder=True)
        return self


def check_form(
    key: str, form: ExportForm, training: TrainingRecipe, on_ladder: bool = False
) -> None:
    """Raise ValueError if a model that is trained like this can't be exported in `form`."""
    calibrated = form.quantised and form.algorithm == "gptq"
    whole = form.quantised and form.algorithm == "k_quant_high"
    if form.precision == "int8":
        whole = not form.dynamic
    if form.adapter_apart and (training.method not in ("lora", "qlora") or whole or calibrated):
        raise ValueError(
            f"{key}.adapter_apart needs training.method: lora or qlora, "
            "and excludes k_quant_high, gptq and, but for dynamic, int8"
        )
    if form.adapter_apart and training.first_layer:
        raise ValueError(
            f"{key}.adapter_apart needs an adapter in all layers; remove training.first_layer"
        )
    if calibrated and not on_ladder:
        raise ValueError(
            f"{key}.algorithm: gptq works only in a ladder, such as "
            "export.ladder: [{algorithm: gptq}]"
        )
