"""The run-failure sensor: which runs it tells of, and in what words."""

from typing import Any

import dagster as dg
import pytest

from taskagent_platform.defs.alert_sensor import alert_sensor
from taskagent_platform.defs.run_failure_sensor import run_failure_sensor
from taskagent_platform.errors import PlatformError
from taskagent_platform.serving.active import active_file
from taskagent_platform.settings import load_settings
from taskagent_platform_tests.receivers import http_receiver


@pytest.fixture
def instance(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with dg.instance_for_test() as made:
        yield made


@dg.asset
def lamp() -> None:
    raise dg.Failure(description="The bulb is missing; put one in.")


@dg.asset
def socket() -> None:
    pass


@dg.asset_check(asset=socket, blocking=True)
def tight() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=False)


def tell(instance: dg.DagsterInstance, assets: list[Any]) -> Any:
    result = dg.materialize(assets, instance=instance, raise_on_error=False)
    event = next(event for event in result.all_events if event.event_type == dg.DagsterEventType.RUN_FAILURE)
    context = dg.build_run_status_sensor_context(
        sensor_name="run_failure",
        dagster_instance=instance,
        dagster_run=result.dagster_run,
        dagster_event=event,
    ).for_run_failure()
    return run_failure_sensor()(context)


def deliver(instance: dg.DagsterInstance) -> Any:
    return alert_sensor().evaluate_tick(dg.build_sensor_context(instance=instance))


def test_a_failed_run_reaches_a_webhook_with_its_reason(instance, monkeypatch):
    with http_receiver() as http:
        monkeypatch.setenv("TASKAGENT_ALERTS__URLS", f'["{http.url}"]')
        assert "failed" in tell(instance, [lamp]).skip_message
        assert deliver(instance).skip_message == "1 messages sent, 0 alerts wait."
        assert "lamp: The bulb is missing; put one in." in http.posted[0]["message"]
        assert f":{load_settings().ports.dagster}/runs/" in http.posted[0]["message"]


def test_a_run_that_a_check_stopped_is_left_to_the_check_sensor(instance):
    assert "stopped by a check" in tell(instance, [socket, tight]).skip_message


def test_an_alert_that_nobody_takes_fails_the_tick_that_dagster_shows(instance, monkeypatch):
    with http_receiver() as http:
        http.status = 503
        monkeypatch.setenv("TASKAGENT_ALERTS__URLS", f'["{http.url}"]')
        monkeypatch.setattr("taskagent_platform.alerts._PAUSE_S", 0.01)
        tell(instance, [lamp])
        with pytest.raises(PlatformError, match=r"json \(address 1\) does not take alerts"):
            deliver(instance)


def test_wrong_settings_and_a_damaged_record_keep_no_alert_back(instance, monkeypatch, tmp_path):
    with http_receiver() as http:
        monkeypatch.setenv("TASKAGENT_ALERTS__URLS", f'["{http.url}"]')
        at_start = load_settings()
        monkeypatch.setattr("taskagent_platform.defs.run_failure_sensor.settings", lambda: at_start)
        active_file(at_start).parent.mkdir(parents=True)
        active_file(at_start).write_text("{")
        (tmp_path / "settings.yaml").write_text("training: {epochs: -1}\n")
        assert "failed" in tell(instance, [lamp]).skip_message
        (tmp_path / "settings.yaml").unlink()
        deliver(instance)
        assert "put one in." in http.posted[0]["message"]
        assert "Serving" not in http.posted[0]["message"]


def test_a_run_of_the_command_line_is_seen_and_told_once_the_outbox_takes_it(instance):
    code_location = dg.Definitions(assets=[lamp], sensors=[run_failure_sensor()]).get_repository_def()

    def tick(cursor: str | None) -> Any:
        context = dg.build_sensor_context(instance=instance, repository_def=code_location, cursor=cursor)
        return run_failure_sensor().evaluate_tick(context)

    cursor = tick(None).cursor
    assert dg.materialize([lamp], instance=instance, raise_on_error=False).dagster_run.remote_job_origin is None
    damaged = load_settings().home / "smoke" / "alerts" / "outbox.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    with pytest.raises(dg.DagsterInvariantViolationError, match=r"waits: .*outbox\.json is damaged"):
        tick(cursor)
    damaged.unlink()
    seen = tick(cursor)
    assert "failed" in seen.skip_message
    assert "put one in." in damaged.read_text()
    assert "failed" not in (tick(seen.cursor).skip_message or "")


def test_without_an_address_the_tick_says_what_to_set(instance):
    assert "alerts.urls" in deliver(instance).skip_message
