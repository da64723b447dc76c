"""Presets: the recipes that are shipped, and how a user's keys are laid over one of them."""

from importlib.resources import files
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from distillery.recipe.dataset import Role
from distillery.recipe.export import ExportForm
from distillery.recipe.task import TaskRecipe

PRESETS = ("demo", "lab")


def preset_values(name: str) -> dict[str, Any]:
    """Return the mapping in presets/NAME.yaml."""
    text = (files("distillery.recipe") / "presets").joinpath(f"{name}.yaml").read_text()
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def preset_for(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the mapping of a preset that a recipe `values` is laid over. What the demo draws of
    the shipped sample is not drawn of other data."""
    shipped = preset_values(name)
    source = shipped["dataset"]["source"]
    dataset = values.get("dataset")
    own = dataset.get("source", source) if isinstance(dataset, dict) else source
    if source == "sample" and own != source:
        shipped["dataset"].pop("sample", None)
    return shipped


def classify_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return what a recipe `values` with task.kind: classify starts from: presets/classify.yaml,
    with the part for its kind of teacher."""
    shipped = preset_values("classify")
    teacher = values.get("teacher")
    kind = teacher.get("kind", "endpoint") if isinstance(teacher, dict) else "endpoint"
    parts = {name: shipped.pop(name) for name in ("own teacher", "other teacher", "validated")}
    part = parts["own teacher" if kind == "local" else "other teacher"]
    both: dict[str, Any] = {**shipped, **part}
    both["dataset"]["splits"] |= {role: role for role in roles_of_files(values)}
    task = values.get("task")
    if kind == "endpoint" and not names(teacher, "answers", "form"):
        # Held to the classes by a JSON schema, if the endpoint takes one. A class's name may be
        # several words.
        both["teacher"] = {"answers": {"form": "json"}, "max_tokens": 64}
        if has_cascade(values):
            both["teacher"]["cascade"] = dict(both["teacher"])
    if names(values.get("student"), "prompt", "answer"):
        # A student that answers by text has no head of its own to probe for.
        both["student"]["layers"] = {"keep": 0.5, "by": "first"}
        both["student"]["training"].pop("second_opinion", None)
    if isinstance(teacher, dict) and teacher.get("soft_labels") is False:
        for name in ("soft_weight", "second_opinion"):
            both["student"]["training"].pop(name, None)
    if names_rows(values, "gold") or (isinstance(task, dict) and task.get("other")):
        both["student"]["gold"] = True
    # Rows that prove a threshold choose neither epoch nor form of the student that it is for.
    if names_rows(values, "validation") and not names(values, "task", "abstain"):
        validated = parts["validated"]
        both["student"]["training"] |= validated["training"]
        if kind == "local":
            both["teacher"]["preparation"]["training"] |= validated["training"]
        both["export"] = ladder_unless_chosen(both["export"], validated["export"], values)
    return both


def choice_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return what a recipe `values` that says task.kind: choice, and nothing of a preset, starts
    from: presets/choose.yaml, with the part for its kind of teacher.

    A local teacher and its student answer by text, unless the recipe's prompt or teacher.answers
    are for letters. An endpoint answers by letter; its student answers by text, unless the recipe
    has a prompt for it, or words of its own for both."""
    shipped = preset_values("choose")
    teacher: Any = values.get("teacher")
    student: Any = values.get("student")
    parts = ("training", "by text", "own teacher", "validated")
    training, by_text, own, validated = (shipped.pop(name) for name in parts)
    both: dict[str, Any] = {**shipped, "student": {"training": training}}
    roles = roles_of_files(values)
    # Where nothing says which rows to train on, the splits are the sample's, one for each role.
    has_all = "train" not in roles and not names(values, "dataset", "splits")
    if "train" in roles:
        both["dataset"] = {"splits": {role: role for role in roles}}
    prompt = values.get("prompt")
    if isinstance(teacher, dict) and teacher.get("kind") == "local":
        both["teacher"] = own["teacher"]
        both["teacher"]["preparation"]["training"] = training
        if not is_for_letters(prompt) and "answers" not in teacher:
            both |= by_text
        if teacher.get("soft_labels") is not False:
            both["student"]["training"] = {**training, **own["training"]}
    elif not (isinstance(student, dict) and student.keys() & {"prompt", "start"}):
        said = dict(prompt) if isinstance(prompt, dict) else {}
        if not said.keys() - {"max_tokens"}:
            # It is the student's own base model whose tokens are counted.
            both["student"]["prompt"] = {**by_text["prompt"], **said}
    if has_all or names_rows(values, "gold"):
        both["student"]["gold"] = True
    if has_all or names_rows(values, "validation"):
        both["export"] = ladder_unless_chosen(both["export"], validated["export"], values)
    return both


def is_for_letters(prompt: Any) -> bool:
    """Return whether the mapping `prompt` is for answers by letter: it names no other answer, and
    tells of options or letters."""
    if not isinstance(prompt, dict) or prompt.get("answer", "letter") != "letter":
        return False
    told = f"{prompt.get('system', '')}{prompt.get('user', '')}"
    tells = any(name in told for name in ("{choices}", "{letters}", "{count}"))
    return tells or "answer" in prompt or "choice" in prompt


def ladder_unless_chosen(
    form: dict[str, Any], ladder: dict[str, Any], values: dict[str, Any]
) -> dict[str, Any]:
    """Return the `ladder` of forms, or the one `form` where a recipe `values` names forms."""
    export = values.get("export")
    if isinstance(export, dict) and export.keys() & {*ExportForm.model_fields, "ladder"}:
        return form
    return ladder


def longest_answer(task: dict[str, Any]) -> int:
    """Return the task.max_tokens of a recipe, or the default where there is none that can be."""
    found = task.get("max_tokens")
    return found if isinstance(found, int) else int(TaskRecipe.model_fields["max_tokens"].default)


def written_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return what a recipe `values` with task.kind: extract or generate starts from:
    presets/write.yaml, with the parts for its kinds of task and teacher. The student is asked with
    the recipe's own prompt.user, if there is one, since it may show further columns."""
    shipped = preset_values("write")
    teacher, prompt = values.get("teacher"), values.get("prompt")
    kind = teacher.get("kind", "endpoint") if isinstance(teacher, dict) else "endpoint"
    parts = ("own teacher", "other teacher", "told the schema", "validated")
    own, other, told, validated = (shipped.pop(name) for name in parts)
    both: dict[str, Any] = {**shipped, **(own if kind == "local" else other)}
    both["dataset"]["splits"] |= {role: role for role in roles_of_files(values)}
    if kind == "local":
        # A longer label would be set aside, and a teacher that learnt little hardly ever ends.
        both["teacher"]["max_tokens"] = longest_answer(values["task"]) + 1
    if values["task"]["kind"] == "extract":
        # The stronger of the two baselines: fields are often words that were seen before.
        both["evaluation"]["rules"].insert(1, {"kind": "better", "than": "field dictionary"})
    if kind == "endpoint" and values["task"]["kind"] == "extract":
        both["prompt"] |= told["prompt"]
        both["teacher"] |= told["teacher"]
        if has_cascade(values):
            both["teacher"]["cascade"] = dict(both["teacher"])
    if kind != "local" and isinstance(prompt, dict) and "user" in prompt:
        both["student"]["prompt"]["user"] = prompt["user"]
    if names_rows(values, "gold"):
        both["student"]["gold"] = True
    if names_rows(values, "validation"):
        both["export"] = ladder_unless_chosen(both["export"], validated["export"], values)
    return both


def names(values: Any, key: str, inner: str) -> bool:
    """Return whether the mapping `values` has a mapping `key` that has `inner`."""
    below = values.get(key) if isinstance(values, dict) else None
    return isinstance(below, dict) and inner in below


def has_cascade(values: dict[str, Any]) -> bool:
    """Return whether a recipe `values` names a cheap teacher, which answers in the teacher's
    form."""
    teacher = values.get("teacher")
    return isinstance(teacher, dict) and isinstance(teacher.get("cascade"), dict)


def names_rows(values: dict[str, Any], role: str) -> bool:
    """Return whether the dataset of a recipe `values` has rows of a role."""
    dataset = values.get("dataset")
    if not isinstance(dataset, dict):
        return False
    for key in ("splits", "carve"):
        roles = dataset.get(key)
        if isinstance(roles, dict) and roles.get(role):
            return True
    return role in roles_of_files(values)


def roles_of_files(values: dict[str, Any]) -> list[str]:
    """Return the roles that files of a recipe `values` are named for. Where dataset.splits is
    given, it alone says which file serves for what."""
    dataset = values.get("dataset")
    if not isinstance(dataset, dict) or dataset.get("splits") is not None:
        return []
    files = dataset.get("files")
    return [role for role in get_args(Role) if isinstance(files, dict) and role in files]


def slice_of(annotation: Any) -> type[BaseModel] | None:
    """Return the slice that a field holds, also one that may be null; None for other fields."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def merge(base: dict[str, Any], over: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Return `base` with the keys of `over` replaced, slice by slice of `model`.

    A field that is a mapping, such as dataset.carve, is merged key by key; null removes a key. A
    choice of layers is replaced as a whole: its settings have no meaning without each other. An
    export's algorithm goes with its precision.
    """
    result = dict(base)
    for key, value in over.items():
        kind = slice_of(model.model_fields[key].annotation) if key in model.model_fields else None
        below = base.get(key, {})
        if key == "layers" or not isinstance(value, dict) or not isinstance(below, dict):
            result[key] = value
        elif kind is not None:
            if value.get("precision", below.get("precision")) != below.get("precision"):
                below = {name: item for name, item in below.items() if name != "algorithm"}
            result[key] = merge(below, value, kind)
        else:
            both = {**below, **value}
            result[key] = {name: item for name, item in both.items() if item is not None}
    return result
