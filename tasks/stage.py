"""What all stages share: the `stage` decorator, cache keys from content, and errors of one line."""

import json
import logging
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import wraps
from types import SimpleNamespace
from typing import Any, Literal, ParamSpec, TypeVar, get_type_hints

from prefect import Task, tags, task
from prefect import results as prefect_results
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.context import FlowRunContext, TagsContext, TaskRunContext
from prefect.results import ResultStore, get_result_store
from prefect.runtime import flow_run
from prefect.transactions import get_transaction
from prefect.utilities.callables import get_call_parameters
from pydantic import BaseModel

import tasks.results  # noqa: F401 - Prefect finds the block that holds the records by its class
from distillery.errors import INFRASTRUCTURE_ERRORS, DistilleryError, StageError, named_line
from distillery.models.base import base_identity
from distillery.models.device import release_gpu
from distillery.recipe import BaseModelRecipe, RegistryRecipe, Slice
from distillery.records import RegisteredModel, StageRecord, digest_of
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.result_records import ForeignRecord, plain_record
from tasks.locks import StageLocks
from tasks.progress import live_display, progress_of

P = ParamSpec("P")
R = TypeVar("R")

RESULT: dict[str, Any] = {"persist_result": True, "result_serializer": "json"}
"""Results of flows and tasks are JSON, never pickle."""

Stage = Literal[
    "prepare dataset",
    "train teacher",
    "export teacher",
    "check teacher",
    "select rows",
    "label",
    "train student",
    "export student",
    "set threshold",
    "ask base model",
    "evaluate",
    "ask judge",
    "register",
    "download",
]

_log = logging.getLogger(__name__)
_no_key: ContextVar[DistilleryError | None] = ContextVar("no_key", default=None)
"""Why the running stage has no cache key."""


def _is_infrastructure(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), INFRASTRUCTURE_ERRORS)


RETRIES: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": [10, 60],
    "retry_condition_fn": _is_infrastructure,
}
"""A registry or store that is away for a moment ends no run after hours of training."""


def always(_record: Any) -> bool:
    """Return that a record may be used again."""
    return True


def stage(
    name: str,
    version: int,
    reusable: Callable[[Any], bool] = always,
    added_later: Collection[str] = (),
) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Make a Prefect task whose cache key is its name, its `version` and its arguments' content.

    Raise `version` when the stage's code changes what it returns. A cached record is a hit only if
    it is of the class that the function is annotated to return, `reusable` says so, and what it
    points to is whole. Of runs that compute the same key at once, one does the work. Only named
    infrastructure errors are retried. `added_later`: parameters that a later version added, which
    count only where they are not None, so that what was cached before is found again."""

    def decorate(function: Callable[P, R]) -> Task[P, R]:
        @wraps(function)
        def work(*args: P.args, **kwargs: P.kwargs) -> R:
            error = _no_key.get()
            if error is not None:
                # It is of this run alone: what is called here next has no part in it.
                _no_key.set(None)
                raise error
            try:
                with progress_of(name):
                    return function(*args, **kwargs)
            finally:
                release_gpu()

        returns = get_type_hints(function)["return"]
        key = _cache_key(name, version, returns, reusable, frozenset(added_later))
        policy = CacheKeyFnPolicy(cache_key_fn=key)
        return task(
            name=name,
            task_run_name=name,
            cache_policy=policy.configure(
                isolation_level="SERIALIZABLE", lock_manager=StageLocks()
            ),
            **RETRIES,
            on_running=[_begins],
            on_completion=[_ends],
            on_failure=[_ends],
            **RESULT,
        )(work)

    return decorate


def uncached(name: str) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Make a Prefect task that is tried again as a stage is, and never cached: what it looks at
    may have changed since the last run."""

    def decorate(function: Callable[P, R]) -> Task[P, R]:
        return task(
            name=name,
            task_run_name=name,
            cache_policy=NO_CACHE,
            **RETRIES,
            on_running=[_begins],
            on_completion=[_ends],
            on_failure=[_ends],
            persist_result=False,
        )(function)

    return decorate


def refreshing(stages: Collection[Stage]) -> Callable[[Stage, Task[P, R]], Task[P, R]]:
    """Return `again(name, task)`, which gives back the task; where `stages` names it, with its
    cache set aside, so that it does its work anew."""

    def again(name: Stage, task: Task[P, R]) -> Task[P, R]:
        if name in stages:
            return task.with_options(refresh_cache=True)
        return task

    return again


def _cache_key(
    name: str,
    version: int,
    returns: type[Any],
    reusable: Callable[[Any], bool],
    added_later: frozenset[str],
) -> Callable[[TaskRunContext, dict[str, Any]], str | None]:
    def key(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
        # Prefect would log any error here and run the stage without a cache, so that unrelated runs
        # would share its work area. The error is kept, and the stage raises it instead of working.
        _no_key.set(None)
        try:
            counted = {}
            for parameter, value in parameters.items():
                if value is not None or parameter not in added_later:
                    counted[parameter] = content_of(value)
            content = digest_of([name, version, counted])
            key_stem = f"{name.replace(' ', '-')}-{content[:32]}"
            return _free_or_hit(context.result_store, key_stem, returns, reusable)
        except DistilleryError as error:
            _no_key.set(error)
        except Exception as error:
            _log.debug("stage %s: no cache key", name, exc_info=True)
            _no_key.set(
                StageError(
                    f"stage {name}: its cache key can't be computed ({named_line(error)}); please "
                    "report this"
                )
            )
        return None

    return key


def _free_or_hit(
    results: ResultStore, key_stem: str, returns: type[Any], reusable: Callable[[Any], bool]
) -> str:
    """Return the first key of `key_stem`, `key_stem`-1 and so on that holds a hit or nothing.

    A record that is no hit stays where it is: another version of the project may still read it."""
    key, generation = key_stem, 0
    while (kept := _kept(results, key)) is not None and not is_hit(kept, returns, reusable):
        generation += 1
        key = f"{key_stem}-{generation}"
    return key


def _kept(results: ResultStore, key: str) -> bytes | None:
    """Return the file of a record; None where there is none, and nothing of one that is not read.

    Unlike ResultStore.exists it does not mistake an outage for a missing record, and it does not
    wait for the holder of the key's lock."""
    storage: Any = results.result_storage
    try:
        content: bytes = storage.read_path(key, _sync=True)
    except ForeignRecord:
        return b""
    except ValueError:
        return None
    return content


def results_of(task: Task[..., Any]) -> ResultStore:
    """Return where the results of a stage are kept."""
    # Prefect's own annotations leave out that the call is synchronous with _sync.
    store: Any = get_result_store()
    found: ResultStore = store.update_for_task(task, _sync=True)
    return found


def is_hit(kept: bytes, returns: type[Any], reusable: Callable[[Any], bool] = always) -> bool:
    """Return whether the file of a record holds one of class `returns` that is `reusable` and whose
    artifact is whole."""
    try:
        record = record_in(kept)
    except Exception:
        # Half-written, or a record of another version of the project: a decoder may raise anything.
        return False
    # A record whose class can't be imported is decoded as a plain dict.
    return isinstance(record, returns) and reusable(record) and is_whole(record)


def record_in(kept: bytes) -> Any:
    """Return the record that its file holds. Raises ForeignRecord for what is not decoded."""
    plain = plain_record(kept)
    return prefect_results.ResultRecord.deserialize(plain).result  # type: ignore[attr-defined]


def is_cached(task: Task[..., Any], **arguments: Any) -> bool:
    """Return whether a stage that is called with `arguments` here and now will be Cached."""
    results = results_of(task)
    parameters = get_call_parameters(task.fn, (), arguments)
    policy: Any = task.cache_policy
    key = policy.cache_key_fn(SimpleNamespace(result_store=results), parameters)
    return key is not None and _kept(results, key) is not None


def cached_records(task: Task[..., Any]) -> Callable[..., Any]:
    """Return a function that returns the record of a stage that is called with its keyword
    arguments here, or None if there is none that is a hit. It makes no task run, so that it may be
    called for thousands."""
    results = results_of(task)
    policy: Any = task.cache_policy

    def find(**arguments: Any) -> Any:
        parameters = get_call_parameters(task.fn, (), arguments)
        key = policy.cache_key_fn(SimpleNamespace(result_store=results), parameters)
        error = _no_key.get()
        if key is None and error is not None:
            _no_key.set(None)
            raise error
        # The key is one that holds a hit or nothing.
        kept = _kept(results, key)
        return None if kept is None else record_in(kept)

    return find


def is_recorded(task: Task[..., Any], key: str) -> bool:
    """Return whether there is a record under this cache key of the stage."""
    return _kept(results_of(task), key) is not None


def own_key() -> str:
    """Return the cache key of the running stage; its checkpoints are kept under it."""
    key = getattr(get_transaction(), "key", None)
    if key is None:
        raise StageError(
            "this stage has no cache key, and so no folder for its checkpoints; please report this"
        )
    return str(key)


def content_of(value: Any) -> Any:
    """Return what of an argument goes into a cache key: its content_id, a base model's digest, or
    its JSON."""
    if isinstance(value, BaseModelRecipe):
        return base_identity(value)
    if hasattr(value, "content_id"):
        return value.content_id
    if isinstance(value, BaseModel):
        in_order = value.in_order if isinstance(value, Slice) else ()
        content = {}
        for name in fields_in_keys(value):
            field = getattr(value, name)
            content[name] = json.dumps(field) if name in in_order else content_of(field)
        return content
    if isinstance(value, dict):
        return {str(key): content_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [content_of(item) for item in value]
    return value


def fields_in_keys(value: BaseModel) -> list[str]:
    """Return the fields of a recipe or record that go into a cache key: all but those that a later
    version of the recipe added and that are at their default, and those that the recipe keeps out
    of keys."""
    added_later = outside = frozenset[str]()
    if isinstance(value, Slice):
        added_later, outside = value.added_later, value.outside_keys
    names = []
    for name, field in type(value).model_fields.items():
        if name in outside:
            continue
        if name not in added_later or getattr(value, name) != field.default:
            names.append(name)
    return names


def is_whole(record: Any) -> bool:
    """Return whether what a record points to is still there, unaltered."""
    if isinstance(record, RegisteredModel):
        from distillery.registry.open import open_registry

        registry = open_registry(RegistryRecipe(kind=record.registry, model_name=record.name))
        known = any(model.content_id == record.content_id for model in registry.list(record.name))
        return known and registry.holds(record)
    return not isinstance(record, StageRecord) or ArtifactStore().holds(record.artifact)


def produced_by() -> str:
    """Return the name of the run that does the work, for the record."""
    return str(flow_run.name or "a run without a name")


def is_scheduled() -> bool:
    """Return whether a schedule of its deployment has started the run."""
    context = FlowRunContext.get()
    return bool(context and context.flow_run and context.flow_run.auto_scheduled)


def own_tags() -> AbstractContextManager[set[str]]:
    """Give the runs that are started within the tags of this one.

    A subflow has none of its own, and the automations look for dead runs by their tags."""
    return tags(*flow_run.tags)


def origin(started: float) -> dict[str, Any]:
    """Return what a record says of where it came from; `started` is time.perf_counter() then."""
    return {
        "produced_by": produced_by(),
        "run_id": str(flow_run.id or ""),
        "seconds": time.perf_counter() - started,
    }


def begin() -> None:
    """Prepare a flow run: tidy its logs, and give its tasks none of its tags.

    For each task with tags Prefect asks the server for slots under their concurrency limits, which
    takes a good part of a cached run's time."""
    TagsContext(current_tags=set()).__enter__()
    _tidy_logs()


def _tidy_logs() -> None:
    """Have Prefect log what the domain says, and an error that the user can mend as its one
    line."""
    # Prefect gives a logger that it is told of its handler, but no level; the root's is WARNING.
    logging.getLogger("distillery").setLevel(logging.INFO)
    for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
        logger = logging.getLogger(name)
        if _plainly not in logger.filters:
            logger.addFilter(_plainly)


def _plainly(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, DistilleryError):
        record.exc_info, record.args, record.msg = None, None, str(error).replace("%", "%%")
    # Prefect announces our own hooks, twice each.
    return not str(record.msg).startswith(("Running hook", "Hook "))


def _begins(stage: Any, _run: Any, _state: Any) -> None:
    display = live_display()
    if display is not None:
        display.stage_begins(stage.name)


def _ends(_stage: Any, _run: Any, state: Any) -> None:
    display = live_display()
    if display is not None:
        display.stage_ends(state.name, state.is_completed())
