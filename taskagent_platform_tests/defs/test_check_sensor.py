"""The check sensor on real runs: what failed, by how much, and what never ran."""

import json
from typing import Any

import dagster as dg
import pytest

from taskagent_platform.alerts import outbox
from taskagent_platform.defs.check_sensor import alerts_of_run, check_sensor
from taskagent_platform.defs.eval_report import GATES
from taskagent_platform.settings import load_settings

KEY = dg.AssetKey(["lights", "eval_report"])


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")
    return load_settings()


@pytest.fixture
def instance():
    with dg.instance_for_test() as made:
        yield made


@dg.asset(key=KEY)
def report() -> "dg.MaterializeResult[None]":
    return dg.MaterializeResult(metadata={"model_digest": "abcdef" * 10})


@dg.asset(key=["lights", "vllm_endpoint"], deps=[KEY])
def endpoint() -> None:
    pass


def gate(name: str, *, passed: bool = True, blocking: bool = True, warn: bool = False, breaks: bool = False) -> Any:
    @dg.asset_check(asset=KEY, name=name, blocking=blocking)
    def check() -> dg.AssetCheckResult:
        if breaks:
            raise RuntimeError("the suite is gone")
        return dg.AssetCheckResult(
            passed=passed,
            severity=dg.AssetCheckSeverity.WARN if warn else dg.AssetCheckSeverity.ERROR,
            description="Argument extraction is 81.5% and must be greater than 90.0%: 8.5 points short.",
            metadata={"margin": "-8.5 points"},
        )

    return check


def passing(*others: str) -> list[Any]:
    return [gate(name) for name in GATES if name not in others]


def run(instance: dg.DagsterInstance, checks: list[Any], *, selection: Any = None) -> dg.DagsterRun:
    result = dg.materialize([report, endpoint, *checks], instance=instance, selection=selection, raise_on_error=False)
    found = instance.get_run_by_id(result.run_id)
    assert found is not None
    return found


def test_a_failed_blocking_check_is_told_with_margin_model_champion_and_links(settings, instance):
    failed = run(instance, [*passing("argument_extraction"), gate("argument_extraction", passed=False)])
    (alert,) = alerts_of_run(settings, instance, failed)
    facts = dict(alert.facts)
    assert alert.title == "lights/eval_report: blocked by argument_extraction"
    assert alert.severity == "failure"
    assert "8.5 points short. (margin -8.5 points)" in facts["What"]
    assert facts["Model"] == "abcdef" * 10
    assert facts["Serving"] == "No model of lights is served."
    assert facts["Run"].endswith(f"/runs/{failed.run_id}")
    assert facts["Report"].endswith("/assets/lights/eval_report")


def test_a_failed_check_that_blocks_nothing_is_told_although_its_run_succeeds(settings, instance):
    succeeded = run(instance, [*passing(), gate("tidy", passed=False, blocking=False)])
    assert succeeded.status == dg.DagsterRunStatus.SUCCESS
    (alert,) = alerts_of_run(settings, instance, succeeded)
    assert alert.title == "lights/eval_report: tidy failed and blocks nothing"
    assert alert.severity == "failure"


def test_a_warning_is_told_as_one(settings, instance):
    (alert,) = alerts_of_run(settings, instance, run(instance, [*passing(), gate("tidy", passed=False, warn=True)]))
    assert (alert.title, alert.severity) == ("lights/eval_report: tidy warns", "warning")


def test_a_gate_that_was_left_out_is_told(settings, instance):
    selection = dg.AssetSelection.assets(KEY).without_checks()
    (alert,) = alerts_of_run(settings, instance, run(instance, passing(), selection=selection))
    assert alert.title == f"lights/eval_report: {', '.join(sorted(GATES))} never ran"


def test_a_gate_that_broke_is_told(settings, instance):
    broken = run(instance, [*passing("multi_tool"), gate("multi_tool", breaks=True)])
    titles = [alert.title for alert in alerts_of_run(settings, instance, broken)]
    assert titles == ["lights/eval_report: multi_tool never ran"]


def test_a_run_in_which_every_gate_passed_is_no_alert(settings, instance):
    assert not list(alerts_of_run(settings, instance, run(instance, passing())))


def test_the_sensor_tells_every_run_once(settings, instance):
    sensor = check_sensor()

    def tick(cursor: str | None) -> Any:
        return sensor.evaluate_tick(dg.build_sensor_context(instance=instance, cursor=cursor))

    run(instance, [*passing("multi_tool"), gate("multi_tool", passed=False)])
    first = tick(None)
    assert "from now on" in first.skip_message
    # As if it had begun before that run.
    begun = json.dumps({**json.loads(first.cursor), "since": "2020-01-01T00:00:00+00:00"})
    second = tick(begun)
    assert "1 runs ended. Alert: lights/eval_report: blocked by multi_tool." in second.skip_message
    run(instance, passing())
    third = tick(second.cursor)
    assert third.skip_message == "1 runs ended."
    assert tick(third.cursor).skip_message == "0 runs ended."
    assert tick(begun).skip_message == "2 runs ended.", "looked at again, not told again"
    assert outbox(settings).deliver().sent == 0
