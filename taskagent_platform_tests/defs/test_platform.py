"""What every asset rests on: one writer at a time, errors as sentences, no leftovers, no run that counts as alive."""

import subprocess
import sys
import threading
import time
from typing import Any

import dagster as dg
import psutil
import pytest
import yaml
from filelock import FileLock

from taskagent_platform.artifacts import new_artifact
from taskagent_platform.defs.instance import close_abandoned_runs, prepare_instance
from taskagent_platform.defs.keys import AssetOptions, domain_asset
from taskagent_platform.defs.platform import Platform
from taskagent_platform.errors import PlatformError
from taskagent_platform.launchers.routes import PROCESS_TAG, ROUTE_TAG
from taskagent_platform.process_identity import process_mark
from taskagent_platform.settings import load_settings
from taskagent_platform_tests.light_domain import LIGHTS

OPTIONS = AssetOptions("lamp", (), {"python"}, "A lamp.", ("settings.py",))


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")
    return load_settings()


@pytest.fixture
def instance():
    with dg.instance_for_test() as made:
        yield made


def lamp(body: Any) -> Any:
    @domain_asset(LIGHTS, OPTIONS)
    def asset(context: dg.AssetExecutionContext, platform: Platform):
        with platform.stage(context, LIGHTS) as stage:
            return body(stage)

    return asset


def materialize(asset: Any, instance: Any, **more: Any) -> Any:
    return dg.materialize([asset], instance=instance, resources={"platform": Platform(**more)}, raise_on_error=False)


def make(stage: Any, kind: str = "lamp") -> Any:
    with new_artifact(stage.folder(), kind=kind, inputs={}, settings={}, code_version="1") as scratch:
        (scratch / "bulb.txt").write_text("on")
    return stage.upstream("lamp")


def test_a_stage_hands_on_path_digest_and_data_version(settings, instance):
    result = materialize(lamp(lambda stage: stage.result(make(stage), reused=False, level=3)), instance)
    made = result.asset_materializations_for_node("lights__lamp")[0]
    assert made.metadata["path"].value == str(settings.folder("lights") / "lamp")
    assert made.metadata["level"].value == 3
    assert made.metadata["reused"].value is False
    assert made.tags["dagster/data_version"] == made.metadata["digest"].value


def test_a_platform_error_fails_the_step_with_its_sentence(settings, instance):
    def fail(stage: Any) -> Any:
        raise PlatformError("The bulb is missing; put one in.")

    result = materialize(lamp(fail), instance)
    failure = result.failure_data_for_node("lights__lamp")
    assert failure.user_failure_data.description == "The bulb is missing; put one in."


def test_an_unfinished_upstream_is_named(settings, instance):
    result = materialize(lamp(lambda stage: stage.upstream("socket")), instance)
    assert (
        "socket is not a finished artifact"
        in result.failure_data_for_node("lights__lamp").user_failure_data.description
    )


def test_the_settings_of_a_run_can_be_given_with_it(settings, instance):
    seen = []

    def look(stage: Any) -> Any:
        seen.append(stage.settings.training.epochs)
        return stage.result(make(stage), reused=False)

    materialize(lamp(look), instance, overrides={"training": {"epochs": 7}})
    assert seen == [7]


def test_a_wrong_setting_of_a_run_fails_it_with_a_sentence(settings, instance):
    result = materialize(lamp(make), instance, overrides={"training": {"epochs": -1}})
    assert "training.epochs = -1" in result.failure_data_for_node("lights__lamp").user_failure_data.description


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("gates", {"gates": {"tool_selection": 0.0}}),
        ("evaluation.case_limit", {"evaluation": {"case_limit": 1}}),
        ("evaluation.latency_requests", {"evaluation": {"latency_requests": 1}}),
        ("home", {"home": "elsewhere"}),
        ("profile", {"profile": "cpu"}),
    ],
)
def test_a_run_cannot_choose_what_models_are_judged_by(settings, name, overrides):
    with pytest.raises(PlatformError, match=rf"^{name} cannot be set for one run .*settings.yaml.*override_reason"):
        Platform(overrides=overrides).settings()
    assert Platform(overrides={"evaluation": {"concurrency": 2}}).settings().evaluation.concurrency == 2


def test_what_a_killed_run_left_is_removed(settings, instance):
    folder = settings.folder("lights")
    partial, other = folder / ".lamp.12345678.partial", folder / ".socket.12345678.partial"
    for leftover in (partial, other):
        leftover.mkdir(parents=True)
        (leftover / "half").write_text("x")
    materialize(lamp(lambda stage: stage.result(make(stage), reused=False)), instance)
    assert not partial.exists()
    assert other.exists(), "another asset's scratch folder may be in use"


def test_a_second_run_waits_for_the_first(settings, instance):
    folder = settings.folder("lights")
    folder.mkdir(parents=True)
    lock = FileLock(folder / ".lock")
    lock.acquire()
    entered = threading.Event()

    def enter(stage: Any) -> Any:
        entered.set()
        return stage.result(make(stage), reused=False)

    running = threading.Thread(target=materialize, args=(lamp(enter), instance))
    running.start()
    try:
        assert not entered.wait(1)
    finally:
        lock.release()
    running.join(timeout=60)
    assert entered.is_set()


def test_figures_of_a_running_step_are_stored_before_it_ends(settings, instance):
    seen: list[Any] = []

    def train(stage: Any) -> Any:
        stage.observe({"step": 1, "loss": 2.5, "eval_loss": None})
        stage.observe({"step": 2, "loss": 2.4})  # too soon after the one before
        stage.observe({"step": 3, "loss": 2.3}, now=True)
        records = instance.get_records_for_run(stage.context.run.run_id, of_type=dg.DagsterEventType.ASSET_OBSERVATION)
        seen.extend(record.event_log_entry.dagster_event.asset_observation_data for record in records.records)
        return stage.result(make(stage), reused=False)

    materialize(lamp(train), instance)
    assert [data.asset_observation.metadata["step"].value for data in seen] == [1, 3]
    assert "eval_loss" not in seen[0].asset_observation.metadata


def test_a_run_is_tagged_with_the_process_that_executes_it(settings, instance):
    result = materialize(lamp(lambda stage: stage.result(make(stage), reused=False)), instance)
    run = instance.get_run_by_id(result.run_id)
    assert run.tags[PROCESS_TAG] == process_mark(psutil.Process())


def test_a_run_whose_process_is_gone_no_longer_counts_as_running(instance):
    @dg.op
    def nothing():
        pass

    @dg.job
    def empty():
        nothing()

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    mark = process_mark(psutil.Process(child.pid))
    going = [
        instance.create_run_for_job(empty, status=dg.DagsterRunStatus.STARTED, tags={PROCESS_TAG: tag})
        for tag in (mark, process_mark(psutil.Process()))
    ]
    sent = instance.create_run_for_job(
        empty, status=dg.DagsterRunStatus.STARTED, tags={PROCESS_TAG: mark, ROUTE_TAG: "gpu:docker"}
    )
    assert close_abandoned_runs(instance) == []
    child.kill()
    # Not waited for: a zombie is gone, too.
    time.sleep(0.2)
    assert close_abandoned_runs(instance) == [going[0].run_id]
    child.wait()
    assert instance.get_run_by_id(going[0].run_id).status == dg.DagsterRunStatus.FAILURE
    for run in (going[1], sent):
        assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.STARTED


def test_the_instance_is_configured_once_and_sends_nothing_home(settings):
    folder = prepare_instance(settings)
    assert folder == settings.home / "dagster"
    configuration = yaml.safe_load((folder / "dagster.yaml").read_text())
    assert configuration["telemetry"] == {"enabled": False}
    (folder / "dagster.yaml").write_text("telemetry:\n  enabled: false\n# mine\n")
    prepare_instance(settings)
    assert (folder / "dagster.yaml").read_text().endswith("# mine\n")
