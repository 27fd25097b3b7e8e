"""The endpoint's asset: where a run may deploy at all."""

from typing import Any

import dagster as dg
import pytest

from taskagent_platform.defs.platform import Platform
from taskagent_platform.defs.vllm_endpoint import vllm_endpoint
from taskagent_platform.launchers.routes import ROUTE_TAG
from taskagent_platform_tests.light_domain import LIGHTS


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")


def why_it_failed(tags: dict[str, Any]) -> Any:
    with dg.instance_for_test() as instance:
        result = dg.materialize(
            [vllm_endpoint(LIGHTS)],
            instance=instance,
            resources={"platform": Platform()},
            tags=tags,
            raise_on_error=False,
        )
    failure: Any = result.failure_data_for_node("lights__vllm_endpoint")
    return failure.user_failure_data.description


@pytest.mark.parametrize("route", ["docker", "kubernetes", "ray"])
def test_a_run_in_a_container_of_its_own_deploys_nothing(route):
    assert f"A run on the route {route} deploys nothing" in why_it_failed({ROUTE_TAG: f"gpu:{route}"})


@pytest.mark.parametrize("tags", [{}, {ROUTE_TAG: "cpu:local"}])
def test_a_run_of_this_machine_goes_on_to_the_model(tags):
    assert "merged_model" in why_it_failed(tags)
