"""The nightly schedule: when it runs, and why it does not."""

from typing import Any

import dagster as dg
import pytest
from dagster._core.execution.api import create_execution_plan
from dagster._core.storage.tags import ASSET_RESUME_RETRY_TAG, RESUME_RETRY_TAG

from taskagent_platform.artifacts import new_artifact
from taskagent_platform.data.targeted import KIND as TARGETED
from taskagent_platform.defs import retrain
from taskagent_platform.defs.platform import FINGERPRINT_TAG, fingerprint
from taskagent_platform.domains.version import version_with
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import load_settings
from taskagent_platform_tests.switch_domain import SWITCHES

JOB = "switches__retrain"


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")
    monkeypatch.setattr(retrain, "settings", load_settings)


@pytest.fixture
def instance():
    with dg.instance_for_test() as made:
        yield made


@dg.asset
def whole() -> None:
    pass


@dg.asset
def socket() -> None:
    pass


@dg.asset
def report() -> None:
    pass


@dg.asset_check(asset=report, blocking=True)
def tool_selection() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=False)


@dg.asset
def broken() -> None:
    raise RuntimeError("out of memory")


def tick(instance: dg.DagsterInstance) -> Any:
    return retrain.nightly_retrain(SWITCHES).evaluate_tick(dg.build_schedule_context(instance))


def earlier_run(instance: dg.DagsterInstance, assets: list[Any], chosen: list[dg.AssetKey] | None = None) -> None:
    """Leaves a run of the same data, code and settings, as the job's own would be."""
    job = dg.Definitions(
        assets=assets,
        jobs=[dg.define_asset_job(JOB)],
        executor=dg.in_process_executor,
    ).resolve_job_def(JOB)
    tags = {FINGERPRINT_TAG: fingerprint(load_settings(), SWITCHES)}
    job.execute_in_process(instance=instance, tags=tags, raise_on_error=False, asset_selection=chosen)


def test_cron_and_time_zone_come_from_the_settings(monkeypatch):
    monkeypatch.setenv("TASKAGENT_RETRAIN__CRON", "15 4 * * 1")
    monkeypatch.setenv("TASKAGENT_RETRAIN__TIME_ZONE", "Europe/Berlin")
    monkeypatch.setenv("TASKAGENT_RETRAIN__NIGHTLY", "true")
    schedule = retrain.nightly_retrain(SWITCHES)
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("15 4 * * 1", "Europe/Berlin")
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("CRON", "at night", "retrain.cron is 'at night'"), ("TIME_ZONE", "Mars/Olympus", "there is no such time zone")],
)
def test_a_time_that_is_none_is_refused(name, value, said, monkeypatch):
    monkeypatch.setenv(f"TASKAGENT_RETRAIN__{name}", value)
    with pytest.raises(PlatformError, match=said):
        retrain.nightly_retrain(SWITCHES)


def test_a_run_that_goes_on_is_not_doubled(instance):
    tags = {FINGERPRINT_TAG: fingerprint(load_settings(), SWITCHES)}

    @dg.job(name=JOB)
    def empty():
        pass

    instance.create_run_for_job(empty, tags=tags, status=dg.DagsterRunStatus.STARTED)
    assert "has not ended yet (started)" in tick(instance).skip_message


def test_a_model_that_its_checks_stopped_is_not_made_again(instance):
    earlier_run(instance, [report, tool_selection])
    assert "which its checks stopped (tool_selection)" in tick(instance).skip_message


def test_a_run_that_crashed_is_tried_again(instance):
    earlier_run(instance, [broken])
    assert len(tick(instance).run_requests) == 1


def test_a_whole_run_is_not_done_again(instance):
    earlier_run(instance, [whole])
    assert "are the same as in run" in tick(instance).skip_message


def test_a_run_of_a_part_is_no_reason_to_skip(instance):
    job = dg.Definitions(assets=[whole, socket], jobs=[dg.define_asset_job(JOB)]).resolve_job_def(JOB)

    def ended(status: dg.DagsterRunStatus, tag: str | None = None, steps: Any = None, after: Any = None) -> Any:
        tags = {FINGERPRINT_TAG: fingerprint(load_settings(), SWITCHES), **({tag: "true"} if tag else {})}
        return instance.create_run_for_job(
            job,
            create_execution_plan(job, step_keys_to_execute=steps),
            tags=tags,
            status=status,
            # What the page asks for after a failure of single assets.
            asset_selection=frozenset({whole.key}) if tag == ASSET_RESUME_RETRY_TAG else None,
            parent_run_id=after,
            root_run_id=after,
        ).run_id

    success, failure = dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE
    part = ended(success, steps=["whole"])
    ended(success, RESUME_RETRY_TAG, steps=["whole"], after=part)
    ended(success, ASSET_RESUME_RETRY_TAG, after=part)
    assert len(tick(instance).run_requests) == 1
    ended(success, RESUME_RETRY_TAG, steps=["whole"], after=ended(failure))
    assert "are the same as in run" in tick(instance).skip_message


def test_a_run_of_chosen_assets_is_no_reason_to_skip(instance):
    earlier_run(instance, [whole, socket], chosen=[whole.key])
    assert len(tick(instance).run_requests) == 1


def test_data_of_a_domain_is_a_reason_to_retrain(tmp_path, monkeypatch):
    suite = tmp_path / "suite.json"
    suite.write_text("{}")
    monkeypatch.setattr(type(SWITCHES), "suites", (suite,))
    before = fingerprint(load_settings(), SWITCHES)
    assert fingerprint(load_settings(), SWITCHES) == before
    suite.write_text('{"tool_selection": []}')
    assert fingerprint(load_settings(), SWITCHES) != before
    suite.write_text("{}")
    hard = tmp_path / "hard.json"
    hard.write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(type(SWITCHES), "robustness_suites", (hard,))
        assert fingerprint(load_settings(), SWITCHES) != before
    monkeypatch.setenv("TASKAGENT_RETRAIN__CRON", "0 3 * * *")
    assert fingerprint(load_settings(), SWITCHES) == before, "when it is retrained decides nothing"
    folder = load_settings().folder(SWITCHES.name) / TARGETED
    version = version_with(SWITCHES, "data", "domains")
    with new_artifact(folder, kind=TARGETED, inputs={}, settings={}, code_version=version):
        pass
    assert fingerprint(load_settings(), SWITCHES) != before
