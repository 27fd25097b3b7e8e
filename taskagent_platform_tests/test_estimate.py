"""How long the main job will take: from an earlier run, or from the machine's speed."""

from typing import Any

import dagster as dg
import pytest

from taskagent_platform import estimate as module
from taskagent_platform.defs.domain import stage_names
from taskagent_platform.defs.keys import asset_key
from taskagent_platform.estimate import estimate, matrix_gflops
from taskagent_platform.settings import load_settings
from taskagent_platform_tests.light_domain import LIGHTS


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    monkeypatch.setenv("TASKAGENT_PROFILE", "cpu")
    monkeypatch.setattr(module, "matrix_gflops", lambda: 96.0)
    return load_settings()


@pytest.fixture
def instance():
    with dg.instance_for_test() as made:
        yield made


def record(instance: dg.DagsterInstance, name: str, seconds: float, **metadata: Any) -> None:
    made = {"seconds": seconds, "reused": False, "profile": "cpu", **metadata}
    instance.report_runless_asset_event(dg.AssetMaterialization(asset_key(LIGHTS, name), metadata=made))


def test_a_machine_of_half_the_speed_takes_twice_as_long(settings, instance, monkeypatch):
    reference = estimate(settings, LIGHTS, instance)
    monkeypatch.setattr(module, "matrix_gflops", lambda: 48.0)
    slow = estimate(settings, LIGHTS, instance)
    assert slow.seconds == pytest.approx(2 * reference.seconds)
    assert "48 GFLOP/s" in slow.basis


def test_more_examples_take_longer(settings, instance, monkeypatch):
    before = estimate(settings, LIGHTS, instance)
    monkeypatch.setenv("TASKAGENT_DATA__MULTI_TOOL", "5000")
    assert estimate(load_settings(), LIGHTS, instance).seconds > before.seconds


def test_an_earlier_run_tells_better(settings, instance):
    for name in stage_names(LIGHTS):
        record(instance, name, 10.0)
    found = estimate(settings, LIGHTS, instance)
    assert found.seconds == pytest.approx(10.0 * len(stage_names(LIGHTS)))
    assert "last made here" in found.basis


def test_what_was_reused_or_made_with_another_profile_tells_nothing(settings, instance):
    record(instance, "eval_report", 100.0)
    record(instance, "lora_adapter", 1000.0)
    record(instance, "lora_adapter", 1.0, reused=True)
    record(instance, "lora_adapter", 2.0, profile="smoke")
    assert estimate(settings, LIGHTS, instance).seconds == pytest.approx(1100.0)


def test_a_training_on_more_examples_is_estimated_longer(settings, instance):
    asked = settings.data.structured_outputs + settings.data.function_calling + settings.data.multi_tool
    record(instance, "eval_report", 0.0)
    record(instance, "lora_adapter", 100.0, examples=round(asked * (1 - settings.data.evaluation_share) / 2))
    assert estimate(settings, LIGHTS, instance).seconds == pytest.approx(200.0, rel=0.01)


def test_a_training_of_more_epochs_is_estimated_longer(settings, instance):
    record(instance, "eval_report", 0.0)
    record(instance, "lora_adapter", 100.0, epochs=settings.training.epochs / 2)
    assert estimate(settings, LIGHTS, instance).seconds == pytest.approx(200.0)


def test_a_training_that_was_gone_on_with_tells_nothing(settings, instance):
    unknown = estimate(settings, LIGHTS, instance)
    record(instance, "eval_report", 100.0)
    record(instance, "lora_adapter", 3.0, resumed_from=280)
    assert estimate(settings, LIGHTS, instance) == unknown
    record(instance, "lora_adapter", 1000.0, resumed_from=0)
    record(instance, "lora_adapter", 3.0, resumed_from=280)
    assert estimate(settings, LIGHTS, instance).seconds == pytest.approx(1100.0)


def test_a_stage_that_has_long_been_reused_is_not_taken_for_free(settings, instance, monkeypatch):
    monkeypatch.setattr(module, "_PAGE", 2)
    unknown = estimate(settings, LIGHTS, instance)
    record(instance, "eval_report", 100.0)
    record(instance, "lora_adapter", 1000.0)
    for _ in range(5):
        record(instance, "merged_model", 0.1, reused=True)
    assert estimate(settings, LIGHTS, instance) == unknown, "nothing here says how long it takes"
    record(instance, "merged_model", 40.0)
    for _ in range(5):
        record(instance, "merged_model", 0.1, reused=True)
    assert estimate(settings, LIGHTS, instance).seconds == pytest.approx(1140.0)


def test_the_speed_of_this_machine_is_a_speed():
    assert matrix_gflops(0.01) > 0
