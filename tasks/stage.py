"""What all stages share: the `stage` decorator, cache keys from content, and errors of one line."""

import logging
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.context import TaskRunContext
from prefect.runtime import flow_run
from pydantic import BaseModel

from distillery.base_model import base_identity
from distillery.errors import INFRASTRUCTURE_ERRORS, DistilleryError
from distillery.recipe import BaseModelRecipe, RegistryRecipe
from distillery.records import RegisteredModel, StageRecord, digest_of
from distillery.store import ArtifactStore

P = ParamSpec("P")
R = TypeVar("R")

RESULT: dict[str, Any] = {"persist_result": True, "result_serializer": "json"}
"""Results of flows and tasks are JSON, never pickle."""


def stage(name: str, version: int) -> Callable[[Callable[P, R]], Task[P, R]]:
    """A Prefect task whose cache key is its name, its `version` and the content of its arguments.

    Raise `version` when the stage's code changes what it returns. Only named infrastructure errors are tried again."""

    def decorate(function: Callable[P, R]) -> Task[P, R]:
        return task(
            name=name,
            task_run_name=name,
            cache_key_fn=_cache_key(name, version),
            retries=2,
            retry_delay_seconds=[10, 60],
            retry_condition_fn=_is_infrastructure,
            **RESULT,
        )(function)

    return decorate


def _cache_key(name: str, version: int) -> Callable[[TaskRunContext, dict[str, Any]], str]:
    def key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
        content = digest_of([name, version, {k: content_of(v) for k, v in parameters.items()}])
        candidate = key_stem = f"{name.replace(' ', '-')}-{content[:32]}"
        # A cached record whose artifact is gone or damaged is no hit: the next free key is used instead.
        generation = 0
        while context.result_store.exists(candidate) and not _is_hit(context, candidate):
            generation += 1
            candidate = f"{key_stem}-{generation}"
        return candidate

    return key


def _is_hit(context: TaskRunContext, key: str) -> bool:
    try:
        record = context.result_store.read(key).result
    except (ValueError, TypeError, OSError):
        # Half-written, or a record of an earlier version of the project.
        return False
    return is_whole(record)


def content_of(value: Any) -> Any:
    """What of an argument goes into a cache key: its content_id, a base model's own digest, else its JSON."""
    if isinstance(value, BaseModelRecipe):
        return base_identity(value)
    if hasattr(value, "content_id"):
        return value.content_id
    if isinstance(value, BaseModel):
        return {name: content_of(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {str(key): content_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [content_of(item) for item in value]
    return value


def is_whole(record: Any) -> bool:
    """Whether what a record points to is still there, unaltered."""
    if isinstance(record, RegisteredModel):
        from distillery.registry import open_registry

        registry = open_registry(RegistryRecipe(kind=record.registry, model_name=record.name))
        known = any(model.content_id == record.content_id for model in registry.list(record.name))
        return known and registry.is_whole(record)
    return not isinstance(record, StageRecord) or ArtifactStore().holds(record.artifact)


def produced_by() -> str:
    """The name of the run that does the work, for the record."""
    return str(flow_run.name or "a run without a name")


def tidy_logs() -> None:
    """Has Prefect log an error that the user can mend as its one line, and keeps progress bars and telemetry out."""
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
        logger = logging.getLogger(name)
        if _one_line_errors not in logger.filters:
            logger.addFilter(_one_line_errors)


def _one_line_errors(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, DistilleryError):
        record.exc_info, record.args, record.msg = None, None, str(error).replace("%", "%%")
    return True


def _is_infrastructure(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), INFRASTRUCTURE_ERRORS)
