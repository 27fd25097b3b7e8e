"""Runs on this machine: each in a process group of its own, which can be checked, ended and resumed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from dagster import DagsterRun
from dagster import _check as check
from dagster._core.launcher.base import (
    CheckRunHealthResult,
    LaunchRunContext,
    ResumeRunContext,
    RunLauncher,
    WorkerStatus,
)
from dagster._grpc.types import ExecuteRunArgs, ResumeRunArgs
from dagster._serdes import ConfigurableClass, ConfigurableClassData

from taskagent_platform.errors import PlatformError
from taskagent_platform.launchers.routes import GPUS_TAG
from taskagent_platform.launchers.run_worker import FOLDER, RunWorkers, Worker

_PROGRAM = "dagster"


class LocalRunLauncher(RunLauncher[Any], ConfigurableClass):
    """Executes runs in processes of this machine.

    Args:
        gpus: the GPUs that may be leased.
        gpus_per_run: how many a run takes that does not say otherwise by tag.
        folder: where workers keep their records; in the instance's folder if None.
        patience_s: how long a run that is terminated may take before its processes are killed.
        inst_data: what it was configured with.
    """

    def __init__(
        self,
        gpus: Sequence[str] = (),
        gpus_per_run: int = 0,
        folder: Path | None = None,
        patience_s: float = 45.0,
        inst_data: ConfigurableClassData | None = None,
    ) -> None:
        self.gpus = tuple(gpus)
        self._gpus_per_run = gpus_per_run
        self._folder = folder
        self._patience_s = patience_s
        self._inst_data = inst_data
        self._made: RunWorkers | None = None
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        return self._inst_data

    @classmethod
    def config_type(cls) -> Any:
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]) -> Self:
        return cls(inst_data=inst_data)

    @property
    def workers(self) -> RunWorkers:
        """The workers of the instance."""
        if self._made is None:
            folder = self._folder or Path(self._instance.root_directory) / FOLDER
            self._made = RunWorkers(folder, gpus=self.gpus, patience_s=self._patience_s)
        return self._made

    def launch_run(self, context: LaunchRunContext) -> None:
        """Starts the run's process. Raises NoFreeGpuError where it has to wait."""
        arguments = ExecuteRunArgs(
            job_origin=check.not_none(context.job_code_origin),
            run_id=context.dagster_run.run_id,
            instance_ref=self._instance.get_ref(),
            set_exit_code_on_failure=True,
        )
        self._start(context.dagster_run, arguments.get_command_args(), attempt=0)

    def resume_run(self, context: ResumeRunContext) -> None:
        """Starts another process for a run whose worker was lost; what the lost one left is killed first."""
        self.workers.clear_up(context.dagster_run.run_id)
        arguments = ResumeRunArgs(
            job_origin=check.not_none(context.job_code_origin),
            run_id=context.dagster_run.run_id,
            instance_ref=self._instance.get_ref(),
            set_exit_code_on_failure=True,
        )
        self._start(context.dagster_run, arguments.get_command_args(), attempt=context.resume_attempt_number or 1)

    @property
    def supports_resume_run(self) -> bool:
        return True

    def terminate(self, run_id: str) -> bool:
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        self._instance.report_run_canceling(run)
        if self.workers.stop(run_id):
            return True
        self.workers.clear_up(run_id)
        self._instance.report_run_canceled(run, message="The process of this run was gone before it was terminated.")
        return False

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        worker = self.workers.find(run.run_id)
        if worker is not None:
            return CheckRunHealthResult(WorkerStatus.RUNNING, run_worker_id=_worker_id(worker))
        ending = self.workers.ending(run.run_id)
        self.workers.clear_up(run.run_id)
        # Read again: it may have finished since the caller read it, just before its process ended.
        known = self._instance.get_run_by_id(run.run_id)
        if known is not None and known.is_finished:
            return CheckRunHealthResult(WorkerStatus.SUCCESS)
        if ending is None:
            lost = "The run's process is gone and left no exit status: it was killed together with its supervisor."
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, lost)
        return CheckRunHealthResult(WorkerStatus.FAILED, ending.sentence())

    def get_run_worker_debug_info(self, run: DagsterRun, include_container_logs: bool | None = True) -> str | None:
        return self.workers.log_tail(run.run_id) or None

    def _start(self, run: DagsterRun, command: Sequence[str], *, attempt: int) -> None:
        if command[0] == _PROGRAM:
            # A run that no code server brought names no path; the program of the job's interpreter is meant.
            command = [check.not_none(run.job_code_origin).executable_path, "-m", _PROGRAM, *command[1:]]
        worker = self.workers.start(run.run_id, command, gpus=self._gpus_wanted(run), attempt=attempt)
        held = f" with GPU {', '.join(worker.gpus)}" if worker.gpus else ""
        self._instance.report_engine_event(f"Started {_worker_id(worker)}{held}.", run, cls=self.__class__)

    def _gpus_wanted(self, run: DagsterRun) -> int:
        said = run.tags.get(GPUS_TAG)
        if said is None or not self.gpus:
            return self._gpus_per_run
        try:
            wanted = int(said)
        except ValueError:
            wanted = 0
        if wanted < 1:
            raise PlatformError(f"The run's tag {GPUS_TAG} is {said!r}: it takes a number of GPUs, 1 or more.")
        return wanted


def _worker_id(worker: Worker) -> str:
    return f"process {worker.pid} on {worker.host}"
