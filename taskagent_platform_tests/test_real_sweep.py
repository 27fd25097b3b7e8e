"""A sweep for real: two trainings, each merged, served by vLLM and asked the development suite."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from taskagent_platform.artifacts import read_manifest
from taskagent_platform.defs.tracking import store_uri
from taskagent_platform.settings import load_settings
from taskagent_platform_tests.swept_domain import SWEPT
from taskagent_platform_tests.switch_home import left_over, switch_home, taskagent
from taskagent_platform_tests.test_main_job import DATA

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

# Nothing is learned at the first.
RATES = (1e-6, 3e-3)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    domain = "taskagent_platform_tests.swept_domain:SWEPT"
    with switch_home(tmp_path_factory.mktemp("sweep"), domain, DATA) as made:
        yield made


def sweep(environment: dict[str, str]) -> str:
    done = taskagent(environment, "sweep", f"learning_rate={','.join(map(str, RATES))}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert left_over(environment) == []
    return done.stdout


def ranking(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    folder = load_settings().folder(SWEPT.name) / "training_sweep"
    found: list[dict[str, Any]] = read_manifest(folder, verify=True).details["ranking"]
    return found


def test_the_training_that_learned_something_is_ranked_first(environment, monkeypatch):
    from mlflow import MlflowClient

    shown = sweep(environment)
    best, other = ranking(environment, monkeypatch)
    assert [trial["changes"]["learning_rate"] for trial in (best, other)] == [3e-3, 1e-6]
    [path] = SWEPT.development_suites
    asked = sum(map(len, json.loads(path.read_text()).values()))
    assert best["cases"] == other["cases"] == asked
    # The base model mixes its tools up.
    assert best["right"] > other["right"]
    assert best["held_out_loss"] < other["held_out_loss"]
    assert f"1. development {best['right']} of {asked} (" in shown

    settings = load_settings()
    client = MlflowClient(store_uri(settings))
    experiment = client.get_experiment_by_name(SWEPT.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], order_by=["metrics.development_accuracy DESC"])
    found = [run.data.metrics["development_accuracy"] for run in runs]
    assert found == [trial["right"] / asked for trial in (best, other)]


def test_a_second_sweep_takes_what_was_measured(environment, monkeypatch):
    before = ranking(environment, monkeypatch)
    shown = sweep(environment)
    after = ranking(environment, monkeypatch)
    assert [trial["adapter"] for trial in after] == [trial["adapter"] for trial in before]
    assert [trial["right"] for trial in after] == [trial["right"] for trial in before]
    assert "model server loading" not in shown
