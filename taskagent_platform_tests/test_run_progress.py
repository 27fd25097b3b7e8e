"""How a run is shown, from the events that Dagster really stores."""

import io
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest
from rich.console import Console

from taskagent_platform.run_progress import PlainView, RunProgress, StageProgress, TerminalView, duration


@dg.asset(key=["lights", "adapter"])
def adapter(context: dg.AssetExecutionContext) -> "dg.MaterializeResult[None]":
    for step in (1, 2):
        figures = {"step": step, "steps": 2, "loss": 1.0 / step, "eta_s": 90.0 * (2 - step)}
        context.log_event(dg.AssetObservation(asset_key=context.asset_key, metadata=figures))
    return dg.MaterializeResult(metadata={"reused": False})


@dg.asset(key=["lights", "base"])
def base() -> "dg.MaterializeResult[None]":
    return dg.MaterializeResult(metadata={"reused": True})


@dg.asset(key=["lights", "report"], deps=[adapter, base])
def report(context: dg.AssetExecutionContext) -> None:
    context.log.info("The model server answers.\nmore")


GATE = dg.AssetCheckSpec("tool_selection", asset=report.key, blocking=True)
OTHER = dg.AssetCheckSpec("speed", asset=report.key, blocking=True)


@dg.multi_asset_check(specs=[GATE, OTHER], name="lights__report_checks")
def gates() -> Iterator[dg.AssetCheckResult]:
    yield dg.AssetCheckResult(
        check_name="tool_selection", asset_key=report.key, passed=False, description="94.0 %, 1.0 points short."
    )
    yield dg.AssetCheckResult(
        check_name="speed", asset_key=report.key, passed=False, severity=dg.AssetCheckSeverity.WARN, description="slow"
    )


@dg.asset(key=["lights", "endpoint"], deps=[report])
def endpoint() -> None:
    pass


@dg.asset(key=["lights", "broken"])
def broken() -> None:
    try:
        raise ValueError("inner")
    except ValueError as error:
        raise dg.Failure(description="The port is taken; choose another.") from error


@dg.asset_check(asset=base, name="is_well")
def torn() -> dg.AssetCheckResult:
    raise RuntimeError("the report is torn")


EVENTS = {dg.DagsterEventType.STEP_START, dg.DagsterEventType.ASSET_OBSERVATION}
STAGES = ("adapter", "base", "report", "endpoint", "broken")


def progress_of(assets: list[Any], instance: dg.DagsterInstance) -> RunProgress:
    result = dg.materialize(assets, instance=instance, raise_on_error=False)
    progress = RunProgress("lights", STAGES)
    for record in instance.get_records_for_run(result.run_id).records:
        progress.apply(record.event_log_entry)
    return progress


@pytest.fixture(scope="module")
def blocked() -> Iterator[RunProgress]:
    with dg.instance_for_test() as instance:
        yield progress_of([adapter, base, report, gates, endpoint], instance)


def test_stages_end_as_made_or_reused(blocked):
    states = {stage.name: stage.state for stage in blocked.stages.values()}
    assert states == {"adapter": "done", "base": "reused", "report": "done"}, "the endpoint is never reached"
    assert blocked.finished
    assert not blocked.succeeded


def test_a_failed_gate_is_told_with_its_sentence(blocked):
    told = {check.name: (check.asset, check.description, check.stops) for check in blocked.failed_checks}
    assert told == {
        "tool_selection": ("report", "94.0 %, 1.0 points short.", True),
        "speed": ("report", "slow", False),
    }
    assert blocked.errors == [], "a failed check is no error of its own"
    assert "0 of 2 checks passed" in blocked.stages["report"].details()


def test_a_failed_stage_is_told_with_the_platform_s_sentence():
    with dg.instance_for_test() as instance:
        progress = progress_of([broken], instance)
    assert progress.stages["broken"].state == "failed"
    assert progress.errors == ["broken: The port is taken; choose another."]


def test_a_check_that_breaks_is_told_too():
    with dg.instance_for_test() as instance:
        progress = progress_of([base, torn], instance)
    assert progress.failed_checks == []
    assert ["the report is torn" in error for error in progress.errors] == [True]
    assert list(progress.stages) == ["base"], "a check is no stage"


def test_a_running_training_shows_step_loss_and_time_left():
    stage = StageProgress("lora_adapter", "running", 0.0)
    stage.figures = {"step": 3, "steps": 12, "loss": 0.51234, "eta_s": 95.0}
    assert stage.details() == "step 3/12, loss 0.5123, 1 min 35 s left"
    assert stage.share() == 0.25


def test_a_running_evaluation_shows_its_cases():
    stage = StageProgress("eval_report", "running", 0.0)
    stage.figures = {"cases_done": 30, "cases": 120}
    assert stage.details() == "30/120 cases"
    assert stage.share() == 0.25


def test_a_finished_training_whose_step_has_not_ended_is_shown():
    stage = StageProgress("lora_adapter", "running", 0.0, figures={"steps": 12}, note="MLflow run: 1")
    assert stage.share() is None
    assert stage.details() == "MLflow run: 1"


@dg.asset(key=["lights", "evaluation"])
def evaluation(context: dg.AssetExecutionContext) -> None:
    cases: dict[str, Any] = {"what": "cases", "cases_done": 4, "cases": 4, "eta_s": 0.0}
    requests: dict[str, Any] = {"what": "timed requests", "cases_done": 1, "cases": 40}
    for figures in (cases, requests):
        context.log_event(dg.AssetObservation(asset_key=context.asset_key, metadata=figures))


def test_the_time_left_of_the_cases_is_not_that_of_what_follows():
    with dg.instance_for_test() as instance:
        run = dg.materialize([evaluation], instance=instance).run_id
        progress = RunProgress("lights", ["evaluation"])
        shown = []
        for record in instance.get_records_for_run(run, of_type=EVENTS).records:
            progress.apply(record.event_log_entry)
            shown.append(progress.stages["evaluation"].details())
    assert shown == ["", "4/4 cases, 0 s left", "1/40 cases"]


@dg.asset(key=["lights", "sweep"])
def sweep(context: dg.AssetExecutionContext) -> None:
    for figures in ({"step": 4, "steps": 4, "loss": 0.5}, {"what": "serving"}, {"cases_done": 1, "cases": 2}):
        context.log.info("The model server loads.")
        context.log_event(dg.AssetObservation(asset_key=context.asset_key, metadata=figures))


def test_what_trains_and_measures_by_turns_shows_the_one_that_it_does():
    shown = []
    with dg.instance_for_test() as instance:
        run = dg.materialize([sweep], instance=instance).run_id
        progress = RunProgress("lights", ["sweep"])
        for record in instance.get_records_for_run(run).records:
            progress.apply(record.event_log_entry)
            stage = progress.running
            if stage is not None and stage.details() not in shown:
                shown.append(stage.details())
    assert [text for text in shown if text] == ["The model server loads.", "step 4/4, loss 0.5000", "1/2 cases"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (80, "1 min 20 s"), (60 * 23 + 31, "23 min"), (3900, "1 h 05 min")],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_plain_lines_tell_each_change_once_and_how_far_it_is_now_and_then():
    now = [1000.0]
    lines: list[str] = []
    progress = RunProgress("lights", ["adapter"])
    view = PlainView(lines.append, progress, clock=lambda: now[0])
    stage = progress.stages["adapter"] = StageProgress("adapter", "running", 1000.0)
    for _ in range(3):
        view.update()
    assert lines == ["[0 s] adapter: running"]
    stage.figures = {"step": 1, "steps": 4, "loss": 2.0}
    now[0] += 5
    view.update()
    assert len(lines) == 1, "a line every few seconds would drown the log"
    now[0] += 20
    view.update()
    assert lines[1] == "[25 s] adapter: running (step 1/4, loss 2.0000)"
    stage.state, stage.ended = "done", now[0]
    view.update()
    assert lines[2] == "[25 s] adapter: done in 25 s"


def test_the_terminal_shows_stages_and_their_count(blocked):
    screen = io.StringIO()
    console = Console(file=screen, width=100, force_terminal=True, color_system=None)
    console.print(TerminalView(console, blocked).render())
    text = screen.getvalue()
    assert "up to date, reused" in text
    assert "3 of 5 stages" in text
