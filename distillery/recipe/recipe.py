"""The recipe: the frozen, typed configuration of a run. presets/*.yaml are recipes; a user's file has the same keys.

A recipe says what is made, never where it runs nor with which key: those are flow parameters, Prefect variables and the
environment. Each stage takes its own slice, and that slice alone is in the stage's cache key.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from distillery.recipe.base import Slice
from distillery.recipe.base_model import BaseModelRecipe
from distillery.recipe.dataset import DatasetRecipe
from distillery.recipe.evaluation import EvaluationRecipe
from distillery.recipe.export import ExportForm, ExportRecipe
from distillery.recipe.preset import PRESETS, merged, preset_values
from distillery.recipe.prompt import PromptRecipe
from distillery.recipe.registry import RegistryRecipe
from distillery.recipe.student import StudentRecipe
from distillery.recipe.teacher import TeacherRecipe
from distillery.recipe.training import TrainingRecipe


class Recipe(Slice):
    """A whole run. `preset` fills in whatever is not given here, after which it is None: the recipe stands on its own.

    In dataset.files, splits, carve and sample, `KEY: null` takes the preset's KEY away: a data set with a test split of
    its own has `splits: {test: test}` and `carve: {test: null}` beside `preset: lab`.
    """

    preset: Literal["demo", "lab"] | None = Field(
        None, description="A shipped recipe; keys given here win"
    )
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dataset: DatasetRecipe = DatasetRecipe()
    prompt: PromptRecipe = PromptRecipe()
    teacher: TeacherRecipe = TeacherRecipe()
    student: StudentRecipe = StudentRecipe()
    export: ExportRecipe = ExportRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    registry: RegistryRecipe = RegistryRecipe()

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") in PRESETS:
            return merged(preset_values(values["preset"]), values, cls) | {"preset": None}
        return values

    @property
    def student_prompt(self) -> PromptRecipe:
        """What the student is asked with."""
        return self.student.prompt or self.prompt

    @property
    def student_base(self) -> BaseModelRecipe:
        """The base model of the student, or of the local teacher that it starts from."""
        return (
            self.teacher.preparation.base if self.student.start == "teacher" else self.student.base
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.prompt.answer != "letter":
            raise ValueError(
                "prompt.answer: a teacher answers by letter; set student.prompt for the student's own"
            )
        if self.student.start == "teacher" and self.teacher.kind != "local":
            raise ValueError("student.start is teacher, which needs teacher.kind: local")
        roles = {*self.dataset.splits, *self.dataset.carve}
        if "test" not in roles:
            raise ValueError(
                "evaluation and gate need a test split in dataset.splits or dataset.carve"
            )
        for key, needs in (
            ("teacher.kind is local", self.teacher.kind == "local"),
            ("student.gold", self.student.gold),
        ):
            if needs and "gold" not in roles:
                raise ValueError(
                    f"{key}, which needs a gold split in dataset.splits or dataset.carve"
                )
        if self.student.start == "teacher" and self.student.prompt:
            raise ValueError(
                "student.prompt: a student that starts from its teacher is asked as the teacher is"
            )
        trainings = [self.student.training, *(step.training for step in self.student.healing)]
        if (
            any(one.patience for one in (*trainings, self.teacher.preparation.training))
            and "validation" not in roles
        ):
            raise ValueError(
                "training.patience needs a validation split in dataset.splits or dataset.carve"
            )
        if (
            any(training.hidden_weight > 0 for training in trainings)
            and self.student.start != "teacher"
        ):
            raise ValueError(
                "student.training.hidden_weight is above 0, which needs student.start: teacher"
            )
        for of_a_teacher in ("soft_weight", "hidden_weight", "rationale_weight"):
            if getattr(self.teacher.preparation.training, of_a_teacher) > 0:
                raise ValueError(
                    f"teacher.preparation.training.{of_a_teacher}: its teacher are the gold rows; leave it out"
                )
        taught = self.teacher.preparation
        self._check_form("teacher.preparation.export", taught.export, taught.training)
        if not self.export.ladder:
            self._check_form("export", self.export, self.student.training)
        elif "validation" not in roles:
            raise ValueError(
                "export.ladder needs a validation split in dataset.splits or dataset.carve"
            )
        for number, form in enumerate(self.export.ladder):
            self._check_form(f"export.ladder.{number}", form, self.student.training, on_ladder=True)
        if any(training.soft_weight > 0 for training in trainings) and not self.teacher.soft_labels:
            raise ValueError(
                "student.training.soft_weight is above 0, which needs teacher.soft_labels: true"
            )
        with_reasons = self.teacher.answers.form == "rationale" or self.teacher.kind == "file"
        reasoned = [training for training in trainings if training.rationale_weight > 0]
        if len({training.rationale_instruction for training in reasoned}) > 1:
            raise ValueError(
                "student: training and healing ask for reasons in several ways; give one instruction"
            )
        if reasoned and not with_reasons:
            raise ValueError(
                "student.training.rationale_weight is above 0, which needs teacher.answers.form: rationale"
            )
        return self

    @staticmethod
    def _check_form(
        key: str, form: ExportForm, training: TrainingRecipe, on_ladder: bool = False
    ) -> None:
        unfit = form.precision == "int8" or (
            form.quantised and form.algorithm in ("k_quant_high", "gptq")
        )
        if form.adapter_apart and (training.method != "lora" or unfit):
            raise ValueError(
                f"{key}.adapter_apart needs training.method: lora, and neither int8 nor k_quant_high nor gptq"
            )
        if form.quantised and form.algorithm == "gptq" and not on_ladder:
            raise ValueError(
                f"{key}.algorithm: gptq is for a rung, such as export.ladder: [{{algorithm: gptq}}]"
            )
