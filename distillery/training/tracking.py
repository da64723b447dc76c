"""Training's figures in an MLflow tracking server, where DISTILLERY_TRACKING names one."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distillery.settings import LocalSettings

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "distillery"

Log = Callable[[int, Mapping[str, float]], None]
"""Takes a step and the figures of that step, by name."""

_log = logging.getLogger(__name__)


@contextmanager
def tracked(run_name: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    """A run of the experiment `distillery`, with `settings` as its parameters, to which figures are logged; nothing
    without DISTILLERY_TRACKING. A server that fails costs the figures and one warning, never the training."""
    url = LocalSettings().tracking
    if not url:
        yield lambda step, figures: None
        return
    # MLflow's own patience is minutes a call.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client, run_id = MlflowClient(url), ""

    def safely(call: Callable[[], Any]) -> Any:
        nonlocal run_id
        try:
            return call()
        except MlflowException as error:
            run_id = ""
            reason = " ".join(str(error).split())[:200]
            _log.warning("DISTILLERY_TRACKING: no figures are kept from here on (%s)", reason)

    def log(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items() if run_id else ():
            safely(lambda name=name, value=value: client.log_metric(run_id, name, value, step=step))  # type: ignore[misc]

    run_id = safely(lambda: _started(client, run_name, settings)) or ""
    status = "FAILED"
    try:
        yield log
        status = "FINISHED"
    finally:
        if run_id:
            safely(lambda: client.set_terminated(run_id, status))


def _started(client: "MlflowClient", run_name: str, settings: Mapping[str, Any]) -> str:
    known = client.get_experiment_by_name(EXPERIMENT)
    experiment = known.experiment_id if known else client.create_experiment(EXPERIMENT)
    run_id: str = client.create_run(experiment, run_name=run_name).info.run_id
    for name, value in settings.items():
        client.log_param(run_id, name, value)
    return run_id
