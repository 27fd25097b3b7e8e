"""The GPU launcher through a real instance: where runs go, what they hold, how they are ended, lost and resumed."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
from dagster._core.launcher import WorkerStatus
from dagster._core.test_utils import create_test_daemon_workspace_context
from dagster._core.workspace.load_target import ModuleTarget
from dagster._daemon.monitoring import execute_run_monitoring_iteration
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon

from taskagent_platform.errors import PlatformError
from taskagent_platform.launchers.gpu_run_launcher import GpuRunLauncher
from taskagent_platform.launchers.local_run_launcher import LocalRunLauncher
from taskagent_platform.launchers.routes import COMPUTE_TAG, GPUS_TAG, PROCESS_TAG, ROUTE_TAG
from taskagent_platform.process_identity import process_mark
from taskagent_platform_tests.launchers.gpu_jobs import FOLDER_VARIABLE, job

TIMEOUT_S = 280.0
MODULE = "taskagent_platform_tests.launchers.gpu_jobs"
pytestmark = pytest.mark.timeout(900)
LOG = logging.getLogger(__name__)


def configuration(**gpu: Any) -> dict[str, Any]:
    side = {"gpus": ["0", "1"], "patience_s": 4.0, **gpu}
    return {
        "run_launcher": {
            "module": "taskagent_platform.launchers.gpu_run_launcher",
            "class": "GpuRunLauncher",
            "config": {"gpu": {"local": side}, "cpu": {"local": {"patience_s": 4.0}}},
        },
        "run_monitoring": {"enabled": True, "max_resume_run_attempts": 1, "start_timeout_seconds": 300},
        "concurrency": {"pools": {"granularity": "run", "default_limit": 2}},
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def instance(folder) -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test(overrides=configuration()) as made:
        yield made
        workers_of(made).stop_all()


def launcher_of(instance: dg.DagsterInstance) -> GpuRunLauncher:
    launcher = instance.run_launcher
    assert isinstance(launcher, GpuRunLauncher)
    return launcher


def workers_of(instance: dg.DagsterInstance) -> Any:
    launcher = launcher_of(instance).delegate("gpu")
    assert isinstance(launcher, LocalRunLauncher)
    return launcher.workers


def new_run(instance: dg.DagsterInstance, name: str, **more: Any) -> str:
    from dagster._core.remote_origin import InProcessCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
    from dagster._core.types.loadable_target_origin import LoadableTargetOrigin

    reconstructable = dg.build_reconstructable_job(MODULE, "job", (name,))
    location = InProcessCodeLocationOrigin(LoadableTargetOrigin(module_name=MODULE), location_name=MODULE)
    return instance.create_run_for_job(
        job(name),
        job_code_origin=reconstructable.get_python_origin(),
        remote_job_origin=RemoteJobOrigin(RemoteRepositoryOrigin(location, "__repository__"), name),
        **more,
    ).run_id


def launch(instance: dg.DagsterInstance, name: str, **more: Any) -> str:
    run_id = new_run(instance, name, **more)
    instance.launch_run(run_id, workspace=None)  # type: ignore[arg-type]
    return run_id


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def seen(folder: Path, name: str, attempt: int = 0) -> tuple[str, int, int]:
    """Returns what a job saw once it works: its GPUs, its pid and its child's."""
    path = folder / f"{name}.{attempt}"
    wait_for(path.exists)
    gpus, pid, child = path.read_text().rsplit(" ", 2)
    return gpus, int(pid), int(child)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def status(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


def tags(instance: dg.DagsterInstance, run_id: str) -> Any:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run.tags


def side_of(instance: dg.DagsterInstance, run_id: str) -> str:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return launcher_of(instance).side_of(run)


def health(instance: dg.DagsterInstance, run_id: str) -> Any:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return launcher_of(instance).check_run_worker_health(run)


@pytest.mark.parametrize(
    ("name", "tagged", "side"),
    [
        ("train", {}, "gpu"),
        ("write", {}, "cpu"),
        ("both", {}, "gpu"),
        ("train", {COMPUTE_TAG: "cpu"}, "cpu"),
        ("write", {COMPUTE_TAG: "gpu"}, "gpu"),
    ],
)
def test_the_tag_decides_and_else_what_is_selected(instance, name, tagged, side):
    assert side_of(instance, new_run(instance, name, tags=tagged)) == side


def test_a_part_of_a_job_without_gpu_work_goes_to_the_cpu_side(instance):
    run_id = new_run(instance, "both", asset_selection=frozenset({dg.AssetKey("written")}))
    assert side_of(instance, run_id) == "cpu"


def test_an_unknown_side_is_refused(instance):
    run_id = new_run(instance, "train", tags={COMPUTE_TAG: "tpu"})
    with pytest.raises(PlatformError, match="'tpu'; it takes gpu or cpu"):
        side_of(instance, run_id)


@pytest.mark.slow
def test_runs_hold_different_gpus_until_they_end_and_the_cpu_side_holds_none(instance, folder):
    first = launch(instance, "train")
    assert seen(folder, "trained")[0] == "0"
    second = launch(instance, "train")
    assert seen(folder, "trained", 1)[0] == "1"
    other = launch(instance, "write")
    seen(folder, "written")
    assert tags(instance, first)[ROUTE_TAG] == "gpu:local"
    assert tags(instance, other)[ROUTE_TAG] == "cpu:local"
    assert workers_of(instance).leases() == {"0": first, "1": second}
    assert health(instance, first).status == WorkerStatus.RUNNING
    (folder / "go").touch()
    wait_for(lambda: all(status(instance, run) == dg.DagsterRunStatus.SUCCESS for run in (first, second, other)))
    wait_for(lambda: workers_of(instance).leases() == {})
    assert health(instance, first).status == WorkerStatus.SUCCESS
    assert workers_of(instance).ending(first).code == 0
    assert all(is_gone(seen(folder, "trained", attempt)[2]) for attempt in (0, 1)), "children end with their run"


@pytest.mark.slow
def test_a_run_that_finds_no_free_gpu_waits_in_the_queue(instance, folder):
    launch(instance, "train", tags={GPUS_TAG: "2"})
    assert seen(folder, "trained")[0] == "0,1"
    waiting = launch(instance, "train")
    assert status(instance, waiting) == dg.DagsterRunStatus.QUEUED
    said = [entry.message for entry in instance.all_logs(waiting)]
    assert any("0 of 2 GPUs are free and 1 are needed: GPU 0 by run" in (text or "") for text in said)


def test_a_run_that_wants_more_gpus_than_there_are_fails_and_says_so(instance):
    run_id = new_run(instance, "train", tags={GPUS_TAG: "3"})
    with pytest.raises(PlatformError, match="asks for 3 GPUs and there are 2"):
        instance.launch_run(run_id, workspace=None)
    assert status(instance, run_id) == dg.DagsterRunStatus.FAILURE


@pytest.mark.slow
def test_terminating_ends_the_run_its_children_and_its_lease(instance, folder):
    run_id = launch(instance, "train")
    _, pid, child = seen(folder, "trained")
    assert launcher_of(instance).terminate(run_id)
    wait_for(lambda: status(instance, run_id) == dg.DagsterRunStatus.CANCELED)
    wait_for(lambda: is_gone(pid) and is_gone(child))
    wait_for(lambda: workers_of(instance).leases() == {})
    assert not launcher_of(instance).terminate(run_id), "it is over"


@pytest.mark.slow
def test_a_run_that_will_not_end_is_killed_after_a_while(instance, folder):
    run_id = launch(instance, "defy")
    _, pid, child = seen(folder, "stubborn")
    assert launcher_of(instance).terminate(run_id)
    wait_for(lambda: is_gone(pid) and is_gone(child))
    wait_for(lambda: workers_of(instance).find(run_id) is None)
    assert workers_of(instance).ending(run_id).asked


@pytest.mark.slow
def test_a_killed_run_is_told_apart_and_its_lease_taken_back(instance, folder):
    run_id = launch(instance, "train")
    _, pid, child = seen(folder, "trained")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: workers_of(instance).find(run_id) is None)
    found = health(instance, run_id)
    assert found.status == WorkerStatus.FAILED
    assert "most likely for want of memory" in found.msg
    assert workers_of(instance).leases() == {}
    wait_for(lambda: is_gone(child))


@pytest.mark.slow
def test_what_a_lost_supervisor_leaves_is_killed_before_its_gpu_is_leased_again(instance, folder):
    run_id = launch(instance, "train", tags={GPUS_TAG: "2"})
    _, pid, child = seen(folder, "trained")
    supervisor = workers_of(instance).find(run_id).pid
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: is_gone(supervisor))
    wait_for(lambda: is_gone(pid))
    assert not is_gone(child), "the kernel ends the run's process alone"
    launch(instance, "train")
    assert seen(folder, "trained", 1)[0] == "0"
    assert is_gone(child)
    assert health(instance, run_id).status == WorkerStatus.NOT_FOUND


def test_a_machine_without_a_gpu_does_the_work_on_the_cpu_side(folder):
    with dg.instance_for_test(overrides=configuration(gpus=[])) as instance:
        assert side_of(instance, new_run(instance, "train")) == "cpu"
        asked = new_run(instance, "train", tags={COMPUTE_TAG: "gpu"})
        with pytest.raises(PlatformError, match="this machine has none that can be leased"):
            side_of(instance, asked)


@pytest.fixture
def own_process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that executes a run by itself, as `taskagent demo` starts one."""
    made = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    yield made
    made.kill()
    made.wait()


def own_run(instance: dg.DagsterInstance, process: subprocess.Popen[bytes]) -> str:
    mark = process_mark(psutil.Process(process.pid))
    return new_run(instance, "train", status=dg.DagsterRunStatus.STARTED, tags={PROCESS_TAG: mark})


def test_a_run_in_a_process_of_its_own_is_left_to_it_and_fails_with_it(instance, own_process):
    with create_test_daemon_workspace_context(
        ModuleTarget(module_name=MODULE, attribute=None, working_directory=None, location_name=MODULE), instance
    ) as workspace:
        run_id = own_run(instance, own_process)
        list(execute_run_monitoring_iteration(workspace, LOG))
        assert status(instance, run_id) == dg.DagsterRunStatus.STARTED
        own_process.kill()
        own_process.wait()
        list(execute_run_monitoring_iteration(workspace, LOG))
    assert status(instance, run_id) == dg.DagsterRunStatus.FAILURE
    assert workers_of(instance).find(run_id) is None, "nobody waits for it, so it is not resumed"


def test_terminating_a_run_in_a_process_of_its_own_interrupts_that(instance, own_process):
    run_id = own_run(instance, own_process)
    assert launcher_of(instance).terminate(run_id)
    assert own_process.wait(30) == -signal.SIGINT
    assert status(instance, run_id) == dg.DagsterRunStatus.CANCELING


@pytest.mark.slow
def test_run_monitoring_resumes_a_lost_run_once_and_then_fails_it(instance, folder):
    with create_test_daemon_workspace_context(
        ModuleTarget(module_name=MODULE, attribute=None, working_directory=None, location_name=MODULE), instance
    ) as workspace:
        run_id = launch(instance, "train")
        for attempt in (0, 1):
            _, pid, _ = seen(folder, "trained", attempt)
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: workers_of(instance).find(run_id) is None)
            list(execute_run_monitoring_iteration(workspace, LOG))
        assert status(instance, run_id) == dg.DagsterRunStatus.FAILURE
        said = " ".join(entry.message or "" for entry in instance.all_logs(run_id))
        assert "Resuming run" in said
        assert "was killed (SIGKILL), most likely for want of memory" in said


@pytest.mark.slow
def test_the_queue_daemon_keeps_the_pool_s_limit_and_offers_waiting_runs_again(instance, folder):
    with create_test_daemon_workspace_context(
        ModuleTarget(module_name=MODULE, attribute=None, working_directory=None, location_name=MODULE), instance
    ) as workspace:
        daemon = QueuedRunCoordinatorDaemon(interval_seconds=1)

        def offer() -> None:
            list(daemon.run_iteration(workspace, fixed_iteration_time=None))

        greedy, *others = [new_run(instance, "train", tags=tagged) for tagged in ({GPUS_TAG: "2"}, {}, {})]
        for run_id in (greedy, *others):
            instance.submit_run(run_id, workspace.create_request_context())
        offer()
        assert seen(folder, "trained")[0] == "0,1"
        # The pool has two slots and the second run comes as far as the launcher, which has no GPU left for it.
        assert [status(instance, run_id) for run_id in others] == [dg.DagsterRunStatus.QUEUED] * 2
        launcher_of(instance).terminate(greedy)
        wait_for(lambda: status(instance, greedy) == dg.DagsterRunStatus.CANCELED)
        wait_for(lambda: workers_of(instance).leases() == {})
        offer()
        seen(folder, "trained", 2)
        assert set(workers_of(instance).leases().values()) == set(others)
        with suppress(StopIteration):
            daemon.__exit__(None, None, None)
