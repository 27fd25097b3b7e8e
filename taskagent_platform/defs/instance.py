"""The Dagster instance of the platform: one, under the home folder, for the command line and the web page alike."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from taskagent_platform.launchers.routes import PROCESS_TAG, ROUTE_TAG
from taskagent_platform.process_identity import marked_process
from taskagent_platform.settings import Settings

if TYPE_CHECKING:  # printing the command line's help must not wait for Dagster
    from dagster import DagsterInstance

_CONFIGURATION = """\
# Written by taskagent, which leaves it alone from now on.
storage:
  sqlite:
    base_dir:
      env: DAGSTER_HOME
compute_logs:
  module: dagster._core.storage.local_compute_log_manager
  class: LocalComputeLogManager
  config:
    base_dir:
      env: DAGSTER_HOME
# One run at a time computes on the accelerator (the assets of the pool `gpu`), or on as many GPUs as the machine has:
# `dagster instance concurrency set gpu 2` raises the limit. The others wait in the queue, and so does a second retrain
# of the same domain.
concurrency:
  runs:
    max_concurrent_runs: 4
    tag_concurrency_limits:
      - key: taskagent/retrain
        value:
          applyLimitPerUniqueValue: true
        limit: 1
  pools:
    default_limit: 1
    granularity: run
run_launcher:
  module: taskagent_platform.launchers.gpu_run_launcher
  class: GpuRunLauncher
  config:
    gpu:
      local: {}
    cpu:
      local: {}
# A run whose process is lost is gone on with once, from what it had finished; then it counts as failed.
run_monitoring:
  enabled: true
  start_timeout_seconds: 300
  cancel_timeout_seconds: 120
  max_resume_run_attempts: 1
  poll_interval_seconds: 30
telemetry:
  enabled: false
nux:
  enabled: false
"""


def prepare_instance(settings: Settings) -> Path:
    """Returns the instance's folder, made and configured if it is new."""
    folder = settings.home / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "dagster.yaml"
    if not file.exists():
        scratch = file.with_name(f".dagster.yaml.{os.getpid()}.partial")
        scratch.write_text(_CONFIGURATION)
        scratch.replace(file)
    return folder


def instance_environment(settings: Settings) -> dict[str, str]:
    """Returns the environment of a process that works on the instance."""
    return {**os.environ, "DAGSTER_HOME": str(prepare_instance(settings)), "TASKAGENT_HOME": str(settings.home)}


def open_instance(settings: Settings) -> "DagsterInstance":
    """Opens the instance in this process."""
    from dagster import DagsterInstance

    os.environ["DAGSTER_HOME"] = str(prepare_instance(settings))
    return DagsterInstance.get()


def report_canceling(settings: Settings, run_id: str) -> None:
    """Says of a run that it is being ended, so that its end is no failure and no daemon resumes it."""
    with open_instance(settings) as instance:
        run = instance.get_run_by_id(run_id)
        if run is not None and not run.is_finished:
            instance.report_run_canceling(run)


def close_abandoned_runs(instance: "DagsterInstance") -> list[str]:
    """Marks runs as failed that still count as running but whose process is gone; returns their ids.

    Runs that the launcher sent somewhere are left to the daemon's monitoring: their process may be in a container, and
    what is lost is gone on with.
    """
    from dagster import DagsterRunStatus, RunsFilter

    going = [DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]
    closed = []
    for run in instance.get_runs(filters=RunsFilter(statuses=going)):
        mark = run.tags.get(PROCESS_TAG)
        if mark is not None and ROUTE_TAG not in run.tags and marked_process(mark) is None:
            instance.report_run_failed(run, "The process of this run ended without finishing it.")
            closed.append(run.run_id)
    return closed
