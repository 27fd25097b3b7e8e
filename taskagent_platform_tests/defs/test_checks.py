"""The checks of dataset and training: what fails, and how severely."""

from typing import Any

import dagster as dg
import pytest

from taskagent_platform.artifacts import new_artifact
from taskagent_platform.data.distribution import Distribution
from taskagent_platform.defs.lora_adapter import divergence, lora_adapter_checks
from taskagent_platform.defs.merged_model import merged_model_checks
from taskagent_platform.defs.platform import Platform
from taskagent_platform.defs.training_dataset import training_dataset_checks
from taskagent_platform.settings import load_settings
from taskagent_platform_tests.light_domain import LIGHTS


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")


def make(kind: str, details: dict[str, Any]) -> None:
    folder = load_settings().folder(LIGHTS.name) / kind
    with new_artifact(folder, kind=kind, inputs={}, settings={}, code_version="1", details=details):
        pass


def evaluate(checks: Any, **overrides: Any) -> dict[str, Any]:
    with dg.instance_for_test() as instance:
        result = (
            dg.Definitions(
                asset_checks=[checks],
                assets=[dg.AssetSpec(key) for key in {spec.asset_key for spec in checks.check_specs}],
                resources={"platform": Platform(overrides=overrides)},
                jobs=[dg.define_asset_job("look", selection=dg.AssetSelection.checks(checks))],
            )
            .resolve_job_def("look")
            .execute_in_process(instance=instance, raise_on_error=False)
        )
        return {found.check_name: found for found in result.get_asset_check_evaluations()}


def dataset(**changes: Any) -> Any:
    found = {
        "total": 600, "multi_tool": 150, "no_tool": 40, "average_turns": 4.2, "sources": {"a": 600},
        "tool_usage": {tool.name: 100 for tool in LIGHTS.tools},
    }  # fmt: skip
    overlap = changes.pop("overlap", [])
    details = {"distribution": Distribution(**{**found, **changes}).model_dump(), "overlap": overlap}
    make("training_dataset", {**details, "overlaps_dropped": 2})
    return training_dataset_checks(LIGHTS)


ENOUGH = {"data": {"structured_outputs": 200, "function_calling": 250, "multi_tool": 150}}


def test_a_sound_dataset_passes():
    assert all(found.passed for found in evaluate(dataset(), **ENOUGH).values())


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        ("enough_examples", {"total": 499, "multi_tool": 125}),
        ("single_tool_share", {"multi_tool": 60}),
        ("single_tool_share", {"multi_tool": 300}),
        ("every_tool_used", {"tool_usage": {"set_light": 19, "list_lights": 300}}),
        ("apart_from_evaluation", {"overlap": ["turn on the light"]}),
    ],
)
def test_a_fault_of_the_dataset_fails_its_check_and_no_other(check, changes):
    results = evaluate(dataset(**changes), **ENOUGH)
    assert [name for name, found in results.items() if not found.passed] == [check]
    assert results[check].severity == dg.AssetCheckSeverity.ERROR
    assert results[check].blocking


def test_a_size_that_the_settings_rule_out_only_warns():
    results = evaluate(dataset(total=64, multi_tool=16, tool_usage={"set_light": 3}))
    assert not results["enough_examples"].passed
    assert results["enough_examples"].severity == dg.AssetCheckSeverity.WARN
    assert results["every_tool_used"].severity == dg.AssetCheckSeverity.WARN
    assert "settings ask for 64" in results["enough_examples"].description


def test_an_overlap_with_the_evaluation_is_an_error_at_every_size():
    results = evaluate(dataset(total=64, multi_tool=16, overlap=["turn on the light"]))
    assert results["apart_from_evaluation"].severity == dg.AssetCheckSeverity.ERROR


def test_a_check_without_its_artifact_does_not_pass():
    assert evaluate(training_dataset_checks(LIGHTS)) == {}


def losses(*values: float, at_save_points: tuple[float, ...] = ()) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = [{"step": step, "loss": value} for step, value in enumerate(values, 1)]
    return history + [{"step": 99, "eval_loss": value} for value in at_save_points]


@pytest.mark.parametrize(
    ("history", "word"),
    [
        (losses(2.0, 1.0, 0.5), None),
        (losses(2.0), None),
        (losses(2.0, 0.5, at_save_points=(0.9, 0.8, 0.81)), None),
        (losses(2.0, 2.0), "did not fall"),
        (losses(1.0, 2.0), "did not fall"),
        (losses(2.0, float("nan")), "did not fall"),
        (losses(2.0, 0.5, at_save_points=(0.5, 0.9)), "rises"),
        (losses(2.0, 0.5, at_save_points=(0.5, float("nan"))), "rises"),
        ([], "No training loss"),
    ],
)
def test_divergence_is_told_in_a_sentence(history, word):
    found = divergence(history)
    assert (found is None) if word is None else (word in (found or ""))


def test_a_final_loss_above_the_bound_warns_and_divergence_is_an_error():
    make("lora_adapter", {"final_loss": 0.1, "history": losses(1.0, 2.0)})
    results = evaluate(lora_adapter_checks(LIGHTS))
    assert results["converged"].metadata["bound"].value == 0.1, "the specification's, unless a setting says otherwise"
    assert (results["converged"].passed, results["converged"].severity) == (False, dg.AssetCheckSeverity.WARN)
    assert (results["no_divergence"].passed, results["no_divergence"].severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert results["no_divergence"].blocking
    assert evaluate(lora_adapter_checks(LIGHTS), training={"converged_loss": 0.11})["converged"].passed


@pytest.mark.parametrize(("difference", "passed"), [(1e-6, True), (1e-4, True), (2e-4, False)])
def test_a_merged_model_must_answer_as_base_and_adapter_do(difference, passed):
    make("merged_model", {"logit_difference": difference, "logit_tolerance": 1e-4, "argmax_agreement": 1.0})
    results = evaluate(merged_model_checks(LIGHTS))
    assert results["answers_as_base_and_adapter"].passed is passed
