"""Trainings on another machine: what says something of their settings, and what does not."""

import asyncio

import pytest
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Crashed, Failed, exception_to_failed_state

from distillery.errors import StoreUnavailable, TrainingError, TrainingUnavailable
from flows.train_student import failure_of


def failed_by(error: Exception) -> State:
    """The state as Prefect itself makes it of a flow that raises `error`."""
    return asyncio.run(
        exception_to_failed_state(error, message="Flow run encountered an exception:")
    )


def test_a_training_that_refuses_its_settings_is_told_from_a_machine_that_died() -> None:
    diverged = failure_of(failed_by(TrainingError("the loss is nan at step 3")), "gpu: the run 'x'")
    assert type(diverged) is TrainingError
    assert str(diverged) == (
        "gpu: the run 'x' ended as Failed: Flow run encountered an exception: "
        "TrainingError: the loss is nan at step 3"
    )


@pytest.mark.parametrize(
    "state",
    [
        Crashed(message="Flow run infrastructure exited with non-zero status code 137."),
        Cancelled(message="by a person"),
        Failed(message="Worker failed to submit flow run"),
        failed_by(StoreUnavailable("the store does not answer")),
        failed_by(TrainingUnavailable("base.model: can't get it")),
        failed_by(RuntimeError("CUDA error")),
    ],
)
def test_all_else_says_nothing_of_the_settings(state: State) -> None:
    assert isinstance(failure_of(state, "gpu: the run 'x'"), TrainingUnavailable)
