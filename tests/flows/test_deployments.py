"""prefect.yaml: every entrypoint loads, its parameters are what the flow takes, and the UI has
words for all of it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.schema_tools import validate

PROJECT = Path(__file__).resolve().parents[2]
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((PROJECT / "prefect.yaml").read_text())[
    "deployments"
]


def flow_of(deployment: dict[str, Any]) -> Flow[..., Any]:
    return load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)


def test_the_deployments_are_the_documented_ones() -> None:
    pools = {f"{flow_of(one).name}/{one['name']}": one["work_pool"]["name"] for one in DEPLOYMENTS}
    assert pools == {
        "distill/demo": "cpu-pool",
        "distill/lab": "cpu-pool",
        "train-student/gpu": "gpu-pool",
        "search/demo": "cpu-pool",
        "batch-inference/cpu": "cpu-pool",
        "answer-shards/cpu": "cpu-pool",
        "label-parts/cpu": "cpu-pool",
        "score-rows/cpu": "cpu-pool",
    }


def test_redistillation_is_weekly_once_switched_on_and_never_beside_another_run() -> None:
    deployments = {f"{flow_of(one).name}/{one['name']}": one for one in DEPLOYMENTS}
    (weekly,) = deployments["distill/lab"]["schedules"]
    assert (weekly["cron"], weekly["timezone"], weekly["active"]) == ("0 5 * * 1", "UTC", False)
    limits = {name: one.get("concurrency_limit") for name, one in deployments.items()}
    alone = {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert {name for name, limit in limits.items() if limit} == {"distill/demo", "distill/lab"}
    assert limits["distill/demo"] == limits["distill/lab"] == alone


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda one: one["entrypoint"])
def test_the_parameters_are_what_the_flow_takes(deployment: dict[str, Any]) -> None:
    flow = flow_of(deployment)
    parameters = deployment.get("parameters", {})
    # In the schema that the server holds, and in the flow itself.
    validate(parameters, flow.parameters.model_dump(), ignore_required=True)
    if "shards_deployment" in parameters:
        assert parameters["shards_deployment"] == "answer-shards/cpu"
    elif parameters:
        recipe = flow.validate_parameters(parameters)["recipe"]
        assert recipe.name == deployment["name"]
        assert parameters["training_deployment"] == "train-student/gpu"


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda one: one["entrypoint"])
def test_the_ui_has_words_for_the_deployment_and_every_parameter(
    deployment: dict[str, Any],
) -> None:
    flow = flow_of(deployment)
    assert len(deployment["description"].split()) >= 10
    assert flow.description
    # The automations watch over runs with this tag.
    assert "distillery" in deployment["tags"]
    properties = flow.parameters.model_dump()["properties"]
    assert [name for name, schema in properties.items() if not schema.get("description")] == []


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda one: one["entrypoint"])
def test_results_are_json(deployment: dict[str, Any]) -> None:
    flow = flow_of(deployment)
    assert flow.persist_result is True
    assert flow.result_serializer == "json"
