"""The recipe: the frozen, typed configuration of a run, one module per slice.

In: a preset's name, a YAML file or a mapping. Out: a checked `Recipe`. May import: errors.
"""

from distillery.recipe.base import Slice
from distillery.recipe.base_model import BaseModelRecipe
from distillery.recipe.dataset import Columns, DatasetRecipe
from distillery.recipe.evaluation import EvaluationRecipe
from distillery.recipe.export import Choose, ExportBounds, ExportForm, ExportRecipe
from distillery.recipe.judge import JUDGE, JudgeRecipe
from distillery.recipe.load import load_recipe, load_space, parse_recipe
from distillery.recipe.preset import PRESETS
from distillery.recipe.prompt import PromptRecipe
from distillery.recipe.recipe import Recipe
from distillery.recipe.registry import RegistryKind, RegistryRecipe
from distillery.recipe.rules import (
    BetterRule,
    GateRule,
    KeepsRule,
    LimitRule,
    NotWorseRule,
    RowsRule,
)
from distillery.recipe.search import SearchRecipe
from distillery.recipe.student import HealingRecipe, LayerChoice, Layers, StudentRecipe
from distillery.recipe.task import (
    METRIC_NAMES,
    AbstainRecipe,
    Metric,
    OtherRecipe,
    TaskKind,
    TaskRecipe,
)
from distillery.recipe.teacher import (
    AnswerRecipe,
    BatchRecipe,
    BudgetRecipe,
    CanaryRecipe,
    CascadeRecipe,
    FilterRecipe,
    PriceRecipe,
    SelectRecipe,
    TeacherPreparation,
    TeacherRecipe,
)
from distillery.recipe.training import LoraRecipe, TrainingRecipe

__all__ = [
    "JUDGE",
    "METRIC_NAMES",
    "PRESETS",
    "AbstainRecipe",
    "AnswerRecipe",
    "BaseModelRecipe",
    "BatchRecipe",
    "BetterRule",
    "BudgetRecipe",
    "CanaryRecipe",
    "CascadeRecipe",
    "Choose",
    "Columns",
    "DatasetRecipe",
    "EvaluationRecipe",
    "ExportBounds",
    "ExportForm",
    "ExportRecipe",
    "FilterRecipe",
    "GateRule",
    "HealingRecipe",
    "JudgeRecipe",
    "KeepsRule",
    "LayerChoice",
    "Layers",
    "LimitRule",
    "LoraRecipe",
    "Metric",
    "NotWorseRule",
    "OtherRecipe",
    "PriceRecipe",
    "PromptRecipe",
    "Recipe",
    "RegistryKind",
    "RegistryRecipe",
    "RowsRule",
    "SearchRecipe",
    "SelectRecipe",
    "Slice",
    "StudentRecipe",
    "TaskKind",
    "TaskRecipe",
    "TeacherPreparation",
    "TeacherRecipe",
    "TrainingRecipe",
    "load_recipe",
    "load_space",
    "parse_recipe",
]
