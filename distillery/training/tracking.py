"""A training's settings and figures in an MLflow tracking server, if DISTILLERY_TRACKING names one.

Each training is a run of the experiment `distillery`.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from distillery.errors import one_line
from distillery.settings import LocalSettings

EXPERIMENT = "distillery"

Log = Callable[[int, Mapping[str, float]], None]
"""Takes a step and the figures of that step, by name."""

_log = logging.getLogger(__name__)


@contextmanager
def tracked(run_name: str, settings: Mapping[str, Any]) -> Iterator[Log]:
    """Give a function that logs figures to a new run, which has `settings` as its parameters.

    The run ends as FINISHED, or as FAILED after an error. Nothing is sent without
    DISTILLERY_TRACKING. A server that fails costs the figures and one warning, never the
    training."""
    url = LocalSettings().tracking
    if not url:
        yield lambda step, figures: None
        return
    # MLflow by itself would retry for minutes at each call.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    run = TrackedRun(url)
    run.start(run_name, settings)
    status = "FAILED"
    try:
        yield run.log
        status = "FINISHED"
    finally:
        run.end(status)


class TrackedRun:
    """A run in MLflow. After the first call that fails, nothing more is sent."""

    def __init__(self, url: str) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(url)
        self.run_id: str | None = None

    def start(self, name: str, settings: Mapping[str, Any]) -> None:
        """Start the run, in an experiment that is created if need be."""
        with self.giving_up_at_an_error():
            known = self.client.get_experiment_by_name(EXPERIMENT)
            if known:
                experiment_id = known.experiment_id
            else:
                experiment_id = self.client.create_experiment(EXPERIMENT)
            run_id: str = self.client.create_run(experiment_id, run_name=name).info.run_id
            for key, value in settings.items():
                self.client.log_param(run_id, key, value)
            self.run_id = run_id

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a step."""
        with self.giving_up_at_an_error():
            for name, value in figures.items():
                if self.run_id:
                    self.client.log_metric(self.run_id, name, value, step=step)

    def end(self, status: str) -> None:
        """End the run with an MLflow status."""
        with self.giving_up_at_an_error():
            if self.run_id:
                self.client.set_terminated(self.run_id, status)

    @contextmanager
    def giving_up_at_an_error(self) -> Iterator[None]:
        """Turn an error of MLflow within into a warning, and forget the run."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            self.run_id = None
            _log.warning(
                "DISTILLERY_TRACKING: no figures are kept from here on (%s)", one_line(error)
            )
